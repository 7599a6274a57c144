"""hw2-q2.py as people run it: flags, files, stops in the middle, bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import REAL_SCANS, ROOT, needs_real_scans, tree
from PIL import Image

import utils

QUICK = ("-epochs", 2, "-device", "cpu")


def test_a_run_leaves_record_figures_and_checkpoints(run_script, small_npz, tmp_path):
    done = run_script("-data", small_npz, *QUICK)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar where there is no terminal
    folder = tmp_path / "runs" / "q2-small-homework-maxpool-lr0.01-seed42-epochs2"
    assert "224,892 parameters" in done.stdout and str(folder.relative_to(tmp_path)) in done.stdout
    names = ".lock best.pt confusion.png confusion.svg curves.png curves.svg last.pt record.json settings.json"
    assert list(tree(folder)) == names.split()
    record = json.loads((folder / "record.json").read_text())
    for key in ("command", "config", "dataset", "history", "test", "seed", "seconds", "device", "threads", "versions"):
        assert key in record
    assert record["command"].startswith("python ") and "-epochs 2" in record["command"]
    assert len(record["history"]) == 2 and record["num_parameters"] == 224_892
    assert record["test"]["num_examples"] == 40 and "test_course_subset" not in record
    assert np.array(record["test"]["confusion"]).sum() == 40
    for name in ("curves", "confusion"):
        with Image.open(folder / f"{name}.png") as image:
            assert min(image.size) > 400

    # The same command again: the same numbers, in a folder of its own.
    before = tree(folder)
    again = run_script("-data", small_npz, *QUICK)
    assert again.returncode == 0 and f"{folder.name}-2" in again.stdout
    assert tree(folder) == before
    assert numbers(folder.with_name(folder.name + "-2")) == numbers(folder)


def numbers(folder) -> dict:
    """A run's record without what may differ from one run to the next, and its best weights."""
    record = json.loads((folder / "record.json").read_text())
    for key in ("command", "date", "seconds", "git"):
        del record[key]
    weights = torch.load(folder / "best.pt", weights_only=True)["network"]
    return record | {"weights": {name: w.numpy().tobytes() for name, w in weights.items()}}


def test_phantoms_say_so_everywhere(call_main, small_arrays, tmp_path, monkeypatch):
    monkeypatch.setattr(utils.offline_data, "oct_phantoms", lambda: small_arrays)
    monkeypatch.setattr(utils, "download_octmnist", lambda data_dir: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    status, out, _ = call_main("-data", "auto", *QUICK)
    assert status == 0
    assert "PHANTOMS" in out and "No score below is a score on OCTMNIST" in out and "test (phantom" in out
    (folder,) = (tmp_path / "runs").iterdir()
    assert "phantom" in folder.name
    assert json.loads((folder / "record.json").read_text())["dataset"]["kind"] == "phantom"
    # Matplotlib writes text as outlines, with the text itself as a comment.
    for name in ("curves", "confusion"):
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
        ["-learning_rate", 1e-12],  # nothing changes, so that the first epoch stays the best
    ],
)
def test_a_stop_at_any_write_is_mended_by_resume(call_main, small_npz, tmp_path, monkeypatch, flags):
    """The process dies before, during or after a write, from the first file of a run to the last."""
    arguments = ["-data", small_npz, "-epochs", 2, *flags]
    assert call_main(*arguments, "-out", tmp_path / "whole")[0] == 0
    expected = numbers(tmp_path / "whole")
    real_write, stops = utils.write_whole, 0
    while True:
        out, left = tmp_path / f"stop{stops}", iter(range(stops, -1, -1))

        def write_whole(path, write, left=left):
            part = path.with_name(f".{path.stem}.0{path.suffix}")
            for moment in ("before", "during", "after"):
                if moment == "after":
                    real_write(path, write)
                if next(left, None) == 0:
                    if moment == "during":
                        part.write_bytes(b"half a file")
                    raise PowerCut

        monkeypatch.setattr(utils, "write_whole", write_whole)
        try:
            status, _, _ = call_main(*arguments, "-out", out)
        except PowerCut:
            status = None
        monkeypatch.setattr(utils, "write_whole", real_write)
        if status == 0:
            break
        assert call_main(*arguments, "-out", out, *(["-resume"] if out.exists() else []))[0] == 0
        assert numbers(out) == expected, stops
        assert not list(out.glob(".*.*"))
        stops += 5  # every write at another moment: 5 and the 3 moments have no common factor
    assert stops > 24  # settings, best and last for two epochs, four figures, the record


def test_resume_refuses_another_run(call_main, small_npz, tmp_path):
    out = tmp_path / "run"
    assert call_main("-data", small_npz, "-out", out, *QUICK)[0] == 0
    before = tree(out)
    for change in (["-no_maxpool"], ["-seed", 1], ["-learning_rate", 0.1], ["-recipe", "strong"], ["-epochs", 3]):
        status, _, err = call_main("-data", small_npz, "-out", out, *QUICK, "-resume", *change)
        assert status == 2 and "cannot resume, it holds a run with another config" in err and err.count("\n") == 1
        assert tree(out) == before
    np.savez(tmp_path / "other.npz", **utils.offline_data.oct_phantoms(20, 8, 8))
    status, _, err = call_main("-data", tmp_path / "other.npz", "-out", out, *QUICK, "-resume")
    assert status == 2 and "another dataset" in err
    assert tree(out) == before


