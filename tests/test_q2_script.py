"""hw2-q2.py as people run it: flags, files, stops in the middle, damaged files, bad input."""

import dataclasses
import errno
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import filelock
import joblib
import numpy as np
import pytest
import torch
from conftest import REAL_SCANS, ROOT, needs_real_scans, tree
from PIL import Image

import runs
import utils
from offline_data import phantoms

QUICK = ("-epochs", 2, "-device", "cpu")


def assert_one_line(status: int, err: str, *parts: object) -> None:
    """Status 2, and one line on stderr that has all the parts."""
    assert status == 2 and err.count("\n") == 1 and "Traceback" not in err, err
    assert len(err) < 600 and all(str(part) in err for part in parts), err


def test_a_run_leaves_record_figures_and_checkpoints(run_script, small_npz, tmp_path):
    done = run_script("-data", small_npz, *QUICK)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar where there is no terminal
    folder = tmp_path / "runs" / "q2-small-homework-maxpool-lr0.01-seed42-epochs2"
    assert "224,892 parameters" in done.stdout and str(folder.relative_to(tmp_path)) in done.stdout
    figures = [f"{name}.{kind}" for name in ("confusion", "curves", "predictions") for kind in ("png", "svg")]
    assert sorted(tree(folder)) == sorted([".lock", "best.pt", "last.pt", "record.json", *figures])
    record = json.loads((folder / "record.json").read_text())
    for key in ("command", "config", "dataset", "history", "test", "seed", "seconds", "device", "threads", "versions"):
        assert key in record
    assert record["command"].startswith("python ") and "-epochs 2" in record["command"]
    assert len(record["history"]) == 2 and record["num_parameters"] == 224_892
    assert record["test"]["num_examples"] == 40 and "test_course_subset" not in record
    assert np.array(record["test"]["confusion"]).sum() == 40
    for name in figures[::2]:
        with Image.open(folder / name) as image:
            assert min(image.size) > 400

    # The same command again touches nothing; elsewhere it gives the same numbers.
    before = tree(folder)
    again = run_script("-data", small_npz, *QUICK)
    assert_one_line(again.returncode, again.stderr, "already holds files", "-resume")
    assert tree(folder) == before
    assert run_script("-data", small_npz, *QUICK, "-out", "again").returncode == 0
    assert numbers(tmp_path / "again") == numbers(folder)


def numbers(folder) -> dict:
    """A run's record without what may differ from one run to the next, and its best weights."""
    record = json.loads((folder / "record.json").read_text())
    for key in ("command", "date", "seconds", "git"):
        del record[key]
    weights = torch.load(folder / "best.pt", weights_only=True)["network"]
    return record | {"weights": {name: w.numpy().tobytes() for name, w in weights.items()}}


def test_the_picture_of_predictions_says_what_was_answered(q2, small_arrays, tmp_path):
    images, labels = small_arrays["test_images"], small_arrays["test_labels"][:, 0]
    probabilities = np.random.default_rng(0).dirichlet(np.ones(4), len(images))
    record = {"config": dataclasses.asdict(q2.RECIPES["homework"]), "dataset": {"kind": "real", "name": "small"}}
    q2.plot_predictions(record, images, labels, probabilities, tmp_path / "predictions")
    # Matplotlib writes text as outlines, with each line of the text as a comment.
    drawn = (tmp_path / "predictions.svg").read_text()
    titles = re.findall(r"<!-- (\w+)(, taken for)? -->.*?<!-- ([✓✗]) (\w+) (\d+)% -->", drawn, flags=re.DOTALL)
    shown = np.concatenate([np.flatnonzero(labels == label)[:6] for label in range(4)])
    assert len(titles) == len(shown) == 24
    for (name, wrong, mark, answer, percent), label, row in zip(
        titles, labels[shown], probabilities[shown], strict=True
    ):
        assert name == q2.SHORT_NAMES[label] and answer == q2.SHORT_NAMES[row.argmax()]
        assert bool(wrong) == (mark == "✗") == (row.argmax() != label) and int(percent) == round(100 * row.max())
    with Image.open(tmp_path / "predictions.png") as picture:
        assert min(picture.size) > 900


def test_a_line_says_why_validation_and_test_accuracy_differ(call_main, small_arrays, tmp_path):
    np.savez(tmp_path / "natural.npz", **small_arrays)  # its test split has as many scans of each class
    alike = {f"test_{part}": small_arrays[f"val_{part}"][::-1] for part in ("images", "labels")}
    np.savez(tmp_path / "alike.npz", **small_arrays | alike)
    record = {}
    for name in ("natural", "alike"):
        status, out, _ = call_main("-data", tmp_path / f"{name}.npz", *QUICK, "-out", tmp_path / name)
        record = json.loads((tmp_path / name / "record.json").read_text())
        assert status == 0 and ("mix the classes differently" in out) == (name == "natural")
        if name == "natural":
            for metric in ("accuracy", "balanced_accuracy"):
                assert f"({record['val'][metric]:.2f} and {record['test'][metric]:.2f})" in out


