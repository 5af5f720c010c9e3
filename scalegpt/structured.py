"""Reads JSON and YAML from any source: with limits on depth and digits, and without aliases or repeated keys.

Every configuration, catalogue and run file is parsed here. An error message names the file, the line where known,
and the fault. It quotes no values, since a file that was given by mistake may hold a secret.
"""

import json
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from scalegpt.errors import InputError
from scalegpt.storage import open_plain, read_bytes
from scalegpt.text import shown

CONFIG_LIMIT = 1 << 20
"""The largest configuration, catalogue or status file, in bytes."""

LINE_LIMIT = 1 << 16
"""The longest line, in characters, that is read from a log of JSON objects. ScaleGPT writes shorter lines."""

_ENDLESS_LINE = 1 << 25
"""A file with a longer line, in characters, is refused, since a sparse or damaged file can have gigabytes of zeros."""

DEPTH = 32
"""The most levels of nested objects and lists."""

DIGITS = 40
"""The most digits of a whole number. Python's own limit is 4,300 digits, which it converts slowly."""

_TOO_DEEP = f"objects and lists nest deeper than {DEPTH}"
_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")) | {"!"}
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text. Error messages call the text ``where``, usually its path.

    Raises:
        InputError: the text is not JSON, nests deeper than :data:`DEPTH`, repeats a key, or has a whole number of more
            than :data:`DIGITS` digits.
    """

    def refuse(what: str) -> NoReturn:
        raise InputError(f"{where}: {what}")

    def whole(digits: str) -> int:
        return int(digits) if len(digits) <= DIGITS else refuse(f"a number of {len(digits):,} digits is too large")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                refuse(f"the key {shown(key)} appears twice; remove one")
            values[key] = value
        return values

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_int=whole)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}:{error.lineno}: not JSON: {error.msg.removesuffix(' at')}") from None
    except RecursionError:
        refuse(_TOO_DEEP)
    level = [value]
    for _ in range(DEPTH + 1):
        level = [child for each in level for child in _children(each)]
    return refuse(_TOO_DEEP) if level else value


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text: objects, lists, None for empty or null scalars, and every other scalar as text.

    The setting that gets a scalar decides the scalar's type, as on the command line. ``off`` can therefore be a word,
    ``2024`` a name, and ``1e-3`` a number, all of which YAML 1.1 would read differently.

    Raises:
        InputError: as for :func:`yaml_node`; or a key is repeated, or is a list or an object.
    """
    node = yaml_node(text, where)
    return None if node is None else _value(node, where)


def _value(node: Any, where: str) -> Any:
    if node.id == "sequence":
        return [_value(item, where) for item in node.value]
    if node.id == "scalar":
        is_plain = node.style is None
        return None if is_plain and node.value in _NULLS else node.value
    values: dict[str, Any] = {}
    for key, value in node.value:
        line = _line(key, where)
        if key.id != "scalar":
            raise InputError(f"{line}: a key must be a word")
        if key.value in values:
            raise InputError(f"{line}: the key {shown(key.value)} appears twice; remove one")
        values[key.value] = _value(value, where)
    return values


def yaml_node(text: str, where: str) -> Any:
    """The root node of a YAML text, with line numbers; None for an empty text. All scalars are text.

    Raises:
        InputError: the text is not YAML, nests deeper than :data:`DEPTH`, or has an alias or a custom tag.
    """
    import yaml  # imported here: it takes 20 ms, and most commands do not need it

    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # the C loader is 20 times as fast
    try:
        return _composed(yaml.parse(text, loader), where)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{where}{line}: not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, UnicodeEncodeError):  # the latter for bytes of an argument that are not UTF-8
        raise InputError(f"{where}: not YAML: it has a character that YAML does not allow") from None


def _composed(events: Iterator[Any], where: str) -> Any:
    """The root node, composed from the parser's events; None if there is no node.

    PyYAML's own composer does not limit the depth, and its C version recurses on the C stack.
    """
    import yaml

    root: Any = None
    open_: list[Any] = []
    for event in events:
        if isinstance(event, yaml.CollectionEndEvent):
            closed = open_.pop()
            if closed.id == "mapping":  # so far a list of keys and values in turn
                closed.value = list(zip(closed.value[::2], closed.value[1::2], strict=True))
            continue
        if not isinstance(event, yaml.NodeEvent):
            if isinstance(event, yaml.DocumentStartEvent) and root is not None:
                raise InputError(f"{_line(event, where)}: the file has a second YAML document; keep only one")
            continue
        node = _node(event, where)
        if open_:
            open_[-1].value.append(node)
        root = root or node
        if node.id != "scalar":
            open_.append(node)
            if len(open_) > DEPTH:
                raise InputError(f"{_line(event, where)}: {_TOO_DEEP}")
    return root


def _node(event: Any, where: str) -> Any:
    import yaml

    if isinstance(event, yaml.AliasEvent):
        raise InputError(f"{_line(event, where)}: aliases (*name) are not supported; write the value itself")
    if event.tag is not None and event.tag not in _TAGS:
        raise InputError(f"{_line(event, where)}: tags (!name) are not supported; remove the tag")
    tag: str = event.tag or ""
    marks = (event.start_mark, event.end_mark)
    if isinstance(event, yaml.ScalarEvent):
        style = event.style or None  # the C parser gives '' for a plain scalar
        return yaml.ScalarNode(tag, event.value, *marks, style=style)
    kind = yaml.SequenceNode if isinstance(event, yaml.SequenceStartEvent) else yaml.MappingNode
    return kind(tag, [], *marks)


def _line(node: Any, where: str) -> str:
    """The file and the line of a node or an event, as ``FILE:LINE``."""
    return f"{where}:{node.start_mark.line + 1}"


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: the file holds no object, or :func:`parse_json` refuses its text.
        OSError: the file is missing or cannot be read.
    """
    return object_in(read_bytes(path, CONFIG_LIMIT), str(path))


def object_in(content: bytes, where: str) -> dict[str, Any]:
    """The object in the content of a JSON file, which errors call ``where``.

    Raises:
        InputError: the content holds no object, or :func:`parse_json` refuses its text.
    """
    try:
        values = parse_json(content.decode("utf-8-sig"), where)
    except UnicodeDecodeError:
        raise InputError(f"{where} is not a text file") from None
    if not isinstance(values, dict):
        raise InputError(f"{where} does not hold a JSON object")
    return values


def read_lines(path: Path, longest: int = LINE_LIMIT) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each line of a log of JSON objects, and its parsed object.

    Lines that are cut short, not objects, or longer than ``longest`` characters are skipped.

    A crash may cut the last line short. The file may be large, so only one line at a time is in memory.

    Raises:
        InputError: the file cannot be read, is not a plain file, or has a line of more than :data:`_ENDLESS_LINE`
            characters.
        FileNotFoundError: there is no such file.
    """
    try:
        with TextIOWrapper(open_plain(path), encoding="utf-8", errors="replace") as file:
            is_whole, length = True, 0
            while line := file.readline(longest):
                begins, is_whole = is_whole, line.endswith("\n")
                length = len(line) if begins else length + len(line)
                if length > _ENDLESS_LINE:
                    raise InputError(
                        f"{path} has a line of more than {_ENDLESS_LINE:,} characters: it is not the log of a run"
                    )
                values = _object(line) if begins and is_whole else None
                if values is not None:
                    yield line, values
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _object(line: str) -> dict[str, Any] | None:
    try:
        values = parse_json(line, "line")
    except InputError:
        return None
    return values if isinstance(values, dict) else None
