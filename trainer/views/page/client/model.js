// What the page knows of a run: one column a preview step, one sign a prompt.

export const WRONG = ["lost", "never right"];

export const CHIPS = [
  ["wrong now", (state) => WRONG.includes(state)],
  ["lost", (state) => state === "lost"],
  ["never right", (state) => state === "never right"],
  ["right", (state) => state === "right"],
  ["no golden", (state) => state === "no golden"],
  ["no answer", (state) => state === "no answer"],
  ["all", () => true],
];

export class Rows {
  constructor(data) {
    this.clear();
    if (data) this.take(data);
  }

  clear() {
    this.steps = [];
    this.columns = new Map();
    this.names = [];
    this.prefix = ""; // what all names begin with and is not shown
    this.verdicts = [];
    this.order = [];
    this.planned = 1;
    this.isPlanned = false; // whether it is the number of preview steps of the whole run
  }

  // Take what the server says is new; gives whether the newest step is another one now.
  take(data) {
    const before = this.newest;
    if (data.whole) this.clear();
    for (const [step, marks, levels, right, compared, low, high, probability] of data.columns)
      this.columns.set(step, { marks, levels, right, compared, low, high, probability });
    this.steps = [...this.columns.keys()].sort((a, b) => a - b);
    if (data.names) [this.names, this.prefix] = [data.names, data.prefix];
    for (const [row, state, short, words] of data.verdicts) this.verdicts[row] = { state, short, words };
    this.order = data.order;
    this.planned = Math.max(data.planned, this.steps.length, 1);
    this.isPlanned = data.planned > 0;
    return before !== this.newest;
  }

  get newest() {
    return this.steps.length ? this.steps[this.steps.length - 1] : null;
  }

  mark(row, step) {
    return (this.columns.get(step)?.marks ?? "")[row] ?? " ";
  }

  level(row, step) {
    const sign = (this.columns.get(step)?.levels ?? "")[row] ?? " ";
    return sign === " " ? null : Number(sign);
  }

  // The place of the preview step at or before a step of training.
  at(step) {
    let low = 0, high = this.steps.length - 1;
    while (low < high) {
      const middle = Math.ceil((low + high) / 2);
      if (this.steps[middle] <= step) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  state(row) {
    return this.verdicts[row]?.state ?? "no answer";
  }

  counts() {
    return CHIPS.map(([, is]) => this.verdicts.filter((one) => is(one.state)).length);
  }

  shown(chip, search) {
    const is = CHIPS.find(([name]) => name === chip)[1];
    const words = search.trim().toLowerCase();
    return this.order.filter(
      (row) => is(this.state(row)) && (!words || (this.prefix + this.names[row]).toLowerCase().includes(words)),
    );
  }
}

// The loss, raw and smoothed; new points are added, smoothed ones near the end replaced.
export class Curves {
  constructor(data) {
    this.raw = [];
    this.smooth = [];
    this.validation = [];
    this.isLog = false;
    if (data) this.take(data);
  }

  take(data) {
    if (data.whole) this.raw = data.raw;
    else this.raw.push(...data.raw);
    if (data.smooth_whole) this.smooth = data.smooth;
    else if (data.smooth.length) {
      const from = data.smooth[0][0];
      while (this.smooth.length && this.smooth[this.smooth.length - 1][0] >= from) this.smooth.pop();
      this.smooth.push(...data.smooth);
    }
    this.validation = data.validation;
    this.isLog = data.is_log;
  }
}
