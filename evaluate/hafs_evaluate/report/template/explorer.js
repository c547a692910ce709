/* Latents: pick a variant, search, sort, open. What is shown is in the address's hash; the list draws what is in view. */
const explorer = document.getElementById("explorer");
const ROW = 30;  // pixels, as in the style
const NAMES = { index: "#", density: "density", max_activation: "max", cosine: "nearest" };
const narrow = matchMedia("(max-width: 760px)");
const view = { variant: "", latent: null, q: "", sort: "density", reversed: false };
const ui = explorer && Object.fromEntries(["list", "columns", "rows", "detail", "search", "sort", "direction", "count"].map((id) => [id, document.getElementById(id)]));
const variantNames = [...document.querySelectorAll("[data-variant]")].map((button) => button.dataset.variant);
const loaded = {};
let found = [];  // places in the record, in the order of the list
let cursor = -1;  // place in `found`
let started = false;

function words(id) {
  return embedded("strings")[id];
}

/* A variant's record with what is found from it; parsed when it is first needed. */
function recordOf(name) {
  if (!loaded[name]) {
    const record = embedded(`latents-${variantNames.indexOf(name)}`);
    const raw = atob(record.bytes);
    record.data = Uint8Array.from(raw, (character) => character.charCodeAt(0));
    record.bytes = null;
    let start = 0;
    record.starts = record.lengths.map((length) => (start += length) - length);
    record.placeOf = new Map(record.columns.index.map((index, place) => [index, place]));
    record.size = record.columns.index.length;
    loaded[name] = record;
  }
  return loaded[name];
}

/* Calls `each({source, document, title, peak, tokens, active, isRandom})` for every context of a latent. */
function readContexts(record, place, each) {
  const data = record.data;
  let at = record.starts[place];
  const next = () => {
    let value = 0, shift = 1, byte;
    do {
      byte = data[at++];
      value += (byte & 127) * shift;
      shift *= 128;
    } while (byte > 127);
    return value;
  };
  for (const isRandom of [false, true]) {
    for (let left = next(); left > 0; left--) {
      const context = { source: next(), document: next(), title: next() - 1, peak: next(), isRandom };
      context.tokens = Array.from({ length: next() }, next);
      let token = -1;
      context.active = Array.from({ length: next() }, () => {
        token += next() + 1;
        return [token, (next() / 1000) * record.scale[place]];
      });
      each(context);
    }
  }
}

function contextsOf(record, place) {
  const contexts = [];
  readContexts(record, place, (context) => contexts.push(context));
  return contexts;
}

/* What a search looks through: tokens, titles, promoted tokens and the contexts' text, in lower case. */
function textOf(record, place) {
  record.texts ||= [];
  if (record.texts[place] === undefined) {
    const parts = [record.top[place].map(([token]) => words(token)).join(" "), record.promoted[place].map(words).join(" ")];
    readContexts(record, place, (context) => {
      if (context.isRandom) return;
      if (context.title >= 0) parts.push(words(context.title));
      parts.push(context.tokens.map(words).join(""));
    });
    record.texts[place] = parts.join("\n").toLowerCase();
  }
  return record.texts[place];
}

function find() {
  const record = recordOf(view.variant);
  const query = view.q.trim().toLowerCase();
  const index = /^#?\d+$/.test(query) ? Number(query.replace("#", "")) : null;
  found = [];
  for (let place = 0; place < record.size; place++) {
    if (!query || record.columns.index[place] === index || textOf(record, place).includes(query)) found.push(place);
  }
  const values = record.columns[view.sort];
  const sign = (view.sort === "index") === view.reversed ? -1 : 1;
  found.sort((a, b) => {
    if (values[a] === null || values[b] === null) return (values[a] === null) - (values[b] === null);
    return sign * (values[a] - values[b]) || a - b;
  });
}

function columnsShown(record) {
  const every = Object.keys(record.columns);
  return narrow.matches ? ["index", view.sort === "index" ? "density" : view.sort] : every;
}

const titleOf = (name) => NAMES[name] || name.replaceAll("_", " ");
const shownIn = (name, value) => (name === "index" ? `#${value}` : name === "density" ? percent(value) : value === null ? "–" : number(Number(value.toPrecision(3))));

function drawHead(record) {
  const columns = columnsShown(record);
  ui.list.style.setProperty("--columns", `3.6rem ${"4.3rem ".repeat(columns.length - 1)}minmax(5rem, 1fr)`);
  ui.list.style.setProperty("--least", `${3.6 + 4.3 * (columns.length - 1) + 6}rem`);
  ui.columns.replaceChildren(
    ...columns.map((name) =>
      make("button", { type: "button", role: "columnheader", title: `sort by ${titleOf(name)}`, "data-sort": name,
        "aria-sort": view.sort !== name ? "none" : (name === "index") === view.reversed ? "descending" : "ascending", onclick: () => sortBy(name) },
        titleOf(name) + (view.sort === name ? ((name === "index") === view.reversed ? " ↓" : " ↑") : ""))),
    make("span", { role: "columnheader" }, "top tokens"),
  );
  const names = Object.keys(record.columns);
  if (ui.sort.length !== names.length) ui.sort.replaceChildren(...names.map((name) => make("option", { value: name }, name === "index" ? "index" : titleOf(name))));
  ui.sort.value = view.sort;
  ui.direction.textContent = (view.sort === "index") === view.reversed ? "↓" : "↑";
}

