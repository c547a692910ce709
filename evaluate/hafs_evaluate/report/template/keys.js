/* The keyboard: / search, j and k through the list, Enter opens, c compares, Esc leaves, ? lists the keys. */
if (explorer) {
  const help = document.getElementById("help");

  function move(step) {
    start();
    if (!found.length) return;
    cursor = Math.min(found.length - 1, Math.max(0, cursor + step));
    reveal(cursor);
    drawRows();
    const box = ui.list.getBoundingClientRect();
    if (box.bottom < 80 || box.top > innerHeight - 80) scrollTo(explorer);
  }

  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
    const typing = event.target.matches("input, select, textarea");
    if (event.key === "Escape") {
      if (typing) event.target.blur();
      else if (view.latent !== null) open(null);
      return;
    }
    if (event.target === ui.search && event.key === "Enter") {
      event.preventDefault();
      searchNow();
      ui.list.focus({ preventScroll: true });
      cursor = Math.max(cursor, 0);
      drawRows();
      return;
    }
    if (typing || event.target.closest("figure")) return;
    const inList = ui.list.contains(event.target);
    const keys = { j: () => move(1), k: () => move(-1), "/": () => { start(); scrollTo(explorer); ui.search.focus({ preventScroll: true }); }, "?": () => help.showModal(), c: () => {
      const compare = document.getElementById("compare");
      if (compare) compare.open = !compare.open;
    } };
    if (inList) Object.assign(keys, { ArrowDown: () => move(1), ArrowUp: () => move(-1), Home: () => move(-Infinity), End: () => move(Infinity) });
    if (event.key === "Enter" && cursor >= 0 && found.length && !event.target.closest("a, button, summary")) {
      keys.Enter = () => open(table.columns.index[found[cursor]]);
    }
    const act = keys[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });
}
