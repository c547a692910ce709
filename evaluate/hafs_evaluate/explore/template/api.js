/* Requests to the server: one of a kind at a time, with a word on what is being waited for, and on a server that stopped. */
const BEAT = 10_000;  // milliseconds between two looks whether the server still answers
const page = (id) => document.getElementById(id);
const running = {};  // kind of request -> its AbortController
let isStopped = false;
let watching = 0;

function showStopped(stopped) {
  isStopped = stopped;
  page("stopped").hidden = !stopped;
  if (stopped && !watching) watching = setInterval(beat, 2_000);
  if (!stopped && watching) watching = clearInterval(watching) || 0;
}

async function beat() {
  try {
    const answer = await (await fetch("/api/at-work")).json();
    showStopped(false);
    return answer.at_work;
  } catch {
    showStopped(true);
    return null;
  }
}
setInterval(() => document.hidden || isStopped || beat(), BEAT);

/* What is waited for, once it takes longer than the blink of an eye. */
let busyTimer = 0;
function showBusy() {
  const own = Object.keys(running).length;
  clearTimeout(busyTimer);
  if (!own) return void (page("busy").textContent = "");
  busyTimer = setTimeout(async () => {
    const all = await beat();
    const left = Object.keys(running).length;
    if (!left) return;
    page("busy").textContent = all > left
      ? `waiting: the model answers ${all} requests, one after the other, yours among them`
      : `the model is at work: ${Object.keys(running).join(", ")}`;
    showBusy();
  }, page("busy").textContent ? 1000 : 300);
}

/* The server's response to a request of one kind; an earlier one of the kind is dropped. Throws an Error to be shown. */
async function post(kind, body) {
  running[kind]?.abort();
  const controller = new AbortController();
  running[kind] = controller;
  showBusy();
  let response;
  try {
    response = await fetch(`/api/${kind}`, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal: controller.signal,
    });
  } catch (error) {
    finished(kind, controller);
    if (controller.signal.aborted) throw error;
    showStopped(true);
    throw new Error("The server no longer answers.");
  }
  if (!response.ok) {
    finished(kind, controller);
    throw new Error((await response.json().catch(() => ({}))).error || `The server answers ${response.status}.`);
  }
  showStopped(false);
  return { response, controller };
}

function finished(kind, controller) {
  if (running[kind] === controller) delete running[kind];
  showBusy();
}

/* Asks, and passes the answer to `show`; an error becomes the text of the element `<place>-error`. */
async function ask(kind, body, show, place = kind) {
  page(`${place}-error`).textContent = "";
  try {
    const { response, controller } = await post(kind, body);
    const answer = await response.json().finally(() => finished(kind, controller));
    if (!controller.signal.aborted) show(answer);
  } catch (error) {
    if (error.name !== "AbortError") page(`${place}-error`).textContent = error.message;
  }
}
