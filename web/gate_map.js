// The live map on Gate Map: how strongly each LoRA is used, per part of the model, while the sampler runs; and, for LoRAs
// with regions, where in the picture, on the sampler's preview.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { MARGIN, h, mount, text, widen } from "./page.js";
import { source } from "./sources.js";

const SCALE = [[48, 18, 80], [50, 90, 142], [32, 146, 140], [94, 201, 98], [253, 231, 37]]; // as HEAT in core/pictures/canvas.py
const LINE_COLORS = ["#4c9be8", "#e8913c", "#55b06b", "#e0607e", "#a58be0", "#b98a66"];
// pixels
const CHART_HEIGHT = 56; // of the lines over the passes
const TOP = 16; // of the map, below the names of the LoRAs
const NAME_HEIGHT = 11; // of the name of a row
const MIN_HEIGHT = 190, MAX_HEIGHT = 300; // of the widget; the picture below it gets the rest
const SCALE_WIDTH = 34; // of the bar of colours with its numbers
const PICTURE_SHARE = 0.42; // of the width, at most, for the picture with the regions
const TINT = 0.6; // share of a LoRA's colour where its region is 1

/** The colour of a value in 0 .. 1. */
function color(value) {
  const position = Math.min(Math.max(value, 0), 1) * (SCALE.length - 1);
  const i = Math.min(Math.floor(position), SCALE.length - 2);
  return `rgb(${SCALE[i].map((low, k) => Math.round(low + (SCALE[i + 1][k] - low) * (position - i))).join(",")})`;
}

/** Whether a node gets its model from a node, directly or through others. */
function isAfter(node, id, visited = new Set()) {
  return (node.inputs ?? []).some((input, slot) => {
    if (input.type !== "MODEL" && input.name !== "model") return false;
    const from = source(node, slot)?.node;
    if (!from || visited.has(from)) return false;
    visited.add(from);
    return String(from.id) === id || isAfter(from, id, visited);
  });
}

/** The values 0 .. 255 of a map, see nodes/comfy/live_gates.py. */
const decoded = (map) => Uint8Array.from(atob(map), (character) => character.charCodeAt(0));

