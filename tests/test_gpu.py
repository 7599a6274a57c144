"""Every question's path on a CUDA device, compared with the CPU: `pytest -m gpu`, half a minute."""

import importlib
import json
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT

import attention_approx as q1

bench_q2, gpu_q3 = (importlib.import_module(name) for name in ("bench_q2", "gpu_q3"))
pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device here")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions in float32, as on a CPU
    yield "cuda"
    torch.cuda.set_sync_debug_mode("default")
    torch.use_deterministic_algorithms(False)


def with_gradients(tensors: list[torch.Tensor], **options) -> list[torch.Tensor]:
    found = q1.taylor_attention(*tensors, **options)
    return [found.detach(), *torch.autograd.grad(found.square().sum(), tensors)]


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"key_mask": True}, {"center": True}], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)], ids=str)
@pytest.mark.parametrize("method", ["features", "direct"])
def test_attention_is_that_of_the_cpu_and_never_waits(gpu, options, dtype, tolerance, method):
    """Odd K: no kernel waits for the host, and none warns that it is not deterministic."""
    torch.manual_seed(0)
    data = [(scale * torch.randn(2, 3, 700, 16)).to(dtype) for scale in (0.25, 0.25, 1.0)]
    if "key_mask" in options:
        options = {"key_mask": torch.rand(2, 1, 700) < 0.8}
    exact = [x.double().requires_grad_() for x in data]
    expected = with_gradients(exact, method="direct", **options)
    inputs = [x.to(gpu).requires_grad_() for x in data]
    options = {name: value.to(gpu) if name == "key_mask" else value for name, value in options.items()}
    q1.taylor_attention(*inputs, method=method, **options).sum().backward()  # starts cuBLAS
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.cuda.set_sync_debug_mode("error")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = with_gradients(inputs, method=method, **options)
    torch.cuda.set_sync_debug_mode("default")
    for x, reference in zip(found, expected, strict=True):
        assert x.dtype == dtype
        assert (x.cpu().double() - reference).abs().max() <= tolerance * reference.abs().max()


@pytest.mark.parametrize("dim", [16, 64])
def test_long_sequences_are_those_of_the_cpu(gpu, dim):
    """Beyond LONG_ROW tokens sums are taken one sequence at a time, and features are made in larger blocks."""
    torch.manual_seed(0)
    data = [0.25 * torch.randn(2, 2 * q1.LONG_ROW + 5, dim) for _ in "qkv"]
    exact = [x.double().requires_grad_() for x in data]
    inputs = [x.to(gpu).requires_grad_() for x in data]
    for x, reference in zip(*(with_gradients(tensors, method="features") for tensors in (inputs, exact)), strict=True):
        assert (x.cpu().double() - reference).abs().max() <= 1e-4 * reference.abs().max()


def test_what_would_raise_is_nan_on_a_gpu(gpu):
    q = torch.randn(1, 600, 8, device=gpu)
    assert q1.taylor_attention(q, torch.full_like(q, torch.nan), q).isnan().all()


def test_all_training_loops_have_the_losses_of_the_cpu(gpu):
    result = bench_q2.device_loops(gpu, num_scans=800, rounds=1)
    assert set(result["losses"]) == {"course, on cuda", "ours, on cuda", "ours, CUDA graphs, on cuda", "ours, on cpu"}
    assert result["relative_difference"] < 1e-4


@pytest.mark.parametrize("recipe", ["homework", "strong"])
@pytest.mark.parametrize("no_maxpool", [False, True])
def test_a_run_learns_on_a_gpu_and_keeps_its_memory(gpu, q2, recipe, no_maxpool):
    images, labels = (torch.from_numpy(x).to(gpu) for x in bench_q2.draw_scans(803))  # a ragged last batch
    config = replace(q2.RECIPES[recipe], no_maxpool=no_maxpool, epochs=8)
    torch.manual_seed(1)
    model = q2.build_network(config).to(gpu)
    optimizer, losses, held, graphs = q2.make_optimizer(config, model), [], [], {}
    for epoch in range(config.epochs):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            losses.append(q2.train_epoch(model, optimizer, images, labels, config, epoch, graphs=graphs))
        held.append(torch.cuda.memory_allocated())
    assert losses[-1] < losses[0] and max(held[4:]) <= max(held[:4]) + 2**20
    scores = q2.evaluate(model, images, labels)
    assert scores["loss"] == pytest.approx(q2.evaluate(model.cpu(), images.cpu(), labels.cpu())["loss"], rel=1e-4)


def test_the_same_seed_gives_the_same_run(gpu, q2, small_npz, tmp_path):
    data, config = q2.utils.load_oct(str(small_npz)), replace(q2.RECIPES["homework"], epochs=2)
    first, second = (q2.train(config, data, tmp_path / name, torch.device(gpu)) for name in "ab")
    assert first["history"] == second["history"] and first["device"] == "cuda" and first["hardware"]["gpu"]


def test_stacked_networks_run_as_a_cuda_graph(gpu):
    assert set(bench_q2.stacked_speed(gpu, 1)["steps_per_second"]) == {"stacked", "stacked, CUDA graph"}


@pytest.mark.parametrize("decoder", gpu_q3.DECODERS)
def test_the_same_seed_teaches_the_same_speech(gpu, decoder):
    speech = gpu_q3.load(6, True, lambda line: None)
    losses = []
    for _ in range(2):
        step = gpu_q3.training(speech, decoder, "bfloat16", gpu)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # that a kernel is not deterministic
            losses.append([step([*speech.features]).tolist() for _ in range(4)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("decoder", gpu_q3.DECODERS)
def test_speech_is_learnt_and_written_as_on_the_cpu(gpu, decoder):
    speech = gpu_q3.load(6, True, lambda line: None)
    clips = [*speech.features]
    # A GPU draws other numbers than a CPU: without what is drawn.
    same = replace(speech.q3.PRESETS[gpu_q3.PRESET], mel_shift=0.0, text_dropout=0.0)
    steps = {place: gpu_q3.training(speech, decoder, "float32", place, same) for place in (gpu, "cpu")}
    losses = {place: [step(clips)[:2].cpu() for _ in range(3)] for place, step in steps.items()}  # without the guide's
    torch.testing.assert_close(losses[gpu], losses["cpu"], rtol=1e-2, atol=0)
    torch.testing.assert_close(losses[gpu][0], losses["cpu"][0], rtol=1e-4, atol=0)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        rounded = gpu_q3.training(speech, decoder, "bfloat16", gpu, same)(clips)
        assert rounded.dtype == torch.float32
        torch.testing.assert_close(rounded[:2].cpu(), losses["cpu"][0], rtol=0.05, atol=0)
    torch.manual_seed(0)
    model, logits = speech.q3.SpeechToText(decoder, speech.q3.PRESETS[gpu_q3.PRESET]).eval(), {}
    for place in ("cpu", gpu):
        audio, lengths, text = speech.q3.collate(clips, speech.features, speech.q3.TokenVectorizer(), place)
        with torch.inference_mode():
            logits[place] = model.to(place)(audio, lengths, text).cpu()
        assert len(model.generate(audio, lengths)) == len(clips)
    torch.testing.assert_close(logits[gpu], logits["cpu"], rtol=1e-3, atol=1e-3)


def test_the_benchmark_runs_on_a_gpu(gpu, tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "bench_gpu.py", "-quick", "-out", tmp_path / "gpu.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["device"] == "cuda" and record["gpu"]["gib"] > 0
    curve = record["q1"]["attention_curves"]["result"][0]
    assert all(np.isfinite(list(point["mib"].values())).all() for point in curve["points"])
