// Several runs side by side: their key numbers, and where their recipes differ.

function runLabel(run, i) {
  return element("span", { class: "run-name" }, element("i", { class: `swatch c${i % COLOURS}` }), run.name);
}

function standingPill(standing) {
  return element("span", { class: `pill ${standing.good ? "good" : "bad"}`, title: standing.reason }, standing.word);
}

function tileNode(tile) {
  const value = element("dd", {}, tile.value, element("small", {}, tile.caption));
  return element("div", { class: tile.lead ? "tile lead" : "tile" }, element("dt", {}, tile.title), value);
}

// A row for each key number, a column for each run.
function runsTable(runs) {
  const titles = [...new Set(runs.flatMap((run) => run.tiles.map((tile) => tile.title)))];
  const head = element("tr", {}, element("th", {}), ...runs.map((run, i) => element("th", { scope: "col" }, runLabel(run, i))));
  const standing = element("tr", {}, element("th", { scope: "row" }, "status"), ...runs.map((run) => element("td", {}, standingPill(run.standing), element("small", {}, run.standing.facts))));
  const rows = titles.map((title) => {
    const cells = runs.map((run) => {
      const tile = run.tiles.find((one) => one.title === title);
      return element("td", {}, tile ? tile.value : "–", tile ? element("small", {}, tile.caption) : null);
    });
    return element("tr", {}, element("th", { scope: "row" }, title), ...cells);
  });
  return element("div", { class: "wide" }, element("table", { class: "runs" }, element("thead", {}, head), element("tbody", {}, standing, ...rows)));
}

function differencesTable(runs, differences) {
  if (!differences.length) return element("p", { class: "empty" }, "Their recipes are the same.");
  const head = element("tr", {}, element("th", { scope: "col" }, "key"), ...runs.map((run, i) => element("th", { scope: "col" }, runLabel(run, i))));
  const rows = differences.map(({ key, values }) => {
    const cells = values.map((value) => element("td", value === null ? { class: "absent" } : {}, value ?? "not set"));
    return element("tr", {}, element("th", { scope: "row" }, key), ...cells);
  });
  return element("div", { class: "wide" }, element("table", { class: "differences" }, element("thead", {}, head), element("tbody", {}, ...rows)));
}
