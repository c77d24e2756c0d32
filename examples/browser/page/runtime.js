// Exported graphs at work in ONNX Runtime's WebAssembly build: one thread, so that no special headers are needed.

import * as ort from "./ort.js";

// A file of this folder; a missing one is named.
export async function get(name) {
  const response = await fetch(name).catch(() => null);
  if (!response) throw new Error(`${name} cannot be loaded: the web server does not answer.`);
  if (!response.ok) throw new Error(`${name} is not there (${response.status}). Build the site again with examples/browser/build.py.`);
  return response;
}

export async function start() {
  if (typeof WebAssembly !== "object") throw new Error("This browser has no WebAssembly, or it is switched off; the models need it.");
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = await (await get("ort.wasm")).arrayBuffer();
}

let turn = Promise.resolve(); // the runtime takes one call at a time

export class Graph {
  static async load(facts) {
    const bytes = new Uint8Array(await (await get(facts.file)).arrayBuffer());
    const session = (turn = turn.then(() => ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] })));
    turn = turn.catch(() => {});
    try {
      return new Graph(facts, await session);
    } catch (error) {
      throw new Error(`${facts.file} cannot be run here: ${error.message}`);
    }
  }

  constructor(facts, session) {
    Object.assign(this, { facts, session, ms: null });
  }

  // Inputs by name as [values, shape]; outputs by name as Float32Arrays.
  async run(inputs) {
    const feeds = {};
    for (const { name, dtype } of this.facts.inputs) feeds[name] = new ort.Tensor(dtype, ...inputs[name]);
    const answer = turn.then(async () => {
      const began = performance.now();
      const found = await this.session.run(feeds);
      this.ms = performance.now() - began;
      return found;
    });
    turn = answer.catch(() => {});
    return Object.fromEntries(Object.entries(await answer).map(([name, tensor]) => [name, tensor.data]));
  }
}