def test_phantoms_say_so_everywhere(call_main, small_arrays, tmp_path, monkeypatch):
    monkeypatch.setattr(phantoms, "oct_phantoms", lambda: small_arrays)
    monkeypatch.setattr(utils, "download_octmnist", lambda data_dir: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    status, out, _ = call_main("-data", "auto", *QUICK)
    assert status == 0
    assert "PHANTOMS" in out and "No score below is a score on OCTMNIST" in out and "test (phantom" in out
    (folder,) = (tmp_path / "runs").iterdir()
    assert "phantom" in folder.name
    assert json.loads((folder / "record.json").read_text())["dataset"]["kind"] == "phantom"
    # Matplotlib writes text as outlines, with the text itself as a comment.
    for name in ("curves", "confusion", "predictions"):
        assert "PHANTOMS, no real scans" in (folder / f"{name}.svg").read_text()


def test_octmnist_without_a_network_explains_and_fails(run_script, tmp_path):
    environment = os.environ | {"HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9"}
    started = time.monotonic()
    done = run_script("-data", "octmnist", env=environment)
    assert time.monotonic() - started < 40  # most of it is importing
    assert done.returncode == 2
    assert len(done.stderr.strip().split("\n")) == 1
    for part in (utils.OCTMNIST_URL, utils.OCTMNIST_MD5, "data/octmnist.npz"):
        assert part in done.stderr
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------------------
# Stops and resumes


def start_and_kill(arguments, cwd, when) -> None:
    """Start the real script and kill -9 it as soon as `when()` is true."""
    command = [sys.executable, str(ROOT / "hw2-q2.py"), *map(str, arguments)]
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not when():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()


def test_a_run_killed_twice_ends_with_the_same_numbers(run_script, small_npz, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = ["-data", small_npz, "-epochs", 20]
    assert run_script(*arguments, "-out", whole).returncode == 0

    def epochs_done():
        path = killed / "last.pt"
        return len(torch.load(path, weights_only=True)["history"]) if path.exists() else 0

    start_and_kill([*arguments, "-out", killed], tmp_path, when=lambda: epochs_done() >= 1)
    first_stop = epochs_done()
    start_and_kill([*arguments, "-out", killed, "-resume"], tmp_path, when=lambda: epochs_done() > first_stop + 1)
    second_stop = epochs_done()
    assert 1 <= first_stop < second_stop < 20 and not (killed / "record.json").exists()

    done = run_script(*arguments, "-out", killed, "-resume")
    assert done.returncode == 0, done.stderr
    assert f"epoch {second_stop + 1:3d}" in done.stdout and f"epoch {second_stop:3d} " not in done.stdout
    assert numbers(killed) == numbers(whole)
    # Finished: one more -resume changes nothing.
    before = tree(killed)
    assert "finished" in run_script(*arguments, "-out", killed, "-resume").stdout
    assert tree(killed) == before


class PowerCut(BaseException):
    """Ends the run at once, as a kill would: nothing in the code under test catches it."""


@pytest.mark.parametrize(
    "flags",
    [
        ["-recipe", "homework"],
        ["-recipe", "strong"],
    ],
)
def test_a_stop_at_any_write_is_mended_by_resume(call_main, small_npz, tmp_path, monkeypatch, flags):
    """The process dies before, during or after a write, from the first file of a run to the last."""
    arguments = ["-data", small_npz, "-epochs", 2, *flags]
    assert call_main(*arguments, "-out", tmp_path / "whole")[0] == 0
    expected = numbers(tmp_path / "whole")
    real_write, stops = runs.write_whole, 0
    while True:
        out, left = tmp_path / f"stop{stops}", iter(range(stops, -1, -1))

        def write_whole(path, content, left=left):
            part = path.with_name(f".{path.name}.77.part")
            for moment in ("before", "during", "after"):
                if moment == "after":
                    real_write(path, content)
                if next(left, None) == 0:
                    if moment == "during":
                        part.write_bytes(b"half a file")
                    raise PowerCut

        for module in (runs, utils):
            monkeypatch.setattr(module, "write_whole", write_whole)
        try:
            status, _, _ = call_main(*arguments, "-out", out)
        except PowerCut:
            status = None
        for module in (runs, utils):
            monkeypatch.setattr(module, "write_whole", real_write)
        if status == 0:
            break
        assert call_main(*arguments, "-out", out, *(["-resume"] if out.exists() else []))[0] == 0
        assert numbers(out) == expected, stops
        assert not list(out.glob("*.part"))
        stops += 7  # 7 and the 3 moments have no common factor: each is met
    assert stops > 27  # last.pt for two epochs, best.pt, six figures and the record, three moments each


def test_resume_refuses_another_run(call_main, small_npz, tmp_path):
    out = tmp_path / "run"
    assert call_main("-data", small_npz, "-out", out, *QUICK)[0] == 0
    before = tree(out)
    for change in (["-no_maxpool"], ["-seed", 1], ["-learning_rate", 0.1], ["-recipe", "strong"], ["-epochs", 3]):
        status, _, err = call_main("-data", small_npz, "-out", out, *QUICK, "-resume", *change)
        assert status == 2 and "cannot resume, it holds a run with another config" in err and err.count("\n") == 1
        assert tree(out) == before
    np.savez(tmp_path / "other.npz", **phantoms.oct_phantoms(60, 30, 8))
    status, _, err = call_main("-data", tmp_path / "other.npz", "-out", out, *QUICK, "-resume")
    assert status == 2 and "another dataset" in err
    assert tree(out) == before


def test_a_second_process_does_not_train_the_same_run(call_main, small_npz, tmp_path):
    out = tmp_path / "run"
    assert call_main("-data", small_npz, "-out", out, *QUICK)[0] == 0
    (out / "record.json").unlink()
    with runs.lock_folder(out):
        (out / ".last.pt.1.part").write_bytes(b"being written")
        before = tree(out)
        status, _, err = call_main("-data", small_npz, "-out", out, *QUICK, "-resume")
    assert status == 2 and str(out) in err and "another process" in err and err.count("\n") == 1
    assert tree(out) == before
    assert call_main("-data", small_npz, "-out", out, *QUICK, "-resume")[0] == 0
    assert (out / "record.json").exists() and not (out / ".last.pt.1.part").exists()


# ---------------------------------------------------------------------------------------------------
# The grid


def test_a_grid_chooses_on_validation_and_links_its_runs(run_script, small_npz, tmp_path):
    arguments = ["-data", small_npz, "-grid", "-seeds", 1, 2, *QUICK]
    done = run_script(*arguments, "-jobs", 2)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "q2-small-homework-grid"
    grid = json.loads((folder / "grid.json").read_text())
    pooled = [row for row in grid["settings"] if row["network"] == "maxpool"]
    assert [row["learning_rate"] for row in pooled] == [0.1, 0.01, 0.001]
    means = {row["learning_rate"]: row["val_accuracy"]["mean"] for row in pooled}
    assert means[grid["chosen_rate"]] == max(means.values())
    (strided,) = (row for row in grid["settings"] if row["network"] == "no_maxpool")
    assert strided["learning_rate"] == grid["chosen_rate"]
    for row in grid["settings"]:
        runs = [json.loads((folder / run).read_text()) for run in row["runs"]]
        assert [run["seed"] for run in runs] == [1, 2]
        assert all(run["config"]["no_maxpool"] == (row["network"] == "no_maxpool") for run in runs)
        for split, metric in (("val", "accuracy"), ("test", "balanced_accuracy")):
            values = [run[split][metric] for run in runs]
            assert row[f"{split}_{metric}"]["mean"] == pytest.approx(sum(values) / 2)
            assert row[f"{split}_{metric}"]["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert (folder / "grid.png").exists() and "chosen" in done.stdout

    # A run of the grid is the run that the script makes alone.
    chosen = grid["chosen_rate"]
    alone = run_script("-data", small_npz, *QUICK, "-seed", 2, "-learning_rate", chosen, "-no_maxpool", "-out", "alone")
    assert alone.returncode == 0, alone.stderr
    assert numbers(tmp_path / "alone") == numbers((folder / strided["runs"][1]).parent)

    # Stopped before its end, it goes on: only what is missing is trained.
    (folder / "grid.json").unlink()
    lost = folder / strided["runs"][0]
    lost.unlink()
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("record.json")}
    assert run_script(*arguments, "-resume").returncode == 0
    assert lost.exists() and all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    repeated = json.loads((folder / "grid.json").read_text())
    assert grid["wall_seconds"] > 0 and repeated["wall_seconds"] is None  # it was not made in one go
    for row in grid["settings"] + repeated["settings"]:
        del row["seconds"]
    assert repeated["settings"] == grid["settings"]

    # Finished, it is shown and not touched; another grid does not get its folder.
    before = tree(folder)
    assert "holds this grid, finished" in run_script(*arguments, "-resume").stdout
    refused = run_script("-data", small_npz, "-grid", "-seeds", 3, *QUICK, "-out", folder, "-resume")
    assert refused.returncode == 2 and "another seeds" in refused.stderr
    assert tree(folder) == before


@pytest.mark.parametrize("diverging", [None, 0.1])
@pytest.mark.parametrize("jobs", [1, 7])
def test_the_no_maxpool_runs_follow_the_chosen_rate(q2, tmp_path, monkeypatch, small_arrays, jobs, diverging):
    """A rate that diverges loses, and the order in which runs end does not matter."""
    scores = {0.1: 0.5, 0.01: 0.4, 0.001: 0.9}  # the last rate wins, after the first had led

    def fake_train(config, *_):
        if config.learning_rate == diverging:
            return config, None
        accuracy = 0.0 if config.no_maxpool else scores[config.learning_rate]
        metrics = dict.fromkeys(("accuracy", "balanced_accuracy", "macro_auc"), accuracy)
        return config, {"val": metrics, "test": metrics, "seconds": 1.0, "history": []}

    monkeypatch.setattr(q2, "train_in_grid", fake_train)
    monkeypatch.setattr(q2, "draw_grid", lambda *_: None)
    monkeypatch.setattr(joblib, "Parallel", partial(joblib.Parallel, backend="threading"))
    data = utils.OctData("small", "phantom", utils.check_oct_arrays(small_arrays, "small"))
    record = q2.run_grid(q2.RECIPES["homework"], [5], data, tmp_path, torch.device("cpu"), jobs, resume=False)
    assert record["chosen_rate"] == 0.001
    assert record["settings"][-1]["runs"] == ["no_maxpool-lr0.001-seed5/record.json"]
    assert [row["diverged"] for row in record["settings"]] == [int(diverging == 0.1), 0, 0, 0]


def test_among_equal_rates_the_first_is_chosen_whichever_run_ends_first(q2):
    configs = [dataclasses.replace(q2.RECIPES["homework"], learning_rate=rate) for rate in (0.001, 0.01, 0.1)]
    done = [(config, {"val": {"accuracy": 0.5}}) for config in configs]
    assert q2.best_rate(done, "homework") == q2.best_rate(done[::-1], "homework") == 0.1


def children(pid: int) -> list[int]:
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def workers(pid: int) -> list[int]:
    """The processes of a grid, without the one of joblib that watches its files."""
    return [child for child in children(pid) if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes()]


def start_grid(small_npz, tmp_path):
    """A grid that takes minutes, when both of its processes train."""
    command = [sys.executable, ROOT / "hw2-q2.py", "-data", small_npz, "-grid", "-epochs", "4000", "-out", "grid"]
    process = subprocess.Popen(
        list(map(str, command)), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: len(list(tmp_path.glob("grid/*/last.pt"))) == 2, 120)
    assert len(workers(process.pid)) == 2
    return process


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts processes in Linux's way")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_processes_of_a_grid_end_with_it(small_npz, tmp_path, how):
    process = start_grid(small_npz, tmp_path)
    trained = workers(process.pid)
    process.send_signal(how)
    process.wait(10)
    process.stderr.close()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in trained), 5)
    for folder in tmp_path.glob("grid/*/"):
        with runs.lock_folder(folder):  # raises if a process still holds it
            pass


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts processes in Linux's way")
def test_a_grid_says_that_a_process_of_it_was_killed(small_npz, tmp_path):
    process = start_grid(small_npz, tmp_path)
    os.kill(workers(process.pid)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "a process of the grid was killed" in err and "-resume" in err
    assert "Traceback" not in err


def test_an_interrupted_process_of_its_own_does_not_end_with_its_parent(tmp_path):
    """With -jobs 1 a grid trains in the process that was started, which may well outlive its shell."""
    code = "import os, time, runs; runs.end_with(os.getpid()); time.sleep(1.5); print('alive')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "alive\n"


# ---------------------------------------------------------------------------------------------------
# Using a trained network


@pytest.fixture(scope="module")
def trained_once(q2, small_arrays, tmp_path_factory):
    """The folder of a run on a few phantoms."""
    folder = tmp_path_factory.mktemp("trained")
    np.savez(folder / "small.npz", **small_arrays)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(utils.STYLE, "savefig.dpi", 20)  # as in `call_main`
        assert q2.main(["-data", str(folder / "small.npz"), "-out", str(folder / "trained"), *map(str, QUICK)]) == 0
    return folder / "trained"


@pytest.fixture
def trained(trained_once, tmp_path):
    """The best.pt of a copy of that run."""
    shutil.copytree(trained_once, tmp_path / "trained", ignore=shutil.ignore_patterns(".lock"))
    return tmp_path / "trained" / "best.pt"


def test_predict_prints_the_networks_probabilities(call_main, q2, trained, small_arrays, tmp_path):
    for i in range(2):
        Image.fromarray(small_arrays["test_images"][i]).convert("RGB").save(tmp_path / f"scan{i}.png")
    status, out, err = call_main("-predict", tmp_path / "scan0.png", tmp_path / "scan1.png", "-checkpoint", trained)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[1].split() == ["file", *q2.SHORT_NAMES, "answer"]
    rows = [line.split() for line in lines if ".png" in line]
    model, _ = q2.load_network(trained, torch.device("cpu"))
    expected = q2.predict(model, torch.from_numpy(small_arrays["test_images"][:2]))
    for row, probabilities in zip(rows, expected, strict=True):
        np.testing.assert_allclose([float(value) for value in row[1:5]], probabilities, atol=6e-5)
        assert row[5:] == [q2.SHORT_NAMES[probabilities.argmax()]]


@needs_real_scans
def test_predict_takes_the_full_size_originals_and_the_network_in_weights(call_main):
    originals = sorted((REAL_SCANS / "originals").iterdir())
    status, out, _ = call_main("-predict", *originals)
    assert status == 0 and "trained on OCT phantoms (phantom)" in out
    for path in originals:
        (line,) = (line for line in out.splitlines() if line.startswith(str(path)))
        values = [float(value) for value in re.findall(r"\d\.\d{4}", line.removeprefix(str(path)))]
        assert len(values) == 4 and sum(values) == pytest.approx(1, abs=3e-4)


def test_the_network_in_weights_is_the_recorded_one(q2):
    """It is small, it says what it was trained on, and its scores on the phantoms are those of its record."""
    assert q2.WEIGHTS.stat().st_size < 1e6
    model, content = q2.load_network(q2.WEIGHTS, torch.device("cpu"))
    config = content["config"]
    folder = ROOT / "results" / "q2" / "phantom-strong"
    record = json.loads((folder / f"{q2.run_name(q2.Config(**config))}" / "record.json").read_text())
    assert (config, content["dataset"]) == (record["config"], record["dataset"])
    data = utils.load_oct("phantom")
    assert q2.evaluate(model, *map(torch.from_numpy, data.splits["test"])) == record["test"]


def test_an_exported_network_predicts_the_same_and_is_checked(call_main, q2, trained, small_arrays, tmp_path):
    path = tmp_path / "mine.safetensors"
    assert call_main("-export", path, "-checkpoint", trained)[0] == 0
    images = torch.from_numpy(small_arrays["test_images"])
    networks = [q2.load_network(file, torch.device("cpu")) for file in (trained, path)]
    np.testing.assert_array_equal(*(q2.predict(model, images) for model, _ in networks))
    for key in ("config", "dataset", "best_epoch"):
        assert networks[0][1][key] == networks[1][1][key]
    assert torch.equal(*(content["trained_on_digests"] for _, content in networks))
    status, _, err = call_main("-export", path, "-checkpoint", trained)
    assert_one_line(status, err, path, "is there already")
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for place in rng.integers(0, len(whole), 40):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(utils.InputError, match="damaged"):
            q2.load_network(path, torch.device("cpu"))


def test_evaluate_scores_a_network_on_other_scans(call_main, q2, trained, tmp_path):
    other = phantoms.oct_phantoms(60, 30, 20, seed=5)
    np.savez(tmp_path / "other.npz", **other)
    arguments = ("-evaluate", "-checkpoint", trained, "-out", tmp_path / "scores.json")
    status, out, _ = call_main(*arguments, "-data", tmp_path / "other.npz")
    assert status == 0 and "test (20 scans)" in out
    assert ", all (" not in out  # real scans may be of the patients that the network was trained on
    record = json.loads((tmp_path / "scores.json").read_text())
    model, _ = q2.load_network(trained, torch.device("cpu"))
    labels = torch.from_numpy(other["test_labels"][:, 0].astype(np.int64))
    expected = q2.evaluate(model, torch.from_numpy(other["test_images"]), labels)
    assert record["test"]["runs"] == [expected]
    assert record["test"]["accuracy"] == {"mean": expected["accuracy"], "std": None}


def test_evaluate_never_scores_a_scan_that_was_trained_or_chosen_on(call_main, trained, small_arrays, tmp_path):
    """Whatever the name, the split and the number of the scans."""
    mixed = dict(small_arrays)
    for i, split in enumerate(("train", "val")):
        for part in ("images", "labels"):
            mixed[f"test_{part}"] = np.concatenate([mixed[f"test_{part}"], small_arrays[f"{split}_{part}"][i:]])
    np.savez(tmp_path / "mixed.npz", **mixed)
    status, out, _ = call_main("-evaluate", "-checkpoint", trained, "-data", tmp_path / "mixed.npz")
    assert status == 0
    assert "test: 262 of 302 scans left out" in out and "test (40 scans)" in out and ", all" not in out
    # last.pt, of which the best network can be used as well, knows them, too.
    last = trained.with_name("last.pt")
    assert "test (40 scans)" in call_main("-evaluate", "-checkpoint", last, "-data", tmp_path / "mixed.npz")[1]
    # All scans of a set are scored where they are real and the network has met phantoms alone.
    content = torch.load(trained, weights_only=True)
    content["dataset"]["kind"] = "phantom"
    runs.save_checkpoint(trained, content)
    status, out, _ = call_main("-evaluate", "-checkpoint", trained, "-data", tmp_path / "mixed.npz")
    assert status == 0 and "all (40 scans)" in out  # each of the 565 others was trained or chosen on
    for part in ("images", "labels"):
        mixed[f"test_{part}"] = small_arrays[f"train_{part}"]
    np.savez(tmp_path / "seen.npz", **mixed)
    status, _, err = call_main("-evaluate", "-checkpoint", trained, "-data", tmp_path / "seen.npz")
    assert_one_line(status, err, "no test scan is left")


def test_evaluate_refuses_networks_that_have_no_common_mean(call_main, q2, trained, small_npz):
    for others, message in [
        ([q2.WEIGHTS], "no common mean"),
        ([trained.parent / "." / "best.pt"], "every network once"),
    ]:
        status, _, err = call_main("-evaluate", "-data", small_npz, "-checkpoint", trained, *others)
        assert_one_line(status, err, message)


def test_figures_are_drawn_again_from_the_record_alone(call_main, trained, tmp_path):
    status, _, _ = call_main("-draw", trained.with_name("record.json"), "-out", tmp_path / "figures")
    assert status == 0
    for name in ("curves", "confusion"):
        drawn = (tmp_path / "figures" / f"trained-{name}.svg").read_bytes()
        assert drawn == trained.with_name(f"{name}.svg").read_bytes()


# ---------------------------------------------------------------------------------------------------
# What a kill, another run or a damaged disk leaves


def test_a_run_killed_before_its_first_checkpoint_starts_anew(call_main, small_npz, tmp_path):
    for resume in ([], ["-resume"]):
        out = tmp_path / f"run{len(resume)}"
        out.mkdir()
        (out / ".lock").touch()
        (out / ".last.pt.4711.part").write_bytes(b"half a checkpoint")
        assert call_main("-data", small_npz, "-out", out, *QUICK, *resume)[0] == 0
        assert (out / "record.json").exists() and not list(out.glob("*.part"))


def test_a_grid_killed_early_goes_on(call_main, small_npz, tmp_path):
    for name in ("maxpool-lr0.1-seed1", "maxpool-lr0.01-seed1"):
        (tmp_path / "grid" / name).mkdir(parents=True)
        (tmp_path / "grid" / name / ".lock").touch()
    arguments = ("-data", small_npz, "-grid", "-seeds", 1, "-epochs", 1, "-jobs", 1, "-out", tmp_path / "grid")
    assert call_main(*arguments, "-resume")[0] == 0
    assert len(list((tmp_path / "grid").glob("*/record.json"))) == 4


def test_resume_leaves_files_alone_that_merely_look_like_ours(call_main, small_npz, trained):
    mine = [".my.notes", ".thesis.pt", ".last.pt", "..part", ".last.pt.old.part", "notes.json.12.part"]
    for name in mine:
        (trained.parent / name).write_text("mine")
    (trained.parent / "record.json").unlink()
    assert call_main("-data", small_npz, "-out", trained.parent, *QUICK, "-resume")[0] == 0
    assert all((trained.parent / name).read_text() == "mine" for name in mine)


def test_a_lost_best_pt_is_made_again_from_last_pt(call_main, small_npz, trained):
    expected = numbers(trained.parent)
    trained.unlink()
    (trained.parent / "record.json").unlink()
    assert call_main("-data", small_npz, "-out", trained.parent, *QUICK, "-resume")[0] == 0
    assert numbers(trained.parent) == expected


@pytest.mark.parametrize("damage", ["empty", "cut off", "a folder"])
def test_a_damaged_best_pt_is_made_again_from_last_pt(call_main, small_npz, trained, damage):
    expected, whole = numbers(trained.parent), trained.read_bytes()
    trained.unlink()
    if damage == "a folder":
        trained.mkdir()
        status, _, err = call_main("-data", small_npz, "-out", trained.parent, *QUICK, "-resume")
        assert_one_line(status, err, "best.pt")
        return
    trained.write_bytes(whole[:3000] if damage == "cut off" else b"")
    assert call_main("-data", small_npz, "-out", trained.parent, *QUICK, "-resume")[0] == 0
    assert numbers(trained.parent) == expected


def test_a_pipe_in_the_place_of_a_record_is_not_waited_for(call_main, small_npz, trained):
    record = trained.with_name("record.json")
    record.unlink()
    os.mkfifo(record)
    for arguments in (["-data", small_npz, "-out", trained.parent, *QUICK, "-resume"], ["-draw", record]):
        status, _, err = call_main(*arguments)
        assert_one_line(status, err, record, "not a file")


def test_the_last_pt_of_another_run_is_not_taken(call_main, small_npz, trained, tmp_path):
    out = tmp_path / "other"
    out.mkdir()
    shutil.copy(trained.with_name("last.pt"), out)
    for change in (["-seed", 1], ["-no_maxpool"], ["-recipe", "strong"]):
        status, _, err = call_main("-data", small_npz, *QUICK, *change, "-out", out, "-resume")
        assert_one_line(status, err, out / "last.pt", "another config")
    assert list(tree(out)) == [".lock", "last.pt"]


DAMAGES = {  # of the content of a checkpoint
    "no history": {"history": []},
    "a history of another type": {"history": "2 epochs"},
    "an epoch too few": {"history": [{"epoch": 2, "val_accuracy": 0.5, "val_loss": 1.0}]},
    "epochs without scores": {"history": [{"epoch": 1}, {"epoch": 2}]},
    "seconds of another type": {"seconds": [1]},
    "seconds that are no number": {"seconds": math.nan},
    "a loss that is no number": {"history": [{"epoch": 1, "val_accuracy": 0.5, "val_loss": math.nan}]},
    "a tensor in the history": {"history": [{"epoch": 1, "val_accuracy": torch.ones(2), "val_loss": 1.0}]},
    "a tensor in the config": {"config": {"epochs": torch.ones(3)}},
    "no random state": {"random": {}},
    "a random state of another size": {"random": {"cpu": torch.zeros(3, dtype=torch.uint8)}},
    "a random state of another type": {"random": {"cpu": 5}},
    "a model of another size": {"model": {"conv1.weight": torch.zeros(1)}},
    "a model of another type": {"model": 3},
    "a network of another type": {"network": None},
    "a config of another type": {"config": 7},
    "a dataset of another type": {"dataset": []},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_last_pt_gets_one_line(call_main, small_npz, trained, damage):
    last = trained.with_name("last.pt")
    runs.save_checkpoint(last, torch.load(last, weights_only=True) | DAMAGES[damage])
    (trained.parent / "record.json").unlink()
    before = tree(trained.parent)
    status, _, err = call_main("-data", small_npz, "-out", trained.parent, *QUICK, "-resume")
    assert_one_line(status, err, last)
    assert tree(trained.parent) == before | {".lock": b""}


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"{", b'"text"', b"\xff\xfe", b'{"config": 3}', b'{"config": {}}', "types"]
)
def test_a_damaged_record_gets_one_line_and_stops_no_other_run(call_main, small_npz, trained, content):
    path = trained.with_name("record.json")
    if content == "types":  # of the right run, but its scores are none
        content = json.dumps(json.loads(path.read_text()) | {"test": 5, "val": None}).encode()
    path.write_bytes(content)
    before = tree(trained.parent)
    for arguments in (["-data", small_npz, "-out", trained.parent, *QUICK, "-resume"], ["-draw", path]):
        status, _, err = call_main(*arguments)
        assert_one_line(status, err, path)
        assert tree(trained.parent) == before | {".lock": b""} or arguments[0] == "-draw"
    assert call_main("-data", small_npz, "-out", trained.parent.with_name("new"), *QUICK)[0] == 0


