// The reader: filters, a list of trajectories, and the one that is open.

const LIST_PAGE = 100;
const SPECIAL = /<\/?think>|<[|｜][^<>]{1,40}[|｜]>/g; // left out of the one-line view of a reply

const ORDERS = {
  step: { label: "step, earliest first", compare: (a, b) => a.step - b.step },
  latest: { label: "step, latest first", compare: (a, b) => b.step - a.step },
  best: { label: "reward, highest first", compare: (a, b) => b.reward - a.reward },
  worst: { label: "reward, lowest first", compare: (a, b) => a.reward - b.reward },
  mismatch: { label: "mismatch, largest first", compare: (a, b) => largestRatio(b) - largestRatio(a) },
};

function largestRatio(trajectory) {
  return (trajectory.log_ratios ?? []).reduce((most, ratio) => Math.max(most, Math.abs(ratio ?? 0)), 0);
}

function replyText(trajectory) {
  return trajectory.tokens.filter((_, i) => trajectory.sampled[i] === "1").join("");
}

function rewardText(trajectory) {
  return trajectory.reward === null ? "–" : significant(trajectory.reward, 3);
}

function distinct(trajectories, name) {
  return [...new Set(trajectories.map((trajectory) => trajectory[name]))].sort((a, b) => (a < b ? -1 : a > b ? 1 : 0));
}

class Reader {
  constructor(trajectories) {
    this.all = trajectories;
    for (const t of trajectories) {
      t.reply = replyText(t);
      const said = t.messages.map((message) => message.content).join("\n");
      t.searchable = [t.id, t.answer ?? "", said, t.tokens.join("")].join("\n").toLowerCase();
    }
    this.modes = colourModes(ratioScale(trajectories));
    this.tip = new TokenTip();
    this.count = element("span", { class: "count", role: "status" });
    this.list = element("ol", { class: "list", "aria-label": "Trajectories" });
    this.list.addEventListener("keydown", (event) => this.walk(event));
    this.pane = element("article", { class: "pane", "aria-label": "Trajectory" });
    const filters = this.buildFilters();
    this.node = element("div", {}, filters, element("div", { class: "reader" }, element("div", { class: "side" }, this.count, this.list), this.pane));
    this.apply();
  }

  buildFilters() {
    const again = { input: () => this.apply() };
    const choice = (label, options) =>
      element("select", { "aria-label": label, on: again }, ...options.map(([value, text]) => element("option", { value }, text)));
    const any = (label, name, word = (value) => value) =>
      choice(label, [["", `any ${label}`], ...distinct(this.all, name).map((value) => [value, word(value)])]);
    this.search = element("input", { type: "search", placeholder: "Search the text", "aria-label": "Search the text", on: again });
    this.step = any("step", "step", (step) => `step ${step}`);
    this.domain = any("domain", "domain");
    this.ending = any("status", "status");
    const bound = (label) => element("input", { type: "number", step: "any", placeholder: label, "aria-label": `reward ${label}`, on: again });
    this.least = bound("from");
    this.most = bound("to");
    this.order = choice("order", Object.entries(ORDERS).map(([value, { label }]) => [value, label]));
    this.colour = element(
      "select",
      { on: { input: () => this.open(this.opened) } },
      ...Object.entries(this.modes).map(([value, { label }]) => element("option", { value }, label)),
    );
    const reward = element("span", { class: "bounds" }, "reward", this.least, this.most);
    const colour = element("label", { class: "bounds" }, "colour by", this.colour);
    return element("form", { class: "filters", on: { submit: (event) => event.preventDefault() } }, this.search, this.step, this.domain, this.ending, reward, this.order, colour);
  }

  // Shows the trajectories of the recorded step nearest to this one.
  goTo(step) {
    const steps = distinct(this.all, "step");
    for (const filter of [this.search, this.domain, this.ending, this.least, this.most]) filter.value = "";
    this.step.value = String(steps[nearest(steps, step)]);
    this.apply();
    this.node.scrollIntoView({ block: "start" });
  }

  apply() {
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const least = this.least.value === "" ? -Infinity : Number(this.least.value);
    const most = this.most.value === "" ? Infinity : Number(this.most.value);
    this.found = this.all
      .filter((t) => this.step.value === "" || t.step === Number(this.step.value))
      .filter((t) => this.domain.value === "" || t.domain === this.domain.value)
      .filter((t) => this.ending.value === "" || t.status === this.ending.value)
      .filter((t) => t.reward === null || (t.reward >= least && t.reward <= most))
      .filter((t) => words.every((word) => t.searchable.includes(word)))
      .sort(ORDERS[this.order.value].compare);
    this.count.textContent = `${FORMATS.count(this.found.length)} of ${FORMATS.count(this.all.length)} trajectories`;
    this.shown = 0;
    this.list.replaceChildren();
    this.extend();
    this.open(this.found.includes(this.opened) ? this.opened : this.found[0]);
  }

