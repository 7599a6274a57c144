"""Question 2: why max-pooling beats convolutions of stride 2, measured at exactly equal parameters (224,892).

    python report/pooling.py                                    on phantoms, to results/q2/pooling-phantom.json
    python report/pooling.py -data scans.npz -epochs 100        on other scans, to results/q2/pooling-scans.json
    python report/pooling.py -seeds 42 -epochs 1 -out try.json  a try

A convolution of stride 2 answers at one fixed position of each 2x2 window of what the same convolution answers at
stride 1. So three networks that differ only in how such a window becomes one number are trained alike, by hw2-q2.py's
own loop: `max` (its network), `stride` (its -no_maxpool) and `mean`, which sees all four positions as max does but
takes no maximum. The weights are those of the best epoch on the validation split. Measured for each network and seed:

    train, val, test    loss, accuracy, balanced accuracy, AUC, without dropout: fitting against generalising
    last_epoch          the same on train and val with the weights of the last epoch
    shifts              how many predictions change, and how many stay right, when the test scans are shifted
    tested_with         the trained weights on the test split, pooled in another way without retraining
    windows             what of the responses stride's one position holds

Trainings are kept under runs/q2/pooling: the same command again goes on where it was stopped, and trains nothing that
is finished.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from runs import InputError, Parser, number, run_script


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, "pooling.py")
    add, rate = parser.add_argument, number(float, 0, low_fits=False)
    add("-data", default="phantom", help="phantom (default), octmnist, auto, an .npz, or a folder of class folders")
    add("-data_dir", type=Path, default=Path("data"), help="where OCTMNIST lies or is saved (default: data)")
    add("-epochs", type=number(int, 1), default=15, help="default: 15")
    add("-learning_rate", type=rate, default=0.1, help="default: 0.1, which hw2-q2.py's grid chose")
    add("-seeds", type=number(int, 0, 2**32), nargs="+", default=[42, 43, 44], help="default: 42 43 44")
    add("-jobs", type=number(int, 1, 1025), default=2, help="processes (default: 2)")
    add("-device", default="auto", help="auto (default: CUDA, MPS, CPU), cpu, cuda, cuda:N or mps")
    add("-out", type=Path, help="the record (default: results/q2/pooling-DATA.json)")
    args = parser.parse_args(arguments)
    if len(set(args.seeds)) < len(args.seeds):
        parser.error("-seeds: every seed once")
    return args


if __name__ == "__main__":
    parse_arguments(None)  # -h and mistakes are answered now: PyTorch takes seconds to import

import importlib
import itertools
import math
from dataclasses import asdict, dataclass
from functools import partial
from unittest import mock

import joblib
import torch
import torch.nn.functional as F
from torch import Tensor

import runs
import utils
from utils import OctData

hw2_q2 = importlib.import_module("hw2-q2")

# How a 2x2 window becomes one number: [..., H, W] -> [..., H / 2, W / 2].
POOLS = {
    "max": partial(F.max_pool2d, kernel_size=2),
    "stride": lambda responses: responses[..., ::2, ::2],
    "mean": partial(F.avg_pool2d, kernel_size=2),
}
METRICS = ("loss", "accuracy", "balanced_accuracy", "macro_auc")
NUM_SCANS = 1000  # at most so many scans for the statistics of the responses


# ---------------------------------------------------------------------------------------------------
# The three networks


class PooledCNN(hw2_q2.CNN):
    """The homework's network, pooled by max, stride or mean. The weights of one fit the others."""

    def __init__(self, dropout_prob: float, pool: str):
        super().__init__(dropout_prob, no_maxpool=pool != "max")
        self.pool = pool
        if pool == "mean":
            # The strided network, its convolutions at stride 1 and averaged; the ReLU that follows changes nothing.
            for convolution in (self.conv1, self.conv2):
                convolution.stride = (1, 1)
                convolution.register_forward_hook(lambda module, inputs, output: POOLS["mean"](F.relu(output)))


