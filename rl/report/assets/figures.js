// Which metrics are drawn together, and what each figure says. A * in a name stands for one word between slashes.

const SECTIONS = [
  {
    title: "Learning",
    figures: [
      { title: "Reward", about: "Mean over the samples of a step.", keys: ["reward/mean", "reward/*"], format: "score", smooth: true, distinct: true },
      { title: "Held-out accuracy", about: "On prompts that are never trained on.", keys: ["eval/*"], format: "share", zero: true },
      { title: "Accuracy in training", about: "Share of samples on which the first reward reaches 1.", keys: ["accuracy/*"], format: "share", zero: true, smooth: true },
      { title: "Reply length", about: "Mean tokens the policy wrote.", keys: ["length/mean"], format: "count", zero: true },
      { title: "Truncated replies", about: "Share of samples that reached a length limit.", keys: ["length/truncated"], format: "share", zero: true },
      { title: "Entropy", about: "Nats per sampled token.", keys: ["entropy"], format: "score", zero: true },
      { title: "Reward parts", about: "Each reward function's own value, before its weight.", keys: ["reward/*/*", "reward/*/*/*"], format: "score", smooth: true },
      { title: "Shares of the reward", about: "Of its spread within groups, by reward.", keys: ["reward_share/*/*"], format: "share", zero: true },
      { title: "Groups without variance", about: "Share whose samples all earned the same.", keys: ["groups/zero_variance"], format: "share", zero: true },
      { title: "Groups and samples lost", about: "Failed or replaced in a step.", keys: ["groups/*", "samples/*"], format: "count", zero: true, named: true },
    ],
  },
  {
    title: "Stability",
    figures: [
      { title: "Alarms that are on", about: "How many of the run's own checks have raised one.", keys: ["alarms/active"], format: "count", zero: true },
      { title: "Engine and learner mismatch", about: "Mean |log-probability difference| per token, in nats.", keys: ["mismatch/logprob_abs"], format: "number", zero: true },
      { title: "Canary prompts", about: "The same on fixed prompts, both sides with equal weights.", keys: ["canary/logprob_abs", "canary/max", "canary/kl"], format: "number", zero: true },
      { title: "Mismatch KL", about: "Of the engine's policy to the learner's, nats per token.", keys: ["mismatch/kl"], format: "number", zero: true },
      { title: "Masked and clipped", about: "Off-policy sequences and clipped tokens.", keys: ["mask/off_policy", "ratio/clipped"], format: "share", zero: true },
      { title: "Importance ratio", about: "Mean of learner over rollout probability.", keys: ["ratio/mean"], format: "score" },
      { title: "KL to the reference", about: "Unbiased estimate, nats per token.", keys: ["kl/reference"], format: "number", zero: true },
      { title: "KL in the loss", about: "The same, times each domain's strength.", keys: ["loss/kl"], format: "number", zero: true },
      { title: "Loss", about: "Policy surrogate and total, to be minimised.", keys: ["loss/policy", "loss/total"], format: "number" },
      { title: "Indexer loss", about: "KL of the indexer to the attention it selects for.", keys: ["loss/indexer"], format: "number", zero: true },
      { title: "Gradient norm", about: "Before clipping.", keys: ["grad_norm"], format: "number", zero: true },
      { title: "Updates skipped", about: "Optimizer steps whose loss or gradient was not finite.", keys: ["learn/skipped"], format: "count", zero: true },
      { title: "Kept-set size", about: "Mean tokens that truncated sampling left to choose from.", keys: ["kept/mean_size"], format: "number", zero: true },
      { title: "Kept-set share", about: "Share of sampled tokens with a recorded kept set.", keys: ["kept/share"], format: "share", zero: true },
      { title: "Routes replayed", about: "Share of tokens trained with the engine's expert choices.", keys: ["routes/replayed"], format: "share", zero: true },
      { title: "Selections", about: "Attended keys replayed, and which the learner would have chosen too.", keys: ["selections/replayed", "selections/identical"], format: "share", zero: true },
      { title: "Staleness", about: "Weight versions between sampling and training.", keys: ["staleness/mean", "staleness/max"], format: "number", zero: true },
    ],
  },
  {
    title: "Time and throughput",
    figures: [
      { title: "Time per step", about: "What a step spends its time on.", keys: ["time/rollout_s", "time/handover_s", "time/learn_s", "time/sync_s", "time/canary_s", "time/evaluate_s"], outline: "time/step_s", format: "seconds", stack: true },
      { title: "Inside learning", about: "On a rank, mean over ranks.", keys: ["time/forward_s", "time/backward_s", "time/optimizer_s"], outline: "time/learn_s", format: "seconds", stack: true },
      { title: "Idle", about: "Seconds of a step with nothing to do.", keys: ["time/learner_idle_s", "time/engines_idle_s"], format: "seconds", zero: true },
      { title: "Scoring", about: "From a group's last token to its rewards.", keys: ["time/reward_s"], format: "seconds", zero: true },
      { title: "Checkpoint in the step", about: "Copying it to host memory, and waiting for the one before it.", keys: ["time/checkpoint_s"], format: "seconds", zero: true },
      { title: "Checkpoint beside the steps", about: "From its copy in host memory to its last byte on the disk.", keys: ["checkpoint/seconds"], format: "seconds", zero: true },
      { title: "Checkpoint size", about: "Bytes of the latest checkpoint.", keys: ["checkpoint/bytes"], format: "bytes", zero: true },
      { title: "Other times", about: "Seconds in a step.", keys: ["time/*"], format: "seconds", zero: true, labelled: true },
      { title: "Generation speed", about: "Tokens per second, over the step and while engines were busy.", keys: ["tokens_per_s", "speed/engines_tokens_per_s"], format: "count", zero: true },
      { title: "Learner's arithmetic", about: "10¹² operations a second and rank.", keys: ["speed/learner_tflops"], format: "number", zero: true },
      { title: "Learner's MFU", about: "Share of the GPU's dense bf16 peak.", keys: ["speed/learner_mfu"], format: "share", zero: true },
      { title: "GPU memory", about: "10⁹ bytes, the most over ranks and engines.", keys: ["memory/*"], format: "number", zero: true, labelled: true },
      { title: "Tokens", about: "Generated and trained in a step.", keys: ["tokens/*"], format: "count", zero: true },
      { title: "Weights sent", about: "Bytes of a weight sync.", keys: ["sync/bytes"], format: "bytes", zero: true },
      { title: "Weight syncs verified", about: "1 when the checksums of engine and learner agree.", keys: ["sync/verified"], format: "number", zero: true },
      { title: "Weight version", about: "That the engines generate with.", keys: ["sync/version"], format: "count", zero: true },
      { title: "Learning rate", about: "After warm-up and schedule.", keys: ["lr"], format: "number", zero: true },
    ],
  },
  {
    title: "Faults",
    about: "What failed and was dealt with, counted in each step. Those that never happened are left out.",
    figures: [
      { title: "Engines restarted", about: "Their process was gone.", keys: ["faults/engine_restarts"] },
      { title: "Engines lost", about: "Given up after too many restarts.", keys: ["faults/engines_lost"] },
      { title: "Requests reissued", about: "From their beginning, because their engine died.", keys: ["faults/reissued"] },
      { title: "Reward workers ended", about: "Crashed, or killed for a call that took too long.", keys: ["faults/reward_workers"] },
      { title: "Tools that failed", about: "Episodes whose environment died or did not answer.", keys: ["faults/tools"] },
      { title: "Late phases", about: "Took longer than the hang doctor allows.", keys: ["faults/late"] },
      { title: "Learner restored", about: "From a checkpoint, times so far.", keys: ["faults/learner_restores"] },
      { title: "Checkpoints not written", about: "So far.", keys: ["faults/checkpoints_failed"] },
      { title: "Other faults", about: "", keys: ["faults/*"], labelled: true },
    ].map((figure) => ({ ...figure, format: "count", zero: true, onlyAboveZero: true })),
  },
];

