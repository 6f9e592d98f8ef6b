// Elements and numbers. Text only ever enters the page as a text node, so nothing a model wrote can become markup.

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function vector(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
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

const FORMATS = {
  number: (value) => significant(value, 3),
  score: (value) => (Math.abs(value) < 1000 ? decimal(value, 3) : significant(value, 4)),
  count: (value) => (Math.abs(value) < 1e6 ? Math.round(value).toLocaleString("en") : significant(value, 3)),
  share: (value) => {
    const percent = 100 * value;
    return `${decimal(percent, Math.abs(percent) < 1 && percent !== 0 ? 2 : 1)} %`;
  },
  seconds: (value) => `${significant(value, 3)} s`,
  bytes,
};

// A mark on an axis, with as many digits as tell it from the next one.
function axisLabel(mark, step, format) {
  if (format === "bytes") return bytes(mark);
  if (format === "share") return `${axisLabel(100 * mark, 100 * step, "number")} %`;
  if (format === "seconds") return `${axisLabel(mark, step, "number")} s`;
  if (Math.abs(mark) >= 1e4) return `${significant(mark / 1e3, 3)}k`;
  if (mark === 0 || step < 1e-4) return significant(mark, 3);
  const places = Math.max(0, -Math.floor(Math.log10(step) + 1e-9) + (/^2\.5/.test(step.toExponential()) ? 1 : 0));
  return decimal(mark, places);
}
