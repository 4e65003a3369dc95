// Nodes with growing sockets are kept tall enough for one more socket. ComfyUI 0.33 adds a socket while it loads such a
// node and removes it again; a node that was too small stays taller than saved, which the page counts as a step for undo.
import { app } from "../../scripts/app.js";
import { widen } from "./page.js";

const SOCKET_HEIGHT = 20; // pixels

app.registerExtension({
  name: "legomole.growing",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("LegoMoLE_") || !node.inputs?.some(({ name }) => name.startsWith("loras."))) return;
    const makeRoom = () => widen(node, 0, node.computeSize()[1] + SOCKET_HEIGHT);
    const { onConnectionsChange } = node;
    node.onConnectionsChange = function () {
      onConnectionsChange?.apply(this, arguments);
      requestAnimationFrame(() => node.graph && makeRoom()); // the page adds sockets after this call
    };
    queueMicrotask(makeRoom); // after our other extensions have added their widgets to a new node
  },
});
