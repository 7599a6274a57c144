"""Taylor attention (three terms) against softmax attention, interleaved in one process on one thread.

    python benchmarks/bench_q1.py [-rounds 25] [-scale 1] [-out results/q1-bench.json]

The yardstick is torch.nn.functional.scaled_dot_product_attention(scale=1): float32, B = H = 1 unless said otherwise,
inputs of small scores. A row says how long taylor_attention takes as a share of that (medians over the rounds), beside
the bar that it must stay under. Also timed: the ways a reader would write the formulas (softmax by matmul, naive
features of all orders), the length from which Taylor is faster, and the lengths from which its feature form
beats all pairs, on which method="auto" rests. `-scale 0.25` shortens all sequences for a trial. Exit status 1 if a
bar is missed.
"""

import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import attention_approx as q1
import runs

LENGTH = 8192
FORWARD_BARS = {8: 0.015, 16: 0.06, 32: 0.16, 64: 0.45}
BACKWARD_BARS = {16: 0.08, 32: 0.15, 64: 0.5}
CAUSAL_BAR = 1.0
CROSSOVER_BAR = 3500  # tokens, D = 64
MEMORY_BAR = 0.1  # of the naive features, L = 16384, D = 64
HEADS_BAR = 1.25  # ratio with B = 2, H = 8, as a multiple of the ratio of the same length with B = H = 1


def softmax(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=1.0, is_causal=causal)


