// Search in the text of every trajectory, and marks on what was found in the one that is open.

const SAID_AT_ONCE = 24; // summaries between two moments in which the page may draw
const AHEAD = 40; // summaries whose blocks are asked for before their turn

function textOf(t) {
  const said = t.messages.map((message) => message.content);
  const turns = t.turns.flatMap((turn) => [...turn.results.map((result) => result.text), turn.user]);
  const tokens = t.sequences.map((sequence) => sequence.tokens.join(""));
  return [t.id, t.answer ?? "", ...said, ...tokens, ...turns, ...Object.values(t.comments), t.state ?? ""].join("\n").toLowerCase();
}

const wordsOf = (text) => text.toLowerCase().split(/\s+/).filter(Boolean);

// The lower-case text of every summary's trajectory, read block by block when it is first needed.
class Texts {
  constructor() {
    this.known = new Map();
  }

  // Whether every word occurs in it; null while that is not known.
  has(summary, words) {
    const text = this.known.get(summary);
    return text === undefined ? null : words.every((word) => text.includes(word));
  }

  // Reads those that are missing; tell(share) is called in between. Stops when still() is false.
  async read(summaries, tell, still) {
    const missing = summaries.filter((summary) => !this.known.has(summary));
    for (const [i, summary] of missing.entries()) {
      if (!still()) return false;
      missing[i + AHEAD]?.source.block(missing[i + AHEAD].block); // unpacked meanwhile, on another thread
      this.known.set(summary, textOf(await summary.source.trajectory(summary)));
      if (i % SAID_AT_ONCE === SAID_AT_ONCE - 1) {
        tell(i / missing.length);
        await new Promise((resume) => setTimeout(resume));
      }
    }
    return still();
  }
}

// Marks the words in an element's text, across the elements inside it; returns the first mark.
function markWords(node, words) {
  const highlights = globalThis.CSS?.highlights;
  if (!highlights || !globalThis.Highlight) return null;
  highlights.delete("found");
  if (!words.length) return null;
  const walker = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
  const pieces = [];
  let text = "";
  while (walker.nextNode()) {
    pieces.push({ node: walker.currentNode, begin: text.length });
    text += walker.currentNode.data;
  }
  const lower = text.toLowerCase();
  if (lower.length !== text.length) return null; // some letters change their length; better no mark than a wrong one
  const ranges = words.flatMap((word) => rangesOf(word, lower, pieces));
  if (ranges.length) highlights.set("found", new Highlight(...ranges));
  return ranges.sort((a, b) => a.compareBoundaryPoints(Range.START_TO_START, b))[0] ?? null;
}

function rangesOf(word, text, pieces) {
  const begins = pieces.map((piece) => piece.begin);
  const ranges = [];
  for (let at = text.indexOf(word); at >= 0 && ranges.length < 2000; at = text.indexOf(word, at + word.length)) {
    const range = new Range();
    const place = (offset) => {
      let i = nearest(begins, offset);
      while (begins[i] > offset) i -= 1;
      while (i + 1 < begins.length && begins[i + 1] <= offset) i += 1;
      return [pieces[i].node, offset - begins[i]];
    };
    range.setStart(...place(at));
    const [last, offset] = place(at + word.length - 1);
    range.setEnd(last, offset + 1);
    ranges.push(range);
  }
  return ranges;
}
