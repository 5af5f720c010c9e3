// The page: passes what the form holds to the planner (worker.mjs), shows its answer, and keeps the form in the address.
// All words and figures come from scalegpt/plan_page/.

const element = (id) => document.getElementById(id);
const form = element("form");
const status = element("status");
const fields = [...form.elements].filter((each) => each.name);
const parts = [...document.querySelectorAll("section.part")];

let others = {}; // settings in the address that have no field
let file = null; // {name, text} of a config.json
let sent = 0;
let isReady = false;
let json = null;

const worker = new Worker(new URL("worker.mjs", import.meta.url), { type: "module" });

// --- the form and the address ---

function held() {
  const values = { ...others };
  for (const field of fields) if (field.value.trim()) values[field.name] = field.value.trim();
  if (file) Object.assign(values, { hf: file.text, hf_name: file.name });
  return values;
}

function fill(values) {
  const { hf, hf_name, ...rest } = values;
  file = hf ? { name: hf_name ?? "", text: hf } : null;
  for (const field of fields) {
    const value = rest[field.name] ?? "";
    const known = field.tagName !== "SELECT" || [...field.options].some((option) => option.value === value);
    if (known) delete rest[field.name];
    field.value = known ? value : "";
  }
  others = rest;
  for (const details of form.querySelectorAll("details")) {
    details.open ||= fields.some((field) => details.contains(field) && field.value);
  }
  showOthers();
  showFile();
}

function showOthers() {
  const words = Object.entries(others).map(([key, value]) => `${key}=${value}`);
  element("others").hidden = !words.length;
  element("others").textContent = `Also set by the address: ${words.join(", ")}`;
}

function showFile() {
  const line = element("file");
  line.hidden = !file;
  line.replaceChildren();
  if (!file) return;
  const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "Remove" });
  remove.onclick = () => {
    file = null;
    element("f-hf").value = "";
    showFile();
    ask();
    element("f-hf").focus();
  };
  line.append(`${file.name || "config.json"} `, remove);
}

const address = (values) => `#${new URLSearchParams(values)}`;

// --- asking ---

function ask() {
  const values = held();
  history.replaceState(null, "", address(values));
  sent += 1;
  performance.mark(`asked-${sent}`);
  document.body.dataset.state = "asked";
  if (isReady) status.textContent = "Planning …";
  worker.postMessage({ id: sent, request: JSON.stringify(values) });
}

worker.onmessage = ({ data }) => {
  if (data.ready) {
    isReady = true;
    performance.mark("ready");
  } else if (data.failed) {
    fail(`The planner did not start: ${data.failed}`, null);
  } else if (data.id === sent) {
    if (data.error) fail(data.error, data.field);
    else if (data.done) finish();
    else show(data);
  }
};
worker.onerror = (event) => fail(`The planner did not start: ${event.message ?? "its script cannot be loaded"}`, null);

function show({ html, title, status: said, used, json: whole }) {
  if (title) {
    refuse("", null);
    document.title = `${title} · ScaleGPT`;
    status.textContent = said;
    showUsed(used);
    json = null;
    for (const part of parts) {
      part.classList.add("stale");
      part.inert = false;
    }
  }
  for (const [name, text] of Object.entries(html)) {
    element(name).innerHTML = text;
    element(name).classList.remove("stale");
  }
  if (whole) json = whole;
  element("save").disabled = !json;
  element("copy-command").hidden = !element("command").querySelector("pre");
  if (title) {
    performance.measure(`answer-${sent}`, `asked-${sent}`);
    document.body.dataset.state = "answered";
  }
}

function finish() {
  performance.measure(`whole-${sent}`, `asked-${sent}`);
  document.body.dataset.state = "done";
}

// What the plan has where the user gives nothing: in a text field as its placeholder, in a choice beside "auto".
function showUsed(used) {
  for (const field of fields) {
    const value = used[field.name] ?? "";
    if (field.tagName === "SELECT" && field.name !== "preset") {
      const first = field.options[0];
      first.dataset.word ??= first.textContent;
      first.textContent = value ? `${first.dataset.word}: ${value}` : first.dataset.word;
    } else if (field.name !== "gpu") field.placeholder = value;
  }
}

// --- what cannot be answered ---

function fail(message, name) {
  refuse(message, name);
  status.textContent = "No plan.";
  for (const part of parts) {
    part.classList.add("stale");
    part.inert = true;
  }
  json = null;
  element("save").disabled = element("copy-command").hidden = true;
  document.body.dataset.state = "failed";
}

function refuse(message, name) {
  const beside = name && element(`e-${name}`);
  for (const each of form.querySelectorAll(".problem")) each.textContent = each === beside ? message : "";
  for (const each of form.querySelectorAll("[aria-invalid]")) each.removeAttribute("aria-invalid");
  if (beside) {
    element(`f-${name}`).setAttribute("aria-invalid", "true");
    const details = beside.closest("details");
    if (details) details.open = true;
  }
  element("error").hidden = !message;
  element("error").textContent = message;
}

// --- events ---

let timer = 0;
form.addEventListener("input", (event) => {
  if (event.target.type === "file") return;
  if (event.target.name === "preset" && event.target.value && file) {
    file = null; // the preset replaces the file
    element("f-hf").value = "";
    showFile();
  }
  clearTimeout(timer);
  timer = setTimeout(ask, event.target.tagName === "SELECT" ? 0 : 60);
});
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => {
  others = {};
  file = null;
  setTimeout(() => (showOthers(), showFile(), ask())); // after the fields have been reset
});

async function take(chosen) {
  if (!chosen) return;
  const folder = (chosen.webkitRelativePath || "").split("/").at(-2);
  const stem = chosen.name.replace(/\.json$/i, "");
  let text = await chosen.text();
  try {
    text = JSON.stringify(JSON.parse(text)); // a shorter address
  } catch {
    // the planner says what is wrong with it
  }
  file = { name: folder ?? (stem === "config" ? "model" : stem), text };
  element("f-preset").value = "";
  showFile();
  ask();
}
element("f-hf").addEventListener("change", (event) => take(event.target.files[0]));
for (const kind of ["dragover", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    element("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") take(event.dataTransfer.files[0]);
  });
}
document.addEventListener("dragleave", () => element("drop").classList.remove("over"));

async function copy(button, text) {
  const word = (button.dataset.word ??= button.textContent);
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => (button.textContent = word), 1500);
}
element("copy-link").onclick = (event) => copy(event.currentTarget, location.href);
element("copy-command").onclick = (event) =>
  copy(event.currentTarget, element("command").querySelector("pre").textContent);
element("save").onclick = () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(json, null, 2)], { type: "application/json" }));
  link.download = "plan.json";
  link.click();
  URL.revokeObjectURL(link.href);
};
addEventListener("hashchange", () => (fill(Object.fromEntries(new URLSearchParams(location.hash.slice(1)))), ask()));

if (location.hash.length > 1) {
  fill(Object.fromEntries(new URLSearchParams(location.hash.slice(1))));
  parts.forEach((part) => part.classList.add("stale"));
  ask();
} else form.reset(); // a reloaded page may have kept its fields; the reset asks
