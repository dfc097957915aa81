"use strict";

// What the person can do: every control, key and gesture ends in one of these.
{
  const { byId } = Anyup.base;
  const { page } = Anyup;
  const { state } = page;

  page.hover = ({ row, column }) => {
    if (row === state.pointer.row && column === state.pointer.column) return;
    state.pointer = { row, column };
    const follows = state.pinned === null && state.prompt === null;
    page.changed("pointer", ...(follows ? ["anchor"] : []));
  };

  page.click = (point) => {
    if (state.erasing) {
      page.erase(point);
      return;
    }
    page.hover(point);
    const { labels, picture } = page;
    const first = !labels.labelled.length;
    if (!labels.add({ picture: picture.index, ...point, vector: picture.vectorAt(point) })) {
      page.toast("The features of this pixel are all zero: no prototype can be made of it.");
      return;
    }
    if (first) page.showLabels();
    const { name, points } = labels.classes[labels.active];
    tellLabels(`Point ${points.length} of ${name} at row ${point.row}, column ${point.column}.`);
  };

  page.erase = (point) => {
    const found = page.labels.erase({ picture: page.picture.index, ...point }, page.eraseReach());
    if (found) tellLabels(`A point of ${found.name} erased.`);
    else page.toast("No point is near the pointer.");
  };

  // Says what changed and how the classes share the picture once the map has been computed.
  function tellLabels(sentence) {
    page.changed("labels");
    requestAnimationFrame(() =>
      requestAnimationFrame(() => {
        const shares = page.map.classes.map((one, i) => `${one.name} ${Anyup.panel.percent(page.map.shares[i])}`);
        page.tell(`${sentence} ${shares.join(", ")}`);
      }),
    );
  }

  page.undo = () => (page.labels.undo() ? tellLabels("Undone.") : page.toast("There is nothing to undo."));
  page.redo = () => (page.labels.redo() ? tellLabels("Done again.") : page.toast("There is nothing to redo."));
  page.clear = () => {
    page.labels.clear();
    tellLabels("All points removed.");
  };

  page.choose = (index, aloud = false) => {
    page.labels.active = index;
    page.erasing(false);
    page.list.update(page.labels, page.map.shares);
    page.showLabelTools();
    if (aloud) page.tell(`Class ${index + 1}: ${page.labels.classes[index].name}`);
  };

  page.rename = (index, wanted) => {
    const name = page.labels.rename(index, wanted);
    if (name === null) page.toast("A class needs a name: it keeps the one it had.");
    else if (name !== wanted.trim()) page.toast(`The class is called “${name}”: names in a head have to differ.`);
  };

  page.addClass = () => {
    page.erasing(false);
    page.labels.addClass();
  };

  page.removeClass = (index) => {
    const { name } = page.labels.classes[index];
    page.labels.removeClass(index);
    tellLabels(`Class ${name} removed.`);
    byId("add-class").focus();
  };

  page.erasing = (on) => {
    state.erasing = on;
    for (const id of ["erase", "quick-erase"]) byId(id).setAttribute("aria-pressed", String(on));
    page.stage.element.classList.toggle("erasing", on);
    page.showLabelTools();
  };

  page.ask = (prompt) => {
    state.prompt = prompt;
    state.pinned = null;
    if (prompt !== null && !state.sides.includes("high:similarity")) page.setSide(1, "high:similarity");
    page.changed("anchor", "sides", "pointer");
  };

  page.take = (index) => {
    const { name, weight } = page.data.prompts[index];
    if (!page.labels.addClass(name, weight)) {
      page.toast(`There are ${Anyup.labels.MOST} classes already: remove one first.`);
      return;
    }
    page.showLabels();
    tellLabels(`${name} is a class now.`);
  };

  page.setSide = (side, id) => {
    state.sides = state.sides.map((old, i) => (i === side ? id : old));
    page.changed("sides");
  };

  page.showLabels = () => {
    if (!state.sides.includes("labels")) page.setSides(page.presets.at(-1).sides);
  };

  page.setSides = (sides) => {
    state.sides = [...sides];
    page.attend(false);
    page.changed("sides");
  };

  page.nextPreset = () => {
    const at = page.presets.findIndex(({ sides }) => sides.every((id, i) => id === state.sides[i]));
    const next = page.presets[(at + 1) % page.presets.length];
    page.setSides(next.sides);
    page.tell(next.name);
  };

  // `held`: by the key, for as long as it is down.
  page.attend = (on, held = false) => {
    if (on && !page.picture.meta.attention) {
      page.toast("This page holds no attention of this picture.");
      return;
    }
    state[held ? "holding" : "attending"] = on;
    byId("attend").setAttribute("aria-pressed", String(state.attending));
    page.changed("sides");
  };

  page.pin = (point = state.pinned ? null : state.pointer) => {
    state.pinned = point && page.vectorsOf(point);
    state.prompt = null;
    page.changed("anchor", "pointer");
  };

  page.release = () => {
    state.pinned = null;
    state.prompt = null;
    page.attend(false);
    page.changed("anchor", "pointer");
  };

  page.turn = (step) => {
    const count = page.data.pictures.length;
    if (count > 1) page.show((page.picture.index + step + count) % count);
  };

  // Puts the point into the address, and the address into the clipboard where that is allowed.
  page.link = async () => {
    if (!state.pinned) page.pin(state.pointer);
    const { picture, row, column } = state.pinned;
    const hash = `#picture=${picture}&row=${row}&column=${column}`;
    const framed = window.parent !== window;
    if (framed) {
      page.toast(`Add this to the address of the saved page: ${hash}`);
      return;
    }
    history.replaceState(null, "", hash);
    const copied = await navigator.clipboard?.writeText(location.href).then(
      () => true,
      () => false,
    );
    page.toast(`The link to this point is in the ${copied ? "clipboard" : "address line"}.`);
  };

  // The point of "#picture=0&row=12&column=34"; null where the address names none in this page.
  page.linked = () => {
    const named = new URLSearchParams(location.hash.slice(1));
    const [picture, row, column] = ["picture", "row", "column"].map((name) => Number(named.get(name) ?? NaN));
    if (![picture, row, column].every((value) => Number.isInteger(value) && value >= 0)) return null;
    return picture < page.data.pictures.length ? { picture, row, column } : null;
  };
}
