// Candidates by retrieval out of all films, then their ranking, as the service does it: the columns are those of the
// catalogue, and whoever asks here is nobody the model has met (the user is out of vocabulary), known by what they like.

import { element, find, last } from "./page.js";

const CANDIDATES = 500, TOP = 10, UNKNOWN = 1;

const search = find("search"), found = find("found"), list = find("list"), status = find("films-status");
let films, columns, askers, graphs, ran, popular, liked = [], order = [], asked = 0;

export async function start(facts, loaded, timed) {
  [graphs, ran] = [loaded, timed];
  const { id, title, year, genres, popularity, features } = facts.items;
  films = id.map((id, at) => {
    const name = title[at] ?? `${id}`, below = [year[at], genres[at]?.replaceAll(", ", " · ")].filter(Boolean).join(" · ");
    return { at, id, title: name, facts: below, words: folded(name) };
  });
  popular = films.map((film) => film.at).sort((a, b) => popularity[b] - popularity[a]);
  const flat = (rows) => ({ width: rows[0].length ?? 1, values: rows.flat() });
  columns = Object.fromEntries(Object.entries(features).map(([name, rows]) => [name, flat(rows)]));
  askers = Object.fromEntries(facts.asker.map((column) => [column.name, column]));
  await refresh();
}

// A column of a request: the features of these films, or the asker's one row once for each of them.
function tensor({ column, dtype, shape }, rows) {
  const [whole, count] = [dtype === "int64", shape[0] === "users" ? 1 : rows.length];
  const values = new (whole ? BigInt64Array : Float32Array)(count * shape.slice(1).reduce((a, b) => a * b, 1));
  const as = whole ? BigInt : Number;
  if (column in columns) {
    const { width, values: all } = columns[column];
    rows.forEach((film, row) => { for (let k = 0; k < width; k++) values[row * width + k] = as(all[film * width + k]); });
  } else {
    const row = asker(askers[column]).map(as);
    for (let at = 0; at < values.length; at++) values[at] = row[at % row.length];
  }
  return [values, [count, ...shape.slice(1)]];
}

function asker({ kind, length, history }) {
  if (kind === "categorical") return [UNKNOWN];
  const ids = history ? liked.slice(-length).map((film) => film.id) : [];
  return [...Array((length || 1) - ids.length).fill(0), ...ids]; // padded on the left: the newest is in the last place
}

async function scored(graph, rows) {
  const inputs = Object.fromEntries(graph.facts.inputs.map((input) => [input.name, tensor(input, rows)]));
  return (await graph.run(inputs)).scores;
}

// The best of some films by their scores; of equals, the earlier.
function best(rows, scores, count) {
  return rows.map((film, at) => ({ film, score: scores[at] })).sort((a, b) => b.score - a.score).slice(0, count);
}

async function answer() {
  if (!liked.length) return { heading: "Popular, to start with", top: popular.slice(0, TOP).map((film) => ({ film })), note: "" };
  const began = performance.now(), hidden = new Set(liked.map((film) => film.at));
  const all = films.map((film) => film.at);
  const [kept, every] = [all.filter((film) => !hidden.has(film)), graphs.retrieval && (await scored(graphs.retrieval, all))];
  const candidates = every ? best(kept, kept.map((film) => every[film]), CANDIDATES).map(({ film }) => film) : kept;
  const top = best(candidates, await scored(graphs.model, candidates), TOP);
  const ms = performance.now() - began;
  const [some, of] = [candidates, all].map(({ length }) => length.toLocaleString("en"));
  const note = `${some} of ${of} films ranked in ${ms.toFixed(1)} ms in this browser`;
  return { heading: "For you", top, note };
}

// An answer that a newer question has overtaken is dropped.
async function refresh() {
  const mine = ++asked;
  showTaste();
  list.setAttribute("aria-busy", "true");
  try {
    const { heading, top, note } = await answer();
    if (mine !== asked) return;
    find("films-answer").textContent = heading;
    show(top);
    say(note);
    Object.assign(last, { liked: liked.map(({ id }) => id), top: top.map(({ film, score }) => [films[film].id, score]) });
    ran();
  } catch (error) {
    if (mine === asked) say(error.message, true);
  }
  if (mine === asked) list.removeAttribute("aria-busy");
}

