/* One latent: its numbers, its relations, its contexts, and the same latent in other variants. */
let isComparing = false;

/* A link to a latent of a variant, or plain text where the page's sample lacks it. */
function link(variant, index, text = `#${index}`) {
  if (!recordOf(variant).placeOf.has(index)) return make("span", { class: "absent", title: "not in this page's sample" }, text);
  return make("a", { href: linkTo(variant, index), onclick: (event) => {
    if (event.metaKey || event.ctrlKey || event.shiftKey) return;
    event.preventDefault();
    goTo(variant, index);
  } }, text);
}

function goTo(variant, index) {
  Object.assign(view, { variant, latent: index });
  const record = recordOf(variant);
  if (view.q && !textOf(record, record.placeOf.get(index)).includes(view.q.trim().toLowerCase())) ui.search.value = view.q = "";
  write(true);
  drawList();
  drawDetail();
}

function chips(tokens) {
  return tokens.length ? tokens.map((token) => make("span", { class: "chip" }, words(token))) : ["not evaluated"];
}

function drawContext(context, maximum) {
  const values = new Map(context.active);
  const text = make("p", { class: "text" });
  context.tokens.forEach((id, i) => {
    const token = words(id);
    const activation = values.get(i);
    const options = i === context.peak ? { class: "peak" } : /^<(\|.*\||s|bos|pad)>$/.test(token) ? { class: "special" } : {};
    if (activation > 0) {
      options.title = number(activation);
      options.style = `background: rgba(var(--shade), ${(0.1 + 0.75 * Math.min(1, activation / maximum)).toFixed(2)})`;
    }
    text.append(make("span", options, token));
  });
  const from = [words(context.source), context.title >= 0 ? words(context.title) : ""].filter(Boolean).join(" · ");
  const peak = values.get(context.peak) || 0;
  return make("div", { class: "context" }, make("div", { class: "from" }, make("span", {}, from), make("b", { title: "activation at the marked token" }, number(Number(peak.toPrecision(3))))), text);
}

/* A context's own place in the corpus: its document and the tokens before its peak. */
function keyOf(context) {
  return [context.document, ...context.tokens.slice(Math.max(0, context.peak - 4), context.peak + 1)].join(" ");
}

/* The latent of another variant that shares most of this one's top contexts: [place, shared, of], or null. */
function overlap(record, place, other) {
  if (!other.byContext) {
    other.byContext = new Map();
    for (let i = 0; i < other.size; i++) {
      readContexts(other, i, (context) => {
        if (context.isRandom) return;
        const key = keyOf(context);
        if (!other.byContext.has(key)) other.byContext.set(key, []);
        other.byContext.get(key).push(i);
      });
    }
  }
  const counts = new Map();
  const own = contextsOf(record, place).filter((context) => !context.isRandom);
  for (const context of own) {
    for (const i of other.byContext.get(keyOf(context)) || []) counts.set(i, (counts.get(i) || 0) + 1);
  }
  let best = null;
  for (const [i, shared] of counts) if (!best || shared > best[1]) best = [i, shared, own.length];
  return best;
}

function drawOther(name, record, place) {
  const other = recordOf(name);
  const match = record.matches && record.matches[place][name];
  const isShown = match && other.placeOf.has(match[0]);
  const near = isShown ? null : overlap(record, place, other);
  const card = make("div", { class: "card" }, make("h5", {}, name));
  if (!match && !near) {
    card.append(make("p", { class: "missing" }, "no latent of its sample shares a top context"));
    return card;
  }
  if (match) card.append(make("p", {}, link(name, match[0]), ` · nearest by decoder cosine${match[1] === null ? "" : `, ${number(Number(match[1].toPrecision(3)))}`}`));
  if (match && !isShown) card.append(make("p", { class: "missing" }, near ? "not in this page's sample; of those that are:" : "not in this page's sample"));
  if (near) card.append(make("p", {}, link(name, other.columns.index[near[0]]), ` · shares ${near[1]} of ${near[2]} top contexts`));
  if (!isShown && !near) return card;
  const at = isShown ? other.placeOf.get(match[0]) : near[0];
  card.append(make("p", {}, `density ${percent(other.columns.density[at])} `, ...other.top[at].slice(0, 4).map(([token]) => make("span", { class: "chip" }, words(token)))));
  card.append(...contextsOf(other, at).filter((context) => !context.isRandom).slice(0, 3).map((context) => drawContext(context, other.scale[at])));
  return card;
}

