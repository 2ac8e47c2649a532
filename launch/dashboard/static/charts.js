// Lines, bands and stacked areas over steps: uPlot with this page's theme, cursor, keys and tooltip.
/* global uPlot */
import { colour, hideTip, short, showTip } from "./dom.js";

const FONT = "11px system-ui, sans-serif";
const NEAR_PIXELS = 6;
const MANY_MARKS = 120;
const GAP_PIXELS = 24;

export const palette = Array.from({ length: 8 }, (_, i) => `c${i}`);

/** CSS colour of a palette name, with an opacity. */
export function paint(name, opacity = 1) {
  const base = colour(name) || colour("other");
  return opacity === 1 ? base : `color-mix(in srgb, ${base} ${Math.round(100 * opacity)}%, transparent)`;
}

/** Call `act` on a new theme, for as long as `host` is on the page. */
export function onThemeChange(host, act) {
  const changed = () => (host.isConnected ? act() : document.removeEventListener("themechange", changed));
  document.addEventListener("themechange", changed);
}

/**
 * A chart over steps in `host`. options: label (for screen readers), unit (y axis), height, format(value), range(min, max),
 * tip(index) -> nodes, markTip(mark) -> nodes, stacked.
 * update({x, series, marks}): series are {label, values, colour, low, high, width, dash, lines}; x and values are arrays of
 * equal length with null where nothing is known. In a stacked chart series with `lines` are drawn as boundaries only.
 */
export class StepChart {
  constructor(host, options) {
    this.host = host;
    this.options = { height: 190, format: short, unit: "", ...options };
    this.marks = [];
    host.classList.add("chart");
    host.tabIndex = 0;
    host.setAttribute("role", "group");
    host.setAttribute("aria-label", `${options.label}. Arrow keys move along the steps, 0 shows all of them.`);
    host.addEventListener("keydown", (event) => this.key(event));
    for (const name of ["mouseleave", "blur"]) host.addEventListener(name, hideTip);
    onThemeChange(host, () => this.rebuild());
    new ResizeObserver(() => this.fit()).observe(host);
  }

  update({ x, series, marks = [] }) {
    this.marks = marks;
    const shape = JSON.stringify(series.map((s) => [s.label, s.colour, Boolean(s.low), s.width, s.dash, s.lines]));
    this.spec = { x, series };
    if (!this.plot || shape !== this.shape) {
      this.shape = shape;
      this.rebuild();
    } else {
      this.plot.setData(this.data());
    }
  }

  rebuild() {
    if (!this.spec) return;
    this.plot?.destroy();
    this.plot = new uPlot(this.plotOptions(), this.data(), this.host);
  }

  fit() {
    if (!this.host.isConnected) {
      this.plot?.destroy(); // it would stay in the group of charts that share a cursor
      this.plot = this.shape = null;
      return;
    }
    const width = this.host.clientWidth;
    if (!this.plot && width > 0) this.rebuild();
    if (this.plot && width > 0 && Math.abs(width - this.plot.width) > 1)
      this.plot.setSize({ width, height: this.options.height });
  }

  /** Columns as uPlot wants them: x, one line per series, then both ends of each band. */
  data() {
    const { x, series } = this.spec;
    const lines = this.options.stacked ? stacked(series) : series.map((s) => s.values);
    const ends = series.filter((s) => s.low).flatMap((s) => [s.high, s.low]);
    return [x, ...lines, ...ends];
  }

  plotOptions() {
    const { series } = this.spec;
    const drawn = this.options.stacked ? this.areas(series) : series.map((s) => line(s));
    const banded = series.filter((s) => s.low);
    const bands = this.options.stacked
      ? this.areaBands(series)
      : banded.map((s, i) => {
          const first = 1 + series.length + 2 * i;
          return { series: [first, first + 1], fill: paint(s.colour, 0.16) };
        });
    const invisible = banded.flatMap(() => [edge(), edge()]);
    return {
      width: Math.max(this.host.clientWidth, 120),
      height: this.options.height,
      legend: { show: false },
      padding: [8, 16, 0, 0],
      cursor: {
        sync: { key: "steps", setSeries: false },
        drag: { x: true, y: false },
        points: { size: 6 },
        focus: { prox: 1e6 },
      },
      focus: { alpha: 1 },
      scales: {
        x: { time: false },
        y: { range: this.options.range ? (_, low, high) => this.options.range(low, high) : padded },
      },
      axes: [
        axis("step", (u, values) => values.map((v) => (Number.isInteger(v) ? short(v) : ""))),
        yAxis(this.options),
      ],
      series: [{}, ...drawn, ...invisible],
      bands,
      hooks: { draw: [(u) => this.drawMarks(u)], setCursor: [(u) => this.moved(u)] },
    };
  }

