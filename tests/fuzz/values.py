"""What a fuzzed flag, key or file may hold, and how text, values and files are damaged."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

NUMBERS = (
    "0", "-1", "1", "2", "3", "7", "1.5", "64", "1000", "1e4", "1e6", "1e16", "1e30", "1e308", "1e309", "-1e308",
    "1e-400", "nan", "inf", "-inf", "9" * 25, "9" * 4400, "-" + "9" * 4400, "9223372036854775807",
    "9223372036854775808", "18446744073709551616", "0x10", "1_000", "0123", "1:30", "0" * 300 + "1", "+5", "٣", "1e",
    "--1", "0.1", "1e-30", "4294967296", "2147483648",
)  # fmt: skip
WORDS = (
    "", " ", "none", "null", "auto", "true", "false", "off", "on", "no", "yes", "y", "NULL", "2024", "2024-02-30",
    "2024-01-01", "2024-13-45T99:99:99Z", "~", "a" * 256, "b" * 5000, "é" * 130, "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07", "\u202eabc", "\x9b31m", "a\nb", "a\tb", "\r", "\u2028", "'", '"',
    "<script>alert(1)</script>", "{", "[1]", "{a: b}", "!!python/object:os.system", "*x", "&x", "\udcff", "😀", "%s",
    "%d%n", "{0}", "gpt2", "byte", "char", "fsdp", "deepspeed", "plain", "full", "selective", "muon", "rollback",
    "bf16", "fp16", "fp32", "latin-1", "utf-16", "rot13", "idna", "zip", "hex", "undefined", "tiny", "150M_1024",
    "4090", "a100-40gb", "cpu", "cuda", "8x A100", "H100 SXM",
)  # fmt: skip
PATHS = (
    "", ".", "..", "~", "~/x", "~nobody_here/x", "./~", "../../x", "absent", "absent/deeper/x", "text.txt",
    "text.txt/x", "prep", "nano", "runs", "runs/tiny", "runs/tiny/checkpoints", "runs/tiny/config.yaml",
    "runs/tiny/metrics.jsonl", "conf.json", "conf.yaml", "gpus.yaml", "ds.json", "/dev/null", "/dev/full",
    "/dev/zero", "/proc/self/mem", "/proc/self/nothing/x", "pipe", "loop", "dangling", "folder", "empty", "binary",
    "bom.txt", "a" * 256, "x/" * 3000, "\x1b[2Jname", "a\nb", "\udcff", "runs/tiny/../tiny", "out",
)  # fmt: skip
"""Relative to the folder of a case; none is a place that a command may damage."""

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**64, 10**30, -(10**30), 10**39, 1.5, -0.0, 1e16, 1e30, 1e308,
    float("nan"), float("inf"), float("-inf"), [], {}, [1, 2], ["a"], {"a": 1}, [[]], [None], {"": {}}, "\0",
    *NUMBERS, *WORDS,
)  # fmt: skip


def replaced(rng: random.Random, value: Any) -> Any:
    """The value with one part of it changed, removed, renamed, or put into another."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.05:
        return rng.choice(VALUES)
    if isinstance(value, list):
        place = rng.randrange(len(value))
        return [*value[:place], replaced(rng, value[place]), *value[place + 1 :]]
    key = rng.choice(list(value))
    kind = rng.random()
    if kind < 0.65:
        return {**value, key: replaced(rng, value[key])}
    rest = {name: each for name, each in value.items() if name != key}
    if kind < 0.8:
        return rest
    if kind < 0.95:
        return {**rest, str(rng.choice(WORDS)) if rng.random() < 0.7 else f"{key}x": value[key]}
    for _ in range(rng.choice((1, 5, 40))):
        value = {key: value}
    return value


def json_of(rng: random.Random, value: Any) -> bytes:
    """The value as JSON, now and then with a key twice, more digits, or very deep nesting."""
    text = json.dumps(value)
    kind = rng.random()
    if kind < 0.08 and text.startswith('{"'):
        text = "{" + text[1 : 1 + text.index(":")] + "1, " + text[1:]
    elif kind < 0.14:
        text = text.replace(" 1", " " + "9" * rng.choice((41, 4400, 100_000)), 1)
    elif kind < 0.2:
        text = nested(rng, "[{", "]}") if rng.random() < 0.5 else '{"a":' * 3000 + "1" + "}" * 3000
    elif kind < 0.26:
        text = "\ufeff" + text
    return text.encode("utf-8", "surrogatepass")


def nested(rng: random.Random, opened: str, closed: str) -> str:
    """Brackets within brackets, closed or not."""
    depth = rng.choice((20, 40, 1000, 100_000, 400_000))
    place = rng.randrange(len(opened))
    text = opened[place] * depth
    return text + (closed[place] * depth if rng.random() < 0.5 else "")


