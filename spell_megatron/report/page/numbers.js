// Columns of numbers, and numbers as text.

const grouped = (value, digits) =>
  value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });

/** Digits after the point that numbers of this size need; -1: they are written with an exponent.
 *  span: difference of the largest and the smallest number that stand together, which must not look equal. */
function digitsFor(largest, unit, span = 0) {
  if (unit === "share") return largest >= 0.01 || largest === 0 ? 1 : largest >= 0.001 ? 2 : 3;
  if (unit === "tokens") return largest < 1000 ? 1 : 0;
  if (unit === "seconds") return largest < 10 ? 2 : 1;
  if (largest === 0) return 0;
  if (largest < 0.001) return -1;
  const apart = span > 1e-9 * largest ? Math.ceil(-Math.log10(span)) : 0;
  return Math.min(9, Math.max(0, 2 - Math.floor(Math.log10(largest)), apart)); // three that count
}

/** A number as text. Without `digits` a whole number has none. */
function format(value, unit, digits) {
  if (value === null || value === undefined) return "–";
  digits ??= unit === "number" && Number.isInteger(value) ? 0 : digitsFor(Math.abs(value), unit);
  if (unit === "share") return `${grouped(value * 100, digits)}%`;
  if (unit === "seconds") return `${grouped(value, digits)} s`;
  if (digits < 0) return value === 0 ? "0" : value.toExponential(2).replace(/-/g, "−");
  return grouped(value, digits).replace("-", "−");
}

/** Largest and smallest of some numbers, of which any may be missing; [null, null] if all are. */
function extent(values) {
  let [low, high] = [null, null];
  for (const value of values) {
    if (value === null || value === undefined) continue;
    if (low === null || value < low) low = value;
    if (high === null || value > high) high = value;
  }
  return [low, high];
}

/** A metric at each step of a run; with a minus before its name, its opposite; undefined if it was not logged. */
const ofMetric = (run, name) =>
  name[0] === "-" ? run.metrics[name.slice(1)]?.map((value) => (value === null ? null : -value)) : run.metrics[name];

/** Sum of a curve's metrics at each step of a run; null where none was logged; undefined without any of them. */
function column(run, metrics) {
  const columns = metrics.map((name) => ofMetric(run, name)).filter(Boolean);
  if (columns.length <= 1) return columns[0];
  return run.steps.map((_, i) =>
    columns.reduce((sum, values) => (values[i] === null ? sum : (sum ?? 0) + values[i]), null),
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
  if (minutes < 48 * 60) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  const hours = Math.round(minutes / 60);
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}
