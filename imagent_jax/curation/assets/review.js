"use strict";
// The page of a review. A decision is kept in localStorage with its id until the server confirms it, and sent again where the
// server does not answer; the server counts an id once. All text enters as text nodes, never as HTML.

const $ = (selector) => document.querySelector(selector);
const me = new URLSearchParams(location.search).get("reviewer") || "";
const PENDING = `review ${location.pathname} ${me}`, RETRY_MS = 400, STATUS_MS = 3000;
const REASONS = ["wrong answer", "another answer is right too", "vague or unclear", "one image is enough", "no image is needed", "wrong box", "not worth asking"];
const state = { order: [], mine: {}, uid: null, question: null, busy: false, zoom: null, disputed: 0, drawn: null };
const known = new Map(); // questions fetched, by uid

function h(tag, props, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "class") node.className = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const same = (a, b) => a.trim().toLowerCase() === b.trim().toLowerCase();

// ---- the server ------------------------------------------------------------------------------------------------------

/** JSON of the server, asked until it answers. A refusal is an error with its sentence. */
async function ask(path, options = {}, query = {}) {
  for (;;) {
    try {
      const reply = await fetch(`${path}?${new URLSearchParams({ reviewer: me, ...query })}`, { signal: AbortSignal.timeout(20000), ...options });
      const values = await reply.json();
      if (reply.status < 500) {
        $("#away").hidden = true;
        if (!reply.ok) throw Object.assign(new Error(values.error), { refused: true });
        return values;
      }
      $("#away").textContent = values.error;
    } catch (error) {
      if (error.refused) throw error;
    }
    $("#away").hidden = false;
    await sleep(RETRY_MS);
  }
}

const newId = () => [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

/** Send a decision; it stays in localStorage until the server has it. */
async function send(decision) {
  localStorage.setItem(PENDING, JSON.stringify(decision));
  try {
    return await ask("api/decide", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(decision) });
  } finally {
    localStorage.removeItem(PENDING);
  }
}

async function fetched(uid) {
  if (!known.has(uid)) {
    if (known.size > 20) known.delete(known.keys().next().value);
    known.set(uid, ask("api/question", {}, { uid }).then((question) => {
      const images = question.images.map((name) => Object.assign(new Image(), { src: `image/${encodeURIComponent(name)}` }));
      return Promise.all(images.map((image) => image.decode().catch(() => null))).then(() => ({ ...question, pictures: images }));
    }));
    known.get(uid).catch(() => known.delete(uid));
  }
  return known.get(uid);
}

// ---- progress --------------------------------------------------------------------------------------------------------

function showStatus(status) {
  const mine = Object.keys(state.mine).length, total = state.order.length;
  $("#who").textContent = me || "review";
  $("#bar").max = total || 1;
  $("#bar").value = mine;
  $("#count").textContent = `${mine} of ${total} ${state.adjudicator ? "disagreements " : ""}decided`;
  $("#others").textContent = Object.entries(status.progress).filter(([name]) => name !== me).map(([name, count]) => `${name} ${count}`).join(" · ");
  $("#agreement").replaceChildren(...status.agreement.flatMap(({ reviewers, questions, alike, kappa }) => [
    h("span", { class: "pair", title: `alike on ${alike} of ${questions}: Cohen's kappa of the verdicts` }, `${reviewers.join(" – ")} κ `,
      h("b", {}, kappa === null ? "–" : kappa.toFixed(2)), ` of ${questions}  `)]));
  if (state.adjudicator && status.disputed !== state.disputed) begin(false);
}

async function begin(go) {
  const status = await ask("api/start");
  Object.assign(state, { order: status.order, mine: status.mine, blindly: status.blind, adjudicator: status.adjudicator, disputed: status.disputed });
  known.clear(); // what others decided may be new
  showStatus(status);
  const here = decodeURIComponent(location.hash.slice(1));
  if (go || !state.question) await show(state.order.includes(here) ? here : undecided(-1));
}

/** The first question after a place without a decision of mine, or from the beginning; undefined: none. */
const undecided = (after) => [...state.order.slice(after + 1), ...state.order.slice(0, after + 1)].find((uid) => !state.mine[uid]);