def test_a_flipped_bit_in_best_pt_never_gives_other_predictions(q2, trained, small_arrays):
    images = torch.from_numpy(small_arrays["test_images"])
    whole, rng = trained.read_bytes(), np.random.default_rng(0)
    expected, refused = q2.predict(q2.load_network(trained, torch.device("cpu"))[0], images), 0
    places = [*rng.integers(0, len(whole), 60), *rng.integers(0, 3000, 30), *(len(whole) - rng.integers(1, 3000, 30))]
    for place in places:  # anywhere, and in the headers
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        trained.write_bytes(damaged)
        try:
            model, _ = q2.load_network(trained, torch.device("cpu"))
        except utils.InputError as error:
            refused += 1
            assert "\n" not in str(error) and str(trained) in str(error)
        else:  # a byte that no reader looks at, such as a date or padding
            np.testing.assert_array_equal(q2.predict(model, images), expected)
    assert refused > 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": None}, "damaged"),
        ({"config": {"recipe": "homework"}}, "damaged"),
        ({"dataset": 5}, "damaged"),
        ({"dataset": {}}, "damaged"),
        ({"dataset": ["name", "kind"]}, "damaged"),
        ({"network": {"conv1.weight": torch.zeros(3)}}, "damaged"),
        ({"network": [1, 2]}, "damaged"),
        ({"trained_on_digests": torch.zeros(4)}, "which scans it was trained on"),
        ({"trained_on_digests": torch.zeros(0, 5, dtype=torch.uint8)}, "which scans it was trained on"),
        ({"trained_on_digests": "none"}, "damaged"),
    ],
)
def test_foreign_parts_of_a_checkpoint_get_one_line(call_main, trained, tmp_path, change, message):
    runs.save_checkpoint(trained, torch.load(trained, weights_only=True) | change)
    Image.new("L", (40, 30)).save(tmp_path / "scan.png")
    status, _, err = call_main("-predict", tmp_path / "scan.png", "-checkpoint", trained)
    assert_one_line(status, err, trained, message)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("recipe", 3),
        ("recipe", "weak"),
        ("dropout", "0.7"),
        ("dropout", 3.0),
        ("dropout", math.nan),
        ("no_maxpool", "yes"),
        ("epochs", [1]),
    ],
)
def test_a_config_of_the_wrong_type_or_size_gets_one_line(call_main, trained, tmp_path, field, value):
    content = torch.load(trained, weights_only=True)
    runs.save_checkpoint(trained, content | {"config": content["config"] | {field: value}})
    Image.new("L", (40, 30)).save(tmp_path / "scan.png")
    status, _, err = call_main("-predict", tmp_path / "scan.png", "-checkpoint", trained)
    assert_one_line(status, err, trained)