function drawCompare(record, place) {
  const details = make("details", { class: "compare", id: "compare" }, make("summary", {}, "The same latent in other variants"));
  const fill = () => {
    if (details.children.length < 2) details.append(make("div", { class: "cards" }, ...variantNames.filter((name) => name !== view.variant).map((name) => drawOther(name, record, place))));
  };
  details.open = isComparing;
  if (isComparing) fill();
  details.addEventListener("toggle", () => {
    isComparing = details.open;
    if (isComparing) fill();
  });
  return details;
}

function relations(record, place) {
  const rows = [];
  const selective = record.selective_for && record.selective_for[place];
  if (selective) {
    const [label, value, share, base] = selective;
    rows.push(["most selective for", [`${label}: ${value}`, share === null || base === null ? "" : `, ${percent(share)} of where it fires against ${percent(base)} of all`]]);
  }
  const partners = record.partners ? record.partners[place] : [];
  if (partners.length) {
    const unit = { pmi: "PMI", phi: "φ" }[record.partners_by] || record.partners_by;
    rows.push(["fires with", partners.map(([index, value]) => make("span", { class: "relation", title: unit }, link(view.variant, index), value === null ? "" : ` ${unit} ${number(Number(value.toPrecision(3)))}`))]);
  }
  const shares = record.shares_with ? record.shares_with[place] : [];
  if (shares.length) rows.push(["shares direction", shares.map(([index, cosine, kind]) => make("span", { class: "relation" }, kind ? `${kind} ` : "", link(view.variant, index), cosine === null ? "" : ` cosine ${number(Number(cosine.toPrecision(3)))}`))]);
  return rows;
}

function drawDetail() {
  const record = recordOf(view.variant);
  const place = record.placeOf.get(view.latent);
  if (view.latent !== null && place === undefined) {
    ui.detail.replaceChildren(make("p", { class: "missing" }, `#${view.latent} of ${view.variant} is not in this page's sample.`));
    return;
  }
  if (view.latent === null) {
    ui.detail.replaceChildren(make("p", { class: "missing" }, "Open a latent from the list."));
    return;
  }
  const columns = Object.keys(record.columns).filter((name) => !["index", "cosine"].includes(name));
  const rows = [
    ...columns.map((name) => [name === "density" ? "density" : name === "max_activation" ? "max activation" : titleOf(name),
      [name === "density" ? `${percent(record.columns[name][place])} of tokens` : number(record.columns[name][place])]]),
    ["nearest", [link(view.variant, record.nearest[place]), `, cosine ${number(record.columns.cosine[place])}`]],
    ["top tokens", record.top[place].map(([token, share]) => make("span", { class: "chip", title: `${percent(share)} of the top contexts` }, words(token)))],
    ["promoted", chips(record.promoted[place])],
    ["suppressed", chips(record.suppressed[place])],
    ...relations(record, place),
  ];
  const contexts = contextsOf(record, place);
  const [top, random] = [contexts.filter((context) => !context.isRandom), contexts.filter((context) => context.isRandom)];
  const shown = (some) => some.map((context) => drawContext(context, record.scale[place]));
  ui.detail.replaceChildren(
    make("h3", {}, `${view.variant} #${view.latent}`),
    make("dl", {}, ...rows.flatMap(([name, parts]) => [make("dt", {}, name), make("dd", {}, ...parts)])),
    ...(variantNames.length > 1 ? [drawCompare(record, place)] : []),
    make("h4", {}, `Top contexts (${top.length})`),
    ...shown(top),
    ...(random.length ? [make("h4", {}, `Random contexts (${random.length})`), ...shown(random)] : []),
  );
}
