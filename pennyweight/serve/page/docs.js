// /openapi.json as a page: one card an operation, its parameters or body, its answer.

function element(tag, text = "", className = "") {
  return Object.assign(document.createElement(tag), { textContent: text, className });
}

const api = await (await fetch("/openapi.json")).json();
const named = (schema) => (schema.$ref ? api.components.schemas[schema.$ref.split("/").pop()] : schema);

// A schema in a few words: "list of (text or whole number), at most 1000".
function words(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return [...new Set(schema.anyOf.map(words))].join(" or ");
  if (schema.enum) return schema.enum.join(" or ");
  if (schema.type === "array") return `list of ${words(schema.items)}${limits(schema, "minItems", "maxItems")}`;
  const plain = { string: "text", integer: "whole number", number: "number", boolean: "true or false", null: "null", object: "object" };
  return (plain[schema.type] ?? "any") + limits(schema, "minimum", "maximum");
}

function limits(schema, low, high) {
  const far = (n) => n === undefined || Math.abs(n) > 2 ** 31;
  const parts = [far(schema[low]) ? "" : `at least ${schema[low]}`, far(schema[high]) ? "" : `at most ${schema[high]}`].filter(Boolean);
  return parts.length ? `, ${parts.join(", ")}` : "";
}

function table(rows) {
  const body = element("table");
  for (const [name, type, text] of rows) {
    const row = element("tr");
    row.append(element("td", name), element("td", type), element("td", text));
    body.append(row);
  }
  return body;
}

function fields(schema) {
  if (schema.anyOf) return fields(schema.anyOf.find((one) => one.$ref));
  const { properties = {}, required = [] } = named(schema);
  return table(Object.entries(properties).map(([name, of]) => [name, words(of), [
    required.includes(name) ? "required" : `default ${JSON.stringify(of.default)}`, of.description].filter(Boolean).join(". ")]));
}

function answers(schema) {
  const { properties = {} } = named(schema);
  return table(Object.entries(properties).map(([name, of]) => [name, words(of), of.description ?? ""]));
}

function card(path, method, operation) {
  const node = element("article");
  const title = element("h2");
  title.append(element("span", method.toUpperCase(), "method"), path);
  node.append(title, element("p", operation.summary, "quiet"));
  if (operation.parameters?.length) {
    node.append(element("h3", "Query"), table(operation.parameters.map((p) => [p.name, words(p.schema), [
      p.required ? "required" : `default ${JSON.stringify(p.schema.default)}`, p.description].filter(Boolean).join(". ")])));
  }
  const body = operation.requestBody?.content["application/json"].schema;
  if (body) node.append(element("h3", `Body: ${words(body)}`), fields(body));
  const answer = operation.responses["200"].content?.["application/json"]?.schema;
  if (answer) node.append(element("h3", `Answer: ${words(answer)}`), answers(answer));
  return node;
}

document.getElementById("intro").textContent = api.info.description;
const paths = document.getElementById("paths");
for (const [path, methods] of Object.entries(api.paths)) {
  for (const [method, operation] of Object.entries(methods)) paths.append(card(path, method, operation));
}
for (const name of ["Item", "Scored", "User", "Failure", "Problem"]) {
  const node = element("article");
  node.append(element("h2", name), element("p", api.components.schemas[name].description ?? "", "quiet"), answers(api.components.schemas[name]));
  paths.append(node);
}
