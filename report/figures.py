"""Draw the report's figures from the records under results/, in the report's typeface and at their true size.

python report/figures.py           report/figures/report/*.svg

Text stays text in these SVG files: Typst sets it in the report's own font. Matplotlib measures it with Computer Modern,
from which that font descends.
"""

import io
import json
import math
import re
import sys
import warnings
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from offline_data.phantoms import oct_phantoms
from runs import write_whole
from utils import COLOURS
from utils import STYLE as SHARED_STYLE

FOLDER = ROOT / "report" / "figures" / "report"
WIDTH = 6.4  # inches: the width of the report's text
MEASURED, SET = "cmr10", "New Computer Modern"
STYLE = SHARED_STYLE | {
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
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    write_whole(FOLDER / f"{name}.svg", buffer.getvalue().replace(MEASURED, SET).encode())


# ---------------------------------------------------------------------------------------------------
# Question 1

FORMS = {  # name in the record -> label, colour, marker
    "softmax, as the formula": ("softmax, weights held", "#8c8c8c", "s"),
    "softmax, fused": ("softmax, fused", "#000000", "s"),
    "Taylor, naive features": ("Taylor, features held", COLOURS[5], "o"),
    "Taylor": ("Taylor, ours", COLOURS[0], "o"),
}
GUIDE = "#8c8c8c"


def set_ticks(axis, ticks: list[float]) -> None:
    """A logarithmic axis with its ticks as plain numbers: 0.01, 1, 1,000."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_ticks(ticks, [f"{tick:,.6f}".rstrip("0").rstrip(".") for tick in ticks])
    axis.axes.minorticks_off()


def draw_guide(axes, x: tuple[float, float], y: float, slope: int) -> None:
    """A dashed line of a slope on logarithmic axes from (x[0], y), with the slope at its end."""
    end = y * (x[1] / x[0]) ** slope
    axes.plot(x, (y, end), color=GUIDE, linewidth=0.7, dashes=(5, 3))
    axes.annotate(f"slope {slope}", (x[1], end), (2, 0), textcoords="offset points", va="center", color="#6e6e6e")


def draw_forms(axes, curve: dict, quantity: str) -> None:
    """Time ("ms") or memory ("mib") against the length; hollow where Taylor attention looks at all pairs."""
    rows = read("q1-bench.json")["methods"]
    dim_and_terms = curve["dim"], curve["num_terms"]
    features_from = next(row["assumed"] for row in rows if (row["dim"], row["num_terms"]) == dim_and_terms)
    for name, (label, colour, marker) in FORMS.items():
        points = [(p["length"], p[quantity][name]) for p in curve["points"] if name in p[quantity]]
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label)
        if name == "Taylor":
            direct = [point for point in points if point[0] < features_from]
            axes.plot(*zip(*direct, strict=True), color=colour, marker=marker, mfc="white", linestyle="none")
    set_ticks(axes.xaxis, [256, 1024, 4096, 16384])
    axes.set(xlim=(200, 30000), xlabel="length L (tokens)")


def q1_time() -> Figure:
    curves = read("q1.json")["costs"]
    figure, panels = new_figure(len(curves), height=2.3)
    guides = {16: ((640, 1600), 130), 64: ((400, 1200), 0.11)}  # D -> where there is room for a slope of 2
    for axes, curve in zip(panels, curves, strict=True):
        draw_forms(axes, curve, "ms")
        set_ticks(axes.yaxis, [0.1, 1, 10, 100, 1000])
        axes.set(ylim=(0.07, 4000), ylabel="time of a forward pass (ms)")
        axes.text(0.03, 0.97, f"D = {curve['dim']}, K = {curve['num_terms']}", transform=axes.transAxes, va="top")
        if length := curve["crossover"]:
            axes.axvline(length, ymax=0.85, color=COLOURS[0], linestyle=":", linewidth=1)
            rounded = round(length, -2 if length >= 1000 else -1)
            axes.annotate(f"L ≈ {rounded:,.0f}", (length, 0.1), (4, 0), textcoords="offset points")
        draw_guide(axes, (4096, 14000), 1, slope=1)
        draw_guide(axes, *guides[curve["dim"]], slope=2)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


def q1_memory_and_crossover() -> Figure:
    curves, methods = read("q1.json")["costs"], read("q1-bench.json")["methods"]
    figure, (memory, crossover) = new_figure(2, height=2.2)
    draw_forms(memory, curves[-1], "mib")
    set_ticks(memory.yaxis, [0.1, 1, 10, 100, 1000])
    memory.set(ylim=(0.07, 4000), ylabel="memory (MiB)")
    draw_guide(memory, (4096, 14000), 0.3, slope=1)
    draw_guide(memory, (900, 2000), 0.1, slope=2)
    handles, labels = memory.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))

    features = {(row["dim"], row["num_terms"]): row["features"] for row in methods}
    limits = (30, 6000)
    crossover.plot(limits, limits, color=GUIDE, linewidth=0.7, dashes=(5, 3))
    crossover.annotate("L = M", (700, 700), (6, -9), textcoords="offset points", color="#6e6e6e")
    three, more = ([m for m in methods if (m["num_terms"] == 3) == wanted] for wanted in (True, False))
    for rows, mark, label in ((three, "o", "against all pairs, K = 3"), (more, "^", "against all pairs, K = 4 to 6")):
        places = [[row[name] for row in rows] for name in ("features", "measured")]
        crossover.plot(*places, mark, color=COLOURS[2], label=label)
    crossing = [c for c in curves if c["crossover"]]
    places = [features[c["dim"], c["num_terms"]] for c in crossing], [c["crossover"] for c in crossing]
    crossover.plot(*places, "ks", mfc="none", markersize=5.5, label="against fused softmax, K = 3")
    for axis in (crossover.xaxis, crossover.yaxis):
        set_ticks(axis, [100, 1000])
    crossover.set(xlim=limits, ylim=limits, xlabel="features M", ylabel="crossover length (tokens)")
    crossover.legend(loc="lower right", borderaxespad=0.2)
    return figure


def q1_error() -> Figure:
    errors = read("q1.json")["errors"]
    stds = [point["score_std"] for point in errors["points"]]
    figure, (measured, bound) = new_figure(2, height=2.15)
    colours = dict(zip(errors["points"][0]["terms"], COLOURS, strict=False))
    for terms, colour in colours.items():
        outcomes = [(d, p["terms"][terms]) for d, p in zip(stds, errors["points"], strict=True)]
        means = [(d, 100 * o["error"]["mean"]) for d, o in outcomes if o["error"]]
        signed = [(d, 100 * o["error"]["mean"]) for d, o in outcomes if o["error"] and o["runs_with_negative_weights"]]
        bounds = [(d, 100 * o["bound"]) for d, o in outcomes if o["bound"]]
        measured.plot(*zip(*means, strict=True), "o-", color=colour, label=f"K = {terms}")
        if signed:
            measured.plot(*zip(*signed, strict=True), "o", color=colour, mfc="white")
        bound.plot(*zip(*bounds, strict=True), "o-", color=colour)
    means_of_v = [100 * point["mean_of_v"]["mean"] for point in errors["points"]]
    measured.plot(stds, means_of_v, color="#000000", linestyle="--", label="mean of V")
    for axes in (measured, bound):
        set_ticks(axes.xaxis, [0.0625, 0.25, 1, 4])
        set_ticks(axes.yaxis, [0.0001, 0.01, 1, 100])
        axes.set(ylim=(1e-5, 1e4), xlabel="standard deviation of the scores")
    measured.set_ylabel("relative error of Z (%)")
    bound.set_ylabel("bound on this error (%)")
    figure.legend(*measured.get_legend_handles_labels(), loc="outside upper center", ncols=len(colours) + 1)
    return figure


# ---------------------------------------------------------------------------------------------------
# Question 2

PHANTOMS, SUBSET, SUBSET_LONGER = "phantom-homework", "real-subset-homework", "real-subset-homework-100-epochs"
NETWORKS = {"maxpool": ("max-pool", "-", "o"), "no_maxpool": ("no max-pool", "--", "s")}  # label, line, marker
CLASSES = ("CNV", "DME", "drusen", "normal")
POOLING = "q2/pooling-phantom.json"


def grid_runs(folder: str, network: str = "maxpool", rate: float | None = None) -> list[dict]:
    """The records of a grid's setting, one per seed; without `rate` those of the rate chosen."""
    grid = read(f"q2/{folder}/grid.json")
    wanted = network, grid["chosen_rate"] if rate is None else rate
    row = next(row for row in grid["settings"] if (row["network"], row["learning_rate"]) == wanted)
    return [read(f"q2/{folder}/{path}") for path in row["runs"]]


def draw_seeds(axes, x, curves, deviation: bool = False, **style) -> None:
    """The mean of the seeds' curves as a line, their range as a band, or one deviation to either side."""
    curves = np.array(curves)
    mean, low, high = curves.mean(axis=0), curves.min(axis=0), curves.max(axis=0)
    if deviation:
        std = curves.std(axis=0, ddof=1) if len(curves) > 1 else 0
        low, high = mean - std, mean + std
    axes.plot(x, mean, **style)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def draw_histories(axes, runs: list[dict], name: str, x=None, **style) -> None:
    """A quantity of the histories against the epoch, or against other places `x` of the epochs' ends."""
    epochs = [epoch["epoch"] for epoch in runs[0]["history"]]
    draw_seeds(axes, epochs if x is None else x, [[e[name] for e in run["history"]] for run in runs], **style)


def share_axis(axes, label: str, low: float = 0, high: float = 1) -> None:
    """A vertical axis of shares, in per cent."""
    axes.set(ylim=(low, high), ylabel=label)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))


