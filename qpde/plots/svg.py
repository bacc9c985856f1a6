"""Figures inside of an HTML page: text stays text, and the page's style sheet chooses the colours."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from qpde.plots.frame import COLOURS, GREY, INK, PALE

if TYPE_CHECKING:
    import matplotlib.figure

__all__ = ["VARIABLES", "inline_svg"]

VARIABLES = {
    INK: "--ink",
    GREY: "--quiet",
    PALE: "--grid",
    "#ffffff": "--page",
    **{colour: f"--curve{i}" for i, colour in enumerate(COLOURS)},
}
"""The custom properties of CSS that stand for the colours of figures; without them the colours are as in a file."""

_COLOUR = re.compile("|".join(VARIABLES), re.IGNORECASE)
_NAMED = {colour.lower(): f"var({name}, {colour.lower()})" for colour, name in VARIABLES.items()}
_REFERENCE = re.compile(r"(?<=^#)[^#()]+$|(?<=url\(#)[^)]+")
_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_NUMBERS = ("d", "x", "y", "transform", "points", "width", "height")


def inline_svg(figure: matplotlib.figure.Figure, *, name: str, label: str) -> str:
    """An `<svg>` element that shows a figure, to be put into an HTML page as it is.

    Its background is transparent, it is as wide as the page lets it be, and it has no script and no outer reference.

    Args:
      figure: What a function of this room returned.
      name: What the ids of its elements begin with: letters, digits, "-" and "_". Each figure of a page has its own.
      label: What the figure shows, in plain text, for readers who cannot see it.
    Raises:
      ValueError: The name is empty or holds other characters.
    """
    if not re.fullmatch(r"[A-Za-z][\w-]*", name, re.ASCII):
        raise ValueError(f"`name` (={name!r}) begins with a letter and goes on with letters, digits, '-' and '_'")
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", dpi=110, transparent=True, metadata=metadata)
    root = ElementTree.fromstring(buffer.getvalue())
    ids: dict[str, str] = {}
    for element in root.iter():
        _simplify(element)
        for value in element.attrib.values():
            for old in _REFERENCE.findall(value):
                ids.setdefault(old, f"{name}-{len(ids)}")
    for element in root.iter():
        for key, value in element.attrib.items():
            element.set(key, _REFERENCE.sub(lambda found: ids[found[0]], value))
        if (own := element.attrib.pop("id", None)) in ids:
            element.set("id", ids[own])
        for child in [child for child in element if child.tag == "style"]:
            element.remove(child)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label, "stroke-linejoin": "round"}
    return ElementTree.tostring(root, encoding="unicode")


def _simplify(element) -> None:
    """Plain names in place of XML's, short numbers, variables in place of colours, and the page's typeface."""
    element.tag = element.tag.rpartition("}")[2]
    element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    for key in _NUMBERS:
        if key in element.attrib:
            element.set(key, _NUMBER.sub(lambda number: f"{float(number[0]):.5g}", element.get(key)).replace("\n", ""))
    if "style" in element.attrib:
        style = _COLOUR.sub(lambda found: _NAMED[found[0].lower()], element.get("style"))
        # Older versions of matplotlib write "font: 700 10px 'DejaVu Sans', ...".
        style = re.sub(r"font: (?:(\d+) )?([\d.]+px)[^;]*", r"font-weight: \1; font-size: \2", style)
        element.set("style", re.sub(r"font-weight: ;|font-family:[^;]*;?", "", style).replace("; ", ";"))
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    if element.tag not in ("text", "tspan"):
        element.text = None
    element.tail = None
