"use strict";

// Reads the JSON that lies in the page: numbers become arrays, pictures stay encoded until they are shown.
{
  const { PageError, floats } = Anyup.base;
  const FORMAT = 1;

  function read(text) {
    let data;
    try {
      data = JSON.parse(text);
    } catch (error) {
      throw new PageError(
        `The data in this page cannot be read (${error.message}). The file is probably cut off: ` +
          "copy it again, or write it anew with anyup-fast view.",
        { cause: error },
      );
    }
    if (data.format !== FORMAT) {
      throw new PageError(
        `The data in this page has format ${data.format}, and its script reads format ${FORMAT}. ` +
          "Write the page anew with anyup-fast view, with one release of the package.",
      );
    }
    if (!data.pictures.length) {
      throw new PageError("There is no picture in this page. Write it anew with anyup-fast view.");
    }
    const { directions } = data;
    const weighted = (items) => items.map((item) => ({ ...item, weight: rows(floats(item.weight), directions) }));
    return {
      ...data,
      basis: floats(data.basis),
      views: weighted(data.views),
      prompts: weighted(data.prompts ?? []).map((prompt) => ({ name: prompt.name, weight: prompt.weight[0] })),
      classes: weighted(data.classes ?? []).map((given) => ({ name: given.name, weight: given.weight[0] })),
    };
  }

  function rows(numbers, width) {
    return Array.from({ length: numbers.length / width }, (_, row) => numbers.subarray(row * width, (row + 1) * width));
  }

  Anyup.data = { read, FORMAT };
}
