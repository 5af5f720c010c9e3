// Runs the planner (Python, in Pyodide) beside the page. It receives {id, request} and sends the parts of the answer, each
// with its id. A newer request ends the work on an older one.
import { loadPyodide } from "./pyodide/pyodide.mjs";

let newest = null;
let wake = () => {};

onmessage = ({ data }) => {
  newest = data;
  wake();
};

const unzipped = async (name) => {
  const response = await fetch(new URL(name, import.meta.url));
  if (!response.ok) throw new Error(`${name}: ${response.status}`);
  const plain = response.body.pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(plain).arrayBuffer());
};

async function start() {
  // The memory of a Python that has imported the planner, made by build.mjs: nothing is imported or compiled here.
  const [memory, files] = await Promise.all([unzipped("memory.bin"), unzipped("packages.bin")]);
  const python = await loadPyodide({ packages: [], _loadSnapshot: memory });
  python.unpackArchive(files, "tar", { extractDir: "/app" });
  return python.globals.get("parts");
}

const breath = () => new Promise((done) => setTimeout(done)); // lets onmessage run
const lastLine = (error) => String(error.message ?? error).trim().split("\n").pop();

async function answer(parts, { id, request }) {
  const steps = parts(request);
  try {
    for (const part of steps) {
      if (part) postMessage({ id, ...JSON.parse(part) });
      await breath();
      if (newest) return;
    }
    postMessage({ id, done: true });
  } catch (error) {
    postMessage({ id, error: `${lastLine(error)} (a bug in ScaleGPT)`, field: null });
  } finally {
    steps.destroy();
  }
}

try {
  const parts = await start();
  postMessage({ ready: true });
  for (;;) {
    while (!newest) await new Promise((done) => (wake = done));
    const asked = newest;
    newest = null;
    await answer(parts, asked);
  }
} catch (error) {
  postMessage({ failed: lastLine(error) });
}
