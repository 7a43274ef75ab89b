
"use strict";

// Units: points are (y, x) in pixels of the image, as everywhere in brixel; cells are numbered row by row.
// A kind is one sort of features ("backbone", "brixel"); a tile shows one kind of one image.

// ---------------------------------------------------------------------------------------------- features

const data = JSON.parse(document.getElementById("data").textContent);
const decodedMaps = new Map();

function bytesOf(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let at = 0; at < bytes.length; at++) bytes[at] = binary.charCodeAt(at);
  return bytes;
}

/** The cells of a map: codes, lengths, and what the components leave out of a direction of length 1. */
function cellsOf(image, kind) {
  const key = image * data.kinds.length + kind;
  if (!decodedMaps.has(key)) {
    const { low, step } = data.kinds[kind];
    const stored = data.images[image].maps[kind];
    const codes = bytesOf(stored.codes);
    const shares = new DataView(bytesOf(stored.lengths).buffer);
    const count = stored.grid[0] * stored.grid[1];
    const lengths = new Float64Array(count);
    const rest = new Float32Array(count);
    for (let cell = 0; cell < count; cell++) {
      lengths[cell] = shares.getUint16(2 * cell, true) / 65535 * stored.longest;
      let square = 0;
      for (let j = 0; j < low.length; j++) square += (low[j] + step[j] * codes[cell * low.length + j]) ** 2;
      rest[cell] = Math.sqrt(Math.max(0, 1 - square));
    }
    decodedMaps.set(key, { codes, lengths, rest, grid: stored.grid, stride: stored.stride });
    stored.codes = stored.lengths = null;
  }
  return decodedMaps.get(key);
}

/** Products of all cells' directions with a vector of components. */
function products(cells, kind, vector) {
  const { low, step } = data.kinds[kind];
  const count = cells.lengths.length, width = low.length, codes = cells.codes;
  const weights = new Float32Array(width), found = new Float32Array(count);
  let constant = 0;
  for (let j = 0; j < width; j++) {
    weights[j] = vector[j] * step[j];
    constant += vector[j] * low[j];
  }
  for (let cell = 0, at = 0; cell < count; cell++) {
    let sum = constant;
    for (let j = 0; j < width; j++) sum += weights[j] * codes[at++];
    found[cell] = sum;
  }
  return found;
}

/** The features at a point, bilinear between centres of cells, as FeatureMap.at; divided by their length. */
function directionAt(image, kind, y, x) {
  const cells = cellsOf(image, kind), { low, step } = data.kinds[kind];
  const [rows, columns] = cells.grid;
  const row = Math.min(Math.max(y / cells.stride[0] - 0.5, 0), rows - 1);
  const column = Math.min(Math.max(x / cells.stride[1] - 0.5, 0), columns - 1);
  const top = Math.floor(row), left = Math.floor(column);
  const bottom = Math.min(top + 1, rows - 1), right = Math.min(left + 1, columns - 1);
  const corners = [
    [top, left, (1 - row + top) * (1 - column + left)], [top, right, (1 - row + top) * (column - left)],
    [bottom, left, (row - top) * (1 - column + left)], [bottom, right, (row - top) * (column - left)],
  ];
  const vector = new Float64Array(low.length);
  let rest = 0;
  for (const [i, j, share] of corners) {
    const cell = i * columns + j, weight = share * cells.lengths[cell];
    for (let c = 0; c < low.length; c++) vector[c] += weight * (low[c] + step[c] * cells.codes[cell * low.length + c]);
    rest += weight * cells.rest[cell]; // neighbours leave out nearly the same
  }
  const length = Math.hypot(rest, ...vector);
  return length > 0 ? vector.map(value => value / length) : null;
}

/** Cosine similarities of all cells to a direction; 0 where either is zero. */
function similarities(image, kind, direction) {
  const cells = cellsOf(image, kind);
  if (direction === null) return new Float32Array(cells.lengths.length);
  const found = products(cells, kind, direction);
  for (let cell = 0; cell < found.length; cell++) {
    found[cell] = cells.lengths[cell] === 0 ? 0 : Math.min(1, Math.max(-1, found[cell]));
  }
  return found;
}

