// Cards and tables: what stands beside the plots.

const times = (count, word) => `${grouped(count, 0)} ${word}${count === 1 ? "" : "s"}`;

/** What went wrong in the runs, and what to do about it; null if nothing did. */
function banner() {
  const faulty = runs.filter((run) => run.findings.length);
  if (!faulty.length) return null;
  const item = ({ title, text, remedy, section, grave }) =>
    h(
      "li",
      { class: grave ? "grave" : "" },
      h("strong", {}, `${grave ? "✖ " : "⚠ "}${title}. `),
      h("span", { class: "what" }, text),
      h("span", { class: "remedy" }, h("b", {}, "What to do: "), remedy, " "),
      section === "overview" ? null : h("a", { href: `#${section}` }, "See the plots"),
    );
  return h(
    "section",
    { id: "banner", "aria-label": "What went wrong" },
    faulty.flatMap((run) => [
      several ? h("h3", {}, swatch(runColour(runs.indexOf(run))), run.name) : null,
      h("ul", {}, run.findings.map(item)),
    ]),
  );
}

const STATES = {
  finished: "finished",
  running: "still going",
  starting: "starting",
  stopped: "stopped early",
  failed: "failed",
  silent: "gives no sign of life",
};
const KINDS = { better: "▲ ", worse: "▼ ", same: "= ", unknown: "" };

/** Rows of a run's card: [label, text]. */
function runFacts(run) {
  const made = run.made.filter((one) => one === true).length;
  const left = run.made.filter((one) => one === false).length;
  const steps = `${run.steps.at(-1) ?? 0}${run.planned ? ` of ${run.planned}` : ""}`;
  const work = run.seconds.reduce((sum, one) => sum + one, 0);
  const paused = run.pauses.reduce((sum, [, seconds]) => sum + seconds, 0);
  const pauses = `${duration(paused)} before ${run.pauses.length > 3 ? times(run.pauses.length, "step") : run.pauses.map(([step]) => `step ${step}`).join(", ")}`;
  return [
    ["steps", STATES[run.state] ? `${steps}, ${STATES[run.state]}` : steps],
    ["updates", made || left ? `${made} made${left ? `, ${left} left out` : ""}` : null],
    ["time at work", work ? duration(work) : null],
    ["pauses, starts", paused ? pauses : null],
    ["clock", run.set_back.length ? `was set back before step ${run.set_back.slice(0, 3).join(", ")}` : null],
    ["last step", run.last_time === null ? null : date(run.last_time)],
    ["model", run.facts["model.path"]],
    ["documents", run.facts["data.documents"]],
    ["seed", run.facts["run.seed"]],
    ["folder", run.folder],
  ].filter(([, value]) => value !== null && value !== undefined);
}

function headline({ first, last, error, questions }) {
  if (last === null) return null;
  const one = (share) => format(share, "share", 1);
  const measured =
    (error === null ? "" : ` ± ${one(error)}`) +
    ` of the answers to ${questions === null ? "held-out questions" : times(questions, "held-out question")} are right`;
  return h("p", { class: "headline" }, first === null ? "" : `${one(first)} → `, one(last), h("small", {}, measured));
}

function runCard(run, index) {
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
  const { kind, text } = run.verdict;
  const faults = run.findings.length;
  const health = faults ? `${times(faults, "fault")} found, see above.` : "✔ No fault found.";
  const told = faults || run.made.some((one) => one !== null);
  return h(
    "article",
    { class: "card" },
    h("h3", {}, several ? stroke(runColour(index), dash(index)) : null, run.name, show),
    headline(run.verdict),
    run.steps.length ? h("p", { class: `verdict ${kind}` }, KINDS[kind], text) : null,
    run.steps.length
      ? h("p", { class: "health" }, told ? health : "The log holds too little to tell whether the run is well.")
      : null,
    h(
      "dl",
      {},
      runFacts(run).flatMap(([label, value]) => [h("dt", {}, label), h("dd", {}, String(value))]),
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
    box.hidden = !rows.length;
    const averaged = state.window > 1 ? `averaged over ${state.window} steps, as the curves are` : "of single steps";
    box.replaceChildren(
      h(
        "table",
        {},
        h(
          "caption",
          {},
          h("h3", {}, several ? "First, last and best values of the runs" : "First, last and best values"),
          h("p", {}, `Values ${averaged}${several ? "; bold: the best of the runs" : ""}.${unequalQuestions(members)}`),
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

const sameQuestions = (members) =>
  members.every(({ run }) => run.question_set !== null && run.question_set === members[0].run.question_set);

/** Why no run's accuracy is marked as the best. */
function unequalQuestions(members) {
  const measured = members.filter(({ run }) => run.metrics["validation/pass@1"]);
  if (measured.length < 2 || sameQuestions(measured)) return "";
  return " Held-out accuracy of these runs cannot be compared: their questions differ, or are not known to be the same.";
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
  const measured = members.filter(({ run }) => run.metrics[row.metric]);
  const comparable = several && (row.across === "always" || (row.across === "questions" && sameQuestions(measured)));
  const top = (key) => {
    const values = filled.map((c) => c[key]);
    return filled.length > 1 && comparable
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

/** A table of settings: rows [key, value of the first run, …]. */
function settingsTable(title, rows, id) {
  return h(
    "div",
    { class: "table settings", id, tabindex: 0, role: "region", "aria-label": title },
    h(
      "table",
      {},
      h("caption", {}, h("h3", {}, title)),
      several
        ? h(
            "thead",
            {},
            h(
              "tr",
              {},
              h("th", {}),
              runs.map((run, i) =>
                h("th", { scope: "col" }, h("span", { class: "chip" }, swatch(runColour(i)), run.name)),
              ),
            ),
          )
        : null,
      h(
        "tbody",
        {},
        rows.map(([key, ...values]) =>
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

/** Settings in which runs differ; all settings and the versions of packages, folded. */
function settingsTables() {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.versions)))];
  const versions = names.map((name) => [name, ...runs.map((run) => run.versions[name] ?? "–")]);
  const different = [...data.settings, ...versions.filter(([, ...values]) => new Set(values).size > 1)];
  const all = data.all_settings;
  return [
    different.length ? settingsTable("Settings in which the runs differ", different, "differences") : null,
    all.length || versions.length
      ? h(
          "details",
          { class: "all-settings" },
          h("summary", {}, `All settings (${all.length}) and versions (${versions.length})`),
          versions.length ? settingsTable("Versions of packages", versions, "versions") : null,
          all.length ? settingsTable("Settings", all, "settings") : null,
        )
      : null,
  ];
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
