"""What all figures share: colours, marks and the frame of a panel."""

from collections.abc import Collection

# Okabe and Ito's palette (2008), told apart by colour-blind readers; its yellow is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
INK, GREY, PALE = "#262626", "#767676", "#E4E4E4"


def check_colours(names: Collection, what: str) -> None:
    """ValueError for more curves than there are colours, or none."""
    if not names:
        raise ValueError(f"there are no {what} to draw")
    if len(names) > len(COLOURS):
        raise ValueError(f"{len(names)} {what} are more than the {len(COLOURS)} colours; draw fewer in one figure")


def new_figure(panels: int = 1, *, title: str | None = None, height: float = 4.2) -> "matplotlib.figure.Figure":
    """An empty figure, as wide as so many panels; ImportError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("qpde.plots needs matplotlib: pip install 'qpde[train]'") from error
    figure = Figure(figsize=(5.4 * panels, height), dpi=160, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, wspace=0.04)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, color=INK)
    return figure


def label(axes, heading: str, x: str, y: str, *, pad: int = 8) -> None:
    """Names of a panel and of its axes, and the house's quiet frame."""
    axes.set_title(heading, loc="left", fontsize=12, fontweight="bold", color=INK, pad=pad)
    axes.set_xlabel(x, fontsize=10, color=INK)
    axes.set_ylabel(y, fontsize=10, color=INK)
    axes.tick_params(colors=INK, labelsize=9.5, length=3)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
