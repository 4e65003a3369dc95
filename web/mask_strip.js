// The switches on MoLE Mix, one per incoming LoRA. They read and write the widget switched_off.
import { app } from "../../scripts/app.js";
import { changed, h, mount, short, source, text } from "./page.js";

const HEIGHT = 60; // pixels, for two lines of switches. It is constant: a node that grows later makes a step for undo
const POLL_INTERVAL = 500; // milliseconds; there is no event for changed widgets of the nodes before ours

/** The labels of the incoming LoRAs in order, or null with a stack whose length is not known before a run. */
function incomingLabels(node) {
  const labels = [];
  for (const [slot, input] of (node.inputs ?? []).entries()) {
    if (!input.name.startsWith("loras.")) continue;
    const from = source(node, slot);
    if (!from || from.mode === 2 || from.mode === 4) continue; // not connected, muted or bypassed
    const value = (name) => from.widgets?.find((widget) => widget.name === name)?.value;
    const isStack = from.outputs?.[node.graph.getLink?.(input.link)?.origin_slot]?.type === "LORA_STACK";
    if (isStack && from.inputs?.some(({ name, link }) => name === "lora_stack" && link != null)) return null;
    if (from.type === "LegoMoLE_LoadLoRA") labels.push(short(value("lora_name") ?? ""));
    else if (from.type === "LegoMoLE_LoRAList")
      labels.push(...JSON.parse(value("loras") || "[]").filter(({ on }) => on).map(({ name }) => short(name)));
    else if (isStack) return null;
    else labels.push(from.title);
  }
  return labels;
}

class MaskStrip {
  constructor(node) {
    this.node = node;
    this.buttons = null;
    this.chips = h("div", { className: "lm-strip", title: text("experts"), aria: { role: "group", label: text("experts") } });
    this.element = h("div", { className: "lm" }, this.chips);
    this.refresh();
  }

  get switchedOff() {
    return this.node.widgets?.find((widget) => widget.name === "switched_off");
  }

  refresh() {
    const labels = incomingLabels(this.node) ?? this.labelsOfLastRun ?? [];
    const value = this.switchedOff?.value ?? "";
    const state = JSON.stringify([labels, value]);
    if (state === this.state) return;
    this.state = state;
    const words = String(value).split(",").map((word) => word.trim());
    this.off = labels.map((label, i) => words.includes(label) || words.includes(String(i + 1)));
    if (labels.length !== this.buttons?.length) {
      this.buttons = labels.map((_, i) => h("button", { type: "button", className: "lm-chip", on: { click: () => this.toggle(i) } }));
      this.chips.replaceChildren(...this.buttons);
      if (!labels.length) this.chips.append(h("span", { className: "lm-note" }, text("noExperts")));
    }
    this.buttons.forEach((button, i) => {
      button.textContent = `${i + 1} ${labels[i]}`;
      button.title = labels[i];
      button.setAttribute("aria-pressed", String(!this.off[i]));
    });
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
      serialize: false, getMinHeight: () => HEIGHT,
    });
    const timer = setInterval(() => node.graph && strip.refresh(), POLL_INTERVAL);
    const { onExecuted, onRemoved } = node;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (output?.experts) strip.labelsOfLastRun = output.experts;
      strip.refresh();
    };
    node.onRemoved = function () {
      onRemoved?.apply(this, arguments);
      clearInterval(timer);
    };
  },
});
