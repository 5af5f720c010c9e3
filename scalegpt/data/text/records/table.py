"""The formats of records that are read, and the reader of each."""

from importlib.util import find_spec

from scalegpt.data.text.formats import ARROW, CSV, JSON_RECORDS, JSONL, PARQUET, TSV
from scalegpt.data.text.records.base import Reader
from scalegpt.data.text.records.columns import read_arrow, read_parquet
from scalegpt.data.text.records.json_records import read_json_array, read_json_lines
from scalegpt.data.text.records.tables import read_csv, read_tsv

READERS: dict[str, Reader] = {
    JSONL.name: read_json_lines,
    JSON_RECORDS.name: read_json_array,
    CSV.name: read_csv,
    TSV.name: read_tsv,
    PARQUET.name: read_parquet,
    ARROW.name: read_arrow,
}
"""Name of a format (:attr:`~scalegpt.data.text.formats.Format.name`) → the reader of its records."""


def lacks_package(form: str) -> bool:
    """Whether the package that reads a format is not installed."""
    return form in {PARQUET.name, ARROW.name} and find_spec("pyarrow") is None
