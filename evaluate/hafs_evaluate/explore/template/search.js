/* The latents that fire on the text more than elsewhere. */
page("search-go").addEventListener("click", () => {
  const run = page("search-run").value;
  const text = page("text").value;
  ask("search", { text, run }, (answer) => {
    const rows = answer.latents.map((one) => make("tr", {},
      make("th", {}, make("button", { type: "button", class: "link", "data-found": one.index, onclick: () => {
        if (text !== readText) read(() => openLatent(run, one.index));
        else openLatent(run, one.index);
      } }, `#${one.index}`)),
      make("td", { class: "token" }, one.label || ""), make("td", {}, number(one.score)), make("td", {}, percent(one.strength)),
      make("td", {}, percent(one.share)), make("td", {}, percent(one.density))));
    page("search-result").replaceChildren(
      make("p", { class: "note" }, `${answer.counted} tokens counted.${cutNote(answer)}`),
      rows.length ? table(["latent", "top token", "score", "strength", "share", "density"], rows)
        : make("p", { class: "missing" }, "No latent fires here more than elsewhere."));
    showState();
  });
});
