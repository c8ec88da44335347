// One run: its progress while it is drawn, its pictures and its record afterwards.

import { $, address, ask, fail, follow, make, seconds, toast } from "./api.js";
import { asPreset, fill } from "./form.js";
import { choose } from "./compare.js";

let shown = null;      // the run on the stage, as the server tells it
let drawing = null;    // the id of the run that is being followed
let stage = "";

/** Put a run into the queue and follow it. */
export async function draw(words) {
  fail($("problem"), null);
  let run;
  try { run = await ask("POST", "/api/runs", { overrides: words }); } catch (error) { fail($("problem"), error); return; }
  watch(run.id);
}

/** Follow a run to its end. */
export function watch(id) {
  drawing = id;
  $("empty").hidden = $("result").hidden = true;
  $("log").replaceChildren();
  $("log-box").hidden = false;
  $("pictures").replaceChildren();
  busy(true);
  doing("Waiting");
  follow(`/api/runs/${id}/events`, (event, ended) => { if (drawing === id) take(id, event, ended); },
    ["state", "stage", "steps", "compiling", "step", "line", "picture"]);
}

function take(id, event, ended) {
  if (event.event === "state") {
    if (ended) finish(id, event);
    else doing(event.state === "drawing" ? "Getting ready" : event.waiting ? `Waiting, ${event.waiting} before it` : "Waiting");
  } else if (event.event === "stage" && event.text) doing(event.text);
  else if (event.event === "steps") {
    stage = event.text;
    doing(event.text || "Decoding and saving");
  } else if (event.event === "compiling") doing(`${stage} · compiling, once`);
  else if (event.event === "step") {
    doing(`${stage} · step ${event.done} of ${event.total}`, event.done / event.total, `${seconds(event.step_s)} a step · ${seconds(event.left_s)} left`);
  } else if (event.event === "line") {
    $("log").append(make("span", { className: event.level }, `${event.text}\n`));
  } else if (event.event === "picture") addPicture(id, event.path);
}

function doing(text, part = 0, left = "") {
  $("doing").textContent = text;
  $("left").textContent = left;
  $("bar").style.width = `${100 * part}%`;
}

function busy(on) {
  $("progress").hidden = !on;
  $("stop").hidden = !on;
  $("stage").setAttribute("aria-busy", String(on));
}

async function finish(id, event) {
  drawing = null;
  busy(false);
  if (event.error) fail($("problem"), event.error);
  history.replaceState(null, "", `#run=${id}`);
  await show(id);
}

/** Stop what is being drawn: at the next step, and at once if asked again. */
export async function stop() {
  if (!drawing) return;
  doing("Stopping at the next step; press again to stop at once");
  try { await ask("DELETE", `/api/runs/${drawing}`); } catch (error) { fail($("problem"), error); }
}

function addPicture(id, path) {
  const image = make("img", { src: address(id, path), alt: shown?.prompt ?? $("prompt").value });
  $("pictures").append(make("a", { href: address(id, path), target: "_blank", rel: "noopener" }, image));
  $("pictures").classList.toggle("one", $("pictures").children.length === 1);
}

/** A run on the stage: pictures, what was asked, what ran, and where the time went. */
export async function show(id) {
  try { shown = await ask("GET", `/api/runs/${encodeURIComponent(id)}`); } catch (error) { fail($("problem"), error); return; }
  const record = shown.record;
  $("empty").hidden = true;
  $("pictures").replaceChildren();
  for (const image of record?.images ?? []) addPicture(id, image.path);
  $("result").hidden = !record;
  if (!record) return;
  $("shown-prompt").textContent = shown.prompt;
  $("record").href = address(id, "run.json");
  if (record.error) fail($("problem"), `${record.error.message} (stage ${record.error.stage})`);
  showTimes(record.timings);
  showOptions(record.options);
  $("notes").replaceChildren(...record.notes.map((note) => make("li", {}, note)));
}

const sum = (list) => list.flat().reduce((total, value) => total + value, 0);

function showTimes(timings) {
  const parts = [["import", timings.import_s], ["load", timings.load_s], ["encode prompt", sum(timings.text_encode_s)],
    ["steps", sum(timings.denoise_s)], ["decode", sum(timings.decode_s)], ["save", sum(timings.save_s)]];
  parts.push(["other", Math.max(0, timings.total_s - sum(parts.map((part) => part[1])))]);
  const bars = parts.map(([name, took], number) => {
    const bar = make("div", { className: `t${number}`, title: `${name} ${seconds(took)}` });
    bar.style.flexGrow = took;
    return took > 0 ? bar : null;
  });
  $("times").replaceChildren(...bars.filter(Boolean));
  const key = parts.map(([name, took], number) => took > 0 ? make("li", {}, make("i", { className: `t${number}` }), `${name} ${seconds(took)}`) : null);
  $("times-key").replaceChildren(...key.filter(Boolean), make("li", {}, `all of it ${seconds(timings.total_s)}`));
}

function showOptions(options) {
  $("ran").replaceChildren(...Object.entries(options).map(([group, option]) => {
    const why = option.fallbacks.map((fallback) => `${fallback.option}: ${fallback.reason}`).join("; ") || String(option.facts.chosen_because ?? "");
    const row = make("tr", {}, make("td", {}, group), make("td", {}, option.requested), make("td", {}, option.effective), make("td", {}, why));
    row.className = option.fallbacks.length ? "fell" : "";
    return row;
  }));
}

const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

function save(name, text) {
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: "text/yaml" })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

export function prepare() {
  $("stop").addEventListener("click", stop);
  $("again").addEventListener("click", () => draw(shown.overrides));
  $("use").addEventListener("click", () => { fill(shown.overrides); $("prompt").focus(); });
  $("copy").addEventListener("click", async () => {
    await navigator.clipboard.writeText(["fluxrun", ...shown.overrides].map(quoted).join(" "));
    toast("Copied");
  });
  $("preset-save").addEventListener("click", () => { save("mine.yaml", asPreset(shown.overrides, "mine")); toast("mine.yaml: put it into FOLDER/preset"); });
  $("to-compare").addEventListener("click", () => { if (shown.record.images.length) choose(shown.id, shown.record.images[0].path, shown.prompt); });
}