function indexOfLargest(values) {
  let best = 0;
  for (let at = 1; at < values.length; at++) if (values[at] > values[best]) best = at;
  return best;
}

/** Centre of a cell; of one that extends beyond the image, the edge. */
function centreOf(image, kind, cell) {
  const { grid, stride } = cellsOf(image, kind), { height, width } = data.images[image];
  const row = Math.floor(cell / grid[1]), column = cell % grid[1];
  return { y: Math.min((row + 0.5) * stride[0], height), x: Math.min((column + 0.5) * stride[1], width) };
}

/** Whether the way back from a cell leads to the point: less than a cell away on both axes, as FeatureMap.match. */
function leadsBack(tile, cell) {
  const place = centreOf(tile.image, tile.kind, cell), point = state.point;
  const back = indexOfLargest(similarities(point.image, tile.kind, directionAt(tile.image, tile.kind, place.y, place.x)));
  const { grid, stride } = cellsOf(point.image, tile.kind);
  const away = [point.y / stride[0] - 0.5 - Math.floor(back / grid[1]), point.x / stride[1] - 0.5 - back % grid[1]];
  return away.every(cells => Math.abs(cells) < 1 - 1e-9);
}

// ---------------------------------------------------------------------------------------------- colours

// nine colours of the map "inferno" (matplotlib, CC0): rising brightness, also for eyes that tell few hues apart
const INFERNO = [
  [0, 0, 4], [33, 12, 74], [87, 16, 110], [138, 34, 106], [188, 55, 84], [228, 90, 49], [249, 142, 9], [249, 203, 53],
  [252, 255, 164],
];
const COLOURS = new Uint8ClampedArray(256 * 4);
for (let level = 0; level < 256; level++) {
  const at = level / 255 * (INFERNO.length - 1), from = Math.min(Math.floor(at), INFERNO.length - 2);
  for (let c = 0; c < 3; c++) COLOURS[4 * level + c] = INFERNO[from][c] + (at - from) * (INFERNO[from + 1][c] - INFERNO[from][c]);
  COLOURS[4 * level + 3] = 255;
}

function paintSimilarities(tile, low, high) {
  const pixels = tile.pixels.data, scale = 255 / Math.max(high - low, 1e-6);
  for (let cell = 0; cell < tile.values.length; cell++) {
    const level = 4 * Math.round(Math.min(255, Math.max(0, (tile.values[cell] - low) * scale)));
    for (let c = 0; c < 4; c++) pixels[4 * cell + c] = COLOURS[level + c];
  }
  tile.canvas.getContext("2d").putImageData(tile.pixels, 0, 0);
}

/** Draw the colours of PCA: products with three components, in ranges that all images share. */
function paintComponents(canvas, image, kind) {
  const cells = cellsOf(image, kind), { directions, colourLow, colourHigh } = data.kinds[kind];
  const context = canvas.getContext("2d"), picture = context.createImageData(canvas.width, canvas.height);
  directions.forEach((direction, c) => {
    const found = products(cells, kind, direction), span = colourHigh[c] - colourLow[c];
    for (let cell = 0; cell < found.length; cell++) {
      const share = span > 0 ? (cells.lengths[cell] * found[cell] - colourLow[c]) / span : 0.5;
      picture.data[4 * cell + c] = Math.round(255 * share);
      picture.data[4 * cell + 3] = 255;
    }
  });
  context.putImageData(picture, 0, 0);
}

// ---------------------------------------------------------------------------------------------- the page

const byId = id => document.getElementById(id);
const gallery = byId("gallery"), ALL = data.kinds.length;

/** What is shown: a kind or all of them, a layer, and a point (image, y, x) or none, which may be pinned. */
const state = {
  kind: Math.max(0, data.kinds.findIndex(kind => kind.name === "brixel")),
  layer: "similarity",
  stretch: false,
  point: null,
  pinned: false,
  pointer: null, // the tile and the point under the mouse
};
const tiles = [];

