"""How a setting is described, read from text or JSON, and checked.

A setting is a dataclass field made by :func:`setting`; ``--help`` and error messages use its description. A
:class:`Section` checks every field when it is made, so every configuration that exists is valid.
"""

import dataclasses
import math
import operator
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePath
from types import UnionType
from typing import Any, Self, get_args

from scalegpt.errors import InputError, nearest
from scalegpt.storage import user_path
from scalegpt.structured import DIGITS, parse_yaml
from scalegpt.text import shown

_LONGEST_TEXT = 100_000
_LONGEST_NUMBER = 400
"""The most characters of a text, and of a number as text (the largest float has 309 digits)."""

Scalar = str | int | float | bool | None

_BOUNDS = {
    "minimum": (operator.ge, "at least"),
    "above": (operator.gt, "more than"),
    "maximum": (operator.le, "at most"),
    "below": (operator.lt, "less than"),
}


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    is_path: bool = False,
    words: tuple[str, ...] = (),
    as_text: Callable[[Any], Any] | None = None,
) -> Any:
    """A dataclass field that is a setting, with its help and its bounds.

    ``minimum`` and ``maximum`` are inclusive, ``above`` and ``below`` exclusive; ``choices`` are the allowed words. A
    text field with ``words`` holds some of these words, separated by commas; in a file it may be a list. ``as_text`` makes
    the text of a field that takes several words on the command line, and lists and mappings in files. None, which only
    optional fields allow, is within all bounds. In a path (``is_path``), ``~`` is the home folder. Give every number an
    upper bound, far above any use, so that arithmetic with it neither overflows nor takes minutes.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "below": below,
        "is_path": is_path,
        "words": words,
        "as_text": as_text,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the configuration, for example all training settings: frozen, and checked when it is made.

    Raises:
        InputError: a value is outside its bounds or choices.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_bounds(field, getattr(self, field.name))
        self.check()

    def check(self) -> None:
        """Check the fields against each other. This method does nothing; subclasses override it."""

    @classmethod
    def settings(cls) -> dict[str, "dataclasses.Field[Any]"]:
        """Setting → its dataclass field, for all settings of the section."""
        return {field.name: field for field in dataclasses.fields(cls)}

    @classmethod
    def from_mapping(cls, values: dict[str, Any], where: str) -> Self:
        """Make the section from parsed JSON, YAML or command-line values.

        Args:
            values: setting → value; text is converted to the setting's type.
            where: the source's name in error messages, for example ``configs/small.json``.

        Raises:
            InputError: a key is unknown, or a value has the wrong type or is outside its bounds.
        """
        known = cls.settings()
        for key in values:
            if key not in known:
                raise InputError(f"{where}: unknown key {shown(key)}{nearest(key, known)}")
        try:
            return cls(**{key: coerce(known[key], value) for key, value in values.items()})
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    def changed(self, **values: Any) -> Self:
        """A copy with some settings replaced. For speed, only the bounds of the replaced settings are checked."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        for name, value in values.items():
            field = self.__dataclass_fields__.get(name)
            if field is None:
                raise TypeError(f"{type(self).__name__} has no setting {name!r}")
            _check_bounds(field, value)
            copy.__dict__[name] = value
        copy.check()
        return copy


def field_types(field: "dataclasses.Field[Any]") -> tuple[type, ...]:
    """The types of a setting: ``(int,)``, or ``(int, NoneType)`` for an optional one."""
    kind = field.type
    return get_args(kind) if isinstance(kind, UnionType) else (kind,)


