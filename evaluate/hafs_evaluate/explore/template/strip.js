/* Tokens in a line, each coloured by a number, as the report colours its contexts. */
const LEFT_OUT = {
  bos: "the beginning of the text (BOS), which no SAE was trained on",
  large: "its activation has a norm that the training left out, so that no latent is shown",
};

/* Fills `element` with the tokens of `answer`; `values` are their activations, `most` the one that is coloured fully. */
function drawStrip(element, answer, values, most) {
  element.dir = page("text").matches(":dir(rtl)") ? "rtl" : "ltr";
  element.replaceChildren(...answer.tokens.map((token, place) => {
    const value = values ? values[place] : 0;
    const kind = answer.kinds[place];
    return make("span", {
      class: kind, "data-place": place, role: "option", "aria-selected": "false",
      title: LEFT_OUT[kind] || (values ? number(value) : null),
      style: value > 0 ? `background: rgba(var(--shade), ${(0.15 + 0.85 * Math.min(1, value / most)).toFixed(3)})` : null,
    }, token);
  }));
}

/* A button for a latent: its index, the token by which it is known, a number, and a bar of its share of the maximum. */
function hit(run, index, label, value, share) {
  const isOpen = opened.run === run && opened.index === index;
  return make("button", { type: "button", class: "hit", "data-run": run, "data-index": index, "aria-current": isOpen,
    title: label ? `strongest on “${label}”` : null, onclick: () => openLatent(run, index) },
    make("i", { style: `width: ${(100 * Math.min(1, share || 0)).toFixed(1)}%` }),
    make("b", {}, `#${index}`), make("span", { class: "token" }, named(label || "")), make("span", {}, number(value)));
}

function markOpen() {
  for (const button of document.querySelectorAll(".hit")) {
    button.setAttribute("aria-current", button.dataset.run === opened.run && Number(button.dataset.index) === opened.index);
  }
}

function cutNote(answer) {
  return answer.cut ? ` The text is too long: its last ${answer.cut.toLocaleString("en")} tokens were not read.` : "";
}

function table(heads, rows) {
  return make("div", { class: "scroll" }, make("table", {},
    make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", {}, head)))), make("tbody", {}, ...rows)));
}
