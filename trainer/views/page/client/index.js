// The panel of a run page: curves, the list of prompts, one answer. It keeps what it was told and
// draws it; new steps come as one short string each, answers when somebody looks at them.

import { AllAnswers } from "./all.js";
import { Answer, asMarkdown } from "./answer.js";
import { Charts } from "./charts.js";
import { el, isTyping } from "./dom.js";
import { help } from "./help.js";
import { List } from "./list.js";
import { Curves, Rows, WRONG } from "./model.js";

export class Panel {
  // emit(name, values): "show", "all", "render"
  constructor(root, data, emit) {
    this.emit = emit;
    this.head = data.head;
    this.name = data.name;
    this.path = data.path;
    this.previews = new Rows(data.rows);
    this.final = data.final ? new Rows(data.final) : null;
    this.curves = new Curves(data.curves);
    this.rows = data.source === "final" && this.final ? this.final : this.previews;
    this.hover = null;
    this.isAll = false;
    this.isTouched = Boolean(new URLSearchParams(location.search).get("prompt"));
    this.charts = new Charts({ hover: (step) => this.setHover(step), go: (step) => this.go(step) });
    this.list = new List({ choose: (row, step) => this.choose(row, step), hover: (step) => this.setHover(step) });
    this.answer = new Answer({
      step: (move) => this.move(move), go: (step) => this.go(step), view: (view) => this.setView(view),
      render: () => this.emit("render", this.place()), copy: () => this.copy(), help: () => this.help.showModal(),
    });
    this.all = new AllAnswers({
      step: (move) => this.move(move), close: () => this.toggleAll(), choose: (row) => { this.toggleAll(); this.choose(row, this.step); },
    });
    this.sources = el("div", { class: "sources", role: "group", "aria-label": "which answers" });
    this.panes = el("div", { class: "panes" }, this.list.pane, this.answer.element);
    this.help = help();
    root.replaceChildren(this.charts.element, this.sources, this.panes, this.all.element, this.help);
    this.answer.view = ["plain", "rendered"].includes(data.view) ? data.view : "diff";
    document.title = this.head.title;
    this.open(data);
    this.listen(root);
  }

  open(data) {
    this.chosen = data.answer ? data.answer.prompt : null;
    this.step = data.answer ? data.answer.step : null;
    this.isFollowing = this.rows === this.previews && this.step === this.rows.newest;
    this.answer.setRows(this.rows);
    this.list.take(this.rows);
    this.drawSources();
    this.answer.show(data.answer);
    this.list.set(this.chosen, this.step, null);
    requestAnimationFrame(() => { this.draw(); this.list.reveal(); });
  }

  listen(root) {
    this.key = (event) => this.pressed(event);
    document.addEventListener("keydown", this.key);
    this.size = new ResizeObserver(() => this.draw());
    this.size.observe(root);
    this.theme = new MutationObserver(() => this.draw());
    this.theme.observe(document.body, { attributes: true, attributeFilter: ["class"] });
  }

  close() {
    document.removeEventListener("keydown", this.key);
    this.size.disconnect();
    this.theme.disconnect();
  }

  // ---- what the server tells

  takeRows(data) {
    const isNewer = this.previews.take(data);
    if (this.rows !== this.previews) return;
    this.answer.setRows(this.rows);
    const wasInSight = this.list.pool.has(this.chosen);
    this.list.take(this.rows);
    if (wasInSight) this.list.reveal(); // it may stand elsewhere now
    const isChanged = data.whole || data.columns.some(([step]) => step === this.step);
    const wrong = (row) => row !== null && WRONG.includes(this.rows.state(row));
    const first = this.rows.order[0] ?? null;
    // While nobody has chosen, a wrong answer stays open: the one that was open may be right now.
    const isMoved = this.chosen === null || (!this.isTouched && wrong(first) && !wrong(this.chosen));
    if (isMoved) {
      this.chosen = this.list.chosen = first;
      this.list.reveal();
    }
    if ((isNewer && this.isFollowing) || !this.rows.columns.has(this.step)) this.fetch(this.rows.newest);
    else if (isChanged || isMoved) this.fetch(this.step);
    else this.answer.draw();
    this.draw();
  }

  takeCurves(data) {
    this.curves.take(data);
    this.draw();
  }

  takeHead(head) {
    this.head = head;
    document.title = head.title;
    this.draw();
  }

  takeFinal(data) {
    this.final = new Rows(data);
    this.drawSources();
  }

  takeAnswer(answer) {
    if (!answer || answer.prompt !== this.chosen || answer.source !== this.source) return; // somebody went on
    this.step = answer.step;
    this.answer.show(answer);
    this.draw();
  }

  takeRendered(found) {
    const answer = this.answer.answer;
    if (!answer || found.prompt !== answer.prompt || found.step !== answer.step) return;
    answer.rendered = found;
    this.answer.draw();
  }

  takeAll(step, answers) {
    if (this.isAll) this.all.show(step, answers, this.rows);
  }

  // ---- what the user does

  get source() {
    return this.rows === this.final ? "final" : "previews";
  }

  place() {
    return { prompt: this.chosen, step: this.step, source: this.source };
  }

