// The search field of LoRA List, and what it requests from the server.
import { api } from "../../scripts/api.js";
import { h, text } from "./page.js";

const MAX_RESULTS = 50; // of a search
const LIST_HEIGHT = 320; // pixels
let count = 0; // for ids that are unique in the page

export const fetchNames = () => api.fetchApi("/legomole/loras").then((answer) => answer.json());

const descriptions = new Map(); // name -> promise of the description of a file

/** What a file says about itself, see nodes/comfy/routes.py. */
export function describe(name) {
  if (!descriptions.has(name)) {
    const url = `/legomole/lora?name=${encodeURIComponent(name)}`;
    descriptions.set(name, api.fetchApi(url).then((answer) => answer.json()));
  }
  return descriptions.get(name);
}

/** The tags in a prompt of other programs: <lora:name>, <lora:name:0.8>, or <lora:name:0.8:0.5> with CLIP's strength. */
export function matchTags(prompt) {
  const number = (word) => (word && Number.isFinite(Number(word)) ? Number(word) : undefined);
  return [...prompt.matchAll(/<lora:([^:<>]+)(?::([^:<>]*))?(?::([^:<>]*))?[^<>]*>/gi)].map(
    ([, name, strength, clip]) => ({ name: name.trim(), strength: number(strength) ?? 1, clip: number(clip) }),
  );
}

export class LoraSearch {
  /**
   * @param onChoose Called with the name of the chosen file.
   * @param onText Called with the text after each change; returns whether it has been dealt with.
   */
  constructor(onChoose, onText) {
    this.onChoose = onChoose;
    this.onText = onText;
    const id = `lm-found-${count++}`;
    this.input = h("input", {
      type: "search",
      placeholder: text("addLora"),
      aria: { role: "combobox", expanded: "false", controls: id, label: text("addLora"), autocomplete: "list" },
      on: {
        input: () => this.onInput(), focus: () => this.load(), keydown: (event) => this.onKey(event),
        blur: () => this.close(),
      },
    });
    // in the page's body, because a node cuts off what is outside of it
    this.results = h("ul", { id, className: "lm lm-found", aria: { role: "listbox", label: text("found") } });
    this.closeOnWheel = ({ target }) => this.results.contains(target) || this.close();
  }

  /** Open the list of files, e.g. to choose one for a row. `onClose` is called when it closes. */
  open(label, onClose) {
    this.close();
    this.onClose = onClose;
    this.input.placeholder = label;
    if (document.activeElement === this.input) this.load();
    else this.input.focus();
  }

  async load() {
    this.names = await fetchNames().catch(() => []);
    descriptions.clear(); // files may have changed
    if (document.activeElement === this.input) this.show();
  }

  onInput() {
    if (document.activeElement !== this.input) return; // Ctrl+Z elsewhere also undoes what was typed here
    if (!this.onText(this.input.value)) return this.show();
    this.close();
  }

  show() {
    const words = this.input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const matches = (this.names ?? []).filter((name) => words.every((word) => name.toLowerCase().includes(word)));
    this.matches = matches.slice(0, MAX_RESULTS);
    const items = this.matches.map((name, i) => {
      const badge = h("span", { className: "lm-badge" });
      describe(name).then(({ base = "" }) => (badge.textContent = base));
      return h("li", {
        id: `${this.results.id}-${i}`, title: name, aria: { role: "option", selected: "false" },
        on: { pointerdown: (event) => { event.preventDefault(); this.choose(name); } },
      }, h("span", { className: "lm-name" }, name.replace(/\.safetensors$/, "")), badge);
    });
    const note = (words) => h("li", { className: "lm-note", aria: { role: "presentation" } }, words);
    const more = matches.length - MAX_RESULTS;
    if (more > 0) items.push(note(text("more", { more })));
    if (!matches.length) items.push(note(text("none")));
    this.results.replaceChildren(...items);
    this.place();
    this.input.setAttribute("aria-expanded", "true");
    this.mark(0);
  }

  /** Put the list under the field, or above it where there is more room. */
  place() {
    const { left, top, bottom, width } = this.input.getBoundingClientRect();
    const below = window.innerHeight - bottom - 8, isAbove = below < 160 && top > below;
    const height = Math.min(isAbove ? top - 8 : below, LIST_HEIGHT);
    Object.assign(this.results.style, {
      left: `${left}px`, width: `${Math.max(width, 260)}px`, maxHeight: `${height}px`,
      top: isAbove ? "" : `${bottom + 2}px`, bottom: isAbove ? `${window.innerHeight - top + 2}px` : "",
    });
    document.body.append(this.results);
    window.addEventListener("wheel", this.closeOnWheel, true);
  }

  mark(choice) {
    this.choice = Math.max(0, Math.min(choice, this.matches.length - 1));
    [...this.results.children].forEach((item, i) => item.setAttribute("aria-selected", String(i === this.choice)));
    const marked = this.matches.length ? this.results.children[this.choice] : null;
    this.input.setAttribute("aria-activedescendant", marked?.id ?? "");
    marked?.scrollIntoView({ block: "nearest" });
  }

  onKey(event) {
    if (event.key === "Escape") this.close();
    else if (!this.results.childElementCount) return;
    else if (event.key === "ArrowDown") this.mark(this.choice + 1);
    else if (event.key === "ArrowUp") this.mark(this.choice - 1);
    else if (event.key === "Enter" && this.matches.length) this.choose(this.matches[this.choice]);
    else return;
    event.preventDefault();
  }

  choose(name) {
    this.onChoose(name);
    this.close();
  }

  close() {
    window.removeEventListener("wheel", this.closeOnWheel, true);
    this.results.replaceChildren();
    this.results.remove();
    this.input.value = "";
    this.input.placeholder = text("addLora");
    this.input.setAttribute("aria-expanded", "false");
    this.input.removeAttribute("aria-activedescendant");
    this.onClose?.();
    this.onClose = null;
  }
}
