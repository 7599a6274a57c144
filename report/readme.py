"""Fill the generated parts of README.md from the records under results/.

python report/readme.py            rewrite README.md
python report/readme.py --check    exit status 1 if README.md is not what the records say

A generated part stands between <!-- begin NAME --> and <!-- end NAME -->; PARTS names the function that fills it.
A part whose record is missing says so.
"""

import json
import re
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
sys.path[:0] = str(ROOT), str(ROOT / "benchmarks")

from asr import summarise_speech_runs
from offline_data import OCTMNIST_CLASS_COUNTS
from runs import Parser


class NotRecorded(Exception):
    """A record that does not exist (yet); the message names it."""


@cache
def read(path: str) -> dict:
    try:
        return json.loads((RESULTS / path).read_text())
    except FileNotFoundError:
        raise NotRecorded(f"results/{path}") from None


def link(text: str, path: str) -> str:
    return f"[{text}](results/{path})"


def spread(value: dict, form: str = ".3f") -> str:
    """Mean ± deviation; a single value has no deviation."""
    return f"{value['mean']:{form}}" + ("" if value["std"] is None else f" ± {value['std']:{form}}")


def duration(seconds: float) -> str:
    if seconds > 5400:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.{1 if seconds < 570 else 0}f} minutes"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------
# Question 1


def q1_results() -> list[list[str]]:
    shares = {dim: result["ratio"]["Taylor"] for dim, result in read("q1-bench.json")["forward"].items()}
    point = next(point for point in read("q1.json")["errors"]["points"] if point["score_std"] == 0.25)
    data = "random numbers (computed)"
    return [
        [
            "time of Taylor attention (three terms, L = 8,192) as a share of fused softmax attention's",
            data,
            ", ".join(f"{shares[dim]:.2g} for D = {dim}" for dim in ("16", "64")),
            link("benchmark", "q1-bench.json"),
        ],
        [
            f"relative error of its output (scores of standard deviation {point['score_std']})",
            data,
            spread(point["terms"]["3"]["error"]),
            link("record", "q1.json"),
        ],
    ]


def q1_cost() -> str:
    from bench_q1 import crossover_sentence  # only here: it brings PyTorch along

    record = read("q1.json")
    crossovers = "; ".join(crossover_sentence(curve) for curve in record["costs"])
    return (
        "**Time:** less than a minute on one CPU thread. **Expect** tables of feature counts, of errors with their "
        "proven bounds and of times, and a figure of both. Recorded here, interpolated between the lengths measured: "
        f"{crossovers} ({link('record', 'q1.json')})."
    )


def q1_speed() -> str:
    """Time as a share of fused softmax attention's, and what the ways of a reader take."""
    bench = read("q1-bench.json")
    features = {row["dim"]: row["merged"] for row in read("q1.json")["features"] if row["num_terms"] == 3}
    rows = []
    for dim, result in bench["forward"].items():
        backward, plain = bench["backward"].get(dim), bench["plain"][dim]["ratio"]
        shares = [result["ratio"]["Taylor"], plain["naive features"], plain["softmax by matmul"]]
        cells = [dim, f"{features[int(dim)]:,}", *(f"{share:.2g}" for share in shares)]
        cells.insert(3, f"{backward['ratio']['Taylor']:.2g}" if backward else "")
        rows.append(cells)
    head = ["D", "M", "Taylor, forward", "Taylor, forward and backward", "naive features", "softmax by matmul"]
    return table(head, rows)


def q1_errors() -> str:
    """Relative error of Z against the standard deviation of the scores."""
    points = [p for p in read("q1.json")["errors"]["points"] if p["score_std"] in (0.125, 0.25, 0.5, 1.0, 2.0)]
    rows = []
    for point in points:
        cells = [
            f"{o['error']['mean']:.2g}{' *' if o['runs_with_negative_weights'] else ''}" if o["error"] else "none"
            for o in point["terms"].values()
        ]
        rows.append([f"{point['score_std']:g}", f"{point['mean_of_v']['mean']:.2g}", *cells])
    return table(["standard deviation of the scores", "mean of V", *(f"K = {k}" for k in points[0]["terms"])], rows)


