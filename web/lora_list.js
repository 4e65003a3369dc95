// The widget of LoRA List. Its value is a JSON text, see nodes/lora_list.py.
import { app } from "../../scripts/app.js";
import { LoraSearch, describe, fetchNames, matchTags } from "./lora_search.js";
import { showInfo, toPercent } from "./lora_info.js";
import { MARGIN, changed, fit, h, mount, setHeight, short, text, widen } from "./page.js";

const TYPE = "LEGOMOLE_LORA_LIST";
const HEAD_HEIGHT = 34, ROW_HEIGHT = 28; // pixels
const LEAST_ROWS = 3, MOST_ROWS = 12; // of which the node is as tall; more rows scroll
const DRAG_STEP = 0.01; // of a strength, per pixel

const DEFAULTS = { words: "", start: 0, end: 1 }; // not kept in a row

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const isShare = (value) => isNumber(value) && value >= 0 && value <= 1;
const clamped = (value) => Math.min(Math.max(Math.round(value * 100) / 100, -100), 100);

/** Remove what a row has anyway from its entry. */
function withoutDefaults(entry) {
  for (const [key, value] of Object.entries(DEFAULTS)) if (entry[key] === value) delete entry[key];
  return entry;
}

class LoraList {
  /** @param node The node that shows the list: a LoRA List, or a subgraph node. */
  constructor(node) {
    this.node = node;
    this.entries = [];
    this.search = new LoraSearch((name) => this.choose(name), (tags) => this.addTags(tags));
    this.all = h("input", {
      type: "checkbox", title: text("useAll"), aria: { label: text("useAll") }, on: { change: () => this.toggleAll() },
    });
    this.clip = h("button", {
      className: "lm-clip", type: "button", title: text("clipHelp"), aria: { label: text("clipHelp") },
      on: { click: () => this.toggleClip() },
    }, "CLIP");
    this.rows = h("ul", { aria: { label: text("loras") } });
    this.scroller = h("div", { className: "lm-scroll" }, this.rows);
    const head = h("div", { className: "lm-head" }, this.all, this.search.input, this.clip);
    this.element = h("div", { className: "lm lm-sized" }, head, this.scroller);
    this.element.addEventListener("contextmenu", ({ target }) => {
      this.clicked = target.closest(".lm-row")?.entry; // for the menu that this event opens
      setTimeout(() => (this.clicked = null), 500);
    }, true);
    this.draw();
  }

  get value() {
    return JSON.stringify(this.entries);
  }

  set value(value) {
    let entries = value;
    try {
      if (typeof value === "string") entries = JSON.parse(value || "[]");
    } catch {
      entries = [];
    }
    if (!Array.isArray(entries) || JSON.stringify(entries) === this.value) return;
    this.entries = entries.filter((entry) => typeof entry?.name === "string").map(
      ({ name, on, strength, clip, words, start, end }) => withoutDefaults({
        name, on: on !== false, strength: isNumber(strength) ? strength : 1, ...(isNumber(clip) ? { clip } : {}),
        ...(typeof words === "string" ? { words } : {}), ...(isShare(start) ? { start } : {}), ...(isShare(end) ? { end } : {}),
      }),
    );
    this.draw();
  }

  get height() {
    return MARGIN + HEAD_HEIGHT + ROW_HEIGHT * Math.min(Math.max(this.entries.length, LEAST_ROWS), MOST_ROWS);
  }

  get hasClip() {
    return this.entries.some(({ clip }) => clip !== undefined);
  }

  /** Report a change by the user. */
  commit() {
    this.onChange?.(this.value);
    this.widget?.callback?.(this.value);
    changed(this.node);
  }

  /** Show what is known about a row's file, and its words and steps, which can be changed there. */
  showInfo(entry) {
    showInfo({ ...DEFAULTS, ...entry }, (changes) => {
      withoutDefaults(Object.assign(entry, changes));
      this.draw();
      this.commit();
    });
  }

  // ---- all rows

  /** @param focus The row and the part of it that gets the focus: `{index, part: ".lm-grip"}`. */
  draw(focus = null) {
    this.rows.replaceChildren(...this.entries.map((entry) => this.row(entry)));
    if (!this.entries.length) this.rows.append(h("li", { className: "lm-note" }, text("empty")));
    this.clip.setAttribute("aria-pressed", String(this.hasClip));
    this.clip.disabled = !this.entries.length;
    this.drawSwitches();
    if (focus) this.rows.children[focus.index]?.querySelector(focus.part)?.focus();
    setHeight(this.element, this.height);
    this.scroller.dataset.captureWheel = this.entries.length > MOST_ROWS; // scrolls while it has the focus, else zooms
    fit(this.node);
  }

  drawSwitches() {
    const count = this.entries.filter(({ on }) => on).length;
    Object.assign(this.all, {
      checked: count > 0 && count === this.entries.length, indeterminate: count > 0 && count < this.entries.length,
      disabled: !this.entries.length,
    });
    this.entries.forEach(({ on }, i) => {
      const row = this.rows.children[i];
      row.classList.toggle("lm-off", !on);
      row.querySelector("input[type=checkbox]").checked = on;
    });
  }

