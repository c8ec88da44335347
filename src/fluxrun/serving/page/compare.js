// Two pictures side by side under a slider, and how far they are apart.

import { $, address, ask, toast } from "./api.js";

let chosen = [];

/** Take a picture as one of the two; the one chosen longest ago makes room. */
export function choose(run, file, prompt) {
  chosen = [...chosen.filter((one) => one.run !== run || one.file !== file), { run, file, prompt }].slice(-2);
  if (chosen.length < 2) toast("Now another one");
  else location.hash = "compare";
}

/** Show the two, if there are two. */
export async function show() {
  const ready = chosen.length === 2;
  $("compare-empty").hidden = ready;
  $("compare-box").hidden = !ready;
  if (!ready) return;
  chosen.forEach((one, number) => {
    const letter = "ab"[number];
    $(`picture-${letter}`).src = address(one.run, one.file);
    $(`picture-${letter}`).alt = one.prompt;
    $(`caption-${letter}`).textContent = `${one.run} ${one.prompt}`.slice(0, 200);
  });
  slide();
  const [a, b] = chosen.map((one) => encodeURIComponent(`${one.run}/${one.file}`));
  try {
    const found = await ask("GET", `/api/compare?a=${a}&b=${b}`);
    $("distance").textContent = found.equal ? "equal pixels" : found.psnr_db === null ? found.reason : `PSNR ${found.psnr_db.toFixed(1)} dB`;
  } catch (error) { $("distance").textContent = error.message; }
}

function slide() {
  const at = $("split").value;
  $("picture-a").style.clipPath = `inset(0 ${100 - at}% 0 0)`;
  $("edge").style.left = `${at}%`;
}

export function prepare() { $("split").addEventListener("input", slide); }
