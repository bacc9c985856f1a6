"""The frame of a page: one file of HTML with its pictures inside, for a phone, paper, day and night."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --ink: #262626; --quiet: #5f5f5f; --line: #dcdcdc; --page: #fff; --card: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --quiet: #a8a8a8; --line: #444; --page: #1b1b1b; --card: #f4f4f4 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.2rem; max-width: 70rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem; padding-top: .8rem; border-top: 1px solid var(--line) }
p, figcaption, li { max-width: 46rem }
nav { font-size: .9rem; columns: 2 14rem; margin: 1rem 0 }
nav a { display: block }
a { color: inherit }
figure { margin: 1rem 0 }
figcaption { color: var(--quiet); font-size: .92rem; margin-top: .5rem }
.panels { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)) }
img { display: block; width: 100%; max-width: 38rem; height: auto; background: var(--card); border-radius: 4px }
.formula { font-family: "Cambria Math", "STIX Two Math", serif; font-size: 1.05rem; margin: .6rem 0; padding-left: 1rem;
  border-left: 3px solid var(--line) }
.wide { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
caption { text-align: left; color: var(--quiet); font-size: .92rem; padding-bottom: .4rem }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line) }
th:first-child { text-align: left; padding-left: 0; min-width: 8rem }
td { white-space: nowrap }
tbody th { font-weight: 500 }
thead th { border-bottom: 2px solid var(--quiet); vertical-align: bottom }
footer { margin-top: 3rem; color: var(--quiet); font-size: .85rem }
@media print {
  :root { --ink: #000; --quiet: #333; --line: #bbb; --page: #fff; --card: #fff }
  body { max-width: none; padding: 0; font-size: 10.5pt }
  nav { display: none }
  h2 { break-after: avoid }
  figure, table { break-inside: avoid }
  .panels { grid-template-columns: 1fr 1fr }
  .wide { overflow-x: visible }
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


def page(title: str, lead: str, sections: Sequence[tuple[str, str]], footer: str) -> str:
    """The whole document.

    Args:
      title, footer: plain text.
      lead: HTML.
      sections: heading in plain text, and HTML.
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


def figure(pictures: Sequence[tuple[Path, str]], caption: str) -> str:
    """PNG files side by side where there is room.

    Args:
      pictures: file, and in plain text what it shows, for who cannot see it.
      caption: HTML, how to read it.
    """
    images = "\n".join(
        f'<img src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" alt="{escape(alt)}">'
        for path, alt in pictures
    )
    return f'<figure>\n<div class="panels">\n{images}\n</div>\n<figcaption>{caption}</figcaption>\n</figure>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """Cells of plain text; the first column names the rows. A wide table scrolls by itself."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = "\n".join(
        "<tr>" + f'<th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(c)}</td>" for c in rest) + "</tr>"
        for first, *rest in rows
    )
    named = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="wide" tabindex="0"><table>{named}<thead><tr>{head}</tr></thead>'
        f"<tbody>\n{lines}\n</tbody></table></div>"
    )


def formula(html: str) -> str:
    """A line of mathematics, in HTML."""
    return f'<p class="formula">{html}</p>'
