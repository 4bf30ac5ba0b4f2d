"""The picture of the method, docs/overview.svg: `python docs/draw_overview.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

FROZEN, SHARED, OWN, MADE, INK, FRAME = "#c9cdd3", "#2f6fb5", "#ee8a2d", "#7fb77e", "#22262b", "#f5f6f8"
SIDE, UNITS, SHARE = 1.7, 0.42, 0.7  # of a weight; width of k units, and how much of them is shared


class Drawing:
    """Matrices as rectangles, lower left corners at (x, y), on a canvas without axes."""

    def __init__(self, width: float, height: float) -> None:
        self.figure, self.axes = pyplot.subplots(figsize=(width * 0.72, height * 0.72))
        self.axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
        self.axes.axis("off")
        self.figure.subplots_adjust(0, 0, 1, 1)

    def box(self, x, y, width, height, colour, dashed=False) -> None:
        style = dict(facecolor="none", linestyle=(0, (3, 2))) if dashed else dict(facecolor=colour)
        self.axes.add_patch(Rectangle((x, y), width, height, edgecolor=INK, linewidth=0.8, **style))

    def weight(self, x, y, side=SIDE, label="$W$") -> None:
        self.box(x, y, side, side, FROZEN)
        self.text(x + side / 2, y + side / 2, label, 15)

    def units(self, x, y, length, label, upright=True, shared=SHARE, width=UNITS) -> None:
        """A trained matrix of k units: the shared ones, then the layer's own."""
        for start, part, colour in ((0, shared, SHARED), (shared, 1 - shared, OWN)):
            if part and upright:
                self.box(x + start * width, y, part * width, length, colour)
            elif part:
                self.box(x, y + (1 - start - part) * width, length, part * width, colour)
        middle = (x + width / 2, y - 0.22) if upright else (x + length / 2, y + width + 0.2)
        self.text(*middle, label)

    def made(self, x, y, length, label, width=UNITS) -> None:
        """A thin matrix that is computed."""
        self.box(x, y, width, length, MADE)
        self.text(x + width / 2, y - 0.22, label)

    def frame(self, x, y, width, height, title) -> None:
        style = dict(boxstyle="round,pad=0,rounding_size=0.18", facecolor=FRAME, edgecolor="#d5d9de", linewidth=0.8)
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, zorder=0, **style))
        self.text(x + 0.2, y + height - 0.27, title, 11, ha="left", weight="bold")

    def text(self, x, y, text, size=11, ha="center", **style) -> None:
        self.axes.text(x, y, text, fontsize=size, ha=ha, va="center", color=INK, **style)

    def arrow(self, start, end) -> None:
        self.axes.add_patch(
            FancyArrowPatch(
                start, end, arrowstyle="-|>", mutation_scale=13, color=INK, linewidth=1.1, shrinkA=0, shrinkB=0
            )
        )


def draw() -> pyplot.Figure:
    """The weight side above, the token side and LoRA below."""
    page = Drawing(17, 7)
    top, bottom = 3.95, 0.7
    middle = top + SIDE / 2

    page.frame(0.2, 3.35, 5.4, 3.45, "column stage: reads the rows of $W$")
    page.weight(0.55, top)
    page.text(2.48, middle, "·", 18)
    page.units(2.7, top, SIDE, "$A_1^\\top$")
    page.arrow((3.3, middle), (4.4, middle))
    page.text(3.8, middle + 0.24, "$\\varphi$", 13)
    page.made(4.55, top, SIDE, "$H_1$")

    page.frame(5.8, 3.35, 5.2, 3.45, "row stage: reads its columns")
    page.arrow((5.1, middle), (6.15, middle))
    page.box(6.3, top, SIDE, SIDE, None, dashed=True)
    page.text(6.3 + SIDE / 2, middle, "tiles,\nnever stored", 9.5)
    page.units(6.3, top + SIDE + 0.08, SIDE, "", upright=False)
    page.text(6.3 + SIDE + 0.3, top + SIDE + 0.08 + UNITS / 2, "$B_1^\\top$")
    page.text(6.3 + SIDE + 0.15, top + SIDE - 0.12, "$^\\top$", 13)
    page.text(8.24, middle, "·", 18)
    page.units(8.45, top, SIDE, "$A_2^\\top$")
    page.arrow((9.05, middle), (12.15, middle))
    page.text(10.0, middle + 0.24, "$\\varphi$", 13)

    page.frame(11.2, 3.35, 5.6, 3.45, "what is left: two thin factors")
    page.made(12.3, top, SIDE, "$H$  [in, k]")
    page.units(14.9, top, SIDE, "$B = B_2$  [out, k]")

    middle = bottom + SIDE / 2
    page.frame(0.2, 0.2, 9.6, 2.95, "token side: within the layer's own product")
    page.box(0.6, bottom, 1.1, SIDE, "white")
    page.text(1.15, middle, "$x$", 15)
    page.text(2.0, middle, "· (", 17)
    page.weight(2.3, bottom)
    page.text(4.45, middle, "+  $\\sigma$", 15)
    page.units(4.95, bottom, SIDE, "$B$")
    page.box(5.5, bottom + SIDE - UNITS, SIDE, UNITS, MADE)
    page.text(5.5 + SIDE / 2, bottom + SIDE - UNITS - 0.24, "$H^\\top$")
    page.text(7.6, middle, ")$^\\top$  =", 15)
    page.box(8.3, bottom, 1.1, SIDE, "white")
    page.text(8.85, middle, "$y$", 15)

    page.frame(10.0, 0.2, 3.6, 2.95, "LoRA, for comparison")
    small, low = 1.1, bottom + 0.3
    page.weight(10.3, low, small)
    page.text(11.65, low + small / 2, "+", 15)
    page.units(11.9, low, small, "$B$", shared=0, width=0.3)
    page.box(12.3, low + small - 0.3, small, 0.3, OWN)
    page.text(12.3 + small / 2, low + small - 0.52, "$A$")

    page.frame(13.8, 0.2, 3.0, 2.95, "")
    labels = {
        FROZEN: "frozen", SHARED: "trained, shared by all\nlayers of a shape", OWN: "trained, each layer's\nown",
        MADE: "computed from W",
    }  # fmt: skip
    for row, (colour, label) in enumerate(labels.items()):
        y = 2.6 - 0.68 * row
        page.box(14.05, y, 0.34, 0.34, colour)
        page.text(14.55, y + 0.17, label, 9.5, ha="left")
    return page.figure


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "genft_kernels"  # the same file from the same script
    target = Path(__file__).with_name("overview.svg")
    draw().savefig(target, metadata={"Date": None})
    print(f"wrote {target}")
