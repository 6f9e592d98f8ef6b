// The steps of one table, and the one every chart points at. Pinned means that it stays when the pointer leaves.

class Cursor {
  constructor(steps) {
    this.steps = steps;
    this.index = steps.length - 1;
    this.active = false;
    this.pinned = false;
    this.listeners = [];
    this.alarms = []; // [{metric, from, to}], see alarmsOf
  }

  move(index, { pin = false } = {}) {
    this.index = Math.min(Math.max(index, 0), this.steps.length - 1);
    this.active = true;
    if (pin) this.pinned = true;
    this.notify();
  }

  leave() {
    if (!this.pinned) this.release();
  }

  release() {
    this.pinned = this.active = false;
    this.index = this.steps.length - 1;
    this.notify();
  }

  // The table has other steps now; a held step stays held.
  extend(steps) {
    const held = this.steps[this.index];
    this.steps = steps;
    this.index = this.active ? nearest(steps, held) : steps.length - 1;
  }

  notify() {
    for (const listener of this.listeners) listener(this);
  }
}

// Stays in sight while the curves scroll by: which step is read, and a slider that the keyboard can move.
function stepBar(cursor, actions) {
  const label = element("output", { class: "at" });
  const slider = element("input", { type: "range", min: 0, "aria-label": "Step", on: { input: () => cursor.move(Number(slider.value), { pin: true }) } });
  const release = button("Let go", () => cursor.release());
  const follow = () => {
    const step = cursor.steps[cursor.index].toLocaleString("en");
    label.textContent = cursor.active ? `Step ${step}${cursor.pinned ? ", held" : ""}` : `Latest, step ${step}`;
    slider.max = cursor.steps.length - 1;
    slider.value = cursor.index;
    slider.setAttribute("aria-valuetext", `step ${step}`);
    release.disabled = !cursor.pinned;
  };
  cursor.listeners.push(follow);
  follow();
  return element("div", { class: "step-bar" }, label, slider, release, ...actions);
}