# ---------------------------------------------------------------------------------------------------
# Question 2

Q2_GRIDS = {  # folder under results/q2 -> what the README calls it
    "phantom-homework": ("phantoms", "homework"),
    "phantom-strong": ("phantoms", "strong"),
    "real-subset-homework": ("real subset", "homework"),
    "real-subset-homework-100-epochs": ("real subset", "homework, 100 epochs"),
    "real-subset-strong-100-epochs": ("real subset", "strong, 100 epochs"),
}
Q2_TRANSFERS = {  # record under results/q2 -> what the README calls it
    "phantom-to-real-homework": "homework, default rate 0.01",
    "phantom-to-real-homework-lr0.1": "homework, rate 0.1 (chosen above)",
    "phantom-to-real-strong": "strong, default rate 0.003",
}
Q2_POOLING = ("q2/pooling-phantom.json", "q2/pooling-kermany_subset.json")
Q2_COMPARED = {  # tested on, how trained -> the records of the homework's recipe and of the strong one
    "phantoms": ("phantom-homework/grid.json", "phantom-strong/grid.json"),
    "real subset, 100 epochs": (
        "real-subset-homework-100-epochs/grid.json",
        "real-subset-strong-100-epochs/grid.json",
    ),
    "real subset, trained on phantoms": ("phantom-to-real-homework-lr0.1.json", "phantom-to-real-strong.json"),
}


def q2_grid(folder: str) -> dict:
    return read(f"q2/{folder}/grid.json")


def q2_balanced(path: str) -> dict:
    """Balanced accuracy on the test split, mean and deviation: of a grid's chosen rate, or of trained networks."""
    record = read(f"q2/{path}")
    if "settings" not in record:
        return record["test"]["balanced_accuracy"]
    rows = (row for row in record["settings"] if row["network"] == "maxpool")
    return next(row["test_balanced_accuracy"] for row in rows if row["learning_rate"] == record["chosen_rate"])


def q2_default() -> dict:
    """The homework's own settings in the grid on phantoms."""
    return next(row for row in q2_grid("phantom-homework")["settings"] if row["learning_rate"] == 0.01)


def q2_results() -> list[list[str]]:
    rows = []
    for data, paths in Q2_COMPARED.items():
        homework, strong = (spread(q2_balanced(path)) for path in paths)
        links = f"{link('homework', f'q2/{paths[0]}')} {link('strong', f'q2/{paths[1]}')}"
        found = f"homework's recipe {homework}, strong one {strong}"
        rows.append(["balanced test accuracy", f"retinal scans ({data})", found, links])
    return rows


def q2_cost() -> str:
    grid, default = q2_grid("phantom-homework"), q2_default()
    seconds, share = default["seconds"]["mean"], sum(OCTMNIST_CLASS_COUNTS) / sum(grid["dataset"]["counts"]["train"])
    return (
        f"**Time:** {duration(seconds)} on phantoms, on one of two busy CPU cores; OCTMNIST has {share:.1f} times as "
        f"many training scans: about {duration(share * seconds)}, not measured. The whole question, `make q2-grid`, "
        f"takes {duration(q2_seconds(grid))} on phantoms, in {grid['jobs']} processes. **Expect** on phantoms a "
        f"validation accuracy of {spread(default['val_accuracy'])} and a test accuracy of "
        f"{spread(default['test_accuracy'])} at the default rate of {default['learning_rate']:g}; at "
        f"{grid['chosen_rate']:g}, which the grid chooses, the latter is "
        f"{spread(q2_balanced('phantom-homework/grid.json'))} ({link('record', 'q2/phantom-homework/grid.json')})."
    )


