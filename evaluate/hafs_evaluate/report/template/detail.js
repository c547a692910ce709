/* One latent: its numbers, its relations and its contexts. */

/* A link to a latent of a variant, or plain text where neither the page nor a side file holds it. */
function link(variant, index, text = `#${index}`) {
  if (!isKnown(variant, index)) return make("span", { class: "absent", title: "no file of this report holds it" }, text);
  const label = labelOf(variant, index);
  return make("a", { href: linkTo(variant, index), title: label ? label[0] : null, onclick: (event) => {
    if (event.metaKey || event.ctrlKey || event.shiftKey) return;
    event.preventDefault();
    goTo(variant, index);
  } }, text);
}

function goTo(variant, index) {
  Object.assign(view, { variant, latent: index });
  write(true);
  showList().then(() => {
    if (cursor >= 0 || !view.q) return;
    ui.search.value = view.q = "";  // it hides the latent that was gone to
    write(false);
    showList();
  });
  drawDetail();
}

const short = (value, digits = 3) => number(Number(value.toPrecision(digits)));

/* Tokens as chips, each with its logit; how strong that is, and what it leaves out. */
function logitRow(record, place, kind) {
  const tokens = record[kind][place];
  if (!tokens.length) return ["not evaluated"];
  const logits = record[`${kind}_logits`] ? record[`${kind}_logits`][place] : [];
  return tokens.map((id, i) => make("span", { class: "chip" }, named(words(record, id)), logits[i] === undefined ? "" : make("small", {}, ` ${logits[i] > 0 ? "+" : ""}${short(logits[i], 2).replace("-", "−")}`)));
}

/* When promoted tokens mean little: where the effect is a random direction's, and where most blocks come after. */
function logitCaveat(record, place) {
  const effect = record.effect ? record.effect[place] : null;
  const chance = record.random_effect ?? null;
  const layer = embedded("layer");
  const said = [];
  if (effect !== null && chance !== null) {
    said.push(`Effect ${short(effect)} SD of the vocabulary; 95% of random directions stay under ${short(chance)}.`);
    if (effect <= chance) said.push("So these tokens are not more than chance.");
  }
  if (layer && layer[0] + 1 < layer[1] / 2) said.push(`Block ${layer[0]} of ${layer[1]}: the ${layer[1] - layer[0] - 1} blocks after it decide what reaches the logits, so read these tokens with care.`);
  return said.length ? make("small", { class: effect !== null && chance !== null && effect <= chance ? "caveat weak" : "caveat" }, said.join(" ")) : "";
}

/* Rows by activation as bars on a logarithmic scale, with what each counts. */
function histogram(counts, maximum) {
  const [width, height] = [240, 44];
  const top = Math.log1p(Math.max(...counts));
  const bar = width / counts.length;
  const total = counts.reduce((sum, n) => sum + n, 0).toLocaleString("en");
  const bars = counts.map((n, i) => {
    const tall = n ? Math.max(1, (height * Math.log1p(n)) / top) : 0;
    const said = `${short((maximum * i) / counts.length)} to ${short((maximum * (i + 1)) / counts.length)}: ${n.toLocaleString("en")} rows`;
    return `<rect x="${i * bar + 0.5}" y="${height - tall}" width="${bar - 1}" height="${tall}"><title>${said}</title></rect>`;
  });
  const box = make("div", { class: "histogram" });
  box.innerHTML = `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="${total} rows by activation, from 0 to ${short(maximum)}">${bars.join("")}</svg>`;  // of numbers alone
  box.append(make("div", { class: "ends" }, make("span", {}, "0"), make("span", {}, `${total} rows, logarithmic height`), make("span", {}, short(maximum))));
  return box;
}

function drawContext(record, context, maximum, note = "") {
  const values = new Map(context.active);
  const text = make("p", { class: "text" });
  context.tokens.forEach((id, i) => {
    const token = words(record, id);
    const activation = values.get(i);
    const options = i === context.peak ? { class: "peak" } : /^<(\|.*\||s|bos|pad)>$/.test(token) ? { class: "special" } : {};
    const next = i + 1 < context.tokens.length;
    if (activation > 0) {
      options.title = short(activation);
      options.style = `background: rgba(var(--shade), ${(0.1 + 0.75 * Math.min(1, activation / maximum)).toFixed(2)})`;
    }
    // A leading space stays outside of the shade: at a line's end it would be a sliver.
    const space = /^ +(?=\S)/.exec(token);
    if (space && (activation > 0 || i === context.peak) && i) text.append(space[0]);
    text.append(make("span", options, space && i ? (activation > 0 || i === context.peak ? token.slice(space[0].length) : token) : next ? token : token.trimEnd() || token));
  });
  const from = [words(record, context.source), context.title >= 0 ? words(record, context.title) : ""].filter(Boolean).join(" · ");
  const peak = values.get(context.peak) || 0;
  return make("div", { class: "context" }, make("div", { class: "from" }, make("span", {}, note ? `${note} · ${from}` : from), make("b", { title: "activation at the marked token" }, short(peak))), text);
}

/* "95th percentile" of the i-th of n contexts that stand for the n-quantiles, highest first. */
function percentile(i, n) {
  const value = Math.round(100 * (1 - (i + 0.5) / n));
  const ending = value % 100 > 10 && value % 100 < 14 ? "th" : { 1: "st", 2: "nd", 3: "rd" }[value % 10] || "th";
  return `${value}${ending} percentile`;
}

