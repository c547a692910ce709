"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "class") element.className = value;
    else if (name === "style") element.style.cssText = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function number(value) {
  if (value === 0) return "0";
  return Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5 ? String(Number(value.toPrecision(4))) : value.toExponential(2);
}

function percent(share) {
  return share === 0 ? "0%" : Number((100 * share).toPrecision(2)) + "%";
}

/* Figures: the values under the pointer, from the same numbers that were drawn. */
{
  const tip = document.getElementById("tip");
  let cursor = null;

  function fraction(value, [low, high, isLog]) {
    return isLog ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
  }

  function hide() {
    tip.hidden = true;
    if (cursor) cursor.remove();
    cursor = null;
  }

  function show(figure, meta, share) {
    hide();
    const svg = figure.querySelector("svg");
    const [x0, y0, x1, y1] = meta.box;
    const curves = meta.series.filter((curve) => curve.x.length);
    if (!curves.length) return;
    const at = curves.map((curve) => {
      let best = 0;
      const places = curve.x.map((x) => fraction(x, meta.x));
      places.forEach((place, i) => { if (Math.abs(place - share) < Math.abs(places[best] - share)) best = i; });
      return { curve, i: best, place: places[best] };
    });
    const nearest = at.reduce((a, b) => (Math.abs(b.place - share) < Math.abs(a.place - share) ? b : a));
    cursor = document.createElementNS(svg.namespaceURI, "line");
    const place = x0 + nearest.place * (x1 - x0);
    for (const [name, value] of Object.entries({ x1: place, x2: place, y1: y0, y2: y1, stroke: "var(--muted)", "stroke-width": 0.7 })) {
      cursor.setAttribute(name, value);
    }
    svg.append(cursor);
    tip.replaceChildren(make("div", { style: "color: var(--muted)" }, `${meta.label}: ${number(nearest.curve.x[nearest.i])}`));
    const lines = at.map(({ curve, i }) => [curve.colour, curve.label, curve.y[i]]);
    lines.push(...meta.levels.map((level) => [level.colour, level.label, level.y]));
    for (const [colour, label, value] of lines) {
      tip.append(make("div", {}, make("i", { style: `background: var(${colour})` }), label, make("b", {}, number(value))));
    }
    tip.hidden = false;
    const box = svg.getBoundingClientRect();
    const left = box.left + (place / svg.viewBox.baseVal.width) * box.width;
    const wanted = left + 14 + tip.offsetWidth > innerWidth - 8 ? left - 14 - tip.offsetWidth : left + 14;
    tip.style.left = `${scrollX + Math.max(8, wanted)}px`;
    tip.style.top = `${scrollY + box.top + (y0 / svg.viewBox.baseVal.height) * box.height}px`;
  }

  for (const figure of document.querySelectorAll("figure[data-figure]")) {
    const meta = data.figures[figure.dataset.figure];
    const [x0, , x1] = meta.box;
    let share = 1;
    figure.addEventListener("pointermove", (event) => {
      const box = figure.querySelector("svg").getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * figure.querySelector("svg").viewBox.baseVal.width;
      share = (x - x0) / (x1 - x0);
      if (share < -0.03 || share > 1.03) hide();
      else show(figure, meta, share);
    });
    figure.addEventListener("pointerleave", hide);
    figure.addEventListener("blur", hide);
    figure.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -0.02, ArrowRight: 0.02 }[event.key];
      if (event.key === "Escape") hide();
      if (!step) return;
      event.preventDefault();
      share = Math.min(1, Math.max(0, share + step));
      show(figure, meta, share);
    });
  }
}

