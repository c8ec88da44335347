// The page: which view is shown, the server's state, and what starts everything.

import { $, ask, fail } from "./api.js";
import * as compare from "./compare.js";
import * as form from "./form.js";
import * as past from "./past.js";
import * as run from "./run.js";
import * as sweep from "./sweep.js";

const VIEWS = { draw: () => {}, history: past.show, compare: compare.show, sweep: sweep.show };

/** The view that the address names; `#run=ID` is a run on the stage. */
function route() {
  const [name, id] = location.hash.slice(1).split("=");
  const view = name === "run" ? "draw" : name in VIEWS ? name : "draw";
  for (const main of document.querySelectorAll("main")) main.hidden = main.id !== view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  if (name === "run" && id) run.show(id);
  VIEWS[view]();
}

async function look() {
  try {
    const status = await ask("GET", "/api/status");
    $("dot").className = status.drawing ? "busy" : "idle";
    const memory = status.worker.rss_bytes ? `, ${(status.worker.rss_bytes / 2 ** 30).toFixed(1)} GB` : "";
    const what = status.drawing ? `drawing${status.waiting ? `, ${status.waiting} waiting` : ""}` : status.worker.pid ? `ready${memory}` : "worker asleep";
    $("server-text").textContent = `${machine} · ${what}`;
  } catch (error) {
    $("dot").className = "gone";
    $("server-text").textContent = error.message;
  }
}

let machine = "";

async function start() {
  run.prepare(); past.prepare(); compare.prepare();
  $("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    $("go").disabled = true;
    try { await run.draw(await form.withPictures()); } catch (error) { fail($("problem"), error); }
    $("go").disabled = false;
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("draw").hidden) { event.preventDefault(); $("form").requestSubmit(); }
  });
  addEventListener("hashchange", route);
  try {
    const catalogue = await form.prepare();
    machine = catalogue.machine;
    sweep.prepare();
  } catch (error) { fail($("problem"), error); }
  route();
  await look();
  setInterval(look, 3000);
}

start();
