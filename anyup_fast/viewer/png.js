"use strict";

// PNG files without a canvas: every byte arrives as it was written, in every browser and at every size.
{
  const { PageError } = Anyup.base;
  const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];

  const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
    let value = byte;
    for (let bit = 0; bit < 8; bit++) value = value & 1 ? 0xedb88320 ^ (value >>> 1) : value >>> 1;
    return value;
  });

  function crc32(bytes) {
    let value = 0xffffffff;
    for (const byte of bytes) value = CRC_TABLE[(value ^ byte) & 255] ^ (value >>> 8);
    return (value ^ 0xffffffff) >>> 0;
  }

  async function through(stream, parts) {
    const piped = new Blob(parts).stream().pipeThrough(stream);
    return new Uint8Array(await new Response(piped).arrayBuffer());
  }

  function* chunks(bytes) {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    for (let at = SIGNATURE.length; at + 8 <= bytes.length; ) {
      const length = view.getUint32(at);
      const kind = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
      if (at + 12 + length > bytes.length) throw new PageError("a PNG inside the page is cut off");
      yield { kind, body: bytes.subarray(at + 8, at + 8 + length) };
      at += 12 + length;
    }
  }

  // {width, height, pixels} of an 8-bit greyscale PNG.
  async function decode(bytes) {
    if (!SIGNATURE.every((byte, i) => bytes[i] === byte)) throw new PageError("an image inside the page is no PNG");
    let header;
    const packed = [];
    for (const { kind, body } of chunks(bytes)) {
      if (kind === "IHDR") header = body;
      if (kind === "IDAT") packed.push(body);
    }
    const [depth, colour, , , interlaced] = header.subarray(8);
    if (depth !== 8 || colour !== 0 || interlaced !== 0) {
      throw new PageError(`a PNG inside the page is not greyscale of 8 bits (depth ${depth}, colour type ${colour})`);
    }
    const view = new DataView(header.buffer, header.byteOffset, header.byteLength);
    const [width, height] = [view.getUint32(0), view.getUint32(4)];
    const filtered = await through(new DecompressionStream("deflate"), packed);
    if (filtered.length !== height * (width + 1)) throw new PageError("a PNG inside the page has too few pixels");
    return { width, height, pixels: unfilter(filtered, width, height) };
  }

  function unfilter(filtered, width, height) {
    const pixels = new Uint8Array(width * height);
    for (let row = 0; row < height; row++) {
      const from = row * (width + 1) + 1;
      const line = filtered.subarray(from, from + width);
      const out = pixels.subarray(row * width, (row + 1) * width);
      const above = row ? pixels.subarray((row - 1) * width, row * width) : new Uint8Array(width);
      UNFILTER[filtered[from - 1]](line, above, out);
    }
    return pixels;
  }

  const UNFILTER = [
    function none(line, _above, out) {
      out.set(line);
    },
    function sub(line, _above, out) {
      for (let i = 0, left = 0; i < line.length; i++) out[i] = left = (line[i] + left) & 255;
    },
    function up(line, above, out) {
      for (let i = 0; i < line.length; i++) out[i] = line[i] + above[i];
    },
    function average(line, above, out) {
      for (let i = 0, left = 0; i < line.length; i++) out[i] = left = (line[i] + ((left + above[i]) >> 1)) & 255;
    },
    function paeth(line, above, out) {
      for (let i = 0, left = 0, corner = 0; i < line.length; i++) {
        const up = above[i];
        const toLeft = Math.abs(up - corner);
        const toUp = Math.abs(left - corner);
        const toCorner = Math.abs(left + up - 2 * corner);
        const best = toLeft <= toUp && toLeft <= toCorner ? left : toUp <= toCorner ? up : corner;
        out[i] = left = (line[i] + best) & 255;
        corner = up;
      }
    },
  ];

  function chunk(kind, body) {
    const bytes = new Uint8Array(12 + body.length);
    const view = new DataView(bytes.buffer);
    view.setUint32(0, body.length);
    for (let i = 0; i < 4; i++) bytes[4 + i] = kind.charCodeAt(i);
    bytes.set(body, 8);
    view.setUint32(8 + body.length, crc32(bytes.subarray(4, 8 + body.length)));
    return bytes;
  }

  // A PNG of `indices` (bytes, row by row) into `palette` (a list of [red, green, blue]).
  async function encodePalette(width, height, indices, palette) {
    const header = new Uint8Array(13);
    const view = new DataView(header.buffer);
    view.setUint32(0, width);
    view.setUint32(4, height);
    header.set([8, 3], 8);
    const lines = new Uint8Array(height * (width + 1));
    for (let row = 0; row < height; row++) {
      lines.set(indices.subarray(row * width, (row + 1) * width), row * (width + 1) + 1);
    }
    const packed = await through(new CompressionStream("deflate"), [lines]);
    const parts = [
      Uint8Array.from(SIGNATURE),
      chunk("IHDR", header),
      chunk("PLTE", Uint8Array.from(palette.flat())),
      chunk("IDAT", packed),
      chunk("IEND", new Uint8Array(0)),
    ];
    return new Blob(parts, { type: "image/png" });
  }

  Anyup.png = { decode, encodePalette };
}
