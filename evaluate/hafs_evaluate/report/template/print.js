/* Before printing everything is drawn and unfolded, with one latent as an example; afterwards it is as it was. */
let unfolded = [];
let before = null;
addEventListener("beforeprint", () => {
  startTree();
  start();
  before = { latent: view.latent, isComparing };
  isComparing = true;  // a latent is drawn after this function has returned, so it is told to be drawn unfolded
  if (explorer && view.latent === null && found.length) open(table.columns.index[found[0]], false);
  else if (explorer) drawDetail();
  unfolded = [...document.querySelectorAll("details:not([open]):not(.configs):not(.compare)")];
  for (const details of unfolded) details.open = true;
});
addEventListener("afterprint", () => {
  if (!before) return;
  for (const details of unfolded) details.open = false;
  unfolded = [];
  isComparing = before.isComparing;
  if (explorer) open(before.latent, false);
  before = null;
});
