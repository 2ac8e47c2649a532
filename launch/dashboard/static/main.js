// The page: which run is shown, what of it is on the screen, and one cheap question every two seconds.
import { getNew } from "./api.js";
import { byId, clock, count, duration, el, fixed, hideTip, short } from "./dom.js";
import { DomainPanel } from "./domains.js";
import { InspectorPanel, SubmitPanel } from "./inspector.js";
import { LossPanel, MixturePanel } from "./mixture.js";
import { ComparePanel, FiguresPanel, ThroughputPanel } from "./running.js";
import { PolicyPanel, WeightingPanel } from "./steering.js";
import { TimelinePanel } from "./timeline.js";

const POLL_MS = 2000;
const STALE_S = 300;

// title, jump word, source panel of the server, drawing class, wide, for which kinds of run
const PANELS = [
  ["mixture", "Mixture: asked for and read", "mixture", MixturePanel, false, "pretraining"],
  ["losses", "Loss by domain", "losses", LossPanel, false, "pretraining"],
  ["domains", "Domains", "summary", DomainPanel, false, "pretraining"],
  ["timeline", "Timeline of policies", "timeline", TimelinePanel, false, "pretraining"],
  ["policy", "Online policies", "policy", PolicyPanel, false, "pretraining"],
  ["weights", "Instance weights", "weighting", WeightingPanel, false, "pretraining"],
  ["figures", "Figures", "figures", FiguresPanel, true, "figures"],
  ["speed", "Speed and memory", "throughput", ThroughputPanel, true, "both"],
  ["data", "Data inspector", null, InspectorPanel, true, "pretraining"],
  ["compare", "Runs beside each other", "compare", ComparePanel, true, "several"],
  ["submit", "Submit a policy", "summary", SubmitPanel, true, "submit"],
];

const page = { runs: [], shown: 0, panels: [], pollTag: null, submit: false, timings: {}, timer: 0, polls: 0 };
const context = { run: () => page.runs[page.shown] };

/** Ask what is new; fetch and draw the panels on the screen whose tag is another one. */
async function poll() {
  clearTimeout(page.timer);
  try {
    const { tag, tree } = await getNew("/api/poll", page.pollTag);
    page.pollTag = tag;
    if (tree) await take(tree);
    page.polls += 1;
    byId("state").dataset.gone = "";
  } catch (error) {
    byId("state").dataset.gone = error.message;
    page.pollTag = null;
  }
  showState();
  if (!document.hidden) page.timer = setTimeout(poll, POLL_MS);
}

async function take(tree) {
  page.submit = tree.submit;
  tree.runs.forEach((found, index) => {
    page.runs[index] ??= { index, name: found.name, tags: {}, known: {} };
    Object.assign(page.runs[index], { tags: found.panels, left: found.left });
  });
  const run = context.run();
  await refresh(run, "summary");
  if (run.kind !== run.summary.kind) build(run);
  glance(run);
  await Promise.all(page.panels.filter((panel) => panel.isVisible).map((panel) => bring(panel, run)));
}

/** The newest data of one of the server's panels; whether it is new. */
async function refresh(run, source) {
  const tag = run.tags[source];
  if (run.known[source]?.tag === tag) return false;
  const { tree, tag: found } = await getNew(`/api/runs/${run.index}/panels/${source}`, null);
  run.known[source] = { tag: found, tree };
  if (source === "summary") run.summary = tree;
  return true;
}

/** Fetch and draw one panel, if there is anything new for it. */
async function bring(panel, run) {
  const began = performance.now();
  if (panel.source === "compare") {
    const key = page.runs.map((other) => other.tags.losses).join();
    if (panel.drawn === key) return;
    panel.view.draw(await ComparePanel.fetch());
    panel.drawn = key;
  } else if (panel.source) {
    await refresh(run, panel.source);
    const { tag, tree } = run.known[panel.source];
    if (panel.drawn === tag || run !== context.run()) return;
    panel.view.draw(tree, run);
    panel.drawn = tag;
  } else {
    return;
  }
  page.timings[panel.id] = performance.now() - began;
  panel.section.dataset.drawn = "yes";
}

/** The panels of this kind of run, empty until they come into sight. */
function build(run) {
  run.kind = run.summary.kind;
  page.panels.forEach((panel) => page.observer.unobserve(panel.section));
  const wanted = PANELS.filter(([, , , , , kinds]) => {
    if (kinds === "several") return page.runs.length > 1;
    if (kinds === "submit") return page.submit && run.kind === "pretraining";
    return kinds === "both" || kinds === run.kind;
  });
  page.panels = wanted.map(([id, title, source, View, wide]) => {
    const [body, tools] = [el("div", { class: "body" }), el("span", { class: "tools" })];
    const section = el("section", { id, class: "panel", "aria-label": title }, el("h2", {}, title, tools), body);
    return { id, title, source, wide, section, view: new View(body, tools, context), isVisible: false, drawn: null };
  });
  arrange();
  byId("jump").replaceChildren(...page.panels.map((panel) => el("a", { href: `#${panel.id}`, text: panel.id })));
  page.panels.forEach((panel) => page.observer.observe(panel.section));
}

const isWide = matchMedia("(min-width: 1080px)");

/** Two columns that fill independently, or all panels in order. */
function arrange() {
  const sections = page.panels.map((panel) => panel.section);
  const halves = page.panels.filter((panel) => !panel.wide);
  if (!isWide.matches || !halves.length) {
    byId("panels").replaceChildren(...sections);
    return;
  }
  const columns = [el("div", { class: "column" }), el("div", { class: "column" })];
  halves.forEach((panel, i) => columns[i % 2].append(panel.section));
  const wideOnes = page.panels.filter((panel) => panel.wide).map((panel) => panel.section);
  byId("panels").replaceChildren(...columns, ...wideOnes);
}

