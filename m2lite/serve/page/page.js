/* The chat: asks, shows what comes, and beside it what it takes. */

import { Refused, ask, events, rememberKey } from "./client.js";
import { byId, bytes, count, element, number, seconds } from "./dom.js";
import { Grid, Touched } from "./experts.js";
import { AnswerTurn, userTurn } from "./turns.js";

const KEPT = "m2lite-chat"; // in this tab, so that it is there after a reload
const NEAR = 80; // CSS pixels from the end of the log at which it is followed

const grid = new Grid();
const question = byId("question");
const log = byId("log");
let shape = null; // of the model's experts
let turns = []; // AnswerTurn, or {message, node} of a question
let running = null; // what stops the answer under way
let follows = true; // whether the log stays at its end

// What is said

async function send() {
  const text = question.value.trim();
  if (!text || running) return;
  question.value = "";
  resize();
  addQuestion(text);
  await answer();
}

function addQuestion(text) {
  const turn = { message: { role: "user", content: text }, node: userTurn(text) };
  add(turn);
}

function addAnswer(message) {
  const look = () => {
    setPanel(true);
    show(turn);
  };
  const turn = new AnswerTurn(message, () => again(turn), look);
  turn.onUpdate = follow;
  add(turn);
  turn.update();
  return turn;
}

function add(turn) {
  byId("welcome").hidden = true;
  turns.push(turn);
  log.append(turn.node);
  follows = true;
  follow();
}

/** The answer is said anew, with other random numbers; what came behind it goes. */
async function again(turn) {
  if (running) return;
  for (const gone of turns.splice(turns.indexOf(turn))) gone.node.remove();
  question.focus();
  await answer({ seed: crypto.getRandomValues(new Uint32Array(1))[0] });
}

async function answer(more = {}) {
  const messages = turns.map((turn) => turn.message).filter(isKept).map(({ own, ...message }) => message);
  const turn = addAnswer({ role: "assistant", reasoning_content: "", content: "" });
  const stop = new AbortController();
  setRunning(stop);
  turn.begin();
  watch(turn, shape);
  const asked = {
    messages, stream: true, stream_options: { include_usage: true }, return_progress: true, return_experts: true,
    timings_per_token: true, ...(byId("thinks").checked ? {} : { reasoning_effort: "none" }), ...more,
  };
  try {
    const response = await ask("/v1/chat/completions", asked, stop.signal);
    for await (const chunk of events(response)) take(turn, chunk);
    turn.end("", turn.message.own.why);
  } catch (error) {
    if (stop.signal.aborted) turn.end("stopped", "You stopped this answer.");
    else turn.end("failed", error instanceof Refused ? error.message : `The answer broke off: ${error.message}.`);
    if (error.status === 401) askForKey(error.message);
  }
  setRunning(null);
  byId("status").textContent = turn.message.own.why || "The answer is complete.";
  keep();
}

/** What the server gets back: questions, and answers of which something came. */
function isKept({ role, content, reasoning_content }) {
  return role === "user" || Boolean(content || reasoning_content);
}

function take(turn, chunk) {
  if (chunk.error) throw new Refused(500, chunk.error.message);
  if (chunk.prompt_progress) turn.progress(chunk.prompt_progress);
  if (chunk.m2lite_experts && !turn.touched) watch(turn, chunk.m2lite_experts); // where /props comes after the question
  const [choice] = chunk.choices ?? [];
  const { delta = {} } = choice ?? {};
  if (delta.reasoning_content) turn.think(delta.reasoning_content);
  if (delta.content) turn.say(delta.content);
  if (choice?.finish_reason) turn.closeThinking();
  if (choice?.experts?.length && turn.touched) {
    for (const each of choice.experts) turn.touched.add(each);
    if (grid.touched === turn.touched) grid.flash();
  }
  if (chunk.timings) showCost(turn, chunk.timings);
  if (chunk.m2lite_warnings) turn.message.own.why = chunk.m2lite_warnings.join(" ");
}

// What it takes

/** Counts an answer's experts, once their `sizes` are known, and shows what there is. */
function watch(turn, sizes) {
  if (sizes) turn.touched = new Touched(sizes);
  show(turn);
}

function show(turn) {
  if (turn.touched) grid.show(turn.touched);
  for (const other of turns) other.node.classList.toggle("shown", other === turn && Boolean(turn.touched));
  showFigures(turn.timings);
}

function showCost(turn, timings) {
  turn.timings = timings;
  const speed = timings.predicted_per_second;
  turn.message.own.cost = [
    count(timings.predicted_n, "token"),
    ...(speed ? [`${rate(speed)} tokens/s`] : []),
    ...(timings.cache_n ? [`${number(timings.cache_n)} reused`] : []),
  ].join(" · ");
  showFigures(timings);
}

