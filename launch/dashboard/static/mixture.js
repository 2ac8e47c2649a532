// Mixture and losses: what is read and what came of it.
import { get } from "./api.js";
import { StepChart, palette } from "./charts.js";
import { count, el, empty, fixed, percent, splitButtons, table } from "./dom.js";

const MOST_SHOWN = palette.length;

/** Domains by share of the tokens read, the largest first; only they have a colour of their own. */
export function ranked(summary) {
  const size = (domain) => domain.num_tokens || domain.proportion || 0;
  return [...summary.domains].sort((a, b) => size(b) - size(a)).map((domain) => domain.name);
}

/** Colours stay with their domains while the page is open, however the ranking changes. */
export function coloursOf(run) {
  run.colours ??= new Map();
  if (run.summary && run.colours.size < Math.min(MOST_SHOWN, run.summary.domains.length)) {
    for (const name of ranked(run.summary)) {
      if (run.colours.size < MOST_SHOWN && !run.colours.has(name)) run.colours.set(name, palette[run.colours.size]);
    }
  }
  return run.colours;
}

export function swatch(colour) {
  return el("i", { class: "swatch", background: colour ? `var(--${colour})` : "var(--other)" });
}

export class MixturePanel {
  constructor(body, tools, context) {
    this.context = context;
    this.note = el("p", { class: "soft sub" });
    this.body = body;
    this.details = new Map();
  }

  draw(data, run) {
    if (!data.steps.length) {
      this.body.replaceChildren(
        empty(
          run.summary?.reading
            ? "The journal is still being read."
            : "No training report yet: shares appear with the first one (mixing.report_every in the run's configuration).",
        ),
      );
      this.chart = null;
      return;
    }
    if (!this.chart) {
      const host = el("div");
      this.chips = el("div", { class: "chips", role: "list", "aria-label": "Domains and their colours" });
      this.body.replaceChildren(host, this.chips, this.note);
      this.chart = new StepChart(host, {
        label: "Realised mixture as areas, requested mixture as lines, commits as ticks",
        unit: "share of tokens",
        height: 250,
        stacked: true,
        format: (v) => `${Math.round(100 * v)} %`,
        range: () => [0, 1],
        tip: (i) => this.tip(i),
        markTip: (mark) => this.markTip(mark),
      });
    }
    this.data = data;
    const colours = coloursOf(run);
    this.shown = data.names.filter((name) => colours.has(name));
    this.requested = aligned(data);
    const areas = this.groups(data.names, data.realised).map((g) => ({
      ...g,
      colour: colours.get(g.label) ?? "other",
    }));
    const lines = this.groups(data.names, this.requested).map((g) => ({ ...g, lines: true }));
    this.chart.update({
      x: data.steps,
      series: [...areas, ...lines],
      marks: data.commits.map(([step, lsn, kind, author]) => ({ step, lsn, kind, author })),
    });
    this.chips.replaceChildren(
      ...areas.map((area) =>
        el(
          "span",
          { role: "listitem" },
          swatch(area.colour === "other" ? null : area.colour),
          el("span", { class: "clip", text: area.label }),
        ),
      ),
    );
    this.note.textContent = this.words(data);
  }

  words(data) {
    const gap =
      data.largest_gap_rows === null
        ? ""
        : ` Largest gap between asked for and read: ${fixed(data.largest_gap_rows, 1)} rows of a domain (contract: 16).`;
    return `Areas: read. Lines: asked for. Ticks: ${count(data.commits.length)} commits.${data.bucket_steps > 1 ? ` One point: ${data.bucket_steps} steps or more.` : ""}${gap}`;
  }

  /** One series for each domain with a colour, and one for all others. */
  groups(names, values) {
    const rest = names.map((name, g) => g).filter((g) => !this.shown.includes(names[g]));
    const groups = this.shown.map((name) => ({ label: name, values: values[names.indexOf(name)] }));
    if (!rest.length) return groups;
    const sum = values[0].map((_, p) =>
      rest.reduce((total, g) => (values[g][p] === null ? total : (total ?? 0) + values[g][p]), null),
    );
    return [...groups, { label: `${rest.length} others`, values: sum }];
  }

  tip(i) {
    const { names, realised, steps } = this.data;
    const order = names
      .map((_, g) => g)
      .sort((a, b) => (realised[b][i] ?? 0) - (realised[a][i] ?? 0))
      .slice(0, 12);
    const colours = coloursOf(this.context.run());
    const rows = order.map((g) => [
      el("span", {}, swatch(colours.get(names[g])), ` ${names[g]}`),
      percent(realised[g][i]),
      percent(this.requested[g][i]),
    ]);
    return [el("p", {}, el("b", { text: `up to step ${count(steps[i])}` })), table(["", "read", "asked"], rows)];
  }

  markTip(mark) {
    const known = this.details.get(mark.lsn);
    if (known) return commitNodes(known);
    if (known === undefined) {
      this.details.set(mark.lsn, null);
      get(`/api/runs/${this.context.run().index}/commits/${mark.lsn}`).then(
        (detail) => {
          if (this.details.size > 300) this.details.clear();
          this.details.set(mark.lsn, detail);
          if (this.chart?.plot) this.chart.moved(this.chart.plot);
        },
        () => this.details.delete(mark.lsn),
      );
    }
    return [
      el(
        "p",
        {},
        el("b", { text: `policy ${mark.lsn}: ${mark.kind}` }),
        ` from step ${count(mark.step)}${mark.author ? ` by ${mark.author}` : ""}`,
      ),
    ];
  }
}

