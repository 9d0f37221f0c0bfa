"""The parts of an HTML page that needs no network and no script, for light and dark, wide and narrow."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

_CSS = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --strong: #2563eb; }
@media (prefers-color-scheme: dark) { :root { --strong: #7aa7ff; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 72rem;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
p { max-width: 48rem; }
.facts, .note { color: #808080; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; }
figure img { width: 100%; max-width: 34rem; height: auto; }
figcaption { font-size: .9rem; color: #808080; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, .words th, .words td { text-align: left; }
.numbers th:first-child, .numbers td { white-space: nowrap; }
.words td { min-width: 8rem; }
pre { background: var(--soft); padding: .6rem; border-radius: .4rem; white-space: pre-wrap; }
article { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem 1rem; }
article ol { margin: .2rem 0; padding-left: 2.6rem; }
.hit { font-weight: 600; color: var(--strong); }
"""


class PageFigure(NamedTuple):
    """A picture, what it shows in words, and a caption."""

    svg: bytes
    alt_text: str
    caption: str


def render_table(columns: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "numbers") -> str:
    """A table that scrolls in its own box; kind is `numbers` or `words`."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    lines = []
    for row in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        lines.append(f'<tr><th scope="row">{escape(row[0])}</th>{cells}</tr>')
    return (
        f'<div class="wide" tabindex="0"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def render_figure(shown: PageFigure) -> str:
    """A picture with its text alternative and its caption, all in the page."""
    data = base64.b64encode(shown.svg).decode()
    return (
        f'<figure><img alt="{escape(shown.alt_text)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(shown.caption)}</figcaption></figure>"
    )


def render_grid(parts: Iterable[str]) -> str:
    """Parts side by side as far as the window is wide; nothing where there are none."""
    content = "".join(parts)
    return f'<div class="grid">{content}</div>' if content else ""


def render_section(title: str, *parts: str) -> str:
    """Nothing where there is nothing to show."""
    if not any(parts):
        return ""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def render_page(title: str, sections: Iterable[str]) -> str:
    """The whole page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>\n"
        f"<body><main>{chr(10).join(section for section in sections if section)}</main></body></html>\n"
    )
