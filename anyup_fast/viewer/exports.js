"use strict";

// What leaves the page as a file.
{
  const { element, canvas } = Anyup.base;

  function download(blob, name) {
    const url = URL.createObjectURL(blob);
    const link = element("a", { href: url, download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 60000);
    return name;
  }

  function stem(name) {
    return name.replace(/\.(jpe?g|png|webp|tiff?|bmp|gif|avif)$/i, "") || name;
  }

  // Numbers are those of `classes`: the ones that have a prototype, in the order in which they are shown.
  async function labelMap(picture, map) {
    const palette = map.classes.map((one) => Anyup.colours.classes[one.colour].rgb);
    const blob = await Anyup.png.encodePalette(picture.width, picture.height, map.labels, palette);
    return download(blob, `${stem(picture.name)}.labels.png`);
  }

  // What the stage shows of the whole picture, at the picture's own size: both sides, without points.
  async function shown(picture, [left, right], cut) {
    const made = canvas(picture.width, picture.height);
    const context = made.getContext("2d");
    const column = Math.round(cut);
    context.drawImage(left, 0, 0);
    if (column < picture.width) {
      const rest = [column, 0, picture.width - column, picture.height];
      context.drawImage(right, ...rest, ...rest);
    }
    const blob = await new Promise((resolve) => made.toBlob(resolve, "image/png"));
    if (!blob) throw new Anyup.base.PageError("The browser could not write this picture as PNG; try a smaller one.");
    return download(blob, `${stem(picture.name)}.view.png`);
  }

  // weight (classes, channels) = prototypes @ basis, as `anyup-fast upsample --head` reads it.
  function head(data, classes) {
    const { channels, directions, basis } = data;
    const values = new Float32Array(classes.length * channels);
    classes.forEach((one, row) => {
      const direction = Anyup.labels.prototype(one);
      for (let channel = 0; channel < channels; channel++) {
        let sum = 0;
        for (let k = 0; k < directions; k++) sum += direction[k] * basis[k * channels + channel];
        values[row * channels + channel] = sum;
      }
    });
    const metadata = {
      classes: JSON.stringify(classes.map((one) => one.name)),
      ...(data.encoder ? { encoder: data.encoder } : {}),
      kind: "prototype",
    };
    const tensors = { weight: { shape: [classes.length, channels], values } };
    return download(Anyup.safetensors.write(tensors, metadata), "head.safetensors");
  }

  Anyup.exports = { labelMap, shown, head };
}
