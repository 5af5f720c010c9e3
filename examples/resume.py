"""Resume a run with its own configuration, and train it longer. Run train.py first.

python examples/resume.py runs/example 40
"""

import json
import sys
from pathlib import Path

import scalegpt


def main(run: Path, steps: int) -> None:
    """Resume from the newest checkpoint, and train up to step ``steps``."""
    before = json.loads((run / "run_status.json").read_text())["step"]
    scalegpt.train(config_file=run / "config.yaml", model_name=run.name, runs_dir=run.parent, max_iters=steps)
    after = json.loads((run / "run_status.json").read_text())
    print(f"{run}: {after['state']}, from step {before} to step {after['step']}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]))
