"use strict";

// The surface on which a picture lies: its two sides, the divider, zoom and panning, points and pointer.
{
  const { byId, clamp } = Anyup.base;
  const SVG = "http://www.w3.org/2000/svg";
  const CRISP_FROM = 2.5; // screen pixels a pixel: from here on pixels are drawn as squares

  class Stage {
    constructor(changed) {
      this.changed = changed;
      this.element = byId("stage");
      this.plane = byId("plane");
      this.canvases = [byId("left"), byId("right")];
      this.contexts = this.canvases.map((one) => one.getContext("2d"));
      this.divider = byId("divider");
      this.share = 0.5;
      this.picture = null;
      this.fitted = true;
      Object.assign(this, { scale: 1, x: 0, y: 0 });
      new ResizeObserver(() => this.resized()).observe(this.element);
      this.holdDivider();
    }

    show(picture) {
      this.picture = picture;
      for (const one of this.canvases) {
        one.width = picture.width;
        one.height = picture.height;
      }
      this.element.style.setProperty("--aspect", picture.width / picture.height);
      this.fit();
    }

    get size() {
      return { width: this.element.clientWidth, height: this.element.clientHeight };
    }

    get fitScale() {
      const { width, height } = this.size;
      return Math.min(width / this.picture.width, height / this.picture.height);
    }

    get limits() {
      return { least: Math.min(this.fitScale, 1), most: Math.max(4, 4 * this.fitScale) };
    }

    fit() {
      this.fitted = true;
      this.scale = this.fitScale;
      this.settle();
    }

    resized() {
      if (!this.picture) return;
      if (this.fitted) this.fit();
      else this.settle();
    }

    // Zooms so that the point (x, y) of the stage stays where it is.
    zoomTo(scale, x = this.size.width / 2, y = this.size.height / 2) {
      const { least, most } = this.limits;
      const next = clamp(scale, least, most);
      this.x = x - ((x - this.x) * next) / this.scale;
      this.y = y - ((y - this.y) * next) / this.scale;
      this.scale = next;
      this.fitted = Math.abs(next - this.fitScale) < 1e-6;
      this.settle();
    }

    pan(dx, dy) {
      this.x += dx;
      this.y += dy;
      this.settle();
    }

    // Holds the picture inside the stage, or centred where it is smaller.
    settle() {
      const { width, height } = this.size;
      const hold = (at, size, room) => (size <= room ? (room - size) / 2 : clamp(at, room - size, 0));
      this.x = hold(this.x, this.picture.width * this.scale, width);
      this.y = hold(this.y, this.picture.height * this.scale, height);
      this.changed("view");
    }

    apply() {
      const { style } = this.plane;
      style.width = `${this.picture.width * this.scale}px`;
      style.height = `${this.picture.height * this.scale}px`;
      style.transform = `translate(${this.x}px, ${this.y}px)`;
      this.plane.classList.toggle("crisp", this.scale * devicePixelRatio >= CRISP_FROM);
      const cut = clamp(this.share * this.size.width - this.x, 0, this.picture.width * this.scale);
      this.canvases[1].style.clipPath = `inset(0 0 0 ${cut}px)`;
      this.divider.style.left = `${100 * this.share}%`;
      this.divider.setAttribute("aria-valuenow", Math.round(100 * this.share));
      this.divider.setAttribute("aria-valuetext", `${Math.round(100 * this.share)} % of the width`);
    }

    // Column of the picture at which the right side begins.
    get cut() {
      return clamp((this.share * this.size.width - this.x) / this.scale, 0, this.picture.width);
    }

    divide(share) {
      this.share = clamp(share, 0, 1);
      this.changed("view");
    }

    holdDivider() {
      const { divider } = this;
      divider.addEventListener("pointerdown", (event) => {
        divider.setPointerCapture(event.pointerId);
        divider.focus({ preventScroll: true });
        event.preventDefault();
      });
      divider.addEventListener("pointermove", (event) => {
        if (!divider.hasPointerCapture(event.pointerId)) return;
        this.divide((event.clientX - this.element.getBoundingClientRect().left) / this.size.width);
      });
      divider.addEventListener("keydown", (event) => {
        const step = event.shiftKey ? 0.1 : 0.01;
        const to = { ArrowLeft: this.share - step, ArrowRight: this.share + step, Home: 0, End: 1 }[event.key];
        if (to === undefined) return;
        this.divide(to);
        event.preventDefault();
        event.stopPropagation();
      });
    }

    // The pixel under a place of the window; null beside the picture.
    pixelAt({ clientX, clientY }) {
      const box = this.element.getBoundingClientRect();
      const column = Math.floor((clientX - box.left - this.x) / this.scale);
      const row = Math.floor((clientY - box.top - this.y) / this.scale);
      const inside = row >= 0 && column >= 0 && row < this.picture.height && column < this.picture.width;
      return inside ? { row, column } : null;
    }

    // Place of a pixel's middle on the stage.
    placeOf({ row, column }) {
      return { x: this.x + (column + 0.5) * this.scale, y: this.y + (row + 0.5) * this.scale };
    }

    // Pans just so far that a pixel is well inside the stage.
    reveal(point) {
      const { width, height } = this.size;
      const { x, y } = this.placeOf(point);
      const margin = Math.min(40, width / 4, height / 4);
      this.pan(clamp(x, margin, width - margin) - x, clamp(y, margin, height - margin) - y);
    }

    drawPoints(points) {
      const marks = points.map(({ row, column, colour, index }) => {
        const { css, ink } = Anyup.colours.classes[colour];
        const { x, y } = this.placeOf({ row, column });
        const mark = svg("g", { class: "point", transform: `translate(${x} ${y})` });
        const digit = svg("text", { fill: ink });
        digit.textContent = index + 1;
        mark.append(svg("circle", { r: 10, fill: css }), digit);
        return mark;
      });
      byId("points").replaceChildren(...marks);
    }

    drawPointer(point, anchor) {
      const place = (id, at) => {
        const { x, y } = this.placeOf(at);
        byId(id).setAttribute("transform", `translate(${x} ${y})`);
      };
      place("pointer", point);
      place("anchor", anchor);
      const apart = point.row !== anchor.row || point.column !== anchor.column;
      byId("anchor").classList.toggle("hidden", !apart);
    }
  }

  function svg(tag, attributes) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  Anyup.Stage = Stage;
}
