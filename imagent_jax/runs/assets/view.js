"use strict";
// The page of a run. RUN (data/index.js) has one row a trajectory; whole records come in chunks, one script a log file,
// because a page opened from disk may load scripts but not fetch files. All text enters as text nodes, never as HTML.

const $ = (selector) => document.querySelector(selector);
const rows = RUN.rows.map((values, at) => ({ at, ...Object.fromEntries(RUN.fields.map((name, i) => [name, values[i]])) }));
const chunkOf = (row) => RUN.chunks[row.chunk];
const taskOf = (row) => RUN.tasks[row.task];
const nameOf = (row) => `${chunkOf(row).name}/${row.line}`;
const byName = new Map(rows.map((row) => [nameOf(row), row]));
const state = { row: null, group: false, shown: rows, said: null };

function h(tag, props, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "style") for (const [k, v] of Object.entries(value)) node.style.setProperty(k, v);
    else if (key === "class") node.className = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
const number = (x, digits = 2) => (x === null || x === undefined ? "–" : (x < 0 ? "−" : "") + Math.abs(x).toFixed(digits));
const mark = (right) => h("span", { class: right ? "right" : "wrong", title: right ? "right" : "wrong" }, right ? "✓" : "✗");
const words = (name) => name.toLowerCase().replaceAll("_", " ");
const fact = (label, value, props) => h("span", { class: "fact", ...props }, `${label} `, h("b", {}, value));

// ---- data ------------------------------------------------------------------------------------------------------------

const chunks = new Map(), waiting = new Map(), files = new Map();

function CHUNK(name, records) {
  waiting.get(name)(records);
}

function load(index) {
  const { name } = RUN.chunks[index];
  if (!chunks.has(name)) {
    chunks.set(name, new Promise((resolve, reject) => {
      waiting.set(name, resolve);
      document.head.append(Object.assign(document.createElement("script"), { src: `data/${encodeURIComponent(name)}.js`, onerror: reject }));
    }));
  }
  return chunks.get(name);
}
const record = async (row) => (await load(row.chunk))[row.line];

function file(name) {
  if (!files.has(name)) {
    const image = new Image();
    image.src = `images/${name}`;
    files.set(name, image.decode().then(() => image));
  }
  return files.get(name);
}

// ---- images: a crop is drawn from its source -------------------------------------------------------------------------

/** Where image `n` lies in a file: {file, box}, following crops and views up to pixels that were saved. */
function source(images, n) {
  const image = images[n - 1];
  if (image.file) return { file: image.file, box: [0, 0, ...image.size] };
  const up = source(images, image.parent);
  return image.box ? { file: up.file, box: shift(image.box, up.box) } : up;
}
const shift = (box, by) => [box[0] + by[0], box[1] + by[1], box[2] + by[0], box[3] + by[1]];

/** The box of image `m` in pixels of image `n`, one of those it was made from; null where there is none. */
function within(images, m, n) {
  const image = images[m - 1];
  if (m === n) return [0, 0, ...image.size];
  if (!image.parent) return null;
  const up = within(images, image.parent, n), parent = images[image.parent - 1];
  const same = image.size.join() === parent.size.join();
  return up && (image.box || same) ? shift(image.box || [0, 0, ...image.size], up) : null;
}

const lineage = (images, n) => {
  const { parent, origin } = images[n - 1];
  return [h("b", {}, `Image ${n}`), parent ? `: ${origin || "made"} of Image ${parent}` : origin ? `: ${origin}` : ""];
};

/** Boxes over image `n`: those of `made` (default: all images cut out of it). */
function boxesOver(images, n, made) {
  const numbers = made || images.map((_, i) => i + 1).filter((m) => m !== n && images[m - 1].box);
  return numbers.map((m) => ({ box: within(images, m, n), label: m, image: m })).filter(({ box }) => box);
}

