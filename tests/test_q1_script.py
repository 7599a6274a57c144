"""Question 1: the script as a user runs it, and the benchmark, with what it measures by."""

import json
import math
import shlex
import subprocess
import sys

import bench_q1
import pytest
import torch
from conftest import ROOT, caller, tree

import attention_approx as q1

SMALL = shlex.split("-quick -lengths 64 200 -dims 3 5 -terms 2 3")


def run_script(folder, *arguments, script="attention_approx.py"):
    command = [sys.executable, ROOT / script, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("q1")
    (folder / "utils.py").write_text("raise RuntimeError('the utils.py of a user')")
    done = run_script(folder, *SMALL, "-out", "record.json")
    assert done.returncode == 0, done.stderr
    return folder, done, json.loads((folder / "record.json").read_text())


def test_the_script_writes_a_record_that_holds_what_it_prints(finished):
    _, done, record = finished
    assert done.stderr == ""
    assert record["command"].startswith("python ") and "-lengths 64 200" in record["command"]
    assert record["config"]["dtype"] == "float32" and record["config"]["lengths"] == [64, 200]
    assert record["dataset"]["kind"] == "random"
    for key in ("versions", "git", "date", "seconds", "device", "threads", "seed"):
        assert key in record, key
    assert f"{q1.num_features(5, 3):,} ({q1.num_features(5, 3, symmetric=False):,})" in done.stdout
    for _, error, bound in record["errors"]["3"]:
        assert f"{error:.1e} ({bound:.1e})" in done.stdout
    for curve in record["costs"]:
        for point in curve["points"]:
            for name in (q1.SOFTMAX, q1.TAYLOR):
                assert name in done.stdout and f"{point['ms'][name]:.2f}" in done.stdout


def test_errors_are_those_of_a_plain_computation():
    for score_std in (0.1, 0.5, 2.0):
        q, k, v = q1.random_tokens(150, 5, score_std, 1, torch.float64, torch.device("cpu"))
        exact = torch.softmax(q @ k.mT, -1) @ v
        for num_terms, (error, bound, negative) in q1.relative_errors(q, k, v, [2, 3, 4]).items():
            weights = sum((q @ k.mT) ** n / math.factorial(n) for n in range(num_terms))
            expected = (weights @ v / weights.sum(-1, keepdim=True) - exact).norm() / exact.norm()
            assert negative == bool((weights < 0).any())
            if math.isnan(error):
                assert (weights.sum(-1) <= 0).any()
            else:
                assert error == pytest.approx(float(expected), rel=1e-6) and error <= bound


def test_recorded_errors_are_summed_up_over_the_draws():
    errors = bench_q1.measure_errors(50, 4, [2, 3], [1, 2])
    for point in errors["points"]:
        draws = [
            q1.random_tokens(50, 4, point["score_std"], seed, torch.float32, torch.device("cpu")) for seed in (1, 2)
        ]
        for num_terms in (2, 3):
            trials = [q1.relative_errors(*draw, [num_terms])[num_terms] for draw in draws]
            found, (one, two) = point["terms"][str(num_terms)], [error for error, _, _ in trials]
            assert found["runs_with_negative_weights"] == sum(negative for _, _, negative in trials)
            assert found["runs_without_result"] == math.isnan(one) + math.isnan(two)
            if found["error"] is None:
                assert found["runs_without_result"] > 0
            else:
                assert found["error"] == pytest.approx({"mean": (one + two) / 2, "std": abs(one - two) / math.sqrt(2)})
            worst = max(bound for _, bound, _ in trials)
            assert found["bound"] == (worst if worst < math.inf else None)
        assert 0 < point["mean_of_v"]["mean"] < 1.5


def test_scores_have_the_standard_deviation_that_is_asked_for():
    q, k, v = q1.random_tokens(800, 16, 0.7, 3, torch.float64, torch.device("cpu"))
    assert float((q @ k.mT).std()) == pytest.approx(0.7, rel=0.02)
    assert float(v.std()) == pytest.approx(1, rel=0.02)


def test_the_figure_is_drawn_and_drawn_again_byte_for_byte(finished):
    folder, _, _ = finished
    assert sorted(tree(folder / "runs" / "q1")) == ["attention.png", "attention.svg"]
    for again in ("one", "two"):
        record = ROOT / "results" / "q1.json"
        done = run_script(folder, "-draw", record, "-figures", again, script="benchmarks/bench_q1.py")
        assert done.returncode == 0, done.stderr
    assert tree(folder / "one") == tree(folder / "two") != {}


def test_a_file_that_exists_is_never_replaced(finished):
    folder, _, _ = finished
    before = tree(folder)
    done = run_script(folder, *SMALL, "-out", "record.json")
    assert done.returncode == 2 and tree(folder) == before and done.stdout == ""
    assert done.stderr == "attention_approx.py: -out record.json: exists already; name a new file\n"


def test_quick_lengths_reach_the_crossovers_of_the_readme_or_say_that_they_are_too_short(finished):
    _, done, _ = finished
    assert "These lengths are too short: Taylor attention is not faster up to L = 200." in done.stdout
    quoted = [curve["crossover"] for curve in json.loads((ROOT / "results" / "q1.json").read_text())["costs"]]
    assert all(q1.QUICK_LENGTHS[0] < crossover < q1.QUICK_LENGTHS[-1] for crossover in quoted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-lengths", "1"], "-lengths: needs a whole number at least 2"),
        (["-dims", "0"], "-dims: needs a whole number at least 1"),
        (["-terms", "x"], "-terms: needs a whole number at least 1"),
        (["-out", "."], "-out .: exists already"),
        (["-dtype", "int8"], "-dtype: invalid choice"),
        (["-device", "abacus"], "-device abacus"),
        (["-quick", "-out", "file/record.json"], "file"),
        (["-quick", "-figures", "file"], "file"),
        (["-lenghts", "5"], "unrecognized arguments: -lenghts 5"),
    ],
)
def test_bad_input_gets_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    before = tree(tmp_path)
    status, _, error = caller(q1, capsys)(*arguments)
    assert status == 2
    assert error.count("\n") == 1 and message in error
    assert tree(tmp_path) == before


