"""Draw the picture of README.md from the records under results/, and from the network in weights/.

python report/pictures.py          report/figures/overview.png
"""

import importlib
import io
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from runs import Parser, write_whole

if __name__ == "__main__":
    Parser(__doc__).parse_args()  # -h is answered now: PyTorch takes seconds to import

import numpy as np
import torch
from matplotlib.ticker import FuncFormatter
from PIL import Image
from readme import DECODERS, SPEECH, NotRecorded, first_pair, read

import utils
from offline_data.phantoms import oct_phantoms

PATH = ROOT / "report" / "figures" / "overview.png"


def draw_q1(figure) -> str:
    """Time against the length, by the ways to compute attention. Like the others, returns what it was measured on."""
    record, axes = read("q1.json"), figure.subplots()
    curve = record["costs"][-1]
    for name, colour in (("softmax, fused", "#000000"), ("Taylor, naive features", "#e69f00"), ("Taylor", "#0072b2")):
        points = [(point["length"], point["ms"][name]) for point in curve["points"] if name in point["ms"]]
        axes.plot(*zip(*points, strict=True), "o-", markersize=3.5, color=colour, label=name)
    length, ms = curve["points"][-1]["length"], curve["points"][-1]["ms"]
    gain = f"{ms['softmax, fused'] / ms['Taylor']:.1f} times\nas fast"
    axes.annotate(gain, (length, ms["Taylor"]), (0, -58), textcoords="offset points", color=colour, ha="right")
    axes.set(xscale="log", yscale="log", xlabel="length (tokens)", ylabel="forward pass (ms)", ylim=(0.1, 2e4))
    ticks = [256, 1024, 4096, 16384]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:,g}"))
    axes.minorticks_off()
    axes.legend(loc="upper left", fontsize=9)
    return f"random numbers, width {curve['dim']}, {record['device'].upper()}"


def draw_q2(figure) -> str:
    """The first test phantom of each class, and what the network in weights/ takes it for."""
    q2 = importlib.import_module("hw2-q2")
    model, _ = q2.load_network(q2.WEIGHTS, torch.device("cpu"))
    data = oct_phantoms(0, 0)  # the test split alone: it does not depend on the sizes of the others
    firsts = [np.flatnonzero(data["test_labels"].ravel() == label)[0] for label in range(4)]
    scans = data["test_images"][firsts]
    for label, axes in enumerate(figure.subplots(2, 2).ravel()):
        shares = q2.predict(model, torch.from_numpy(scans))[label]
        guess, right = q2.SHORT_NAMES[shares.argmax()], shares.argmax() == label
        axes.imshow(scans[label], cmap="gray", vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color="#bbbbbb")
        name = q2.SHORT_NAMES[label]
        title = f"{name}: {'✓' if right else f'✗ {guess}'} {shares.max():.0%}"
        axes.set_title(title, fontsize=10, fontweight="normal", color="black" if right else utils.COLOURS[1], pad=4)
    return "PHANTOMS, no real scans: answer and confidence"


def draw_q3(figure) -> str:
    """Validation errors over the epochs: mean over the seeds, and their range."""
    axes, rows = figure.subplots(), first_pair()
    for row, colour in zip(rows, utils.COLOURS, strict=False):
        histories = [read(f"q3/{file}")["history"] for file in row["files"]]
        curves = 100 * np.array([[epoch["val"]["cer"] for epoch in history] for history in histories])
        epochs = np.arange(1, curves.shape[1] + 1)
        axes.plot(epochs, curves.mean(0), color=colour, label=f"{DECODERS[row['decoder']]} decoder")
        axes.fill_between(epochs, curves.min(0), curves.max(0), color=colour, alpha=0.2, linewidth=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="epoch", ylabel="wrong characters in 100", ylim=(0, None))
    axes.legend(loc="upper right", fontsize=9)
    return f"{rows[0]['data']}, {SPEECH[rows[0]['kind']]}"


def draw_overview() -> None:
    figure, _ = utils.new_figure(size=(10.6, 3.6))  # in our style
    figure.clear()
    titles = "1  Attention in linear time", "2  Retinal scans", "3  Speech recognition"
    for part, title, draw in zip(
        figure.subfigures(1, 3, width_ratios=(1, 0.8, 1)), titles, (draw_q1, draw_q2, draw_q3), strict=True
    ):
        try:
            data = draw(part)
        except NotRecorded:
            data = "not recorded yet"
        part.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
        part.supxlabel(data, x=0.5, fontsize=9, color="#555555")
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, metadata={"Software": None})
    palette = Image.open(drawn).convert("RGB").quantize(method=Image.Quantize.FASTOCTREE)  # half of the bytes
    palette.save(small, "PNG", optimize=True)
    write_whole(PATH, small.getvalue())


if __name__ == "__main__":
    draw_overview()
