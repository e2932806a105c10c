// The page, from top to bottom.

function section(id, title, text) {
  $("nav").append(h("a", { href: `#${id}` }, id[0].toUpperCase() + id.slice(1)));
  const element = h("section", { id }, h("h2", {}, title), text ? h("p", { class: "about" }, text) : null);
  $("main").append(element);
  return element;
}

function controls() {
  $("window").parentElement.hidden = !runs.length;
  const longest = Math.max(...runs.map((run) => run.steps.length));
  const widths = [1, 3, 5, 10, 20, 50, 100, 200].filter((w) => w === 1 || w <= longest / 3);
  state.window = widths.findLast((w) => w <= Math.max(1, longest / 40));
  $("window").append(
    ...widths.map((w) =>
      h("option", { value: w, ...(w === state.window && { selected: true }) }, w === 1 ? "1 step" : `${w} steps`),
    ),
  );
  $("window").addEventListener("change", () => {
    state.window = +$("window").value;
    redrawAll();
  });
  const axes = Object.keys(data.axes).filter((axis) => axis === "steps" || runs.some((run) => run.axes[axis]));
  $("axis").append(...axes.map((axis) => h("option", { value: axis }, data.axes[axis])));
  $("axis").parentElement.hidden = axes.length < 2;
  $("axis").addEventListener("change", () => {
    state.axis = $("axis").value;
    redrawAll();
  });
  const paintIn = (theme) => {
    document.documentElement.dataset.theme = theme;
    redrawAll();
  };
  $("theme").addEventListener("change", () => paintIn($("theme").value));
  addEventListener("beforeprint", () => paintIn("light"));
  addEventListener("afterprint", () => paintIn($("theme").value));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
}

/** The sections of plots. Those without any are named in a line, which is returned. */
function plots() {
  const empty = [];
  for (const part of data.sections) {
    const grid = h("div", { class: "grid" });
    if (part.id === "outcomes") grid.append(...runs.map(funnelCard).filter(Boolean));
    const [absent, zero] = [[], []];
    for (const panel of part.panels) {
      const curves = Object.values(panel.groups).flat();
      if (curves.some(nonzero)) grid.append(plotPanel(panel, present(panel.groups)));
      else (curves.some(measured) ? zero : absent).push(panel.title);
    }
    if (part.id === "speed") grid.append(...runs.map(timelineCard).filter(Boolean));
    if (!grid.children.length) {
      empty.push(part.title);
      continue;
    }
    const left = [
      ["Not plotted, for it is zero at every step", zero],
      ["Not measured", absent],
    ].filter(([, titles]) => titles.length);
    const element = section(part.id, part.title, part.text);
    element.append(grid);
    if (left.length)
      element.append(
        h("p", { class: "missing" }, left.map(([why, titles]) => `${why}: ${titles.join("; ")}.`).join(" ")),
      );
  }
  return empty.length ? `The runs have logged nothing for these sections: ${empty.join("; ")}.` : "";
}

function anyMetric(missing) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.metrics)))].sort();
  if (!names.length) return;
  const unit = (name) => (/\/rate\/|pass@|_share$|truncated$/.test(name) ? "share" : "number");
  const groups = names.map((name) => [name, [{ label: name, metrics: [name], colour: "blue", error: null }]]);
  const element = section(
    "metrics",
    "Any metric",
    `All ${names.length} numbers that were logged; those of the plots above, and the rest.`,
  );
  const box = h("div", {});
  const panel = (name) => ({
    title: name,
    text: "",
    unit: unit(name),
    sparse: name.startsWith("validation/"),
    stacked: false,
    log: false,
  });
  const select = h(
    "select",
    { id: "metric", "aria-label": "Metric", onchange: () => show(select.value) },
    names.map((name) => h("option", {}, name)),
  );
  let draw = null;
  function show(name) {
    if (draw) redraws.splice(redraws.indexOf(draw), 1);
    box.replaceChildren(
      plotPanel(
        panel(name),
        groups.filter(([label]) => label === name),
      ),
    );
    draw = redraws.at(-1);
    if (ready) draw();
  }
  select.value = names.includes("selfplay/reward") ? "selfplay/reward" : names[0];
  show(select.value);
  const everything = csvButton("all metrics", () => csvOfEverything(names), "Save all numbers (CSV)");
  element.append(h("div", { class: "filters" }, h("label", {}, "Metric", select), everything), box);
  if (missing) element.append(h("p", { class: "missing" }, missing));
}

let ready = false;
controls();
if (runs.length) {
  const faults = banner();
  if (faults) $("main").append(faults);
  const overview = section("overview", "Overview", "");
  overview.append(
    h("div", { class: several ? "" : "beside" }, h("div", { class: "cards" }, runs.map(runCard)), comparison()),
  );
  overview.append(...settingsTables().filter(Boolean));
}
if (evaluations.length) showEvaluations();
if (runs.length) {
  anyMetric(plots());
}
const transcripts = runs.length ? section("transcripts", "Transcripts", "") : null;
redrawAll();
ready = true;
$("footer").append(
  `Written ${date(data.written)} by spell report. The page connects to nothing. `,
  runs.length
    ? "Click a point of a plot for the transcripts of its step. Drag over a plot to enlarge a range, double-click to go " +
        "back. CSV saves the numbers of a plot."
    : "",
);

// Transcripts are the bulk of the page: they come when the plots are there.
await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
if (runs.length) showTranscripts(await unpack("transcripts-data"));
document.documentElement.dataset.ready = "true";