// ---- a question ------------------------------------------------------------------------------------------------------

const boxes = (question, n) => (question.evidence || []).filter((e) => e.image === n).map(({ box: [l, t, r, b] }) => {
  const node = h("div", { class: "box" });
  for (const [side, value] of Object.entries({ left: l, top: t, width: r - l, height: b - t })) node.style.setProperty(side, `${value / 10}%`);
  return node;
});

function picture(question, n) {
  const image = question.pictures[n - 1].cloneNode();
  return h("div", { class: "picture", "data-image": n }, image, ...boxes(question, n));
}

/** Give every picture the largest size at which all fit. */
function layout() {
  const area = $("#images"), figures = [...area.querySelectorAll("figure")], count = figures.length;
  if (!count) return;
  const sizes = state.question.pictures.map((p) => [p.naturalWidth || 1, p.naturalHeight || 1]);
  const fit = (columns) => {
    const rows = Math.ceil(count / columns), w = (area.clientWidth - 40 - 14 * (columns - 1)) / columns, hh = (area.clientHeight - 28 - 10 * (rows - 1)) / rows - 22;
    return sizes.map(([iw, ih]) => Math.max(0.01, Math.min(w / iw, hh / ih)));
  };
  const areaOf = (columns) => fit(columns).reduce((sum, scale, i) => sum + scale * scale * sizes[i][0] * sizes[i][1], 0);
  const columns = Array.from({ length: count }, (_, i) => i + 1).reduce((best, c) => (areaOf(c) > areaOf(best) ? c : best));
  area.style.setProperty("grid-template-columns", `repeat(${columns}, auto)`);
  fit(columns).forEach((scale, i) => {
    const style = figures[i].querySelector(".picture").style;
    style.setProperty("width", `${sizes[i][0] * scale}px`);
    style.setProperty("height", `${sizes[i][1] * scale}px`);
  });
}

function showImages(question) {
  $("#images").replaceChildren(...question.images.map((name, i) => h("figure", {}, picture(question, i + 1),
    h("figcaption", {}, h("b", {}, `Image ${i + 1}`), ` · ${question.pictures[i].naturalWidth ? question.pictures[i].naturalWidth + " × " + question.pictures[i].naturalHeight : "cannot be shown"}`))));
  layout();
}

const optionOf = (question, letter) => question.options["ABCDEFGHIJKLMNOPQRSTUVWXYZ".indexOf(letter.trim().toUpperCase())];
const told = (question, answer) => (question.options.length && optionOf(question, answer) !== undefined ? `${answer}. ${optionOf(question, answer)}` : answer);
const inWords = (changes) => Object.entries(changes).map(([name, value]) => `${name}: ${name === "evidence" ? lines(value).replaceAll("\n", "; ") : [].concat(value).join(" / ")}`).join(" · ");

function voice({ reviewer, verdict, reason, changes, own }) {
  return h("p", { class: "voice" }, h("b", {}, reviewer), ` ${verdict}`, reason && `: ${reason}`, changes && ` ${inWords(changes)}`, own && ` (answered ${own} blind)`);
}

async function show(uid) {
  closeForms();
  if (uid === undefined) return finished();
  state.uid = uid;
  delete $("#page").dataset.ready;
  const question = await fetched(uid);
  if (state.uid !== uid) return; // gone on meanwhile
  state.question = question;
  history.replaceState(null, "", `${location.search}#${encodeURIComponent(uid)}`);
  draw();
  const next = undecided(state.order.indexOf(uid));
  if (next !== undefined && next !== uid) fetched(next).catch(() => {});
}

