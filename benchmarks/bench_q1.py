"""Taylor attention (three terms) against softmax attention, interleaved in one process on one thread.

    python benchmarks/bench_q1.py [-out results/q1-bench.json]                         times and memory, and their bars
    python benchmarks/bench_q1.py -curves [-out results/q1.json]                       errors, times, memory against L
    python benchmarks/bench_q1.py -draw results/q1.json -figures runs/q1     the figure of such a record
    python benchmarks/bench_q1.py -device cuda [-out runs/q1-cuda.json]                long sequences on a GPU

The yardstick is torch.nn.functional.scaled_dot_product_attention(scale=1): float32, B = H = 1 unless said otherwise,
inputs of small scores. A row says how long taylor_attention takes as a share of that (medians over the rounds), beside
the bar that it must stay under. Also timed: the ways a reader would write the formulas (softmax by matmul, naive
features of all orders), the length from which Taylor is faster, and the lengths from which its feature form
beats all pairs, on which method="auto" rests. `-scale 0.25` shortens all sequences for a trial. Exit status 1 if a
bar is missed.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from runs import Parser, number, one_line, reading, run_script


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "bench_q1.py")
    add = parser.add_argument
    add("-rounds", type=number(int, 1), help="of the timing, whose medians count (bars 25, curves 7, lengths 5)")
    add("-scale", type=number(float, 0, 2, low_fits=False), default=1.0, help="of all lengths")
    add("-curves", action="store_true", help="errors, times and memory against the length")
    add("-draw", type=Path, metavar="RECORD", help="draw the figure of a record of -curves")
    add("-figures", type=Path, metavar="FOLDER", help="where the figure goes (beside the record)")
    add("-device", default="cpu", help="cpu (default), cuda or cuda:N; other than cpu: time long sequences on it")
    add("-lengths", type=number(int, 2, 2**20), nargs="+", metavar="L", help="of -device (1024 to 131072)")
    add("-out", type=Path, metavar="FILE", help="write a record; one that is there is replaced")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse_arguments()  # -h and mistakes are answered now: PyTorch takes seconds to import

import itertools
import json
import math
import os
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import attention_approx as q1
import runs
import utils

LENGTH = 8192
# For D = 8, 1.25 times the 0.015 of the former, longer code: there a call costs more than its sums.
FORWARD_BARS = {8: 0.01875, 16: 0.06, 32: 0.15, 64: 0.42}
BACKWARD_BARS = {16: 0.08, 32: 0.15, 64: 0.5}
CAUSAL_BAR = 1.0
CROSSOVER_BAR = 3500  # tokens, D = 64
MEMORY_BAR = 0.1  # of the naive features, L = 16384, D = 64
HEADS_BAR = 1.25  # ratio with B = 2, H = 8, as a multiple of the ratio of the same length with B = H = 1


def softmax(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=1.0, is_causal=causal)


def tokens(length: int, dim: int, batch: tuple[int, int] = (1, 1)) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, L, D], float32, scores of standard deviation 1/4."""
    generator = torch.Generator().manual_seed(42)
    q, k, v = (torch.randn(*batch, length, dim, generator=generator) for _ in range(3))
    entry = math.sqrt(0.25 / math.sqrt(dim))
    return entry * q, entry * k, v


def time_interleaved(
    functions: dict[str, Callable], rounds: int, least_seconds: float = 0.02
) -> dict[str, list[float]]:
    """Seconds a call of each function, once a round, in turns that change from round to round; a GPU is waited for.

    A function is called again until `least_seconds` have passed, and the mean of these calls counts.
    """
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds, order = {name: [] for name in functions}, list(functions)
    for name in order:
        functions[name]()
    for _ in range(rounds):
        for name in order:
            synchronise()
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


def with_backward(attention: Callable, q: Tensor, k: Tensor, v: Tensor) -> Callable:
    """Forward and backward pass as a call without arguments."""
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    slope = torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).to(v)
    return lambda: torch.autograd.grad(attention(*inputs), inputs, slope)


