// Two charts of the first screen, on one step axis: right answers, and loss.

import { colours, el, number, sized } from "./dom.js";

const LEFT = 40, RIGHT = 8, TOP = 6, BOTTOM = 18;
const MANY = 100;
const NICE = [1, 1.5, 2, 3, 4, 5, 6, 8, 10];

// The end of the axis: it stays for a while, so that a growing run does not shift its past.
function axisEnd(last, total, isOver) {
  if (isOver || last <= 0) return Math.max(last, 1);
  const power = 10 ** Math.floor(Math.log10(last));
  const nice = NICE.map((one) => one * power).find((one) => one >= last);
  return total ? Math.max(last, Math.min(nice, total)) : nice;
}

// A number of two digits that fits beside an axis, such as 0.48 or 8e-4.
const short = (value) =>
  (value !== 0 && Math.abs(value) < 0.01 ? value.toExponential(0) : Number(value.toPrecision(2)).toString());

// A running mean, for curves of so many previews that they are noise.
function calmed(points) {
  const half = points.length > MANY ? Math.round(points.length / 40) : 0;
  return half === 0 ? points : points.map(([step], n) => {
    const window = points.slice(Math.max(0, n - half), n + half + 1);
    return [step, window.reduce((sum, [, value]) => sum + value, 0) / window.length];
  });
}

export class Charts {
  // on.hover(step | null), on.go(step)
  constructor(on) {
    this.on = on;
    this.match = this.figure("right answers, %");
    this.loss = this.figure("loss");
    this.element = el("div", { class: "curves-row" }, this.match.frame, this.loss.frame);
    this.hover = null;
    this.isDue = false;
  }

  figure(title) {
    const canvas = el("canvas", { role: "img", "aria-label": title });
    const [name, now] = [el("span", { class: "curve-title" }, title), el("span", { class: "curve-now" })];
    const frame = el("figure", { class: "curve" }, el("figcaption", {}, name, now), canvas);
    const step = (event) => {
      const box = canvas.getBoundingClientRect();
      const share = (event.clientX - box.left - LEFT) / Math.max(1, box.width - LEFT - RIGHT);
      return Math.round(Math.min(1, Math.max(0, share)) * this.end);
    };
    canvas.addEventListener("pointermove", (event) => this.on.hover(step(event)));
    canvas.addEventListener("pointerleave", () => this.on.hover(null));
    canvas.addEventListener("click", (event) => this.on.go(step(event)));
    return { frame, canvas, name, now };
  }

  // state: {rows, curves, head, chosen, hover}
  draw(state) {
    this.state = state;
    if (this.isDue) return;
    this.isDue = true;
    requestAnimationFrame(() => {
      this.isDue = false;
      this.drawNow(this.state);
    });
  }

  drawNow({ rows, curves, head, chosen, hover }) {
    const last = Math.max(rows.newest ?? 0, curves.raw.length ? curves.raw[curves.raw.length - 1][0] : 0);
    this.end = axisEnd(last, head.total, head.is_over);
    this.isNarrow = window.innerWidth < 640;
    const ink = colours(this.element);
    const hasMatch = rows.steps.some((step) => rows.columns.get(step).compared);
    const hasGolden = rows.steps.some((step) => rows.columns.get(step).probability !== null);
    this.match.frame.hidden = !(hasMatch || hasGolden);
    this.loss.frame.hidden = !(curves.raw.length || curves.validation.length);
    this.element.hidden = this.match.frame.hidden && this.loss.frame.hidden;
    const shared = { head, chosen, hover, ink };
    if (!this.match.frame.hidden) this.drawMatch(rows, shared, hasMatch, hasGolden);
    if (!this.loss.frame.hidden) this.drawLoss(curves, shared);
  }

