/* Figures: the values under the pointer, from the same numbers that were drawn. */
{
  const tip = document.getElementById("tip");
  let cursor = null;
  let share = 1;

  function fraction(value, [low, high, isLog]) {
    return isLog ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
  }

  function hide() {
    tip.hidden = true;
    if (cursor) cursor.remove();
    cursor = null;
  }

  function draw(svg, name, attributes) {
    cursor = document.createElementNS(svg.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) cursor.setAttribute(key, value);
    svg.append(cursor);
  }

  function interval(pair, i) {
    return pair && pair[0][i] !== null ? ` (${number(pair[0][i])} to ${number(pair[1][i])})` : "";
  }

  function row(colour, label, value) {
    return make("div", {}, make("i", { style: `background: var(${colour})` }), make("span", {}, label), make("b", {}, value));
  }

  function place(svg, x, y) {
    tip.hidden = false;
    const box = svg.getBoundingClientRect();
    const left = box.left + (x / svg.viewBox.baseVal.width) * box.width;
    const wanted = left + 14 + tip.offsetWidth > innerWidth - 8 ? left - 14 - tip.offsetWidth : left + 14;
    tip.style.left = `${scrollX + Math.max(8, wanted)}px`;
    tip.style.top = `${scrollY + box.top + (y / svg.viewBox.baseVal.height) * box.height}px`;
  }

  /* What a legend belongs to: its group's figures, or all of its section. */
  const partOf = (element) => element.closest("[data-group], section");

  /* Those of the curves, levels or points that no legend hides. */
  function visible(svg, curves) {
    const hidden = new Set([...partOf(svg).querySelectorAll('[data-curve][aria-pressed="false"]')].map((button) => button.dataset.curve));
    return curves.filter((curve) => !hidden.has(curve.colour));
  }

  function showCurves(svg, meta) {
    const [x0, y0, x1, y1] = meta.box;
    const curves = visible(svg, meta.series).filter((curve) => curve.x.length);
    if (!curves.length) return;
    const at = curves.map((curve) => {
      let best = 0;
      const places = curve.x.map((x) => fraction(x, meta.x));
      places.forEach((here, i) => { if (Math.abs(here - share) < Math.abs(places[best] - share)) best = i; });
      return { curve, i: best, place: places[best] };
    });
    const nearest = at.reduce((a, b) => (Math.abs(b.place - share) < Math.abs(a.place - share) ? b : a));
    const x = x0 + nearest.place * (x1 - x0);
    draw(svg, "line", { x1: x, x2: x, y1: y0, y2: y1, stroke: "var(--muted)", "stroke-width": 0.7 });
    tip.replaceChildren(make("div", { style: "color: var(--muted)" }, `${meta.label}: ${number(nearest.curve.x[nearest.i])}`));
    for (const { curve, i } of at) tip.append(row(curve.colour, curve.label, number(curve.y[i]) + interval(curve.y_interval, i)));
    for (const one of visible(svg, meta.beyond || [])) tip.append(row(one.colour, one.label, one.text));
    for (const level of visible(svg, meta.levels)) tip.append(row(level.colour, level.label, number(level.y)));
    place(svg, x, y0);
  }

  function showPoint(svg, meta, x, y) {
    const [x0, y0, x1, y1] = meta.box;
    let best = null;
    for (const curve of visible(svg, meta.series)) {
      curve.x.forEach((value, i) => {
        const px = x0 + fraction(value, meta.x) * (x1 - x0);
        const py = y1 - fraction(curve.y[i], meta.y) * (y1 - y0);
        const distance = Math.hypot(px - x, py - y);
        if (!best || distance < best.distance) best = { curve, i, px, py, distance };
      });
    }
    if (!best) return;
    const { curve, i, px, py } = best;
    draw(svg, "circle", { cx: px, cy: py, r: 5.5, fill: "none", stroke: "var(--ink)", "stroke-width": 1 });
    tip.replaceChildren(
      row(curve.colour, curve.label, curve.notes ? curve.notes[i] : ""),
      row("--page", meta.label, number(curve.x[i]) + interval(curve.x_interval, i)),
      row("--page", meta.y_label, number(curve.y[i]) + interval(curve.y_interval, i)),
    );
    place(svg, px, py + 12);
  }

  function figureOf(event) {
    return event.target.closest ? event.target.closest("figure[data-figure]") : null;
  }

  document.addEventListener("pointermove", (event) => {
    const figure = figureOf(event);
    hide();
    if (!figure) return;
    const meta = embedded("figures")[figure.dataset.figure];
    const svg = figure.querySelector("svg");
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const y = ((event.clientY - box.top) / box.height) * svg.viewBox.baseVal.height;
    share = (x - meta.box[0]) / (meta.box[2] - meta.box[0]);
    if (share < -0.03 || share > 1.03) return;
    if (meta.scatter) showPoint(svg, meta, x, y);
    else showCurves(svg, meta);
  });
  document.addEventListener("pointerleave", hide);
  document.addEventListener("focusout", hide);
  document.addEventListener("keydown", (event) => {
    const figure = figureOf(event);
    if (event.key === "Escape") hide();
    const step = { ArrowLeft: -0.02, ArrowRight: 0.02 }[event.key];
    if (!figure || !step) return;
    event.preventDefault();
    hide();
    share = Math.min(1, Math.max(0, share + step));
    const meta = embedded("figures")[figure.dataset.figure];
    const [x0, y0, x1, y1] = meta.box;
    if (meta.scatter) showPoint(figure.querySelector("svg"), meta, x0 + share * (x1 - x0), (y0 + y1) / 2);
    else showCurves(figure.querySelector("svg"), meta);
  });

  /* A legend's entry hides its curves, with their intervals and values, in the figures that the legend belongs to. */
  document.addEventListener("click", (event) => {
    const button = event.target.closest ? event.target.closest("[data-curve]") : null;
    if (!button) return;
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", shown);
    for (const part of partOf(button).querySelectorAll(`[data-of="${button.dataset.curve}"]`)) part.style.display = shown ? "" : "none";
  });
}
