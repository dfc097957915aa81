"use strict";

// What the page knows, what can be done with it, and the drawing of a frame.
{
  const { byId, write } = Anyup.base;
  const FRAMES_KEPT = 240;
  const ERASE_REACH = 16; // pixels of the screen
  const TOAST_TIME = 4000;

  const page = {
    data: null,
    picture: null,
    state: {
      sides: ["photo", "photo"],
      pointer: { row: 0, column: 0 },
      pinned: null, // the pixel that similarity stays with
      prompt: null, // number of the prompt that takes the pointer's place
      attending: false, // by the button
      holding: false, // by the key
      erasing: false,
      mapOpacity: 1,
      labelOpacity: 0.6,
      map: "viridis",
      fit: true,
      outline: true,
      path: "auto",
    },
    frames: [], // milliseconds from the beginning of a frame in which the similarity changed to the next frame
    work: [], // milliseconds of them in which the script worked

    get path() {
      return page.similarity?.path ?? null;
    },

    // The pixel whose similarity is shown: {picture, row, column, vector, coarse}.
    get anchor() {
      return page.state.pinned ?? page.vectorsOf(page.state.pointer);
    },

    vectorsOf(point) {
      const { picture } = page;
      return { picture: picture.index, ...point, vector: picture.vectorAt(point), coarse: picture.lowVectorAt(point) };
    },

    get sides() {
      const { attending, holding, sides } = page.state;
      return (attending || holding) && page.picture.meta.attention ? ["attention", "attention"] : sides;
    },
  };

  const dirty = new Set();
  let scheduled = false;

  // Kinds of change: view (zoom, divider), sides, pointer, anchor, style, labels. One frame draws them all.
  page.changed = (...what) => {
    for (const kind of what) dirty.add(kind);
    if (scheduled) return;
    scheduled = true;
    requestAnimationFrame(frame);
  };

  function frame() {
    scheduled = false;
    if (!page.picture) return;
    const started = performance.now();
    const what = new Set(dirty);
    dirty.clear();
    const has = (...kinds) => kinds.some((kind) => what.has(kind));
    compute(has);
    drawSides(has);
    drawMarks(has);
    if (has("anchor")) {
      page.showQuery();
      keep(page.work, performance.now() - started);
      requestAnimationFrame(() => keep(page.frames, performance.now() - started));
    }
  }

  // Similarity, labels and attention, each only where something they come from has changed.
  function compute(has) {
    const { state, labels, layers } = page;
    const table = Anyup.colours.maps[state.map];
    if (has("anchor", "style")) {
      const prompt = state.prompt === null ? null : page.data.prompts[state.prompt];
      page.similarity.update({ anchor: page.anchor, prompt, table, fit: state.fit });
      page.insets.draw(page.similarity);
    }
    if (has("labels")) {
      page.map.update(labels.labelled);
      page.painted = labels.labelled.length ? layers.labels(page.map) : null;
      page.list.update(labels, page.map.shares);
      page.showLabelTools();
    }
    if (page.sides.includes("attention") && has("pointer", "style", "sides")) {
      page.attention = layers.attention(state.pointer, table);
    }
  }

  function drawSides(has) {
    const { layers, similarity, attention, painted, sides } = page;
    const { mapOpacity, labelOpacity, outline } = page.state;
    const shown = { layers, similarity, attention, labels: painted, mapOpacity, labelOpacity, outline };
    sides.forEach((id, side) => {
      if (has("sides", ...Anyup.layers.needs(id))) Anyup.layers.draw(page.stage.contexts[side], id, shown);
    });
    if (has("sides", "anchor", "pointer", "style", "labels")) Anyup.legend.draw(page);
    if (has("sides")) page.showSides(sides);
  }

  function drawMarks(has) {
    const { state, stage, picture, labels } = page;
    if (has("view")) page.showView();
    if (has("view", "labels")) stage.drawPoints(labels.points.filter((point) => point.picture === picture.index));
    if (has("view", "pointer", "anchor")) {
      const pinned = state.pinned?.picture === picture.index ? state.pinned : state.pointer;
      stage.drawPointer(state.pointer, pinned);
    }
    if (has("pointer", "anchor", "labels")) write(byId("readout"), Anyup.legend.readout(page));
  }

  function keep(list, value) {
    list.push(value);
    if (list.length > FRAMES_KEPT) list.shift();
  }

  let wanted = 0;

  // Shows another picture and, with a point, pins it; points, classes and what is compared stay as they are.
  page.show = async (index, point = null) => {
    wanted = index;
    document.documentElement.classList.add("busy");
    write(byId("readout"), `Reading ${page.data.pictures[index].name} …`);
    try {
      const picture = await page.shelf.get(index);
      if (wanted !== index) return;
      await picture.openAttention();
      if (wanted === index) settle(picture, point);
    } catch (error) {
      if (wanted !== index) return;
      page.changed("pointer");
      page.fail(error);
    } finally {
      if (wanted === index) document.documentElement.classList.remove("busy");
    }
  };

  function settle(picture, point) {
    const { state, stage } = page;
    byId("failure").hidden = true;
    page.picture = picture;
    page.layers = new Anyup.layers.Layers(page.data, picture);
    page.map = new Anyup.labels.LabelMap(picture);
    page.attention = null;
    page.makeSimilarity();
    state.pointer = { row: Math.floor(picture.height / 2), column: Math.floor((2 * picture.width) / 3) };
    if (point) {
      const [row, column] = [Math.min(point.row, picture.height - 1), Math.min(point.column, picture.width - 1)];
      state.pointer = { row, column };
      state.pinned = page.vectorsOf(state.pointer);
      state.prompt = null;
    }
    page.insets.show(picture);
    page.listSides();
    page.markThumbnail(picture.index);
    stage.show(picture);
    const about = [page.data.encoder, picture.name, `${picture.height} × ${picture.width}`];
    write(byId("subtitle"), about.filter(Boolean).join(" · "));
    page.changed("sides", "view", "pointer", "anchor", "style", "labels");
  }

  page.makeSimilarity = () => {
    const { path } = page.state;
    const card = path === "webgl" || (path === "auto" && Anyup.webgl.real());
    page.similarity = new Anyup.similarity.Similarity(page.picture, card ? "webgl" : "script");
    page.showPath();
  };

  page.lostCard = () => {
    if (!page.picture || page.path !== "webgl") return;
    page.state.path = "script";
    byId("path").value = "script";
    page.makeSimilarity();
    page.toast("The graphics card was lost; the script draws from now on.");
    page.changed("sides", "anchor", "style");
  };

  // Shows why something failed; a fault of the script itself stays in the console, too.
  page.explain = (error) => {
    const known = error instanceof Anyup.base.PageError;
    const reason = `The page's script failed: ${error.message}. Please report it, with the browser's name.`;
    byId("failure").textContent = known ? error.message : reason;
    byId("failure").hidden = false;
    if (!page.picture) document.documentElement.dataset.state = "failed";
  };

  page.fail = (error) => {
    if (!(error instanceof Anyup.base.PageError)) throw error;
    page.explain(error);
  };

  // Whatever nobody caught ends here. (Events without an error are notices of the browser.)
  window.addEventListener("error", (event) => event.error && page.explain(event.error));
  window.addEventListener("unhandledrejection", (event) => page.explain(event.reason));

  let fading = null;

  page.toast = (text) => {
    byId("toast").textContent = text;
    clearTimeout(fading);
    fading = setTimeout(() => byId("toast").replaceChildren(), TOAST_TIME);
  };

  page.tell = (text) => {
    byId("live").textContent = text;
  };

  let speaking = null;

  // After the arrow keys have come to rest, the line about the pixel is read out.
  page.tellSoon = () => {
    clearTimeout(speaking);
    speaking = setTimeout(() => page.tell(byId("readout").textContent), 500);
  };

  page.eraseReach = () => ERASE_REACH / page.stage.scale;

  Anyup.page = page;
}
