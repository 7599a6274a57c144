"""Question 1: self-attention in time linear in the length, by the Taylor series of the exponential.

    python attention_approx.py                     every table, curve and figure of question 1
    python attention_approx.py -quick              the same in seconds, with short sequences, into runs/
    python attention_approx.py -lengths 1024 8192 -dims 32 -terms 3 5 -dtype float64 -out runs/q1.json -figures runs

    from attention_approx import TaylorState, taylor_attention
    z = taylor_attention(q, k, v, scale=q.shape[-1] ** -0.5)      # q, k, v [..., L, D]; three terms of the series

Attention gives query i the mean of the values v_j, weighted by exp(q_i·k_j). All pairs of L tokens are looked at:
time in L² D, and memory in L² where the weights are kept. Instead:

1. The exponential is replaced by the first K terms of its series:  P_K(t) = sum_{n<K} t^n / n!.
2. A power of a dot product is a dot product of monomials (multinomial theorem):
       (q·k)^n / n! = sum_{|a|=n} q^a k^a / a!        x^a = x_1^a_1 ... x_D^a_D,  a! = a_1! ... a_D!
   so that P_K(q·k) = phi(q)·phi(k) with the M = C(D+K-1, K-1) features phi_a(x) = x^a / sqrt(a!), |a| < K.
3. Then Z = softmax(Q K^T) V ~ Diag(Phi(Q) Phi(K)^T 1)^-1 Phi(Q) Phi(K)^T V, one query, key and value a row.
4. Multiplied from the right, Phi(K)^T V has M rows of a value's width, whatever L is: time in L M D.

(K alone is the number of terms, D alone the width of queries and keys; in products Q, K, V are the matrices.) The
approximation is good where the scores are small: the error grows like score^K / K!. For odd K every weight is
positive; for even K a weight can be negative, which is counted and warned about.
"""

import argparse
import itertools
import json
import math
import numbers
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from tqdm import tqdm

import runs
import utils
from runs import InputError, number

# ---------------------------------------------------------------------------------------------------
# The series and its feature map


def num_features(dim: int, num_terms: int = 3, symmetric: bool = True) -> int:
    """The dimension M of the feature map for vectors of `dim` coordinates and `num_terms` terms of the series.

    C(dim + num_terms - 1, num_terms - 1) monomials of degree below num_terms if each counts once (`symmetric`),
    sum_{n < num_terms} dim^n if the coordinates' order counts. Raises TypeError, ValueError.
    """
    _check_count("dim", dim)
    _check_count("num_terms", num_terms)
    if symmetric:
        return math.comb(dim + num_terms - 1, num_terms - 1)
    return sum(dim**degree for degree in range(num_terms))


def feature_map(x: Tensor, num_terms: int = 3, symmetric: bool = True) -> Tensor:
    """phi(x) with phi(q)·phi(k) = sum_{n < num_terms} (q·k)^n / n!, exactly.

    x [..., D] -> [..., M], M = num_features(D, num_terms, symmetric). With `symmetric` each monomial comes once,
    phi_a(x) = x^a / sqrt(a!); else the degree n is the outer product x (x) ... (x) x / sqrt(n!), all D^n entries.
    This is the definition, for reading and testing: `taylor_attention` never holds the features of a sequence.
    Raises TypeError, ValueError.
    """
    _check_tensor("x", x, least_dims=1)
    dim = x.shape[-1]
    num_features(dim, num_terms)  # raises if there is no such map
    degrees = [torch.ones_like(x[..., :1])]
    for degree in range(1, num_terms):
        if symmetric:
            exponents = list(itertools.combinations_with_replacement(range(dim), degree))
            roots = [math.prod(math.factorial(a.count(i)) for i in set(a)) ** -0.5 for a in exponents]
            monomials = x[..., torch.tensor(exponents, device=x.device)].prod(-1)
            degrees.append(monomials * torch.tensor(roots, dtype=x.dtype, device=x.device))
        else:
            outer = x[..., :, None] * degrees[-1][..., None, :]
            degrees.append(outer.flatten(-2) / math.sqrt(degree))
    return torch.cat(degrees, -1)


def exp_series(t: Tensor | float, num_terms: int) -> Tensor | float:
    """P_K(t) = sum_{n < num_terms} t^n / n!, elementwise, by Horner's rule."""
    value = 0 * t + 1
    for n in range(num_terms - 1, 0, -1):
        value = 1 + t * value / n
    return value


# ---------------------------------------------------------------------------------------------------
# What is approximated, and the approximation as the formula says it


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float = 1.0, causal: bool = False, key_mask: Tensor | None = None
) -> Tensor:
    """Softmax(scale · Q K^T) V, exactly, as the formula says it: time and memory in Lq·Lk.

    Arguments, shapes and errors as in `taylor_attention`.
    """
    inputs = _prepare(q, k, v, scale, causal, key_mask)
    with torch.autocast(q.device.type, enabled=False):
        scores = inputs.q.mT @ inputs.k
        if inputs.keep is not None:
            scores = scores.masked_fill(~inputs.keep[:, None, :], -math.inf)
        if causal:
            scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
        return inputs.restore(inputs.w[:, :-1] @ scores.softmax(-1).mT)


def naive_taylor_attention(q: Tensor, k: Tensor, v: Tensor, num_terms: int = 3, *, symmetric: bool = False) -> Tensor:
    """D^-1 Phi(Q) Phi(K)^T V in four lines: linear in L, but all features of all tokens are held at once."""
    phi_q, phi_k = feature_map(q, num_terms, symmetric), feature_map(k, num_terms, symmetric)  # [..., L, M]
    numerator = phi_q @ (phi_k.mT @ v)
    denominator = phi_q @ phi_k.sum(-2)[..., None]
    return numerator / denominator


# ---------------------------------------------------------------------------------------------------
# Input that is checked and brought to one form


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")


def _check_scale(scale: float) -> None:
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"scale must be a number, not {scale!r}")
    if not abs(scale) <= sys.float_info.max:
        raise ValueError("scale must be a finite number")


def _check_tensor(name: str, x: Tensor, least_dims: int = 2) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{name} must be of float64, float32, bfloat16 or float16, not {x.dtype}")
    if x.dim() < least_dims:
        raise ValueError(f"{name} must be {'[..., L, D]' if least_dims == 2 else '[..., D]'}, not {list(x.shape)}")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> torch.Size:
    """The leading dimensions that q, k and v broadcast to. Raises TypeError, ValueError."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x)
        if x.dtype != q.dtype or x.device != q.device:
            raise TypeError(f"q is {q.dtype} on {q.device}, {name} is {x.dtype} on {x.device}: they must be alike")
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.shape[-1] != k.shape[-1] or q.shape[-1] == 0:
        raise ValueError(f"q and k must be of one width, at least 1: {shapes}")
    if k.shape[-2] != v.shape[-2] or k.shape[-2] == 0:
        raise ValueError(f"k and v must be of one length, at least 1: {shapes}")
    try:
        return torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    except RuntimeError:
        raise ValueError(f"the leading dimensions do not fit together: {shapes}") from None


@dataclass
class _Inputs:
    """Queries, keys and values in columns, with one batch dimension N, in the dtype that sums are accumulated in."""

    q: Tensor  # [N, D, Lq], times scale
    k: Tensor  # [N, D, Lk], 0 where masked
    w: Tensor  # [N, E + 1, Lk]: the values, and ones below them for the denominator; 0 where masked
    keep: Tensor | None  # [N, Lk], bool: the keys that take part
    seen: Tensor  # [N or 1, Lq or 1], float: how many keys each query sees
    sizes: tuple[float, float, float]  # bounds on the norms of queries and keys; the largest |value|, at least 1
    batch: torch.Size  # the leading dimensions
    dtype: torch.dtype  # of the result

    def restore(self, z: Tensor) -> Tensor:
        """[N, E, Lq] as [..., Lq, E] in the caller's dtype."""
        return z.mT.contiguous().reshape(*self.batch, z.shape[2], z.shape[1]).to(self.dtype)


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float = 1.0,
    causal: bool = False,
    key_mask: Tensor | None = None,
    center: bool = False,
) -> _Inputs:
    """Check everything that a caller can get wrong and bring it to one form. Raises TypeError, ValueError."""
    batch = _check_shapes(q, k, v)
    _check_scale(scale)
    if center and causal:
        raise ValueError("center=True needs the mean of all keys, which causal=True must not see")
    keep = _check_mask(key_mask, batch, k)
    seen = _count_seen(keep, q, k, causal)

    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    flat = [x.expand(*batch, *x.shape[-2:]).reshape(batch.numel(), *x.shape[-2:]) for x in (q, k, v)]
    queries, keys, values = (x.to(accumulate).mT for x in flat)
    w = torch.cat([values.mT, values.new_ones(values.shape[0], values.shape[2], 1)], -1).mT
    if scale != 1:
        queries = queries * float(scale)
    if keep is not None:  # NaN in a masked key must not matter either
        keys, w = (x.masked_fill(~keep[:, None], 0) for x in (keys, w))
    sizes = _sizes(queries, keys, w)
    if center:
        keys = keys - keys.sum(-1, keepdim=True) / seen[:, None]
        if keep is not None:
            keys = keys.masked_fill(~keep[:, None], 0)
        sizes = _sizes(queries, keys, w)
    return _Inputs(queries, keys, w, keep, seen, sizes, batch, q.dtype)


