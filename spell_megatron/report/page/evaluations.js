// Evaluations (of `spell evaluate`): cards, the paper's table, pass@k over k, and the numbers of each benchmark.

const { evaluations } = data;
const manyEvaluations = evaluations.length > 1;

const percent = (share) => grouped(share * 100, 1);
const withInterval = ([mean, low, high]) => [
  percent(mean),
  h("span", { class: "soft" }, ` (${percent(low)}–${percent(high)})`),
];
const evaluationChip = (index) =>
  h("span", { class: "chip" }, manyEvaluations ? swatch(runColour(index)) : null, evaluations[index].name);

function evaluationCard(evaluation, index) {
  const { facts, folder } = evaluation;
  const rows = Object.entries({ ...facts, folder }).filter(([, value]) => value !== null);
  return h(
    "article",
    { class: "card" },
    h("h3", {}, evaluationChip(index)),
    h(
      "dl",
      {},
      rows.flatMap(([label, value]) => [
        h("dt", {}, label),
        h("dd", {}, typeof value === "number" ? value.toLocaleString("en-US") : value),
      ]),
    ),
  );
}

/** A table in a box that can be scrolled. */
function evaluationTable(id, title, text, head, rows) {
  return h(
    "div",
    { class: "table", id, tabindex: 0, role: "region", "aria-label": title },
    h(
      "table",
      {},
      h("caption", {}, h("h3", {}, title), h("p", {}, text)),
      h("thead", {}, h("tr", {}, h("th", {}), head.map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, rows),
    ),
  );
}

/** The paper's columns, one row for each evaluation. */
function scoreTable(measure, k) {
  const at = (evaluation, column) => evaluation.columns[column]?.[measure].find(([of]) => of === k)?.slice(1);
  const best = data.evaluation_columns.map((column) => {
    const members = evaluations.filter((e) => at(e, column));
    const sets = new Set(members.map((e) => JSON.stringify(e.questions[column])));
    return members.length > 1 && sets.size === 1 ? Math.max(...members.map((e) => at(e, column)[0])) : null;
  });
  const rows = evaluations.map((evaluation, index) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, evaluationChip(index)),
      data.evaluation_columns.map((column, i) => {
        const estimate = at(evaluation, column);
        if (!estimate) return h("td", {}, "–");
        return h("td", { class: estimate[0] === best[i] ? "winner" : "" }, withInterval(estimate));
      }),
    ),
  );
  const compared = manyEvaluations ? " Bold: the highest, where all are of as many questions; their settings may differ." : "";
  const text = `In %; in brackets: ${evaluations[0].interval}.${compared}`;
  return evaluationTable("scores", `pass@${k}`, text, data.evaluation_columns, rows);
}

/** pass@k over k in one column, a curve with intervals for each evaluation. */
function passPlot(column, measure, hidden, redraw) {
  const members = evaluations
    .map(({ name, columns }, index) => ({ name, index, points: columns[column]?.[measure()] }))
    .filter(({ points }) => points);
  const ks = [...new Set(members.flatMap(({ points }) => points.map(([k]) => k)))].sort((a, b) => a - b);
  const legend = h("div", { class: "legend" });
  const plot = h("div", { class: "plot", role: "img", "aria-label": `pass@k, ${column}` });
  let chart = null;

  function draw() {
    const all = members.map(({ name, index }, i) => {
      const points = evaluations[index].columns[column][measure()];
      return {
        label: name,
        colour: runColour(index),
        dash: dash(index),
        hidden: hidden.has(index),
        toggle: () => {
          if (!hidden.delete(index)) hidden.add(index);
          redraw();
        },
        ks: points.map(([k]) => k),
        // side by side, so that no interval hides another
        x: points.map(([k]) => ks.indexOf(k) + 0.06 * (i - (members.length - 1) / 2)),
        smooth: points.map(([, mean]) => mean),
        bars: points.map(([, , low, high]) => [low, high]),
      };
    });
    const curves = all.filter((curve) => !curve.hidden);
    const values = fill(all);
    const bounds = curves.flatMap(({ bars }) => bars.flat());
    const [low, high] = bounds.length ? [Math.min(...bounds), Math.max(...bounds)] : [null, null];
    const [chartData] = align(curves.map((curve) => ({ ...curve, values: curve.smooth })), false, false);
    chart?.destroy();
    chart = new uPlot(
      {
        width: plot.clientWidth || 300,
        height: HEIGHT,
        padding: [10, 20, 0, 0],
        legend: { show: false },
        cursor: { y: false, drag: { x: false, y: false }, points: { size: 7 } },
        scales: {
          x: { time: false, range: () => [-0.4, ks.length - 0.6] },
          y: { range: () => valueRange("share", false, low, high, 0) },
        },
        axes: [
          { ...AXIS, size: 26, gap: 4, splits: () => ks.map((_, i) => i), values: () => ks.map((k) => `k = ${k}`) },
          valueAxis("share", false),
        ],
        series: [
          {},
          ...curves.map((curve) => ({
            label: curve.label,
            stroke: () => paint(`var(--${curve.colour})`),
            width: 2,
            dash: curve.dash,
            spanGaps: true,
            points: { show: true, size: 7 },
          })),
        ],
        hooks: {
          setCursor: [(u) => values(u.cursor.idx == null ? ks[0] : ks[Math.round(u.data[0][u.cursor.idx])])],
          ready: [() => values(ks[0])],
          draw: [(u) => curves.forEach((curve) => drawBars(u, curve.colour, curve.x, curve.bars))],
        },
      },
      chartData,
      plot,
    );
  }

  /** Makes the legend, and returns a function that shows the values at a k. */
  function fill(curves) {
    const at = h("span", { class: "at" });
    const cells = curves.map(() => h("span", { class: "value" }));
    legend.replaceChildren(...legendButtons(curves, cells, redraw), at);
    return (k) => {
      at.textContent = `pass@${k}`;
      curves.forEach((curve, i) => (cells[i].textContent = format(curve.smooth[curve.ks.indexOf(k)], "share")));
    };
  }

  new ResizeObserver(() => chart?.setSize({ width: plot.clientWidth, height: HEIGHT })).observe(plot);
  return [draw, h("article", { class: "panel" }, h("header", {}, h("h3", {}, column)), legend, plot)];
}