const COLOURS = 6;

function hasValues(values) {
  return values?.some(known) ?? false;
}

// "reward/math" under "Reward" reads "math", "staleness/max" reads "max"; names that people chose stay as they are.
function shortLabel(key, figure) {
  if (figure.named) return key.replaceAll("_", " ");
  const last = key.split("/").slice(1).join("/") || key;
  if (!figure.stack && !figure.labelled && figure.keys.some((name) => name.includes("*"))) return last;
  return last.replace(/_per_s$/, "_a_second").replace(/_s$/, "").replaceAll("_", " ");
}

function matching(key, names) {
  const words = key.split("/");
  return names.filter((name) => {
    const parts = name.split("/");
    return parts.length === words.length && words.every((word, i) => word === "*" || word === parts[i]);
  });
}

// The figure with the curves it finds. What an outline shows may be drawn as one, or elsewhere, too.
function withSeries(figure, columns, used) {
  const wanted = figure.keys.flatMap((key) => matching(key, Object.keys(columns)));
  const isNew = (name) => name !== figure.outline && !used.has(name) && hasValues(columns[name]);
  const found = [...new Set(wanted)].filter(isNew);
  found.forEach((name) => used.add(name));
  const names = figure.onlyAboveZero ? found.filter((name) => columns[name].some((value) => value > 0)) : found;
  if (figure.distinct && names.length === 2 && String(columns[names[0]]) === String(columns[names[1]])) names.pop(); // one domain
  const series = names.map((name, i) => ({ label: shortLabel(name, figure), values: columns[name], colour: `c${i % COLOURS}` }));
  let outline = null;
  if (figure.outline && hasValues(columns[figure.outline]) && (series.length || !used.has(figure.outline))) {
    used.add(figure.outline);
    outline = { label: shortLabel(figure.outline, figure), values: columns[figure.outline], colour: "ink" };
  }
  const shown = { ...figure, names: [...names, figure.outline ?? ""], series, outline };
  if (!series.length && outline) return { ...shown, stack: false, series: [{ ...outline, colour: "c0" }], outline: null };
  return shown;
}

