// Keys and signs, for whoever presses `?`.

import { button, el } from "./dom.js";

const KEYS = [
  ["j  k", "the next and the prompt before (in the list also the arrows up and down)"],
  ["\u2190  \u2192", "the preview before and the next one"],
  ["n", "the next prompt that is wrong now"],
  ["a", "all answers of this step"],
  ["/", "search prompts"],
  ["?", "this"],
];
const SIGNS = [
  ["full bar", "right: the answer matches its golden answer"],
  ["low bar", "wrong; the lower and darker, the less probable the golden answer's tokens (where measured)"],
  ["grey bar", "no golden answer to compare with"],
  ["line", "no answer; at the foot: superseded by a newer step"],
  ["\u25b2", "in the charts: the step with most right answers; small ticks are checkpoints; a dotted line: resumed there"],
];

export function help() {
  const rows = (list, tag) => list.map(([key, words]) => el("tr", {}, el("th", { scope: "row" }, el(tag, {}, key)), el("td", {}, words)));
  const dialog = el("dialog", { class: "help", "aria-label": "keys and signs" },
    el("h2", {}, "Keys"), el("table", {}, ...rows(KEYS, "kbd")),
    el("h2", {}, "Signs"), el("table", {}, ...rows(SIGNS, "span")));
  dialog.append(button("close", { class: "plain-button" }, () => dialog.close()));
  return dialog;
}
