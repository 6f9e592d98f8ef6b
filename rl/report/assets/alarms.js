// What the run's own checks raised (alarms.jsonl): one line for each alarm of a metric, with its latest words.

// [{name, metric, times: [{from, to}], last}]: when each alarm was on; ``to`` is null while it is. Those that are on come first.
function alarmsOf(rows) {
  const found = new Map();
  for (const row of rows) {
    const key = `${row.run ?? ""} ${row.alarm} ${row.metric}`;
    const one = found.get(key) ?? { name: row.alarm, metric: row.metric, run: row.run, times: [], last: row };
    found.set(key, one);
    if (row.active) {
      if (!one.times.length || one.times.at(-1).to !== null) one.times.push({ from: row.step, to: null });
      one.last = row; // what was seen says more than that it has cleared
    } else if (one.times.length) one.times.at(-1).to = row.step;
  }
  const isOn = (one) => one.times.at(-1)?.to === null;
  return [...found.values()].filter((one) => one.times.length).sort((a, b) => isOn(b) - isOn(a) || b.last.step - a.last.step);
}

function whenText({ times }) {
  const { from, to } = times.at(-1);
  const before = times.length > 1 ? `${times.length} times, last ` : "";
  return to === null ? `${before}since step ${from}` : `${before}steps ${from} to ${to}, cleared`;
}

class AlarmsView {
  // goTo(step) shows the curves at a step.
  constructor(goTo) {
    this.goTo = goTo;
    this.node = element("div", { class: "alarms", role: "region", "aria-label": "Alarms" });
  }

  show(rows) {
    const open = new Set([...this.node.querySelectorAll("details[open]")].map((node) => node.dataset.key));
    const lines = alarmsOf(rows).map((one) => this.line(one, open));
    this.node.replaceChildren(...lines);
    this.node.hidden = !lines.length;
  }

  line({ name, metric, run, times, last }, open) {
    const key = `${run ?? ""} ${name} ${metric}`;
    const cleared = times.at(-1).to !== null;
    const title = [run, name].filter(Boolean).join(": ");
    const seen = last.sentence.replace(`alarm ${name}: `, "");
    const head = element("summary", {}, element("b", {}, title), element("span", { class: "says" }, seen), element("span", { class: "when" }, whenText({ times })));
    const shown = times.slice(-40);
    const places = shown.map(({ from }) => button(`step ${from}`, () => this.goTo(from)));
    const numbers = last.value === null ? "" : `${metric || "its value"} gave ${significant(last.value, 3)}${last.limit === null ? "" : `, its limit is ${significant(last.limit, 3)}`}. `;
    const started = element("p", { class: "places" }, numbers, "It started at ", ...places);
    return element("details", { class: `alarm ${cleared ? "cleared" : ""}`, "data-key": key, open: open.has(visible(key)) }, head, element("p", { class: "sentence" }, last.sentence), started);
  }
}