/* Latents: pick a variant, search, sort, open; what is open is kept in the address's hash. */
if (document.getElementById("explorer")) {
  const list = document.getElementById("list");
  const detail = document.getElementById("detail");
  const search = document.getElementById("search");
  const sort = document.getElementById("sort");
  const names = Object.keys(data.latents);
  let variant = names[0];
  let opened = null;

  const texts = new WeakMap();
  function textOf(latent) {
    if (!texts.has(latent)) {
      const parts = [latent.top_tokens.map(([token]) => token).join(" "), latent.promoted.join(" ")];
      for (const context of latent.contexts) parts.push(context.title || "", context.tokens.join(""));
      texts.set(latent, parts.join("\n").toLowerCase());
    }
    return texts.get(latent);
  }

  const value = {
    density: (latent) => -latent.density,
    max_activation: (latent) => -latent.max_activation,
    cosine: (latent) => -latent.nearest.cosine,
    index: (latent) => latent.index,
  };

  function shown() {
    const words = search.value.trim().toLowerCase();
    return data.latents[variant]
      .filter((latent) => !words || String(latent.index) === words || textOf(latent).includes(words))
      .sort((a, b) => value[sort.value](a) - value[sort.value](b) || a.index - b.index);
  }

  function drawList() {
    const found = shown();
    list.replaceChildren(
      ...found.map((latent) =>
        make(
          "button",
          { type: "button", "data-index": latent.index, "aria-pressed": latent === opened, onclick: () => open(latent, true) },
          make("span", {}, `#${latent.index}`),
          make("span", { class: "density" }, percent(latent.density)),
          make("span", { class: "token" }, [...new Set(latent.top_tokens.map(([token]) => token.trim() || token))].slice(0, 3).join("  ")),
        ),
      ),
    );
    if (!found.length) list.append(make("p", { class: "missing" }, "No latent of this sample matches."));
    for (const button of document.querySelectorAll("[data-variant]")) {
      button.setAttribute("aria-pressed", button.dataset.variant === variant);
    }
    return found;
  }

  function chips(tokens) {
    return tokens.length ? tokens.map((token) => make("span", { class: "chip" }, token)) : ["not evaluated"];
  }

  function drawContext(context, maximum) {
    const peak = context.values[context.peak];
    const text = make("p", { class: "text" });
    context.tokens.forEach((token, i) => {
      const activation = context.values[i];
      const options = i === context.peak ? { class: "peak" } : /^<(\|.*\||s|bos|pad)>$/.test(token) ? { class: "special" } : {};
      if (activation > 0) {
        options.title = number(activation);
        options.style = `background: rgba(var(--shade), ${(0.1 + 0.75 * Math.min(1, activation / maximum)).toFixed(2)})`;
      }
      text.append(make("span", options, token));
    });
    const from = [context.source, context.title].filter(Boolean).join(" · ");
    return make("div", { class: "context" }, make("div", { class: "from" }, make("span", {}, from), make("b", { title: "activation at the peak" }, number(peak))), text);
  }

  function open(latent, byHand) {
    opened = latent;
    for (const button of list.querySelectorAll("[data-index]")) {
      button.setAttribute("aria-pressed", latent !== null && Number(button.dataset.index) === latent.index);
    }
    if (!latent) {
      detail.replaceChildren();
      return;
    }
    const rows = [
      ["density", [`${percent(latent.density)} of tokens`]],
      ["max activation", [number(latent.max_activation)]],
      ["nearest", [`#${latent.nearest.index}, cosine ${number(latent.nearest.cosine)}`]],
      ["top tokens", latent.top_tokens.map(([token, share]) => make("span", { class: "chip", title: `${percent(share)} of the top contexts` }, token))],
      ["promoted", chips(latent.promoted)],
      ["suppressed", chips(latent.suppressed)],
    ];
    detail.replaceChildren(
      make("h3", {}, `${variant} #${latent.index}`),
      make("dl", {}, ...rows.flatMap(([name, parts]) => [make("dt", {}, name), make("dd", {}, ...parts)])),
      ...latent.contexts.map((context) => drawContext(context, latent.max_activation)),
    );
    if (byHand) history.replaceState(null, "", `#latent=${encodeURIComponent(variant)}/${latent.index}`);
  }

  function choose(name) {
    variant = name;
    opened = null;
    const found = drawList();
    open(found[0] || null, false);
    drawList();
  }

  function fromHash() {
    const match = /^#latent=([^/]+)\/(\d+)$/.exec(location.hash);
    const name = match && decodeURIComponent(match[1]);
    if (!match || !names.includes(name)) return false;
    const latent = data.latents[name].find((entry) => entry.index === Number(match[2]));
    if (!latent) return false;
    variant = name;
    search.value = "";
    drawList();
    open(latent, false);
    document.getElementById("latents").scrollIntoView();
    return true;
  }

  for (const button of document.querySelectorAll("[data-variant]")) {
    button.addEventListener("click", () => choose(button.dataset.variant));
  }
  search.addEventListener("input", () => { const found = drawList(); if (!found.includes(opened)) open(found[0] || null, false); });
  sort.addEventListener("change", drawList);
  list.addEventListener("keydown", (event) => {
    const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    const next = step && event.target[step];
    if (!next || !next.click) return;
    event.preventDefault();
    next.focus();
    next.click();
  });
  addEventListener("hashchange", fromHash);
  document.getElementById("explorer").hidden = false;
  if (!fromHash()) choose(variant);
}