function otherFigures(columns, used) {
  const names = Object.keys(columns).filter((name) => !used.has(name) && hasValues(columns[name]));
  return names.map((name) => ({ title: name, names: [name], about: "", format: "number", series: [{ label: name, values: columns[name], colour: "c0" }], outline: null }));
}

// Every section with at least one curve. A metric that no figure names gets one of its own under "Other".
function sectionsOf(columns) {
  const used = new Set();
  const sections = SECTIONS.map(({ title, about, figures }) => ({
    title,
    about,
    figures: figures.map((figure) => withSeries(figure, columns, used)).filter((figure) => figure.series.length),
  }));
  sections.push({ title: "Other", figures: otherFigures(columns, used) });
  return sections.filter((section) => section.figures.length);
}

const SUPERVISED = [
  { title: "Supervised loss", about: "Next-token loss on the demonstrations, nats per token.", keys: ["loss/supervised"], format: "number" },
  { title: "Supervised indexer loss", about: "KL of the indexer to the attention it selects for.", keys: ["loss/indexer"], format: "number", zero: true },
  { title: "Total loss", about: "What the optimizer minimises.", keys: ["loss/total"], format: "number" },
  { title: "Gradient norm", about: "Before clipping.", keys: ["grad_norm"], format: "number", zero: true },
  { title: "Learning rate", about: "After warm-up and schedule.", keys: ["lr"], format: "number", zero: true },
  { title: "Updates skipped", about: "Steps whose loss or gradient was not finite.", keys: ["learn/skipped"], format: "count", zero: true },
  { title: "Tokens", about: "Trained in a step.", keys: ["tokens/trained"], format: "count", zero: true },
];

function supervisedSections(columns) {
  const used = new Set();
  const named = SUPERVISED.map((figure) => withSeries(figure, columns, used)).filter((figure) => figure.series.length);
  return [{ title: "Cold start", figures: [...named, ...otherFigures(columns, used)] }];
}

// The tables of several runs over all of their steps; undefined where a run has no such step.
function joined(tables) {
  const steps = [...new Set(tables.flatMap((table) => table.steps))].sort((a, b) => a - b);
  const place = new Map(steps.map((step, i) => [step, i]));
  const columns = tables.map((table) => {
    const spread = (values) => {
      const all = new Array(steps.length).fill(undefined);
      table.steps.forEach((step, i) => (all[place.get(step)] = values[i]));
      return all;
    };
    return Object.fromEntries(Object.entries(table.columns).map(([name, values]) => [name, spread(values)]));
  });
  return { steps, columns };
}

// One figure for each metric of a section, with a curve for each run that has it.
function comparedSection({ title, about: what, figures }, columns, names) {
  const compare = (figure, name) => {
    const series = columns.flatMap((of, i) => (hasValues(of[name]) ? [{ label: names[i], values: of[name], colour: `c${i % COLOURS}` }] : []));
    const single = figure.names.filter(Boolean).length === 1;
    const about = single ? figure.about : `${figure.title}. ${figure.about}`;
    return { ...figure, title: single ? figure.title : name, about, names: [name], series, labelled: true, stack: false, outline: null };
  };
  return { title, about: what, figures: figures.flatMap((figure) => figure.names.filter(Boolean).map((name) => compare(figure, name))) };
}

// Sections for the tables of one run or several; ``sections`` makes them of columns.
function figuresOf(tables, names, sections) {
  if (tables.length === 1) return { steps: tables[0].steps, sections: sections(tables[0].columns) };
  const { steps, columns } = joined(tables);
  const every = {};
  for (const [name, values] of columns.flatMap(Object.entries)) {
    if (!every[name]?.some((value) => value > 0)) every[name] = values; // rather of a run that has something to show
  }
  return { steps, sections: sections(every).map((section) => comparedSection(section, columns, names)) };
}
