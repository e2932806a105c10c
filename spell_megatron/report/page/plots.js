// Plots: a panel with a choice of curves, a legend with values, and a canvas.

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

const STEPS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000];
const AXIS_FONT = "12px system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif";
const AXIS = {
  stroke: () => paint("var(--soft)"),
  font: AXIS_FONT,
  grid: { stroke: () => paint("var(--grid)"), width: 1 },
  ticks: { show: false },
};
const HEIGHT = 232;
const MOST_BARS = 60; // a stack over so many steps is drawn as bars

/** Digits after the point that multiples of an increment need. */
function digitsOf(increment) {
  let digits = 0;
  while (digits < 8 && Math.abs(increment * 10 ** digits - Math.round(increment * 10 ** digits)) > 1e-6) digits++;
  return digits;
}

function axisValue(value, unit, increment) {
  if (value === null) return "";
  if (unit === "share") return `${(value * 100).toFixed(digitsOf(increment * 100))}%`;
  if (Math.abs(value) >= 10000) return `${(value / 1000).toFixed(digitsOf(increment / 1000))}k`;
  if (value !== 0 && increment < 0.00005) {
    const power = 10 ** Math.floor(Math.log10(Math.abs(value)) + 1e-9);
    return value.toExponential(digitsOf(increment / power)).replace(/-/g, "−");
  }
  return value.toFixed(digitsOf(increment)).replace("-", "−");
}

/** Of an axis for values from `low` to `high`, with room for error bars of a length. */
function valueRange(unit, stacked, low, high, error) {
  if (low === null || low === undefined) return [0, 1];
  [low, high] = [low - error, high + error];
  const flat = high - low <= 1e-6 * Math.abs(high); // averages of equal numbers differ by roundings
  const room = flat ? Math.abs(high) * 0.1 || (unit === "share" ? 0.05 : 1) : (high - low) * 0.08;
  let from = low - room;
  let to = high + room;
  if (stacked) [from, to] = [0, unit === "share" ? 1 : high * 1.05 || 1];
  if (low >= 0) from = Math.max(0, from);
  if (unit === "share" && high <= 1) to = Math.min(1, to);
  return [from, to];
}

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
  const curve = (run, series, label, colour, hidden, toggle) => {
    const values = column(run, series.metrics);
    if (!values) return null;
    const error = series.error ? run.metrics[series.error] : null;
    return { label, colour, hidden, toggle, error, steps: run.steps, values, smooth: average(values, width) };
  };
  if (several) {
    return runs
      .map((run, i) => curve(run, choice.curves[0], run.name, runColour(i), state.hidden.has(i), () => toggleRun(i)))
      .filter(Boolean);
  }
  return choice.curves
    .map((series) =>
      curve(runs[0], series, series.label, series.colour, off.has(series.label), (redraw) => {
        if (!off.delete(series.label)) off.add(series.label);
        redraw();
      }),
    )
    .filter(Boolean);
}

function toggleRun(index) {
  if (!state.hidden.delete(index)) state.hidden.add(index);
  redrawAll();
}

/** Entries of a legend, each with the cell that its value will be in. */
function legendButtons(curves, cells, redraw) {
  return curves.map((curve, i) =>
    h(
      "button",
      { type: "button", "aria-pressed": String(!curve.hidden), onclick: () => curve.toggle(redraw) },
      h("span", { class: "swatch", colour: curve.colour }),
      curve.label,
      cells[i],
    ),
  );
}

