"""All checks: importing this module registers them, in the order of the imports."""

from scalegpt.doctor import software  # isort: skip
from scalegpt.doctor import gpus  # isort: skip
from scalegpt.doctor import speed  # isort: skip
from scalegpt.doctor import files  # isort: skip
from scalegpt.doctor import system  # isort: skip
from scalegpt.doctor import network  # isort: skip
from scalegpt.doctor.checks import CHECKS, run_checks

__all__ = ["CHECKS", "files", "gpus", "network", "run_checks", "software", "speed", "system"]
