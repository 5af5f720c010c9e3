"""Hugging Face's ``config.json``, read as a model's shape and written from one, for the families that ScaleGPT can express.

:mod:`~scalegpt.interop.families.table` says what each family is; reading and writing are the same for all. Neither imports
torch, so the planner reads a folder as fast as a preset.
"""

from scalegpt.interop.families.reading import HfModel, read_config
from scalegpt.interop.families.table import FAMILIES, Family
from scalegpt.interop.families.writing import as_config, families_of

__all__ = ["FAMILIES", "Family", "HfModel", "as_config", "families_of", "read_config"]