def loss_axis(axes) -> None:
    axes.set(ylim=(0, 1.4), yticks=np.arange(0, 1.5, 0.2), ylabel="training loss (nats)")


def epoch_axis(axes) -> None:
    axes.set(xlim=(0.5, 15.5), xticks=(1, 5, 10, 15), xlabel="epoch")


def q2_phantoms() -> Figure:
    phantoms = oct_phantoms(0, 0)  # the test split alone: it does not depend on the sizes of the others
    labels = phantoms["test_labels"].ravel()
    figure, panels = new_figure(8, height=0.95)
    for i, axes in enumerate(panels):
        label, number = divmod(i, 2)
        image = phantoms["test_images"][np.flatnonzero(labels == label)[number]]
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="none")
        axes.set_axis_off()
        axes.set_title(CLASSES[label])
    return figure


def q2_rates() -> Figure:
    grid = read(f"q2/{PHANTOMS}/grid.json")
    steps = math.ceil(sum(grid["dataset"]["counts"]["train"]) / grid["config"]["batch_size"])
    figure, (loss, accuracy, flow) = new_figure(3, height=2.0)
    for rate, colour in zip((0.1, 0.01, 0.001), COLOURS, strict=False):
        runs, style = grid_runs(PHANTOMS, rate=rate), {"color": colour, "label": f"rate {rate:g}"}
        draw_histories(loss, runs, "train_loss", **style)
        draw_histories(accuracy, runs, "val_accuracy", **style)
        ends = rate * steps * np.arange(1, grid["config"]["epochs"] + 1)
        draw_histories(flow, runs, "train_loss", x=ends, **style)
    for axes in (loss, flow):
        loss_axis(axes)
    share_axis(accuracy, "validation accuracy (%)", low=0.4)
    for axes in (loss, accuracy):
        epoch_axis(axes)
    set_ticks(flow.xaxis, [1, 10, 100, 1000])
    flow.set(xlabel="time of the flow, rate × steps")
    figure.legend(*loss.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def q2_networks() -> Figure:
    figure, (loss, accuracy, test) = new_figure(3, height=2.2)
    studies = {"phantoms\n15": PHANTOMS, "real\n15": SUBSET, "real\n100": SUBSET_LONGER}
    for (network, (label, line, marker)), colour in zip(NETWORKS.items(), COLOURS, strict=False):
        runs, style = grid_runs(PHANTOMS, network), {"color": colour, "label": label, "linestyle": line}
        draw_histories(loss, runs, "train_loss", **style)
        draw_histories(accuracy, runs, "val_accuracy", **style)
        offset = -0.12 if network == "maxpool" else 0.12
        for place, folder in enumerate(studies.values()):
            scores = [run["test"]["balanced_accuracy"] for run in grid_runs(folder, network)]
            test.plot([place + offset] * len(scores), scores, marker, color=colour, mfc="none")
    loss_axis(loss)
    share_axis(accuracy, "validation accuracy (%)", low=0.4)
    for axes in (loss, accuracy):
        epoch_axis(axes)
    share_axis(test, "balanced test accuracy (%)")
    test.axhline(1 / 4, color=GUIDE, linewidth=0.7, dashes=(5, 3))
    test.annotate("chance", (2.4, 1 / 4), (0, -3), textcoords="offset points", ha="right", va="top", color="#6e6e6e")
    test.set(xlim=(-0.4, 2.4), xlabel="data, epochs")
    test.set_xticks(range(len(studies)), studies)
    figure.legend(*loss.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def q2_confusion() -> Figure:
    """Row percentages over the test predictions of all seeds."""
    tests = {
        "phantoms, max-pool": [run["test"] for run in grid_runs(PHANTOMS)],
        "phantoms, no max-pool": [run["test"] for run in grid_runs(PHANTOMS, "no_maxpool")],
        "real, 100 epochs": [run["test"] for run in grid_runs(SUBSET_LONGER)],
        "phantoms to real": read("q2/phantom-to-real-homework-lr0.1.json")["test"]["runs"],
    }
    figure, panels = new_figure(len(tests), height=2.1)
    for axes, (title, runs) in zip(panels, tests.items(), strict=True):
        counts = np.sum([run["confusion"] for run in runs], axis=0)
        shares = counts / counts.sum(axis=1, keepdims=True)
        axes.grid(False)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), share in np.ndenumerate(shares):
            colour = "white" if share > 0.5 else "black"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour)
        axes.set_xticks(range(len(CLASSES)), CLASSES, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(CLASSES)), CLASSES if axes is panels[0] else [])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set(title=title, xlabel="predicted class")
    panels[0].set_ylabel("true class")
    return figure


