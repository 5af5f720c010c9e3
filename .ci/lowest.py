"""Print a pip constraint to the lowest release that pyproject.toml declares of each dependency, one a line.

`make lowest` tests with these that the declared bounds work. torch is no part of it: of the releases declared, the package
index has the lower ones only with CUDA's libraries, several gigabytes.
"""

import re
import tomllib
from pathlib import Path

NOT_TESTED = {"torch"}


def lowest(requirements: list[str]) -> list[str]:
    """The lower bound of each requirement as an exact version; those without one are free."""
    found = (re.match(r"([A-Za-z0-9._-]+)>=([0-9.]+)", requirement) for requirement in requirements)
    return [f"{match[1]}=={match[2]}" for match in found if match is not None and match[1] not in NOT_TESTED]


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    print("\n".join(lowest([*project["dependencies"], *extras["deepspeed"], *extras["dev"]])))
