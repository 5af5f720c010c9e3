"""Commands and files that start the training of a plan under launchers: torchrun, deepspeed, Slurm, Kubernetes.

The recipes in ``launch/`` are these texts for one plan; a test compares them.
"""

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence

from scalegpt.planner.plan import Plan
from scalegpt.system.invocation import IN_BROWSER, MODULE, program, script_words

WARNING_SECONDS = 300
"""Seconds before its time limit at which Slurm signals a job, and which Kubernetes grants a pod that it ends."""

SAVE_SECONDS = 240
"""Seconds that torchrun gives its ranks to finish a step and save."""

RESTARTS = 3
"""How often a job starts again after a failure without a user."""

PORT = 29500

NEW_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
"""Lets a machine join again: torchrun's agents then tell each other at each restart where the ranks meet.

Otherwise an agent that stays (torch 2.13) does not tell a new one, which gives up after 60 s.
"""

FIRST_MACHINE = "FIRST_MACHINE"
"""Placeholder for the name of the machine on which rank 0 runs."""


def launch_text(plan: Plan, words: Sequence[str], launcher: str, *, installed: bool = True) -> str:
    """The command or the file that starts the training of a plan under a launcher.

    Args:
        plan: the plan; its machine says how many machines and GPUs there are.
        words: the flags of the run.
        launcher: a key of :data:`LAUNCHERS`.
        installed: name the programs as this installation has them; False: as a checkout on ``PATH`` has them.
    """
    return LAUNCHERS[launcher](plan, words, installed)


def _target(installed: bool, *, module_flag: str = "-m") -> list[str]:
    """The words that name the script for a launcher."""
    return script_words(module_flag) if installed and not IN_BROWSER else ["launch/train.py"]


def _launcher(name: str, installed: bool) -> list[str]:
    return program(name) if installed else [name]


def _torchrun(plan: Plan, words: Sequence[str], installed: bool) -> str:
    """The command for torchrun, which the user starts on every machine."""
    nodes, gpus = plan.machine.nodes, plan.machine.gpus
    where = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{FIRST_MACHINE}:{PORT}"] if nodes > 1 else ["--standalone"]
    options = ["--nnodes", str(nodes), "--nproc_per_node", str(gpus), "--max-restarts", str(RESTARTS), *where]
    line = shlex.join([*_launcher("torchrun", installed), *options, *_target(installed), *words])
    if nodes == 1:
        return line
    return f"# on each of the {nodes} machines; put the first one's name for {FIRST_MACHINE}\n{NEW_STORE} {line}"


def _deepspeed(plan: Plan, words: Sequence[str], installed: bool) -> str:
    """The command for deepspeed, which the user starts on the first machine, and the lines of its hostfile."""
    nodes, gpus = plan.machine.nodes, plan.machine.gpus
    target = [*_target(installed, module_flag="--module"), *words]
    if nodes == 1:
        return shlex.join([*_launcher("deepspeed", installed), "--num_gpus", str(gpus), *target])
    lines = [f"# hostfile has a line for each of the {nodes} machines:  HOST slots={gpus}"]
    return "\n".join([*lines, shlex.join([*_launcher("deepspeed", installed), "--hostfile", "hostfile", *target])])


