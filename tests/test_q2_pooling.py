"""report/pooling.py: three networks that differ in the pooling alone, what is measured of them, and its record."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, caller, tree
from scipy import ndimage
from test_q2_network import forward_in_numpy
from torch.nn.utils import parameters_to_vector

import runs

METRICS = {"loss", "accuracy", "balanced_accuracy", "macro_auc"}


@pytest.fixture(scope="module")
def pooling(q2):
    return importlib.import_module("pooling")


@pytest.fixture
def call(pooling, tmp_path, monkeypatch, capsys):
    """Run main in this process and in an empty folder; returns exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    return caller(pooling, capsys)


def make_networks(pooling) -> dict:
    networks = {}
    for pool in pooling.POOLS:
        torch.manual_seed(3)
        networks[pool] = pooling.PooledCNN(0.7, pool)
    return networks


# ---------------------------------------------------------------------------------------------------
# The networks


@pytest.mark.parametrize(("pool", "no_maxpool"), [("max", False), ("stride", True)])
def test_max_and_stride_are_the_homeworks_networks_to_the_bit(q2, pooling, pool, no_maxpool):
    torch.manual_seed(3)
    homework, ours = q2.CNN(0.7, no_maxpool), make_networks(pooling)[pool]
    images, labels = torch.rand(9, 1, 28, 28), torch.arange(9) % 4
    outcomes = []
    for model in (homework, ours):  # the same first weights, outputs and gradients, dropout and all
        torch.manual_seed(5)
        output = model(images)
        F.nll_loss(output, labels).backward()
        outcomes.append((output, parameters_to_vector(p.grad for p in model.parameters())))
    assert torch.equal(parameters_to_vector(ours.parameters()), parameters_to_vector(homework.parameters()))
    assert all(map(torch.equal, *outcomes))


def test_stride_keeps_one_position_of_what_the_same_convolution_answers_at_stride_1(pooling):
    stride = make_networks(pooling)["stride"]
    images = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8)
    first, _ = pooling.responses(stride, images)
    with torch.no_grad():
        kept = F.relu(stride.conv1(images.div(256).unsqueeze(1)))
    torch.testing.assert_close(first[..., ::2, ::2], kept)


def test_mean_equals_numpy(q2, pooling):
    networks = make_networks(pooling)
    assert len({q2.get_number_trainable_params(n) for n in networks.values()}) == 1
    mean = networks["mean"].eval()
    images = torch.rand(4, 1, 28, 28)

    def average(x):
        return x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2).mean(axis=(2, 4))

    expected = np.stack([forward_in_numpy(mean, image[0].numpy(), average) for image in images])
    with torch.no_grad():
        np.testing.assert_allclose(mean(images).numpy(), expected, atol=2e-6)


def test_the_three_networks_start_from_the_same_weights_and_train_apart(q2, pooling, small_arrays):
    images = torch.from_numpy(small_arrays["train_images"][:16]).div(256).unsqueeze(1)
    outputs = [network.eval()(images) for network in make_networks(pooling).values()]
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[1], outputs[2])


# ---------------------------------------------------------------------------------------------------
# The measures


@pytest.mark.parametrize(("dy", "dx"), [(0, 0), (1, 0), (0, -1), (-2, 1), (2, -2)])
def test_shift_equals_scipys(pooling, dy, dx):
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    expected = ndimage.shift(images, (0, dy, dx), order=0, mode="nearest")
    assert np.array_equal(pooling.shift(torch.from_numpy(images), dy, dx).numpy(), expected)


