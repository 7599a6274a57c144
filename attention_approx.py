"""Question 1: self-attention in time linear in the length, by the Taylor series of the exponential.

    python attention_approx.py                     tables of features, errors and times; a figure in runs/q1
    python attention_approx.py -quick              the same in seconds
    python attention_approx.py -lengths 1024 8192 -dims 32 -terms 3 5 -dtype float64 -out runs/q1.json

    from attention_approx import TaylorState, taylor_attention
    z = taylor_attention(q, k, v, scale=q.shape[-1] ** -0.5)      # q, k, v [..., L, D]; three terms of the series

Attention gives query i the mean of the values v_j, weighted by exp(q_i·k_j): all pairs of L tokens, time in L² D.
Instead:

1. The exponential is replaced by the first K terms of its series:  P_K(t) = sum_{n<K} t^n / n!.
2. A power of a dot product is a dot product of monomials (multinomial theorem):
       (q·k)^n / n! = sum_{|a|=n} q^a k^a / a!        x^a = x_1^a_1 ... x_D^a_D,  a! = a_1! ... a_D!
   so that P_K(q·k) = phi(q)·phi(k) with the M = C(D+K-1, K-1) features phi_a(x) = x^a / sqrt(a!), |a| < K.
3. Then Z = softmax(Q K^T) V ~ Diag(Phi(Q) Phi(K)^T 1)^-1 Phi(Q) Phi(K)^T V, with one token per row.
4. Multiplied from the right, Phi(K)^T V has M rows of a value's width, whatever L is: time in L M D.

(K alone is the number of terms, D alone the width of queries and keys; in products Q, K, V are the matrices.) The
approximation is good where the scores are small: the error grows like score^K / K!. For odd K every weight is
positive; for even K a weight can be negative, which is counted and warned about.
"""

import argparse
import sys
from pathlib import Path

LENGTHS, QUICK_LENGTHS = [256, 512, 1024, 2048, 4096, 8192], [512, 1024, 2048, 4096]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    from runs import Parser, number  # only here: who imports this file as a library needs torch alone

    parser = Parser(__doc__, "attention_approx.py")
    add = parser.add_argument
    add("-quick", action="store_true", help="L = 512 to 4096, errors at L = 256")
    add("-lengths", type=number(int, 2, 2**20), nargs="+", metavar="L", help="of the times (default 256 to 8192)")
    add("-dims", type=number(int, 1, 1025), nargs="+", metavar="D", default=[16, 64], help="of the times (16 64)")
    add("-terms", type=number(int, 1, 21), nargs="+", metavar="K", default=[2, 3, 4, 5, 6], help="(2 3 4 5 6)")
    add("-dtype", choices=["float32", "float64", "bfloat16"], default="float32", help="of q, k and v (float32)")
    add("-device", default="cpu", help="cpu (default), cuda, cuda:N, mps or auto")
    add("-threads", type=number(int, 1, 1025), default=1, help="CPU threads (1)")
    add("-out", type=Path, metavar="FILE", help="write a record of all numbers; the file must not exist yet")
    add("-figures", type=Path, metavar="FOLDER", default=Path("runs/q1"), help="where the figure goes (runs/q1)")
    args = parser.parse_args(arguments)
    args.lengths = sorted({*(args.lengths or (QUICK_LENGTHS if args.quick else LENGTHS))})
    args.dims, args.terms = sorted({*args.dims}), sorted({*args.terms})
    return args


if __name__ == "__main__":
    parse_arguments(None)  # -h and mistakes are answered now: PyTorch takes seconds to import

import itertools
import math
import numbers
import time
import timeit
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------------
# The series and its feature map


def num_features(dim: int, num_terms: int = 3, symmetric: bool = True) -> int:
    """The monomials of degree below num_terms in `dim` coordinates: each counts once, or (not `symmetric`) every order
    of its coordinates. Raises TypeError, ValueError.
    """
    _check_count("dim", dim)
    _check_count("num_terms", num_terms)
    if symmetric:
        return math.comb(dim + num_terms - 1, num_terms - 1)
    return sum(dim**degree for degree in range(num_terms))


def feature_map(x: Tensor, num_terms: int = 3, symmetric: bool = True) -> Tensor:
    """phi(x) with phi(q)·phi(k) = sum_{n < num_terms} (q·k)^n / n!, exactly.

    x [..., D] -> [..., M]. With `symmetric` each monomial comes once, phi_a(x) = x^a / sqrt(a!); else the degree n is
    the outer product x (x) ... (x) x / sqrt(n!), all D^n entries. This is the definition, for reading and testing:
    `taylor_attention` never holds the features of a sequence. Raises TypeError, ValueError.
    """
    _check_tensor("x", x, "[..., D]")
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


def exp_series(t: Tensor, num_terms: int) -> Tensor:
    """P_K(t) = sum_{n < num_terms} t^n / n!, elementwise, by Horner's rule."""
    one = t.new_ones(())
    value = torch.ones_like(t) if num_terms == 1 else one
    for n in range(num_terms - 1, 0, -1):
        value = torch.addcmul(one, t, value, value=1 / n)  # 1 + t · value / n
    return value


# ---------------------------------------------------------------------------------------------------
# What is approximated, and the approximation as the formula says it


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float = 1.0, causal: bool = False, key_mask: Tensor | None = None
) -> Tensor:
    """Softmax(scale · Q K^T) V, exactly, as the formula says it: time and memory in Lq·Lk.

    Arguments, shapes and errors as in `taylor_attention`.
    """
    x = _prepare(q, k, v, scale, causal, key_mask)
    with torch.autocast(q.device.type, enabled=False):
        scores = (x.q.mT @ x.k).masked_fill(x.w[:, -1:] == 0, -math.inf)  # [N, Lq, Lk]
        if causal:
            scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
        return _divide(x.w @ scores.softmax(-1).mT * x.counts[:, None], x)


