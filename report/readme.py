"""Fill the generated parts of README.md and of results/README.md from the records under results/.

A generated part stands between <!-- begin NAME --> and <!-- end NAME -->; PAGES names the functions that fill it. Where
a record is missing, the part says so.
"""

import json
import re
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
sys.path.insert(0, str(ROOT))

from runs import Parser, spread, summarise_speech_runs


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


def duration(seconds: float) -> str:
    if seconds > 5400:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.{1 if seconds < 570 else 0}f} minutes"


def table(head: str, rows: Iterable[Iterable[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head.split(", "), *rows)]
    return "\n".join([lines[0], "|---" * (head.count(", ") + 1) + "|", *lines[1:]]).replace(" ± ", "\u00a0±\u00a0")


def from_first(value: float, firsts: dict, key: str, digits: int = 3) -> str:
    """The difference from the first value that came with the same key."""
    return f"{value - firsts[key]:+.{digits}f}" if key in firsts else firsts.update({key: value}) or "baseline"


# ---------------------------------------------------------------------------------------------------
# Question 1


def q1_error(score_std: float) -> float:
    points = read("q1.json")["errors"]["points"]
    return next(p for p in points if p["score_std"] == score_std)["terms"]["3"]["error"]["mean"]


def q1_result() -> list[str]:
    bench, error = read("q1-bench.json"), f"{q1_error(0.25):.1%}"
    narrow, wide = (1 / bench["forward"][dim]["ratio"]["Taylor"] for dim in ("16", "64"))
    result = (
        f"**{narrow:.0f} times as fast** as PyTorch's softmax attention on {bench['length']:,} tokens with heads of "
        f"width 16, {wide:.1f} times with width 64. It is exact only for small scores: {error} off where their "
        "standard deviation is 0.25"
    )
    return [result, "computed from random numbers", f"{link('time', 'q1-bench.json')}, {link('error', 'q1.json')}"]


def q1_expect() -> str:
    narrow, wide = (f"{curve['crossover']:,.0f} tokens with width {curve['dim']}" for curve in read("q1.json")["costs"])
    return (
        f"**Expect** features to overtake PyTorch's fused softmax at {narrow}, and at {wide} "
        f"({link('record', 'q1.json')}). The scores must be small: at a standard deviation of 2, three terms are off "
        f"by {q1_error(2):.0%}."
    )


def q1_time() -> str:
    bench, rows = read("q1-bench.json"), []
    features = {row["dim"]: row["merged"] for row in read("q1.json")["features"] if row["num_terms"] == 3}
    for dim, forward in bench["forward"].items():
        backward, plain = bench["backward"].get(dim, {"ratio": {}})["ratio"], bench["plain"][dim]["ratio"]
        ratios = forward["ratio"]["Taylor"], backward.get("Taylor"), plain["naive features"], plain["softmax by matmul"]
        rows.append([dim, f"{features[int(dim)]:,}", "1", *(f"{1 / ratio:.2g}" if ratio else "" for ratio in ratios)])
    head = "width D, features, fused softmax, Taylor, Taylor with backward, naive features, softmax by matmul"
    return table(head, rows)


def q1_errors() -> str:
    rows = []
    for point in read("q1.json")["errors"]["points"]:
        if point["score_std"] in (0.125, 0.25, 0.5, 1, 2):
            errors = point["terms"].values()
            cells = [f"{e['error']['mean']:.2g}{' *' * bool(e['runs_with_negative_weights'])}" for e in errors]
            rows.append([f"{point['score_std']:g}", f"{point['mean_of_v']['mean']:.2g}", *cells])
    return table("deviation of the scores, mean of V, 2 terms, 3 terms, 4 terms, 5 terms, 6 terms", rows)


# ---------------------------------------------------------------------------------------------------
# Question 2

GRIDS = {  # folder under results/q2 -> data and recipe; of each data set the baseline first
    "phantom-homework": ("phantoms", "homework"),
    "phantom-strong": ("phantoms", "strong"),
    "real-subset-homework": ("real subset", "homework"),
    "real-subset-homework-100-epochs": ("real subset", "homework, 100 epochs"),
    "real-subset-strong-100-epochs": ("real subset", "strong, 100 epochs"),
}
TRANSFERS = {  # record under results/q2 -> how its networks were trained on phantoms
    "phantom-to-real-homework": "homework, default rate 0.01",
    "phantom-to-real-homework-lr0.1": "homework, rate 0.1 (chosen above)",
    "phantom-to-real-strong": "strong, default rate 0.003",
}


def chosen(folder: str, network: str = "maxpool", rate: float | None = None) -> dict:
    """The row of a grid at a learning rate, by default the one that validation chose."""
    grid = read(f"q2/{folder}/grid.json")
    wanted = network, rate or grid["chosen_rate"]
    return next(row for row in grid["settings"] if (row["network"], row["learning_rate"]) == wanted)


def q2_result() -> list[str]:
    folders = "real-subset-homework-100-epochs", "real-subset-strong-100-epochs", "phantom-homework", "phantom-strong"
    shares = [f"{chosen(folder)['test_balanced_accuracy']['mean']:.0%}" for folder in folders]
    result = (
        f"**{shares[1]} of real scans right** with our strong recipe, {shares[0]} with the homework's, both after 100 "
        f"epochs. On phantoms: {shares[3]} and {shares[2]}. Means of the four classes; guessing gives 25%"
    )
    links = [
        link(f"{GRIDS[folder][0]}, {share}", f"q2/{folder}/grid.json")
        for folder, share in zip(folders, shares, strict=True)
    ]
    scans = sum(read(f"q2/{folders[0]}/grid.json")["dataset"]["counts"]["test"])
    return [result, f"{scans} real scans; phantoms", "; ".join(links)]


def q2_expect() -> str:
    default, best = chosen("phantom-homework", rate=0.01), chosen("phantom-homework")
    return (
        f"**Expect** {duration(default['seconds']['mean'])} on phantoms, and a test accuracy near "
        f"{default['test_accuracy']['mean']:.2f}. With `-learning_rate {best['learning_rate']:g}`, which the grid "
        f"chooses, it is near {best['test_accuracy']['mean']:.2f} ({link('record', 'q2/phantom-homework/grid.json')})."
    )


def q2_grids() -> str:
    rows, firsts = [], {}
    for folder, (data, recipe) in GRIDS.items():
        for network, called in (("maxpool", "max-pool"), ("no_maxpool", "no max-pool")):
            row = chosen(folder, network)
            scores = [spread(row[key], ".3f") for key in ("val_accuracy", "test_accuracy", "test_balanced_accuracy")]
            change = from_first(row["test_balanced_accuracy"]["mean"], firsts, data)
            about = [link(data, f"q2/{folder}/grid.json"), f"{recipe}, {called}", f"{row['learning_rate']:g}"]
            rows.append([*about, *scores, change, f"{row['test_macro_auc']['mean']:.3f}"])
    return table("data, recipe and network, rate, validation, test, balanced, difference, AUC", rows)


def q2_transfer() -> str:
    rows, firsts = [], {}
    for name, recipe in TRANSFERS.items():
        cells = [link(recipe, f"q2/{name}.json")]
        for part in ("test", "all"):
            score = read(f"q2/{name}.json")[part]["balanced_accuracy"]
            cells += [spread(score, ".3f"), from_first(score["mean"], firsts, part)]
        rows.append(cells)
    return table("recipe, test split, difference, all scans, difference", rows)


def q2_counts() -> str:
    rows = []
    for folder in "phantom-homework", "real-subset-homework":
        for split, counts in read(f"q2/{folder}/grid.json")["dataset"]["counts"].items():
            rows.append([GRIDS[folder][0], split, *(f"{count:,}" for count in counts)])
    return table("scans, split, CNV, DME, drusen, normal", rows)


# ---------------------------------------------------------------------------------------------------
# Question 3

DECODERS = {"lstm": "LSTM", "transformer": "transformer"}
SPEECH = {"spoken": "synthetic speech", "real": "real speech"}
SPLITS = "test", "test_new_words", "test_real"


def short_name(dataset: str) -> str:
    """The name of a dataset without what it was tested on besides."""
    return re.sub(r", tested on [^,]+", "", dataset)


@cache
def q3_groups() -> dict[str, list[dict]]:
    """The runs by what they were tested on, those that differ in the seed alone as one row; the baseline first.

    Synthetic speech comes first, then real speech, then what is no result: clips learnt by heart.
    """
    rows = [row | {"split": split} for split in SPLITS for row in summarise_speech_runs(RESULTS / "q3", split)]
    for row in rows:
        name, first = (short_name(row[key] or "") for key in ("dataset", "pretrained"))
        row["data"] = f"{first}, then {name}" if first else name
        row["adapted"] = bool(first) and row["kind"] == "real"
        row["real"] = not row["by_heart"] and (row["split"] == "test_real" or row["kind"] == "real")
        row["links"] = "\u00a0".join(link(f"{s}", f"q3/{f}") for s, f in zip(row["seeds"], row["files"], strict=True))
        tested = f"{SPEECH['real' if row['real'] else row['kind']]}, {row['clips']:,} clips"
        tested = "a word in each sentence never heard in training, " * (row["split"] == "test_new_words") + tested
        row["group"] = f"No result, {name}" if row["by_heart"] else tested if row["real"] else f"{name}: {tested}"
    if not rows:
        raise NotRecorded("question 3")

    def place(row: dict) -> tuple:
        group = row["by_heart"], row["real"], row["dataset"] != "spoken corpus", row["adapted"]
        group = *group, SPLITS.index(row["split"]), bool(row["pretrained"]), row["data"]
        return *group, row["preset"] != "improved", len(row["changes"]), str(row["changes"]), row["decoder"]

    groups = {}
    for row in sorted(rows, key=place):
        groups.setdefault(row["group"], []).append(row)
    return groups


def pair(rows: list[dict]) -> list[dict]:
    """Both decoders of the first row's setting."""
    return [row for row in rows if all(row[key] == rows[0][key] for key in ("data", "preset", "changes"))]


def first_pair() -> list[dict]:
    return pair(next(iter(q3_groups().values())))


def real_pairs() -> list[list[dict]]:
    """Both decoders of each setting that was tested on real speech, the last of them adapted to it."""
    pairs = {}
    for rows in q3_groups().values():
        for row in rows if rows[0]["real"] else ():
            pairs.setdefault(row["data"], pair([r for r in rows if r["data"] == row["data"]]))
    return list(pairs.values())


def in_words(items: list[str]) -> str:
    return " and ".join([", ".join(items[:-1])] * (len(items) > 1) + items[-1:])


def errors(rows: list[dict]) -> str:
    return ", ".join(f"{100 * row['scores']['cer']['mean']:.1f} with the {DECODERS[row['decoder']]}" for row in rows)


def q3_result(rows: list[dict], data: str) -> list[str]:
    links = "; ".join(f"{DECODERS[row['decoder']]}, seed {row['links']}" for row in rows)
    return [f"**Wrong characters in 100:** {errors(rows)}", data, links]


def q3_spoken() -> list[str]:
    return q3_result(first_pair(), f"{SPEECH[first_pair()[0]['kind']]}, short sentences of few words")


def minutes_of_voice() -> float:
    """How much real speech the networks trained on: that of those that heard nothing else."""
    for rows in real_pairs():
        if rows[0]["kind"] == "real" and not rows[0]["adapted"]:
            return 60 * read(f"q3/{rows[0]['files'][0]}")["dataset"]["hours"]["train"]
    raise NotRecorded("networks trained on real speech alone")


def q3_real() -> list[str]:
    if not real_pairs():
        raise NotRecorded("real speech")
    rows = real_pairs()[-1]
    spoken = "trained on synthetic voices alone"
    how = f"after {minutes_of_voice():.0f} minutes of that voice" if rows[0]["adapted"] else spoken
    return q3_result(rows, f"{rows[0]['group']}, {how}")


def q3_expect() -> str:
    took = duration(read("q3/run.json")["seconds"])
    return f"**Expect** {took} for the {first_pair()[0]['data']}, on two idle cores ({link('record', 'q3/run.json')})."


def q3_adapt() -> str:
    """What some minutes of a person's voice are worth to a network that had heard synthetic voices alone."""
    found = {rows[0]["adapted"]: rows[0] for rows in real_pairs() if rows[0]["adapted"] or rows[0]["kind"] == "spoken"}
    if len(found) < 2:
        raise NotRecorded("networks adapted to a voice")
    before, whole = 100 * found[False]["scores"]["cer"]["mean"], read(f"q3/{found[True]['files'][0]}")
    records = [read(f"q3/fewer/{path.name}") for path in (RESULTS / "q3" / "fewer").glob("*.json")] + [whole]
    records.sort(key=lambda record: record["dataset"]["counts"]["train"])
    # Half of the clips are synthetic ones, mixed in. The whole corpus' minutes are known, of its parts their share.
    minute = whole["dataset"]["counts"]["train"] / minutes_of_voice()
    minutes = [f"{record['dataset']['counts']['train'] / minute:.0f}" for record in records]
    after = [f"{100 * record['test']['cer']:.1f}" for record in records]
    return (
        f"The network in `weights/` has heard synthetic voices alone: it gets {before:.1f} of 100 of a reader's "
        f"characters wrong. After {in_words(minutes)} minutes of her voice: {in_words(after)}."
    )


def transcript() -> str:
    """The first test sentence that not both decoders write rightly, in the runs of the first seed."""
    rows = first_pair()
    texts = {DECODERS[row["decoder"]]: read(f"q3/details/{row['files'][0]}")["transcripts"]["test"] for row in rows}
    clips = next(iter(texts.values()))
    clip = next(c for c in clips if any(written[c]["written"] != clips[c]["said"] for written in texts.values()))
    lines = {"said": clips[clip]["said"]} | {name: written[clip]["written"] for name, written in texts.items()}
    return "\n".join(["```text", *(f"{name:<12} {text}" for name, text in lines.items()), "```", ""]) + (
        f"\nThe first test sentence of the {rows[0]['data']} ({SPEECH[rows[0]['kind']]}) that a decoder gets wrong."
    )


def q3_scores() -> str:
    """A table for each test; what all of its rows share stands in its caption."""
    text, firsts = [], {}
    for group, rows in q3_groups().items():
        settings = [[f"preset {row['preset']}"] * (row["preset"] != "improved") for row in rows]
        for row, setting in zip(rows, settings, strict=True):
            setting += [f"{name} {value}" for name, value in row["changes"].items()]
        shared = [part for part in settings[0] if all(part in setting for setting in settings)]
        body = []
        for row, setting in zip(rows, settings, strict=True):
            own = [row["data"]] * (row["real"] or bool(row["pretrained"])) + [
                part for part in setting if part not in shared
            ]
            cells = [", ".join(own) or "unchanged", f"{DECODERS[row['decoder']]} {row['links']}"]
            cells += [spread(row["scores"][key], ".3f") for key in ("jaccard", "cosine", "damerau_levenshtein")]
            similarity, cer = (row["scores"][key] for key in ("damerau_levenshtein", "cer"))
            change = from_first(similarity["mean"], firsts, f"{group} {row['decoder']}")
            body.append([*cells, change, spread({k: v and 100 * v for k, v in cer.items()}, ".1f")])
        text.append(f"**{group[0].upper()}{group[1:]}**" + (f" ({', '.join(shared)})" if shared else ""))
        first = "trained on" if rows[0]["real"] else "setting"
        text.append(table(f"{first}, decoder (seeds), Jaccard, cosine, Damerau-L., difference, CER in %", body))
    return "\n\n".join(text)


def q3_decoding() -> str:
    """Character error rates of each way to decode, and what it changes; for changed settings not."""
    body, ways = [], []
    for group, rows in q3_groups().items():
        for row in rows if rows[0]["real"] else pair(rows):
            details = [read(f"q3/details/{file}") for file in row["files"] if not row["by_heart"]]
            found = [{"test": d["decoding"], **d.get("decoding_others", {})}.get(row["split"]) for d in details]
            if found and all(found):
                ways = [way for way in found[0] if way != "clips"]
                rates = [sum(f[way]["cer"] for f in found) / len(found) for way in ways]
                cells = [f"{rate:.1%}\u00a0({100 * (rate - rates[0]):+.1f})" for rate in rates[1:]]
                about = f"{row['data']}; {group}" if row["real"] else group
                tried = sorted({f["clips"] for f in found})
                number = " to ".join(dict.fromkeys([f"{tried[0]}", f"{tried[-1]}"]))
                body.append([about, DECODERS[row["decoder"]], number, f"{rates[0]:.1%}", *cells])
    return table(", ".join(["tested on", "decoder", "tried", *(way.replace(", ", " ") for way in ways)]), body)


def q3_voices() -> str:
    """What each variation of the voice is worth on real clips, by the error rate of CTC in points."""
    rows, firsts = [], {}
    for variant in read("q3/voices.json")["variants"]:
        real, own = variant["test_real"], variant["test"]
        rates = [f"{100 * split[key]:.1f}" for split in (own, real) for key in ("cer", "cer_by_ctc")]
        change = from_first(100 * real["cer_by_ctc"], firsts, "real", 1)
        rows.append([variant["variant"], *rates, change])
    return table("training voices, own voice, own voice by CTC, real, real by CTC, difference", rows)


def q3_counts() -> str:
    rows, splits = {}, ("train", "val", *SPLITS)
    for row in (row for rows in q3_groups().values() for row in rows if not row["by_heart"]):
        about = read(f"q3/{row['files'][0]}")["dataset"]
        sizes = [
            f"{about['counts'][s]:,} ({about['hours'][s]:.2f}\u00a0h)" if s in about["counts"] else "" for s in splits
        ]
        rows[about["name"]] = [f"{short_name(about['name'])} ({SPEECH[about['kind']]})", *sizes]
    return table(f"corpus, {', '.join(splits)}", rows.values())


# ---------------------------------------------------------------------------------------------------
# All questions


def commands() -> str:
    q2, q3 = chosen("phantom-homework", rate=0.01)["seconds"]["mean"], read("q3/run.json")["seconds"]
    return f"""\
```
# Names the condition on a scan and writes down a recording: 15 seconds.
make demo

# Prints how exact and how fast attention in linear time is, and draws both: a minute.
make q1

# Trains the networks of both other questions and prints their scores: {duration(q2)} and {duration(q3)}.
make q2 ARGS="-data phantom" && make q3 ARGS="-p data spoken"
```"""


def results() -> str:
    rows = []
    makers = {
        "1\u00a0attention": q1_result,
        "2\u00a0scans": q2_result,
        "3\u00a0speech": q3_spoken,
        "3\u00a0real\u00a0speech": q3_real,
    }
    for question, make in makers.items():
        try:
            rows.append([question, *make()])
        except NotRecorded:
            rows.append([question, "not recorded yet", "", ""])
    return table("question, result, data, records", rows)


def gpu() -> str:
    if (RESULTS / "gpu.json").exists():
        record = read("gpu.json")
        curves = record["q1"]["attention_curves"]["result"]
        shown = [c for c in curves if (c["heads"], c["dim"], c["backward"]) == (16, 64, False)]
        lengths = {c["dtype"]: f"{round(c['crossover'], -3):,.0f}" for c in shown}
        steps = record["q2"]["training_loops"]["result"]["steps_per_second"]
        return (
            f"On one {record['gpu']['name']}, Taylor attention passes PyTorch's fused kernel at {lengths['float32']} "
            f"tokens (bfloat16: {lengths['bfloat16']}), and question 2 trains "
            f"{steps['ours, CUDA graphs'] / steps['course']:.1f} times as fast as the course's loop "
            f"({link('more', 'README.md')})."
        )
    return "**Nothing here was measured on a GPU.** `make bench-gpu` would do so, and stops after six minutes."


def gpu_table() -> str:
    return read("gpu.json")["table"]


def benchmarks() -> str:
    q1, q2, q3 = (read(path) for path in ("q1-bench.json", "q2/bench.json", "q3/bench.json"))
    memory, steps = q1["memory_mib"], q2["steps_per_second"]
    speeds = {bar["what"]: bar["value"] for bar in q3["bars"]}
    for decoder, name in DECODERS.items():
        fastest = q3["training"][decoder]["ratio_wall"]["course, at its fastest"]
        speeds[f"training, {name}, the course's at its fastest"] = fastest
    rows = [
        ["1, MiB beside the input", f"{memory['naive features']:,.0f}", f"{memory['Taylor']:.0f}", "q1-bench.json"],
        ["2, steps per second", f"{steps['plain']:.0f}", f"{steps['ours']:.0f}", "q2/bench.json"],
        *([f"3, speed of {what}", "1", f"{value:.0f}", "q3/bench.json"] for what, value in speeds.items()),
    ]
    return table("what, plain way, ours, record", ([*row[:-1], link("record", row[-1])] for row in rows))


def records() -> str:
    """What each target of `make records` takes; of question 3 the training, both decoders at once."""
    grids = [f"q2/{folder}/grid" for folder in GRIDS] + ["q2/pooling-phantom", "q2/pooling-kermany_subset"]
    q2 = [read(f"{name}.json") for name in grids]
    targets = (
        "q3-records REAL_SPEECH=LJSpeech-1.1",
        "q3-ablations",
        "q3-lj-text TEXTS=metadata.csv TEST_SPEECH=chapters",
        "q3-real REAL_SPEECH=LJSpeech-1.1 TEXTS=metadata.csv TEST_SPEECH=chapters",
    )
    seconds = {
        "q1-records": read("q1.json")["seconds"],
        "q2-records REAL=scans.npz": sum(grid.get("wall_seconds") or grid["seconds"] / grid["jobs"] for grid in q2),
    } | dict.fromkeys(targets, 0)
    for row in (row for rows in q3_groups().values() for row in rows):
        place = 3 if row["kind"] == "real" else 2 if row["dataset"] != "spoken corpus" else bool(row["changes"])
        if (row["split"], row["decoder"]) == ("test", "lstm"):
            seconds[targets[0 if row["by_heart"] else place]] += 60 * row["minutes"]["mean"] * len(row["seeds"])
    rows = ([f"`make {name}`", duration(took) if took else "not recorded yet"] for name, took in seconds.items())
    return table("command, time", rows)


PAGES = {
    "README.md": {
        "commands": commands, "results": results, "transcript": transcript, "gpu": gpu,
        "q1": q1_expect, "q2": q2_expect, "q3": q3_expect, "q3-adapt": q3_adapt,
    },
    "results/README.md": {
        "q1-time": q1_time, "q1-errors": q1_errors, "q2-grids": q2_grids, "q2-transfer": q2_transfer,
        "q2-counts": q2_counts, "q3-scores": q3_scores, "q3-decoding": q3_decoding, "q3-voices": q3_voices,
        "q3-counts": q3_counts, "benchmarks": benchmarks, "gpu": gpu_table, "records": records,
    },
}  # fmt: skip


def fill(page: str) -> str:
    """A page with what its records say between <!-- begin NAME --> and <!-- end NAME -->."""
    text = (ROOT / page).read_text()
    for name, make in PAGES[page].items():
        try:
            part = make()
        except NotRecorded as missing:
            part = f"*Not recorded yet: {missing}.*"
        part = part if page == "README.md" else part.replace("](results/", "](")
        pattern = f"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        text, found = re.subn(pattern, lambda m, new=part: f"{m[1]}{new}\n{m[2]}", text, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(f"{page}: the part {name} stands there {found} times, not once")
    return text


def main() -> None:
    for page in PAGES:
        (ROOT / page).write_text(fill(page))


if __name__ == "__main__":
    Parser(__doc__).parse_args()
    main()
