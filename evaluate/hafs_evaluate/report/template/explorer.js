/* The list of latents: pick a variant, search, filter, sort, open. What is shown is in the address's hash. */
const ROW = 30;  // pixels, as in the style
const NAMES = { index: "#", density: "density", max_activation: "max", cosine: "nearest", selectivity: "select." };
const DEFAULT_SORT = "selectivity";
const narrow = matchMedia("(max-width: 760px)");
const view = { variant: "", latent: null, q: "", sort: DEFAULT_SORT, reversed: false, all: false, least: "", most: "", live: "" };
const ui = explorer && Object.fromEntries(["list", "columns", "rows", "detail", "search", "sort", "direction", "count", "all", "least", "most", "live", "problem"].map((id) => [id, document.getElementById(id)]));
let table = null;  // what the list shows: see `sampleTable`
let found = [];  // places in the table, in the order of the list
let cursor = -1;  // place in `found`
let started = false;

/* What the list calls a latent: its label, or else its top tokens. */
function nameOf(place) {
  const label = labelOf(view.variant, table.columns.index[place]);
  return label ? label[0] : [...new Set(table.tokens[place].map((token) => named(token).trim()))].slice(0, 4).join("  ");
}

function matches(place, query, number) {
  const index = table.columns.index[place];
  if (index === number) return true;
  const label = labelOf(view.variant, index);
  if (label && label[0].toLowerCase().includes(query)) return true;
  const record = recordOf(view.variant);
  if (record.placeOf.has(index)) return textOf(record, record.placeOf.get(index)).includes(query);
  return table.tokens[place].join(" ").toLowerCase().includes(query);
}

function passes(place) {
  const density = table.columns.density[place];
  const [least, most] = [parseFloat(view.least), parseFloat(view.most)];
  return !(100 * density < least) && !(100 * density > most) && (view.live === "" || (density > 0) === (view.live === "fires"));
}

const ascends = (name) => name === "index" || name === "name";

function find() {
  const query = view.q.trim().toLowerCase();
  const number = /^#?\d+$/.test(query) ? Number(query.replace("#", "")) : null;
  found = [];
  for (let place = 0; place < table.size; place++) {
    if (passes(place) && (!query || matches(place, query, number))) found.push(place);
  }
  const sign = ascends(view.sort) === view.reversed ? -1 : 1;
  const values = view.sort === "name" ? Object.fromEntries(found.map((place) => [place, nameOf(place).toLowerCase()])) : table.columns[view.sort];
  const compared = view.sort === "name" ? (a, b) => values[a].localeCompare(values[b], "en") : (a, b) => values[a] - values[b];
  found.sort((a, b) => {
    if (values[a] === null || values[b] === null) return (values[a] === null) - (values[b] === null) || a - b;
    return sign * compared(a, b) || a - b;
  });
}

function columnsShown() {
  const every = Object.keys(table.columns);
  return narrow.matches ? ["index", ascends(view.sort) ? "density" : view.sort] : every;
}

const titleOf = (name) => NAMES[name] || name.replaceAll("_", " ");
const shownIn = (name, value) => (name === "index" ? `#${value}` : value === null ? "–" : name === "density" ? percent(value) : number(Number(value.toPrecision(3))));

function drawHead() {
  const columns = columnsShown();
  ui.list.style.setProperty("--columns", `3.8rem ${"3.9rem ".repeat(columns.length - 1)}minmax(5rem, 1fr)`);
  ui.list.style.setProperty("--least", `${3.8 + 3.9 * (columns.length - 1) + 5 + 0.25 * columns.length + 1.25}rem`);  // with gaps and padding
  const isDown = (name) => ascends(name) === view.reversed;
  const head = (name, title) => make("button", { type: "button", role: "columnheader", title: `sort by ${title}`, "data-sort": name,
    "aria-sort": view.sort !== name ? "none" : isDown(name) ? "descending" : "ascending", onclick: () => sortBy(name) },
    title + (view.sort === name ? (isDown(name) ? " ↓" : " ↑") : ""));
  ui.columns.replaceChildren(...columns.map((name) => head(name, titleOf(name))), head("name", "label or top tokens"));
  const names = [...Object.keys(table.columns), "name"];
  if (ui.sort.length !== names.length) ui.sort.replaceChildren(...names.map((name) => make("option", { value: name }, { index: "index", name: "name", max_activation: "max activation", selectivity: "selectivity" }[name] || titleOf(name))));
  ui.sort.value = view.sort;
  ui.direction.textContent = isDown(view.sort) ? "↓" : "↑";
}

/* Only the rows in view are in the page, so that thousands cost what thirty do. */
function drawRows() {
  if (!table) return;
  const columns = columnsShown();
  const first = Math.max(0, Math.floor((ui.list.scrollTop - 10 * ROW) / ROW));
  const last = Math.min(found.length, Math.ceil((ui.list.scrollTop + ui.list.clientHeight) / ROW) + 10);
  ui.rows.style.height = `${found.length * ROW}px`;
  ui.list.setAttribute("aria-rowcount", found.length);
  const rows = [];
  for (let i = first; i < last; i++) {
    const place = found[i];
    const index = table.columns.index[place];
    rows.push(make("div", { role: "row", class: "row", style: `top: ${i * ROW}px`, "data-index": index, "aria-rowindex": i + 1,
      "aria-selected": index === view.latent, "data-cursor": i === cursor ? "" : null },
      ...columns.map((name) => make("span", { role: "gridcell", class: name }, shownIn(name, table.columns[name][place]))),
      make("span", { role: "gridcell", class: labelOf(view.variant, index) ? "token label" : "token" }, nameOf(place))));
  }
  ui.rows.replaceChildren(...rows);
  if (!found.length) ui.rows.replaceChildren(make("p", { class: "missing" }, view.all ? "No latent matches." : "No latent of this sample matches."));
  const size = table.size.toLocaleString("en");
  ui.count.textContent = found.length === table.size ? `${size} latents` : `${found.length.toLocaleString("en")} of ${size}`;
}

