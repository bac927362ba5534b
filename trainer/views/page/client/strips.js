// A strip: every preview step of a prompt as a bar. Right: full height. Wrong: lower, and the lower
// and darker, the less probable the golden answer. So it reads without colours, too.

export const cellWidth = (width, planned, most) => Math.max(2, Math.min(most, Math.floor(width / planned)));

// One bar of a cell in a strip of some height.
export function drawCell(context, mark, level, x, width, height, colours) {
  const wide = width > 3 ? width - 1 : width;
  context.globalAlpha = 1;
  if (mark === "=") {
    context.fillStyle = colours.good;
    context.fillRect(x, 0, wide, height);
  } else if (mark === "x") {
    const share = level === null ? 0.5 : 0.3 + 0.06 * level;
    context.globalAlpha = level === null ? 0.8 : 1 - 0.06 * level;
    context.fillStyle = colours.bad;
    context.fillRect(x, height * (1 - share), wide, height * share);
  } else if (mark === "!") {
    context.fillStyle = colours.bad;
    context.fillRect(x, height / 2 - 1, wide, 2);
  } else if (mark === ".") {
    context.fillStyle = colours.none;
    context.globalAlpha = level === null ? 1 : 0.4 + 0.06 * level;
    const share = level === null ? 0.5 : 0.3 + 0.06 * level;
    context.fillRect(x, height * (1 - share), wide, height * share);
  } else if (mark === "-") {
    context.fillStyle = colours.none;
    context.fillRect(x, height - 2, wide, 2);
  }
  context.globalAlpha = 1;
}

// Draw the cells from a place on; cell k always stands at k * width - scroll.
export function drawStrip(context, rows, row, { width, height, cell, scroll, colours, chosen, hover }) {
  const first = Math.max(0, Math.floor(scroll / cell));
  const last = Math.min(rows.steps.length, Math.ceil((scroll + width) / cell));
  for (let k = first; k < last; k++) {
    const step = rows.steps[k];
    drawCell(context, rows.mark(row, step), rows.level(row, step), k * cell - scroll, cell, height, colours);
  }
  for (const [step, colour] of [[hover, colours.dim], [chosen, colours.ink]]) {
    if (step === null || step === undefined || !rows.steps.length) continue;
    const x = rows.at(step) * cell - scroll;
    context.strokeStyle = colour;
    context.lineWidth = 1;
    context.strokeRect(x - 0.5, 0.5, Math.max(cell, 3), height - 1);
  }
}
