// Plots: a panel with a choice of curves, a legend with values, and a canvas.

/** A piece of a line, as it is drawn in a plot. */
function stroke(colour, pattern = []) {
  const line = h("span", { class: "stroke" });
  const stops = [];
  let at = 0;
  pattern.forEach((length, i) => {
    stops.push(`${i % 2 ? "transparent" : `var(--${colour})`} ${at}px ${at + length}px`);
    at += length;
  });
  line.style.background = stops.length ? `repeating-linear-gradient(to right, ${stops.join(", ")})` : `var(--${colour})`;
  return line;
}

const probe = h("span", { hidden: true });
document.body.append(probe);
const resolved = new Map();
/** What a canvas can paint with: the colour that a CSS expression has in the present theme. */
function paint(expression) {
  if (!resolved.has(expression)) {
    probe.style.color = expression;
    resolved.set(expression, getComputedStyle(probe).color);
  }
  return resolved.get(expression);
}

const HEIGHT = 248;
const DASHES = [[], [9, 4], [2, 3], [10, 3, 2, 3]]; // curves differ by more than their colour
/** Dashes of the curve with this number: where colours begin again, they shift. */
const dash = (index) => DASHES[(index + Math.floor(index / RUN_COLOURS.length)) % DASHES.length];
const MOST_BARS = 60; // a stack over so many steps is drawn as bars

const measured = (curve) => runs.some((run) => column(run, curve.metrics));
const nonzero = (curve) => runs.some((run) => column(run, curve.metrics)?.some((value) => value));

/** Groups of a panel with the curves that some run has; of many, those that are zero throughout are left out. */
function present(groups) {
  const kept = Object.entries(groups).map(([label, curves]) => [
    label,
    curves.filter((curve) => measured(curve) && (curves.length <= 3 || nonzero(curve))),
  ]);
  return kept.filter(([, curves]) => curves.length);
}

/** Choices of a panel: with one run its groups, with several each single curve, which all runs then share. */
function choices(groups) {
  if (!several) return groups.map(([label, curves]) => ({ label, curves }));
  return groups.flatMap(([label, curves]) =>
    curves.map((curve) => ({
      group: curves.length > 1 && groups.length > 1 ? label : "",
      label: curves.length > 1 || !label ? curve.label : label,
      curves: [curve],
    })),
  );
}

function chooser(options, title, onchange) {
  if (options.length < 2) return null;
  const select = h("select", { "aria-label": `Curves of ${title}`, onchange });
  const sections = new Map();
  options.forEach((option, i) => {
    const item = h("option", { value: i }, option.label);
    if (!option.group) return select.append(item);
    if (!sections.has(option.group)) {
      sections.set(option.group, h("optgroup", { label: option.group }));
      select.append(sections.get(option.group));
    }
    sections.get(option.group).append(item);
  });
  return select;
}

/** The curves to be drawn now: label, colour, steps, values, smooth (averaged values), and what a click hides. */
function curvesOf(panel, choice, off) {
  const width = panel.sparse ? 1 : state.window;
  const curve = (run, index, series, drawn) => {
    const values = column(run, series.metrics);
    const x = positions(run);
    if (!values || !x) return null;
    const error = series.error ? run.metrics[series.error] : null;
    return { run: index, error, x, steps: run.steps, values, smooth: average(values, width), ...drawn };
  };
  if (several) {
    return runs
      .map((run, i) => {
        const toggle = () => toggleRun(i);
        const drawn = { label: run.name, colour: runColour(i), dash: dash(i), hidden: state.hidden.has(i), toggle };
        return curve(run, i, choice.curves[0], drawn);
      })
      .filter(Boolean);
  }
  return choice.curves
    .map((series, i) => {
      const toggle = (redraw) => {
        if (!off.delete(series.label)) off.add(series.label);
        redraw();
      };
      const { label, colour } = series;
      return curve(runs[0], 0, series, { label, colour, dash: dash(i), hidden: off.has(label), toggle });
    })
    .filter(Boolean);
}

function toggleRun(index) {
  if (!state.hidden.delete(index)) state.hidden.add(index);
  redrawAll();
}