  toggleAll() {
    for (const entry of this.entries) entry.on = this.all.checked;
    this.drawSwitches();
    this.commit();
  }

  /** Show or remove the strengths on text encoders. */
  toggleClip() {
    const hadClip = this.hasClip;
    for (const entry of this.entries) {
      if (hadClip) delete entry.clip;
      else entry.clip = entry.strength;
    }
    this.draw();
    this.commit();
  }

  /** Insert a LoRA, or give the row that is being changed another file. */
  choose(name, strength = 1, clip = undefined) {
    const index = this.entries.indexOf(this.replaced);
    this.replaced = null;
    if (index >= 0) this.entries[index].name = name;
    else this.entries.push({ name, on: true, strength, ...(clip !== undefined || this.hasClip ? { clip: clip ?? strength } : {}) });
    this.draw(index >= 0 ? { index, part: ".lm-name" } : null);
    this.commit();
  }

  /** Add the LoRAs of tags like <lora:name:0.8> in a pasted prompt; returns whether there were any. */
  addTags(prompt) {
    const tags = matchTags(prompt);
    if (!tags.length) return false;
    fetchNames().then((names) => {
      for (const { name, strength, clip } of tags) {
        const plain = (other) => other.replaceAll("\\", "/").replace(/\.safetensors$/, "").toLowerCase();
        const found = names.find((other) => plain(other) === plain(name))
          ?? names.find((other) => plain(short(other)) === plain(short(name)));
        const entry = { name: found ?? `${name.replace(/\.safetensors$/, "")}.safetensors`, on: true, strength };
        if (clip !== undefined || this.hasClip) entry.clip = clip ?? strength;
        this.entries.push(entry);
      }
      this.draw();
      this.commit();
    });
    return true;
  }

  // ---- one row

  row(entry) {
    const name = short(entry.name);
    const label = h("span", {}, name);
    const badge = h("span", { className: "lm-badge" });
    const file = h("button", {
      className: "lm-name", type: "button", title: entry.name, aria: { label: text("change", { name }) },
      on: { click: () => this.change(entry) },
    }, label);
    const button = (className, sign, key, onClick) => h("button", {
      className, type: "button", title: text(key, { name }), aria: { label: text(key, { name }) }, on: { click: onClick },
    }, sign);
    const item = h("li", { className: "lm-row" },
      h("button", {
        className: "lm-grip", type: "button", title: text("moveHelp"), aria: { label: text("move", { name }) },
        on: { pointerdown: (event) => this.drag(event, item), keydown: (event) => this.onMoveKey(event, entry) },
      }, "⠿"),
      h("input", {
        type: "checkbox", checked: entry.on, aria: { label: text("use", { name }) },
        on: { change: ({ target }) => this.switch(entry, target.checked) },
      }),
      file, this.steps(entry), badge, this.number(entry, "strength"),
      ...(this.hasClip ? [this.number(entry, "clip")] : []),
      button("lm-info", "i", "info", () => this.showInfo(entry)),
      button("lm-remove", "✕", "remove", () => this.remove(entry)),
    );
    item.entry = entry;
    describe(entry.name).then(({ error, words = [], base = "" }) => {
      item.classList.toggle("lm-missing", Boolean(error));
      file.title = [entry.name, error ?? words.join(", ")].filter(Boolean).join("\n");
      if (error) label.textContent = `${name}: ${error.split("\n")[0]}`;
      badge.textContent = badge.title = base;
    });
    return item;
  }

  /** The part of the sampling steps in which a row's LoRA acts; empty for all. */
  steps({ name, start = DEFAULTS.start, end = DEFAULTS.end }) {
    if (start === DEFAULTS.start && end === DEFAULTS.end) return "";
    const percent = { start: toPercent(start), end: toPercent(end) };
    const title = text("stepsOf", { name: short(name), ...percent });
    return h("span", { className: "lm-badge lm-steps", title }, `${percent.start}–${percent.end}%`);
  }

  /** The input of a strength: typed, stepped by the arrow keys, or dragged sideways. */
  number(entry, key) {
    const label = text(key === "clip" ? "strengthClip" : "strength", { name: short(entry.name) });
    const set = (value) => (entry[key] = isNumber(value) ? clamped(value) : 1);
    const input = h("input", {
      type: "number", className: `lm-${key}`, min: -100, max: 100, step: 0.05, value: entry[key] ?? entry.strength,
      title: label, aria: { label },
      on: {
        input: ({ target }) => document.activeElement === target && set(target.valueAsNumber), // not by Ctrl+Z elsewhere
        change: ({ target }) => { target.value = entry[key]; this.commit(); },
        pointerdown: (event) => this.scrub(event, set),
        wheel: ({ target }) => target.blur(), // else the wheel would change the strength
      },
    });
    return input;
  }

  scrub({ button, clientX: start, target }, set) {
    if (button !== 0 || document.activeElement === target) return; // in an input that has the focus, dragging selects text
    const before = target.valueAsNumber;
    let isDragged = false;
    const move = (event) => {
      isDragged ||= Math.abs(event.clientX - start) > 3;
      if (!isDragged) return;
      event.preventDefault();
      target.value = set(before + (event.clientX - start) * DRAG_STEP);
    };
    const drop = () => {
      if (!isDragged) return;
      target.blur();
      this.commit();
    };
    whileDragging(move, drop);
  }

