"""Checks of what is installed: Python, torch, DeepSpeed, a compiler."""

import importlib.metadata
import sys
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from scalegpt.doctor.checks import FAILURE, OK, WARNING, Finding, Setting, check
from scalegpt.planner.checks import INSTALL


def required(package: str) -> SpecifierSet:
    """The versions of a package that ScaleGPT's metadata allow; any version if they do not name the package."""
    found = [Requirement(line) for line in importlib.metadata.requires("scalegpt") or ()]
    return next((each.specifier for each in found if each.name == package), SpecifierSet())


@check("python")
def python(_: Setting) -> Iterator[Finding]:
    """Check that ScaleGPT runs on this version of Python."""
    version = ".".join(map(str, sys.version_info[:3]))
    wanted = SpecifierSet(importlib.metadata.metadata("scalegpt")["Requires-Python"] or "")
    if wanted.contains(version):
        yield Finding(OK, f"Python {version}")
    else:
        yield Finding(FAILURE, f"Python {version}, but ScaleGPT needs {wanted}", "make install PYTHON=python3.12")


@check("torch")
def torch(_: Setting) -> Iterator[Finding]:
    """Check that torch can be imported, that its version is allowed, and that its build suits the GPUs."""
    import torch

    from scalegpt.hardware.detect import find

    version, wanted = torch.__version__, required("torch")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU only"
    if not wanted.contains(version.partition("+")[0]):
        yield Finding(FAILURE, f"torch {version}, but ScaleGPT needs {wanted}", f"pip install 'torch{wanted}'")
    elif find().devices and not torch.cuda.is_available():
        yield Finding(
            FAILURE,
            f"torch {version} ({build}) finds no GPU, though the driver lists {len(find().devices)}",
            "install torch's build for this driver, see https://pytorch.org/get-started",
        )
    else:
        threads = torch.get_num_threads()
        yield Finding(OK, f"torch {version} ({build}), {threads} thread{'s' if threads > 1 else ''}")


@check("deepspeed")
def deepspeed(_: Setting) -> Iterator[Finding]:
    """Check DeepSpeed's version. DeepSpeed is an optional extra, so it may be missing."""
    wanted = required("deepspeed")
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        yield Finding(WARNING, "DeepSpeed is not installed; --backend deepspeed needs it", INSTALL)
        return
    if wanted.contains(version):
        yield Finding(OK, f"DeepSpeed {version}")
    else:
        yield Finding(FAILURE, f"DeepSpeed {version}, but --backend deepspeed needs {wanted}", INSTALL)


@check("compiler")
def compiler(_: Setting) -> Iterator[Finding]:
    """Check that ``torch.compile`` finds a compiler. Runs on GPUs compile by default, runs on CPUs do not."""
    import torch

    from scalegpt.backends.capabilities import resolve_compile

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compiled, problem = resolve_compile("on", device)
    if compiled:
        yield Finding(OK, "torch.compile finds a compiler")
    else:
        yield Finding(
            WARNING,
            f"{problem}",
            "install gcc and g++, for example apt install g++, and unset CC and CXX if they are wrong",
        )
