/* One latent: the report's figures, its activations on the text, its neighbours, what it promotes, where it fires. */
const CONTEXTS = 6;
const opened = { run: null, index: null, live: null, text: null };

/* Opens a latent in the panel, colours the text by it, and notes it in the address. */
function openLatent(run, index) {
  if (!allRuns.includes(run)) return;
  Object.assign(opened, { run, index, live: null });
  writeHash({ run, latent: index }, true);
  showTab("latent");
  loadLatent();
}

function loadLatent() {
  const { run, index } = opened;
  for (const name of ["latent", "steer"]) page(`${name}-run`).value = run;
  page("latent-index").value = page("steer-latent").value = index;
  markOpen();
  const text = reading ? readText : "";
  return ask("latent", { run, latent: index, text, runs: allRuns.slice(0, 8) }, (answer) => {
    Object.assign(opened, { live: answer.live, text });
    drawLatent(answer);
    drawText();
    showState();
  });
}

function figures(answer) {
  const rows = [
    ["fires on", `${percent(answer.density)} of ${answer.rows_scanned.toLocaleString("en")} rows`],
    ["maximum", number(answer.max_activation)],
  ];
  if (answer.live) {
    const most = Math.max(...answer.live.activations);
    const share = answer.max_activation ? ` (${percent(most / answer.max_activation)} of its maximum)` : "";
    rows.push(["on this text", most ? number(most) + share : "silent"]);
  }
  return make("dl", {}, ...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

function logits(title, tokens, values) {
  return [make("h3", {}, title), make("p", {}, ...tokens.map((token, place) =>
    make("span", { class: "chip", title: number(values[place]) }, named(token))))];
}

function effectNote(answer) {
  const chance = answer.random_logit_effect;
  return make("p", { class: "note" }, `Their logits lie ${number(answer.logit_effect)} standard deviations off the mean`
    + (chance ? `; of random directions 95% stay below ${number(chance)}.` : "."));
}

function contextOf(context) {
  const most = Math.max(...context.values);
  return make("div", { class: "context" },
    make("p", { class: "from" }, make("span", {}, context.title || context.source), make("b", {}, number(most))),
    make("p", { class: "text" }, ...context.tokens.map((token, place) => make("span", {
      class: place === context.peak ? "peak" : null,
      style: context.values[place] > 0 ? `background: rgba(var(--shade), ${(0.15 + 0.85 * context.values[place] / most).toFixed(3)})` : null,
    }, token))));
}

function drawLatent(answer) {
  const matches = Object.entries(answer.matches).map(([run, match]) => [run, match]);
  const contexts = answer.dashboard?.contexts.slice(0, CONTEXTS);
  page("latent-result").replaceChildren(
    make("h2", {}, `#${answer.index} of ${answer.run}`), figures(answer),
    ...(answer.promoted.length ? [...logits("Promotes", answer.promoted, answer.promoted_logits),
      ...logits("Suppresses", answer.suppressed, answer.suppressed_logits), effectNote(answer)] : []),
    make("h3", {}, "Nearest dictionary vectors, by cosine"),
    ...answer.neighbours.map((other) => hit(answer.run, other.index, other.label, other.cosine, other.cosine)),
    ...(matches.length ? [make("h3", {}, "In the other runs, by cosine")] : []),
    ...matches.flatMap(([run, match]) => [make("p", { class: "note" }, run), hit(run, match.index, match.label, match.cosine, match.cosine)]),
    make("h3", {}, "Where it fires most"),
    ...(contexts ? contexts.map(contextOf) : [make("p", { class: "missing" }, "The evaluation shows no texts of this latent, as of most.")]),
  );
}

page("latent-open").addEventListener("click", () => openLatent(page("latent-run").value, Number(page("latent-index").value)));
page("latent-index").addEventListener("keydown", (event) => {
  if (event.key === "Enter") page("latent-open").click();
});
