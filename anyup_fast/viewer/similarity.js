"use strict";

// Similarity of every pixel to a query, as colours: by the graphics card where there is one, else by the script.
{
  const { unit, canvas } = Anyup.base;

  class ScriptPainter {
    constructor(volume) {
      this.volume = volume;
      this.canvas = canvas(volume.width, volume.height);
      this.context = this.canvas.getContext("2d");
      this.image = this.context.createImageData(volume.width, volume.height);
      this.pixels = new Uint32Array(this.image.data.buffer);
    }

    paint(query, table, low, high) {
      this.volume.paintCosines(query, table, low, high, this.pixels);
      this.context.putImageData(this.image, 0, 0);
    }
  }

  class Similarity {
    constructor(picture, path) {
      this.picture = picture;
      this.low = new ScriptPainter(picture.low);
      this.high = (path === "webgl" && Anyup.webgl.painter(picture.high)) || new ScriptPainter(picture.high);
      this.path = this.high instanceof ScriptPainter ? "script" : "webgl";
      this.cosines = new Float32Array(picture.low.count);
    }

    // Query vectors of length one for the high-res and the low-res map.
    queries({ anchor, prompt }) {
      if (prompt) return [prompt.weight, prompt.weight];
      return [anchor.vector, anchor.coarse].map((vector) => unit(vector) ?? new Float32Array(vector.length));
    }

    // Paints both maps. Their scale is one: fixed, or fitted to the low-res map.
    update({ anchor, prompt, table, fit }) {
      const [query, coarse] = this.queries({ anchor, prompt });
      this.query = query;
      [this.from, this.to] = [0, 1];
      if (fit) {
        this.picture.low.cosines(coarse, this.cosines);
        let [least, most] = [1, -1];
        for (const value of this.cosines) {
          if (value < least) least = value;
          if (value > most) most = value;
        }
        this.from = Math.floor(least * 100) / 100;
        this.to = prompt || anchor.picture !== this.picture.index ? Math.ceil(most * 100) / 100 : 1;
        if (this.to - this.from < 0.01) this.from = this.to - 0.01;
      }
      this.low.paint(coarse, table, this.from, this.to);
      this.high.paint(query, table, this.from, this.to);
    }

    // Cosine of one pixel with the query that was painted last.
    at(point) {
      const vector = unit(this.picture.vectorAt(point));
      return vector ? Anyup.base.dot(vector, this.query) : 0;
    }
  }

  Anyup.similarity = { Similarity };
}
