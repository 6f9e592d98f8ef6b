// Line and stacked-area charts that share a cursor over the steps.

const MARGIN = { top: 8, right: 10, bottom: 20, left: 46 };
const HEIGHT = 150;
const DIGIT = 6.4; // width of one in a label
const SMOOTHING = 0.04; // of a noisy curve, that each point of its smoothed one reaches to either side

// Values are numbers, null where one is missing, and undefined at steps that a run does not have (of several runs).
const known = (value) => value !== null && value !== undefined;

// A curve written on few of its steps (evaluation) is joined across the others; in any other a gap is a missing number.
function isSparse(values) {
  let numbers = 0;
  let gaps = 0;
  for (const value of values) {
    if (value === null) gaps += 1;
    else if (value !== undefined) numbers += 1;
  }
  return numbers <= gaps;
}

// The mean over the neighbours of each point, nearer ones weighing more; it does not lag behind the curve.
function smoothed(values) {
  const points = [];
  values.forEach((value, i) => known(value) && points.push(i));
  const reach = Math.max(Math.round(points.length * SMOOTHING), 2);
  const result = values.slice();
  points.forEach((place, n) => {
    let sum = 0;
    let weights = 0;
    for (let k = Math.max(n - reach, 0); k <= Math.min(n + reach, points.length - 1); k += 1) {
      const weight = reach + 1 - Math.abs(k - n);
      sum += weight * values[points[k]];
      weights += weight;
    }
    result[place] = sum / weights;
  });
  return result;
}

function linePath(values, x, y, joined) {
  let path = "";
  let pen = false;
  values.forEach((value, i) => {
    if (!known(value)) {
      if (value === null && !joined) pen = false;
      return;
    }
    const to = `${x(i).toFixed(1)} ${y(value).toFixed(1)}`;
    path += pen ? `L${to}` : `M${to}h0`; // of a number between two gaps this leaves a dot
    pen = true;
  });
  return path;
}

