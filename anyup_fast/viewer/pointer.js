"use strict";

// Mouse, pen and fingers on the stage: hovering, clicking, panning, pinching, the wheel.
{
  const CLICK_REACH = 6; // pixels of the screen that a click may move
  const TAP_REACH = 12;
  const TAP_TIME = 600; // milliseconds after which a touch is no tap any more

  // `page` has stage, hover(point), click(point) and erase(point).
  function listen(page) {
    const { stage } = page;
    const surface = stage.element;
    const fingers = new Map();
    let press = null;

    surface.addEventListener("pointerdown", (event) => {
      if (event.target.closest("button, #divider") || !page.picture) return;
      fingers.set(event.pointerId, event);
      surface.setPointerCapture(event.pointerId);
      surface.focus({ preventScroll: true });
      if (fingers.size > 1) {
        press = null;
        return;
      }
      const { clientX, clientY, button, pointerType } = event;
      press = { clientX, clientY, button, touch: pointerType === "touch", time: event.timeStamp, moved: false };
      if (press.touch) hover(event);
    });

    surface.addEventListener("pointermove", (event) => {
      if (!page.picture) return;
      if (fingers.size === 2 && fingers.has(event.pointerId)) {
        pinch(event);
        return;
      }
      if (press) {
        const reach = press.touch ? TAP_REACH : CLICK_REACH;
        press.moved ||= Math.hypot(event.clientX - press.clientX, event.clientY - press.clientY) > reach;
        const last = fingers.get(event.pointerId);
        if (!press.touch && press.moved && last) {
          stage.pan(event.clientX - last.clientX, event.clientY - last.clientY);
        }
      }
      if (fingers.has(event.pointerId)) fingers.set(event.pointerId, event);
      hover(event);
    });

    const release = (event) => {
      fingers.delete(event.pointerId);
      const ended = press;
      press = null;
      if (!ended || event.type === "pointercancel" || ended.moved) return;
      if (ended.touch && event.timeStamp - ended.time > TAP_TIME) return;
      const point = stage.pixelAt(event);
      if (!point) return;
      if (ended.button === 2 || event.altKey) page.erase(point);
      else if (ended.button === 0) page.click(point);
    };
    surface.addEventListener("pointerup", release);
    surface.addEventListener("pointercancel", release);
    // A press on the divider's line that does not drag it is a click on the picture below.
    stage.divider.addEventListener("pointerdown", ({ target, clientX, clientY }) => {
      press = target === stage.divider ? { clientX, clientY } : null;
    });
    stage.divider.addEventListener("pointerup", (event) => {
      const near = press && Math.hypot(event.clientX - press.clientX, event.clientY - press.clientY) < 3;
      const point = near && stage.pixelAt(event);
      press = null;
      if (point && event.button === 0) page.click(point);
    });
    surface.addEventListener("contextmenu", (event) => event.preventDefault());

    surface.addEventListener(
      "wheel",
      (event) => {
        if (!page.picture) return;
        event.preventDefault();
        const box = surface.getBoundingClientRect();
        const lines = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 30 : 1;
        const factor = Math.exp(-event.deltaY * lines * (event.ctrlKey ? 0.01 : 0.002));
        stage.zoomTo(stage.scale * factor, event.clientX - box.left, event.clientY - box.top);
      },
      { passive: false },
    );

    function hover(event) {
      const point = stage.pixelAt(event);
      if (point) page.hover(point);
    }

    // Two fingers: the middle between them is dragged, their distance zooms.
    function pinch(event) {
      const before = span([...fingers.values()]);
      fingers.set(event.pointerId, event);
      const after = span([...fingers.values()]);
      const box = surface.getBoundingClientRect();
      stage.pan(after.x - before.x, after.y - before.y);
      if (before.away > 0) {
        stage.zoomTo((stage.scale * after.away) / before.away, after.x - box.left, after.y - box.top);
      }
    }
  }

  function span([a, b]) {
    return {
      x: (a.clientX + b.clientX) / 2,
      y: (a.clientY + b.clientY) / 2,
      away: Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY),
    };
  }

  Anyup.pointer = { listen };
}
