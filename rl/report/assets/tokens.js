// A trajectory's tokens: cut into thinking, reply and environment, tinted by a number, and explained one at a time.

const BLOCK_TITLES = { thinking: "Thinking", reply: "Reply", environment: "Environment" };

// The prompt's text, and what follows it as [{kind, indices}].
function blocksOf(trajectory) {
  const { tokens, sampled } = trajectory;
  const starts = [];
  let text = "";
  for (const token of tokens) {
    starts.push(text.length);
    text += token;
  }
  const marks = [...text.matchAll(/<\/?think>/g)].map((match) => ({ end: match.index + match[0].length, opens: match[0] === "<think>" }));
  let first = sampled.indexOf("1");
  if (first < 0) first = tokens.length;
  const blocks = [];
  let mark = 0;
  let thinking = false;
  for (let i = 0; i < tokens.length; i += 1) {
    while (mark < marks.length && marks[mark].end <= starts[i]) thinking = marks[mark++].opens;
    if (i < first) continue;
    const kind = sampled[i] === "0" ? "environment" : thinking ? "thinking" : "reply";
    if (blocks.at(-1)?.kind !== kind) blocks.push({ kind, indices: [] });
    blocks.at(-1).indices.push(i);
  }
  return { prompt: tokens.slice(0, first).join(""), promptTokens: first, blocks };
}

// The weight versions that sampled it, oldest first.
function versionsOf(trajectory) {
  trajectory.used ??= [...new Set(trajectory.versions.filter((version) => version >= 0))].sort((a, b) => a - b);
  return trajectory.used;
}

// Where the colour of a log-ratio is full: what 99 of 100 tokens of the page stay below, within 0.02 and 0.5 nats.
function ratioScale(trajectories) {
  const sizes = trajectories
    .flatMap((trajectory) => trajectory.log_ratios ?? [])
    .filter((ratio) => ratio)
    .map(Math.abs)
    .sort((a, b) => a - b);
  return Math.min(Math.max(sizes[Math.floor(sizes.length * 0.99)] ?? 0, 0.02), 0.5);
}

// Each mode gives a token {hue, strength in 0..1}, or null for none, and names both ends of its scale.
function colourModes(scale) {
  const span = significant(scale, 2);
  return {
    ratio: {
      label: "learner against rollout",
      missing: (t) => t.log_ratios === null,
      ends: [`learner less likely, log-ratio −${span}`, `more likely, +${span}`],
      hues: ["cool", "warm"],
      tint: (t, i) => t.log_ratios[i] && { hue: t.log_ratios[i] > 0 ? "warm" : "cool", strength: Math.abs(t.log_ratios[i]) / scale },
    },
    surprise: {
      label: "surprise when sampled",
      missing: () => false,
      ends: ["certain", "probability 5 % or less"],
      hues: ["clear", "plain"],
      tint: (t, i) => ({ hue: "plain", strength: -(t.rollout_logprobs[i] ?? 0) / 3 }),
    },
    kept: {
      label: "kept-set size",
      missing: (t) => t.kept_sizes === null,
      ends: ["1 token to choose from", "1,000 or more"],
      hues: ["clear", "plain"],
      tint: (t, i) => ({ hue: "plain", strength: Math.log10(Math.max(t.kept_sizes[i], 1)) / 3 }),
    },
    version: {
      label: "weight version",
      missing: () => false,
      ends: ["oldest in this sample", "newest"],
      hues: ["clear", "plain"],
      tint: (t, i) => {
        const used = versionsOf(t);
        const range = used.at(-1) - used[0];
        return range ? { hue: "plain", strength: (t.versions[i] - used[0]) / range } : null;
      },
    },
    routed: {
      label: "live-routed tokens",
      missing: (t) => t.routed === null,
      ends: ["route recorded", "not recorded"],
      hues: ["clear", "warm"],
      tint: (t, i) => (t.routed[i] === "1" ? null : { hue: "warm", strength: 0.7 }),
    },
    none: { label: "nothing", missing: () => false, ends: null, tint: () => null },
  };
}

function tokenSpan(trajectory, i, mode) {
  const text = trajectory.tokens[i];
  const span = element("span", { class: "token", "data-i": i }, text);
  if (text === "") span.classList.add("part");
  else if (text.trim() === "" && text.includes("\n")) span.classList.add("newline");
  else if (/^<(\/?think|[|｜].*[|｜])>$/s.test(text)) span.classList.add("special");
  const tint = trajectory.sampled[i] === "1" && !mode.missing(trajectory) && mode.tint(trajectory, i);
  if (tint && tint.strength > 0.01) {
    span.classList.add(tint.hue);
    span.style.setProperty("--strength", `${Math.round(8 + 62 * Math.min(tint.strength, 1))}%`);
  }
  return span;
}

function tokenFacts(t, i) {
  const facts = [];
  if (t.sampled[i] === "1") {
    const logprob = t.rollout_logprobs[i];
    if (logprob !== null) facts.push(["rollout log-prob", `${decimal(logprob, 4)}  (${FORMATS.share(Math.exp(logprob))})`]);
    const ratio = t.log_ratios?.[i];
    if (ratio !== null && ratio !== undefined) {
      facts.push(["learner − rollout", `${ratio > 0 ? "+" : ""}${significant(ratio, 3)}`], ["ratio", decimal(Math.exp(ratio), 4)]);
    }
    if (t.kept_sizes) facts.push(["kept set", `${FORMATS.count(t.kept_sizes[i])} token${t.kept_sizes[i] === 1 ? "" : "s"}`]);
    facts.push(["weights", `version ${t.versions[i]}`]);
  } else facts.push(["sampled", "no, given to the policy"]);
  if (t.routed) facts.push(["route", t.routed[i] === "1" ? "recorded, replayed" : "not recorded, routed live"]);
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

  show(trajectory, span) {
    this.current?.classList.remove("current");
    this.current = span;
    span.classList.add("current");
    const i = Number(span.dataset.i);
    const rows = tokenFacts(trajectory, i).map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
    const shown = trajectory.tokens[i] === "" ? "part of the next character" : JSON.stringify(trajectory.tokens[i]);
    this.node.replaceChildren(element("code", {}, shown), element("dl", {}, ...rows));
    this.node.hidden = false;
    this.place();
  }

  place() {
    const span = this.current;
    const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const card = this.node.getBoundingClientRect();
    const left = Math.min(Math.max(at.left, 8), document.documentElement.clientWidth - card.width - 8);
    const below = at.bottom + 6 + card.height < window.innerHeight;
    this.node.style.left = `${left}px`;
    this.node.style.top = `${below ? at.bottom + 6 : Math.max(at.top - card.height - 6, 8)}px`;
  }

  hide() {
    this.current?.classList.remove("current");
    this.current = null;
    this.node.hidden = true;
  }

  // Pointer, touch and arrow keys over a container of token spans.
  watch(container, trajectory) {
    const spanOf = (event) => event.target.closest?.(".token");
    container.addEventListener("pointerover", (event) => spanOf(event) && this.show(trajectory, spanOf(event)));
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
      this.show(trajectory, next);
    });
  }
}