def compare(functions: dict[str, Callable], rounds: int) -> dict:
    """Medians in ms, and each as a share of the first."""
    times = time_interleaved(functions, rounds)
    ms = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
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
        "Taylor": peak_memory(lambda: q1.taylor_attention(q, k, v)) / 2**20,
        "naive features": peak_memory(lambda: q1.naive_taylor_attention(q, k, v)) / 2**20,
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


# ---------------------------------------------------------------------------------------------------
# The record behind the curves of README and report

CURVES = {
    "lengths": [256, 512, 1024, 2048, 3072, 4096, 8192, 16384],
    "dims": [16, 64],
    "terms": [2, 3, 4, 5, 6],
    "dtype": "float32",
    "error_length": 1024,
    "seeds": [42, 43, 44, 45, 46],
    "rounds": 7,
}
FORMULA, NAIVE = "softmax, as the formula", "Taylor, naive features"


def four_forms(q: Tensor, k: Tensor, v: Tensor, num_terms: int) -> dict[str, Callable]:
    """The ways to compute attention that fit into memory, as calls without arguments."""
    forms = {
        q1.SOFTMAX: lambda: softmax(q[None], k[None], v[None]),
        q1.TAYLOR: lambda: q1.taylor_attention(q, k, v, num_terms),
    }
    length, dim = q.shape[-2:]
    if length**2 < 2**28:  # 1 GiB of scores, and as much of weights
        forms[FORMULA] = lambda: q1.softmax_attention(q, k, v)
    if length * q1.num_features(dim, num_terms, symmetric=False) < 2**27:
        forms[NAIVE] = lambda: q1.naive_taylor_attention(q, k, v, num_terms)
    return forms


@torch.no_grad()
def measure_costs(lengths: list[int], dim: int, rounds: int) -> dict:
    """Milliseconds and MiB of a forward pass against L, with the length from which Taylor is faster."""
    points = []
    for length in tqdm(lengths, desc=f"costs, D = {dim}", disable=None, leave=False):
        forms = four_forms(*q1.random_tokens(length, dim, 0.25, 42, torch.float32, torch.device("cpu")), 3)
        ms = {name: 1e3 * statistics.median(seconds) for name, seconds in time_interleaved(forms, rounds).items()}
        mib = {name: peak_memory(form) / 2**20 for name, form in forms.items()}
        points.append({"length": length, "ms": ms, "mib": mib})
    curve = {"dim": dim, "num_terms": 3, "points": points, "crossover": crossover(points)}
    print(crossover_sentence(curve))
    return curve


def crossover(points: list[dict]) -> float | None:
    """The length from which Taylor attention stays faster than fused softmax, between two measured lengths.

    Interpolated on logarithms; None if it is not faster at the longest, or faster already at the shortest.
    """
    ratios = [(math.log(p["length"]), math.log(p["ms"][q1.TAYLOR] / p["ms"][q1.SOFTMAX])) for p in points]
    if ratios[-1][1] >= 0:
        return None
    for (l0, r0), (l1, r1) in reversed(list(itertools.pairwise(ratios))):
        if r0 >= 0:
            return math.exp(l0 + (l1 - l0) * r0 / (r0 - r1))
    return None


def crossover_sentence(curve: dict) -> str:
    if curve["crossover"]:
        return f"D = {curve['dim']}: Taylor is faster than fused softmax from L = {curve['crossover']:,.0f} on"
    last = curve["points"][-1]
    if last["ms"][q1.TAYLOR] < last["ms"][q1.SOFTMAX]:
        return f"D = {curve['dim']}: Taylor is faster at all of these lengths"
    return f"D = {curve['dim']}: these lengths are too short: Taylor is not faster up to L = {last['length']:,}"


