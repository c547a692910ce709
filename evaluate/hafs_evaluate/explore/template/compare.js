/* Two runs on the same text: latents matched by the cosine of their dictionary vectors. */
page("compare-go").addEventListener("click", () => {
  const runs = [page("compare-a").value, page("compare-b").value];
  ask("compare", { text: page("text").value, runs }, (answer) => {
    const strips = runs.map(() => make("p", { class: "strip" }));
    const names = runs.map(() => make("h3", {}));
    const rows = answer.pairs.map((pair, place) => make("tr", { "data-pair": place, tabindex: 0, onclick: () => draw(place),
      onkeydown: (event) => { if (event.key === "Enter") draw(place); } },
      make("th", {}, `#${pair.index}`), make("td", { class: "token" }, pair.label || ""), make("td", {}, number(pair.peak)),
      make("td", {}, number(pair.match.cosine)), make("td", {}, `#${pair.match.index}`), make("td", { class: "token" }, pair.match.label || ""),
      make("td", {}, number(pair.match_peak)), make("td", {}, number(pair.correlation))));

    function draw(place) {
      const pair = answer.pairs[place];
      rows.forEach((row, other) => row.setAttribute("aria-selected", other === place));
      [pair.index, pair.match.index].forEach((index, side) => {
        const most = [pair.peak, pair.match_peak][side];
        drawStrip(strips[side], answer, pair.activations[side], most);
        names[side].replaceChildren(make("button", { type: "button", class: "link", onclick: () => openLatent(runs[side], index) },
          `#${index} of ${runs[side]}`), most ? `, at most ${number(most)}` : ", silent here");
      });
    }

    const heads = ["latent", "top token", "highest", "cosine", "match", "top token", "highest", "correlation"];
    page("compare-result").replaceChildren(...(rows.length
      ? [names[0], strips[0], names[1], strips[1], table(heads, rows),
        make("p", { class: "note" }, `Highest: on this text. Correlation: of the two activations over its tokens.${cutNote(answer)}`)]
      : [make("p", { class: "missing" }, "No latent of the first run fires on this text.")]));
    if (rows.length) draw(0);
    showState();
  });
});
