// Elements and words. Text reaches the page through textContent alone: names and documents are other people's.

/** An element with properties (class, text, on<event>, dataset and aria attributes) and children. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "width" || name === "left" || name === "background") node.style[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** Buttons that choose between the losses of two splits; the chosen one is pressed. */
export function splitButtons(chosen, choose) {
  const names = { train: "training", validation: "validation" };
  const buttons = Object.entries(names).map(([split, text]) =>
    el("button", { type: "button", text, "aria-pressed": String(split === chosen) }),
  );
  buttons.forEach((button, i) =>
    button.addEventListener("click", () => {
      buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
      choose(Object.keys(names)[i]);
    }),
  );
  return buttons;
}

export const byId = (id) => document.getElementById(id);

const colours = new Map();
document.addEventListener("themechange", () => colours.clear());

/** A colour of the theme in force, for canvases. Kept until the theme changes: asking for the style is slow. */
export function colour(name) {
  if (!colours.has(name))
    colours.set(name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim());
  return colours.get(name);
}

/** A table: header cells are text or {text, left}, rows are lists of text, numbers or nodes. */
export function table(header, rows, left = 1) {
  const head = el(
    "tr",
    {},
    ...header.map((cell, i) =>
      cell instanceof Node ? cell : el("th", { text: cell, class: i < left ? "left" : "", scope: "col" }),
    ),
  );
  const body = rows.map((row) =>
    row instanceof Node ? row : el("tr", {}, ...row.map((cell, i) => td(cell, i < left ? "left" : ""))),
  );
  return el("table", {}, el("thead", {}, head), el("tbody", {}, ...body));
}

export function td(cell, kind = "") {
  return cell instanceof Node ? el("td", { class: kind }, cell) : el("td", { class: kind, text: cell ?? "–" });
}

export const empty = (text) => el("p", { class: "empty", text });

export const count = (value) =>
  value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en-US");

/** A number with a unit prefix: 1.23M. */
export function short(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  for (const [limit, unit] of [
    [1e12, "T"],
    [1e9, "G"],
    [1e6, "M"],
    [1e3, "k"],
  ]) {
    if (size >= limit) return trimmed((value / limit).toPrecision(digits)) + unit;
  }
  return size >= 1e-3 || size === 0 ? trimmed(Number(value).toPrecision(digits)) : Number(value).toExponential(1);
}

const trimmed = (text) => (text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text);

export const percent = (share, digits = 1) =>
  share === null || share === undefined ? "–" : `${(100 * share).toFixed(digits)} %`;

export function fixed(value, digits = 3) {
  return value === null || value === undefined ? "–" : value.toFixed(digits);
}

/** Seconds as 45 s, 12 min, 3 h 20 min, 2 d 4 h. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  if (seconds < 60) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

/** A journal's clock in the reader's time zone. */
export const clock = (seconds) => (seconds ? new Date(seconds * 1000).toLocaleString("sv-SE") : "–");

const tip = byId("tip");

/** Show nodes beside the pointer (or a place on the page); nothing hides the tip. */
export function showTip(x, y, ...nodes) {
  if (!nodes.length) {
    tip.hidden = true;
    return;
  }
  tip.replaceChildren(...nodes);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, x + 14 + box.width > innerWidth ? x - box.width - 10 : x + 14)}px`;
  tip.style.top = `${Math.max(4, Math.min(y + 12, innerHeight - box.height - 4))}px`;
}

export const hideTip = () => showTip(0, 0);
