// The browser of transcripts.

let wanted = null; // what to show as soon as the transcripts are there

/** Shows the transcripts of a run's step, or says that the page has none. */
let showTranscriptsOf = (run, step) => (wanted = [run, step]);

function showTranscripts(questions) {
  const PAGE_SIZE = 30;
  const unique = (values) => [...new Set(values)];
  const filter = (label, values, text = (value) => value) =>
    h(
      "label",
      {},
      label,
      h(
        "select",
        { onchange: () => list() },
        h("option", { value: "" }, "all"),
        values.map((v) => h("option", { value: v }, text(v))),
      ),
    );
  if (!questions.length) {
    showTranscriptsOf = () => transcripts.scrollIntoView();
    transcripts.append(
      h(
        "p",
        { class: "about" },
        "There are none: the runs were told not to keep what the policy writes (logging.dump: none), have not ",
        "finished a step, or --transcripts was 0.",
      ),
    );
    return;
  }
  const texts = questions.map((q) =>
    [q.question?.text, q.question?.output, q.reference, q.cluster, q.uid, ...q.answers.map((a) => a.output)]
      .join("\n")
      .toLowerCase(),
  );
  const steps = unique(questions.map((q) => q.step)).sort((a, b) => a - b);
  const filters = {
    run: filter(
      "Run",
      runs.map((_, i) => String(i)),
      (i) => runs[+i].name,
    ),
    step: filter("Step", steps.map(String)),
    task: filter("Task", unique(questions.map((q) => q.task)).sort()),
    outcome: filter(
      "Outcome",
      unique([...Object.keys(data.outcomes), ...questions.map((q) => q.outcome)]).filter((key) =>
        questions.some((q) => q.outcome === key),
      ),
      (key) => outcome(key).label,
    ),
  };
  if (!several) filters.run.hidden = true;
  const against = h("input", { type: "checkbox", id: "against", onchange: () => list() });
  const search = h("input", {
    type: "search",
    id: "search",
    placeholder: "words in question or answers",
    oninput: () => list(),
    "aria-label": "Search",
  });
  for (const [name, label] of Object.entries(filters)) label.lastChild.id = `filter-${name}`;
  const count = h("p", { class: "count", "aria-live": "polite", tabindex: -1 });
  const instead = h("p", { class: "about", id: "instead", "aria-live": "polite", hidden: true });
  const box = h("div", { id: "questions" });
  const more = h("button", { type: "button", class: "more", onclick: () => extend() }, "Show more");
  let found = [];
  let shown = 0;

  function list() {
    instead.hidden = true;
    const chosen = Object.fromEntries(Object.entries(filters).map(([name, label]) => [name, label.lastChild.value]));
    const words = search.value.toLowerCase().trim();
    found = questions.filter(
      (q, i) =>
        ["run", "step", "task", "outcome"].every((key) => !chosen[key] || String(q[key]) === chosen[key]) &&
        (!against.checked || q.answers.some((a) => a.verdict !== null && a.verdict !== a.rule)) &&
        (!words || texts[i].includes(words)),
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
    h(
      "p",
      { class: "about" },
      `A sample: ${questions.length} questions of ${steps.length} steps, of each task and outcome about as many. ` +
        `Texts over ${grouped(data.text_chars, 0)} characters lose their middle, ` +
        `judgments over ${grouped(data.judgment_chars, 0)}. ` +
        "spell report --transcripts N --text-chars N takes more or less; the folder rollouts/ of a run has all.",
    ),
    h(
      "div",
      { class: "filters" },
      Object.values(filters),
      h("label", {}, against, "verdict against the rule check"),
      search,
    ),
    count,
    instead,
    box,
    more,
  );
  list();
  showTranscriptsOf = (run, step) => {
    const own = unique(questions.filter((q) => q.run === run).map((q) => q.step));
    const nearest = own.sort((a, b) => Math.abs(a - step) - Math.abs(b - step))[0];
    for (const label of Object.values(filters)) label.lastChild.value = "";
    filters.run.lastChild.value = String(run);
    filters.step.lastChild.value = nearest === undefined ? "" : String(nearest);
    against.checked = false;
    search.value = "";
    list();
    if (nearest !== step) {
      const file = `rollouts/step_${String(step).padStart(6, "0")}`;
      const which = several ? ` of ${runs[run].name}` : "";
      instead.textContent =
        `This page has no transcripts of step ${step}${which}` +
        `${nearest === undefined ? "" : `; here is the nearest step, ${nearest}`}. All that was written in a step is in ` +
        `${file}.* of the run's folder; spell report --transcripts N takes more steps into the page.`;
      instead.hidden = false;
    }
    transcripts.scrollIntoView();
    count.focus({ preventScroll: true });
  };
  if (wanted) showTranscriptsOf(...wanted);
}

/** An outcome's label and colour; a later version's outcome has its name. */
const outcome = (key) => data.outcomes[key] ?? { label: key, colour: "grey" };
const outcomeChip = (key) =>
  h("span", { class: "chip" }, swatch(outcome(key).colour), outcome(key).label.split(":")[0]);
const signed = (value) => (value ? `${value > 0 ? "+" : "−"}${Math.abs(value).toFixed(2)}` : "–");
const mark = (value) =>
  value === null || value === undefined
    ? h("span", { class: "soft" }, "–")
    : value > 0
      ? h("span", { class: "yes" }, "right")
      : h("span", { class: "no" }, "wrong");
const points = (value) => value?.toFixed(2).replace("-", "−") ?? "–";

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
      h("span", { class: "reward" }, q.question ? points(q.question.reward) : ""),
    ),
  );
  item.addEventListener("toggle", () => item.open && item.children.length === 1 && item.append(questionBody(q)));
  return item;
}

