"""Adds the pages of the documentation site that are not files in ``docs/``, and points links at them.

MkDocs calls the functions (``hooks`` in mkdocs.yml). The site has the documents of ``docs/`` and of other folders, the
command reference, made from the commands' parsers, and the Python reference, made from docstrings by mkdocstrings.
"""

import argparse
import re
from pathlib import Path
from posixpath import normpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from scalegpt.cli.main import COMMANDS, command
from scalegpt.cli.parser import Parser, shape_of

ROOT = Path(__file__).resolve().parents[2]

ELSEWHERE = {
    "index.md": "README.md",
    "presets.md": "configs/README.md",
    "architecture.md": "ARCHITECTURE.md",
    "contributing.md": "CONTRIBUTING.md",
    "changes.md": "CHANGELOG.md",
}
"""Page of the site → the document outside ``docs/`` that it shows."""

DOCUMENTED = (
    "scalegpt.api.plan", "scalegpt.api.train", "scalegpt.api.load", "scalegpt.inference.loaded.LoadedModel",
    "scalegpt.planner.query.Answer", "scalegpt.planner.plan.Plan", "scalegpt.errors.InputError", "scalegpt.errors.RunError",
)  # fmt: skip
"""The public functions and classes, by the path of their docstring."""

OF_EVERY_COMMAND = {"help", "debug"}
"""Arguments that every command has."""

ROLE = re.compile(r":\w+:<code>(?:~[\w.]*\.)?([\w.]+)</code>")
"""A cross-reference of a docstring, such as ``:func:`~scalegpt.api.plan```, in HTML."""

LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files in ``docs/``."""
    made = {page: (ROOT / document).read_text(encoding="utf-8") for page, document in ELSEWHERE.items()}
    for name, text in {**made, "commands.md": commands(), "python.md": python()}.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links at the pages of the site; a link to a file that is no page becomes its text."""
    source = page.file.src_uri
    folder = Path(ELSEWHERE.get(source, f"docs/{source}")).parent.as_posix()
    pages = {document: name for name, document in ELSEWHERE.items()}

    def pointed(link: re.Match[str]) -> str:
        text, (target, mark, anchor) = link[1], link[2].partition("#")
        if not target or "://" in target:
            return link[0]
        path = normpath(f"{folder}/{target}")
        name = pages.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if path == "docs/README.md" or path == "docs":
            return f"[{text}](index.md)"
        return f"[{text}]({name}{mark}{anchor})" if name and name.endswith(".md") else text

    return LINK.sub(pointed, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Show a docstring's cross-reference as the name that it refers to."""
    return ROLE.sub(r"<code>\1</code>", html)


# --- the references --------------------------------------------------------------------------------------------------


def python() -> str:
    """The page of the Python reference: a directive of mkdocstrings for each public name."""
    intro = "# Python\n\n`import scalegpt` loads neither torch nor numpy. The commands run the same functions.\n\n"
    return intro + "".join(f"::: {name}\n\n" for name in DOCUMENTED)


def commands() -> str:
    """The page of the command reference, from the parsers of the commands and of their actions."""
    said = [
        "# Commands\n\nEvery flag may be spelled with `_` or with `-`. Every command takes `--help`, and `--debug`, which "
        "shows a traceback with an error.\n\n"
    ]
    for name, summary in COMMANDS.items():
        shape = shape_of(command(name))
        if isinstance(shape, Parser):
            said.append(_section(f"## {name}", shape))
            continue
        said.append(f"## {name}\n\n{summary[0].upper()}{summary[1:]}.\n\n")
        said += [_section(f"### {name} {action}", own) for action, own in shape.items()]
    return "".join(said)


def _section(heading: str, parser: Parser) -> str:
    summary, _, example = (parser.description or "").partition("\n\nexample:\n")
    lines = [f"{heading}\n\n{_escaped(summary)}\n\n```text\n{_dedented(example)}\n```\n\n"]
    for group in parser._action_groups:
        actions = [
            action
            for action in group._group_actions
            if action.help != argparse.SUPPRESS and action.dest not in OF_EVERY_COMMAND
        ]
        if not actions:
            continue
        if group.title and group.title not in {"positional arguments", "options"}:
            lines.append(f"**{group.title[0].upper()}{group.title[1:]}**\n\n")
        lines += [_argument(parser, action) for action in actions]
    return "".join(lines)


def _argument(parser: Parser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    value = "" if action.nargs == 0 else f" {formatter._format_args(action, action.dest.upper())}"
    term = f"`{', '.join(action.option_strings)}{value}`" if action.option_strings else f"`{value.strip()}`"
    return f"{term}\n:   {_escaped(formatter._expand_help(action))}\n\n"


def _dedented(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines())


def _escaped(text: str) -> str:
    """Plain text as Markdown that shows it as it is; what stands between backticks is code."""
    parts = text.split("`")
    prose = [re.sub(r"([\\*_\[\]<>|])", r"\\\1", part) if index % 2 == 0 else part for index, part in enumerate(parts)]
    return "`".join(prose)
