/* Before printing everything is drawn and unfolded, with one latent as an example; afterwards it is as it was. */
let unfolded = [];
addEventListener("beforeprint", () => {
  startTree();
  start();
  if (explorer && view.latent === null && found.length) open(table.columns.index[found[0]], false);
  unfolded = [...document.querySelectorAll("details:not([open]):not(.configs)")];
  for (const details of unfolded) details.open = true;
});
addEventListener("afterprint", () => {
  for (const details of unfolded) details.open = false;
  unfolded = [];
});
