"""A page of HTML that needs nothing beside itself.

Its texts are one line of Markdown each: bold, code, links.
"""

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path

from .tables import Table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #111; background: #fff; }
body { max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3, h4 { line-height: 1.2; break-after: avoid; }
h2 { border-top: 2px solid #0072b2; padding-top: .6rem; margin-top: 2.5rem; }
h4 { margin: 1.6rem 0 .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ccc; padding: .2rem .6rem; }
th, td { text-align: left; white-space: nowrap; }
thead th { border-bottom: 2px solid #555; }
td b { color: #005a8e; }
pre { font-size: 12px; background: #f4f4f4; padding: .5rem .7rem; overflow-x: auto; }
figure { margin: 1rem 0; break-inside: avoid; }
figure img { width: 100%; height: auto; }
figcaption, .note { font-size: 13px; color: #444; }
@page { margin: 12mm; }
@media print {
  body { font-size: 10pt; margin: 0; max-width: none; }
  .wide, pre { overflow: visible; }
  table { font-size: 6.8pt; } tr { break-inside: avoid; }
  th, td { padding: .1rem .3rem; } th { white-space: normal; }
  pre { font-size: 7pt; white-space: pre-wrap; }
}
"""


def inline(text: str) -> str:
    """Markdown inside a line as HTML."""
    made = html.escape(text.strip(), quote=True)
    made = re.sub(r"`([^`]+)`", r"<code>\1</code>", made)
    made = re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", made)
    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r'<a href="\2">\1</a>', made)


class Page:
    """Written from top to bottom; ``html`` is the whole."""

    def __init__(self, title: str):
        self.title = title
        self._parts: list[str] = []
        self._contents: list[str] = []

    def heading(self, level: int, text: str) -> None:
        anchor = ""
        if level < 4:
            number = len(self._contents)
            anchor = f' id="s{number}"'
            indent = f"margin-left: {1.5 * (level - 2)}rem"
            link = f'<a href="#s{number}">{inline(text)}</a>'
            self._contents.append(f'<li style="{indent}">{link}</li>')
        self._parts.append(f"<h{level}{anchor}>{inline(text)}</h{level}>")

    def paragraph(self, text: str) -> None:
        self._parts.append(f"<p>{inline(text)}</p>")

    def items(self, texts: Sequence[str]) -> None:
        self._parts.append("<ul>" + "".join(f"<li>{inline(text)}</li>" for text in texts) + "</ul>")

    def table(self, table: Table) -> None:
        """Under its title, with its footnote and its commands."""

        def row(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{inline(cell)}</{tag}>" for cell in cells) + "</tr>"

        self.heading(4, table.title)
        head = f"<thead>{row(table.headings, 'th')}</thead>"
        body = "\n".join(row(cells, "td") for cells in table.rows)
        made = f"<table>\n{head}\n<tbody>{body}</tbody>\n</table>"
        self._parts.append(f'<div class="wide">{made}</div>')
        if table.stale:
            self._parts.append(f'<p class="note">{inline(table.footnote())}</p>')
        if table.commands:
            self._parts.append("<pre>" + "\n".join(map(html.escape, table.commands)) + "</pre>")

    def figure(self, stem: Path, caption: str) -> None:
        """The SVG inside the page, as an image of its own: its names cannot meet another's."""
        data = base64.b64encode(Path(f"{stem}.svg").read_bytes()).decode()
        text = inline(caption)
        image = f'<img alt="{text}" src="data:image/svg+xml;base64,{data}">'
        self._parts.append(f"<figure>{image}<figcaption>{text}</figcaption></figure>")

    def html(self) -> str:
        title = inline(self.title)
        head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        head += f"<title>{title}</title><style>{_STYLE}</style>"
        intro, *parts = self._parts or [""]
        contents = f"<ul>{''.join(self._contents)}</ul>" if self._contents else ""
        body = "\n".join([f"<h1>{title}</h1>", intro, contents, *parts])
        page = f'<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>'
        return f"<!doctype html>\n{page}\n"
