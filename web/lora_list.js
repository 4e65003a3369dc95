// The widget of LoRA List. Its value is a JSON text, see nodes/merge/lora_list.py.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { changed, fit, h, mount, short, text, widen } from "./page.js";

const MAX_RESULTS = 20; // of a search
const ROW_HEIGHT = 74; // pixels
let count = 0; // for ids that are unique in the page

const fetchNames = () => api.fetchApi("/legomole/loras").then((answer) => answer.json());

const descriptions = new Map(); // name -> promise of the description of a file
function describe(name) {
  if (!descriptions.has(name)) {
    const url = `/legomole/lora?name=${encodeURIComponent(name)}`;
    descriptions.set(name, api.fetchApi(url).then((answer) => answer.json()));
  }
  return descriptions.get(name);
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
      on: { input: () => this.showResults(), focus: () => this.open(), keydown: (event) => this.onSearchKey(event) },
    });
    this.results = h("ul", { id, className: "lm-found", aria: { role: "listbox", label: text("found") } });
    this.rows = h("ul", { aria: { label: text("loras") } });
    const under = h("div", { className: "lm-under" }, this.rows, this.results);
    this.element = h("div", { className: "lm" }, this.search, under);
    this.element.addEventListener("focusout", (event) => {
      if (!this.element.contains(event.relatedTarget)) this.close();
    });
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
    this.entries = entries.filter((entry) => typeof entry?.name === "string").map(({ name, on, strength }) => (
      { name, on: on !== false, strength: Number.isFinite(strength) ? strength : 1 }
    ));
    this.draw();
  }

  /** Height for three to five rows. Search results cover the rows, so that a search does not change the node's size. */
  get height() {
    return 40 + ROW_HEIGHT * Math.min(Math.max(this.entries.length, 3), 5);
  }

  /** Report a change by the user. */
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
    const name = short(entry.name);
    const badge = h("span", { className: "lm-badge" });
    const words = h("div", { className: "lm-words" });
    const set = (property) => ({ target }) => {
      entry[property] = property === "on" ? target.checked : Number(target.value);
      if (property === "strength" && !Number.isFinite(entry.strength)) entry.strength = 1;
      item.classList.toggle("lm-off", !entry.on);
      for (const input of [slider, number]) if (input !== target) input.value = entry.strength;
    };
    const inputs = (property) => ({ input: set(property), change: () => this.commit() });
    const label = text("strength", { name });
    const slider = h("input", {
      type: "range", min: -1, max: 2, step: 0.05, value: entry.strength, aria: { label }, on: inputs("strength"),
    });
    const number = h("input", {
      type: "number", min: -100, max: 100, step: 0.01, value: entry.strength, aria: { label }, on: inputs("strength"),
    });
    const grip = h("button", {
      className: "lm-grip", type: "button", title: text("moveHelp"), aria: { label: text("move", { name }) },
      on: { pointerdown: (event) => this.drag(event, item), keydown: (event) => this.onMoveKey(event, entry) },
    }, "⠿");
    const line = h("div", { className: "lm-line" },
      h("input", { type: "checkbox", checked: entry.on, aria: { label: text("use", { name }) }, on: inputs("on") }),
      h("span", { className: "lm-name", title: entry.name }, name),
      badge,
      h("button", {
        className: "lm-remove", type: "button", title: text("remove", { name }), aria: { label: text("remove", { name }) },
        on: { click: () => this.remove(entry) },
      }, "✕"),
    );
    const body = h("div", { className: "lm-body" }, line, h("div", { className: "lm-line" }, slider, number), words);
    const item = h("li", { className: "lm-row" + (entry.on ? "" : " lm-off") }, grip, body);
    item.entry = entry;
    describe(entry.name).then((file) => {
      item.classList.toggle("lm-missing", Boolean(file.error));
      words.title = file.error ?? file.words.join(", ");
      words.textContent = words.title.split("\n")[0];
      badge.textContent = badge.title = file.base ?? "";
      if (file.thumbnail) body.before(h("img", { src: file.thumbnail, alt: "" }));
    });
    return item;
  }

  remove(entry) {
    const index = this.entries.indexOf(entry);
    this.entries.splice(index, 1);
    this.draw({ index: Math.min(index, this.entries.length - 1), part: ".lm-remove" });
    this.commit();
  }

  onMoveKey(event, entry) {
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
      // rectangles and pointer are both in pixels of the page, whatever the zoom
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
    window.addEventListener("pointermove", move, true); // moving a row in the document would end its pointer capture
    for (const name of ends) window.addEventListener(name, drop, true);
  }

  // ---- search

  async open() {
    this.names = await fetchNames().catch(() => []);
    descriptions.clear(); // files may have changed
    this.showResults();
  }

  showResults() {
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const matches = (this.names ?? []).filter((name) => words.every((word) => name.toLowerCase().includes(word)));
    this.matches = matches.slice(0, MAX_RESULTS);
    const items = this.matches.map((name, i) => {
      const badge = h("span", { className: "lm-badge" });
      describe(name).then((file) => (badge.textContent = file.base ?? ""));
      return h("li", {
        id: `${this.results.id}-${i}`, title: name, aria: { role: "option", selected: "false" },
        on: { pointerdown: (event) => { event.preventDefault(); this.add(name); } },
      }, h("span", { className: "lm-name" }, name.replace(/\.safetensors$/, "")), badge);
    });
    const more = matches.length - MAX_RESULTS;
    if (more > 0) items.push(h("li", { className: "lm-note", aria: { role: "presentation" } }, text("more", { more })));
    if (!matches.length) items.push(h("li", { className: "lm-note", aria: { role: "presentation" } }, text("none")));
    this.results.replaceChildren(...items);
    this.search.setAttribute("aria-expanded", "true");
    this.mark(0);
  }

  mark(choice) {
    this.choice = Math.max(0, Math.min(choice, this.matches.length - 1));
    [...this.results.children].forEach((item, i) => item.setAttribute("aria-selected", String(i === this.choice)));
    const marked = this.matches.length ? this.results.children[this.choice] : null;
    this.search.setAttribute("aria-activedescendant", marked?.id ?? "");
    marked?.scrollIntoView({ block: "nearest" });
  }

  onSearchKey(event) {
    if (event.key === "Escape") this.close();
    else if (!this.results.childElementCount) return;
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
    this.results.replaceChildren();
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
