"""``scalegpt plan --launch``, and the recipes of ``launch/``, which it makes."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from scalegpt.api import plan
from scalegpt.cli.main import main
from scalegpt.planner.start.launching import LAUNCHERS, launch_text

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["--preset", "350M_1024", "--input_file", "data/", "--backend", "fsdp"]
RECIPES = {"slurm": "launch/slurm/train.sbatch", "kubernetes": "launch/kubernetes/train.yaml"}
ASKED = ["plan", "--preset", "350M_1024", "--gpu", "h100-sxm", "--gpus", "8", "--input_file", "my data.txt"]


@pytest.mark.parametrize("launcher", RECIPES)
def test_the_recipes_are_what_the_planner_writes(launcher: str) -> None:
    """``python -c 'import tests…'`` is not needed to update one: the assertion shows the text."""
    choice = plan("350M_1024", gpu="h100-sxm", gpus=8, nodes=2).choice
    assert (ROOT / RECIPES[launcher]).read_text() == launch_text(choice, WORDS, launcher, installed=False) + "\n"


@pytest.mark.parametrize("nodes", ["1", "2"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_only_the_text_is_on_standard_output(capfd: pytest.CaptureFixture[str], launcher: str, nodes: str) -> None:
    assert main([*ASKED, "--nodes", nodes, "--launch", launcher]) == 0
    text = capfd.readouterr().out
    assert "350M_1024" in text
    if launcher == "kubernetes":
        runtime, job = yaml.safe_load_all(text)
        assert runtime["spec"]["mlPolicy"]["numNodes"] == job["spec"]["trainer"]["numNodes"] == int(nodes)
        assert job["spec"]["trainer"]["numProcPerNode"] == 8
        words = job["spec"]["trainer"]["args"]
        assert words[words.index("--input_file") + 1] == "my data.txt"
    else:
        checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=True)
        assert checked.stderr == ""
        assert "'my data.txt'" in text
        numbers = {"torchrun": f"--nnodes {nodes} --nproc_per_node 8", "slurm": f"#SBATCH --nodes={nodes}\n"}
        assert numbers.get(launcher, "slots=8" if nodes == "2" else "--num_gpus 8") in text


def test_the_stated_network_is_checked_by_the_run(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, "--nodes", "2", "--network", "8xinfiniband-400g", "--launch", "torchrun"]) == 0
    assert "--network 3200Gb/s" in capfd.readouterr().out


def test_nothing_is_printed_for_a_plan_that_does_not_fit(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, "--memory_gb", "1", "--launch", "slurm"]) == 3
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "does not fit" in printed.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "--gpu", "h100-sxm", "--launch", "slurm"], "launch starts one run; give --preset"),
        ([*ASKED, "--launch", "slurm", "--json"], "json does not go with --launch"),
    ],
)
def test_what_is_not_one_run_is_refused(capfd: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert main(words) == 2
    assert said in capfd.readouterr().err


SRUN = """#!/bin/sh
# a stand-in for srun: it "trains" until it is signalled, then "saves" and fails, as torchrun does
trap 'echo saved; exit 1' USR1
echo $$ > srun.pid
echo "$@" > srun.words
while :; do sleep 0.05; done
"""
SCONTROL = '#!/bin/sh\ncase "$1" in show) echo node1; echo node2;; requeue) echo "$2" > requeued;; esac\n'
SCANCEL = '#!/bin/sh\necho "$@" > cancelled\nkill -USR1 "$(cat srun.pid)"\n'


def test_a_signal_to_the_batch_script_saves_and_queues_the_job_again(tmp_path: Path) -> None:
    """With stand-ins for Slurm's programs; docs/CLUSTERS.md says what was seen under Slurm itself."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    variables = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    environment = {**os.environ, **variables, "SLURM_CPUS_ON_NODE": "4", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = subprocess.Popen(
        ["bash", str(ROOT / RECIPES["slurm"])], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    while not (tmp_path / "srun.words").exists() or not (tmp_path / "srun.words").read_text():
        assert job.poll() is None
    job.send_signal(10)
    assert job.communicate(timeout=60)[0] == "saved\n"
    assert job.returncode == 1
    assert (tmp_path / "requeued").read_text() == "77\n"
    assert (tmp_path / "cancelled").read_text() == "--signal=USR1 77\n"
    words = (tmp_path / "srun.words").read_text()
    assert "torchrun --nnodes 2 --nproc_per_node 8" in words
    assert "--rdzv_endpoint node1:20077" in words


def test_the_kubernetes_recipe_keeps_to_the_schema_of_its_kinds() -> None:
    """Against Kubeflow Trainer's CRDs, in the folder that ``TRAINER_CRDS`` names (manifests/base/crds of its repository)."""
    folder = os.environ.get("TRAINER_CRDS")
    if folder is None:
        pytest.skip("TRAINER_CRDS names no folder with Kubeflow Trainer's CRDs")
    jsonschema = pytest.importorskip("jsonschema")
    for document in yaml.safe_load_all((ROOT / RECIPES["kubernetes"]).read_text()):
        plural = f"{document['kind'].lower()}s"
        crd = yaml.safe_load((Path(folder) / f"trainer.kubeflow.org_{plural}.yaml").read_text())
        (version,) = [each for each in crd["spec"]["versions"] if document["apiVersion"].endswith(f"/{each['name']}")]
        jsonschema.validate(document, _closed(version["schema"]["openAPIV3Schema"]))


def _closed(schema: object) -> object:
    """The schema in which an object has no other fields than those it names, as the API server prunes the others."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if closed.pop("x-kubernetes-int-or-string", False):
        return {"type": ["integer", "string"]}
    if isinstance(closed.get("properties"), dict) and closed.get("type") == "object" and closed["properties"]:
        is_open = "additionalProperties" in closed or closed.get("x-kubernetes-preserve-unknown-fields")
        if not is_open and set(closed["properties"]) != {"metadata"}:
            closed["additionalProperties"] = False
    return closed
