"""A page of HTML from blocks of Markdown: headings, lists, tables, images, paragraphs."""

import html
import re
from collections.abc import Sequence

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
div { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ccc; padding: .2rem .6rem; text-align: left; }
td { white-space: nowrap; }
td b { color: #005a8e; }
img { width: 100%; }
"""


def inline(text: str) -> str:
    """Markdown inside a line as HTML: code, bold, images, links."""
    made = html.escape(text.strip(), quote=True)
    made = re.sub(r"`([^`]+)`", r"<code>\1</code>", made)
    made = re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", made)
    made = re.sub(r"!\[([^\]]+)\]\(([^)]+)\)", r'<img alt="\1" src="\2"><br>\1', made)
    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r'<a href="\2">\1</a>', made)


def page(title: str, blocks: Sequence[str]) -> str:
    """The whole page; a block may hold several, parted by an empty line."""
    parts = [_block(part) for block in blocks for part in block.split("\n\n")]
    head = f'<meta charset="utf-8"><title>{inline(title)}</title><style>{_STYLE}</style>'
    body = "\n".join([f"<h1>{inline(title)}</h1>", *parts])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _block(text: str) -> str:
    rows = text.splitlines()
    if found := re.match(r"(#+) (.*)", text):
        level = len(found[1])
        return f"<h{level}>{inline(found[2])}</h{level}>"
    if text.startswith("- "):
        items = (f"<li>{inline(row.removeprefix('- '))}</li>" for row in rows)
        return f"<ul>{''.join(items)}</ul>"
    if text.startswith("| "):
        made = [_row(rows[0], "th"), *(_row(row, "td") for row in rows[2:])]
        return "<div><table>\n" + "\n".join(made) + "\n</table></div>"
    return f"<p>{inline(text)}</p>"


def _row(row: str, tag: str) -> str:
    cells = row.strip("|").split("|")
    return "<tr>" + "".join(f"<{tag}>{inline(cell)}</{tag}>" for cell in cells) + "</tr>"
