"use strict";

// The list of classes, prompts, thumbnails and the other controls beside the picture.
{
  const { byId, element, write } = Anyup.base;
  const INSET = 320; // pixels of the longer side of the small maps

  function icon(name) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("aria-hidden", "true");
    const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
    use.setAttribute("href", `#i-${name}`);
    svg.append(use);
    return svg;
  }

  function percent(share) {
    if (share > 0 && share < 0.01) return "< 1 %";
    return `${Math.round(100 * share)} %`;
  }

  // Rows of the list; they stay while their number stays, so that the focus stays, too.
  class ClassList {
    constructor(page) {
      this.page = page;
      this.rows = [];
    }

    row(index) {
      const { labels } = this.page;
      const radio = element("input", { type: "radio", name: "class", value: index });
      const digit = element("span", { text: index + 1, "aria-hidden": "true" });
      const label = `Name of class ${index + 1}`;
      const name = element("input", { type: "text", "aria-label": label, maxlength: 80, spellcheck: "false" });
      const share = element("span", { class: "share" });
      const remove = element("button", { type: "button", class: "remove" }, icon("close"));
      const pick = element("label", { class: "pick" }, radio, digit);
      const item = element("li", {}, pick, name, share, remove);
      radio.addEventListener("change", () => this.page.choose(index));
      item.addEventListener("pointerdown", ({ target }) => remove.contains(target) || this.page.choose(index));
      name.addEventListener("change", () => {
        this.page.rename(index, name.value);
        name.value = labels.classes[index].name;
      });
      name.addEventListener("keydown", (event) => event.key === "Enter" && name.blur());
      remove.addEventListener("click", () => this.page.removeClass(index));
      const quick = element("button", { type: "button", text: index + 1 });
      quick.addEventListener("click", () => this.page.choose(index, true));
      return { item, pick, radio, name, share, remove, quick };
    }

    update({ classes, active, labelled }, shares) {
      if (this.rows.length !== classes.length) {
        this.rows = classes.map((_, index) => this.row(index));
        byId("classes").replaceChildren(...this.rows.map((row) => row.item));
        byId("quick").replaceChildren(...this.rows.map((row) => row.quick));
      }
      this.rows.forEach((row, index) => {
        const one = classes[index];
        const { css, ink } = Anyup.colours.classes[one.colour];
        row.item.classList.toggle("active", index === active);
        for (const mark of [row.pick, row.quick]) {
          mark.style.background = css;
          mark.style.color = ink;
        }
        row.quick.setAttribute("aria-label", `Next point: ${one.name}`);
        row.quick.setAttribute("aria-pressed", String(index === active));
        row.radio.checked = index === active;
        row.radio.setAttribute("aria-label", `Class ${index + 1}: ${one.name}`);
        if (document.activeElement !== row.name) row.name.value = one.name;
        const place = labelled.indexOf(one);
        const count = one.points.length;
        const points = count ? `${count} ${count === 1 ? "point" : "points"}` : one.given ? "given" : "no points";
        write(row.share, place < 0 ? points : `${points} · ${percent(shares[place] ?? 0)}`);
        row.remove.setAttribute("aria-label", `Remove class ${index + 1}: ${one.name}`);
        row.remove.disabled = classes.length === 1;
      });
    }
  }

  function prompts(page) {
    const box = byId("prompts");
    box.hidden = !page.data.prompts.length;
    const buttons = page.data.prompts.map((prompt, index) => {
      const show = element("button", { type: "button", text: prompt.name, "aria-pressed": "false" });
      const what = `Use as class: ${prompt.name}`;
      const take = element("button", { type: "button", text: "Use as class", "aria-label": what });
      show.addEventListener("click", () => page.ask(page.state.prompt === index ? null : index));
      take.addEventListener("click", () => page.take(index));
      box.append(element("div", {}, show, take));
      return show;
    });
    return (asked) => buttons.forEach((button, index) => button.setAttribute("aria-pressed", String(index === asked)));
  }

  function thumbnails(page) {
    const { pictures } = page.data;
    const box = byId("thumbs");
    box.hidden = pictures.length < 2;
    if (pictures.length < 2) return () => {};
    const buttons = pictures.map((meta, index) => {
      const image = element("img", { src: meta.photo, alt: "", loading: "lazy", decoding: "async" });
      const caption = element("span", { text: meta.name });
      const button = element("button", { type: "button", title: meta.name }, image, caption);
      button.addEventListener("click", () => page.show(index));
      return button;
    });
    box.replaceChildren(...buttons);
    return (shown) => {
      buttons.forEach((button, index) => button.setAttribute("aria-current", String(index === shown)));
      const { offsetLeft, offsetTop } = buttons[shown];
      box.scrollTo(offsetLeft - box.clientWidth / 3, offsetTop - box.clientHeight / 3);
    };
  }

  // The two small maps beside each other.
  class Insets {
    constructor() {
      this.low = byId("inset-low").getContext("2d");
      this.high = byId("inset-high").getContext("2d");
    }

    show({ width, height, grid, cellsSize }) {
      const scale = Math.min(1, INSET / Math.max(width, height));
      this.sizes = { high: [width, height], low: cellsSize };
      this.scale = scale;
      for (const context of [this.low, this.high]) {
        context.canvas.width = Math.round(width * scale);
        context.canvas.height = Math.round(height * scale);
      }
      write(byId("caption-low"), `low-res, ${grid[0]} × ${grid[1]}`);
      write(byId("caption-high"), `high-res, ${height} × ${width}`);
    }

    draw(similarity) {
      for (const side of ["low", "high"]) {
        const context = this[side];
        context.imageSmoothingEnabled = side === "high";
        context.drawImage(similarity[side].canvas, 0, 0, ...this.sizes[side].map((size) => size * this.scale));
      }
    }
  }

  function options(select, entries) {
    const groups = new Map();
    for (const { value, text, group } of entries) {
      const option = element("option", { value, text });
      if (!group) select.append(option);
      else if (groups.has(group)) groups.get(group).append(option);
      else groups.set(group, element("optgroup", { label: group }, option));
    }
    select.append(...groups.values());
  }

  Anyup.panel = { ClassList, Insets, prompts, thumbnails, options, percent };
}