function drawList(keepScroll) {
  if (!(view.sort in table.columns) && view.sort !== "name") view.sort = DEFAULT_SORT in table.columns ? DEFAULT_SORT : "max_activation";
  find();
  cursor = found.findIndex((place) => table.columns.index[place] === view.latent);
  drawHead();
  for (const button of document.querySelectorAll("[data-variant]")) button.setAttribute("aria-pressed", button.dataset.variant === view.variant);
  for (const option of ui.all.options) option.textContent = option.value ? `all ${(sampleTable(view.variant).size + othersOf(view.variant).size).toLocaleString("en")}` : `sample of ${sampleTable(view.variant).size.toLocaleString("en")}`;
  ui.rows.style.height = `${found.length * ROW}px`;
  if (!keepScroll) reveal(Math.max(0, cursor));
  drawRows();
}

/* Takes the table that `view` asks for and draws it; says so in words where a file is missing. */
async function showList(keepScroll) {
  const variant = view.variant;
  ui.problem.hidden = true;
  table = sampleTable(variant);
  if (view.all) {
    try {
      const whole = await wholeTable(variant);
      if (view.variant !== variant) return;
      table = whole;
    } catch (error) {
      Object.assign(view, { all: false });
      ui.all.value = "";
      ui.problem.hidden = false;
      ui.problem.textContent = withoutFiles(error);
    }
  }
  drawList(keepScroll);
}

function reveal(i) {
  const top = i * ROW;
  const height = ui.list.clientHeight - ROW;  // the head covers the first of them
  if (top < ui.list.scrollTop) ui.list.scrollTop = top;
  else if (top + ROW > ui.list.scrollTop + height) ui.list.scrollTop = top + ROW - height + 4;
}

function hashValues() {
  const sort = (view.reversed ? "-" : "") + view.sort;
  return { variant: view.variant, latent: view.latent, q: view.q, sort: sort === DEFAULT_SORT ? null : sort, all: view.all ? 1 : null, least: view.least, most: view.most, live: view.live };
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
  narrowed();
}

/* Draws the list again from its top, after a change of what it holds. */
function narrowed() {
  write(false);
  ui.list.scrollTop = 0;
  return showList(true);
}

let waiting = 0;  // for the end of the typing
function searchNow() {
  clearTimeout(waiting);
  if (view.q === ui.search.value) return;
  view.q = ui.search.value;
  narrowed();
}

function open(index, isNewPlace = true) {
  view.latent = index;
  if (isNewPlace) write(true);
  cursor = found.findIndex((place) => table.columns.index[place] === index);
  drawRows();
  drawDetail();
}

function choose(name) {
  Object.assign(view, { variant: name, latent: null });
  write(true);
  ui.list.scrollTop = 0;
  showList();
  drawDetail();
}

/* Shows what the hash's values say. */
function fromHash(values) {
  if (!started) return start();
  const sort = values.sort || DEFAULT_SORT;
  Object.assign(view, {
    variant: variantNames.includes(values.variant) ? values.variant : variantNames[0],
    latent: /^\d+$/.test(values.latent || "") ? Number(values.latent) : null,
    q: values.q || "",
    sort: sort.replace(/^-/, ""),
    reversed: sort.startsWith("-"),
    all: values.all === "1",
    least: values.least || "", most: values.most || "", live: values.live || "",
  });
  for (const [id, value] of Object.entries({ search: view.q, all: view.all ? "1" : "", least: view.least, most: view.most, live: view.live })) ui[id].value = value;
  showList();
  drawDetail();
}

function start() {
  if (started || !explorer) return;
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
  ui.all.addEventListener("change", () => { view.all = ui.all.value === "1"; narrowed(); });
  for (const id of ["least", "most", "live"]) ui[id].addEventListener("input", () => { view[id] = ui[id].value; narrowed(); });
  document.getElementById("list-csv").addEventListener("click", () => {
    const columns = Object.keys(table.columns);
    const rows = found.map((place) => [...columns.map((name) => table.columns[name][place]), (labelOf(view.variant, table.columns.index[place]) || [""])[0], table.tokens[place].join(" ")]);
    download(`latents-${view.variant}.csv`, csvOf([[...columns, "label", "top tokens"], ...rows]), "text/csv");
  });
  narrow.addEventListener("change", () => { if (table) drawList(); });
  addEventListener("resize", drawRows);
  followers.push(fromHash);
  const wanted = readHash() || {};
  if (["variant", "latent", "q", "sort", "all", "least", "most", "live"].some((name) => wanted[name])) addEventListener("DOMContentLoaded", start);
  else {
    new IntersectionObserver((entries, observer) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      observer.disconnect();
      start();
    }, { rootMargin: "500px" }).observe(explorer);
  }
}