def test_outputs_that_are_no_numbers_are_no_answer(call_main, trained, tmp_path):
    content = torch.load(trained, weights_only=True)
    content["network"] = {name: 1e30 * weights for name, weights in content["network"].items()}
    runs.save_checkpoint(trained, content)
    Image.new("L", (40, 30), 90).save(tmp_path / "scan.png")
    status, out, err = call_main("-predict", tmp_path / "scan.png", "-checkpoint", trained)
    assert_one_line(status, err, "outputs are no numbers")
    assert "nan" not in out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_do_not_answer(call_main, trained, tmp_path, value):
    content = torch.load(trained, weights_only=True)
    content["network"]["fc3.bias"][2] = value
    runs.save_checkpoint(trained, content)
    Image.new("L", (40, 30)).save(tmp_path / "scan.png")
    status, out, err = call_main("-predict", tmp_path / "scan.png", "-checkpoint", trained)
    assert_one_line(status, err, trained, "weights are no numbers")
    assert out == ""


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_trains_with_a_warning(call_main, small_npz, tmp_path, monkeypatch, number):
    def acquire(self, *_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    status, _, err = call_main("-data", small_npz, "-out", tmp_path / "run", *QUICK)
    assert status == 0 and "no locks" in err and err.count("\n") == 1
    assert (tmp_path / "run" / "record.json").exists()


# ---------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-epochs", 0], "-epochs: needs a whole number at least 1, not '0'"),
        (["-epochs", 2.5], "-epochs: needs a whole number"),
        (["-dropout", 1.5], "-dropout: needs a number at least 0 and below 1, not '1.5'"),
        (["-dropout", "nan"], "-dropout: needs a number"),
        (["-learning_rate", -0.1], "-learning_rate: needs a number above 0"),
        (["-learning_rate", 0], "-learning_rate: needs a number above 0"),
        (["-learning_rate", "inf"], "-learning_rate: needs a number above 0"),
        (["-l2_decay", -1], "-l2_decay: needs a number"),
        (["-batch_size", 0], "-batch_size: needs a whole number"),
        (["-seed", -1], "-seed: needs a whole number"),
        (["-jobs", 0], "-jobs: needs a whole number"),
        (["-threads", 0], "-threads: needs a whole number"),
        (["-optimizer", "sdg"], "-optimizer: invalid choice: 'sdg'"),
        (["-recipe", "weak"], "-recipe: invalid choice"),
        (["-epoch_count", 3], "unrecognized arguments"),
        (["-device", "abacus"], "-device abacus:"),
        (["-device", "meta"], "-device meta:"),
        (["-device", "hpu"], "-device hpu: use auto, cpu, cuda"),
        (["-device", "mps"], "-device mps: this machine has none"),
        (["-device", "cuda:99"], "-device cuda:99: this machine has none"),
        (["-data", "nowhere.npz"], "-data nowhere.npz: no such file or folder"),
        (["-grid", "-no_maxpool"], "-grid sets -learning_rate and -no_maxpool itself"),
        (["-grid", "-seeds", 1, 1], "-seeds: every seed once"),
        (["-grid", "-predict", "a.png"], "-grid and -predict exclude each other"),
        (["-predict", "a.png"], "a.png: No such file or directory"),
        (["-checkpoint", "best.pt"], "-checkpoint goes with"),
        (["-draw", "nowhere.json"], "nowhere.json: no such file"),
        (["-grid", "-seed", 3], "takes -seeds instead of -seed"),
        (["-seeds", 1, 2], "-seeds and -jobs go with -grid"),
        (["-jobs", 2], "-seeds and -jobs go with -grid"),
        (["-learning_rate", "1e300"], "-learning_rate: needs a number above 0 and below 1e+30"),
        (["-export", "network.pt"], "-export network.pt: must end in .safetensors"),
        (["-data", ""], "no such file or folder"),
        (["-batch_size", 10**20], "-batch_size: needs a whole number"),
        (["-threads", 3_000_000_000], "-threads: needs a whole number"),
    ],
)
def test_impossible_flags_get_one_line_and_status_2(call_main, tmp_path, arguments, message):
    status, _, err = call_main(*arguments)
    assert_one_line(status, err, message)
    assert tree(tmp_path) == {}


