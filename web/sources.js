// Where the links of a node come from: through reroutes, bypassed nodes and the borders of subgraphs.
import { short } from "./page.js";

const NEVER = 2, BYPASS = 4; // modes of nodes

/** All subgraph nodes that show a subgraph, anywhere in the workflow. */
function instances(subgraph, graph = subgraph.rootGraph) {
  return (graph.nodes ?? []).filter((node) => node.isSubgraphNode?.()).flatMap((node) => (
    node.subgraph === subgraph ? [node] : instances(subgraph, node.subgraph)
  ));
}

/** The link that a subgraph node gets from inside of the subgraph, for one of its outputs. */
const innerLink = (node, slot) => node.subgraph.outputNode?.slots[slot]?.getLinks?.()[0];

function follow(graph, id) {
  const link = id == null ? null : graph?.getLink?.(id);
  if (!link) return null;
  if (link.originIsIoNode) { // from outside of this subgraph; of several places where it is used, the first
    const owners = instances(graph);
    const owner = owners.find(({ inputs }) => inputs[link.origin_slot]?.link != null) ?? owners[0];
    return owner && follow(owner.graph, owner.inputs[link.origin_slot]?.link);
  }
  const node = graph.getNodeById(link.origin_id);
  if (!node || node.mode === NEVER) return null;
  if (node.isSubgraphNode?.() && node.mode !== BYPASS) return follow(node.subgraph, innerLink(node, link.origin_slot)?.id);
  if (node.mode === BYPASS) {
    const type = node.outputs[link.origin_slot]?.type;
    return follow(graph, node.inputs?.find((input) => input.type === type && input.link != null)?.link);
  }
  if (node.isVirtualNode && node.inputs?.length) return follow(graph, node.inputs[0].link); // Reroute
  return { node, slot: link.origin_slot };
}

/** The node and its output at the other end of an input's link; null if nothing is connected. */
export const source = (node, slot) => follow(node.graph, node.inputs?.[slot]?.link);

/** The value of a widget, also where it is promoted to the subgraph node; undefined where a link gives it. */
function widgetValue(node, name) {
  const input = node.inputs?.find((candidate) => candidate.widget?.name === name && candidate.link != null);
  if (!input) return node.widgets?.find((widget) => widget.name === name)?.value;
  const link = node.graph.getLink(input.link);
  const owner = link?.originIsIoNode ? instances(node.graph)[0] : null;
  return owner ? widgetValue(owner, owner.inputs[link.origin_slot].name) : undefined;
}

const stackInput = (node) => node.inputs?.findIndex(({ name }) => name === "lora_stack") ?? -1;

/** The names of the LoRAs that an input receives, in order; null where links cannot tell before a run. */
function incoming(node, slot) {
  const from = source(node, slot);
  if (!from) return [];
  const { node: origin, slot: output } = from;
  const type = origin.outputs?.[output]?.type;
  if (origin.type === "LegoMoLE_LoadLoRA" || origin.type === "LegoMoLE_LoRAList") {
    const before = type === "LORA_STACK" ? incoming(origin, stackInput(origin)) : [];
    const value = widgetValue(origin, origin.type === "LegoMoLE_LoadLoRA" ? "lora_name" : "loras");
    if (before === null || value === undefined) return null;
    if (origin.type === "LegoMoLE_LoadLoRA") return [...before, short(value)];
    return [...before, ...JSON.parse(value || "[]").filter(({ on }) => on).map(({ name }) => short(name))];
  }
  return type === "LEGOMOLE_LORA" || type === "LORA_MODEL" ? [origin.title] : null;
}

const loraSlots = (node) => [...(node.inputs ?? []).entries()].filter(([, { name }]) => name.startsWith("loras.")).map(([slot]) => slot);

/** The names of all LoRAs that a node receives, or null. */
export function incomingLoras(node) {
  const names = loraSlots(node).map((slot) => incoming(node, slot));
  return names.includes(null) ? null : names.flat();
}

/** The names of the LoRAs that have a region by name: those of the Region nodes before a node. */
export function namedRegions(node) {
  const names = new Set();
  const visited = new Set();
  let from = node, input = "named_regions";
  while (from && !visited.has(from)) {
    visited.add(from);
    from = source(from, from.inputs?.findIndex(({ name }) => name === input))?.node;
    if (from?.type !== "LegoMoLE_Region") break;
    names.add(short(widgetValue(from, "lora") ?? ""));
    input = "regions";
  }
  return names;
}

/** A text that changes when other LoRAs may arrive at a node. */
export function signature(node) {
  const visited = new Set();
  const trace = (from) => {
    if (!from || visited.has(from.node)) return from && from.node.id;
    const { node: origin, slot } = from;
    visited.add(origin);
    const values = ["loras", "lora_name"].map((name) => widgetValue(origin, name));
    return [origin.id, slot, ...values, ...(origin.inputs ?? []).map((_, i) => trace(source(origin, i)))];
  };
  return JSON.stringify(loraSlots(node).map((slot) => trace(source(node, slot))));
}