/** Entries of a legend, each with the cell that its value will be in. */
function legendButtons(curves, cells, redraw, areas = false) {
  return curves.map((curve, i) =>
    h(
      "button",
      { type: "button", "aria-pressed": String(!curve.hidden), onclick: () => curve.toggle(redraw) },
      areas ? swatch(curve.colour) : stroke(curve.colour, curve.dash),
      curve.label,
      cells[i],
    ),
  );
}

/** One panel: title, choice of curves, numbers to save, legend with values, plot. */
function plotPanel(panel, groups) {
  const options = choices(groups);
  const select = chooser(options, panel.title, () => draw());
  const legend = h("div", { class: "legend" });
  const plot = h("div", { class: "plot" });
  const off = new Set();
  const stacked = panel.stacked && !several;
  let chart = null;
  let curves = [];

  function draw() {
    const all = curvesOf(panel, options[select ? +select.value : 0], off);
    curves = all.filter((curve) => !curve.hidden);
    chart?.destroy();
    const values = fillLegend(all, draw);
    const [chartData, shown] = align(curves, stacked, panel.log);
    chart = new uPlot(
      plotOptions(panel, curves, shown, stacked, chartData[0], plot.clientWidth, values),
      chartData,
      plot,
    );
    reachPlot(chart, () => curves);
  }

  /** Makes the legend, and returns a function that shows the values at a place of the axis (null: the last ones). */
  function fillLegend(curves, redraw) {
    const at = h("span", { class: "at" });
    const cells = curves.map(() => h("span", { class: "value" }));
    legend.replaceChildren(...legendButtons(curves, cells, redraw, stacked), at);
    const digits = legendDigits(curves, panel.unit);
    const last = Math.max(0, ...curves.map((curve) => curve.x[lastIndex(curve.smooth)] ?? 0));
    return (x) => {
      curves.forEach((curve, i) => {
        const index = x === null ? lastIndex(curve.smooth) : indexAt(curve, x);
        cells[i].textContent = format(curve.smooth[index], panel.unit, panel.log ? undefined : digits);
      });
      const step = several || state.axis === "steps" ? "" : `, step ${curves[0]?.steps[indexAt(curves[0], x ?? last)]}`;
      at.textContent = placeText(x ?? last) + step;
      if (document.activeElement === plot) plot.setAttribute("aria-valuetext", spoken(curves, cells, at));
    };
  }

  redraws.push(draw);
  new ResizeObserver(() => chart?.setSize({ width: plot.clientWidth, height: HEIGHT })).observe(plot);
  plotKeys(plot, panel.title, () => chart, () => curves);
  return h(
    "article",
    { class: "panel" },
    h(
      "header",
      {},
      h("h3", {}, panel.title),
      h("div", { class: "tools" }, select, csvButton(panel.title, () => csvOfCurves(curves))),
    ),
    panel.text ? h("p", { class: "about" }, panel.text) : null,
    legend,
    plot,
  );
}

const spoken = (curves, cells, at) =>
  [at.textContent, ...curves.map(({ label }, i) => `${label} ${cells[i].textContent}`)].join(", ");

/** Digits after the point of all values in a legend. */
function legendDigits(curves, unit) {
  const all = curves.flatMap((curve) => curve.smooth);
  if (unit === "number" && all.every((value) => value === null || Number.isInteger(value))) return 0;
  const spans = curves.map(({ smooth }) => extent(smooth)).filter(([low]) => low !== null);
  const last = curves.map(({ smooth }) => Math.abs(smooth[lastIndex(smooth)] ?? 0));
  const apart = spans.map(([low, high]) => high - low).filter((span) => span > 0);
  return digitsFor(Math.max(0, ...last), unit, apart.length ? Math.min(...apart) : 0);
}

/** The record of a curve at a place of the axis: on the axis of steps at it, on others at it or before; -1 for none. */
function indexAt({ x }, place) {
  if (state.axis === "steps") return x.indexOf(place);
  return place > x.at(-1) ? -1 : x.findLastIndex((value) => value <= place);
}

