"""What all figures share: colours, marks and the frame of a panel."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import matplotlib.artist
    import matplotlib.axes
    import matplotlib.figure
    import matplotlib.legend

# Okabe and Ito's palette (2008), told apart by colour-blind readers; its yellow is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
INK, GREY, PALE = "#262626", "#767676", "#E4E4E4"


_FIXED = ("symmetric", "plain")  # what most figures compare has the first colours in all of them


def styles(names: Collection[str], what: str, among: Collection[str] = ()) -> dict[str, int]:
    """Places in `COLOURS` and `MARKERS` by name: "symmetric" and "plain" have the first two, others what is left.

    Args:
      names: what is drawn.
      what: they are, for messages.
      among: all that figures beside this one draw: the same for each of them, it gives a name one colour in all.
    Raises:
      ValueError: there are more names than colours, or none.
    """
    if not names:
        raise ValueError(f"there are no {what} to draw")
    everything = list(dict.fromkeys((*among, *names)))
    if len(everything) > len(COLOURS):
        raise ValueError(f"{len(everything)} {what} are more than the {len(COLOURS)} colours; draw fewer in one figure")
    found = {name: place for place, name in enumerate(_FIXED) if name in everything}
    free = (place for place in range(len(COLOURS)) if place not in found.values())
    return {name: found[name] if name in found else next(free) for name in everything}


def power_of_ten(value: float, position: int | None = None) -> str:
    """The number at a tick of a logarithmic axis, in plain text: 0.001, 20, 10⁻⁶."""
    del position
    exponent = math.floor(math.log10(value) + 1e-9)
    if -4 < exponent < 4:
        return f"{value:g}"
    digits = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    factor = round(value / 10.0**exponent, 6)
    return f"10{digits}" if factor == 1 else f"{factor:g}·10{digits}"


def logarithmic(axes: matplotlib.axes.Axes, *names: str) -> None:
    """Make the axes of these names, "x" or "y", logarithmic, their numbers in plain text; after everything is drawn."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for name in names:
        axes.set(**{f"{name}scale": "log"})
        axis, (low, high) = getattr(axes, f"{name}axis"), getattr(axes, f"get_{name}lim")()
        axis.set_major_formatter(FuncFormatter(power_of_ten))
        axis.set_minor_formatter(NullFormatter())
        if high < 20 * low:  # one power of ten, or none
            axis.set_minor_locator(LogLocator(subs=(2, 5)))
            axis.set_minor_formatter(FuncFormatter(power_of_ten))


def plain(text: str) -> str:
    """The text as matplotlib shows it letter by letter: "$" begins no mathematics.

    matplotlib takes text for mathematics where "$" stands without a backslash, and removes the backslash elsewhere.
    """
    return text.replace("$", r"\$")


def legend(owner, handles: Mapping[str, matplotlib.artist.Artist], **place) -> matplotlib.legend.Legend:
    """A legend with every name as it is: matplotlib itself leaves out those that begin with an underscore.

    Args:
      owner: Figure or axes that gets it.
      handles: What is drawn, by name.
      place: Where it goes, as for matplotlib's own.
    """
    made = owner.legend(list(handles.values()), ["name"] * len(handles), frameon=False, labelcolor=INK, **place)
    for text, name in zip(made.get_texts(), handles, strict=True):
        text.set_text(plain(name))
    return made


def new_figure(panels: int = 1, *, title: str | None = None, height: float = 4.2) -> matplotlib.figure.Figure:
    """An empty figure, as wide as so many panels; ImportError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("qpde.plots needs matplotlib: pip install 'qpde[train]'") from error
    figure = Figure(figsize=(5.4 * panels, height), dpi=160)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08, wspace=0.04)
    if title:
        figure.suptitle(plain(title), x=0.01, ha="left", fontsize=13, color=INK)
    return figure


def label(axes, heading: str, x: str, y: str, *, pad: int = 8) -> None:
    """Names of a panel and of its axes, and the house's quiet frame."""
    axes.set_title(plain(heading), loc="left", fontsize=12, fontweight="bold", color=INK, pad=pad)
    axes.set_xlabel(plain(x), fontsize=10, color=INK)
    axes.set_ylabel(plain(y), fontsize=10, color=INK)
    axes.tick_params(which="both", colors=INK, labelsize=9.5)
    axes.tick_params(which="major", length=3)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
