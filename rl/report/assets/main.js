// Puts the views into the page, and keeps them up to date where a server sends what is new.

const POLL_MS = 2000;
const data = JSON.parse(document.getElementById("run-data").textContent);
const { runs, live } = data;
const names = runs.map((run) => run.name);
const sources = runs.map((_, number) => new Source(number, live));

const cursor = new Cursor([0]);
const curves = new CurvesView(cursor);
const coldCursor = new Cursor([0]);
const coldCurves = new CurvesView(coldCursor);
const timelines = runs.map(() => new TimelineView());
const reader = new Reader(names, runs.map((run) => run.clip));
const numbers = stepTable();
const alarms = new AlarmsView((step) => {
  openTab("curves");
  cursor.move(nearest(cursor.steps, step), { pin: true });
});

const place = (id) => document.getElementById(id);

function showCurves() {
  const trained = runs.map((run) => run.metrics);
  const { steps, sections } = figuresOf(trained, names, sectionsOf);
  place("curves-empty").hidden = steps.length > 0;
  for (const node of [place("step-bar"), numbers]) node.hidden = !steps.length;
  if (steps.length) {
    cursor.extend(steps);
    cursor.alarms = runs.flatMap((run) => alarmsOf(run.alarms).flatMap(({ metric, times }) => times.map((time) => ({ metric, ...time }))));
    curves.show(sections);
    cursor.notify();
  }
  const cold = figuresOf(runs.map((run) => run.supervised), names, supervisedSections);
  if (!cold.steps.length) return;
  coldCursor.extend(cold.steps);
  coldCurves.show(cold.sections);
  coldCursor.notify();
}

// Every metric of the step under the cursor, a column for each run.
function stepTable() {
  const body = element("tbody");
  const details = element("details", { class: "numbers" }, element("summary", {}, "Every number of this step"), element("table", {}, body));
  const fill = () => {
    if (!details.open) return;
    const step = cursor.steps[cursor.index];
    const all = [...new Set(runs.flatMap((run) => Object.keys(run.metrics.columns)))];
    const cells = (name) => runs.map(({ metrics }) => metrics.columns[name]?.[metrics.steps.indexOf(step)]);
    const head = runs.length > 1 ? [element("tr", {}, element("th", {}), ...names.map((name) => element("th", {}, name)))] : [];
    body.replaceChildren(...head, ...all.map((name) => element("tr", {}, element("th", { scope: "row" }, name), ...cells(name).map((value) => element("td", {}, known(value) ? significant(value, 6) : "–")))));
  };
  details.addEventListener("toggle", fill);
  cursor.listeners.push(fill);
  return details;
}

function showStanding() {
  alarms.show(runs.flatMap((run) => run.alarms.map((alarm) => (runs.length > 1 ? { ...alarm, run: run.name } : alarm))));
  if (runs.length > 1) {
    place("tiles").hidden = true;
    place("comparison").replaceChildren(runsTable(runs));
  } else if (live) {
    const { standing, tiles } = runs[0];
    place("tiles").replaceChildren(...tiles.map(tileNode));
    const reason = standing.reason ? element("span", { class: "reason" }, standing.reason) : null;
    place("standing").replaceChildren(standingPill(standing), ...[reason].filter(Boolean), element("span", { class: "facts" }, standing.facts));
  }
  const notes = runs.flatMap((run) => run.notes.map((note) => (runs.length > 1 ? `${run.name}: ${note}` : note)));
  place("notes").replaceChildren(...notes.map((note) => element("li", {}, note)));
}

function showTimeline(number, columns) {
  if (!columns.actor.length) return;
  place("timeline-empty").hidden = true;
  if (!timelines[number].node.isConnected) {
    const title = runs.length > 1 ? [element("h3", {}, runLabel(runs[number], number))] : [];
    place("timelines").append(...title, timelines[number].node);
  }
  timelines[number].add(columns);
}

function showRecipes() {
  if (runs.length > 1) place("differences").append(element("h3", {}, "Where they differ"), differencesTable(runs, data.differences));
  for (const run of runs) {
    const text = element("pre", { class: "recipe" }, run.recipe || "(no recipe.yaml)");
    const node = runs.length > 1 ? element("details", {}, element("summary", {}, `recipe.yaml of ${run.name}`), text) : text;
    place("recipes").append(node);
  }
}

