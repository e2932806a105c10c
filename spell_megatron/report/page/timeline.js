// What trainer and engines did in each step, beside each other.

const SHOWN_STEPS = 4;

/** The timeline of a run; null if it has recorded none. */
function timelineCard(run, index) {
  const line = run.timeline;
  if (!line) return null;
  const lanes = h("div", { class: "lanes" });
  const last = Math.max(0, line.steps.length - SHOWN_STEPS);
  const from = h(
    "select",
    { "aria-label": "First step of the timeline", onchange: () => draw() },
    line.steps.map(({ step }, i) => h("option", { value: i, ...(i === last && { selected: true }) }, `step ${step}`)),
  );

  function draw() {
    const shown = line.steps.slice(+from.value, +from.value + SHOWN_STEPS);
    const longest = Math.max(...shown.map(({ seconds }) => seconds));
    const rows = shown.flatMap((step) => [
      ...laneRow(line, step, "trainer", longest),
      ...laneRow(line, step, "engines", longest),
    ]);
    lanes.replaceChildren(...rows, h("span", {}), h("div", { class: "ticks" }, ticks(longest)), h("span", {}));
  }

  draw();
  return h(
    "article",
    { class: "panel timeline" },
    h(
      "header",
      {},
      h("h3", { class: "chip" }, several ? swatch(runColour(index)) : null, `Timeline${several ? `: ${run.name}` : ""}`),
      h("div", { class: "tools" }, h("label", {}, "From ", from)),
    ),
    h("p", { class: "about" }, timelineText(line)),
    h("div", { class: "legend" }, timelineLegend(line)),
    lanes,
  );
}

/** Cells of a lane in a step: its name, its bar, its share of work. */
function laneRow(line, step, lane, longest) {
  const share = (seconds) => `${(100 * seconds) / longest}%`;
  const place = (element, start) => {
    element.style.left = share(start);
    return element;
  };
  const spans = step[lane].map(([name, start, seconds]) => {
    const [label, colour] = line.names[name];
    const title = `${label}: ${format(seconds, "seconds")}, from ${format(start, "seconds")}`;
    return place(h("div", { colour, width: `max(1px, ${share(seconds)})`, title }), start);
  });
  const first = lane === "trainer";
  const done = lane === "trainer" ? step.work[0] : step.work[1];
  const spoken = `${lane} in step ${step.step}: ${spans.map((span) => span.title).join("; ") || "idle"}`;
  return [
    h("span", { class: first ? "first" : "" }, first ? `step ${step.step} ` : "", h("span", { class: "soft" }, lane)),
    h(
      "div",
      { class: `lane${first ? " first" : ""}`, role: "img", "aria-label": spoken },
      h("div", { class: "whole", width: share(step.seconds) }),
      spans,
    ),
    h("span", { class: `soft${first ? " first" : ""}` }, `${format(done / (step.seconds || 1), "share", 0)} at work`),
  ];
}

/** Seconds below the bars. */
function ticks(longest) {
  const unit = longest >= 7200 ? 3600 : longest >= 180 ? 60 : 1;
  const name = { 1: "s", 60: "min", 3600: "h" }[unit];
  const most = longest / unit;
  const step = [0.1, 0.2, 0.5, ...WHOLE].find((one) => most / one <= 6) ?? most;
  const places = Array.from({ length: Math.floor(most / step) + 1 }, (_, i) => i * step);
  return places.map((place) => {
    const tick = h("span", {}, `${grouped(place, digitsOf(step))} ${name}`);
    tick.style.left = `${(100 * place) / most}%`;
    return tick;
  });
}

function timelineLegend({ names, seconds }) {
  const entries = names.filter(([, , whole]) => whole > 0);
  return entries.map(([label, colour, whole]) =>
    h("span", {}, swatch(colour), label, h("span", { class: "value" }, format(whole / seconds, "share", 0))),
  );
}

function timelineText({ work, seconds, count, hidden, names }) {
  const idle = (lane) => format(1 - work[lane] / seconds, "share", 0);
  const update = names.filter(([name]) => name === "update" || name === "accumulate").reduce((sum, one) => sum + one[2], 0);
  const overlap =
    hidden && update ? ` ${format(hidden / update, "share", 0)} of the update ran while the engines wrote (accumulate).` : "";
  return (
    `What trainer and engines did. Grey: idle. Of all ${times(count, "step")}, the trainer was idle for ` +
    `${idle("trainer")} of the time, the engines for ${idle("engines")}.${overlap} The legend has each kind's share.`
  );
}