function draw() {
  const question = state.question, mine = question.mine;
  for (const node of [$("#images"), $("aside")]) node.hidden = false;
  $(".done")?.remove();
  showImages(question);
  $("#crumbs").textContent = `${state.order.indexOf(question.uid) + 1} of ${state.order.length} · ${question.kind} · ${question.several ? "needs several images" : "one image"} · ${question.uid}`;
  $("#text").textContent = question.text;
  $("#options").replaceChildren(...question.options.map((option, i) => h("li", { class: !question.hidden && optionOf(question, question.answer) === option && "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[i] === question.answer && "claimed" }, option)));
  $("#blind").hidden = !question.hidden;
  $("#own").value = "";
  for (const node of [$("#claim"), $("#verdicts"), $("#history")]) node.hidden = question.hidden;
  $("#voices").replaceChildren(...(question.others || []).map(voice), ...(mine ? [voice({ reviewer: "You", ...mine })] : []));
  for (const button of $("#verdicts").children) button.classList.toggle("mine", mine !== null && mine !== undefined && button.textContent.startsWith(mine.verdict));
  if (!question.hidden) {
    $("#claim").replaceChildren(h("dt", {}, "claimed answer"), h("dd", { class: "answer" }, told(question, question.answer)),
      ...(question.own ? [h("dt", {}, "your answer"), h("dd", { class: same(question.own, question.answer) ? "same" : "other" }, told(question, question.own))] : []),
      ...(question.evidence.length ? [h("dt", {}, "rests on"), h("dd", {}, [...new Set(question.evidence.map((e) => `Image ${e.image}`))].join(", "))] : []));
    $("#history div").replaceChildren(...question.history.map(({ by, what, facts }) => h("p", {}, h("b", {}, by), ` ${what}`, Object.keys(facts).length > 0 && ` ${JSON.stringify(facts)}`)));
  }
  $("aside").scrollTop = 0;
  if (question.hidden) $("#own").focus();
  else document.activeElement?.blur();
  $("#page").dataset.ready = question.uid + (question.hidden ? "?" : "");
}

function finished() {
  Object.assign(state, { uid: null, question: null });
  for (const node of [$("#images"), $("aside")]) node.hidden = true;
  $(".done")?.remove();
  $("#page").append(h("p", { class: "done" }, state.order.length ? `All ${state.order.length} are decided. Press k to look at the last one again.`
    : state.adjudicator ? "Nobody disagrees so far. This page looks again every few seconds." : "There is no question."));
  $("#page").dataset.ready = "done";
}

// ---- decisions -------------------------------------------------------------------------------------------------------

function closeForms() {
  for (const form of [$("#reject"), $("#mend")]) form.hidden = true;
  $("#error").hidden = true;
  leaveZoom();
  document.body.classList.remove("mending");
  document.activeElement?.blur();
}

function complain(error) {
  $("#error").textContent = error.message;
  $("#error").hidden = false;
}

async function decide(verdict, facts = {}) {
  const question = state.question;
  if (state.busy || !question || question.hidden) return;
  state.busy = true;
  try {
    const status = await send({ id: newId(), uid: question.uid, content: question.content, verdict, ...facts });
    state.mine[question.uid] = verdict;
    known.delete(question.uid);
    showStatus(status);
    await show(undecided(state.order.indexOf(question.uid)));
  } catch (error) {
    complain(error);
  } finally {
    state.busy = false;
  }
}

async function answer() {
  const question = state.question, own = $("#own").value;
  if (state.busy || !own.trim()) return;
  state.busy = true;
  try {
    const reply = await send({ id: newId(), uid: question.uid, content: question.content, verdict: "answer", answer: own.trim() });
    known.delete(question.uid);
    state.question = { ...reply.question, pictures: question.pictures };
    draw();
  } catch (error) {
    complain(error);
  } finally {
    state.busy = false;
  }
}

const lines = (evidence) => evidence.map((e) => [e.image, ...e.box].join(" ")).join("\n");
const split = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);
const typed = () => split($("#new-evidence").value).map((line) => line.split(/[\s,]+/).map(Number)).map(([image, ...box]) => ({ image, box }));

function openMend() {
  const { text, options, answer: claimed, evidence } = state.question;
  closeForms();
  $("#new-text").value = text;
  $("#new-options").value = options.join("\n");
  $("#new-answer").value = claimed;
  $("#new-evidence").value = lines(evidence);
  $("#mend").hidden = false;
  document.body.classList.add("mending");
  $("#new-text").focus();
}

function saveMend() {
  const was = state.question, changes = {}, options = split($("#new-options").value);
  if ($("#new-text").value.trim() !== was.text) changes.text = $("#new-text").value;
  if ($("#new-answer").value.trim() !== was.answer) changes.answer = $("#new-answer").value;
  if (options.join("\n") !== was.options.join("\n")) changes.options = options;
  if (split($("#new-evidence").value).join("\n") !== lines(was.evidence)) {
    changes.evidence = typed();
    if (changes.evidence.some(({ image, box }) => box.length !== 4 || [image, ...box].some((x) => !Number.isInteger(x)))) {
      return complain(new Error("A line of boxes has five whole numbers: image left top right bottom."));
    }
  }
  decide("mend", { changes });
}

function leaveMend() {
  closeForms();
  showImages(state.question);
}

$("#new-evidence").addEventListener("input", () => showImages({ ...state.question, evidence: typed().filter((e) => e.box.length === 4) }));
$("#mend").addEventListener("submit", (event) => { event.preventDefault(); saveMend(); });
$("#blind").addEventListener("submit", (event) => { event.preventDefault(); answer(); });
$("#reject").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("#reason").value.trim()) decide("reject", { reason: $("#reason").value.trim() });
});
$("#reasons").append(...REASONS.map((reason) => h("li", {}, reason)));
$("#reason").addEventListener("keydown", (event) => {
  if (!$("#reason").value && REASONS[Number(event.key) - 1]) {
    event.preventDefault();
    decide("reject", { reason: REASONS[Number(event.key) - 1] });
  }
});