def q2_pooling() -> Figure:
    networks = read(POOLING)["networks"]
    parts = {"train": "training", "val": "validation", "test": "test"}
    shifts = {"1": "1 px", "2_odd": "2 px,\nodd", "2_even": "2 px,\neven"}
    figure, (loss, fit, changed) = new_figure(3, height=2.2)
    styles = {"max": (COLOURS[0], "-", "o"), "mean": (COLOURS[2], ":", "^"), "stride": (COLOURS[1], "--", "s")}
    for offset, (pool, (colour, line, marker)) in zip((-0.2, 0, 0.2), styles.items(), strict=True):
        runs = networks[pool]["runs"]
        epochs, curves = runs[0]["history"]["epoch"], [run["history"]["train_loss"] for run in runs]
        draw_seeds(loss, epochs, curves, color=colour, linestyle=line, label=pool)
        for run, aside in zip(runs, np.linspace(-0.06, 0.06, len(runs)), strict=True):  # seeds side by side
            scores = [run["measures"][part]["balanced_accuracy"] for part in parts]
            changes = [run["measures"]["shifts"][shift]["changed"] for shift in shifts]
            for axes, values in ((fit, scores), (changed, changes)):
                axes.plot(np.arange(3) + offset + aside, values, marker, color=colour, mfc="none")
    loss_axis(loss)
    epoch_axis(loss)
    share_axis(fit, "balanced accuracy (%)")
    fit.set_xticks(range(3), parts.values())
    share_axis(changed, "predictions changed (%)", high=0.4)
    changed.set(xlabel="shift of the scan")
    changed.set_xticks(range(3), shifts.values())
    figure.legend(*loss.get_legend_handles_labels(), loc="outside upper center", ncols=len(styles))
    return figure


