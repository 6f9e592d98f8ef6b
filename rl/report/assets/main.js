// Fills the page's sections from the embedded data.

const data = JSON.parse(document.getElementById("run-data").textContent);

function addSection(parent, { title, figures }, cursor) {
  const grid = element("div", { class: "grid-of-charts" }, ...figures.map((figure) => new Chart(figure, cursor).node));
  parent.append(element("h3", { class: "group" }, title), grid);
}

function stepTable(table, cursor) {
  const body = element("tbody");
  const details = element("details", { class: "numbers" }, element("summary", {}, "Every number of this step"), element("table", {}, body));
  const fill = () => {
    if (!details.open) return;
    const rows = Object.entries(table.columns).map(([name, values]) => {
      const value = values[cursor.index];
      return element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, value === null ? "–" : significant(value, 6)));
    });
    body.replaceChildren(...rows);
  };
  details.addEventListener("toggle", fill);
  cursor.listeners.push(fill);
  return details;
}

// Stays in sight while the curves scroll by: which step is read, and a slider that the keyboard can move.
function stepBar(table, cursor, reader) {
  const label = element("output", { class: "at" });
  const slider = element("input", { type: "range", min: 0, max: table.steps.length - 1, "aria-label": "Step" });
  slider.addEventListener("input", () => cursor.move(Number(slider.value), { pin: true }));
  const release = element("button", { type: "button", class: "quiet", on: { click: () => cursor.release() } }, "Let go");
  const read = element("button", { type: "button", class: "quiet", on: { click: () => reader.goTo(cursor.steps[cursor.index]) } }, "Read its trajectories");
  const follow = () => {
    const step = cursor.steps[cursor.index].toLocaleString("en");
    label.textContent = cursor.active ? `Step ${step}${cursor.pinned ? ", held" : ""}` : `Latest, step ${step}`;
    slider.value = cursor.index;
    slider.setAttribute("aria-valuetext", `step ${step}`);
    release.disabled = !cursor.pinned;
  };
  cursor.listeners.push(follow);
  follow();
  return element("div", { class: "step-bar" }, label, slider, release, reader ? read : null);
}

function themeButton(button) {
  const themes = ["auto", "light", "dark"];
  let at = 0;
  button.addEventListener("click", () => {
    at = (at + 1) % themes.length;
    document.documentElement.dataset.theme = themes[at];
    button.textContent = `Theme: ${themes[at]}`;
  });
}

const curves = document.getElementById("curves");
const trajectories = document.getElementById("trajectories");
const reader = data.trajectories.length ? new Reader(data.trajectories) : null;
trajectories.append(reader ? reader.node : element("p", { class: "empty" }, "This run has not recorded any trajectories."));

if (data.metrics.steps.length) {
  const cursor = new Cursor(data.metrics.steps);
  curves.append(stepBar(data.metrics, cursor, reader));
  for (const section of sectionsOf(data.metrics.columns)) addSection(curves, section, cursor);
  curves.append(stepTable(data.metrics, cursor));
}
if (data.supervised.steps.length) addSection(curves, supervisedSection(data.supervised.columns), new Cursor(data.supervised.steps));
themeButton(document.getElementById("theme"));