/** One panel: title, choice of curves, legend with values, plot. */
function plotPanel(panel, groups) {
  const options = choices(groups);
  const select = chooser(options, panel.title, () => draw());
  const legend = h("div", { class: "legend" });
  const plot = h("div", { class: "plot", role: "img", "aria-label": panel.title });
  const off = new Set();
  let chart = null;

  function draw() {
    const choice = options[select ? +select.value : 0];
    const all = curvesOf(panel, choice, off);
    const curves = all.filter((curve) => !curve.hidden);
    chart?.destroy();
    const stacked = panel.stacked && !several;
    const values = fillLegend(all, draw);
    const [chartData, shown] = align(curves, stacked, panel.log);
    chart = new uPlot(
      plotOptions(panel, curves, shown, stacked, chartData[0], plot.clientWidth, values),
      chartData,
      plot,
    );
  }

  /** Makes the legend, and returns a function that shows the values at a step (null: the last ones). */
  function fillLegend(curves, redraw) {
    const at = h("span", { class: "at" });
    const cells = curves.map(() => h("span", { class: "value" }));
    legend.replaceChildren(...legendButtons(curves, cells, redraw), at);
    const whole = curves.every((curve) => curve.smooth.every((value) => value === null || Number.isInteger(value)));
    const largest = Math.max(0, ...curves.map((curve) => Math.abs(curve.smooth[lastIndex(curve.smooth)] ?? 0)));
    const digits = whole && panel.unit === "number" ? 0 : digitsFor(largest, panel.unit);
    const last = Math.max(...curves.map((curve) => curve.steps[lastIndex(curve.smooth)] ?? 0));
    return (step) => {
      at.textContent = `step ${step ?? last}`;
      curves.forEach((curve, i) => {
        const index = step === null ? lastIndex(curve.smooth) : curve.steps.indexOf(step);
        cells[i].textContent = format(curve.smooth[index], panel.unit, panel.log ? undefined : digits);
      });
    };
  }

  redraws.push(draw);
  new ResizeObserver(() => chart?.setSize({ width: plot.clientWidth, height: HEIGHT })).observe(plot);
  return h(
    "article",
    { class: "panel" },
    h("header", {}, h("h3", {}, panel.title), select),
    panel.text ? h("p", { class: "about" }, panel.text) : null,
    legend,
    plot,
  );
}

/** Columns for uPlot over all steps of the curves: [steps, ...], and what each column shows. */
function align(curves, stacked, log) {
  const steps = [...new Set(curves.flatMap((curve) => curve.steps))].sort((a, b) => a - b);
  const place = new Map(steps.map((step, i) => [step, i]));
  const spread = (curve, values) => {
    const wide = new Array(steps.length).fill(null);
    curve.steps.forEach((step, i) => (wide[place.get(step)] = log && values[i] <= 0 ? null : values[i]));
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
  const margin = bars || steps.length === 1 ? 0.5 : 0;
  const error = Math.max(0, ...curves.flatMap((curve) => curve.error ?? []));
  const series = shown.map(({ curve, faint }) => ({
    label: curve.label,
    stroke: () => paint(stacked ? "var(--panel)" : `var(--${curve.colour})`),
    fill: stacked ? () => paint(`color-mix(in srgb, var(--${curve.colour}) 78%, var(--panel))`) : undefined,
    width: stacked || faint ? 1 : 2,
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
      { ...AXIS, incrs: STEPS, space: 55, size: 26, gap: 4, values: (u, splits) => splits.map(String) },
      valueAxis(panel.unit, panel.log),
    ],
    series: [{}, ...series],
    hooks: {
      setCursor: [(u) => values(u.cursor.idx === null || u.cursor.idx === undefined ? null : u.data[0][u.cursor.idx])],
      ready: [() => values(null)],
      draw: [(u) => curves.forEach((curve) => curve.error && drawBars(u, curve.colour, curve.steps, errorBars(curve)))],
    },
  };
}

/** The axis of the values. */
function valueAxis(unit, log) {
  return {
    ...AXIS,
    space: 38,
    gap: 6,
    size: (u, texts) => 14 + Math.max(22, ...(texts ?? []).map((text) => (text ?? "").length * 7.2)),
    values: (u, splits, i, space, increment) =>
      splits.map((v) =>
        log ? (v === null ? "" : v.toExponential(0).replace("-", "−")) : axisValue(v, unit, increment),
      ),
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
