"""runs.py: files written whole, files read with one line for what is damaged, locks, records."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tree

import runs
from runs import InputError


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    runs.write_json(path, {"a": [1, 2], "b": {"c": None}})
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        runs.write_json(path, {"a": float("nan")})
    assert tree(tmp_path) == before

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs.os, "fsync", full)
    for write in (lambda: runs.write_json(path, {"a": 1}), lambda: runs.save_checkpoint(path, {"a": torch.zeros(9)})):
        with pytest.raises(OSError, match="No space left"):
            write()
        assert tree(tmp_path) == before


def test_json_comes_back_as_it_went(tmp_path):
    record = {"history": [{"epoch": 1, "loss": 0.5}], "confusion": [[1, 2], [3, 4]], "none": []}
    record |= {"note": "a [1,\n 2] b, c [ 1  2 ].npz", "files": ["runs/my  run/best.pt"], "mean ± std": 1}
    runs.write_json(tmp_path / "r.json", record)
    assert json.loads((tmp_path / "r.json").read_text()) == record == runs.read_json(tmp_path / "r.json")
    assert "[1, 2]" in (tmp_path / "r.json").read_text()  # lists of numbers on one line


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"{", b"\xff", b"null", 2000 * b"[" + 2000 * b"]"])
def test_json_that_is_no_record_gets_one_line(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a record, or damaged") as error:
        runs.read_json(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value) and len(str(error.value)) < 400


class Code:
    """What a pickle from a stranger can do."""

    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_a_checkpoint_is_data_and_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"config": Code()}, tmp_path / "stranger.pt")
    with pytest.raises(InputError, match="not a checkpoint, or damaged"):
        runs.load_checkpoint(tmp_path / "stranger.pt", {"config"})
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "stranger.pt", weights_only=False)  # it would have run
    assert (tmp_path / "ran").exists()


def test_a_flipped_bit_in_a_tensor_is_seen_before_it_is_used(tmp_path):
    path, tensors = tmp_path / "c.pt", {"weight": torch.arange(5000.0)}
    runs.save_checkpoint(path, tensors)
    assert torch.equal(runs.load_checkpoint(path, {"weight"})["weight"], tensors["weight"])
    whole = path.read_bytes()
    start = whole.index(tensors["weight"].numpy().tobytes())
    for place in np.random.default_rng(0).integers(start, start + 20_000, 50):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="checksum"):
            runs.load_checkpoint(path, {"weight"})
        torch.load(path, weights_only=True)  # which does not see it


def test_weights_come_back_with_what_is_said_of_them(tmp_path):
    path = tmp_path / "w.safetensors"
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.tensor([1, 2], dtype=torch.uint8), "half": torch.randn(2).half()}
    runs.save_weights(path, tensors, {"kind": "phantom", "± ü": [1, None]})
    found, about = runs.load_weights(path)
    assert about == {"kind": "phantom", "± ü": [1, None]}
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"phantom", b"phxntom"))  # what is said counts as well
    with pytest.raises(InputError, match="checksum"):
        runs.load_weights(path)


def test_a_folder_is_locked_for_others_only_as_long_as_it_is_used(tmp_path):
    lock = runs.lock_folder
    with lock(tmp_path / "run"), pytest.raises(InputError, match="another process"), lock(tmp_path / "run"):
        pass
    with lock(tmp_path / "run"):
        pass


def test_numbers_are_summarised_at_any_depth():
    values = [{"a": 1.0, "b": {"c": 2.0, "d": None}}, {"a": 3.0, "b": {"c": 2.0, "d": 1.0}}]
    assert runs.summarise(values) == {
        "a": {"mean": 2.0, "std": 2**0.5},
        "b": {"c": {"mean": 2.0, "std": 0.0}, "d": None},
    }
    assert runs.mean_and_std([5.0]) == {"mean": 5.0, "std": None}