def coerce(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """Convert a value from JSON, YAML or the command line to the field's type.

    Whole numbers may be written ``5e5`` or ``500_000``; booleans ``true/false/on/off/yes/no/1/0``; ``none`` or null unsets
    an optional setting.

    Raises:
        InputError: the value cannot be converted to that type.
    """
    kinds = field_types(field)
    if field.metadata["as_text"] is not None:
        value = field.metadata["as_text"](value)
    if type(None) in kinds and (value is None or str(value).lower() in {"none", "null"}):
        return None
    word = "on" if value else "off"
    if field.metadata["words"] and isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
        value = ",".join(value)
    if isinstance(value, bool) and word in field.metadata["choices"]:
        value = word  # YAML 1.1 reads on and off as booleans; here they are choices
    for kind in kinds:
        if issubclass(kind, Section):
            return _section(kind, field.name, value)
        converted = _text(field, value) if kind is str else _convert(kind, value)
        if converted is not None:
            return converted
    raise InputError(f"{field.name} must be {_describe(field)}, not {shown(value)}")


def _section(kind: type[Section], name: str, value: Any) -> Section:
    """Make a setting that is an object, from a mapping or from its text, for example ``{type: linear, factor: 2}``.

    Raises:
        InputError: the value is neither an object nor its text, or has a key or value that is not allowed.
    """
    if isinstance(value, kind):
        return value
    values = parse_yaml(value, name) if isinstance(value, str) and len(value) <= _LONGEST_TEXT else value
    if not isinstance(values, dict):
        raise InputError(f"{name} must be none or an object such as {kind()}, not {shown(value)}")
    return kind.from_mapping(values, name)


def _text(field: "dataclasses.Field[Any]", value: Any) -> str | None:
    """The value as text. Whole numbers (which may be names) and paths are converted; None for any other type.

    Raises:
        InputError: the text is too long, is not a valid path, or is not UTF-8.
    """
    if isinstance(value, int) and not isinstance(value, bool) and not field.metadata["choices"]:
        value = str(value)
    if field.metadata["is_path"] and isinstance(value, PurePath):
        value = str(value)
    if not isinstance(value, str):
        return None
    text: str = value
    if len(text) > _LONGEST_TEXT:
        raise InputError(f"{field.name} has more than {_LONGEST_TEXT:,} characters")
    if field.metadata["is_path"] and field.metadata["as_text"] is None:
        try:
            return user_path(text)
        except InputError as error:
            raise InputError(f"{field.name} {error}") from None
    if any("\ud800" <= character <= "\udfff" for character in text):
        advice = "rename it" if field.metadata["is_path"] else "give text in UTF-8"
        raise InputError(f"{field.name} {shown(text)} is not UTF-8; {advice}")
    return text


def _convert(kind: type, value: Any) -> Scalar:
    """The value converted to the type ``kind``; None if it cannot be."""
    if kind is bool:
        return _as_bool(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = _number(value)
        return float(number) if kind is float else int(number) if kind is int and number == int(number) else None
    except (ValueError, OverflowError):  # not a number, infinite, or too large
        return None


def _number(value: str | int | float) -> int | float:
    """A finite number, parsed if it is given as text.

    Raises:
        ValueError: the text is not a number, or the number is not finite.
        OverflowError: the whole number is larger than any float.
    """
    if isinstance(value, str):
        if len(value) > _LONGEST_NUMBER:
            raise ValueError("too long")
        if len(value) <= DIGITS:
            with suppress(ValueError):
                return int(value)
    number = float(value) if isinstance(value, str) else value
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def _as_bool(value: Any) -> bool | None:
    words = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}
    return words.get(str(value).lower())


def _describe(field: "dataclasses.Field[Any]") -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "none"}
    if field.metadata["choices"]:
        booleans = ("true", "false") if bool in field_types(field) else ()
        return "one of " + ", ".join((*booleans, *field.metadata["choices"]))
    return " or ".join(names[kind] for kind in field_types(field))


def _check_bounds(field: "dataclasses.Field[Any]", value: Any) -> None:
    if value is None:
        return
    bounds = field.metadata
    if (
        bounds["choices"]
        and value not in bounds["choices"]
        and not (isinstance(value, bool) and bool in field_types(field))
    ):
        booleans = ("true", "false") if bool in field_types(field) else ()
        raise InputError(
            f"{shown(value)} is not a value of {field.name}{nearest(value, (*booleans, *bounds['choices']))}"
        )
    for each in words_of(value) if bounds["words"] else ():
        if each not in bounds["words"]:
            raise InputError(f"{shown(each)} is not a value of {field.name}{nearest(each, bounds['words'])}")
    for name, (holds, words) in _BOUNDS.items():
        limit = bounds[name]
        if limit is not None and not holds(value, limit):
            raise InputError(f"{field.name} must be {words} {limit:,}, not {shown(value)}")


def words_of(value: str | None) -> tuple[str, ...]:
    """The words of a setting that holds several words separated by commas, each word once."""
    return tuple(dict.fromkeys(word.strip() for word in (value or "").split(",") if word.strip()))


def steps_of(text: str, name: str) -> tuple[int, int]:
    """The first and the last step that ``A`` or ``A:B`` names; ``name`` is the flag's name in messages.

    Raises:
        InputError: the text has neither form, the range is empty, or it begins before step 1.
    """
    found = re.fullmatch("([0-9]{1,15})(?::([0-9]{1,15}))?", text)
    if found is None:
        raise InputError(
            f"{name} must be A or A:B with whole numbers from 1 on, for example 100:120, not {shown(text)}"
        )
    first, last = int(found[1]), int(found[2] or found[1])
    if not 1 <= first <= last:
        raise InputError(f"{name} {text} names no step: steps count from 1, and in A:B, A must be at most B")
    return first, last


def limits(field: "dataclasses.Field[Any]") -> str:
    """The bounds of a number in words, such as ``1 to 10,000``; empty for other settings."""
    bounds = field.metadata
    low, high = bounds["minimum"], bounds["maximum"]
    if low is not None and high is not None:
        return f"{low:,} to {high:,}"
    return ", ".join(f"{words} {bounds[name]:,}" for name, (_, words) in _BOUNDS.items() if bounds[name] is not None)
