// All answers of one step as a table.

import { button, el, number } from "./dom.js";

export class AllAnswers {
  // on.step(move), on.close(), on.choose(row)
  constructor(on) {
    this.on = on;
    this.title = el("h2", {});
    this.table = el("div", { class: "wide" });
    this.element = el("section", { class: "all-answers", "aria-label": "all answers of one step", hidden: true },
      el("div", { class: "tools" }, this.title,
        button("\u2190", { class: "key", "aria-label": "the preview before" }, () => on.step(-1)),
        button("\u2192", { class: "key", "aria-label": "the next preview" }, () => on.step(1)),
        button("back to one prompt (a)", { class: "plain-button" }, () => on.close())),
      this.table);
  }

  show(step, answers, rows) {
    this.title.textContent = `All answers of step ${number(step)}`;
    const head = el("tr", {}, ...["", "prompt", "golden", "generated", "score"].map((name) => el("th", { scope: "col" }, name)));
    const byRow = new Map(answers.map((one) => [one.prompt, one]));
    const lines = rows.order.filter((row) => byRow.has(row)).map((row) => this.line(byRow.get(row), rows));
    this.table.replaceChildren(el("table", { class: "lined all-table" }, el("thead", {}, head), el("tbody", {}, ...lines)));
  }

  line(one, rows) {
    const kind = { "=": "right", x: "wrong", "!": "error" }[one.mark] ?? "none";
    const sign = { "=": "\u2713", x: "\u2717", "!": "!" }[one.mark] ?? "\u2022";
    const pieces = (list) => el("td", { dir: "auto", class: "cell-text" }, ...list.map(([type, text]) =>
      (type === "same" ? text : el(type === "missing" ? "del" : "ins", { class: type }, text))));
    return el("tr", {},
      el("td", { class: `row-mark mark-${kind}`, "aria-label": kind }, sign),
      el("td", { dir: "auto" }, button(rows.names[one.prompt], { class: "link" }, () => this.on.choose(one.prompt))),
      pieces(one.golden), pieces(one.text), el("td", { class: "dim" }, one.score));
  }
}
