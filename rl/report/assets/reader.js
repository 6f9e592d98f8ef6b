// The reader: filters, a list of trajectories, and the one that is open.

const LIST_PAGE = 100;
const SPECIAL = /<\/?think>|<[|｜][^<>]{1,40}[|｜]>/g; // left out of the one-line view of a reply

const ORDERS = {
  latest: { label: "step, latest first", compare: (a, b) => b.step - a.step },
  step: { label: "step, earliest first", compare: (a, b) => a.step - b.step },
  best: { label: "reward, highest first", compare: (a, b) => b.reward - a.reward },
  worst: { label: "reward, lowest first", compare: (a, b) => a.reward - b.reward },
  mismatch: { label: "mismatch, largest first", compare: (a, b) => (b.mismatch ?? 0) - (a.mismatch ?? 0) },
  longest: { label: "length, longest first", compare: (a, b) => b.tokens - a.tokens },
};

function rewardText(trajectory) {
  return trajectory.reward === null ? "–" : significant(trajectory.reward, 3);
}

// A sample of the evaluation before training, which has neither advantage nor log-ratios.
const isEvaluation = (trajectory) => trajectory.flags.includes("evaluation");

function toneOf(trajectory) {
  return trajectory.advantage > 0 ? "up" : trajectory.advantage < 0 ? "down" : "";
}

function distinct(values) {
  return [...new Set(values)].sort((a, b) => (a < b ? -1 : a > b ? 1 : 0));
}

class Reader {
  // runs: names; clips: how far each lets a ratio go from 1, as [below, above], or null.
  constructor(runs, clips) {
    this.runs = runs;
    this.clips = clips;
    this.all = [];
    this.found = [];
    this.texts = new Texts();
    this.tip = new TokenTip();
    this.count = element("span", { class: "count", role: "status" });
    this.list = element("ol", { class: "list", "aria-label": "Trajectories" });
    this.list.addEventListener("keydown", (event) => this.walk(event));
    this.pane = element("article", { class: "pane", "aria-label": "Trajectory" });
    const side = element("div", { class: "side" }, this.count, this.list);
    this.node = element("div", {}, this.buildFilters(), element("div", { class: "reader" }, side, this.pane));
  }

  // Adds summaries; each knows its run and where the whole trajectory is; ``more`` are on
  // their way.
  add(run, source, summaries, { more = false } = {}) {
    for (const summary of summaries) this.all.push(Object.assign(summary, { run, source }));
    this.refreshChoices();
    const shown = this.apply();
    this.isFilled = !more;
    return shown;
  }

  buildFilters() {
    const again = () => this.apply();
    this.search = element("input", { type: "search", placeholder: "Search the text", "aria-label": "Search the text", on: { input: () => this.searchSoon() } });
    this.choices = {
      run: { select: select("run", [], again), of: (t) => [t.run], word: (run) => this.runs[run] },
      step: { select: select("step", [], again), of: (t) => [t.step], word: (step) => `step ${step}` },
      domain: { select: select("domain", [], again), of: (t) => [t.domain] },
      status: { select: select("status", [], again), of: (t) => [t.status] },
      flag: { select: select("flag", [], again), of: (t) => t.flags },
    };
    this.choices.run.select.hidden = this.runs.length < 2;
    const bound = (label) => element("input", { type: "number", step: "any", placeholder: label, "aria-label": `reward ${label}`, on: { input: again } });
    this.least = bound("from");
    this.most = bound("to");
    this.order = select("order", Object.entries(ORDERS).map(([value, { label }]) => [value, label]), again);
    this.colour = select("colour", Object.entries(COLOUR_MODES).map(([value, { label }]) => [value, label]), () => this.open(this.opened));
    const reward = element("span", { class: "bounds" }, "reward", this.least, this.most);
    const colour = element("label", { class: "bounds" }, "colour by", this.colour);
    const clear = button("Clear", () => this.clear());
    const selects = Object.values(this.choices).map((choice) => choice.select);
    return element("form", { class: "filters", on: { submit: (event) => event.preventDefault() } }, this.search, ...selects, reward, this.order, clear, colour);
  }

  refreshChoices() {
    for (const [name, choice] of Object.entries(this.choices)) {
      const chosen = choice.select.value;
      const options = distinct(this.all.flatMap(choice.of)).map((value) => element("option", { value }, choice.word ? choice.word(value) : String(value)));
      choice.select.replaceChildren(element("option", { value: "" }, `any ${name}`), ...options);
      choice.select.value = chosen;
    }
  }

  clear() {
    for (const filter of [this.search, this.least, this.most]) filter.value = "";
    for (const choice of Object.values(this.choices)) choice.select.value = "";
    return this.apply();
  }

