// The live map on Gate Map: how strongly each LoRA is used, per part of the model, while the sampler runs.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { h, mount, source, text, widen } from "./page.js";

const SCALE = [[48, 18, 80], [50, 90, 142], [32, 146, 140], [94, 201, 98], [253, 231, 37]]; // as HEAT in core/pictures/canvas.py
const LINE_COLORS = ["#4c9be8", "#e8913c", "#55b06b", "#e0607e", "#a58be0", "#b98a66"];
const CHART_HEIGHT = 56; // pixels, of the lines over the passes

/** The colour of a value in 0 .. 1. */
function color(value) {
  const position = Math.min(Math.max(value, 0), 1) * (SCALE.length - 1);
  const i = Math.min(Math.floor(position), SCALE.length - 2);
  return `rgb(${SCALE[i].map((low, k) => Math.round(low + (SCALE[i + 1][k] - low) * (position - i))).join(",")})`;
}

/** The ids of all nodes upstream of a node's model input. */
function upstreamIds(node, ids = new Set()) {
  for (const [slot, input] of (node.inputs ?? []).entries()) {
    if (input.type !== "MODEL" && input.name !== "model") continue;
    const from = source(node, slot);
    if (!from || ids.has(from.id)) continue;
    ids.add(from.id);
    upstreamIds(from, ids);
  }
  return ids;
}

class LiveMap {
  constructor(node) {
    this.node = node;
    this.canvas = h("canvas", { aria: { role: "img", label: text("waiting") } });
    this.element = h("div", { className: "lm" }, this.canvas);
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
    const summary = labels.map((label, j) => `${label} ${means[j].toFixed(2)}`).join(", ");
    this.canvas.setAttribute("aria-label", text("means", { means: summary }));
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
    this.#drawMap(pen, width, height - CHART_HEIGHT - 18);
    this.#drawLines(pen, width, height - CHART_HEIGHT, CHART_HEIGHT - 4);
    this.#drawTitle(pen, width, textColor);
  }

  #drawTitle(pen, width, textColor) {
    const { labels, pass } = this.latest;
    const labelWidth = (width - 70) / labels.length;
    labels.forEach((label, j) => {
      pen.fillStyle = LINE_COLORS[j % LINE_COLORS.length];
      pen.fillText(label, 6 + labelWidth * j, 11, labelWidth - 6);
    });
    pen.fillStyle = textColor;
    pen.textAlign = "right";
    pen.fillText(text("pass", { pass }), width - 4, 11);
    pen.textAlign = "left";
  }

  #drawMap(pen, width, height) {
    const { gates, labels } = this.latest;
    const largest = Math.max(1, ...gates.flat());
    const rowHeight = height / gates.length;
    const columnWidth = width / labels.length;
    gates.forEach((values, i) => values.forEach((value, j) => {
      pen.fillStyle = color(value / largest);
      pen.fillRect(
        columnWidth * j, 16 + rowHeight * i, columnWidth - 1, Math.max(rowHeight - (rowHeight > 4 ? 1 : 0), 1),
      );
    }));
  }

  #drawLines(pen, width, top, height) {
    const largest = Math.max(1, ...this.history.flat());
    this.latest.labels.forEach((_, j) => {
      pen.strokeStyle = LINE_COLORS[j % LINE_COLORS.length];
      pen.lineWidth = 2;
      pen.beginPath();
      this.history.forEach((means, i) => {
        const x = 2 + ((width - 4) * i) / Math.max(this.history.length - 1, 1);
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
      for (const map of maps)
        if ([...upstreamIds(map.node)].some((upstream) => String(upstream) === id)) map.update(detail);
    });
  },
  nodeCreated(node) {
    if (node.comfyClass !== "LegoMoLE_GateMap") return;
    const map = new LiveMap(node);
    maps.add(map);
    mount(node, "live", "LEGOMOLE_GATE_MAP", map.element, { serialize: false, getMinHeight: () => 190 });
    widen(node, 280, 0);
    const { onRemoved } = node;
    node.onRemoved = function () {
      onRemoved?.apply(this, arguments);
      maps.delete(map);
    };
  },
});
