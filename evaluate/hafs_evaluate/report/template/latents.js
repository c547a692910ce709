/* The latents' data: records embedded in the page, and those of side files, which are loaded when one is asked for. */
const explorer = document.getElementById("explorer");
const variantNames = [...document.querySelectorAll("[data-variant]")].map((button) => button.dataset.variant);
const records = {};
const side = embedded("side") || {};
const labels = embedded("labels") || {};
const arrived = {};  // what side files gave, by name
const loading = {};

window.hafsLatents = (name, value) => { arrived[name] = value; };  // what a side file calls

/* The value of a side file. Scripts load from disk too, where a page may read no files. */
function sideFile(name) {
  loading[name] ||= new Promise((resolve, reject) => {
    if (name in arrived) return resolve(arrived[name]);
    const script = make("script", { src: `latents/${name}.js`, onload: () => {
      script.remove();
      if (name in arrived) resolve(arrived[name]);
      else reject(new Error(name));
    }, onerror: () => {
      script.remove();
      delete loading[name];
      reject(new Error(name));
    } });
    document.head.append(script);
  });
  return loading[name];
}

const withoutFiles = (error) => `The file latents/${error.message}.js is missing. The folder latents/ belongs beside this page: copy it too, or write the report again with "hafs report".`;

/* A record with its bytes decoded and its latents' places. */
function opened(record, strings) {
  const raw = atob(record.bytes);
  record.data = Uint8Array.from(raw, (character) => character.charCodeAt(0));
  record.bytes = null;
  let start = 0;
  record.starts = record.lengths.map((length) => (start += length) - length);
  record.placeOf = new Map(record.columns.index.map((index, place) => [index, place]));
  record.size = record.columns.index.length;
  record.strings = strings;
  return record;
}

/* A variant's embedded record; parsed when it is first needed. */
function recordOf(name) {
  records[name] ||= opened(embedded(`latents-${variantNames.indexOf(name)}`), embedded("strings"));
  return records[name];
}

function othersOf(name) {
  const own = side[name];
  if (!own) return new Set();
  if (!own.set) {
    own.set = new Set();
    for (let i = 0; i < own.indices.length; i += 2) for (let n = 0; n < own.indices[i + 1]; n++) own.set.add(own.indices[i] + n);
  }
  return own.set;
}

const isKnown = (name, index) => recordOf(name).placeOf.has(index) || othersOf(name).has(index);

/* [record, place] of any latent of a variant; null where no file holds it. */
async function latentOf(name, index) {
  const record = recordOf(name);
  if (record.placeOf.has(index)) return [record, record.placeOf.get(index)];
  if (!othersOf(name).has(index)) return null;
  const value = await sideFile(`${side[name].name}-${Math.floor(index / side[name].part)}`);
  if (!value.placeOf) opened(value, value.strings).random_effect = record.random_effect;
  return [value, value.placeOf.get(index)];
}

const words = (record, id) => record.strings[id];
const labelOf = (name, index) => (labels[name] || {})[index] || null;

/* What the list shows: the columns and the top tokens of the sample, or of all latents once their list has arrived. */
function sampleTable(name) {
  const record = recordOf(name);
  record.table ||= { columns: record.columns, size: record.size, tokens: record.top.map((top) => top.map(([token]) => words(record, token))) };
  return record.table;
}

async function wholeTable(name) {
  const own = side[name];
  if (!own) return sampleTable(name);
  const sample = sampleTable(name);
  const list = await sideFile(`${own.name}-list`);
  if (!own.table) {
    const columns = Object.fromEntries(Object.keys(sample.columns).map((key) => [key, [...sample.columns[key], ...(list.columns[key] || Array(list.top.length).fill(null))]]));
    own.table = { columns, size: columns.index.length, tokens: [...sample.tokens, ...list.top.map((top) => top.map((token) => list.strings[token]))] };
  }
  return own.table;
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

/* What a search looks through, in lower case: the label, tokens, titles, promoted tokens and the contexts' text. */
function textOf(record, place) {
  record.texts ||= [];
  if (record.texts[place] === undefined) {
    const parts = [record.top[place].map(([token]) => words(record, token)).join(" "), record.promoted[place].map((id) => words(record, id)).join(" ")];
    readContexts(record, place, (context) => {
      if (context.isRandom) return;
      if (context.title >= 0) parts.push(words(record, context.title));
      parts.push(context.tokens.map((id) => words(record, id)).join(""));
    });
    record.texts[place] = parts.join("\n").toLowerCase();
  }
  return record.texts[place];
}

/* Everything known of a latent as plain values, for a file. */
function plainLatent(name, record, place) {
  const tokens = (ids) => ids.map((id) => words(record, id));
  const index = record.columns.index[place];
  const context = (one) => {
    const values = new Map(one.active);
    return { source: words(record, one.source), document: one.document, title: one.title >= 0 ? words(record, one.title) : null, peak: one.peak,
      tokens: tokens(one.tokens), values: one.tokens.map((_, i) => Number((values.get(i) || 0).toPrecision(4))) };
  };
  const contexts = contextsOf(record, place);
  const links = (pairs, keys) => (pairs || []).map((pair) => Object.fromEntries(keys.map((key, i) => [key, pair[i]])));
  return {
    variant: name, latent: index, label: (labelOf(name, index) || [null])[0],
    ...Object.fromEntries(Object.entries(record.columns).filter(([key]) => key !== "index").map(([key, values]) => [key, values[place]])),
    histogram: record.histogram ? record.histogram[place] : null,
    top_tokens: record.top[place].map(([token, share]) => [words(record, token), share]),
    promoted: tokens(record.promoted[place]), promoted_logits: record.promoted_logits ? record.promoted_logits[place] : [],
    suppressed: tokens(record.suppressed[place]), suppressed_logits: record.suppressed_logits ? record.suppressed_logits[place] : [],
    logit_effect: record.effect ? record.effect[place] : null, random_logit_effect: record.random_effect ?? null,
    neighbours: links(record.neighbours && record.neighbours[place], ["index", "cosine"]),
    partners: links(record.partners && record.partners[place], ["index", record.partners_by || "strength"]),
    selective_for: record.selective_for ? record.selective_for[place] : null,
    matches: record.matches ? record.matches[place] : {},
    contexts: contexts.filter((one) => !one.isRandom).map(context), random_contexts: contexts.filter((one) => one.isRandom).map(context),
  };
}