  drawMatch(rows, shared, hasMatch, hasGolden) {
    const columns = rows.steps.map((step) => [step, rows.columns.get(step)]);
    const right = columns.filter(([, one]) => one.compared)
      .map(([step, one]) => [step, (100 * one.right) / one.compared]);
    const band = columns.filter(([, one]) => one.low !== null);
    const golden = columns.filter(([, one]) => one.probability !== null)
      .map(([step, one]) => [step, one.probability]);
    const highest = Math.max(1, ...right.map(([, value]) => value), ...golden.map(([, value]) => value));
    const top = [10, 25, 50, 100].find((one) => one >= highest);
    const paint = this.start(this.match.canvas, [0, top], false, [0, top / 2, top], shared);
    if (band.length > 1) {
      paint.context.fillStyle = shared.ink.band;
      paint.context.beginPath();
      const y = (value) => paint.y(Math.min(value, top));
      for (const [step, one] of band) paint.context.lineTo(paint.x(step), y(one.high));
      for (const [step, one] of band.slice().reverse()) paint.context.lineTo(paint.x(step), y(one.low));
      paint.context.fill();
    }
    paint.line(calmed(golden), shared.ink.extra, 1.5, [4, 3]);
    if (right.length > MANY) {
      paint.context.globalAlpha = 0.3;
      paint.line(right, shared.ink.good, 1);
      paint.context.globalAlpha = 1;
    }
    paint.line(calmed(right), shared.ink.good, 2.2);
    this.finish(paint, shared);
    const step = rows.steps[rows.at(shared.hover ?? rows.newest)];
    const one = rows.columns.get(step);
    const parts = [];
    if (one.compared) parts.push(`${one.right} of ${one.compared}`);
    if (one.probability !== null) parts.push(`golden${this.isNarrow ? "" : " tokens"} ${one.probability.toFixed(1)} %`);
    const title = hasMatch
      ? `right answers, %${band.length > 1 ? " (band: 95 %)" : ""}${hasGolden ? "; dashed: golden token probability" : ""}${shared.head.best === null ? "" : "; \u25b2 most right"}`
      : "golden token probability, %";
    this.match.name.textContent = this.isNarrow ? (hasMatch ? "right" : "%") : title;
    // Where there is no place for both, the figure is read, and the step stands below.
    const place = this.isNarrow && shared.hover === null ? "" : `step ${number(step)}: `;
    this.match.now.textContent = `${place}${parts.join(", ") || "nothing compared"}`;
    const from = right[0] ?? golden[0], to = right[right.length - 1] ?? golden[golden.length - 1];
    this.match.canvas.setAttribute("aria-label", from
      ? `${title}: from ${from[1].toFixed(0)} at step ${from[0]} to ${to[1].toFixed(0)} at step ${to[0]}`
      : title);
  }

  drawLoss(curves, shared) {
    const { raw, smooth, validation, isLog, smoothing } = curves;
    const values = [...raw, ...validation].map(([, value]) => value).filter((value) => !isLog || value > 0);
    const sorted = values.slice().sort((a, b) => a - b);
    // One spike must not press the rest flat: it leaves the frame at its top.
    const high = sorted[Math.floor(0.995 * (sorted.length - 1))] ?? 1;
    const range = [sorted[0] ?? 0, Math.max(high, ...validation.map(([, value]) => value))];
    const paint = this.start(this.loss.canvas, range, isLog, null, shared);
    paint.context.globalAlpha = 0.35;
    paint.line(raw, shared.ink.train, 1);
    paint.context.globalAlpha = 1;
    paint.line(smooth, shared.ink.train, 2);
    paint.line(validation, shared.ink.val, 2, [5, 3], true);
    this.finish(paint, shared);
    const before = (points, step) => {
      let found = null;
      for (const point of points) if (point[0] <= step) found = point;
      return found;
    };
    const step = shared.hover ?? this.end;
    const [train, val] = [before(smooth.length ? smooth : raw, step), before(validation, step)];
    const title =
      `loss: training${smoothing ? ` (${smoothing})` : ""}${validation.length ? ", validation dashed" : ""}${isLog ? ", log scale" : ""}`;
    this.loss.name.textContent = this.isNarrow ? "loss" : title;
    const words = [train, val].filter(Boolean).map(([, value]) => value.toPrecision(3));
    this.loss.now.textContent = `${shared.hover === null ? "" : `step ${number(step)}: `}${words.join(" / ")}`;
    this.loss.canvas.setAttribute("aria-label", `${title}: now ${words.join(", validation ")}`);
  }