function picture(images, n, side, boxes) {
  const image = images[n - 1], { file: name, box } = source(images, n), [w, hh] = image.size;
  const scale = side / Math.max(w, hh), seen = $("#pixels").value === "seen";
  const cap = Math.min(1, 1024 / Math.max(w, hh));
  const [cw, ch] = seen ? image.shown : [Math.round(w * cap), Math.round(hh * cap)];
  const canvas = h("canvas", { width: cw, height: ch });
  file(name).then((pixels) => {
    const pen = canvas.getContext("2d");
    pen.imageSmoothingQuality = "high";
    pen.drawImage(pixels, box[0], box[1], box[2] - box[0], box[3] - box[1], 0, 0, cw, ch);
    canvas.dataset.drawn = name;
  }, () => canvas.replaceWith(h("span", { class: "small" }, `images/${name} is missing`)));
  const labels = []; // [x, y] of those set, so that no label covers another
  return h("div", { class: seen ? "picture seen" : "picture", "data-image": n, style: { width: `${w * scale}px`, height: `${hh * scale}px` } },
    canvas,
    boxes.map(({ box: [l, t, r, b], label, kind, image: m }) => {
      const above = t * scale > 16, y = above ? t * scale : b * scale;
      let x = l * scale;
      while (labels.some(([a, c]) => Math.abs(a - x) < 15 && Math.abs(c - y) < 14)) x += 15;
      labels.push([x, y]);
      return h("div", {
        class: `box ${kind || ""}`, "data-box": m,
        style: { left: `${(100 * l) / w}%`, top: `${(100 * t) / hh}%`, width: `${(100 * (r - l)) / w}%`, height: `${(100 * (b - t)) / hh}%` },
      }, h("span", { class: above ? "above" : "", style: { left: `${x - l * scale - 2}px` } }, `${label}`));
    }));
}

function figure(images, n, side) {
  const { size, shown, parent, box } = images[n - 1];
  const from = parent && box ? [picture(images, parent, side * 0.8, boxesOver(images, parent, [n])), h("span", { class: "arrow" }, "→")] : [];
  return h("figure", {}, ...from, picture(images, n, side, boxesOver(images, n)),
    h("figcaption", {}, lineage(images, n), ` · ${size.join(" × ")}, seen at ${shown.join(" × ")}`));
}

// ---- tokens ----------------------------------------------------------------------------------------------------------

/** Why a token does not train; "" where it does. */
function excuse(t, i) {
  const { kind, kept } = t.tokens;
  if (kind[i] === "4") return "shown, not sampled";
  if (!kept) return "an evaluation: nothing trains";
  return kept[i] === "1" ? "" : t.dropped ? `trajectory dropped: ${words(t.end)}` : `${words(RUN.kinds[kind[i]])} dropped`;
}

function token(t, i) {
  const { text, kind, kept, logprob, repeat } = t.tokens, count = repeat[i];
  const dropped = kept ? kept[i] === "0" : kind[i] === "4";
  const special = /^<\|.*\|>$/.test(text[i]) ? " special" : /^\n+$/.test(text[i]) ? " newline" : "";
  return h("span", {
    class: `tok k${kind[i]} ${dropped ? "dropped" : "kept"}${special}`, "data-i": i,
    style: { "--p": Math.min(1, -logprob[i] / 3).toFixed(3) },
  }, count ? `${text[i]}×${count}` : text[i]);
}

function tokens(t, start, stop) {
  const node = h("div", { class: "tokens" }, Array.from({ length: stop - start }, (_, i) => token(t, start + i)));
  node.trajectory = t;
  return node;
}

function tip(t, i) {
  const { ids, text, kind, logprob, kept, ratio } = t.tokens, lines = [`${JSON.stringify(text[i])}   id ${ids[i]}`];
  const why = excuse(t, i);
  lines.push(`${words(RUN.kinds[kind[i]])} · ${why || "trains"}`);
  if (kind[i] !== "4") lines.push(`log-prob ${number(logprob[i], 4)}   p ${(100 * Math.exp(logprob[i])).toFixed(1)} %`);
  if (kept && kind[i] !== "4") lines.push(`advantage ${number(t.advantage, 3)}${why ? " (no gradient)" : ""}`);
  if (ratio && kind[i] !== "4") lines.push(`ratio ${number(ratio[i], 4)}`);
  return lines.join("\n");
}

// ---- a trajectory as a conversation ----------------------------------------------------------------------------------

