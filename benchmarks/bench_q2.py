"""Our training loop against the loop of the course's skeleton, interleaved in one process on one thread.

    python benchmarks/bench_q2.py [-rounds 41] [-steps 100] [-out results/q2/bench.json]

The plain loop: a float32 TensorDataset, a DataLoader, torch.optim.SGD and loss.item() at each step. Both train
the homework's network (batch 8, SGD 0.01) on phantoms from the same seed; each round trains one epoch of `steps`
steps with either loop, in random order. Printed: steps a second, CPU time a step, the ratio of the medians (plain
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

import dataclasses
import importlib
import random
import time

import numpy as np
import torch
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

import runs
import utils
from offline_data.phantoms import oct_phantoms

hw2_q2 = importlib.import_module("hw2-q2")

BATCH_SIZE = 8


class PlainLoop:
    """As in the course's skeleton."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        utils.set_seed(42)
        self.model = hw2_q2.CNN(dropout_prob=0.7)
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
            self.optimizer.zero_grad()
            loss = criterion(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return float(np.mean(losses))


class OurLoop:
    """hw2-q2.py's own `train_epoch`, untouched."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        utils.set_seed(42)
        self.config, self.epochs = hw2_q2.RECIPES["homework"], 0
        self.model = hw2_q2.build_network(self.config)
        self.optimizer = hw2_q2.make_optimizer(self.config, self.model)
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(labels)
        self.data_bytes = self.images.nbytes + self.labels.nbytes
        self.random_state = torch.get_rng_state()

    def epoch(self) -> float:
        self.epochs += 1
        return hw2_q2.train_epoch(self.model, self.optimizer, self.images, self.labels, self.config, self.epochs - 1)


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