/** What stands behind the scores: each benchmark of each evaluation, and its parts. */
function benchmarkTable() {
  const names = [...new Set(evaluations.flatMap(({ benchmarks }) => Object.keys(benchmarks)))];
  const cell = (content) => h("td", {}, content);
  const share = (value) => cell(`${percent(value)}%`);
  const rows = names.flatMap((name) =>
    evaluations.flatMap(({ benchmarks }, index) => {
      const about = benchmarks[name];
      if (!about) return [];
      const label = (text) => h("th", { scope: "row" }, text, manyEvaluations ? [" · ", evaluationChip(index)] : null);
      const judged = `${about.judged.toLocaleString("en-US")} / ${about.judged_yes.toLocaleString("en-US")} / `;
      return [
        h(
          "tr",
          {},
          label(name),
          cell(`${about.questions.toLocaleString("en-US")} × ${about.samples}`),
          cell(withInterval(about.score)),
          cell(percent(about.rule[0])),
          cell(judged + about.judged_unparsable.toLocaleString("en-US")),
          share(about.answers_without_statement),
          share(about.answers_cut),
          share(about.prompts_cut),
          cell(about.answer_tokens === null ? "–" : grouped(about.answer_tokens, 0)),
        ),
        ...Object.entries(about.subsets).map(([subset, part]) =>
          h(
            "tr",
            {},
            label(`– ${subset}`),
            cell(`${part.questions.toLocaleString("en-US")} × ${about.samples}`),
            cell(withInterval(part.score)),
            ...Array.from({ length: 6 }, () => cell("")),
          ),
        ),
      ];
    }),
  );
  const head = ["questions × samples", "pass@1", "by rule", "judged / yes / unparsable"];
  head.push("no answer", "answers cut", "prompts cut", "tokens");
  const text = "pass@1 in %, with its interval; mean tokens of an answer.";
  return evaluationTable("benchmarks", "Benchmarks", text, head, rows);
}

function showEvaluations() {
  const element = section("evaluation", "Evaluation", "");
  element.append(h("div", { class: "cards" }, evaluations.map(evaluationCard)));
  const judged = evaluations.some(({ facts }) => facts.judge);
  const curves = evaluations.flatMap(({ columns }) => Object.values(columns));
  const ks = new Set(curves.flatMap(({ score }) => score.map(([k]) => k)));
  const chooseMeasure = h(
    "select",
    { id: "measure", onchange: () => redraw() },
    h("option", { value: "score" }, judged ? "better of rule and judge" : "rule"),
    judged ? h("option", { value: "rule" }, "rule alone") : null,
  );
  const chooseK = h(
    "select",
    { id: "k", onchange: () => redraw() },
    [...ks].sort((a, b) => a - b).map((k) => h("option", { value: k }, `pass@${k}`)),
  );
  const table = h("div");
  const hidden = new Set();
  const plots = data.evaluation_columns.map((column) => passPlot(column, () => chooseMeasure.value, hidden, redraw));
  function redraw() {
    table.replaceChildren(scoreTable(chooseMeasure.value, +chooseK.value));
    plots.forEach(([draw]) => draw());
  }
  redraws.push(redraw);
  element.append(
    h("div", { class: "filters" }, h("label", {}, "Score", chooseMeasure), h("label", {}, "Table of", chooseK)),
    table,
    h("div", { class: "grid" }, plots.map(([, panel]) => panel)),
    benchmarkTable(),
  );
}
