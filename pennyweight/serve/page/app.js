// The page at /: whose taste (titles I like, or a user of the data), and the list that follows from it.
// Plain modules, no build step, nothing from the network but this service's own answers.

const find = (id) => document.getElementById(id);
const search = find("search"), found = find("found"), list = find("list"), status = find("status"), taste = find("taste");

const state = { mode: "liked", user: null, liked: [], order: [], asked: 0 };

async function call(path, body) {
  const options = body && { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  const response = await fetch(path, options || {}).catch(() => {
    throw new Error("The service does not answer. Is it still running?");
  });
  const answer = await response.json();
  if (answer.error) throw new Error([answer.error.message, answer.error.remedy].filter(Boolean).join(". "));
  return answer;
}

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

const facts = (item) => [item.year, ...item.genres].filter(Boolean).join(" · ");

function say(text, bad = false) {
  status.textContent = text;
  status.classList.toggle("bad", bad);
}

// The list. An answer that a newer question has overtaken is dropped.
async function refresh() {
  const asked = ++state.asked;
  list.setAttribute("aria-busy", "true");
  try {
    const started = performance.now();
    const answer = await question();
    if (asked !== state.asked) return;
    show(answer.items, answer.heading);
    showTaste(answer.history || []);
    say(`${answer.items.length} titles in ${Math.max(1, Math.round(performance.now() - started))} ms${answer.note || ""}`);
  } catch (error) {
    if (asked === state.asked) say(error.message, true);
  }
  if (asked === state.asked) list.removeAttribute("aria-busy");
}

async function question() {
  if (state.mode === "liked" && !state.liked.length) return { ...(await call("/items?k=10")), heading: "Popular, to start with" };
  if (state.mode === "user" && !state.user) return { ...(await call("/items?k=10")), heading: "Popular, until you choose a user" };
  const body = state.mode === "user" ? { user: state.user } : { liked: state.liked.map((item) => item.id) };
  const answer = await call("/recommend", body);
  const note = state.mode === "user" && !answer.known ? ", for somebody the model has not met" : "";
  return { ...answer, note, heading: state.mode === "user" ? `For user ${state.user}` : "For you" };
}

function show(items, heading) {
  find("answer").textContent = heading;
  const before = new Map(state.order.map((id, rank) => [id, rank]));
  list.replaceChildren(...items.map((item, rank) => row(item, rank, before)));
  state.order = items.map((item) => item.id);
}

function row(item, rank, before) {
  const climbed = before.has(item.id) ? before.get(item.id) - rank : 0;
  const fresh = before.size > 0 && !before.has(item.id);
  const mark = fresh ? "new" : climbed > 0 ? `▲ ${climbed}` : "";
  const like = element("button", { type: "button", textContent: "Like", onclick: () => liked(item, like) });
  like.setAttribute("aria-label", `Like ${item.title}`);
  const title = element("div", {}, element("span", { className: "title", textContent: item.title }));
  if (mark) title.append(element("span", { className: "moved", textContent: mark, title: fresh ? "not in the last list" : "places up" }));
  if (facts(item)) title.append(element("div", { className: "genres", textContent: facts(item) }));
  return element("li", { className: fresh ? "fresh" : "" }, element("span", { className: "rank", textContent: rank + 1 }), title, like);
}

// A like: stored for a user of the data; kept on this page alone otherwise.
async function liked(item, button) {
  button.disabled = true;
  try {
    if (state.mode === "user" && state.user) {
      await call("/events", { id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, user: state.user, item: item.id });
    } else {
      choose("liked");
      if (!state.liked.some((other) => other.id === item.id)) state.liked.push(item);
    }
    const place = [...list.querySelectorAll("button")].indexOf(button);
    await refresh();
    list.querySelectorAll("button")[place]?.focus({ preventScroll: true });
  } catch (error) {
    button.disabled = false;
    say(error.message, true);
  }
}

function showTaste(history) {
  const user = state.mode === "user";
  const items = user ? history.slice(0, 6) : state.liked;
  find("taste-title").textContent = user ? "Liked lately" : "Liked so far";
  taste.replaceChildren(...items.map((item) => chip(item, !user)));
  find("empty").hidden = items.length > 0 || user;
  find("taste-title").hidden = user && !items.length;
  find("clear").hidden = user || !items.length;
}

function chip(item, removable) {
  const node = element("li", {}, element("span", { textContent: item.title }));
  if (!removable) return node;
  const forget = element("button", { type: "button", textContent: "×", onclick: () => drop(item) });
  forget.setAttribute("aria-label", `Forget ${item.title}`);
  node.append(forget);
  return node;
}

function drop(item) {
  state.liked = state.liked.filter((other) => other.id !== item.id);
  search.focus();
  refresh();
}

// The search field: the combobox pattern of the ARIA practices guide; arrows move, Enter takes, Escape closes.
let options = [], active = -1, timer = 0, sought = 0, current = true; // current: the options are those of what is typed

async function suggest() {
  clearTimeout(timer);
  const user = state.mode === "user", mine = ++sought;
  try {
    const answer = await call(`/${user ? "users" : "items"}?k=8&q=${encodeURIComponent(search.value.trim())}`);
    if (mine !== sought || document.activeElement !== search) return;
    options = user ? answer.users : answer.items;
    current = true;
    open();
  } catch (error) {
    say(error.message, true);
  }
}

function open() {
  active = -1;
  const rows = options.map((option, i) => {
    const node = element("li", { id: `option-${i}`, onmousedown: (event) => { event.preventDefault(); take(i); } });
    node.setAttribute("role", "option");
    node.setAttribute("aria-selected", "false");
    node.append(option.title ?? `User ${option.id}`);
    const below = option.title === undefined ? (option.known ? "" : "new to the model") : facts(option);
    if (below) node.append(element("small", { textContent: below }));
    return node;
  });
  found.replaceChildren(...(rows.length ? rows : [element("li", { className: "none", textContent: "Nothing found" })]));
  found.hidden = false;
  search.setAttribute("aria-expanded", "true");
}

function close() {
  sought++;
  clearTimeout(timer);
  found.hidden = true;
  options = [];
  current = true;
  search.setAttribute("aria-expanded", "false");
  search.removeAttribute("aria-activedescendant");
}

function move(step) {
  if (!options.length) return;
  active = (active + step + options.length) % options.length;
  [...found.children].forEach((node, i) => node.setAttribute("aria-selected", String(i === active)));
  found.children[active].scrollIntoView({ block: "nearest" });
  search.setAttribute("aria-activedescendant", `option-${active}`);
}

function take(i) {
  const option = options[i];
  search.value = "";
  close();
  if (state.mode === "user") setUser(option.id);
  else if (!state.liked.some((other) => other.id === option.id)) state.liked.push(option);
  refresh();
}

function setUser(user) {
  state.user = user;
  state.order = [];
  history.replaceState(null, "", user === null ? "/" : `/?user=${encodeURIComponent(user)}`);
}

search.addEventListener("input", () => { current = false; clearTimeout(timer); timer = setTimeout(suggest, 120); });
search.addEventListener("focus", suggest);
search.addEventListener("blur", close);
search.addEventListener("keydown", async (event) => {
  const shut = found.hidden;
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    if (shut) suggest();
    else move(event.key === "ArrowDown" ? 1 : active < 0 ? 0 : -1);
  } else if (event.key === "Enter" && (!shut || !current)) {
    event.preventDefault();
    if (!current) await suggest();
    if (options.length) take(Math.max(active, 0));
  } else if (event.key === "Escape") close();
});

function choose(mode) {
  if (state.mode === mode) return;
  state.mode = mode;
  state.order = [];
  document.querySelector(`[name=mode][value=${mode}]`).checked = true;
  find("search-label").textContent = mode === "user" ? "Search a user" : "Search a title";
  search.value = "";
  setUser(null);
}

document.querySelectorAll("[name=mode]").forEach((radio) => radio.addEventListener("change", () => { choose(radio.value); refresh(); }));
find("clear").addEventListener("click", () => { state.liked = []; state.order = []; refresh(); search.focus(); });

const given = new URLSearchParams(location.search).get("user");
if (given) { choose("user"); setUser(given); }
refresh();
call("/health").then((health) => { find("about").textContent = `${health.model} · ${health.items.toLocaleString()} titles · ${(health.bytes / 1e6).toPrecision(2)} MB`; }).catch(() => {});