def feature_table(dims: list[int], terms: list[int]) -> list[dict]:
    """M for every D and K: each monomial once, and every order of the coordinates."""
    return [
        {"dim": d, "num_terms": k, "merged": q1.num_features(d, k), "unmerged": q1.num_features(d, k, symmetric=False)}
        for d in dims
        for k in terms
    ]


def measure_errors(length: int, dim: int, terms: list[int], seeds: list[int]) -> dict:
    """The relative error of Z against the size of the scores for each K, beside the mean of V and the bound."""

    def summary(values: list[float]) -> dict:
        return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}

    points = []
    for score_std in tqdm(q1.SCORE_STDS, desc="errors", disable=None, leave=False):
        draws = [q1.random_tokens(length, dim, score_std, s, torch.float32, torch.device("cpu")) for s in seeds]
        trials, of_mean = [q1.relative_errors(*draw, terms) for draw in draws], []
        for q, k, v in draws:
            exact = q1.softmax_attention(q.double(), k.double(), v.double())
            of_mean.append(float((v.double().mean(-2, keepdim=True) - exact).norm() / exact.norm()))
        outcomes = {}
        for num_terms in terms:
            errors, bounds, negative = zip(*(trial[num_terms] for trial in trials), strict=True)
            without = sum(map(math.isnan, errors))
            outcomes[str(num_terms)] = {
                "error": None if without else summary(errors),
                "bound": max(bounds) if max(bounds) < math.inf else None,
                "runs_with_negative_weights": sum(negative),
                "runs_without_result": without,
            }
        points.append({"score_std": score_std, "mean_of_v": summary(of_mean), "terms": outcomes})
    return {"length": length, "dim": dim, "seeds": seeds, "points": points}


def measure_curves(lengths: list[int], error_length: int, seeds: list[int], rounds: int) -> dict:
    """Features, errors, times and memory, in the form that the report reads."""
    dims, terms = CURVES["dims"], CURVES["terms"]
    record = {"features": feature_table([8, 16, 32, 64], terms)}
    record["errors"] = measure_errors(error_length, max(dims), terms, seeds)
    record["costs"] = [measure_costs(lengths, dim, rounds) for dim in dims]
    return record


def plot(record: dict):
    """The script's figure, from a record of the curves."""
    errors = {
        num_terms: [
            (point["score_std"], (outcome["error"] or {"mean": math.nan})["mean"], outcome["bound"] or math.nan)
            for point in record["errors"]["points"]
            for outcome in [point["terms"][num_terms]]
        ]
        for num_terms in record["errors"]["points"][0]["terms"]
    }
    return q1.plot(errors, record["costs"])


def draw(record: dict, folder: Path) -> None:
    """`plot` as attention.png and .svg."""
    utils.save_figure(plot(record), folder / "attention")


# ---------------------------------------------------------------------------------------------------
# Long sequences on a GPU, for `-device` and for bench_gpu.py

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]  # not by matmul
LONGEST_CALL = 150  # ms: what is expected to take longer is left out
FEATURES, DIRECT = (partial(q1.taylor_attention, method=method) for method in ("features", "direct"))


def call_ms(call: Callable, calls: int = 1) -> float:
    """Milliseconds a call, by CUDA events where there is a GPU, else by the clock."""
    if not torch.cuda.is_available():
        return 1e3 * timeit.timeit(call, number=calls) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def device_costs(forms: dict[str, Callable], rounds: int) -> dict[str, dict]:
    """The median time of a call in "ms" by form, and on a GPU its peak memory in "mib".

    The forms take turns after a warm-up. Short calls are repeated for 5 ms; long ones have three rounds at most.
    """
    warm_up = {name: call_ms(form) for name, form in forms.items()}
    again = {name: call_ms(form) if warm_up[name] < 500 else warm_up[name] for name, form in forms.items()}
    calls = {name: max(1, min(50, int(5 / ms))) for name, ms in again.items()}
    times = {name: [] for name in forms}
    for turn in range(min(rounds, 3) if max(again.values()) > 100 else rounds):
        for name in [*forms][:: -1 if turn % 2 else 1]:
            times[name].append(call_ms(forms[name], calls[name]))
    costs = {"ms": {name: statistics.median(values) for name, values in times.items()}}
    if torch.cuda.is_available():
        costs["mib"] = {name: peak_memory(form, "cuda") / 2**20 for name, form in forms.items()}
    return costs