  areas(series) {
    return series.map((s, i) => ({
      label: s.label,
      stroke: s.lines ? paint("ink", 0.6) : paint(s.colour, 0.9),
      width: s.lines ? 0.75 : 0,
      fill: !s.lines && i === 0 ? paint(s.colour, 0.8) : undefined,
      points: { show: false },
      paths: uPlot.paths.stepped({ align: -1 }),
    }));
  }

  areaBands(series) {
    const areas = series.filter((s) => !s.lines);
    return areas.slice(1).map((s, i) => ({ series: [i + 2, i + 1], fill: paint(s.colour, 0.8) }));
  }

  /** Marks are {step, ...}: a tick at the top for each, a line through the chart while they are few. */
  drawMarks(u) {
    const { left, top, width, height } = u.bbox;
    const shown = this.marks.filter((mark) => mark.step >= u.scales.x.min && mark.step <= u.scales.x.max);
    const ctx = u.ctx;
    ctx.save();
    ctx.fillStyle = paint("ink");
    ctx.strokeStyle = paint("ink", 0.45);
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([2 * devicePixelRatio, 3 * devicePixelRatio]);
    let last = -10;
    for (const mark of shown) {
      const x = Math.round(u.valToPos(mark.step, "x", true));
      if (x - last < 1 || x < left || x > left + width) continue;
      last = x;
      ctx.fillRect(x - 1, top, 2, 7 * devicePixelRatio);
      if (shown.length <= MANY_MARKS) {
        ctx.beginPath();
        ctx.moveTo(x, top);
        ctx.lineTo(x, top + height);
        ctx.stroke();
      }
    }
    ctx.restore();
  }

  moved(u) {
    const isHere = this.host.matches(":hover") || document.activeElement === this.host;
    if (!isHere) return;
    const { left, top, idx } = u.cursor;
    if (left < 0 || idx === null || idx === undefined) {
      hideTip();
      return;
    }
    const box = u.over.getBoundingClientRect();
    const mark = this.options.markTip && this.nearMark(u, left);
    const nodes = mark ? this.options.markTip(mark) : this.options.tip?.(idx);
    if (nodes?.length) showTip(box.left + left, box.top + top, ...nodes);
    else hideTip();
  }

  nearMark(u, left) {
    let best = null;
    let distance = NEAR_PIXELS;
    for (const mark of this.marks) {
      const away = Math.abs(u.valToPos(mark.step, "x") - left);
      if (away < distance) [best, distance] = [mark, away];
    }
    return best;
  }

  key(event) {
    const u = this.plot;
    if (!u || event.ctrlKey || event.altKey || event.metaKey) return;
    const x = this.spec.x;
    const at = u.cursor.idx ?? x.length - 1;
    const stride = event.shiftKey ? 10 : 1;
    const to = { ArrowLeft: at - stride, ArrowRight: at + stride, Home: 0, End: x.length - 1 }[event.key];
    if (to !== undefined && x.length) {
      const index = Math.max(0, Math.min(x.length - 1, to));
      u.setCursor({ left: u.valToPos(x[index], "x"), top: u.over.clientHeight / 3 });
      event.preventDefault();
    } else if (event.key === "Escape") {
      hideTip();
    } else if (event.key === "0" && x.length) {
      u.setScale("x", { min: x[0], max: x.at(-1) });
    }
  }
}

function line(s) {
  return {
    label: s.label,
    stroke: paint(s.colour),
    width: s.width ?? 1.25,
    dash: s.dash,
    gaps: longOnes,
    points: { show: (u) => u.data[0].length < 30, size: 4, fill: paint(s.colour) },
  };
}

const edge = () => ({ stroke: "transparent", width: 0, points: { show: false }, gaps: longOnes });

/** A domain may have no row in a report or two; where it was not read for long, there is no line. */
function longOnes(u, series, first, last, gaps) {
  return gaps.filter(([from, to]) => to - from > GAP_PIXELS * devicePixelRatio);
}

function padded(u, low, high) {
  if (low === null || high === null) return [0, 1];
  const space = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [low >= 0 && low - space < 0 ? 0 : low - space, high + space];
}

function axis(label, values) {
  return {
    label,
    values,
    font: FONT,
    labelFont: FONT,
    labelSize: 14,
    labelGap: 0,
    size: 24,
    gap: 3,
    stroke: paint("soft"),
    grid: { stroke: paint("grid"), width: 1 },
    ticks: { stroke: paint("line"), width: 1, size: 3 },
  };
}

function yAxis(options) {
  return { ...axis(options.unit, (u, values) => values.map((v) => options.format(v))), size: 46 };
}

/** Running sums: of the areas, and of the lines by themselves. */
function stacked(series) {
  const sums = { true: null, false: null };
  return series.map((s) => {
    const before = sums[Boolean(s.lines)];
    const values = s.values.map((value, i) =>
      value === null ? (before?.[i] ?? (s.lines ? null : 0)) : value + (before?.[i] ?? 0),
    );
    sums[Boolean(s.lines)] = values;
    return values;
  });
}
