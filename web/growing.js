// Nodes with growing sockets, in ComfyUI 0.33.
// They are kept tall enough for one more socket: the page adds a socket while it loads such a node and removes it again; a
// node that was too small stays taller than saved, which the page counts as a step for undo.
// A socket that is connected again in the same frame keeps its link, as when its source is put into a subgraph: the page
// removes sockets a frame after they lost their link, whatever happened since.
import { app } from "../../scripts/app.js";
import { widen } from "./page.js";

const SOCKET_HEIGHT = 20; // pixels

app.registerExtension({
  name: "legomole.growing",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("LegoMoLE_") || !node.inputs?.some(({ name }) => name.startsWith("loras."))) return;
    const makeRoom = () => widen(node, 0, node.computeSize()[1] + SOCKET_HEIGHT);
    const { onConnectionsChange } = node;
    node.onConnectionsChange = function (type, slot, isConnected, ...others) {
      const input = type === LiteGraph.INPUT ? this.inputs[slot] : null;
      const report = () => {
        if (!isConnected && input?.link) return;
        onConnectionsChange?.call(this, type, slot, isConnected, ...others);
        requestAnimationFrame(() => node.graph && makeRoom()); // the page adds sockets after this call
      };
      if (input?.name.startsWith("loras.") && !isConnected) requestAnimationFrame(report);
      else report();
    };
    queueMicrotask(makeRoom); // after our other extensions have added their widgets to a new node
  },
});
