"""Draw the figures of report and README.md from the records under results/.

python report/figures.py           report/figures/report/*.svg, at their true size, and report/figures/overview.png

What README.md or the notebook shows, too, is drawn by the same functions. Text stays text in these SVG files: Typst
sets it in the report's own font. Matplotlib measures it with Computer Modern, from which that font descends.
"""

import importlib
import io
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
sys.path[:0] = str(ROOT), str(ROOT / "benchmarks")

from runs import Parser, read_json, summarise_speech_runs, write_whole

if __name__ == "__main__":
    Parser(__doc__).parse_args()  # -h and mistakes are answered now: PyTorch takes seconds to import

import bench_q1
import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

import asr
import utils
from offline_data.phantoms import oct_phantoms

hw2_q2 = importlib.import_module("hw2-q2")
FOLDER, OVERVIEW = (ROOT / "report" / "figures" / name for name in ("report", "overview.png"))
WIDTH = 6.4  # inches: the width of the report's text
MEASURED, SET = "cmr10", "New Computer Modern"
STYLE = {
    "font.family": [MEASURED, "DejaVu Serif"],  # the second one for what the first lacks, as ±
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "normal",
    "axes.titlelocation": "center",
    "axes.linewidth": 0.6,
    "axes.formatter.use_mathtext": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "legend.fontsize": 8,
    "figure.titlesize": 9,
    "svg.fonttype": "none",
}
DECODERS = {"lstm": "LSTM", "transformer": "transformer"}
GUIDE = {"color": "#8c8c8c", "linewidth": 0.7, "dashes": (5, 3)}


def read(path: str) -> dict:
    return read_json(ROOT / "results" / path)


def draw_costs(axes, curve: dict, quantity: str, colours: dict[str, str]) -> None:
    """Milliseconds ("ms") or memory ("mib") against the length, by the ways to compute attention."""
    for name, colour in colours.items():
        points = [(p["length"], p[quantity][name]) for p in curve["points"] if name in p[quantity]]
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name)


# ---------------------------------------------------------------------------------------------------
# Question 1


def q1_memory_and_crossover() -> Figure:
    """Memory against the length, and the lengths from which features are faster against the number of features."""
    curve, methods = read("q1.json")["costs"][-1], pd.DataFrame(read("q1-bench.json")["methods"])
    figure, (memory, crossover) = utils.new_figure(1, 2)
    draw_costs(memory, curve, "mib", dict(zip(curve["points"][0]["mib"], ("#000000", *utils.COLOURS), strict=False)))
    memory.set_xscale("log", base=4)
    memory.set(yscale="log", xlabel="length L (tokens)", ylabel="memory (MiB)")
    figure.legend(loc="outside upper center", ncols=4)
    for three, mark, label in ((True, "o", "against all pairs, K = 3"), (False, "^", "against all pairs, K = 4 to 6")):
        rows = methods[(methods["num_terms"] == 3) == three]
        crossover.plot(rows["features"], rows["measured"], mark, color=utils.COLOURS[2], label=label)
    features = methods[methods["num_terms"] == 3].set_index("dim")["features"]
    fused = [(features[c["dim"]], c["crossover"]) for c in read("q1.json")["costs"] if c["crossover"]]
    crossover.plot(*zip(*fused, strict=True), "ks", mfc="none", markersize=5.5, label="against fused softmax, K = 3")
    limits = (30, 6000)
    crossover.plot(limits, limits, **GUIDE)
    crossover.annotate("L = M", (700, 700), (6, -9), textcoords="offset points", color="#6e6e6e")
    crossover.set(xscale="log", yscale="log", xlim=limits, ylim=limits, xlabel="features M", ylabel="crossover length")
    crossover.legend(loc="lower right", borderaxespad=0.2)
    for axes in (memory, crossover):
        axes.minorticks_off()
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,g}")
    return figure


# ---------------------------------------------------------------------------------------------------
# Question 2


def test_phantoms(number: int) -> np.ndarray:
    """The first `number` of each class, uint8 [4 * number, 28, 28]."""
    phantoms = oct_phantoms(0, 0)  # the test split alone: it does not depend on the sizes of the others
    labels = phantoms["test_labels"].ravel()
    return phantoms["test_images"][np.concatenate([np.flatnonzero(labels == c)[:number] for c in range(4)])]