/* Only the rows in view are in the page, so that a thousand cost what thirty do. */
function drawRows() {
  const record = recordOf(view.variant);
  const columns = columnsShown(record);
  const first = Math.max(0, Math.floor((ui.list.scrollTop - 10 * ROW) / ROW));
  const last = Math.min(found.length, Math.ceil((ui.list.scrollTop + ui.list.clientHeight) / ROW) + 10);
  ui.rows.style.height = `${found.length * ROW}px`;
  ui.list.setAttribute("aria-rowcount", found.length);
  const rows = [];
  for (let i = first; i < last; i++) {
    const place = found[i];
    const index = record.columns.index[place];
    const tokens = [...new Set(record.top[place].map(([token]) => words(token).trim() || words(token)))].slice(0, 4).join("  ");
    rows.push(make("div", { role: "row", class: "row", style: `top: ${i * ROW}px`, "data-index": index, "aria-rowindex": i + 1,
      "aria-selected": index === view.latent, "data-cursor": i === cursor ? "" : null },
      ...columns.map((name) => make("span", { role: "gridcell", class: name }, shownIn(name, record.columns[name][place]))),
      make("span", { role: "gridcell", class: "token" }, tokens)));
  }
  ui.rows.replaceChildren(...rows);
  if (!found.length) ui.rows.replaceChildren(make("p", { class: "missing" }, "No latent of this sample matches."));
  ui.count.textContent = found.length === record.size ? `${record.size.toLocaleString("en")} latents` : `${found.length.toLocaleString("en")} of ${record.size.toLocaleString("en")}`;
}

function drawList(keepScroll) {
  const record = recordOf(view.variant);
  if (!(view.sort in record.columns)) view.sort = "density";
  find();
  cursor = found.findIndex((place) => record.columns.index[place] === view.latent);
  drawHead(record);
  for (const button of document.querySelectorAll("[data-variant]")) button.setAttribute("aria-pressed", button.dataset.variant === view.variant);
  ui.rows.style.height = `${found.length * ROW}px`;
  if (!keepScroll) reveal(Math.max(0, cursor));
  drawRows();
}

function reveal(i) {
  const top = i * ROW;
  const height = ui.list.clientHeight - ROW;  // the head covers the first of them
  if (top < ui.list.scrollTop) ui.list.scrollTop = top;
  else if (top + ROW > ui.list.scrollTop + height) ui.list.scrollTop = top + ROW - height + 4;
}

function hashValues() {
  const sort = (view.reversed ? "-" : "") + view.sort;
  return { variant: view.variant, latent: view.latent, q: view.q, sort: sort === "density" ? null : sort };
}

function write(isNewPlace) {
  writeHash(hashValues(), isNewPlace);
}

function linkTo(variant, index) {
  return hashOf({ ...(readHash() || {}), ...hashValues(), variant, latent: index });
}

function sortBy(name) {
  if (view.sort === name) view.reversed = !view.reversed;
  else Object.assign(view, { sort: name, reversed: false });
  write(false);
  ui.list.scrollTop = 0;
  drawList(true);
}

let waiting = 0;  // for the end of the typing
function searchNow() {
  clearTimeout(waiting);
  if (view.q === ui.search.value) return;
  view.q = ui.search.value;
  write(false);
  ui.list.scrollTop = 0;
  drawList(true);
}

function open(index, isNewPlace = true) {
  view.latent = index;
  if (isNewPlace) write(true);
  const record = recordOf(view.variant);
  cursor = found.findIndex((place) => record.columns.index[place] === index);
  drawRows();
  drawDetail();
}

function choose(name) {
  Object.assign(view, { variant: name, latent: null });
  write(true);
  ui.list.scrollTop = 0;
  drawList();
  drawDetail();
}

/* Shows what the hash's values say. */
function fromHash(values) {
  if (!started) return start();
  const sort = values.sort || "density";
  Object.assign(view, {
    variant: variantNames.includes(values.variant) ? values.variant : variantNames[0],
    latent: /^\d+$/.test(values.latent || "") ? Number(values.latent) : null,
    q: values.q || "",
    sort: sort.replace(/^-/, ""),
    reversed: sort.startsWith("-"),
  });
  ui.search.value = view.q;
  drawList();
  drawDetail();
}

function start() {
  if (started) return;
  started = true;
  const values = readHash() || {};
  fromHash(values);
  if (values.latent || values.variant) {
    startTree();  // it lies above, and would push down what is scrolled to
    scrollTo(explorer);
  }
}

if (explorer) {
  explorer.hidden = false;
  ui.list.addEventListener("scroll", drawRows, { passive: true });
  ui.rows.addEventListener("click", (event) => {
    const row = event.target.closest("[data-index]");
    if (row) open(Number(row.dataset.index));
  });
  for (const button of document.querySelectorAll("[data-variant]")) button.addEventListener("click", () => choose(button.dataset.variant));
  ui.search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(searchNow, 80);
  });
  ui.sort.addEventListener("change", () => sortBy(ui.sort.value));
  ui.direction.addEventListener("click", () => sortBy(view.sort));
  narrow.addEventListener("change", () => { if (started) drawList(); });
  addEventListener("resize", () => { if (started) drawRows(); });
  followers.push(fromHash);
  const wanted = readHash() || {};
  if (wanted.variant || wanted.latent || wanted.q || wanted.sort) addEventListener("DOMContentLoaded", start);
  else {
    new IntersectionObserver((entries, observer) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      observer.disconnect();
      start();
    }, { rootMargin: "500px" }).observe(explorer);
  }
}