function element(parent, name, properties = {}) {
  const made = Object.assign(document.createElement(name), properties);
  parent.append(made);
  return made;
}

const two = value => value.toFixed(2);
const placeText = point => `y ${point.y.toFixed(1)}, x ${point.x.toFixed(1)}`;

function makeTile(image, kind) {
  const { name, height, width, source, maps } = data.images[image];
  const [rows, columns] = maps[kind].grid, stride = maps[kind].stride;
  const figure = element(gallery, "figure");
  figure.dataset.image = image;
  figure.dataset.kind = kind;
  const frame = element(figure, "div", { className: "frame", tabIndex: 0 });
  frame.setAttribute("role", "application");
  frame.setAttribute("aria-roledescription", "image to point at");
  frame.setAttribute("aria-label", `${name}, ${data.kinds[kind].name}, ${height} by ${width} pixels. Arrow keys move the point, Enter pins it.`);
  frame.style.setProperty("--aspect", width / height);
  const cellsCanvas = className => {
    const canvas = element(frame, "canvas", { className, width: columns, height: rows });
    canvas.style.height = `${100 * rows * stride[0] / height}%`; // the last cells may extend beyond the image
    canvas.style.width = `${100 * columns * stride[1] / width}%`;
    return canvas;
  };
  if (source === null) paintComponents(cellsCanvas("base"), image, kind);
  else element(frame, "img", { src: source, alt: "", draggable: false });
  const canvas = cellsCanvas("cells");
  const ring = element(frame, "div", { className: "ring", hidden: true });
  const match = element(frame, "div", { className: "match", hidden: true });
  const caption = element(figure, "figcaption");
  element(caption, "b", { textContent: name });
  caption.append(" ");
  element(caption, "small", { textContent: `${data.kinds[kind].name}, ${rows} × ${columns} cells` });
  const readout = element(caption, "output");
  const tile = { image, kind, figure, frame, canvas, ring, match, readout, values: null, best: null };
  tile.pixels = canvas.getContext("2d").createImageData(columns, rows);
  listen(tile);
  return tile;
}

function pointFrom(tile, event) {
  const box = tile.frame.getBoundingClientRect(), { height, width } = data.images[tile.image];
  const along = (at, start, length, side) => Math.min(side, Math.max(0, (at - start) / length * side));
  return {
    image: tile.image,
    y: along(event.clientY, box.top, box.height, height),
    x: along(event.clientX, box.left, box.width, width),
  };
}

function listen(tile) {
  const { frame, ring } = tile;
  let drag = null; // of the ring: whether it has moved
  frame.addEventListener("pointermove", event => {
    if (drag !== null) return;
    if (event.pointerType !== "touch") state.pointer = { tile, point: pointFrom(tile, event) };
    if (!state.pinned && event.pointerType !== "touch") state.point = state.pointer.point;
    schedule();
  });
  frame.addEventListener("pointerleave", () => {
    state.pointer = null;
    schedule();
  });
  frame.addEventListener("click", event => {
    if (event.target === ring) return;
    moveTo(pointFrom(tile, event), true);
  });
  ring.addEventListener("pointerdown", event => {
    if (!state.pinned) return;
    ring.setPointerCapture(event.pointerId);
    drag = { moved: false, x: event.clientX, y: event.clientY };
    event.preventDefault(); // keeps the focus, and the text unselected
  });
  ring.addEventListener("pointermove", event => {
    if (drag === null) return;
    drag.moved ||= Math.hypot(event.clientX - drag.x, event.clientY - drag.y) > 4;
    if (drag.moved) moveTo(pointFrom(tile, event), true);
  });
  ring.addEventListener("pointerup", () => {
    if (drag !== null && !drag.moved) free();
    drag = null;
  });
  ring.addEventListener("pointercancel", () => { drag = null; });
  frame.addEventListener("keydown", event => {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key in steps && !event.ctrlKey && !event.altKey && !event.metaKey) {
      stepPoint(tile, steps[event.key], event.shiftKey ? 5 : 1);
    } else if (event.key === "Enter" || event.key === " ") {
      if (state.pinned && state.point.image === tile.image) free();
      else moveTo(state.point !== null && state.point.image === tile.image ? state.point : middleOf(tile), true);
    } else return;
    event.preventDefault();
    announce = true;
  });
}

