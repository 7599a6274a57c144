"""Our training loop against the loop of the course's skeleton, interleaved in one process on one thread.

    python benchmarks/bench_q2.py [-rounds 41] [-steps 100] [-out results/q2/bench.json]

The plain loop: a float32 TensorDataset, a DataLoader, torch.optim.SGD and loss.item() at each step. Both train
the homework's network (batch 8, SGD 0.01) on phantoms from the same seed; each round trains one epoch of `steps`
steps with either loop, in random order. Printed: steps per second, CPU time a step, the ratio of the medians (plain
time / our time: above 1 we are faster), whether all parameters are bit for bit the same at the end, and the memory
of the data. Exit status 1 if they are not the same, or the ratio is below 1.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from runs import Parser, number


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("-rounds", type=number(int, 1), default=41)
    parser.add_argument("-steps", type=number(int, 1), default=100, help="steps of an epoch")
    parser.add_argument("-out", type=Path, help="write a record")
    return parser.parse_args()


if __name__ == "__main__":
    parse_arguments()  # -h and mistakes are answered now: PyTorch takes seconds to import

import copy
import dataclasses
import importlib
import random
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import joblib
import numpy as np
import torch
import torch.nn.functional as F
from bench_q1 import call_ms, device_costs
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

import runs
import utils
from offline_data.phantoms import oct_phantoms

hw2_q2 = importlib.import_module("hw2-q2")

BATCH_SIZE = 8


class PlainLoop:
    """As in the course's skeleton."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, device: str = "cpu", dropout: float = 0.7):
        utils.set_seed(42)
        self.device, self.model = device, hw2_q2.CNN(dropout).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        x = torch.from_numpy(images).float().div(256).unsqueeze(1)
        self.dataset = TensorDataset(x, torch.from_numpy(labels))
        self.loader = DataLoader(self.dataset, batch_size=BATCH_SIZE, shuffle=True)
        self.data_bytes = sum(tensor.nbytes for tensor in self.dataset.tensors)
        self.random_state = torch.get_rng_state()

    def epoch(self) -> float:
        criterion = torch.nn.NLLLoss()
        self.model.train()
        losses = []
        for x, y in self.loader:
            if self.device != "cpu":
                x, y = x.to(self.device), y.to(self.device)
            self.optimizer.zero_grad()
            loss = criterion(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return float(np.mean(losses))


class OurLoop:
    """hw2-q2.py's own `train_epoch`, untouched."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, device: str = "cpu", dropout: float = 0.7):
        utils.set_seed(42)
        self.config = dataclasses.replace(hw2_q2.RECIPES["homework"], dropout=dropout)
        self.epochs, self.graphs = 0, {}
        self.model = hw2_q2.build_network(self.config).to(device)
        self.optimizer = hw2_q2.make_optimizer(self.config, self.model)
        self.images, self.labels = torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)
        self.data_bytes = self.images.nbytes + self.labels.nbytes
        self.random_state = torch.get_rng_state()

    def epoch(self) -> float:
        self.epochs += 1
        parts = self.model, self.optimizer, self.images, self.labels, self.config, self.epochs - 1
        return hw2_q2.train_epoch(*parts, graphs=self.graphs)


# ---------------------------------------------------------------------------------------------------
# On a GPU, for bench_gpu.py

WAYS = {"course": PlainLoop, "ours": OurLoop, "ours, CUDA graphs": OurLoop}


def draw_scans(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Phantoms drawn by all cores: images uint8 [size, 28, 28], labels int64 [size]."""
    sizes = [len(part) for part in np.array_split(np.arange(size), 1 + size // 4000)]
    tasks = (joblib.delayed(oct_phantoms)(part, 4, 4, seed) for seed, part in enumerate(sizes))
    drawn = joblib.Parallel(-1 if len(sizes) > 1 else 1)(tasks)
    images, labels = (np.concatenate([arrays[f"train_{part}"] for arrays in drawn]) for part in ("images", "labels"))
    return images, labels[:, 0].astype(np.int64)


def epoch_of(way: str, *arguments, **options) -> Callable[[], float]:
    """The `epoch` of a loop made with these arguments; "ours" alone is hw2-q2.py's without CUDA graphs."""
    epoch = WAYS[way](*arguments, **options).epoch
    eager = mock.patch.object(torch.cuda, "make_graphed_callables", lambda network, inputs: network)
    return eager(epoch) if way == "ours" else epoch


def device_loops(device: str, num_scans: int, rounds: int) -> dict:
    """Steps a second of three loops in turns. Without dropout, all of them and ours on the CPU must agree in losses."""
    images, labels = draw_scans(num_scans)
    costs = device_costs({way: epoch_of(way, images, labels, device) for way in WAYS}, rounds)
    losses, steps = {}, -(-len(labels) // BATCH_SIZE)
    for way, place in [*((way, device) for way in WAYS), ("ours", "cpu")]:
        epoch = epoch_of(way, images[:4000], labels[:4000], place, dropout=0.0)
        losses[f"{way}, on {place}"] = [epoch(), epoch()]
    return {
        "steps_per_second": {way: 1e3 * steps / ms for way, ms in costs["ms"].items()},
        "losses": losses,
        "relative_difference": max(max(x) / min(x) - 1 for x in zip(*losses.values(), strict=True)),
    }


def timed_run(device: str, num_scans: int, left: Callable[[], float], leave_out: Callable[[str], None]) -> dict:
    """The homework's 15 epochs, or those for which `left()` seconds are enough; what is missing is told."""
    loop, losses, seconds, mib = OurLoop(*draw_scans(num_scans), device), [], [], []
    while len(losses) < loop.config.epochs and (not seconds or left() > seconds[-1]):
        seconds.append(call_ms(lambda: losses.append(loop.epoch())) / 1e3)
        mib.append(torch.cuda.memory_reserved() / 2**20)  # must not grow
    if len(losses) < loop.config.epochs:
        leave_out(f"{loop.config.epochs - len(losses)} of {loop.config.epochs} epochs; no time is left")
    return {"scans": num_scans, "epochs": len(losses), "seconds": seconds, "losses": losses, "reserved_mib": mib}


def stacked_step(models: list[torch.nn.Module], rates: Tensor) -> tuple[dict[str, Tensor], Callable]:
    """Networks as one: their parameters [R, ...], and a step of gradient descent, each with its own rate and batch."""
    parameters, _ = torch.func.stack_module_state(models)
    network = copy.deepcopy(models[0]).to("meta")
    forward = torch.vmap(lambda own, x: torch.func.functional_call(network, own, (x,)), randomness="different")

    def step(x: Tensor, y: Tensor) -> Tensor:  # [R, B, 1, 28, 28], [R, B] -> losses [R]
        outputs = forward(parameters, x)  # [R, B, 4]
        losses = F.nll_loss(outputs.flatten(0, 1), y.flatten(), reduction="none").view_as(y).mean(1)
        gradients = torch.autograd.grad(losses.sum(), [*parameters.values()])
        with torch.no_grad():
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                parameter -= rates.view(-1, *[1] * (parameter.dim() - 1)) * gradient
        return losses.detach()

    return parameters, step


def stacked_speed(device: str, rounds: int) -> dict:
    """Steps a second of the grid's nine networks with pooling, each step for all nine."""
    utils.set_seed(42)
    rates = torch.tensor(hw2_q2.GRID_RATES["homework"] * 3, device=device)
    _, step = stacked_step([hw2_q2.CNN(0.7).to(device) for _ in rates], rates)
    x, y = torch.rand(len(rates), BATCH_SIZE, 1, 28, 28, device=device), torch.zeros(len(rates), BATCH_SIZE).long()
    forms = {"stacked": partial(step, x, y.to(device))}
    if device == "cuda":
        with torch.cuda.stream(torch.cuda.Stream()):  # what is captured must have run before, on another stream
            forms["stacked"]()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            forms["stacked"]()
        forms["stacked, CUDA graph"] = graph.replay
    ms = device_costs(forms, rounds)["ms"]
    return {"networks": len(rates), "steps_per_second": {name: 1e3 / value for name, value in ms.items()}}


def main() -> int:
    args = parse_arguments()

    runs.git_state()
    torch.set_num_threads(1)
    data = oct_phantoms(num_train=args.steps * BATCH_SIZE, num_val=4, num_test=4)
    images, labels = data["train_images"], data["train_labels"].reshape(-1).astype(np.int64)
    loops = {"plain": PlainLoop(images, labels), "ours": OurLoop(images, labels)}
    wall, cpu = {name: [] for name in loops}, {name: [] for name in loops}
    order = random.Random(0)
    for _ in range(args.rounds):
        for name in order.sample(list(loops), k=len(loops)):
            loop = loops[name]
            torch.set_rng_state(loop.random_state)  # each loop draws as if it were alone
            started, started_cpu = time.perf_counter(), time.process_time()
            loop.epoch()
            wall[name].append((time.perf_counter() - started) / args.steps)
            cpu[name].append((time.process_time() - started_cpu) / args.steps)
            loop.random_state = torch.get_rng_state()

    same = torch.equal(*(parameters_to_vector(loop.model.parameters()) for loop in loops.values()))
    record = {
        "config": dataclasses.asdict(hw2_q2.RECIPES["homework"]),
        "dataset": {"name": "OCT phantoms", "kind": "phantom", "counts": {"train": len(labels)}},
        "rounds": args.rounds,
        "steps_per_round": args.steps,
        "steps_per_second": {name: 1 / float(np.median(wall[name])) for name in loops},
        "cpu_ms_per_step": {name: 1e3 * float(np.median(cpu[name])) for name in loops},
        "ratio_wall": float(np.median(wall["plain"]) / np.median(wall["ours"])),
        "ratio_cpu": float(np.median(cpu["plain"]) / np.median(cpu["ours"])),
        "parameters_identical": same,
        "data_memory_ratio": loops["ours"].data_bytes / loops["plain"].data_bytes,
    }
    print(f"{'loop':8s}{'steps/s':>10s}{'CPU ms/step':>14s}")
    for name in loops:
        print(f"{name:8s}{record['steps_per_second'][name]:10.0f}{record['cpu_ms_per_step'][name]:14.3f}")
    print(f"ratio of medians, plain / ours: wall {record['ratio_wall']:.3f}, CPU {record['ratio_cpu']:.3f}")
    print(f"parameters after {args.rounds} epochs: {'bit-identical' if same else 'DIFFERENT'}")
    print(f"memory of the data, ours / plain: {record['data_memory_ratio']:.3f}")
    if args.out:
        runs.write_json(args.out, record | runs.run_environment(torch.device("cpu")))
    return 0 if same and record["ratio_wall"] >= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
