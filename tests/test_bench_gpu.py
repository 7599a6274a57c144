"""The benchmark of all questions on a GPU, tried on the CPU: what it writes, when, and what it says."""

import importlib
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, caller

import runs

bench_gpu, bench_q2, gpu_q3 = (importlib.import_module(name) for name in ("bench_gpu", "bench_q2", "gpu_q3"))
COMMAND = [sys.executable, str(ROOT / "benchmarks" / "bench_gpu.py")]
ALONE = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # without a GPU, wherever this runs
NAMES = [(question, function.__name__) for question, function, _ in bench_gpu.PARTS]


@pytest.fixture
def bench(monkeypatch):
    """The benchmark on the CPU, and its main in this process; it changes global settings."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench_gpu, "STARTED", time.monotonic())
    return bench_gpu


@pytest.fixture
def main(bench, capsys):
    return caller(bench, capsys)


def test_a_quick_run_writes_part_after_part(tmp_path):
    path, seen = tmp_path / "gpu.json", []
    with subprocess.Popen([*COMMAND, "-quick", "-out", path], env=ALONE, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            if path.exists() and (names := [*bench_gpu.parts_of(json.loads(path.read_text()))]) not in seen:
                seen.append(names)
            time.sleep(0.02)
        printed = process.stdout.read()
    assert process.returncode == 0 and len(seen) > 3 and sorted(map(len, seen)) == [*map(len, seen)]
    record = json.loads(path.read_text())
    assert {"command", "config", "gpu", "versions", "hardware", "git", "date", "device", "seed"} <= record.keys()
    assert record["device"] == "cpu" and record["threads"] == 1 and record["gpu"] is None
    parts = bench_gpu.parts_of(record)
    assert sorted(parts) == sorted(name for _, name in NAMES)
    assert all("failed" not in part and part["seconds"] >= 0 for part in parts.values())
    assert {name for name, part in parts.items() if part["result"] is None} == {"default_run", "notebook"}
    assert all(part["left_out"] for part in parts.values() if part["result"] is None)
    assert "noise stands in" in parts["speech_training"]["left_out"][0]

    for row in parts["attention_agreement"]["result"]:
        assert max(row[name] for name in ("output", "q", "k", "v")) < {"float32": 1e-5, "bfloat16": 0.02}[row["dtype"]]
    assert len(parts["attention_curves"]["result"]) == 8
    loops = parts["training_loops"]["result"]
    assert [*loops["steps_per_second"]] == ["course", "ours", "ours, CUDA graphs"]
    assert loops["relative_difference"] < 1e-6
    assert parts["whole_run"]["result"]["epochs"] == 15 == len(parts["whole_run"]["result"]["losses"])
    speech = parts["speech_training"]["result"]
    assert speech["speech"] == "random" and [row["decoder"] for row in speech["rows"]] == ["lstm", "transformer"]
    assert speech["rows"][0]["speech_seconds_per_second"].keys() == {"2", "4"}
    assert min(parts["speech_decoding"]["result"]["characters"].values()) >= 0
    assert bench_gpu.table(record) in printed


def test_a_run_that_is_killed_keeps_what_it_had(tmp_path):
    path = tmp_path / "gpu.json"
    with subprocess.Popen([*COMMAND, "-quick", "-out", path], env=ALONE, stdout=subprocess.DEVNULL) as process:
        while not path.exists() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    parts = bench_gpu.parts_of(runs.read_json(path))
    assert "attention_agreement" in parts and len(parts) < len(NAMES)
    assert all(part["result"] for part in parts.values())


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    done = subprocess.run(COMMAND, env=ALONE, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == ("bench_gpu.py: PyTorch finds no CUDA device here (-quick tries this program on the CPU)\n")


def fake_parts(monkeypatch, **functions) -> None:
    def named(name, function):
        function.__name__ = name
        return function

    monkeypatch.setattr(bench_gpu, "PARTS", [(name[:2], named(name, f), 10) for name, f in functions.items()])


def test_questions_are_measured_alone_and_kept(main, bench, tmp_path, monkeypatch):
    path, calls = tmp_path / "gpu.json", []
    fake_parts(
        monkeypatch, q1_a=lambda b: calls.append("q1") or {"x": 1}, q2_a=lambda b: calls.append("q2") or {"x": 2}
    )
    assert main("-quick", "-q1", "-out", path)[0] == main("-quick", "-q2", "-out", path)[0] == 0
    record = json.loads(path.read_text())
    assert calls == ["q1", "q2"] and [record[q][f"{q}_a"]["result"]["x"] for q in ("q1", "q2")] == [1, 2]
    runs.write_json(path, record | {"versions": record["versions"] | {"torch": "1.0"}})
    assert main("-quick", "-q2", "-out", path)[0] == 0
    assert "q1" not in json.loads(path.read_text())  # of another PyTorch: no part of this record


def test_a_part_that_fails_leaves_the_others(main, bench, tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    fake_parts(monkeypatch, q1_a=lambda b: 1 / 0, q2_a=lambda b: b.leave_out("a size"))
    status, out, err = main("-quick", "-out", path)
    record = json.loads(path.read_text())
    assert status == 1 and "ZeroDivisionError" in err and "left out: a size" in out
    assert record["q1"]["q1_a"]["failed"] == "division by zero" and record["q2"]["q2_a"]["left_out"] == ["a size"]


def test_the_time_is_shared_out_and_kept(main, bench, tmp_path, monkeypatch):
    left = []
    fake_parts(monkeypatch, q1_a=lambda b: left.append(b.left()), q2_a=lambda b: left.append(b.left()))
    assert main("-quick", "-minutes", 1, "-out", tmp_path / "a.json")[0] == 0
    assert left == pytest.approx([30, 30], abs=1)  # of 60 seconds, half each
    bench.STARTED -= 59
    assert main("-quick", "-minutes", 1, "-out", tmp_path / "b.json")[0] == 0
    assert left[2:] == pytest.approx([1, 1], abs=0.5)
    bench.STARTED -= 2
    assert main("-quick", "-minutes", 1, "-out", tmp_path / "c.json")[0] == 0 and len(left) == 4
    late = json.loads((tmp_path / "c.json").read_text())
    assert late["q1"]["q1_a"]["left_out"] == late["q2"]["q2_a"]["left_out"] == ["no time is left"]


def test_the_table_shows_what_is_recorded():
    def point(length, taylor, softmax=None):
        return {"length": length, "ms": {"Taylor": taylor} | ({} if softmax is None else {"softmax, fused": softmax})}

    about = {"heads": 16, "backward": False, "dim": 64, "dtype": "float32"}
    curves = [
        about | {"points": [point(1024, 2, 1), point(2048, 3, 4), point(4096, 5)], "crossover": 1500.4},
        about | {"backward": True, "points": [point(1024, 2, 3)], "crossover": None},
        about | {"dtype": "bfloat16", "points": [point(1024, 2, 1)], "crossover": None},
        about | {"dim": 16, "points": [], "crossover": None},
    ]
    record = {
        "gpu": {"name": "NVIDIA H100"},
        "config": bench_gpu.FULL,
        "q1": {"attention_curves": {"result": curves}},
        "q2": {
            "whole_run": {"result": {"epochs": 15, "scans": 97477, "seconds": [2.0] * 15}},
            "default_run": {"result": {"cpu": {"test_accuracy": 0.9}, "cuda": {"test_accuracy": 0.91}}},
            "training_loops": {"failed": "out of memory"},
        },
        "q3": {"notebook": {"result": {"lstm": {"cpu": {"similarity": 0.98}, "cuda": {"similarity": 0.975}}}}},
    }
    attention = "1: ms of attention"
    rows = {
        "question": "NVIDIA H100",
        "---": "---",
        f"{attention}, float32, forward, L = 2,048": "Taylor: 3; softmax, fused: 4; Taylor faster from L = 1,500 on",
        f"{attention}, float32, with backward, L = 1,024": "Taylor: 2; softmax, fused: 3; Taylor faster at all lengths",
        f"{attention}, bfloat16, forward, L = 1,024": "Taylor: 2; softmax, fused: 1; Taylor not faster",
        "2: 15 epochs of 97,477 phantoms": "30 s",
        "2: test accuracy of the default run, phantoms": "cpu: 0.9000; cuda: 0.9100",
        "3: validation similarity, lstm": "cpu: 0.980; cuda: 0.975",
    }
    lines = [f"| {what} | {value} |" for what, value in rows.items()]
    assert bench_gpu.table(record) == "\n".join(lines).replace("| --- | --- |", "|---|---|")
    assert bench_gpu.table({"gpu": None, "config": bench_gpu.QUICK}) == "| question | no GPU |\n|---|---|"


def test_the_default_run_stands_beside_the_recorded_one(bench, q2, monkeypatch):
    recorded = json.loads((ROOT / "results/q2/phantom-homework/maxpool-lr0.01-seed42/record.json").read_text())
    data = SimpleNamespace(description=recorded["dataset"])
    monkeypatch.setattr(bench.utils, "load_phantoms", lambda: data)
    monkeypatch.setattr(bench.q2, "train", lambda config, *_: recorded | {"device": "cuda", "seconds": 5.0})
    scores = bench.default_run(bench.Bench(quick=False))
    assert scores["cpu"]["test_accuracy"] == scores["cuda"]["test_accuracy"] == recorded["test"]["accuracy"]
    assert [scores[name]["seconds"] for name in ("cpu", "cuda")] == [recorded["seconds"], 5.0]
    data.description = {"name": "other phantoms"}
    assert [*bench.default_run(bench.Bench(quick=False))] == ["cuda"]


def test_stacked_networks_learn_as_each_alone(q2):
    rates = (0.1, 0.02)
    torch.manual_seed(0)
    models = [q2.CNN(0.0) for _ in rates]
    parameters, step = bench_q2.stacked_step(models, torch.tensor(rates))
    x, y = torch.rand(2, 8, 1, 28, 28), torch.randint(4, (2, 8))
    for _ in range(3):
        losses = step(x, y)
        for i, (model, rate) in enumerate(zip(models, rates, strict=True)):
            optimizer = torch.optim.SGD(model.parameters(), lr=rate)
            alone = q2.train_batch(x[i], y[i], model, optimizer, torch.nn.NLLLoss())
            torch.testing.assert_close(losses[i], alone)
    for i, model in enumerate(models):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameters[name][i], parameter)


def test_a_run_short_of_time_makes_fewer_epochs(monkeypatch):
    lines, left = [], iter([1e9, 1e9, 0.0])
    result = bench_q2.timed_run("cpu", 80, lambda: next(left), lines.append)
    assert result["epochs"] == len(result["losses"]) == 3 and lines == ["12 of 15 epochs; no time is left"]


@pytest.mark.parametrize("error", [ImportError("No module named 'hibari_tts'"), runs.InputError("no voice")])
def test_noise_stands_in_where_nothing_speaks(monkeypatch, error):
    def fail(*_):
        raise error

    lines = []
    monkeypatch.setattr(gpu_q3.utils, "load_speech", fail)
    speech = gpu_q3.load(5, False, lines.append)
    assert speech.kind == "random" and lines == [f"the spoken corpus, for which noise stands in; {error}"]
    seconds = [clip.seconds for clip in speech.features]
    assert len(seconds) == 5 and seconds == sorted(seconds) and min(seconds) >= 2 and max(seconds) <= 10
    mels = {features.shape[1] for features in speech.features.values()}
    assert len(mels) == 1 and all(len(features) > 80 for features in speech.features.values())


def test_a_decoder_that_finds_no_memory_is_left_out(monkeypatch):
    speech = gpu_q3.load(2, True, lambda line: None)

    def costs(forms, rounds):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    lines = []
    monkeypatch.setattr(gpu_q3, "device_costs", costs)
    result = gpu_q3.training_speed(speech, "cpu", [2], 1, lambda: 1.0, lines.append)
    assert result["rows"] == [] and len(lines) == 2 and "lstm decoder in float32; CUDA out of memory" in lines[0]
    gpu_q3.training_speed(speech, "cpu", [2], 1, lambda: -1.0, lines.append)
    assert lines[2:] == [f"training of the {d} decoder in float32; no time is left" for d in gpu_q3.DECODERS]


def test_the_notebooks_scores_stand_beside_the_recorded_ones(tmp_path, monkeypatch):
    def record(decoder, device, similarity, seed=42):
        about = {"config": {"decoder": decoder, "epochs": 8}, "dataset": {"name": "spoken corpus"}, "seed": seed}
        return about | {"device": device, "seconds": 60.0, "val": {"damerau_levenshtein": similarity}}

    def papermill(command, timeout, **_):
        words = list(map(str, command))
        assert words[words.index("data") - 1 : words.index("data") + 2] == ["-p", "data", "spoken"] and timeout == 50
        runs.write_json(tmp_path / "runs" / "gpu-q3" / "run-lstm" / "record.json", record("lstm", "cuda", 0.97))

    monkeypatch.setattr(gpu_q3, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_q3.subprocess, "run", papermill)
    for i, recorded in enumerate([record("lstm", "cpu", 0.98), record("lstm", "cpu", 0.5, seed=43), {"odd": 1}]):
        runs.write_json(tmp_path / "results" / "q3" / f"{i}.json", recorded)
    found = gpu_q3.similarity(tmp_path / "results", 50.0, print)
    assert {device: row["similarity"] for device, row in found["lstm"].items()} == {"cpu": 0.98, "cuda": 0.97}

    def slow(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    lines = []
    monkeypatch.setattr(gpu_q3.subprocess, "run", slow)
    assert gpu_q3.similarity(tmp_path / "results", 50.0, lines.append) is None
    assert lines == ["the notebook did not finish in time; it goes on with -q3 -minutes 15"]