def device_inputs(device: torch.device, dtype: str, dim: int, heads: int, length: int) -> list[Tensor]:
    """q, k, v [1, heads, length, dim] as `tokens` has them, made on the device."""
    torch.manual_seed(42)
    scales = 0.5 * dim**-0.25, 0.5 * dim**-0.25, 1.0
    made = (scale * torch.randn(1, heads, length, dim, device=device) for scale in scales)
    return [x.to(DTYPES[dtype]).requires_grad_() for x in made]


def attend(attention: Callable, backward: bool, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """The output z, and with `backward` the gradients of |z|² / 2."""
    with torch.set_grad_enabled(backward):
        z = attention(q, k, v)
        return [z, *(torch.autograd.grad(z, (q, k, v), z.detach()) if backward else ())]


def relative_difference(x: Tensor, reference: Tensor) -> float | None:
    """The largest difference over the largest number of the reference; None where one is not finite."""
    x, reference = x.detach().double().cpu(), reference.detach().double().cpu()
    value = float((x - reference).abs().max() / reference.abs().max())
    return value if math.isfinite(value) else None


def device_agreement(
    device: torch.device, dims: list[int], length: int, leave_out: Callable[[str], None]
) -> list[dict]:
    """Relative differences of outputs and gradients from float64 on the CPU, two heads."""
    forms = {q1.SOFTMAX: (softmax, q1.softmax_attention), "features": (FEATURES, DIRECT), "direct": (DIRECT, DIRECT)}
    rows = []
    for dim, dtype, (name, (form, exact)) in itertools.product(dims, DTYPES, forms.items()):
        inputs = device_inputs(device, dtype, dim, 2, length)
        try:
            with sdpa_kernel(FUSED):
                found = attend(form, True, *inputs)
        except RuntimeError as error:  # no fused kernel, as for bfloat16 on GPUs before 2020
            leave_out(f"agreement of {name}, D = {dim}, {dtype}; {one_line(error, 90)}")
            continue
        expected = attend(exact, True, *(x.detach().double().cpu().requires_grad_() for x in inputs))
        errors = dict(zip(("output", "q", "k", "v"), map(relative_difference, found, expected), strict=True))
        rows.append({"dtype": dtype, "dim": dim, "form": name} | errors)
    return rows


def device_curves(
    device: torch.device,
    sizes: tuple[list[int], list[int], list[int]],
    rounds: int,
    left: Callable[[], float] = lambda: math.inf,
    leave_out: Callable[[str], None] = print,
) -> list[dict]:
    """Times and memory against L for all dtypes, forward and with backward; `sizes` are numbers of heads, D and L.

    What has no time (`left()` seconds), no memory or no fused kernel is told to `leave_out`. With one head, the two
    methods of Taylor attention are timed as well: they say where "auto" should change over.
    """
    curves = []
    for backward, heads, dim, dtype in itertools.product((False, True), sizes[0], sizes[1], DTYPES):
        name = f"attention, H = {heads}, D = {dim}, {dtype}, {'with backward' if backward else 'forward'}"
        forms, points = {q1.SOFTMAX: softmax, q1.TAYLOR: q1.taylor_attention}, []
        if heads == 1 and not backward:
            forms |= {"features": FEATURES, "direct": DIRECT}
        for length in sizes[2]:
            for form, ms in points[-1]["ms"].items() if points else ():
                if ms * (4 if form in (q1.SOFTMAX, "direct") else 2) > LONGEST_CALL:
                    del forms[form]
                    leave_out(f"{name}: {form} from L = {length:,} on; the length before took {ms:.0f} ms")
            if not forms:
                break
            try:
                if left() < 0:
                    raise RuntimeError("no time is left")
                data = device_inputs(device, dtype, dim, heads, length)
                calls = {form: partial(attend, function, backward, *data) for form, function in forms.items()}
                with sdpa_kernel(FUSED):
                    points.append({"length": length} | device_costs(calls, rounds))
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                leave_out(f"{name}: L = {length:,} and more; {one_line(error, 90)}")
                break
            finally:
                data = calls = None  # the next length needs the memory
        both = [point for point in points if {q1.SOFTMAX, q1.TAYLOR} <= point["ms"].keys()]
        curve = {"heads": heads, "backward": backward, "dim": dim, "dtype": dtype, "points": points}
        curves.append(curve | {"crossover": crossover(both) if both else None})
        if both:
            ms = both[-1]["ms"]
            at = f"{ms[q1.TAYLOR]:.2f} ms, fused softmax {ms[q1.SOFTMAX]:.2f} ms at L = {both[-1]['length']:,}"
            print(f"{name}: Taylor {at}; {curve_crossover(curves[-1])}", flush=True)
    return curves


def curve_crossover(curve: dict) -> str:
    if curve["crossover"]:
        return f"faster from L = {curve['crossover']:,.0f} on"
    last = [p["ms"] for p in curve["points"] if {q1.SOFTMAX, q1.TAYLOR} <= p["ms"].keys()][-1]
    return "faster at all lengths" if last[q1.TAYLOR] < last[q1.SOFTMAX] else "not faster"


def measure_bars(args: argparse.Namespace) -> dict:
    record = measure(args.rounds or 25, args.scale)
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
    config = {"rounds": args.rounds or 25, "scale": args.scale, "num_terms": 3, "dtype": "float32"}
    return {"config": config} | record


def run(args: argparse.Namespace) -> None:
    if args.draw:
        with reading(args.draw, "a record of -curves"):
            return draw(json.loads(args.draw.read_text()), args.figures or args.draw.parent)
    device, started = utils.choose_device(args.device), time.perf_counter()
    torch.set_num_threads(1)
    if args.curves:
        lengths, error_length = ([max(16, int(n * args.scale)) for n in x] for x in (CURVES["lengths"], [1024]))
        config = CURVES | {"lengths": sorted({*lengths}), "error_length": error_length[0]}
        config["rounds"] = args.rounds or config["rounds"]
        record = measure_curves(config["lengths"], error_length[0], config["seeds"], config["rounds"])
        record = {"config": config} | record | {"seed": config["seeds"][0], "seconds": time.perf_counter() - started}
    elif args.lengths or device.type != "cpu":
        config = {"lengths": args.lengths or [2**n for n in range(10, 18)], "rounds": args.rounds or 5}
        record = {
            "config": config,
            "curves": device_curves(device, ([8], [16, 64], config["lengths"]), config["rounds"]),
        }
    else:
        record = measure_bars(args)
    if args.out:
        dataset = {"name": "normal random numbers, scores of standard deviation 1/4", "kind": "random"}
        about = {"dataset": dataset, "threads": 1, "device": str(device)} | runs.run_environment(device)
        runs.write_json(args.out, record | about)
    args.missed = not all(bar["kept"] for bar in record.get("bars", []))


def main() -> int:
    args = argparse.Namespace(missed=False)  # run_script keeps what it parses; whether a bar was missed must get out

    def parse(arguments: list[str] | None) -> argparse.Namespace:
        vars(args).update(vars(parse_arguments(arguments)))
        return args

    return run_script("bench_q1.py", parse, run, None, "stopped, nothing was written") or int(args.missed)


if __name__ == "__main__":
    sys.exit(main())
