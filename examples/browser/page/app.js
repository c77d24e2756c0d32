// Start: the runtime, then each half by itself, so that one that fails leaves the other.

import { start as startDigit } from "./digit.js";
import { start as startFilms } from "./films.js";
import { element, find } from "./page.js";
import { Graph, get, start } from "./runtime.js";

const names = { "digit-model": "Digit classifier", "films-retrieval": "Films: candidates", "films-model": "Films: ranking" };
const cells = [];

function part(name, bytes, graph) {
  const last = element("td", { textContent: "–" });
  const size = bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
  find("parts").append(element("tr", {}, element("th", { scope: "row", textContent: name }), element("td", { textContent: size }), last));
  if (graph) cells.push([graph, last]);
}

const timed = () => cells.forEach(([graph, cell]) => { if (graph.ms !== null) cell.textContent = `${graph.ms.toFixed(1)} ms`; });

function broken(error) {
  const node = find("broken");
  node.textContent = [node.textContent, error.message].filter(Boolean).join(" ");
  node.hidden = false;
}

async function half(id, facts, begin) {
  const graphs = {};
  for (const [name, graph] of Object.entries(facts.graphs)) graphs[name] = await Graph.load(graph);
  find(id).hidden = false;
  for (const [name, graph] of Object.entries(graphs)) part(names[`${id}-${name}`], graph.facts.bytes, graph);
  await begin(facts, graphs, timed);
}

try {
  const [catalog] = await Promise.all([get("catalog.json").then((response) => response.json()), start()]);
  part(`ONNX Runtime ${catalog.runtime.version}`, catalog.runtime.bytes);
  find("device").hidden = false;
  for (const [id, begin] of [["digit", startDigit], ["films", startFilms]]) await half(id, catalog[id], begin).catch(broken);
} catch (error) {
  broken(error);
}
find("starting").hidden = true;
document.documentElement.dataset.ready = "";