# ---------------------------------------------------------------------------------------------------
# Question 3

DECODERS = {"lstm": ("LSTM", COLOURS[0]), "transformer": ("transformer", COLOURS[1])}


def speech_runs(decoder: str) -> list[tuple[str, dict]]:
    """File names and records of the runs on the spoken corpus with the preset `improved`, one per seed."""
    names = sorted(path.name for path in (ROOT / "results" / "q3").glob("spoken-*.json"))
    runs = [(name, read(f"q3/{name}")) for name in names]
    wanted = {"preset": "improved", "decoder": decoder}
    return [(n, r) for n, r in runs if wanted.items() <= r["config"].items() and not r["changes"]]


def q3_curves() -> Figure:
    figure, (loss, similarity) = new_figure(2, height=1.9)
    similarities = {"cosine": (":", "cosine"), "jaccard": ("--", "Jaccard")}
    similarities["damerau_levenshtein"] = ("-", "Damerau-Levenshtein")
    for decoder, (name, colour) in DECODERS.items():
        histories = [record["history"] for _, record in speech_runs(decoder)]
        epochs = [entry["epoch"] for entry in histories[0]]

        def values(split, key, histories=histories):
            return np.array([[entry[split][key] for entry in history] for history in histories])

        draw = partial(draw_seeds, x=epochs, deviation=True, color=colour)
        draw(loss, curves=values("train", "loss"), linestyle="--", label=f"{name}, training")
        draw(loss, curves=values("val", "loss"), label=f"{name}, validation")
        for key, (line, label) in similarities.items():
            draw(similarity, curves=values("val", key), linestyle=line, label=f"{name}, {label}")
    loss.set(xlabel="epoch", ylabel="cross-entropy per token (nats)")
    similarity.set(xlabel="epoch", ylabel="similarity, validation split", ylim=(0, 1.02))
    for axes in (loss, similarity):
        axes.set_xticks(epochs)
        axes.legend()
    return figure