function middleOf(tile) {
  const { height, width } = data.images[tile.image];
  return { image: tile.image, y: height / 2, x: width / 2 };
}

function stepPoint(tile, [down, right], cells) {
  const { stride, grid } = cellsOf(tile.image, tile.kind), { height, width } = data.images[tile.image];
  const known = state.point !== null && state.point.image === tile.image;
  const from = known ? state.point : middleOf(tile);
  // from centre to centre, so that every step reaches another cell
  const centre = (at, step, count, by, side) => {
    const cell = Math.min(count - 1, Math.max(0, Math.floor(at / step) + by));
    return Math.min((cell + 0.5) * step, side);
  };
  const by = known ? cells : 0;
  moveTo({
    image: tile.image,
    y: centre(from.y, stride[0], grid[0], down * by, height),
    x: centre(from.x, stride[1], grid[1], right * by, width),
  }, state.pinned);
}

function moveTo(point, pinned) {
  state.point = point;
  state.pinned = pinned;
  schedule();
}

function free() {
  if (state.pinned) state.pinned = false;
  else state.point = null;
  schedule();
}

// ---------------------------------------------------------------------------------------------- drawing

let waiting = false, announce = false;

function schedule() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    render();
  });
}

const isShown = tile => state.kind === ALL || state.kind === tile.kind;

function render() {
  const shown = tiles.filter(isShown), heat = state.layer === "similarity" && state.point !== null;
  compare(shown);
  const [low, high] = paint(shown, heat);
  for (const tile of shown) {
    tile.frame.classList.toggle("heat", heat);
    tile.canvas.hidden = !(heat || state.layer === "pca");
    markTile(tile);
  }
  drawLinks(shown);
  drawScale(low, high);
  writeStatus(shown);
}

function compare(shown) {
  const directions = new Map();
  for (const tile of shown) {
    tile.values = tile.best = null;
    if (state.point === null) continue;
    if (!directions.has(tile.kind)) {
      directions.set(tile.kind, directionAt(state.point.image, tile.kind, state.point.y, state.point.x));
    }
    tile.values = similarities(tile.image, tile.kind, directions.get(tile.kind));
    if (tile.image !== state.point.image) {
      const cell = indexOfLargest(tile.values);
      tile.best = { ...centreOf(tile.image, tile.kind, cell), score: tile.values[cell] };
      if (state.pinned) tile.best.mutual = leadsBack(tile, cell);
    }
  }
}

