// The list of LoRAs on the node LoRA List. Its value is a JSON text, see nodes/merge/lora_list.py.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { changed, fit, h, mount, short, text, widen } from "./page.js";

const SHOWN = 20; // files found by a search
const ROW = 74; // pixels, for making room
let count = 0; // for ids that are unique in the page

const names = () => api.fetchApi("/legomole/loras").then((answer) => answer.json());

const known = new Map(); // name -> promise of what the file says about itself
function about(name) {
  if (!known.has(name))
    known.set(name, api.fetchApi(`/legomole/lora?name=${encodeURIComponent(name)}`).then((answer) => answer.json()));
  return known.get(name);
}

class LoraList {
  constructor(node) {
    this.node = node;
    this.entries = [];
    const id = `lm-found-${count++}`;
    this.search = h("input", {
      type: "search",
      placeholder: text("addLora"),
      aria: { role: "combobox", expanded: "false", controls: id, label: text("addLora"), autocomplete: "list" },
      on: { input: () => this.find(), focus: () => this.open(), keydown: (event) => this.searchKey(event) },
    });
    this.found = h("ul", { id, className: "lm-found", aria: { role: "listbox", label: text("found") } });
    this.rows = h("ul", { aria: { label: text("loras") } });
    const under = h("div", { className: "lm-under" }, this.rows, this.found);
    this.element = h("div", { className: "lm" }, this.search, under);
    this.element.addEventListener("focusout", (event) => {
      if (!this.element.contains(event.relatedTarget)) this.close();
    });
    this.draw();
  }

  get value() {
    return JSON.stringify(this.entries);
  }

  set value(given) {
    let entries = given;
    try {
      if (typeof given === "string") entries = JSON.parse(given || "[]");
    } catch {
      entries = [];
    }
    if (!Array.isArray(entries) || JSON.stringify(entries) === this.value) return;
    this.entries = entries.filter((entry) => typeof entry?.name === "string").map(({ name, on, strength }) => (
      { name, on: on !== false, strength: Number.isFinite(strength) ? strength : 1 }
    ));
    this.draw();
  }

  /** Room for three rows, which the files found cover, and up to five: a search must not change a node's size. */
  get height() {
    return 40 + ROW * Math.min(Math.max(this.entries.length, 3), 5);
  }

  commit() {
    this.widget?.callback?.(this.value);
    changed(this.node);
  }

  // ---- rows

  draw(focus = null) {
    this.rows.replaceChildren(...this.entries.map((entry) => this.row(entry)));
    if (!this.entries.length) this.rows.append(h("li", { className: "lm-note" }, text("empty")));
    if (focus) this.rows.children[focus.index]?.querySelector(focus.part)?.focus();
    fit(this.node);
  }

  row(entry) {
    const named = { name: short(entry.name) };
    const badge = h("span", { className: "lm-badge" });
    const words = h("div", { className: "lm-words" });
    const use = (property) => ({ target }) => {
      entry[property] = property === "on" ? target.checked : Number(target.value);
      if (property === "strength" && !Number.isFinite(entry.strength)) entry.strength = 1;
      item.classList.toggle("lm-off", !entry.on);
      for (const input of [slider, number]) if (input !== target) input.value = entry.strength;
    };
    const inputs = (property) => ({ input: use(property), change: () => this.commit() });
    const label = text("strength", named);
    const slider = h("input", {
      type: "range", min: -1, max: 2, step: 0.05, value: entry.strength, aria: { label }, on: inputs("strength"),
    });
    const number = h("input", {
      type: "number", min: -100, max: 100, step: 0.01, value: entry.strength, aria: { label }, on: inputs("strength"),
    });
    const grip = h("button", {
      className: "lm-grip", type: "button", title: text("moveHelp"), aria: { label: text("move", named) },
      on: { pointerdown: (event) => this.drag(event, item), keydown: (event) => this.moveKey(event, entry) },
    }, "⠿");
    const line = h("div", { className: "lm-line" },
      h("input", { type: "checkbox", checked: entry.on, aria: { label: text("use", named) }, on: inputs("on") }),
      h("span", { className: "lm-name", title: entry.name }, named.name),
      badge,
      h("button", {
        className: "lm-remove", type: "button", title: text("remove", named), aria: { label: text("remove", named) },
        on: { click: () => this.remove(entry) },
      }, "✕"),
    );
    const body = h("div", { className: "lm-body" }, line, h("div", { className: "lm-line" }, slider, number), words);
    const item = h("li", { className: "lm-row" + (entry.on ? "" : " lm-off") }, grip, body);
    item.entry = entry;
    about(entry.name).then((said) => {
      item.classList.toggle("lm-missing", Boolean(said.error));
      words.title = said.error ?? said.words.join(", ");
      words.textContent = words.title.split("\n")[0];
      badge.textContent = badge.title = said.base ?? "";
      if (said.thumbnail) body.before(h("img", { src: said.thumbnail, alt: "" }));
    });
    return item;
  }