def _check_mask(key_mask: Tensor | None, batch: torch.Size, k: Tensor) -> Tensor | None:
    """The mask as [N, Lk], or None."""
    if key_mask is None:
        return None
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        raise TypeError("key_mask must be a tensor of bool: True where the key takes part")
    wanted = torch.Size([*batch, k.shape[-2]])
    try:
        if key_mask.shape[-1:] != wanted[-1:]:
            raise RuntimeError
        return key_mask.to(k.device).expand(wanted).reshape(batch.numel(), k.shape[-2])
    except RuntimeError:
        shape = list(key_mask.shape)
        raise ValueError(f"key_mask must fit {list(wanted)} (leading dimensions, keys), not {shape}") from None


def _count_seen(keep: Tensor | None, q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """How many keys each query sees, [N or 1, Lq or 1]. Raises ValueError if a query sees none."""
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    if keep is None:
        counts = torch.arange(1, num_keys + 1)[None] if causal else torch.tensor([[num_keys]])
        counts = counts.to(k.device)
    else:
        counts = keep.cumsum(-1) if causal else keep.sum(-1, keepdim=True)
    if causal:  # query i sees the keys 0 to i, or all if there are fewer
        counts = counts[:, torch.arange(num_queries, device=k.device).clamp(max=num_keys - 1)]
    if keep is not None and num_queries and bool((counts == 0).any()):
        raise ValueError(
            f"{int((counts == 0).sum())} queries see no key: key_mask drops all up to their position"
            if causal
            else f"key_mask drops every key in {int((counts == 0).sum())} of {len(counts)} sequences"
        )
    return counts.to(torch.float64 if k.dtype == torch.float64 else torch.float32)


def _sizes(q: Tensor, k: Tensor, w: Tensor) -> tuple[float, float, float]:
    """Upper bounds on the norms of queries and keys, and the largest value; raises ValueError for NaN and infinity."""
    with torch.no_grad():
        zero = torch.zeros((), dtype=w.dtype, device=w.device)
        extremes = [x.mT.aminmax() if x.numel() else (zero, zero) for x in (q, k, w)]
        bounds = torch.stack(list(itertools.chain(*extremes))).tolist()  # one wait for the device
    sizes = [max(abs(low), abs(high)) for low, high in zip(bounds[::2], bounds[1::2], strict=True)]
    for name, x, size in zip("qkv", (q, k, w), sizes, strict=True):
        if not math.isfinite(size):
            raise ValueError(f"{name} holds {int((~x.isfinite()).sum())} NaN or infinite numbers")
    root = math.sqrt(q.shape[1])
    return root * sizes[0], root * sizes[1], sizes[2]


def _norms(x: Tensor) -> Tensor:
    """Euclidean norms of the columns of x [..., D, L] -> [..., L]; vector_norm is fifty times slower along this dim."""
    return x.square().sum(-2).sqrt()


# ---------------------------------------------------------------------------------------------------
# Linear time. From here on a sequence is [N, D, L]: a feature of many tokens lies in one row, so that products of
# features and the big matrix products run along contiguous memory. `w` [N, E, L] holds the values, and ones below
# them for the denominator. A feature here is a plain product of coordinates; the weights 1/a! are multiplied once
# into the sums over the keys, which do not grow with L.


@dataclass(frozen=True)
class _Product:
    """Features that are a block of coordinates times some features of one degree less. All slices are of rows."""

    coordinates: slice
    others: slice
    out: slice  # len(coordinates) * len(others) rows

    @property
    def sizes(self) -> tuple[int, int]:
        return self.coordinates.stop - self.coordinates.start, self.others.stop - self.others.start

    def factors(self, lower: Tensor) -> tuple[Tensor, Tensor]:
        """The coordinates [N, c, 1, n] and the others [N, 1, m, n] among the lower features."""
        return lower[:, self.coordinates, None], lower[:, None, self.others]

    def unfold(self, rows: Tensor, first_row: int = 0) -> Tensor:
        """These products [N, c, m, n] among rows of which the first is the feature number `first_row`."""
        return rows[:, self.out.start - first_row : self.out.stop - first_row].unflatten(1, self.sizes)


@dataclass(frozen=True)
class _Layout:
    """The order of the features: the constant 1, the coordinates, then the products degree by degree."""

    size: int  # all features
    lower: int  # those held for a tile: all but the highest degree (up to K = 2 all), the factors of the products
    products: list[_Product]  # the degrees 2 to K-2
    top: list[list[_Product]]  # the degree K-1 in groups, each made and used at once
    weights: Tensor  # [size], float64: what each feature counts in the sum over all features


@lru_cache(maxsize=64)
def _layout(dim: int, num_terms: int, block: int, group_rows: int) -> _Layout:
    """Degree n is made of degree n-1: a coordinate times every product that begins with it or with a later one.

    In this order those are the last rows of degree n-1, one slice, and each monomial comes once. A `block` of
    coordinates is multiplied at once: that makes fewer and larger operations, at the price that within a block a
    monomial comes in several orders, which share its weight.
    """
    edges = [*range(1, dim + 1, block), dim + 1]  # row 0 is the constant
    blocks = [slice(*edge) for edge in itertools.pairwise(edges)]
    starts, end = edges[:-1], dim + 1  # where the rows begin whose first coordinate is in this block or later
    degrees = []
    for _ in range(2, num_terms):
        degree, row = [], end
        for coordinates, start in zip(blocks, starts, strict=True):
            rows = (coordinates.stop - coordinates.start) * (end - start)
            degree.append(_Product(coordinates, slice(start, end), slice(row, row + rows)))
            row += rows
        degrees.append(degree)
        starts, end = [product.out.start for product in degree], row

    size = 1 if num_terms == 1 else end
    lower = degrees[-1][0].out.start if degrees else size
    top = []
    for product in degrees[-1] if degrees else []:
        if not top or product.out.stop - top[-1][0].out.start > group_rows:
            top.append([])
        top[-1].append(product)
    products = list(itertools.chain(*degrees[:-1]))
    return _Layout(size, lower, products, top, _weights(size, blocks, list(itertools.chain(*degrees))))


def _weights(size: int, blocks: list[slice], products: list[_Product]) -> Tensor:
    """The weights w with sum_m w_m f_m(q) f_m(k) = P_K(q·k), f being the products without weights.

    Of the n! orders of n coordinates those sorted by block are kept, so that one feature stands for
    n! / (b_1! b_2! ...) of them if b_i coordinates lie in block i; with the series' 1/n! its weight is the product
    of all 1/b_i!.
    """
    if size == 1:
        return torch.ones(1, dtype=torch.float64)
    weights = torch.ones(size, dtype=torch.float64)
    front = torch.full((size,), -1)  # the block at the front of each product, and how many coordinates are of it
    repeats = torch.ones(size, dtype=torch.int64)
    for block, coordinates in enumerate(blocks):
        front[coordinates] = block
    for product in products:
        block, width = front[product.coordinates.start], product.sizes[0]
        count = torch.where(front[product.others] == block, repeats[product.others] + 1, 1)
        front[product.out] = block
        repeats[product.out] = count.repeat(width)
        weights[product.out] = (weights[product.others] / count).repeat(width)
    return weights


class _Workspace:
    """Room for the features of n tokens of N sequences, used again for every tile of that size."""

    def __init__(self, layout: _Layout, num_sequences: int, num_tokens: int, like: Tensor):
        self.layout = layout
        most_rows = max((group[-1].out.stop - group[0].out.start for group in layout.top), default=0)
        self.room = like.new_empty(num_sequences, layout.lower + most_rows, num_tokens)
        self.room[:, 0] = 1
        self.lower = self.room[:, : layout.lower]
        self._products = [(*p.factors(self.lower), p.unfold(self.lower)) for p in layout.products]
        self.groups = []  # (rows, [N, rows, n], how to fill it); each in the same place, below the lower features
        for group in layout.top:
            rows = slice(group[0].out.start, group[-1].out.stop)
            top = self.room[:, layout.lower : layout.lower + rows.stop - rows.start]
            views = [(*p.factors(self.lower), p.unfold(top, rows.start)) for p in group]
            self.groups.append((rows, top, views))

    def fill(self, x: Tensor) -> None:
        """Compute the lower features of x [N, D, n]."""
        self.lower[:, 1 : 1 + x.shape[1]].copy_(x[:, : self.layout.lower - 1])
        for coordinates, others, out in self._products:
            torch.mul(coordinates, others, out=out)

    def features(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """All features of x [N, D, n], as (rows, features [N, rows, n]); each is overwritten by the next."""
        self.fill(x)
        if not self.groups:
            yield slice(0, self.layout.lower), self.lower
        for i, (rows, top, products) in enumerate(self.groups):
            for coordinates, others, out in products:
                torch.mul(coordinates, others, out=out)
            if i == 0:  # together with the lower features: one matrix product less
                yield slice(0, rows.stop), self.room[:, : rows.stop]
            else:
                yield rows, top


# How many features are made at once: on a CPU they should stay in its caches, on a GPU they should keep it busy.
# Within a factor of two the figures matter little.
_TILES = {"cpu": (256, 2**19, 2048)}  # device -> rows of a group, numbers of a tile, tokens of a tile
_TILES_GPU = (4096, 2**26, 2**17)


def _tiles(x: Tensor, layout: _Layout) -> Iterator[tuple[slice, slice, _Workspace]]:
    """Cut x [N, D, L] into tiles: (sequences, tokens, workspace)."""
    num_sequences, _, length = x.shape
    _, numbers, most_tokens = _TILES.get(x.device.type, _TILES_GPU)
    rows = max([layout.lower, *(group[-1].out.stop - group[0].out.start for group in layout.top)])
    tokens = min(most_tokens, max(64, 2 ** int(math.log2(max(1, numbers // rows)))))
    sequences = max(1, tokens // max(1, length))
    workspaces = {}
    for first_sequence in range(0, num_sequences, sequences):
        for first_token in range(0, length, tokens):
            shape = min(sequences, num_sequences - first_sequence), min(tokens, length - first_token)
            if shape not in workspaces:
                workspaces[shape] = _Workspace(layout, *shape, x)
            yield (
                slice(first_sequence, first_sequence + sequences),
                slice(first_token, first_token + tokens),
                workspaces[shape],
            )


# Everything rests on one expression in three variables, F(x, w, s) = sum_l f(x_l) · s^T w_l, with the features f,
# and on its three derivatives. The forward pass needs those by s and w, the backward passes all three.


def _sum_over_tokens(x: Tensor, w: Tensor, layout: _Layout) -> Tensor:
    """dF/ds = sum_l w_l f(x_l)^T: x [N, D, L], w [N, E, L] -> [N, E, M]."""
    sums = x.new_zeros(x.shape[0], w.shape[1], layout.size)
    for sequences, tokens, workspace in _tiles(x, layout):
        for rows, features in workspace.features(x[sequences, :, tokens]):
            sums[sequences, :, rows].baddbmm_(w[sequences, :, tokens], features.mT)
    return sums


def _sum_over_features(x: Tensor, s: Tensor, layout: _Layout) -> Tensor:
    """dF/dw = s f(x_l): x [N, D, L], s [N, E, M] -> [N, E, L]."""
    sums = x.new_empty(x.shape[0], s.shape[1], x.shape[2])
    for sequences, tokens, workspace in _tiles(x, layout):
        for rows, features in workspace.features(x[sequences, :, tokens]):
            first = rows.start == 0
            sums[sequences, :, tokens].baddbmm_(s[sequences, :, rows], features, beta=0 if first else 1)
    return sums


def _gradient_of_tokens(x: Tensor, w: Tensor, s: Tensor, layout: _Layout) -> Tensor:
    """dF/dx_l: x [N, D, L], w [N, E, L], s [N, E, M] -> [N, D, L], back through the products, highest degree first."""
    grad = torch.zeros_like(x)
    if layout.size == 1:
        return grad
    for sequences, tokens, workspace in _tiles(x, layout):
        s_columns, w_columns = s[sequences].mT, w[sequences, :, tokens]
        workspace.fill(x[sequences, :, tokens])
        # Into a tensor that is there: around a backward pass autocast may be on, and would round the result.
        grad_lower = torch.bmm(s_columns[:, : layout.lower], w_columns, out=torch.empty_like(workspace.lower))
        for (rows, top, _), group in zip(workspace.groups, layout.top, strict=True):
            torch.bmm(s_columns[:, rows], w_columns, out=top)
            for product in group:
                _backward_of_product(product, product.unfold(top, rows.start), workspace.lower, grad_lower)
        for product in reversed(layout.products):
            _backward_of_product(product, product.unfold(grad_lower), workspace.lower, grad_lower)
        grad[sequences, :, tokens] = grad_lower[:, 1 : 1 + x.shape[1]]
    return grad


def _backward_of_product(product: _Product, grad_out: Tensor, lower: Tensor, grad_lower: Tensor) -> None:
    """Add to the gradients of the factors what the gradient of their product (overwritten) gives them."""
    coordinates, others = product.factors(lower)
    grad_lower[:, product.coordinates] += (grad_out * others).sum(2)
    grad_lower[:, product.others] += grad_out.mul_(coordinates).sum(1)


class _KeySums(torch.autograd.Function):
    """Phi(K)^T V with the features' weights: k [N, D, L], w [N, E, L] -> [N, E, M]."""

    @staticmethod
    def forward(ctx, k: Tensor, w: Tensor, layout: _Layout) -> Tensor:
        ctx.save_for_backward(k, w)
        ctx.layout = layout
        return _sum_over_tokens(k, w, layout).mul_(layout.weights.to(k))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple:
        k, w = ctx.saved_tensors
        grad_sums = grad_output * ctx.layout.weights.to(k)
        need_k, need_w, _ = ctx.needs_input_grad
        grad_k = _gradient_of_tokens(k, w, grad_sums, ctx.layout) if need_k else None
        grad_w = _sum_over_features(k, grad_sums, ctx.layout) if need_w else None
        return grad_k, grad_w, None


class _QueryProducts(torch.autograd.Function):
    """Phi(Q) S: q [N, D, L], the sums over the keys s [N, E, M] -> [N, E, L]."""

    @staticmethod
    def forward(ctx, q: Tensor, s: Tensor, layout: _Layout) -> Tensor:
        ctx.save_for_backward(q, s)
        ctx.layout = layout
        return _sum_over_features(q, s, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple:
        q, s = ctx.saved_tensors
        need_q, need_s, _ = ctx.needs_input_grad
        grad_q = _gradient_of_tokens(q, grad_output, s, ctx.layout) if need_q else None
        grad_s = _sum_over_tokens(q, grad_output, ctx.layout) if need_s else None
        return grad_q, grad_s, None


def _features_fit(num_terms: int, dtype: torch.dtype) -> bool:
    """Whether the smallest weight of a feature, 1/(K-1)!, is a normal number of the dtype of the sums."""
    return math.lgamma(num_terms) < -math.log(torch.finfo(dtype).tiny)


def _features_layout(dim: int, num_terms: int, like: Tensor) -> _Layout:
    if not _features_fit(num_terms, like.dtype):
        raise ValueError(f"{num_terms} terms are too many for features in {like.dtype}: their weights 1/n! vanish")
    # Blocks of four beat single coordinates at three terms; with more terms the repeated monomials cost more.
    return _layout(dim, num_terms, 4 if num_terms <= 3 else 1, _TILES.get(like.device.type, _TILES_GPU)[0])


def _linear_sums(q: Tensor, k: Tensor, w: Tensor, num_terms: int) -> Tensor:
    """sum_j P_K(q_i·k_j) w_j by features: q [N, D, Lq], k [N, D, Lk], w [N, E, Lk] -> [N, E, Lq]."""
    layout = _features_layout(q.shape[1], num_terms, q)
    return _QueryProducts.apply(q, _KeySums.apply(k, w, layout), layout)


CAUSAL_CHUNK = 1024  # tokens


def _causal_linear_sums(q: Tensor, k: Tensor, w: Tensor, num_terms: int) -> Tensor:
    """The same over j <= i: directly within a chunk, by features for the running sums over the chunks before."""
    layout = _features_layout(q.shape[1], num_terms, q)
    chunks, before = [q.new_zeros(q.shape[0], w.shape[1], 0)], None
    for first in range(0, q.shape[2], CAUSAL_CHUNK):
        q_chunk, k_chunk, w_chunk = (x[:, :, first : first + CAUSAL_CHUNK] for x in (q, k, w))
        sums = _PairSums.apply(q_chunk, k_chunk, w_chunk, num_terms, True)
        if before is not None:
            sums = sums + _QueryProducts.apply(q_chunk, before, layout)
        chunks.append(sums)
        if k_chunk.shape[2] and first + CAUSAL_CHUNK < q.shape[2]:
            key_sums = _KeySums.apply(k_chunk, w_chunk, layout)
            before = key_sums if before is None else before + key_sums
    return torch.cat(chunks, -1)


# ---------------------------------------------------------------------------------------------------
# Quadratic time: every pair of tokens, a tile at a time. Faster for short sequences.

PAIR_TILE, CAUSAL_PAIR_TILE = 512, 256  # tokens; smaller tiles waste less above the diagonal


def _series_(t: Tensor, num_terms: int, out: Tensor) -> Tensor:
    """P_K(t) into `out`; 0 for no terms."""
    if num_terms <= 1:
        return out.fill_(num_terms)
    torch.mul(t, 1 / (num_terms - 1), out=out).add_(1)
    for n in range(num_terms - 2, 0, -1):
        out.mul_(t)
        if n > 1:
            out.mul_(1 / n)
        out.add_(1)
    return out


def _pair_tiles(q: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[slice, slice, slice, Tensor, Tensor]]:
    """Tiles of all pairs: (sequences, queries, keys, scores [n, keys, queries], room of the same shape)."""
    num_sequences, num_queries, num_keys = q.shape[0], q.shape[2], k.shape[2]
    side = CAUSAL_PAIR_TILE if causal else PAIR_TILE
    sequences = max(1, side**2 // max(1, min(side, num_queries) * min(side, num_keys)))
    if q.device.type != "cpu":
        sequences *= 64
    most = min(sequences, num_sequences) * min(side, num_queries) * min(side, num_keys)
    scores_room, room = q.new_empty(most), q.new_empty(most)
    for first in range(0, num_sequences, sequences):
        some = slice(first, min(first + sequences, num_sequences))
        for first_query in range(0, num_queries, side):
            queries = slice(first_query, min(first_query + side, num_queries))
            for first_key in range(0, min(num_keys, queries.stop) if causal else num_keys, side):
                keys = slice(first_key, min(first_key + side, num_keys))
                shape = some.stop - some.start, keys.stop - keys.start, queries.stop - queries.start
                scores = scores_room[: math.prod(shape)].view(shape)
                torch.bmm(k[some, :, keys].mT, q[some, :, queries], out=scores)
                yield some, queries, keys, scores, room[: math.prod(shape)].view(shape)


class _PairSums(torch.autograd.Function):
    """sum_j P_K(q_i·k_j) w_j pair by pair: q [N, D, Lq], k [N, D, Lk], w [N, E, Lk] -> [N, E, Lq]."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, w: Tensor, num_terms: int, causal: bool) -> Tensor:
        ctx.save_for_backward(q, k, w)
        ctx.num_terms, ctx.causal = num_terms, causal
        sums = q.new_zeros(q.shape[0], w.shape[1], q.shape[2])
        for some, queries, keys, scores, room in _pair_tiles(q, k, causal):
            weights = _series_(scores, num_terms, out=room)
            if causal:
                weights.triu_(keys.start - queries.start)
            sums[some, :, queries].baddbmm_(w[some, :, keys], weights)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple:
        q, k, w = ctx.saved_tensors
        grad_q, grad_k, grad_w = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(w)
        for some, queries, keys, scores, room in _pair_tiles(q, k, ctx.causal):
            grad_out = grad_output[some, :, queries]
            weights = _series_(scores, ctx.num_terms, out=room)
            if ctx.causal:
                weights.triu_(keys.start - queries.start)
            grad_w[some, :, keys].baddbmm_(grad_out, weights.mT)
            grad_scores = _series_(scores, ctx.num_terms - 1, out=room)  # the derivative of P_K is P_{K-1}
            grad_scores.mul_(torch.bmm(w[some, :, keys].mT, grad_out, out=scores))
            if ctx.causal:
                grad_scores.triu_(keys.start - queries.start)
            grad_q[some, :, queries].baddbmm_(k[some, :, keys], grad_scores)
            grad_k[some, :, keys].baddbmm_(q[some, :, queries], grad_scores.mT)
        return grad_q, grad_k, grad_w, None, None


# ---------------------------------------------------------------------------------------------------
# Taylor attention

METHODS = ("auto", "direct", "features")


def taylor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_terms: int = 3,
    *,
    scale: float = 1.0,
    causal: bool = False,
    key_mask: Tensor | None = None,
    center: bool = False,
    method: str = "auto",
) -> Tensor:
    """Attention with P_K(scale · q·k) in place of exp(scale · q·k), K = num_terms; any K >= 1 (K = 1: the mean of v).

    q [..., Lq, D], k [..., Lk, D], v [..., Lk, E] -> [..., Lq, E], in the dtype of q; the leading dimensions
    broadcast. Sums are accumulated in float32, or in float64 for float64. Differentiable once, in reverse mode.

    scale     multiplies the scores; 1 as in the homework, D**-0.5 in a transformer.
    causal    query i sees the keys 0 to i only (all of them if there are fewer), as scaled_dot_product_attention does.
    key_mask  [..., Lk] bool, True where the key takes part; the others count as if they were not there. The leading
              dimensions broadcast: [B, 1, Lk] for B sequences of several heads.
    center    subtract the mean key: softmax attention stays the same, and the scores get smaller where the keys
              share an offset. Not with causal.
    method    "features": time linear in the length, for any length; "direct": over all pairs, faster for short
              sequences; "auto": the faster of both, but "direct" where the rounding of features might exceed 1 % of
              the largest value (|q||k| far larger than the scores; from about 70 on in float32 with three terms).

    For odd K all weights are positive. For even K a weight is negative where a score lies below the root of P_K:
    a RuntimeWarning gives their number (counting looks at pairs that are long enough to get there: up to
    quadratic time). Raises ValueError if denominators are negative, vanish within rounding or overflow; for NaN or
    infinite input, shapes that do not fit, num_terms < 1, a mask that leaves a query without keys; TypeError for
    other dtypes than float64, float32, bfloat16, float16, or mixed ones.
    """
    _check_count("num_terms", num_terms)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    inputs = _prepare(q, k, v, scale, causal, key_mask, center)
    with torch.autocast(q.device.type, enabled=False):  # sums need the precision
        negative = _negative_weights(inputs, num_terms, causal) if num_terms % 2 == 0 else None
        if method == "features" or (method == "auto" and _features_are_faster(inputs, num_terms, causal)):
            attend = _causal_linear_sums if causal else _linear_sums
            sums = attend(inputs.q, inputs.k, inputs.w, num_terms)
            bad = _count_imprecise(sums, inputs, lambda: _longest_seen_key(inputs, causal), num_terms)
            if bad == 0:
                return _finish(sums, inputs, num_terms)
            if method == "features":
                raise ValueError(_too_large(bad, sums, num_terms) + '; method="direct" loses less')
        sums = _PairSums.apply(inputs.q, inputs.k, inputs.w, num_terms, causal)
        bad = _count_unusable(sums, inputs, negative)
        if bad:
            raise ValueError(_too_large(bad, sums, num_terms))
        return _finish(sums, inputs, num_terms)


def crossover_length(dim: int, num_terms: int) -> float:
    """The length from which features are faster than all pairs: fitted to what benchmarks/bench_q1.py measures.

    All pairs cost L² D operations and features L M D, so the length is in proportion to M; the constant stands for
    what a call costs besides, which is more where the lower features are computed tile by tile.
    """
    return (350 if num_terms <= 3 else 500) + 0.9 * min(num_features(dim, num_terms), 2**60)


def _features_are_faster(inputs: _Inputs, num_terms: int, causal: bool) -> bool:
    num_queries, num_keys = inputs.q.shape[2], inputs.k.shape[2]
    length = 2 * num_queries * num_keys / max(1, num_queries + num_keys)  # what counts is pairs over tokens
    crossover = crossover_length(inputs.q.shape[1], num_terms) * (2 if causal else 1)
    return length >= crossover and _features_fit(num_terms, inputs.q.dtype)


# ---------------------------------------------------------------------------------------------------
# Never quietly wrong


TOLERANCE = 0.01  # what rounding may change in the result, as a share of the largest value, in the worst case
ROUNDING = 16  # the worst case in units of eps: 13 was the largest error found, for equal keys, whose errors add up


def _too_large(bad: int, sums: Tensor, num_terms: int) -> str:
    return (
        f"{bad} of {sums[:, -1].numel()} denominators are negative, vanish within rounding or overflow: "
        f"the scores are too large for {num_terms} terms in {sums.dtype}; scale them down"
        + ("" if num_terms % 2 else " or take an odd number of terms")
    )


def _longest_seen_key(inputs: _Inputs, causal: bool) -> Tensor:
    """The norm of the longest key that each query sees, [N, Lq or 1]."""
    norms = _norms(inputs.k)
    if not causal:
        return norms.amax(-1, keepdim=True)
    last = torch.arange(inputs.q.shape[2], device=norms.device).clamp(max=norms.shape[1] - 1)
    return norms.cummax(-1).values[:, last]


@torch.no_grad()
def _count_imprecise(sums: Tensor, inputs: _Inputs, longest_key: Callable[[], Tensor | float], num_terms: int) -> int:
    """For how many queries the rounding of the feature form may exceed TOLERANCE.

    A score is a sum of products of coordinates, and its powers are expanded too: what cancels there leaves an error
    of up to ROUNDING · eps · P_K(|q| |k|) in the mean weight. `longest_key` is called only where bounds on all norms
    do not settle it.
    """
    if sums[:, -1].numel() == 0:
        return 0
    means = sums[:, -1] / inputs.seen
    share = ROUNDING * torch.finfo(sums.dtype).eps / TOLERANCE
    smallest, biggest = (float(extreme) for extreme in means.aminmax())
    if smallest > share * exp_series(inputs.sizes[0] * inputs.sizes[1], num_terms) and biggest < math.inf:
        return 0  # NaN does not get through here
    limits = share * exp_series(_norms(inputs.q) * longest_key(), num_terms)
    return int((~((means > limits) & means.isfinite())).sum())


@torch.no_grad()
def _count_unusable(sums: Tensor, inputs: _Inputs, negative: Tensor | None) -> int:
    """How many denominators are not finite, not positive, or drown in what weights of both signs cancel (even K)."""
    denominators = sums[:, -1]
    limits = 0.0
    if negative is not None:
        magnitudes = denominators + 2 * negative  # the sum of the absolute weights
        limits = ROUNDING * torch.finfo(sums.dtype).eps / TOLERANCE * magnitudes
    return int((~((denominators > limits) & denominators.isfinite())).sum())


def _finish(sums: Tensor, inputs: _Inputs, num_terms: int) -> Tensor:
    """Sums [N, E + 1, Lq] -> their first E rows over the last one, [..., Lq, E]. Raises ValueError on overflow.

    With positive weights a result lies between the values, so that only the sums can overflow; they are looked at
    where the sizes of the input do not rule that out.
    """
    z = inputs.restore(sums[:, :-1] / sums[:, -1:])
    if z.numel() == 0:
        return z
    logs = [math.log(max(1.0, size)) for size in inputs.sizes]
    num_keys = float(inputs.seen.max())
    log_of_largest = (num_terms - 1) * (logs[0] + logs[1]) + logs[2] + math.log(num_keys * num_terms)
    if num_terms % 2 == 0 or log_of_largest > math.log(torch.finfo(z.dtype).max):
        bad = int((~z.isfinite()).sum())
        if bad:
            raise ValueError(f"{bad} numbers of the result overflow {sums.dtype} or {z.dtype}: scale q, k or v down")
    return z


@lru_cache
def _negative_root(num_terms: int) -> float:
    """The only real root of P_K for even K, below which a weight is negative. By bisection on exact fractions."""
    low, high = Fraction(-num_terms), Fraction(0)
    for _ in range(50):
        middle = (low + high) / 2
        if exp_series(middle, num_terms) < 0:
            low = middle
        else:
            high = middle
    return float(high)


@torch.no_grad()
def _negative_weights(inputs: _Inputs, num_terms: int, causal: bool) -> Tensor | None:
    """Warn of weights below zero; returns the sum of their absolute values for each query [N, Lq], None without any.

    Only queries and keys that are long enough to get below the root are looked at.
    """
    root = _negative_root(num_terms)
    if inputs.sizes[0] * inputs.sizes[1] < -root:
        return None
    count, sums = 0, inputs.q.new_zeros(inputs.q.shape[0], inputs.q.shape[2])
    for q, k, query_sums in zip(inputs.q, inputs.k, sums, strict=True):
        q_norms, k_norms = _norms(q), _norms(k)
        if q_norms.numel() == 0:
            continue
        keys = (k_norms * q_norms.amax() >= -root).nonzero()[:, 0]
        queries = (q_norms * k_norms.amax() >= -root).nonzero()[:, 0]
        for some in queries.split(1024):
            scores = q[:, some].mT @ k[:, keys]
            below = scores < root
            if causal:
                below &= keys <= some[:, None]
            count += int(below.sum())
            query_sums[some] = -exp_series(scores, num_terms).masked_fill(~below, 0).sum(-1)
    if count == 0:
        return None
    warnings.warn(
        f"{count} weights are negative: their scores lie below {root:.3f}, where {num_terms} terms of the series "
        "are negative; use an odd number of terms or smaller scores",
        RuntimeWarning,
        stacklevel=4,  # the caller of taylor_attention; no_grad is a frame too
    )
    return sums


class TaylorState:
    """The causal sums as a state of constant size: keys and values stream in, queries can be asked at any time.

        state = TaylorState(num_terms=3, scale=0.125)
        for q, k, v in tokens:                         # each [..., 1, D], [..., 1, D], [..., 1, E]
            z = state.update(k, v).query(q)            # [..., 1, E]: attention over all keys so far

    Token by token this is taylor_attention(..., causal=True); keys of a longer update are all seen by the next query.
    The leading dimensions must stay the same. For even K the keys are gone when a query comes, so the warning counts
    the queries for which a negative weight cannot be ruled out. Errors as in `taylor_attention` by features.
    """

    def __init__(self, num_terms: int = 3, *, scale: float = 1.0):
        _check_count("num_terms", num_terms)
        _check_scale(scale)
        self.num_terms, self.scale = num_terms, scale
        self.num_keys = 0
        self.sums: Tensor | None = None  # [N, E + 1, M]: the features of the keys times the values and ones
        self._kind: tuple | None = None  # leading dimensions, D, E, dtype
        self._longest_key = self._largest_value = 0.0

    def update(self, k: Tensor, v: Tensor) -> "TaylorState":
        """Add keys [..., n, D] and values [..., n, E]; returns the state."""
        _check_tensor("k", k)
        inputs = _prepare(k[..., :0, :], k, v)
        kind = tuple(inputs.batch), k.shape[-1], v.shape[-1], k.dtype
        if self._kind not in (None, kind):
            raise ValueError(f"the state holds (leading dimensions, D, E, dtype) {self._kind}, not {kind}")
        with torch.autocast(k.device.type, enabled=False):
            sums = _KeySums.apply(inputs.k, inputs.w, _features_layout(k.shape[-1], self.num_terms, inputs.k))
        self.sums = sums if self.sums is None else self.sums + sums
        self._kind = kind
        self.num_keys += k.shape[-2]
        self._longest_key = max(self._longest_key, float(_norms(inputs.k.detach()).amax()))
        self._largest_value = max(self._largest_value, inputs.sizes[2])
        return self

    def query(self, q: Tensor) -> Tensor:
        """Attention of the queries [..., n, D] over all keys so far, [..., n, E]. The state stays as it is."""
        if self.sums is None:
            raise ValueError("no keys yet: call update(k, v) first")
        _check_tensor("q", q)
        batch, dim, _, dtype = self._kind
        if (tuple(q.shape[:-2]), q.shape[-1], q.dtype) != (batch, dim, dtype):
            raise ValueError(f"q {list(q.shape)} of {q.dtype} does not fit the state's {[*batch, 'n', dim]} of {dtype}")
        inputs = _prepare(q, q.new_zeros(1, dim), q.new_zeros(1, 1), self.scale)  # the keys are in the sums
        inputs.seen = torch.full_like(inputs.seen, self.num_keys)
        inputs.sizes = inputs.sizes[0], self._longest_key, self._largest_value
        if self.num_terms % 2 == 0:
            self._warn_of_negative_weights(inputs.q)
        with torch.autocast(q.device.type, enabled=False):
            sums = _QueryProducts.apply(inputs.q, self.sums, _features_layout(dim, self.num_terms, inputs.q))
            bad = _count_imprecise(sums, inputs, lambda: self._longest_key, self.num_terms)
            if bad:
                raise ValueError(_too_large(bad, sums, self.num_terms))
            return _finish(sums, inputs, self.num_terms)

    def _warn_of_negative_weights(self, queries: Tensor) -> None:
        reach = _norms(queries.detach()) * self._longest_key
        doubtful = int((reach > -_negative_root(self.num_terms)).sum())
        if doubtful:
            warnings.warn(
                f"weights of {doubtful} queries may be negative: an even number of terms needs small scores",
                RuntimeWarning,
                stacklevel=3,
            )


# ---------------------------------------------------------------------------------------------------
# A proven bound on the error


def error_bound(q: Tensor, k: Tensor, v: Tensor, num_terms: int = 3, *, scale: float = 1.0) -> Tensor:
    """A bound on |z_hat - z| (Euclidean) for each query: [..., Lq], float64. Time in Lq·Lk: it looks at every score.

    With r(t) = P_K(t) exp(-t) the approximate weights are the exact ones times r(t_j), normalised again. If r lies
    between m and M on a row, no reweighting by such factors moves more than tanh(ln(M/m)/4) of the weight, and
    moving a share s of the weight moves the mean of v by at most s times the diameter of v:

        |z_hat - z| <= tanh(ln(max_j r(t_j) / min_j r(t_j)) / 4) · max_{i,j} |v_i - v_j|

    Two different scores, each with a suitable number of keys, attain it. r falls strictly for odd K, so that there
    the extreme scores decide; for even K the bound is infinite where a weight is not positive. Rounding is no part
    of it: neither that of the attention nor its own, about 1e-16 of the diameter for scores around 1. It holds for
    `taylor_attention` to all keys, without `center`.

    Raises ValueError and TypeError for input that `taylor_attention` refuses, TypeError on MPS: it has no float64.
    """
    _check_count("num_terms", num_terms)
    inputs = _prepare(q, k, v, scale)
    bounds = inputs.q.new_empty(inputs.q.shape[0], inputs.q.shape[2], dtype=torch.float64)
    for bound, *sequence in zip(bounds, inputs.q, inputs.k, inputs.w[:, :-1], strict=True):
        queries, keys, values = (x.detach().double().T for x in sequence)
        diameter = _diameter(values)
        for rows, some in zip(bound.split(256), queries.split(256), strict=True):
            scores = some @ keys.T
            weights = exp_series(scores, num_terms)
            log_ratio = weights.clamp(min=0).log() - scores
            share = torch.tanh((log_ratio.amax(-1) - log_ratio.amin(-1)) / 4)
            rows.copy_((share * diameter).masked_fill((weights <= 0).any(-1), math.inf))
    return bounds.reshape(*inputs.batch, inputs.q.shape[2])


def _diameter(v: Tensor) -> Tensor:
    """The largest distance between two rows of v [L, E]."""
    v = v - v.mean(0)  # distances from sums of squares lose nothing of the largest one after this
    squares = v.square().sum(-1)
    tops = [
        (squares[first : first + 256, None] + squares - 2 * v[first : first + 256] @ v.T).amax()
        for first in range(0, len(v), 256)
    ]
    return torch.stack(tops).amax().clamp(min=0).sqrt()


# ---------------------------------------------------------------------------------------------------
# Experiments: what the features cost, how good the approximation is, what it saves


def feature_table(dims: list[int], terms: list[int]) -> list[dict]:
    """M for every D and K: each monomial once, and every order of the coordinates."""
    return [
        {"dim": d, "num_terms": k, "merged": num_features(d, k), "unmerged": num_features(d, k, symmetric=False)}
        for d in dims
        for k in terms
    ]


def random_tokens(length: int, dim: int, deviation: float, seed: int, dtype: torch.dtype, device: torch.device):
    """q, k, v [1, L, D]: normal random numbers, v of deviation 1, q and k such that scores q·k have `deviation`."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(1, length, dim, generator=generator, dtype=torch.float64) for _ in range(3)]
    entry = math.sqrt(deviation / math.sqrt(dim))
    return tuple(x.to(device, dtype) for x in (entry * draws[0], entry * draws[1], draws[2]))


def relative_error(approximate: Tensor, exact: Tensor) -> float:
    """|Z_hat - Z| / |Z| in the Frobenius norm."""
    return float((approximate.double() - exact).norm() / exact.norm())


def measure_errors(args: argparse.Namespace, device: torch.device) -> dict:
    """The error of Z against the size of the scores, for each K, beside the mean of V and the proven bound."""
    length, dim = args.error_length, max(args.dims)
    points = []
    for deviation in tqdm(args.deviations, desc="errors", disable=None, leave=False):
        point = {"deviation": deviation, "mean_of_v": [], "terms": {k: [] for k in args.terms}}
        for seed in args.seeds:
            q, k, v = random_tokens(length, dim, deviation, seed, args.dtype, device)
            exact = softmax_attention(*(x.double() for x in (q, k, v)))
            point["mean_of_v"].append(relative_error(v.mean(-2, keepdim=True).expand_as(v), exact))
            for num_terms in args.terms:
                bound = error_bound(q, k, v, num_terms).norm() / exact.norm()
                point["terms"][num_terms].append(try_approximation(q, k, v, num_terms, exact) | {"bound": float(bound)})
        points.append(point)
    return {"length": length, "dim": dim, "seeds": args.seeds, "points": [summarise(point) for point in points]}


def try_approximation(q: Tensor, k: Tensor, v: Tensor, num_terms: int, exact: Tensor) -> dict:
    """The relative error, or None where even K leaves no usable denominator; and whether weights were negative."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        try:
            error = relative_error(taylor_attention(q, k, v, num_terms), exact)
        except ValueError:
            error = None
    return {"error": error, "negative": bool(caught)}


def summarise(point: dict) -> dict:
    """Means and deviations over the seeds; None where a seed has no error or no finite bound."""
    terms = {}
    for num_terms, trials in point["terms"].items():
        errors, bounds = ([trial[name] for trial in trials] for name in ("error", "bound"))
        terms[str(num_terms)] = {
            "error": runs.mean_and_std(errors) if None not in errors else None,
            "bound": max(bounds) if math.isfinite(max(bounds)) else None,
            "runs_with_negative_weights": sum(trial["negative"] for trial in trials),
            "runs_without_result": errors.count(None),
        }
    return {
        "deviation": point["deviation"],
        "mean_of_v": runs.mean_and_std(point["mean_of_v"]),
        "terms": terms,
    }


def time_interleaved(
    functions: dict[str, Callable], rounds: int, least_seconds: float = 0.02, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds a call of each function, once a round, in turns that change from round to round.

    A function is called again until `least_seconds` have passed, and the mean of these calls counts. `device` is the
    type of device that they compute on: a GPU is waited for.
    """
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = {name: [] for name in functions}
    for function in functions.values():
        function()
        synchronise()
    order = list(functions)
    for _ in range(rounds):
        for name in order:
            calls, started = 0, time.perf_counter()
            while calls == 0 or time.perf_counter() - started < least_seconds:
                functions[name]()
                synchronise()
                calls += 1
            seconds[name].append((time.perf_counter() - started) / calls)
        order = order[1:] + order[:1]
    return seconds


def peak_memory(function: Callable, device: str = "cpu") -> int:
    """The most bytes of tensors that a call holds at a time, its result included, what was there before not.

    `device` is the type of device that it computes on.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports missing GPUs as errors
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return max(itertools.accumulate((change for _, change in changes), initial=0))


SOFTMAX, FORMULA, TAYLOR, NAIVE = "softmax, fused", "softmax, as the formula", "Taylor", "Taylor, naive features"


def attention_forms(q: Tensor, k: Tensor, v: Tensor, num_terms: int) -> dict[str, Callable]:
    """The ways to compute attention that are compared, as calls without arguments."""
    forms = {
        SOFTMAX: lambda: F.scaled_dot_product_attention(q[None], k[None], v[None], scale=1.0),
        TAYLOR: lambda: taylor_attention(q, k, v, num_terms),
    }
    length, dim = q.shape[-2:]
    if length**2 < 2**28:  # 1 GiB of scores, and as much of weights
        forms[FORMULA] = lambda: softmax_attention(q, k, v)
    if length * num_features(dim, num_terms, symmetric=False) < 2**27:
        forms[NAIVE] = lambda: naive_taylor_attention(q, k, v, num_terms)
    return forms


@torch.no_grad()
def measure_costs(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Milliseconds and MiB of a forward pass against L, for each D, with the length from which Taylor is faster."""
    num_terms = 3 if 3 in args.terms else args.terms[0]
    curves = []
    progress = tqdm(total=len(args.dims) * len(args.lengths), desc="costs", disable=None, leave=False)
    for dim in args.dims:
        points = []
        for length in args.lengths:
            q, k, v = random_tokens(length, dim, 0.25, args.seeds[0], args.dtype, device)
            forms = attention_forms(q, k, v, num_terms)
            times = time_interleaved(forms, args.rounds, device=device.type)
            points.append(
                {
                    "length": length,
                    "ms": {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()},
                    "mib": {name: peak_memory(form, device.type) / 2**20 for name, form in forms.items()},
                }
            )
            progress.update()
        curves.append({"dim": dim, "num_terms": num_terms, "points": points, "crossover": crossover(points)})
    progress.close()
    return curves


def crossover(points: list[dict]) -> float | None:
    """The length from which Taylor attention stays faster than fused softmax, between two measured lengths.

    Interpolated on logarithms; None if it is not faster at the longest, or faster already at the shortest.
    """
    ratios = [(math.log(p["length"]), math.log(p["ms"][TAYLOR] / p["ms"][SOFTMAX])) for p in points]
    if ratios[-1][1] >= 0:
        return None
    for (l0, r0), (l1, r1) in reversed(list(itertools.pairwise(ratios))):
        if r0 >= 0:
            return math.exp(l0 + (l1 - l0) * r0 / (r0 - r1))
    return None


# ---------------------------------------------------------------------------------------------------
# What is printed, and the figures: each is made from the record alone


def print_features(record: dict) -> None:
    print("\nFeatures M for D dimensions and K terms: each monomial once (every order of its coordinates)")
    terms = sorted({row["num_terms"] for row in record["features"]})
    print(f"{'':8s}" + "".join(f"{f'K = {k}':>28s}" for k in terms))
    for dim in dict.fromkeys(row["dim"] for row in record["features"]):
        rows = {row["num_terms"]: row for row in record["features"] if row["dim"] == dim}
        cells = [f"{rows[k]['merged']:,} ({rows[k]['unmerged']:,})" for k in terms]
        print(f"{f'D = {dim}':8s}" + "".join(f"{cell:>28s}" for cell in cells))


def print_errors(record: dict) -> None:
    errors = record["errors"]
    print(f"\nRelative error of Z against the deviation of the scores (L = {errors['length']}, D = {errors['dim']}),")
    print(f"mean of {len(errors['seeds'])} draws. In brackets the proven bound. *: negative weights, --: no result.")
    terms = list(errors["points"][0]["terms"])
    print(f"{'scores':>8s}{'mean of V':>12s}" + "".join(f"{f'K = {k}':>22s}" for k in terms))
    for point in errors["points"]:
        cells = [error_cell(point["terms"][k]) for k in terms]
        print(f"{point['deviation']:8g}{point['mean_of_v']['mean']:12.2g}" + "".join(f"{cell:>22s}" for cell in cells))


def error_cell(outcome: dict) -> str:
    mark = "*" if outcome["runs_with_negative_weights"] else ""
    error = "--" if outcome["error"] is None else f"{outcome['error']['mean']:.1e}{mark}"
    return error + (" (none)" if outcome["bound"] is None else f" ({outcome['bound']:.1e})")


def print_costs(record: dict) -> None:
    for curve in record["costs"]:
        print(f"\nForward pass, D = {curve['dim']}, K = {curve['num_terms']}: milliseconds, and MiB beside the input")
        names = max((point["ms"] for point in curve["points"]), key=len)
        print(f"{'L':>8s}" + "".join(f"{name:>28s}" for name in names))
        for point in curve["points"]:
            cells = [f"{point['ms'][n]:.2f} ms{point['mib'][n]:9.1f} MiB" if n in point["ms"] else "" for n in names]
            print(f"{point['length']:8,d}" + "".join(f"{cell:>28s}" for cell in cells))
        print(crossover_sentence(curve))


def crossover_sentence(curve: dict) -> str:
    if curve["crossover"] is None:
        faster = curve["points"][-1]["ms"][TAYLOR] < curve["points"][-1]["ms"][SOFTMAX]
        return f"D = {curve['dim']}: Taylor is {'faster at all lengths' if faster else 'not faster at the longest'}"
    return f"D = {curve['dim']}: Taylor is faster than fused softmax from L = {curve['crossover']:,.0f} on"


STYLES = {SOFTMAX: ("#000000", "o"), FORMULA: ("#8c8c8c", "s"), TAYLOR: ("#0072b2", "o"), NAIVE: ("#e69f00", "s")}


def draw_errors(record: dict, path: Path) -> None:
    errors = record["errors"]
    figure, (axes,) = utils.new_figure(size=(7.0, 4.6))
    deviations = [point["deviation"] for point in errors["points"]]
    for num_terms, colour in zip(errors["points"][0]["terms"], itertools.cycle(utils.COLOURS), strict=False):
        outcomes = [point["terms"][num_terms] for point in errors["points"]]
        means = [outcome["error"]["mean"] if outcome["error"] else math.nan for outcome in outcomes]
        bounds = [outcome["bound"] if outcome["bound"] else math.nan for outcome in outcomes]
        axes.plot(deviations, means, "o-", color=colour, markersize=4.5, label=f"K = {num_terms}")
        axes.plot(deviations, bounds, ":", color=colour, linewidth=1.2)
        negative = [
            (d, m) for d, m, o in zip(deviations, means, outcomes, strict=True) if o["runs_with_negative_weights"]
        ]
        axes.plot([d for d, _ in negative], [m for _, m in negative], "o", color=colour, mfc="white", markersize=4.5)
    axes.plot(deviations, [p["mean_of_v"]["mean"] for p in errors["points"]], "k--", linewidth=1.2, label="mean of V")
    axes.plot([], [], ":", color="#555555", label="proven bound")
    axes.plot([], [], "o", color="#555555", mfc="white", label="negative weights")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="standard deviation of the scores q·k",
        ylabel=f"relative error of Z ({record['config']['dtype']})",
        title=f"K terms of the series serve where scores are small (L = {errors['length']:,}, D = {errors['dim']})",
    )
    axes.legend(loc="lower right", ncols=2)
    utils.save_figure(figure, path)


def draw_costs(record: dict, quantity: str, label: str, path: Path) -> None:
    """Time ("ms") or memory ("mib") against L, a panel for each D."""
    curves = record["costs"]
    figure, panels = utils.new_figure(1, len(curves), size=(5.0, 4.0))
    for axes, curve in zip(panels, curves, strict=True):
        for name, (colour, marker) in STYLES.items():
            points = [(p["length"], p[quantity][name]) for p in curve["points"] if name in p[quantity]]
            if points:
                axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, color=colour, label=name)
        axes.set(yscale="log", xlabel="length L (tokens)", ylabel=label)
        axes.set_title(f"D = {curve['dim']}, K = {curve['num_terms']}, {record['config']['dtype']}")
        axes.set_xscale("log", base=2)
        lengths = [point["length"] for point in curve["points"]]
        ticks = [length for length in lengths if math.log2(length).is_integer()] or lengths
        axes.set_xticks(ticks, [f"{length:,}" for length in ticks], rotation=40)
        axes.minorticks_off()
        if quantity == "ms" and curve["crossover"]:
            mark_crossover(axes, curve["crossover"])
    limits = [limit for axes in panels for limit in axes.get_ylim()]
    for axes in panels:
        axes.set_ylim(min(limits), max(limits))  # one scale, so that the panels can be compared
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=len(names))
    utils.save_figure(figure, path)


def mark_crossover(axes, length: float) -> None:
    colour = STYLES[TAYLOR][0]
    axes.axvline(length, color=colour, linestyle=":", linewidth=1.2)
    text, place = f"Taylor faster\nfrom L = {length:,.0f}", ("data", "axes fraction")
    axes.annotate(text, (length, 0.03), xycoords=place, xytext=(5, 0), textcoords="offset points", color=colour)


def draw(record: dict, folder: Path) -> None:
    """Draw the three figures of a record into `folder`, as PNG and SVG."""
    draw_errors(record, folder / "error")
    threads = "one thread" if record["threads"] == 1 else f"{record['threads']} threads"
    where = f"CPU, {threads}" if record["device"] == "cpu" else record["device"]
    draw_costs(record, "ms", f"time of a forward pass (ms; {where})", folder / "time")
    draw_costs(record, "mib", "memory beside the input (MiB)", folder / "memory")


def draw_again(path: Path, folder: Path) -> None:
    """Draw from a record's file. Raises InputError if it is none of this question's."""
    try:
        draw(json.loads(path.read_text()), folder)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"-draw {path}: not a record of question 1 ({type(error).__name__}: {error})") from None


# ---------------------------------------------------------------------------------------------------
# The command line

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
RECORDED = {  # the settings of the recorded run; with others the results go to a folder of their own under runs/
    "lengths": [256, 512, 1024, 2048, 3072, 4096, 8192, 16384],
    "dims": [16, 64],
    "terms": [2, 3, 4, 5, 6],
    "dtype": "float32",
    "deviations": [0.0625, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0],
    "error_length": 1024,
    "seeds": [42, 43, 44, 45, 46],
    "rounds": 7,
}
QUICK = RECORDED | {"lengths": [128, 256, 512, 1024], "error_length": 256, "seeds": [42, 43], "rounds": 3}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = runs.Parser(__doc__, "attention_approx.py")
    add, count, seed = parser.add_argument, number(int, 1), number(int, 0, 2**32)
    add("-quick", action="store_true", help="short sequences (128 to 1024, errors at 256), 2 seeds, 3 rounds")
    add(
        "-lengths", type=number(int, 2, 2**20), nargs="+", metavar="L", help="of the cost curves (default 256 to 16384)"
    )
    add("-dims", type=number(int, 1, 1025), nargs="+", metavar="D", help="of the curves; errors: the largest (16 64)")
    add("-terms", type=number(int, 1, 21), nargs="+", metavar="K", help="of the table and the errors (2 3 4 5 6)")
    add("-dtype", choices=DTYPES, help="of q, k and v (default float32)")
    deviation = number(float, 0, 1000, low_fits=False)
    add("-deviations", type=deviation, nargs="+", metavar="S", help="of the scores whose error is taken (1/16 to 4)")
    add("-error_length", type=number(int, 2, 2**15), metavar="L", help="length for the errors (default 1024)")
    add("-seeds", type=seed, nargs="+", metavar="SEED", help="of the draws that an error is the mean of (42 to 46)")
    add("-rounds", type=count, help="of the timing, whose medians count (default 7)")
    add("-device", default="cpu", help="cpu (default), cuda, cuda:N or auto")
    add("-threads", type=number(int, 1, 1025), default=1, help="CPU threads (default 1)")
    add("-out", type=Path, metavar="RECORD", help="results/q1.json, or a new folder under runs/ for other settings")
    add("-figures", type=Path, metavar="FOLDER", help="report/figures/q1, or beside the record for other settings")
    add("-draw", type=Path, metavar="RECORD", help="only draw a record's figures again, into -figures or beside it")
    args = parser.parse_args(arguments)
    for name, value in (QUICK if args.quick else RECORDED).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("lengths", "dims", "terms", "deviations", "seeds"):
        setattr(args, name, sorted(set(getattr(args, name))))
    args.settings = {name: getattr(args, name) for name in RECORDED}
    args.dtype = DTYPES[args.dtype]
    return args


def choose_measured_device(name: str) -> torch.device:
    """`utils.choose_device` among those whose memory can be measured; CUDA's waits and counts then are this one's."""
    device = utils.choose_device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if device.type in ("cpu", "cuda"):
        return device
    if name == "auto":
        return torch.device("cpu")
    raise InputError(f"-device {name}: memory can be measured on cpu and cuda only")


def run(args: argparse.Namespace) -> None:
    if args.draw:
        return draw_again(args.draw, args.figures or args.draw.parent)
    device = choose_measured_device(args.device)
    torch.set_num_threads(args.threads)
    utils.set_seed(args.seeds[0])
    started = time.perf_counter()
    home = Path("runs") / f"q1-{time.strftime('%Y%m%d-%H%M%S')}"
    recorded = args.settings == RECORDED and args.device == "cpu" and args.threads == 1
    out = args.out or (Path("results/q1.json") if recorded else home / "record.json")
    figures = args.figures or (Path("report/figures/q1") if recorded and not args.out else out.parent)

    if not out.name or out.is_dir():
        raise InputError(f"-out {out}: is a folder; name the record's file")
    for folder in (out.parent, figures):
        folder.mkdir(parents=True, exist_ok=True)  # what cannot be written should be known before it is measured

    record = {"config": args.settings, "dataset": {"name": "normal random numbers", "kind": "random"}}
    record["features"] = feature_table(sorted({8, 16, 32, 64, *args.dims}), args.terms)
    print_features(record)
    record["errors"] = measure_errors(args, device)
    print_errors(record)
    record["costs"] = measure_costs(args, device)
    print_costs(record)
    record |= {"seed": args.seeds[0], "seconds": time.perf_counter() - started}
    record |= {"device": str(device), "threads": args.threads} | runs.run_environment(device)
    runs.write_json(out, record)
    draw(record, figures)
    print(f"\n{record['seconds']:.0f} s; record {out}, figures in {figures}")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 2 for input that cannot be used (after one line on stderr), 130 when interrupted."""
    return runs.run_script("attention_approx.py", parse_arguments, run, arguments, "stopped, nothing was written")


if __name__ == "__main__":
    sys.exit(main())