def q2_seconds(study: dict) -> float:
    """What a grid takes from start to end; one that was resumed, and pooling, know only what their runs took."""
    return study.get("wall_seconds") or study["seconds"] / study["jobs"]


def q2_runs() -> str:
    """One row a network at its chosen rate: mean ± deviation over the seeds."""
    rows = []
    for folder, (data, recipe) in Q2_GRIDS.items():
        grid = q2_grid(folder)
        for row in grid["settings"]:
            if row["learning_rate"] == grid["chosen_rate"]:
                network = "no max-pool" if row["network"] == "no_maxpool" else "max-pool"
                names = ("val_accuracy", "test_accuracy", "test_balanced_accuracy", "test_macro_auc")
                cells = [data, recipe, network, f"{row['learning_rate']:g}", *(spread(row[name]) for name in names)]
                rows.append([*cells, link("grid", f"q2/{folder}/grid.json")])
    head = ["trained and tested on", "recipe", "network", "rate"]
    return table([*head, "val accuracy", "test accuracy", "balanced", "AUC", "record"], rows)


def q2_transfer() -> str:
    """Networks that saw phantoms only, on real scans: mean ± deviation over the seeds."""
    rows = []
    for name, recipe in Q2_TRANSFERS.items():
        for part, called in (("all", "all"), ("test", "test split")):
            scores = read(f"q2/{name}.json")[part]
            scans = f"{called}, {scores['runs'][0]['num_examples']:,}"
            cells = [spread(scores[metric]) for metric in ("accuracy", "balanced_accuracy", "macro_auc")]
            rows.append([recipe, scans, *cells, link("scores", f"q2/{name}.json")])
    head = ["trained on phantoms only, max-pool", "tested on the real subset"]
    return table([*head, "accuracy", "balanced", "AUC", "record"], rows)


def q2_counts() -> str:
    """What each data set holds, class by class."""
    rows = [
        [name, split, *(f"{count:,}" for count in counts)]
        for name, folder in (("phantoms", "phantom-homework"), ("real subset", "real-subset-homework"))
        for split, counts in q2_grid(folder)["dataset"]["counts"].items()
    ]
    return table(["scans", "split", "CNV", "DME", "drusen", "normal"], rows)


# ---------------------------------------------------------------------------------------------------
# Question 3

DECODERS = {"lstm": "LSTM", "transformer": "transformer"}
SPEECH = {"spoken": "synthetic speech", "real": "real speech"}
LJ_TEXTS = "LJ Speech texts, spoken"  # what offline_data calls them
RESULT, CHANGE, BY_HEART = "a result", "a changed setting", "clips learnt by heart"  # what a row can be


@cache
def q3_rows(split: str = "test") -> list[dict]:
    """Runs that differ in the seed alone as one row, in the tables' order, with the `role` of each.

    BY_HEART: scored on the clips it was trained on. CHANGE: an unchanged run on the same data is recorded too.
    """
    rows = summarise_speech_runs(RESULTS / "q3", split)
    unchanged = {(row["dataset"], row["preset"], row["decoder"]) for row in rows if not row["changes"]}
    for row in rows:
        changed = row["changes"] and (row["dataset"], row["preset"], row["decoder"]) in unchanged
        row["role"] = BY_HEART if row["by_heart"] else CHANGE if changed else RESULT
        row["data"] = f"{row['dataset']} ({SPEECH[row['kind']]})"
        if row["changes"]:
            row["preset"] += f" ({', '.join(f'{name} {value}' for name, value in row['changes'].items())})"
        seeds = zip(row["seeds"], row["files"], strict=True)
        row["links"] = " ".join(link(f"{seed}", f"q3/{file}") for seed, file in seeds)
    rows.sort(key=lambda row: (not row["preset"].startswith("improved"), row["preset"], row["decoder"]))
    return sorted(rows, key=lambda row: (row["kind"] == "real", row["clips"]))


