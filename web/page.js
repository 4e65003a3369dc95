// What our widgets share: creating elements, texts in the page's language, and reporting changes to the page.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const sheet = document.createElement("link");
sheet.rel = "stylesheet";
sheet.href = new URL("./legomole.css", import.meta.url).href;
document.head.append(sheet);

const texts = await api
  .fetchApi("/i18n")
  .then((answer) => answer.json())
  .catch(() => ({}));

/** A text of locales/<language>/main.json, with each `{name}` in it replaced by a value. */
export function text(key, values = {}) {
  const language = app.ui?.settings?.getSettingValue?.("Comfy.Locale") ?? "en";
  const template = texts[language]?.legomole?.[key] ?? texts.en?.legomole?.[key] ?? key;
  return template.replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

/** Create an element with properties, ARIA attributes (`aria`) and listeners (`on`). Text is never parsed as markup. */
export function h(tag, { aria = {}, on = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  for (const [name, value] of Object.entries(aria)) element.setAttribute(name === "role" ? name : `aria-${name}`, value);
  for (const [name, listener] of Object.entries(on)) element.addEventListener(name, listener);
  element.append(...children);
  return element;
}

const tracker = () => app.extensionManager?.workflow?.activeWorkflow?.changeTracker;

/** Report that the user changed a widget: the page marks the workflow as modified and adds a step for undo. */
export function changed(node) {
  node.graph?.setDirtyCanvas(true, true);
  tracker()?.captureCanvasState?.();
}

/** Stop key and pointer events of a widget before they reach the canvas, which would delete or drag nodes. */
function shield(element) {
  element.addEventListener("keydown", (event) => {
    const isCommand = event.ctrlKey || event.metaKey;
    const isTextInput = event.target.matches("input[type=search], input[type=number]");
    // the page lets every input undo by itself, also sliders and check boxes, which cannot
    if (event.target.matches("input") && !isTextInput) tracker()?.undoRedo?.(event);
    if (!isCommand || isTextInput) event.stopPropagation();
  });
  for (const name of ["pointerdown", "mousedown", "dblclick", "contextmenu"])
    element.addEventListener(name, (event) => event.stopPropagation());
}

/**
 * Add a widget made of elements to a node. After undo and redo, Vue's nodes still show the elements of the replaced node:
 * they are replaced by the new node's here.
 */
export function mount(node, name, type, element, options) {
  shield(element);
  const widget = node.addDOMWidget(name, type, element, { hideOnZoom: false, ...options });
  if (options.serialize === false) widget.serialize = false; // for the workflow; the option of that name is for the prompt
  const { onRemoved } = node;
  node.onRemoved = function () {
    onRemoved?.apply(this, arguments);
    const { id } = node;
    requestAnimationFrame(() => {
      const successor = app.canvas.graph?.getNodeById(id)?.widgets?.find((other) => other.type === type)?.element;
      if (!successor || successor.isConnected || !element.isConnected) return;
      successor.className = element.className; // with the classes that the page has added
      element.replaceWith(successor);
    });
  };
  return widget;
}

/** Make a node large enough for its widgets. */
export function fit(node) {
  widen(node, ...node.computeSize());
}

/** Make a node at least this large. */
export function widen(node, width, height) {
  if (node.size[0] >= width && node.size[1] >= height) return;
  node.setSize([Math.max(width, node.size[0]), Math.max(height, node.size[1])]);
  node.graph?.setDirtyCanvas(true, true);
}

/** The node at the other end of an input's link, through reroutes; null if nothing is connected. */
export function source(node, slot) {
  const id = node.inputs?.[slot]?.link;
  const link = id == null ? null : node.graph?.getLink?.(id) ?? node.graph?.links?.[id];
  return link ? node.graph.getNodeById(link.origin_id) : null;
}

/** The name of a LoRA file without folder and extension. */
export const short = (name) => name.replace(/^.*[\\/]/, "").replace(/\.safetensors$/, "");
