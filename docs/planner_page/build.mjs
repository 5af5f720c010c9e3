// node build.mjs PYODIDE PACKAGES SITE: writes the planner as a page to the folder SITE.
//
// PYODIDE: the folder of the npm package. PACKAGES: a folder with the Python packages of the page. Python starts here once,
// imports the planner and makes one plan; its memory is kept (memory.bin), so that Python in the page needs not do the same.
import { cpSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import path from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { gzipSync } from "node:zlib";

const [pyodide, packages, site] = process.argv.slice(2).map((each) => path.resolve(each));
const here = path.dirname(fileURLToPath(import.meta.url));
const { loadPyodide } = await import(pathToFileURL(path.join(pyodide, "pyodide.mjs")));

// Compiles the packages, and gives them as a tar archive.
const COMPILE = `
import compileall, io, shutil, sys, tarfile
from pathlib import Path

shutil.copytree("/packages", "/app")
compileall.compile_dir("/app", quiet=1, legacy=True, optimize=2, workers=1)
for source in Path("/app").rglob("*.py"):
    source.unlink()
archive = io.BytesIO()
with tarfile.open(fileobj=archive, mode="w") as tar:
    for file in sorted(Path("/app").rglob("*")):
        if file.is_file():
            tar.add(file, file.relative_to("/app"))
sys.path.insert(0, "/app")
from scalegpt.plan_page.form import STYLE, index
`;

// Imports the planner and answers one request, whose parts that are quick are enough to have all modules and the cards.
const WARM = `
import gc, json, sys
sys.path.insert(0, "/app")
from scalegpt.plan_page.browser import parts
from scalegpt.plan_page.form import FIRST
next(parts(json.dumps(FIRST)))
gc.collect()
`;

const first = await loadPyodide({ packages: [] });
first.FS.mkdirTree("/packages");
first.FS.mount(first.FS.filesystems.NODEFS, { root: packages }, "/packages");
first.runPython(COMPILE);
const files = first.runPython("archive.getvalue()").toJs();
const [page, style] = [first.runPython("index()"), first.globals.get("STYLE")];

const second = await loadPyodide({ packages: [], _makeSnapshot: true });
const room = second._module.HEAP8.length;
second.unpackArchive(files, "tar", { extractDir: "/app" });
second.runPython(WARM);
if (second._module.HEAP8.length > room) throw new Error("memory grew, and Python in the page starts with less; warm up less");

const write = (name, content) => writeFileSync(path.join(site, name), content);
mkdirSync(path.join(site, "pyodide"), { recursive: true });
for (const name of ["pyodide.mjs", "pyodide.asm.mjs", "pyodide.asm.wasm", "python_stdlib.zip", "pyodide-lock.json"]) {
  cpSync(path.join(pyodide, name), path.join(site, "pyodide", name));
}
for (const name of ["main.mjs", "worker.mjs", "icon.svg"]) cpSync(path.join(here, name), path.join(site, name));
write("index.html", page);
write("site.css", style + readFileSync(path.join(here, "site.css"), "utf8"));
write("packages.bin", gzipSync(files, { level: 9 }));
write("memory.bin", gzipSync(second.makeMemorySnapshot(), { level: 9 }));