def test_bad_files_get_one_line_and_touch_nothing(call_main, trained, small_npz, tmp_path):
    (tmp_path / "cut.npz").write_bytes(small_npz.read_bytes()[:5000])
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (40, 30)).save(tmp_path / "scan.png")
    (tmp_path / "cut.pt").write_bytes(trained.read_bytes()[:3000])
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    strong = tmp_path / "strong"
    assert call_main("-data", small_npz, "-recipe", "strong", "-out", strong, *QUICK)[0] == 0
    mixed = torch.load(trained, weights_only=True) | {
        "network": torch.load(strong / "best.pt", weights_only=True)["network"]
    }
    torch.save(mixed, tmp_path / "mixed.pt")
    scan = tmp_path / "scan.png"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "mine.txt").write_text("mine")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.pt")
    before = tree(tmp_path)
    for arguments, message in [
        (["-data", tmp_path / "cut.npz"], "not an .npz file, or damaged"),
        (["-data", small_npz, "-out", trained.parent], "already holds files"),
        (["-predict", tmp_path / "text.png", "-checkpoint", trained], "text.png: not an image"),
        (["-predict", tmp_path / "no.png", "-checkpoint", trained], "no.png: No such file"),
        (["-predict", tmp_path, "-checkpoint", trained], "not an image"),
        (["-predict", tmp_path / "pipe.png", "-checkpoint", trained], "pipe.png: not an image"),
        (["-predict", scan, "-checkpoint", tmp_path / "pipe.pt"], "pipe.pt: not a file"),
        (["-predict", scan, "-checkpoint", tmp_path / "no.pt"], "no.pt: no such file"),
        (["-predict", scan, "-checkpoint", tmp_path / "cut.pt"], "not a checkpoint, or damaged"),
        (["-predict", scan, "-checkpoint", scan], "not a checkpoint, or damaged"),
        (["-predict", scan, "-checkpoint", tmp_path / "other.pt"], "not a checkpoint"),
        (["-predict", scan, "-checkpoint", tmp_path / "mixed.pt"], "not a network of hw2-q2.py"),
        (["-predict", scan, "-checkpoint", trained, "-no_maxpool"], "no_maxpool False, not True"),
        (["-predict", scan, "-checkpoint", strong / "best.pt", "-recipe", "homework"], "recipe strong, not homework"),
        (["-predict", scan, "-checkpoint", trained, trained], "takes one -checkpoint"),
        (["-draw", scan], "not a record"),
        (["-data", small_npz, "-out", scan / "below"], "Not a directory"),
        (["-data", small_npz, "-out", scan, "-resume"], "File exists"),
        (["-data", small_npz, "-out", tmp_path / "empty", "-resume"], "holds no run"),
        (["-evaluate", "-data", small_npz, "-checkpoint", trained, "-out", scan], "is there already"),
    ]:
        status, _, err = call_main(*arguments)
        assert_one_line(status, err, message)
    assert tree(tmp_path) == before


