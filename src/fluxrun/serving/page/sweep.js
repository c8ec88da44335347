// Sweeps: every combination of the checked options, as a table that fills while they are drawn, and a report.

import { $, address, ask, fail, make, seconds } from "./api.js";
import { groups, overrides } from "./form.js";

let followed = null;

/** One box of options for each group; what falls back here is grey, with its reason. */
export function prepare() {
  for (const [group, found] of groups()) {
    const box = make("fieldset", {}, make("legend", {}, group));
    for (const option of found.options) {
      const check = make("input", { type: "checkbox", name: group, value: option.name });
      const text = option.usable ? option.name : `${option.name} – ${option.why_not}`;
      box.append(make("label", { className: option.usable ? "" : "falls", title: option.about }, check, text));
    }
    $("axes").append(box);
  }
  $("sweep-form").addEventListener("input", count);
  $("sweep-form").addEventListener("submit", (event) => { event.preventDefault(); begin(); });
  $("sweep-stop").addEventListener("click", () => ask("DELETE", `/api/sweeps/${followed}`).catch((error) => fail($("sweep-problem"), error)));
  count();
}

function axes() {
  const found = {};
  for (const check of $("axes").querySelectorAll("input:checked")) (found[check.name] ??= []).push(check.value);
  const seeds = $("seeds").value.split(",").map((seed) => seed.trim()).filter(Boolean);
  return { ...found, seed: seeds.length ? seeds : ["0"] };
}

function count() {
  const jobs = Object.values(axes()).reduce((product, values) => product * values.length, 1);
  $("sweep-count").textContent = `${jobs} picture${jobs === 1 ? "" : "s"}`;
}

async function begin() {
  fail($("sweep-problem"), null);
  const varied = axes();
  const fixed = overrides().filter((word) => !(word.split("=")[0] in varied));
  try { watch((await ask("POST", "/api/sweeps", { overrides: fixed, axes: varied })).id); } catch (error) { fail($("sweep-problem"), error); }
}

async function watch(id) {
  followed = id;
  $("sweep-live").hidden = false;
  for (;;) {
    const sweep = await ask("GET", `/api/sweeps/${id}`);
    if (followed !== id) return;
    draw(sweep);
    if (["completed", "interrupted"].includes(sweep.state)) break;
    await new Promise((later) => setTimeout(later, 700));
  }
  show();
}

function draw(sweep) {
  const done = sweep.jobs.filter((job) => !["pending", "queued", "drawing"].includes(job.state)).length;
  $("sweep-state").textContent = `${done} of ${sweep.jobs.length} done${sweep.state === "reporting" ? ", writing the report" : sweep.state === "interrupted" ? ", stopped" : ""}${sweep.problem ? ` – no report: ${sweep.problem}` : ""}`;
  $("sweep-stop").hidden = sweep.state !== "drawing";
  $("report").hidden = !sweep.report;
  $("report").href = `/api/sweeps/${sweep.id}/report`;
  $("sweep-rows").replaceChildren(...sweep.jobs.map((job, number) => {
    const picture = job.image ? make("a", { href: `#run=${job.run}` }, make("img", { src: address(job.run, job.image), alt: job.label, loading: "lazy" })) : null;
    const cells = [String(number), job.label, job.error ? `${job.state}: ${job.error}` : job.state];
    const row = make("tr", {}, ...cells.map((text) => make("td", {}, text)), make("td", { className: "n" }, job.seconds === null ? "" : seconds(job.seconds)), make("td", {}, picture));
    row.className = ["failed", "refused"].includes(job.state) ? "bad" : "";
    return row;
  }));
}

/** Earlier sweeps of this server. */
export async function show() {
  const found = await ask("GET", "/api/sweeps");
  $("sweeps").replaceChildren(...found.map((one) => {
    const open = make("button", { type: "button" }, `${one.id}: ${one.jobs} jobs, ${one.state}`);
    open.addEventListener("click", () => watch(one.id));
    return make("li", {}, open);
  }));
}
