// Who did what when: a lane for each actor, drawn on a canvas, over a window of the run's time.

const LANE = 30;
const AXIS = 22;
const MOST_ROWS = 4; // spans of one actor that lie over each other and are told apart
const OVERVIEW = 30;
const RESUMED = "resumed";

// Phases in the colours of what they are for; any other gets one of the rest.
const PHASES = {
  generate: "c0",
  step: "c2",
  learn: "c2",
  "cold start": "c2",
  sync: "c1",
  score: "c3",
  evaluate: "c5",
  canary: "c5",
  checkpoint: "c4",
  save: "c4",
  rollout: "waiting",
  sleep: "waiting",
  wake: "c1",
  load: "soft",
  start: "soft",
};

// Actors in the order in which a step meets them, engines by their number.
function actorOrder(a, b) {
  const rank = (name) => ["driver", "engine", "rewards", "learner"].findIndex((start) => name.startsWith(start));
  return (rank(a) + 1 || 9) - (rank(b) + 1 || 9) || a.localeCompare(b, "en", { numeric: true });
}

// The spans of a run, by actor, each with the row it is drawn in.
class Spans {
  constructor() {
    this.all = [];
    this.actors = [];
    this.resumed = []; // milliseconds
    this.end = 0;
  }

  add({ actor, phase, detail, begin, length, step, names }) {
    for (let i = 0; i < actor.length; i += 1) {
      this.all.push({ actor: names[actor[i]], phase: names[phase[i]], detail: names[detail[i]], begin: begin[i], end: begin[i] + length[i], step: step[i] });
    }
    this.arrange();
  }

  arrange() {
    const byActor = new Map();
    for (const span of this.all) {
      if (!byActor.has(span.actor)) byActor.set(span.actor, []);
      byActor.get(span.actor).push(span);
      this.end = Math.max(this.end, span.end);
    }
    this.actors = [...byActor.entries()].sort(([a], [b]) => actorOrder(a, b)).map(([name, spans]) => this.lane(name, spans));
    this.resumed = this.findResumed();
  }

  // Where the run went on after it had ended or failed: the last thing seen in front of each start but the first.
  findResumed() {
    const starts = this.all.filter((span) => span.actor === "driver" && span.phase === "start");
    const before = starts.map(({ begin }) => this.all.reduce((last, { end }) => (end <= begin ? Math.max(last, end) : last), -1));
    return before.filter((end) => end >= 0);
  }

  lane(name, spans) {
    spans.sort((a, b) => a.begin - b.begin || b.end - a.end);
    const free = []; // when each row is free again
    for (const span of spans) {
      let row = free.findIndex((end) => end <= span.begin + 1); // times are whole milliseconds
      if (row < 0) row = Math.min(free.length, MOST_ROWS - 1);
      free[row] = Math.max(free[row] ?? 0, span.end);
      span.row = row;
    }
    return { name, spans, rows: Math.max(free.length, 1) };
  }

  get phases() {
    return [...new Set(this.all.map((span) => span.phase))];
  }
}

// For each phase of an actor the share of the window it covers, and what none covers; spans that overlap count once.
function sharesOf({ spans }, from, to) {
  const shares = new Map();
  let covered = 0;
  let until = from;
  for (const span of spans) {
    const begin = Math.max(span.begin, until);
    const end = Math.min(span.end, to);
    if (end <= begin) continue;
    shares.set(span.phase, (shares.get(span.phase) ?? 0) + end - begin);
    covered += end - begin;
    until = end;
  }
  return { shares, idle: Math.max(to - from - covered, 0) };
}

class TimelineView {
  constructor() {
    this.spans = new Spans();
    this.canvas = element("canvas", { tabindex: 0, role: "img", "aria-label": "Timeline: drag or use the arrow keys to move, plus and minus to zoom" });
    this.overview = element("canvas", { class: "overview", "aria-hidden": "true" });
    this.shares = element("div", { class: "shares" });
    this.legend = element("div", { class: "legend" });
    this.table = element("div", { class: "wide" });
    this.tip = element("div", { class: "tip", role: "status", hidden: true });
    this.range = element("span", { class: "range" });
    const controls = element("div", { class: "controls" }, this.range, button("−", () => this.zoom(2), { "aria-label": "Zoom out" }), button("+", () => this.zoom(0.5), { "aria-label": "Zoom in" }), button("Whole run", () => this.look(0, this.spans.end)), button("Latest steps", () => this.lookAtLatest()));
    const field = element("div", { class: "field" }, this.canvas, this.overview);
    this.node = element("div", { class: "timeline" }, element("div", { class: "timeline-head" }, this.legend, controls), element("div", { class: "lanes" }, this.shares, field), this.table);
    document.body.append(this.tip);
    this.listen();
  }

