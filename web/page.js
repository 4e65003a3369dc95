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

const watchers = new Set();

/** Call a function after every change by the user, before the page saves the step for undo. Returns how to stop. */
export function onChanged(watcher) {
  watchers.add(watcher);
  return () => watchers.delete(watcher);
}

/** Report that the user changed a widget: the page marks the workflow as modified and adds a step for undo. */
export function changed(node) {
  node.graph?.setDirtyCanvas(true, true);
  for (const watcher of watchers) watcher();
  tracker()?.captureCanvasState?.();
}

const isTextInput = (element) => element.matches("input[type=search], input[type=number]");

/** Stop events of a widget that would delete or drag nodes, and give the canvas those that move it or open a menu. */
function shield(node, element) {
  element.addEventListener("keydown", (event) => {
    const isCommand = event.ctrlKey || event.metaKey;
    // the page lets every input undo by itself, also sliders and check boxes, which cannot
    if (event.target.matches("input") && !isTextInput(event.target)) tracker()?.undoRedo?.(event);
    if (!isCommand || isTextInput(event.target)) event.stopPropagation();
  });
  const isMiddle = { pointerdown: ({ button }) => button === 1, pointermove: ({ buttons }) => buttons & 4, pointerup: ({ button }) => button === 1 };
  const forward = { pointerdown: "processMouseDown", pointermove: "processMouseMove", pointerup: "processMouseUp" };
  for (const [name, method] of Object.entries(forward))
    element.addEventListener(name, (event) => isMiddle[name](event) && app.canvas[method](event));
  for (const name of ["pointerdown", "mousedown", "dblclick"])
    element.addEventListener(name, (event) => event.stopPropagation());
  element.addEventListener("contextmenu", (event) => {
    if (isTextInput(event.target)) event.stopPropagation(); // the browser's menu, to paste
    else if (!LiteGraph.vueNodesMode) {
      event.preventDefault();
      event.stopPropagation();
      app.canvas.adjustMouseEvent(event);
      app.canvas.selectNode(node);
      app.canvas.processContextMenu(node, event);
    }
  });
  element.addEventListener("wheel", (event) => {
    if (LiteGraph.vueNodesMode) return; // Nodes 2.0 decide by themselves, by data-capture-wheel
    const scroller = event.target.closest("[data-capture-wheel=true]");
    const scrolls = scroller?.contains(document.activeElement) && scroller.scrollHeight > scroller.clientHeight;
    if (scrolls && !event.ctrlKey) return event.stopPropagation();
    event.preventDefault();
    event.stopPropagation();
    app.canvas.processMouseWheel(event);
  }, { passive: false });
}

/**
 * Add a widget made of elements to a node. After undo and redo, Vue's nodes still show the elements of the replaced node:
 * they are replaced by the new node's here.
 */
export function mount(node, name, type, element, options) {
  shield(node, element);
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

export const MARGIN = 20; // pixels that the page leaves above and below a widget, together

/** Give the element of a widget its least height, for Nodes 2.0, which do not ask the widget. */
export function setHeight(element, height) {
  element.style.minHeight = `${height - MARGIN}px`;
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

/** The name of a LoRA file without folder and extension. */
export const short = (name) => name.replace(/^.*[\\/]/, "").replace(/\.safetensors$/, "");