const folded = (title, text) =>
  text === null || text === undefined
    ? null
    : h("details", {}, h("summary", { class: "soft" }, title), h("pre", {}, text));
const rows = (pairs) =>
  h(
    "dl",
    {},
    pairs
      .filter(([, value]) => value !== null && value !== undefined && value !== "")
      .flatMap(([label, value]) => [h("dt", {}, label), h("dd", {}, value)]),
  );

function questionBody(q) {
  const asked = q.question;
  const unseen = q.documents.filter((id) => !asked?.documents.includes(id));
  return h(
    "div",
    { class: "body" },
    rows([
      ["Question", asked?.text],
      ["Reference", q.reference],
      [
        "Gate",
        typeof asked?.gate === "number"
          ? `${Math.round(100 * asked.gate)} % of the answers from its documents reach the reference`
          : null,
      ],
      [
        "Reward",
        asked &&
          `${points(asked.reward)}, advantage ${signed(asked.advantage)}, ${asked.tokens} tokens` +
            (asked.truncated ? ", cut off" : ""),
      ],
      [
        "Place",
        `${several ? `${runs[q.run].name}, ` : ""}step ${q.step}, attempt ${q.uid}, ${q.task}, cluster ${q.cluster}`,
      ],
      ["Questioner saw", asked && (asked.documents.join(", ") || "no documents")],
      ["Responder also", unseen.length ? unseen.join(", ") : null],
    ]),
    folded(`What the questioner wrote (${asked?.tokens} tokens)`, asked?.output),
    folded(`The questioner's prompt (${asked?.prompt_tokens} tokens)`, asked?.prompt),
    q.answers.length
      ? folded(`The responder's prompt (${q.answers[0].prompt_tokens} tokens)`, q.responder_prompt)
      : null,
    q.answers.length ? h("h4", {}, `${q.answers.length} answers`) : null,
    q.answers.length
      ? h(
          "div",
          { class: "answer head" },
          ["", "answer", "rule", "verdict", "votes", "reward", "advantage"].map((text, i) =>
            h("span", { class: i >= 5 ? "number" : "" }, text),
          ),
        )
      : null,
    q.answers.map(answerItem),
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
      h(
        "span",
        { class: "votes soft" },
        answer.judgments.length ? `${votes[0]} yes, ${votes[1]} no${votes[2] ? `, ${votes[2]} invalid` : ""}` : "–",
      ),
      h("span", { class: "number" }, points(answer.reward)),
      h("span", { class: "advantage number soft" }, signed(answer.advantage)),
    ),
  );
  item.addEventListener("toggle", () => {
    if (!item.open || item.children.length > 1) return;
    const judgments = answer.judgments.map((j) =>
      h(
        "div",
        { class: "judgment" },
        h(
          "span",
          { class: j.vote > 0 ? "yes" : j.vote < 0 ? "soft" : "no" },
          j.vote > 0 ? "yes" : j.vote < 0 ? "invalid" : "no",
        ),
        h("span", { class: "soft" }, points(j.reward)),
        h("pre", {}, j.output),
      ),
    );
    item.append(
      h(
        "div",
        { class: "inner" },
        h("p", { class: "soft" }, `${answer.tokens} tokens${answer.truncated ? ", cut off" : ""}`),
        h("pre", {}, answer.output),
        judgments.length ? h("h4", {}, "Judgments: vote, reward, text") : null,
        judgments,
      ),
    );
  });
  return item;
}
