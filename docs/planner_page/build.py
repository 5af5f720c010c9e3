"""Builds the planner as a page in ``build/site``: npm's Pyodide, this repository's wheel, and PyYAML without its C part.

Usage: ``.venv/bin/python docs/planner_page/build.py``. ``package.json`` beside it has the version of Pyodide.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build"

NEEDED = ("architecture", "config", "hardware", "html", "interop", "plan_page", "planner", "system", "_bundled")
"""The folders of the package that the page uses."""


def main() -> None:
    """Build the page."""
    npm, wheels, packages, site = (BUILD / name for name in ("npm", "wheel", "packages", "site"))
    for folder in (wheels, packages, site):
        shutil.rmtree(folder, ignore_errors=True)
    npm.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(HERE / name, npm)
    _run("npm", "ci", "--prefix", str(npm), "--no-audit", "--no-fund", "--silent")
    _run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(wheels), str(ROOT))
    _unpack(next(wheels.glob("*.whl")), packages)
    (packages / "yaml").mkdir()
    for module in Path(yaml.__file__).parent.glob("*.py"):
        shutil.copy(module, packages / "yaml")
    _run("node", str(HERE / "build.mjs"), str(npm / "node_modules" / "pyodide"), str(packages), str(site))
    size = sum(file.stat().st_size for file in site.rglob("*") if file.is_file())
    print(f"the page is in {site.relative_to(ROOT)}, {size / 1e6:.1f} MB; `scalegpt plan --ui` serves it")


def _run(*words: str) -> None:
    try:
        subprocess.run(words, check=True, cwd=ROOT)
    except FileNotFoundError:
        sys.exit(f"{words[0]} is not installed; the page needs Node.js 20 or newer with npm")
    except subprocess.CalledProcessError as error:
        sys.exit(f"{words[0]} failed with status {error.returncode}")


def _unpack(wheel: Path, folder: Path) -> None:
    """Unpack the part of our wheel that the page uses."""
    with zipfile.ZipFile(wheel) as files:
        for name in files.namelist():
            parts = Path(name).parts
            if parts[0] == "scalegpt" and (len(parts) == 2 or parts[1] in NEEDED):
                files.extract(name, folder)


if __name__ == "__main__":
    main()
