"""The repository itself: README, requirements, Makefile."""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_the_readme_says_what_the_records_say():
    command = [sys.executable, ROOT / "report" / "readme.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert len(links) > 10
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for target in links:
        assert any(path == target or path.startswith(f"{target}/") for path in tracked), target


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][a-z0-9-]*)", README))
    assert named and named <= targets, named - targets


@pytest.mark.parametrize(("script", "least"), [("attention_approx.py", 3), ("hw2-q2.py", 6)])
def test_flags_of_the_readme_exist(script, least, capsys):
    module = importlib.import_module(script.removesuffix(".py"))
    commands = re.findall(rf"python {re.escape(script)}([^`\n#]*)", README)
    assert len(commands) >= least
    for flags in commands:
        words = flags.replace("...", "x").split()
        if words == ["-h"]:
            continue
        module.parse_arguments(words)  # exits on an unknown flag
    with pytest.raises(SystemExit):
        module.parse_arguments(["-no_such_flag"])
    assert "unrecognized" in capsys.readouterr().err


def test_requirements_are_pinned_and_say_who_needs_them():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+ +# (Q[123](, Q[123])*|tests|lint[a-z ]*)\b.*", line), line


def test_every_record_tells_where_it_comes_from():
    records = sorted(p for p in (ROOT / "results").rglob("*.json") if p.name != "settings.json")
    assert len(records) > 10
    for path in records:
        record = json.loads(path.read_text())
        for key in ("command", "versions", "git", "date"):
            assert key in record, (path, key)
        assert record["git"]["clean"], path


def test_a_second_make_installs_nothing():
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "ARGS")}
    command = ["make", "--no-print-directory", "-n", "q2"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    if (ROOT / ".venv" / ".ready").exists():
        assert "pip" not in done.stdout and done.stdout.strip().endswith("hw2-q2.py")
    else:
        assert done.stdout.index("pip install") < done.stdout.index("hw2-q2.py")


def test_the_benchmark_compares_loops_that_end_alike(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "bench_q2.py", "-rounds", "2", "-steps", "6"]
    done = subprocess.run([*command, "-out", tmp_path / "bench.json"], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr  # 1: slower in so short a run, which says nothing
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["parameters_identical"] is True
    assert record["data_memory_ratio"] <= 0.3


# ---------------------------------------------------------------------------------------------------
# What the records must show


def record(path: str) -> dict:
    return json.loads((ROOT / "results" / "q2" / path).read_text())


def test_taylor_attention_keeps_its_bars():
    """The bars are those of the benchmark itself; here they stand again, so that loosening one is noticed."""
    bars = {
        "time, forward, D = 8": 0.015,
        "time, forward, D = 16": 0.06,
        "time, forward, D = 32": 0.16,
        "time, forward, D = 64": 0.45,
        "time, causal, D = 64": 1.0,
        "time, forward and backward, D = 16": 0.08,
        "time, forward and backward, D = 32": 0.15,
        "time, forward and backward, D = 64": 0.5,
        "crossover length, D = 64": 3500,
        "memory, share of naive features, D = 64": 0.1,
        "time ratio, B = 2 and H = 8 over B = H = 1": 1.25,
    }
    bench = json.loads((ROOT / "results" / "q1-bench.json").read_text())
    assert bench["config"]["scale"] == 1 and bench["threads"] == 1
    measured = {bar["what"]: bar["value"] for bar in bench["bars"]}
    assert set(measured) == set(bars)
    for what, bar in bars.items():
        assert measured[what] <= bar, what


def test_the_recorded_curves_show_where_taylor_attention_pays():
    record = json.loads((ROOT / "results" / "q1.json").read_text())
    assert [curve["dim"] for curve in record["costs"]] == [16, 64]
    for curve in record["costs"]:
        assert curve["crossover"] < 3500
    for point in record["errors"]["points"]:
        errors = [outcome["error"]["mean"] for outcome in point["terms"].values() if outcome["error"]]
        if point["deviation"] <= 1:  # beyond that weights of both signs spoil the even K
            assert errors == sorted(errors, reverse=True) and len(errors) == 5  # more terms, less error
        for outcome in point["terms"].values():
            assert outcome["bound"] is None or outcome["error"]["mean"] <= outcome["bound"]


def test_phantoms_are_neither_trivial_nor_hopeless_with_the_default_settings():
    rows = {row["learning_rate"]: row for row in record("phantom-homework/grid.json")["settings"][:3]}
    assert 0.80 <= rows[0.01]["val_accuracy"]["mean"] <= 0.95


def test_what_is_learnt_from_phantoms_serves_on_real_scans():
    scores = record("phantom-to-real-homework.json")
    assert scores["trained_on"]["kind"] == "phantom" and scores["dataset"]["kind"] == "real"
    assert len(scores["checkpoints"]) == len(set(scores["checkpoints"])) == 3
    assert scores["all"]["balanced_accuracy"]["mean"] >= 0.45
    assert scores["all"]["macro_auc"]["mean"] >= 0.75


@pytest.mark.parametrize(
    ("homework", "strong"),
    [
        ("phantom-homework", "phantom-strong"),
        ("real-subset-homework-100-epochs", "real-subset-strong-100-epochs"),
    ],
)
def test_the_strong_recipe_beats_the_homeworks(homework, strong):
    def chosen(name):
        grid = record(f"{name}/grid.json")
        (row,) = (
            r for r in grid["settings"] if r["network"] == "maxpool" and r["learning_rate"] == grid["chosen_rate"]
        )
        assert len(row["runs"]) == 3
        return row["test_balanced_accuracy"]["mean"]

    assert chosen(strong) > chosen(homework)


def test_the_training_loop_is_never_slower_than_the_plain_one():
    bench = record("bench.json")
    assert bench["ratio_wall"] >= 1 and bench["ratio_cpu"] >= 1 and bench["parameters_identical"]