def q3_alignments() -> Figure:
    figure, panels = new_figure(2, height=1.9)
    for axes, (decoder, (name, _)) in zip(panels, DECODERS.items(), strict=True):
        looked = read(f"q3/details/{speech_runs(decoder)[0][0]}")["cross_attention"]
        weights = np.array(looked["weights"])
        extent = (0, weights.shape[1] * looked["seconds_per_position"], len(weights), 0)
        axes.imshow(weights, aspect="auto", cmap="Greys", vmin=0, extent=extent, interpolation="nearest")
        heard = looked["heard_by_ctc"] or []
        axes.plot(heard, np.arange(len(heard)) + 0.5, ".", color=COLOURS[1], markersize=3.5)
        words = list(re.finditer(r"\S+", looked["written"]))
        middles = [(word.start() + word.end()) / 2 for word in words]
        axes.set_yticks([*middles, len(weights) - 0.5], [*(word.group() for word in words), "(stop)"], fontsize=7.5)
        for word in words[1:]:
            axes.axhline(word.start() - 0.5, color="#dddddd", linewidth=0.6)  # through the row of the space
        axes.tick_params(axis="y", length=0)
        axes.set(title=name, xlabel="time (s)", ylabel="written, character by character")
        axes.grid(False)
    return figure


def q3_length() -> Figure:
    improved = [group for group in read("q3/analysis.json")["groups"] if group["preset"] == "improved"]
    small = next(g["splits"] for g in improved if g["dataset"]["name"] == "spoken corpus" and not g["changes"])
    shown = {"test": small["test"], "new words": small["test_new_words"]}
    figure, panels = new_figure(len(shown), height=1.5)
    for axes, (title, decoders) in zip(panels, shown.items(), strict=True):
        for decoder, (name, colour) in DECODERS.items():
            bins = decoders[decoder]["by_length"]
            characters = [b["characters"]["mean"] for b in bins]
            rates, deviations = ([100 * (b["cer"][key] or 0) for b in bins] for key in ("mean", "std"))
            axes.errorbar(characters, rates, deviations, marker="o", capsize=2, color=colour, label=name)
        axes.set(title=title, xlabel="characters of the sentence")
        axes.margins(y=0.1)
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("character error rate (%)")
    panels[0].legend()
    return figure


FIGURES = {
    "q1-time": q1_time,
    "q1-memory-and-crossover": q1_memory_and_crossover,
    "q1-error": q1_error,
    "q2-phantoms": q2_phantoms,
    "q2-rates": q2_rates,
    "q2-networks": q2_networks,
    "q2-confusion": q2_confusion,
    "q3-curves": q3_curves,
    "q3-alignments": q3_alignments,
    "q3-length": q3_length,
}  # name of the file -> the function that draws it, in the report's order
if (ROOT / "results" / POOLING).exists():
    FIGURES["q2-pooling"] = q2_pooling


def draw_all() -> None:
    # Formulas on the axes would need mathtext for their minus; these axes have none.
    warnings.filterwarnings("ignore", message="cmr10 font should ideally be used with mathtext")
    with matplotlib.rc_context(STYLE):
        for name, make in FIGURES.items():
            save(make(), name)


if __name__ == "__main__":
    draw_all()