  remove(entry) {
    const index = this.entries.indexOf(entry);
    this.entries.splice(index, 1);
    this.draw({ index: Math.min(index, this.entries.length - 1), part: ".lm-remove" });
    this.commit();
  }

  moveKey(event, entry) {
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    const from = this.entries.indexOf(entry);
    const to = from + step;
    if (!step || to < 0 || to >= this.entries.length) return;
    event.preventDefault();
    this.entries.splice(to, 0, ...this.entries.splice(from, 1));
    this.draw({ index: to, part: ".lm-grip" });
    this.commit();
  }

  drag({ button }, item) {
    if (button !== 0) return;
    item.classList.add("lm-moving");
    const move = ({ clientY }) => {
      const others = [...this.rows.children].filter((other) => other !== item);
      // the rectangles are as the page shows them, zoomed or not, like the pointer
      const next = others.find((other) => {
        const { top, height } = other.getBoundingClientRect();
        return clientY < top + height / 2;
      });
      if (next !== item.nextElementSibling) this.rows.insertBefore(item, next ?? null);
    };
    const drop = () => {
      window.removeEventListener("pointermove", move, true);
      for (const name of ends) window.removeEventListener(name, drop, true);
      item.classList.remove("lm-moving");
      const order = [...this.rows.children].map((row) => row.entry);
      if (order.every((entry, i) => entry === this.entries[i])) return;
      this.entries = order;
      this.commit();
    };
    const ends = ["pointerup", "pointercancel"];
    window.addEventListener("pointermove", move, true); // a row that moves could not capture the pointer
    for (const name of ends) window.addEventListener(name, drop, true);
  }

  // ---- search

  async open() {
    this.names = await names().catch(() => []);
    known.clear(); // files may have changed
    this.find();
  }

  find() {
    const wanted = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fitting = (this.names ?? []).filter((name) => wanted.every((word) => name.toLowerCase().includes(word)));
    this.matches = fitting.slice(0, SHOWN);
    const items = this.matches.map((name, i) => {
      const badge = h("span", { className: "lm-badge" });
      about(name).then((said) => (badge.textContent = said.base ?? ""));
      return h("li", {
        id: `${this.found.id}-${i}`, title: name, aria: { role: "option", selected: "false" },
        on: { pointerdown: (event) => { event.preventDefault(); this.add(name); } },
      }, h("span", { className: "lm-name" }, name.replace(/\.safetensors$/, "")), badge);
    });
    const more = fitting.length - SHOWN;
    if (more > 0) items.push(h("li", { className: "lm-note", aria: { role: "presentation" } }, text("more", { more })));
    if (!fitting.length) items.push(h("li", { className: "lm-note", aria: { role: "presentation" } }, text("none")));
    this.found.replaceChildren(...items);
    this.search.setAttribute("aria-expanded", "true");
    this.mark(0);
  }

  mark(choice) {
    this.choice = Math.max(0, Math.min(choice, this.matches.length - 1));
    [...this.found.children].forEach((item, i) => item.setAttribute("aria-selected", String(i === this.choice)));
    const marked = this.matches.length ? this.found.children[this.choice] : null;
    this.search.setAttribute("aria-activedescendant", marked?.id ?? "");
    marked?.scrollIntoView({ block: "nearest" });
  }

  searchKey(event) {
    if (event.key === "Escape") this.close();
    else if (!this.found.childElementCount) return;
    else if (event.key === "ArrowDown") this.mark(this.choice + 1);
    else if (event.key === "ArrowUp") this.mark(this.choice - 1);
    else if (event.key === "Enter" && this.matches.length) this.add(this.matches[this.choice]);
    else return;
    event.preventDefault();
  }

  add(name) {
    this.entries.push({ name, on: true, strength: 1 });
    this.search.value = "";
    this.close();
    this.draw();
    this.commit();
  }

  close() {
    this.found.replaceChildren();
    this.search.setAttribute("aria-expanded", "false");
    this.search.removeAttribute("aria-activedescendant");
  }
}

app.registerExtension({
  name: "legomole.loraList",
  getCustomWidgets: () => ({
    LEGOMOLE_LORA_LIST(node, name) {
      const list = new LoraList(node);
      list.widget = mount(node, name, "LEGOMOLE_LORA_LIST", list.element, {
        getValue: () => list.value,
        setValue: (value) => (list.value = value),
        getMinHeight: () => list.height,
      });
      return { widget: list.widget };
    },
  }),
  nodeCreated(node) {
    if (node.comfyClass === "LegoMoLE_LoRAList") widen(node, 340, 0);
  },
});
