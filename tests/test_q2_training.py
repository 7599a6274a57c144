"""Training: the course's optimisation to the bit, and the parts of the strong recipe."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import runs
import utils


def start(q2, config):
    """Network and optimizer as a run begins with them."""
    utils.set_seed(config.seed)
    model = q2.build_network(config)
    return model, q2.make_optimizer(config, model)


def homework(q2, **changes):
    return dataclasses.replace(q2.RECIPES["homework"], **{"seed": 7} | changes)


def tensors(arrays):
    return torch.from_numpy(arrays["train_images"]), torch.from_numpy(
        arrays["train_labels"].reshape(-1).astype("int64")
    )


def course_loop(q2, images, labels, epochs, no_maxpool=False, l2_decay=0.0):
    """The course's skeleton: float data set, DataLoader, torch.optim.SGD. Returns parameters, losses, batch sizes."""
    utils.set_seed(7)
    model = q2.CNN(0.7, no_maxpool)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=l2_decay)
    loader = DataLoader(TensorDataset((images.float() / 256).unsqueeze(1), labels), batch_size=8, shuffle=True)
    epoch_losses = []
    for _ in range(epochs):
        losses, sizes = [], []
        for x, y in loader:
            optimizer.zero_grad()
            loss = torch.nn.functional.nll_loss(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            sizes.append(len(y))
        epoch_losses.append(np.average(losses, weights=sizes))
    return parameters_to_vector(model.parameters()), epoch_losses, sizes


@pytest.mark.parametrize(("no_maxpool", "l2_decay"), [(False, 0.0), (True, 0.01)])
def test_bit_identical_to_the_course_loop(q2, small_arrays, monkeypatch, no_maxpool, l2_decay):
    monkeypatch.setattr(q2, "CHUNK", 5)  # several chunks an epoch, the last one ragged
    images, labels = tensors(small_arrays)  # 203 scans: the last batch has 3
    expected, expected_losses, sizes = course_loop(q2, images, labels, 2, no_maxpool, l2_decay)
    assert sizes[-1] == 3
    config = homework(q2, no_maxpool=no_maxpool, l2_decay=l2_decay)
    model, optimizer = start(q2, config)
    losses = [q2.train_epoch(model, optimizer, images, labels, config, epoch) for epoch in range(2)]
    assert torch.equal(parameters_to_vector(model.parameters()), expected)
    # The epoch's loss weighs each example alike: the ragged batch counts less than a whole one.
    assert losses == pytest.approx(expected_losses, rel=1e-6)


def test_one_random_draw_more_is_seen(q2, small_arrays):
    """The comparison above can fail: one draw more, and the parameters differ."""
    images, labels = tensors(small_arrays)
    expected, _, _ = course_loop(q2, images, labels, 1)
    model, optimizer = start(q2, homework(q2))
    torch.rand(1)
    q2.train_epoch(model, optimizer, images, labels, homework(q2))
    assert not torch.equal(parameters_to_vector(model.parameters()), expected)


def test_balanced_order_draws_every_class_alike(q2):
    torch.manual_seed(0)
    labels = torch.tensor([0] * 8000 + [1] * 1000 + [2] * 500 + [3] * 500)
    shares = labels[q2.balanced_order(labels)].bincount() / len(labels)
    torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.02, rtol=0)


def test_shift_and_flip_against_numpy(q2):
    torch.manual_seed(0)
    images = torch.rand(400, 1, 28, 28)
    moved = q2.shift_and_flip(images, max_shift=1).numpy()[:, 0]
    seen = set()
    for image, result in zip(images.numpy()[:, 0], moved, strict=True):
        padded = np.pad(image, 1, mode="edge")
        candidates = {
            (row, column, flip): padded[1 + row : 29 + row, 1 + column : 29 + column][:, :: -1 if flip else 1]
            for row in (-1, 0, 1)
            for column in (-1, 0, 1)
            for flip in (False, True)
        }
        found = [key for key, candidate in candidates.items() if np.array_equal(candidate, result)]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) == 18  # every shift, flipped and not


