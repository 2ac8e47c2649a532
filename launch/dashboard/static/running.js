// Speed and memory, figures of runs without a journal, and runs beside each other.
import { get } from "./api.js";
import { StepChart, palette } from "./charts.js";
import { count, el, empty, fixed, percent, short, splitButtons, table } from "./dom.js";
import { swatch } from "./mixture.js";

export class ThroughputPanel {
  constructor(body) {
    this.body = body;
  }

  draw(data, run) {
    if (!data.steps.length) {
      this.body.replaceChildren(
        empty(
          run.summary?.reading
            ? "The metrics are still being read."
            : "No step is recorded yet: metrics.jsonl in the run's folder is empty or missing.",
        ),
      );
      this.charts = null;
      return;
    }
    if (!this.charts) this.build(data);
    this.data = data;
    const x = data.steps;
    const rate = data.tokens_per_second ?? data.seconds;
    this.charts.rate.update({
      x,
      series: [{ label: "speed", values: rate.mean, low: rate.low, high: rate.high, colour: "c0" }],
    });
    this.charts.wait.update({
      x,
      series: [{ label: "waiting", values: data.waiting.map((v) => (v === null ? null : 100 * v)), colour: "c1" }],
    });
    this.charts.norm.update({
      x,
      series: [
        {
          label: "gradient norm",
          values: data.grad_norm.mean,
          low: data.grad_norm.low,
          high: data.grad_norm.high,
          colour: "c2",
        },
      ],
    });
    this.charts.lr.update({ x, series: [{ label: "learning rate", values: data.lr, colour: "c3" }] });
    const memory = data.peak_memory_bytes;
    this.memory.textContent = memory
      ? `Peak memory of the leader: ${short(memory / 2 ** 30)} GiB.`
      : "Peak memory of the leader is recorded when the run ends.";
  }

  build(data) {
    this.charts = {};
    const tokens = Boolean(data.tokens_per_second);
    const wanted = [
      ["rate", tokens ? "tokens per second" : "seconds per step", tokens ? "tokens/s" : "s"],
      ["wait", "waiting for data, part of a step", "%"],
      ["norm", "gradient norm", "norm"],
      ["lr", "learning rate", "per step"],
    ];
    const blocks = wanted.map(([name, title, unit]) => {
      const host = el("div");
      this.charts[name] = new StepChart(host, { label: title, unit, height: 140, tip: (i) => this.tip(i) });
      return el("div", {}, el("h3", { text: title }), host);
    });
    this.memory = el("p", { class: "soft sub" });
    this.body.replaceChildren(el("div", { class: "smalls" }, ...blocks), this.memory);
  }

  tip(i) {
    const { steps, seconds, wait_seconds: wait, tokens_per_second: rate, lr, grad_norm: norm, waiting } = this.data;
    const rows = [
      rate && ["tokens per second", short(rate.mean[i]), `${short(rate.low[i])} to ${short(rate.high[i])}`],
      ["seconds per step", short(seconds.mean[i]), `${short(seconds.low[i])} to ${short(seconds.high[i])}`],
      ["waiting for data", wait.mean[i] === null ? "–" : `${short(wait.mean[i])} s`, percent(waiting[i], 2)],
      ["gradient norm", short(norm.mean[i]), `${short(norm.low[i])} to ${short(norm.high[i])}`],
      ["learning rate", lr[i] === null ? "–" : lr[i].toExponential(2), ""],
    ].filter(Boolean);
    return [el("p", {}, el("b", { text: `up to step ${count(steps[i])}` })), table(["", "mean", "range"], rows)];
  }
}

/** All figures of a run that keeps no journal; training and held-out pairs of the same name in one chart. */
export class FiguresPanel {
  constructor(body) {
    this.body = body;
    this.charts = new Map();
  }

  draw(data) {
    const names = [...new Set(Object.keys(data.curves).map((key) => key.slice(key.indexOf("/") + 1)))];
    if (!names.length) {
      this.body.replaceChildren(empty("No figures yet: they come with the first report."));
      return;
    }
    this.grid ??= el("div", { class: "smalls" });
    if (!this.grid.isConnected) this.body.replaceChildren(this.grid);
    for (const name of names) {
      const [train, held] = [data.curves[`train/${name}`], data.curves[`evaluation/${name}`]];
      const x = [...new Set([...(train?.steps ?? []), ...(held?.steps ?? [])])].sort((a, b) => a - b);
      const series = [
        train && {
          label: "training",
          values: at(train, x),
          low: at(train, x, "low"),
          high: at(train, x, "high"),
          colour: "c0",
        },
        held && { label: "held out", values: at(held, x), colour: "c1" },
      ].filter(Boolean);
      this.chart(name).update({ x, series });
      this.chart(name).shown = { x, series };
    }
  }

