"""Fill the generated parts of README.md from the records under results/.

python report/readme.py            rewrite README.md
python report/readme.py --check    exit status 1 if README.md is not what the records say
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"

Q2_GRIDS = {  # folder under results/q2 -> what the README calls it
    "phantom-homework": ("phantoms", "homework"),
    "phantom-strong": ("phantoms", "strong"),
    "real-subset-homework": ("real subset", "homework"),
    "real-subset-homework-100-epochs": ("real subset", "homework, 100 epochs"),
    "real-subset-strong-100-epochs": ("real subset", "strong, 100 epochs"),
}


def read(path: str) -> dict:
    return json.loads((RESULTS / path).read_text())


def mean(value: dict) -> str:
    return f"{value['mean']:.3f} ± {value['std']:.3f}"


def link(text: str, path: str) -> str:
    return f"[{text}](results/{path})"


def q2_runs() -> str:
    """One row a network at its chosen rate: mean ± deviation over the seeds."""
    lines = [
        "| trained and tested on | recipe | network | rate | val accuracy | test accuracy | balanced | AUC | record |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for folder, (data, recipe) in Q2_GRIDS.items():
        grid = read(f"q2/{folder}/grid.json")
        for row in grid["settings"]:
            if row["learning_rate"] == grid["chosen_rate"]:
                network = "no max-pool" if row["network"] == "no_maxpool" else "max-pool"
                names = ("val_accuracy", "test_accuracy", "test_balanced_accuracy", "test_macro_auc")
                cells = [data, recipe, network, f"{row['learning_rate']:g}", *(mean(row[name]) for name in names)]
                lines.append(f"| {' | '.join(cells)} | {link('grid', f'q2/{folder}/grid.json')} |")
    return "\n".join(lines)


Q2_TRANSFERS = {  # record under results/q2 -> what the README calls it
    "phantom-to-real-homework": "homework, default rate 0.01",
    "phantom-to-real-homework-lr0.1": "homework, rate 0.1 (chosen above)",
    "phantom-to-real-strong": "strong, default rate 0.003",
}


def q2_transfer() -> str:
    """Networks that saw phantoms only, on real scans: mean ± deviation over the seeds."""
    lines = [
        "| trained on phantoms only, max-pool | tested on real scans | accuracy | balanced | AUC | record |",
        "|---|---|---|---|---|---|",
    ]
    for name, recipe in Q2_TRANSFERS.items():
        record = read(f"q2/{name}.json")
        for part, called in (("all", "all"), ("test", "test split")):
            scores = record[part]
            scans = f"{called}, {scores['runs'][0]['num_examples']:,}"
            cells = [recipe, scans, *(mean(scores[m]) for m in ("accuracy", "balanced_accuracy", "macro_auc"))]
            lines.append(f"| {' | '.join(cells)} | {link('scores', f'q2/{name}.json')} |")
    return "\n".join(lines)


def q2_counts() -> str:
    """What each data set holds, class by class."""
    lines = ["| data | split | CNV | DME | drusen | normal |", "|---|---|---|---|---|---|"]
    for name, folder in (("phantoms", "phantom-homework"), ("real subset", "real-subset-homework")):
        for split, counts in read(f"q2/{folder}/grid.json")["dataset"]["counts"].items():
            lines.append(f"| {name} | {split} | " + " | ".join(f"{count:,}" for count in counts) + " |")
    return "\n".join(lines)


def q2_speed() -> str:
    bench, grids = read("q2/bench.json"), [read(f"q2/{folder}/grid.json") for folder in Q2_GRIDS]
    steps = bench["steps_per_second"]
    default = next(row for row in grids[0]["settings"] if row["learning_rate"] == 0.01)
    minutes = {folder: grid["wall_seconds"] / 60 for folder, grid in zip(Q2_GRIDS, grids, strict=True)}
    return (
        f"Our loop makes {bench['ratio_wall']:.2f} times the steps of the course's loop (medians of {bench['rounds']} "
        f"interleaved rounds on one thread: {steps['ours']:.0f} against {steps['plain']:.0f} steps a second, with "
        f"parameters bit-identical) and holds the scans in {bench['data_memory_ratio']:.2f} of the memory "
        f"({link('record', 'q2/bench.json')}). On the two cores where the records were made, without a GPU, a default "
        f"training on phantoms took {default['seconds']['mean'] / 60:.1f} minutes with one core to itself, "
        f"`make q2-grid` on phantoms {minutes['phantom-homework']:.0f} minutes, and the five grids of "
        f"`make q2-records` {sum(minutes.values()):.0f} minutes."
    )


def q1_speed() -> str:
    """Time as a share of fused softmax attention, and what the ways of a reader take."""
    bench = read("q1-bench.json")
    features = {row["dim"]: row["merged"] for row in read("q1.json")["features"] if row["num_terms"] == 3}
    lines = [
        "| D | M | Taylor, forward | Taylor, forward and backward | naive features | softmax by matmul |",
        "|---|---|---|---|---|---|",
    ]
    for dim, result in bench["forward"].items():
        backward = bench["backward"].get(dim)
        plain = bench["plain"][dim]["ratio"]
        shares = [result["ratio"]["Taylor"], plain["naive features"], plain["softmax by matmul"]]
        cells = [f"{share:.2g}" for share in shares]
        cells.insert(1, f"{backward['ratio']['Taylor']:.2g}" if backward else "")
        lines.append(f"| {dim} | {features[int(dim)]:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def q1_more() -> str:
    bench, record = read("q1-bench.json"), read("q1.json")
    bars = {bar["what"]: bar["value"] for bar in bench["bars"]}
    crossovers = {curve["dim"]: curve["crossover"] for curve in record["costs"]}
    memory = bench["memory_mib"]
    return (
        f"At D = 16 Taylor attention is faster than fused softmax from L = {crossovers[16]:,.0f} on, at D = 64 from "
        f"{crossovers[64]:,.0f} on ({link('curves', 'q1.json')}). Causal, at D = 64 and L = 8,192, it takes "
        f"{bars['time, causal, D = 64']:.2f} of the time of fused causal softmax. At L = 16,384 and D = 64 it needs "
        f"{memory['Taylor']:.0f} MiB beside its input, naive features {memory['naive features']:,.0f} MiB "
        f"({link('benchmark', 'q1-bench.json')}; medians of {bench['config']['rounds']} interleaved rounds on one "
        f"thread of a CPU). `make q1` takes {record['seconds'] / 60:.1f} minutes."
    )


def q1_errors() -> str:
    """Relative error of Z against the deviation of the scores."""
    errors = read("q1.json")["errors"]
    terms = list(errors["points"][0]["terms"])
    lines = [
        f"| deviation of the scores | mean of V | {' | '.join(f'K = {k}' for k in terms)} |",
        "|---" * (len(terms) + 2) + "|",
    ]
    for point in errors["points"]:
        if point["deviation"] in (0.125, 0.25, 0.5, 1.0, 2.0):
            outcomes = [point["terms"][k] for k in terms]
            cells = [
                f"{o['error']['mean']:.2g}{' *' if o['runs_with_negative_weights'] else ''}" if o["error"] else "none"
                for o in outcomes
            ]
            lines.append(f"| {point['deviation']:g} | {point['mean_of_v']['mean']:.2g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(value: dict, form: str = ".3f") -> str:
    """Mean ± deviation; a single value has no deviation."""
    return f"{value['mean']:{form}}" + ("" if value["std"] is None else f" ± {value['std']:{form}}")


def q3_rows(split: str = "test") -> list[dict]:
    sys.path.insert(0, str(ROOT))
    from utils import summarise_speech_runs  # here: it brings PyTorch along

    rows = summarise_speech_runs(RESULTS / "q3", split)
    return sorted(rows, key=lambda row: (row["kind"] == "real", row["preset"] == "homework", len(row["dataset"])))


def q3_runs() -> str:
    """One row a decoder, preset and corpus: mean ± deviation over the seeds, on the test split."""
    columns = ("Jaccard", "cosine", "Damerau-Levenshtein", "CER", "minutes")
    lines = [
        f"| trained and tested on | preset | decoder | clips | {' | '.join(columns)} | records |",
        "|---" * (len(columns) + 5) + "|",
    ]
    for row in q3_rows():
        scores = row["scores"]
        cells = [f"{row['dataset']} ({row['kind']})", row["preset"], row["decoder"], f"{row['clips']:,}"]
        cells += [spread(scores[key]) for key in ("jaccard", "cosine", "damerau_levenshtein")]
        cells += [spread(scores["cer"], ".1%"), f"{row['minutes']['mean']:.1f}"]
        links = " ".join(
            link(f"seed {seed}", f"q3/{file}") for seed, file in zip(row["seeds"], row["files"], strict=True)
        )
        lines.append(f"| {' | '.join(cells)} | {links} |")
    return "\n".join(lines)


def q3_more() -> str:
    """Words that never occur in training, and what the benchmark measured."""
    new = {
        row["decoder"]: row["scores"]
        for row in q3_rows("test_new_words")
        if row["preset"] == "improved" and not row["changes"]
    }
    lstm, transformer = (spread(new[name]["damerau_levenshtein"]) for name in ("lstm", "transformer"))
    bench = read("q3/bench.json")
    times = {bar["what"]: f"{bar['value']:.0f}" for bar in bench["bars"]}
    trained, decoded = (bench["dataset"][part]["name"] for part in ("training", "decoding"))
    return (
        f"On the second test split, whose sentences each hold a word never heard in training, the LSTM reaches a "
        f"Damerau-Levenshtein similarity of {lstm}, the transformer {transformer}. One core trains on "
        f"{times['training, LSTM']} (LSTM) and {times['training, transformer']} (transformer) times as many seconds of "
        f"speech as the course's way, which pads every clip to 20 seconds. Greedy decoding takes "
        f"1/{times['decoding, LSTM']} and 1/{times['decoding, transformer']} of the time of the course's way and gives "
        f"the same texts ({link('benchmark', 'q3/bench.json')}: training on {trained}, decoding on the {decoded})."
    )


PARTS = {"q1-speed": q1_speed, "q1-more": q1_more, "q1-errors": q1_errors}
PARTS |= {"q2-runs": q2_runs, "q2-transfer": q2_transfer, "q2-counts": q2_counts, "q2-speed": q2_speed}
PARTS |= {"q3-runs": q3_runs, "q3-more": q3_more}


def draw_q3() -> None:
    """Loss and similarity over the epochs of the first seed, as in the notebook."""
    from utils import plot_speech_curves, save_figure

    rows = [row for row in q3_rows() if row["preset"] == "improved" and not row["changes"] and row["kind"] == "spoken"]
    records = {row["decoder"]: read(f"q3/{row['files'][0]}") for row in rows}
    names = {"lstm": "LSTM", "transformer": "transformer"}
    histories = {names[decoder]: records[decoder]["history"] for decoder in sorted(records)}
    title = f"{rows[0]['dataset']} ({rows[0]['kind']}), improved"
    save_figure(plot_speech_curves(histories, title), ROOT / "report" / "figures" / "q3" / "curves")


def fill(text: str) -> str:
    """Replace what stands between <!-- begin NAME --> and <!-- end NAME --> for each part."""
    for name, make in PARTS.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        text, found = pattern.subn(lambda _, b=begin, e=end, m=make: f"{b}\n{m()}\n{e}", text)
        if found != 1:
            raise SystemExit(f"README.md: the part {name} stands there {found} times, not once")
    return text


def main() -> int:
    path = ROOT / "README.md"
    old = path.read_text()
    new = fill(old)
    if "--check" in sys.argv[1:]:
        if new != old:
            print("README.md is not what the records say: run `make readme`", file=sys.stderr)
        return int(new != old)
    path.write_text(new)
    draw_q3()
    return 0


if __name__ == "__main__":
    sys.exit(main())