function say(text, bad = false) {
  status.textContent = text;
  status.classList.toggle("bad", bad);
}

function show(top) {
  const before = new Map(order.map((film, rank) => [film, rank]));
  list.replaceChildren(...top.map(({ film, score }, rank) => row(films[film], score, rank, before)));
  order = top.map(({ film }) => film);
}

function row(film, score, rank, before) {
  const climbed = before.has(film.at) ? before.get(film.at) - rank : 0, fresh = before.size > 0 && !before.has(film.at);
  const like = element("button", { type: "button", textContent: "Like", onclick: () => add(film, like) });
  like.setAttribute("aria-label", `Like ${film.title}`);
  const text = element("div", {}, element("span", { className: "title", textContent: film.title }));
  const moved = fresh ? ["new", "not in the last list"] : [`▲ ${climbed}`, "places up"];
  if (fresh || climbed > 0) text.append(element("span", { className: "moved", textContent: moved[0], title: moved[1] }));
  const below = element("div", { className: "genres", textContent: film.facts });
  if (score !== undefined) below.append(film.facts && " · ", element("span", { className: "score", textContent: `score ${score.toFixed(3)}` }));
  text.append(below);
  return element("li", { className: fresh ? "fresh" : "" }, element("span", { className: "rank", textContent: rank + 1 }), text, like);
}

async function add(film, button) {
  const place = [...list.querySelectorAll("button")].indexOf(button);
  if (!liked.includes(film)) liked.push(film);
  await refresh();
  if (button) list.querySelectorAll("button")[place]?.focus({ preventScroll: true });
}

function showTaste() {
  find("taste").replaceChildren(...liked.map((film) => {
    const forget = element("button", { type: "button", textContent: "×", onclick: () => drop(film) });
    forget.setAttribute("aria-label", `Forget ${film.title}`);
    return element("li", {}, element("span", { textContent: film.title }), forget);
  }));
  find("empty").hidden = liked.length > 0;
  find("clear").hidden = !liked.length;
}

function drop(film) {
  liked = liked.filter((other) => other !== film);
  search.focus();
  refresh();
}

find("clear").addEventListener("click", () => { [liked, order] = [[], []]; search.focus(); refresh(); });

// The search field: the combobox pattern of the ARIA practices guide; arrows move, Enter takes, Escape closes.
let options = [], active = -1;

const folded = (text) => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();

// Films in whose title each word stands, the most popular first.
function matching(text) {
  const words = folded(text).split(/\s+/).filter(Boolean), matches = [];
  for (const film of popular) {
    if (words.every((word) => films[film].words.includes(word)) && matches.push(films[film]) === 8) break;
  }
  return matches;
}

function open() {
  active = -1;
  options = matching(search.value);
  const rows = options.map((film, i) => {
    const onmousedown = (event) => { event.preventDefault(); take(i); };
    const node = element("li", { id: `option-${i}`, role: "option", onmousedown }, film.title, element("small", { textContent: film.facts }));
    node.setAttribute("aria-selected", "false");
    return node;
  });
  found.replaceChildren(...(rows.length ? rows : [element("li", { className: "none", textContent: "Nothing found" })]));
  found.hidden = false;
  search.setAttribute("aria-expanded", "true");
  search.removeAttribute("aria-activedescendant");
}

function close() {
  found.hidden = true;
  search.setAttribute("aria-expanded", "false");
  search.removeAttribute("aria-activedescendant");
}

function choose(step) {
  if (!options.length) return;
  active = active < 0 && step < 0 ? options.length - 1 : (active + step + options.length) % options.length;
  [...found.children].forEach((node, i) => node.setAttribute("aria-selected", String(i === active)));
  found.children[active].scrollIntoView({ block: "nearest" });
  search.setAttribute("aria-activedescendant", `option-${active}`);
}

function take(i) {
  search.value = "";
  close();
  add(options[i]);
}

search.addEventListener("input", open);
search.addEventListener("focus", open);
search.addEventListener("blur", close);
search.addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    if (found.hidden) open();
    else choose(event.key === "ArrowDown" ? 1 : -1);
  } else if (event.key === "Enter" && !found.hidden) {
    event.preventDefault();
    if (options.length) take(Math.max(active, 0));
  } else if (event.key === "Escape") close();
});
