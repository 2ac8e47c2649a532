// What uPlot does not draw: heat maps, and the lanes of the timeline. Plain canvases with hover and keys.
import { colour, hideTip, short, showTip } from "./dom.js";
import { onThemeChange, paint } from "./charts.js";

const FONT = "11px system-ui, sans-serif";
const LABEL_WIDTH = 92;

/** A canvas in `host` that is drawn again on a new size or theme. Subclasses have height(), draw(ctx, width, height). */
class Drawing {
  constructor(host, label) {
    this.host = host;
    this.canvas = document.createElement("canvas");
    host.classList.add("chart");
    host.tabIndex = 0;
    host.setAttribute("role", "group");
    host.setAttribute("aria-label", label);
    host.append(this.canvas);
    onThemeChange(host, () => this.paintAll());
    new ResizeObserver(() => this.paintAll()).observe(host);
    this.canvas.addEventListener("mousemove", (event) =>
      this.hover(event.offsetX, event.offsetY, event.clientX, event.clientY),
    );
    for (const name of ["mouseleave", "blur"]) host.addEventListener(name, hideTip);
    host.addEventListener("keydown", (event) => this.key(event));
  }

  update(spec) {
    this.spec = spec;
    this.paintAll();
  }

  paintAll() {
    const width = this.host.clientWidth;
    if (!this.spec || width === 0) return;
    const height = this.height();
    this.canvas.width = width * devicePixelRatio;
    this.canvas.height = height * devicePixelRatio;
    this.canvas.style.height = `${height}px`;
    const ctx = this.canvas.getContext("2d");
    ctx.scale(devicePixelRatio, devicePixelRatio);
    ctx.font = FONT;
    ctx.textBaseline = "middle";
    this.draw(ctx, width, height);
  }

  tipAt(x, y, nodes) {
    const box = this.canvas.getBoundingClientRect();
    showTip(box.left + x, box.top + y, ...nodes);
  }
}

/** update({rows, columns, values, low, high, diverging, cellHeight, numbers, tip(row, column), columnTitle, rowTitle}). */
export class HeatMap extends Drawing {
  height() {
    return this.spec.rows.length * this.cellHeight() + 34;
  }

  cellHeight() {
    return this.spec.cellHeight ?? Math.max(16, Math.min(34, 220 / this.spec.rows.length));
  }

  cell() {
    const { columns } = this.spec;
    return { width: (this.host.clientWidth - LABEL_WIDTH) / Math.max(columns.length, 1), height: this.cellHeight() };
  }

  draw(ctx, width, height) {
    const { rows, columns, values, numbers } = this.spec;
    const cell = this.cell();
    rows.forEach((row, r) => {
      ctx.fillStyle = paint("soft");
      ctx.textAlign = "right";
      ctx.fillText(clipped(ctx, row, LABEL_WIDTH - 8), LABEL_WIDTH - 6, (r + 0.5) * cell.height);
      columns.forEach((_, c) => {
        const value = values[r]?.[c];
        ctx.fillStyle = this.shade(value);
        ctx.fillRect(
          LABEL_WIDTH + c * cell.width,
          r * cell.height,
          Math.ceil(cell.width),
          cell.height - (numbers ? 1 : 0),
        );
        if (numbers && cell.width > 40 && value !== null && value !== undefined) {
          ctx.fillStyle = paint("ink");
          ctx.textAlign = "center";
          ctx.fillText(short(value, 2), LABEL_WIDTH + (c + 0.5) * cell.width, (r + 0.5) * cell.height);
        }
      });
    });
    this.labels(ctx, width, height, cell);
    if (this.at) this.outline(ctx, cell);
  }

  labels(ctx, width, height, cell) {
    const { columns, columnTitle } = this.spec;
    const every = Math.ceil(columns.length / Math.max(Math.floor((width - LABEL_WIDTH) / 64), 1));
    ctx.fillStyle = paint("soft");
    ctx.textAlign = "center";
    columns.forEach((name, c) => {
      const x = Math.max(LABEL_WIDTH + 18, Math.min(width - 18, LABEL_WIDTH + (c + 0.5) * cell.width));
      if (c % every === 0) ctx.fillText(clipped(ctx, name, Math.max(cell.width * every - 4, 20)), x, height - 25);
    });
    ctx.fillText(columnTitle ?? "", LABEL_WIDTH + (width - LABEL_WIDTH) / 2, height - 8);
  }

  /** From low over the middle to high; only the upper half where numbers have no sign. */
  shade(value) {
    if (value === null || value === undefined || !Number.isFinite(value)) return paint("grid");
    const { low, high, diverging } = this.spec;
    if (!diverging) return `color-mix(in oklab, ${colour("low")} ${mix(value, low, high)}%, ${colour("middle")})`;
    const end = value < 0 ? "high" : "low"; // harm is the warm end
    return `color-mix(in oklab, ${colour(end)} ${mix(Math.abs(value), 0, Math.max(Math.abs(low), Math.abs(high)))}%, ${colour("middle")})`;
  }