def _slurm(plan: Plan, words: Sequence[str], installed: bool) -> str:
    """The file for sbatch: one task a machine, which runs torchrun."""
    nodes, gpus = plan.machine.nodes, plan.machine.gpus
    devices = [f"#SBATCH --gpus-per-node={gpus}"] if plan.machine.is_gpu else []
    torchrun = [
        shlex.join(_launcher("torchrun", installed)),
        f'--nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node {gpus} --max-restarts {RESTARTS}',
        '--rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$first:$((20000 + SLURM_JOB_ID % 10000))"',
        f"--signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout {SAVE_SECONDS}",
        shlex.join([*_target(installed), *words]),
    ]
    command = " \\\n    ".join(['srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_ON_NODE"', *torchrun])
    return "\n".join((
        "#!/bin/bash",
        "# ScaleGPT under Slurm: one task a machine, which runs torchrun. Start it with sbatch, from a folder that all",
        "# machines share.",
        f"#SBATCH --job-name={_plain_name(plan)}",
        f"#SBATCH --nodes={nodes}",
        "#SBATCH --ntasks-per-node=1",
        *devices,
        "#SBATCH --exclusive",
        "#SBATCH --time=24:00:00",
        f"#SBATCH --signal=B:USR1@{WARNING_SECONDS}",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --output=%x-%j.log",
        "",
        f"# {WARNING_SECONDS} s before the time limit Slurm sends SIGUSR1 to this script, which passes it on to the ranks.",
        "# They finish the step, save and end, and the job is queued again. The same command then resumes the run.",
        "trap 'again=yes; scancel --signal=USR1 \"$SLURM_JOB_ID\"' USR1",
        "",
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"{command} &",
        'wait "$!"; status=$?',
        'while kill -0 "$!" 2>/dev/null; do wait "$!"; status=$?; done  # a signal ends wait early',
        'if [ -n "$again" ] && [ "$status" -ne 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
        'exit "$status"',
    ))  # fmt: skip


def _kubernetes(plan: Plan, words: Sequence[str], installed: bool) -> str:
    """The file for ``kubectl apply``: a runtime and a job of Kubeflow Trainer 2, which sets torchrun's variables."""
    del installed  # the image has the programs
    name = f"scalegpt-{_plain_name(plan).lower()}"  # it must begin with a letter
    return f"{_training_runtime(plan, name)}\n---\n{_train_job(plan, name, words)}"


def _training_runtime(plan: Plan, name: str) -> str:
    """The pods: their number, image and volumes, and how often they are started again."""
    return f"""\
# ScaleGPT on Kubernetes, by Kubeflow Trainer 2. Start it with kubectl apply -f FILE. Fill in `image` (made from the
# Dockerfile) and `claimName`: a volume that all pods can write (ReadWriteMany), with the data; the runs go there.
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainingRuntime
metadata:
  name: {name}
spec:
  mlPolicy:
    numNodes: {plan.machine.nodes}
    torch: {{}}
  template:
    spec:
      failurePolicy:
        maxRestarts: {RESTARTS}
      replicatedJobs:
        - name: node
          template:
            metadata:
              labels:
                trainer.kubeflow.org/trainjob-ancestor-step: trainer
            spec:
              template:
                spec:
                  terminationGracePeriodSeconds: {WARNING_SECONDS}
                  containers:
                    - name: node
                      image: scalegpt
                      workingDir: /work
                      volumeMounts:
                        - name: work
                          mountPath: /work
                        - name: shared-memory
                          mountPath: /dev/shm
                  volumes:
                    - name: work
                      persistentVolumeClaim:
                        claimName: scalegpt
                    - name: shared-memory
                      emptyDir:
                        medium: Memory"""


def _train_job(plan: Plan, name: str, words: Sequence[str]) -> str:
    """The job on these pods: its GPUs and its command."""
    gpus, resource = plan.machine.gpus, "nvidia.com/gpu" if plan.machine.is_gpu else "cpu"
    command = ["torchrun", "--shutdown-timeout", str(SAVE_SECONDS), "-m", MODULE, *words]
    return f"""\
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainJob
metadata:
  name: {name}
spec:
  runtimeRef:
    apiGroup: trainer.kubeflow.org
    kind: TrainingRuntime
    name: {name}
  trainer:
    numNodes: {plan.machine.nodes}
    numProcPerNode: {gpus}
    resourcesPerNode:
      limits:
        {resource}: {gpus}
    command: {json.dumps(command[:1])}
    args: {json.dumps(command[1:], ensure_ascii=False)}"""


def _plain_name(plan: Plan) -> str:
    """The run's name in letters, digits and hyphens, at most 40 of them, beginning and ending with a letter or digit."""
    return re.sub(r"[^A-Za-z0-9]+", "-", plan.run.name)[:40].strip("-") or "run"


LAUNCHERS: Mapping[str, Callable[[Plan, Sequence[str], bool], str]] = {
    "torchrun": _torchrun,
    "deepspeed": _deepspeed,
    "slurm": _slurm,
    "kubernetes": _kubernetes,
}
"""Value of ``scalegpt plan --launch`` → the function that makes the text."""