def tokens(length: int, dim: int, batch: tuple[int, int] = (1, 1)) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, L, D], float32, scores of deviation 1/4."""
    generator = torch.Generator().manual_seed(42)
    q, k, v = (torch.randn(*batch, length, dim, generator=generator) for _ in range(3))
    entry = math.sqrt(0.25 / math.sqrt(dim))
    return entry * q, entry * k, v


def with_backward(attention: Callable, q: Tensor, k: Tensor, v: Tensor) -> Callable:
    """Forward and backward pass as a call without arguments."""
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    slope = torch.randn(v.shape, generator=torch.Generator().manual_seed(1))
    return lambda: torch.autograd.grad(attention(*inputs), inputs, slope)


def compare(functions: dict[str, Callable], rounds: int) -> dict:
    """Medians in ms, and each as a share of the first."""
    ms = {name: 1e3 * statistics.median(t) for name, t in q1.time_interleaved(functions, rounds).items()}
    yardstick = ms[next(iter(functions))]
    return {"ms": ms, "ratio": {name: value / yardstick for name, value in ms.items()}}


def two_forms(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> dict[str, Callable]:
    return {
        "softmax, fused": lambda: softmax(q, k, v, causal),
        "Taylor": lambda: q1.taylor_attention(q, k, v, causal=causal),
    }


def all_forms(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable]:
    """With the plain ways; in rounds of their own, for hundreds of MiB that come and go slow down what follows."""
    return two_forms(q, k, v) | {
        "softmax by matmul": lambda: torch.softmax(q @ k.mT, -1) @ v,
        "naive features": lambda: q1.naive_taylor_attention(q, k, v),
    }


def find_crossover(first: Callable, second: Callable, low: int, high: int, rounds: int) -> int | None:
    """The length (to a step of a sixteenth of `low`) from which `second` is faster than `first`, by bisection.

    The callables take a length and return a call. None if `second` is not faster at `high`.
    """

    def faster(length: int) -> bool:
        return compare({"first": first(length), "second": second(length)}, rounds)["ratio"]["second"] < 1

    rounds = max(3, rounds // 3)
    if not faster(high):
        return None
    while high - low > max(16, low // 16):
        middle = (low + high) // 2
        low, high = (low, middle) if faster(middle) else (middle, high)
    return high


def at_length(attention: Callable, dim: int = 64) -> Callable:
    def call(length: int) -> Callable:
        q, k, v = tokens(length, dim)
        return lambda: attention(q, k, v)

    return call


def method_crossover(dim: int, num_terms: int, expected: int, rounds: int) -> int | None:
    """The length from which the feature form beats all pairs."""
    forms = (
        lambda q, k, v, method=method: q1.taylor_attention(q / 4, k / 4, v, num_terms, method=method)
        for method in ("direct", "features")
    )
    return find_crossover(*(at_length(form, dim) for form in forms), max(32, expected // 3), 3 * expected, rounds)


def compare_heads(length: int, rounds: int) -> dict:
    """Two sequences with eight heads each, and one head alone."""
    q, k, v = tokens(length, 64, (2, 8))
    one = [x[:1, :1] for x in (q, k, v)]
    forms = {
        "softmax, fused": lambda: softmax(q, k, v),
        "Taylor": lambda: q1.taylor_attention(q, k, v),
        "softmax, one head": lambda: softmax(*one),
        "Taylor, one head": lambda: q1.taylor_attention(*one),
    }
    return compare(forms, rounds)


def measure_memory(length: int) -> dict[str, float]:
    """The most MiB that the ways with features hold at a time."""
    q, k, v = tokens(length, 64)
    return {
        "Taylor": q1.peak_memory(lambda: q1.taylor_attention(q, k, v)) / 2**20,
        "naive features": q1.peak_memory(lambda: q1.naive_taylor_attention(q, k, v)) / 2**20,
    }


def measure_methods(rounds: int, scale: float) -> list[dict]:
    """From which length features beat all pairs, beside what `taylor_attention` assumes."""
    return [
        {
            "dim": dim,
            "num_terms": terms,
            "features": q1.num_features(dim, terms),
            "assumed": round(q1.crossover_length(dim, terms)),
            "measured": method_crossover(dim, terms, round(scale * q1.crossover_length(dim, terms)), rounds),
        }
        for dim, terms in ((8, 3), (16, 3), (32, 3), (64, 3), (8, 4), (16, 4), (8, 5), (8, 6))
    ]


def compare_backward(length: int, dim: int, rounds: int) -> dict:
    """Forward and backward pass together."""
    data = tokens(length, dim)
    forms = {"softmax, fused": with_backward(softmax, *data), "Taylor": with_backward(q1.taylor_attention, *data)}
    return compare(forms, rounds)


def measure(rounds: int, scale: float) -> dict:
    length = int(LENGTH * scale)
    progress = tqdm(total=2 * len(FORWARD_BARS) + len(BACKWARD_BARS) + 5, desc="benchmark", disable=None, leave=False)

    def done(result):
        progress.update()
        return result

    with torch.no_grad():
        forward = {dim: done(compare(two_forms(*tokens(length, dim)), rounds)) for dim in FORWARD_BARS}
        causal = done(compare(two_forms(*tokens(length, 64), causal=True), rounds))
        plain = {dim: done(compare(all_forms(*tokens(length, dim)), max(3, rounds // 5))) for dim in FORWARD_BARS}
        low, high = (int(scale * limit) for limit in (1536, 6144))
        crossover = done(find_crossover(at_length(softmax), at_length(q1.taylor_attention), low, high, rounds))
        heads = done(compare_heads(length // 2, max(3, rounds // 3)))
        memory = done(measure_memory(2 * length))
        methods = done(measure_methods(rounds, scale))
    backward = {dim: done(compare_backward(length, dim, max(3, rounds // 4))) for dim in BACKWARD_BARS}
    progress.close()
    return {
        "length": length,
        "forward": forward,
        "plain": plain,
        "causal": causal,
        "crossover": crossover,
        "backward": backward,
        "heads": heads,
        "memory_mib": memory,
        "methods": methods,
    }


def judge(record: dict, scale: float) -> list[dict]:
    """What was measured beside its bar."""
    rows = []

    def row(what: str, value: float | None, bar: float) -> None:
        rows.append({"what": what, "value": value, "bar": bar, "kept": value is not None and value <= bar})

    for dim, bar in FORWARD_BARS.items():
        row(f"time, forward, D = {dim}", record["forward"][dim]["ratio"]["Taylor"], bar)
    row("time, causal, D = 64", record["causal"]["ratio"]["Taylor"], CAUSAL_BAR)
    for dim, bar in BACKWARD_BARS.items():
        row(f"time, forward and backward, D = {dim}", record["backward"][dim]["ratio"]["Taylor"], bar)
    row("crossover length, D = 64", record["crossover"], CROSSOVER_BAR * scale)
    memory = record["memory_mib"]
    row("memory, share of naive features, D = 64", memory["Taylor"] / memory["naive features"], MEMORY_BAR)
    ms = record["heads"]["ms"]
    together, alone = ms["Taylor"] / ms["softmax, fused"], ms["Taylor, one head"] / ms["softmax, one head"]
    row("time ratio, B = 2 and H = 8 over B = H = 1", together / alone, HEADS_BAR)
    return rows


def main() -> int:
    parser = runs.Parser(description=__doc__)
    parser.add_argument("-rounds", type=runs.number(int, 1), default=25)
    parser.add_argument("-scale", type=runs.number(float, 0, 2, low_fits=False), default=1.0, help="of all lengths")
    parser.add_argument("-out", type=Path, help="write a record")
    args = parser.parse_args()

    runs.git_state()
    torch.set_num_threads(1)
    record = measure(args.rounds, args.scale)
    record["bars"] = judge(record, args.scale)

    print(f"forward, L = {record['length']:,}: ms (share of fused softmax)")
    for dim, result in record["plain"].items():
        cells = [f"{name} {result['ms'][name]:.2f} ({ratio:.3f})" for name, ratio in result["ratio"].items()]
        print(f"  D = {dim:2d}: " + ", ".join(cells))
    print("length from which features beat all pairs: measured (assumed)")
    for m in record["methods"]:
        print(f"  D = {m['dim']:2d}, K = {m['num_terms']}, M = {m['features']:5,d}: {m['measured']} ({m['assumed']})")
    print(f"{'Taylor against fused softmax':48s}{'measured':>10s}{'bar':>10s}")
    for bar in record["bars"]:
        value = "none" if bar["value"] is None else f"{bar['value']:.4g}"
        print(f"{bar['what']:48s}{value:>10s}{bar['bar']:10g}{'' if bar['kept'] else '   MISSED'}")
    if args.out:
        about = {"config": {"rounds": args.rounds, "scale": args.scale, "num_terms": 3, "dtype": "float32"}}
        about["dataset"] = {"name": "normal random numbers, scores of deviation 1/4", "kind": "random"}
        runs.write_json(args.out, about | record | {"threads": 1, "device": "cpu"} | runs.run_environment())
    return 0 if all(bar["kept"] for bar in record["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