  // Shows the trajectories of the recorded step nearest to this one.
  goTo(step) {
    if (!this.all.length) return;
    const steps = distinct(this.all.map((t) => t.step));
    for (const filter of [this.search, this.least, this.most]) filter.value = "";
    for (const choice of Object.values(this.choices)) choice.select.value = "";
    this.choices.step.select.value = String(steps[nearest(steps, step)]);
    this.apply();
  }

  searchSoon() {
    clearTimeout(this.soon);
    this.soon = setTimeout(() => this.apply(), 150);
  }

  chosen() {
    const least = this.least.value === "" ? -Infinity : Number(this.least.value);
    const most = this.most.value === "" ? Infinity : Number(this.most.value);
    const bounded = least > -Infinity || most < Infinity;
    const choices = Object.values(this.choices).filter((choice) => choice.select.value !== "");
    return this.all
      .filter((t) => choices.every((choice) => choice.of(t).some((value) => String(value) === choice.select.value)))
      .filter((t) => !bounded || (t.reward !== null && t.reward >= least && t.reward <= most));
  }

  async apply() {
    const turn = (this.applied = {});
    const still = () => this.applied === turn;
    const words = wordsOf(this.search.value);
    let found = this.chosen();
    if (words.length) {
      const tell = (share) => (this.count.textContent = `Searching, ${Math.round(100 * share)} % read`);
      try {
        if (!(await this.texts.read(found, tell, still))) return;
      } catch (error) {
        this.count.textContent = `The text cannot be searched: ${visible(error.message)}`;
        return;
      }
      found = found.filter((t) => this.texts.has(t, words));
    }
    this.show(found.sort(ORDERS[this.order.value].compare));
  }

  show(found) {
    this.found = found;
    this.count.textContent = `${FORMATS.count(found.length)} of ${FORMATS.count(this.all.length)} trajectories`;
    const least = Math.max(this.shown && found.includes(this.opened) ? found.indexOf(this.opened) + 1 : 0, LIST_PAGE);
    this.shown = 0;
    this.list.replaceChildren();
    this.extend(least);
    this.open(found.includes(this.opened) && this.stays(this.opened) ? this.opened : found[0]);
  }

  // What nobody asked for gives way while older steps still come in, and an evaluation to the first of training.
  stays(t) {
    return this.isAsked || (this.isFilled && !isEvaluation(t));
  }

  extend(count = LIST_PAGE) {
    this.more?.remove();
    const next = this.found.slice(this.shown, this.shown + count);
    this.list.append(...next.map((summary) => this.item(summary)));
    this.shown += next.length;
    if (this.shown >= this.found.length) return;
    const text = `Show ${Math.min(LIST_PAGE, this.found.length - this.shown)} more`;
    this.more = element("li", {}, button(text, () => this.extend()));
    this.list.append(this.more);
  }

  item(t) {
    const place = this.runs.length > 1 ? element("i", { class: `swatch c${t.run % COLOURS}`, title: this.runs[t.run] }) : null;
    const head = element("span", { class: "item-head" }, place, element("span", { class: `reward ${toneOf(t)}` }, rewardText(t)), element("span", { class: "item-id" }, t.id), element("span", { class: "item-step" }, `step ${t.step}`));
    const marks = [t.status === "finished" ? null : t.status, ...t.flags.filter((flag) => ["masked", "malformed", "tool errors"].includes(flag))].filter(Boolean);
    const turns = t.turns > 1 ? `${t.turns} turns` : null;
    const note = [...marks, isEvaluation(t) ? "evaluation" : null, turns].filter(Boolean).join(", ");
    const snippet = element("span", { class: "snippet" }, note ? element("span", { class: marks.length ? "marks" : "" }, `${note} · `) : null, t.snippet.replace(SPECIAL, " "));
    const node = element("button", { type: "button", on: { click: () => this.open(t, { asked: true }) } }, head, snippet);
    node.summary = t;
    return element("li", {}, node);
  }

  walk(event) {
    const move = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const buttons = [...this.list.querySelectorAll("button")];
    const next = buttons[buttons.indexOf(document.activeElement) + move];
    next?.focus();
    if (next?.summary) this.open(next.summary, { asked: true });
  }

  // Opens what a link names, as run/step/id.
  openNamed(name) {
    const t = this.all.find((one) => this.nameOf(one) === name);
    if (t) {
      this.isAsked = true;
      this.open(t);
    }
    return Boolean(t);
  }

  nameOf(t) {
    return [t.run, t.step, encodeURIComponent(t.id)].join("/");
  }

