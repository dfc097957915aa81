"use strict";

// The similarity by a graphics card: one fragment a pixel, the same arithmetic as the script's.
{
  const { canvas } = Anyup.base;
  const MOST_PLANES = 32;
  const SOFTWARE = /swiftshader|llvmpipe|softpipe|software|basic render/i;

  const VERTEX = `#version 300 es
    void main() {
      vec2 corner = vec2(gl_VertexID & 1, gl_VertexID >> 1);
      gl_Position = vec4(4.0 * corner - 1.0, 0.0, 1.0);
    }`;

  const FRAGMENT = `#version 300 es
    precision highp float;
    precision highp int;
    precision highp sampler2D;
    precision highp sampler2DArray;
    uniform sampler2DArray planes;
    uniform sampler2D inverse;
    uniform sampler2D colours;
    uniform float weights[${MOST_PLANES}];
    uniform float constant, low, gain;
    uniform int count, height;
    out vec4 colour;
    void main() {
      ivec2 at = ivec2(gl_FragCoord.x, height - 1 - int(gl_FragCoord.y));
      float sum = constant;
      for (int k = 0; k < count; k++) sum += weights[k] * texelFetch(planes, ivec3(at, k), 0).r;
      float cosine = sum * texelFetch(inverse, at, 0).r;
      colour = texelFetch(colours, ivec2(clamp(int((cosine - low) * gain + 0.5), 0, 255), 0), 0);
    }`;

  let card = null;

  // The page's one context, made when it is first asked for; null where there is none.
  function open() {
    if (card) return card;
    const surface = canvas(1, 1);
    const gl = surface.getContext("webgl2", { alpha: false, antialias: false, preserveDrawingBuffer: true });
    if (!gl) return null;
    const program = link(gl);
    if (!program) return null;
    const known = gl.getExtension("WEBGL_debug_renderer_info");
    const name = String(gl.getParameter(known ? known.UNMASKED_RENDERER_WEBGL : gl.RENDERER));
    const at = (variable) => gl.getUniformLocation(program, variable);
    card = { surface, gl, program, at, renderer: name, textures: [] };
    surface.addEventListener("webglcontextlost", () => {
      card = null;
      Anyup.page.lostCard();
    });
    return card;
  }

  function link(gl) {
    const program = gl.createProgram();
    for (const [kind, source] of [
      [gl.VERTEX_SHADER, VERTEX],
      [gl.FRAGMENT_SHADER, FRAGMENT],
    ]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    return gl.getProgramParameter(program, gl.LINK_STATUS) ? program : null;
  }

  // Whether a real graphics card draws: one that a processor imitates is slower than the script.
  function real() {
    const opened = open();
    return opened !== null && !SOFTWARE.test(opened.renderer);
  }

  class CardPainter {
    constructor(volume) {
      Object.assign(this, { volume, canvas: card.surface, table: null });
      const { gl, surface } = card;
      const { width, height, planes } = volume;
      [surface.width, surface.height] = [width, height];
      card.textures.forEach((old) => gl.deleteTexture(old));
      gl.pixelStorei(gl.UNPACK_ALIGNMENT, 1);
      card.textures = [gl.TEXTURE_2D_ARRAY, gl.TEXTURE_2D, gl.TEXTURE_2D].map((kind, unit) => texture(gl, kind, unit));
      gl.activeTexture(gl.TEXTURE0);
      gl.texStorage3D(gl.TEXTURE_2D_ARRAY, 1, gl.R8, width, height, planes.length);
      planes.forEach((plane, k) =>
        gl.texSubImage3D(gl.TEXTURE_2D_ARRAY, 0, 0, 0, k, width, height, 1, gl.RED, gl.UNSIGNED_BYTE, plane),
      );
      gl.activeTexture(gl.TEXTURE1);
      gl.texImage2D(gl.TEXTURE_2D, 0, gl.R32F, width, height, 0, gl.RED, gl.FLOAT, volume.inverse);
      gl.useProgram(card.program);
      ["planes", "inverse", "colours"].forEach((name, unit) => gl.uniform1i(card.at(name), unit));
      gl.uniform1i(card.at("count"), planes.length);
      gl.uniform1i(card.at("height"), height);
      gl.viewport(0, 0, width, height);
    }

    paint(query, table, low, high) {
      const { gl } = card;
      const { scale, offset } = this.volume;
      if (table !== this.table) {
        this.table = table;
        gl.activeTexture(gl.TEXTURE2);
        const bytes = new Uint8Array(table.buffer);
        gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, 256, 1, 0, gl.RGBA, gl.UNSIGNED_BYTE, bytes);
      }
      gl.uniform1fv(card.at("weights"), Float32Array.from(scale, (value, k) => 255 * value * query[k]));
      gl.uniform1f(card.at("constant"), Anyup.base.dot(offset, query));
      gl.uniform1f(card.at("low"), low);
      gl.uniform1f(card.at("gain"), 255 / (high - low));
      gl.drawArrays(gl.TRIANGLES, 0, 3);
    }

    // Whether the card paints what the script paints, within two of 256 steps, in all but one pixel of a thousand.
    agrees() {
      const { volume } = this;
      const { gl } = card;
      const query = Anyup.base.unit(volume.at(volume.count >> 1)) ?? new Float32Array(volume.planes.length);
      const table = Anyup.colours.maps.grey;
      const expected = new Uint32Array(volume.count);
      const got = new Uint8Array(4 * volume.count);
      volume.paintCosines(query, table, -1, 1, expected);
      this.paint(query, table, -1, 1);
      gl.readPixels(0, 0, volume.width, volume.height, gl.RGBA, gl.UNSIGNED_BYTE, got);
      let wrong = 0;
      for (let row = 0, i = 0; row < volume.height; row++) {
        const upside = (volume.height - 1 - row) * volume.width;
        for (let column = 0; column < volume.width; column++, i++) {
          if (Math.abs((expected[i] & 255) - got[4 * (upside + column)]) > 2) wrong++;
        }
      }
      return gl.getError() === gl.NO_ERROR && wrong <= volume.count / 1000;
    }
  }

  function texture(gl, kind, unit) {
    const made = gl.createTexture();
    gl.activeTexture(gl.TEXTURE0 + unit);
    gl.bindTexture(kind, made);
    for (const filter of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(kind, filter, gl.NEAREST);
    for (const wrap of [gl.TEXTURE_WRAP_S, gl.TEXTURE_WRAP_T]) gl.texParameteri(kind, wrap, gl.CLAMP_TO_EDGE);
    return made;
  }

  // A painter for a map of features; null where the card cannot do it, or does it otherwise than the script.
  function painter(volume) {
    const opened = open();
    if (!opened) return null;
    const most = opened.gl.getParameter(opened.gl.MAX_TEXTURE_SIZE);
    if (volume.planes.length > MOST_PLANES || Math.max(volume.width, volume.height) > most) return null;
    const made = new CardPainter(volume);
    return made.agrees() ? made : null;
  }

  function renderer() {
    return open()?.renderer ?? null;
  }

  Anyup.webgl = { real, painter, renderer };
}