/** [start, stop) of sampled and of shown tokens, in turn. */
function spans(kind) {
  const found = [];
  for (let i = 0; i < kind.length; i++) {
    const shown = kind[i] === "4", last = found.at(-1);
    if (last && last.shown === shown) last.stop = i + 1;
    else found.push({ shown, start: i, stop: i + 1 });
  }
  return found;
}

function outcome(call) {
  const name = h("b", {}, call.name || "unreadable call");
  if (call.status === "EXECUTED") return [name, " ran"];
  if (call.status === "INVALID") return [name, ": ", h("span", { class: "bad" }, "invalid"), ` · ${call.said.join(" ")}`];
  return [name, ": ", h("span", { class: "bad" }, "fault of the world"), h("pre", {}, call.error || "")];
}

/** The arguments of a call that are programs or have several lines: in the tokens, their line ends are "\\n". */
const programs = (call) => Object.entries(call.arguments || {})
  .filter(([name, value]) => typeof value === "string" && (name === "code" || value.includes("\n")))
  .map(([name, value]) => h("pre", { class: "code", title: name }, value));

function conversation(t, side) {
  const all = spans(t.tokens.kind), parts = [];
  t.turns.forEach((turn, i) => {
    const at = all.findIndex((span, j) => !span.shown && all.slice(0, j).filter((s) => !s.shown).length === i);
    if (at < 0) return;
    parts.push(h("section", { class: "turn" }, h("div", { class: "who" }, "policy"), tokens(t, all[at].start, all[at].stop)));
    if (!turn.call) return;
    const answer = all[at + 1];
    const said = turn.call.status === "EXECUTED" ? turn.call.said.filter((line) => !turn.call.images.some((n) => line === `Image ${n}` || line.startsWith(`Image ${n}:`))) : [];
    parts.push(h("section", { class: "turn" }, h("div", { class: "who" }, "tool"), h("div", {},
      programs(turn.call),
      h("div", { class: "status" }, outcome(turn.call)),
      said.map((line) => h("pre", {}, line)),
      turn.call.images.length > 0 && h("div", { class: "shown" }, turn.call.images.map((n) => figure(t.images, n, side))),
      answer ? h("details", {}, h("summary", {}, "the tokens shown"), tokens(t, answer.start, answer.stop))
        : h("div", { class: "small" }, "Not shown: the trajectory ended here."))));
  });
  return parts;
}

const legend = () => [["k0", "text"], ["k1", "tool call"], ["k2", "invalid call"], ["k3", "answer"], ["k4", "observation"], ["k1 dropped", "dropped by the mask"]]
  .map(([kind, label]) => h("span", { class: `tok ${kind}` }, ` ${label} `));

function facts(t) {
  const { total, ...parts } = t.rewards, calls = t.turns.filter((turn) => turn.call);
  const counts = ["EXECUTED", "INVALID", "FAULT"].map((s) => [s, calls.filter((turn) => turn.call.status === s).length]).filter(([, c]) => c);
  return h("div", { class: "facts" },
    total !== undefined && fact("reward", number(total), { title: Object.entries(parts).map(([k, v]) => `${k} ${number(v)}`).join("\n") }),
    t.advantage !== null && fact("advantage", number(t.advantage)),
    fact("end", words(t.end)), t.dropped && h("span", { class: "fact warn" }, "dropped by the mask"),
    counts.length ? counts.map(([status, c]) => fact("calls", `${c} ${words(status)}`)) : fact("calls", "none"),
    fact("tokens", t.length));
}

const given = (images) => images.map((_, i) => i + 1).filter((n) => !images[n - 1].parent && !images[n - 1].origin);
const heldOut = (row) => chunkOf(row).split === "held-out";
const elsewhere = (row) => rows.filter((other) => other.task === row.task && heldOut(other) === heldOut(row) && (heldOut(row) || other.chunk === row.chunk));
const labelOf = (row) => (heldOut(row) ? chunkOf(row).label : `rollout ${row.rollout}`);

function head(row, mates) {
  const task = taskOf(row);
  return [
    h("div", { class: "crumbs" }, `${chunkOf(row).split} · ${chunkOf(row).label} · ${task[1] ? `${task[1]} · ` : ""}${task[0]}`),
    h("h2", { class: "question" }, task[2]),
    mates.length > 1 && h("div", { class: "facts" }, h("a", { class: `fact${state.group ? " here" : ""}`, href: link(row, !state.group) }, "side by side"),
      mates.map((mate) => h("a", { class: `fact${mate === row && !state.group ? " here" : ""}`, href: link(mate) }, mark(mate.right), ` ${labelOf(mate)}`))),
  ];
}