// Tabs: each section by its name in the address, so that a link can lead to it.
const TABS = ["curves", "timeline", "trajectories", "recipe"];

function openTab(name, { push = true } = {}) {
  for (const tab of TABS) {
    place(tab).hidden = tab !== name;
    document.querySelector(`nav a[href="#${tab}"]`).setAttribute("aria-current", tab === name ? "page" : "false");
  }
  if (push && location.hash.slice(1).split("/")[0] !== name) history.replaceState(null, "", `#${name}`);
  if (name === "timeline") timelines.forEach((timeline) => timeline.soon());
}

function openAddress() {
  const [tab, ...rest] = location.hash.slice(1).split("/");
  openTab(TABS.includes(tab) ? tab : TABS[0], { push: false });
  if (tab === "trajectories" && rest.length) reader.openNamed(rest.join("/"));
}

function themeButton(node) {
  const themes = ["auto", "light", "dark"];
  let at = 0;
  node.addEventListener("click", () => {
    at = (at + 1) % themes.length;
    document.documentElement.dataset.theme = themes[at];
    node.textContent = `Theme: ${themes[at]}`;
    timelines.forEach((timeline) => timeline.soon());
  });
}

function append(table, more) {
  const before = table.steps.length;
  table.steps.push(...more.steps);
  for (const name of new Set([...Object.keys(table.columns), ...Object.keys(more.columns)])) {
    table.columns[name] ??= new Array(before).fill(null);
    table.columns[name].push(...(more.columns[name] ?? new Array(more.steps.length).fill(null)));
  }
}

// Asks for what came since and shows it; true when there is more to ask for at once.
async function follow(number) {
  const run = runs[number];
  run.seen ??= { spans: 0, samples: -1 };
  const last = (table) => table.steps.at(-1) ?? -1;
  const seen = { epoch: data.epochs[number], metrics: last(run.metrics), supervised: last(run.supervised), alarms: run.alarms.length, ...run.seen };
  const news = await ask(`run/${number}/news?${new URLSearchParams(seen)}`);
  if (news.reset) {
    location.reload();
    return false;
  }
  const grown = news.metrics.steps.length + news.supervised.steps.length + news.alarms.length > 0;
  append(run.metrics, news.metrics);
  append(run.supervised, news.supervised);
  run.alarms.push(...news.alarms);
  Object.assign(run, { standing: news.standing, tiles: news.tiles });
  run.seen = { spans: run.seen.spans + news.spans.actor.length, samples: news.samples };
  showStanding();
  if (grown) showCurves();
  showTimeline(number, news.spans);
  if (news.index.length) reader.add(number, sources[number], news.index, { more: news.more });
  return news.more;
}

async function followAll() {
  let wait = POLL_MS;
  try {
    const more = await Promise.all(runs.map((_, number) => follow(number)));
    if (more.some(Boolean)) wait = 0;
    place("link").hidden = true;
  } catch (error) {
    place("link").hidden = false;
    place("link").textContent = visible(`No answer from the server (${error.message}); trying again.`);
  }
  setTimeout(followAll, document.hidden ? 5 * POLL_MS : wait);
}

async function unpackBlocks() {
  await Promise.all(
    runs.map(async (_, number) => {
      showTimeline(number, await sources[number].block("timeline"));
      reader.add(number, sources[number], await sources[number].block("index"));
    }),
  );
  openAddress();
}

const filter = element("input", { type: "search", placeholder: "Filter curves", "aria-label": "Filter curves", on: { input: () => curves.filter(filter.value) } });
const read = button("Read its trajectories", () => {
  reader.goTo(cursor.steps[cursor.index]);
  openTab("trajectories");
});
place("step-bar").append(stepBar(cursor, [read, filter]));
place("charts").append(curves.node, numbers, coldCurves.node);
place("alarms").append(alarms.node);
place("reader").append(reader.node);
themeButton(place("theme"));
window.addEventListener("hashchange", openAddress);
openAddress();
showStanding();
showCurves();
showRecipes();
reader.apply();
if (live) followAll();
else unpackBlocks().catch((error) => (place("link").hidden = false, place("link").textContent = visible(`Trajectories and timeline cannot be unpacked: ${error.message}`)));
document.documentElement.dataset.ready = "true";
