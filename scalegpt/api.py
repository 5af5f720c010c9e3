"""The functions of ``import scalegpt``: :func:`plan`, :func:`train` and :func:`load`. The commands run the same code.

Importing this module loads neither torch nor numpy, nor does planning.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalegpt.config.inference import InferenceSettings
from scalegpt.config.shape import ModelConfig
from scalegpt.errors import InputError, RunError
from scalegpt.inputs import Inputs
from scalegpt.planner.query import Answer, Asked, answer
from scalegpt.planner.target import Target

if TYPE_CHECKING:  # imported in the functions that need them, so that planning starts at once
    from scalegpt.inference.loaded import LoadedModel
    from scalegpt.training.request import Request
    from scalegpt.training.resilience.stopping import LauncherWatch, StopRequest
    from scalegpt.training.run import Ending


def plan(
    preset: str | None = None,
    *,
    config_file: str | Path | None = None,
    hf: str | Path | None = None,
    gpu: str | None = None,
    gpus: int | None = None,
    nodes: int | None = None,
    memory_gb: float | None = None,
    host_memory_gb: float | None = None,
    network: str | None = None,
    network_gbps: float | None = None,
    price_per_gpu_hour: float | None = None,
    margin: float | None = None,
    calibrated: bool = True,
    trace: bool = False,
    **settings: Any,
) -> Answer:
    """Choose the fastest way to train a model within a machine's memory, as ``scalegpt plan`` does; needs no GPU or torch.

    Examples:
        >>> plan("500M_1024", gpu="a100-40gb", gpus=8).choice.fits
        True

    Args:
        preset: a named configuration, see ``scalegpt presets``.
        config_file: a JSON or YAML file in the form of a preset, instead of a preset.
        hf: a folder with a Hugging Face model, or its ``config.json``, instead of a preset.
        gpu: the card, such as ``a100-40gb``; ``cpu``: this processor; None: the GPUs here, or that of ``memory_gb``.
        gpus: number of GPUs in each machine; None: those found here, or one if ``gpu`` is given.
        nodes: number of machines; None: one.
        memory_gb: memory to use on each card, in GB of 10⁹ bytes; without ``gpu``, the memory of a card without a name.
        host_memory_gb: host memory of each machine, in GB of 10⁹ bytes; offload needs it.
        network: network of each machine, for example ``infiniband-400g``, ``8xinfiniband-400g`` or ``50GB/s``.
        price_per_gpu_hour: price of one GPU for one hour; ``as_dict()`` then has the cost of the run.
        network_gbps: the same as a number in Gbit/s in each direction, instead of ``network``.
        margin: share of a card's memory that the plan leaves free; None: 0.03.
        calibrated: correct the prediction by measurements of earlier runs.
        trace: also run the real step on tensors without data, to compare peaks; this needs torch and takes seconds.
        settings: any settings of a run, for example ``micro_batch=8``. The planner keeps them, and chooses the others of
            :data:`~scalegpt.config.run.PLANNED`.

    Returns:
        The answer. Its ``choice`` is the plan, with ``fits``, ``total_bytes``, ``seconds`` of a step, ``batch`` and ``run``.
        ``command()`` is the command that trains it; ``as_dict()`` has the values that ``scalegpt plan --json`` prints.

    Raises:
        InputError: a name or a card is unknown, or the settings are not valid.
    """
    if preset is config_file is hf is None and settings.keys().isdisjoint({*ModelConfig.settings(), "init_from"}):
        raise InputError("plan() needs a preset, a config_file, hf, or settings of the model such as n_layer=12")
    machine = {"gpu": gpu, "gpus": gpus, "nodes": nodes, "memory_gb": memory_gb, "host_memory_gb": host_memory_gb}
    machine |= {"network": network, "network_gbps": network_gbps, "price_per_gpu_hour": price_per_gpu_hour}
    target = Target.of(_given(**machine, margin=margin), "plan()", calibrated=calibrated)
    asked = Asked.of(
        preset=preset, config_file=_text(config_file), hf=_text(hf), flags=settings,
        machine=target.machine, calibration=target.calibration, margin=target.margin, given_in="plan()",
    )  # fmt: skip
    given = answer(asked)
    return traced(given) if trace else given


def traced(given: Answer) -> Answer:
    """Add the traced peak of each phase to the answer, from the trainer's own step on tensors without data.

    Raises:
        InputError: the backend or the offload cannot be traced.
    """
    from scalegpt.tracing.trace import trace_step

    choice = given.choice
    trace = trace_step(choice.run, ranks=choice.machine.ranks, grad_accum=choice.batch.grad_accum)
    return replace(given, trace=trace.phases)


def train(
    preset: str | None = None,
    *,
    input_file: Inputs | None = None,
    config_file: str | Path | None = None,
    model_name: str | None = None,
    runs_dir: str | Path = "runs",
    device: str = "auto",
    fresh: bool = False,
    margin: float | None = None,
    allow_change: str | Iterable[str] = (),
    trust_checkpoint: bool = False,
    resume_step: int | None = None,
    progress: str = "auto",
    **settings: Any,
) -> Path:
    """Train a model in this process, as ``scalegpt train`` does; the same call resumes an unfinished run.

    For several ranks, start the script with ``torchrun`` or ``deepspeed``, so that each rank calls this function. If it
    is called in the main thread, signals such as Ctrl-C end the run after the current step, with a checkpoint; before
    the first step, a signal ends the process. A step that exceeds ``step_timeout`` ends the process with status 75.

    Args:
        preset: a named configuration, see ``scalegpt presets``; None: the settings' defaults.
        input_file: text or tokens, a list of these, or a mixture, ``{path: weight}``; None: what ``config_file`` names.
        config_file: a JSON or YAML file in the form of a preset, instead of a preset.
        model_name: the run's folder in ``runs_dir``; None: the preset's name.
        runs_dir: the folder of all runs.
        device: ``cpu``, ``cuda``, or ``auto``: CUDA if there is a CUDA device.
        fresh: start a new run, in a folder beside that of an earlier run of the same name.
        margin: share of a card's memory that a chosen micro batch leaves free; None: 0.03.
        allow_change: settings that may differ when the run resumes, or ``data``.
        trust_checkpoint: resume from a checkpoint that another run has written.
        resume_step: resume from the checkpoint of this step, and set later checkpoints aside.
        progress: ``auto``: a live line where the output is a terminal; ``plain``: plain lines everywhere.
        settings: any setting of a run, for example ``max_iters=1000``. They override the preset; ``scalegpt train
            --help`` lists them.

    Returns:
        The run's folder, with ``metrics.jsonl``, ``run_status.json`` and ``checkpoints/``.

    Raises:
        InputError: a setting, the data or the run's folder cannot be used; nothing was changed.
        RunError: the run failed, and ``run_status.json`` says why; or a signal stopped it after a checkpoint.
    """
    from scalegpt.training.request import Request
    from scalegpt.training.resilience.stopping import LauncherWatch, StopRequest

    stop = StopRequest()
    request = Request.of(
        preset=preset, config_file=_text(config_file), name=model_name, runs_dir=Path(runs_dir), fresh=fresh, margin=margin,
        settings={**settings, **_given(input_file=input_file)}, allow_change=allow_change,
        trust_checkpoint=trust_checkpoint, resume_step=resume_step, progress=progress, given_in="train()",
    )  # fmt: skip
    ending = run_request(request, device, stop, LauncherWatch(stop))
    if ending.status or ending.folder is None:
        raise RunError(
            f"the run was stopped (status {ending.status}); the same call, without fresh and resume_step, resumes it"
        )
    return ending.folder


def run_request(request: "Request", device: str, stop: "StopRequest", launcher: "LauncherWatch") -> "Ending":
    """Train as requested; stop on a signal, or when the launcher ends. Torch is imported here.

    Raises:
        InputError: the request cannot be met; nothing was changed.
        RunError: the run failed.
    """
    with stop.listening():
        with stop.alone():  # importing torch takes seconds; a signal ends the process at once
            launcher.start()
            from scalegpt.training.run import train as train_run
        try:
            return train_run(request, device, stop)
        finally:
            launcher.stop()


def load(
    run: str | Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    checkpoint: str | int = "last",
    runs_dir: str | Path = "runs",
) -> "LoadedModel":
    """Load a trained model for inference.

    Examples:
        >>> load("runs/tiny").generate("Once upon a time", max_new_tokens=50)  # doctest: +SKIP

    Args:
        run: a run's folder; a checkpoint's folder; or the name of a run in ``runs_dir``.
        device: ``cpu``, ``cuda``, or ``auto``: CUDA if there is a CUDA device.
        precision: the dtype to compute in, ``fp32``, ``bf16``, ``fp16``, or ``auto``: bf16 on a CUDA device with bf16
            units, else fp32.
        checkpoint: which checkpoint of the run: ``last``, ``best`` (the lowest held-out loss), or a step.
        runs_dir: the folder in which the name of a run is looked up.

    Returns:
        The loaded model. ``generate(prompt)`` continues a text. ``model`` is the torch module; ``tokenizer`` and
        ``header`` are those of the checkpoint.

    Raises:
        InputError: a value is not one of those above; there is no such run, checkpoint or device; or the checkpoint is
            damaged.
    """
    from scalegpt.checkpoint.address import place_of
    from scalegpt.inference.load import load_model

    given = {"device": device, "precision": precision, "checkpoint": checkpoint}
    settings = InferenceSettings.from_mapping(given, "load()")
    path = place_of(str(run))
    named = Path(runs_dir) / str(run)
    is_name = isinstance(path, Path) and len(path.parts) == 1 and not path.exists() and named.exists()
    return load_model(
        named if is_name else path, settings.device, precision=settings.precision, checkpoint=settings.checkpoint
    )


def _given(**settings: Any) -> dict[str, Any]:
    """The given settings, without those that are None."""
    return {key: value for key, value in settings.items() if value is not None}


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)
