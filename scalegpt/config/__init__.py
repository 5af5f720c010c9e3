"""The configuration of a run: settings that are checked when made, presets and files, and flags that override both.

Read ``run.py`` first, then ``settings.py`` (how a setting is described) and ``presets.py`` (how a run is resolved). May
import :mod:`scalegpt.structured`, :mod:`~scalegpt.storage`, :mod:`~scalegpt.text` and :mod:`~scalegpt.errors`; no torch.
"""

from scalegpt.config.run import DataConfig, ParallelConfig, RunConfig
from scalegpt.config.shape import ModelConfig
from scalegpt.config.train import TrainConfig

__all__ = ["DataConfig", "ModelConfig", "ParallelConfig", "RunConfig", "TrainConfig"]
