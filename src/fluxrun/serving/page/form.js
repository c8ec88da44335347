// The form: what to draw, as overrides in the command line's words; what would fall back is said before anything is drawn.

import { $, ask, fail, make } from "./api.js";

let catalogue = null;
const selects = {};

export const groups = () => Object.entries(catalogue.groups).filter(([group]) => group !== "model");

/** Fill the drop-downs from the server's catalogue. */
export async function prepare() {
  catalogue = await ask("GET", "/api/options");
  for (const option of catalogue.groups.model.options) $("model").append(make("option", { value: option.name }, option.name));
  for (const preset of catalogue.presets) $("preset").append(make("option", { value: preset.name, title: preset.about }, preset.name));
  for (const [group, found] of groups()) $("options").append(dropDown(group, found));
  const preferred = catalogue.groups.model.default;
  if (catalogue.groups.model.options.some((option) => option.name === preferred)) $("model").value = preferred;
  suggestSize();
  $("model").addEventListener("change", suggestSize);
  $("form").addEventListener("input", later);
  $("dice").addEventListener("click", () => { $("seed").value = Math.floor(Math.random() * 2 ** 31); });
  later();
  return catalogue;
}

function dropDown(group, found) {
  const select = make("select", { id: `group-${group}` });
  for (const option of found.options) {
    const text = option.usable ? option.name : `${option.name} – ${option.why_not}`;
    select.append(make("option", { value: option.name, className: option.usable ? "" : "falls", title: option.why_not ?? option.about }, text));
  }
  select.value = found.default;
  selects[group] = select;
  const about = make("p", { className: "about", id: `about-${group}` });
  select.setAttribute("aria-describedby", about.id);
  return make("label", { className: "field", htmlFor: select.id }, `${group} – ${found.about}`, select, about);
}

/** The chosen model's own sizes, as hints of what an empty field means. */
function suggestSize() {
  const chosen = catalogue.groups.model.options.find((option) => option.name === $("model").value);
  for (const key of ["width", "height", "steps"]) $(key).placeholder = chosen?.[key] ?? "auto";
}

/** The form as overrides. */
export function overrides({ prompt = true } = {}) {
  const words = [];
  if ($("preset").value) words.push(`+preset=${$("preset").value}`);
  words.push(`model=${$("model").value}`);
  for (const [group, found] of groups()) if (selects[group].value !== found.default) words.push(`${group}=${selects[group].value}`);
  for (const key of ["width", "height", "steps"]) if ($(key).value) words.push(`${key}=${$(key).value}`);
  words.push(...$("more").value.split("\n").map((line) => line.trim()).filter(Boolean));
  if ($("number").value > 1) words.push(`num_images=${$("number").value}`);
  if (prompt) words.push(`prompt=${$("prompt").value}`, `seed=${$("seed").value || 0}`);
  return words;
}

/** The same, with the chosen pictures uploaded. */
export async function withPictures() {
  const names = [];
  for (const file of $("references").files) {
    const ending = file.name.split(".").pop().toLowerCase();
    names.push((await ask("POST", `/api/files?ending=${encodeURIComponent(ending)}`, file)).name);
  }
  return names.length ? [...overrides(), `reference_images=[${names.join(",")}]`] : overrides();
}

let waiting = 0;
let asked = 0;
function later() {
  clearTimeout(waiting);
  waiting = setTimeout(look, 350);
}

/** Ask the server what would run, and say at each group why it would be something else. */
async function look() {
  const number = ++asked;
  let plan = null, problem = "";
  try { plan = await ask("POST", "/api/plan", { overrides: overrides({ prompt: false }) }); } catch (error) { problem = error.message; }
  if (number !== asked) return;
  $("plan").textContent = plan ? plan.notes.join(" ") : problem.split(" allowed: ")[0];
  let changed = 0, falls = 0;
  for (const [group, found] of groups()) {
    const chosen = found.options.find((option) => option.name === selects[group].value);
    const reasons = (plan?.options[group]?.fallbacks ?? []).map((fallback) => fallback.reason);
    const about = $(`about-${group}`);
    about.textContent = reasons.length ? `runs as ${plan.options[group].effective}: ${reasons.join("; ")}` : chosen?.about ?? "";
    about.classList.toggle("falls", reasons.length > 0);
    selects[group].classList.toggle("falls", reasons.length > 0);
    changed += selects[group].value !== found.default;
    falls += reasons.length > 0;
  }
  $("options-count").textContent = [changed && `${changed} changed`, falls && `${falls} would fall back`].filter(Boolean).join(", ");
}

/** Fill the form from a run's own words, so that it can be changed. */
export function fill(words) {
  $("form").reset();
  $("number").value = 1;
  const rest = [];
  for (const word of words) {
    const at = word.indexOf("="), key = word.slice(0, at), value = word.slice(at + 1);
    const field = { prompt: "prompt", seed: "seed", steps: "steps", width: "width", height: "height", num_images: "number", model: "model", "+preset": "preset" }[key];
    if (field) $(field).value = value;
    else if (selects[key]) selects[key].value = value;
    else rest.push(word);
  }
  $("more").value = rest.join("\n");
  for (const [group, found] of groups()) if (!words.some((word) => word.startsWith(`${group}=`))) selects[group].value = found.default;
  suggestSize();
  fail($("problem"), null);
  later();
}

/** A run's words as a preset file: groups in its defaults list, keys below; its prompt and seed are no part of it. */
export function asPreset(words, name) {
  const chosen = [], nested = {}, plain = [];
  for (const word of words) {
    const at = word.indexOf("="), key = word.slice(0, at).replace(/^\++/, ""), value = word.slice(at + 1);
    if (["prompt", "negative_prompt", "seed", "preset", "image", "mask_image", "reference_images", "lora.files", "prompts_file"].includes(key)) continue;
    if (catalogue.groups[key]) chosen.push(`  - override /${key}: ${value}`);
    else if (key.includes(".")) (nested[key.split(".")[0]] ??= []).push(`  ${key.split(".").slice(1).join(".")}: ${value}`);
    else plain.push(`${key}: ${value}`);
  }
  const lines = ["# @package _global_", `# fluxrun --config-dir FOLDER +preset=${name}`];
  if (chosen.length) lines.push("defaults:", ...chosen);
  lines.push(...plain);
  for (const [group, knobs] of Object.entries(nested)) lines.push(`${group}:`, ...knobs);
  return lines.join("\n") + "\n";
}
