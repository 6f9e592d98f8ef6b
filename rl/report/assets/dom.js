// Elements and numbers. Text only ever enters the page as a text node, so nothing a model wrote can become markup, and
// characters that act instead of being seen (controls, marks of direction, zero-width ones, tags) are spelled out.

const ACTING =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufe00-\ufe0e\ufeff\ufff9-\ufffb\u{e0000}-\u{e01ef}]/gu;

function visible(text) {
  return String(text).replace(ACTING, (character) => `⟨U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, visible(value));
  }
  const given = children.flat().filter((child) => child !== null && child !== undefined && child !== "");
  node.append(...given.map((child) => (child instanceof Node ? child : visible(child))));
  return node;
}

function vector(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// A name of slashes and underscores, which may go on in the next line behind one of them.
function breakable(name) {
  return String(name)
    .split(/(?<=[/_])/)
    .flatMap((part, i) => (i ? [element("wbr"), part] : [part]));
}

function button(text, action, attributes = {}) {
  return element("button", { type: "button", class: "quiet", on: { click: action }, ...attributes }, text);
}

function select(label, options, action) {
  const choices = options.map(([value, text]) => element("option", { value }, text));
  return element("select", { "aria-label": label, on: { input: action } }, ...choices);
}

function significant(value, digits) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) {
    const text = value.toExponential(Math.max(digits - 2, 0));
    return minus(text.replace(/\.0+e/, "e").replace("e+", "e"));
  }
  return minus(Number(value.toPrecision(digits)).toLocaleString("en", { maximumFractionDigits: 6 }));
}

function minus(text) {
  return text.replace(/^-/, "−");
}

function signed(value, digits) {
  return `${value > 0 ? "+" : ""}${significant(value, digits)}`;
}

function decimal(value, places) {
  return minus(value.toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places }));
}

function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${significant(value, 3)} ${units[unit]}`;
}

// 0.42 s, 12.3 s, 4:12 or 2:03:10.
function duration(seconds) {
  if (seconds < 60) return `${significant(seconds, 3)} s`;
  const whole = Math.round(seconds);
  const two = (number) => String(number).padStart(2, "0");
  const minutes = Math.floor(whole / 60);
  return minutes < 60 ? `${minutes}:${two(whole % 60)}` : `${Math.floor(minutes / 60)}:${two(minutes % 60)}:${two(whole % 60)}`;
}

const FORMATS = {
  number: (value) => significant(value, 3),
  score: (value) => (Math.abs(value) < 1000 ? decimal(value, 3) : significant(value, 4)),
  count: (value) => (Math.abs(value) < 1e6 ? Math.round(value).toLocaleString("en") : significant(value, 3)),
  share: (value) => {
    const percent = 100 * value;
    return `${decimal(percent, Math.abs(percent) < 1 && percent !== 0 ? 2 : 1)} %`;
  },
  seconds: (value) => (value !== 0 && Math.abs(value) < 1e-3 ? `${significant(1000 * value, 2)} ms` : `${significant(value, 3)} s`),
  bytes,
};

// A mark on an axis, with as many digits as tell it from the next one.
function axisLabel(mark, step, format) {
  if (format === "bytes") return bytes(mark);
  if (format === "share") return `${axisLabel(100 * mark, 100 * step, "number")} %`;
  if (format === "seconds") return `${axisLabel(mark, step, "number")} s`;
  const large = [[1e9, 1e9, "G"], [1e6, 1e6, "M"], [1e4, 1e3, "k"]].find(([least]) => Math.abs(mark) >= least);
  if (large) return `${axisLabel(mark / large[1], step / large[1], "number")}${large[2]}`;
  if (mark === 0 || step < 1e-4) return significant(mark, 3);
  const places = Math.max(0, -Math.floor(Math.log10(step) + 1e-9) + (/^2\.5/.test(step.toExponential()) ? 1 : 0));
  return decimal(mark, places);
}

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const marks = [];
  for (let i = first; i * step <= high + step * 1e-9; i += 1) marks.push(Number((i * step).toPrecision(12)));
  return marks;
}

function nearest(sorted, value) {
  let low = 0;
  let high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle;
    else high = middle;
  }
  return Math.abs(sorted[low] - value) <= Math.abs(sorted[high] - value) ? low : high;
}
