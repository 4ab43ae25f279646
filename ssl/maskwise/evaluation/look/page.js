"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const card = name => $("card-" + name);
const inflated = new Map();
const state = { image: 0, layer: 0, head: 0, masking: data.masking, ratio: data.ratio, mass: data.mass, patch: 0,
  opacity: 0.75, smooth: false, boxes: new Set(["LOST", "DINO-seg"]) };
const COVER = [118, 118, 124], SEGMENT = [214, 40, 40];
const colormap = bytesOf(data.colormap);
let now = null;  // the arrays of the image shown

function bytesOf(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

async function opened(index) {
  if (inflated.has(index)) return inflated.get(index);
  const facts = data.images[index];
  const stream = new Blob([bytesOf(facts.bytes)]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const picture = new Image();
  picture.src = facts.picture;
  await picture.decode();
  const array = (name, Type) => {
    const place = facts.arrays[name];
    return place && new Type(buffer, place[0], place[1]);
  };
  const patches = facts.grid[0] * facts.grid[1], masks = {};
  for (const [name] of data.maskings) {
    const bits = array("mask_" + name, Uint8Array);
    if (bits) masks[name] = bits;
  }
  let first = 0;
  const layers = facts.layers.map(layer => {
    const maps = layer.heads === 1 ? 1 : layer.heads + 1, here = { ...layer, first, maps };
    first += maps;
    return here;
  });
  const image = { facts, picture, patches, masks, layers, maps: array("maps", Uint8Array),
    codes: array("codes", Int8Array), colors: array("colors", Uint8Array) };
  if (inflated.size > 8) inflated.delete(inflated.keys().next().value);
  inflated.set(index, image);
  return image;
}

// values ------------------------------------------------------------------------------------------

function attention(layer = state.layer, head = state.head) {
  const row = now.layers[layer].first + Math.min(head, now.layers[layer].maps - 1);
  const most = now.facts.map_scales[row], values = new Float64Array(now.patches);
  for (let i = 0; i < now.patches; i++) values[i] = most * (now.maps[row * now.patches + i] / 255) ** 2;
  return values;
}

function massMask(values, share) {
  const order = Array.from(values.keys()).sort((a, b) => values[b] - values[a] || a - b);
  const total = values.reduce((sum, value) => sum + value, 0), mask = new Uint8Array(values.length);
  let before = 0;
  for (const i of order) {
    if (before >= share * total * (1 - 1e-12)) break;
    mask[i] = 1;
    before += values[i];
  }
  return mask;
}

function drawnMask(name, step) {
  const bits = now.masks[name], stride = Math.ceil(now.patches / 8), mask = new Uint8Array(now.patches);
  for (let k = 0; k <= step; k++)
    for (let i = 0; i < now.patches; i++) mask[i] ^= (bits[k * stride + (i >> 3)] >> (7 - (i & 7))) & 1;
  return mask;
}

function cosines(patch) {
  const width = now.codes.length / now.patches, scale = now.facts.code_scale ** 2, codes = now.codes;
  const values = new Float64Array(now.patches);
  for (let i = 0; i < now.patches; i++) {
    let sum = 0;
    for (let k = 0; k < width; k++) sum += codes[i * width + k] * codes[patch * width + k];
    values[i] = Math.max(-1, Math.min(1, sum * scale));
  }
  return values;
}

// drawing -----------------------------------------------------------------------------------------

function span(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  return [low, high];
}

function heat(values) {
  const [low, high] = span(values), pixels = new Uint8ClampedArray(values.length * 4);
  values.forEach((value, i) => {
    const level = high > low ? Math.min(255, Math.floor((value - low) / (high - low) * 256)) : 0;
    pixels.set([colormap[3 * level], colormap[3 * level + 1], colormap[3 * level + 2], 255], 4 * i);
  });
  return pixels;
}

function cover(mask, color, alpha) {
  const pixels = new Uint8ClampedArray(mask.length * 4);
  mask.forEach((masked, i) => pixels.set([...color, masked ? Math.round(255 * alpha) : 0], 4 * i));
  return pixels;
}

function onGrid(pixels, canvas = document.createElement("canvas")) {
  const [rows, columns] = now.facts.grid;
  canvas.width = columns;
  canvas.height = rows;
  canvas.getContext("2d").putImageData(new ImageData(pixels, columns, rows), 0, 0);
  return canvas;
}

function draw(name, pixels, opacity, smooth = state.smooth) {
  const canvas = card(name).querySelector("canvas"), context = canvas.getContext("2d");
  context.globalAlpha = 1;
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.drawImage(now.picture, 0, 0, canvas.width, canvas.height);
  if (!pixels) return;
  context.globalAlpha = opacity;
  context.imageSmoothingEnabled = smooth;
  context.drawImage(onGrid(pixels), 0, 0, canvas.width, canvas.height);
}

function say(name, text) { card(name).querySelector("figcaption output").textContent = text; }

function scale(name, low, high, format) {
  const [left, bar, right] = card(name).querySelector(".scale").children;
  left.textContent = format(low);
  right.textContent = format(high);
  const stops = [];
  for (let i = 0; i <= 16; i++) stops.push("rgb(" + colormap.slice(3 * Math.min(255, 16 * i)).slice(0, 3).join(",") + ")");
  bar.style.background = "linear-gradient(90deg," + stops.join(",") + ")";
}

const percent = value => {
  const share = 100 * value;
  return (share >= 10 ? share.toFixed(0) : share >= 1 ? share.toFixed(1) : share.toPrecision(2)) + " %";
};
const count = mask => mask.reduce((sum, value) => sum + value, 0);
const of = mask => `${count(mask)} of ${now.patches} patches`;

function drawAttention() {
  if (!now.layers.length) return;
  const values = attention(), layer = now.layers[state.layer], mask = massMask(values, state.mass / 100);
  const head = layer.maps === 1 ? "one map" : state.head ? `head ${state.head}` : `${layer.heads} heads merged`;
  draw("attention", heat(values), state.opacity);
  scale("attention", ...span(values), percent);
  say("attention", `${layer.title}, ${head}`);
  draw("mass", cover(mask, SEGMENT, 1), 0.55, false);
  say("mass", of(mask));
  $("layer-name").textContent = layer.title;
  $("head-name").textContent = layer.maps === 1 ? "1" : state.head ? `${state.head} of ${layer.heads}` : "merged";
  $("mass-value").textContent = `${state.mass} %`;
  $("head").max = layer.maps - 1;
  $("head").value = state.head;
  $("head").disabled = layer.maps === 1;
  $("layer").value = state.layer;
  for (const button of document.querySelectorAll("#atlas button"))
    button.setAttribute("aria-current", button.dataset.place === `${state.layer},${state.head}`);
}

function drawMask() {
  if (!now.masks[state.masking]) state.masking = Object.keys(now.masks)[0];
  const mask = drawnMask(state.masking, state.ratio);
  draw("mask", cover(mask, COVER, 1), 0.92, false);
  say("mask", of(mask));
  $("ratio-value").textContent = `${state.ratio} %`;
  for (const button of $("maskings").children)
    button.setAttribute("aria-checked", button.dataset.name === state.masking);
}

function drawSimilarity() {
  const values = cosines(state.patch), [low, high] = span(values);
  draw("similarity", heat(values), state.opacity);
  scale("similarity", low, high, value => value.toFixed(2));
  const columns = now.facts.grid[1], row = Math.floor(state.patch / columns), column = state.patch % columns;
  say("similarity", `patch ${row}, ${column}`);
  for (const name of ["image", "attention", "mass", "mask", "similarity", "colors"]) mark(name, row, column);
}

function mark(name, row, column) {
  const [rows, columns] = now.facts.grid, [height, width] = now.facts.size, svg = card(name).querySelector("svg");
  const box = { x: column * width / columns, y: row * height / rows, width: width / columns, height: height / rows };
  svg.querySelectorAll(".cell").forEach(old => old.remove());
  for (const kind of ["cell halo", "cell"]) svg.append(shape(kind, box));
}

function shape(kind, box) {
  const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  rect.setAttribute("class", kind);
  for (const [key, value] of Object.entries(box)) rect.setAttribute(key, value);
  return rect;
}

function drawBoxes() {
  const svg = card("image").querySelector("svg");
  svg.querySelectorAll(".box").forEach(old => old.remove());
  for (const [name, [x0, y0, x1, y1]] of Object.entries(now.facts.boxes)) {
    if (!state.boxes.has(name)) continue;
    for (const kind of ["box halo", "box " + name])
      svg.append(shape(kind, { x: x0, y: y0, width: x1 - x0, height: y1 - y0 }));
  }
}

function drawColors() {
  const pixels = new Uint8ClampedArray(now.patches * 4);
  for (let i = 0; i < now.patches; i++) pixels.set([...now.colors.subarray(3 * i, 3 * i + 3), 255], 4 * i);
  draw("colors", pixels, 1);
}

function drawAtlas() {  // a row for each head, a column for each layer
  const table = $("atlas").querySelector(".table"), [rows, columns] = now.facts.grid;
  $("atlas").hidden = now.layers.reduce((sum, layer) => sum + layer.maps, 0) < 2;
  if ($("atlas").hidden) return;
  const room = (table.clientWidth - 84) / now.layers.length - 9;
  const width = Math.round(Math.max(52, Math.min(132 * Math.min(1.3, Math.sqrt(columns / rows)), room)));
  const top = element("div", { className: "row head" }, element("span"));
  for (const layer of now.layers) {
    const name = element("div", { textContent: layer.title });
    name.style.width = width + 4 + "px";
    top.append(name);
  }
  table.replaceChildren(top);
  for (let h = 0; h < Math.max(...now.layers.map(layer => layer.maps)); h++) {
    const row = element("div", { className: "row" }, element("span", { textContent: h ? `head ${h}` : "merged" }));
    now.layers.forEach((layer, l) => row.append(h < layer.maps ? atlasCell(l, h, width) : gap(width)));
    table.append(row);
  }
}

function atlasCell(layer, head, width) {
  const canvas = onGrid(heat(attention(layer, head)));
  canvas.style.width = width + "px";
  const title = `${now.layers[layer].title}, ${head ? "head " + head : "merged"}`;
  const button = element("button", { type: "button", title }, canvas);
  button.dataset.place = `${layer},${head}`;
  button.onclick = () => { Object.assign(state, { layer, head }); drawAttention(); };
  return button;
}

function gap(width) {
  const empty = element("div");
  empty.style.width = width + 4 + "px";
  return empty;
}

function element(tag, values = {}, ...children) {
  const made = Object.assign(document.createElement(tag), values);
  made.append(...children);
  return made;
}

async function show(index) {
  const before = now;
  const image = await opened(index);
  if (state.image !== index) return;  // another was chosen meanwhile
  now = image;
  const { facts } = now, [height, width] = facts.size, zoom = Math.max(1, Math.round(640 / Math.max(height, width)));
  for (const stage of document.querySelectorAll("main .stage")) {
    const canvas = stage.querySelector("canvas");
    canvas.width = width * zoom;
    canvas.height = height * zoom;
    stage.querySelector("svg").setAttribute("viewBox", `0 0 ${width} ${height}`);
    stage.querySelector("svg").setAttribute("preserveAspectRatio", "none");
  }
  if (!before || before.facts.layers.length !== facts.layers.length) {
    state.layer = Math.max(0, facts.layers.length - 1);
    state.head = 0;
  }
  if (!before) {
    const [x, y] = data.point || [0.5, 0.5];
    state.patch = patchAt(x, y);
  } else if (before.facts.grid.join() !== facts.grid.join()) {
    const [rows, columns] = before.facts.grid;
    state.patch = patchAt((state.patch % columns + 0.5) / columns, (Math.floor(state.patch / columns) + 0.5) / rows);
  }
  for (const name of ["attention", "mass"]) card(name).hidden = !now.layers.length;
  $("layer").max = Math.max(0, facts.layers.length - 1);
  $("layer").parentElement.hidden = facts.layers.length < 2;
  $("head").parentElement.hidden = now.layers.every(layer => layer.maps === 1);
  $("boxes").replaceChildren(...Object.keys(facts.boxes).map(boxChoice));
  $("code-error").textContent = facts.code_error >= 0.005 ? `, to within ${facts.code_error.toFixed(2)}` : "";
  $("maskings").replaceChildren(...data.maskings.filter(([name]) => now.masks[name]).map(maskingChoice));
  $("frame").value = index;
  $("frame-name").textContent = `${index + 1} of ${data.images.length}: ${facts.name}`;
  [...$("strip").children].forEach((button, i) => {
    button.setAttribute("aria-current", i === index);
    if (i === index) $("strip").scrollLeft = button.offsetLeft - ($("strip").clientWidth - button.offsetWidth) / 2;
  });
  const [tall, wide] = facts.original;
  say("image", `${facts.name}, ${wide} x ${tall}`);
  say("colors", `${facts.grid[1]} x ${facts.grid[0]} patches`);
  draw("image");
  drawBoxes();
  drawAtlas();
  drawAttention();
  drawMask();
  drawSimilarity();
  drawColors();
  document.body.dataset.shown = index;
}

function boxChoice(name) {
  const input = element("input", { type: "checkbox", checked: state.boxes.has(name) });
  input.onchange = () => { state.boxes[input.checked ? "add" : "delete"](name); drawBoxes(); };
  return element("label", { className: name }, input, name);
}

function maskingChoice([name, title]) {
  const button = element("button", { type: "button", textContent: title });
  button.dataset.name = name;
  button.setAttribute("role", "radio");
  button.onclick = () => { state.masking = name; drawMask(); };
  return button;
}

// controls ----------------------------------------------------------------------------------------

function patchAt(x, y) {
  const [rows, columns] = now.facts.grid, within = (share, most) => Math.max(0, Math.min(most - 1, Math.floor(share * most)));
  return within(y, rows) * columns + within(x, columns);
}

function choose(patch) { state.patch = patch; drawSimilarity(); }

for (const canvas of document.querySelectorAll("main canvas")) {
  canvas.onclick = event => {
    const box = canvas.getBoundingClientRect();
    choose(patchAt((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height));
  };
  canvas.onkeydown = event => {
    const [rows, columns] = now.facts.grid, row = Math.floor(state.patch / columns), column = state.patch % columns;
    const moved = { ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1],
      ArrowRight: [row, column + 1] }[event.key];
    if (!moved) return;
    event.preventDefault();
    const [r, c] = moved;
    if (r >= 0 && r < rows && c >= 0 && c < columns) choose(r * columns + c);
  };
}

function bind(id, key, redraw, value = input => Number(input.value)) {
  $(id).oninput = () => { state[key] = value($(id)); redraw(); };
}
const overlays = () => { drawAttention(); drawSimilarity(); drawColors(); };
bind("layer", "layer", () => { state.head = Math.min(state.head, now.layers[state.layer].maps - 1); drawAttention(); });
bind("head", "head", drawAttention);
bind("mass", "mass", drawAttention);
bind("ratio", "ratio", drawMask);
bind("opacity", "opacity", overlays, input => input.value / 100);
bind("smooth", "smooth", overlays, input => input.checked);
bind("frame", "image", () => show(state.image));
$("mass").value = state.mass;
$("ratio").value = state.ratio;

const dark = matchMedia("(prefers-color-scheme: dark)");
const themes = ["auto", "light", "dark"];
function paint() {
  const theme = $("theme").textContent;
  document.documentElement.dataset.theme = theme === "auto" ? (dark.matches ? "dark" : "light") : theme;
}
$("theme").onclick = () => {
  $("theme").textContent = themes[(themes.indexOf($("theme").textContent) + 1) % themes.length];
  paint();
};
dark.onchange = paint;
paint();

if (data.images.length > 1) {
  $("images").hidden = false;
  $("frame").max = data.images.length - 1;
  data.images.forEach((facts, index) => {
    const picture = element("img", { src: facts.picture, alt: facts.name, loading: "lazy" });
    const button = element("button", { type: "button", title: facts.name }, picture);
    button.onclick = () => { state.image = index; show(index); };
    $("strip").append(button);
  });
  let timer = null;
  $("play").onclick = () => {
    clearInterval(timer);
    timer = timer ? null : setInterval(() => {
      state.image = (state.image + 1) % data.images.length;
      show(state.image);
    }, 200);
    $("play").textContent = timer ? "\u275a\u275a" : "\u25b6";
  };
}
show(0);
