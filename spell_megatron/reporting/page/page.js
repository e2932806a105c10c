// Draws the page out of the embedded data. Text of a model becomes text nodes only, never markup.
"use strict";
(async () => {
  const $ = (id) => document.getElementById(id);

  /** An element. Attributes that begin with "on" are listeners; children are nodes or texts; null ones are left out. */
  function h(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (name === "colour") element.style.background = `var(--${value})`;
      else if (name === "width") element.style.width = value;
      else if (value === true) element.setAttribute(name, "");
      else if (value !== false && value !== null) element.setAttribute(name, value);
    }
    element.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return element;
  }

  async function unpack(id) {
    const letters = atob($(id).textContent);
    $(id).remove();
    const bytes = new Uint8Array(letters.length);
    for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  if (!("DecompressionStream" in window) || !CSS.supports("color", "light-dark(white, black)")) {
    $("main").append(h("p", { class: "message" }, "This browser is too old for this page: it needs one of 2024 or later."));
    return;
  }
  const data = await unpack("data");
  const { runs } = data;
  const several = runs.length > 1;
  const RUN_COLOURS = ["blue", "orange", "green", "purple", "red", "teal", "pink", "brown"];
  const runColour = (index) => RUN_COLOURS[index % RUN_COLOURS.length];
  const state = { window: 1, hidden: new Set() };
  const redraws = []; // to be called when runs, averaging or theme change

  // ---------------------------------------------------------------------------------------- numbers

  const grouped = (value, digits) =>
    value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });

  /** Digits after the point that numbers of this size need; -1: they are written with an exponent. */
  function digitsFor(largest, unit) {
    if (unit === "share") return 1;
    if (unit === "tokens") return largest < 1000 ? 1 : 0;
    if (unit === "seconds") return largest < 10 ? 2 : 1;
    if (largest === 0) return 0;
    if (largest < 0.001) return -1;
    return Math.max(0, 2 - Math.floor(Math.log10(largest))); // three that count
  }

  /** A number as text. Without `digits` a whole number has none. */
  function format(value, unit, digits) {
    if (value === null || value === undefined) return "–";
    digits ??= unit === "number" && Number.isInteger(value) ? 0 : digitsFor(Math.abs(value), unit);
    if (unit === "share") return `${grouped(value * 100, digits)}%`;
    if (unit === "seconds") return `${grouped(value, digits)} s`;
    if (digits < 0) return value === 0 ? "0" : value.toExponential(2).replace("-", "−");
    return grouped(value, digits).replace("-", "−");
  }

  /** Sum of a curve's metrics at each step of a run; null where none was logged; undefined without any of them. */
  function column(run, metrics) {
    const columns = metrics.map((name) => run.metrics[name]).filter(Boolean);
    if (columns.length <= 1) return columns[0];
    return run.steps.map((_, i) =>
      columns.reduce((sum, values) => (values[i] === null ? sum : (sum ?? 0) + values[i]), null)
    );
  }

  /** Mean over the `width` steps around each one; steps without a value stay without. */
  function average(values, width) {
    if (width <= 1) return values;
    const sums = [0];
    const counts = [0];
    for (const value of values) {
      sums.push(sums.at(-1) + (value ?? 0));
      counts.push(counts.at(-1) + (value !== null));
    }
    const before = Math.floor((width - 1) / 2);
    return values.map((value, i) => {
      if (value === null) return null;
      const from = Math.max(0, i - before);
      const to = Math.min(values.length, i - before + width);
      return (sums[to] - sums[from]) / (counts[to] - counts[from]);
    });
  }

  const lastIndex = (values) => values.findLastIndex((value) => value !== null);
  const visibleRuns = () => runs.map((run, index) => ({ run, index })).filter(({ index }) => !state.hidden.has(index));
  const date = (seconds) => new Date(seconds * 1000).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
  function duration(seconds) {
    const minutes = Math.round(seconds / 60);
    if (seconds < 120) return `${Math.round(seconds)} s`;
    if (minutes < 120) return `${minutes} min`;
    return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  }

  // ----------------------------------------------------------------------------------------- colours

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

  // ------------------------------------------------------------------------------------------- plots

  const STEPS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000];
  const AXIS_FONT = "12px system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif";
  const HEIGHT = 232;

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

  function valueRange(unit, stacked, low, high) {
    if (low === null || low === undefined) return [0, 1];
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

  /** Groups of a panel with the curves that some run has; of many curves, those that are zero throughout are left out. */
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
      }))
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
        .map((run, i) =>
          curve(run, choice.curves[0], run.name, runColour(i), state.hidden.has(i), () => toggleRun(i))
        )
        .filter(Boolean);
    }
    return choice.curves
      .map((series) =>
        curve(runs[0], series, series.label, series.colour, off.has(series.label), (redraw) => {
          if (!off.delete(series.label)) off.add(series.label);
          redraw();
        })
      )
      .filter(Boolean);
  }

  function toggleRun(index) {
    if (!state.hidden.delete(index)) state.hidden.add(index);
    redrawAll();
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
      chart = new uPlot(plotOptions(panel, curves, shown, stacked, chartData[0], plot.clientWidth, values), chartData, plot);
    }

    /** Makes the legend, and returns a function that shows the values at a step (null: the last ones). */
    function fillLegend(curves, redraw) {
      const at = h("span", { class: "at" });
      const cells = curves.map(() => h("span", { class: "value" }));
      legend.replaceChildren(
        ...curves.map((curve, i) =>
          h(
            "button",
            { type: "button", "aria-pressed": String(!curve.hidden), onclick: () => curve.toggle(redraw) },
            h("span", { class: "swatch", colour: curve.colour }),
            curve.label,
            cells[i]
          )
        ),
        at
      );
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
      plot
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
    const [first, last] = [steps[0] ?? 0, steps.at(-1) ?? 1];
    const grid = { stroke: () => paint("var(--grid)"), width: 1 };
    const axis = { stroke: () => paint("var(--soft)"), font: AXIS_FONT, grid, ticks: { show: false } };
    const series = shown.map(({ curve, faint }) => ({
      label: curve.label,
      stroke: () => paint(stacked ? "var(--panel)" : `var(--${curve.colour})`),
      fill: stacked ? () => paint(`color-mix(in srgb, var(--${curve.colour}) 78%, var(--panel))`) : undefined,
      width: stacked || faint ? 1 : 2,
      alpha: faint ? 0.24 : 1,
      spanGaps: true,
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
        x: { time: false, range: (u, low, high) => (low === high ? [low - 0.5, high + 0.5] : [low, high]) },
        y: panel.log
          ? { distr: 3 }
          : { range: (u, low, high) => valueRange(panel.unit, stacked, low, high) },
      },
      axes: [
        { ...axis, incrs: STEPS, space: 55, size: 26, gap: 4, values: (u, splits) => splits.map(String) },
        {
          ...axis,
          space: 38,
          gap: 6,
          size: (u, texts) => 14 + Math.max(22, ...(texts ?? []).map((text) => (text ?? "").length * 7.2)),
          values: (u, splits, i, space, increment) =>
            splits.map((v) => (panel.log ? (v === null ? "" : v.toExponential(0).replace("-", "−")) : axisValue(v, panel.unit, increment))),
        },
      ],
      series: [{}, ...series],
      hooks: {
        setCursor: [(u) => values(u.cursor.idx === null || u.cursor.idx === undefined ? null : u.data[0][u.cursor.idx])],
        ready: [() => values(null)],
        draw: [(u) => curves.forEach((curve) => curve.error && drawErrors(u, curve))],
      },
    };
  }

  function drawErrors(u, curve) {
    const { ctx } = u;
    ctx.save();
    ctx.strokeStyle = paint(`var(--${curve.colour})`);
    ctx.lineWidth = devicePixelRatio;
    ctx.beginPath();
    curve.steps.forEach((step, i) => {
      if (curve.values[i] === null || curve.error[i] === null) return;
      const x = Math.round(u.valToPos(step, "x", true));
      ctx.moveTo(x, u.valToPos(curve.values[i] - curve.error[i], "y", true));
      ctx.lineTo(x, u.valToPos(curve.values[i] + curve.error[i], "y", true));
    });
    ctx.stroke();
    ctx.restore();
  }

  function redrawAll() {
    resolved.clear();
    for (const redraw of redraws) redraw();
  }

  // ---------------------------------------------------------------------------------------- overview

  function section(id, title, text) {
    $("nav").append(h("a", { href: `#${id}` }, id[0].toUpperCase() + id.slice(1)));
    const element = h("section", { id }, h("h2", {}, title), text ? h("p", { class: "about" }, text) : null);
    $("main").append(element);
    return element;
  }

  const swatch = (colour) => h("span", { class: "swatch", colour });

  function runCard(run, index) {
    const name = Object.keys(run.metrics).find((metric) => metric === "validation/pass@1");
    const values = name ? run.metrics[name] : [];
    const [from, to] = [values.findIndex((v) => v !== null), lastIndex(values)];
    const error = (i) => (run.metrics["validation/standard_error"]?.[i] ?? null);
    const plusMinus = (i) => (error(i) === null ? "" : ` ± ${format(error(i), "share")}`);
    const state_ = run.planned ? `${run.steps.at(-1) ?? 0} of ${run.planned}` : `${run.steps.at(-1) ?? 0}`;
    const rows = [
      ["steps", state_],
      ["last step", run.last_time ? date(run.last_time) : "–"],
      ["time so far", run.first_time ? duration(run.last_time - run.first_time) : "–"],
      ["model", run.facts["model.path"]],
      ["documents", run.facts["data.documents"]],
      ["seed", run.facts["run.seed"]],
      ["folder", run.folder],
    ].filter(([, value]) => value !== null && value !== undefined);
    const show = several
      ? h("button", { type: "button", class: "show", "aria-pressed": "true", onclick: () => toggleRun(index) }, "hide")
      : null;
    if (show) {
      redraws.push(() => {
        const hidden = state.hidden.has(index);
        show.textContent = hidden ? "show" : "hide";
        show.setAttribute("aria-pressed", String(!hidden));
      });
    }
    return h(
      "article",
      { class: "card" },
      h("h3", {}, several ? swatch(runColour(index)) : null, run.name, show),
      from >= 0
        ? h(
            "p",
            { class: "headline" },
            to > from ? `${format(values[from], "share")} → ${format(values[to], "share")}` : format(values[to], "share"),
            h("small", {}, `${plusMinus(to)}  held-out pass@1`)
          )
        : null,
      h("dl", {}, rows.flatMap(([label, value]) => [h("dt", {}, label), h("dd", {}, String(value))])),
      run.notes.map((note) => h("p", { class: "about" }, note))
    );
  }

  function bestOf(values, better) {
    let best = -1;
    values.forEach((value, i) => {
      if (value === null) return;
      if (best < 0 || (better === "more" ? value > values[best] : value < values[best])) best = i;
    });
    return best;
  }

  function comparison() {
    const box = h("div", { class: "table", id: "comparison", tabindex: 0, role: "region", "aria-label": "First, last and best values" });
    function draw() {
      const members = visibleRuns();
      const rows = data.table.filter((row) => members.some(({ run }) => run.metrics[row.metric]));
      const averaged = state.window > 1 ? `averaged over ${state.window} steps, as the curves are` : "of single steps";
      box.replaceChildren(
        h(
          "table",
          {},
          h(
            "caption",
            {},
            h("h3", {}, several ? "First, last and best values of the runs" : "First, last and best values"),
            h("p", {}, `Values ${averaged}${several ? "; bold: the best of the runs" : ""}.`)
          ),
          h(
            "thead",
            {},
            several
              ? h("tr", {}, h("th", {}), members.map(({ run, index }) => h("th", { class: "run", colspan: 4, scope: "colgroup" }, h("span", { class: "chip" }, swatch(runColour(index)), run.name))))
              : null,
            h("tr", {}, h("th", {}), members.flatMap(() => ["first", "last", "best", "at step"].map((text) => h("th", { scope: "col" }, text))))
          ),
          h("tbody", {}, rows.map((row) => comparisonRow(row, members)))
        )
      );
    }
    redraws.push(draw);
    return box;
  }

  function comparisonRow(row, members) {
    const columns = members.map(({ run }) => {
      const raw = run.metrics[row.metric];
      if (!raw) return null;
      const values = average(raw, row.sparse ? 1 : state.window);
      const best = row.better ? bestOf(values, row.better) : -1;
      return { first: values.find((v) => v !== null), last: values[lastIndex(values)], best, bestValue: values[best], step: run.steps[best] };
    });
    const filled = columns.filter(Boolean);
    const digits = digitsFor(Math.max(...filled.flatMap((c) => [Math.abs(c.first), Math.abs(c.last)])), row.unit);
    const top = (key) => {
      const values = filled.map((c) => c[key]);
      return several && filled.length > 1 && row.better ? (row.better === "more" ? Math.max(...values) : Math.min(...values)) : null;
    };
    const [topLast, topBest] = [top("last"), top("bestValue")];
    return h(
      "tr",
      {},
      h("th", { scope: "row" }, row.label),
      columns.flatMap((c) =>
        c === null
          ? [h("td", { class: "first" }, "–"), h("td", {}, "–"), h("td", {}), h("td", {})]
          : [
              h("td", { class: "first" }, format(c.first, row.unit, digits)),
              h("td", { class: c.last === topLast ? "winner" : "" }, format(c.last, row.unit, digits)),
              h("td", { class: c.bestValue === topBest ? "winner" : "" }, c.best < 0 ? "" : format(c.bestValue, row.unit, digits)),
              h("td", { class: "soft" }, c.best < 0 ? "" : String(c.step)),
            ]
      )
    );
  }

  function settingsTable() {
    if (!data.settings.length) return null;
    return h(
      "div",
      { class: "table settings", tabindex: 0, role: "region", "aria-label": "Settings in which the runs differ" },
      h(
        "table",
        {},
        h("caption", {}, h("h3", {}, "Settings in which the runs differ")),
        h("thead", {}, h("tr", {}, h("th", {}), runs.map((run, i) => h("th", { scope: "col" }, h("span", { class: "chip" }, swatch(runColour(i)), run.name))))),
        h("tbody", {}, data.settings.map(([key, ...values]) => h("tr", {}, h("th", { scope: "row" }, key), values.map((v) => h("td", {}, v)))))
      )
    );
  }

  // ------------------------------------------------------------------------------------------ funnel

  /** Share of the attempts that come as far as each stage, in the first and the last tenth of a run's steps. */
  function funnelCard(run, index) {
    const rates = (name) => run.metrics[`selfplay/rate/${name}`];
    if (!rates("valid") || !rates("mixed")) return null;
    const logged = run.steps.map((_, i) => i).filter((i) => rates("valid")[i] !== null);
    const tenth = Math.max(1, Math.round(logged.length / 10));
    const mean = (metrics, part) =>
      part.reduce((sum, i) => sum + metrics.reduce((s, name) => s + (rates(name)?.[i] ?? 0), 0), 0) / part.length;
    const [start, end] = [logged.slice(0, tenth), logged.slice(-tenth)];
    const steps = (part) => (part.length === 1 ? `step ${run.steps[part[0]]}` : `steps ${run.steps[part[0]]} to ${run.steps[part.at(-1)]}`);
    const stages = [
      ["attempts", null, "grey"],
      ["a usable question", ["valid"], "purple"],
      ["… that needs its documents", ["mixed", "all_0", "all_1"], "orange"],
      ["… that some answers get right", ["mixed", "all_1"], "blue"],
      ["… and others wrong: mixed", ["mixed"], "green"],
    ];
    return h(
      "article",
      { class: "panel" },
      h("h3", { class: "chip" }, several ? swatch(runColour(index)) : null, `How far attempts come${several ? `: ${run.name}` : ""}`),
      h("p", { class: "about" }, `Share of attempts: ${steps(start)} (marks) → ${steps(end)} (bars).`),
      h(
        "div",
        { class: "funnel" },
        stages.map(([label, metrics, colour]) => {
          const [before, after] = metrics ? [mean(metrics, start), mean(metrics, end)] : [1, 1];
          const mark = h("div", { class: "mark" });
          mark.style.left = `calc(${Math.min(100, before * 100)}% - 1px)`;
          return h(
            "div",
            { class: "stage" },
            h("span", {}, label),
            h("div", { class: "track" }, h("div", { class: "bar", colour, width: `${after * 100}%` }), metrics ? mark : null),
            h("span", { class: "values" }, metrics ? `${format(before, "share")} → ${format(after, "share")}` : "100%")
          );
        })
      )
    );
  }

  // --------------------------------------------------------------------------- controls and sections

  function controls() {
    const longest = Math.max(...runs.map((run) => run.steps.length));
    const widths = [1, 3, 5, 10, 20, 50, 100, 200].filter((w) => w === 1 || w <= longest / 3);
    state.window = widths.findLast((w) => w <= Math.max(1, longest / 40));
    $("window").append(...widths.map((w) => h("option", { value: w, ...(w === state.window && { selected: true }) }, w === 1 ? "1 step" : `${w} steps`)));
    $("window").addEventListener("change", () => {
      state.window = +$("window").value;
      redrawAll();
    });
    $("theme").addEventListener("change", () => {
      document.documentElement.dataset.theme = $("theme").value;
      redrawAll();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
  }

  function plots() {
    for (const part of data.sections) {
      const element = section(part.id, part.title, part.text);
      const grid = h("div", { class: "grid" });
      if (part.id === "outcomes") grid.append(...runs.map(funnelCard).filter(Boolean));
      const [absent, zero] = [[], []];
      for (const panel of part.panels) {
        const curves = Object.values(panel.groups).flat();
        if (curves.some(nonzero)) grid.append(plotPanel(panel, present(panel.groups)));
        else (curves.some(measured) ? zero : absent).push(panel.title);
      }
      element.append(grid);
      const left = [["Not plotted, for it is zero at every step", zero], ["Not measured", absent]].filter(([, titles]) => titles.length);
      if (left.length) element.append(h("p", { class: "missing" }, left.map(([why, titles]) => `${why}: ${titles.join("; ")}.`).join(" ")));
    }
  }

  function anyMetric() {
    const names = [...new Set(runs.flatMap((run) => Object.keys(run.metrics)))].sort();
    const unit = (name) => (/\/rate\/|pass@|_share$|truncated$/.test(name) ? "share" : "number");
    const groups = names.map((name) => [name, [{ label: name, metrics: [name], colour: "blue", error: null }]]);
    const element = section("metrics", "Any metric", `All ${names.length} numbers that were logged; those of the plots above, and the rest.`);
    const box = h("div", {});
    const panel = (name) => ({ title: name, text: "", unit: unit(name), sparse: name.startsWith("validation/"), stacked: false, log: false });
    const select = h("select", { id: "metric", "aria-label": "Metric", onchange: () => show(select.value) }, names.map((name) => h("option", {}, name)));
    let draw = null;
    function show(name) {
      if (draw) redraws.splice(redraws.indexOf(draw), 1);
      box.replaceChildren(plotPanel(panel(name), groups.filter(([label]) => label === name)));
      draw = redraws.at(-1);
      if (ready) draw();
    }
    select.value = names.includes("selfplay/reward") ? "selfplay/reward" : names[0];
    show(select.value);
    element.append(h("div", { class: "filters" }, h("label", {}, "Metric", select)), box);
  }

  // ------------------------------------------------------------------------------------- transcripts

  function showTranscripts(questions) {
    const PAGE_SIZE = 30;
    const unique = (values) => [...new Set(values)];
    const filter = (label, values, text = (value) => value) =>
      h("label", {}, label, h("select", { onchange: () => list() }, h("option", { value: "" }, "all"), values.map((v) => h("option", { value: v }, text(v)))));
    if (!questions.length) {
      transcripts.append(h("p", { class: "about" }, "There are none: the runs were told not to keep what the policy writes (logging.dump: none), have not finished a step, or --transcripts was 0."));
      return;
    }
    const texts = questions.map((q) => [q.question?.text, q.question?.output, q.reference, q.cluster, q.uid, ...q.answers.map((a) => a.output)].join("\n").toLowerCase());
    const steps = unique(questions.map((q) => q.step)).sort((a, b) => a - b);
    const filters = {
      run: filter("Run", runs.map((_, i) => String(i)), (i) => runs[+i].name),
      step: filter("Step", steps.map(String)),
      task: filter("Task", unique(questions.map((q) => q.task)).sort()),
      outcome: filter("Outcome", Object.keys(data.outcomes).filter((key) => questions.some((q) => q.outcome === key)), (key) => data.outcomes[key].label),
    };
    if (!several) filters.run.hidden = true;
    const against = h("input", { type: "checkbox", id: "against", onchange: () => list() });
    const search = h("input", { type: "search", id: "search", placeholder: "words in question or answers", oninput: () => list(), "aria-label": "Search" });
    for (const [name, label] of Object.entries(filters)) label.lastChild.id = `filter-${name}`;
    const count = h("p", { class: "count", "aria-live": "polite" });
    const box = h("div", { id: "questions" });
    const more = h("button", { type: "button", class: "more", onclick: () => extend() }, "Show more");
    let found = [];
    let shown = 0;

    function list() {
      const chosen = Object.fromEntries(Object.entries(filters).map(([name, label]) => [name, label.lastChild.value]));
      const words = search.value.toLowerCase().trim();
      found = questions.filter(
        (q, i) =>
          ["run", "step", "task", "outcome"].every((key) => !chosen[key] || String(q[key]) === chosen[key]) &&
          (!against.checked || q.answers.some((a) => a.verdict !== null && a.verdict !== a.rule)) &&
          (!words || texts[i].includes(words))
      );
      box.replaceChildren();
      shown = 0;
      count.textContent = `${found.length} of ${questions.length} questions`;
      extend();
    }
    function extend() {
      box.append(...found.slice(shown, shown + PAGE_SIZE).map(questionItem));
      shown = Math.min(shown + PAGE_SIZE, found.length);
      more.hidden = shown >= found.length;
      more.textContent = `Show more (${found.length - shown} left)`;
    }
    transcripts.append(
      h("p", { class: "about" },
        `A sample: ${questions.length} questions of ${steps.length} steps, of each task and outcome about as many. ` +
          `Texts over ${grouped(data.text_chars, 0)} characters lose their middle, judgments over ${grouped(data.judgment_chars, 0)}. ` +
          "spell report --transcripts N --text-chars N takes more or less; the folder rollouts/ of a run has all."),
      h("div", { class: "filters" }, Object.values(filters), h("label", {}, against, "verdict against the rule check"), search),
      count,
      box,
      more
    );
    list();
  }

  const outcomeChip = (key) => h("span", { class: "chip" }, swatch(data.outcomes[key].colour), data.outcomes[key].label.split(":")[0]);
  const signed = (value) => (value ? `${value > 0 ? "+" : "−"}${Math.abs(value).toFixed(2)}` : "–");
  const mark = (value) => (value === null || value === undefined ? h("span", { class: "soft" }, "–") : value > 0 ? h("span", { class: "yes" }, "right") : h("span", { class: "no" }, "wrong"));
  const points = (value) => value.toFixed(2).replace("-", "−");

  function questionItem(q) {
    const right = q.answers.filter((a) => a.reward > 0).length;
    const item = h(
      "details",
      { class: "question" },
      h(
        "summary",
        {},
        h("span", { class: "soft" }, several ? swatch(runColour(q.run)) : null, ` step ${q.step}`),
        outcomeChip(q.outcome),
        h("span", { class: "asked" }, q.question?.text ?? (q.question ? "(no question could be read)" : q.cluster)),
        h("span", { class: "right soft" }, q.answers.length ? `${right} of ${q.answers.length} right` : ""),
        h("span", { class: "reward" }, q.question ? points(q.question.reward) : "")
      )
    );
    item.addEventListener("toggle", () => item.open && item.children.length === 1 && item.append(questionBody(q)));
    return item;
  }

  const folded = (title, text) => (text === null || text === undefined ? null : h("details", {}, h("summary", { class: "soft" }, title), h("pre", {}, text)));
  const rows = (pairs) => h("dl", {}, pairs.filter(([, value]) => value !== null && value !== undefined && value !== "").flatMap(([label, value]) => [h("dt", {}, label), h("dd", {}, value)]));

  function questionBody(q) {
    const asked = q.question;
    const unseen = q.documents.filter((id) => !asked?.documents.includes(id));
    return h(
      "div",
      { class: "body" },
      rows([
        ["Question", asked?.text],
        ["Reference", q.reference],
        ["Reward", asked && `${points(asked.reward)}, advantage ${signed(asked.advantage)}, ${asked.tokens} tokens${asked.truncated ? ", cut off" : ""}`],
        ["Place", `${several ? `${runs[q.run].name}, ` : ""}step ${q.step}, attempt ${q.uid}, ${q.task}, cluster ${q.cluster}`],
        ["Questioner saw", asked && (asked.documents.join(", ") || "no documents")],
        ["Responder also", unseen.length ? unseen.join(", ") : null],
      ]),
      folded(`What the questioner wrote (${asked?.tokens} tokens)`, asked?.output),
      folded(`The questioner's prompt (${asked?.prompt_tokens} tokens)`, asked?.prompt),
      q.answers.length ? folded(`The responder's prompt (${q.answers[0].prompt_tokens} tokens)`, q.responder_prompt) : null,
      q.answers.length ? h("h4", {}, `${q.answers.length} answers`) : null,
      q.answers.length ? h("div", { class: "answer head" }, ["", "answer", "rule", "verdict", "votes", "reward", "advantage"].map((text, i) => h("span", { class: i >= 5 ? "number" : "" }, text))) : null,
      q.answers.map(answerItem)
    );
  }

  function answerItem(answer, index) {
    const votes = [1, 0, -1].map((vote) => answer.judgments.filter((j) => j.vote === vote).length);
    const item = h(
      "details",
      { class: "answer" },
      h(
        "summary",
        {},
        h("span", { class: "soft" }, `${index + 1}`),
        h("span", { class: "predicted" }, answer.prediction ?? (answer.truncated ? "(cut off)" : "(no answer found)")),
        mark(answer.rule),
        mark(answer.verdict),
        h("span", { class: "votes soft" }, answer.judgments.length ? `${votes[0]} yes, ${votes[1]} no${votes[2] ? `, ${votes[2]} invalid` : ""}` : "–"),
        h("span", { class: "number" }, points(answer.reward)),
        h("span", { class: "advantage number soft" }, signed(answer.advantage))
      )
    );
    item.addEventListener("toggle", () => {
      if (!item.open || item.children.length > 1) return;
      const judgments = answer.judgments.map((j) =>
        h(
          "div",
          { class: "judgment" },
          h("span", { class: j.vote > 0 ? "yes" : j.vote < 0 ? "soft" : "no" }, j.vote > 0 ? "yes" : j.vote < 0 ? "invalid" : "no"),
          h("span", { class: "soft" }, points(j.reward)),
          h("pre", {}, j.output)
        )
      );
      item.append(
        h("div", { class: "inner" }, h("p", { class: "soft" }, `${answer.tokens} tokens${answer.truncated ? ", cut off" : ""}`), h("pre", {}, answer.output), judgments.length ? h("h4", {}, "Judgments: vote, reward, text") : null, judgments)
      );
    });
    return item;
  }

  // --------------------------------------------------------------------------------------- all of it

  let ready = false;
  controls();
  const overview = section("overview", "Overview", "");
  overview.append(h("div", { class: several ? "" : "beside" }, h("div", { class: "cards" }, runs.map(runCard)), comparison()));
  const settings = settingsTable();
  if (settings) overview.append(settings);
  plots();
  anyMetric();
  const transcripts = section("transcripts", "Transcripts", "");
  redrawAll();
  ready = true;
  $("footer").append(`Written ${date(data.written)} by spell report. The page connects to nothing. Drag over a plot to enlarge a range of steps, double-click to go back.`);

  // Transcripts are the bulk of the page: they come when the plots are there.
  await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
  showTranscripts(await unpack("transcripts-data"));
  document.documentElement.dataset.ready = "true";
})();