/** Columns for uPlot over all places of the curves on the axis: [places, ...], and what each column shows. */
function align(curves, stacked, log) {
  const steps = [...new Set(curves.flatMap((curve) => curve.x))].sort((a, b) => a - b);
  const place = new Map(steps.map((step, i) => [step, i]));
  const spread = (curve, values) => {
    const wide = new Array(steps.length).fill(null);
    curve.x.forEach((step, i) => (wide[place.get(step)] = log && values[i] <= 0 ? null : values[i]));
    return wide;
  };
  if (!stacked) {
    // single steps stand faintly behind averages
    const faint = state.window > 1 ? curves.filter((curve) => curve.smooth !== curve.values) : [];
    const columns = [...faint.map((c) => spread(c, c.values)), ...curves.map((c) => spread(c, c.smooth))];
    const shown = [...faint.map((curve) => ({ curve, faint: true })), ...curves.map((curve) => ({ curve }))];
    return [[steps, ...columns], shown];
  }
  const wide = curves.map((curve) => spread(curve, curve.smooth));
  const sum = steps.map((_, i) => (wide.some((column) => column[i] !== null) ? 0 : null));
  const stack = wide.map((column) => column.map((v, i) => (sum[i] === null ? null : (sum[i] += v ?? 0))));
  // the highest is painted first, the others over it
  return [[steps, ...stack.reverse()], curves.map((curve) => ({ curve })).reverse()];
}

function plotOptions(panel, curves, shown, stacked, steps, width, values) {
  const bars = stacked && steps.length <= MOST_BARS;
  const margin = steps.length === 1 ? 0.5 : bars ? (steps.at(-1) - steps[0]) / (2 * steps.length - 2) : 0;
  const error = Math.max(0, ...curves.flatMap((curve) => curve.error ?? []));
  const series = shown.map(({ curve, faint }) => ({
    label: curve.label,
    stroke: () => paint(stacked ? "var(--panel)" : `var(--${curve.colour})`),
    fill: stacked ? () => paint(`color-mix(in srgb, var(--${curve.colour}) 78%, var(--panel))`) : undefined,
    width: stacked || faint ? 1 : 2,
    dash: stacked || faint ? undefined : curve.dash,
    alpha: faint ? 0.24 : 1,
    spanGaps: true,
    paths: bars ? uPlot.paths.bars({ size: [0.8, 60] }) : undefined,
    points: { show: !faint && (panel.sparse || steps.length === 1), size: 7 },
  }));
  return {
    width: width || 300,
    height: HEIGHT,
    padding: [10, 20, 0, 0],
    legend: { show: false },
    cursor: {
      y: false,
      sync: { key: "steps", scales: ["x", null] },
      points: { size: (u, i) => (stacked || shown[i - 1].faint ? 0 : 7) },
    },
    scales: {
      x: { time: false, range: (u, low, high) => [low - margin, high + margin] },
      y: panel.log ? { distr: 3 } : { range: (u, low, high) => valueRange(panel.unit, stacked, low, high, error) },
    },
    axes: [
      stepAxis(),
      valueAxis(panel.unit, panel.log),
    ],
    series: [{}, ...series],
    hooks: {
      setCursor: [(u) => values(u.cursor.idx === null || u.cursor.idx === undefined ? null : u.data[0][u.cursor.idx])],
      ready: [() => values(null)],
      draw: [(u) => curves.forEach((curve) => curve.error && drawBars(u, curve.colour, curve.x, errorBars(curve)))],
    },
  };
}

const errorBars = ({ values, error }) =>
  values.map((v, i) => (v === null || error[i] === null ? null : [v - error[i], v + error[i]]));

/** Vertical bars [low, high] (null: none) at some places of the x axis. */
function drawBars(u, colour, places, bars) {
  const { ctx } = u;
  ctx.save();
  ctx.strokeStyle = paint(`var(--${colour})`);
  ctx.lineWidth = devicePixelRatio;
  ctx.beginPath();
  bars.forEach((bar, i) => {
    if (!bar) return;
    const x = Math.round(u.valToPos(places[i], "x", true));
    ctx.moveTo(x, u.valToPos(bar[0], "y", true));
    ctx.lineTo(x, u.valToPos(bar[1], "y", true));
  });
  ctx.stroke();
  ctx.restore();
}

function redrawAll() {
  resolved.clear();
  for (const redraw of redraws) redraw();
}