/** The regions as an image: each in the colour of its LoRA, blended where they overlap, as opaque as they are strong. */
function tinted({ width, height, maps }) {
  const layers = maps.flatMap((map, i) => (map === null ? [] : [{ values: decoded(map), rgb: rgbOf(LINE_COLORS[i % LINE_COLORS.length]) }]));
  const image = new ImageData(width, height);
  for (let p = 0; p < width * height; p++) {
    const total = layers.reduce((sum, { values }) => sum + values[p], 0);
    if (!total) continue;
    for (let k = 0; k < 3; k++)
      image.data[4 * p + k] = layers.reduce((sum, { values, rgb }) => sum + values[p] * rgb[k], 0) / total;
    image.data[4 * p + 3] = TINT * Math.min(total, 255);
  }
  const canvas = h("canvas", { width, height });
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

/** #4c9be8 -> [76, 155, 232] */
const rgbOf = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

/** The share of the picture that each LoRA with a region acts in: "ember 50%, heart 25%". */
function shares({ labels, regions }) {
  return labels.flatMap((label, i) => {
    if (regions.maps[i] === null) return [];
    const values = decoded(regions.maps[i]);
    return [`${label} ${Math.round(values.reduce((sum, value) => sum + value, 0) / values.length / 2.55)}%`];
  }).join(", ");
}

/** A scope of gates as a row's name: double_blocks.0 -> double 0. */
const rowName = (scope) => scope.replace(/^(diffusion_model|model)\./, "").replace(/_?blocks?\./, " ").replaceAll("_", " ") || "model";

class LiveMap {
  constructor(node) {
    this.node = node;
    this.canvas = h("canvas", { aria: { role: "img", label: text("waiting") } });
    this.element = h("div", { className: "lm" }, this.canvas);
    this.element.style.maxHeight = `${MAX_HEIGHT - MARGIN}px`; // for Nodes 2.0, which do not ask the widget
    this.draw = this.draw.bind(this);
    new ResizeObserver(this.draw).observe(this.canvas);
  }

  /** Show the gates of a pass: a message from nodes/comfy/live_gates.py. */
  update(message) {
    const { labels, gates, pass } = message;
    const isNewRun = !this.latest || pass <= this.latest.pass || this.latest.labels.join() !== labels.join();
    this.latest = message;
    const means = labels.map((_, j) => gates.reduce((sum, row) => sum + row[j], 0) / gates.length);
    this.history = [...(isNewRun ? [] : this.history), means]; // mean gates of every pass
    if (isNewRun) this.picture = null;
    this.regions = message.regions ? tinted(message.regions) : null;
    const summary = labels.map((label, j) => `${label} ${means[j].toFixed(2)}`).join(", ");
    const parts = [text("means", { means: summary })];
    if (this.regions) parts.push(text("regionShares", { shares: shares(message) }));
    this.canvas.setAttribute("aria-label", parts.join("; "));
    requestAnimationFrame(this.draw);
  }

  /** Show the regions on this preview of the picture, an ImageBitmap. */
  showPicture(picture) {
    this.picture = picture;
    requestAnimationFrame(this.draw);
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width || !height) return;
    const ratio = window.devicePixelRatio || 1;
    Object.assign(this.canvas, { width: width * ratio, height: height * ratio });
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.font = "11px system-ui, sans-serif";
    const textColor = getComputedStyle(this.element).color;
    pen.fillStyle = textColor;
    if (!this.latest) return pen.fillText(text("waiting"), 6, 18, width - 12);
    const mapHeight = height - CHART_HEIGHT - TOP - 4;
    const left = this.#drawNames(pen, width, mapHeight);
    const right = this.regions ? this.#drawRegions(pen, width, height, textColor) : width;
    const mapWidth = right - left - SCALE_WIDTH;
    const largest = Math.max(1, ...this.latest.gates.flat());
    this.#drawMap(pen, left, mapWidth, mapHeight, largest);
    this.#drawScale(pen, right - SCALE_WIDTH, mapHeight, largest, textColor);
    this.#drawLines(pen, left, mapWidth, height - CHART_HEIGHT, CHART_HEIGHT - 4);
    this.#drawTitle(pen, left, mapWidth, textColor);
  }

  /** Draw the regions at the right, on the preview if there is one. Returns where they begin. */
  #drawRegions(pen, width, height, textColor) {
    const { regions } = this.latest;
    const scale = Math.min((width * PICTURE_SHARE) / regions.width, (height - TOP - 4) / regions.height);
    const box = [width - scale * regions.width, TOP, scale * regions.width, scale * regions.height];
    pen.fillStyle = textColor;
    pen.fillText(text("regions"), box[0], 11, box[2]);
    pen.fillStyle = "#808080";
    if (this.picture) pen.drawImage(this.picture, ...box);
    else pen.fillRect(...box);
    pen.drawImage(this.regions, ...box);
    return box[0] - 6;
  }

  #drawTitle(pen, left, width, textColor) {
    const { labels, pass } = this.latest;
    const labelWidth = width / labels.length;
    labels.forEach((label, j) => {
      pen.fillStyle = LINE_COLORS[j % LINE_COLORS.length];
      pen.fillText(label, left + labelWidth * j, 11, labelWidth - 6);
    });
    pen.fillStyle = textColor;
    pen.textAlign = "right";
    pen.fillText(text("pass", { pass }), left - 6, 11, left - 8);
    pen.textAlign = "left";
  }

  /** Draw the names of rows, of as many as there is room for. Returns the width they take. */
  #drawNames(pen, width, height) {
    const names = this.latest.scopes.map(rowName);
    const step = Math.ceil((NAME_HEIGHT * names.length) / height);
    const left = Math.min(Math.max(50, ...names.map((name) => pen.measureText(name).width + 8)), width * 0.35);
    const rowHeight = height / names.length;
    pen.textAlign = "right";
    for (let i = 0; i < names.length; i += step)
      pen.fillText(names[i], left - 6, TOP + rowHeight * (i + 0.5) + 4, left - 8);
    pen.textAlign = "left";
    return left;
  }

  #drawMap(pen, left, width, height, largest) {
    const { gates, labels } = this.latest;
    const rowHeight = height / gates.length;
    const columnWidth = width / labels.length;
    gates.forEach((values, i) => values.forEach((value, j) => {
      pen.fillStyle = color(value / largest);
      pen.fillRect(
        left + columnWidth * j, TOP + rowHeight * i, columnWidth - 1, Math.max(rowHeight - (rowHeight > 4 ? 1 : 0), 1),
      );
    }));
  }

  #drawScale(pen, left, height, largest, textColor) {
    for (let y = 0; y < height; y++) {
      pen.fillStyle = color(1 - y / height);
      pen.fillRect(left + 4, TOP + y, 7, 1);
    }
    pen.fillStyle = textColor;
    pen.fillText(largest.toFixed(largest < 10 ? 1 : 0), left + 14, TOP + 9);
    pen.fillText("0", left + 14, TOP + height - 1);
  }

  #drawLines(pen, left, width, top, height) {
    const largest = Math.max(1, ...this.history.flat());
    this.latest.labels.forEach((_, j) => {
      pen.strokeStyle = LINE_COLORS[j % LINE_COLORS.length];
      pen.lineWidth = 2;
      pen.beginPath();
      this.history.forEach((means, i) => {
        const x = left + 2 + ((width - 4) * i) / Math.max(this.history.length - 1, 1);
        const y = top + height - (height - 2) * (means[j] / largest);
        pen.lineTo(x, y);
        if (this.history.length === 1) pen.lineTo(x + 4, y); // a single point would be invisible
      });
      pen.stroke();
    });
  }
}

const maps = new Set();

app.registerExtension({
  name: "legomole.gateMap",
  setup() {
    api.addEventListener("legomole.gates", ({ detail }) => {
      const id = String(detail.node).split(":").at(-1); // inside subgraphs, their ids come first
      for (const map of maps) if (isAfter(map.node, id)) map.update(detail);
    });
    api.addEventListener("b_preview_with_metadata", async ({ detail: { blob, nodeId } }) => {
      const shown = [...maps].filter(({ latest }) => latest?.regions && latest.sampler === nodeId);
      if (!shown.length) return;
      const picture = await createImageBitmap(blob);
      for (const map of shown) map.showPicture(picture);
    });
  },
  nodeCreated(node) {
    if (node.comfyClass !== "LegoMoLE_GateMap") return;
    const map = new LiveMap(node);
    maps.add(map);
    mount(node, "live", "LEGOMOLE_GATE_MAP", map.element, {
      serialize: false, getMinHeight: () => MIN_HEIGHT, getMaxHeight: () => MAX_HEIGHT,
    });
    widen(node, 460, 0); // the labelled picture below is 660 pixels wide
    const { onRemoved } = node;
    node.onRemoved = function () {
      onRemoved?.apply(this, arguments);
      maps.delete(map);
    };
  },
});
