// The switches on MoLE Mix, one per incoming LoRA. They read and write the widget switched_off.
import { app } from "../../scripts/app.js";
import { MARGIN, changed, fit, h, mount, onChanged, text } from "./page.js";
import { incomingLoras, namedRegions, signature } from "./sources.js";

const HEIGHT = 60; // pixels, for two lines of switches
const POLL_INTERVAL = 500; // milliseconds; there is no event for changed widgets of the nodes before ours

/** Names without the words that all of them begin or end with: a_b_ember, a_b_heart -> ember, heart. */
function distinct(names) {
  if (new Set(names).size < 2) return names;
  const words = names.map((name) => name.split(/(?<=[_\-. ])/));
  const shortest = Math.min(...words.map(({ length }) => length)) - 1;
  const shared = (at) => {
    let count = 0;
    while (count < shortest && words.every((parts) => parts.at(at(count)) === words[0].at(at(count)))) count++;
    return count;
  };
  const first = shared((i) => i), last = Math.min(shared((i) => -1 - i), shortest - first);
  return words.map((parts) => parts.slice(first, parts.length - last).join("").replace(/[_\-. ]$/, ""));
}

/** The numbers of the LoRAs that have a mask, from 1. */
const connectedRegions = ({ inputs = [] }) => inputs
  .filter(({ name, link }) => name.startsWith("regions.") && link != null)
  .map(({ name }) => Number(name.match(/\d+$/)[0]));

class MaskStrip {
  constructor(node) {
    this.node = node;
    this.height = HEIGHT;
    this.buttons = [];
    this.chips = h("div", { className: "lm-strip", title: text("experts"), aria: { role: "group", label: text("experts") } });
    this.element = h("div", { className: "lm" }, this.chips);
    this.refresh();
  }

  get switchedOff() {
    return this.node.widgets?.find((widget) => widget.name === "switched_off");
  }

  /** The names of the LoRAs: by the links, else those of the last run if nothing before the node has changed since. */
  get labels() {
    const run = this.lastRun;
    return incomingLoras(this.node) ?? (run && run.signature === signature(this.node) ? run.labels : null);
  }

  refresh() {
    const labels = this.labels;
    const value = this.switchedOff?.value ?? "";
    const regions = connectedRegions(this.node), named = namedRegions(this.node);
    const state = JSON.stringify([labels, value, regions, [...named]]);
    if (state === this.state) return;
    this.state = state;
    const words = String(value).split(",").map((word) => word.trim());
    this.off = (labels ?? []).map((label, i) => words.includes(label) || words.includes(String(i + 1)));
    if (!labels?.length) {
      this.buttons = [];
      return this.chips.replaceChildren(h("span", { className: "lm-note" }, text(labels ? "noExperts" : "runOnce")));
    }
    if (labels.length !== this.buttons.length) {
      this.buttons = labels.map((_, i) => h("button", { type: "button", className: "lm-chip", on: { click: () => this.toggle(i) } }));
      this.chips.replaceChildren(...this.buttons);
    }
    const names = distinct(labels);
    this.buttons.forEach((button, i) => {
      const hasNumber = regions.includes(i + 1), hasName = named.has(labels[i]);
      const title = hasNumber ? text("hasRegion", { number: i + 1 }) : hasName ? text("hasNamedRegion") : null;
      button.textContent = `${i + 1} ${names[i]}${title ? " ▣" : ""}`;
      button.title = title ? `${labels[i]}\n${title}` : labels[i];
      button.setAttribute("aria-pressed", String(!this.off[i]));
    });
  }

  /** Refresh after a change by the user, and make room for all switches in the same step for undo. */
  refreshAndFit() {
    if (!this.node.graph) return;
    this.refresh();
    const last = this.chips.lastElementChild;
    if (last?.offsetHeight) this.height = Math.max(HEIGHT, last.offsetTop + last.offsetHeight - this.chips.offsetTop + MARGIN);
    fit(this.node);
  }

  toggle(i) {
    this.off[i] = !this.off[i];
    const numbers = this.off.flatMap((isOff, index) => (isOff ? [index + 1] : []));
    this.switchedOff.value = numbers.join(", ");
    this.switchedOff.callback?.(this.switchedOff.value);
    this.refresh();
    changed(this.node);
  }
}

app.registerExtension({
  name: "legomole.maskStrip",
  nodeCreated(node) {
    if (node.comfyClass !== "LegoMoLE_MoLEMix") return;
    const strip = new MaskStrip(node);
    // not serialized, because switched_off holds the value
    mount(node, "experts", "LEGOMOLE_MASK_STRIP", strip.element, {
      serialize: false, getMinHeight: () => strip.height,
    });
    const timer = setInterval(() => node.graph && strip.refresh(), POLL_INTERVAL);
    const stop = onChanged(() => strip.refreshAndFit());
    const { onConnectionsChange, onExecuted, onRemoved } = node;
    node.onConnectionsChange = function () {
      onConnectionsChange?.apply(this, arguments);
      requestAnimationFrame(() => node.graph && strip.refresh());
    };
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (output?.experts) strip.lastRun = { labels: output.experts, signature: signature(node) };
      strip.refresh();
    };
    node.onRemoved = function () {
      onRemoved?.apply(this, arguments);
      clearInterval(timer);
      stop();
    };
  },
});