  chart(name) {
    if (!this.charts.has(name)) {
      const host = el("div");
      this.grid.append(el("div", {}, el("h3", { text: name }), host));
      const chart = new StepChart(host, {
        label: name,
        unit: name.split("/").at(-1),
        height: 140,
        tip: (i) => tipOf(chart.shown, i),
      });
      this.charts.set(name, chart);
    }
    return this.charts.get(name);
  }
}

function at(curve, x, part = "mean") {
  const place = new Map(curve.steps.map((step, i) => [step, i]));
  return x.map((step) => (place.has(step) ? curve[part][place.get(step)] : null));
}

function tipOf({ x, series }, i) {
  const rows = series
    .filter((s) => s.values[i] !== null)
    .map((s) => [el("span", {}, swatch(s.colour), ` ${s.label}`), short(s.values[i])]);
  return [el("p", {}, el("b", { text: `step ${count(x[i])}` })), table(["", ""], rows)];
}

export class ComparePanel {
  constructor(body, tools) {
    this.body = body;
    this.split = "train";
    tools.append(...splitButtons(this.split, (split) => this.choose(split)));
  }

  choose(split) {
    this.split = split;
    if (this.data) this.draw(this.data);
  }

  draw(data) {
    this.data = data;
    if (!this.chart) {
      const host = el("div");
      this.legend = el("div", { class: "chips" });
      this.tables = el("div");
      this.body.replaceChildren(host, this.legend, this.tables);
      this.chart = new StepChart(host, {
        label: "Mean loss of all runs",
        unit: "nats per token",
        height: 240,
        tip: (i) => tipOf(this.shown, i),
      });
    }
    const x = [...new Set(data.runs.flatMap((run) => run[this.split].steps))].sort((a, b) => a - b);
    const series = data.runs.map((run, i) => ({
      label: run.name,
      values: at(run[this.split], x),
      colour: palette[i % palette.length],
      dash: i >= palette.length ? [4, 3] : undefined,
    }));
    this.shown = { x, series };
    this.chart.update({ x, series });
    this.legend.replaceChildren(
      ...series.map((s) => el("span", {}, swatch(s.colour), el("span", { class: "clip", text: s.label }))),
    );
    this.tables.replaceChildren(
      el(
        "div",
        { class: "scroll", tabindex: "0", role: "region", "aria-label": "Settings that differ" },
        this.settings(data),
      ),
      el(
        "div",
        { class: "scroll", tabindex: "0", role: "region", "aria-label": "Domains of all runs" },
        this.domains(data),
      ),
    );
  }

  settings(data) {
    const rows = Object.entries(data.different).map(([key, values]) => [
      key,
      ...values.map((value) => (value === undefined || value === null ? "–" : String(value).slice(0, 16))),
    ]);
    rows.push([
      "commits by kind of policy",
      ...data.runs.map((run) => run.policies.map(([kind, n]) => `${n} ${kind}`).join(", ") || "none"),
    ]);
    return table(["what differs", ...data.runs.map((run) => run.name)], rows);
  }

  /** Newest loss and tokens of each domain; differences to the first run. */
  domains(data) {
    const first = data.runs[0].domains;
    const rows = data.domains.map((name) => [
      name,
      ...data.runs.flatMap((run, i) => {
        const found = run.domains[name]?.[this.split] ?? null;
        const base = first[name]?.[this.split] ?? null;
        const delta =
          i && found !== null && base !== null
            ? ` (${found - base >= 0 ? "+" : "−"}${fixed(Math.abs(found - base))})`
            : "";
        return [fixed(found) + delta, short(run.domains[name]?.tokens ?? null)];
      }),
    ]);
    return table(["domain", ...data.runs.flatMap((run) => [`${run.name}: loss`, "tokens"])], rows);
  }

  static fetch() {
    return get("/api/compare");
  }
}
