/* The typed text: its tokens, and the strongest latents of each run on one of them or on all. */
const EXAMPLES = [
  "The river rises in the mountains of northern Italy and flows south to the sea.",
  "In 1969, Neil Armstrong became the first person to walk on the Moon.",
  "def add(a, b):\n    return a + b",
];
let reading = null;  // the server's answer for the text that is shown
let readText = "";
let shownRuns = [];
let chosen = null;  // place of the token that was clicked
let hovered = null;

function read(then) {
  const text = page("text").value;
  return ask("read", { text, runs: shownRuns }, (answer) => {
    const isNew = text !== readText;
    [reading, readText] = [answer, text];
    if (isNew) chosen = hovered = null;
    page("read-result").hidden = false;
    drawText();
    if (opened.index !== null) loadLatent();
    showState();
    if (typeof then === "function") then();
  });
}

/* The text's tokens, coloured by the latent that is open. */
function drawText() {
  if (!reading) return;
  const live = opened.live && opened.text === readText ? opened.live : null;
  const most = live ? Math.max(...live.activations) : 0;
  drawStrip(page("strip"), reading, live?.activations, most);
  page("strip-note").textContent = (live
    ? `Coloured by #${opened.index} of ${opened.run}: ${most ? `at most ${number(most)} here` : "it is silent here"}.`
    : "Click a token for its latents, and a latent to colour the text by it.") + cutNote(reading);
  drawColumns();
}

function drawColumns() {
  const place = hovered ?? chosen;
  for (const token of page("strip").children) token.setAttribute("aria-selected", Number(token.dataset.place) === chosen);
  page("columns-title").textContent = place === null ? "Strongest on the text" : `Strongest on “${reading.tokens[place]}”`;
  page("columns-of-runs").replaceChildren(...Object.entries(reading.runs).map(([run, found]) => {
    const list = place === null ? found.on_text : found.by_token[place];
    const active = place === null ? "" : LEFT_OUT[reading.kinds[place]] ? "left out" : `${found.l0[place]} latents fire`;
    return make("div", {}, make("h3", {}, run), make("p", { class: "l0" }, active),
      ...list.map(([index, value]) => hit(run, index, found.labels[index], value, value / found.max[index])),
      ...(list.length ? [] : [make("p", { class: "missing" }, "None fires.")]));
  }));
}

function drawRuns(names) {
  page("shown").replaceChildren(...names.map((name) => make("label", {}, make("input", {
    type: "checkbox", value: name, ...(shownRuns.includes(name) ? { checked: "" } : {}),
    onchange: () => {
      shownRuns = [...page("shown").querySelectorAll(":checked")].map((box) => box.value);
      read();
    } }), ` ${name}`)));
}

function choose(place) {
  chosen = place;
  hovered = null;
  drawColumns();
}

page("read").addEventListener("click", () => read());
page("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) read();
});
page("strip").addEventListener("click", (event) => {
  const token = event.target.closest("[data-place]");
  if (token) choose(Number(token.dataset.place) === chosen ? null : Number(token.dataset.place));
});
page("strip").addEventListener("mouseover", (event) => {
  const token = event.target.closest("[data-place]");
  const place = token ? Number(token.dataset.place) : null;
  if (place === hovered) return;
  hovered = place;
  drawColumns();
});
page("strip").addEventListener("mouseleave", () => {
  hovered = null;
  drawColumns();
});
page("strip").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step && reading) {
    event.preventDefault();
    choose(Math.min(reading.tokens.length - 1, Math.max(0, (chosen ?? -1) + (page("strip").dir === "rtl" ? -step : step))));
  } else if (event.key === "Escape") choose(null);
});
page("examples").append(...EXAMPLES.map((text) => make("button", { type: "button", class: "link", onclick: () => {
  page("text").value = text;
  read();
} }, text.split(/\s+/).slice(0, 3).join(" ") + " …")));