def q2_phantoms() -> Figure:
    figure, every = utils.new_figure(1, 8)
    for i, (axes, image) in enumerate(zip(every, test_phantoms(2), strict=True)):
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="none")
        axes.set_axis_off()
        axes.set_title(hw2_q2.SHORT_NAMES[i // 2])
    return figure


def q2_grid() -> Figure:
    return hw2_q2.plot_grid(read("q2/phantom-homework/grid.json"), ROOT / "results" / "q2" / "phantom-homework")


def q2_pooling() -> Figure:
    networks = read("q2/pooling-phantom.json")["networks"]
    parts = {"train": "training", "val": "validation", "test": "test"}
    shifts = {"1": "1 px", "2_odd": "2 px,\nodd", "2_even": "2 px,\neven"}
    figure, (loss, fit, changed) = utils.new_figure(1, 3)
    for i, (pool, mark) in enumerate({"max": "o-", "mean": "^:", "stride": "s--"}.items()):
        runs = networks[pool]["runs"]
        losses = pd.DataFrame([run["history"]["train_loss"] for run in runs], columns=runs[0]["history"]["epoch"])
        loss.plot(losses.mean(), mark[1:], color=utils.COLOURS[i], label=pool)
        loss.fill_between(losses.columns, losses.min(), losses.max(), color=utils.COLOURS[i], alpha=0.15, linewidth=0)
        for run, aside in zip(runs, np.linspace(-0.06, 0.06, len(runs)), strict=True):  # seeds side by side
            scores = [run["measures"][part]["balanced_accuracy"] for part in parts]
            changes = [run["measures"]["shifts"][shift]["changed"] for shift in shifts]
            for axes, values in ((fit, scores), (changed, changes)):
                axes.plot(np.arange(3) + 0.2 * (i - 1) + aside, values, mark[0], color=utils.COLOURS[i], mfc="none")
    loss.set(ylim=(0, 1.3), xlabel="epoch", ylabel="training loss (nats)")
    fit.set(ylim=(0, 1), ylabel="balanced accuracy (%)")
    changed.set(ylim=(0, 0.4), xlabel="shift of the scan", ylabel="predictions changed (%)")
    for axes, ticks in ((fit, parts), (changed, shifts)):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
        axes.set_xticks(range(3), ticks.values())
    figure.legend(*loss.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


# ---------------------------------------------------------------------------------------------------
# Question 3


def spoken_runs(decoder: str) -> list[str]:
    """The names of the records of the preset `improved` on the spoken corpus, one per seed."""
    wanted = {"dataset": "spoken corpus", "preset": "improved", "changes": {}, "decoder": decoder}
    rows = summarise_speech_runs(ROOT / "results" / "q3")
    return next(row["files"] for row in rows if wanted.items() <= row.items())


def q3_histories() -> dict[str, list[list[dict]]]:
    return {name: [read(f"q3/{file}")["history"] for file in spoken_runs(d)] for d, name in DECODERS.items()}


def q3_curves() -> Figure:
    return asr.plot_speech_curves(q3_histories(), "Loss")


def q3_alignments() -> Figure:
    files = [spoken_runs(decoder)[0] for decoder in DECODERS]
    looked = pd.DataFrame([read(f"q3/details/{file}")["cross_attention"] for file in files], DECODERS.values())
    weights, texts, heard = (dict(looked[key]) for key in ("weights", "written", "heard_by_ctc"))
    weights = {name: np.array(rows) for name, rows in weights.items()}
    seconds = looked["seconds_per_position"].iloc[0] * weights["LSTM"].shape[1]
    figure = asr.plot_alignments(weights, texts, heard, seconds, "")
    for axes, (name, text) in zip(figure.axes, texts.items(), strict=True):  # small: a tick per word, not a character
        words = list(re.finditer(r"\S+", text))
        middles = [(word.start() + word.end()) / 2 for word in words]
        axes.set_yticks(
            [*middles, len(text) + 0.5],
            [*(word.group() for word in words), "(stop)"],
            fontsize=7.5,
            family=STYLE["font.family"],
        )
        axes.set(title=name, ylabel="written")
        axes.get_legend().remove()
        axes.lines[0].set_markersize(2)
    return figure


# ---------------------------------------------------------------------------------------------------
# The picture of README.md: a panel a question. Each function returns what its numbers were measured on.


def overview_q1(part) -> str:
    record, axes = read("q1.json"), part.subplots()
    curve = record["costs"][-1]
    draw_costs(
        axes, curve, "ms", {"softmax, fused": "#000000", "Taylor, naive features": "#e69f00", "Taylor": "#0072b2"}
    )
    for line in axes.lines:
        line.set_markersize(3.5)
    length, ms = curve["points"][-1]["length"], curve["points"][-1]["ms"]
    gain = f"{ms['softmax, fused'] / ms['Taylor']:.1f} times\nas fast as\nfused softmax"
    axes.annotate(gain, (length, ms["Taylor"]), (0, -58), textcoords="offset points", color="#0072b2", ha="right")
    axes.set(xscale="log", yscale="log", xlabel="length (tokens)", ylabel="forward pass (ms)", ylim=(0.1, 2e4))
    axes.set_xticks(ticks := [256, 1024, 4096, 16384], [f"{tick:,}" for tick in ticks])
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.minorticks_off()
    axes.legend(loc="upper left", fontsize=9)
    return f"random numbers, width {curve['dim']}, {record['device'].upper()}"


def overview_q2(part) -> str:
    """The first test phantom of each class, and what the network in weights/ takes it for."""
    model, _ = hw2_q2.load_network(hw2_q2.WEIGHTS, torch.device("cpu"))
    scans, names = test_phantoms(1), hw2_q2.SHORT_NAMES
    shares = hw2_q2.predict(model, torch.from_numpy(scans))
    for label, axes in enumerate(part.subplots(2, 2).ravel()):
        guess = shares[label].argmax()
        axes.imshow(scans[label], cmap="gray", vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color="#bbbbbb")
        title = f"{names[label]}: {'✓' if guess == label else f'✗ {names[guess]}'} {shares[label].max():.0%}"
        colour = "black" if guess == label else utils.COLOURS[1]
        axes.set_title(title, fontsize=10, fontweight="normal", color=colour, pad=4)
    return "PHANTOMS, no real scans: answer and confidence"


def overview_q3(part) -> str:
    """Validation errors over the epochs: mean over the seeds, and their range."""
    axes = part.subplots()
    for (name, histories), colour in zip(q3_histories().items(), utils.COLOURS, strict=False):
        curves = 100 * np.array([[epoch["val"]["cer"] for epoch in history] for history in histories])
        epochs = np.arange(1, curves.shape[1] + 1)
        axes.plot(epochs, curves.mean(0), color=colour, label=f"{name} decoder")
        axes.fill_between(epochs, curves.min(0), curves.max(0), color=colour, alpha=0.2, linewidth=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="epoch", ylabel="wrong characters in 100", ylim=(0, None))
    axes.legend(loc="upper right", fontsize=9)
    return "spoken corpus, synthetic speech"


def draw_overview() -> None:
    figure, _ = utils.new_figure(size=(10.6, 3.6))  # in our style
    figure.clear()
    panels = {
        "1  Attention in linear time": overview_q1,
        "2  Retinal scans": overview_q2,
        "3  Speech recognition": overview_q3,
    }
    for part, (title, draw) in zip(figure.subfigures(1, 3, width_ratios=(1, 0.8, 1)), panels.items(), strict=True):
        part.supxlabel(draw(part), x=0.5, fontsize=9, color="#555555")
        part.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, metadata={"Software": None})
    palette = Image.open(drawn).convert("RGB").quantize(method=Image.Quantize.FASTOCTREE)  # half of the bytes
    palette.save(small, "PNG", optimize=True)
    write_whole(OVERVIEW, small.getvalue())


FIGURES: dict[str, tuple[Callable[[], Figure], float]] = {
    "q1-attention": (lambda: bench_q1.plot(read("q1.json")), 2.4),
    "q1-memory-and-crossover": (q1_memory_and_crossover, 2.1),
    "q2-phantoms": (q2_phantoms, 0.95),
    "q2-grid": (q2_grid, 2.4),
    "q2-pooling": (q2_pooling, 2.1),
    "q3-curves": (q3_curves, 2.1),
    "q3-alignments": (q3_alignments, 1.8),
}  # name of the file -> the function that draws it, and inches of height; in the report's order


def draw_all() -> None:
    """Write report/figures/report/NAME.svg for each of FIGURES; the same records give the same bytes."""
    # Formulas on the axes would need mathtext for their minus; these axes have none.
    warnings.filterwarnings("ignore", message="cmr10 font should ideally be used with mathtext")
    with mock.patch.dict(utils.STYLE, STYLE), matplotlib.rc_context():
        for name, (plot, height) in FIGURES.items():
            figure, buffer = plot(), io.StringIO()
            figure.set_size_inches(WIDTH, height)
            if figure.get_suptitle():
                figure.suptitle("")  # the report has captions
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
            write_whole(FOLDER / f"{name}.svg", buffer.getvalue().replace(MEASURED, SET).encode())


if __name__ == "__main__":
    draw_all()
    draw_overview()
