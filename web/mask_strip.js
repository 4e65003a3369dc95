// The switches on MoLE Mix: one per LoRA that comes in. They write and read the widget switched_off.
import { app } from "../../scripts/app.js";
import { changed, h, mount, short, source, text } from "./page.js";

const HEIGHT = 60; // pixels: two lines of chips. It must not depend on them: a node that grows later makes a step for undo
const LOOK_EVERY = 500; // milliseconds; nodes before ours do not tell when their widgets change

/** What comes in, in order: labels, or null for a stack whose length only a run tells. */
function incoming(node) {
  const labels = [];
  for (const [slot, input] of (node.inputs ?? []).entries()) {
    if (!input.name.startsWith("loras.")) continue;
    const from = source(node, slot);
    if (!from || from.mode === 2 || from.mode === 4) continue; // nothing, muted or bypassed
    const value = (name) => from.widgets?.find((widget) => widget.name === name)?.value;
    const stacked = from.outputs?.[node.graph.getLink?.(input.link)?.origin_slot]?.type === "LORA_STACK";
    if (stacked && from.inputs?.some(({ name, link }) => name === "lora_stack" && link != null)) return null;
    if (from.type === "LegoMoLE_LoadLoRA") labels.push(short(value("lora_name") ?? ""));
    else if (from.type === "LegoMoLE_LoRAList")
      labels.push(...JSON.parse(value("loras") || "[]").filter(({ on }) => on).map(({ name }) => short(name)));
    else if (stacked) return null;
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
    this.look();
  }

  get switches() {
    return this.node.widgets?.find((widget) => widget.name === "switched_off");
  }

  look() {
    const labels = incoming(this.node) ?? this.run ?? [];
    const off = this.switches?.value ?? "";
    const state = JSON.stringify([labels, off]);
    if (state === this.state) return;
    this.state = state;
    const words = String(off).split(",").map((word) => word.trim());
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
    const numbers = this.off.flatMap((is, index) => (is ? [index + 1] : []));
    this.switches.value = numbers.join(", ");
    this.switches.callback?.(this.switches.value);
    this.look();
    changed(this.node);
  }
}

app.registerExtension({
  name: "legomole.maskStrip",
  nodeCreated(node) {
    if (node.comfyClass !== "LegoMoLE_MoLEMix") return;
    const strip = new MaskStrip(node);
    // the value is that of switched_off
    mount(node, "experts", "LEGOMOLE_MASK_STRIP", strip.element, {
      serialize: false, getMinHeight: () => HEIGHT,
    });
    const timer = setInterval(() => node.graph && strip.look(), LOOK_EVERY);
    const { onExecuted, onRemoved } = node;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (output?.experts) strip.run = output.experts;
      strip.look();
    };
    node.onRemoved = function () {
      onRemoved?.apply(this, arguments);
      clearInterval(timer);
    };
  },
});
