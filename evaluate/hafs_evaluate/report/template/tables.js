/* Tables and files: definitions at the heads of columns, sorting, CSV, downloads, links that can be copied. */
function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

const csvCell = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
const csvOf = (rows) => rows.map((row) => row.map((text) => csvCell(String(text ?? ""))).join(",")).join("\r\n") + "\r\n";

/* A cell's text: its own, and the small figure beside it in brackets. */
function cellText(cell) {
  const copy = cell.cloneNode(true);
  for (const part of copy.querySelectorAll("button.fold, svg, .aside, [aria-hidden]")) part.remove();
  const small = [...copy.querySelectorAll("small")].map((part) => { const text = part.textContent.trim(); part.remove(); return text; });
  const text = copy.textContent.replace(/\s+/g, " ").trim().replaceAll("−", "-");
  return small.length && small[0] ? `${text} (${small.join(" ").replaceAll("−", "-")})` : text;
}

function tableRows(table) {
  return [...table.rows].filter((row) => !row.classList.contains("head")).map((row) => [...row.cells].map(cellText));
}

/* "Copied" where the browser lets a page copy; else the text is selected for the reader to copy. */
function copyButton(label, text) {
  const button = make("button", { type: "button", class: "plain", onclick: async () => {
    const given = text();
    try {
      await navigator.clipboard.writeText(given);
      button.textContent = "copied";
      setTimeout(() => { button.textContent = label; }, 1500);
    } catch {
      prompt("Copy this:", given);
    }
  } }, label);
  return button;
}

/* What a head says when the pointer, the focus or a finger is on it. */
const bubble = make("div", { id: "bubble", role: "tooltip", hidden: "" });
document.body.append(bubble);

function define(element) {
  bubble.textContent = element.dataset.definition;
  bubble.hidden = false;
  const box = element.getBoundingClientRect();
  bubble.style.left = `${scrollX + Math.max(8, Math.min(box.left, document.documentElement.clientWidth - bubble.offsetWidth - 8))}px`;
  bubble.style.top = `${scrollY + box.bottom + 6}px`;
}

function withDefinition(element) {
  element.setAttribute("aria-describedby", "bubble");
  for (const name of ["pointerenter", "focus", "click"]) element.addEventListener(name, () => define(element));
  for (const name of ["pointerleave", "blur"]) element.addEventListener(name, () => { bubble.hidden = true; });
}
addEventListener("keydown", (event) => { if (event.key === "Escape") bubble.hidden = true; });

/* Rows by a column; those under one group head stay together, and rows of class "last" at the end. */
function sortRows(table, column, descending) {
  const value = (row) => {
    const cell = row.cells[column];
    if (!cell) return null;
    const text = cell.textContent.trim().replaceAll("−", "-").replaceAll(",", "");
    const number = parseFloat(text.replace(/^[<±]\s*/, ""));
    return Number.isNaN(number) ? (column === 0 || /[a-z]/i.test(text) ? text.toLowerCase() : null) : number;
  };
  for (const body of table.tBodies) {
    const blocks = [[]];
    for (const row of body.rows) {
      if (row.classList.contains("head") || (row.classList.contains("last") && !blocks.at(-1).isLast)) blocks.push([]);
      blocks.at(-1).push(row);
      blocks.at(-1).isLast = row.classList.contains("last");
    }
    for (const block of blocks) {
      if (block.isLast) { body.append(...block); continue; }
      const head = block.filter((row) => row.classList.contains("head"));
      const rows = block.filter((row) => !row.classList.contains("head")).map((row) => [value(row), row]);
      rows.sort(([a], [b]) => {
        if (typeof a !== typeof b || a === null || b === null) return typeof a === "number" ? -1 : typeof b === "number" ? 1 : 0;
        return (descending ? -1 : 1) * (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
      });
      body.append(...head, ...rows.map(([, row]) => row));
    }
  }
}

function makeSortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = make("button", { type: "button", class: "sort", "data-definition": head.dataset.definition || null }, ...head.childNodes);
    if (head.dataset.definition) withDefinition(button);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === null ? column > 0 : head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sortRows(table, column, descending);
    });
  });
}

/* A way to the table's figures as a file, and a shadow where there is more to the right. */
function fitOut(scroll) {
  const name = (scroll.getAttribute("aria-label") || scroll.id || "table").toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "");
  const csv = make("button", { type: "button", class: "plain", onclick: () => {
    const table = scroll.querySelector("table");
    if (table) download(`${name}.csv`, csvOf(tableRows(table)), "text/csv");
  } }, "CSV");
  const hint = make("span", { class: "hint", hidden: "" }, "scrolls sideways →");
  scroll.after(make("p", { class: "tools" }, csv, hint));
  const look = () => {
    const left = scroll.scrollWidth - scroll.clientWidth - scroll.scrollLeft;
    hint.hidden = scroll.scrollWidth <= scroll.clientWidth + 1;
    scroll.classList.toggle("more", left > 2);
  };
  scroll.addEventListener("scroll", look, { passive: true });
  new ResizeObserver(look).observe(scroll);
  look();
}

function fitOutAll(root) {
  for (const table of root.querySelectorAll("table.sortable:not([data-ready])")) {
    table.dataset.ready = "";
    makeSortable(table);
  }
  for (const element of root.querySelectorAll("[data-definition]:not(button):not(th)")) withDefinition(element);
  for (const scroll of root.querySelectorAll(".scroll:not([data-ready])")) {
    scroll.dataset.ready = "";
    fitOut(scroll);
  }
}
fitOutAll(document);
groupFollowers.push(() => fitOutAll(document));
for (const heading of document.querySelectorAll("section[id] > h2")) {
  heading.append(" ", make("span", { class: "aside" }, copyButton("copy link", () => `${location.href.split("#")[0]}#${heading.parentElement.id}`)));
}
