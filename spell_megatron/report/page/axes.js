// What stands along the plots: steps, time or tokens below them, and the values at their side.

const AXIS_FONT = "12px system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif";
const AXIS = {
  stroke: () => paint("var(--soft)"),
  font: AXIS_FONT,
  grid: { stroke: () => paint("var(--grid)"), width: 1 },
  ticks: { show: false },
};
const WHOLE = [1, 2, 5].flatMap((n) => [0, 1, 2, 3, 4, 5].map((power) => n * 10 ** power)).sort((a, b) => a - b);

/** Where the steps of a run stand on the chosen axis; undefined if the run has not measured it. */
const positions = (run) => (state.axis === "steps" ? run.steps : run.axes[state.axis]);

/** Unit of the time axis: [seconds in it, its name], so that the longest run has numbers of a good size. */
function timeUnit() {
  const longest = Math.max(...runs.map((run) => run.axes.time?.at(-1) ?? 0));
  if (longest >= 7200) return [3600, "hours"];
  return longest >= 180 ? [60, "minutes"] : [1, "seconds"];
}

function axisTitle() {
  if (state.axis === "steps") return "step";
  return state.axis === "time" ? `${timeUnit()[1]} of work, without pauses` : data.axes[state.axis];
}

/** A place on the chosen axis, in words. */
function placeText(x) {
  if (state.axis === "steps") return `step ${x}`;
  return state.axis === "time" ? duration(x) : `${axisValue(x, "number", x / 100)} tokens`;
}

function stepAxis() {
  const axis = { ...AXIS, space: 60, size: 26, gap: 4, label: axisTitle(), labelSize: 16, labelGap: 0, labelFont: AXIS_FONT };
  if (state.axis === "steps") return { ...axis, incrs: WHOLE, values: (u, splits) => splits.map(String) };
  if (state.axis !== "time")
    return { ...axis, values: (u, splits, i, space, increment) => splits.map((v) => axisValue(v, "number", increment)) };
  const [unit] = timeUnit();
  const incrs = [0.1, 0.2, 0.5, ...WHOLE].map((n) => n * unit);
  return {
    ...axis,
    incrs,
    values: (u, splits, i, space, increment) => splits.map((v) => (v / unit).toFixed(digitsOf(increment / unit))),
  };
}

/** Digits after the point that multiples of an increment need. */
function digitsOf(increment) {
  let digits = 0;
  while (digits < 8 && Math.abs(increment * 10 ** digits - Math.round(increment * 10 ** digits)) > 1e-6) digits++;
  return digits;
}

const LARGE = [
  [1e9, "B"],
  [1e6, "M"],
  [1e4, "k", 1e3],
];

function axisValue(value, unit, increment) {
  if (value === null) return "";
  if (unit === "share") return `${(value * 100).toFixed(digitsOf(increment * 100))}%`;
  const large = LARGE.find(([from]) => Math.abs(value) >= from);
  if (large) {
    const by = large[2] ?? large[0];
    return `${(value / by).toFixed(Math.min(2, digitsOf(increment / by)))}${large[1]}`.replace("-", "−");
  }
  if (value !== 0 && increment < 0.00005) {
    const power = 10 ** Math.floor(Math.log10(Math.abs(value)) + 1e-9);
    return value.toExponential(digitsOf(increment / power)).replace(/-/g, "−");
  }
  return value.toFixed(digitsOf(increment)).replace("-", "−");
}

/** Of an axis for values from `low` to `high`, with room for error bars of a length. What hardly changes looks so:
 *  an axis spans at least 1 % of its values, or 5 points if they are shares. */
function valueRange(unit, stacked, low, high, error) {
  if (low === null || low === undefined) return [0, 1];
  [low, high] = [low - error, high + error];
  if (stacked) return [0, unit === "share" ? 1 : high * 1.05 || 1];
  const size = Math.max(Math.abs(low), Math.abs(high));
  const least = unit === "share" ? Math.min(0.05, size / 2) || 0.05 : size / 100 || 1;
  const room = Math.max((high - low) * 0.08, (least - (high - low)) / 2);
  let from = low - room;
  let to = high + room;
  if (low >= 0) from = Math.max(0, from);
  if (unit === "share" && high <= 1) to = Math.min(1, to);
  return [from, to];
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