  async open(t, { asked = false } = {}) {
    this.opened = t;
    this.tip.hide();
    for (const node of this.list.querySelectorAll("button")) node.setAttribute("aria-current", t && node.summary === t ? "true" : "false");
    if (!t) {
      this.pane.replaceChildren(element("p", { class: "empty" }, this.all.length ? "No trajectory matches these filters." : "No trajectories yet."));
      return;
    }
    this.isAsked ||= asked;
    if (asked) history.replaceState(null, "", `#trajectories/${this.nameOf(t)}`);
    try {
      const whole = await t.source.trajectory(t);
      if (this.opened === t) this.draw(t, whole);
    } catch (error) {
      if (this.opened === t) this.pane.replaceChildren(element("p", { class: "empty" }, `This trajectory cannot be read: ${error.message}`));
    }
  }

  draw(t, whole) {
    const tints = tinting(whole, this.colour.value, this.clips[t.run]);
    const conversation = new ConversationView(whole, tints, this.tip);
    this.pane.replaceChildren(...this.heading(t, whole), this.legend(whole, tints), ...conversation.nodes(), this.state(whole));
    const first = markWords(this.pane, wordsOf(this.search.value));
    first?.startContainer.parentElement.scrollIntoView({ block: "center" });
  }

  heading(t, whole) {
    const versions = versionsOf(whole);
    const facts = [
      ["reward", rewardText(t)],
      ["advantage", t.advantage === null || isEvaluation(t) ? "–" : signed(t.advantage, 3)],
      ["status", t.status],
      ["tokens", FORMATS.count(t.tokens)],
      ["weights", versions.length > 1 ? `versions ${versions.join(", ")}` : `version ${versions[0] ?? "–"}`],
      ["step", FORMATS.count(t.step)],
    ];
    if (this.runs.length > 1) facts.unshift(["run", this.runs[t.run]]);
    const long = whole.answer !== null && whole.answer.length > 120;
    if (whole.answer !== null && !long) facts.push(["expected answer", whole.answer]);
    const answer = long ? element("details", { class: "raw" }, element("summary", {}, "Expected answer"), element("pre", {}, whole.answer)) : "";
    const cells = facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
    const flags = t.flags.map((flag) => element("span", { class: `pill ${flag === "masked" ? "bad" : ""}` }, flag === "masked" ? "masked as off-policy" : flag));
    return [element("h3", {}, t.id, ...flags), element("dl", { class: "facts-row" }, ...cells), this.siblings(t), this.parts(whole), this.comments(whole), answer];
  }

  // The samples of the same prompt, those of the same step first: what earned more, what less.
  siblings(t) {
    const near = (one) => Math.abs(one.step - t.step) + (one.run === t.run ? 0 : 0.5);
    const others = this.all.filter((one) => one.prompt === t.prompt && one.prompt !== "");
    if (others.length < 2) return "";
    const shown = others.sort((a, b) => near(a) - near(b) || a.id.localeCompare(b.id)).slice(0, 24);
    const chips = shown.map((one) => {
      const where = one.step === t.step && one.run === t.run ? "" : ` ${this.runs.length > 1 ? `${this.runs[one.run]}, ` : ""}step ${one.step}`;
      const attributes = { class: `chip ${toneOf(one)}`, "aria-current": one === t ? "true" : "false", title: one.id };
      return button(`${rewardText(one)}${where}`, () => this.open(one, { asked: true }), attributes);
    });
    return element("div", { class: "siblings" }, element("span", {}, `${others.length} samples of this prompt: `), ...chips);
  }

  parts({ parts }) {
    const entries = Object.entries(parts);
    if (!entries.length) return "";
    const largest = Math.max(1, ...entries.map(([, value]) => Math.abs(value ?? 0)));
    const rows = entries.map(([name, value]) => {
      const bar = element("meter", { min: 0, max: largest, value: Math.abs(value ?? 0), class: value < 0 ? "down" : "up", "aria-label": name });
      return element("div", {}, element("span", {}, ...breakable(name)), bar, element("b", {}, value === null ? "–" : significant(value, 3)));
    });
    return element("div", { class: "parts", role: "group", "aria-label": "Reward parts" }, ...rows);
  }

  comments({ comments }) {
    const said = Object.entries(comments);
    if (!said.length) return "";
    return element("div", { class: "comments" }, ...said.map(([name, text]) => element("div", { class: "comment" }, element("h4", {}, `${name} says`), element("p", {}, text))));
  }

  state({ state }) {
    if (state === null) return "";
    return element("details", { class: "raw" }, element("summary", {}, "The environment's state at the end"), element("pre", {}, state));
  }

  legend(whole, tints) {
    const { mode } = tints;
    if (whole.sequences.every((sequence) => mode.missing(sequence, tints))) return element("p", { class: "scale" }, `${mode.label}: not recorded for this sample`);
    const ends = mode.ends(tints);
    if (!ends) return "";
    const bar = element("span", { class: `ramp from-${mode.hues[0]} to-${mode.hues[1]}`, "aria-hidden": "true" });
    return element("p", { class: "scale" }, ends[0], bar, ends[1]);
  }
}
