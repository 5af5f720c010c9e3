"""What a run is: the model's shape, the training settings, the parallel layout, the data; presets and overrides."""

from scalegpt.config.run import DataConfig, ParallelConfig, RunConfig
from scalegpt.config.shape import ModelConfig
from scalegpt.config.train import TrainConfig

__all__ = ["DataConfig", "ModelConfig", "ParallelConfig", "RunConfig", "TrainConfig"]