// ---- zoom ------------------------------------------------------------------------------------------------------------

function zoom(n) {
  const question = state.question;
  if (!question || n < 1 || n > question.images.length) return;
  const { naturalWidth: w, naturalHeight: hh } = question.pictures[n - 1], fit = Math.min(innerWidth / w, innerHeight / hh);
  const first = (question.evidence || []).find((e) => e.image === n), [l, t, r, b] = first ? first.box : [0, 0, 1000, 1000];
  state.zoom = { n, w, h: hh, fit, scale: fit, x: ((l + r) / 2000) * w, y: ((t + b) / 2000) * hh };
  const frame = picture(question, n);
  frame.style.setProperty("width", `${w}px`);
  frame.style.setProperty("height", `${hh}px`);
  $("#zoom .picture").replaceWith(frame);
  $("#zoom").hidden = false;
  place();
}

/** Put the zoomed picture so that its point (x, y) is in the middle; at its whole size the picture is in the middle. */
function place() {
  const z = state.zoom, whole = z.scale <= z.fit * 1.001, x = whole ? z.w / 2 : z.x, y = whole ? z.h / 2 : z.y, style = $("#zoom .picture").style;
  style.setProperty("transform", `translate(${innerWidth / 2 - x * z.scale}px, ${innerHeight / 2 - y * z.scale}px) scale(${z.scale})`);
  $("#zoom").style.setProperty("--scale", z.scale);
  $("#zoom-name").textContent = `Image ${z.n} · ${(z.scale * 100).toFixed(0)} %`;
}

function scaleBy(factor) {
  state.zoom.scale = Math.min(40, Math.max(state.zoom.fit, state.zoom.scale * factor));
  place();
}

function move(right, down) {
  const z = state.zoom, step = Math.min(innerWidth, innerHeight) / 5 / z.scale;
  z.x = Math.min(z.w, Math.max(0, z.x + right * step));
  z.y = Math.min(z.h, Math.max(0, z.y + down * step));
  place();
}

function leaveZoom() {
  state.zoom = null;
  $("#zoom").hidden = true;
}

const IN_ZOOM = {
  "+": () => scaleBy(1.5), "=": () => scaleBy(1.5), "-": () => scaleBy(1 / 1.5), 0: () => scaleBy(0), Escape: leaveZoom,
  ArrowLeft: () => move(-1, 0), ArrowRight: () => move(1, 0), ArrowUp: () => move(0, -1), ArrowDown: () => move(0, 1),
};

// ---- keys and the mouse ----------------------------------------------------------------------------------------------

function step(by) {
  const at = state.uid ? state.order.indexOf(state.uid) + by : by < 0 ? state.order.length - 1 : 0;
  if (!state.busy && state.order[at] !== undefined) show(state.order[at]);
}

