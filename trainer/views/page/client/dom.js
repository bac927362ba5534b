// Elements are made of tags, attributes and text. Text of a run is only ever text, never HTML.

export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function button(label, attributes, onclick) {
  return el("button", { type: "button", ...attributes, onclick }, label);
}

// The colours of the page at this moment: they change with the theme.
export function colours(element) {
  const style = getComputedStyle(element);
  const one = (name) => style.getPropertyValue(name).trim();
  return {
    ink: one("--ink"), dim: one("--dim"), line: one("--line"), paper: one("--paper"),
    good: one("--cell-good"), bad: one("--cell-bad"), none: one("--cell-none"), band: one("--band"),
    train: one("--train"), val: one("--val"), extra: one("--extra"),
  };
}

// A canvas of CSS size (width, height) with sharp pixels, cleared.
export function sized(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

export const number = (value) => value.toLocaleString("en-US");

export function isTyping(event) {
  const target = event.target;
  return (
    event.altKey || event.ctrlKey || event.metaKey ||
    (target.closest && target.closest("input, textarea, select, [contenteditable], [role=slider], .q-dialog"))
  );
}