  switch(entry, isOn) {
    entry.on = isOn;
    this.drawSwitches();
    this.commit();
  }

  /** Let the user choose another file for a row, which keeps its place and strength. */
  change(entry) {
    this.search.open(text("changeTo", { name: short(entry.name) }), () => (this.replaced = null));
    this.replaced = entry;
  }

  remove(entry) {
    const index = this.entries.indexOf(entry);
    this.entries.splice(index, 1);
    this.draw({ index: Math.min(index, this.entries.length - 1), part: ".lm-remove" });
    this.commit();
  }

  /** Move a row up (-1) or down (1). */
  move(entry, step) {
    const from = this.entries.indexOf(entry), to = from + step;
    if (to < 0 || to >= this.entries.length) return;
    this.entries.splice(to, 0, ...this.entries.splice(from, 1));
    this.draw({ index: to, part: ".lm-grip" });
    this.commit();
  }

  onMoveKey(event, entry) {
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    this.move(entry, step);
  }

  drag({ button }, item) {
    if (button !== 0) return;
    item.classList.add("lm-moving");
    const move = ({ clientY }) => {
      const others = [...this.rows.children].filter((other) => other !== item);
      // rectangles and pointer are both in pixels of the page, whatever the zoom
      const next = others.find((other) => {
        const { top, height } = other.getBoundingClientRect();
        return clientY < top + height / 2;
      });
      if (next !== item.nextElementSibling) this.rows.insertBefore(item, next ?? null);
    };
    const drop = () => {
      item.classList.remove("lm-moving");
      const order = [...this.rows.children].map((row) => row.entry);
      if (order.every((entry, i) => entry === this.entries[i])) return;
      this.entries = order;
      this.commit();
    };
    whileDragging(move, drop);
  }

  /** Entries of the node's menu for the row that was clicked with the right button. */
  menu(entry) {
    const name = short(entry.name);
    return [
      { content: text("info", { name }), callback: () => this.showInfo(entry) },
      { content: text("change", { name }), callback: () => this.change(entry) },
      { content: text(entry.on ? "switchOff" : "switchOn", { name }), callback: () => this.switch(entry, !entry.on) },
      { content: text("moveUp", { name }), callback: () => this.move(entry, -1) },
      { content: text("moveDown", { name }), callback: () => this.move(entry, 1) },
      { content: text("remove", { name }), callback: () => this.remove(entry) },
      null,
    ];
  }
}

/** Call `move` with each movement of the pointer, wherever it is, and `drop` when its button is released. */
function whileDragging(move, drop) {
  const ends = ["pointerup", "pointercancel"];
  const end = () => {
    window.removeEventListener("pointermove", move, true);
    for (const name of ends) window.removeEventListener(name, end, true);
    drop();
  };
  window.addEventListener("pointermove", move, true); // moving a row in the document would end its pointer capture
  for (const name of ends) window.addEventListener(name, end, true);
}

/** Add a list to a node as a widget. */
function addList(node, name, list, options) {
  list.widget = mount(node, name, TYPE, list.element, { getMinHeight: () => list.height, ...options });
  const { getExtraMenuOptions } = node;
  node.getExtraMenuOptions = function (_, menu) {
    if (list.clicked) menu.unshift(...list.menu(list.clicked));
    return getExtraMenuOptions?.apply(this, arguments);
  };
  return list.widget;
}

/**
 * Let a subgraph node draw promoted lists. ComfyUI 0.33 creates such widgets only for text areas; of others it keeps the
 * value and draws nothing.
 */
function drawPromotedLists(node) {
  const create = node.createPromotedHostWidget;
  node.createPromotedHostWidget = function (input, id, source) {
    const isInGraph = this.graph?.getNodeById(this.id) === this; // while it is cloned or configured it has another id
    if (source.type !== TYPE || !isInGraph) return create?.apply(this, arguments);
    const stored = this._projectPromotedWidget(input); // reads and writes the value that the page saves and sends
    const list = new LoraList(this);
    list.value = stored.value;
    list.onChange = (value) => (stored.value = value);
    const widget = addList(this, input.name, list, {
      getValue: () => stored.value,
      setValue: (value) => (stored.value = list.value = value),
    });
    this._extraWidgets.splice(this._extraWidgets.indexOf(widget), 1); // the input shows it
    return widget;
  };
}

app.registerExtension({
  name: "legomole.loraList",
  getCustomWidgets: () => ({
    [TYPE](node, name) {
      const list = new LoraList(node);
      const widget = addList(node, name, list, {
        getValue: () => list.value,
        setValue: (value) => (list.value = value),
      });
      return { widget };
    },
  }),
  nodeCreated(node) {
    if (node.isSubgraphNode?.()) drawPromotedLists(node);
    if (node.comfyClass === "LegoMoLE_LoRAList") widen(node, 380, 0);
  },
});