const KEYS = {
  a: () => decide("accept"), u: () => decide("unsure"),
  m: () => state.question && !state.question.hidden && openMend(),
  r: () => {
    if (!state.question || state.question.hidden) return;
    closeForms();
    $("#reason").value = "";
    $("#reject").hidden = false;
    $("#reason").focus();
  },
  j: () => step(1), k: () => step(-1), ArrowRight: () => step(1), ArrowLeft: () => step(-1),
  g: () => !state.busy && show(undecided(-1)), b: () => document.body.classList.toggle("bare"),
  h: () => { $("#history").open = !$("#history").open; },
  Enter: () => state.question?.hidden && $("#own").focus(), "?": () => $("#help").showModal(), Escape: () => state.question && leaveMend(),
};

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, textarea");
  if (event.key === "Enter" && event.ctrlKey && !$("#mend").hidden) return saveMend();
  if (event.key === "Escape" && typing) return $("#blind").hidden ? leaveMend() : event.target.blur();
  if (typing || event.ctrlKey || event.metaKey || event.altKey || $("#help").open) return;
  if (event.key === "Enter" && event.target.matches("button, summary")) return;
  const digit = /^[1-9]$/.test(event.key) && (() => zoom(Number(event.key)));
  const act = (state.zoom && Object.hasOwn(IN_ZOOM, event.key) && IN_ZOOM[event.key]) || digit || (Object.hasOwn(KEYS, event.key) && KEYS[event.key]);
  if (!act || event.repeat && "amru".includes(event.key)) return;
  event.preventDefault();
  act();
});
document.addEventListener("click", (event) => {
  const key = event.target.closest("[data-key]")?.dataset.key, frame = event.target.closest("#images .picture");
  if (key) KEYS[key]();
  else if (frame && $("#mend").hidden) zoom(Number(frame.dataset.image));
});
$("#ask").addEventListener("click", () => $("#help").showModal());
$("#zoom").addEventListener("wheel", (event) => scaleBy(event.deltaY < 0 ? 1.2 : 1 / 1.2), { passive: true });
$("#zoom").addEventListener("pointermove", (event) => {
  if (!event.buttons) return;
  Object.assign(state.zoom, { x: state.zoom.x - event.movementX / state.zoom.scale, y: state.zoom.y - event.movementY / state.zoom.scale });
  place();
});

/** Where the mouse is on a picture, in thousandths. */
function spot(frame, event) {
  const { left, top, width, height } = frame.getBoundingClientRect(), within = (x) => Math.round(Math.min(1000, Math.max(0, x)));
  return [within((1000 * (event.clientX - left)) / width), within((1000 * (event.clientY - top)) / height)];
}
$("#images").addEventListener("pointerdown", (event) => {
  const frame = event.target.closest(".picture");
  if (frame && !$("#mend").hidden) state.drawn = { frame, from: spot(frame, event) };
});
document.addEventListener("pointerup", (event) => {
  if (!state.drawn) return;
  const { frame, from: [x, y] } = state.drawn, [u, v] = spot(frame, event), area = $("#new-evidence");
  state.drawn = null;
  if (Math.abs(u - x) < 4 || Math.abs(v - y) < 4) return;
  area.value = [...split(area.value), [frame.dataset.image, Math.min(x, u), Math.min(y, v), Math.max(x, u), Math.max(y, v)].join(" ")].join("\n");
  area.dispatchEvent(new Event("input"));
});
window.addEventListener("resize", () => { if (state.question) layout(); if (state.zoom) place(); });

// ---- start -----------------------------------------------------------------------------------------------------------

(async () => {
  try {
    const pending = localStorage.getItem(PENDING);
    if (pending) {
      await send(JSON.parse(pending)).catch(() => {}); // refused: its question has changed
      history.replaceState(null, "", location.search); // go on with the next one
    }
    await begin(true);
    for (;;) {
      await sleep(STATUS_MS);
      if (!state.busy) showStatus(await ask("api/status"));
    }
  } catch (error) {
    document.body.replaceChildren(h("p", { class: "done" }, error.message));
  }
})();