  // Axes; gives what draws in them.
  start(canvas, [low, high], isLog, ticks, { ink }) {
    const width = canvas.parentElement.clientWidth;
    const HEIGHT = (this.height = this.isNarrow ? 84 : 120);
    const context = sized(canvas, width, HEIGHT);
    const scale = isLog ? Math.log10 : (value) => value;
    let [bottom, top] = [scale(low), scale(high)];
    if (!(top > bottom)) [bottom, top] = [bottom - 0.5, top + 0.5];
    const [inner, tall] = [width - LEFT - RIGHT, HEIGHT - TOP - BOTTOM];
    const x = (step) => LEFT + (inner * step) / this.end;
    const y = (value) => TOP + tall * (1 - (scale(value) - bottom) / (top - bottom));
    context.font = "11px system-ui, sans-serif";
    context.fillStyle = ink.dim;
    context.strokeStyle = ink.line;
    context.lineWidth = 1;
    context.textAlign = "right";
    const shown = ticks ?? [0, 0.5, 1].map((share) => bottom + share * (top - bottom))
      .map((value) => (isLog ? 10 ** value : value));
    for (const tick of shown) {
      context.fillText(ticks ? String(tick) : short(tick), LEFT - 5, y(tick) + 4);
      context.beginPath();
      context.moveTo(LEFT, y(tick));
      context.lineTo(width - RIGHT, y(tick));
      context.stroke();
    }
    context.textAlign = "left";
    context.fillText("0", LEFT, HEIGHT - 4);
    context.textAlign = "right";
    context.fillText(`step ${number(this.end)}`, width - RIGHT, HEIGHT - 4);
    const line = (points, colour, thick, dash = [], dots = false) => {
      context.save();
      context.beginPath();
      context.rect(LEFT, 0, inner + RIGHT, HEIGHT - BOTTOM + 1);
      context.clip();
      context.strokeStyle = context.fillStyle = colour;
      context.lineWidth = thick;
      context.setLineDash(dash);
      context.beginPath();
      for (const [step, value] of points) if (!isLog || value > 0) context.lineTo(x(step), y(value));
      context.stroke();
      if (points.length === 1 || (dots && points.length < 40))
        for (const [step, value] of points) context.fillRect(x(step) - 2, y(value) - 2, 4, 4);
      context.restore();
    };
    return { context, x, y, line, width };
  }

  // Marks at the bottom, and the cross-hair.
  finish({ context, x }, { head, chosen, hover, ink }) {
    const floor = this.height - BOTTOM;
    context.fillStyle = ink.dim;
    for (const step of head.checkpoints) context.fillRect(x(step) - 1, floor, 2, 4);
    if (head.best !== null) {
      context.fillStyle = ink.good;
      context.beginPath();
      context.moveTo(x(head.best) - 5, floor + 8);
      context.lineTo(x(head.best) + 5, floor + 8);
      context.lineTo(x(head.best), floor + 1);
      context.fill();
    }
    const upright = (step, colour, dash) => {
      context.strokeStyle = colour;
      context.lineWidth = 1;
      context.setLineDash(dash);
      context.beginPath();
      context.moveTo(x(step), TOP);
      context.lineTo(x(step), floor);
      context.stroke();
      context.setLineDash([]);
    };
    if (head.resumed) upright(head.resumed, ink.dim, [2, 3]);
    if (chosen !== null) upright(chosen, ink.ink, []);
    if (hover !== null) upright(hover, ink.train, []);
  }
}
