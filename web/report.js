// The text that our nodes show while and after they run. ComfyUI 0.33 cuts words in the middle, loses line breaks in
// Nodes 2.0, and shows nothing for a node whose result is cached.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { MARGIN, h, mount, setHeight, text } from "./page.js";

const NAME = "$$node-text-preview"; // by this name the page finds the widget for texts from the server
const MIN_HEIGHT = 48, MAX_HEIGHT = 168; // pixels
const LINE_HEIGHT = 16; // pixels

const DROPPED = /^\s*(\d+ keys? could not be |DROPPED \((\d+)\))/;
const FAULT = /^(fault:|🔴)/u, WARNING = /^(note:|warning:|🟡)/u;

/** A line of text. Long keys wrap after dots and underscores, further lines are indented as the first. */
function lineElement(line) {
  const words = line.trim();
  const parts = words.split(/(?<=[._/\\])(?=\w)/).flatMap((part) => [part, h("wbr")]);
  const className = DROPPED.test(line) || FAULT.test(words) ? "lm-bad" : WARNING.test(words) ? "lm-warn" : "";
  const element = h("div", { className }, ...(words ? parts : [" "]));
  element.style.paddingLeft = `${4 * line.search(/\S|$/)}px`;
  return element;
}

class Report {
  constructor(node) {
    this.node = node;
    this.lines = [];
    this.box = h("div", { className: "lm-report", aria: { role: "log" } });
    this.element = h("div", { className: "lm lm-sized" }, this.box);
    this.element.dataset.captureWheel = "true";
    this.element.tabIndex = 0; // so that it can get the focus and scroll
  }

  get value() {
    return this.lines.join("\n");
  }

  set value(value) {
    this.lines = String(value ?? "").split("\n");
    const section = this.lines.map((line) => line.match(DROPPED)?.[2]).find(Boolean);
    const isFirst = DROPPED.test(this.lines[0]);
    this.box.replaceChildren(
      ...(section && !isFirst ? [h("div", { className: "lm-bad" }, text("dropped", { count: section }))] : []),
      ...this.lines.map(lineElement),
    );
    setHeight(this.element, this.height);
  }

  get height() {
    return Math.min(Math.max(this.box.childElementCount * LINE_HEIGHT + MARGIN, MIN_HEIGHT), MAX_HEIGHT);
  }
}

/** Show a text on a node, in place of the page's own widget. */
function show(node, value) {
  const index = node.widgets?.findIndex(({ name }) => name === NAME) ?? -1;
  let widget = node.widgets?.[index];
  if (widget && !widget.report) {
    widget.onRemove?.();
    node.widgets.splice(index, 1);
    widget = null;
  }
  if (!widget) {
    const report = new Report(node);
    widget = mount(node, NAME, "LEGOMOLE_REPORT", report.element, {
      serialize: false, getValue: () => report.value, setValue: (text) => (report.value = text),
      getMinHeight: () => report.height,
    });
    widget.report = report;
  }
  widget.value = value;
  const height = node.computeSize()[1];
  if (node.size[1] < height) node.setSize([node.size[0], height]);
  node.setDirtyCanvas?.(true, true);
}

app.registerExtension({
  name: "legomole.report",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("LegoMoLE_")) return;
    const { onExecuted } = node;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (output?.text?.length) show(node, [output.text].flat().join("\n"));
    };
  },
  setup() {
    api.addEventListener("progress_text", ({ detail }) => {
      const path = String(detail?.nodeId ?? "").split(":");
      const node = path.reduce((at, id) => (at?.subgraph ?? at)?.getNodeById?.(id), app.rootGraph ?? app.graph);
      if (node?.comfyClass?.startsWith("LegoMoLE_")) show(node, detail.text);
    });
  },
});
