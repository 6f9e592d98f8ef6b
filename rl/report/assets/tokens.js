// Tokens: tinted by a number, and explained one at a time.

const TOKENS_AT_ONCE = 3000; // of one block; more on request, as a browser is slow with very many elements

// Where the colour of a log-ratio is full: what 99 of 100 tokens stay below, within 0.02 and 0.5 nats.
function ratioScale(trajectory) {
  const sizes = trajectory.sequences
    .flatMap((sequence) => sequence.log_ratios ?? [])
    .filter((ratio) => ratio)
    .map(Math.abs)
    .sort((a, b) => a - b);
  return Math.min(Math.max(sizes[Math.floor(sizes.length * 0.99)] ?? 0, 0.02), 0.5);
}

// The weight versions that sampled it, oldest first.
function versionsOf(trajectory) {
  const all = trajectory.sequences.flatMap((sequence) => sequence.versions ?? []);
  return [...new Set(all.filter((version) => version !== null && version >= 0))].sort((a, b) => a - b);
}

// The last token of a sequence is never fed to the model, so it has no route.
const isLast = (sequence, i) => i === sequence.tokens.length - 1 && !sequence.cut;

// Each mode gives token i of a sequence {hue, strength in 0..1}, or null for none, and names both ends of its scale.
const COLOUR_MODES = {
  ratio: {
    label: "log-ratio, learner to rollout",
    missing: (s) => s.log_ratios === null,
    ends: ({ scale }) => [`learner less likely, −${significant(scale, 2)} nats`, `more likely, +${significant(scale, 2)}`],
    hues: ["cool", "warm"],
    tint: (s, i, { scale }) => s.log_ratios[i] && { hue: s.log_ratios[i] > 0 ? "warm" : "cool", strength: Math.abs(s.log_ratios[i]) / scale },
  },
  surprise: {
    label: "surprise when sampled",
    missing: (s) => s.rollout_logprobs === null,
    ends: () => ["certain", "probability 5 % or less"],
    hues: ["clear", "plain"],
    tint: (s, i) => ({ hue: "plain", strength: -(s.rollout_logprobs[i] ?? 0) / 3 }),
  },
  kept: {
    label: "kept-set size",
    missing: (s) => s.kept_sizes === null,
    ends: () => ["1 token to choose from", "1,000 or more"],
    hues: ["clear", "plain"],
    tint: (s, i) => ({ hue: "plain", strength: Math.log10(Math.max(s.kept_sizes[i] ?? 1, 1)) / 3 }),
  },
  version: {
    label: "weight version",
    missing: (s) => s.versions === null,
    ends: ({ versions }) => [`version ${versions[0] ?? "–"}`, `version ${versions.at(-1) ?? "–"}`],
    hues: ["clear", "plain"],
    tint: (s, i, { versions }) => {
      const range = versions.at(-1) - versions[0];
      return range ? { hue: "plain", strength: (s.versions[i] - versions[0]) / range } : null;
    },
  },
  routed: {
    label: "routes not replayed",
    missing: (s) => s.routed === null,
    ends: () => ["route recorded, replayed", "routed live"],
    hues: ["clear", "warm"],
    tint: (s, i) => (s.routed[i] === "1" || isLast(s, i) ? null : { hue: "warm", strength: 0.7 }),
  },
  clipped: {
    label: "clipped by the objective",
    missing: (s, { clip }) => s.log_ratios === null || clip === null,
    ends: ({ clip }) => ["learned from", `gradient cut off, ratio beyond ${significant(1 - clip[0], 3)} to ${significant(1 + clip[1], 3)}`],
    hues: ["clear", "warm"],
    tint: (s, i, { clip, advantage }) => {
      const ratio = Math.exp(s.log_ratios[i] ?? 0);
      const cut = advantage > 0 ? ratio > 1 + clip[1] : advantage < 0 && ratio < 1 - clip[0];
      return cut ? { hue: "warm", strength: 0.8 } : null;
    },
  },
  none: { label: "nothing", missing: () => false, ends: () => null, tint: () => null },
};

// What colours need to know of a whole trajectory; ``clip`` is how far below and above 1 its run lets a ratio go.
function tinting(trajectory, mode, clip) {
  return { mode: COLOUR_MODES[mode], scale: ratioScale(trajectory), versions: versionsOf(trajectory), advantage: trajectory.advantage, clip };
}

