"use strict";

// Writes float32 tensors in the format of safetensors: length of the header, header (JSON), numbers.
{
  // tensors: {name: {shape, values (Float32Array)}}; metadata: {name: string}.
  function write(tensors, metadata) {
    const header = { __metadata__: metadata };
    let end = 0;
    for (const [name, { shape, values }] of Object.entries(tensors)) {
      header[name] = { dtype: "F32", shape, data_offsets: [end, end + 4 * values.length] };
      end += 4 * values.length;
    }
    const encoded = new TextEncoder().encode(JSON.stringify(header));
    const padded = Math.ceil(encoded.length / 8) * 8;
    const bytes = new Uint8Array(8 + padded + end).fill(0x20, 8, 8 + padded);
    const view = new DataView(bytes.buffer);
    view.setBigUint64(0, BigInt(padded), true);
    bytes.set(encoded, 8);
    let at = 8 + padded;
    for (const { values } of Object.values(tensors)) {
      for (const value of values) {
        view.setFloat32(at, value, true);
        at += 4;
      }
    }
    return new Blob([bytes], { type: "application/octet-stream" });
  }

  Anyup.safetensors = { write };
}
