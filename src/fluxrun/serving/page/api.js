// The way to the server, and small helpers for the page. Text reaches the page as text only: there is no innerHTML here.

export const $ = (id) => document.getElementById(id);

/** An element with properties and children; strings become text nodes. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value; else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export class Refused extends Error {
  constructor(message, status) { super(message); this.status = status; }
}

/** Ask for JSON; throws Refused with the server's one line. */
export async function ask(method, path, body) {
  const options = { method, headers: {} };
  if (body instanceof Blob) options.body = body;
  else if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["Content-Type"] = "application/json";
  }
  let answer;
  try { answer = await fetch(path, options); } catch { throw new Refused("the server does not answer", 0); }
  if (answer.status === 401 && path !== "/api/login") { await login(); return ask(method, path, body); }
  const data = answer.status === 204 ? null : await answer.json().catch(() => null);
  if (!answer.ok) {
    const wait = answer.headers.get("Retry-After");
    const text = data?.error?.message ?? `the server answers ${answer.status}`;
    throw new Refused(wait ? `${text}: try again in ${wait} s` : text, answer.status);
  }
  return data;
}

let entering = null;

/** Ask for the token, once, and change it for a cookie; one in the address (after #) never reaches the server or its log. */
function login() {
  entering ??= new Promise((entered) => {
    const enter = async (token) => {
      try { await ask("POST", "/api/login", { token }); } catch (error) { fail($("login-problem"), error); return; }
      $("login").close();
      entering = null;
      entered();
    };
    const given = new URLSearchParams(location.hash.slice(1)).get("token");
    if (given) { history.replaceState(null, "", location.pathname); enter(given); }
    $("login-form").onsubmit = (event) => { event.preventDefault(); enter($("token").value); };
    if (!$("login").open) $("login").showModal();
  });
  return entering;
}

/** Show an error in its place, or clear it. */
export function fail(place, error) {
  place.hidden = !error;
  place.textContent = error ? error.message ?? String(error) : "";
}

let fading = 0;
export function toast(text) {
  $("toast").textContent = text;
  $("toast").hidden = false;
  clearTimeout(fading);
  fading = setTimeout(() => { $("toast").hidden = true; }, 2500);
}

export const seconds = (value) => (value >= 100 ? `${value.toFixed(0)} s` : value >= 0.1 ? `${value.toFixed(1)} s` : `${(value * 1000).toFixed(0)} ms`);

export const address = (run, file) => `/api/runs/${encodeURIComponent(run)}/files/${file.split("/").map(encodeURIComponent).join("/")}`;

/** Follow a run's (or sweep's) events; `take` gets each, and the stream ends with the run. */
export function follow(path, take, kinds) {
  const source = new EventSource(path);
  for (const kind of kinds) {
    source.addEventListener(kind, (message) => {
      const event = JSON.parse(message.data);
      const ended = kind === "state" && !["queued", "drawing"].includes(event.state);
      if (ended) source.close();
      take(event, ended);
    });
  }
  return source;
}
