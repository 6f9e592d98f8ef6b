// Line and stacked-area charts that share a cursor over the steps.

const MARGIN = { top: 10, right: 12, bottom: 22, left: 50 };
const HEIGHT = 168;
const SMOOTHING = 0.85; // of the moving average drawn over noisy curves

// The steps of one table, and the one every chart points at. Pinned means that it stays when the pointer leaves.
class Cursor {
  constructor(steps) {
    this.steps = steps;
    this.index = steps.length - 1;
    this.active = false;
    this.pinned = false;
    this.listeners = [];
  }

  move(index, { pin = false } = {}) {
    this.index = Math.min(Math.max(index, 0), this.steps.length - 1);
    this.active = true;
    if (pin) this.pinned = true;
    this.notify();
  }

  leave() {
    if (this.pinned) return;
    this.release();
  }

  release() {
    this.pinned = this.active = false;
    this.index = this.steps.length - 1;
    this.notify();
  }

  notify() {
    for (const listener of this.listeners) listener(this);
  }
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

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const marks = [];
  for (let i = first; i * step <= high + step * 1e-9; i += 1) marks.push(Number((i * step).toPrecision(12)));
  return marks;
}

// A curve written on few of the steps (evaluation) is joined across the others; in any other a gap is a missing number.
function isSparse(values) {
  return values.filter((value) => value !== null).length <= values.length / 2;
}

function movingAverage(values) {
  let average = null;
  let weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    average = SMOOTHING * (average ?? 0) + (1 - SMOOTHING) * value;
    weight = SMOOTHING * weight + (1 - SMOOTHING);
    return average / weight;
  });
}

