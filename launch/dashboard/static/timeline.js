// Timeline of policies: every event in its lane, and the list of them page by page.
import { get } from "./api.js";
import { Lanes } from "./canvases.js";
import { clock, count, el, empty, table, td } from "./dom.js";
import { commitNodes } from "./mixture.js";

const PAGE = 60;
const EVENT_HEADER = [
  ["step", ""],
  ["what", "left"],
  ["entry", "lsn"],
  ["by", "left by"],
  ["", ""],
];

export class TimelinePanel {
  constructor(body, tools, context) {
    this.context = context;
    this.body = body;
    this.off = new Set(["run"]);
    this.lanesHost = el("div");
    this.filters = el("div", { class: "chips", role: "group", "aria-label": "Kinds of events in the list" });
    this.list = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Events" });
    this.older = el("button", { type: "button", text: "older", onclick: () => this.page(this.last) });
    this.newest = el("button", { type: "button", text: "newest", onclick: () => this.page(null) });
    tools.append(this.newest, this.older);
  }

  draw(data, run) {
    if (!data.steps.length) {
      this.body.replaceChildren(empty("The journal has no entry yet."));
      return;
    }
    if (!this.lanes) {
      this.body.replaceChildren(this.lanesHost, this.filters, this.list);
      this.lanes = new Lanes(
        this.lanesHost,
        "Events over steps. Arrow keys go from one to the next, Enter shows it in the list.",
      );
    }
    this.data = data;
    this.lanes.update({
      ...data,
      end: run.summary?.num_steps ?? data.now,
      tip: (i, show) => this.tip(i, show),
      press: (i) => this.page(data.lsn[i] + 1),
    });
    this.drawFilters(data);
    if (!this.before) this.page(null);
  }

  drawFilters(data) {
    this.filters.replaceChildren(
      ...data.lanes.map((lane) =>
        el("button", {
          type: "button",
          text: `${lane} ${data.counts[lane] || ""}`,
          "aria-pressed": String(!this.off.has(lane)),
          disabled: !data.counts[lane],
          onclick: () => {
            if (!this.off.delete(lane)) this.off.add(lane);
            this.drawFilters(data);
            this.page(this.before ?? null);
          },
        }),
      ),
    );
  }

  async page(before) {
    this.before = before;
    const lanes = this.data.lanes.filter((lane) => !this.off.has(lane)).join(",");
    const from = before === null ? "" : `&before=${before}`;
    const found = await get(`/api/runs/${this.context.run().index}/events?count=${PAGE}&lanes=${lanes}${from}`).catch(
      () => null,
    );
    if (!found || before !== this.before) return;
    this.last = found.events.at(-1)?.lsn ?? null;
    this.older.disabled = !found.more;
    this.newest.disabled = before === null;
    const rows = found.events.map((event) => this.row(event));
    this.list.replaceChildren(
      rows.length
        ? table(
            EVENT_HEADER.map(([text, kind]) => el("th", { text, class: kind, scope: "col" })),
            rows,
            0,
          )
        : empty("No event of these kinds."),
    );
  }

  row(event) {
    const what = el("span", { class: `lane ${event.lane}`, text: event.lane });
    const open = () => this.open(row, event);
    const row = el(
      "tr",
      {
        class: "press",
        tabindex: "0",
        title: clock(event.time),
        onclick: open,
        onkeydown: (e) => e.key === "Enter" && open(),
      },
      td(count(event.step)),
      td(what, "left"),
      td(String(event.lsn), "lsn"),
      td(event.author || "", "left by"),
      el("td", { class: "text", text: event.text }),
    );
    return row;
  }

  /** The entry as it stands in the journal, below its row. */
  async open(row, event) {
    if (row.nextElementSibling?.classList.contains("detail")) {
      row.nextElementSibling.remove();
      return;
    }
    const index = this.context.run().index;
    const entry = await get(`/api/runs/${index}/entries/${event.lsn}`).catch((error) => ({ error: error.message }));
    const policy = event.lane === "commit" ? entry.body?.policy_lsn : null;
    const nodes = policy ? await get(`/api/runs/${index}/commits/${policy}`).then(commitNodes, () => []) : [];
    const text = JSON.stringify(
      entry.body ?? entry,
      (key, value) => (Array.isArray(value) && value.length > 24 ? `[${value.length} values]` : value),
      1,
    );
    row.after(
      el(
        "tr",
        { class: "detail" },
        el(
          "td",
          { class: "text", colspan: "5" },
          ...nodes,
          el("pre", { text: `${clock(entry.time)} ${entry.writer ?? ""}\n${text}` }),
        ),
      ),
    );
  }

  tip(index, show) {
    const { lsn, lane, lanes, steps } = this.data;
    show([el("p", {}, el("b", { text: lanes[lane[index]] }), ` at step ${count(steps[index])}, entry ${lsn[index]}`)]);
    this.wanted = lsn[index];
    get(
      `/api/runs/${this.context.run().index}/events?count=1&before=${lsn[index] + 1}&lanes=${lanes[lane[index]]}`,
    ).then(
      (found) => {
        const event = found.events[0];
        if (this.wanted !== lsn[index] || event?.lsn !== lsn[index]) return;
        show([
          el(
            "p",
            {},
            el("b", { text: event.lane }),
            ` at step ${count(event.step)}, entry ${event.lsn}${event.author ? ` by ${event.author}` : ""}`,
          ),
          el("p", { class: "why", text: event.text }),
        ]);
      },
      () => {},
    );
  }
}
