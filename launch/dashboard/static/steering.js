// Online policies and instance weights: what the policies saw and chose, and how much samples count.
import { HeatMap } from "./canvases.js";
import { StepChart, palette } from "./charts.js";
import { count, el, empty, fixed, percent, short, table } from "./dom.js";
import { coloursOf, swatch } from "./mixture.js";

const MATRIX_WORDS = { gains: "gain in row's loss per share of column (Aioli's matrix)" };

export class PolicyPanel {
  constructor(body, tools, context) {
    this.body = body;
    this.context = context;
    this.choice = el("select", { "aria-label": "Online policy", onchange: () => this.show() });
    this.slider = el("input", { type: "range", min: "0", "aria-label": "Decision", oninput: () => this.showMatrix() });
    this.caption = el("p", { class: "soft sub" });
    this.heatHost = el("div");
    this.vectors = el("div", { class: "smalls" });
    this.charts = new Map();
    tools.append(this.choice);
  }

  draw(data, run) {
    this.data = data;
    this.colours = coloursOf(run);
    this.choice.hidden = data.policies.length < 2;
    if (!data.policies.length) {
      this.body.replaceChildren(
        empty(
          "No online policy has decided anything. One that does, such as `kind: aioli` or `odm` (also with --shadow), shows here what it measured and chose.",
        ),
      );
      this.heat = null;
      return;
    }
    const chosen = this.choice.value;
    this.choice.replaceChildren(
      ...data.policies.map((p) =>
        el("option", { value: String(p.lsn), text: `${p.shadow ? "shadow " : ""}${p.kind}, entry ${p.lsn}` }),
      ),
    );
    if (data.policies.some((p) => String(p.lsn) === chosen)) this.choice.value = chosen;
    if (!this.heat) {
      this.heat = new HeatMap(this.heatHost, "Matrix of the decision. Arrow keys move from cell to cell.");
      this.body.replaceChildren(this.caption, this.slider, this.heatHost, this.vectors);
    }
    this.show();
  }

  /** An arm that is a domain has the domain's colour. */
  colour(arm, k) {
    return this.colours.get(arm) ?? palette[k % palette.length];
  }

  show() {
    const policy = this.data.policies.find((p) => String(p.lsn) === this.choice.value) ?? this.data.policies[0];
    const followed = !this.policy || Number(this.slider.value) >= Number(this.slider.max);
    this.policy = policy;
    this.slider.max = String(policy.decisions.length - 1);
    if (followed) this.slider.value = this.slider.max;
    this.showMatrix();
    this.showVectors(policy);
  }

  showMatrix() {
    const { decisions, matrices, arms } = this.policy;
    const at = Number(this.slider.value);
    const decision = decisions[at];
    const name = Object.keys(matrices)[0];
    const values = name ? matrices[name][at] : null;
    this.slider.hidden = decisions.length < 2;
    this.caption.textContent =
      `decision ${decision.number} of ${decisions.at(-1).number}, step ${count(decision.step)}: ${decision.action}${decision.reason ? ` (${decision.reason})` : ""}` +
      (name ? `. ${MATRIX_WORDS[name] ?? name}${values ? "" : ": this decision has none"}` : "");
    this.heatHost.hidden = !values || values.length !== arms.length;
    if (this.heatHost.hidden) return;
    const all = values.flat().filter((v) => v !== null);
    this.heat.update({
      rows: arms,
      columns: arms,
      values,
      low: Math.min(...all, 0),
      high: Math.max(...all, 0),
      diverging: true,
      numbers: true,
      columnTitle: "read (column), validated (row)",
      tip: (r, c) => [
        el("p", {}, el("b", { text: short(values[r][c]) }), ` gain in the loss of ${arms[r]} from reading ${arms[c]}`),
      ],
    });
  }

  showVectors(policy) {
    const all = { shares: policy.shares, ...policy.vectors };
    const x = policy.decisions.map((decision) => decision.step);
    for (const [name, chart] of this.charts) {
      if (!(name in all)) {
        chart.block.remove();
        this.charts.delete(name);
      }
    }
    for (const [name, values] of Object.entries(all)) {
      const series = policy.arms.map((arm, k) => ({
        label: arm,
        values: values.map((v) => v?.[k] ?? null),
        colour: this.colour(arm, k),
        dash: k >= palette.length ? [3, 3] : undefined,
      }));
      this.chart(name).update({ x, series });
    }
  }

