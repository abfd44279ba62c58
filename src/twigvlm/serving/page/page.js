// The page: a picture, a question, settings, and one lane or three in which answers appear.
import { draw } from "/patches.js";
import { streamAnswer } from "/stream.js";

const MAX_SIDE = 2048; // pixels of the longer side that are sent
const SENT_AS_THEY_ARE = ["image/png", "image/jpeg"];
const at = (id) => document.getElementById(id);
const state = { settings: null, picture: null, uri: null, running: null, chosen: 0 };

async function start() {
  const response = await fetch("/page/settings");
  const settings = (state.settings = await response.json());
  at("model").textContent = settings.model;
  const { low, high } = settings.retain;
  const budget = Math.round(settings.retain.default ?? Math.max(low, Math.min(64, high)));
  Object.assign(at("retain"), { min: Math.ceil(low), max: Math.floor(high), value: budget });
  at("retain-value").textContent = at("retain").value;
  at("prune").checked = settings.prunes;
  at("refocus").checked = settings.refocus !== null;
  at("length").value = settings.max_tokens;
  for (const way of settings.ways) at("way").add(new Option(way === "none" ? "none (plain decoding)" : way, way));
  at("way").value = settings.way;
  for (const id of ["prune", "retain", "refocus", "compare"]) at(id).disabled = !settings.has_twig;
  const { scout, pruner, retain_per_image: perImage } = settings.pruning;
  if (scout || pruner || perImage) at("refocus").disabled = true; // none of them chooses again
  at("key").hidden = at("key-label").hidden = !settings.needs_key;
  settings.examples.forEach(addExample);
  const first = settings.examples[0];
  setBusy(false);
  if (first) await showExample(first, true);
}

function addExample(example, index) {
  const button = document.createElement("button");
  button.type = "button";
  const image = document.createElement("img");
  image.src = example.picture;
  image.alt = `Example ${index + 1}: ${example.question}`;
  button.append(image);
  button.addEventListener("click", () => guarded(() => showExample(example)));
  at("examples").append(button);
}

// A picture that comes late must not replace what was chosen after it, nor the first example a question that is there already.
async function showExample(example, first = false) {
  const chosen = (state.chosen += 1);
  const response = await fetch(example.picture);
  const shown = await setPicture(await response.blob(), chosen);
  if (shown && !(first && at("question").value)) at("question").value = example.question;
}

// Whether the picture is shown; not if another one was chosen meanwhile.
async function setPicture(blob, chosen = (state.chosen += 1)) {
  let picture;
  try {
    picture = await createImageBitmap(blob);
  } catch {
    throw new Error("this file is no picture that the browser can read");
  }
  const pixels = picture.width * picture.height;
  const scale = Math.min(
    1,
    MAX_SIDE / Math.max(picture.width, picture.height),
    Math.sqrt((0.99 * state.settings.max_pixels) / pixels), // sides are rounded
  );
  const copy = document.createElement("canvas");
  copy.width = Math.max(1, Math.round(picture.width * scale));
  copy.height = Math.max(1, Math.round(picture.height * scale));
  const pen = copy.getContext("2d");
  pen.fillStyle = "white"; // behind what is transparent, as the server reads it
  pen.fillRect(0, 0, copy.width, copy.height);
  pen.drawImage(picture, 0, 0, copy.width, copy.height);
  // As it is where it is small and every server reads it, so that the model sees what was given. A PNG of a large photograph
  // could be more than the server takes.
  const small = scale === 1 && blob.size < 4e6;
  const sent = small && SENT_AS_THEY_ARE.includes(blob.type);
  const drawn = small ? copy.toDataURL("image/png") : copy.toDataURL("image/jpeg", 0.95);
  const uri = sent ? await dataUri(blob) : drawn;
  if (chosen !== state.chosen) return false;
  state.uri = uri;
  state.picture = copy;
  draw(at("picture"), state.picture, null, null, false);
  at("hint").textContent = "Drop another picture, paste one, or press Enter to choose a file.";
  at("error").textContent = "";
  return true;
}

function dataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("this file cannot be read"));
    reader.readAsDataURL(blob);
  });
}

function requestBody(pruned, way) {
  const parts = [{ type: "text", text: at("question").value }];
  if (state.uri) parts.unshift({ type: "image_url", image_url: { url: state.uri } });
  const body = {
    model: state.settings.model,
    messages: [{ role: "user", content: parts }],
    max_completion_tokens: Number(at("length").value),
    speculate: way,
    retain: pruned ? Number(at("retain").value) : null,
    fit_budget: pruned,
  };
  if (!pruned) return body;
  if (at("refocus").checked) body.refocus = state.settings.refocus ?? 0.7;
  return { ...body, ...state.settings.pruning };
}

