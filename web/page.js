// What our widgets share: elements, texts in the page's language, and telling the page that something changed.
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

/** A text of locales/<language>/main.json; `{name}` in it is replaced by what is given. */
export function text(key, values = {}) {
  const language = app.ui?.settings?.getSettingValue?.("Comfy.Locale") ?? "en";
  const found = texts[language]?.legomole?.[key] ?? texts.en?.legomole?.[key] ?? key;
  return found.replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

/** An element. Properties are set as they are, `aria` and `on` hold attributes and listeners. Text is never markup. */
export function h(tag, { aria = {}, on = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  for (const [name, value] of Object.entries(aria)) element.setAttribute(name === "role" ? name : `aria-${name}`, value);
  for (const [name, listener] of Object.entries(on)) element.addEventListener(name, listener);
  element.append(...children);
  return element;
}

const tracker = () => app.extensionManager?.workflow?.activeWorkflow?.changeTracker;

/** Tell the page that a widget changed by the user's hand: it marks the workflow, and undo knows the step. */
export function changed(node) {
  node.graph?.setDirtyCanvas(true, true);
  tracker()?.captureCanvasState?.();
}

/** Keep keys and pointer of a widget from the canvas behind it, which would delete or drag nodes. */
function shield(element) {
  element.addEventListener("keydown", (event) => {
    const command = event.ctrlKey || event.metaKey;
    const typing = event.target.matches("input[type=search], input[type=number]");
    // the page leaves undo to every input: to sliders and check boxes too, which have none
    if (event.target.matches("input") && !typing) tracker()?.undoRedo?.(event);
    if (!command || typing) event.stopPropagation();
  });
  for (const name of ["pointerdown", "mousedown", "dblclick", "contextmenu"])
    element.addEventListener(name, (event) => event.stopPropagation());
}

/**
 * Add a widget made of elements to a node. After undo and redo, Vue's nodes go on showing the elements of the node that was
 * replaced: they are handed the new ones here.
 */
export function mount(node, name, type, element, options) {
  shield(element);
  const widget = node.addDOMWidget(name, type, element, { hideOnZoom: false, ...options });
  if (options.serialize === false) widget.serialize = false; // in the workflow; the option is for the prompt
  const { onRemoved } = node;
  node.onRemoved = function () {
    onRemoved?.apply(this, arguments);
    const { id } = node;
    requestAnimationFrame(() => {
      const heir = app.canvas.graph?.getNodeById(id)?.widgets?.find((other) => other.type === type)?.element;
      if (!heir || heir.isConnected || !element.isConnected) return;
      heir.className = element.className; // the page's own classes
      element.replaceWith(heir);
    });
  };
  return widget;
}

/** Make room for a widget that has grown. */
export function fit(node) {
  widen(node, ...node.computeSize());
}

/** Make a node at least so large. */
export function widen(node, width, height) {
  if (node.size[0] >= width && node.size[1] >= height) return;
  node.setSize([Math.max(width, node.size[0]), Math.max(height, node.size[1])]);
  node.graph?.setDirtyCanvas(true, true);
}

/** The node at the other end of an input's link, through reroutes; null where nothing is connected. */
export function source(node, slot) {
  const link = node.inputs?.[slot]?.link;
  const found = link == null ? null : node.graph?.getLink?.(link) ?? node.graph?.links?.[link];
  return found ? node.graph.getNodeById(found.origin_id) : null;
}

/** A LoRA file's name as people say it. */
export const short = (name) => name.replace(/^.*[\\/]/, "").replace(/\.safetensors$/, "");
