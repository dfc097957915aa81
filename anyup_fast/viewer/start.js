"use strict";

// Connects the controls with the page and shows the first picture.
{
  const { byId, element, write } = Anyup.base;
  const { page } = Anyup;
  const { state } = page;
  const on = (id, kind, action) => byId(id).addEventListener(kind, action);

  function presets(data) {
    const [first] = data.views;
    return [
      { name: "Features", sides: ["photo", `high:${first.name}`] },
      { name: "Low / high", sides: [`low:${first.name}`, `high:${first.name}`] },
      { name: "Similarity", sides: ["low:similarity", "high:similarity"] },
      { name: "Labels", sides: ["photo", "labels"] },
    ];
  }

  function showPresets() {
    const made = page.presets.map(({ name, sides }) => {
      const button = element("button", { type: "button", text: name, "aria-pressed": "false" });
      button.addEventListener("click", () => page.setSides(sides));
      return button;
    });
    byId("presets").replaceChildren(...made);
  }

  page.listSides = () => {
    const entries = Anyup.layers.list(page.data, page.picture);
    state.sides = state.sides.map((id) => (entries.some((entry) => entry.id === id) ? id : "photo"));
    for (const id of ["side-left", "side-right"]) {
      byId(id).replaceChildren();
      Anyup.panel.options(byId(id), entries.map(({ id: value, title: text, group }) => ({ value, text, group })));
    }
    byId("attend").disabled = !page.picture.meta.attention;
  };

  page.showSides = (sides) => {
    const tags = new Map(Anyup.layers.list(page.data, page.picture).map(({ id, tag }) => [id, tag]));
    ["left", "right"].forEach((side, i) => {
      byId(`side-${side}`).value = state.sides[i];
      write(byId(`tag-${side}`), tags.get(sides[i]));
    });
    page.presets.forEach((preset, i) => {
      const pressed = preset.sides.every((id, side) => id === state.sides[side]);
      byId("presets").children[i].setAttribute("aria-pressed", String(pressed));
    });
  };

  page.showView = () => {
    page.stage.apply();
    write(byId("zoom-value"), `${Math.round(100 * page.stage.scale)} %`);
  };

  page.showQuery = () => {
    const { pinned, prompt } = state;
    write(byId("query"), `To ${Anyup.legend.query(page)}`);
    byId("pin").setAttribute("aria-pressed", String(pinned !== null));
    byId("pinned").hidden = pinned === null && prompt === null;
    const words = prompt === null ? `Pinned at ${pinned?.row}, ${pinned?.column}` : page.data.prompts[prompt].name;
    write(byId("pinned").firstElementChild, words);
    byId("pinned").setAttribute("aria-label", `Let go: ${words}`);
    page.markPrompt(prompt);
  };

  page.showLabelTools = () => {
    const { labels } = page;
    const { name } = labels.classes[labels.active];
    const some = labels.labelled.length > 0;
    write(
      byId("hint"),
      state.erasing ? "Click near a point to erase it." : `Click into the picture: it is a point of ${name}.`,
    );
    for (const id of ["undo", "quick-undo"]) byId(id).disabled = !labels.past.length;
    byId("redo").disabled = !labels.future.length;
    byId("clear").disabled = !labels.points.length;
    byId("add-class").disabled = labels.full;
    byId("save-head").disabled = !some;
    byId("save-labels").disabled = !some;
    write(byId("export-note"), some ? exportNote(labels.labelled) : "The head and the label map need a point first.");
  };

  function exportNote(classes) {
    const names = classes.map((one, i) => `${i} ${one.name}`).join(", ");
    return `Numbers in label maps and in the head: ${names}.`;
  }

  page.showPath = () => {
    const { data, path } = page;
    const card = Anyup.webgl.renderer() ?? "WebGL2 is not available";
    write(
      byId("about"),
      `Now drawn by ${path === "webgl" ? "WebGL" : "the script"} (${card}). anyup-fast ${data.version}, ` +
        `encoder ${data.encoder || "of your own"}, weights ${data.weights}, ` +
        `${data.directions} directions of ${data.channels} channels.`,
    );
  };

  function connect() {
    const { stage } = page;
    on("side-left", "change", (event) => page.setSide(0, event.target.value));
    on("side-right", "change", (event) => page.setSide(1, event.target.value));
    on("zoom-in", "click", () => stage.zoomTo(stage.scale * Anyup.keys.ZOOM_STEP));
    on("zoom-out", "click", () => stage.zoomTo(stage.scale / Anyup.keys.ZOOM_STEP));
    on("zoom-fit", "click", () => stage.fit());
    on("pinned", "click", () => page.release());
    on("pin", "click", () => page.pin());
    on("attend", "click", () => page.attend(!state.attending));
    on("link", "click", () => page.link());
    for (const id of ["undo", "quick-undo"]) on(id, "click", () => page.undo());
    on("redo", "click", () => page.redo());
    for (const id of ["erase", "quick-erase"]) on(id, "click", () => page.erasing(!state.erasing));
    on("clear", "click", () => page.clear());
    on("add-class", "click", () => page.addClass());
    on("save-head", "click", () => page.toast(`${Anyup.exports.head(page.data, page.labels.labelled)} saved.`));
    on("save-labels", "click", () => save(Anyup.exports.labelMap(page.picture, page.map)));
    on("save-picture", "click", () => save(Anyup.exports.shown(page.picture, stage.canvases, stage.cut)));
    for (const kind of ["map", "label"]) {
      on(`${kind}-opacity`, "input", (event) => style({ [`${kind}Opacity`]: event.target.valueAsNumber / 100 }));
    }
    on("map", "change", (event) => style({ map: event.target.value }));
    on("range", "change", (event) => style({ fit: event.target.value === "fit" }));
    on("outline", "change", (event) => style({ outline: event.target.checked }));
    on("path", "change", (event) => {
      state.path = event.target.value;
      page.makeSimilarity();
      page.changed("sides", "anchor", "style");
    });
    on("help-open", "click", () => byId("help").showModal());
    on("help-close", "click", () => byId("help").close());
    on("theme", "click", () => setTheme(!dark()));
    window.addEventListener("hashchange", () => goTo(page.linked()));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", markTheme);
  }

  function save(saving) {
    saving.then((name) => page.toast(`${name} saved.`)).catch(page.fail);
  }

  function style(change) {
    Object.assign(state, change);
    for (const kind of ["map", "label"]) {
      const percents = Math.round(100 * state[`${kind}Opacity`]);
      byId(`${kind}-opacity`).valueAsNumber = percents;
      write(byId(`${kind}-opacity`).nextElementSibling, `${percents} %`);
    }
    page.changed("style", "anchor");
  }

  function dark() {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }

  function setTheme(wanted) {
    document.documentElement.dataset.theme = wanted ? "dark" : "light";
    markTheme();
  }

  function markTheme() {
    byId("theme").setAttribute("aria-pressed", String(dark()));
  }

  async function goTo(point) {
    if (!point) return;
    await page.show(point.picture, point);
  }

  async function start() {
    write(byId("title"), document.title);
    const data = Anyup.data.read(byId("data").textContent);
    page.data = data;
    page.shelf = new Anyup.pictures.Shelf(data.pictures);
    page.stage = new Anyup.Stage(page.changed);
    page.labels = new Anyup.labels.Labels(data.classes, () => page.changed("labels"));
    page.list = new Anyup.panel.ClassList(page);
    page.insets = new Anyup.panel.Insets();
    page.presets = presets(data);
    state.sides = [...page.presets.at(data.classes.length ? -1 : 0).sides];
    showPresets();
    page.markPrompt = Anyup.panel.prompts(page);
    page.markThumbnail = Anyup.panel.thumbnails(page);
    Anyup.panel.options(byId("map"), Object.keys(Anyup.colours.maps).map((name) => ({ value: name, text: name })));
    style({});
    connect();
    markTheme();
    Anyup.pointer.listen(page);
    Anyup.keys.listen(page);
    const linked = page.linked();
    if (linked) await goTo(linked);
    else await page.show(0);
    if (data.classes.length > Anyup.labels.MOST) {
      page.toast(`The head has ${data.classes.length} classes: the first ${Anyup.labels.MOST} are shown.`);
    }
    if (page.picture) {
      requestAnimationFrame(() =>
        requestAnimationFrame(() => {
          document.documentElement.dataset.state = "ready";
        }),
      );
    }
  }

  start().catch(page.fail);
}
