// Looking into the data: the rows of a step as text, the steps of a row. And the form that submits policies.
import { get, post } from "./api.js";
import { count, el, empty, fixed, percent, short, table, td } from "./dom.js";

const PAGE = 64;
const ROW_HEADER = [["position"], ["row", "left"], ["epoch"], ["loss"], ["weight"], ["text", "left"]];

export class InspectorPanel {
  constructor(body, tools, context) {
    this.context = context;
    this.step = el("input", { type: "number", min: "0", value: "0", required: true });
    this.rank = el("input", {
      value: "0/1",
      required: true,
      maxlength: "40",
      pattern: "[0-9]+/[0-9]+",
      title: "rank R of N, such as 3/8",
    });
    this.characters = el(
      "select",
      {},
      ...[
        [300, "300 characters"],
        [2000, "2,000 characters"],
        [20000, "whole rows"],
      ].map(([value, text]) => el("option", { value: String(value), text })),
    );
    this.row = el("input", { placeholder: "domain:row", required: true, maxlength: "200" });
    this.answer = el(
      "div",
      { "aria-live": "polite" },
      empty("A step and a rank show the rows that the rank read there, as text. A row shows the steps that read it."),
    );
    const byStep = el(
      "form",
      { onsubmit: (event) => this.submitted(event, () => this.showStep(0)) },
      el("label", { text: "step" }, this.step),
      el("label", { text: "rank / ranks" }, this.rank),
      el("label", { text: "of each row" }, this.characters),
      el("button", { text: "show rows" }),
    );
    const byRow = el(
      "form",
      { onsubmit: (event) => this.submitted(event, () => this.showRow(this.row.value)) },
      el("label", { text: "domain:row" }, this.row),
      el("button", { text: "show its steps" }),
    );
    body.replaceChildren(el("div", { class: "two" }, byStep, byRow), this.answer);
  }

  draw() {}

  async submitted(event, act) {
    event.preventDefault();
    await act();
  }

  async ask(path, show) {
    this.answer.setAttribute("aria-busy", "true");
    try {
      this.answer.replaceChildren(...show(await get(path)));
    } catch (error) {
      this.answer.replaceChildren(el("p", { class: "bad", text: error.message }));
    }
    this.answer.removeAttribute("aria-busy");
  }

  showStep(first) {
    const query = new URLSearchParams({
      step: this.step.value,
      rank: this.rank.value,
      characters: this.characters.value,
      first,
    });
    return this.ask(`/api/runs/${this.context.run().index}/rows?${query}`, (found) => this.rows(found));
  }

  showRow(name) {
    this.row.value = name;
    return this.ask(`/api/runs/${this.context.run().index}/uses?${new URLSearchParams({ row: name })}`, (found) =>
      this.uses(found),
    );
  }

  rows(found) {
    const notes = [
      ...new Set([found.trained ? "" : "this step is still to come", found.text_problem, found.weight_problem]),
    ].filter(Boolean);
    const rows = found.rows.map((row) => {
      const name = `${row.domain}:${row.row}`;
      const cell = el("button", {
        type: "button",
        text: name,
        title: "the steps that read this row",
        onclick: () => this.showRow(name),
      });
      const text =
        row.text === null ? el("td", { class: "text soft", text: "–" }) : el("td", { class: "text", text: row.text });
      return el(
        "tr",
        {},
        td(String(row.position)),
        td(cell, "left"),
        td(String(row.epoch)),
        td(fixed(row.loss)),
        td(fixed(row.weight, 2)),
        text,
      );
    });
    const shown = `step ${count(found.step)}, policy ${found.policy}: rows ${found.first + 1} to ${found.first + found.rows.length} of ${count(found.num_rows)}`;
    const more =
      found.first + found.rows.length < found.num_rows &&
      el("button", { type: "button", text: "next rows", onclick: () => this.showStep(found.first + PAGE) });
    return [
      el("p", { class: "soft", text: [shown, ...notes].join(". ") }),
      el(
        "div",
        { class: "scroll", tabindex: "0", role: "region", "aria-label": "Rows" },
        table(
          ROW_HEADER.map(([text, kind]) => el("th", { text, class: kind, scope: "col" })),
          rows,
          0,
        ),
      ),
      ...(more ? [more] : []),
    ];
  }

  uses(found) {
    const rows = found.uses.map((use) => {
      const jump = el("button", {
        type: "button",
        text: count(use.step),
        onclick: () => {
          this.step.value = String(use.step);
          this.rank.value = "0/1";
          return this.showStep(0);
        },
      });
      return [jump, count(use.position), String(use.epoch), use.step < found.next_step ? "read" : "to come"];
    });
    const head = el("p", {
      class: "soft",
      text: `${found.row}: ${rows.length ? `${rows.length} of the run's ${count(found.num_steps)} steps, under the commits so far` : "no step of the run reads it, under the commits so far"}`,
    });
    const text =
      found.text === null ? el("p", { class: "soft", text: found.text_problem }) : el("pre", { text: found.text });
    return [
      head,
      rows.length
        ? el(
            "div",
            { class: "scroll", tabindex: "0", role: "region", "aria-label": "Steps" },
            table(["step", "position", "epoch", ""], rows, 0),
          )
        : "",
      text,
    ];
  }
}