/** What the data set says of a task besides the question, which no policy sees: its history, event by event, and the rest. */
function known({ history, ...others }) {
  const events = Array.isArray(history) ? history : [], rest = events.length || history === undefined ? others : { history, ...others };
  return h("details", { class: "known" }, h("summary", {}, events.length ? "how this question came to be" : "facts of the task"),
    events.length > 0 && h("ol", {}, events.map((event) => h("li", {}, h("b", {}, event.by), ` ${event.what} `,
      Object.entries(event.facts || {}).map(([name, value]) => h("span", { class: "small" }, `${name} ${typeof value === "string" ? value : JSON.stringify(value)} · `))))),
    Object.keys(rest).length > 0 && h("pre", {}, JSON.stringify(rest, null, 1)));
}

function trajectory(row, t) {
  return [
    ...head(row, elsewhere(row)),
    h("div", { class: "verdict" }, h("span", { class: "said" }, mark(t.right), ` ${t.answer ?? "no answer"}`), h("span", {}, "truth ", h("b", {}, t.truth))),
    facts(t), t.error && h("pre", {}, t.error),
    h("div", { class: "gallery" }, given(t.images).map((n) => figure(t.images, n, 240))), t.facts && known(t.facts),
    ...conversation(t, 170), h("p", { class: "legend key" }, legend()),
  ];
}

// ---- the rollouts of a task side by side -----------------------------------------------------------------------------

function advantageBar(advantage, widest) {
  const share = (50 * Math.abs(advantage)) / (widest || 1);
  return h("div", { class: "bar", title: `advantage ${number(advantage)}` }, h("i", { style: {
    left: `${advantage < 0 ? 50 - share : 50}%`, width: `${share}%`, background: advantage < 0 ? "var(--bad)" : "var(--good)" } }));
}

function group(row, mates, records) {
  const widest = Math.max(...mates.map((mate) => Math.abs(mate.advantage || 0)));
  const rewards = mates.map((mate) => mate.reward).filter((x) => x !== null), mean = rewards.reduce((a, b) => a + b, 0) / rewards.length;
  const spread = Math.sqrt(rewards.reduce((a, b) => a + (b - mean) ** 2, 0) / rewards.length);
  const images = records[0].images, over = (n) => records.flatMap((t, i) => boxesOver(t.images, n)
    .map((b) => ({ ...b, image: `${i}-${b.image}`, label: heldOut(row) ? mates[i].rollout || chunkOf(mates[i]).label : mates[i].rollout, kind: t.right ? "right" : "wrong" })));
  return [
    ...head(row, mates),
    h("div", { class: "facts" }, fact("truth", records[0].truth), fact("right", `${mates.filter((mate) => mate.right).length} of ${mates.length}`),
      rewards.length > 0 && fact("reward", `${number(mean)} ± ${number(spread)}`)),
    h("div", { class: "gallery" }, given(images).map((n) => h("figure", {}, picture(images, n, 220, over(n)), h("figcaption", {}, lineage(images, n))))), records[0].facts && known(records[0].facts),
    h("div", { class: "columns" }, mates.map((mate, i) => h("div", { class: `column${mate.right ? " good" : ""}${mate === row ? " here" : ""}` },
      h("h3", {}, h("a", { href: link(mate) }, labelOf(mate)), h("span", {}, mark(mate.right), ` ${mate.answer ?? "no answer"}`)),
      mate.advantage !== null && advantageBar(mate.advantage, widest),
      h("div", { class: "small" }, mate.reward !== null && `reward ${number(mate.reward)} · advantage ${number(mate.advantage)}`,
        mate.end !== "ANSWERED" && h("span", { class: "end" }, ` ${words(mate.end)}`)),
      conversation(records[i], 92)))),
  ];
}

// ---- the list and its filters ----------------------------------------------------------------------------------------

const link = (row, grouped) => `#${grouped ? "group/" : ""}${encodeURI(nameOf(row))}`;

