"""Draw the pictures of README.md that no question draws itself, from the records under results/.

python report/pictures.py          report/figures/overview and report/figures/q3/curves, PNG and SVG
"""

import numpy as np
from readme import DECODERS, Q2_COMPARED, RESULT, ROOT, SPEECH, NotRecorded, q2_balanced, q3_pairs, read

import asr
import utils  # found because readme.py puts ROOT on the path

FIGURES = ROOT / "report" / "figures"


def draw_q1(axes) -> str:
    """Time against the length, by the ways to compute attention. Like the others, returns what it was measured on."""
    record = read("q1.json")
    curve = record["costs"][-1]
    for name, colour in (("softmax, fused", "#000000"), ("Taylor, naive features", "#e69f00"), ("Taylor", "#0072b2")):
        points = [(point["length"], point["ms"][name]) for point in curve["points"] if name in point["ms"]]
        axes.plot(*zip(*points, strict=True), "o-", markersize=3.5, color=colour, label=name)
    length, ms = curve["points"][-1]["length"], curve["points"][-1]["ms"]
    gain = f"{ms['softmax, fused'] / ms['Taylor']:.1f}× faster\nthan softmax"
    axes.annotate(
        gain, (length, ms["Taylor"]), (0, -48), textcoords="offset points", color=colour, ha="right", weight="bold"
    )
    axes.set(xscale="log", yscale="log", xlabel="length (tokens)", ylabel="forward pass (ms)", ylim=(0.1, 2e4))
    ticks = [256, 1024, 4096, 16384]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(loc="upper left", fontsize=9)
    return f"computed: random numbers, D = {curve['dim']}, {record['device'].upper()}"


def draw_q2(axes) -> str:
    """Balanced accuracy of both recipes, by what they were tested on."""
    places = np.arange(len(Q2_COMPARED))
    recipes = ("homework's recipe", utils.COLOURS[4]), ("strong recipe", utils.COLOURS[2])
    for i, (recipe, colour) in enumerate(recipes):
        scores = [q2_balanced(paths[i]) for paths in Q2_COMPARED.values()]
        means, deviations = ([score[key] for score in scores] for key in ("mean", "std"))
        bars = axes.bar(places + 0.4 * i - 0.2, means, 0.36, yerr=deviations, label=recipe, color=colour)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=9)
    axes.axhline(0.25, color="#555555", linestyle=":", label="chance")
    axes.set_xticks(places, [data.replace(", ", ",\n").replace("on ", "on\n") for data in Q2_COMPARED])
    axes.set_yticks(np.arange(0, 1.1, 0.2))
    axes.set(ylabel="balanced test accuracy", ylim=(0, 1.38))
    axes.grid(False, axis="x")
    axes.legend(loc="upper right", fontsize=9)
    return "phantoms, and a real subset of scans"


def draw_q3(axes) -> str:
    """Validation similarity over the epochs: mean over the seeds, and their range."""
    pairs = [rows for rows in q3_pairs(RESULT).values() if rows[0]["preset"].startswith("improved")]
    colours = dict(zip(DECODERS, utils.COLOURS, strict=False))
    for rows, line in zip(pairs, ("-", "--", ":"), strict=False):
        for row in rows:
            histories = [read(f"q3/{file}")["history"] for file in row["files"]]
            curves = np.array([[epoch["val"]["damerau_levenshtein"] for epoch in history] for history in histories])
            epochs, colour = np.arange(1, curves.shape[1] + 1), colours[row["decoder"]]
            label = DECODERS[row["decoder"]] if rows is pairs[0] else None
            axes.plot(epochs, curves.mean(0), line, color=colour, label=label)
            axes.fill_between(epochs, curves.min(0), curves.max(0), color=colour, alpha=0.2, linewidth=0)
        if len(pairs) > 1:
            axes.plot([], [], line, color="#555555", label=rows[0]["dataset"].removesuffix(", spoken"))
    axes.set(xlabel="epoch (mean and range of the seeds)", ylabel="Damerau-Levenshtein, validation", ylim=(0, 1.02))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="lower right", fontsize=9)
    if len(pairs) == 1:
        return pairs[0][0]["data"]
    return " and ".join(dict.fromkeys(SPEECH[row["kind"]] for rows in pairs for row in rows))


def draw_overview() -> None:
    """The picture of the first screen: a panel a question."""
    figure, panels = utils.new_figure(1, 3, size=(3.3, 3.4))
    titles = "1  Attention in linear time", "2  Retinal scans", "3  Speech recognition"
    for axes, title, draw in zip(panels, titles, (draw_q1, draw_q2, draw_q3), strict=True):
        try:
            data = draw(axes)
        except NotRecorded:
            data = "not recorded yet"
        axes.set_title(title, pad=20)
        axes.annotate(data, (0, 1), (0, 7), xycoords="axes fraction", textcoords="offset points", fontsize=9)
    utils.save_figure(figure, FIGURES / "overview")


def draw_curves() -> None:
    """Loss and similarities over the epochs of the first seed, as in the notebook."""
    (data, preset), rows = next(iter(q3_pairs(RESULT).items()))
    histories = {DECODERS[row["decoder"]]: read(f"q3/{row['files'][0]}")["history"] for row in rows}
    utils.save_figure(asr.plot_speech_curves(histories, f"{data}, {preset}"), FIGURES / "q3" / "curves")


if __name__ == "__main__":
    draw_overview()
    draw_curves()