class Chart {
  // figure: {title, about, format, zero, smooth, stack, labelled, series: [{label, values, colour}], outline: series or
  // null}; a curve that is alone is named only where the figure is ``labelled``.
  constructor(figure, cursor) {
    this.cursor = cursor;
    this.take(figure);
    this.svg = vector("svg", { height: HEIGHT, "aria-hidden": "true" });
    this.values = this.curves.map(() => element("b"));
    const keys = this.curves.map((curve, i) => {
      const swatch = element("i", { class: `swatch ${curve === figure.outline ? "outline" : curve.colour}` });
      return element("span", { class: "key" }, swatch, `${curve.label} `, this.values[i]);
    });
    const isAlone = this.curves.length === 1 && !figure.labelled;
    if (isAlone) keys[0].replaceChildren(this.values[0]);
    const head = element("div", { class: "chart-head" }, element("h4", {}, ...breakable(figure.title)));
    if (isAlone) head.append(keys[0]);
    const legend = !isAlone ? element("div", { class: "legend" }, ...keys) : null;
    this.caption = element("figcaption", {}, head, element("p", {}, figure.about), legend);
    this.node = element("figure", { class: "chart" }, this.caption, this.svg);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerdown", (event) => this.point(event, true));
    this.svg.addEventListener("pointerleave", () => cursor.leave());
    this.searchable = [figure.title, ...figure.names, ...this.curves.map((curve) => curve.label)].join(" ").toLowerCase();
    cursor.listeners.push(Object.assign(() => this.follow(), { ofChart: true }));
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  take(figure) {
    this.figure = figure;
    this.curves = figure.outline ? [...figure.series, figure.outline] : figure.series;
    this.format = FORMATS[figure.format];
  }

  // The same figure with other numbers.
  update(figure) {
    this.take(figure);
    this.draw({ anyway: true });
  }

  point(event, pin = false) {
    if (!this.x) return;
    const box = this.svg.getBoundingClientRect();
    const share = (event.clientX - box.left - this.left) / (this.width - this.left - MARGIN.right);
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
    values = values.filter(known);
    let low = values.reduce((least, value) => Math.min(least, value), Infinity);
    let high = values.reduce((most, value) => Math.max(most, value), -Infinity);
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

  draw({ anyway = false } = {}) {
    const width = Math.round(this.svg.getBoundingClientRect().width);
    if (!width || (width === this.width && !anyway)) return;
    this.width = width;
    const steps = this.cursor.steps;
    const [low, high] = this.extent();
    const levels = this.levels(low, high);
    this.left = Math.max(MARGIN.left, 12 + DIGIT * Math.max(...levels.map(({ text }) => text.length)));
    const across = width - this.left - MARGIN.right;
    const down = HEIGHT - MARGIN.top - MARGIN.bottom;
    const range = steps.at(-1) - steps[0] || 1;
    const place = (step) => this.left + ((step - steps[0]) / range) * across;
    this.x = (i) => place(steps[i]);
    this.y = (value) => MARGIN.top + (1 - (value - low) / (high - low)) * down;
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.axes(levels, place, width);
    for (const { metric, from, to } of this.cursor.alarms) {
      if (!this.figure.names.includes(metric)) continue;
      const begin = place(Math.max(from, steps[0]));
      const end = Math.max(place(Math.min(to ?? steps.at(-1), steps.at(-1))), begin + 3);
      this.svg.append(vector("rect", { class: "alarm-mark", x: begin, y: HEIGHT - MARGIN.bottom - 3, width: end - begin, height: 3 }));
    }
    if (this.figure.stack) this.areas();
    else this.lines(this.figure.series);
    if (this.figure.outline) this.lines([this.figure.outline], "outline");
    this.rule = vector("line", { class: "rule", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom });
    this.dots = this.curves.map((curve) => vector("circle", { class: `dot ${curve.colour}`, r: 3.2 }));
    this.svg.append(this.rule, ...this.dots);
    this.follow();
  }

  // Marks of the vertical axis, with their labels.
  levels(low, high) {
    const marks = ticks(low, high, 4);
    const gap = Number(((marks[1] ?? high) - marks[0]).toPrecision(6));
    return marks.map((mark) => ({ mark, text: axisLabel(mark, gap, this.figure.format) }));
  }

  axes(levels, place, width) {
    for (const { mark, text } of levels) {
      const y = this.y(mark);
      const label = vector("text", { class: "tick", x: this.left - 8, y: y + 3.5, "text-anchor": "end" }, text);
      const line = { class: mark === 0 ? "grid zero" : "grid", x1: this.left, x2: width - MARGIN.right, y1: y, y2: y };
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
      const points = values.filter(known).length;
      const smooth = this.figure.smooth && !sparse && points >= 20;
      const raw = vector("path", { class: `line ${colour} ${extra} ${smooth ? "raw" : ""}` });
      raw.setAttribute("d", linePath(values, this.x, this.y, sparse));
      this.svg.append(raw);
      if (smooth) {
        const path = vector("path", { class: `line ${colour}` });
        path.setAttribute("d", linePath(smoothed(values), this.x, this.y, false));
        this.svg.append(path);
      }
      if (points > 30) continue;
      values.forEach((value, i) => {
        if (!known(value)) return;
        this.svg.append(vector("circle", { class: `mark ${colour} ${smooth ? "raw" : ""}`, cx: this.x(i), cy: this.y(value), r: 2.2 }));
      });
    }
  }

  areas() {
    const { series } = this.figure;
    const rows = this.cursor.steps.map((_, i) => i).filter((i) => series.some((curve) => known(curve.values[i])));
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
      if (!active || isSparse(curve.values)) while (at > 0 && !known(curve.values[at])) at -= 1;
      const value = curve.values[at];
      this.values[i].textContent = known(value) ? this.format(value) : "–";
      if (!this.dots) return;
      const onLine = !this.figure.stack || curve === this.figure.outline;
      this.dots[i].setAttribute("visibility", active && onLine && known(value) ? "visible" : "hidden");
      if (!known(value)) return;
      this.dots[i].setAttribute("cx", this.x(at));
      this.dots[i].setAttribute("cy", this.y(value));
    });
    if (!this.rule) return;
    this.rule.setAttribute("visibility", active ? "visible" : "hidden");
    this.rule.setAttribute("x1", this.x(index));
    this.rule.setAttribute("x2", this.x(index));
  }
}

// All charts of a table, in sections; takes new numbers without being built again as long as its curves are the same.
class CurvesView {
  constructor(cursor) {
    this.cursor = cursor;
    this.node = element("div");
    this.charts = [];
    this.shape = "";
  }

  show(sections) {
    const figures = sections.flatMap((section) => section.figures);
    const shape = JSON.stringify(sections.map(({ title, figures: all }) => [title, all.map((f) => [f.title, f.series.map((one) => one.label), f.outline?.label])]));
    if (shape === this.shape) {
      this.charts.forEach((chart, i) => chart.update(figures[i]));
      return;
    }
    this.shape = shape;
    this.cursor.listeners = this.cursor.listeners.filter((listener) => !listener.ofChart);
    this.charts = figures.map((figure) => new Chart(figure, this.cursor));
    let at = 0;
    this.groups = sections.map(({ title, about, figures: all }) => {
      const charts = this.charts.slice(at, (at += all.length));
      const grid = element("div", { class: "grid-of-charts" }, ...charts.map((chart) => chart.node));
      const what = about ? element("p", { class: "about" }, about) : null;
      return { charts, node: element("section", { class: "group" }, element("h3", {}, title), what, grid) };
    });
    this.node.replaceChildren(...this.groups.map((group) => group.node));
    this.filter(this.words ?? "");
  }

  // Only charts in whose title or labels every word occurs.
  filter(text) {
    this.words = text;
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    for (const { charts, node } of this.groups ?? []) {
      for (const chart of charts) chart.node.hidden = !words.every((word) => chart.searchable.includes(word));
      node.hidden = charts.every((chart) => chart.node.hidden);
    }
  }
}