@dataclass(frozen=True)
class PoolingConfig(hw2_q2.Config):
    """The homework's settings, and how to pool."""

    pool: str = "max"


def make_config(args: argparse.Namespace, pool: str, seed: int) -> PoolingConfig:
    values = asdict(hw2_q2.RECIPES["homework"]) | {"learning_rate": args.learning_rate, "epochs": args.epochs}
    return PoolingConfig(**values | {"no_maxpool": pool == "stride", "seed": seed, "pool": pool})


def build_network(config: PoolingConfig) -> PooledCNN:
    return PooledCNN(config.dropout, config.pool)


def load_network(path: Path, part: str, config: PoolingConfig, device: torch.device) -> PooledCNN:
    """The `network` of a best.pt, after its best epoch, or the `model` of a last.pt."""
    model = build_network(config).to(device)
    model.load_state_dict(runs.load_checkpoint(path, {part})[part])
    return model.eval()


# ---------------------------------------------------------------------------------------------------
# Measures of a trained network


def scores(metrics: dict) -> dict:
    return {name: metrics[name] for name in METRICS}


def shift(images: Tensor, dy: int, dx: int) -> Tensor:
    """Move images [N, H, W] down by dy and right by dx pixels; the border uncovered repeats the image's edge.

    The edge of a scan is near-black background or a white wedge of no tissue: repeating it goes on with either.
    """
    rows = (torch.arange(images.shape[1], device=images.device) - dy).clamp(0, images.shape[1] - 1)
    columns = (torch.arange(images.shape[2], device=images.device) - dx).clamp(0, images.shape[2] - 1)
    return images[:, rows[:, None], columns]


def shift_sensitivity(model: PooledCNN, images: Tensor, labels: Tensor) -> dict:
    """Share of predictions that a shift changes, and balanced accuracy: means over the shifts of each distance.

    The distance is max(|dy|, |dx|). An odd shift changes which positions the first sampling looks at, an even one
    does not: of the 16 shifts of distance 2, `2_even` has the 8 that are even both ways, `2_odd` the others.
    """
    unshifted = hw2_q2.predict(model, images).argmax(axis=1)
    outcomes: dict[str, list[dict]] = {"1": [], "2": [], "2_even": [], "2_odd": []}
    for dy, dx in itertools.product(range(-2, 3), repeat=2):
        distance = max(abs(dy), abs(dx))
        if distance:
            probabilities = hw2_q2.predict(model, shift(images, dy, dx))
            outcome = {
                "changed": float((probabilities.argmax(axis=1) != unshifted).mean()),
                "balanced_accuracy": hw2_q2.score(probabilities, labels.cpu().numpy())["balanced_accuracy"],
            }
            outcomes[str(distance)].append(outcome)
            if distance == 2:
                outcomes["2_odd" if dy % 2 or dx % 2 else "2_even"].append(outcome)
    return {
        group: {name: sum(outcome[name] for outcome in members) / len(members) for name in members[0]}
        for group, members in outcomes.items()
    }


@torch.no_grad()
def responses(model: PooledCNN, images: Tensor) -> list[Tensor]:
    """What both convolutions answer at stride 1, after ReLU: [N, 8, 28, 28] and [N, 16, 12, 12]."""
    x, found = images.div(256).unsqueeze(1), []
    for convolution in (model.conv1, model.conv2):
        found.append(F.relu(F.conv2d(x, convolution.weight, convolution.bias, padding=convolution.padding)))
        x = POOLS[model.pool](found[-1])
    return found


