"""Draw the report's figures from the records under results/, in the report's typeface and at their true size.

python report/figures.py           report/figures/report/*.svg

Text stays text in these SVG files: Typst sets it in the report's own font. Matplotlib measures it with Computer Modern,
from which that font descends.
"""

import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from utils import COLOURS, write_whole  # noqa: E402

FOLDER = ROOT / "report" / "figures" / "report"
WIDTH = 6.4  # inches: the width of the report's text
MEASURED, SET = "cmr10", "New Computer Modern"
STYLE = {
    "font.family": [MEASURED, "DejaVu Serif"],  # the second one for what the first lacks, as ±
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "normal",
    "axes.titlelocation": "center",
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.6,
    "axes.formatter.use_mathtext": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
}


def read(path: str) -> dict:
    return json.loads((ROOT / "results" / path).read_text())


def new_figure(columns: int = 1, height: float = 2.3, width: float = WIDTH):
    """A figure of `columns` axes side by side, in inches, with its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def save(figure: Figure, name: str) -> None:
    """Write report/figures/report/<name>.svg; the same drawing gives the same bytes."""

    def write(temporary: Path) -> None:
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})
        temporary.write_text(temporary.read_text().replace(MEASURED, SET))

    write_whole(FOLDER / f"{name}.svg", write)


# ---------------------------------------------------------------------------------------------------
# Question 1


# ---------------------------------------------------------------------------------------------------
# Question 2


# ---------------------------------------------------------------------------------------------------
# Question 3


FIGURES = {}  # name of the file -> the function that draws it, in the report's order


def draw_all() -> None:
    with matplotlib.rc_context(STYLE):
        for name, make in FIGURES.items():
            save(make(), name)


if __name__ == "__main__":
    draw_all()