function linePath(values, x, y, joined) {
  let path = "";
  let pen = false;
  values.forEach((value, i) => {
    if (value === null) {
      if (!joined) pen = false;
      return;
    }
    path += `${pen ? "L" : "M"}${x(i).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = true;
  });
  return path;
}

class Chart {
  // figure: {title, about, format, zero, smooth, stack, series: [{label, values, colour}], outline: series or null}
  constructor(figure, cursor) {
    this.figure = figure;
    this.cursor = cursor;
    this.curves = figure.outline ? [...figure.series, figure.outline] : figure.series;
    this.format = FORMATS[figure.format];
    this.svg = vector("svg", { height: HEIGHT, "aria-hidden": "true" });
    this.values = this.curves.map(() => element("b"));
    const keys = this.curves.map((curve, i) => {
      const swatch = element("i", { class: `swatch ${curve === figure.outline ? "outline" : curve.colour}` });
      return element("span", { class: "key" }, swatch, `${curve.label} `, this.values[i]);
    });
    if (this.curves.length === 1) keys[0].replaceChildren(this.values[0]);
    const head = element("div", { class: "chart-head" }, element("h4", {}, figure.title));
    if (this.curves.length === 1) head.append(keys[0]);
    const legend = this.curves.length > 1 ? element("div", { class: "legend" }, ...keys) : null;
    this.caption = element("figcaption", {}, head, element("p", {}, figure.about), legend);
    this.node = element("figure", { class: "chart" }, this.caption, this.svg);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerdown", (event) => this.point(event, true));
    this.svg.addEventListener("pointerleave", () => cursor.leave());
    cursor.listeners.push(() => this.follow());
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  point(event, pin = false) {
    if (!this.x) return;
    const box = this.svg.getBoundingClientRect();
    const share = (event.clientX - box.left - MARGIN.left) / (this.width - MARGIN.left - MARGIN.right);
    const steps = this.cursor.steps;
    const index = nearest(steps, steps[0] + share * (steps.at(-1) - steps[0]));
    if (pin && this.cursor.pinned && index === this.cursor.index) this.cursor.release();
    else if (pin || !this.cursor.pinned) this.cursor.move(index, { pin });
  }

  extent() {
    const { series, stack, outline, zero } = this.figure;
    let values = series.flatMap((curve) => curve.values);
    if (stack) values = this.cursor.steps.map((_, i) => series.reduce((sum, curve) => sum + (curve.values[i] ?? 0), 0));
    if (outline) values = values.concat(outline.values);
    values = values.filter((value) => value !== null);
    let low = Math.min(...values);
    let high = Math.max(...values);
    if (zero || stack) {
      low = Math.min(low, 0);
      high = Math.max(high, 0);
    }
    if (this.figure.format === "share" && high > 0.7 && high <= 1) high = 1;
    if (low === 0 && high === 0) return [0, 1];
    if (high - low < 1e-12) {
      high += Math.abs(high) * 0.1 || 1;
      if (!(zero || stack)) low -= Math.abs(low) * 0.1 || 1;
    }
    return [low, high];
  }

  draw() {
    const width = Math.round(this.svg.getBoundingClientRect().width);
    if (!width || width === this.width) return;
    this.width = width;
    const steps = this.cursor.steps;
    const [low, high] = this.extent();
    const across = width - MARGIN.left - MARGIN.right;
    const down = HEIGHT - MARGIN.top - MARGIN.bottom;
    const range = steps.at(-1) - steps[0] || 1;
    const place = (step) => MARGIN.left + ((step - steps[0]) / range) * across;
    this.x = (i) => place(steps[i]);
    this.y = (value) => MARGIN.top + (1 - (value - low) / (high - low)) * down;
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.axes(low, high, place, width);
    if (this.figure.stack) this.areas();
    else this.lines(this.figure.series);
    if (this.figure.outline) this.lines([this.figure.outline], "outline");
    this.rule = vector("line", { class: "rule", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom });
    this.dots = this.curves.map((curve) => vector("circle", { class: `dot ${curve.colour}`, r: 3.2 }));
    this.svg.append(this.rule, ...this.dots);
    this.follow();
  }

  axes(low, high, place, width) {
    const levels = ticks(low, high, 4);
    const gap = Number(((levels[1] ?? high) - levels[0]).toPrecision(6));
    for (const mark of levels) {
      const y = this.y(mark);
      const text = axisLabel(mark, gap, this.figure.format);
      const label = vector("text", { class: "tick", x: MARGIN.left - 8, y: y + 3.5, "text-anchor": "end" }, text);
      const line = { class: mark === 0 ? "grid zero" : "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y };
      this.svg.append(vector("line", line), label);
    }
    const steps = this.cursor.steps;
    if (steps.length === 1) {
      this.svg.append(vector("text", { class: "tick", x: place(steps[0]), y: HEIGHT - 6 }, `step ${steps[0]}`));
      return;
    }
    const marks = ticks(steps[0], steps.at(-1), width > 420 ? 6 : 4).filter(Number.isInteger);
    marks.forEach((mark, i) => {
      const label = `${i === 0 ? "step " : ""}${mark.toLocaleString("en")}`;
      const anchor = place(mark) > width - MARGIN.right - 10 ? "end" : i === 0 ? "start" : "middle";
      const x = place(mark) - (i === 0 ? 3 : 0);
      this.svg.append(vector("text", { class: "tick", x, y: HEIGHT - 6, "text-anchor": anchor }, label));
    });
  }

  lines(curves, extra = "") {
    for (const { values, colour } of curves) {
      const sparse = isSparse(values);
      const points = values.filter((value) => value !== null).length;
      const smooth = this.figure.smooth && !sparse && points >= 20;
      const raw = vector("path", { class: `line ${colour} ${extra} ${smooth ? "raw" : ""}` });
      raw.setAttribute("d", linePath(values, this.x, this.y, sparse));
      this.svg.append(raw);
      if (smooth) {
        const path = vector("path", { class: `line ${colour}` });
        path.setAttribute("d", linePath(movingAverage(values), this.x, this.y, false));
        this.svg.append(path);
      }
      if (points > 30) continue;
      values.forEach((value, i) => {
        if (value === null) return;
        this.svg.append(vector("circle", { class: `mark ${colour} ${smooth ? "raw" : ""}`, cx: this.x(i), cy: this.y(value), r: 2.2 }));
      });
    }
  }

  areas() {
    const { series } = this.figure;
    const rows = this.cursor.steps.map((_, i) => i).filter((i) => series.some((curve) => curve.values[i] !== null));
    const base = rows.map(() => 0);
    const edge = () => rows.map((row, i) => `${this.x(row).toFixed(1)} ${this.y(base[i]).toFixed(1)}`);
    for (const { values, colour } of series) {
      const lower = edge().reverse();
      rows.forEach((row, i) => (base[i] += values[row] ?? 0));
      this.svg.append(vector("path", { class: `area ${colour}`, d: `M${edge().join("L")}L${lower.join("L")}Z` }));
    }
  }

  // Values under the cursor; a sparse curve shows its last value at or before it.
  follow() {
    const { index, active } = this.cursor;
    this.curves.forEach((curve, i) => {
      let at = index;
      if (!active || isSparse(curve.values)) while (at > 0 && curve.values[at] === null) at -= 1;
      const value = curve.values[at];
      this.values[i].textContent = value === null ? "–" : this.format(value);
      if (!this.dots) return;
      const onLine = !this.figure.stack || curve === this.figure.outline;
      this.dots[i].setAttribute("visibility", active && onLine && value !== null ? "visible" : "hidden");
      if (value === null) return;
      this.dots[i].setAttribute("cx", this.x(at));
      this.dots[i].setAttribute("cy", this.y(value));
    });
    if (!this.rule) return;
    this.rule.setAttribute("visibility", active ? "visible" : "hidden");
    this.rule.setAttribute("x1", this.x(index));
    this.rule.setAttribute("x2", this.x(index));
  }
}