@torch.no_grad()
def pooled_otherwise(model: PooledCNN, pool: str, rescale_on: Tensor | None = None) -> PooledCNN:
    """The trained network with another way of pooling, not retrained.

    A maximum is larger than a mean or a sample, and the layers above expect its size. With scans `rescale_on`
    [N, 28, 28] each channel is scaled so that its mean over them is what it was: then only the pattern differs.
    """
    other = PooledCNN(model.drop.p, pool).to(model.fc1.weight.device)
    other.load_state_dict(model.state_dict())
    if rescale_on is not None:
        for i, convolution in enumerate((other.conv1, other.conv2)):
            wanted, found = (
                POOLS[network.pool](responses(network, rescale_on)[i]).mean(dim=(0, 2, 3)) for network in (model, other)
            )
            factor = torch.where(found > 0, wanted / found, 1)  # positive: ReLU and pooling commute with it
            convolution.weight *= factor[:, None, None, None]
            convolution.bias *= factor
    return other.eval()


def scores_pooled_otherwise(model: PooledCNN, scans: Tensor, images: Tensor, labels: Tensor) -> dict:
    """Test scores of the trained weights under the other ways of pooling, as they are and rescaled on `scans`.

    `four_phases` keeps the way, and averages the probabilities over shifts by 0 or 1 pixel in both directions.
    """
    tested = {}
    for pool in POOLS:
        if pool != model.pool:
            tested[pool] = hw2_q2.evaluate(pooled_otherwise(model, pool), images, labels)
            tested[f"{pool}_rescaled"] = hw2_q2.evaluate(pooled_otherwise(model, pool, scans), images, labels)
    phases = [hw2_q2.predict(model, shift(images, dy, dx)) for dy in (0, 1) for dx in (0, 1)]
    tested["four_phases"] = hw2_q2.score(sum(phases) / 4, labels.cpu().numpy())
    return {name: scores(metrics) for name, metrics in tested.items()}


def window_statistics(model: PooledCNN, scans: Tensor) -> dict:
    """For both convolutions, what stride's position holds of the 2x2 windows of their responses, after ReLU.

    `differing` is the share of windows whose four responses are not all equal (background is flat). Of these,
    `largest_is_sampled` have their largest response at that position (chance: 1/4) and `missed_by_stride` have
    nothing there; `kept_by_stride` is the sum of the responses there, as a share of the sum of the largest ones.
    """

    def share(part: Tensor, whole: Tensor) -> float | None:
        return float(part.double().sum() / whole.double().sum()) if whole.any() else None

    statistics = {}
    for name, response in zip(("conv1", "conv2"), responses(model, scans), strict=True):
        largest, sampled = POOLS["max"](response), POOLS["stride"](response)
        differing = largest > -POOLS["max"](-response)
        statistics[name] = {
            "differing": share(differing, torch.ones_like(differing)),
            "largest_is_sampled": share((sampled == largest) & differing, differing),
            "missed_by_stride": share((sampled == 0) & differing, differing),
            "kept_by_stride": share(sampled * differing, largest * differing),
        }
    return statistics


# ---------------------------------------------------------------------------------------------------
# The experiment


def train_and_measure(config: PoolingConfig, data: OctData, folder: Path, device: torch.device) -> dict:
    """One network and seed, in a process of its own; a finished training is read instead of repeated."""
    torch.set_num_threads(1)
    runs.git_state()
    folder = folder / f"{config.pool}-lr{config.learning_rate:g}-seed{config.seed}-epochs{config.epochs}"
    print(f"{folder}: {'is trained' if (folder / 'record.json').exists() else 'trains'}", flush=True)
    # hw2-q2.py's own loop, with our network in the place of its two; its figures would call `mean` max-pool.
    no_figures = {"draw_run": lambda *_: None, "plot_predictions": lambda *_: None}
    try:
        with mock.patch.multiple(hw2_q2, **no_figures):
            record = hw2_q2.train(config, data, folder, device, resume=True, build=build_network)
    except hw2_q2.Diverged as error:
        raise InputError(f"{folder}: {error}") from None
    splits = {split: [torch.from_numpy(array).to(device) for array in data.splits[split]] for split in utils.SPLITS}
    return {key: record[key] for key in ("seed", "num_parameters", "best_epoch", "seconds")} | {
        "folder": str(folder),
        "history": {name: [epoch[name] for epoch in record["history"]] for name in record["history"][0]},
        "measures": measure(config, folder, record, splits, device),
    }


