/* The label tree: a row a class, a column an arm, each cell coloured by its score. */
let startTree = () => {};
if (document.getElementById("tree")) {
  const place = document.getElementById("tree");
  const controls = document.getElementById("tree-controls");
  // Cividis: light to dark in luminance alone, the same to the colour-blind.
  const CIVIDIS = [[0, 34, 78], [28, 54, 110], [63, 74, 108], [90, 94, 109], [117, 116, 117], [145, 138, 118], [174, 161, 111], [206, 186, 97], [240, 213, 72], [254, 232, 56]];
  const closed = new Set();
  let data, tree, contrast, k, metric, shown;

  function colour(share) {
    const at = Math.min(0.9999, Math.max(0, share)) * (CIVIDIS.length - 1);
    const [a, b] = [CIVIDIS[Math.floor(at)], CIVIDIS[Math.floor(at) + 1]];
    return a.map((value, i) => Math.round(value + (at % 1) * (b[i] - value)));
  }

  function luminance(rgb) {
    const [r, g, b] = rgb.map((value) => { const c = value / 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }

  const isNodeMeasure = () => metric in data.node_measures;
  const limits = () => (isNodeMeasure() ? [1, 0] : [0.5, 1]);  // bad, good
  const key = () => (isNodeMeasure() ? metric : `${contrast}/${k}/${metric}`);

  function cell(packed) {
    if (packed === null || packed === undefined) return make("td", { class: "none" }, "");
    const [value, spread] = (Array.isArray(packed) ? packed : [packed, null]).map((part) => (part === null ? null : part / 1000));
    const [bad, good] = limits();
    const rgb = colour((value - bad) / (good - bad));
    const ink = luminance(rgb) > 0.18 ? "#000" : "#fff";
    return make("td", { style: `background: rgb(${rgb}); color: ${ink}` }, value.toFixed(3), spread === null ? "" : " ", spread === null ? "" : make("small", {}, `± ${spread.toFixed(3)}`));
  }

  function draw() {
    const nodes = data.trees[tree];
    const values = data.values[tree];
    const columns = data.columns.filter((column) => shown.has(column.name) && values[column.name]);
    const parents = new Set(nodes.map((node) => node.parent));
    const isHidden = (node) => [...closed].some((path) => node.path.startsWith(path + "/"));
    const body = make("tbody");
    nodes.forEach((node, i) => {
      if (isHidden(node)) return;
      const isOpen = !closed.has(node.path);
      const head = make("th", { scope: "row", style: `--level: ${node.level - 1}` });
      if (parents.has(node.path)) {
        head.append(make("button", { type: "button", class: "fold", "aria-expanded": isOpen, "aria-label": `children of ${node.label}`,
          onclick: () => { isOpen ? closed.add(node.path) : closed.delete(node.path); draw(); } }, isOpen ? "▾" : "▸"));
      } else head.append(make("span", { class: "leaf" }));
      head.append(make("span", {}, node.label), make("small", {}, `${node.texts.toLocaleString("en")} texts`));
      body.append(make("tr", { class: node.level === 1 ? "root" : "" }, head, ...columns.map((column) => cell((values[column.name][key()] || [])[i]))));
    });
    const titles = columns.map((column) => make("th", { scope: "col" }, make("i", { style: `background: var(${data.colours[column.name]})` }), column.name));
    place.replaceChildren(make("table", { class: "tree" }, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "class"), ...titles)), body));
    const [bad, good] = limits();
    const stops = CIVIDIS.map((rgb) => `rgb(${rgb})`).join(", ");
    document.getElementById("tree-scale").replaceChildren(make("span", {}, String(bad)), make("i", { style: `background: linear-gradient(90deg, ${stops})` }), make("span", {}, String(good)),
      make("span", { class: "what" }, isNodeMeasure() ? `${data.node_measures[metric]}; 0 is best` : `${data.metrics[metric]}, ${k === 1 ? "1 latent" : `${k} latents`}, ${data.contrasts[contrast]}`));
    for (const select of controls.querySelectorAll("[data-needs-probe]")) select.disabled = isNodeMeasure();
  }

  function choice(label, options, value, onchange, needsProbe) {
    const select = make("select", { "data-tree-choice": label, ...(needsProbe ? { "data-needs-probe": "" } : {}) });
    for (const [name, title] of options) select.append(make("option", { value: name, ...(String(name) === String(value) ? { selected: "" } : {}) }, title));
    select.addEventListener("change", () => { onchange(select.value); draw(); });
    return make("label", {}, `${label} `, select);
  }

  function drawControls() {
    const arms = make("div", { class: "toggles", role: "group", "aria-label": "Columns of the tree" });
    for (const column of data.columns) {
      const box = make("input", { type: "checkbox", "data-column": column.name });
      box.checked = shown.has(column.name);
      box.addEventListener("change", () => { box.checked ? shown.add(column.name) : shown.delete(column.name); draw(); });
      arms.append(make("label", {}, box, column.name));
    }
    controls.replaceChildren(
      choice("Tree", Object.keys(data.trees).map((name) => [name, name]), tree, (value) => { tree = value; closed.clear(); }),
      choice("Score", [...Object.entries(data.metrics), ...Object.entries(data.node_measures).filter(([name]) => data.has.includes(name))], metric, (value) => { metric = value; }),
      choice("Contrast", Object.entries(data.contrasts), contrast, (value) => { contrast = value; }, true),
      choice("Latents", data.ks.map((value) => [value, `k = ${value}`]), k, (value) => { k = Number(value); }, true),
      data.columns.length > 8 ? make("details", {}, make("summary", {}, "Columns"), arms) : arms,
    );
  }

  function show(group) {
    const own = data.groups[group] || Object.values(data.groups)[0];
    shown = new Set(data.columns.filter((column) => !column.arm || own.includes(column.name)).map((column) => column.name));
    drawControls();
    draw();
  }

  startTree = () => {
    if (data) return;
    data = embedded("tree");
    tree = Object.keys(data.trees)[0];
    contrast = "rest";
    metric = "balanced_accuracy";
    k = data.ks[0];
    data.has = Object.keys(data.node_measures).filter((name) => Object.values(data.values).some((by) => Object.values(by).some((one) => one[name])));
    const pressed = groupButtons.find((button) => button.getAttribute("aria-pressed") === "true");
    show(pressed ? pressed.dataset.chooseGroup : Object.keys(data.groups)[0]);
  };
  groupFollowers.push((group) => { if (data) show(group); });
  new IntersectionObserver((entries, observer) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    startTree();
  }, { rootMargin: "600px" }).observe(controls);
}