def test_cosine_learning_rate(q2):
    rates = [q2.cosine_learning_rate(0.1, step, 200) for step in range(200)]
    assert max(rates) == pytest.approx(0.1)
    assert rates[:10] == sorted(rates[:10]) and rates[0] == pytest.approx(0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 1e-4


def test_strong_recipe_learns_and_keeps_an_average_of_the_weights(q2, small_arrays):
    config = dataclasses.replace(q2.RECIPES["strong"], seed=0, epochs=8)
    model, optimizer = start(q2, config)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    data = tensors(small_arrays)
    losses = [q2.train_epoch(model, optimizer, *data, config, epoch, average) for epoch in range(8)]
    assert losses[-1] < losses[0] - 0.1
    averaged, latest = (torch.cat([p.flatten() for p in m.parameters()]) for m in (average, model))
    assert 0 < (averaged - latest).norm() < latest.norm()


def small_data(arrays, name="small"):
    return utils.OctData(name, "phantom", utils.check_oct_arrays(arrays, name))


def test_the_best_epoch_is_kept_and_the_test_split_is_touched_once(q2, small_arrays, tmp_path, monkeypatch):
    data = small_data(small_arrays)
    looked_at = []

    def spy(model, images, batch_size=1024, real=q2.predict):
        looked_at.append(images.numpy().tobytes())
        return real(model, images, batch_size)

    monkeypatch.setattr(q2, "predict", spy)
    config = homework(q2, seed=1, epochs=6, learning_rate=0.1)
    record = q2.train(config, data, tmp_path / "run", torch.device("cpu"))

    test_bytes = data.splits["test"][0].tobytes()
    assert looked_at.count(test_bytes) == 1 and looked_at[-1] == test_bytes
    accuracies = [epoch["val_accuracy"] for epoch in record["history"]]
    best = record["history"][record["best_epoch"] - 1]
    assert best["val_accuracy"] == max(accuracies) == record["val"]["accuracy"]
    assert best["val_loss"] == min(e["val_loss"] for e in record["history"] if e["val_accuracy"] == max(accuracies))
    # best.pt holds those very weights; last.pt is of the last epoch.
    model, content = q2.load_network(tmp_path / "run" / "best.pt", torch.device("cpu"))
    val_images, val_labels = map(torch.from_numpy, data.splits["val"])
    assert q2.evaluate(model, val_images, val_labels) == record["val"]
    assert content["best_epoch"] == record["best_epoch"]
    assert len(runs.load_checkpoint(tmp_path / "run" / "last.pt", {"history"})["history"]) == 6


def test_among_equal_epochs_the_lowest_loss_is_kept_and_later_ones_do_not_replace_it(
    q2, small_arrays, tmp_path, monkeypatch
):
    script = iter([(0.3, 1.0), (0.5, 0.9), (0.5, 0.7), (0.5, 0.8), (0.2, 0.1)])  # validation accuracy and loss

    def evaluate(model, images, labels, real=q2.evaluate):
        accuracy, loss = next(script, (None, None))
        return real(model, images, labels) | ({} if accuracy is None else {"accuracy": accuracy, "loss": loss})

    monkeypatch.setattr(q2, "evaluate", evaluate)
    kept = []
    save = runs.save_checkpoint
    monkeypatch.setattr(
        runs, "save_checkpoint", lambda path, content: (kept.append(copy.deepcopy(content)), save(path, content))
    )
    record = q2.train(homework(q2, seed=1, epochs=5), small_data(small_arrays), tmp_path, torch.device("cpu"))
    assert record["best_epoch"] == 3
    *epochs, best = kept  # last.pt after each epoch, then best.pt
    assert [len(content["history"]) for content in epochs] == [1, 2, 3, 4, 5]
    for name, weights in best["network"].items():
        assert torch.equal(weights, epochs[2]["model"][name]) and torch.equal(weights, epochs[4]["network"][name])
    assert not torch.equal(best["network"]["fc3.bias"], epochs[4]["model"]["fc3.bias"])


def test_octmnist_is_also_tested_on_the_courses_subset(q2, small_arrays, tmp_path):
    labels = np.repeat(np.arange(4), 250).astype(np.uint8)[:, None]
    images = np.tile(small_arrays["test_images"], (25, 1, 1))
    arrays = small_arrays | {"test_images": images, "test_labels": labels}
    for name, expected in (("OCTMNIST", 529), ("other", None)):
        record = q2.train(
            homework(q2, seed=1, epochs=1), small_data(arrays, name), tmp_path / name, torch.device("cpu")
        )
        assert record["test"]["num_examples"] == 1000
        assert record.get("test_course_subset", {}).get("num_examples") == expected