function tokenSpan(sequence, i, tints) {
  const text = sequence.tokens[i];
  const span = element("span", { class: "token", "data-i": i }, text);
  if (text === "") span.classList.add("part");
  else if (text.trim() === "" && text.includes("\n")) span.classList.add("newline");
  else if (/^<(\/?think|[|｜].*[|｜])>$|^｜DSML｜$/s.test(text)) span.classList.add("special");
  const { mode } = tints;
  const tint = sequence.sampled[i] === "1" && !mode.missing(sequence, tints) && mode.tint(sequence, i, tints);
  if (tint && tint.strength > 0.01) {
    span.classList.add(tint.hue);
    span.style.setProperty("--strength", `${Math.round(8 + 62 * Math.min(tint.strength, 1))}%`);
  }
  return span;
}

// Tokens [begin, end) of a sequence as text; those past the first thousands come when they are asked for.
function tokenStream(sequence, begin, end, label, tints, tip) {
  const node = element("div", { class: "said stream", tabindex: 0, role: "group", "aria-label": `${label}, token by token: use the left and right arrow keys` });
  const extend = (from) => {
    const to = Math.min(from + TOKENS_AT_ONCE, end);
    const spans = [];
    for (let i = from; i < to; i += 1) spans.push(tokenSpan(sequence, i, tints));
    node.append(...spans);
    if (to === end) return;
    const more = button(`Show more of these ${FORMATS.count(end - begin)} tokens`, () => {
      more.remove();
      extend(to);
    });
    node.append(more);
  };
  extend(begin);
  tip.watch(node, sequence);
  return node;
}

function tokenFacts(s, i) {
  const facts = [];
  if (s.sampled[i] === "1") {
    const logprob = s.rollout_logprobs?.[i];
    if (known(logprob)) facts.push(["rollout log-prob", `${decimal(logprob, 4)}  (${FORMATS.share(Math.exp(logprob))})`]);
    const ratio = s.log_ratios?.[i];
    if (known(ratio)) facts.push(["learner − rollout", signed(ratio, 3)], ["ratio", decimal(Math.exp(ratio), 4)]);
    const size = s.kept_sizes?.[i];
    if (known(size)) facts.push(["kept set", size ? `${FORMATS.count(size)} token${size === 1 ? "" : "s"}` : "none, everything was kept"]);
    if (known(s.versions?.[i])) facts.push(["weights", `version ${s.versions[i]}`]);
  } else facts.push(["sampled", "no, given to the policy"]);
  const unrouted = isLast(s, i) ? "none, nothing follows it" : "not recorded, routed live";
  if (s.routed) facts.push(["route", s.routed[i] === "1" ? "recorded, replayed" : unrouted]);
  facts.push(["position", FORMATS.count(i)]);
  return facts;
}

// One floating card for the token under the pointer, or the one the arrow keys have reached.
class TokenTip {
  constructor() {
    this.node = element("div", { class: "tip", role: "status", hidden: true });
    this.current = null;
    document.body.append(this.node);
    window.addEventListener("scroll", () => this.current && this.place(), { passive: true });
  }

  show(sequence, span) {
    this.current?.classList.remove("current");
    this.current = span;
    span.classList.add("current");
    const i = Number(span.dataset.i);
    const rows = tokenFacts(sequence, i).map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
    const shown = sequence.tokens[i] === "" ? "part of the next character" : JSON.stringify(sequence.tokens[i]);
    this.node.replaceChildren(element("code", {}, shown), element("dl", {}, ...rows));
    this.node.hidden = false;
    this.place();
  }

  place() {
    placeNear(this.node, this.current.getClientRects()[0] ?? this.current.getBoundingClientRect());
  }

  hide() {
    this.current?.classList.remove("current");
    this.current = null;
    this.node.hidden = true;
  }

  // Pointer, touch and arrow keys over a container of token spans.
  watch(container, sequence) {
    const spanOf = (event) => event.target.closest?.(".token");
    container.addEventListener("pointerover", (event) => spanOf(event) && this.show(sequence, spanOf(event)));
    container.addEventListener("pointerleave", () => this.hide());
    container.addEventListener("blur", () => this.hide());
    container.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") this.hide();
      if (!move) return;
      event.preventDefault();
      const spans = [...container.querySelectorAll(".token")];
      const at = spans.indexOf(this.current);
      const next = spans[at < 0 ? 0 : Math.min(Math.max(at + move, 0), spans.length - 1)];
      next.scrollIntoView({ block: "nearest" });
      this.show(sequence, next);
    });
  }
}

// A floating card below a box, or above it where there is no room.
function placeNear(node, box) {
  const card = node.getBoundingClientRect();
  const left = Math.min(Math.max(box.left, 8), document.documentElement.clientWidth - card.width - 8);
  const below = box.bottom + 6 + card.height < window.innerHeight;
  node.style.left = `${left}px`;
  node.style.top = `${below ? box.bottom + 6 : Math.max(box.top - card.height - 6, 8)}px`;
}