/** Who, why and what changed. */
export function commitNodes(detail) {
  const by = detail.author ? ` by ${detail.author}` : "";
  const rows = detail.changes.map(([name, before, after]) => [name, percent(before), "→", percent(after)]);
  return [
    el("p", {}, el("b", { text: `policy ${detail.lsn}: ${detail.kind}` }), ` from step ${count(detail.step)}${by}`),
    detail.why && el("p", { class: "why", text: detail.why }),
    detail.weighting && el("p", { class: "why", text: `weights: ${detail.weighting}` }),
    rows.length
      ? table(["", "before", "", "after"], rows)
      : el("p", { class: "why", text: "the mixture stays as it is" }),
    detail.more > 0 && el("p", { class: "why", text: `and ${detail.more} more domains` }),
  ].filter(Boolean);
}

function aligned(data) {
  if (data.requested_steps.length === data.steps.length) return data.requested;
  const place = new Map(data.requested_steps.map((step, i) => [step, i]));
  return data.names.map((_, g) =>
    data.steps.map((step) => (place.has(step) ? data.requested[g][place.get(step)] : null)),
  );
}

export class LossPanel {
  constructor(body, tools, context) {
    this.body = body;
    this.context = context;
    this.split = "train";
    tools.append(...splitButtons(this.split, (split) => this.choose(split)));
    this.hidden = new Set();
  }

  choose(split) {
    this.split = split;
    if (this.data) this.draw(this.data, this.context.run());
  }

  draw(data, run) {
    this.data = data;
    const curve = data[this.split];
    if (!curve.steps.length) {
      const why =
        this.split === "train"
          ? "No training report yet."
          : "No validation yet: see evaluation.every in the run's configuration.";
      this.body.replaceChildren(empty(run.summary?.reading ? "The journal is still being read." : why));
      this.chart = null;
      return;
    }
    if (!this.chart) {
      const host = el("div");
      this.chips = el("div", { class: "chips", role: "group", "aria-label": "Domains: press to show or hide" });
      this.note = el("p", { class: "soft sub" });
      this.body.replaceChildren(host, this.chips, this.note);
      this.chart = new StepChart(host, {
        label: "Loss by domain",
        unit: "nats per token",
        height: 250,
        tip: (i) => this.tip(i),
      });
    }
    this.drawCurves(data, curve, run);
  }

  drawCurves(data, curve, run) {
    const colours = coloursOf(run);
    const first = [...colours.keys()];
    const order = [...first, ...data.names.filter((name) => !colours.has(name))];
    this.extra ??= new Set();
    this.visible = order.filter((name) => (colours.has(name) ? !this.hidden.has(name) : this.extra.has(name)));
    const series = this.visible.map((name) => {
      const g = data.names.indexOf(name);
      const [mean, half] = [curve.mean[g], curve.half[g]];
      return {
        label: name,
        values: mean,
        colour: colours.get(name) ?? "other",
        low: mean.map((v, p) => (v === null ? null : v - (half[p] ?? 0))),
        high: mean.map((v, p) => (v === null ? null : v + (half[p] ?? 0))),
      };
    });
    series.push({ label: "all tokens", values: curve.overall, colour: "ink", width: 1.75, dash: [6, 3] });
    this.chart.update({ x: curve.steps, series });
    this.drawChips(order, colours, run);
    this.note.textContent =
      "Dashed: mean over all tokens. Bands: 95 % of the mean, tokens taken as independent (they are not: a lower bound).";
  }

  drawChips(order, colours, run) {
    const key = order.join("\n") + this.visible.join("\n");
    if (key === this.chipsOf) return;
    this.chipsOf = key;
    this.chips.replaceChildren(
      ...order.map((name) =>
        el(
          "button",
          {
            type: "button",
            "aria-pressed": String(this.visible.includes(name)),
            title: name,
            onclick: () => {
              const set = colours.has(name) ? this.hidden : this.extra;
              if (!set.delete(name)) set.add(name);
              this.draw(this.data, run);
            },
          },
          swatch(colours.get(name)),
          el("span", { class: "clip", text: name }),
        ),
      ),
    );
  }

  tip(i) {
    const curve = this.data[this.split];
    const colours = coloursOf(this.context.run());
    const rows = this.visible
      .map((name) => this.data.names.indexOf(name))
      .filter((g) => curve.mean[g][i] !== null)
      .sort((a, b) => curve.mean[b][i] - curve.mean[a][i])
      .slice(0, 14)
      .map((g) => [
        el("span", {}, swatch(colours.get(this.data.names[g])), ` ${this.data.names[g]}`),
        fixed(curve.mean[g][i]),
        `± ${fixed(curve.half[g][i])}`,
      ]);
    return [
      el("p", {}, el("b", { text: `step ${count(curve.steps[i])}` }), ` all tokens ${fixed(curve.overall[i])}`),
      table(["", "nats", ""], rows),
    ];
  }
}
