/* Helpers, the embedded data (parsed when first asked for), and the state that the address's hash holds. */
const parsed = {};
function embedded(name) {
  if (!(name in parsed)) {
    const element = document.getElementById(`data-${name}`);
    parsed[name] = element ? JSON.parse(element.textContent) : null;
    if (element) element.remove();  // its text is as long as the page
  }
  return parsed[name];
}

function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (value === null || value === undefined) continue;
    if (name === "class") element.className = value;
    else if (name === "style") element.style.cssText = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/* A token as a list names it: one of spaces alone would be an empty place. */
function named(token) {
  return token.trim() ? token : token.replace(/\s/g, "␣");
}

function scrollTo(element) {
  element.scrollIntoView({ behavior: "instant" });
}

function number(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  return Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5 ? String(Number(value.toPrecision(4))) : value.toExponential(2);
}

function percent(share) {
  return share === 0 ? "0%" : Number((100 * share).toPrecision(2)) + "%";
}

/* "#variant=adaptive&latent=12&q=fox&sort=index": what is shown. A hash without "=" is a place on the page. */
function readHash() {
  const text = location.hash.slice(1);
  return text.includes("=") ? Object.fromEntries(new URLSearchParams(text)) : text ? null : {};
}

function hashOf(values) {
  const kept = Object.entries(values).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return kept.length ? "#" + new URLSearchParams(kept) : "";
}

function writeHash(changes, isNewPlace) {
  const hash = hashOf({ ...(readHash() || {}), ...changes });
  if (hash === location.hash) return;
  history[isNewPlace ? "pushState" : "replaceState"](null, "", hash || location.pathname + location.search);
}

const followers = [];  // called with the hash's values when the reader goes back or forward, or follows a link
addEventListener("popstate", () => {
  const values = readHash();
  if (values) for (const follow of followers) follow(values);
});

/* Which group of arms is drawn: of many arms, one architecture and k at a time. */
const groupButtons = [...document.querySelectorAll("[data-choose-group]")];
const groupFollowers = [];
const mainGroup = (groupButtons.find((button) => button.getAttribute("aria-pressed") === "true") || { dataset: {} }).dataset.chooseGroup;

function chooseGroup(key) {
  for (const part of document.querySelectorAll("[data-group]")) {
    if (part.tagName === "TEMPLATE" && part.dataset.group === key) {
      part.replaceWith(make("div", { "data-group": key }, part.content.cloneNode(true)));
    } else if (part.tagName !== "TEMPLATE") part.hidden = part.dataset.group !== key;
  }
  for (const part of document.querySelectorAll("[data-group-only]")) part.hidden = part.dataset.groupOnly !== key;
  for (const button of groupButtons) button.setAttribute("aria-pressed", button.dataset.chooseGroup === key);
  for (const follow of groupFollowers) follow(key);
}

for (const button of groupButtons) {
  button.addEventListener("click", () => {
    const key = button.dataset.chooseGroup;
    writeHash({ group: key === mainGroup ? null : key }, true);
    chooseGroup(key);
  });
}
if (groupButtons.length) {
  const known = (key) => (groupButtons.some((button) => button.dataset.chooseGroup === key) ? key : mainGroup);
  followers.push((values) => chooseGroup(known(values.group)));
  const wanted = known((readHash() || {}).group);
  if (wanted !== mainGroup) addEventListener("DOMContentLoaded", () => chooseGroup(wanted));
}