const EXAMPLE = "kind: static\nmixture: {}\n";

export class SubmitPanel {
  constructor(body, tools, context) {
    this.context = context;
    this.document = el("textarea", { spellcheck: "false", "aria-label": "Policy document (YAML)" });
    this.document.value = EXAMPLE;
    this.author = el("input", { maxlength: "100", autocomplete: "username" });
    this.why = el("input", { maxlength: "500" });
    this.atStep = el("input", { type: "number", min: "0", placeholder: "soonest" });
    this.shadow = el("input", { type: "checkbox" });
    this.token = el("input", { type: "password", autocomplete: "off", required: true });
    this.previewed = "";
    this.send = el("button", {
      type: "button",
      text: "submit",
      disabled: true,
      title: "preview it first",
      onclick: () => this.submit(),
    });
    this.look = el("button", { type: "submit", text: "preview" });
    this.answer = el("div", { "aria-live": "polite" });
    const form = el(
      "form",
      {
        onsubmit: (event) => {
          event.preventDefault();
          this.preview();
        },
        oninput: () => this.changed(),
      },
      el("label", { class: "full", text: "policy document (YAML, as for `mixwright mix submit`)" }, this.document),
      el("label", { text: "author" }, this.author),
      el("label", { text: "why" }, this.why),
      el("label", { text: "at step" }, this.atStep),
      el("label", { class: "inline" }, this.shadow, "shadow"),
      el("label", { text: "token (printed when the dashboard started)" }, this.token),
      this.look,
      this.send,
    );
    body.replaceChildren(form, this.answer);
  }

  draw(summary) {
    if (this.document.value !== EXAMPLE || !summary?.domains?.length) return;
    const shares = summary.domains
      .slice(0, 40)
      .map((domain) => `  ${domain.name}: ${Math.max(Math.round(1000 * (domain.proportion ?? 0)), 1)}`);
    this.document.value = `kind: static\nmixture:\n${shares.join("\n")}\n`;
  }

  /** Only what was previewed can be submitted. */
  changed() {
    this.send.disabled = JSON.stringify(this.tree()) !== this.previewed;
  }

  tree() {
    const step = this.atStep.value === "" ? null : Number(this.atStep.value);
    return {
      document: this.document.value,
      author: this.author.value,
      why: this.why.value,
      at_step: step,
      shadow: this.shadow.checked,
    };
  }

  async act(verb, tree, show) {
    this.look.disabled = this.send.disabled = true;
    this.answer.replaceChildren(
      el("p", {
        class: "soft outcome",
        text: verb === "preview" ? "looking ahead …" : "asking the run's controller …",
      }),
    );
    try {
      this.answer.replaceChildren(
        ...show(await post(`/api/runs/${this.context.run().index}/${verb}`, this.token.value, tree)),
      );
      return true;
    } catch (error) {
      this.answer.replaceChildren(el("p", { class: "bad outcome", text: error.message }));
      return false;
    } finally {
      this.look.disabled = false;
    }
  }

  async preview() {
    const tree = this.tree();
    const done = await this.act("preview", tree, (found) => this.forecast(found));
    this.previewed = done ? JSON.stringify(tree) : "";
    this.changed();
  }

  submit() {
    this.previewed = "";
    // One id for one press: a request that is sent twice is journaled once.
    const id = Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join(
      "",
    );
    return this.act("submit", { ...this.tree(), request_id: id }, (found) => [
      el("p", { class: "good outcome", text: [`policy ${found.lsn} is accepted`, ...found.remarks].join("\n") }),
    ]);
  }

  forecast(found) {
    const reads = new Map(found.forecast.domains.map((domain) => [domain.name, domain]));
    const rows = [...(found.mixture ?? found.changes)]
      .sort((a, b) => Math.max(b.after, b.before) - Math.max(a.after, a.before))
      .map((change) => {
        const domain = reads.get(change.name);
        const points = 100 * (change.after - change.before);
        return [
          change.name,
          percent(change.before, 2),
          percent(change.after, 2),
          `${points >= 0 ? "+" : "−"}${Math.abs(points).toFixed(2)}`,
          short(domain?.num_tokens ?? null),
          fixed(domain?.epochs, 2),
          domain?.exhaustion ? `step ${count(domain.exhaustion.step)}` : "–",
        ];
      });
    return [
      el("p", {
        class: "outcome",
        text: [`Would hold from about step ${count(found.step)}. Nothing was submitted.`, ...found.remarks].join("\n"),
      }),
      el(
        "div",
        { class: "scroll", tabindex: "0", role: "region", "aria-label": "Preview" },
        table(["domain", "in force", "new", "points", "tokens to the end", "epochs at the end", "cap reached"], rows),
      ),
    ];
  }
}
