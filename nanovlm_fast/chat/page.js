"use strict";
// The page keeps everything: pictures as files, what was said, and the attention of each reply.

const $ = (id) => document.getElementById(id);
// Of a picture on the page, in pixels; what stands around it fits on the screen with it.
const mostSide = () => {
  const around = state.pictures.length > 1 ? 376 : 300;
  return Math.min(460, Math.max(200, window.innerHeight - around));
};
const state = {
  model: null,
  pictures: [], // {file, base64, url, width, height}
  shown: 0, // which of them is on the stage
  turns: [], // [question, reply] that the model reads before the next question
  reply: null, // the one whose attention is drawn
  token: null, // of that reply, while the pointer is on it
  busy: false,
};

// ---- errors

function complain(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

async function refusal(response) {
  try {
    return (await response.json()).error;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

const GONE = "the server does not answer: is the command still running in its terminal?";

// ---- pictures

async function add(file) {
  const name = file.name || "picture";
  if (file.size > state.model.upload) {
    const limit = state.model.upload / 2 ** 20;
    return complain(`${name}: ${(file.size / 2 ** 20).toFixed(1)} MiB, at most ${limit} MiB are taken`);
  }
  let content;
  try {
    content = await base64(file);
  } catch {
    return complain(`${name}: it cannot be read; is it a folder?`);
  }
  let response;
  try {
    response = await fetch("/picture", { method: "POST", body: file });
  } catch {
    return complain(GONE);
  }
  if (!response.ok) return complain(`${name}: ${await refusal(response)}`);
  const url = URL.createObjectURL(await response.blob());
  const image = new Image();
  image.src = url;
  await image.decode();
  const picture = { url, base64: content, width: image.width, height: image.height };
  if (state.pictures.length >= state.model.max_images) forget(state.pictures.pop());
  state.pictures.push(picture);
  begin();
  show(state.pictures.length - 1);
}

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.split(",")[1] || "");
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function forget(picture) {
  URL.revokeObjectURL(picture.url);
}

function remove(number) {
  if (state.busy) return;
  forget(...state.pictures.splice(number, 1));
  begin();
  show(Math.max(0, Math.min(number, state.pictures.length - 1)));
}

function show(number) {
  state.shown = number;
  const picture = state.pictures[number];
  const many = state.model.max_images > 1;
  $("drop").classList.toggle("small", Boolean(picture));
  $("drop").querySelector("strong").textContent =
    !picture ? "Drop a picture here" : many && state.pictures.length < state.model.max_images
      ? "Add a picture" : "Another picture";
  $("drop").querySelector("span").hidden = Boolean(picture);
  $("stage").hidden = !picture;
  $("strip").replaceChildren(...(state.pictures.length > 1 ? state.pictures.map(thumbnail) : []));
  if (picture) {
    const wide = Math.min(mostSide(), $("look").clientWidth - 32);
    const scale = Math.min(wide / picture.width, mostSide() / picture.height, 8);
    $("shown").src = picture.url;
    $("shown").classList.toggle("enlarged", scale > 2);
    $("shown").style.width = `${Math.round(picture.width * scale)}px`;
    $("shown").style.height = `${Math.round(picture.height * scale)}px`;
  }
  draw();
}

function thumbnail(picture, number) {
  const place = document.createElement("div");
  const image = document.createElement("img");
  const button = document.createElement("button");
  image.src = picture.url;
  image.alt = `Picture ${number + 1}`;
  image.onclick = () => show(number);
  button.textContent = "\u00d7";
  button.setAttribute("aria-label", `Remove picture ${number + 1}`);
  button.onclick = () => remove(number);
  place.classList.toggle("now", number === state.shown);
  place.append(image, button);
  return place;
}

// ---- attention

// (h, w) of what is drawn on a picture: the token under the pointer, or the chosen layer.
function mapOf(number) {
  const maps = state.reply && state.reply.pictures && state.reply.pictures[number];
  if (!maps) return null;
  if (state.token !== null) return maps.by_token[state.token];
  const layer = Number($("layer").value);
  return layer < 0 ? mean(maps.by_layer) : maps.by_layer[layer];
}

function mean(maps) {
  return maps[0].map((row, y) =>
    row.map((_, x) => maps.reduce((sum, one) => sum + one[y][x], 0) / maps.length));
}

const total = (map) => map.flat().reduce((sum, value) => sum + value, 0);
const percent = (value) => `${(100 * value).toFixed(value < 0.1 ? 1 : 0)}%`;

// From clear over amber to dark red, as the bar in the legend.
function colour(share) {
  const stops = [[255, 179, 0, 0], [255, 160, 0, 0.45], [228, 60, 10, 0.6], [150, 0, 20, 0.68]];
  const at = Math.min(share, 0.9999) * (stops.length - 1);
  const from = stops[Math.floor(at)];
  const to = stops[Math.floor(at) + 1];
  const part = at % 1;
  const [r, g, b, a] = from.map((value, i) => value + (to[i] - value) * part);
  return `rgba(${Math.round(r)}, ${Math.round(g)}, ${Math.round(b)}, ${a.toFixed(3)})`;
}

function draw() {
  const canvas = $("overlay");
  const maps = state.pictures.map((_, number) => mapOf(number));
  const map = maps[state.shown];
  $("legend").hidden = !map;
  canvas.hidden = !map || !$("on").checked;
  if (!map) return;
  const most = Math.max(...maps.flat(2));
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(parseInt($("shown").style.width) * ratio);
  canvas.height = Math.round(parseInt($("shown").style.height) * ratio);
  const pen = canvas.getContext("2d");
  const wide = canvas.width / map[0].length;
  const high = canvas.height / map.length;
  map.forEach((row, y) => row.forEach((value, x) => {
    // Edges are rounded, or neighbours would leave a seam.
    const [left, top] = [Math.round(x * wide), Math.round(y * high)];
    const [right, bottom] = [Math.round((x + 1) * wide), Math.round((y + 1) * high)];
    pen.fillStyle = colour(value / (most || 1));
    pen.fillRect(left, top, right - left, bottom - top);
  }));
  if (Math.min(wide, high) > 44 * ratio) label(pen, map, wide, high, ratio);
  $("most").textContent = percent(most);
  const sum = maps.reduce((all, one) => all + total(one), 0);
  const where = state.pictures.length > 1 ? "the pictures" : "the picture";
  const what = state.token === null ? "The reply" : `"${state.reply.pieces[state.token].trim()}"`;
  $("share").textContent = `${what}: ${percent(sum)} of the attention goes to ${where}, the rest to text.`;
}

function label(pen, map, wide, high, ratio) {
  pen.font = `600 ${13 * ratio}px system-ui, sans-serif`;
  pen.textAlign = "right";
  pen.textBaseline = "bottom";
  pen.lineWidth = 3 * ratio;
  pen.lineJoin = "round";
  pen.strokeStyle = "rgba(255, 255, 255, 0.85)";
  pen.fillStyle = "#1d1d1f";
  map.forEach((row, y) => row.forEach((value, x) => {
    if (value < 0.005) return;
    const place = [(x + 1) * wide - 6 * ratio, (y + 1) * high - 5 * ratio];
    pen.strokeText(percent(value), ...place);
    pen.fillText(percent(value), ...place);
  }));
}

function choose(reply, token = null) {
  state.reply = reply;
  state.token = token;
  for (const element of document.querySelectorAll(".said")) {
    element.classList.toggle("now", Boolean(reply) && element === reply.element);
  }
  const layers = reply && reply.pictures && reply.pictures.length ? reply.pictures[0].by_layer.length : 0;
  if ($("layer").length !== layers + 1) {
    $("layer").replaceChildren(new Option("all layers", -1));
    for (let i = 0; i < layers; i++) $("layer").add(new Option(`layer ${i + 1}`, i));
  }
  draw();
}

// ---- conversation

function begin() {
  state.turns = [];
  $("turns").replaceChildren();
  $("anew").hidden = true;
  choose(null);
}

function bubble(kind, text = "") {
  const element = document.createElement("p");
  element.className = kind;
  element.textContent = text;
  $("turns").append(element);
  element.scrollIntoView({ block: "nearest" });
  return element;
}

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

async function ask(question) {
  const element = bubble("said busy");
  choose(null);
  const body = JSON.stringify({
    pictures: state.pictures.map((picture) => picture.base64),
    turns: state.model.converses ? state.turns : [],
    question,
  });
  let last = null;
  try {
    const response = await fetch("/ask", {
      method: "POST", body, headers: { "Content-Type": "application/json" },
    });
    if (!response.ok) throw new Error(await refusal(response));
    for await (const line of lines(response)) {
      if (line.error) throw new Error(line.error);
      if (line.text === undefined) last = line;
      else element.textContent = line.text;
      element.scrollIntoView({ block: "nearest" });
    }
    if (!last) throw new Error("the reply broke off: the terminal says why");
  } catch (error) {
    element.classList.add("wrong");
    element.textContent = error instanceof TypeError ? GONE : error.message;
    return;
  } finally {
    element.classList.remove("busy");
  }
  state.turns.push([question, last.pieces.join("").trimStart()]);
  finish(element, last);
}

function finish(element, reply) {
  reply.element = element;
  const first = !document.querySelector(".tip");
  element.onclick = () => choose(reply);
  if (!reply.pieces.length) {
    element.classList.add("empty");
    element.textContent = "(nothing: the reply ended at once)";
  } else {
    element.replaceChildren(...reply.pieces.map((piece, number) => {
      const span = document.createElement("span");
      span.textContent = number ? piece : piece.trimStart();
      span.onpointerenter = () => choose(reply, number);
      return span;
    }));
    element.onpointerleave = () => choose(reply);
  }
  if (first && reply.pictures.length && reply.pieces.length) {
    bubble("tip", "Point at a word to see where the model looked when it chose it.");
  }
  choose(reply);
}

// ---- events

// One thing at a time: a picture that arrives would end the conversation under a question.
async function alone(action) {
  if (state.busy) return;
  state.busy = $("ask").disabled = true;
  complain("");
  try {
    await action();
  } finally {
    state.busy = $("ask").disabled = false;
    $("question").focus();
  }
}

async function submit() {
  const question = $("question").value.trim();
  if (!question) return;
  if (!state.pictures.length && !state.model.converses) return complain("show a picture first");
  if ($("hint")) $("hint").remove();
  $("question").value = "";
  bubble("asked", question);
  await ask(question);
  $("anew").hidden = false;
}

function addAll(files) {
  const copy = [...files]; // the field that they come from is emptied
  if (!copy.length) return; // text was pasted
  if (state.busy) return complain("wait for the answer, then show the next picture");
  alone(async () => { for (const file of copy) await add(file); });
}

function listen() {
  $("form").onsubmit = (event) => {
    event.preventDefault();
    alone(submit);
  };
  $("anew").onclick = () => state.busy || begin();
  $("on").onchange = draw;
  $("layer").onchange = draw;
  window.onresize = () => show(state.shown);
  $("file").onchange = () => {
    addAll($("file").files);
    $("file").value = ""; // so that the same file can be chosen again
  };
  document.addEventListener("paste", (event) => addAll(event.clipboardData.files));
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("over");
  });
  document.addEventListener("dragleave", () => document.body.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("over");
    addAll(event.dataTransfer.files);
  });
}

async function main() {
  try {
    state.model = await (await fetch("/model")).json();
  } catch {
    return complain(GONE);
  }
  const { checkpoint, parameters, device, max_images, converses } = state.model;
  const size = parameters < 1e6 ? `${(parameters / 1e6).toFixed(1)}` : `${Math.round(parameters / 1e6)}`;
  $("model").textContent = `${checkpoint} \u00b7 ${size} million parameters \u00b7 ${device}`;
  const pictures = max_images > 1 ? `up to ${max_images} pictures` : "one picture";
  $("kind").textContent = converses
    ? `It reads the whole conversation, with ${pictures}.`
    : `It answers single questions about ${pictures}.`;
  $("anew").textContent = converses ? "Begin anew" : "Clear";
  $("file").multiple = max_images > 1;
  listen();
  document.body.dataset.ready = "yes";
}

main();
