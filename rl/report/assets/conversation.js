// A trajectory as a conversation: its turns with thinking, reply, tool calls and results, each token where it was said.

const KINDS = { thinking: "Thinking", reply: "Reply", calls: "Tool calls" };

// Where kinds change within a sequence's text. A call's marker belongs to the call, a thought's to what it closes.
const MARKS = /<think>|<\/think>|<｜DSML｜function_calls>|<\/｜DSML｜function_calls>|<tool_call>|<\/tool_call>/g;

const ENDING = /^\s*(<[|｜][^<>]{1,40}[|｜]>)?\s*$/;

// For each token of a sequence the kind of text it belongs to, were it sampled.
function kindsOf(sequence) {
  const text = sequence.tokens.join("");
  const marks = [...text.matchAll(MARKS)].map(({ 0: mark, index }) => {
    if (/^<(｜DSML｜|tool_call)/.test(mark)) return { at: index, kind: "calls" };
    return { at: index + mark.length, kind: mark === "<think>" ? "thinking" : "reply" };
  });
  let next = 0;
  let kind = "reply";
  let at = 0;
  return sequence.tokens.map((token) => {
    while (next < marks.length && marks[next].at <= at) kind = marks[next++].kind;
    at += token.length;
    return kind;
  });
}

// The stretches [begin, end) of a sequence that were sampled, one a reply.
function repliesOf(sequence) {
  return [...sequence.sampled.matchAll(/1+/g)].map((match) => ({ sequence, begin: match.index, end: match.index + match[0].length }));
}

// [{turn, span}]: what an episode says of a turn, and where its reply's tokens are. Either may be missing: a sample
// without tools has no turns, and older records hold the tokens of the last sequence only.
function turnsOf(trajectory) {
  const spans = trajectory.sequences.flatMap(repliesOf);
  const { turns } = trajectory;
  if (!turns.length) return spans.map((span) => ({ turn: null, span }));
  const cut = trajectory.sequences.some((sequence) => sequence.cut);
  const shift = cut ? 0 : Math.max(turns.length - spans.length, 0);
  return turns.map((turn, i) => ({ turn, span: spans[i - shift] ?? null }));
}

class ConversationView {
  constructor(trajectory, tints, tip) {
    this.trajectory = trajectory;
    this.tints = tints;
    this.tip = tip;
    this.read = new Map(trajectory.sequences.map((sequence) => [sequence, 0])); // tokens shown so far
  }

  nodes() {
    const t = this.trajectory;
    const turns = turnsOf(t);
    const said = turns.map((one, i) => this.turn(one, i, turns));
    const cut = t.sequences.reduce((sum, sequence) => sum + sequence.cut, 0);
    const rest = cut ? element("p", { class: "empty" }, `${FORMATS.count(cut)} more tokens are in the samples folder.`) : null;
    return [...t.messages.map((one) => this.message(one)), ...said.flat(), rest].filter(Boolean);
  }

  message({ role, content }) {
    return element("div", { class: `message given ${role === "system" ? "system" : ""}` }, element("h4", {}, role), this.long(content));
  }

  // Text of people and tools; a long one is folded to a few lines.
  long(text) {
    const node = element("div", { class: "said" }, text);
    if (text.length < 1500) return node;
    node.classList.add("folded");
    const open = button("Show all of it", () => {
      node.classList.remove("folded");
      open.remove();
    });
    return element("div", {}, node, open);
  }

  turn({ turn, span }, i, turns) {
    const many = turns.length > 1;
    const nodes = span ? this.given(span, i === 0) : [];
    if (many) nodes.push(this.turnHead(turn, span, i, turns.length));
    nodes.push(...(span ? this.reply(span) : [element("div", { class: "message reply" }, element("h4", {}, "Reply", element("span", { class: "size" }, "its tokens were not recorded")), this.long(turn.reply))]));
    if (turn) nodes.push(...this.answers(turn));
    return nodes;
  }

