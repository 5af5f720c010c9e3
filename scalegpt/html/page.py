"""The parts of an HTML page that is a single file, needs no network, and has colours for light and dark screens.

A run's ``report.html`` and the page of ``scalegpt plan --html`` are made with this module.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from scalegpt.text import visible

PALETTE = {
    "ink": ("#1c1e21", "#e6e8ea"),
    "soft": ("#5f6770", "#a0a8b0"),
    "line": ("#d9dde1", "#3a4046"),
    "page": ("#ffffff", "#16181b"),
    "on": ("#ffffff", "#16181b"),
    "warn": ("#c0262d", "#ff8078"),
    "good": ("#1d7a3c", "#6fcf8b"),
    "rest": ("#565e66", "#a0a8b0"),
    "rest2": ("#6d757d", "#848c94"),
    "c1": ("#2868c8", "#6ea4f4"),
    "c2": ("#c2481a", "#f49060"),
    "c3": ("#0b7a6f", "#4cc0b0"),
    "c4": ("#7b4fb5", "#b99af0"),
    "c5": ("#8a6500", "#d9b83f"),
    "c6": ("#b03a74", "#ef8ab8"),
    "c7": ("#4a7423", "#9cc65e"),
    "c8": ("#3d6b99", "#8fb9dd"),
    "c9": ("#5b57a6", "#a5a2ee"),
    "c10": ("#96503a", "#d9a08a"),
    "c11": ("#17748c", "#63bfd6"),
    "c12": ("#8b4a8f", "#d69bd9"),
}
"""Name → its colour on a light and on a dark page.

``c1`` to ``c12`` distinguish parts of a chart, ``rest`` and ``rest2`` are for less important parts, and ``on`` is for
text on any of these colours.
"""

HUES = 12
"""The number of colours that distinguish parts: ``c1`` to ``c12``."""


def _variables(scheme: int) -> str:
    return "".join(f"--{name}:{colours[scheme]};" for name, colours in PALETTE.items())


STYLE = f"""
:root{{{_variables(0)}color-scheme:light dark}}
@media screen and (prefers-color-scheme:dark){{:root{{{_variables(1)}}}}}
body{{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:820px;margin:2rem auto;
padding:0 1rem}}
h1{{font-size:1.4rem}}h2{{font-size:1.05rem;margin-top:2rem}}
.scroll{{overflow-x:auto}}table{{border-collapse:collapse;font-variant-numeric:tabular-nums}}
td,th{{padding:.1rem 1.2rem .1rem 0;vertical-align:top;text-align:left;font-weight:400}}tbody th{{color:var(--soft)}}
thead th{{font-weight:600;border-bottom:1px solid var(--line);vertical-align:bottom}}
.number{{text-align:right}}td.number{{white-space:nowrap}}
pre{{white-space:pre-wrap;overflow-wrap:anywhere}}
pre{{border-left:3px solid var(--line);padding-left:.8rem;font-size:13px}}.flag{{white-space:nowrap}}
svg text{{fill:var(--soft);font-size:12px}}
@media (max-width:640px){{td,th{{padding-right:.7rem}}table{{font-size:13px}}}}
@media print{{body{{max-width:none;margin:0}}h2{{break-after:avoid}}svg,tr{{break-inside:avoid}}.scroll{{overflow:visible}}}}
"""
"""The CSS of every page."""


def escape(text: str) -> str:
    """Text escaped for HTML, between tags and in attributes; control characters are made visible."""
    return html.escape(visible(text))


def command(words: str) -> str:
    """A command, or flags, as HTML in which no line break can separate a flag from its hyphens."""
    return " ".join(
        f'<span class="flag">{escape(word)}</span>' if word.startswith("-") else escape(word)
        for word in words.split(" ")
    )


def document(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole HTML page.

    Args:
        title: the title, as text.
        body: the content of ``<body>``, as HTML.
        style: further CSS; its colours are those of :data:`PALETTE`, for example ``var(--c1)``.
        script: JavaScript that runs after the body has been read.
    """
    if script:
        body += f"<script>{script}</script>"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="generator" content="ScaleGPT">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body>{body}</body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A section as HTML: a heading, followed by the parts."""
    return f"<h2>{title}</h2>{''.join(parts)}"


def facts(rows: Mapping[str, str]) -> str:
    """A table of names and values as HTML; both are given as text."""
    lines = (f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows.items())
    return f"<table><tbody>{''.join(lines)}</tbody></table>"


@dataclass
class Table:
    """A table with a heading over each column. If it is wider than the page, only the table scrolls sideways.

    Attributes:
        label: the description of the table for screen readers.
        heads: the headings of the columns, as text.
        classes: the CSS class of each column; ``number`` aligns to the right.
        rows: the rows added so far, as HTML.
    """

    label: str
    heads: Sequence[str]
    classes: Sequence[str]
    rows: list[str] = field(default_factory=list)

    def add(self, name: str, *cells: str, kind: str = "") -> None:
        """Add a row: ``name`` and ``cells`` are its cells as HTML, ``kind`` is its CSS class."""
        columns = zip(self.classes[1:], cells, strict=True)
        drawn = "".join(f"<td{_class(column)}>{cell}</td>" for column, cell in columns)
        self.rows.append(f'<tr{_class(kind)}><th scope="row"{_class(self.classes[0])}>{name}</th>{drawn}</tr>')

    def draw(self) -> str:
        """The table as HTML."""
        heads = "".join(
            f'<th scope="col"{_class(column)}>{escape(head)}</th>' if head else "<td></td>"
            for head, column in zip(self.heads, self.classes, strict=True)
        )
        return (
            f'<div class="scroll" role="region" aria-label="{escape(self.label)}" tabindex="0"><table>'
            f"<thead><tr>{heads}</tr></thead><tbody>{''.join(self.rows)}</tbody></table></div>"
        )


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