@pytest.mark.parametrize("record", ["nothing.json", "broken.json", "foreign.json"])
def test_what_cannot_be_drawn_gets_one_line(tmp_path, record):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "foreign.json").write_text('{"features": []}')
    done = run_script(tmp_path, "-draw", record, script="benchmarks/bench_q1.py")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and record in done.stderr
    assert len(tree(tmp_path)) == 2


# ---------------------------------------------------------------------------------------------------
# What is measured with


def test_peak_memory_counts_what_is_held_at_a_time():
    def function():
        first = torch.empty(1_000_000)
        second = torch.empty(500_000)
        del first
        return second, torch.empty(100_000)

    assert bench_q1.peak_memory(function) == 6_000_000


def test_functions_are_timed_in_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = bench_q1.time_interleaved(functions, rounds=4, least_seconds=0)
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 4, "b": 4, "c": 4}
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"


@pytest.mark.parametrize(
    ("taylor", "softmax", "expected"),
    [
        ([4, 8, 16], [1, 4, 16], None),  # equal at the end is not faster
        ([4, 8, 16], [2, 8, 32], 200),
        ([4, 8, 16], [1, 16, 32], 100 * 2 ** (2 / 3)),
        ([1, 2, 3], [2, 3, 4], None),  # faster at all lengths
        ([2, 1, 2, 1], [1, 2, 1, 2], 400 * math.sqrt(2)),  # the last change counts
    ],
)
def test_the_crossover_is_interpolated(taylor, softmax, expected):
    points = [
        {"length": length, "ms": {q1.TAYLOR: a, q1.SOFTMAX: b}}
        for length, a, b in zip((100, 200, 400, 800), taylor, softmax, strict=False)
    ]
    found = bench_q1.crossover(points)
    assert found == expected or found == pytest.approx(expected)


def test_memory_grows_with_the_length_and_stays_far_below_naive_features():
    bytes_at = {}
    for length in (2400, 4800):
        q, k, v = q1.random_tokens(length, 64, 0.25, 0, torch.float32, "cpu")
        q1.taylor_attention(q, k, v)  # the layout is made once
        bytes_at[length] = bench_q1.peak_memory(lambda: q1.taylor_attention(q, k, v, method="features"))  # noqa: B023
    assert bytes_at[4800] - bytes_at[2400] < 2400 * 4 * 300  # values, sums and result, but no features
    assert bytes_at[4800] < 0.05 * bench_q1.peak_memory(lambda: q1.naive_taylor_attention(q, k, v))
    causal = bench_q1.peak_memory(lambda: q1.taylor_attention(q, k, v, causal=True, method="features"))
    assert causal < 0.1 * 4800**2 * 4


def test_the_sentence_says_why_there_is_no_crossover():
    def sentence(taylor):
        points = [{"length": 1024, "ms": {q1.TAYLOR: taylor, q1.SOFTMAX: 2}}]
        return bench_q1.crossover_sentence({"dim": 64, "points": points, "crossover": bench_q1.crossover(points)})

    assert sentence(3) == "D = 64: these lengths are too short: Taylor is not faster up to L = 1,024"
    assert sentence(1) == "D = 64: Taylor is faster at all of these lengths"


