/* The page's beginning: what there is to explore, the tabs, and the latent that the address names. */
const TABS = ["latent", "search", "steer", "compare"];
let allRuns = [];

function showTab(name) {
  for (const tab of TABS) {
    page(tab).hidden = tab !== name;
    page(`tab-${tab}`).setAttribute("aria-selected", tab === name);
    page(`tab-${tab}`).tabIndex = tab === name ? 0 : -1;
  }
}

for (const [place, tab] of TABS.entries()) {
  page(`tab-${tab}`).addEventListener("click", () => showTab(tab));
  page(`tab-${tab}`).addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    const next = TABS[(place + step + TABS.length) % TABS.length];
    showTab(next);
    page(`tab-${next}`).focus();
  });
}

function drawMemory(state) {
  const rows = state.runs.map((run) => make("tr", {}, make("th", {}, run.name), make("td", {}, run.architecture), make("td", {}, number(run.k)),
    make("td", {}, run.latents.toLocaleString("en")), make("td", {}, run.megabytes === null ? "not loaded" : `${number(run.megabytes)} MB`),
    make("td", {}, run.seconds === null ? "–" : `${number(run.seconds)} s`)));
  page("loaded").replaceChildren(
    make("thead", {}, make("tr", {}, ...["run", "architecture", "k", "latents", "memory", "loaded in"].map((head) => make("th", {}, head)))),
    make("tbody", {}, ...rows));
  page("memory-note").textContent = `The language model takes ${state.megabytes.toLocaleString("en")} MB and was loaded in ${number(state.seconds)} s.`
    + ` An SAE is loaded when it is first asked for. The SAEs were trained on texts of up to ${state.trained_context} tokens.`;
}

async function showState() {
  try {
    drawMemory(await (await fetch("/api/state")).json());
  } catch {
    showStopped(true);
  }
}

function fromHash(values) {
  if (allRuns.includes(values.run) && /^\d{1,9}$/.test(values.latent || "")) {
    Object.assign(opened, { run: values.run, index: Number(values.latent), live: null });
    showTab("latent");
    loadLatent();
  }
}

async function start() {
  let state;
  try {
    state = await (await fetch("/api/state")).json();
  } catch {
    return showStopped(true);
  }
  allRuns = state.runs.map((run) => run.name);
  shownRuns = allRuns.slice(0, 4);
  document.title = `Explorer: ${state.profile}`;
  page("where").textContent = `${state.profile}: ${state.model} at ${state.hook_point}`;
  page("report").hidden = !state.has_report;
  page("command").textContent = state.command;
  page("steer-tokens").max = state.limits.new_tokens;
  for (const choice of document.querySelectorAll(".run-choice")) choice.replaceChildren(...allRuns.map((name) => make("option", { value: name }, name)));
  page("compare-b").value = allRuns[1] ?? allRuns[0];
  drawRuns(allRuns);
  drawMemory(state);
  followers.push(fromHash);
  fromHash(readHash() || {});
}

start();
