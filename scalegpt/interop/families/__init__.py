"""Reads Hugging Face's ``config.json`` as a model's shape, and writes it from one, for the families that ScaleGPT knows.

:mod:`~scalegpt.interop.families.table` describes each family; reading and writing use the same code for all. It imports
no torch, so the planner reads a folder as fast as a preset.
"""

from scalegpt.interop.families.reading import HfModel, read_config
from scalegpt.interop.families.table import FAMILIES, Family
from scalegpt.interop.families.writing import as_config, families_of

__all__ = ["FAMILIES", "Family", "HfModel", "as_config", "families_of", "read_config"]
