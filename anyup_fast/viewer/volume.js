"use strict";

// Features of one map: K planes of bytes, value = scale[k] * byte + offset[k].
{
  const { PageError, fromDataUrl } = Anyup.base;
  const PLANES_AT_ONCE = 8;

  class Volume {
    constructor(planes, scale, offset, width, height) {
      Object.assign(this, { planes, scale, offset, width, height, count: width * height });
      this.sums = new Int32Array(this.count);
      this.inverse = this.inverseNorms();
    }

    static async read({ scale, offset, image, columns = 1 }, width, height) {
      const { pixels, ...size } = await Anyup.png.decode(fromDataUrl(image));
      const blocks = Math.ceil(scale.length / columns);
      if (size.width !== columns * width || size.height !== blocks * height) {
        throw new PageError(
          `an image of features is ${size.width} x ${size.height} pixels, not ${columns * width} x ${blocks * height}`,
        );
      }
      const planes = scale.map((_, k) => cutPlane(pixels, k, columns, width, height));
      return new Volume(planes, scale, offset, width, height);
    }

    inverseNorms() {
      const squares = new Float64Array(this.count);
      this.planes.forEach((bytes, k) => {
        const table = Float64Array.from({ length: 256 }, (_, byte) => (this.scale[k] * byte + this.offset[k]) ** 2);
        for (let i = 0; i < squares.length; i++) squares[i] += table[bytes[i]];
      });
      return Float32Array.from(squares, (square) => (square > 0 ? 1 / Math.sqrt(square) : 0));
    }

    // The vector z (K) of one pixel.
    at(index) {
      return Float32Array.from(this.planes, (bytes, k) => this.scale[k] * bytes[index] + this.offset[k]);
    }

    // Dot products of `query` (K) with every pixel as whole numbers: query . z = step * sums[i] + constant.
    // The weights are as fine as 31 bits allow (17 or more bits a weight), and integers are what scripts add fastest.
    project(query) {
      const weights = this.scale.map((scale, k) => scale * query[k]);
      const total = weights.reduce((sum, weight) => sum + Math.abs(weight), 0);
      const step = total > 0 ? (255 * total) / 2147480000 : 1;
      const whole = weights.map((weight) => Math.round(weight / step));
      const constant = this.offset.reduce((sum, offset, k) => sum + offset * query[k], 0);
      this.sums.fill(0);
      let k = 0;
      for (; k + PLANES_AT_ONCE <= whole.length; k += PLANES_AT_ONCE) addEight(this.sums, this.planes, whole, k);
      for (; k < whole.length; k++) addOne(this.sums, this.planes[k], whole[k]);
      return { sums: this.sums, step, constant };
    }

    // query . z of every pixel.
    dots(query, out = new Float32Array(this.count)) {
      const { sums, step, constant } = this.project(query);
      for (let i = 0; i < out.length; i++) out[i] = step * sums[i] + constant;
      return out;
    }

    // Cosine of every pixel with a query of length one.
    cosines(query, out = new Float32Array(this.count)) {
      const { inverse } = this;
      const { sums, step, constant } = this.project(query);
      for (let i = 0; i < out.length; i++) out[i] = (step * sums[i] + constant) * inverse[i];
      return out;
    }

    // The same as colours: `table` (256 colours) from `low` to `high`, into pixels (Uint32Array).
    paintCosines(query, table, low, high, pixels) {
      const { inverse } = this;
      const { sums, step, constant } = this.project(query);
      const gain = 255 / (high - low);
      const slope = gain * step;
      const start = gain * constant;
      const shift = 0.5 - gain * low;
      for (let i = 0; i < pixels.length; i++) {
        const place = (slope * sums[i] + start) * inverse[i] + shift;
        pixels[i] = table[place <= 0 ? 0 : place >= 255 ? 255 : place | 0];
      }
    }
  }

  function cutPlane(pixels, k, columns, width, height) {
    if (columns === 1) return pixels.subarray(k * width * height, (k + 1) * width * height);
    const out = new Uint8Array(width * height);
    const start = Math.floor(k / columns) * height * columns * width + (k % columns) * width;
    for (let row = 0; row < height; row++) {
      const from = start + row * columns * width;
      out.set(pixels.subarray(from, from + width), row * width);
    }
    return out;
  }

  function addEight(sums, planes, weights, k) {
    const [a, b, c, d, e, f, g, h] = planes.slice(k, k + PLANES_AT_ONCE);
    const [wa, wb, wc, wd, we, wf, wg, wh] = weights.slice(k, k + PLANES_AT_ONCE);
    for (let i = 0; i < sums.length; i++) {
      const first = Math.imul(wa, a[i]) + Math.imul(wb, b[i]) + Math.imul(wc, c[i]) + Math.imul(wd, d[i]);
      const second = Math.imul(we, e[i]) + Math.imul(wf, f[i]) + Math.imul(wg, g[i]) + Math.imul(wh, h[i]);
      sums[i] = (sums[i] + ((first | 0) + (second | 0))) | 0;
    }
  }

  function addOne(sums, plane, weight) {
    for (let i = 0; i < sums.length; i++) sums[i] = (sums[i] + Math.imul(weight, plane[i])) | 0;
  }

  Anyup.Volume = Volume;
}
