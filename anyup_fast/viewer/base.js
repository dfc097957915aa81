"use strict";

// Everything that the scripts of the page share hangs on this object; each file adds its own part.
const Anyup = {};

{
  // An error whose message is meant for the person who looks at the page.
  class PageError extends Error {}

  function fromBase64(text) {
    const letters = atob(text);
    const bytes = new Uint8Array(letters.length);
    for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
    return bytes;
  }

  // The bytes behind "data:image/png;base64,...".
  function fromDataUrl(url) {
    return fromBase64(url.slice(url.indexOf(",") + 1));
  }

  // Little-endian float32 numbers in base64.
  function floats(text) {
    const bytes = fromBase64(text);
    const view = new DataView(bytes.buffer);
    return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
  }

  function dot(a, b) {
    let sum = 0;
    for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
    return sum;
  }

  // The vector at length one; null where it has no direction.
  function unit(vector) {
    const length = Math.sqrt(dot(vector, vector));
    return length > 0 ? Float32Array.from(vector, (value) => value / length) : null;
  }

  function clamp(value, low, high) {
    return Math.min(Math.max(value, low), high);
  }

  // An element with properties ("text" is set as text, never as markup), attributes and children.
  function element(tag, { text, ...attributes } = {}, ...children) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) {
      if (value === true) made.setAttribute(name, "");
      else if (value !== false && value !== null) made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }

  function byId(id) {
    return document.getElementById(id);
  }

  // Sets text only where it differs, so that a line that is written every frame costs nothing while it stays.
  function write(node, text) {
    if (node.textContent !== text) node.textContent = text;
  }

  function canvas(width, height) {
    const made = document.createElement("canvas");
    made.width = width;
    made.height = height;
    return made;
  }

  Anyup.base = { PageError, fromBase64, fromDataUrl, floats, dot, unit, clamp, element, byId, write, canvas };
}
