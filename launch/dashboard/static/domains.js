// Domains: share, tokens, epochs beside their caps, the countdown to exhaustion, losses.
import { count, duration, el, empty, fixed, percent, short, table } from "./dom.js";
import { coloursOf, swatch } from "./mixture.js";

const COLUMNS = [
  ["domain", (d) => d.name, "left"],
  ["share", (d) => d.proportion],
  ["tokens", (d) => d.num_tokens],
  ["epochs", (d) => d.epochs],
  ["cap", (d) => d.max_epochs ?? Infinity],
  ["runs out", (d) => d.exhausted?.in ?? Infinity],
  ["loss", (d) => d.loss],
  ["held out", (d) => d.validation_loss],
];

export class DomainPanel {
  constructor(body, tools, context) {
    this.body = body;
    this.context = context;
    this.sort = { column: 1, falling: true };
  }

  draw(summary, run) {
    this.summary = summary;
    const known = summary.domains.filter((domain) => domain.proportion !== undefined);
    if (!known.length) {
      this.body.replaceChildren(
        empty(
          summary.reading
            ? "The journal is still being read."
            : "No policy is committed yet: nothing says what is read.",
        ),
      );
      return;
    }
    const value = COLUMNS[this.sort.column][1];
    const sign = this.sort.falling ? -1 : 1;
    const order = [...known].sort((a, b) => sign * compare(value(a), value(b)));
    const largest = Math.max(...known.map((domain) => domain.proportion), 1e-9);
    const most = 1.25 * Math.max(...known.map((domain) => domain.epochs), 1e-9);
    const rows = order.map((domain) => this.row(domain, run, largest, most));
    const header = COLUMNS.map(([name, , left], i) => this.header(name, i, left));
    const top = this.body.firstElementChild?.scrollTop ?? 0;
    this.body.replaceChildren(
      el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Domains" }, table(header, rows)),
    );
    this.body.firstElementChild.scrollTop = top;
  }

  header(name, i, left) {
    const sorted = this.sort.column === i ? (this.sort.falling ? "descending" : "ascending") : null;
    return el(
      "th",
      { class: left ?? "", scope: "col", "aria-sort": sorted },
      el("button", {
        type: "button",
        text: name + (sorted === "descending" ? " ↓" : sorted ? " ↑" : ""),
        onclick: () => {
          this.sort = { column: i, falling: this.sort.column === i ? !this.sort.falling : i !== 0 };
          this.draw(this.summary, this.context.run());
        },
      }),
    );
  }

  row(domain, run, largest, most) {
    const name = el("span", {}, swatch(coloursOf(run).get(domain.name)), ` ${domain.name}`);
    const share = el("span", {}, meter(domain.proportion / largest), percent(domain.proportion));
    const cap = domain.max_epochs ?? null;
    const epochs = el(
      "span",
      {},
      meter(domain.epochs / most, cap === null || cap > most ? null : cap / most),
      fixed(domain.epochs, 2),
    );
    const capText =
      cap === null ? "none" : `${short(cap)} ${domain.on_exhaust === "renormalise" ? "" : domain.on_exhaust}`;
    return [
      name,
      share,
      short(domain.num_tokens),
      epochs,
      capText,
      this.end(domain),
      fixed(domain.loss),
      fixed(domain.validation_loss),
    ];
  }

  /** The countdown: steps and time until the cap. */
  end(domain) {
    if (!domain.exhausted) return el("span", { class: "soft", text: "not in this run" });
    const { step, action } = domain.exhausted;
    const left = domain.exhausted.in;
    const stop = action === "stop" ? ", ends the run" : "";
    if (left === 0) return el("span", { class: "bad", text: `at its cap since step ${count(step)}${stop}` });
    const time =
      this.summary.seconds_per_step && this.summary.state === "running"
        ? ` · ${duration(left * this.summary.seconds_per_step)}`
        : "";
    return el("span", {
      class: left < 0.1 * this.summary.num_steps ? "bad" : "warn",
      text: `in ${short(left)} steps${time}${stop}`,
    });
  }
}

function meter(part, mark = null) {
  const fill = el("i", { width: `${Math.max(0, Math.min(100, 100 * part))}%` });
  return el(
    "span",
    { class: "meter", "aria-hidden": "true" },
    fill,
    mark === null ? null : el("u", { left: `${Math.max(0, Math.min(98, 100 * mark))}%` }),
  );
}

function compare(a, b) {
  if (typeof a === "string") return a < b ? -1 : a > b ? 1 : 0;
  return (a ?? -Infinity) - (b ?? -Infinity) || 0;
}