  outline(ctx, cell) {
    ctx.strokeStyle = paint("accent");
    ctx.lineWidth = 2;
    ctx.strokeRect(
      LABEL_WIDTH + this.at.c * cell.width + 1,
      this.at.r * cell.height + 1,
      cell.width - 2,
      cell.height - 2,
    );
  }

  hover(x, y) {
    const cell = this.cell();
    const r = Math.floor(y / cell.height);
    const c = Math.floor((x - LABEL_WIDTH) / cell.width);
    const inside = r >= 0 && r < this.spec.rows.length && c >= 0 && c < this.spec.columns.length;
    if (inside) this.tipAt(x, y, this.spec.tip(r, c));
    else hideTip();
  }

  key(event) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key === "Escape") hideTip();
    if (!moves[event.key] || !this.spec?.rows.length) return;
    event.preventDefault();
    const [dr, dc] = moves[event.key];
    const from = this.at ?? { r: 0, c: -dc };
    const r = Math.max(0, Math.min(this.spec.rows.length - 1, from.r + dr));
    const c = Math.max(0, Math.min(this.spec.columns.length - 1, from.c + dc));
    this.at = { r, c };
    this.paintAll();
    const cell = this.cell();
    this.tipAt(LABEL_WIDTH + (c + 0.5) * cell.width, (r + 0.5) * cell.height, this.spec.tip(r, c));
  }
}

const LANE_HEIGHT = 19;
const LANE_COLOURS = {
  shadow: "c6",
  commit: "good",
  reject: "bad",
  rollback: "warn",
  cancel: "warn",
  hold: "warn",
  run: "faint",
};

/** update({lanes, counts, steps, lane, lsn, now, end, tip(index), press(index)}): every event in its lane. */
export class Lanes extends Drawing {
  constructor(host, label) {
    super(host, label);
    this.canvas.addEventListener("click", (event) => {
      const index = this.near(event.offsetX, event.offsetY);
      if (index !== null) this.spec.press(index);
    });
  }

  height() {
    return this.spec.lanes.length * LANE_HEIGHT + 30;
  }

  x(step) {
    return LABEL_WIDTH + (step / Math.max(this.spec.end, 1)) * (this.host.clientWidth - LABEL_WIDTH - 8);
  }

  draw(ctx, width, height) {
    const { lanes, counts, steps, lane, now, end } = this.spec;
    lanes.forEach((name, i) => {
      const y = (i + 0.5) * LANE_HEIGHT;
      ctx.fillStyle = paint(counts[name] ? "soft" : "faint", counts[name] ? 1 : 0.6);
      ctx.textAlign = "right";
      ctx.fillText(`${name} ${counts[name] || ""}`, LABEL_WIDTH - 8, y);
      ctx.fillStyle = paint("grid");
      ctx.fillRect(LABEL_WIDTH, y, width - LABEL_WIDTH - 8, 1);
    });
    steps.forEach((step, i) => {
      ctx.fillStyle = paint(LANE_COLOURS[lanes[lane[i]]] ?? "accent");
      ctx.fillRect(this.x(step) - 1, lane[i] * LANE_HEIGHT + 4, 2.5, LANE_HEIGHT - 8);
    });
    ctx.fillStyle = paint("accent");
    ctx.fillRect(this.x(now), 0, 1, lanes.length * LANE_HEIGHT);
    ctx.fillStyle = paint("soft");
    for (const part of [0, 0.25, 0.5, 0.75, 1]) {
      ctx.textAlign = part === 0 ? "left" : part === 1 ? "right" : "center";
      ctx.fillText(short(Math.round(part * end)), this.x(part * end), height - 22);
    }
    ctx.textAlign = "center";
    ctx.fillText("step", LABEL_WIDTH + (width - LABEL_WIDTH) / 2, height - 8);
  }

  near(x, y) {
    const lane = Math.floor(y / LANE_HEIGHT);
    let best = null;
    let distance = 7;
    this.spec.steps.forEach((step, i) => {
      const away = Math.abs(this.x(step) - x);
      if (this.spec.lane[i] === lane && away < distance) [best, distance] = [i, away];
    });
    return best;
  }

  hover(x, y) {
    const index = this.near(x, y);
    this.canvas.style.cursor = index === null ? "" : "pointer";
    if (index === null) hideTip();
    else this.spec.tip(index, (nodes) => this.tipAt(x, y, nodes));
  }

  key(event) {
    const { steps, lane } = this.spec;
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") hideTip();
    if (event.key === "Enter" && this.at !== undefined) this.spec.press(this.at);
    if (!move || !steps.length) return;
    event.preventDefault();
    this.at = Math.max(0, Math.min(steps.length - 1, (this.at ?? steps.length) + move));
    this.spec.tip(this.at, (nodes) => this.tipAt(this.x(steps[this.at]), (lane[this.at] + 0.5) * LANE_HEIGHT, nodes));
  }
}

function mix(value, low, high) {
  return Math.round(100 * Math.max(0, Math.min(1, high > low ? (value - low) / (high - low) : 0)));
}

function clipped(ctx, text, width) {
  if (ctx.measureText(text).width <= width) return text;
  let end = text.length;
  while (end > 1 && ctx.measureText(`${text.slice(0, end)}…`).width > width) end -= 1;
  return `${text.slice(0, end)}…`;
}