def test_shift_sensitivity_counts_the_predictions_that_change(pooling, monkeypatch):
    """A network that answers class 1 wherever the pixel at (10, 10) is lit: every shift of a lit dot changes it."""

    def predict(model, images):
        return np.eye(4)[(images[:, 10, 10] > 0).long().numpy()]

    monkeypatch.setattr(pooling.hw2_q2, "predict", predict)
    images = torch.zeros(4, 28, 28, dtype=torch.uint8)
    images[0, 10, 10] = 255  # changes at every shift
    images[1, 10, 8] = 255  # at one of the 8 shifts of distance 2 that are even, (0, 2)
    images[2, 10, 9] = 255  # at one of the 8 shifts of distance 1, (0, 1)
    found = pooling.shift_sensitivity(None, images, torch.tensor([1, 0, 0, 0]))
    changed = {group: outcome["changed"] for group, outcome in found.items()}
    assert changed == pytest.approx({"1": 9 / 32, "2": 17 / 64, "2_even": 9 / 32, "2_odd": 1 / 4})
    # Class 1 (the first scan) is missed at every shift, class 0 where one of the others is taken for it.
    assert found["1"]["balanced_accuracy"] == pytest.approx((1 - 1 / 24) / 2)


def test_pooled_otherwise_changes_the_pooling_alone(pooling, small_arrays):
    networks = make_networks(pooling)
    scans = torch.from_numpy(small_arrays["train_images"])
    images = scans[:20].div(256).unsqueeze(1)
    for network in networks.values():
        network.eval()
    before = parameters_to_vector(networks["max"].parameters()).clone()
    with torch.no_grad():
        swapped = pooling.pooled_otherwise(networks["max"], "mean")
        assert torch.equal(swapped(images), networks["mean"](images))
        rescaled = pooling.pooled_otherwise(networks["max"], "stride", scans)
    assert not swapped.training and not rescaled.training
    assert torch.equal(parameters_to_vector(networks["max"].parameters()), before)
    for wanted, found in zip(*(pooling.responses(n, scans) for n in (networks["max"], rescaled)), strict=True):
        wanted, found = F.max_pool2d(wanted, 2).mean(dim=(0, 2, 3)), found[..., ::2, ::2].mean(dim=(0, 2, 3))
        assert (found > 0).any()
        torch.testing.assert_close(found[found > 0], wanted[found > 0])


