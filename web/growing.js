// Nodes with growing sockets keep room for one socket more. ComfyUI 0.33 adds one while it loads such a node and takes it
// away again; a node without the room stays taller than it was saved, which the page counts as a step for undo.
import { app } from "../../scripts/app.js";
import { widen } from "./page.js";

const SOCKET = 20; // pixels

app.registerExtension({
  name: "legomole.growing",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("LegoMoLE_") || !node.inputs?.some(({ name }) => name.startsWith("loras."))) return;
    const room = () => widen(node, 0, node.computeSize()[1] + SOCKET);
    const { onConnectionsChange } = node;
    node.onConnectionsChange = function () {
      onConnectionsChange?.apply(this, arguments);
      requestAnimationFrame(() => node.graph && room()); // the page grows the sockets after this call
    };
    queueMicrotask(room); // after the widgets that other parts of ours add to a new node
  },
});
