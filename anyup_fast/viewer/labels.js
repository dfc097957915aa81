"use strict";

// Classes and their points, with undo; prototypes; the label map of a picture.
{
  const { unit, dot } = Anyup.base;
  const MOST = 9;

  // A state is a list of classes {name, colour, given, points} that is never changed, only replaced.
  class Labels {
    // `initial`: classes {name, weight} that the page begins with.
    constructor(initial, changed) {
      const named = [];
      for (const { name, weight } of initial.slice(0, MOST)) {
        named.push(made(distinct(name, named), named.length, weight));
      }
      while (named.length < 2) named.push(made(distinct("", named), named.length));
      this.classes = named;
      this.past = [];
      this.future = [];
      this.active = 0;
      this.changed = changed;
    }

    replace(classes) {
      this.past.push(this.classes);
      this.future = [];
      this.settle(classes);
    }

    settle(classes) {
      this.classes = classes;
      this.active = Math.min(this.active, classes.length - 1);
      this.changed();
    }

    undo() {
      if (!this.past.length) return false;
      this.future.push(this.classes);
      this.settle(this.past.pop());
      return true;
    }

    redo() {
      if (!this.future.length) return false;
      this.past.push(this.classes);
      this.settle(this.future.pop());
      return true;
    }

    edit(index, change) {
      this.replace(this.classes.map((one, i) => (i === index ? { ...one, ...change } : one)));
    }

    // `point`: {picture, row, column, vector}; vector is what the features say there (K).
    add({ vector, ...point }) {
      const direction = unit(vector);
      if (!direction) return false;
      const { points } = this.classes[this.active];
      this.edit(this.active, { points: [...points, { ...point, unit: direction }] });
      return true;
    }

    // Removes the nearest point of a picture within `reach` pixels; returns its class.
    erase({ picture, row, column }, reach) {
      let best = null;
      this.classes.forEach((one, index) =>
        one.points.forEach((point) => {
          const away = Math.hypot(point.row - row, point.column - column);
          if (point.picture === picture && away <= (best?.away ?? reach)) best = { away, index, point };
        }),
      );
      if (!best) return null;
      const found = this.classes[best.index];
      this.edit(best.index, { points: found.points.filter((point) => point !== best.point) });
      return found;
    }

    clear() {
      this.replace(this.classes.map((one) => ({ ...one, points: [] })));
    }

    get full() {
      return this.classes.length >= MOST;
    }

    // The name that a class got; null where nothing is left of the one wanted.
    rename(index, wanted) {
      if (!printable(wanted)) return null;
      const name = distinct(wanted, this.classes.filter((_, i) => i !== index));
      if (name !== this.classes[index].name) this.edit(index, { name });
      return name;
    }

    addClass(name = "", weight = null) {
      if (this.full) return false;
      const used = new Set(this.classes.map((one) => one.colour));
      const colour = Anyup.colours.classes.findIndex((_, i) => !used.has(i));
      this.replace([...this.classes, made(distinct(name, this.classes), colour, weight)]);
      this.active = this.classes.length - 1;
      this.changed();
      return true;
    }

    removeClass(index) {
      this.replace(this.classes.filter((_, i) => i !== index));
    }

    get points() {
      return this.classes.flatMap((one, index) => one.points.map((point) => ({ ...point, colour: one.colour, index })));
    }

    // Classes that have a prototype, in the order in which they are shown: the numbers of label maps and heads.
    get labelled() {
      return this.classes.filter((one) => prototype(one));
    }
  }

  function made(name, colour, weight = null) {
    return { name, colour, given: weight, points: [] };
  }

  function printable(name) {
    return name.replace(/[\p{Cc}\p{Zl}\p{Zp}]+/gu, " ").trim();
  }

  // A name that no other class has, without control characters: files of heads take no other.
  function distinct(wanted, others) {
    const taken = new Set(others.map((one) => one.name));
    const name = printable(wanted);
    const variant = (number) => (name ? `${name} (${number})` : `class ${number}`);
    if (name && !taken.has(name)) return name;
    let number = name ? 2 : others.length + 1;
    while (taken.has(variant(number))) number++;
    return variant(number);
  }

  const prototypes = new WeakMap();

  // Mean of the unit vectors of a class's points, at length one; a prototype it was given counts as one more point.
  function prototype(one) {
    if (!prototypes.has(one)) prototypes.set(one, mean([...one.points.map((point) => point.unit), ...given(one)]));
    return prototypes.get(one);
  }

  function given(one) {
    const direction = one.given && unit(one.given);
    return direction ? [direction] : [];
  }

  function mean(vectors) {
    if (!vectors.length) return null;
    const sum = new Float64Array(vectors[0].length);
    for (const vector of vectors) vector.forEach((value, k) => (sum[k] += value));
    return unit(sum);
  }

  // Labels of one picture; the scores of a class are computed again only when its prototype changes.
  class LabelMap {
    constructor(picture) {
      this.volume = picture.high;
      this.labels = new Uint8Array(this.volume.count);
      this.best = new Float32Array(this.volume.count);
      this.scores = new Map();
      this.classes = [];
      this.shares = [];
    }

    update(classes) {
      const wanted = classes.map(prototype);
      for (const known of this.scores.keys()) if (!wanted.includes(known)) this.scores.delete(known);
      for (const one of wanted) if (!this.scores.has(one)) this.scores.set(one, this.volume.dots(one));
      this.classes = classes;
      this.labels.fill(0);
      wanted.forEach((one, label) => raise(this.scores.get(one), this.best, this.labels, label));
      const counts = Array.from({ length: classes.length }, () => 0);
      if (classes.length) for (const label of this.labels) counts[label]++;
      this.shares = counts.map((count) => count / this.volume.count);
    }
  }

  function raise(scores, best, labels, label) {
    if (label === 0) {
      best.set(scores);
      return;
    }
    for (let i = 0; i < scores.length; i++) {
      if (scores[i] > best[i]) {
        best[i] = scores[i];
        labels[i] = label;
      }
    }
  }

  // Cosine of a vector with a class.
  function closeness(one, vector) {
    const [direction, at] = [prototype(one), unit(vector)];
    return direction && at ? dot(direction, at) : 0;
  }

  Anyup.labels = { Labels, LabelMap, prototype, closeness, MOST };
}
