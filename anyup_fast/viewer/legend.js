"use strict";

// Sentences and scales that say what is shown, and the line about the pixel under the pointer.
{
  const { byId, element, dot } = Anyup.base;

  function number(value) {
    return (Math.abs(value) >= 100 ? value.toFixed(0) : value.toFixed(2)).replace("-", "−");
  }

  function scale(gradient, from, to) {
    const bar = element("i", {});
    bar.style.background = gradient;
    return element("div", { class: "scale" }, element("span", { text: from }), bar, element("span", { text: to }));
  }

  function keys(entries) {
    const made = entries.map(({ css, name }) => {
      const swatch = element("i", {});
      swatch.style.background = css;
      return element("span", {}, swatch, name);
    });
    return element("div", { class: "keys" }, ...made);
  }

  function pixel({ row, column }) {
    return `row ${row}, column ${column}`;
  }

  // Ends of the grey scale as channel means, where a view of one band is proportional to the mean.
  function meanEnds({ weight: [weight], bias: [bias] }, { basis, directions, channels }) {
    const mean = Float64Array.from({ length: directions }, (_, k) => {
      let sum = 0;
      for (let channel = 0; channel < channels; channel++) sum += basis[k * channels + channel];
      return sum / channels;
    });
    const square = dot(mean, mean);
    const slope = square > 0 ? dot(weight, mean) / square : 0;
    const rest = weight.reduce((sum, value, k) => sum + (value - slope * mean[k]) ** 2, 0);
    if (!slope || rest > 1e-4 * dot(weight, weight)) return ["0", "1"];
    return [number(-bias / slope), number((1 - bias) / slope)];
  }

  function ofView(name, resolution, { data, picture }) {
    const view = data.views.find((one) => one.name === name);
    const [height, width] = resolution === "low" ? picture.grid : [picture.height, picture.width];
    const what = resolution === "low" ? "Low-res" : "High-res";
    if (view.weight.length === 3) {
      const parts = ["#c8443a", "#2f8f46", "#3f6fd1"].map((css, i) => ({ css, name: `direction ${i + 1}` }));
      return [`${what} features as ${name}, ${height} × ${width}`, keys(parts)];
    }
    const [from, to] = meanEnds(view, data);
    const title = name === "mean" ? "mean of their channels" : name;
    const greys = Anyup.colours.gradient("grey");
    return [`${what} features as ${title}, ${height} × ${width}`, scale(greys, from, to)];
  }

  // [sentence, picture of the scale or null] of a layer.
  function describe(id, page) {
    const { state, picture, similarity, attention, labels } = page;
    const gradient = Anyup.colours.gradient(state.map);
    if (id === "photo") {
      const edged = state.outline && labels.labelled.length > 1;
      const words = `Photograph, ${picture.height} × ${picture.width} pixels`;
      return edged ? [`${words}, with the outline of the labels`, classKeys(labels)] : [words, null];
    }
    if (id === "labels") {
      if (!labels.labelled.length) return ["Labels: click into the picture to set the first point", null];
      return ["Labels: nearest prototype by cosine", classKeys(labels)];
    }
    if (id === "attention") {
      if (!attention) return ["Attention", null];
      const words =
        `Attention, mean of the heads, at ${pixel(attention)}: ` +
        `the nearest of the pixels kept, one in ${picture.meta.attention.step} each way`;
      return [words, scale(gradient, "0", attention.most.toFixed(3))];
    }
    if (id.endsWith(":similarity")) {
      const where = id.startsWith("low") ? "Low-res cosine" : "Cosine";
      const ends = [number(similarity.from), number(similarity.to)];
      if (state.fit) ends[0] = `≤ ${ends[0]}`;
      if (state.fit && similarity.to < 1) ends[1] = `≥ ${ends[1]}`;
      return [`${where} to ${query(page)}`, scale(gradient, ...ends)];
    }
    const at = id.indexOf(":");
    return ofView(id.slice(at + 1), id.slice(0, at), page);
  }

  function classKeys(labels) {
    return keys(labels.labelled.map((one) => ({ css: Anyup.colours.classes[one.colour].css, name: one.name })));
  }

  function query({ state, data, anchor, picture }) {
    if (state.prompt !== null) return `“${data.prompts[state.prompt].name}”`;
    const elsewhere = anchor.picture === picture.index ? "" : ` of ${data.pictures[anchor.picture].name}`;
    return `${state.pinned ? "the pinned pixel at" : "the pixel at"} ${pixel(anchor)}${elsewhere}`;
  }

  function drawOne(place, [sentence, extra]) {
    place.replaceChildren(element("p", { text: sentence, title: sentence }), ...(extra ? [extra] : []));
  }

  // Both sides; one legend where they show the same.
  function draw(page) {
    const [left, right] = page.sides;
    drawOne(byId("legend-left"), describe(left, page));
    byId("legend-right").hidden = left === right;
    if (left !== right) drawOne(byId("legend-right"), describe(right, page));
  }

  // One line: pixel, cell, similarity, label.
  function readout({ picture, state, similarity, labels }) {
    const { pointer } = state;
    const cell = picture.cellOf(pointer);
    const parts = [`Row ${pointer.row}, column ${pointer.column}`, `cell ${cell.row}, ${cell.column}`];
    if (state.pinned || state.prompt !== null) parts.push(`similarity ${similarity.at(pointer).toFixed(3)}`);
    if (labels.labelled.length) {
      const vector = picture.vectorAt(pointer);
      const close = labels.labelled.map((one) => [Anyup.labels.closeness(one, vector), one.name]);
      const [cosine, name] = close.reduce((best, next) => (next[0] > best[0] ? next : best));
      parts.push(`${name} (${cosine.toFixed(3)})`);
    }
    return parts.join(" · ");
  }

  Anyup.legend = { draw, readout, query };
}
