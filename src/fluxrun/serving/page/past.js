// The history: runs of the output folder, searched by prompt.

import { $, address, ask, make } from "./api.js";

const PAGE = 48;
let offset = 0;
let asked = 0;

async function load(more) {
  const number = ++asked, search = $("search").value;
  offset = more ? offset + PAGE : 0;
  const found = await ask("GET", `/api/runs?limit=${PAGE}&offset=${offset}&search=${encodeURIComponent(search)}`);
  if (number !== asked) return;
  const cards = found.runs.map(card);
  if (more) $("runs").append(...cards); else $("runs").replaceChildren(...cards);
  $("history-empty").hidden = found.total > 0;
  $("history-empty").textContent = search ? "No prompt has all of these words." : "Nothing was drawn yet.";
  $("more-runs").hidden = offset + PAGE >= found.total;
}

function card(run) {
  const image = run.images.length ? make("img", { src: address(run.id, run.images[0]), alt: "", loading: "lazy" }) : run.state;
  const date = new Date(run.started_at);
  const about = [run.images.length > 1 && `${run.images.length} pictures`, run.state !== "completed" && run.state, isNaN(date) ? "" : date.toLocaleString()];
  const link = make("a", { href: `#run=${run.id}` }, make("div", { className: "thumb" }, image), make("p", {}, run.prompt || "no prompt"), make("small", {}, about.filter(Boolean).join(" · ")));
  return make("li", { className: run.state === "failed" ? "bad" : "" }, link);
}

export const show = () => load(false);

let waiting = 0;
export function prepare() {
  $("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(() => load(false), 250); });
  $("more-runs").addEventListener("click", () => load(true));
}