def q3_pairs(*roles: str) -> dict[tuple, list[dict]]:
    """The decoders trained alike: rows of these roles by data and preset."""
    pairs = {}
    for row in q3_rows():
        if row["role"] in roles:
            pairs.setdefault((row["data"], row["preset"]), []).append(row)
    if not pairs:
        raise NotRecorded(f"question 3, {' or '.join(roles)}")
    return pairs


def q3_similarities(rows: list[dict]) -> str:
    return ", ".join(f"{DECODERS[row['decoder']]} {spread(row['scores']['damerau_levenshtein'])}" for row in rows)


def q3_links(rows: list[dict]) -> str:
    return ", ".join(f"{DECODERS[row['decoder']]} {row['links']}" for row in rows)


def q3_seconds(rows: list[dict]) -> float:
    """Training time of one seed, both decoders at once."""
    return max(60 * row["minutes"]["mean"] for row in rows)


def q3_results() -> list[list[str]]:
    return [
        [f"Damerau-Levenshtein similarity, preset {preset}", data, q3_similarities(rows), q3_links(rows)]
        for (data, preset), rows in q3_pairs(RESULT).items()
    ]


def q3_cost() -> str:
    (data, _), rows = next(iter(q3_pairs(RESULT).items()))
    epochs, bench = read(f"q3/{rows[0]['files'][0]}")["config"]["epochs"], read("q3/bench.json")["training"]
    run = read("q3/run.json")
    speed = min(bench[row["decoder"]]["speech_seconds_per_second"]["wall"]["ours"] for row in rows)
    whole = duration(epochs * 18 * 3600 / speed)  # 18 hours are LJ Speech's training split
    return (
        f"**Time:** {duration(run['seconds'])} on the {data} and two idle CPU cores, from making it to the page "
        f"({link('record', 'q3/run.json')}); {duration(max(run['training_seconds'].values()))} of them train, both "
        f"decoders at once. On LJ Speech {epochs} epochs would take about {whole} by "
        f"the speed of the {link('benchmark', 'q3/bench.json')}; that has not been run. **Expect** on the "
        f"{rows[0]['dataset']} a Damerau-Levenshtein similarity of {q3_similarities(rows)}."
    )


def q3_scope() -> str:
    """What is not recorded."""
    recorded = {row[key] for rows in q3_pairs(RESULT).values() for row in rows for key in ("dataset", "preset")}
    parts = {
        "homework": "the preset `homework`",
        LJ_TEXTS: "the texts of LJ Speech, spoken",
    }
    missing = [text for name, text in parts.items() if name not in recorded]
    scope = [] if "LJ Speech" in recorded else ["**Nothing here is a score on LJ Speech**, which is not recorded yet."]
    return " ".join(scope + ([f"Not recorded yet: {'; '.join(missing)}."] if missing else []))


def q3_table(role: str) -> str:
    """One row a decoder, preset and corpus: mean ± deviation over the seeds, on the test splits."""
    new_words = {row["links"]: spread(row["scores"]["damerau_levenshtein"]) for row in q3_rows("test_new_words")}
    rows = []
    for row in (row for pair in q3_pairs(role).values() for row in pair):
        scores = row["scores"]
        cells = [row["data"], row["preset"], DECODERS[row["decoder"]]]
        cells += [spread(scores[key]) for key in ("jaccard", "cosine", "damerau_levenshtein")]
        rows.append([*cells, new_words.get(row["links"], ""), spread(scores["cer"], ".1%"), row["links"]])
    head = ["data", "preset", "decoder", "Jaccard", "cosine", "Damerau-Levenshtein"]
    return table([*head, "the same, new words", "CER", "records by seed"], rows)


def q3_memorised() -> str:
    proofs = (
        f"trained on {rows[0]['clips']} clips of real speech and scored on the same clips, the similarity is "
        f"{q3_similarities(rows)} ({q3_links(rows)})"
        for rows in q3_pairs(BY_HEART).values()
    )
    return f"A proof that all parts work on a person's voice, and no result: {'; '.join(proofs)}."