def yaml_of(rng: random.Random, value: Any) -> bytes:
    """The value as YAML, now and then with an alias bomb, a tag, a key twice, or deep nesting."""
    text = yaml.safe_dump(value, allow_unicode=rng.random() < 0.5)
    kind = rng.random()
    if kind < 0.06:
        bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, rng.choice((3, 12))))
        text = bomb + text
    elif kind < 0.12:
        text = text.replace(
            ": ", f": {rng.choice(('!!python/name:os.system', '!!binary', '!!set', '&a', '*a', '<<', '|', '>'))} ", 1
        )
    elif kind < 0.18:
        text += text[: text.find("\n") + 1]
    elif kind < 0.24:
        text = nested(rng, "[{", "]}") if rng.random() < 0.5 else "".join(" " * n + "- a:\n" for n in range(500))
    elif kind < 0.28:
        text = "\ufeff" + text
    elif kind < 0.3:
        text += "---\n" + text
    return text.encode("utf-8", "surrogatepass")


def damaged_text(rng: random.Random, content: bytes) -> bytes:
    """The content cut, with flipped bits, or with something inserted."""
    place = rng.randrange(len(content) + 1)
    insert = rng.choice(
        (
            b"\0",
            b"\x1b[2J",
            b"\xff\xfe",
            b"\xef\xbb\xbf",
            b"\n",
            b"9" * 5000,
            b"[" * 2000,
            b"{",
            b'"',
            b"\xe2\x80\xae",
            b"a" * 200_000,
        )
    )
    choices: tuple[Callable[[], bytes], ...] = (
        lambda: content[:place],
        lambda: content[place:],
        lambda: content[:place] + insert + content[place:],
        lambda: content[:place] + insert + content[place + len(insert) :],
        lambda: flipped(rng, content),
        lambda: content * rng.choice((2, 30)),
        lambda: b"",
        lambda: rng.randbytes(rng.choice((1, 100, 5000))),
        lambda: rng.choice(VALUES_AS_JSON),
    )
    return rng.choice(choices)()


VALUES_AS_JSON = tuple(json.dumps(value).encode() for value in VALUES)


def flipped(rng: random.Random, content: bytes) -> bytes:
    """The content with a few flipped bits."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 20))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def damage_file(rng: random.Random, path: Path) -> None:
    """Damage, replace or lock a file."""
    kind = rng.choice(
        (
            "gone",
            "folder",
            "dangling",
            "loop",
            "pipe",
            "huge",
            "empty",
            "closed",
            "text",
            "text",
            "text",
            "value",
            "value",
        )
    )
    try:
        with path.open("rb") as file:
            content = file.read(1 << 20)
    except PermissionError:  # it was closed before
        return
    if kind == "text" or (kind == "value" and path.suffix not in {".json", ".jsonl", ".yaml"}):
        path.write_bytes(damaged_text(rng, content))
    elif kind == "value":
        try:
            path.write_bytes(_damaged_value(rng, path, content))
        except (ValueError, yaml.YAMLError, RecursionError):  # it was damaged before
            path.write_bytes(damaged_text(rng, content))
    elif kind == "closed":
        path.chmod(0)
    elif kind == "huge":
        size = rng.choice((1 << 21, 1 << 34))
        os.truncate(path, 1 << 21 if path.suffix == ".bin" else size)  # tokens may be many, and all are read
    else:
        path.unlink()
        replace_by(kind, path)


def _damaged_value(rng: random.Random, path: Path, content: bytes) -> bytes:
    if path.suffix == ".yaml":
        return yaml_of(rng, replaced(rng, yaml.safe_load(content)))
    if path.suffix == ".json":
        return json_of(rng, replaced(rng, json.loads(content)))
    lines = content.splitlines(keepends=True)
    if not lines:
        return b"{}\n"
    place = rng.randrange(len(lines))
    lines[place] = json_of(rng, replaced(rng, json.loads(lines[place]))) + b"\n"
    return b"".join(lines)


def replace_by(kind: str, path: Path) -> None:
    """Make a folder, a link, a pipe or an empty file."""
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()


def damage_folder(rng: random.Random, folder: Path) -> None:
    """Damage one or two of the files below a folder, or remove or lock a folder."""
    for _ in range(rng.choice((1, 1, 2))):
        files = sorted(
            path for path in folder.rglob("*") if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK)
        )
        if not files:
            return
        chosen = rng.choice(files)
        if rng.random() < 0.07 and chosen.parent != folder:
            shutil.rmtree(chosen.parent) if rng.random() < 0.5 else chosen.parent.chmod(0)
        else:
            damage_file(rng, chosen)
