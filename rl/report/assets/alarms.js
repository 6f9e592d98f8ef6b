// What the run's own checks raised: one line an alarm, with how often, and its latest words.

function alarmGroups(alarms) {
  const groups = new Map();
  for (const alarm of alarms) {
    const group = groups.get(alarm.alarm) ?? { name: alarm.alarm, steps: [], last: alarm };
    group.steps.push(alarm.step);
    group.last = alarm;
    groups.set(alarm.alarm, group);
  }
  return [...groups.values()].sort((a, b) => b.last.step - a.last.step);
}

function stepsText(steps) {
  if (steps.length === 1) return `step ${steps[0]}`;
  return `${FORMATS.count(steps.length)} times, steps ${Math.min(...steps)} to ${Math.max(...steps)}`;
}

class AlarmsView {
  // goTo(step) shows the curves at a step.
  constructor(goTo) {
    this.goTo = goTo;
    this.node = element("div", { class: "alarms", role: "region", "aria-label": "Alarms" });
  }

  show(alarms) {
    const rows = alarmGroups(alarms).map(({ name, steps, last }) => {
      const numbers = last.value === null ? null : `${significant(last.value, 3)}${last.limit === null ? "" : ` against ${significant(last.limit, 3)}`}`;
      const line = element("summary", {}, element("b", {}, name), element("span", { class: "says" }, last.sentence), element("span", { class: "when" }, numbers ? `${numbers} · ` : "", stepsText(steps)));
      const shown = [...new Set(steps)].slice(-40);
      const places = shown.map((step) => button(String(step), () => this.goTo(step)));
      const more = shown.length < new Set(steps).size ? `the last ${shown.length} steps: ` : "at step ";
      return element("details", { class: "alarm" }, line, element("p", { class: "sentence" }, last.sentence), element("p", { class: "places" }, more, ...places));
    });
    this.node.replaceChildren(...rows);
    this.node.hidden = !rows.length;
  }
}