  turnHead(turn, span, i, count) {
    const facts = [`Turn ${i + 1} of ${count}`];
    if (span) {
      const versions = [...new Set((span.sequence.versions ?? []).slice(span.begin, span.end).filter(known))];
      facts.push(`${FORMATS.count(span.end - span.begin)} tokens`, `weights ${versions.sort((a, b) => a - b).join(", ")}`);
      if (span.sequence.log_ratios) {
        const ratios = span.sequence.log_ratios.slice(span.begin, span.end);
        facts.push(`mean log-ratio ${signed(ratios.reduce((sum, ratio) => sum + (ratio ?? 0), 0) / ratios.length, 2)}`);
      }
    }
    return element("h4", { class: "turn-head", id: `turn-${i + 1}` }, facts.join(" · "));
  }

  // What the model read before a reply, as it read it: the prompt, or what came between two replies.
  given({ sequence, begin, end }, first) {
    const from = this.read.get(sequence);
    this.read.set(sequence, end);
    if (from === begin) return [];
    const restarted = from === 0 && !first;
    const what = first ? "Prompt" : restarted ? "Restarted context" : "What came back,";
    const title = `${what} as the model read it, ${FORMATS.count(begin - from)} tokens`;
    const details = element("details", { class: "raw", open: first && !this.trajectory.messages.length }, element("summary", {}, title));
    const fill = () => details.childElementCount === 1 && details.append(element("pre", {}, sequence.tokens.slice(from, begin).join("")));
    details.addEventListener("toggle", fill);
    if (details.open) fill();
    const note = restarted ? element("p", { class: "restart" }, "The context was restarted here; the turns before it are a sequence of their own.") : null;
    return [note, details].filter(Boolean);
  }

  // A reply's tokens, cut where its kind changes.
  reply({ sequence, begin, end }) {
    const kinds = (this.kinds ??= new Map());
    if (!kinds.has(sequence)) kinds.set(sequence, kindsOf(sequence));
    const kindOf = kinds.get(sequence);
    const blocks = [];
    for (let i = begin; i < end; i += 1) {
      if (blocks.at(-1)?.kind !== kindOf[i]) blocks.push({ kind: kindOf[i], begin: i, end: i });
      blocks.at(-1).end = i + 1;
    }
    const last = blocks.at(-1);
    if (blocks.length > 1 && ENDING.test(sequence.tokens.slice(last.begin, last.end).join(""))) {
      blocks.pop(); // the token that ends a reply belongs to what it ends
      blocks.at(-1).end = last.end;
    }
    return blocks.map((block) => this.block(sequence, block));
  }

  block(sequence, { kind, begin, end }) {
    const text = tokenStream(sequence, begin, end, KINDS[kind], this.tints, this.tip);
    const size = element("span", { class: "size" }, `${FORMATS.count(end - begin)} token${end - begin === 1 ? "" : "s"}`);
    return element("div", { class: `message ${kind}` }, element("h4", {}, KINDS[kind], size), text);
  }

  // What came of a turn: calls as they were read, with their results, and what the user said next.
  answers({ calls, results, malformed, user }) {
    const nodes = [];
    if (malformed) nodes.push(element("p", { class: "malformed" }, element("b", {}, "Not a valid call: "), malformed));
    for (let i = 0; i < Math.max(calls.length, results.length); i += 1) nodes.push(this.result(calls[i], results[i]));
    if (user) nodes.push(element("div", { class: "message given" }, element("h4", {}, "user"), this.long(user)));
    return nodes;
  }

  result(call, result) {
    const failed = result?.failed ? element("span", { class: "pill bad" }, "error") : null;
    const head = element("h4", {}, call ? this.call(call) : "Result", failed);
    const said = result ? this.long(result.text || "(empty)") : element("div", { class: "said" }, "(no result)");
    return element("div", { class: `message result ${result?.failed ? "failed" : ""}` }, head, said);
  }

  // name(argument=value, ...), long values on lines of their own.
  call({ name, arguments: given }) {
    const entries = Object.entries(given);
    const inline = entries.every(([, value]) => value.length <= 60 && !value.includes("\n"));
    if (inline) return element("code", { class: "call" }, `${name}(${entries.map(([key, value]) => `${key}=${value}`).join(", ")})`);
    const lines = entries.map(([key, value]) => element("div", {}, element("span", { class: "key-of" }, `${key} = `), value));
    return element("code", { class: "call" }, `${name}(`, ...lines, ")");
  }
}