def test_a_second_process_does_not_train_the_same_run(call_main, small_npz, tmp_path):
    out = tmp_path / "run"
    assert call_main("-data", small_npz, "-out", out, *QUICK)[0] == 0
    (out / "record.json").unlink()
    (out / ".last.1.pt").write_bytes(b"being written")
    before = tree(out)
    with utils.lock_folder(out):
        status, _, err = call_main("-data", small_npz, "-out", out, *QUICK, "-resume")
    assert status == 2 and str(out) in err and "another process" in err and err.count("\n") == 1
    assert tree(out) == before
    assert call_main("-data", small_npz, "-out", out, *QUICK, "-resume")[0] == 0
    assert (out / "record.json").exists() and not (out / ".last.1.pt").exists()


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
    """The guess that keeps a process busy is no part of the answer, and a rate that diverges loses."""
    scores = {0.1: 0.5, 0.01: 0.4, 0.001: 0.9}  # the last rate wins, after the first had led

    def fake_train(config, data, folder, device, args):
        if config.learning_rate == diverging:
            return config, None
        accuracy = 0.0 if config.no_maxpool else scores[config.learning_rate]
        metrics = dict.fromkeys(("accuracy", "balanced_accuracy", "macro_auc"), accuracy)
        return config, {"val": metrics, "test": metrics, "seconds": 1.0, "history": []}

    monkeypatch.setattr(q2, "train_in_grid", fake_train)
    monkeypatch.setattr(q2, "draw_grid", lambda *_: None)
    monkeypatch.setattr(q2.joblib, "Parallel", partial(q2.joblib.Parallel, backend="threading"))
    args = q2.parse_arguments(["-grid", "-seeds", "5", "-jobs", str(jobs)])
    data = utils.OctData("small", "phantom", utils.check_oct_arrays(small_arrays, "small"))
    record = q2.run_grid(args, data, tmp_path, torch.device("cpu"))
    assert record["chosen_rate"] == 0.001
    assert record["settings"][-1]["runs"] == ["no_maxpool-lr0.001-seed5/record.json"]
    assert [row["diverged"] for row in record["settings"]] == [int(diverging == 0.1), 0, 0, 0]


# ---------------------------------------------------------------------------------------------------
# Using a trained network


@pytest.fixture
def trained(call_main, small_npz, tmp_path):
    assert call_main("-data", small_npz, "-out", tmp_path / "trained", *QUICK)[0] == 0
    return tmp_path / "trained" / "best.pt"


def test_predict_prints_the_networks_probabilities(call_main, q2, trained, small_arrays, tmp_path):
    for i in range(2):
        Image.fromarray(small_arrays["test_images"][i]).convert("RGB").save(tmp_path / f"scan{i}.png")
    status, out, err = call_main("-predict", tmp_path / "scan0.png", tmp_path / "scan1.png", "-checkpoint", trained)
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines() if "scan" in line and ".png" in line]
    model = q2.CNN(0.7)
    model.load_state_dict(torch.load(trained, weights_only=True)["model"])
    expected = q2.predict(model, torch.from_numpy(small_arrays["test_images"][:2]))
    for row, probabilities in zip(rows, expected, strict=True):
        np.testing.assert_allclose([float(value) for value in row[1:5]], probabilities, atol=6e-5)
        assert " ".join(row[5:]) == q2.OCT_CLASSES[probabilities.argmax()]


@needs_real_scans
def test_predict_takes_the_full_size_originals(call_main, trained):
    originals = sorted((REAL_SCANS / "originals").iterdir())
    status, out, _ = call_main("-predict", *originals, "-checkpoint", trained)
    assert status == 0
    for path in originals:
        (line,) = (line for line in out.splitlines() if line.startswith(str(path)))
        values = [float(value) for value in re.findall(r"\d\.\d{4}", line.removeprefix(str(path)))]
        assert len(values) == 4 and sum(values) == pytest.approx(1, abs=3e-4)


