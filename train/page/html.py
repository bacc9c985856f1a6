"""The frame of a page: one file of HTML with its pictures inside, for a phone, paper, day and night.

Text from names and files is escaped here and by `fill`. What is called HTML below goes into the page as it is.
"""

import base64
from collections.abc import Sequence
from html import escape
from string import Template
from typing import Any, NamedTuple

from qpde.plots import inline_svg

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --ink: #262626; --quiet: #666; --line: #dcdcdc; --grid: #e4e4e4; --page: #fff;
  --shade: #f6f6f6; --curve0: #0072b2; --curve1: #d55e00; --curve2: #009e73; --curve3: #cc79a7; --curve4: #56b4e9;
  --curve5: #e69f00; --curve6: #000 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --quiet: #a3a3a3; --line: #444; --grid: #383838; --page: #1b1b1b; --shade: #262626;
    --curve0: #3f9fd8; --curve1: #f07a26; --curve2: #18b98c; --curve3: #dd92bb; --curve4: #8fd0f5; --curve5: #f0b429;
    --curve6: #fff }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.2rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .4rem; padding-top: .9rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem }
p, figcaption, li { max-width: 46rem }
nav { font-size: .9rem; columns: 4 13rem; margin: 1rem 0 }
nav a { display: block; padding: .1rem 0 }
a { color: inherit; text-underline-offset: .2em; text-decoration-color: var(--quiet) }
figure { margin: 1rem 0 }
figcaption { color: var(--quiet); font-size: .92rem; margin-top: .5rem }
.panels { display: grid; gap: 1rem 1.2rem; align-items: start }
.panels svg { display: block; width: 100%; max-width: 38rem; height: auto }
@media (min-width: 48rem) {
  .two { grid-template-columns: 1fr 1fr }
  .one { display: grid; grid-template-columns: 1fr 1fr; gap: 1.2rem; align-items: center }
}
@media (min-width: 62rem) {
  .three { grid-template-columns: repeat(3, 1fr) }
}
.thumbs { display: flex; flex-wrap: wrap; gap: .7rem; margin: .4rem 0 1rem; padding: 0; list-style: none }
.thumbs li { width: 5.6rem; font-size: .8rem; line-height: 1.3; color: var(--quiet) }
.thumbs img { display: block; width: 5.6rem; height: 5.6rem; object-fit: contain; image-rendering: pixelated;
  margin-bottom: .2rem; background: var(--shade); border-radius: 3px }
.formula { margin: .8rem 0; padding: .2rem 0 .2rem 1rem; border-left: 3px solid var(--line); overflow: auto hidden;
  max-width: none }
