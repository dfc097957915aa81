"use strict";

// Pictures of the page. Their features are decoded when they are first shown; the last few stay decoded.
{
  const { PageError, fromDataUrl, clamp } = Anyup.base;
  const KEPT = 3;

  class Picture {
    constructor(meta, index, photo, high, low) {
      Object.assign(this, { ...meta, meta, index, photo, high, low });
      this.attentionPixels = null;
    }

    static async open(meta, index) {
      const [height, width] = meta.grid;
      const opened = await Promise.allSettled([
        openPhoto(meta),
        Anyup.Volume.read(meta.high, meta.width, meta.height),
        Anyup.Volume.read(meta.low, width, height),
      ]);
      const failed = opened.find((result) => result.status === "rejected");
      if (failed) {
        throw new PageError(
          `The picture ${meta.name} cannot be shown: ${failed.reason.message}. ` +
            "Open the page in a current browser (of 2024 or later), or write it anew: the file may be damaged.",
          { cause: failed.reason },
        );
      }
      return new Picture(meta, index, ...opened.map((result) => result.value));
    }

    // Size of the low-res map in pixels: its last cells may reach beyond the picture.
    get cellsSize() {
      return [this.grid[1] * this.patch[1], this.grid[0] * this.patch[0]];
    }

    indexOf({ row, column }) {
      return row * this.width + column;
    }

    // The low-res cell that a pixel lies in.
    cellOf({ row, column }) {
      const [height, width] = this.grid;
      return {
        row: Math.min(Math.floor(row / this.patch[0]), height - 1),
        column: Math.min(Math.floor(column / this.patch[1]), width - 1),
      };
    }

    vectorAt(point) {
      return this.high.at(this.indexOf(point));
    }

    lowVectorAt(point) {
      const cell = this.cellOf(point);
      return this.low.at(cell.row * this.low.width + cell.column);
    }

    // Weights of the lattice point nearest to a pixel, over the cells of the low-res map.
    async openAttention() {
      if (this.meta.attention && !this.attentionPixels) {
        const { pixels, width } = await Anyup.png.decode(fromDataUrl(this.meta.attention.image));
        this.attentionPixels = { pixels, width };
      }
    }

    attentionAt({ row, column }) {
      const { step, rows, columns, window: span, scale } = this.meta.attention;
      const nearest = (at, count) => clamp(Math.round((at - Math.floor(step / 2)) / step), 0, count - 1);
      const [i, j] = [nearest(row, rows.length), nearest(column, columns.length)];
      const { pixels, width } = this.attentionPixels;
      const weights = new Float32Array(this.low.count);
      const inside = new Uint8Array(this.low.count);
      for (let y = 0; y < span[0]; y++) {
        for (let x = 0; x < span[1]; x++) {
          const [top, left] = [rows[i] + y, columns[j] + x];
          if (top >= this.low.height || left >= this.low.width) continue;
          const cell = top * this.low.width + left;
          weights[cell] = scale[0] * pixels[(i * span[0] + y) * width + j * span[1] + x];
          inside[cell] = 1;
        }
      }
      const middle = (k, size) => Math.min(Math.floor(step / 2) + k * step, size - 1);
      return { weights, inside, row: middle(i, this.height), column: middle(j, this.width) };
    }
  }

  async function openPhoto(meta) {
    const photo = new Image(meta.width, meta.height);
    photo.src = meta.photo;
    try {
      await photo.decode();
    } catch (error) {
      throw new PageError("its photograph cannot be decoded", { cause: error });
    }
    return photo;
  }

  class Shelf {
    constructor(metas) {
      this.metas = metas;
      this.open = new Map();
    }

    // The picture of a number, decoded; the one that was not asked for longest makes room.
    async get(index) {
      const opening = this.open.get(index) ?? Picture.open(this.metas[index], index);
      opening.catch(() => this.open.delete(index));
      this.open.delete(index);
      this.open.set(index, opening);
      for (const oldest of this.open.keys()) {
        if (this.open.size <= KEPT) break;
        this.open.delete(oldest);
      }
      return opening;
    }
  }

  Anyup.pictures = { Shelf };
}
