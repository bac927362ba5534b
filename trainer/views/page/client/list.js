// The list of prompts: only the rows in sight exist, so that 500 cost what 20 cost.

import { button, colours, el, sized } from "./dom.js";
import { CHIPS } from "./model.js";
import { cellWidth, drawStrip } from "./strips.js";

const ROW = 30, STRIP = 16, SPARE = 4;
const SIGNS = { right: "\u2713", lost: "\u2717", "never right": "\u2717", "no golden": "\u2022", "no answer": "!" };
const KINDS = { right: "right", lost: "wrong", "never right": "wrong", "no golden": "none", "no answer": "error" };

export class List {
  // on.choose(row, step | null), on.hover(step | null)
  constructor(on) {
    this.on = on;
    this.chip = "all";
    this.search = "";
    this.shown = [];
    this.scroll = 0;
    this.chips = el("div", { class: "chips", role: "group", "aria-label": "which prompts" });
    this.input = el("input", {
      type: "search", class: "search", placeholder: "search (/)", "aria-label": "search prompts",
      oninput: () => { this.search = this.input.value; this.filter(); },
    });
    this.space = el("div", { class: "rows-space" });
    this.element = el("div", {
      class: "rows", role: "listbox", tabindex: "0", "aria-label": "prompts", onscroll: () => this.draw(),
    }, this.space);
    this.bar = el("div", { class: "strip-bar", onscroll: () => { this.scroll = this.bar.scrollLeft; this.draw(); } },
      el("div", {}));
    this.empty = el("p", { class: "dim none-shown" });
    this.pane = el("div", { class: "rows-pane" },
      el("div", { class: "row-tools" }, this.chips, this.input), this.empty, this.element, this.bar, legend());
    this.element.addEventListener("click", (event) => this.clicked(event));
    this.element.addEventListener("pointermove", (event) => this.on.hover(this.stepAt(event)));
    this.element.addEventListener("pointerleave", () => this.on.hover(null));
    this.pool = new Map();
  }

  take(rows) {
    // Rows do not change places under the hand that is about to press one.
    if (this.rows !== rows || !this.element.matches(":hover, :focus")) this.order = rows.order;
    this.rows = rows;
    this.drawChips();
    this.filter();
  }

  drawChips() {
    const counts = this.rows.counts();
    if (!CHIPS.some(([name], n) => name === this.chip && (counts[n] || name === "all"))) this.chip = "all";
    this.chips.replaceChildren(...CHIPS.map(([name], n) => [name, counts[n]])
      .filter(([name, count]) => count || name === "all")
      .map(([name, count]) => button(`${name} ${count}`, {
        class: "chip", "aria-pressed": String(name === this.chip), "data-chip": name,
      }, () => { this.chip = name; this.drawChips(); this.filter(); })));
  }

  filter() {
    const wanted = new Set(this.rows.shown(this.chip, this.search));
    this.shown = this.order.filter((row) => wanted.has(row));
    for (const row of wanted) if (!this.order.includes(row)) this.shown.push(row);
    this.empty.hidden = this.shown.length > 0;
    this.empty.textContent = this.search ? `no prompt has "${this.search}"` : "no such prompt";
    this.space.style.height = `${this.shown.length * ROW}px`;
    this.draw();
  }

  // Bring the chosen row into sight.
  reveal() {
    const at = this.shown.indexOf(this.chosen);
    if (at < 0) return;
    const [top, bottom] = [at * ROW, (at + 1) * ROW];
    if (top < this.element.scrollTop) this.element.scrollTop = top;
    else if (bottom > this.element.scrollTop + this.element.clientHeight)
      this.element.scrollTop = bottom - this.element.clientHeight;
  }

  set(chosen, step, hover) {
    Object.assign(this, { chosen, step, hover });
    this.draw();
  }

  // The next row in a direction that `is` says yes to; after the last one the first, where `isRound`.
  after(move, { is = () => true, isRound = false } = {}) {
    const at = this.shown.indexOf(this.chosen);
    for (let n = 1; n <= this.shown.length; n++) {
      const place = at < 0 ? (move > 0 ? n - 1 : this.shown.length - n) : at + n * move;
      const row = this.shown[isRound ? (place + this.shown.length) % this.shown.length : place];
      if (row === undefined) return null;
      if (is(row)) return row;
    }
    return null;
  }

  draw() {
    if (this.isDue) return;
    this.isDue = true;
    requestAnimationFrame(() => { this.isDue = false; this.drawNow(); });
  }