  chart(name) {
    if (!this.charts.has(name)) {
      const host = el("div");
      const block = el(
        "div",
        {},
        el("h3", { text: name === "shares" ? "share of each arm after each decision" : `${name} of each arm` }),
        host,
      );
      this.vectors.append(block);
      const chart = new StepChart(host, {
        label: `${name} of each arm`,
        unit: name === "shares" ? "share" : name,
        height: 150,
        tip: (i) => this.tip(name, i),
      });
      chart.block = block;
      this.charts.set(name, chart);
    }
    return this.charts.get(name);
  }

  tip(name, i) {
    const { arms, decisions, shares, vectors } = this.policy;
    const values = (name === "shares" ? shares : vectors[name])[i] ?? [];
    const rows = arms.map((arm, k) => [
      el("span", {}, swatch(this.colour(arm, k)), ` ${arm}`),
      name === "shares" ? percent(values[k]) : short(values[k]),
    ]);
    return [
      el("p", {}, el("b", { text: `decision ${decisions[i].number}, step ${count(decisions[i].step)}` })),
      table(["", name], rows),
    ];
  }
}

export class WeightingPanel {
  constructor(body) {
    this.body = body;
  }

  draw(data, run) {
    if (!data.steps.length) {
      this.body.replaceChildren(
        empty(
          data.in_force
            ? `In force: ${data.in_force}. Figures come with the next report.`
            : "All samples count alike: no policy has asked for `loss_weighting`. `mixwright mix submit configs/policies/reweight.yaml` switches it on.",
        ),
      );
      this.chart = null;
      return;
    }
    if (!this.chart) this.build();
    this.data = data;
    this.note.textContent =
      (data.in_force ? `In force: ${data.in_force}.` : "Not in force now.") +
      " Effective size: 1 when all samples count alike; below about 0.5 half of the batch is paid for and not used.";
    this.chart.update({
      x: data.steps,
      series: [
        {
          label: "effective sample size",
          values: data.effective.mean,
          low: data.effective.low,
          high: data.effective.high,
          colour: "c0",
        },
      ],
    });
    this.drawHistogram(data);
    this.drawShares(data, run);
  }

  build() {
    const [size, heat, shares] = [
      el("div"),
      el("div"),
      el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Weight and tokens by domain" }),
    ];
    this.note = el("p", { class: "soft sub" });
    this.shares = shares;
    this.body.replaceChildren(
      this.note,
      el(
        "div",
        { class: "two" },
        el("div", {}, el("h3", { class: "sub", text: "effective sample size, part of the batch" }), size),
        el("div", {}, el("h3", { class: "sub", text: "relative weights of samples over steps" }), heat),
      ),
      shares,
    );
    this.chart = new StepChart(size, {
      label: "Effective sample size",
      unit: "part of samples",
      height: 190,
      tip: (i) => [
        el(
          "p",
          {},
          el("b", { text: fixed(this.data.effective.mean[i]) }),
          ` at step ${count(this.data.steps[i])}, correlation with the mixture ${fixed(this.data.correlation[i], 2)}`,
        ),
      ],
    });
    this.heat = new HeatMap(heat, "Histogram of relative weights over steps. Arrow keys move from cell to cell.");
  }

  drawHistogram(data) {
    const { edges } = data;
    const names = [...edges.map((edge, i) => `${i ? edges[i - 1] : 0}–${edge}`), `> ${edges.at(-1)}`].reverse();
    const parts = data.histogram.map((counts) =>
      counts.map(
        (n) =>
          n /
          Math.max(
            counts.reduce((a, b) => a + b, 0),
            1,
          ),
      ),
    );
    const values = names.map((_, r) => parts.map((part) => part[names.length - 1 - r]));
    this.heat.update({
      rows: names,
      columns: data.histogram_steps.map((step) => short(step)),
      values,
      low: 0,
      high: Math.max(...values.flat(), 0.01),
      cellHeight: 13,
      columnTitle: "step (rows: weight relative to uniform)",
      tip: (r, c) => [
        el(
          "p",
          {},
          el("b", { text: percent(values[r][c]) }),
          ` of samples weigh ${names[r]} times uniform, up to step ${count(data.histogram_steps[c])}`,
        ),
      ],
    });
  }

  drawShares(data, run) {
    const rows = data.names.map((name, g) => [
      name,
      percent(data.token_share[g]),
      percent(data.weight_share[g]),
      ratio(data.weight_share[g], data.token_share[g]),
    ]);
    rows.sort((a, b) => Number.parseFloat(b[3]) - Number.parseFloat(a[3]) || 0);
    this.shares.replaceChildren(table(["domain, newest report", "tokens", "weight", "weight per token"], rows));
  }
}

const ratio = (weight, tokens) => (weight === null || !tokens ? "–" : `${fixed(weight / tokens, 2)} ×`);