function show(index) {
  page.shown = index;
  const run = context.run();
  run.kind = null; // the panels are built anew: none keeps anything of the other run
  page.pollTag = null;
  location.hash = "";
  drawRuns();
  hideTip();
  poll();
}

function drawRuns() {
  const one = page.runs.length === 1;
  byId("runs").replaceChildren(
    ...page.runs.map((run) =>
      one
        ? el("span", { class: "clip", text: run.name, title: run.summary?.folder })
        : el("button", {
            type: "button",
            class: "clip",
            text: run.name,
            "aria-pressed": String(run.index === page.shown),
            onclick: () => show(run.index),
          }),
    ),
  );
}

/** The run in a few numbers. */
function glance(run) {
  const s = run.summary;
  if (byId("runs").childElementCount !== page.runs.length) drawRuns();
  document.title = `${run.name} · mixwright`;
  byId("problem").hidden = !s.problem;
  byId("problem").textContent = s.problem ? `This run cannot be read further: ${s.problem}` : "";
  const part = s.num_steps ? s.next_step / s.num_steps : null;
  const speed =
    s.seconds_per_step && s.tokens_per_step ? `${short(s.tokens_per_step / s.seconds_per_step)} tokens/s` : "";
  const left =
    s.state === "running" && s.seconds_per_step && s.num_steps
      ? `${duration((s.num_steps - s.next_step) * s.seconds_per_step)} left`
      : "";
  const losses = s.domains.filter((domain) => domain.loss !== null && domain.loss !== undefined);
  const mean = losses.length ? losses.reduce((sum, domain) => sum + domain.loss, 0) / losses.length : null;
  const policy = s.policy;
  const coming = s.pending?.[0];
  byId("glance").replaceChildren(
    ...[
      fact("step", `${count(s.next_step)}${s.num_steps ? ` / ${short(s.num_steps)}` : ""}`, left, part),
      fact("tokens", short(s.tokens_per_step ? s.next_step * s.tokens_per_step : null), speed),
      s.kind === "pretraining" && fact("mean of domain losses", fixed(mean), "nats per token, newest report"),
      fact("seconds per step", short(s.seconds_per_step), "median of the newest"),
      policy &&
        fact(
          "policy in force",
          `${policy.kind}`,
          `entry ${policy.lsn} from step ${count(policy.effective_step)}${policy.author ? ` by ${policy.author}` : ""}${policy.why ? `: ${policy.why}` : ""}`,
          null,
          true,
        ),
      coming &&
        fact(
          "coming",
          coming.kind,
          `entry ${coming.lsn}, ${coming.effective_step ? `step ${count(coming.effective_step)}` : coming.at_step ? `wants step ${count(coming.at_step)}` : "as soon as possible"}`,
        ),
      s.kind === "pretraining" &&
        fact("mixing service", s.held ? "decisions are held" : s.service.state, s.service.message, null, true),
      s.checkpoint && fact("checkpoint", s.checkpoint, `journal entry ${count(s.last_lsn)}`),
    ].filter(Boolean),
  );
}

function fact(name, value, small = "", part = null, wide = false) {
  const bar = part === null ? null : el("div", { class: "bar" }, el("i", { width: `${100 * part}%` }));
  return el(
    "dl",
    { class: `fact${wide ? " wide" : ""}`, title: `${name}: ${value}${small ? ` (${small})` : ""}` },
    el("dt", { text: name }),
    el("dd", { text: value }),
    el("small", { text: small }),
    bar,
  );
}

function showState() {
  const pill = byId("state");
  const s = context.run()?.summary;
  const gone = pill.dataset.gone;
  const age = s?.updated ? Math.max(s.now - s.updated, 0) : null;
  const isStale = s?.state === "running" && age > STALE_S;
  const reading = s?.reading && context.run().left > 0;
  pill.className = `pill ${gone ? "gone" : reading ? "reading" : isStale ? "stale" : (s?.state ?? "")}`;
  pill.textContent = gone
    ? "no answer"
    : reading
      ? `reading, ${count(context.run().left)} entries to go`
      : isStale
        ? `silent for ${duration(age)}`
        : (s?.state ?? "connecting");
  pill.title = gone || (s?.updated ? `newest journal entry: ${clock(s.updated)}` : "");
}

function setUpTheme() {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const changed = () => document.dispatchEvent(new Event("themechange"));
  dark.addEventListener("change", changed);
  byId("theme").addEventListener("click", () => {
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
    root.dataset.theme = isDark ? "light" : "dark";
    try {
      localStorage.setItem("mixwright-theme", root.dataset.theme);
    } catch {
      /* it holds until the page is left */
    }
    changed();
  });
}

page.observer = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      const panel = page.panels.find((other) => other.section === entry.target);
      if (panel) panel.isVisible = entry.isIntersecting;
      if (panel?.isVisible && context.run()?.summary) bring(panel, context.run()).catch(() => {});
    }
  },
  { rootMargin: "300px" },
);

document.addEventListener("visibilitychange", () => document.hidden || poll());
isWide.addEventListener("change", arrange);
setUpTheme();
poll();

/** For tests and benchmarks: ask now, and how long each panel took from question to drawing. */
window.mixwright = { poll, page, bring: (panel) => bring(panel, context.run()) };
