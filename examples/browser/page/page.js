// What both halves need of the document.

export const find = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// The last answers, for the console and for tests.
export const last = (globalThis.pennyweight = {});
