// Numbers to save: what a plot shows, as a table of comma-separated values.

/** A cell. Texts that a spreadsheet would take for a formula get an apostrophe. */
function cell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
  const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

const csv = (rows) => rows.map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";

/** The numbers of curves: a row for each run and step; as logged, and averaged if the plot's curves are. */
function csvOfCurves(curves) {
  const width = state.window;
  const columns = []; // label, and the values of each run
  for (const curve of curves) {
    const label = several ? "value" : curve.label;
    add(label, curve.run, curve.values);
    if (curve.smooth !== curve.values) add(`${label}, mean of ${width} steps`, curve.run, curve.smooth);
    if (curve.error) add(`${label}, standard error`, curve.run, curve.error);
  }
  function add(label, run, values) {
    const column = columns.find((one) => one.label === label) ?? { label, of: new Map() };
    if (!column.of.size) columns.push(column);
    column.of.set(run, values);
  }
  const members = [...new Set(curves.map((curve) => curve.run))].sort((a, b) => a - b);
  const rows = members.flatMap((member) => csvRows(runs[member], columns.map(({ of }) => of.get(member))));
  return csv([["run", "step", "seconds of work", ...columns.map(({ label }) => label)], ...rows]);
}

/** Rows of a run: its name, step, seconds of work so far, and values; steps without any value are left out. */
function csvRows(run, columns) {
  const kept = run.steps.map((_, i) => i).filter((i) => columns.some((values) => (values?.[i] ?? null) !== null));
  return kept.map((i) => [run.name, run.steps[i], run.axes.time?.[i], ...columns.map((values) => values?.[i])]);
}

/** Every number of the runs. */
function csvOfEverything(names) {
  const rows = runs.flatMap((run) => csvRows(run, names.map((name) => run.metrics[name])));
  return csv([["run", "step", "seconds of work", ...names], ...rows]);
}

/** A button that saves a table under a title. */
function csvButton(title, table, text = "CSV") {
  const save = () => {
    const link = h("a", {
      href: URL.createObjectURL(new Blob([table()], { type: "text/csv" })),
      download: `${title.toLowerCase().replace(/[^a-z0-9]+/g, "-")}.csv`,
    });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  };
  return h("button", { type: "button", class: "save", "aria-label": `Save ${title} as CSV`, onclick: save }, text);
}
