"use strict";

// Colour maps as tables of 256 colours, and the colours of the classes.
{
  const STOPS = {
    viridis: "440154 482475 414487 355f8d 2a788e 21918c 22a884 44bf70 7ad151 bddf26 fde725",
    magma: "000004 140e36 3b0f70 641a80 8c2981 b73779 de4968 f7705c fe9f6d fecf92 fcfdbf",
    cividis: "00224e 123570 3b496c 575d6d 707173 8a8678 a59c74 c3b369 e1cc55 fee838",
    grey: "000000 ffffff",
  };

  // Told apart with every common kind of colour vision; the digits on the points say the same.
  const CLASSES = "0072b2 e69f00 009e73 cc79a7 56b4e9 d55e00 f0e442 eeeeee 4b2a8c";

  function rgb(hex) {
    return [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));
  }

  // One number for a pixel of an ImageData seen as Uint32Array (red is the lowest byte).
  function packed([red, green, blue], alpha = 255) {
    return ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0;
  }

  function table(stops) {
    const colours = stops.split(" ").map(rgb);
    return Uint32Array.from({ length: 256 }, (_, i) => {
      const place = (i / 255) * (colours.length - 1);
      const below = Math.min(Math.floor(place), colours.length - 2);
      const part = place - below;
      return packed(colours[below].map((value, c) => Math.round(value + part * (colours[below + 1][c] - value))));
    });
  }

  function gradient(name) {
    return `linear-gradient(to right, ${STOPS[name].split(" ").map((hex) => `#${hex}`).join(", ")})`;
  }

  function luminance(colour) {
    const [red, green, blue] = colour.map((v) => (v <= 10 ? v / 3294 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  }

  const classes = CLASSES.split(" ").map((hex) => {
    const colour = rgb(hex);
    return { css: `#${hex}`, rgb: colour, ink: luminance(colour) > 0.18 ? "#000000" : "#ffffff" };
  });

  const maps = Object.fromEntries(Object.entries(STOPS).map(([name, stops]) => [name, table(stops)]));

  Anyup.colours = { maps, gradient, classes, packed };
}