def q3_counts() -> str:
    """What each corpus of the tables holds."""
    datasets = {data: read(f"q3/{rows[0]['files'][0]}")["dataset"] for (data, _), rows in q3_pairs(RESULT).items()}
    rows = [
        [data, split, f"{count:,}", f"{dataset['hours'][split]:.2f}"]
        for data, dataset in datasets.items()
        for split, count in dataset["counts"].items()
    ]
    return table(["speech", "split", "clips", "hours"], rows)


# ---------------------------------------------------------------------------------------------------
# All questions


def results() -> str:
    """The first screen's table."""
    rows = []
    for question, make in enumerate((q1_results, q2_results, q3_results), start=1):
        try:
            rows += [[f"{question}", *cells] for cells in make()]
        except NotRecorded:
            rows.append([f"{question}", "", "", "not recorded yet", ""])
    return table(["question", "measured", "data (kind)", "result", "records"], rows).replace(" ± ", "\u00a0±\u00a0")


def cost() -> str:
    record = read("q1.json")
    return (
        f"Recorded without a network and without a GPU, on {record['hardware']['cpus']} CPU cores: "
        f"{duration(record['seconds'])} for question 1, {duration(q2_default()['seconds']['mean'])} of training for "
        f"question 2, {duration(read('q3/run.json')['seconds'])} for the whole of question 3 "
        f"({record['hardware']['machine']}, Python {record['versions']['python']}, PyTorch "
        f"{record['versions']['torch'].split('+')[0]}). The installation comes on top."
    )


def benchmarks() -> str:
    """Our code against the plain way, in one process."""
    q1, q2, q3 = (read(path) for path in ("q1-bench.json", "q2/bench.json", "q3/bench.json"))
    bars, times = ({bar["what"]: bar["value"] for bar in bench["bars"]} for bench in (q1, q3))
    steps, memory = q2["steps_per_second"], q1["memory_mib"]
    trained, decoded = (q3["dataset"][part]["name"] for part in ("training", "decoding"))
    fastest = {decoder: q3["training"][decoder]["ratio_wall"]["course, at its fastest"] for decoder in q3["training"]}
    found = {
        "q1-bench.json": f"{bars['time, forward, D = 64']:.2f} of the time of fused softmax attention, causal "
        f"{bars['time, causal, D = 64']:.2f} (D = 64, L = 8,192). {memory['Taylor']:.0f} MiB beside the input, naive "
        f"features {memory['naive features']:,.0f} MiB (L = 16,384).",
        "q2/bench.json": f"{q2['ratio_wall']:.2f} times the steps of the course's loop ({steps['ours']:.0f} against "
        f"{steps['plain']:.0f} a second), to the bit the same. Scans in {q2['data_memory_ratio']:.2f} of the memory.",
        "q3/bench.json": f"Training: {times['training, LSTM']:.0f} (LSTM) and {times['training, transformer']:.0f} "
        f"(transformer) times the seconds of speech of the course's way ({trained}), "
        f"{fastest['lstm']:.0f} and {fastest['transformer']:.0f} times if that takes two clips a step and masks "
        f"nothing, its fastest. Greedy decoding: "
        f"1/{times['decoding, LSTM']:.0f} and 1/{times['decoding, transformer']:.0f} of its time ({decoded}).",
    }
    rounds = q1["config"]["rounds"], q2["rounds"], q3["config"]["rounds"]
    rows = [
        # Real speech lies elsewhere for everyone.
        [f"`{read(path)['command'].replace('../shared/data', 'path/to')}`", text, f"{number}", link("record", path)]
        for number, (path, text) in zip(rounds, found.items(), strict=True)
    ]
    return table(["command", "ours against the plain way, on one thread of a CPU", "rounds", "record"], rows)


