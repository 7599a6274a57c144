"""Whole runs of hw2-q3.ipynb: how long one takes, and one process against two.

    python benchmarks/run_q3.py [-out results/q3/run.json] [-records results/q3]

1. What `make q3 ARGS="-p data spoken"` does, without anything at hand: the corpus is spoken, both decoders are trained
   and scored, the page is written. Nothing else should run meanwhile: the bar of ten minutes is for two idle cores.
2. The LSTM decoder trained for two epochs by one process and by two, which Accelerate starts and gives half of every
   batch: the losses of an epoch must be the same but for rounding, which each step's weights hand on to the next.

Exit status 1 if a bar is missed.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import runs

MINUTES, DIFFERENCE = 10, 1e-3  # bars: wall time; relative, of an epoch's training loss


def run_notebook(folder: Path, **parameters) -> dict[str, dict]:
    """Run the notebook on the spoken corpus with all it keeps in `folder`; the records of its runs, by decoder."""
    command = [sys.executable, str(ROOT / "run_notebook.py"), "-out", str(folder)]
    named = {"data": "spoken", "data_dir": folder.parent / "data", "runs_dir": folder} | parameters
    for name, value in named.items():
        command += ["-p", name, str(value)]
    subprocess.run(command, check=True)
    records = map(runs.read_json, sorted(folder.glob("*/record.json")))
    return {record["config"]["decoder"]: record for record in records}


def time_a_run(folder: Path, records_dir: Path | None) -> dict:
    """Seconds of the whole notebook and of its page, from an empty folder, and what came of it."""
    kept = {"records_dir": records_dir.resolve(), "extra_clips": 50} if records_dir else {}
    began = time.monotonic()
    records = run_notebook(folder, **kept)
    seconds = round(time.monotonic() - began, 1)
    return {
        **{key: records["lstm"][key] for key in ("dataset", "seed", "device", "threads")},
        "seconds": seconds,
        "training_seconds": {decoder: record["seconds"] for decoder, record in records.items()},
        "damerau_levenshtein": {d: record["test"]["damerau_levenshtein"] for d, record in records.items()},
    }


def compare_processes(folder: Path) -> dict:
    """Training losses by epoch, by one process and by two, and their largest relative difference."""
    losses = {}
    fixed = "{epochs: 2, mel_shift: 0, text_dropout: 0}"  # what is random is drawn by each process for itself
    short = {"decoders": "lstm", "extra_clips": 1, "device": "cpu", "overrides": fixed}
    for processes in (1, 2):
        records = run_notebook(folder / f"by{processes}", processes=processes, **short)
        assert records["lstm"]["processes"] == processes
        losses[str(processes)] = [epoch["train"]["loss"] for epoch in records["lstm"]["history"]]
    pairs = zip(*losses.values(), strict=True)
    return {"train_loss": losses, "relative_difference": max(abs(one / two - 1) for one, two in pairs)}


def main() -> int:
    parser = runs.Parser(__doc__)
    parser.add_argument("-out", type=Path, metavar="RECORD", help="write a record")
    parser.add_argument("-records", type=Path, metavar="FOLDER", help="keep the records of the first run there")
    args = parser.parse_args()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # Windows has none
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        record = runs.run_environment() | {"load_before": load, **time_a_run(folder / "whole", args.records)}
        record["one_and_two"] = compare_processes(folder)
    minutes, difference = record["seconds"] / 60, record["one_and_two"]["relative_difference"]
    print(f"the whole notebook: {minutes:.1f} minutes (bar: {MINUTES})")
    print(f"one process and two: losses differ by {difference:.1e} (bar: {DIFFERENCE:.0e})")
    if args.out:
        runs.write_json(args.out, record)
    return int(minutes > MINUTES or difference > DIFFERENCE)


if __name__ == "__main__":
    sys.exit(main())
