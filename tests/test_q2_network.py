"""The networks and the metrics against independent implementations."""

import numpy as np
import pytest
import torch
from scipy.signal import correlate2d
from sklearn.metrics import balanced_accuracy_score


def stride_in_numpy(x: np.ndarray) -> np.ndarray:
    return x[:, ::2, ::2]  # a stride of 2 keeps every second position


def max_in_numpy(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2).max(axis=(2, 4))


def forward_in_numpy(model, image: np.ndarray, pool) -> np.ndarray:
    """The homework's network written out with SciPy and NumPy in float64, from the statement."""
    weights = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    x = image[None].astype(np.float64)
    for layer, padding in (("conv1", 1), ("conv2", 0)):
        x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
        kernels, biases = weights[f"{layer}.weight"], weights[f"{layer}.bias"]
        x = np.stack(
            [
                sum(correlate2d(x[c], kernel[c], mode="valid") for c in range(len(x))) + bias
                for kernel, bias in zip(kernels, biases, strict=True)
            ]
        )
        x = pool(np.maximum(x, 0))
    x = x.reshape(-1)
    for layer in ("fc1", "fc2", "fc3"):
        x = weights[f"{layer}.weight"] @ x + weights[f"{layer}.bias"]
        if layer != "fc3":
            x = np.maximum(x, 0)
    return x - np.log(np.exp(x).sum())


@pytest.mark.parametrize("no_maxpool", [False, True])
def test_homework_network_equals_the_statement_written_out(q2, no_maxpool):
    torch.manual_seed(1)
    model = q2.CNN(dropout_prob=0.7, no_maxpool=no_maxpool).eval()
    images = torch.rand(5, 1, 28, 28)
    pool = stride_in_numpy if no_maxpool else max_in_numpy
    expected = np.stack([forward_in_numpy(model, image[0].numpy(), pool) for image in images])
    with torch.no_grad():
        np.testing.assert_allclose(model(images).numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("no_maxpool", [False, True])
def test_parameter_counts(q2, no_maxpool):
    by_hand = (9 * 8 + 8) + (9 * 8 * 16 + 16) + (576 * 320 + 320) + (320 * 120 + 120) + (120 * 4 + 4)
    assert by_hand == 224_892
    assert q2.get_number_trainable_params(q2.CNN(0.7, no_maxpool)) == by_hand
    strong = q2.get_number_trainable_params(q2.StrongCNN(0.3, no_maxpool))
    assert f"{strong:,}" in q2.StrongCNN.__doc__
    assert abs(strong / by_hand - 1) < 0.05


def test_frozen_parameters_are_not_counted(q2):
    model = q2.CNN(0.7)
    model.fc3.requires_grad_(False)
    assert q2.get_number_trainable_params(model) == 224_892 - (120 * 4 + 4)


@pytest.mark.parametrize("network", ["CNN", "StrongCNN"])
@pytest.mark.parametrize("no_maxpool", [False, True])
def test_outputs_are_log_probabilities_and_dropout_acts_in_training_only(q2, network, no_maxpool):
    torch.manual_seed(0)
    model = getattr(q2, network)(0.7, no_maxpool)
    images = torch.rand(6, 1, 28, 28)
    model.eval()
    log_probabilities = model(images)
    torch.testing.assert_close(log_probabilities.exp().sum(dim=1), torch.ones(6))
    assert torch.equal(log_probabilities, model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


def test_metrics_equal_medmnists_evaluator_and_sklearn(q2):
    from medmnist.evaluator import getACC, getAUC

    rng = np.random.default_rng(3)
    labels = rng.choice(4, size=300, p=[0.5, 0.1, 0.1, 0.3])
    probabilities = rng.dirichlet(np.ones(4), size=300) + 0.4 * np.eye(4)[labels]
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    metrics = q2.score(probabilities, labels)
    assert metrics["macro_auc"] == pytest.approx(getAUC(labels[:, None], probabilities, "multi-class"), abs=1e-12)
    assert metrics["accuracy"] == pytest.approx(getACC(labels[:, None], probabilities, "multi-class"), abs=1e-12)
    predicted = probabilities.argmax(axis=1)
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted), abs=1e-12)
    confusion = np.array(metrics["confusion"])
    assert confusion[1, 3] == ((labels == 1) & (predicted == 3)).sum()  # a row is a true class
    for c in range(4):
        assert metrics["precision"][c] == pytest.approx(confusion[c, c] / confusion[:, c].sum())
        assert metrics["recall"][c] == pytest.approx(confusion[c, c] / confusion[c].sum())
    assert metrics["loss"] == pytest.approx(
        np.mean([-np.log(p[y]) for p, y in zip(probabilities, labels, strict=True)])
    )


def test_metrics_where_a_class_is_missing(q2):
    labels = np.array([0, 0, 3])
    probabilities = np.eye(4)[[0, 1, 3]]
    metrics = q2.score(probabilities, labels)
    assert metrics["macro_auc"] is None
    assert metrics["balanced_accuracy"] == pytest.approx((0.5 + 1.0) / 2)
    assert np.isfinite(metrics["loss"])


def test_course_subset_takes_the_first_of_each_class(q2):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 250))
    subset = q2.course_test_subset(labels)
    assert len(subset) == len(set(subset)) == 529
    for c, count in enumerate((182, 55, 42, 250)):
        assert subset[labels[subset] == c].tolist() == np.flatnonzero(labels == c)[:count].tolist()


def test_prediction_does_not_depend_on_the_batch_size_and_records_no_gradients(q2, small_arrays):
    torch.manual_seed(0)
    model = q2.CNN(0.7)
    images = torch.from_numpy(small_arrays["val_images"])
    modes = []
    model.fc3.register_forward_hook(lambda *_: modes.append(torch.is_inference_mode_enabled() and not model.training))
    whole = q2.predict(model, images, batch_size=1000)
    np.testing.assert_allclose(q2.predict(model, images, batch_size=7), whole, atol=1e-6)
    assert len(modes) == 1 + 9 and all(modes)
    np.testing.assert_allclose(whole.sum(axis=1), 1, atol=1e-6)