function newLane(title) {
  const lane = at("lane-template").content.cloneNode(true).firstElementChild;
  lane.querySelector("h2").textContent = title;
  at("answers").append(lane);
  return lane;
}

// Runs one lane; its clock stops with the answer. Its patches are those of the picture that was asked about.
async function runLane(lane, body, picture, signal) {
  const [clock, answer] = [lane.querySelector(".clock"), lane.querySelector(".answer")];
  const begun = performance.now();
  const tick = () => {
    clock.textContent = `${((performance.now() - begun) / 1000).toFixed(2)} s`;
  };
  const timer = setInterval(tick, 50);
  answer.setAttribute("aria-busy", "true");
  lane.scrollIntoView({ block: "nearest" }); // on a phone it begins below the screen
  let looks = 0;
  let reason = null;
  try {
    const usage = await streamAnswer(body, at("key").value, signal, (choice) => {
      for (const piece of choice.twigvlm?.pieces ?? []) {
        const span = document.createElement("span");
        span.className = piece.drafted ? "drafted" : "base";
        span.textContent = piece.text;
        answer.append(span);
      }
      if (choice.twigvlm?.kept) {
        looks += 1;
        const kept = choice.twigvlm.kept;
        const grid = choice.twigvlm.grid;
        const all = grid !== null && kept.length === grid[0] * grid[1];
        if (picture === state.picture) draw(at("picture"), picture, all ? null : kept, grid, state.settings.square);
      }
      reason = choice.finish_reason ?? reason;
    });
    tick();
    lane.querySelector(".figures").textContent = figures(usage, looks, (performance.now() - begun) / 1000, reason);
  } finally {
    clearInterval(timer);
    tick();
    answer.setAttribute("aria-busy", "false");
  }
}

function figures(usage, looks, seconds, reason) {
  const { visual_tokens: visual, average_visual_tokens: average } = usage.prompt_tokens_details;
  const { accepted_prediction_tokens: accepted, drafted_tokens: drafted } = usage.completion_tokens_details;
  const count = usage.completion_tokens;
  const found = [`${count} tokens, ${(count / seconds).toFixed(1)} per second`];
  if (visual) found.push(`R̄ = ${average} of ${visual} visual tokens`);
  if (drafted) found.push(`${accepted} of ${drafted} drafted tokens accepted`);
  if (looks > 1) found.push(`patches chosen again ${looks - 1} times`);
  if (reason === "length") found.push("cut at the longest answer");
  return `${found.join("; ")}.`;
}

async function run(lanes) {
  at("answers").replaceChildren();
  at("error").textContent = "";
  const aborter = (state.running = new AbortController());
  const { picture } = state;
  setBusy(true);
  try {
    const made = lanes.map(({ title, body }) => ({ lane: newLane(title), body }));
    for (const { lane, body } of made) await runLane(lane, body, picture, aborter.signal);
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  } finally {
    setBusy(false);
  }
}

function setBusy(busy) {
  at("send").disabled = busy;
  at("compare").disabled = busy || !state.settings.has_twig;
  at("stop").disabled = !busy;
}

function ask() {
  const [pruned, way] = [at("prune").checked, at("way").value];
  return run([{ title: "Answer", body: requestBody(pruned, way) }]);
}

function compare() {
  const way = at("way").value === "none" ? "chain" : at("way").value;
  return run([
    { title: "Plain", body: requestBody(false, "none") },
    { title: `Exact: drafts by ${way}`, body: requestBody(false, way) },
    { title: `Pruned to R̄ ${at("retain").value}, drafts by ${way}`, body: requestBody(true, way) },
  ]);
}

async function guarded(work) {
  try {
    await work();
  } catch (error) {
    at("error").textContent = error.message;
  }
}

function takeFile(files) {
  if (files?.length) guarded(() => setPicture(files[0]));
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  guarded(ask);
});
at("compare").addEventListener("click", () => {
  if (at("form").reportValidity()) guarded(compare);
});
at("stop").addEventListener("click", () => state.running?.abort());
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
    event.preventDefault();
    if (!at("send").disabled) at("form").requestSubmit();
  }
});
at("retain").addEventListener("input", () => {
  at("retain-value").textContent = at("retain").value;
  at("prune").checked = true;
});
at("drop").addEventListener("click", () => at("file").click());
at("drop").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" && event.key !== " ") return;
  event.preventDefault();
  at("file").click();
});
at("file").addEventListener("change", () => {
  takeFile(at("file").files);
  at("file").value = ""; // or choosing the same file again would change nothing
});
// Files may be dropped anywhere: the browser would leave the page to show them.
const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  at("drop").classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) at("drop").classList.remove("over"); // it has left the window
});
document.addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  at("drop").classList.remove("over");
  takeFile(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => takeFile(event.clipboardData?.files));
guarded(start);