def run_bench(folder, *arguments):
    done = run_script(folder, *arguments, "-out", "bench.json", script="benchmarks/bench_q1.py")
    assert done.returncode in (0, 1), done.stderr  # 1: bars are missed at lengths so short, which says nothing
    return done, json.loads((folder / "bench.json").read_text())


def test_the_benchmark_measures_every_bar(tmp_path):
    done, record = run_bench(tmp_path, "-rounds", "1", "-scale", "0.05")
    assert done.returncode == (0 if all(bar["kept"] for bar in record["bars"]) else 1)
    assert len(record["bars"]) == 11
    for bar in record["bars"]:
        assert bar["what"] in done.stdout
    assert set(record["forward"]) == {"8", "16", "32", "64"}
    assert set(record["plain"]["64"]["ms"]) == {"softmax, fused", "Taylor", "softmax by matmul", "naive features"}


def test_the_benchmark_measures_the_curves_of_the_report(tmp_path):
    done, record = run_bench(tmp_path, "-curves", "-rounds", "1", "-scale", "0.02")
    recorded = json.loads((ROOT / "results" / "q1.json").read_text())
    assert record.keys() == recorded.keys() and record["config"].keys() == recorded["config"].keys()
    for ours, theirs in zip(record["costs"], recorded["costs"], strict=True):
        assert ours["dim"] == theirs["dim"]
        for point in ours["points"]:
            assert point["ms"].keys() == point["mib"].keys() == theirs["points"][0]["ms"].keys()
    assert done.stdout.count("D = ") == 2


def test_the_benchmark_measures_long_sequences_on_a_device(tmp_path):
    done, record = run_bench(tmp_path, "-device", "cpu", "-lengths", "16", "32", "-rounds", "1")
    assert done.returncode == 0 and record["device"] == "cpu"
    assert [(curve["backward"], curve["dim"], curve["dtype"]) for curve in record["curves"]] == [
        (backward, dim, dtype) for backward in (False, True) for dim in (16, 64) for dtype in ("float32", "bfloat16")
    ]
    for curve in record["curves"]:
        assert [point["length"] for point in curve["points"]] == [16, 32]
        assert f"Taylor {curve['points'][-1]['ms']['Taylor']:.2f} ms" in done.stdout


def test_what_takes_too_long_or_finds_no_memory_is_left_out(monkeypatch):
    """Softmax is to take more than 300 ms at the last length; Taylor attention gets there, but finds no memory."""
    monkeypatch.setattr(bench_q1, "LONGEST_CALL", 300)

    def costs(calls, rounds):
        length = next(iter(calls.values())).args[2].shape[2]
        if length > 200:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"ms": {name: length / pace if name == "Taylor" else length**2 / 200 for name in calls}}

    monkeypatch.setattr(bench_q1, "device_costs", costs)
    lines, sizes, pace = [], ([1], [4], [50, 100, 200, 400]), 2
    curves = bench_q1.device_curves(torch.device("cpu"), sizes, 1, leave_out=lines.append)
    assert [len(curve["points"]) for curve in curves] == [3] * 4
    assert [*curves[0]["points"][-1]["ms"]] == ["softmax, fused", "Taylor", "features", "direct"]
    assert [*curves[2]["points"][-1]["ms"]] == ["softmax, fused", "Taylor"]  # the methods apart: forward only
    assert curves[0]["crossover"] == pytest.approx(100)
    assert sum("softmax, fused from L = 400 on; the length before took 200 ms" in line for line in lines) == 4
    assert sum("L = 400 and more; CUDA out of memory" in line for line in lines) == 4

    pace, lines = 1, []  # now no form is left at the last length
    curves = bench_q1.device_curves(torch.device("cpu"), sizes, 1, leave_out=lines.append)
    assert [len(curve["points"]) for curve in curves] == [3] * 4 and not any("memory" in line for line in lines)
    assert sum("Taylor from L = 400 on; the length before took 200 ms" in line for line in lines) == 4

    late = bench_q1.device_curves(torch.device("cpu"), sizes, 1, lambda: -1.0, lines.append)
    assert not any(curve["points"] for curve in late) and "no time is left" in lines[-1]


def test_a_device_without_a_fused_kernel_still_tells_of_taylor_attention(monkeypatch):
    def softmax(*_):
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(bench_q1, "softmax", softmax)
    lines = []
    rows = bench_q1.device_agreement(torch.device("cpu"), [4], 30, lines.append)
    assert [(row["form"], row["dtype"]) for row in rows] == [
        (form, dtype) for dtype in ("float32", "bfloat16") for form in ("features", "direct")
    ]
    assert len(lines) == 2 and "No available kernel" in lines[0]
    assert all(max(row[name] for name in ("output", "q", "k", "v")) < 1e-5 for row in rows if row["dtype"] == "float32")