def test_evaluate_scores_a_network_on_other_scans(call_main, q2, trained, small_npz, tmp_path):
    other = utils.offline_data.oct_phantoms(40, 20, 20, seed=5)
    np.savez(tmp_path / "other.npz", **other)
    arguments = ("-evaluate", "-checkpoint", trained, trained, "-out", tmp_path / "scores.json")
    status, out, _ = call_main(*arguments, "-data", tmp_path / "other.npz")
    assert status == 0 and ", all (80 scans)" in out
    record = json.loads((tmp_path / "scores.json").read_text())
    model = q2.CNN(0.7)
    model.load_state_dict(torch.load(trained, weights_only=True)["model"])
    images = np.concatenate([other[f"{split}_images"] for split in utils.SPLITS])
    labels = np.concatenate([other[f"{split}_labels"] for split in utils.SPLITS]).reshape(-1).astype(np.int64)
    expected = q2.evaluate(model, torch.from_numpy(images), torch.from_numpy(labels))
    assert record["all"]["runs"] == [expected, expected]
    assert record["all"]["accuracy"] == {"mean": pytest.approx(expected["accuracy"]), "std": 0.0}
    # On the scans it was trained on, only the test split counts.
    status, out, _ = call_main("-evaluate", "-checkpoint", trained, "-data", small_npz)
    assert status == 0 and "test (40 scans)" in out and ", all (" not in out


def test_figures_are_drawn_again_from_the_record_alone(call_main, trained, tmp_path):
    status, _, _ = call_main("-draw", trained.with_name("record.json"), "-out", tmp_path / "figures")
    assert status == 0
    for name in ("curves", "confusion"):
        drawn = (tmp_path / "figures" / f"trained-{name}.svg").read_bytes()
        assert drawn == trained.with_name(f"{name}.svg").read_bytes()


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
        (["-data", "nowhere.npz"], "-data nowhere.npz: no such file or folder"),
        (["-grid", "-no_maxpool"], "-grid sets -learning_rate and -no_maxpool itself"),
        (["-grid", "-seeds", 1, 1], "-seeds: every seed once"),
        (["-grid", "-predict", "a.png"], "-grid and -predict exclude each other"),
        (["-predict", "a.png"], "-predict needs -checkpoint"),
        (["-checkpoint", "best.pt"], "-checkpoint goes with"),
        (["-draw", "nowhere.json"], "No such file or directory: 'nowhere.json'"),
        (["-grid", "-seed", 3], "takes -seeds instead of -seed"),
        (["-batch_size", 10**20], "-batch_size: needs a whole number"),
        (["-threads", 3_000_000_000], "-threads: needs a whole number"),
    ],
)
def test_impossible_flags_get_one_line_and_status_2(call_main, tmp_path, arguments, message):
    status, _, err = call_main(*arguments)
    assert status == 2
    assert message in err and err.count("\n") == 1 and "Traceback" not in err
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
    before = tree(tmp_path)
    for arguments, message in [
        (["-data", tmp_path / "cut.npz"], "cannot be read as .npz"),
        (["-data", small_npz, "-out", trained.parent], "already holds files"),
        (["-predict", tmp_path / "text.png", "-checkpoint", trained], "text.png: not an image"),
        (["-predict", tmp_path / "no.png", "-checkpoint", trained], "no.png: cannot be read"),
        (["-predict", tmp_path, "-checkpoint", trained], "cannot be read as an image"),
        (["-predict", scan, "-checkpoint", tmp_path / "no.pt"], "no such checkpoint"),
        (["-predict", scan, "-checkpoint", tmp_path / "cut.pt"], "cannot be read as a checkpoint"),
        (["-predict", scan, "-checkpoint", scan], "cannot be read as a checkpoint"),
        (["-predict", scan, "-checkpoint", tmp_path / "other.pt"], "not a checkpoint of hw2-q2.py"),
        (["-predict", scan, "-checkpoint", tmp_path / "mixed.pt"], "its weights do not fit its network"),
        (["-predict", scan, "-checkpoint", trained, "-no_maxpool"], "no_maxpool False, not True"),
        (["-predict", scan, "-checkpoint", strong / "best.pt", "-recipe", "homework"], "recipe strong, not homework"),
        (["-predict", scan, "-checkpoint", trained, trained], "takes one -checkpoint"),
        (["-draw", scan], "not a record"),
        (["-data", small_npz, "-out", scan / "below"], "Not a directory"),
        (["-data", small_npz, "-out", scan, "-resume"], "File exists"),
        (["-data", small_npz, "-out", tmp_path / "empty", "-resume"], "holds no run of hw2-q2.py"),
        (["-evaluate", "-data", small_npz, "-checkpoint", trained, "-out", scan], "is there already"),
    ]:
        status, _, err = call_main(*arguments)
        assert status == 2, arguments
        assert message in err and err.count("\n") == 1, (arguments, err)
    assert tree(tmp_path) == before


def test_a_training_that_diverges_says_so(call_main, small_npz):
    status, _, err = call_main("-data", small_npz, *QUICK, "-learning_rate", 1e9)
    assert status == 2 and "training diverged" in err and "lower -learning_rate" in err and err.count("\n") == 1


def test_interrupting_says_how_to_go_on(call_main, q2, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(q2, "run", interrupt)
    status, _, err = call_main()
    assert status == 130 and "-resume" in err and "Traceback" not in err


def test_the_real_script_prints_no_traceback(run_script, tmp_path):
    (tmp_path / "bad.npz").write_text("nothing")
    done = run_script("-data", "bad.npz")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("hw2-q2.py: bad.npz: cannot be read") and done.stderr.count("\n") == 1