function paint(shown, heat) {
  let low = 0, high = 1;
  if (heat && state.stretch) {
    low = Infinity;
    high = -Infinity;
    for (const tile of shown) {
      for (const value of tile.values) {
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
    }
  }
  for (const tile of shown) {
    if (heat) paintSimilarities(tile, low, high);
    else if (state.layer === "pca" && tile.painted !== "pca") paintComponents(tile.canvas, tile.image, tile.kind);
    tile.painted = heat ? "similarity" : state.layer;
  }
  return [low, high];
}

function putAt(mark, tile, point) {
  const { height, width } = data.images[tile.image];
  mark.style.top = `${100 * point.y / height}%`;
  mark.style.left = `${100 * point.x / width}%`;
}

function markTile(tile) {
  const own = state.point !== null && state.point.image === tile.image;
  const best = state.pinned ? tile.best : null;
  tile.ring.hidden = !own;
  tile.ring.classList.toggle("pinned", own && state.pinned);
  if (own) putAt(tile.ring, tile, state.point);
  tile.match.hidden = best === null;
  if (best !== null) {
    tile.match.classList.toggle("oneway", !best.mutual);
    putAt(tile.match, tile, best);
  }
  let text = "";
  if (own) text = `point at ${placeText(state.point)}`;
  else if (best !== null) text = `best ${best.score.toFixed(3)} at ${placeText(best)}, ${best.mutual ? "mutual" : "one way"}`;
  else if (tile.best !== null) text = `best ${tile.best.score.toFixed(3)}`;
  tile.readout.textContent = text;
}

const SVG = "http://www.w3.org/2000/svg";
const links = document.createElementNS(SVG, "svg");
links.id = "links";
links.setAttribute("aria-hidden", "true");

/** Lines from the pinned point to the matches, from edge to edge of their rings. */
function drawLinks(shown) {
  links.replaceChildren();
  if (!state.pinned) return;
  const origin = gallery.getBoundingClientRect();
  const placeOf = (tile, point) => {
    const box = tile.frame.getBoundingClientRect(), { height, width } = data.images[tile.image];
    return [box.left - origin.left + point.x / width * box.width, box.top - origin.top + point.y / height * box.height];
  };
  for (const tile of shown.filter(one => one.best !== null)) {
    const own = shown.find(one => one.image === state.point.image && one.kind === tile.kind);
    const [x1, y1] = placeOf(own, state.point), [x2, y2] = placeOf(tile, tile.best);
    const length = Math.hypot(x2 - x1, y2 - y1), dx = 12 * (x2 - x1) / length, dy = 12 * (y2 - y1) / length;
    if (!(length > 24)) continue;
    for (const casing of [true, false]) {
      const line = document.createElementNS(SVG, "line");
      line.classList.toggle("casing", casing);
      line.classList.toggle("oneway", !tile.best.mutual);
      Object.entries({ x1: x1 + dx, y1: y1 + dy, x2: x2 - dx, y2: y2 - dy }).forEach(([name, at]) => line.setAttribute(name, at));
      links.append(line);
    }
  }
}

/** The similarity of the cell under the mouse to a pinned point, or null. */
function comparedValue() {
  if (!state.pinned || state.pointer === null || !isShown(state.pointer.tile)) return null;
  const { tile, point } = state.pointer, { grid, stride } = cellsOf(tile.image, tile.kind);
  const row = Math.min(grid[0] - 1, Math.floor(point.y / stride[0]));
  const column = Math.min(grid[1] - 1, Math.floor(point.x / stride[1]));
  return tile.values[row * grid[1] + column];
}

function drawScale(low, high) {
  byId("scale").disabled = state.layer !== "similarity";
  byId("scale-low").textContent = state.stretch ? two(low) : "0";
  byId("scale-high").textContent = state.stretch ? two(high) : "1";
  const value = comparedValue(), needle = byId("needle");
  needle.hidden = value === null || state.layer !== "similarity";
  if (value !== null) needle.style.left = `${100 * Math.min(1, Math.max(0, (value - low) / Math.max(high - low, 1e-6)))}%`;
}

function writeStatus(shown) {
  const coarse = matchMedia("(pointer: coarse)").matches;
  let hint = coarse ? "Tap an image to pin a point." : "Move the mouse over an image; click to pin a point.";
  if (state.pinned) hint = coarse ? "Drag the ring, or tap it to free the point." : "Pinned: drag the ring, Esc frees the point.";
  byId("hint").textContent = hint;
  const value = comparedValue();
  byId("readout").textContent = value === null ? "" : `Under the mouse: ${value.toFixed(3)}`;
  if (announce && state.point !== null) {
    const matches = shown.filter(tile => tile.best !== null)
      .map(tile => `${data.images[tile.image].name}: best ${two(tile.best.score)} at ${placeText(tile.best)}`);
    byId("announcement").textContent = [`${state.pinned ? "Pinned at" : "Point at"} ${placeText(state.point)}`, ...matches].join(". ");
  }
  announce = false;
}

// ---------------------------------------------------------------------------------------------- controls

function chooseKind(kind) {
  state.kind = kind;
  document.querySelectorAll("[name=kind]").forEach(input => { input.checked = Number(input.value) === kind; });
  tiles.forEach(tile => { tile.figure.hidden = !isShown(tile); });
  const count = tiles.filter(isShown).length;
  const columns = kind === ALL ? data.kinds.length : count > 6 ? 4 : count === 4 ? 2 : Math.min(count, 3);
  gallery.style.setProperty("--columns", columns);
  gallery.style.setProperty("--few-columns", Math.min(columns, 2)); // where the window is not wide
  gallery.style.setProperty("--tallest", count <= columns ? "74vh" : "36vh"); // one row, or two, in a window
  state.pointer = null;
  schedule();
}

function chooseLayer(layer) {
  state.layer = layer;
  document.querySelectorAll("[name=layer]").forEach(input => { input.checked = input.value === layer; });
  schedule();
}

function chooseOpacity(percent) {
  byId("opacity").value = percent;
  byId("opacity-value").textContent = `${byId("opacity").value} %`;
  gallery.style.setProperty("--opacity", byId("opacity").value / 100);
}

function chooseStretch(stretch) {
  byId("stretch").checked = state.stretch = stretch;
  schedule();
}

function pressKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const opacity = Number(byId("opacity").value), key = event.key.toLowerCase();
  const actions = {
    escape: free, s: () => chooseLayer("similarity"), p: () => chooseLayer("pca"), i: () => chooseLayer("none"),
    c: () => chooseStretch(!state.stretch), "-": () => chooseOpacity(opacity - 10), "+": () => chooseOpacity(opacity + 10),
    "=": () => chooseOpacity(opacity + 10),
  };
  const kind = Number(key) - 1;
  if (/^[1-9]$/.test(key) && document.querySelector(`[name=kind][value="${kind}"]`)) chooseKind(kind);
  else if (Object.hasOwn(actions, key)) actions[key]();
}

