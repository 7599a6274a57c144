"""All three questions on one GPU: speed, memory, agreement with the CPU. Writes results/gpu.json.

    make bench-gpu                                     all of it, at most six minutes
    python benchmarks/bench_gpu.py -q2                 one question; what the record says of the others stays
    python benchmarks/bench_gpu.py -q3 -minutes 15     time enough for the notebook of question 3
    python benchmarks/bench_gpu.py -quick              tiny sizes, on the CPU where there is no GPU: tries this program

Needs no network: scans and speech are made here. The parts run in the order of PARTS; each is written once it is done.
A part that is short of time or memory leaves sizes out and says which. Times are by CUDA events: medians of rounds in
which the forms take turns, after a warm-up. Exit status: 0; 1 if a part failed; 2 without CUDA.
"""

import argparse
import sys
import time
from pathlib import Path

STARTED, ROOT = time.monotonic(), Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from runs import InputError, Parser, number, one_line, read_json, run_environment, run_script, write_json


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "bench_gpu.py")
    add = parser.add_argument
    for n in "123":
        add(f"-q{n}", dest="questions", action="append_const", const=f"q{n}", help=f"question {n} (default: all)")
    add("-quick", action="store_true", help="tiny sizes; written to runs/gpu-quick.json")
    add("-minutes", type=number(float, 0, low_fits=False), default=6.0, help="of all parts together (6)")
    add("-no_notebook", action="store_true", help="leave out the training of question 3, which takes longest")
    add("-out", type=Path, metavar="FILE", help="the record (results/gpu.json)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse_arguments()  # -h and mistakes are answered now: PyTorch takes seconds to import

import importlib
import subprocess
import traceback
from contextlib import suppress
from functools import cached_property
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import bench_q1
import bench_q2
import gpu_q3
import torch

import attention_approx as q1
import utils

q2 = importlib.import_module("hw2-q2")

FULL = {"quick": False, "lengths": [2**n for n in range(10, 18)], "dims": [64, 16, 32, 128], "heads": [16, 1]}
FULL |= {"agreement_length": 1024, "epoch_scans": 6_000, "scans": 97_477, "batches": [8, 16, 32, 64], "clips": 256}
QUICK = {"quick": True, "lengths": [64, 128], "dims": [8], "heads": [2, 1]}
QUICK |= {"agreement_length": 64, "epoch_scans": 200, "scans": 80, "batches": [2, 4], "clips": 4}
RESULTS, QUESTIONS = ROOT / "results", ("q1", "q2", "q3")


class Bench:
    """What the parts share: the device, the sizes, the time that is left, and what was left out."""

    def __init__(self, quick: bool):
        self.sizes, self.rounds = SimpleNamespace(**(QUICK if quick else FULL)), 1 if quick else 5
        self.device, self.deadline, self.left_out = "cuda" if torch.cuda.is_available() else "cpu", 0.0, []

    @cached_property
    def speech(self) -> gpu_q3.Speech:
        return gpu_q3.load(self.sizes.clips, self.sizes.quick, self.leave_out)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def leave_out(self, line: str) -> None:
        print(f"  left out: {line}", flush=True)
        self.left_out.append(line)


# ---------------------------------------------------------------------------------------------------
# The parts, most of which bench_q1.py, bench_q2.py and gpu_q3.py measure


def attention_agreement(bench: Bench) -> list[dict]:
    device, length = torch.device(bench.device), bench.sizes.agreement_length
    return bench_q1.device_agreement(device, bench.sizes.dims, length, bench.leave_out)


def attention_curves(bench: Bench) -> list[dict]:
    torch.use_deterministic_algorithms(False)  # the other questions ask for them
    sizes = bench.sizes.heads, bench.sizes.dims, bench.sizes.lengths
    return bench_q1.device_curves(torch.device(bench.device), sizes, min(3, bench.rounds), bench.left, bench.leave_out)


def training_loops(bench: Bench) -> dict:
    return bench_q2.device_loops(bench.device, bench.sizes.epoch_scans, min(3, bench.rounds))


def default_run(bench: Bench) -> dict | None:
    """Scores of the default run of question 2, seed 42, beside those that are recorded of a CPU."""
    if bench.sizes.quick:
        return bench.leave_out("the default run takes minutes on a CPU")
    config, data = q2.RECIPES["homework"], utils.load_phantoms()
    with TemporaryDirectory() as folder:
        runs = [q2.train(config, data, Path(folder) / "run", torch.device(bench.device))]
    recorded = RESULTS / "q2" / "phantom-homework" / q2.run_name(config) / "record.json"
    if recorded.exists() and (record := read_json(recorded))["dataset"] == data.description:
        runs.insert(0, record)
    rows = [(run, {f"{split}_accuracy": run[split]["accuracy"] for split in ("val", "test")}) for run in runs]
    return {run["device"]: row | {"test_loss": run["test"]["loss"], "seconds": run["seconds"]} for run, row in rows}


def whole_run(bench: Bench) -> dict:
    return bench_q2.timed_run(bench.device, bench.sizes.scans, bench.left, bench.leave_out)


def stacked_networks(bench: Bench) -> dict:
    return bench_q2.stacked_speed(bench.device, bench.rounds)


def speech_training(bench: Bench) -> dict:
    speech, sizes, rounds = bench.speech, bench.sizes.batches, min(3, bench.rounds)
    return gpu_q3.training_speed(speech, bench.device, sizes, rounds, bench.left, bench.leave_out)


def speech_decoding(bench: Bench) -> dict:
    return gpu_q3.decoding_speed(bench.speech, bench.device)


def notebook(bench: Bench) -> dict | None:
    if bench.sizes.quick:
        return bench.leave_out("the notebook takes minutes")
    return gpu_q3.similarity(RESULTS, bench.left(), bench.leave_out)


PARTS = (  # question, function, seconds of the six minutes; the most valuable first, the longest last
    ("q1", attention_agreement, 14),
    ("q2", training_loops, 40),
    ("q3", speech_training, 45),
    ("q1", attention_curves, 85),
    ("q2", default_run, 36),
    ("q2", whole_run, 30),
    ("q3", speech_decoding, 15),
    ("q2", stacked_networks, 5),
    ("q3", notebook, 90),
)

# ---------------------------------------------------------------------------------------------------
# The record


def describe_gpu() -> dict | None:
    if not torch.cuda.is_available():
        return None
    about, driver = torch.cuda.get_device_properties(), None
    with suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    return {
        "name": about.name,
        "gib": round(about.total_memory / 2**30, 1),
        "driver": driver,
        "cuda": torch.version.cuda,
    }


def parts_of(record: dict) -> dict[str, dict]:
    return {name: part for question in QUESTIONS for name, part in record.get(question, {}).items()}


def table(record: dict) -> str:
    """The record as a short Markdown table; what was not measured has no row."""
    results = {name: part.get("result") for name, part in parts_of(record).items()}
    rows, shown = [], [record["config"][key][0] for key in ("heads", "dims")]

    def listed(values: dict, form: str = "{:,.0f}") -> str:
        return "; ".join(f"{name}: {form.format(value)}" for name, value in values.items())

    for curve in results.get("attention_curves") or []:
        points = [point for point in curve["points"] if {q1.SOFTMAX, q1.TAYLOR} <= point["ms"].keys()]
        if points and [curve["heads"], curve["dim"]] == shown:
            direction, last = "with backward" if curve["backward"] else "forward", points[-1]
            times = listed({name: last["ms"][name] for name in (q1.TAYLOR, q1.SOFTMAX)}, "{:.3g}")
            what = f"1: ms of attention, {curve['dtype']}, {direction}, L = {last['length']:,}"
            rows.append((what, f"{times}; Taylor {bench_q1.curve_crossover(curve)}"))
    if loops := results.get("training_loops"):
        rows.append(("2: training steps per second", listed(loops["steps_per_second"])))
    if stacked := results.get("stacked_networks"):
        rows.append((f"2: the same, {stacked['networks']} networks a step", listed(stacked["steps_per_second"])))
    if whole := results.get("whole_run"):
        rows.append((f"2: {whole['epochs']} epochs of {whole['scans']:,} phantoms", f"{sum(whole['seconds']):.0f} s"))
    if len(default := results.get("default_run") or {}) > 1:  # the CPU's record is of the same phantoms
        scores = {device: scores["test_accuracy"] for device, scores in default.items()}
        rows.append(("2: test accuracy of the default run, phantoms", listed(scores, "{:.4f}")))
    for row in (results.get("speech_training") or {"rows": []})["rows"]:
        what = f"3: seconds of speech trained a second, {row['decoder']}, {row['dtype']}, by clips per step"
        rows.append((what, listed(row["speech_seconds_per_second"])))
    if decoding := results.get("speech_decoding"):
        rows.append((f"3: ms to decode {decoding['clips']} clips", listed(decoding["ms"])))
    for decoder, scores in (results.get("notebook") or {}).items():
        similarities = {device: score["similarity"] for device, score in scores.items()}
        rows.append((f"3: validation similarity, {decoder}", listed(similarities, "{:.3f}")))
    gpu = (record["gpu"] or {"name": "no GPU"})["name"]
    return "\n".join([f"| question | {gpu} |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)])


def run(args: argparse.Namespace) -> None:
    bench, out = Bench(args.quick), args.out or ROOT / ("runs/gpu-quick.json" if args.quick else "results/gpu.json")
    if bench.device == "cpu" and not args.quick:
        raise InputError("PyTorch finds no CUDA device here (-quick tries this program on the CPU)")
    torch.set_num_threads(1)
    about = {"config": vars(bench.sizes), "gpu": describe_gpu(), **run_environment(torch.device(bench.device))}
    before = read_json(out) if out.exists() else {}
    if any(before.get(key) != about[key] for key in ("config", "gpu", "versions", "git")):
        before = {}  # measured elsewhere, or by other code
    record = about | {question: before[question] for question in QUESTIONS if question in before}
    record |= {"dataset": {"name": "random tensors, OCT phantoms, spoken corpus", "kind": "synthetic"}, "seed": 42}
    skipped = {notebook} if args.no_notebook else set()
    parts = [part for part in PARTS if part[0] in (args.questions or QUESTIONS) and part[1] not in skipped]
    end, unit = STARTED + 60 * args.minutes, 60 * args.minutes / sum(seconds for *_, seconds in parts)
    for question, function, seconds in parts:
        began, bench.left_out = time.monotonic(), []
        bench.deadline = end if function is notebook else min(end, began + seconds * unit)
        print(f"{question}: {function.__name__.replace('_', ' ')}", flush=True)
        try:
            part = {"result": function(bench) if bench.left() > 0 else bench.leave_out("no time is left")}
        except Exception as error:  # the other parts are worth having
            args.failed, part = True, {"failed": one_line(error)}
            traceback.print_exc()
        part |= {"seconds": round(time.monotonic() - began, 1), "left_out": bench.left_out}
        record.setdefault(question, {})[function.__name__] = part
        record["seconds"] = round(sum(part["seconds"] for part in parts_of(record).values()), 1)
        write_json(out, record | {"table": table(record)})  # README and report show it
    print(f"{table(record)}\n{out}")


def main(arguments: list[str] | None = None) -> int:
    args = argparse.Namespace(failed=False)  # run_script keeps what it parses; whether a part failed must get out

    def parse(arguments: list[str] | None) -> argparse.Namespace:
        vars(args).update(vars(parse_arguments(arguments)))
        return args

    return run_script("bench_gpu.py", parse, run, arguments, "stopped; what was done is kept") or int(args.failed)


if __name__ == "__main__":
    sys.exit(main())