.formula math { font-size: 1.08rem; width: max-content }
.wide { overflow-x: auto; margin: 1rem 0; max-width: max-content }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
caption { text-align: left; color: var(--quiet); font-size: .92rem; padding-bottom: .4rem }
th, td { padding: .3rem .8rem; text-align: right; vertical-align: baseline; border-bottom: 1px solid var(--line) }
th:first-child { position: sticky; left: 0; text-align: left; padding-left: 0; background: var(--page) }
td { white-space: nowrap }
small { display: block; color: var(--quiet); font-size: .8rem }
.facts td { white-space: normal; text-align: left; overflow-wrap: anywhere }
tbody th { font-weight: 500 }
thead th { border-bottom: 2px solid var(--quiet); vertical-align: bottom }
footer { margin-top: 3rem; color: var(--quiet); font-size: .85rem }
:focus-visible { outline: 2px solid var(--curve0) }
@media (max-width: 30rem) {
  body { padding: .9rem }
  table { font-size: .82rem }
  small { font-size: .72rem }
  th, td { padding: .3rem .4rem }
  th:first-child { min-width: 5.2rem }
}
@media print {
  :root { color-scheme: light; --ink: #000; --quiet: #444; --line: #bbb; --grid: #ddd; --page: #fff; --shade: #fff;
    --curve0: #0072b2; --curve1: #d55e00; --curve2: #009e73; --curve3: #cc79a7; --curve4: #56b4e9; --curve5: #e69f00;
    --curve6: #000 }
  body { max-width: none; padding: 0; font-size: 10pt }
  nav { display: none }
  h2, h3, caption { break-after: avoid }
  h2 { margin-top: 1.4rem }
  svg, tr, .thumbs li, .formula { break-inside: avoid }
  .two { grid-template-columns: 1fr 1fr }
  .three { grid-template-columns: repeat(3, 1fr); gap: .5rem }
  .one { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; align-items: center }
  .wide, .formula { overflow: visible }
}
</style>
</head>
<body>
<header><h1>$title</h1>
$lead
<nav aria-label="Contents">$contents</nav></header>
<main>
$sections
</main>
<footer>$footer</footer>
</body>
</html>
""")

_COLUMNS = {2: "two", 3: "three"}


class Picture(NamedTuple):
    """A figure of matplotlib on a page.

    Attributes:
      name: Its own on the page, of letters, digits, "-" and "_".
      figure: What is drawn.
      label: What it shows, in plain text, for readers who cannot see it.
    """

    name: str
    figure: Any
    label: str


class Thumbnail(NamedTuple):
    """A small picture of a list: the bytes of a PNG file, and in plain text what stands below."""

    png: bytes
    caption: str


def fill(template: str, **values: Any) -> str:
    """HTML with values in place of {names}, as plain text: nothing in them is taken for HTML."""
    return template.format(**{name: escape(str(value)) for name, value in values.items()})


def page(title: str, lead: str, sections: Sequence[tuple[str, str]], footer: str) -> str:
    """The whole document.

    Args:
      title: Plain text.
      lead: HTML.
      sections: Heading in plain text, and HTML.
      footer: Plain text.
    """
    headings = [(f"part{i}", escape(heading)) for i, (heading, _) in enumerate(sections, 1)]
    contents = "".join(f'<a href="#{anchor}">{heading}</a>' for anchor, heading in headings)
    bodies = (
        f'<section>\n<h2 id="{anchor}">{heading}</h2>\n{body}\n</section>'
        for (anchor, heading), (_, body) in zip(headings, sections, strict=True)
    )
    return _PAGE.substitute(
        title=escape(title), lead=lead, contents=contents, sections="\n".join(bodies), footer=escape(footer)
    )


def figure(pictures: Sequence[Picture], caption: str) -> str:
    """Pictures in full rows where there is room, and one below the other where there is not.

    A single picture has its caption beside it.

    Args:
      pictures: At least one.
      caption: HTML, how to read them.
    """
    drawn = [inline_svg(p.figure, name=p.name, label=p.label) for p in pictures]
    if len(drawn) == 1:
        return f'<figure class="one"><div class="panels">{drawn[0]}</div><figcaption>{caption}</figcaption></figure>'
    rows = "\n".join(f'<div class="panels {_COLUMNS[len(row)]}">\n{"".join(row)}\n</div>' for row in _full_rows(drawn))
    return f"<figure>\n{rows}\n<figcaption>{caption}</figcaption>\n</figure>"


def thumbnails(pictures: Sequence[Thumbnail]) -> str:
    """Small pictures with a line of text each."""
    items = "".join(
        f'<li><img src="data:image/png;base64,{base64.b64encode(p.png).decode()}" alt="{escape(p.caption)}">'
        f"{escape(p.caption)}</li>"
        for p in pictures
    )
    return f'<ul class="thumbs">{items}</ul>'


def table(header: Sequence[str], rows: Sequence[Sequence[str | tuple[str, str]]], caption: str = "") -> str:
    """A table of plain text. A wide one scrolls by itself, and its first column stays.

    Args:
      header: Names of the columns.
      rows: Cells; the first one names the row. A pair is a cell and a note below it.
      caption: What it shows, in plain text.
    """
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = "\n".join(
        f'<tr><th scope="row">{_cell(first)}</th>' + "".join(f"<td>{_cell(c)}</td>" for c in rest) + "</tr>"
        for first, *rest in rows
    )
    named = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="wide" tabindex="0"><table>{named}<thead><tr>{head}</tr></thead>'
        f"<tbody>\n{lines}\n</tbody></table></div>"
    )


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """A table of names and values, in plain text, whose values may be long."""
    lines = "\n".join(f'<tr><th scope="row">{escape(k)}</th><td>{escape(v)}</td></tr>' for k, v in rows)
    return f'<div class="wide facts"><table><tbody>\n{lines}\n</tbody></table></div>'


def _cell(cell: str | tuple[str, str]) -> str:
    if isinstance(cell, str):
        return escape(cell)
    text, note = cell
    return f"{escape(text)}<small>{escape(note)}</small>"


def _full_rows(drawn: Sequence[str]) -> list[Sequence[str]]:
    """Rows of 3 where that comes out even, else rows of 2, after one row of 3 where the number is odd."""
    if len(drawn) % 3 == 0:
        return [drawn[i : i + 3] for i in range(0, len(drawn), 3)]
    if len(drawn) % 2:
        return [drawn[:3], *_full_rows(drawn[3:])]
    return [drawn[i : i + 2] for i in range(0, len(drawn), 2)]