  extend() {
    this.more?.remove();
    const next = this.found.slice(this.shown, this.shown + LIST_PAGE);
    this.list.append(...next.map((trajectory) => this.item(trajectory)));
    this.shown += next.length;
    if (this.shown >= this.found.length) return;
    const text = `Show ${Math.min(LIST_PAGE, this.found.length - this.shown)} more`;
    this.more = element("li", {}, element("button", { type: "button", class: "quiet", on: { click: () => this.extend() } }, text));
    this.list.append(this.more);
  }

  item(t) {
    const tone = t.advantage > 0 ? "up" : t.advantage < 0 ? "down" : "";
    const head = element("span", { class: "item-head" }, element("span", { class: `reward ${tone}` }, rewardText(t)), element("span", { class: "item-id" }, t.id), element("span", { class: "item-step" }, `step ${t.step}`));
    const flags = [t.status === "finished" ? null : t.status, t.masked ? "masked" : null].filter(Boolean).join(", ");
    const snippet = element("span", { class: "snippet" }, flags ? `${flags} · ` : "", t.reply.replace(SPECIAL, " ").replace(/\s+/g, " ").slice(0, 160));
    const button = element("button", { type: "button", on: { click: () => this.open(t) } }, head, snippet);
    button.trajectory = t;
    return element("li", {}, button);
  }

  walk(event) {
    const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const buttons = [...this.list.querySelectorAll("button")];
    const next = buttons[buttons.indexOf(document.activeElement) + move];
    next?.focus();
    if (next?.trajectory) this.open(next.trajectory);
  }

  open(t) {
    this.opened = t;
    this.tip.hide();
    for (const button of this.list.querySelectorAll("button")) button.setAttribute("aria-current", button.trajectory === t ? "true" : "false");
    if (!t) {
      this.pane.replaceChildren(element("p", { class: "empty" }, "No trajectory matches these filters."));
      return;
    }
    const { prompt, promptTokens, blocks } = blocksOf(t);
    const mode = this.modes[this.colour.value];
    const messages = t.messages.map(({ role, content }) => element("div", { class: `message ${role === "system" ? "system" : ""}` }, element("h4", {}, role), element("div", { class: "said" }, content)));
    const raw = element("details", { open: t.messages.length === 0 }, element("summary", {}, `Prompt as the model read it, ${FORMATS.count(promptTokens)} tokens`), element("pre", {}, prompt));
    const spoken = blocks.map(({ kind, indices }) => this.block(t, kind, indices, mode));
    const cut = t.cut ? element("p", { class: "empty" }, `${FORMATS.count(t.cut)} more tokens are in the samples folder.`) : null;
    this.pane.replaceChildren(...this.heading(t), ...messages, raw, this.legend(t, mode), ...spoken, cut ?? "");
  }

  heading(t) {
    const versions = versionsOf(t);
    const numSampled = [...t.sampled].filter((flag) => flag === "1").length;
    const facts = [
      ["reward", rewardText(t)],
      ["advantage", t.advantage === null ? "–" : `${t.advantage > 0 ? "+" : ""}${significant(t.advantage, 3)}`],
      ["status", t.status],
      ["tokens", FORMATS.count(numSampled)],
      ["weights", versions.length > 1 ? `versions ${versions.join(", ")}` : `version ${versions[0] ?? "–"}`],
      ["step", FORMATS.count(t.step)],
    ];
    if (t.answer !== null) facts.push(["expected answer", t.answer]);
    const cells = facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
    const title = element("h3", {}, t.id, t.masked ? element("span", { class: "pill bad" }, "masked as off-policy") : null);
    return [title, element("dl", { class: "facts-row" }, ...cells), this.parts(t)];
  }

  parts(t) {
    const entries = Object.entries(t.parts);
    if (!entries.length) return "";
    const largest = Math.max(1, ...entries.map(([, value]) => Math.abs(value ?? 0)));
    const rows = entries.map(([name, value]) => {
      const bar = element("meter", { min: 0, max: largest, value: Math.abs(value ?? 0), class: value < 0 ? "down" : "up", "aria-label": name });
      return element("div", {}, element("span", {}, name), bar, element("b", {}, value === null ? "–" : significant(value, 3)));
    });
    return element("div", { class: "parts", "aria-label": "Reward parts" }, ...rows);
  }

  legend(t, mode) {
    if (mode.missing(t)) return element("p", { class: "scale" }, `${mode.label}: not recorded for this sample`);
    if (!mode.ends) return "";
    const bar = element("span", { class: `ramp from-${mode.hues[0]} to-${mode.hues[1]}`, "aria-hidden": "true" });
    return element("p", { class: "scale" }, mode.ends[0], bar, mode.ends[1]);
  }

  block(t, kind, indices, mode) {
    const label = `${BLOCK_TITLES[kind]}, token by token: use the left and right arrow keys`;
    const text = element("div", { class: "said stream", tabindex: 0, role: "group", "aria-label": label }, ...indices.map((i) => tokenSpan(t, i, mode)));
    this.tip.watch(text, t);
    const size = element("span", { class: "size" }, `${FORMATS.count(indices.length)} tokens`);
    return element("div", { class: `message ${kind}` }, element("h4", {}, BLOCK_TITLES[kind], size), text);
  }
}
