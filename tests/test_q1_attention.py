"""Question 1: Taylor attention against the sums written out in NumPy, its properties, and what it refuses."""

import copy
import functools
import itertools
import math
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import attention_approx as q1
from attention_approx import (
    TaylorState,
    error_bound,
    feature_map,
    num_features,
    softmax_attention,
    taylor_attention,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*negative:RuntimeWarning")
LINEAR_AND_DIRECT = pytest.mark.parametrize("method", ["features", "direct"])


def tokens(queries, keys, dim, width, *, batch=(), score=0.5, seed=0, dtype=torch.float64):
    """q, k, v with scores of about the deviation `score`."""
    generator = torch.Generator().manual_seed(seed)
    entry = math.sqrt(score / math.sqrt(dim))
    shapes = (queries, dim), (keys, dim), (keys, width)
    q, k, v = (torch.randn(*batch, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return (entry * q).to(dtype), (entry * k).to(dtype), v.to(dtype)


def written_out(q, k, v, num_terms, causal=False, keep=None):
    """sum_j P_K(q·k_j) v_j / sum_j P_K(q·k_j) in NumPy, float64, from powers and factorials."""
    q, k, v = (x.detach().double().numpy() for x in (q, k, v))
    scores = np.einsum("...id,...jd->...ij", q, k)
    weights = sum(scores**n / math.factorial(n) for n in range(num_terms)) * np.ones_like(scores)
    if causal:
        weights = weights * (np.arange(k.shape[-2]) <= np.arange(q.shape[-2])[:, None])
    if keep is not None:
        weights = weights * keep.numpy()[..., None, :]
    return torch.from_numpy(np.einsum("...ij,...jd->...id", weights, v) / weights.sum(-1)[..., None])


def difference(a, b):
    """The largest difference, relative to the largest number."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


# ---------------------------------------------------------------------------------------------------
# The feature map


@pytest.mark.parametrize("dim", [1, 2, 3, 7])
@pytest.mark.parametrize("num_terms", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_product_of_features_is_the_series(dim, num_terms, symmetric):
    q, k, _ = tokens(5, 5, dim, 1, score=2.0)
    phi_q, phi_k = (feature_map(x, num_terms, symmetric) for x in (q, k))
    expected = sum((q @ k.mT) ** n / math.factorial(n) for n in range(num_terms))
    torch.testing.assert_close(phi_q @ phi_k.mT, expected * torch.ones(5, 5), rtol=1e-12, atol=1e-12)
    assert phi_q.shape[-1] == num_features(dim, num_terms, symmetric)


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("num_terms", [1, 2, 3, 4, 5])
def test_features_are_counted_as_by_hand(dim, num_terms):
    exponents = np.stack(np.meshgrid(*[range(num_terms)] * dim)).reshape(dim, -1) if dim < 6 else None
    if exponents is not None:
        assert num_features(dim, num_terms) == int((exponents.sum(0) < num_terms).sum())
    assert num_features(dim, num_terms) == math.comb(dim + num_terms - 1, num_terms - 1)
    assert num_features(dim, num_terms, symmetric=False) == sum(dim**n for n in range(num_terms))


def test_three_terms_by_hand():
    root = math.sqrt(0.5)
    expected = [1, 2, 3, 4 * root, 6, 9 * root]  # 1, x, y, x²/√2, xy, y²/√2
    torch.testing.assert_close(feature_map(torch.tensor([2.0, 3.0])), torch.tensor(expected))


@pytest.mark.parametrize("num_terms", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("block", [1, 2, 3, 4, 8])
def test_the_fast_features_with_their_weights_are_the_series(num_terms, block):
    x, y, _ = tokens(9, 9, 7, 1, score=2.0)
    layout = q1._layout(7, num_terms, block)
    features = []
    for z in (x, y):
        buffer = z.new_empty(1, layout.num_lower + layout.num_top, 9)
        features.append(torch.cat([rows[0].clone() for _, rows in q1._features(z.mT[None], layout, buffer)]))
    product = torch.einsum("mi,mj,m->ij", *features, torch.tensor(layout.weights, dtype=x.dtype))
    torch.testing.assert_close(product, q1.exp_series(x @ y.mT, num_terms), rtol=1e-12, atol=1e-12)
    if block == 1:
        assert len(layout.weights) == num_features(7, num_terms)  # each monomial once


# ---------------------------------------------------------------------------------------------------
# Taylor attention against the sums written out


@LINEAR_AND_DIRECT
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_terms", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize(("length", "dim", "width"), [(1, 1, 1), (37, 1, 3), (130, 5, 7), (301, 9, 4), (67, 13, 1)])
def test_agrees_with_the_sums_written_out(monkeypatch, method, causal, num_terms, length, dim, width):
    monkeypatch.setattr(q1, "CAUSAL_CHUNK", 64)
    monkeypatch.setattr(q1, "PAIRS_CPU", 48 * length)
    monkeypatch.setattr(q1, "TILE_CPU", (2**12, 128))  # a ragged last tile
    q, k, v = tokens(length, length, dim, width, batch=(2,), score=0.5 if num_terms % 2 else 0.1)
    expected = written_out(q, k, v, num_terms, causal)
    ours = taylor_attention(q, k, v, num_terms, causal=causal, method=method)
    assert difference(ours, expected) < 1e-12
    ours = taylor_attention(*(x.float() for x in (q, k, v)), num_terms, causal=causal, method=method)
    assert ours.dtype == torch.float32
    assert difference(ours, written_out(*(x.float() for x in (q, k, v)), num_terms, causal)) < 1e-5


@pytest.mark.parametrize(("length", "dim", "num_terms"), [(5000, 8, 3), (2500, 64, 3), (2300, 16, 4), (1100, 8, 6)])
def test_agrees_at_full_size_whatever_the_method(length, dim, num_terms):
    q, k, v = tokens(length, length, dim, dim, score=0.25)
    expected = written_out(q, k, v, num_terms)
    for method in q1.METHODS:
        assert difference(taylor_attention(q, k, v, num_terms, method=method), expected) < 1e-12
        single = taylor_attention(*(x.float() for x in (q, k, v)), num_terms, method=method)
        assert difference(single, expected) < 1e-5
    causal = taylor_attention(q, k, v, num_terms, causal=True, method="features")
    assert difference(causal, written_out(q, k, v, num_terms, causal=True)) < 1e-12


def test_the_naive_form_agrees():
    q, k, v = tokens(50, 60, 6, 4, batch=(2, 3))
    for symmetric in (True, False):
        naive = q1.naive_taylor_attention(q, k, v, 5, symmetric=symmetric)
        assert difference(naive, written_out(q, k, v, 5)) < 1e-12


@LINEAR_AND_DIRECT
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(20, 90), (90, 20), (1, 33), (33, 1)])
def test_queries_and_keys_may_differ_in_number(monkeypatch, method, causal, queries, keys):
    monkeypatch.setattr(q1, "CAUSAL_CHUNK", 16)
    monkeypatch.setattr(q1, "PAIRS_CPU", 200)
    q, k, v = tokens(queries, keys, 4, 6)
    ours = taylor_attention(q, k, v, 3, causal=causal, method=method)
    assert difference(ours, written_out(q, k, v, 3, causal)) < 1e-12


@LINEAR_AND_DIRECT
def test_leading_dimensions_broadcast(method):
    q, _, _ = tokens(40, 40, 5, 3, batch=(2, 3))
    _, k, v = tokens(40, 40, 5, 3, batch=(3,), seed=1)
    ours = taylor_attention(q, k[:1], v, 3, method=method)  # one head of keys for all queries
    assert ours.shape == (2, 3, 40, 3)
    assert difference(ours, written_out(q, k[:1].expand_as(k), v, 3)) < 1e-12


def test_nothing_in_nothing_out():
    q, k, v = tokens(4, 6, 3, 2, batch=(2,))
    assert taylor_attention(q[:, :0], k, v).shape == (2, 0, 2)
    assert taylor_attention(q[:0], k[:0], v[:0]).shape == (0, 4, 2)
    for num_terms in (3, 4):
        assert taylor_attention(q[:, :0], k, v, num_terms, causal=True, method="features").shape == (2, 0, 2)


def test_one_term_is_the_mean_of_v():
    q, k, v = tokens(30, 40, 5, 3)
    ours = taylor_attention(q, k, v, 1)
    torch.testing.assert_close(ours, v.mean(-2, keepdim=True).expand(30, 3))


@LINEAR_AND_DIRECT
def test_scale_multiplies_the_scores(method):
    q, k, v = tokens(30, 30, 5, 3, score=2.0)
    assert difference(taylor_attention(q, k, v, scale=0.2, method=method), written_out(0.2 * q, k, v, 3)) < 1e-12


def test_the_exact_reference_is_torch_s_attention():
    q, k, v = tokens(40, 40, 8, 5, batch=(2, 3), score=3.0)
    for causal in (False, True):
        theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.7, is_causal=causal)
        assert difference(softmax_attention(q, k, v, scale=0.7, causal=causal), theirs) < 1e-12
    keep = torch.rand(2, 1, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0, attn_mask=keep[..., None, :])
    assert difference(softmax_attention(q, k, v, key_mask=keep), theirs) < 1e-12


def test_more_terms_come_closer_to_softmax():
    q, k, v = tokens(60, 60, 4, 3, score=0.4)
    exact = softmax_attention(q, k, v)
    errors = [difference(taylor_attention(q, k, v, terms), exact) for terms in range(1, 19)]
    assert all(b < a for a, b in itertools.pairwise(errors)), errors
    assert errors[-1] < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@LINEAR_AND_DIRECT
def test_half_precision_is_summed_in_float32(dtype, method):
    q, k, v = tokens(3000, 3000, 8, 4, dtype=dtype)
    v = v + 100  # in bfloat16 a sum of these would be off by far
    ours = taylor_attention(q, k, v, 3, method=method)
    assert ours.dtype == dtype
    expected = written_out(q, k, v, 3)
    assert difference(ours, expected) < torch.finfo(dtype).eps
    rounded = expected.to(dtype)  # all but a few ties are the nearest number of the dtype
    assert float((ours == rounded).double().mean()) > 0.95


def test_autocast_does_not_touch_the_sums():
    q, k, v = tokens(600, 600, 8, 4, dtype=torch.float32)
    calls = [
        lambda: taylor_attention(q, k, v, method="features"),
        lambda: taylor_attention(q, k, v, 4, method="direct"),
        lambda: softmax_attention(q, k, v, causal=True),
        lambda: TaylorState().update(k, v).query(q),
    ]
    plain = [call() for call in calls]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = [call() for call in calls]
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("settings", [{"method": "features"}, {"method": "direct"}, {"causal": True}])
def test_autocast_does_not_touch_the_gradients(settings):
    """A training loop may hold its backward pass, too, inside autocast."""

    def gradients() -> tuple:
        inputs = [x.requires_grad_() for x in tokens(1100, 1100, 8, 4, dtype=torch.float32)]
        return torch.autograd.grad(taylor_attention(*inputs, **settings).square().sum(), inputs)

    plain = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


# ---------------------------------------------------------------------------------------------------
# Masks, causality, streaming, centring


@LINEAR_AND_DIRECT
@pytest.mark.parametrize("num_terms", [1, 3, 4])
def test_a_masked_key_counts_as_if_it_were_not_there(method, num_terms):
    q, k, v = tokens(20, 50, 5, 3, batch=(2,))
    keep = torch.rand(50, generator=torch.Generator().manual_seed(1)) < 0.6
    without = taylor_attention(q, k[:, keep], v[:, keep], num_terms, method=method)
    for junk in (0.0, 1e30, math.nan, math.inf):
        k_junk, v_junk = (x.masked_fill(~keep[:, None], junk) for x in (k, v))
        ours = taylor_attention(q, k_junk, v_junk, num_terms, key_mask=keep, method=method)
        assert difference(ours, without) < 1e-13
    exact = softmax_attention(q, k, v.masked_fill(~keep[:, None], math.nan), key_mask=keep)
    assert difference(exact, softmax_attention(q, k[:, keep], v[:, keep])) < 1e-13


def test_a_mask_may_differ_from_sequence_to_sequence(monkeypatch):
    monkeypatch.setattr(q1, "CAUSAL_CHUNK", 16)
    q, k, v = tokens(50, 50, 5, 3, batch=(2, 3))
    keep = torch.rand(2, 1, 50, generator=torch.Generator().manual_seed(2)) < 0.6
    keep[..., 0] = True
    for causal in (False, True):
        for method in ("features", "direct"):
            ours = taylor_attention(q, k, v, 3, key_mask=keep, causal=causal, method=method)
            assert difference(ours, written_out(q, k, v, 3, causal, keep.expand(2, 3, 50))) < 1e-12


@LINEAR_AND_DIRECT
def test_what_comes_later_changes_nothing(monkeypatch, method):
    monkeypatch.setattr(q1, "CAUSAL_CHUNK", 32)
    monkeypatch.setattr(q1, "PAIRS_CPU", 24 * 150)
    q, k, v = tokens(150, 150, 6, 4, batch=(2,))
    whole = taylor_attention(q, k, v, 3, causal=True, method=method)
    for first in (1, 31, 32, 33, 100, 149):
        generator = torch.Generator().manual_seed(first)
        later = [x.clone() for x in (q, k, v)]
        for x in later:
            x[:, first:] = torch.randn(x[:, first:].shape, generator=generator, dtype=x.dtype)
        changed = taylor_attention(*later, 3, causal=True, method=method)
        assert torch.equal(changed[:, :first], whole[:, :first])
        assert not torch.allclose(changed[:, first:], whole[:, first:])
        prefix = taylor_attention(*(x[:, :first] for x in (q, k, v)), 3, causal=True, method=method)
        assert difference(prefix, whole[:, :first]) < 1e-13


@LINEAR_AND_DIRECT
def test_no_gradient_flows_from_the_past_to_the_future(monkeypatch, method):
    monkeypatch.setattr(q1, "CAUSAL_CHUNK", 16)
    q, k, v = (x.requires_grad_() for x in tokens(60, 60, 5, 3))
    taylor_attention(q, k, v, 3, causal=True, method=method)[:20].sum().backward()
    for x in (q, k, v):
        assert x.grad[20:].abs().max() == 0 and x.grad[:20].abs().max() > 0


@pytest.mark.parametrize("num_terms", [1, 2, 3, 4, 5])
def test_streaming_is_causal_attention(num_terms):
    q, k, v = tokens(70, 70, 5, 3, batch=(2, 2), score=0.2)
    causal = taylor_attention(q, k, v, num_terms, scale=0.5, causal=True)
    state = TaylorState(num_terms, scale=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        rows = [state.update(k[..., [i], :], v[..., [i], :]).query(q[..., [i], :]) for i in range(70)]
        blocks = TaylorState(num_terms, scale=0.5).update(k[..., :30, :], v[..., :30, :])
        last = blocks.update(k[..., 30:, :], v[..., 30:, :]).query(q[..., -5:, :])
    assert difference(torch.cat(rows, -2), causal) < 1e-12
    whole = taylor_attention(q[..., -5:, :], k, v, num_terms, scale=0.5)
    assert difference(last, whole) < 1e-12
    assert state.num_keys == 70


def test_a_state_passes_gradients_on():
    q, k, v = (x.requires_grad_() for x in tokens(12, 12, 4, 3))

    def streamed(q, k, v):
        state = TaylorState(3)
        return torch.cat([state.update(k[i : i + 1], v[i : i + 1]).query(q[i : i + 1]) for i in range(12)])

    assert torch.autograd.gradcheck(streamed, (q, k, v), fast_mode=True)


def test_centring_undoes_an_offset_of_the_keys():
    q, k, v = tokens(80, 80, 8, 4, score=0.3)
    offset = torch.full((8,), 1.5, dtype=k.dtype)
    exact = softmax_attention(q, k + offset, v)
    assert difference(exact, softmax_attention(q, k, v)) < 1e-12
    centred = taylor_attention(q, k + offset, v, center=True)
    assert difference(centred, taylor_attention(q, k, v, center=True)) < 1e-12
    plain = taylor_attention(q, k + offset, v)
    assert difference(centred, exact) < 0.2 * difference(plain, exact)
    keep = torch.arange(80) < 50
    masked = taylor_attention(q, k, v, center=True, key_mask=keep)
    assert difference(masked, taylor_attention(q, k[:50], v[:50], center=True)) < 1e-12


# ---------------------------------------------------------------------------------------------------
# Gradients


@LINEAR_AND_DIRECT
@pytest.mark.parametrize("num_terms", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"center": True, "scale": 0.7}, {"key_mask": torch.arange(11) % 3 != 1}]
)
def test_gradients_are_those_of_finite_differences(monkeypatch, method, num_terms, options):
    monkeypatch.setattr(q1, "CAUSAL_CHUNK", 4)
    monkeypatch.setattr(q1, "PAIRS_CPU", 30)
    monkeypatch.setattr(q1, "TILE_CPU", (64, 64))
    q, k, v = (x.requires_grad_() for x in tokens(11, 11, 6, 3, batch=(2,), score=0.2))
    attention = functools.partial(taylor_attention, num_terms=num_terms, method=method, **options)
    assert torch.autograd.gradcheck(attention, (q, k, v), fast_mode=True)


def test_gradients_of_long_sequences_are_those_of_plain_autograd():
    q, k, v = (x.requires_grad_() for x in tokens(2500, 2500, 16, 16, score=0.25))
    out_slope = torch.randn(2500, 16, generator=torch.Generator().manual_seed(3), dtype=q.dtype)
    weights = 1 + q @ k.mT + (q @ k.mT) ** 2 / 2
    expected = torch.autograd.grad(weights @ v / weights.sum(-1, keepdim=True), (q, k, v), out_slope)
    ours = torch.autograd.grad(taylor_attention(q, k, v, method="features"), (q, k, v), out_slope)
    for a, b in zip(ours, expected, strict=True):
        assert difference(a, b) < 1e-11
    single = [x.detach().float().requires_grad_() for x in (q, k, v)]
    ours = torch.autograd.grad(taylor_attention(*single), single, out_slope.float())
    for a, b in zip(ours, expected, strict=True):
        assert difference(a, b) < 1e-4


@LINEAR_AND_DIRECT
@pytest.mark.parametrize("wanted", ["q", "k", "v", "qv", "kv"])
def test_gradients_are_made_for_what_wants_them(method, wanted):
    inputs = dict(zip("qkv", tokens(12, 12, 4, 3), strict=True))
    for name in wanted:
        inputs[name].requires_grad_()
    taylor_attention(**inputs, method=method).square().sum().backward()
    partial = {name: inputs[name].grad for name in wanted}
    everything = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    taylor_attention(**everything, method=method).square().sum().backward()
    for name in "qkv":
        assert (inputs[name].grad is None) == (name not in wanted)
    for name, grad in partial.items():
        torch.testing.assert_close(grad, everything[name].grad)


def series_attention(q, k, v):
    """Three terms in plain operations."""
    weights = 1 + q @ k.mT + (q @ k.mT) ** 2 / 2
    return weights @ v / weights.sum(-1, keepdim=True)


def streamed(q, k, v):
    return TaylorState(3).update(k, v).query(q)


TWICE = {
    "features": functools.partial(taylor_attention, method="features"),
    "direct": functools.partial(taylor_attention, method="direct"),
    "state": streamed,
}


@pytest.mark.parametrize("form", TWICE)
def test_second_derivatives_are_those_of_plain_autograd(form):
    inputs = tokens(7, 7, 3, 2, seed=5)
    direction = tokens(7, 7, 3, 2, seed=6)

    def loss(attention, *inputs):
        return attention(*inputs).sin().sum()

    ours, plain = functools.partial(loss, TWICE[form]), functools.partial(loss, series_attention)
    for name in ("hvp", "vhp"):
        product = getattr(torch.autograd.functional, name)
        for a, b in zip(product(ours, inputs, direction)[1], product(plain, inputs, direction)[1], strict=True):
            assert b.abs().max() > 0.01
            assert difference(a, b) < 1e-12
    hessians = [torch.autograd.functional.hessian(f, inputs) for f in (ours, plain)]
    for a, b in zip(*map(itertools.chain.from_iterable, hessians), strict=True):
        assert difference(a, b) < 1e-12


@LINEAR_AND_DIRECT
@pytest.mark.parametrize("num_terms", [2, 3, 5])
@pytest.mark.parametrize("causal", [False, True])
def test_second_derivatives_are_those_of_finite_differences(monkeypatch, method, num_terms, causal):
    monkeypatch.setattr(q1, "CAUSAL_CHUNK", 4)
    monkeypatch.setattr(q1, "PAIRS_CPU", 30)
    monkeypatch.setattr(q1, "TILE_CPU", (64, 64))
    q, k, v = (x.requires_grad_() for x in tokens(9, 9, 3, 2, batch=(2,), score=0.2))
    attention = functools.partial(taylor_attention, num_terms=num_terms, method=method, causal=causal)
    assert torch.autograd.gradgradcheck(attention, (q, k, v), fast_mode=True)


# ---------------------------------------------------------------------------------------------------
# Never quietly wrong


@given(st.floats(-50, 50), st.sampled_from([1, 3, 5, 7, 9]))
@settings(max_examples=500, deadline=None)
def test_the_series_is_positive_for_odd_terms(t, num_terms):
    t = torch.tensor(t, dtype=torch.float64)
    assert q1.exp_series(t, num_terms) > 0
    if num_terms == 3:
        assert q1.exp_series(t, 3) >= 0.5


@LINEAR_AND_DIRECT
@pytest.mark.parametrize("num_terms", [3, 5])
def test_odd_terms_give_means_of_v_even_for_large_scores(method, num_terms):
    q, k, v = tokens(200, 200, 8, 3, score=30.0)
    ours = taylor_attention(q, k, v, num_terms, method=method)
    assert (ours >= v.amin(0) - 1e-9).all() and (ours <= v.amax(0) + 1e-9).all()


@pytest.mark.parametrize(
    ("num_terms", "root"), [(2, -1), (4, -1.5961), (6, -2.1806), (60, -17.4207), (100, -28.611)]
)  # the larger ones: mpmath with 100 digits
def test_the_root_of_an_even_series(num_terms, root):
    assert q1._negative_root(num_terms) == pytest.approx(root, abs=1e-3)


@LINEAR_AND_DIRECT
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_terms", [2, 4])
def test_negative_weights_are_counted(method, causal, num_terms):
    q, k, v = tokens(90, 90, 6, 3, batch=(2, 2), score=0.9)
    k[..., :10, :] = 0  # weights of 1: no denominator of an early row vanishes
    keep = torch.arange(90) % 7 != 3
    weights = q1.exp_series(q @ k.mT, num_terms)
    counted = torch.ones(90, 90, dtype=torch.bool).tril() if causal else torch.ones(90, 90, dtype=torch.bool)
    expected = int(((weights < 0) & counted & keep).sum())
    assert expected > 0
    with pytest.warns(RuntimeWarning, match=f"^{expected} weights are negative"):
        taylor_attention(q, k, v, num_terms, causal=causal, key_mask=keep, method=method)


def test_negative_weights_are_counted_after_centring():
    """A masked key is 0, and no longer when the mean is subtracted: it must not be counted then."""
    q, k, v = tokens(60, 60, 4, 3, score=0.5)
    k, keep = k + 2, torch.arange(60) % 2 == 0
    weights = 1 + q @ (k - k[keep].mean(0)).mT
    expected = int(((weights < 0) & keep).sum())
    assert expected > 0 and int((q @ -k[keep].mean(0) < -1).sum()) > 0
    with pytest.warns(RuntimeWarning, match=f"^{expected} weights are negative"):
        taylor_attention(q, k, v, 2, key_mask=keep, center=True)


@pytest.mark.filterwarnings("error")
def test_no_false_alarm():
    q, k, v = tokens(300, 300, 8, 3, score=0.1)
    taylor_attention(q, k, v, 4)
    q, k, v = tokens(300, 300, 8, 3, score=5.0)
    taylor_attention(q, k, v, 3)
    TaylorState(4).update(0.1 * k, v).query(0.1 * q)


@LINEAR_AND_DIRECT
def test_a_vanishing_denominator_is_an_error(method):
    q, v = torch.ones(3, 1, dtype=torch.float64), torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    k = torch.tensor([[-1.5], [-0.5]], dtype=torch.float64)  # weights -0.5 and 0.5
    q[2] = 0.1
    with pytest.raises(ValueError, match=r"^2 of 3 denominators are negative, vanish"):
        taylor_attention(q, k, v, 2, method=method)
    with pytest.raises(ValueError, match=r"^2 of 3 denominators"):
        TaylorState(2).update(k, v).query(q)
    with pytest.raises(ValueError, match=r"^2 of 3 denominators"):
        taylor_attention(q, k - 1, v, 2, method=method)  # negative as a whole


@LINEAR_AND_DIRECT
def test_overflow_is_an_error(method):
    q, k, v = tokens(10, 10, 4, 3, dtype=torch.float32)
    with pytest.raises(ValueError, match="too large"):
        taylor_attention(1e15 * q, 1e15 * k, v, 3, method=method)
    with pytest.raises(ValueError, match="overflow"):
        taylor_attention(1e3 * q, k, 1e36 * v, 3, method=method)
    with pytest.raises(ValueError, match="too large"):
        taylor_attention(q, 1e25 * k, v, 3, method=method)


def all_scores_minus_one(reach, num_keys=2000, seed=0):
    """One query and keys whose scores are all -1 although |q||k| is about `reach`: features cancel, scores do not."""
    length = math.sqrt(reach)
    q = torch.tensor([[length, length / 3]])
    along = q[0] / q[0].norm()
    across = torch.tensor([-along[1], along[0]])
    k = length * across * torch.ones(num_keys, 1) - along / q[0].norm()
    generator = torch.Generator().manual_seed(seed)
    return q.expand(num_keys, 2).clone(), k, torch.randn(num_keys, 3, generator=generator) + 5


@pytest.mark.parametrize("reach", [5, 30, 60, 100, 300, 1000, 3000, 1e5])
def test_features_that_would_cancel_are_not_used(reach):
    q, k, v = all_scores_minus_one(reach)
    expected = written_out(q, k, v, 3)
    assert difference(taylor_attention(q, k, v), expected) < q1.TOLERANCE  # auto: by features, or by pairs
    assert difference(taylor_attention(q, k, v, method="direct"), expected) < 1e-4
    if reach <= 60:
        assert difference(taylor_attention(q, k, v, method="features"), expected) < q1.TOLERANCE
    else:
        with pytest.raises(ValueError, match=r"^2000 of 2000 denominators .* within rounding .* method=.direct."):
            taylor_attention(q, k, v, method="features")
        with pytest.raises(ValueError, match=r"^2000 of 2000 denominators"):
            TaylorState(3).update(k, v).update(0.001 * k, v).query(q)


def test_a_denominator_of_weights_that_cancel_is_refused_by_pairs_too():
    """Weights of 1 and -1, up to 1e-9: positive, but of few digits in float32."""
    q = torch.ones(1, 1)
    k = torch.tensor([[0.0], [-2.0 + 1e-6]])
    with pytest.warns(RuntimeWarning, match="1 weights"), pytest.raises(ValueError, match="1 of 1 denominators"):
        taylor_attention(q, k, torch.ones(2, 1), 2, method="direct")


@LINEAR_AND_DIRECT
def test_a_long_key_spoils_no_query_that_does_not_see_it(monkeypatch, method):
    monkeypatch.setattr(q1, "CAUSAL_CHUNK", 8)
    q, k, v = tokens(20, 20, 8, 2, batch=(2,), dtype=torch.float32)
    plain = taylor_attention(q, k, v, causal=True, method=method)
    k[0, 19] *= 3e4  # the last key of the first sequence
    ours = taylor_attention(q, k, v, causal=True, method=method)
    assert torch.equal(ours[:, :19], plain[:, :19]) and torch.equal(ours[1], plain[1])


def test_scores_of_standard_normal_tokens_are_no_false_alarm():
    q, k, v = tokens(300, 300, 64, 4, score=8.0, dtype=torch.float32)
    for num_terms in (3, 5, 7, 9):
        ours = taylor_attention(q, k, v, num_terms, causal=True)
        assert difference(ours, written_out(q, k, v, num_terms, causal=True)) < 1e-4


def test_centring_takes_the_offset_out_of_the_check():
    q, k, v = tokens(600, 600, 8, 3, score=0.3)
    for method in ("features", "direct"):
        ours = taylor_attention(q.float(), (k + 1000).float(), v.float(), center=True, method=method)
        centred = (k + 1000).float().double()
        assert difference(ours, written_out(q, centred - centred.mean(0), v, 3)) < 1e-4


def test_large_numbers_that_undo_each_other_are_no_overflow():
    q, k, v = tokens(30, 30, 4, 3, dtype=torch.float32)
    ours = taylor_attention(1e20 * q, 1e-20 * k, v)
    assert difference(ours, written_out(1e20 * q.double(), 1e-20 * k.double(), v, 3)) < 1e-5


def test_an_infinite_result_is_an_error():
    q, k = torch.ones(1, 1).half(), torch.tensor([[-1.45], [-0.5]]).half()
    v = torch.tensor([[-60000.0], [60000.0]]).half()
    with pytest.raises(ValueError, match=r"overflow torch.float32 or torch.float16"):
        taylor_attention(q, k, v, 2)
    with pytest.raises(ValueError, match=r"1 numbers of the result overflow torch.float32"):
        taylor_attention(q.float(), k.float(), v.sign().float() * 3e37, 2)  # no sum overflows, their quotient does


@pytest.mark.parametrize("num_terms", [20, 33, 39, 60])
def test_many_terms(num_terms):
    generator = torch.Generator().manual_seed(0)
    q, k = (3 * torch.rand(1000, 1, generator=generator) for _ in range(2))
    v = torch.randn(1000, 2, generator=generator)
    expected = written_out(q, k, v, num_terms)
    assert difference(taylor_attention(q, k, v, num_terms), expected) < 1e-4
    if num_terms > 34:  # the weights 1/n! of the features vanish
        with pytest.raises(ValueError, match=r"too many for features in torch.float32"):
            taylor_attention(q, k, v, num_terms, method="features")
        assert difference(taylor_attention(*(x.double() for x in (q, k, v)), num_terms), expected) < 1e-10
    phi_q, phi_k = (feature_map(x, num_terms) for x in (q[:5], k[:5]))
    torch.testing.assert_close(phi_q @ phi_k.mT, torch.exp(q[:5] @ k[:5].mT), rtol=1e-4, atol=0)


def test_auto_takes_features_for_long_sequences_only(monkeypatch):
    chosen = []
    original = q1._key_sums
    monkeypatch.setattr(q1, "_key_sums", lambda *a: (chosen.append("features"), original(*a))[1])
    for length, causal, expected in (
        (64, False, []),
        (64, True, []),
        (2000, False, ["features"]),
        (2000, True, ["features"]),
    ):
        chosen.clear()
        q, k, v = tokens(length, length, 16, 16, score=0.2)
        taylor_attention(q, k, v, causal=causal)
        assert chosen == expected
    assert q1.crossover_length(10_000, 1000) > 1e9  # a number beyond floats


def test_warnings_point_at_the_caller():
    q, k, v = tokens(30, 30, 4, 3, score=0.6)
    with pytest.warns(RuntimeWarning) as caught:
        taylor_attention(q, k, v + 5, 4)
        TaylorState(4).update(k, v + 5).query(q)
    assert {warning.filename for warning in caught} == {__file__}


def test_the_state_says_that_weights_may_be_negative():
    q, k, v = tokens(30, 30, 4, 3, score=0.6)
    state = TaylorState(4).update(k, v + 5).update(0.01 * k, v)
    reach = q.norm(dim=-1) * k.norm(dim=-1).max()
    expected = int((reach > 1.5961).sum())
    assert 0 < expected < 30
    with pytest.warns(RuntimeWarning, match=f"weights of {expected} queries may be negative"):
        state.query(q)


GOOD = {"q": (4, 3), "k": (5, 3), "v": (5, 2)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_terms": 0}, ValueError, "num_terms must be at least 1, not 0"),
        ({"num_terms": 2.0}, TypeError, "num_terms must be a whole number, not 2.0"),
        ({"num_terms": True}, TypeError, "num_terms must be a whole number"),
        ({"q": torch.zeros(4, 2)}, ValueError, r"q and k must be of one width.*q \[4, 2\], k \[5, 3\]"),
        ({"q": torch.zeros(4, 0), "k": torch.zeros(5, 0)}, ValueError, "one width, at least 1"),
        ({"v": torch.zeros(4, 2)}, ValueError, r"k and v must be of one length.*k \[5, 3\], v \[4, 2\]"),
        ({"k": torch.zeros(0, 3), "v": torch.zeros(0, 2)}, ValueError, "one length, at least 1"),
        ({"q": torch.zeros(3)}, ValueError, r"q must be \[..., L, D\], not \[3\]"),
        ({"q": torch.zeros(2, 4, 3), "k": torch.zeros(3, 5, 3)}, ValueError, "leading dimensions do not fit"),
        ({"q": [[1.0]]}, TypeError, "q must be a tensor, not list"),
        ({"v": torch.zeros(5, 2, dtype=torch.int64)}, TypeError, "v must be of float64, .* not torch.int64"),
        ({"v": torch.zeros(5, 2, dtype=torch.complex64)}, TypeError, "not torch.complex64"),
        ({"v": torch.zeros(5, 2, dtype=torch.float64)}, TypeError, "q is torch.float32 .* v is torch.float64"),
        ({"q": torch.full((4, 3), math.nan)}, ValueError, "q holds 12 NaN or infinite"),
        ({"k": torch.full((5, 3), math.inf)}, ValueError, "k holds 15 NaN or infinite"),
        ({"v": torch.tensor([[0.0, math.nan]]).expand(5, 2)}, ValueError, "v holds 5 NaN or infinite"),
        ({"scale": math.nan}, ValueError, "scale must be a finite number"),
        ({"scale": 10**400}, ValueError, "scale must be a finite number"),
        ({"scale": "1"}, TypeError, "scale must be a number, not '1'"),
        ({"scale": torch.tensor(1.0)}, TypeError, "scale must be a number"),
        ({"key_mask": torch.zeros(5, dtype=torch.bool)}, ValueError, "key_mask drops every key in 1 of 1 sequences"),
        ({"key_mask": torch.ones(5)}, TypeError, "key_mask must be a tensor of bool"),
        ({"key_mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"key_mask must fit \[5\].*not \[4\]"),
        ({"key_mask": torch.ones(1, dtype=torch.bool)}, ValueError, r"key_mask must fit \[5\].*not \[1\]"),
        ({"key_mask": torch.arange(5) > 1, "causal": True}, ValueError, "2 queries see no key"),
        ({"center": True, "causal": True}, ValueError, "center=True needs the mean of all keys"),
        ({"method": "fast"}, ValueError, "method must be one of auto, direct, features"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {name: torch.zeros(shape) for name, shape in GOOD.items()} | {"num_terms": 3} | change
    with pytest.raises(error, match=message) as caught:
        taylor_attention(**arguments)
    assert "\n" not in str(caught.value)


def test_bad_calls_of_the_others_are_named():
    with pytest.raises(ValueError, match="dim must be at least 1"):
        num_features(0)
    with pytest.raises(TypeError, match="x must be of float64"):
        feature_map(torch.arange(3))
    with pytest.raises(ValueError, match="no keys yet"):
        TaylorState().query(torch.zeros(1, 3))
    state = TaylorState().update(torch.zeros(2, 5, 3), torch.zeros(2, 5, 2))
    with pytest.raises(ValueError, match="the state holds"):
        state.update(torch.zeros(2, 5, 4), torch.zeros(2, 5, 2))
    with pytest.raises(ValueError, match="does not fit the state"):
        state.query(torch.zeros(3, 1, 3))
    with pytest.raises(ValueError, match=r"^k holds 6 NaN"):
        state.update(torch.full((2, 1, 3), math.nan), torch.zeros(2, 1, 2))
    with pytest.raises(TypeError, match=r"^k must be a tensor"):
        state.update("a", torch.zeros(2, 1, 2))
    with pytest.raises(TypeError, match="scale must be a number"):
        TaylorState(scale="x")
    assert state.query(torch.zeros(2, 0, 3)).shape == (2, 0, 2)
    assert state.num_keys == 5


# ---------------------------------------------------------------------------------------------------
# In other people's programs


def test_the_import_needs_torch_alone_and_changes_nothing(tmp_path):
    """Also where the user has modules of the same names as ours."""
    for name in ("utils", "runs", "offline_data"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('this is not the module of attention_approx')")
    (tmp_path / "main.py").write_text(
        f"""
import sys, warnings
import numpy, torch, matplotlib
before = dict(matplotlib.rcParams), list(warnings.filters), torch.get_num_threads(), torch.get_rng_state()
loaded = set(sys.modules)
sys.path.append({str(ROOT)!r})
import attention_approx
after = dict(matplotlib.rcParams), list(warnings.filters), torch.get_num_threads(), torch.get_rng_state()
assert before[:3] == after[:3] and torch.equal(before[3], after[3])
new = {{name.split(".")[0] for name in set(sys.modules) - loaded}} - set(sys.stdlib_module_names)
assert new <= {{"attention_approx", "torch"}}, new
q = torch.randn(2, 5, 3)
attention_approx.taylor_attention(q, q, q)
"""
    )
    done = subprocess.run([sys.executable, "main.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (lambda x: x.to_sparse(), "q must be a dense tensor with values; it is torch.sparse_coo"),
        (lambda x: x[0].to_sparse_csr(), "it is torch.sparse_csr"),
        (lambda x: x.to("meta"), "it is on the meta device"),
        (lambda x: torch.nested.nested_tensor([x[0], x[1][:3]]), "it is nested"),
        (lambda x: torch.nested.nested_tensor([x[0], x[1][:3]], layout=torch.jagged), "it is nested"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(nested|Sparse)")
def test_tensors_without_plain_values_are_refused(kind, message):
    q, k, v = tokens(5, 6, 3, 2, batch=(2,))
    for attention in (taylor_attention, softmax_attention, error_bound, lambda q, k, v: TaylorState().update(q, v)):
        with pytest.raises(TypeError, match=message.replace("q must", "[qk] must")):
            attention(kind(q), k, v)
    with pytest.raises(TypeError, match="key_mask must be a tensor of bool, and dense"):
        taylor_attention(q, k, v, key_mask=kind(torch.ones(2, 6, dtype=torch.bool)[:, :, None])[..., 0])


@pytest.mark.parametrize("shape", [(2, 6), (3, 6), (2, 3, 1, 6), (1, 6)])
def test_a_mask_must_have_one_dimension_or_one_less_than_k(shape):
    """[B, Lk] with k [B, H, Lk, D] would be taken for one mask a head where B = H."""
    q, k, v = tokens(4, 6, 3, 2, batch=(2, 2))
    with pytest.raises(ValueError, match=r"key_mask must fit \[2, 2, 6\] with one dimension or with one less than k"):
        taylor_attention(q, k, v, key_mask=torch.ones(shape, dtype=torch.bool))
    keep = torch.rand(2, 1, 6, generator=torch.Generator().manual_seed(0)) < 0.7
    ours = taylor_attention(q, k, v, key_mask=keep)
    assert difference(ours, written_out(q, k, v, 3, keep=keep.expand(2, 2, 6))) < 1e-12
    ours = taylor_attention(q, k, v, key_mask=keep[0, 0])
    assert difference(ours, written_out(q, k, v, 3, keep=keep[0, 0])) < 1e-12


def gradients_of(attention, *inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(attention(*inputs).sin().sum(), inputs)


@pytest.mark.parametrize("form", TWICE)
def test_torch_compile(form):
    inputs = tokens(40, 40, 5, 3, batch=(2,), dtype=torch.float32)
    compiled = torch.compile(TWICE[form], backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), TWICE[form](*inputs))
    for a, b in zip(gradients_of(compiled, *inputs), gradients_of(TWICE[form], *inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", TWICE)
def test_torch_func_grad(form):
    inputs = tokens(12, 12, 4, 3)
    ours = torch.func.grad(lambda *x: TWICE[form](*x).sin().sum(), argnums=(0, 1, 2))(*inputs)
    for a, b in zip(ours, gradients_of(series_attention, *inputs), strict=True):
        assert difference(a, b) < 1e-12


@LINEAR_AND_DIRECT
def test_vmap_is_refused_with_what_to_do_instead(method):
    q, k, v = tokens(12, 12, 4, 3, batch=(2,))
    attention = functools.partial(taylor_attention, method=method)
    with pytest.raises(RuntimeError, match=r"under torch\.vmap: give q, k and v a leading dimension"):
        torch.vmap(attention)(q, k, v)
    with pytest.raises(RuntimeError, match=r"under torch\.vmap: give q, k and v a leading dimension"):
        torch.vmap(torch.func.grad(lambda *x: attention(*x).sum()))(q, k, v)


def test_a_state_is_copied_and_pickled():
    q, k, v = tokens(12, 12, 4, 3, batch=(2,))
    state = TaylorState(scale=0.5).update(k[:, :8], v[:, :8])
    copies = [copy.deepcopy(state), pickle.loads(pickle.dumps(state))]
    state.update(k[:, 8:], v[:, 8:])
    for other in copies:
        torch.testing.assert_close(other.query(q), taylor_attention(q, k[:, :8], v[:, :8], scale=0.5))
        torch.testing.assert_close(other.update(k[:, 8:], v[:, 8:]).query(q), state.query(q))


@pytest.mark.parametrize("form", TWICE)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(form, reentrant):
    inputs = tokens(12, 12, 4, 3, batch=(2,))
    plain = [x.clone().requires_grad_() for x in inputs]
    checkpointed = [x.clone().requires_grad_() for x in inputs]
    TWICE[form](*plain).sin().sum().backward()
    checkpoint(TWICE[form], *checkpointed, use_reentrant=reentrant).sin().sum().backward()
    for a, b in zip(checkpointed, plain, strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("form", TWICE)
def test_inference_mode_leaves_nothing_behind_that_spoils_training(form):
    q1._layout.cache_clear()
    inputs = tokens(12, 12, 4, 3)
    with torch.inference_mode():
        TWICE[form](*inputs)
    for a, b in zip(gradients_of(TWICE[form], *inputs), gradients_of(series_attention, *inputs), strict=True):
        assert difference(a, b) < 1e-12


@LINEAR_AND_DIRECT
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("empty", [(slice(0), slice(None)), (slice(None), slice(0))])
def test_gradients_of_empty_batches_and_of_no_queries(method, causal, empty):
    q, k, v = tokens(5, 6, 3, 2, batch=(2,))
    inputs = q[empty], k[empty[0]], v[empty[0]]
    grads = gradients_of(functools.partial(taylor_attention, method=method, causal=causal), *inputs)
    assert all(grad.shape == x.shape and not grad.any() for grad, x in zip(grads, inputs, strict=True))


class CountReads(TorchDispatchMode):
    """How often a number is read from a tensor: on a GPU, each time the host waits for the device."""

    reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("form", [*TWICE, "causal", "auto", "masked"])
def test_values_are_read_once_and_not_at_all_where_that_would_wait(monkeypatch, form):
    inputs = [x.requires_grad_() for x in tokens(1200, 1200, 8, 3)]
    options = {"causal": {"causal": True}, "masked": {"key_mask": torch.arange(1200) % 5 > 0}}.get(form, {})
    attention = TWICE.get(form) or functools.partial(taylor_attention, **options)
    with CountReads() as counter:
        attention(*inputs).sum().backward()
    assert counter.reads <= 1 + 2 * (form == "state")  # the state also looks at the keys and values of an update
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as on a GPU
    with CountReads() as counter:
        attention(*inputs).sum().backward()
    assert counter.reads == 2 * (form == "state")  # which it does on the CPU only


def test_where_values_cannot_be_read_the_rows_that_would_raise_are_nan(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    q, k, v = tokens(20, 20, 4, 3)
    q[3, 0] = math.nan
    expected = taylor_attention(q, k, v)
    assert expected[3].isnan().all() and expected[[0, 1, 2, *range(4, 20)]].isfinite().all()
    q, k, v = all_scores_minus_one(1000)
    assert taylor_attention(q, k, v, method="features").isnan().all()
    assert taylor_attention(q, k, v, key_mask=torch.zeros(2000, dtype=torch.bool)).isnan().all()


# ---------------------------------------------------------------------------------------------------
# The bound


@st.composite
def rows_of_scores(draw):
    """One query of length 1 in one dimension, so that the keys are the scores; values in the plane."""
    count = draw(st.integers(1, 12))
    numbers = st.floats(-6, 6, allow_subnormal=False)
    scores = draw(st.lists(numbers, min_size=count, max_size=count))
    values = draw(st.lists(st.tuples(numbers, numbers), min_size=count, max_size=count))
    return torch.tensor(scores, dtype=torch.float64)[:, None], torch.tensor(values, dtype=torch.float64)


def errors_and_bounds(q, k, v, num_terms):
    approximate = written_out(q, k, v, num_terms)
    errors = (approximate - softmax_attention(q, k, v)).norm(dim=-1)
    return errors, error_bound(q, k, v, num_terms)


@given(rows_of_scores(), st.integers(1, 8))
@settings(max_examples=3000, deadline=None)
def test_no_error_exceeds_the_bound(row, num_terms):
    k, v = row
    errors, bounds = errors_and_bounds(torch.ones(1, 1, dtype=torch.float64), k, v, num_terms)
    positive = bool((written_weights(k, num_terms) > 0).all())
    assert not bounds.isnan().any() and positive == bool((bounds < math.inf).all())
    if positive:
        assert (errors <= bounds * (1 + 1e-9) + 1e-12).all()


def written_weights(scores, num_terms):
    return sum(scores**n / math.factorial(n) for n in range(num_terms))


@pytest.mark.parametrize("num_terms", [1, 2, 3, 4, 5, 6])
def test_no_error_exceeds_the_bound_in_many_dimensions(num_terms):
    for seed, score in enumerate((0.05, 0.2, 0.5, 1.0, 2.0)):
        q, k, v = tokens(400, 300, 8, 5, score=score, seed=seed)
        errors, bounds = errors_and_bounds(q, k, v, num_terms)
        assert (errors <= bounds * (1 + 1e-9) + 1e-12).all()
        assert bool(bounds.isfinite().all()) == bool((written_weights(q @ k.mT, num_terms) > 0).all())


@pytest.mark.parametrize("num_terms", [1, 3, 5])
def test_two_points_attain_the_bound(num_terms):
    """Scores 0 and t with copies such that the share of t is 1 / (1 + sqrt(r(t))): there the bound is an equality."""
    copies, low, high = 2, -8.0, 0.0
    for _ in range(200):  # copies · exp(t) · sqrt(r(t)) must be 1
        t = (low + high) / 2
        low, high = (t, high) if copies * math.sqrt(written_weights(t, num_terms) * math.exp(t)) < 1 else (low, t)
    k = torch.tensor([[0.0]] + [[t]] * copies, dtype=torch.float64)
    v = torch.tensor([[3.0, 1.0]] + [[-1.0, -2.0]] * copies, dtype=torch.float64)
    errors, bounds = errors_and_bounds(torch.ones(1, 1, dtype=torch.float64), k, v, num_terms)
    assert float(errors) == pytest.approx(float(bounds), rel=1e-9)
    assert float(errors) > 1e-6


def test_the_bound_takes_the_shape_of_the_queries_and_the_scale():
    q, k, v = tokens(20, 30, 4, 3, batch=(2, 3))
    bounds = error_bound(q, k, v, scale=0.5)
    assert bounds.shape == (2, 3, 20) and bounds.dtype == torch.float64
    torch.testing.assert_close(bounds, error_bound(0.5 * q, k, v))
    by_hand = error_bound(q[1, 2], k[1, 2], v[1, 2], scale=0.5)
    torch.testing.assert_close(bounds[1, 2], by_hand)
    assert error_bound(q[:0], k[:0], v[:0]).shape == (0, 3, 20)


def test_the_diameter_is_the_largest_distance():
    _, _, v = tokens(1, 700, 2, 4)
    torch.testing.assert_close(q1._diameter(v), torch.cdist(v, v).max())
    v[300:302] *= torch.tensor([[50.0], [-50.0]])
    torch.testing.assert_close(q1._diameter(v), torch.cdist(v, v).max())


def test_the_bound_is_infinite_where_a_weight_is_negative_even_if_all_values_are_equal():
    one = torch.ones(1, 1)
    assert float(error_bound(one, torch.tensor([[-2.0]]), torch.ones(1, 3), 2)) == math.inf
    assert float(error_bound(one, torch.tensor([[-0.5]]), torch.ones(1, 3), 2)) == 0