def test_a_training_that_diverges_says_so(call_main, small_npz):
    status, _, err = call_main("-data", small_npz, *QUICK, "-learning_rate", 1e9)
    assert_one_line(status, err, "training diverged", "lower -learning_rate")


def test_interrupting_says_how_to_go_on(call_main, q2, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(q2, "run", interrupt)
    status, _, err = call_main()
    assert status == 130 and "-resume" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: \n you"
        ),
    ],
)
def test_too_little_memory_gets_one_line(call_main, q2, small_npz, monkeypatch, error):
    def train_batch(*_):
        raise error

    monkeypatch.setattr(q2, "train_batch", train_batch)
    status, _, err = call_main("-data", small_npz, *QUICK)
    assert_one_line(status, err, "out of memory", "-batch_size")


def test_a_full_disk_gets_one_line_and_resume_goes_on(run_script, small_npz, tmp_path):
    """The limit on a file's size fails as a full disk does: in the middle of a write."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))

    full = run_script("-data", small_npz, *QUICK, "-out", "run", preexec_fn=limit)
    assert_one_line(full.returncode, full.stderr, "File too large")
    assert list(tree(tmp_path / "run")) == [".lock"]
    assert run_script("-data", small_npz, *QUICK, "-out", "run", "-resume").returncode == 0


def test_streams_that_are_closed_full_or_replaced(run_script, call_main, small_npz, monkeypatch, tmp_path):
    def closed():
        os.close(1)
        os.close(2)

    done = run_script("-data", small_npz, *QUICK, "-out", "closed", preexec_fn=closed)
    assert done.returncode == 0 and (tmp_path / "closed" / "record.json").exists()
    with Path("/dev/full").open("w") as full:
        done = run_script("-data", small_npz, *QUICK, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert_one_line(done.returncode, done.stderr, "No space left")

    class Stream:  # of Jupyter and others, which cannot be reconfigured
        text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream := Stream())
        assert call_main("-data", small_npz, *QUICK, "-out", tmp_path / "replaced")[0] == 0
    assert "224,892 parameters" in stream.text


def test_help_and_mistakes_are_answered_before_pytorch_is_imported(run_script, tmp_path):
    """In a folder with a `torch` that cannot be imported."""
    (tmp_path / "torch.py").write_text("raise SystemExit(9)")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = run_script("-h", env=environment)
    assert done.returncode == 0 and "-no_maxpool" in done.stdout
    assert_one_line((done := run_script("-epochs", "x", env=environment)).returncode, done.stderr, "-epochs")
    assert run_script("-epochs", "2", env=environment).returncode == 9


def test_the_real_script_prints_no_traceback(run_script, tmp_path):
    (tmp_path / "bad.npz").write_text("nothing")
    done = run_script("-data", "bad.npz")
    assert done.stdout == ""
    assert_one_line(done.returncode, done.stderr, "hw2-q2.py: bad.npz: not an .npz file, or damaged")