function addKindChoices() {
  const names = data.kinds.map(kind => kind.name);
  if (names.length > 1) names.push("side by side");
  const choices = document.querySelector("#kinds .choices");
  names.forEach((name, kind) => {
    const label = element(choices, "label");
    element(label, "input", { type: "radio", name: "kind", value: kind });
    element(label, "span", { textContent: name });
  });
  byId("kinds").hidden = names.length === 1;
  byId("kind-keys").replaceChildren();
  names.forEach((_, kind) => element(byId("kind-keys"), "kbd", { textContent: kind + 1 }));
  choices.addEventListener("change", event => chooseKind(Number(event.target.value)));
}

function writeFacts() {
  const rows = data.kinds.map(kind => [
    kind.name, `${kind.channels}`, `${kind.low.length}`, kind.loss.mean.toFixed(4), kind.loss.p99.toFixed(4),
    kind.loss.largest.toFixed(4),
  ]);
  for (const row of rows) {
    const line = element(byId("facts"), "tr");
    row.forEach((text, column) => element(line, column ? "td" : "th", { textContent: text }));
  }
  const resized = data.kinds.filter(kind => kind.resizedFrom.length)
    .map(kind => `Maps "${kind.name}" of ${kind.resizedFrom.join(", ")} cells were resized for this page.`);
  byId("resized").textContent = resized.join(" ");
  byId("resized").hidden = resized.length === 0;
}

byId("bar").getContext("2d").putImageData(new ImageData(COLOURS, 256, 1), 0, 0);
data.images.forEach((_, image) => data.kinds.forEach((_, kind) => tiles.push(makeTile(image, kind))));
gallery.append(links);
addKindChoices();
writeFacts();
byId("layers").addEventListener("change", event => chooseLayer(event.target.value));
byId("opacity").addEventListener("input", event => chooseOpacity(event.target.value));
byId("stretch").addEventListener("change", event => chooseStretch(event.target.checked));
byId("controls").addEventListener("submit", event => event.preventDefault());
document.addEventListener("keydown", pressKey);
new ResizeObserver(schedule).observe(gallery);
chooseOpacity(75);
chooseKind(state.kind);