  choose(row, step) {
    this.chosen = row;
    this.isFollowing = step === null || step === undefined ? this.isFollowing : step === this.rows.newest;
    this.list.set(row, this.step, this.hover);
    this.list.reveal();
    this.ask(step ?? (this.isFollowing ? this.rows.newest : this.step));
  }

  go(step) {
    if (this.chosen === null || !this.rows.steps.length) return;
    const found = this.rows.steps[this.rows.at(step)];
    this.isFollowing = found === this.rows.newest;
    this.ask(found);
  }

  move(by) {
    const place = this.rows.steps.indexOf(this.step) + by;
    if (place >= 0 && place < this.rows.steps.length) this.go(this.rows.steps[place]);
  }

  // What somebody wants to see: the address says so.
  ask(step) {
    this.isTouched = true;
    this.fetch(step);
    this.keepPlace();
    this.draw();
  }

  fetch(step) {
    if (this.chosen === null) return;
    this.step = step;
    this.emit("show", this.place());
    if (this.isAll) this.emit("all", { step });
  }

  setView(view) {
    this.answer.view = view;
    this.answer.draw();
    this.keepPlace();
  }

  setHover(step) {
    if (step === this.hover) return;
    this.hover = step;
    this.draw();
  }

  toggleAll() {
    if (this.step === null || this.rows !== this.previews) return;
    this.isAll = !this.isAll;
    this.panes.hidden = this.isAll;
    this.all.element.hidden = !this.isAll;
    if (this.isAll) this.emit("all", { step: this.step });
    else this.draw();
  }

  setSource(rows) {
    if (this.isAll) this.toggleAll();
    this.rows = rows;
    this.isFollowing = rows === this.previews;
    this.chosen = rows.order[0] ?? null;
    this.answer.rows = rows;
    this.list.take(rows);
    this.drawSources();
    if (this.chosen !== null) this.choose(this.chosen, rows.newest);
  }

  // The address tells what is shown, so that it can be sent to somebody.
  keepPlace() {
    const words = new URLSearchParams();
    if (this.source === "final") words.set("source", "final");
    words.set("prompt", this.chosen);
    if (!this.isFollowing && this.source !== "final") words.set("step", this.step);
    if (this.answer.view !== "diff") words.set("view", this.answer.view);
    history.replaceState(history.state, "", `${this.path}?${words}`);
  }

  async copy() {
    if (!this.answer.answer) return;
    const link = new URL(`${this.path}?prompt=${this.chosen}&step=${this.step}`, location.href).href;
    const words = asMarkdown(this.answer.answer, this.name, link);
    try {
      await navigator.clipboard.writeText(words);
      this.answer.copied.textContent = "copied";
    } catch {
      // No clipboard without https on other hosts: the text is selected for Ctrl-C.
      const box = el("textarea", { class: "copy-box", "aria-label": "answer as Markdown" });
      box.value = words;
      this.answer.body.prepend(box);
      box.select();
      this.answer.copied.textContent = "press Ctrl-C";
    }
    setTimeout(() => { this.answer.copied.textContent = ""; }, 4000);
  }

  pressed(event) {
    if (isTyping(event) || document.querySelector("dialog[open]")) return;
    const isInList = document.activeElement === this.list.element;
    const to = (row) => { if (row !== null) this.choose(row, null); };
    const wrong = (row) => WRONG.includes(this.rows.state(row));
    const acts = {
      j: () => to(this.list.after(1)),
      k: () => to(this.list.after(-1)),
      n: () => to(this.list.after(1, { is: wrong, isRound: true })),
      a: () => this.toggleAll(),
      "?": () => this.help.showModal(),
      "/": () => this.list.input.focus(),
      ArrowLeft: () => this.move(-1),
      ArrowRight: () => this.move(1),
      Escape: () => { if (this.isAll) this.toggleAll(); },
      ...(isInList && {
        ArrowDown: () => to(this.list.after(1)),
        ArrowUp: () => to(this.list.after(-1)),
        Home: () => to(this.list.shown[0] ?? null),
        End: () => to(this.list.shown[this.list.shown.length - 1] ?? null),
      }),
    };
    const isScrolling = event.key.startsWith("Arrow") && event.target.closest?.(".wide, .strip-bar");
    if (!(event.key in acts) || isScrolling) return;
    event.preventDefault();
    acts[event.key]();
  }

  // ---- drawing

  drawSources() {
    this.sources.hidden = !this.final;
    if (!this.final) return;
    const one = (rows, words) => el("button", {
      type: "button", class: "chip", "aria-pressed": String(this.rows === rows), onclick: () => this.setSource(rows),
    }, words);
    this.sources.replaceChildren(one(this.previews, "previews"),
      one(this.final, `final evaluation ${this.head.final}`),
      el("span", { class: "dim" }, this.rows === this.final ? this.head.by_kind : ""));
  }

  draw() {
    this.panes.classList.toggle("no-previews", !this.rows.steps.length);
    this.list.set(this.chosen, this.step, this.hover);
    this.answer.drawStrip(this.hover);
    this.charts.draw({
      rows: this.previews, curves: this.curves, head: this.head,
      chosen: this.rows === this.previews ? this.step : null, hover: this.hover,
    });
  }
}
