// Cards and tables: what stands beside the plots.

const swatch = (colour) => h("span", { class: "swatch", colour });

function runCard(run, index) {
  const name = Object.keys(run.metrics).find((metric) => metric === "validation/pass@1");
  const values = name ? run.metrics[name] : [];
  const [from, to] = [values.findIndex((v) => v !== null), lastIndex(values)];
  const error = (i) => run.metrics["validation/standard_error"]?.[i] ?? null;
  const plusMinus = (i) => (error(i) === null ? "" : ` ± ${format(error(i), "share")}`);
  const taken = run.planned ? `${run.steps.at(-1) ?? 0} of ${run.planned}` : `${run.steps.at(-1) ?? 0}`;
  const rows = [
    ["steps", taken],
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
          h("small", {}, `${plusMinus(to)}  held-out pass@1`),
        )
      : null,
    h(
      "dl",
      {},
      rows.flatMap(([label, value]) => [h("dt", {}, label), h("dd", {}, String(value))]),
    ),
    run.notes.map((note) => h("p", { class: "about" }, note)),
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
  const box = h("div", {
    class: "table",
    id: "comparison",
    tabindex: 0,
    role: "region",
    "aria-label": "First, last and best values",
  });
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
          h("p", {}, `Values ${averaged}${several ? "; bold: the best of the runs" : ""}.`),
        ),
        h(
          "thead",
          {},
          several
            ? h(
                "tr",
                {},
                h("th", {}),
                members.map(({ run, index }) =>
                  h(
                    "th",
                    { class: "run", colspan: 4, scope: "colgroup" },
                    h("span", { class: "chip" }, swatch(runColour(index)), run.name),
                  ),
                ),
              )
            : null,
          h(
            "tr",
            {},
            h("th", {}),
            members.flatMap(() => ["first", "last", "best", "step"].map((text) => h("th", { scope: "col" }, text))),
          ),
        ),
        h(
          "tbody",
          {},
          rows.map((row) => comparisonRow(row, members)),
        ),
      ),
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
    return {
      first: values.find((v) => v !== null),
      last: values[lastIndex(values)],
      best,
      bestValue: values[best],
      step: run.steps[best],
    };
  });
  const filled = columns.filter(Boolean);
  const digits = digitsFor(Math.max(...filled.flatMap((c) => [Math.abs(c.first), Math.abs(c.last)])), row.unit);
  const top = (key) => {
    const values = filled.map((c) => c[key]);
    return several && filled.length > 1 && row.better
      ? row.better === "more"
        ? Math.max(...values)
        : Math.min(...values)
      : null;
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
            h(
              "td",
              { class: c.bestValue === topBest ? "winner" : "" },
              c.best < 0 ? "" : format(c.bestValue, row.unit, digits),
            ),
            h("td", { class: "soft" }, c.best < 0 ? "" : String(c.step)),
          ],
    ),
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
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          h("th", {}),
          runs.map((run, i) => h("th", { scope: "col" }, h("span", { class: "chip" }, swatch(runColour(i)), run.name))),
        ),
      ),
      h(
        "tbody",
        {},
        data.settings.map(([key, ...values]) =>
          h(
            "tr",
            {},
            h("th", { scope: "row" }, key),
            values.map((v) => h("td", {}, v)),
          ),
        ),
      ),
    ),
  );
}

/** Share of the attempts that come as far as each stage, in the first and the last tenth of a run's steps. */
function funnelCard(run, index) {
  const rates = (name) => run.metrics[`selfplay/rate/${name}`];
  if (!rates("mixed")) return null;
  const logged = run.steps.map((_, i) => i).filter((i) => rates("mixed")[i] !== null);
  const tenth = Math.max(1, Math.round(logged.length / 10));
  const mean = (outcomes, part) =>
    part.reduce((sum, i) => sum + outcomes.reduce((s, name) => s + (rates(name)?.[i] ?? 0), 0), 0) / part.length;
  const [start, end] = [logged.slice(0, tenth), logged.slice(-tenth)];
  const steps = (part) =>
    part.length === 1 ? `step ${run.steps[part[0]]}` : `steps ${run.steps[part[0]]} to ${run.steps[part.at(-1)]}`;
  return h(
    "article",
    { class: "panel" },
    h(
      "h3",
      { class: "chip" },
      several ? swatch(runColour(index)) : null,
      `How far attempts come${several ? `: ${run.name}` : ""}`,
    ),
    h("p", { class: "about" }, `Share of attempts: ${steps(start)} (marks) → ${steps(end)} (bars).`),
    h(
      "div",
      { class: "funnel" },
      data.funnel.map(({ label, outcomes, colour }, stage) => {
        // all attempts reach the first stage
        const [before, after] = stage ? [mean(outcomes, start), mean(outcomes, end)] : [1, 1];
        const mark = h("div", { class: "mark" });
        mark.style.left = `calc(${Math.min(100, before * 100)}% - 1px)`;
        return h(
          "div",
          { class: "stage" },
          h("span", {}, label),
          h(
            "div",
            { class: "track" },
            h("div", { class: "bar", colour, width: `${after * 100}%` }),
            stage ? mark : null,
          ),
          h("span", { class: "values" }, stage ? `${format(before, "share")} → ${format(after, "share")}` : "100%"),
        );
      }),
    ),
  );
}