def naive_taylor_attention(q: Tensor, k: Tensor, v: Tensor, num_terms: int = 3, *, symmetric: bool = False) -> Tensor:
    """D^-1 Phi(Q) Phi(K)^T V in four lines: linear in L, but all features of all tokens are held at once."""
    phi_q, phi_k = feature_map(q, num_terms, symmetric), feature_map(k, num_terms, symmetric)  # [..., L, M]
    numerator = phi_q @ (phi_k.mT @ v)
    denominator = phi_q @ phi_k.sum(-2)[..., None]
    return numerator / denominator


# ---------------------------------------------------------------------------------------------------
# The linear form. From here on a sequence is [N, D, L], N of them: a feature of many tokens lies in one row, so that
# products of features and the big matrix products run along contiguous memory. `w` [N, E + 1, L] holds the values, and
# ones below them for the denominator. A feature here is a plain product of coordinates; the weights 1/a! are
# multiplied once into the sums over the keys, which do not grow with L.


class _Product(NamedTuple):
    """Rows of features that are a block of coordinates times features of one degree less."""

    coordinates: slice
    others: slice
    rows: slice  # len(coordinates) * len(others)

    def factors(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return features[:, self.coordinates, None], features[:, None, self.others]

    def unfold(self, rows: Tensor) -> Tensor:  # [n, rows, tokens] -> [n, coordinates, others, tokens]
        return rows.view(len(rows), self.coordinates.stop - self.coordinates.start, -1, rows.shape[2])


class _Layout(NamedTuple):
    """The order of the features: the constant 1, the coordinates, then the products degree by degree."""

    lower: list[_Product]  # the degrees 2 to K-2: held for a tile, since the others are made of them
    top: list[_Product]  # the degree K-1, from K = 3 on: each is made and used at once
    num_lower: int  # rows of the constant, the coordinates and the lower products
    num_top: int  # rows of the largest of the others
    weights: list[float]  # of every feature, so that P_K(q·k) = sum_m weights[m] f_m(q) f_m(k)


def _layout_for(x: Tensor, num_terms: int) -> _Layout:
    """The layout for x [N, D, L] on its device. Measured: with more than three terms repeated monomials cost more."""
    small = 4 if num_terms <= 3 else 2
    launches_are_dear = x.device.type != "cpu" and num_terms <= 3
    return _layout(x.shape[1], num_terms, max(small, x.shape[1] // 4) if launches_are_dear else small)


@lru_cache(maxsize=64)
def _layout(dim: int, num_terms: int, block: int) -> _Layout:
    """Degree n is made of degree n-1: a coordinate times every product that begins with it or with a later one.

    In this order those are the last rows of degree n-1, one slice, and each monomial comes once. A `block` of
    coordinates is multiplied at once: fewer and larger operations, at the price that within a block a monomial comes
    in several orders. Those share its weight: the product of all 1/b_i! if b_i coordinates lie in block i.
    """
    edges = starts = [*range(1, dim + 1, block), dim + 1]  # starts: where products begin with block 0, 1, ...; the end
    weights = [1.0] * (dim + 1 if num_terms > 1 else 1)
    repeats = [1] * (dim + 1)  # factors at the front that lie in one block
    lower, top = [], []
    for _ in range(2, num_terms):
        lower, top = lower + top, []
        for i, (first, stop) in enumerate(itertools.pairwise(edges)):
            others, first_row = slice(starts[i], starts[-1]), len(weights)
            counts = [n + 1 for n in repeats[starts[i] : starts[i + 1]]] + [1] * (starts[-1] - starts[i + 1])
            weights += [weight / n for weight, n in zip(weights[others], counts, strict=True)] * (stop - first)
            repeats += counts * (stop - first)
            top.append(_Product(slice(first, stop), others, slice(first_row, len(weights))))
        starts = [product.rows.start for product in top] + [len(weights)]
    num_top = top[0].rows.stop - top[0].rows.start if top else 0  # the first product is the largest
    return _Layout(lower, top, starts[0] if top else len(weights), num_top, weights)


TILE_CPU, TILE_GPU = (2**19, 8192), (2**26, 2**17)  # numbers, tokens: what a CPU's caches hold, what keeps a GPU busy
LONG_ROW = 4096  # tokens: sums over more keep a GPU busy one by one, but not as a batch, each of which is one block's


def _tiles(x: Tensor, rows: int) -> Iterator[tuple[tuple[slice, slice, slice], Tensor]]:
    """Cut x [N, D, L] into tiles: (the tile's index, a buffer [n, rows, tokens] that all tiles share)."""
    num_sequences, _, length = x.shape
    most_numbers, most_tokens = TILE_CPU if x.device.type == "cpu" else TILE_GPU
    tokens = max(64, min(most_numbers // rows, most_tokens))
    sequences = max(1, tokens // max(1, length))
    tokens = math.ceil(max(1, length) / math.ceil(max(1, length) / tokens))  # no small tile at the end
    buffer = x.new_empty(min(sequences, num_sequences), rows, min(tokens, length))
    for n, first in itertools.product(range(0, num_sequences, sequences), range(0, length, tokens)):
        tile = slice(n, n + sequences), slice(None), slice(first, first + tokens)
        yield tile, buffer[: num_sequences - n, :, : length - first]


def _features(x: Tensor, layout: _Layout, buffer: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """All features of x [n, D, tokens] as (rows, features [n, rows, tokens]), one product after the other."""
    lower = buffer[:, : layout.num_lower]
    lower[:, :1] = 1
    lower[:, 1 : 1 + x.shape[1]] = x[:, : layout.num_lower - 1]
    for product in layout.lower:
        torch.mul(*product.factors(lower), out=product.unfold(lower[:, product.rows]))
    if not layout.top:
        yield slice(0, layout.num_lower), lower
    first = 0
    for product in layout.top:
        stop = layout.num_lower + product.rows.stop - product.rows.start
        torch.mul(*product.factors(lower), out=product.unfold(buffer[:, layout.num_lower : stop]))
        yield slice(product.rows.stop - stop + first, product.rows.stop), buffer[:, first:stop]
        first = layout.num_lower  # the lower features came with the first product: one matrix product less


# Everything rests on one expression in three variables, F(x, w, s) = sum_l f(x_l) · s^T w_l with the features f, and on
# its three derivatives. The forward pass needs those by s and w, the backward pass all three.


def _tiled_sums(x: Tensor, y: Tensor, num_terms: int, over_tokens: bool) -> Tensor:
    """dF/ds = sum_l w_l f(x_l)^T [N, E, M], with y = w [N, E, L]; or dF/dw_l = s f(x_l) [N, E, L], with y = s."""
    layout = _layout_for(x, num_terms)
    sums = x.new_zeros(len(x), y.shape[1], len(layout.weights) if over_tokens else x.shape[2])
    for tile, buffer in _tiles(x, layout.num_lower + layout.num_top):
        for rows, features in _features(x[tile], layout, buffer):
            if over_tokens and x.is_cuda and features.shape[2] > LONG_ROW:
                for one, *factors in zip(sums[tile[0], :, rows], y[tile], features.mT, strict=True):
                    one.addmm_(*factors)
            elif over_tokens:
                sums[tile[0], :, rows].baddbmm_(y[tile], features.mT)
            else:
                sums[tile].baddbmm_(y[tile[0], :, rows], features)
    return sums


def _token_gradient(x: Tensor, w: Tensor, s: Tensor, num_terms: int) -> Tensor:
    """dF/dx_l: x [N, D, L], w [N, E, L], s [N, E, M] -> [N, D, L], back through the products, the highest first."""
    layout = _layout_for(x, num_terms)
    gradient = torch.zeros_like(x)
    for tile, buffer in _tiles(x, 2 * layout.num_lower + layout.num_top):
        (_, lower), *_ = _features(x[tile], layout._replace(top=[]), buffer)  # the top degree is not needed
        columns = s[tile[0]].mT
        grad, of_top = buffer[:, layout.num_lower :].tensor_split((layout.num_lower,), 1)
        torch.bmm(columns[:, : layout.num_lower], w[tile], out=grad)
        for product in itertools.chain(layout.top, reversed(layout.lower)):
            of_product = grad[:, product.rows]
            if product.rows.start >= layout.num_lower:
                of_product = of_top[:, : product.rows.stop - product.rows.start]
                torch.bmm(columns[:, product.rows], w[tile], out=of_product)
            of_product, (coordinates, others) = product.unfold(of_product), product.factors(lower)
            grad[:, product.coordinates] += (of_product * others).sum(2)
            grad[:, product.others] += of_product.mul_(coordinates).sum(1)
        gradient[tile] = grad[:, 1 : 1 + x.shape[1]] if num_terms > 1 else 0
    return gradient


def _plain_token_gradient(x: Tensor, w: Tensor, s: Tensor, num_terms: int) -> Tensor:
    """The same in operations that autograd follows, for second derivatives; all features are held at once."""
    layout = _layout_for(x, num_terms)

    def features(x: Tensor) -> Tensor:
        rows = torch.cat([torch.ones_like(x[:, :1]), x], 1)[:, : len(layout.weights)]
        for product in layout.lower + layout.top:
            coordinates, others = product.factors(rows)
            rows = torch.cat([rows, (coordinates * others).flatten(1, 2)], 1)
        return rows

    return torch.func.vjp(features, x)[1](s.mT @ w)[0]


class _Recomputed(torch.autograd.Function):
    """forward(*tensors); its gradients are made by backward(grad, tensors, which of them need one) from these alone."""

    @staticmethod
    def forward(forward: Callable, backward: Callable, *tensors: Tensor) -> Tensor:
        return forward(*tensors)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        _, ctx.gradients, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        with torch.autocast(grad.device.type, enabled=False):  # a backward pass may run inside autocast, too
            return None, None, *ctx.gradients(grad, ctx.saved_tensors, ctx.needs_input_grad[2:])

    @staticmethod
    def vmap(*_):
        raise RuntimeError("under torch.vmap: give q, k and v a leading dimension instead, as a batch")


def _gradients_of(function: Callable) -> Callable:
    return lambda grad, tensors, needed: torch.func.vjp(function, *tensors)[1](grad)


def _feature_sums(x: Tensor, y: Tensor, num_terms: int, over_tokens: bool) -> Tensor:
    """`_tiled_sums`, differentiable: over the tokens and over the features, each is the other's derivative by y."""

    def backward(grad: Tensor, tensors: tuple, needed: tuple) -> tuple:
        x, y = tensors
        w, s = (y, grad) if over_tokens else (grad, y)
        fast, plain = (partial(form, num_terms=num_terms) for form in (_token_gradient, _plain_token_gradient))
        grad_x = _Recomputed.apply(fast, _gradients_of(plain), x, w, s) if needed[0] else None
        return grad_x, _feature_sums(x, grad, num_terms, not over_tokens) if needed[1] else None

    return _Recomputed.apply(partial(_tiled_sums, num_terms=num_terms, over_tokens=over_tokens), backward, x, y)


MOST_TERMS = {torch.float32: 34, torch.float64: 171}  # beyond, the smallest weight, 1/(K-1)!, is no normal number


def _key_sums(k: Tensor, w: Tensor, num_terms: int) -> Tensor:
    """Phi(K)^T V with the features' weights: k [N, D, L], w [N, E, L] -> [N, E, M]."""
    if num_terms > MOST_TERMS[k.dtype]:
        raise ValueError(f"{num_terms} terms are too many for features in {k.dtype}: their weights 1/n! vanish")
    weights = torch.tensor(_layout_for(k, num_terms).weights, dtype=k.dtype, pin_memory=k.is_cuda)
    weights = weights.to(k.device, non_blocking=True)  # from pinned memory: nobody waits
    return _feature_sums(k, w, num_terms, over_tokens=True) * weights


# ---------------------------------------------------------------------------------------------------
# All pairs, a tile of queries at a time: faster for short sequences

PAIRS_CPU, PAIRS_GPU = 2**18, 2**26  # weights that are held at once


def _pair_sums(q: Tensor, k: Tensor, w: Tensor, num_terms: int, causal: bool = False) -> Tensor:
    """sum_j P_K(q_i·k_j) w_j pair by pair: q [N, D, Lq], k [N, D, Lk], w [N, E, Lk] -> [N, E, Lq].

    The backward pass computes the weights again, so that its memory, too, is linear in the length.
    """
    num_keys, num_queries = max(1, k.shape[2]), max(1, q.shape[2])
    most_pairs = PAIRS_CPU if q.device.type == "cpu" else PAIRS_GPU
    sequences = max(1, most_pairs // (num_keys * num_queries))
    if len(q) > sequences:
        parts = zip(*(x.split(sequences) for x in (q, k, w)), strict=True)
        return torch.cat([_pair_sums(*part, num_terms, causal) for part in parts])

    def attend(q: Tensor, k: Tensor, w: Tensor, first: int) -> Tensor:
        weights = exp_series(k.mT @ q, num_terms)  # [N, keys, queries]
        return w @ (weights.triu_(-first) if causal else weights)  # causal: the keys up to first + query

    side, sums = max(8, most_pairs // num_keys), []
    for i, q_tile in enumerate(q.split(side, -1)):
        tile, seen = partial(attend, first=i * side), slice((i + 1) * side if causal else None)
        sums.append(_Recomputed.apply(tile, _gradients_of(tile), q_tile, k[..., seen], w[..., seen]))
    return torch.cat(sums, -1)


# ---------------------------------------------------------------------------------------------------
# Causal sums: pairs within a chunk of tokens, features for the running sums over the chunks before

CAUSAL_CHUNK = 1024  # tokens; on a GPU eight times as many, since it has work for fewer, larger steps


def _causal_sums(q: Tensor, k: Tensor, w: Tensor, num_terms: int) -> Tensor:
    """sum_{j <= i} P_K(q_i·k_j) w_j: q [N, D, Lq], k [N, D, Lk], w [N, E, Lk] -> [N, E, Lq]."""
    size = CAUSAL_CHUNK if q.device.type == "cpu" else 8 * CAUSAL_CHUNK
    q_chunks, *key_chunks = (x.split(size, -1) for x in (q, k, w))
    no_keys = k[..., :0], w[..., :0]  # beside the queries that come after the last key
    key_chunks = itertools.chain(zip(*key_chunks, strict=True), itertools.repeat(no_keys))
    sums, before = [], None
    for i, (q_chunk, (k_chunk, w_chunk)) in enumerate(zip(q_chunks, key_chunks, strict=False)):
        sums.append(_pair_sums(q_chunk, k_chunk, w_chunk, num_terms, causal=True))
        if before is not None:
            sums[i] = sums[i] + _feature_sums(q_chunk, before, num_terms, over_tokens=False)
        if k_chunk.shape[2] and i + 1 < len(q_chunks):
            key_sums = _key_sums(k_chunk, w_chunk, num_terms)
            before = key_sums if before is None else before + key_sums
    return torch.cat(sums, -1)


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
    broadcast. Sums are accumulated in float32, or in float64 for float64. Differentiable in reverse mode, any number
    of times; from the second time on, the features of all tokens are held.

    scale     multiplies the scores; 1 as in the homework, D**-0.5 in a transformer.
    causal    query i sees the keys 0 to i only (all of them if there are fewer), as scaled_dot_product_attention does.
    key_mask  bool, True where the key takes part; the others count as if they were not there. [Lk], or with one
              dimension less than k: [B, Lk] for k [B, Lk, D], [B, 1, Lk] for the heads of k [B, H, Lk, D].
    center    subtract the mean key: softmax attention stays the same, and the scores get smaller where the keys
              share an offset. Not with causal.
    method    "features": time linear in the length, for any length; "direct": over all pairs, faster for short
              sequences; "auto": the faster of both, but "direct" where the rounding of features might exceed 1 % of
              the largest value (|q||k| far larger than the scores; from about 70 on in float32 with three terms).

    For odd K all weights are positive. For even K a weight is negative where a score lies below the root of P_K:
    a RuntimeWarning gives their number (counting takes quadratic time unless |q||k| rules them out). Raises
    ValueError if denominators are negative, vanish within rounding or overflow; for NaN or infinite input, shapes
    that do not fit, num_terms < 1, a mask that leaves a query without keys; TypeError for other dtypes than float64,
    float32, bfloat16, float16, for mixed ones, and for sparse, nested and meta tensors.

    On a GPU, odd K never wait for the device: results whose values would raise are NaN, and "auto" chooses by length.
    """
    _check_count("num_terms", num_terms)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    x = _prepare(q, k, v, scale, causal, key_mask, center)
    with torch.autocast(q.device.type, enabled=False):  # sums need the precision
        negative = _negative_weights(x, num_terms) if num_terms % 2 == 0 else 0.0
        if method == "features" or (method == "auto" and _features_are_faster(x, num_terms)):
            if causal:
                sums = _causal_sums(x.q, x.k, x.w, num_terms)
            else:
                sums = _feature_sums(x.q, _key_sums(x.k, x.w, num_terms), num_terms, over_tokens=False)
            lengths = _norms(x.k)  # a score's products of coordinates cancel, and their powers, too
            longest = lengths.cummax(-1).values[:, x.last_seen] if causal else lengths.amax(-1, keepdim=True)
            reach = _norms(x.q) * longest
            try:
                return _divide(sums, x, num_terms, exp_series(reach, num_terms))
            except _UnusableDenominators as error:
                if method == "features":
                    raise ValueError(f'{error}; method="direct" loses less') from None
        return _divide(_pair_sums(x.q, x.k, x.w, num_terms, causal), x, num_terms, 2 * negative)


FEW_PAIRS_GPU = 2**27  # what a GPU weighs in the time that it takes to launch the features' many small kernels


def crossover_length(dim: int, num_terms: int) -> float:
    """The length from which features (time L M D) are faster than all pairs (L² D), measured on a CPU."""
    return 350 + 0.8 * min(num_features(dim, num_terms), 2**60)


def _features_are_faster(x: "_Inputs", num_terms: int) -> bool:
    num_queries, num_keys = x.q.shape[2], x.k.shape[2]
    length = 2 * num_queries * num_keys / max(1, num_queries + num_keys)  # what counts is pairs over tokens
    crossover = crossover_length(x.q.shape[1], num_terms) * (1 if x.last_seen is None else 2)
    worth_launching = x.q.device.type == "cpu" or len(x.q) * num_queries * num_keys >= FEW_PAIRS_GPU
    return length >= crossover and worth_launching and num_terms <= MOST_TERMS[x.q.dtype]


# ---------------------------------------------------------------------------------------------------
# Input that is checked and brought to one form


class _Inputs(NamedTuple):
    """Queries, keys and values in columns, with one batch dimension N, in the dtype that sums are accumulated in."""

    q: Tensor  # [N, D, Lq], times scale
    k: Tensor  # [N, D, Lk], 0 where masked
    w: Tensor  # [N, E + 1, Lk]: the values, and ones below them for the denominator; 0 where masked
    counts: Tensor  # [N or 1, Lq or 1], float: how many keys each query sees
    last_seen: Tensor | None  # [Lq]: the last key that each query sees under causal attention
    batch: torch.Size  # the leading dimensions
    dtype: torch.dtype  # of the result


def _prepare(q, k, v, scale=1.0, causal=False, key_mask=None, center=False) -> _Inputs:
    """Check the arguments of `taylor_attention` and bring them to one form. Raises TypeError, ValueError."""
    batch = _check_arguments(q, k, v, scale, causal, key_mask, center)
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    flat = (x.expand(*batch, *x.shape[-2:]).reshape(batch.numel(), *x.shape[-2:]) for x in (q, k, v))
    queries, keys, values = (x.to(accumulate).mT for x in flat)
    w = torch.cat([values.mT, values.new_ones(values.shape[0], values.shape[2], 1)], -1).mT
    if scale != 1:
        queries = queries * float(scale)
    seen = keys.new_ones(1, k.shape[-2])  # [N or 1, Lk]
    if key_mask is not None:
        keep = key_mask.to(k.device).expand(*batch, k.shape[-2]).reshape(batch.numel(), k.shape[-2])
        keys, w = (x.masked_fill(~keep[:, None], 0) for x in (keys, w))  # NaN in a masked key must not matter either
        seen = keep.to(accumulate)
    last_seen = torch.arange(q.shape[-2], device=q.device).clamp(max=k.shape[-2] - 1) if causal else None
    # Whole numbers: exact beyond 2^24 keys, and on a GPU sums of floats in turn are not deterministic.
    counts = seen.cumsum(-1, dtype=torch.long)[:, last_seen].to(accumulate) if causal else seen.sum(-1, keepdim=True)
    if center:
        keys = (keys - keys.sum(-1, keepdim=True) / counts[:, None]).masked_fill(seen[:, None] == 0, 0)
    return _Inputs(queries, keys, w, counts, last_seen, batch, q.dtype)


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


def _check_tensor(name: str, x: Tensor, shape: str = "[..., L, D]") -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if (kind := _kind(x)) != torch.strided:
        raise TypeError(f"{name} must be a dense tensor with values; it is {kind}")
    if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{name} must be of float64, float32, bfloat16 or float16, not {x.dtype}")
    if x.dim() < shape.count(","):
        raise ValueError(f"{name} must be {shape}, not {list(x.shape)}")


def _kind(x: Tensor) -> object:
    return "nested" if x.is_nested else "on the meta device" if x.is_meta else x.layout


def _check_arguments(q, k, v, scale, causal, key_mask, center) -> torch.Size:
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
    leading = {x.shape[:-2] for x in (q, k, v)}
    try:
        batch = leading.pop() if len(leading) == 1 else torch.broadcast_shapes(*leading)  # which takes its time
    except RuntimeError:
        raise ValueError(f"the leading dimensions do not fit together: {shapes}") from None
    _check_scale(scale)
    if center and causal:
        raise ValueError("center=True needs the mean of all keys, which causal=True must not see")
    if key_mask is not None:
        if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool or _kind(key_mask) != torch.strided:
            raise TypeError("key_mask must be a tensor of bool, and dense: True where the key takes part")
        mask, keys = [*key_mask.shape], [*batch, k.shape[-2]]
        fits = len(mask) in (1, k.dim() - 1) and all(
            m in (1, n) for m, n in zip(mask[-2::-1], keys[-2::-1], strict=False)
        )
        if not fits or mask[-1] != keys[-1]:
            raise ValueError(
                f"key_mask must fit {keys} with one dimension or with one less than k (as [B, 1, {keys[-1]}] for k "
                f"[B, H, {keys[-1]}, D]), not {mask}"
            )
    return batch


# ---------------------------------------------------------------------------------------------------
# Never quietly wrong. The values of the input are looked at only where the result is NaN, infinite or imprecise.

TOLERANCE = 0.01  # what rounding may change in the result, as a share of the largest value, in the worst case
ROUNDING = 16  # the worst case in units of eps: 13 was the largest error found, for equal keys, whose errors add up


class _UnusableDenominators(ValueError):
    pass


def _norms(x: Tensor) -> Tensor:
    """Euclidean norms of the columns of x [..., D, L] -> [..., L]; as a product, which is the fastest sum along D."""
    return (x.new_ones(1, x.shape[-2]) @ x.detach().square())[..., 0, :].sqrt()


def _divide(sums: Tensor, x: _Inputs, num_terms: int = 1, rounded: Tensor | float = 0.0) -> Tensor:
    """Sums [N, E + 1, Lq] -> their first E rows over the last one, [..., Lq, E].

    `rounded` [N, Lq] is the mean of the absolute numbers that were added up to the weights: their rounding is an error
    of up to ROUNDING · eps · rounded in the mean weight. Raises ValueError where that may change the result by more
    than TOLERANCE, where a mean weight is not positive or something is not finite. Where looking would make the host
    wait for a GPU, and where torch.compile traces, those rows become NaN instead.
    """
    z = (sums[:, :-1] / sums[:, -1:]).to(x.dtype)
    means = sums[:, -1].detach() / x.counts
    positive = (means > ROUNDING * torch.finfo(sums.dtype).eps / TOLERANCE * rounded) & means.isfinite()
    usable = positive & ((0 * z.detach()).sum(1) == 0)  # 0 · z is NaN if z is NaN or infinite
    if sums.device.type != "cpu" or torch.compiler.is_compiling():
        z = z.masked_fill(~usable[:, None], math.nan)
    elif not usable.all():
        _check_finite(q=x.q, k=x.k, v=x.w)
        if unseen := int((x.counts == 0).sum()):
            if x.last_seen is not None:
                raise ValueError(f"{unseen} queries see no key: key_mask drops all up to their position")
            raise ValueError(f"key_mask drops every key in {unseen} of {len(x.counts)} sequences")
        if bad := int((~positive).sum()):
            raise _UnusableDenominators(
                f"{bad} of {positive.numel()} denominators are negative, vanish within rounding or overflow: the "
                f"scores are too large for {num_terms} terms in {sums.dtype}; scale them down"
                + (" or take an odd number of terms" if num_terms % 2 == 0 else "")
            )
        bad = int((~z.isfinite()).sum())
        raise ValueError(f"{bad} numbers of the result overflow {sums.dtype} or {x.dtype}: scale q, k or v down")
    return z.mT.reshape(*x.batch, z.shape[2], z.shape[1])


def _check_finite(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if bad := int((~x.isfinite()).sum()):
            raise ValueError(f"{name} holds {bad} NaN or infinite numbers")


@lru_cache
def _negative_root(num_terms: int) -> float:
    """Where P_K becomes negative: at its only real root for even K, which is rounded up; nowhere for odd K."""
    if num_terms % 2:
        return -math.inf
    terms = [Fraction(1, math.factorial(n)) for n in range(num_terms)]  # exact, since they cancel
    steps = range(num_terms << 40)
    step = bisect_left(steps, True, key=lambda i: sum(a * Fraction(-i, 2**40) ** n for n, a in enumerate(terms)) < 0)
    return (1 - step) / 2**40


@torch.no_grad()
def _negative_weights(x: _Inputs, num_terms: int) -> Tensor | float:
    """For even K: warn of weights below zero, counted among all pairs unless |q||k| rules them out.

    Returns the mean of their absolute values over all keys that a query sees, [N, Lq].
    """
    root = _negative_root(num_terms)
    if not (_norms(x.q) * _norms(x.k).amax(-1, keepdim=True) > -root).any():
        return 0.0
    side, count, sums = max(1, 2**22 // x.k[:, 0].numel()), 0, []
    for first in range(0, x.q.shape[2], side):
        scores = x.k.mT @ x.q[..., first : first + side]  # [N, keys, queries]
        scores = scores.triu(-first) if x.last_seen is not None else scores
        weights = exp_series(scores, num_terms).masked_fill(scores >= root, 0)
        count += int((weights < 0).sum())
        sums.append(-weights.sum(1))
    if count:
        warnings.warn(
            f"{count} weights are negative: their scores lie below {root:.3f}, where {num_terms} terms of the series "
            "are negative; use an odd number of terms or smaller scores",
            RuntimeWarning,
            stacklevel=4,  # the caller of taylor_attention; no_grad is a frame, too
        )
    return torch.cat(sums, -1) / x.counts


# ---------------------------------------------------------------------------------------------------
# Streaming


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
        self.longest_key: Tensor | None = None  # [N, 1]: its norm
        self._kind: tuple | None = None  # leading dimensions, D, E, dtype

    def update(self, k: Tensor, v: Tensor) -> "TaylorState":
        """Add keys [..., n, D] and values [..., n, E]; returns the state."""
        _check_tensor("k", k)
        x = _prepare(k[..., :0, :], k, v)
        kind = tuple(x.batch), k.shape[-1], v.shape[-1], k.dtype
        if self._kind not in (None, kind):
            raise ValueError(f"the state holds (leading dimensions, D, E, dtype) {self._kind}, not {kind}")
        if k.device.type == "cpu":
            _check_finite(k=x.k, v=x.w)
        with torch.autocast(k.device.type, enabled=False):
            sums, longest_key = _key_sums(x.k, x.w, self.num_terms), _norms(x.k).amax(-1, keepdim=True)
        if self.sums is not None:
            sums, longest_key = self.sums + sums, torch.maximum(self.longest_key, longest_key)
        self.sums, self.longest_key, self._kind = sums, longest_key, kind
        self.num_keys += k.shape[-2]
        return self

    def query(self, q: Tensor) -> Tensor:
        """Attention of the queries [..., n, D] over all keys so far, [..., n, E]. The state stays as it is."""
        if self.sums is None:
            raise ValueError("no keys yet: call update(k, v) first")
        _check_tensor("q", q)
        batch, dim, _, dtype = self._kind
        if (tuple(q.shape[:-2]), q.shape[-1], q.dtype) != (batch, dim, dtype):
            raise ValueError(f"q {list(q.shape)} of {q.dtype} does not fit the state's {[*batch, 'n', dim]} of {dtype}")
        x = _prepare(q, q.new_zeros(1, dim), q.new_zeros(1, 1), self.scale)  # the keys are in the sums
        x = x._replace(counts=torch.full_like(x.counts, self.num_keys))
        reach, root = _norms(x.q) * self.longest_key, _negative_root(self.num_terms)
        if root > -math.inf and (doubtful := int((reach > -root).sum())):
            message = f"weights of {doubtful} queries may be negative: an even number of terms needs small scores"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        with torch.autocast(q.device.type, enabled=False):
            sums = _feature_sums(x.q, self.sums, self.num_terms, over_tokens=False)
            return _divide(sums, x, self.num_terms, exp_series(reach, self.num_terms))


# ---------------------------------------------------------------------------------------------------
# A proven bound on the error


def error_bound(q: Tensor, k: Tensor, v: Tensor, num_terms: int = 3, *, scale: float = 1.0) -> Tensor:
    """A bound on |z_hat - z| (Euclidean) for each query: [..., Lq], float64. Time in Lq·Lk: it looks at every score.

    With r(t) = P_K(t) exp(-t) the approximate weights are the exact ones times r(t_j), normalised again. That moves a
    share of at most tanh(ln(max_j r(t_j) / min_j r(t_j)) / 4) of the weight, and moving a share s of it moves the mean
    of v by at most s times the diameter of v:

        |z_hat - z| <= tanh(ln(max_j r(t_j) / min_j r(t_j)) / 4) · max_{i,j} |v_i - v_j|

    Two different scores, each with a suitable number of keys, attain it. Infinite where a weight is not positive (even
    K). Rounding is no part of it: neither that of the attention nor its own, about 1e-16 of the diameter for scores
    around 1. It holds for `taylor_attention` to all keys, without `center`. Raises ValueError and TypeError for input
    that `taylor_attention` refuses, TypeError on MPS: it has no float64.
    """
    _check_count("num_terms", num_terms)
    x = _prepare(q, k, v, scale)
    _check_finite(q=x.q, k=x.k, v=x.w)
    bounds = x.q.new_empty(x.q.shape[0], x.q.shape[2], dtype=torch.float64)
    for bound, *sequence in zip(bounds, x.q, x.k, x.w[:, :-1], strict=True):
        queries, keys, values = (columns.detach().double().T for columns in sequence)
        diameter = _diameter(values)
        for rows, tile in zip(bound.split(256), queries.split(256), strict=True):
            scores = tile @ keys.T
            weights = exp_series(scores, num_terms)
            log_ratio = weights.clamp(min=0).log() - scores
            share = torch.tanh((log_ratio.amax(-1) - log_ratio.amin(-1)) / 4)
            rows.copy_((share * diameter).masked_fill((weights <= 0).any(-1), math.inf))
    return bounds.reshape(*x.batch, x.q.shape[2])


def _diameter(v: Tensor) -> Tensor:
    """The largest distance between two rows of v [L, E]; after centring, it loses nothing by the products in cdist."""
    v = v - v.mean(0)
    return torch.stack([torch.cdist(rows, v).amax() for rows in v.split(256)]).amax()


# ---------------------------------------------------------------------------------------------------
# The script: how many features, how good, how fast. What is recorded is measured by benchmarks/bench_q1.py.

SOFTMAX, TAYLOR = "softmax, fused", "Taylor"
SCORE_STDS = [0.0625, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0]


def random_tokens(length: int, dim: int, score_std: float, seed: int, dtype: torch.dtype, device: torch.device):
    """q, k, v [1, L, D]: normal random numbers; the standard deviation of v is 1, of the scores q·k `score_std`."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(1, length, dim, generator=generator, dtype=torch.float64) for _ in range(3)]
    entry = math.sqrt(score_std / math.sqrt(dim))
    return tuple(x.to(device, dtype) for x in (entry * draws[0], entry * draws[1], draws[2]))


def relative_errors(q: Tensor, k: Tensor, v: Tensor, terms: list[int]) -> dict[int, tuple[float, float, bool]]:
    """|Z_hat - Z| / |Z| (Frobenius) for each K, the bound on it, and whether weights are negative; NaN: no result."""
    exact, outcomes = softmax_attention(q.double(), k.double(), v.double()), {}
    for num_terms in terms:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            try:
                error = float((taylor_attention(q, k, v, num_terms).double() - exact).norm() / exact.norm())
            except ValueError:  # an even K left a denominator that cannot be used
                error = math.nan
        bound = float(error_bound(q, k, v, num_terms).norm() / exact.norm())
        outcomes[num_terms] = error, bound, bool(caught)
    return outcomes


@torch.no_grad()
def measure_times(lengths: list[int], dim: int, num_terms: int, dtype: torch.dtype, device: torch.device) -> list[dict]:
    """Milliseconds of a forward pass for each length: the mean of calls that take a fifth of a second."""

    def milliseconds(attention: Callable) -> float:
        attention()
        calls, seconds = timeit.Timer(lambda: (attention(), wait())).autorange()
        return 1e3 * seconds / calls

    points, wait = [], torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for length in lengths:
        tokens = [x[None] for x in random_tokens(length, dim, 0.25, 42, dtype, device)]  # [1, 1, L, D]
        softmax = milliseconds(partial(F.scaled_dot_product_attention, *tokens, scale=1.0))
        taylor = milliseconds(partial(taylor_attention, *tokens, num_terms))
        points.append({"length": length, "ms": {SOFTMAX: softmax, TAYLOR: taylor}})
    return points


def plot(errors: dict[int, list[tuple[float, float, float]]], curves: list[dict]):
    """A figure: for each K the errors and bounds against the scores' size, for each D the time against the length."""
    from utils import COLOURS, new_figure

    figure, (axes, *panels) = new_figure(1, 1 + len(curves), size=(5.2, 4.4))
    for (num_terms, rows), colour in zip(errors.items(), itertools.cycle(COLOURS), strict=False):
        stds, means, bounds = zip(*rows, strict=True)
        axes.plot(stds, means, "o-", color=colour, markersize=4, label=f"K = {num_terms}")
        axes.plot(stds, bounds, ":", color=colour, linewidth=1.2)
    axes.plot([], [], ":", color="#555555", label="proven bound")
    axes.set(xscale="log", yscale="log", xlabel="standard deviation of the scores q·k", ylabel="relative error of Z")
    axes.xaxis.set_major_formatter("{x:g}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    times = [ms for curve in curves for point in curve["points"] for ms in point["ms"].values()]
    for panel, curve in zip(panels, curves, strict=True):
        for name, colour in zip(curve["points"][0]["ms"], ("#000000", *COLOURS), strict=False):
            points = [(p["length"], p["ms"][name]) for p in curve["points"] if name in p["ms"]]
            panel.plot(*zip(*points, strict=True), "o-", markersize=4, color=colour, label=name)
        panel.set_xscale("log", base=4)
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.set(yscale="log", xlabel="length L (tokens)", ylabel="time of a forward pass (ms)")
        panel.set_ylim(min(times) / 1.5, max(times) * 1.5)  # one scale, so that the panels can be compared
        panel.set_title(f"D = {curve['dim']}, K = {curve['num_terms']}")
    if panels:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    for panel in (axes, *panels):
        panel.yaxis.set_major_formatter("{x:,g}")
        panel.minorticks_off()
    return figure


def draw(errors: dict[int, list[tuple[float, float, float]]], curves: list[dict], folder: Path) -> None:
    """`plot` as attention.png and .svg."""
    from utils import save_figure

    save_figure(plot(errors, curves), folder / "attention")


def run(args: argparse.Namespace) -> None:
    from tabulate import tabulate

    import runs
    from utils import choose_device

    device, dtype, started = choose_device(args.device), getattr(torch, args.dtype), time.perf_counter()
    if args.out and args.out.exists():
        raise runs.InputError(f"-out {args.out}: exists already; name a new file")
    for folder in (args.figures, *([args.out.parent] if args.out else [])):
        folder.mkdir(parents=True, exist_ok=True)  # what cannot be written should be known before it is measured
    torch.set_num_threads(args.threads)

    def show(title: str, columns: list[str], rows: list[list]) -> None:
        print(f"\n{title}\n\n{tabulate(rows, columns, disable_numparse=True, stralign='right')}", flush=True)

    heads, rows = [f"K = {num_terms}" for num_terms in args.terms], []
    for dim in sorted({8, 16, 32, 64, *args.dims}):
        counts = ((num_features(dim, k), num_features(dim, k, symmetric=False)) for k in args.terms)
        rows.append([dim, *(f"{merged:,} ({unmerged:,})" for merged, unmerged in counts)])
    title = "Features M for D dimensions and K terms: each monomial once (every order of its coordinates)"
    show(title, ["D", *heads], rows)

    length, dim, errors, rows = 256 if args.quick else 1024, max(args.dims), {k: [] for k in args.terms}, []
    for score_std in SCORE_STDS:
        outcomes = relative_errors(*random_tokens(length, dim, score_std, 42, dtype, device), args.terms)
        for num_terms, (error, bound, _) in outcomes.items():
            errors[num_terms].append((score_std, error, bound))
        cells = (f"{error:.1e}{'*' if negative else ''} ({bound:.1e})" for error, bound, negative in outcomes.values())
        rows.append([score_std, *cells])
    title = f"Relative error of Z (L = {length:,}, D = {dim}) against the standard deviation of the scores; in brackets"
    show(f"{title}\nthe proven bound. *: negative weights, nan: no result", ["scores", *heads], rows)

    num_terms, curves = 3 if 3 in args.terms else args.terms[0], []
    for dim in args.dims:
        points = measure_times(args.lengths, dim, num_terms, dtype, device)
        curves.append({"dim": dim, "num_terms": num_terms, "points": points})
        rows = [[f"{p['length']:,}", *(f"{p['ms'][name]:.2f}" for name in (SOFTMAX, TAYLOR))] for p in points]
        show(f"Milliseconds of a forward pass, D = {dim}, K = {num_terms}", ["L", SOFTMAX, TAYLOR], rows)
        slower = max((p["length"] for p in points if p["ms"][TAYLOR] >= p["ms"][SOFTMAX]), default=0)
        if slower == args.lengths[-1]:
            print(f"These lengths are too short: Taylor attention is not faster up to L = {slower:,}.")
        else:
            print(f"Taylor attention is faster than fused softmax at all lengths above L = {slower:,}.")
    draw(errors, curves, args.figures)
    if args.out:
        finite = {k: [[x if math.isfinite(x) else None for x in row] for row in rows] for k, rows in errors.items()}
        record = {"config": {name: getattr(args, name) for name in ("lengths", "dims", "terms", "dtype")}}
        record |= {"dataset": {"name": "normal random numbers", "kind": "random"}, "errors": finite, "costs": curves}
        record |= {"seed": 42, "seconds": time.perf_counter() - started, "device": str(device), "threads": args.threads}
        runs.write_json(args.out, record | runs.run_environment(device))
    print(f"\nfigure {args.figures / 'attention.png'}" + (f", record {args.out}" if args.out else ""))


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 2 for input that cannot be used (after one line on stderr), 130 when interrupted."""
    from runs import run_script

    return run_script("attention_approx.py", parse_arguments, run, arguments, "stopped")


if __name__ == "__main__":
    sys.exit(main())
