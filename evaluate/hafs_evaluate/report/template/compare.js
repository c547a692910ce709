/* The same latent in other variants: the nearest dictionary vector, or the one that shares most top contexts. */
let isComparing = false;

/* A context's own place in the corpus: its document and the tokens before its peak. */
function keyOf(record, context) {
  return [context.document, ...context.tokens.slice(Math.max(0, context.peak - 4), context.peak + 1).map((id) => words(record, id))].join(" ");
}

/* The latent of another variant's sample that shares most of this one's top contexts: [place, shared, of], or null. */
function overlap(record, place, other) {
  if (!other.byContext) {
    other.byContext = new Map();
    for (let i = 0; i < other.size; i++) {
      readContexts(other, i, (context) => {
        if (context.isRandom) return;
        const key = keyOf(other, context);
        if (!other.byContext.has(key)) other.byContext.set(key, []);
        other.byContext.get(key).push(i);
      });
    }
  }
  const counts = new Map();
  const own = contextsOf(record, place).filter((context) => !context.isRandom);
  for (const context of own) {
    for (const i of other.byContext.get(keyOf(record, context)) || []) counts.set(i, (counts.get(i) || 0) + 1);
  }
  let best = null;
  for (const [i, shared] of counts) if (!best || shared > best[1]) best = [i, shared, own.length];
  return best;
}

/* Fills a variant's card: at once with what the page holds, later with what comes from a side file. */
async function fillCard(card, name, record, place) {
  const index = record.columns.index[place];
  const match = record.matches && record.matches[place][name];
  const missing = (text) => card.append(make("p", { class: "missing" }, text));
  let shown = null;
  if (match) {
    card.append(make("p", {}, link(name, match[0]), ` · nearest by decoder cosine${match[1] === null ? "" : `, ${short(match[1])}`}`, match[0] === index ? "" : " · another index"));
    try {
      shown = await latentOf(name, match[0]);
      if (!shown) missing("no file of this report holds it");
    } catch (error) {
      missing(withoutFiles(error));
    }
  } else {
    const near = overlap(record, place, recordOf(name));
    if (!near) {
      missing("no latent of its sample shares a top context");
      return;
    }
    shown = [recordOf(name), near[0]];
    card.append(make("p", {}, link(name, recordOf(name).columns.index[near[0]]), ` · shares ${near[1]} of ${near[2]} top contexts`));
  }
  if (!shown) return;
  const [other, at] = shown;
  card.append(make("p", {}, `density ${percent(other.columns.density[at])} `, ...other.top[at].slice(0, 4).map(([token]) => make("span", { class: "chip" }, named(words(other, token))))));
  card.append(...contextsOf(other, at).filter((context) => !context.isRandom).slice(0, 3).map((context) => drawContext(other, context, other.scale[at])));
}

function drawCompare(variant, record, place) {
  const details = make("details", { class: "compare", id: "compare" }, make("summary", {}, "The same latent in other variants"));
  const fill = () => {
    if (details.children.length > 1) return;
    const cards = make("div", { class: "cards" });
    details.append(cards);
    for (const name of variantNames.filter((other) => other !== variant)) {
      const card = make("div", { class: "card" }, make("h5", {}, name));
      cards.append(card);
      fillCard(card, name, record, place);
    }
  };
  details.open = isComparing;
  if (isComparing) fill();
  details.addEventListener("toggle", () => {
    isComparing = details.open;
    if (isComparing) fill();
  });
  return details;
}