  add(columns) {
    const whole = this.to === undefined || (this.from === 0 && this.to >= this.spans.end);
    const following = this.to >= this.spans.end;
    const before = this.spans.end;
    this.spans.add(columns);
    if (this.to === undefined) this.lookAtLatest();
    else if (whole) this.look(0, this.spans.end);
    else if (following) this.look(this.from + this.spans.end - before, this.spans.end);
    this.draw();
  }

  // All of a short run; the last steps of a long one, wide enough to see phases in.
  lookAtLatest() {
    const begins = this.spans.all.filter((span) => span.step !== null && span.actor === "driver").map((span) => span.begin).sort((a, b) => a - b);
    const shown = Math.max(Math.round(window.innerWidth / 120), 3);
    this.look(begins.length > shown ? begins.at(-shown) : 0, this.spans.end);
  }

  look(from, to) {
    const least = 20; // milliseconds
    const size = Math.min(Math.max(to - from, least), Math.max(this.spans.end, least));
    this.from = Math.min(Math.max(from, 0), Math.max(this.spans.end - size, 0));
    this.to = this.from + size;
    this.soon();
  }

  zoom(factor, at = (this.from + this.to) / 2) {
    this.look(at - (at - this.from) * factor, at + (this.to - at) * factor);
  }

  soon() {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.draw());
  }

  listen() {
    new ResizeObserver(() => this.soon()).observe(this.canvas.parentElement ?? this.node);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.soon());
    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.drag = { x: event.offsetX, from: this.from, to: this.to };
    });
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", () => (this.drag = null));
    canvas.addEventListener("pointerleave", () => (this.tip.hidden = true));
    canvas.addEventListener("dblclick", (event) => this.zoom(0.4, this.timeAt(event.offsetX)));
    const wheel = (event) => {
      if (!event.ctrlKey && !event.metaKey && !event.shiftKey) return; // the page scrolls
      event.preventDefault();
      if (event.shiftKey) this.look(this.from + (event.deltaY + event.deltaX) * this.perPixel(), this.to + (event.deltaY + event.deltaX) * this.perPixel());
      else this.zoom(1.2 ** Math.sign(event.deltaY), this.timeAt(event.offsetX));
    };
    canvas.addEventListener("wheel", wheel, { passive: false });
    canvas.addEventListener("keydown", (event) => this.key(event));
    const jump = (event) => {
      if (event.type === "pointermove" && !event.buttons) return;
      const at = (event.offsetX / this.overview.clientWidth) * this.spans.end;
      this.look(at - (this.to - this.from) / 2, at + (this.to - this.from) / 2);
    };
    this.overview.addEventListener("pointerdown", jump);
    this.overview.addEventListener("pointermove", jump);
  }

  key(event) {
    const size = this.to - this.from;
    const act = {
      ArrowLeft: () => this.look(this.from - size / 8, this.to - size / 8),
      ArrowRight: () => this.look(this.from + size / 8, this.to + size / 8),
      "+": () => this.zoom(0.5),
      "=": () => this.zoom(0.5),
      "-": () => this.zoom(2),
      0: () => this.look(0, this.spans.end),
    }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }

  move(event) {
    if (this.drag) {
      const moved = (this.drag.x - event.offsetX) * this.perPixel();
      this.look(this.drag.from + moved, this.drag.to + moved);
      return;
    }
    const span = this.spanAt(event.offsetX, event.offsetY);
    this.tip.hidden = !span;
    if (!span) return;
    const facts = [
      ["begins", duration(span.begin / 1000)],
      ["takes", duration((span.end - span.begin) / 1000)],
    ];
    if (span.step !== null) facts.unshift(["step", FORMATS.count(span.step)]);
    const rows = facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
    this.tip.replaceChildren(element("b", {}, `${span.actor}: ${span.phase}`), span.detail ? element("p", {}, span.detail) : "", element("dl", {}, ...rows));
    placeNear(this.tip, new DOMRect(event.clientX + 8, event.clientY - 8, 0, 16));
  }

  perPixel() {
    return (this.to - this.from) / this.canvas.clientWidth;
  }

  timeAt(x) {
    return this.from + x * this.perPixel();
  }

  spanAt(x, y) {
    const lane = this.spans.actors[Math.floor((y - AXIS) / LANE)];
    if (!lane || y < AXIS) return null;
    const time = this.timeAt(x);
    const slack = 2 * this.perPixel();
    const row = Math.floor((((y - AXIS) % LANE) - 3) / ((LANE - 6) / lane.rows));
    const near = lane.spans.filter((span) => span.begin - slack <= time && time <= span.end + slack);
    return near.find((span) => span.row === row) ?? near[0] ?? null;
  }

  draw() {
    const width = this.canvas.clientWidth;
    if (!width || this.to === undefined) return;
    const paint = colours(this.node);
    const height = AXIS + LANE * this.spans.actors.length;
    const context = fitted(this.canvas, width, height);
    this.drawAxis(context, width, height, paint);
    this.spans.actors.forEach((lane, i) => this.drawLane(context, lane, AXIS + i * LANE, width, paint));
    this.drawResumed(context, width, height, paint);
    this.drawOverview(width, paint);
    this.describe();
  }

  drawAxis(context, width, height, paint) {
    context.font = `11px ${paint.font}`;
    context.textBaseline = "middle";
    context.fillStyle = paint.faint;
    context.strokeStyle = paint.line;
    const gap = (this.to - this.from) / 1000 / (width / 110);
    for (const mark of ticks(this.from / 1000, this.to / 1000, Math.max((this.to - this.from) / 1000 / gap, 1))) {
      const x = Math.round((mark * 1000 - this.from) / this.perPixel()) + 0.5;
      context.beginPath();
      context.moveTo(x, AXIS - 4);
      context.lineTo(x, height);
      context.stroke();
      context.fillText(duration(mark), Math.min(x + 3, width - 44), AXIS / 2 - 2);
    }
  }

  // A line through all lanes, with a word in the place of the axis' labels.
  drawResumed(context, width, height, paint) {
    const size = context.measureText(RESUMED).width;
    for (const time of this.spans.resumed.filter((one) => one >= this.from && one <= this.to)) {
      const x = Math.round((time - this.from) / this.perPixel());
      const left = Math.min(x, width - size - 8);
      context.fillStyle = paint.card;
      context.fillRect(left, 0, size + 8, AXIS - 4);
      context.fillStyle = paint.bad;
      context.fillRect(x, 0, 1, height);
      context.fillText(RESUMED, left + 4, AXIS / 2 - 2);
    }
  }

  drawLane(context, { spans, rows }, top, width, paint) {
    const scale = this.perPixel();
    const height = (LANE - 6) / rows;
    context.fillStyle = paint.sunken;
    context.fillRect(0, top + 3, width, LANE - 6);
    const painted = new Float64Array(rows).fill(-1); // the last pixel painted, as nobody sees more spans than pixels
    for (const span of spans) {
      if (span.end < this.from || span.begin > this.to) continue;
      const x = Math.max((span.begin - this.from) / scale, 0);
      const end = Math.min((span.end - this.from) / scale, width);
      if (end <= painted[span.row] + 0.3) continue;
      painted[span.row] = end;
      const y = top + 3 + span.row * height;
      context.fillStyle = paint.phase(span.phase);
      context.fillRect(x, y, Math.max(end - x - (end - x > 3 ? 0.7 : 0), 0.7), height - (rows > 1 ? 0.5 : 0));
      if (rows === 1 && end - x > 46) this.label(context, span, x, end, top, paint);
    }
  }

  label(context, span, x, end, top, paint) {
    context.fillStyle = PHASES[span.phase] === "waiting" ? paint.soft : paint.card;
    const text = span.step === null || end - x < 90 ? span.phase : `${span.phase} ${span.step}`;
    if (context.measureText(text).width < end - x - 8) context.fillText(text, x + 5, top + LANE / 2 + 0.5);
  }

  // The whole run in one strip, each actor a line of it, with the window marked.
  drawOverview(width, paint) {
    const context = fitted(this.overview, width, OVERVIEW);
    const scale = width / Math.max(this.spans.end, 1);
    const height = OVERVIEW / Math.max(this.spans.actors.length, 1);
    this.spans.actors.forEach(({ spans }, i) => {
      let painted = -1;
      for (const span of spans) {
        const x = span.begin * scale;
        const end = Math.max(span.end * scale, x + 0.7);
        if (end < painted + 0.5) continue;
        painted = end;
        context.fillStyle = paint.phase(span.phase);
        context.fillRect(x, i * height, end - x, Math.max(height - 0.5, 0.5));
      }
    });
    context.fillStyle = paint.bad;
    for (const time of this.spans.resumed) context.fillRect(Math.round(time * scale), 0, 1, OVERVIEW);
    context.fillStyle = paint.veil;
    context.fillRect(0, 0, this.from * scale, OVERVIEW);
    context.fillRect(this.to * scale, 0, width, OVERVIEW);
    context.strokeStyle = paint.ink;
    context.strokeRect(this.from * scale + 0.5, 0.5, Math.max((this.to - this.from) * scale - 1, 1), OVERVIEW - 1);
  }

  // How each actor spent the window.
  describe() {
    this.range.textContent = `${duration(this.from / 1000)} to ${duration(this.to / 1000)}`;
    const spent = this.spans.actors.map((lane) => ({ name: lane.name, ...sharesOf(lane, this.from, this.to) }));
    const rows = spent.map(({ name, shares }) => {
      const busy = [...shares].filter(([phase]) => PHASES[phase] !== "waiting").reduce((sum, [, time]) => sum + time, 0);
      return element("div", { class: "share" }, element("span", { class: "actor" }, name), element("b", {}, busy || !shares.size ? `${Math.round((100 * busy) / (this.to - this.from))} %` : "waits"));
    });
    this.shares.replaceChildren(element("div", { class: "share-head" }, element("span", {}, "actor"), element("span", {}, "busy")), ...rows);
    this.table.replaceChildren(this.sharesTable(spent));
    const keys = this.spans.phases.map((phase) => element("span", { class: "key" }, element("i", { class: `swatch ${phaseClass(phase)}` }), phase));
    if (this.spans.resumed.length) keys.push(element("span", { class: "key" }, element("i", { class: "swatch resumed" }), RESUMED));
    this.legend.replaceChildren(...keys);
  }

  // A row for each actor, a column for each phase: the share of the window, and the seconds.
  sharesTable(spent) {
    const phases = this.spans.phases.filter((phase) => spent.some(({ shares }) => shares.has(phase)));
    const size = this.to - this.from;
    const cell = (time, of) => {
      const node = element("td", {}, time ? FORMATS.share(time / size) : "", time ? element("small", {}, duration(time / 1000)) : null);
      node.classList.add(of);
      node.style.setProperty("--share", `${Math.round((100 * time) / size)}%`);
      return node;
    };
    const head = [...phases.map((phase) => element("th", { scope: "col" }, element("i", { class: `swatch ${phaseClass(phase)}` }), phase)), element("th", { scope: "col" }, "nothing")];
    const rows = spent.map(({ name, shares, idle }) => element("tr", {}, element("th", { scope: "row" }, name), ...phases.map((phase) => cell(shares.get(phase) ?? 0, phaseClass(phase))), cell(idle, "idle")));
    return element("table", { class: "spent" }, element("caption", {}, "How the time in sight was spent"), element("thead", {}, element("tr", {}, element("th", {}), ...head)), element("tbody", {}, ...rows));
  }
}

function phaseClass(phase) {
  if (PHASES[phase]) return PHASES[phase];
  const sum = [...phase].reduce((total, character) => total + character.codePointAt(0), 0);
  return `c${sum % COLOURS}`;
}

// The colours of the page's theme, as a canvas needs them.
function colours(node) {
  const style = getComputedStyle(node);
  const of = (name) => style.getPropertyValue(name).trim();
  const palette = { waiting: of("--waiting"), soft: of("--faint") };
  for (let i = 0; i < COLOURS; i += 1) palette[`c${i}`] = of(`--c${i}`);
  const named = Object.fromEntries(["ink", "soft", "faint", "line", "card", "sunken", "veil", "bad"].map((name) => [name, of(`--${name}`)]));
  return { ...named, font: style.fontFamily, phase: (phase) => palette[phaseClass(phase)] };
}

// A context over width x height CSS pixels, sharp on any screen.
function fitted(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return context;
}