def measure(config: PoolingConfig, folder: Path, record: dict, splits: dict, device: torch.device) -> dict:
    model = load_network(folder / "best.pt", "network", config, device)
    last = load_network(folder / "last.pt", "model", config, device)
    sample = {split: images[:: math.ceil(len(images) / NUM_SCANS)] for split, (images, _) in splits.items()}
    return {
        "train": scores(hw2_q2.evaluate(model, *splits["train"])),
        "val": scores(record["val"]),
        "test": scores(record["test"]),
        "test_recall": dict(zip(hw2_q2.SHORT_NAMES, record["test"]["recall"], strict=True)),
        "last_epoch": {split: scores(hw2_q2.evaluate(last, *splits[split])) for split in ("train", "val")},
        "shifts": shift_sensitivity(model, *splits["test"]),
        "tested_with": scores_pooled_otherwise(model, sample["train"], *splits["test"]),
        "windows": window_statistics(model, sample["val"]),
    }


def difference(a: dict | float | None, b: dict | float | None) -> dict | float | None:
    if isinstance(a, dict):
        return {key: difference(a[key], b[key]) for key in a if key in b}
    return None if a is None or b is None else a - b


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    device = utils.choose_device(args.device)
    data = utils.load_oct(args.data, args.data_dir)
    name = "phantom" if data.kind == "phantom" else data.name.lower().replace(" ", "_")
    folder = Path("runs/q2/pooling") / f"{name}-{data.description['sha256'][:8]}"
    configs = [make_config(args, pool, seed) for seed in args.seeds for pool in POOLS]
    parallel = joblib.Parallel(n_jobs=args.jobs, pre_dispatch="n_jobs", batch_size=1, mmap_mode="c")
    trained = parallel(joblib.delayed(train_and_measure)(config, data, folder, device) for config in configs)

    by_pool = {pool: trained[i :: len(POOLS)] for i, pool in enumerate(POOLS)}
    measures = {pool: [run["measures"] for run in group] for pool, group in by_pool.items()}
    record = {
        "config": {k: v for k, v in asdict(configs[0]).items() if k not in ("pool", "no_maxpool", "seed")},
        "dataset": data.description,
        "seeds": args.seeds,
        "chosen_by": f"val_{hw2_q2.CHOOSE_BY['homework']}",
        "networks": {pool: {"summary": runs.summarise(measures[pool]), "runs": by_pool[pool]} for pool in POOLS},
        # A seed gives the three networks the same first weights and the same batches: differences are by pairs.
        "max_minus": {
            pool: runs.summarise(list(map(difference, measures["max"], measures[pool]))) for pool in ("stride", "mean")
        },
        "seconds": round(sum(run["seconds"] for run in trained), 1),
        "jobs": args.jobs,
        **runs.run_environment(device),
    }
    runs.write_json(args.out or Path(f"results/q2/pooling-{name}.json"), record)
    print_record(record)


def print_record(record: dict) -> None:
    dataset = record["dataset"]
    print(f"\n{dataset['name']} ({dataset['kind']}), seeds {record['seeds']}, mean ± standard deviation")
    names = ("train loss", "train balanced", "val balanced", "test balanced", "changed by 1")
    print(" " * 8 + "".join(f"{name:>18s}" for name in names))
    for pool, network in record["networks"].items():
        found = network["summary"]
        values = [found["train"]["loss"], *(found[split]["balanced_accuracy"] for split in utils.SPLITS)]
        values.append(found["shifts"]["1"]["changed"])
        print(f"{pool:8s}" + "".join(f"{runs.spread(value, '.4f'):>18s}" for value in values))


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 2 for input that cannot be used (after one line on stderr), 130 when interrupted."""
    return run_script("pooling.py", parse_arguments, run, arguments, "stopped; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