def records() -> str:
    """The targets that make the records, in order, with what they take."""
    trained = {RESULT: 0.0, CHANGE: 0.0, BY_HEART: 0.0, LJ_TEXTS: 0.0}  # seconds
    for rows in q3_pairs(RESULT, CHANGE, BY_HEART).values():
        target = LJ_TEXTS if rows[0]["dataset"] == LJ_TEXTS else rows[0]["role"]
        trained[target] += q3_seconds(rows) * len(rows[0]["seeds"])
    studies = [f"q2/{folder}/grid.json" for folder in Q2_GRIDS] + [*Q2_POOLING]
    q2 = sum(q2_seconds(read(path)) for path in studies)
    targets = {
        "make q1-records": ("question 1", read("q1.json")["seconds"]),
        "make q2-records REAL=scans.npz": (
            "question 2: all grids, phantom networks on real scans, ways of pooling",
            q2,
        ),
        "make q3-records REAL_SPEECH=LJSpeech-1.1": (
            "question 3: three seeds, real clips learnt by heart, the preset homework",
            trained[RESULT] + trained[BY_HEART],
        ),
        "make q3-ablations": ("question 3: changed settings", trained[CHANGE]),
        "make q3-lj-text TEXTS=metadata.csv": ("question 3 on all texts of LJ Speech, spoken", trained[LJ_TEXTS]),
    }
    rows = []
    for name, (what, time) in targets.items():
        took = duration(time) if time else "not recorded yet"
        rows.append([f"`{name}`", what, took + (" of training" if time and "q3" in name else "")])
    return table(["command", "what it records", "time on two cores, as far as recorded, without benchmarks"], rows)


def devices() -> str:
    used = {json.loads(path.read_text()).get("device") for path in RESULTS.rglob("*.json")} - {None}
    made = f"The records were made on: {', '.join(sorted(used))}."
    if used == {"cpu"}:
        made = "**Nothing on this page was measured on a GPU:** every record names the CPU as its device."
    if (RESULTS / "gpu.json").exists():
        made += f" On a GPU ({link('record', 'gpu.json')}):\n\n{read('gpu.json')['table']}\n\n"
    difference = read("q3/run.json")["one_and_two"]["relative_difference"]
    return (
        f"{made} On a CPU, two processes that share every batch of question 3 have the training losses of one, but for "
        f"{difference:.0e} of them ({link('record', 'q3/run.json')})."
    )


PARTS = {"results": results, "cost": cost, "benchmarks": benchmarks, "records": records, "devices": devices}
PARTS |= {"q1-cost": q1_cost, "q1-speed": q1_speed, "q1-errors": q1_errors}
PARTS |= {"q2-cost": q2_cost, "q2-runs": q2_runs, "q2-transfer": q2_transfer, "q2-counts": q2_counts}
PARTS |= {"q3-cost": q3_cost, "q3-scope": q3_scope, "q3-memorised": q3_memorised, "q3-counts": q3_counts}
PARTS |= {"q3-runs": lambda: q3_table(RESULT), "q3-changes": lambda: q3_table(CHANGE)}


def fill(text: str) -> str:
    """Replace what stands between <!-- begin NAME --> and <!-- end NAME --> for each part."""
    for name, make in PARTS.items():
        try:
            part = make()
        except NotRecorded as missing:
            part = f"*Not recorded yet: {missing}.*"
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        text, found = pattern.subn(lambda _, new=f"{begin}\n{part}\n{end}": new, text)
        if found != 1:
            raise SystemExit(f"README.md: the part {name} stands there {found} times, not once")
    return text


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--check", action="store_true", help="exit status 1 if README.md is not what the records say")
    args = parser.parse_args()
    path = ROOT / "README.md"
    old = path.read_text()
    new = fill(old)
    if args.check:
        if new != old:
            print("README.md is not what the records say: run `make readme`", file=sys.stderr)
        return int(new != old)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
