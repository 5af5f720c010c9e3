"""Read Parquet and Arrow by pyarrow: the column of the text alone, some rows at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from scalegpt.data.text.packed import DamagedError, InputFile, MissingPackageError
from scalegpt.data.text.records.base import RecordError, TextField, checked_text
from scalegpt.errors import InputError
from scalegpt.text import brief, one_line

_ROWS = 256
"""Rows that are in memory as Python's strings at once."""

_BUFFER_BYTES = 1 << 20
"""Bytes of a column that are read at once: without it pyarrow reads a whole row group's."""

_STREAM_START = b"\xff\xff\xff\xff"


def read_parquet(file: InputFile, encoding: str, field: TextField) -> Iterator[str]:  # noqa: ARG001 - Parquet is UTF-8
    """Yield the text of each row; see :data:`~.base.Reader`."""
    with _pyarrow_errors() as pa:
        import pyarrow.parquet

        with pa.OSFile(str(file.path)) as opened:
            table = pyarrow.parquet.ParquetFile(
                opened, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
            )
            path = _path(pa, table.schema_arrow, field)
            total, size, rows = table.metadata.num_rows, _size(file), 0
            for batch in table.iter_batches(_ROWS, columns=[str(field.name)], use_threads=False):
                file.position = size * min(rows, total) // max(total, 1)
                yield from _texts(pa, batch, path, str(field.name), rows)
                rows += len(batch)


def read_arrow(file: InputFile, encoding: str, field: TextField) -> Iterator[str]:  # noqa: ARG001 - Arrow is UTF-8
    """Yield the text of each row of an Arrow file or stream; see :data:`~.base.Reader`.

    A record batch is read whole, since nothing less can be read of it.
    """
    with _pyarrow_errors() as pa, pa.OSFile(str(file.path)) as opened:
        is_stream = opened.read(len(_STREAM_START)) == _STREAM_START
        opened.seek(0)
        schema = (pa.ipc.open_stream if is_stream else pa.ipc.open_file)(opened).schema
        path = _path(pa, schema, field)
        options = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(path[0])], use_threads=False)
        opened.seek(0)
        if is_stream:
            batches = _of_stream(pa.ipc.open_stream(opened, options=options), opened, file)
        else:
            batches = _of_file(pa.ipc.open_file(opened, options=options), file)
        rows = 0
        for batch in batches:
            yield from _texts(pa, batch, path, str(field.name), rows)
            rows += len(batch)


def _of_stream(reader: Any, opened: Any, file: InputFile) -> Iterator[Any]:
    for batch in reader:
        file.position = opened.tell()
        yield batch


def _of_file(reader: Any, file: InputFile) -> Iterator[Any]:
    size, count = _size(file), reader.num_record_batches
    for number in range(count):
        file.position = size * number // count
        yield reader.get_batch(number)


def _size(file: InputFile) -> int:
    return file.path.stat().st_size


@contextmanager
def _pyarrow_errors() -> Iterator[Any]:
    """Give the package pyarrow, and turn its errors into :class:`~scalegpt.data.text.packed.DamagedError`.

    Raises:
        MissingPackageError: pyarrow is not installed.
    """
    try:
        import pyarrow  # imported here, since it is an extra
        import pyarrow.ipc
    except ImportError:
        raise MissingPackageError("Parquet or Arrow") from None
    try:
        yield pyarrow
    except InputError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        raise DamagedError(brief(error, 200)) from None
    except (pyarrow.ArrowException, MemoryError, ValueError, KeyError, OverflowError) as error:
        raise DamagedError(brief(error, 200) or type(error).__name__) from None


def _path(pa: Any, schema: Any, field: TextField) -> list[str]:
    """The path of the text's column: its name, or the names of structs and then of a field in them.

    Raises:
        NoFieldError: there is no such column.
        RecordError: the column holds no text, or several have its name.
    """
    name = field.choose(lambda name: _type(pa, schema, _parts(schema, name)) is not None, schema.names)
    path = _parts(schema, name)
    kind = _type(pa, schema, path)
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not (is_text or pa.types.is_null(kind)):
        raise RecordError("the schema", f"column {one_line(name)} is {brief(kind, 60)}, not text")
    if schema.names.count(path[0]) > 1:
        raise RecordError("the schema", f"it has {schema.names.count(path[0])} columns {one_line(path[0])}")
    return path


def _parts(schema: Any, name: str) -> list[str]:
    return [name] if name in schema.names else name.split(".")


def _type(pa: Any, schema: Any, path: list[str]) -> Any:
    """The type of the column at a path; None if there is none."""
    if path[0] not in schema.names:
        return None
    kind = schema.field(schema.names.index(path[0])).type
    for name in path[1:]:
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    return kind


def _texts(pa: Any, batch: Any, path: list[str], name: str, before: int) -> Iterator[str]:
    """The texts of a batch, which ``before`` rows of the file precede.

    Raises:
        RecordError: a row's text is not UTF-8.
        pyarrow.ArrowException: the batch is damaged.
    """
    import pyarrow.compute

    column = batch.column(batch.schema.get_field_index(path[0]))
    column.validate(full=True)
    for part in path[1:]:
        column = pyarrow.compute.struct_field(column, part)
    for first in range(0, len(column), _ROWS):
        values = column.slice(first, _ROWS)
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        for number, value in enumerate(values.to_pylist(), start=before + first + 1):
            yield checked_text(value, name, f"row {number:,}")