function showFigures(timings) {
  const set = (id, value, unit = "") => byId(id).replaceChildren(value, " ", element("small", "", unit));
  const speed = timings?.predicted_per_second;
  set("speed", speed ? rate(speed) : "–", speed ? "tokens/s" : "");
  if (!timings) {
    for (const id of ["length", "reused", "bytes"]) set(id, "–");
    byId("strip").textContent = "";
    return;
  }
  const { predicted_n, predicted_ms, cache_n, prompt_n, bytes_read, bytes_read_dense, hit_rate } = timings;
  set("length", number(predicted_n), `token${predicted_n === 1 ? "" : "s"} in ${seconds(predicted_ms / 1000)}`);
  set("reused", number(cache_n), `of ${number(cache_n + prompt_n)}`);
  if (bytes_read === undefined) set("bytes", "Nothing", "all in memory");
  else set("bytes", bytes(bytes_read + bytes_read_dense), hit_rate === null ? "" : `${Math.round(100 * hit_rate)} % hits`);
  const touched = grid.touched?.tokens ? `${number(grid.touched.cells)} experts` : "";
  byId("strip").textContent = `${speed ? `${rate(speed)} tokens/s` : ""}\n${touched}`;
}

function rate(perSecond) {
  return perSecond < 10 ? perSecond.toFixed(1) : number(Math.round(perSecond));
}

// The log

function follow() {
  if (follows) log.scrollTop = log.scrollHeight;
  byId("to-end").hidden = follows || log.scrollHeight - log.clientHeight - log.scrollTop < NEAR;
}

log.addEventListener("scroll", () => {
  follows = log.scrollHeight - log.clientHeight - log.scrollTop < NEAR;
  byId("to-end").hidden = follows;
});
byId("to-end").addEventListener("click", () => {
  follows = true;
  follow();
});

addEventListener("resize", follow);

function keep() {
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(turns.map((turn) => turn.message)));
  } catch {
    sessionStorage.removeItem(KEPT); // it is too long to be kept
  }
}

function restore() {
  try {
    for (const message of JSON.parse(sessionStorage.getItem(KEPT)) ?? []) {
      if (message.role === "user") addQuestion(message.content);
      else addAnswer(message);
    }
  } catch {
    sessionStorage.removeItem(KEPT);
  }
}

function newChat() {
  running?.abort();
  for (const turn of turns) turn.node.remove();
  turns = [];
  sessionStorage.removeItem(KEPT);
  byId("welcome").hidden = false;
  if (shape) grid.show(new Touched(shape));
  showFigures(null);
  question.focus();
}

// Keys and buttons

function setRunning(stop) {
  running = stop;
  byId("send").hidden = Boolean(stop);
  byId("stop").hidden = !stop;
  for (const button of log.querySelectorAll(".again")) button.disabled = Boolean(stop);
}

function resize() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
question.addEventListener("input", resize);
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || !running || byId("key-dialog").open) return;
  event.preventDefault();
  running.abort();
  question.focus();
});
byId("stop").addEventListener("click", () => {
  running?.abort();
  question.focus();
});
byId("new").addEventListener("click", newChat);
for (const button of byId("welcome").querySelectorAll("button")) {
  button.addEventListener("click", () => {
    question.value = button.textContent;
    send();
    question.focus();
  });
}
byId("panel-toggle").addEventListener("click", () => setPanel(!document.body.classList.contains("panel-open")));

function setPanel(isOpen) {
  document.body.classList.toggle("panel-open", isOpen);
  byId("panel-toggle").setAttribute("aria-expanded", String(isOpen));
}

// The server

function askForKey(why) {
  byId("key-why").textContent = why;
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = byId("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) {
    byId("key-why").textContent = "A key is letters, digits and signs without a space.";
    return;
  }
  rememberKey(key);
  byId("key").value = "";
  byId("key-dialog").close();
  greet();
  question.focus();
});

/** What the server is, which also shows whether it wants a key. */
async function greet() {
  try {
    const props = await (await ask("/props")).json();
    byId("name").textContent = props.model_alias;
    byId("context").textContent = ` · ${number(props.default_generation_settings.n_ctx)} tokens of context`;
    document.title = `${props.model_alias} · m2lite`;
    shape = props.m2lite_experts;
    if (!grid.touched) grid.show(new Touched(shape));
  } catch (error) {
    if (error.status === 401) askForKey(byId("key-why").textContent);
    else byId("name").textContent = error.message;
  }
}

setPanel(matchMedia("(min-width: 64rem)").matches);
restore();
resize();
greet();
