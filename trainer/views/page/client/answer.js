// The right pane: one answer beside its golden answer, with what differs marked on both sides.

import DOMPurify from "dompurify";

import { button, colours, el, number, sized } from "./dom.js";
import { cellWidth, drawStrip } from "./strips.js";

const VIEWS = ["diff", "plain", "rendered"];
const OWN_STRIP = 20;
const MAX_SAMPLES = 4; // more are folded at first
const SIGN_WORDS = { "=": "right", x: "wrong", ".": "nothing to compare with", "!": "no answer", "-": "superseded by a newer step" };
const CLASSES = { "=": "right", x: "wrong", ".": "none", "!": "error", "-": "late" };
// Whatever loads, sends, runs or leads elsewhere goes; what is left is formatted text.
const CLEAN = {
  FORBID_TAGS: ["img", "picture", "source", "video", "audio", "track", "svg", "math", "style", "form", "input",
    "button", "textarea", "select", "dialog", "template"],
  FORBID_ATTR: ["style", "class", "id", "name", "href", "src", "srcset", "background", "poster", "title"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
};

export class Answer {
  // on.step(move), on.go(step), on.view(view), on.render(), on.copy(answer), on.all()
  constructor(on) {
    this.on = on;
    this.view = "diff";
    this.title = el("h2", { class: "question", dir: "auto" });
    this.verdict = el("p", { class: "verdict" });
    this.strip = el("canvas", { class: "own-strip", role: "img", "aria-label": "all previews of this prompt" });
    this.strip.addEventListener("click", (event) => {
      const place = Math.floor((event.clientX - this.strip.getBoundingClientRect().left) / this.cell + this.from);
      if (place < this.rows.steps.length) this.on.go(this.rows.steps[place]);
    });
    this.place = el("span", { class: "place" });
    this.back = button("\u2190", { class: "key", "aria-label": "the preview before" }, () => this.on.step(-1));
    this.forth = button("\u2192", { class: "key", "aria-label": "the next preview" }, () => this.on.step(1));
    this.views = el("span", { class: "views", role: "group", "aria-label": "how answers are shown" },
      ...VIEWS.map((view) => button(view, { "data-view": view }, () => this.on.view(view))));
    this.copied = el("span", { class: "dim", role: "status" });
    this.keys = el("span", { class: "keys dim" }, ...hint("j", "k", " prompt "), ...hint("n", " next wrong "),
      ...hint("a", " all answers "), button("?", { class: "key", "aria-label": "keys and legend" }, () => this.on.help()));
    this.facts = el("span", { class: "facts" });
    this.body = el("div", { class: "answer-body" });
    this.element = el("section", { class: "answer-pane", "aria-label": "answer" },
      this.title, el("div", { class: "verdict-line" }, this.verdict, this.keys), this.strip,
      el("div", { class: "tools" }, el("span", { class: "steps" }, this.back, this.place, this.forth),
        el("span", { class: "ways" }, this.views,
          button("copy", { class: "plain-button", "data-act": "copy", "aria-label": "copy as Markdown" }, () => this.on.copy()), this.copied),
        this.facts),
      this.body);
    this.nothing = el("p", { class: "dim" }, "No answers yet.");
    this.show(null);
  }

  setRows(rows) {
    this.rows = rows;
    this.drawStrip();
  }

  show(answer) {
    const isSame = answer && this.answer && JSON.stringify(answer) === JSON.stringify(this.answer);
    if (isSame && !answer.rendered) return; // whoever reads or selects it is not disturbed
    this.answer = answer;
    for (const child of this.element.children) child.hidden = !answer && child !== this.nothing;
    this.nothing.hidden = Boolean(answer);
    if (!answer) { this.element.append(this.nothing); return; }
    this.title.textContent = answer.question;
    this.verdict.textContent = [answer.verdict, answer.change && `golden tokens ${answer.change}`].filter(Boolean).join("; ");
    this.draw();
  }

  draw() {
    const answer = this.answer;
    if (!answer) return;
    const steps = this.rows.steps;
    const at = steps.indexOf(answer.step);
    this.place.replaceChildren("step ", el("b", {}, number(answer.step)), ` (${at + 1} of ${steps.length})`);
    this.back.disabled = at <= 0;
    this.forth.disabled = at >= steps.length - 1;
    this.element.dataset.shows = this.view;
    for (const one of this.views.children) one.setAttribute("aria-pressed", String(one.dataset.view === this.view));
    const scores = Object.entries(answer.scores).map(([name, value]) => `${name} ${value.toPrecision(3)}`);
    this.facts.replaceChildren(...[...scores, ...answer.facts, ...(answer.is_same_as_before ? ["the same as the preview before"] : [])].map((fact) => el("span", { class: "fact" }, fact)));
    this.body.replaceChildren(this.sides(), ...this.more());
    this.drawStrip();
    requestAnimationFrame(() => this.toFirst());
  }

  sides() {
    const answer = this.answer;
    const sides = el("div", { class: "sides" });
    const head = el("div", { class: "label" }, "generated ",
      el("span", { class: `row-mark mark-${CLASSES[answer.mark]}` },
        `${{ "=": "\u2713", x: "\u2717", "!": "!" }[answer.mark] ?? ""} ${SIGN_WORDS[answer.mark] ?? ""}`),
      el("span", { class: "where" }, where(answer)));
    if (answer.error !== null) {
      if (answer.golden !== null) sides.append(side(el("div", { class: "label" }, "golden"), plain(answer.golden)));
      sides.append(side(head, plain(answer.error)));
      return sides;
    }
    if (answer.golden !== null)
      sides.append(side(el("div", { class: "label" }, "golden"), this.text(answer.golden, answer.golden_pieces, "golden")));
    sides.append(side(head, this.text(answer.text, answer.text_pieces, "text")));
    this.scrollTogether([...sides.querySelectorAll(".answer")]);
    return sides;
  }

  text(text, pieces, which) {
    if (this.view === "rendered") {
      const html = this.answer.rendered?.[which];
      if (html === undefined) { this.on.render(); return plain(text); }
      return el("div", { class: "answer rendered", dir: "auto", tabindex: "0" },
        DOMPurify.sanitize(html, { ...CLEAN, RETURN_DOM_FRAGMENT: true }));
    }
    return this.view === "diff" && pieces ? marked(pieces) : plain(text);
  }

  more() {
    const answer = this.answer;
    const found = [];
    if (answer.samples.length)
      found.push(el("details", { class: "more", open: this.isSamplesOpen ?? answer.samples.length <= MAX_SAMPLES,
        ontoggle: (event) => { this.isSamplesOpen = event.target.open; } },
        el("summary", {}, `further samples (${answer.samples.length})`),
        ...answer.samples.map(([mark, text]) => side(
          el("div", { class: `label row-mark mark-${CLASSES[mark]}` }, SIGN_WORDS[mark] ?? ""), plain(text)))));
    if (answer.tokens.length)
      found.push(el("details", { class: "more", open: this.isTokensOpen, ontoggle: (event) => { this.isTokensOpen = event.target.open; } },
        el("summary", {}, `golden tokens by probability: ${answer.tokens_words}`),
        el("div", { class: "answer", dir: "auto" }, ...answer.tokens.map(([text, chance]) =>
          el("span", { class: `surprise-${surprise(chance)}`, "data-chance": `${(100 * chance).toFixed(1)} %` }, text))),
        el("p", { class: "dim legend" }, ...[0.95, 0.6, 0.2, 0.05].map((chance, n) => el("span", { class: "legend-item" },
          el("span", { class: `surprise-${surprise(chance)}` }, ["90 % and more", "from 50 %", "from 10 %", "below 10 %"][n]))))));
    found.push(el("details", { class: "more", open: this.isRawOpen, ontoggle: (event) => { this.isRawOpen = event.target.open; } },
      el("summary", {}, "prompt and raw text"),
      el("div", { class: "label" }, "prompt"), plain(answer.question),
      el("div", { class: "label" }, "generated, with special tokens"), plain(answer.raw)));
    return found;
  }

  // The first difference in sight, on both sides.
  toFirst() {
    for (const box of this.body.querySelectorAll(".sides .answer")) {
      const first = box.querySelector(".missing, .extra");
      box.scrollTop = first ? Math.max(0, first.offsetTop - box.clientHeight / 3) : 0;
    }
  }

  scrollTogether(boxes) {
    let leader = null;
    for (const box of boxes) {
      box.addEventListener("pointerenter", () => { leader = box; });
      box.addEventListener("focus", () => { leader = box; });
      box.addEventListener("scroll", () => {
        if (leader !== box) return;
        const share = box.scrollTop / Math.max(1, box.scrollHeight - box.clientHeight);
        for (const other of boxes)
          if (other !== box) other.scrollTop = share * (other.scrollHeight - other.clientHeight);
      });
    }
  }

  drawStrip(hover = null) {
    if (!this.rows || !this.answer) return;
    const width = this.element.clientWidth;
    this.cell = cellWidth(width, this.rows.planned, 22);
    const shown = Math.floor(width / this.cell);
    // More steps than fit: the window that holds the chosen one, in whole windows.
    const at = Math.max(0, this.rows.steps.indexOf(this.answer.step));
    this.from = this.rows.steps.length <= shown ? 0
      : Math.min(this.rows.steps.length - shown, Math.floor(at / shown) * shown);
    const context = sized(this.strip, width, OWN_STRIP);
    drawStrip(context, this.rows, this.answer.prompt, {
      width, height: OWN_STRIP, cell: this.cell, scroll: this.from * this.cell, colours: colours(this.element),
      chosen: this.answer.step, hover,
    });
  }
}

function hint(...keys) {
  const words = keys.pop();
  return [...keys.map((key) => el("kbd", {}, key)), words];
}

function where(answer) {
  if (!answer.words || answer.mark === "=") return "";
  return `, ${answer.words}`;
}

const side = (label, text) => el("div", { class: "side" }, label, text);

const plain = (text) => el("div", { class: "answer", dir: "auto", tabindex: "0" }, text || "(nothing)");

const surprise = (chance) => (chance >= 0.9 ? 0 : chance >= 0.5 ? 1 : chance >= 0.1 ? 2 : 3);

export function marked(pieces) {
  const box = el("div", { class: "answer", dir: "auto", tabindex: "0" });
  for (const [kind, text] of pieces) {
    if (kind === "same") box.append(text);
    else if (kind === "fold" || kind === "thought") {
      const lines = text.split("\n").length - 1;
      const size = lines > 1 ? `${lines} lines` : `${number(text.length)} characters`;
      const words = kind === "fold" ? `${size} that are equal` : `thoughts, ${size}`;
      box.append(el("details", { class: "fold" }, el("summary", {}, words), text));
    } else {
      const isWhite = !text.trim();
      const breaks = isWhite ? "\u23ce".repeat(Math.min(40, text.split("\n").length - 1)) : "";
      box.append(el(kind === "missing" ? "del" : "ins", { class: isWhite ? `${kind} white` : kind, "data-breaks": breaks || null }, text));
    }
  }
  if (!box.childNodes.length) box.append("(nothing)");
  return box;
}

// The answer that is shown, for a chat or an issue.
export function asMarkdown(answer, name, link) {
  const fence = (text) => {
    const ticks = "`".repeat(Math.max(3, ...[...text.matchAll(/`+/g)].map((one) => one[0].length + 1)));
    return `${ticks}\n${text}\n${ticks}`;
  };
  const parts = [`**${name}, step ${answer.step}**: ${SIGN_WORDS[answer.mark] ?? ""} (${answer.verdict})`, "Prompt:", fence(answer.question)];
  if (answer.golden !== null) parts.push("Golden:", fence(answer.golden));
  parts.push("Generated:", fence(answer.error ?? answer.text));
  if (answer.words) parts.push(answer.words);
  return [...parts, link].join("\n\n");
}
