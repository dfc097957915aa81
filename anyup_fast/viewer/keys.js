"use strict";

// The keyboard. Letters and digits work everywhere but in fields of text; arrows on the stage.
{
  const { byId, clamp } = Anyup.base;
  const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const OWN = ["PageUp", "PageDown", "Delete", "Backspace"]; // what sliders use themselves, or nobody expects there
  const ZOOM_STEP = 1.25;

  function listen(page) {
    const { stage } = page;

    function onStage(event) {
      const step = STEPS[event.key];
      if (step) {
        const size = event.shiftKey ? 10 : 1;
        const { row, column } = page.state.pointer;
        page.hover({
          row: clamp(row + step[0] * size, 0, page.picture.height - 1),
          column: clamp(column + step[1] * size, 0, page.picture.width - 1),
        });
        stage.reveal(page.state.pointer);
        page.tellSoon();
      } else if (event.key === "Enter" || event.key === " ") page.click(page.state.pointer);
      else return false;
      return true;
    }

    function anywhere(event) {
      const { key } = event;
      const plain = {
        "+": () => stage.zoomTo(stage.scale * ZOOM_STEP),
        "=": () => stage.zoomTo(stage.scale * ZOOM_STEP),
        "-": () => stage.zoomTo(stage.scale / ZOOM_STEP),
        0: () => stage.fit(),
        a: () => event.repeat || page.attend(true, true),
        p: () => page.pin(),
        l: () => page.link(),
        v: () => page.nextPreset(),
        e: () => page.erasing(!page.state.erasing),
        "?": () => byId("help").showModal(),
        Delete: () => page.erase(page.state.pointer),
        Backspace: () => page.erase(page.state.pointer),
        Escape: () => page.release(),
        PageUp: () => page.turn(-1),
        PageDown: () => page.turn(1),
      };
      const action = plain[key.length === 1 ? key.toLowerCase() : key];
      if (action) action();
      else if (/^[1-9]$/.test(key) && Number(key) <= page.labels.classes.length) page.choose(Number(key) - 1, true);
      else return false;
      return true;
    }

    function withControl(event) {
      const key = event.key.toLowerCase();
      if (key === "z" && event.shiftKey) page.redo();
      else if (key === "z") page.undo();
      else if (key === "y") page.redo();
      else return false;
      return true;
    }

    document.addEventListener("keydown", (event) => {
      if (!page.picture || byId("help").open) return;
      const { target } = event;
      if (target.matches("input[type=text], select") || event.altKey) return;
      if (target.matches("input, [role=slider]") && OWN.includes(event.key)) return;
      const used =
        event.ctrlKey || event.metaKey
          ? withControl(event)
          : (target === stage.element && onStage(event)) || anywhere(event);
      if (used) event.preventDefault();
    });

    const letGo = (event) => {
      if (event.type === "blur" || event.key.toLowerCase() === "a") page.attend(false, true);
    };
    document.addEventListener("keyup", letGo);
    window.addEventListener("blur", letGo);
  }

  Anyup.keys = { listen, ZOOM_STEP };
}