function relations(variant, record, place) {
  const rows = [];
  const relation = (index, value, kind = "") => make("span", { class: "relation" }, kind ? `${kind} ` : "", link(variant, index), value === null ? "" : ` ${value}`);
  const shares = record.shares_with ? record.shares_with[place] : [];
  const kinds = Object.fromEntries(shares.map(([index, , kind]) => [index, kind]));
  const near = record.neighbours ? record.neighbours[place] : [];
  rows.push(["nearest", [...near.map(([index, cosine]) => relation(index, short(cosine), kinds[index])), make("small", { class: "caveat" }, "by cosine of dictionary vectors")]]);
  const further = shares.filter(([index]) => !near.some(([other]) => other === index));
  if (further.length) rows.push(["shares direction", further.map(([index, cosine, kind]) => relation(index, cosine === null ? null : short(cosine), kind))]);
  const partners = record.partners ? record.partners[place] : [];
  if (partners.length) {
    const unit = { pmi: "PMI", phi: "φ" }[record.partners_by] || record.partners_by;
    rows.push(["fires with", partners.map(([index, value]) => relation(index, value === null ? null : `${unit} ${short(value)}`))]);
  }
  const selective = record.selective_for && record.selective_for[place];
  if (selective) {
    const [label, value, share, base] = selective;
    rows.push(["most selective for", [`${label}: ${value}`, share === null || base === null ? "" : `, ${percent(share)} of where it fires against ${percent(base)} of all`]]);
  }
  return rows;
}

function labelRow(variant, index) {
  const label = labelOf(variant, index);
  if (!label) return [];
  const [text, source, score] = label;
  const from = [source || "labels.csv", score === null ? "" : `detects contexts with a balanced accuracy of ${short(score)}`].filter(Boolean).join("; ");
  return [["label", [make("b", {}, text), " ", make("small", { class: "caveat" }, from)]]];
}

const extraRows = [];  // functions (variant, record, place) -> [[name, parts], ...] of a script that is added to the page

async function drawDetail() {
  const { variant, latent } = view;
  const say = (text) => ui.detail.replaceChildren(make("p", { class: "missing" }, text));
  if (latent === null) return say("Open a latent from the list.");
  let at;
  try {
    const pending = latentOf(variant, latent);
    if (!recordOf(variant).placeOf.has(latent)) say(`Loading #${latent} of ${variant} …`);
    at = await pending;
  } catch (error) {
    if (view.latent === latent && view.variant === variant) say(`#${latent} of ${variant} is not in the page itself. ${withoutFiles(error)}`);
    return;
  }
  if (view.latent !== latent || view.variant !== variant) return;
  if (!at) return say(`No file of this report holds #${latent} of ${variant}.`);
  const [record, place] = at;
  const columns = Object.keys(record.columns).filter((name) => !["index", "cosine"].includes(name) && record.columns[name][place] !== null);
  const rows = [
    ...labelRow(variant, latent),
    ...columns.map((name) => [{ density: "density", max_activation: "max activation", selectivity: "selectivity" }[name] || titleOf(name),
      [name === "density" ? `${percent(record.columns[name][place])} of tokens` : number(record.columns[name][place])]]),
    ...(record.histogram && record.histogram[place] && record.columns.density[place] > 0 ? [["activations", [histogram(record.histogram[place], record.columns.max_activation[place])]]] : []),
    ["top tokens", record.top[place].map(([token, share]) => make("span", { class: "chip", title: `${percent(share)} of the top contexts` }, named(words(record, token))))],
    ["promoted", logitRow(record, place, "promoted")],
    ["suppressed", [...logitRow(record, place, "suppressed"), logitCaveat(record, place)]],
    ...relations(variant, record, place),
    ...extraRows.flatMap((more) => more(variant, record, place)),
  ];
  const contexts = contextsOf(record, place);
  const [top, random] = [contexts.filter((context) => !context.isRandom), contexts.filter((context) => context.isRandom)];
  ui.detail.replaceChildren(
    make("h3", {}, `${variant} #${latent}`),
    make("p", { class: "tools" },
      make("button", { type: "button", class: "plain", onclick: () => download(`${variant}-${latent}.json`, JSON.stringify(plainLatent(variant, record, place), null, 1), "application/json") }, "JSON"),
      copyButton("copy link", () => location.href),
      copyButton("copy row for labels.csv", () => csvOf([[variant, latent, (labelOf(variant, latent) || [""])[0]]]).trim())),
    make("dl", {}, ...rows.flatMap(([name, parts]) => [make("dt", {}, name), make("dd", {}, ...parts)])),
    ...(variantNames.length > 1 ? [drawCompare(variant, record, place)] : []),
    ...(contexts.length ? [] : [make("p", { class: "missing" }, "It fires on none of the rows that were read.")]),
    ...(top.length ? [make("h4", {}, `Top contexts (${top.length})`)] : []),
    ...top.map((context) => drawContext(record, context, record.scale[place])),
    ...(random.length ? [make("h4", {}, `Contexts by quantile of the activation (${random.length})`)] : []),
    ...random.map((context, i) => drawContext(record, context, record.scale[place], percentile(i, random.length))),
  );
}