def test_window_statistics_of_a_convolution_that_copies_its_input(pooling):
    model = make_networks(pooling)["max"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.conv1.weight[:, 0, 1, 1] = 1
        model.conv2.bias.fill_(-1)
    scan = torch.zeros(1, 28, 28, dtype=torch.uint8)
    scan[0, 0, 0] = 64  # the largest of its window, at the sampled position
    scan[0, 4, 5] = 64  # beside it: missed
    scan[0, 8, 8], scan[0, 9, 9] = 32, 128  # a quarter of the largest is sampled
    scan[0, 20:22, 20:22] = 128  # flat
    first, second = pooling.window_statistics(model, scan).values()
    kept = (64 + 0 + 32) / (64 + 64 + 128)
    names = ("differing", "largest_is_sampled", "missed_by_stride", "kept_by_stride")
    assert first == pytest.approx(dict(zip(names, (3 / 196, 1 / 3, 1 / 3, kept), strict=True)))
    assert second == dict(zip(names, (0, None, None, None), strict=True))


# ---------------------------------------------------------------------------------------------------
# The script


def test_the_script_writes_a_record_and_loads_what_is_trained(pooling, call, small_npz, tmp_path, monkeypatch):
    flags = ("-data", small_npz, "-epochs", 1, "-seeds", 5, 6, "-device", "cpu")
    command = [sys.executable, ROOT / "report" / "pooling.py", *flags, "-jobs", 2]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.count(": trains") == 6 and "small (real), seeds [5, 6]" in done.stdout
    path = tmp_path / "results" / "q2" / "pooling-small.json"
    record = json.loads(path.read_text())
    for key in ("command", "versions", "git", "date", "config", "dataset", "seconds", "device", "threads", "jobs"):
        assert key in record
    assert record["config"]["learning_rate"] == 0.1 and record["config"]["epochs"] == 1
    assert record["seeds"] == [5, 6] and record["chosen_by"] == "val_accuracy"
    assert list(record["networks"]) == ["max", "stride", "mean"] and list(record["max_minus"]) == ["stride", "mean"]
    firsts = [network["runs"][0]["history"]["train_loss"][0] for network in record["networks"].values()]
    assert len(set(firsts)) == 3  # three trainings, not one under three names
    for pool, network in record["networks"].items():
        others = {other for other in record["networks"] if other != pool}
        assert [run["seed"] for run in network["runs"]] == [5, 6]
        for run in network["runs"]:
            assert run["num_parameters"] == 224_892 and len(run["history"]["train_loss"]) == 1
            measures = run["measures"]
            assert all(set(measures[split]) == METRICS for split in ("train", "val", "test"))
            assert set(measures["last_epoch"]) == {"train", "val"}
            assert set(measures["shifts"]) == {"1", "2", "2_even", "2_odd"}
            assert set(measures["tested_with"]) == others | {f"{o}_rescaled" for o in others} | {"four_phases"}
            trained = json.loads((tmp_path / run["folder"] / "record.json").read_text())
            assert trained["config"]["pool"] == pool and trained["test"]["loss"] == measures["test"]["loss"]
        losses = [run["measures"]["train"]["loss"] for run in network["runs"]]
        assert network["summary"]["train"]["loss"] == pytest.approx(
            {"mean": np.mean(losses), "std": np.std(losses, ddof=1)}
        )
        if pool != "max":
            firsts = [run["measures"]["train"]["loss"] for run in record["networks"]["max"]["runs"]]
            gaps = np.subtract(firsts, losses)
            assert record["max_minus"][pool]["train"]["loss"] == pytest.approx(
                {"mean": gaps.mean(), "std": gaps.std(ddof=1)}
            )

    def refuse(*arguments, **options):
        raise AssertionError("trains again")

    monkeypatch.setattr(pooling.hw2_q2, "train_locked", refuse)
    before = tree(tmp_path / "runs")
    status, out, err = call(*flags, "-jobs", 1, "-out", "again.json")
    assert (status, err) == (0, "") and out.count(": is trained") == 6
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["networks"] == record["networks"] and again["max_minus"] == record["max_minus"]
    assert tree(tmp_path / "runs") == before


def test_trainings_equal_those_of_hw2_q2(q2, pooling, small_npz, tmp_path, monkeypatch):
    """max and stride are what hw2-q2.py trains, with and without -no_maxpool: the same weights to the bit."""
    monkeypatch.chdir(tmp_path)
    data, device = q2.utils.load_oct(str(small_npz)), torch.device("cpu")
    args = pooling.parse_arguments(["-epochs", "2"])
    for pool, no_maxpool in (("max", False), ("stride", True)):
        run = pooling.train_and_measure(pooling.make_config(args, pool, 42), data, tmp_path / "ours", device)
        flags = ["-epochs", "2", "-learning_rate", "0.1", *["-no_maxpool"] * no_maxpool]
        assert q2.main(["-data", str(small_npz), "-device", "cpu", "-out", f"plain-{pool}", *flags]) == 0
        folders = [tmp_path / folder for folder in (run["folder"], f"plain-{pool}")]
        ours, plain = (runs.load_checkpoint(folder / "best.pt", {"network"})["network"] for folder in folders)
        assert ours.keys() == plain.keys() and all(map(torch.equal, ours.values(), plain.values()))
        ours, plain = (runs.read_json(folder / "record.json")["history"] for folder in folders)
        assert ours == plain and len(ours) == 2


def test_bad_input_is_one_line_and_status_2(call, small_npz, tmp_path):
    (tmp_path / "file").write_text("")
    for arguments, message in [
        (["-data", "no.npz"], "no such file or folder"),
        (["-epochs", "0"], "at least 1"),
        (["-learning_rate", "0"], "above 0"),
        (["-seeds", "1", "1"], "every seed once"),
        (["-pool", "max"], "unrecognized"),
        (["-data", small_npz, "-device", "nonsense"], "-device nonsense"),
        (["-data", small_npz, "-epochs", 1, "-jobs", 1, "-learning_rate", 1e9], "seed42-epochs1: training diverged"),
    ]:
        status, _, err = call(*arguments)
        assert status == 2 and message in err and err.count("\n") == 1, (arguments, err)
        assert err.startswith("pooling.py: ")
    assert not (tmp_path / "results").exists()
