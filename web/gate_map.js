// The live picture on Gate Map: how much of each LoRA goes in, part by part, while the sampler runs.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { h, mount, source, text, widen } from "./page.js";

const SCALE = [[48, 18, 80], [50, 90, 142], [32, 146, 140], [94, 201, 98], [253, 231, 37]]; // as HEAT in core/pictures/canvas.py
const LINES = ["#4c9be8", "#e8913c", "#55b06b", "#e0607e", "#a58be0", "#b98a66"];
const COURSE = 56; // pixels of the lines over the passes

function color(share) {
  const at = Math.min(Math.max(share, 0), 1) * (SCALE.length - 1);
  const i = Math.min(Math.floor(at), SCALE.length - 2);
  return `rgb(${SCALE[i].map((low, k) => Math.round(low + (SCALE[i + 1][k] - low) * (at - i))).join(",")})`;
}

/** Ids of the nodes that a Gate Map's model comes through. */
function mixes(node, seen = new Set()) {
  for (const [slot, input] of (node.inputs ?? []).entries()) {
    if (input.type !== "MODEL" && input.name !== "model") continue;
    const from = source(node, slot);
    if (!from || seen.has(from.id)) continue;
    seen.add(from.id);
    mixes(from, seen);
  }
  return seen;
}

class LiveMap {
  constructor(node) {
    this.node = node;
    this.canvas = h("canvas", { aria: { role: "img", label: text("waiting") } });
    this.element = h("div", { className: "lm" }, this.canvas);
    this.draw = this.draw.bind(this);
    new ResizeObserver(this.draw).observe(this.canvas);
  }

  tell(news) {
    const fresh = !this.news || news.pass <= this.news.pass || this.news.labels.join() !== news.labels.join();
    this.news = news;
    const means = news.labels.map((_, j) => news.gates.reduce((sum, row) => sum + row[j], 0) / news.gates.length);
    this.course = [...(fresh ? [] : this.course), means];
    const said = news.labels.map((label, j) => `${label} ${means[j].toFixed(2)}`).join(", ");
    this.canvas.setAttribute("aria-label", text("means", { means: said }));
    requestAnimationFrame(this.draw);
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width || !height) return;
    const sharp = window.devicePixelRatio || 1;
    Object.assign(this.canvas, { width: width * sharp, height: height * sharp });
    const pen = this.canvas.getContext("2d");
    pen.scale(sharp, sharp);
    pen.font = "11px system-ui, sans-serif";
    const ink = getComputedStyle(this.element).color;
    pen.fillStyle = ink;
    if (!this.news) return pen.fillText(text("waiting"), 6, 18, width - 12);
    this.#map(pen, width, height - COURSE - 18);
    this.#lines(pen, width, height - COURSE, COURSE - 4);
    this.#title(pen, width, ink);
  }

  #title(pen, width, ink) {
    const { labels, pass } = this.news;
    const room = (width - 70) / labels.length;
    labels.forEach((label, j) => {
      pen.fillStyle = LINES[j % LINES.length];
      pen.fillText(label, 6 + room * j, 11, room - 6);
    });
    pen.fillStyle = ink;
    pen.textAlign = "right";
    pen.fillText(text("pass", { pass }), width - 4, 11);
    pen.textAlign = "left";
  }

  #map(pen, width, height) {
    const { gates, labels } = this.news;
    const high = Math.max(1, ...gates.flat());
    const row = height / gates.length;
    const column = width / labels.length;
    gates.forEach((values, i) => values.forEach((value, j) => {
      pen.fillStyle = color(value / high);
      pen.fillRect(column * j, 16 + row * i, column - 1, Math.max(row - (row > 4 ? 1 : 0), 1));
    }));
  }

  #lines(pen, width, top, height) {
    const high = Math.max(1, ...this.course.flat());
    this.news.labels.forEach((_, j) => {
      pen.strokeStyle = LINES[j % LINES.length];
      pen.lineWidth = 2;
      pen.beginPath();
      this.course.forEach((means, i) => {
        const x = 2 + ((width - 4) * i) / Math.max(this.course.length - 1, 1);
        pen.lineTo(x, top + height - (height - 2) * (means[j] / high));
        if (this.course.length === 1) pen.lineTo(x + 4, top + height - (height - 2) * (means[j] / high));
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
      // subgraphs put their ids in front
      const id = String(detail.node).split(":").at(-1);
      for (const map of maps) if ([...mixes(map.node)].some((found) => String(found) === id)) map.tell(detail);
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
