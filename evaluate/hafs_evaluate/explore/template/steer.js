/* Continuations with a latent changed, as the server computes them: one line of JSON for each token. */
let steering = null;

function shownTail(text) {
  return text.length > 160 ? "…" + text.slice(-160) : text;
}

/* The prompt's end, what both continuations begin with, and marked what differs from there on. */
function drawContinued(prompt, texts) {
  let same = 0;
  while (same < texts.plain.length && texts.plain[same] === texts.steered[same]) same += 1;
  for (const which of ["plain", "steered"]) {
    const text = texts[which];
    const differs = which === "steered" && texts.plain.length > same ? text.slice(same) : "";
    page(`steer-${which}`).replaceChildren(make("span", { class: "prompt" }, shownTail(prompt)), text.slice(0, text.length - differs.length), make("mark", {}, differs));
  }
}

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

async function steer() {
  const value = (id) => Number(page(`steer-${id}`).value);
  const body = {
    text: page("text").value, run: page("steer-run").value, latent: value("latent"), mode: page("steer-mode").value,
    strength: value("strength"), new_tokens: value("tokens"), temperature: value("temperature"), seed: value("seed"),
  };
  page("steer-error").textContent = page("steer-said").textContent = "";
  const texts = { plain: "", steered: "" };
  let isDone = false;
  try {
    const { response, controller } = await post("steer", body);
    steering = controller;
    page("steer-stop").disabled = false;
    try {
      for await (const line of lines(response)) {
        if (line.error) throw new Error(line.error);
        if (line.which) {
          texts[line.which] = line.text;
          page("steer-result").hidden = false;
          drawContinued(body.text, texts);
        } else if (line.done) {
          isDone = true;
          page("steer-said").textContent = line.is_same ? "The two are the same." : `They differ from token ${line.first_difference === null ? "the end" : line.first_difference + 1} on.`;
        } else page("steer-said").textContent = `${body.mode === "add" ? "adding" : "clamped to"} ${number(line.value)}; the maximum is ${number(line.maximum)}.${cutNote(line)}`;
      }
      if (!isDone) showStopped(true);
    } finally {
      finished("steer", controller);
    }
  } catch (error) {
    if (error.name === "AbortError") page("steer-said").textContent = "Stopped.";
    else if (error instanceof TypeError) showStopped(true);
    else page("steer-error").textContent = error.message;
  }
  page("steer-stop").disabled = !("steer" in running);
  showState();
}

page("steer-go").addEventListener("click", steer);
page("steer-stop").addEventListener("click", () => steering?.abort());
