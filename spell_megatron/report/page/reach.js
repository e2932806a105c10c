// From a plot to the transcripts of a step, by mouse or by keys.

/** A click on a plot (not a drag) shows the transcripts of the step below the pointer. */
function reachPlot(chart, curves) {
  let pressed = null;
  chart.over.title = "Click: transcripts of this step. Drag: enlarge.";
  chart.over.addEventListener("mousedown", (event) => (pressed = event.clientX));
  chart.over.addEventListener("click", (event) => {
    if (pressed !== null && Math.abs(event.clientX - pressed) < 4) showStep(chart, curves());
  });
}

/** Shows the transcripts of where the cursor of a plot is; with several runs, of the curve that is nearest to it. */
function showStep(chart, curves) {
  const { idx, top } = chart.cursor;
  if (idx === null || idx === undefined) return;
  const place = chart.data[0][idx];
  const near = curves
    .map((curve) => ({ curve, index: indexAt(curve, place) }))
    .filter(({ curve, index }) => index >= 0 && curve.smooth[index] !== null)
    .map((found) => ({ ...found, away: Math.abs(chart.valToPos(found.curve.smooth[found.index], "y") - top) }))
    .sort((a, b) => a.away - b.away)[0];
  if (near) showTranscriptsOf(near.curve.run, near.curve.steps[near.index]);
}

const KEYS = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };

/** Arrow keys move along a plot, Enter shows the transcripts of the step. */
function plotKeys(plot, title, chart, curves) {
  for (const [name, value] of Object.entries({
    tabindex: 0,
    role: "slider",
    "aria-label": `${title}: arrow keys move along the plot, Enter shows transcripts`,
    "aria-valuemin": 0,
    "aria-valuenow": 0,
  }))
    plot.setAttribute(name, value);
  plot.addEventListener("keydown", (event) => {
    const u = chart();
    if (event.key === "Enter" && u) return showStep(u, curves());
    const by = KEYS[event.key];
    if (by === undefined || !u || !u.data[0].length) return;
    event.preventDefault();
    const last = u.data[0].length - 1;
    const index = Math.min(last, Math.max(0, (u.cursor.idx ?? last + (by < 0 ? 1 : 0)) + by));
    plot.setAttribute("aria-valuemax", last);
    plot.setAttribute("aria-valuenow", index);
    const shown = u.series.findIndex((series, i) => i && u.data[i][index] !== null);
    const top = shown > 0 ? u.valToPos(u.data[shown][index], "y") : 1;
    u.setCursor({ left: u.valToPos(u.data[0][index], "x"), top });
  });
}