function fill(id, any, entries) {
  $(`#${id}`).append(...[["", any], ...entries].map(([value, label]) => h("option", { value }, label ?? value)));
}

function matches(row, f) {
  const chunk = chunkOf(row), task = taskOf(row);
  if (f.where && f.where !== chunk.split && f.where !== chunk.name) return false;
  if (f.outcome && (f.outcome === "right") !== Boolean(row.right)) return false;
  if (f.end && row.end !== f.end) return false;
  if (f.kind && task[1] !== f.kind) return false;
  if (f.tool === "?none" && row.executed + row.invalid + row.faulted) return false;
  if (f.tool === "?any" && !row.executed) return false;
  if (f.tool === "?invalid" && !row.invalid) return false;
  if (f.tool === "?fault" && !row.faulted) return false;
  if (f.tool && f.tool[0] !== "?" && !row.tools.includes(RUN.tools.indexOf(f.tool))) return false;
  if ((f.low !== "" || f.high !== "") && row.reward === null) return false;
  if (f.low !== "" && row.reward < Number(f.low) - 1e-9) return false;
  if (f.high !== "" && row.reward > Number(f.high) + 1e-9) return false;
  if (!f.search) return true;
  const text = [task[0], task[1], task[2], task[3], row.answer ?? "", state.said ? state.said[row.at] : ""].join("\n").toLowerCase();
  return f.search.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}

function list() {
  const ids = ["search", "where", "outcome", "tool", "end", "kind", "low", "high"], f = {};
  for (const id of ids) {
    f[id] = $(`#${id}`).value.trim();
    $(`#${id}`).classList.toggle("set", f[id] !== "");
  }
  state.shown = rows.filter((row) => matches(row, f));
  const right = state.shown.filter((row) => row.right).length, part = document.createDocumentFragment();
  $("#count").value = `${state.shown.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")}` + (state.shown.length ? ` · ${((100 * right) / state.shown.length).toFixed(0)} % right` : "");
  const tallies = new Map();
  for (const row of state.shown) {
    const tally = tallies.get(row.chunk) || [0, 0];
    tallies.set(row.chunk, [tally[0] + Boolean(row.right), tally[1] + 1]);
  }
  let chunk = null, task = null;
  for (const row of state.shown) {
    if (row.chunk !== chunk) {
      const [good, count] = tallies.get(row.chunk);
      part.append(h("h2", {}, h("span", {}, `${chunkOf(row).split} · ${chunkOf(row).label}`), h("span", {}, `${good}/${count} right`)));
    }
    if (row.chunk !== chunk || row.task !== task) part.append(h("h3", {}, taskOf(row)[2], h("small", {}, `  ${taskOf(row)[3]}`)));
    [chunk, task] = [row.chunk, row.task];
    const calls = row.executed + row.invalid + row.faulted;
    row.node = h("a", { class: `row${row === state.row ? " here" : ""}`, href: link(row), "data-at": row.at }, mark(row.right), h("b", {}, row.answer ?? "no answer"),
      row.end !== "ANSWERED" ? h("span", { class: "end" }, words(row.end)) : h("span", {}, calls ? `${calls} call${calls > 1 ? "s" : ""}` : ""),
      h("span", {}, row.reward === null ? "" : number(row.reward)));
    part.append(row.node);
  }
  if (!state.shown.length) part.append(h("p", { class: "empty" }, rows.length ? "Nothing matches; clear a filter." : "No trajectories were logged; set run.log_trajectories above 0."));
  $("#list").replaceChildren(part);
}

async function searchSaid() {
  const all = await Promise.all(RUN.chunks.map((_, index) => load(index)));
  state.said = rows.map((row) => all[row.chunk][row.line].turns.map((turn) => turn.text + (turn.call?.said || []).join("\n")).join("\n"));
  list();
}

// ---- moving about ----------------------------------------------------------------------------------------------------