  layOut() {
    const most = Math.max(40, Math.round(this.element.clientWidth * 0.36));
    this.cell = cellWidth(most, this.rows.planned, 6);
    // Where the number of steps is known from the start, names get what strips will never need.
    const width = this.stripWidth = this.rows.isPlanned ? Math.min(most, Math.max(24, this.rows.planned * this.cell)) : most;
    const all = this.rows.steps.length * this.cell;
    const isWide = this.rows.planned * this.cell > width;
    this.bar.hidden = !isWide;
    if (!isWide) { this.scroll = 0; return; }
    this.bar.style.width = `${width}px`;
    this.bar.firstChild.style.width = `${Math.max(all, width)}px`;
    // The newest step stays in sight: it moves on by half a strip, not at every step.
    const isAtEnd = this.lastAll === undefined || this.scroll + width >= this.lastAll - this.cell;
    if (isAtEnd && all > this.scroll + width)
      this.scroll = this.lastAll === undefined ? Math.max(0, all - width) : all - Math.round(width / 2);
    this.lastAll = all;
    const end = Math.max(0, all - width);
    if (this.step !== this.seenStep && this.step !== null && this.step !== this.rows.newest) {
      const x = this.rows.at(this.step) * this.cell;
      if (x < this.scroll || x + this.cell > this.scroll + width) this.scroll = Math.min(end, Math.max(0, x - width / 2));
    }
    this.seenStep = this.step;
    if (this.bar.scrollLeft !== Math.min(this.scroll, end)) this.bar.scrollLeft = Math.min(this.scroll, end);
  }

  drawNow() {
    if (!this.rows) return;
    this.layOut();
    const ink = colours(this.element);
    const first = Math.max(0, Math.floor(this.element.scrollTop / ROW) - SPARE);
    const last = Math.min(this.shown.length, Math.ceil((this.element.scrollTop + this.element.clientHeight) / ROW) + SPARE);
    const wanted = new Set(this.shown.slice(first, last));
    for (const [row, parts] of this.pool) if (!wanted.has(row)) { parts.line.remove(); this.pool.delete(row); }
    for (let at = first; at < last; at++) this.drawRow(this.shown[at], at, ink);
    const current = this.pool.get(this.chosen);
    if (current) this.element.setAttribute("aria-activedescendant", current.line.id);
    else this.element.removeAttribute("aria-activedescendant");
  }

  make(row) {
    const parts = {
      mark: el("span", { class: "row-mark", "aria-hidden": "true" }),
      name: el("span", { class: "row-name", dir: "auto" }),
      canvas: el("canvas", { "aria-hidden": "true", class: "strip" }),
      verdict: el("span", { class: "row-verdict" }),
    };
    parts.line = el("div", { class: "row-line", role: "option", id: `row-${row}`, "data-row": row },
      parts.mark, parts.name, parts.canvas, parts.verdict);
    this.space.append(parts.line);
    this.pool.set(row, parts);
    return parts;
  }

  drawRow(row, at, ink) {
    const { line, mark, name, canvas, verdict } = this.pool.get(row) ?? this.make(row);
    const { state, short, words } = this.rows.verdicts[row];
    line.style.top = `${at * ROW}px`;
    line.setAttribute("aria-selected", String(row === this.chosen));
    line.setAttribute("aria-posinset", at + 1);
    line.setAttribute("aria-setsize", this.shown.length);
    line.setAttribute("aria-label", `${this.rows.names[row]}: ${words}`);
    mark.textContent = SIGNS[state];
    mark.className = `row-mark mark-${KINDS[state]}`;
    name.textContent = this.rows.names[row];
    verdict.textContent = short;
    const context = sized(canvas, this.stripWidth, STRIP);
    drawStrip(context, this.rows, row, {
      width: this.stripWidth, height: STRIP, cell: this.cell, scroll: this.scroll, colours: ink,
      chosen: row === this.chosen ? this.step : null, hover: this.hover,
    });
  }

  stepAt(event) {
    const canvas = event.target.closest?.(".row-line")?.querySelector("canvas");
    if (!canvas || !this.rows.steps.length) return null;
    const x = event.clientX - canvas.getBoundingClientRect().left;
    if (x < 0 || x > this.stripWidth) return null;
    const place = Math.floor((x + this.scroll) / this.cell);
    return place < this.rows.steps.length ? this.rows.steps[place] : null;
  }

  clicked(event) {
    const line = event.target.closest(".row-line");
    if (line) this.on.choose(Number(line.dataset.row), this.stepAt(event));
  }
}

function legend() {
  const item = (kind, words) => el("span", { class: "legend-item" }, el("span", { class: `cell cell-${kind}` }), words);
  return el("div", { class: "legend dim" }, item("right", "right"), item("wrong", "wrong (lower: golden less probable)"),
    item("none", "nothing to compare with"), item("error", "no answer"));
}
