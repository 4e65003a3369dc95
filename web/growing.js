// Nodes with growing sockets, in ComfyUI 0.33.
// They are kept tall enough for one more socket: the page adds a socket while it loads such a node and removes it again; a
// node that was too small stays taller than saved, which the page counts as a step for undo.
// A socket that is connected again in the same frame keeps its link, as when its source is put into a subgraph: the page
// removes sockets a frame after they lost their link, whatever happened since.
// Regions belong to the LoRA of their number: when one is disconnected, the page would move those after it down, so it is
// not told; and it is told to add sockets until every LoRA has one, which it does only when the last is connected.
import { app } from "../../scripts/app.js";
import { onChanged, widen } from "./page.js";
import { incomingLoras } from "./sources.js";

const SOCKET_HEIGHT = 20; // pixels
const isRegion = ({ name }) => name.startsWith("regions.");

/** Add sockets until every LoRA has one for its region. */
function addRegions(node, onConnectionsChange) {
  const wanted = incomingLoras(node)?.length ?? 0;
  for (let count = 0; ; ) {
    const slots = [...node.inputs.keys()].filter((slot) => isRegion(node.inputs[slot]));
    if (!slots.length || slots.length >= wanted || slots.length <= count) return;
    count = slots.length;
    onConnectionsChange.call(node, LiteGraph.INPUT, slots.at(-1), true, {});
  }
}

app.registerExtension({
  name: "legomole.growing",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("LegoMoLE_") || !node.inputs?.some(({ name }) => name.startsWith("loras."))) return;
    const { onConnectionsChange, onRemoved } = node;
    const makeRoom = () => widen(node, 0, node.computeSize()[1] + SOCKET_HEIGHT);
    const grow = () => {
      addRegions(node, onConnectionsChange);
      makeRoom();
    };
    node.onConnectionsChange = function (type, slot, isConnected, ...others) {
      const input = type === LiteGraph.INPUT ? this.inputs[slot] : null;
      if (input && isRegion(input) && !isConnected) return;
      const next = app.configuringGraph ? makeRoom : grow;
      const report = () => {
        if (!isConnected && input?.link) return;
        onConnectionsChange?.call(this, type, slot, isConnected, ...others);
        requestAnimationFrame(() => node.graph && next()); // the page adds sockets after this call
      };
      if (input?.name.startsWith("loras.") && !isConnected) requestAnimationFrame(report);
      else report();
    };
    queueMicrotask(makeRoom); // after our other extensions have added their widgets to a new node
    if (!node.inputs.some(isRegion)) return;
    const stop = onChanged(() => node.graph && grow());
    node.onRemoved = function () {
      onRemoved?.apply(this, arguments);
      stop();
    };
  },
});