async function show() {
  const hash = decodeURI(location.hash.slice(1)), grouped = hash.startsWith("group/");
  const row = byName.get(grouped ? hash.slice(6) : hash) || state.shown[0];
  if (!row) return $("#page").replaceChildren();
  if (state.row?.node) state.row.node.classList.remove("here");
  Object.assign(state, { row, group: grouped });
  row.node?.classList.add("here");
  row.node?.scrollIntoView({ block: "nearest" });
  const mates = grouped ? elsewhere(row) : [row];
  const records = await Promise.all(mates.map(record));
  if (state.row !== row || state.group !== grouped) return; // gone on meanwhile
  const parts = grouped ? group(row, mates, records) : trajectory(row, records[0]);
  $("#page").replaceChildren(...parts.filter(Boolean));
  $("#page").classList.toggle("bylogprob", $("#colour").value === "logprob");
  $("#page").scrollTop = 0;
  $("#page").dataset.ready = hash || nameOf(row);
}

function go(by, wholeTask) {
  const at = state.shown.indexOf(state.row), same = (row) => row.chunk === state.row.chunk && row.task === state.row.task;
  let next = at < 0 ? 0 : at + by;
  if (wholeTask) {
    while (state.shown[next] && same(state.shown[next])) next += by;
    while (by < 0 && state.shown[next - 1] && state.shown[next - 1].task === state.shown[next]?.task && state.shown[next - 1].chunk === state.shown[next].chunk) next -= 1;
  }
  if (state.shown[next]) location.hash = link(state.shown[next], state.group);
}

function flip(id) {
  const select = $(`#${id}`);
  select.selectedIndex = 1 - select.selectedIndex;
  show();
}

const KEYS = {
  j: () => go(1, state.group), k: () => go(-1, state.group), J: () => go(1, true), K: () => go(-1, true),
  g: () => state.row && (location.hash = link(state.row, !state.group)),
  p: () => flip("colour"), v: () => flip("pixels"), "/": () => $("#search").select(), "?": () => $("#help").showModal(),
};

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, select, textarea");
  if (event.key === "Escape" && typing) event.target.blur();
  if (event.key === "Enter" && event.target.id === "search") searchSaid();
  if (typing || event.ctrlKey || event.metaKey || event.altKey || $("#help").open || !Object.hasOwn(KEYS, event.key)) return;
  event.preventDefault();
  KEYS[event.key]();
});
document.addEventListener("mouseover", (event) => {
  const tok = event.target.closest(".tok[data-i]"), cut = event.target.closest(".picture")?.dataset.image;
  const t = tok?.closest(".tokens").trajectory;
  $("#tip").hidden = !t;
  for (const box of document.querySelectorAll("[data-box]")) box.classList.toggle("hot", !state.group && box.dataset.box === (event.target.closest(".box")?.dataset.box || cut));
  if (!t) return;
  $("#tip").textContent = tip(t, Number(tok.dataset.i));
  const at = tok.getBoundingClientRect(), size = $("#tip").getBoundingClientRect();
  $("#tip").style.left = `${Math.min(at.left, innerWidth - size.width - 8)}px`;
  $("#tip").style.top = `${at.bottom + size.height + 12 > innerHeight ? at.top - size.height - 6 : at.bottom + 6}px`;
});
window.addEventListener("hashchange", show);
$("#filters").addEventListener("input", list);
$("#filters").addEventListener("submit", (event) => event.preventDefault());
$("#filters").addEventListener("reset", () => setTimeout(list));
for (const id of ["colour", "pixels"]) $(`#${id}`).addEventListener("change", show);
$("#ask").addEventListener("click", KEYS["?"]);

document.title = `${RUN.name}: trajectories`;
$("#name").textContent = RUN.name;
$("#about").textContent = RUN.about;
$("#report").hidden = !RUN.report;
$("#legend").append(...legend());
fill("where", "all steps", [["train"], ["held-out"], ...RUN.chunks.map((c) => [c.name, `${c.split} · ${c.label}`])]);
fill("outcome", "right and wrong", [["right"], ["wrong"]]);
fill("tool", "any calls", [["?none", "no call"], ["?any", "executed a call"], ...RUN.tools.map((name) => [name]), ["?invalid", "invalid call"], ["?fault", "faulted call"]]);
fill("end", "any end", [...new Set(rows.map((row) => row.end))].sort().map((end) => [end, words(end)]));
fill("kind", "any kind", [...new Set(RUN.tasks.map((task) => task[1]))].filter(Boolean).sort().map((kind) => [kind]));
list();
show();
