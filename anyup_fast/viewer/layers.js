"use strict";

// What a side of the picture can show, and how it is drawn at the picture's own size.
{
  const { canvas, clamp } = Anyup.base;
  const { packed } = Anyup.colours;
  const OUTSIDE = packed([0, 0, 0], 120); // shade over the cells that a pixel cannot look at

  // {id, group, title, tag} of everything that the page can show of a picture.
  function list(data, picture) {
    const views = data.views.flatMap(({ name }) => {
      const shown = name === "mean" ? "Mean" : name;
      return [
        { id: `low:${name}`, group: "Features", title: `${shown}, low-res`, tag: `${shown} · low-res` },
        { id: `high:${name}`, group: "Features", title: `${shown}, high-res`, tag: `${shown} · high-res` },
      ];
    });
    return [
      { id: "photo", group: "Picture", title: "Photograph", tag: "Photograph" },
      ...views,
      { id: "low:similarity", group: "Similarity", title: "Similarity, low-res", tag: "Similarity · low-res" },
      { id: "high:similarity", group: "Similarity", title: "Similarity, high-res", tag: "Similarity · high-res" },
      { id: "labels", group: "Labels", title: "Label map", tag: "Labels" },
      ...(picture?.meta.attention
        ? [{ id: "attention", group: "Attention", title: "Attention", tag: "Attention" }]
        : []),
    ];
  }

  // Kinds of change after which a layer has to be drawn again.
  function needs(id) {
    if (id === "photo") return ["labels", "style"];
    if (id === "labels") return ["labels", "style"];
    if (id === "attention" || id.endsWith(":similarity")) return ["pointer", "style"];
    return [];
  }

  class Layers {
    constructor(data, picture) {
      Object.assign(this, { data, picture });
      this.made = new Map();
    }

    keep(key, make) {
      if (!this.made.has(key)) this.made.set(key, make());
      return this.made.get(key);
    }

    // A picture of features: colours = weight @ z + bias.
    view(id) {
      return this.keep(id, () => {
        const [resolution, name] = [id.slice(0, id.indexOf(":")), id.slice(id.indexOf(":") + 1)];
        const { weight, bias } = this.data.views.find((view) => view.name === name);
        const volume = this.picture[resolution];
        const bands = weight.map((row, band) => volume.dots(row).map((value) => 255 * clamp(value + bias[band], 0, 1)));
        const [red, green, blue] = bands.length === 3 ? bands : [bands[0], bands[0], bands[0]];
        return painted(volume.width, volume.height, (pixels) => {
          for (let i = 0; i < pixels.length; i++) {
            pixels[i] = packed([Math.round(red[i]), Math.round(green[i]), Math.round(blue[i])]);
          }
        });
      });
    }

    attention(point, table) {
      const { weights, inside, ...nearest } = this.picture.attentionAt(point);
      const most = weights.reduce((a, b) => Math.max(a, b), 0) || 1;
      const { width, height } = this.picture.low;
      const image = painted(width, height, (pixels) => {
        for (let i = 0; i < pixels.length; i++) {
          pixels[i] = inside[i] ? table[Math.round((255 * weights[i]) / most)] : OUTSIDE;
        }
      });
      return { image, most, ...nearest };
    }

    // The label map as colours, and the edges of its regions alone.
    labels(map) {
      const { width, height } = this.picture.high;
      const colours = map.classes.map((one) => packed(Anyup.colours.classes[one.colour].rgb));
      const fill = painted(width, height, (pixels) => {
        if (colours.length) for (let i = 0; i < pixels.length; i++) pixels[i] = colours[map.labels[i]];
      });
      const edges = painted(width, height, (pixels) => {
        if (colours.length > 1) drawEdges(pixels, map.labels, colours, width, height);
      });
      return { fill, edges };
    }
  }

  function drawEdges(pixels, labels, colours, width, height) {
    const mark = (i, j) => {
      if (labels[i] !== labels[j]) {
        pixels[i] = colours[labels[i]];
        pixels[j] = colours[labels[j]];
      }
    };
    for (let row = 0; row < height; row++) {
      for (let column = 0, i = row * width; column < width; column++, i++) {
        if (column + 1 < width) mark(i, i + 1);
        if (row + 1 < height) mark(i, i + width);
      }
    }
  }

  function painted(width, height, paint) {
    const made = canvas(width, height);
    const context = made.getContext("2d");
    const image = context.createImageData(width, height);
    paint(new Uint32Array(image.data.buffer));
    context.putImageData(image, 0, 0);
    return made;
  }

  // Draws layer `id` into a context of the picture's size.
  function draw(context, id, { layers, similarity, labels, attention, mapOpacity, labelOpacity, outline }) {
    const { width, height } = context.canvas;
    const put = (image, alpha = 1, size = [width, height]) => {
      context.globalAlpha = alpha;
      context.drawImage(image, 0, 0, ...size);
      context.globalAlpha = 1;
    };
    const cells = layers.picture.cellsSize;
    context.imageSmoothingEnabled = false;
    const base = id === "photo" || id === "labels" || id === "attention" || id.endsWith(":similarity");
    if (base) put(layers.picture.photo);
    if (id === "photo" && outline && labels) put(labels.edges);
    else if (id === "labels" && labels) {
      put(labels.fill, labelOpacity);
      put(labels.edges);
    } else if (id === "attention" && attention) put(attention.image, mapOpacity, cells);
    else if (id === "low:similarity") put(similarity.low.canvas, mapOpacity, cells);
    else if (id === "high:similarity") put(similarity.high.canvas, mapOpacity);
    else if (!base) put(layers.view(id), 1, id.startsWith("low:") ? cells : [width, height]);
  }

  Anyup.layers = { list, needs, draw, Layers };
}
