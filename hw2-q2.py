"""Question 2: classify retinal OCT scans (OCTMNIST, 28x28, four classes) with a small convolutional network.

    python hw2-q2.py                                    train on OCTMNIST, or on phantoms where it cannot be had
    python hw2-q2.py -no_maxpool                        the variant that strides instead of pooling
    python hw2-q2.py -data scans.npz -recipe strong     other scans; what a practitioner would do
    python hw2-q2.py -grid -seeds 42 43 44 -jobs 2      the whole question: three rates, the choice, both networks
    python hw2-q2.py -resume                            go on with a run that was stopped
    python hw2-q2.py -predict a.jpeg b.png              classify scans with the network in weights/
    python hw2-q2.py -predict a.jpeg -checkpoint runs/.../best.pt
    python hw2-q2.py -evaluate -data scans.npz -checkpoint runs/.../best.pt
    python hw2-q2.py -draw runs/.../record.json -out figures

A run leaves in its folder: record.json (every number), figures (PNG, SVG), best.pt (the weights of the best epoch
on the validation split) and last.pt (all that is needed to go on after a stop).
"""

import argparse
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from runs import InputError, Parser, number, run_script

# ---------------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class Config:
    """What determines a run's numbers, together with the data. Raises TypeError, ValueError for what cannot be."""

    recipe: str
    optimizer: str
    learning_rate: float
    batch_size: int
    epochs: int
    dropout: float
    l2_decay: float
    no_maxpool: bool = False
    seed: int = 42

    def __post_init__(self):
        for field in fields(self):  # a checkpoint may hold anything
            if not isinstance(getattr(self, field.name), (float, int) if field.type is float else field.type):
                raise TypeError(f"{field.name} must be {field.type.__name__}, not {getattr(self, field.name)!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")


# What a flag is where it is not given: as the course states it, and what a practitioner would do.
RECIPES = {
    "homework": Config("homework", "sgd", learning_rate=0.01, batch_size=8, epochs=15, dropout=0.7, l2_decay=0.0),
    "strong": Config("strong", "adamw", learning_rate=0.003, batch_size=64, epochs=10, dropout=0.3, l2_decay=0.05),
}
GRID_RATES = {"homework": (0.1, 0.01, 0.001), "strong": (0.01, 0.003, 0.001)}
# The metric on the validation split that chooses the best epoch, and the grid's learning rate.
CHOOSE_BY = {"homework": "accuracy", "strong": "balanced_accuracy"}
WEIGHTS = Path(__file__).with_name("weights") / "q2-strong-phantoms.safetensors"  # made by `make weights`


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, "hw2-q2.py")
    add, rate = parser.add_argument, number(float, 0, 1e30, low_fits=False)

    add("-data", default="auto", help="auto (default), octmnist, phantom, an .npz, or a folder of class folders")
    add("-data_dir", type=Path, default=Path("data"), help="where OCTMNIST lies or is saved (default: data)")

    add("-recipe", choices=RECIPES, help="homework (default): as the course states it; strong: a practitioner's")
    add("-no_maxpool", action="store_true", default=None, help="stride by 2 instead of pooling")
    add("-epochs", type=number(int, 1), help="default: 15 (strong: 10)")
    add("-batch_size", type=number(int, 1, 2**20), help="default: 8 (strong: 64)")
    add("-learning_rate", type=rate, help="default: 0.01 (strong: 0.003)")
    add("-l2_decay", type=number(float, 0, 1e30), help="weight decay; default: 0 (strong: 0.05)")
    add("-dropout", type=number(float, 0, 1), help="default: 0.7 (strong: 0.3)")
    add("-optimizer", choices=("sgd", "adam", "adamw"), help="default: sgd (strong: adamw)")
    add("-seed", type=number(int, 0, 2**32), help="default: 42")

    add("-device", default="auto", help="auto (default: CUDA, MPS, CPU), cpu, cuda, cuda:N or mps")
    add("-threads", type=number(int, 1, 1025), default=1, help="CPU threads of a process; more than 1 rarely helps")
    add("-out", type=Path, help="folder of the run (default: a name that tells the settings, under runs/)")
    add("-resume", action="store_true", help="go on with the stopped run or grid of the same settings")

    add("-grid", action="store_true", help="the whole question: all rates and seeds, then no_maxpool")
    add("-seeds", type=number(int, 0, 2**32), nargs="+", help="of a grid (default: 42 43 44)")
    add("-jobs", type=number(int, 1, 1025), help="processes of a grid (default: 2)")

    add("-predict", type=Path, nargs="+", metavar="IMAGE", help="classify image files")
    add("-evaluate", action="store_true", help="score networks on the scans of -data that they were not trained on")
    add("-export", type=Path, metavar="FILE", help="save the network of -checkpoint as safetensors, which run no code")
    add("-checkpoint", type=Path, nargs="+", help="best.pt, for these three (default: the network in weights/)")
    add("-draw", type=Path, nargs="+", metavar="RECORD", help="draw a record.json or grid.json again, into -out")

    args = parser.parse_args(arguments)
    modes = [flag for flag in ("grid", "predict", "evaluate", "export", "draw") if getattr(args, flag)]
    if len(modes) > 1:
        parser.error(f"-{modes[0]} and -{modes[1]} exclude each other")
    if args.checkpoint and not (args.predict or args.evaluate or args.export):
        parser.error("-checkpoint goes with -predict, -evaluate or -export (to go on with a stopped run, use -resume)")
    if len(args.checkpoint or []) > 1 and not args.evaluate:
        parser.error(f"-{modes[0]} takes one -checkpoint, not {len(args.checkpoint)}")
    if args.grid and (args.no_maxpool or args.learning_rate or args.seed is not None):
        parser.error("-grid sets -learning_rate and -no_maxpool itself, and takes -seeds instead of -seed")
    for flag, path in (("-out", args.out if args.evaluate else None), ("-export", args.export)):
        if path and path.exists():
            parser.error(f"{flag} {path}: is there already; choose another name")
    if (args.seeds or args.jobs) and not args.grid:
        parser.error("-seeds and -jobs go with -grid")
    if args.export and args.export.suffix != ".safetensors":
        parser.error(f"-export {args.export}: must end in .safetensors")
    args.seeds, args.jobs, args.checkpoint = args.seeds or [42, 43, 44], args.jobs or 2, args.checkpoint or [WEIGHTS]
    if len(set(args.seeds)) < len(args.seeds):
        parser.error("-seeds: every seed once")
    return args


if __name__ == "__main__":
    parse_arguments(None)  # -h and mistakes are answered now: PyTorch takes seconds to import

import contextlib
import copy
import io
import json
import math
import os
import time
from collections.abc import Iterable
from concurrent.futures import BrokenExecutor
from functools import partial
from typing import TextIO

import joblib
import numpy as np
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import runs
import utils
from offline_data import OCT_CLASSES
from utils import OctData

SHORT_NAMES = ("CNV", "DME", "drusen", "normal")
# The course tests on a test split re-weighted to the training proportions: of each class the first so many.
COURSE_TEST_COUNTS = (182, 55, 42, 250)


class Diverged(InputError):
    """The learning rate was too high for these data."""


# ---------------------------------------------------------------------------------------------------
# The networks


class CNN(nn.Module):
    """The homework's network: two convolutions and three linear layers, 224,892 parameters.

    With `no_maxpool` the convolutions stride by 2 and nothing is pooled; the shapes stay the same:
    images [B, 1, 28, 28] -> conv1, pool [B, 8, 14, 14] -> conv2, pool [B, 16, 6, 6] -> [B, 576] -> [B, 4].
    """

    def __init__(self, dropout_prob: float, no_maxpool: bool = False):
        super().__init__()
        self.no_maxpool = no_maxpool
        stride = 2 if no_maxpool else 1
        self.conv1 = nn.Conv2d(1, 8, kernel_size=3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(8, 16, kernel_size=3, stride=stride, padding=0)
        self.fc1 = nn.Linear(16 * 6 * 6, 320)
        self.fc2 = nn.Linear(320, 120)
        self.fc3 = nn.Linear(120, len(OCT_CLASSES))
        self.drop = nn.Dropout(dropout_prob)

    def forward(self, images: Tensor) -> Tensor:
        """Images float [B, 1, 28, 28] in [0, 1] to log-probabilities [B, 4]."""
        x = F.relu(self.conv1(images))  # [B, 8, 28, 28], or [B, 8, 14, 14] with strides
        if not self.no_maxpool:
            x = F.max_pool2d(x, 2)  # [B, 8, 14, 14]
        x = F.relu(self.conv2(x))  # [B, 16, 12, 12], or [B, 16, 6, 6] with strides
        if not self.no_maxpool:
            x = F.max_pool2d(x, 2)  # [B, 16, 6, 6]
        x = self.drop(F.relu(self.fc1(x.flatten(1))))  # [B, 320]
        x = F.relu(self.fc2(x))  # [B, 120]
        return F.log_softmax(self.fc3(x), dim=1)  # [B, 4]


class StrongCNN(nn.Module):
    """About as many parameters (218,100), spent on depth: five batch-normalised convolutions, then a mean.

    Three of them halve the resolution, by max-pooling or (`no_maxpool`) by their stride. The mean over positions
    makes the network care less where in the scan a lesion lies.
    """

    def __init__(self, dropout_prob: float, no_maxpool: bool = False):
        super().__init__()
        layers, channels = [], 1
        for width, halve in ((16, True), (32, True), (64, False), (96, True), (160, False)):
            stride = 2 if halve and no_maxpool else 1
            # Batch norm has a bias of its own, so the convolution needs none.
            layers.append(nn.Conv2d(channels, width, 3, stride, padding=1, bias=False))
            if halve and not no_maxpool:
                layers.append(nn.MaxPool2d(2))
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.drop = nn.Dropout(dropout_prob)
        self.classifier = nn.Linear(channels, len(OCT_CLASSES))
        self.to(memory_format=torch.channels_last)  # a third faster on a CPU at this size

    def forward(self, images: Tensor) -> Tensor:
        """Images float [B, 1, 28, 28] in [0, 1] to log-probabilities [B, 4]."""
        x = self.features(images)  # [B, 160, 3, 3], or [B, 160, 4, 4] with strides
        x = self.drop(x.mean(dim=(2, 3)))  # [B, 160]
        return F.log_softmax(self.classifier(x), dim=1)  # [B, 4]


def build_network(config: Config) -> nn.Module:
    return {"homework": CNN, "strong": StrongCNN}[config.recipe](config.dropout, config.no_maxpool)


def get_number_trainable_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---------------------------------------------------------------------------------------------------
# Training


class PlainSGD:
    """Gradient descent without momentum: p <- p - learning_rate * (gradient + l2_decay * p).

    The parameters of torch.optim.SGD, bit for bit (a test compares them), without its bookkeeping: that costs 6 % of a
    step at batch size 8, half of what this loop gains over the course's (benchmarks/bench_q2.py).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0):
        self.parameters, self.weight_decay = list(parameters), weight_decay
        self.param_groups = [{"lr": lr}]

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        gradients = [parameter.grad for parameter in self.parameters]
        if self.weight_decay:
            gradients = torch._foreach_add(gradients, self.parameters, alpha=self.weight_decay)
        torch._foreach_add_(self.parameters, gradients, alpha=-self.param_groups[0]["lr"])

    def state_dict(self) -> dict:
        return {}  # no momentum: nothing is carried from step to step

    def load_state_dict(self, state: dict) -> None:
        pass


def train_batch(x: Tensor, y: Tensor, model: nn.Module, optimizer, criterion) -> Tensor:
    """One step on images x [B, 1, 28, 28] and labels y [B]. Returns the loss, not yet waited for."""
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def shuffled_order(num_examples: int) -> Tensor:
    """The order [N] in which DataLoader(shuffle=True) would serve the examples from the same random state.

    Starting an iteration draws a base seed for its workers; then the sampler draws the seed of its own generator.
    """
    torch.empty((), dtype=torch.int64).random_()
    sampler_seed = int(torch.empty((), dtype=torch.int64).random_())
    return torch.randperm(num_examples, generator=torch.Generator().manual_seed(sampler_seed))


def balanced_order(labels: Tensor) -> Tensor:
    """N examples [N] drawn with replacement, every class equally often on average."""
    weights = 1.0 / labels.bincount(minlength=len(OCT_CLASSES))[labels].double()
    return torch.multinomial(weights, len(labels), replacement=True)


def cosine_learning_rate(peak: float, step: int, num_steps: int) -> float:
    """Linear warm-up over the first 5 % of the steps, then a half cosine down to zero."""
    warmup = max(1, num_steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def shift_and_flip(images: Tensor, max_shift: int = 2) -> Tensor:
    """Flip each image [B, 1, 28, 28] left to right with probability 1/2 and shift it by up to `max_shift` pixels.

    A left eye mirrors a right one; the border that a shift uncovers repeats the image's edge.
    """
    count, _, height, width = images.shape
    flip = torch.rand(count, 1, device=images.device) < 0.5
    shift = torch.randint(-max_shift, max_shift + 1, (2, count, 1), device=images.device)
    rows = (torch.arange(height, device=images.device) + shift[0]).clamp(0, height - 1)  # [B, 28]
    columns = (torch.arange(width, device=images.device) + shift[1]).clamp(0, width - 1)  # [B, 28]
    columns = torch.where(flip, width - 1 - columns, columns)
    index = torch.arange(count, device=images.device)[:, None, None]
    return images[index, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


CHUNK = 128  # batches gathered and scaled at once; the loss is looked at as rarely


def train_epoch(model, optimizer, images, labels, config, epoch=0, average=None, progress=None, graphs=None) -> float:
    """Train once over uint8 images [N, 28, 28] and labels [N]. Returns the mean loss over the epoch's examples.

    `epoch` counts from 0. `average`, if any, follows the weights of the model; `progress` is a tqdm bar of steps.
    `graphs` is a dict that keeps a model's CUDA graphs from epoch to epoch.
    """
    strong, size = config.recipe == "strong", config.batch_size
    model.train()
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1) if strong else nn.NLLLoss()
    order = balanced_order(labels.cpu()) if strong else shuffled_order(len(labels))
    networks = {} if graphs is None else graphs
    steps_an_epoch, num_done, loss_sum = math.ceil(len(labels) / size), 0, 0.0
    step = epoch * steps_an_epoch
    for chunk in order.to(images.device).split(CHUNK * size):
        inputs = images[chunk].div(256).unsqueeze(1)  # [chunk, 1, 28, 28]; the course divides by 256, not 255
        if strong:
            inputs = shift_and_flip(inputs)
        batches, losses = list(zip(inputs.split(size), labels[chunk].split(size), strict=True)), []
        for x, y in batches:
            network = model
            if strong:
                rate = cosine_learning_rate(config.learning_rate, step, steps_an_epoch * config.epochs)
                optimizer.param_groups[0]["lr"] = rate
            elif x.is_cuda:  # at batch size 8, launching the kernels takes longer than running them: CUDA graphs
                if len(x) not in networks:  # a whole batch and the ragged last one
                    # Captured on a stream of its own, on purpose, and without drawing dropout's numbers.
                    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
                    with torch.random.fork_rng([x.device]):
                        networks[len(x)] = torch.cuda.make_graphed_callables(nn.Sequential(model), (x.clone(),))
                network = networks[len(x)]
            losses.append(train_batch(x, y, network, optimizer, criterion))
            if average:
                average.update_parameters(model)
            step += 1
        loss_sum += sum(loss * len(y) for loss, (_, y) in zip(torch.stack(losses).tolist(), batches, strict=True))
        num_done += len(chunk)
        if progress is not None:
            progress.update(len(batches))
            progress.set_postfix(epoch=epoch + 1, loss=f"{loss_sum / num_done:.3f}")
    return loss_sum / len(labels)


# ---------------------------------------------------------------------------------------------------
# Scores


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, batch_size: int = 1024) -> np.ndarray:
    """Class probabilities float [N, 4] of uint8 images [N, 28, 28]."""
    model.eval()
    outputs = [model(batch.div(256).unsqueeze(1)).exp() for batch in images.split(batch_size)]
    return torch.cat(outputs).cpu().numpy()


def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> dict:
    """The metrics of `score` for the model on uint8 images [N, 28, 28] with labels [N]. Raises Diverged as it does."""
    return score(predict(model, images), labels.cpu().numpy())


def score(probabilities: np.ndarray, labels: np.ndarray) -> dict:
    """Metrics of class probabilities [N, 4] against labels [N], as they stand in a record.

    `macro_auc` is the unweighted mean of the four one-against-rest areas under the ROC curve, as in MedMNIST's
    evaluator; None where a class is missing from the labels. Balanced accuracy is the mean recall of the classes
    that occur. `confusion` has a row a true class and a column a predicted one. Raises Diverged for NaN.
    """
    if not np.isfinite(probabilities).all():
        raise Diverged("training diverged, the network's outputs are no numbers any more: lower -learning_rate")
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score

    classes = range(len(OCT_CLASSES))
    predicted = probabilities.argmax(axis=1)
    precision, recall, _, support = precision_recall_fscore_support(
        labels, predicted, labels=list(classes), zero_division=0
    )
    true_probability = np.maximum(probabilities[np.arange(len(labels)), labels], np.finfo(np.float32).tiny)
    areas = [roc_auc_score(labels == c, probabilities[:, c]) for c in classes] if support.all() else None
    return {
        "num_examples": len(labels),
        "loss": float(-np.log(true_probability).mean()),
        "accuracy": float((predicted == labels).mean()),
        "balanced_accuracy": float(recall[support > 0].mean()),
        "macro_auc": float(np.mean(areas)) if areas else None,
        "precision": precision.tolist(),
        "recall": recall.tolist(),
        "confusion": confusion_matrix(labels, predicted, labels=list(classes)).tolist(),
    }


def course_test_subset(labels: np.ndarray) -> np.ndarray:
    """Indices of the course's 529 test scans: of each class the first 182 / 55 / 42 / 250 in file order."""
    firsts = [np.flatnonzero(labels == c)[:count] for c, count in enumerate(COURSE_TEST_COUNTS)]
    return np.sort(np.concatenate(firsts))


# ---------------------------------------------------------------------------------------------------
# A run: training, checkpoints, record


def make_optimizer(config: Config, model: nn.Module) -> PlainSGD | torch.optim.Optimizer:
    kind = {"sgd": PlainSGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(model.parameters(), lr=config.learning_rate, weight_decay=config.l2_decay)


def identity(config: Config, data: OctData) -> dict:
    """What a run's numbers follow from."""
    return {"config": asdict(config), "dataset": data.description}


def best_epoch(history: list[dict], recipe: str) -> dict:
    """The epoch with the highest validation metric (the recipe's), among equals the lowest loss."""
    return max(history, key=lambda epoch: (epoch[f"val_{CHOOSE_BY[recipe]}"], -epoch["val_loss"]))


def train(
    config: Config, data: OctData, folder: Path, device, resume=False, verbose=False, build=build_network
) -> dict:
    """Train, test once, and leave record, figures and checkpoints in `folder`. Returns the record.

    With `resume` it goes on from last.pt, or reads a run that is finished. Raises InputError for a folder that holds
    anything else, Diverged where losses or outputs are no numbers any more.
    """

    def is_whole(record: dict) -> bool:
        print_outcome(record, folder, to=io.StringIO())  # raises where a score is missing or no number
        with contextlib.suppress(InputError):  # a best.pt that is lost or damaged can be made again from last.pt
            return bool(runs.load_checkpoint(folder / "best.pt", {"network"}))
        return False

    make, wanted = partial(train_locked, config, data, folder, device, verbose, build), identity(config, data)
    record, was_there = runs.do_once(folder / "record.json", resume, wanted, make, is_whole)
    if was_there and verbose:
        print(f"{folder} holds this run, finished")
    return record


def train_locked(config: Config, data: OctData, folder: Path, device: torch.device, verbose: bool, build) -> dict:
    """`train` in a folder that is locked: from the start, or from last.pt where that is."""
    utils.set_seed(config.seed)
    splits = {split: [torch.from_numpy(array).to(device) for array in data.splits[split]] for split in utils.SPLITS}
    model = build(config).to(device)
    state, average, network = {"model": model, "optimizer": make_optimizer(config, model)}, None, model
    if config.recipe == "strong":  # what is evaluated is the moving average of the weights
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
        state, network = state | {"average": average}, average.module
    state["network"] = best = copy.deepcopy(network)  # as after the best epoch so far

    history, seconds, last, graphs = [], 0.0, folder / "last.pt", {}
    if last.exists():
        history, seconds = go_back_to(last, state, identity(config, data), device)
    steps = math.ceil(len(splits["train"][1]) / config.batch_size)
    quiet = None if verbose else True  # None: quiet unless the output is a terminal
    bar = tqdm(total=steps * config.epochs, initial=steps * len(history), unit="step", disable=quiet, leave=False)
    with bar as progress:
        for epoch in range(len(history), config.epochs):
            started = time.perf_counter()
            loss = train_epoch(model, state["optimizer"], *splits["train"], config, epoch, average, progress, graphs)
            val = evaluate(network, *splits["val"])
            seconds += time.perf_counter() - started
            metrics = {f"val_{name}": val[name] for name in ("loss", "accuracy", "balanced_accuracy", "macro_auc")}
            history.append({"epoch": epoch + 1, "train_loss": loss} | metrics)
            if verbose:
                scores = f"accuracy {val['accuracy']:.4f}   balanced {val['balanced_accuracy']:.4f}"
                losses = f"training loss {loss:.4f}   validation loss {val['loss']:.4f}"
                tqdm.write(f"epoch {epoch + 1:3d}   {losses}   {scores}", file=sys.stdout)
            if best_epoch(history, config.recipe) is history[-1]:
                best.load_state_dict(network.state_dict())
            content = identity(config, data) | {name: part.state_dict() for name, part in state.items()}
            content |= {"history": history, "seconds": seconds, "random": utils.random_state(device)}
            content |= {"trained_on_digests": torch.from_numpy(data.trained_on_digests)}
            runs.save_checkpoint(last, content)

    record = identity(config, data) | {
        "num_parameters": get_number_trainable_params(best),
        "best_epoch": best_epoch(history, config.recipe)["epoch"],
        "chosen_by": f"val_{CHOOSE_BY[config.recipe]}",
        "val": evaluate(best, *splits["val"]),
        "history": history,
        "seed": config.seed,
        "seconds": round(seconds, 2),
        **runs.run_environment(device),
    }
    return test_and_save(best, record, data, folder, device)


def test_and_save(best: nn.Module, record: dict, data: OctData, folder: Path, device: torch.device) -> dict:
    """Test the trained network, once; leave it, the record and the figures in `folder`. Returns the record."""
    images, labels = data.splits["test"]
    probabilities = predict(best, torch.from_numpy(images).to(device))
    record["test"] = score(probabilities, labels)
    if data.name == "OCTMNIST":
        subset = course_test_subset(labels)
        record["test_course_subset"] = score(probabilities[subset], labels[subset])
    content = {"config": record["config"], "dataset": record["dataset"], "best_epoch": record["best_epoch"]}
    content |= {"network": best.state_dict(), "trained_on_digests": torch.from_numpy(data.trained_on_digests)}
    runs.save_checkpoint(folder / "best.pt", content)
    draw_run(record, folder)
    plot_predictions(record, images, labels, probabilities, folder / "predictions")
    runs.write_json(folder / "record.json", record)  # last: a folder with a record is a finished run
    return record


def go_back_to(path: Path, state: dict, wanted: dict, device: torch.device) -> tuple[list, float]:
    """Load a last.pt into the parts of a training's `state`, and the random state. Returns history and seconds so far.

    Raises InputError if it is damaged, or of another run than the `identity` that is wanted.
    """
    content = runs.load_checkpoint(path, {"config", "dataset", "history", "seconds", "random"})
    with runs.reading(path, "a checkpoint of hw2-q2.py"):
        runs.check_identity(path, content, wanted)
        history, config = content["history"], wanted["config"]
        json.dumps([history, content["seconds"]], allow_nan=False)  # raises for what no record can hold
        best_epoch(history, config["recipe"])  # raises for a history that is empty or lacks something
        if [epoch["epoch"] for epoch in history] != list(range(1, len(history) + 1)) or len(history) > config["epochs"]:
            raise ValueError("its epochs do not follow each other")
        for name, part in state.items():
            part.load_state_dict(content[name])
        utils.restore_random_state(content["random"], device)
        return history, float(content["seconds"])


# ---------------------------------------------------------------------------------------------------
# The whole question: a grid of runs

GridRun = tuple[Config, dict | None]  # a run's settings and its record, None if the training diverged
VARIED = ("learning_rate", "no_maxpool", "seed")  # the settings in which the runs of a grid differ


def run_grid(
    config: Config, seeds: list[int], data: OctData, folder: Path, device: torch.device, jobs: int, resume: bool
) -> dict:
    """Train every learning rate with every seed, choose the rate, train `no_maxpool` with it. Returns the record.

    The rate is chosen by the mean over the seeds of the best validation metric; no test score plays a part.
    """

    def is_whole(record: dict) -> bool:
        print_grid(record, to=io.StringIO())  # raises where a part is missing or of another type
        files = [folder / file for row in record["settings"] for file in row["runs"]]
        return bool(files) and all(file.with_name("best.pt").exists() for file in files)

    shared = {name: value for name, value in asdict(config).items() if name not in VARIED}
    wanted = {"config": shared, "seeds": seeds, "dataset": data.description}
    make = partial(run_grid_locked, config, wanted, data, folder, device, jobs, resume)
    record, was_there = runs.do_once(folder / "grid.json", resume, wanted, make, is_whole)
    if was_there:
        print(f"{folder} holds this grid, finished")
    return record


def run_grid_locked(base: Config, about: dict, data: OctData, folder: Path, device, jobs: int, resume: bool) -> dict:
    """`run_grid` in a folder that is locked; `about` begins the record."""
    started, begun_before, threads = time.perf_counter(), any(folder.glob("*/last.pt")), torch.get_num_threads()
    rates, metric, seeds, done = GRID_RATES[base.recipe], CHOOSE_BY[base.recipe], about["seeds"], []
    num_runs = len(seeds) * (len(rates) + 1)

    def train_all(rates: Iterable[float], no_maxpool: bool) -> None:
        configs = [replace(base, no_maxpool=no_maxpool, learning_rate=r, seed=s) for r in rates for s in seeds]
        tasks = (joblib.delayed(train_in_grid)(c, data, folder, device, resume, threads, os.getpid()) for c in configs)
        # Each run as soon as it is done; with mmap_mode the processes share the scans.
        pool = joblib.Parallel(
            jobs, return_as="generator_unordered", pre_dispatch="n_jobs", batch_size=1, mmap_mode="c"
        )
        for config, record in pool(tasks):
            done.append((config, record))
            outcome = f"best validation {metric} {record['val'][metric]:.4f}" if record else "diverged"
            print(f"{len(done):2d} of {num_runs}   {run_name(config):28s} {outcome}", flush=True)

    try:
        train_all(rates, no_maxpool=False)
        chosen = best_rate(done, base.recipe)
        train_all([chosen], no_maxpool=True)
    except BrokenExecutor:
        advice = "add -resume to go on, with fewer -jobs if memory is short"
        raise InputError(f"{folder}: a process of the grid was killed; {advice}") from None
    record = about | {
        "chosen_rate": chosen,
        "chosen_by": f"mean over seeds of the best val_{metric}",
        "settings": [summarise_setting(done, no, r) for no, r in [*((False, r) for r in rates), (True, chosen)]],
        "seconds": round(sum(run["seconds"] for _, run in done if run), 1),
        "wall_seconds": None if begun_before else round(time.perf_counter() - started, 1),
        "jobs": jobs,
        **runs.run_environment(device),
    }
    runs.write_json(folder / "grid.json", record)
    draw_grid(record, folder, folder / "grid")
    return record


def train_in_grid(
    config: Config, data: OctData, folder: Path, device, resume: bool, threads: int, parent: int
) -> GridRun:
    """One run of a grid, in a process of its own that ends with its `parent`; a finished one is read, not repeated."""
    runs.end_with(parent)
    torch.set_num_threads(threads)
    try:
        return config, train(config, data, folder / run_name(config), device, resume)
    except Diverged:
        return config, None


def best_rate(done: list[GridRun], recipe: str) -> float:
    """The learning rate with the highest mean of the best validation metrics, among equals the first of GRID_RATES.

    Only the runs with pooling count; one that diverged has the metric -inf.
    """

    def mean_metric(rate: float) -> float:
        group = [record for config, record in done if (config.no_maxpool, config.learning_rate) == (False, rate)]
        return float(np.mean([record["val"][CHOOSE_BY[recipe]] if record else -math.inf for record in group]))

    return max(GRID_RATES[recipe], key=mean_metric)


def summarise_setting(done: list[GridRun], no_maxpool: bool, rate: float) -> dict:
    """A row of the grid's record: each metric of a setting as mean and standard deviation over the seeds."""
    group = [run for run in done if (run[0].no_maxpool, run[0].learning_rate) == (no_maxpool, rate)]
    trained = sorted(((config, record) for config, record in group if record), key=lambda run: run[0].seed)
    row = {
        "network": "no_maxpool" if no_maxpool else "maxpool",
        "learning_rate": rate,
        "runs": [f"{run_name(config)}/record.json" for config, _ in trained],
        "diverged": len(group) - len(trained),
    }
    for split in ("val", "test", "test_course_subset"):
        for metric in ("accuracy", "balanced_accuracy", "macro_auc"):
            values = [record[split][metric] for _, record in trained if split in record]
            if values and None not in values:
                row[f"{split}_{metric}"] = runs.mean_and_std(values)
    if trained:
        row["seconds"] = runs.mean_and_std([record["seconds"] for _, record in trained])
    return row


def print_grid(record: dict, to: TextIO | None = None) -> None:
    dataset, rows = record["dataset"], []
    for row in record["settings"]:
        names = ("val_accuracy", "test_accuracy", "test_balanced_accuracy", "test_macro_auc")
        is_chosen = row["learning_rate"] == record["chosen_rate"] and row["network"] == "maxpool"
        remark = f"{row['diverged']} diverged" if row["diverged"] else "<- chosen" if is_chosen else ""
        cells = [runs.spread(row[name], ".4f") if name in row else "n/a" for name in names]
        rows.append([row["network"], f"{row['learning_rate']:g}", *cells, remark])
    headers = ["network", "rate", "val acc", "test acc", "test balanced", "test AUC", ""]
    print(f"\n{dataset['name']} ({dataset['kind']}), seeds {record['seeds']}, mean ± standard deviation", file=to)
    print(tabulate(rows, headers, disable_numparse=True, colalign=["left", *["right"] * 5, "left"]), file=to)


# ---------------------------------------------------------------------------------------------------
# Figures: drawn from records alone, but for the predictions


def data_title(record: dict) -> str:
    """What a figure must say of its data before anything else."""
    return "PHANTOMS, no real scans" if record["dataset"]["kind"] == "phantom" else record["dataset"]["name"]


def run_title(record: dict, separator: str = ": ") -> str:
    config = record["config"]
    network = f"{config['recipe']} recipe, {'strided, no max-pool' if config['no_maxpool'] else 'max-pool'}"
    return f"{data_title(record)}{separator}{network}, rate {config['learning_rate']:g}"


def plot(record: dict, path: Path) -> None:
    """Training loss and validation accuracy against the epoch, as `path`.png and .svg."""
    figure, (loss_axes, accuracy_axes) = utils.new_figure(1, 2, size=(4.6, 3.5))
    figure.suptitle(run_title(record))
    history = {key: [epoch[key] for epoch in record["history"]] for key in record["history"][0]}
    loss_axes.plot(history["epoch"], history["train_loss"], label="training, mean over the epoch")
    loss_axes.plot(history["epoch"], history["val_loss"], "--", label="validation, after the epoch")
    loss_axes.set(title="Loss", xlabel="epoch", ylabel="negative log-likelihood [nats]")
    accuracy_axes.plot(history["epoch"], history["val_accuracy"], label="accuracy")
    accuracy_axes.plot(history["epoch"], history["val_balanced_accuracy"], "--", label="balanced accuracy")
    accuracy_axes.axvline(record["best_epoch"], color="0.5", linewidth=1, linestyle=":", label="epoch kept")
    accuracy_axes.set(title="Validation accuracy", xlabel="epoch", ylabel="fraction correct")
    for axes in (loss_axes, accuracy_axes):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    utils.save_figure(figure, path)


def plot_confusion(record: dict, path: Path) -> None:
    """The test split's confusion matrix, counts on row shares, as `path`.png and .svg."""
    test, ticks = record["test"], range(len(SHORT_NAMES))
    counts = np.array(test["confusion"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, (axes,) = utils.new_figure(size=(4.6, 4.6))
    figure.suptitle(run_title(record, "\n"))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{count}\n{shares[row, column]:.0%}", ha="center", va="center", color=colour)
    axes.set(xticks=ticks, xticklabels=SHORT_NAMES, yticks=ticks, yticklabels=SHORT_NAMES, ylabel="true class")
    axes.set_xlabel("predicted class (scans, share of the true class)")
    scores = f"accuracy {test['accuracy']:.3f}, balanced {test['balanced_accuracy']:.3f}"
    axes.set_title(f"test split: {scores}", fontsize=10, fontweight="normal")
    axes.grid(False)
    utils.save_figure(figure, path)


def plot_predictions(
    record: dict, images: np.ndarray, labels: np.ndarray, probabilities: np.ndarray, path: Path
) -> None:
    """The first six test scans of each class with the answer and its probability, wrong ones marked, as `path`.*.

    Images uint8 [N, 28, 28], labels [N], class probabilities [N, 4].
    """
    height, width = 39, 33  # of a scan with its two lines of text above and the gap beside it, in pixels
    mosaic = np.full((4 * height, 6 * width - 5), 255, np.uint8)  # one picture: 24 axes would take seconds to draw
    figure, (axes,) = utils.new_figure(size=(9.0, 7.4))
    figure.suptitle(f"{run_title(record)}, test scans")
    axes.axis("off")
    for label, name in enumerate(SHORT_NAMES):
        for place, i in enumerate(np.flatnonzero(labels == label)[:6]):
            top, left = label * height + 11, place * width
            mosaic[top : top + 28, left : left + 28] = images[i]
            guess = probabilities[i].argmax()
            verdict = f"{SHORT_NAMES[guess]} {probabilities[i, guess]:.0%}"
            text = f"{name}\n✓ {verdict}" if guess == label else f"{name}, taken for\n✗ {verdict}"
            colour, weight = ("black", "normal") if guess == label else (utils.COLOURS[1], "bold")
            axes.text(left + 14, top - 1, text, color=colour, fontweight=weight, fontsize=9, ha="center", va="bottom")
    axes.imshow(mosaic, cmap="gray", vmin=0, vmax=255)
    utils.save_figure(figure, path)


def draw_run(record: dict, folder: Path, prefix: str = "") -> None:
    plot(record, folder / f"{prefix}curves")
    plot_confusion(record, folder / f"{prefix}confusion")


def plot_grid(grid: dict, folder: Path):
    """Compare a grid's settings: curves as mean and range over the seeds, test scores as one mark per seed.

    The records of the runs lie in `folder`.
    """
    figure, (loss_axes, accuracy_axes, test_axes) = utils.new_figure(1, 3, size=(4.3, 3.9))
    figure.suptitle(f"{data_title(grid)}: {grid['config']['recipe']} recipe, {len(grid['seeds'])} seeds (band: range)")
    ticks = []
    for i, row in enumerate(grid["settings"]):
        records = [runs.read_json(folder / name) for name in row["runs"]]  # none where every seed diverged
        strided, colour = row["network"] == "no_maxpool", utils.COLOURS[i]
        ticks.append(f"{row['learning_rate']:g}\n{'no max-pool' if strided else '' if records else 'diverged'}")
        for axes, name in ((loss_axes, "train_loss"), (accuracy_axes, "val_accuracy")) if records else ():
            curves = np.array([[e[name] for e in r["history"]] for r in records])
            label = f"{'no max-pool' if strided else 'max-pool'}, rate {row['learning_rate']:g}"
            epochs = np.arange(1, curves.shape[1] + 1)
            axes.plot(epochs, curves.mean(axis=0), "--" if strided else "-", color=colour, label=label)
            axes.fill_between(epochs, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        for metric, marker, shift, face in (("accuracy", "o", -0.12, colour), ("balanced_accuracy", "s", 0.12, "none")):
            values, label = [r["test"][metric] for r in records], metric.replace("_", " ") if i == 0 else None
            test_axes.plot([i + shift] * len(values), values, marker, color=colour, markerfacecolor=face, label=label)
    loss_axes.set(title="Training loss", xlabel="epoch", ylabel="negative log-likelihood [nats]")
    accuracy_axes.set(title="Validation accuracy", xlabel="epoch", ylabel="fraction correct")
    test_axes.set(title="Test split, one mark per seed", xlabel="learning rate", ylabel="fraction correct")
    test_axes.set_xticks(range(len(ticks)), ticks)
    shown = [axes.get_legend_handles_labels() for axes in (loss_axes, test_axes)]
    figure.legend(*map(sum, zip(*shown, strict=True), ([], [])), loc="outside lower center", ncols=3)
    for axes in (loss_axes, accuracy_axes):
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def draw_grid(grid: dict, folder: Path, path: Path) -> None:
    """`plot_grid` as `path`.png and .svg."""
    utils.save_figure(plot_grid(grid, folder), path)


def draw(record_path: Path, folder: Path) -> None:
    """Draw the figures of a record again, of a run or of a grid, into `folder`. Raises InputError."""
    name = record_path.resolve().parent.name
    with runs.reading(record_path, "a record of hw2-q2.py"):
        record = runs.read_json(record_path)
        if "settings" in record:
            draw_grid(record, record_path.parent, folder / f"{name}-grid")
        else:
            draw_run(record, folder, prefix=f"{name}-")


# ---------------------------------------------------------------------------------------------------
# Using a trained network


def load_network(
    path: Path, device: torch.device, recipe: str | None = None, no_maxpool: bool | None = None
) -> tuple[nn.Module, dict]:
    """The network of a best.pt, last.pt or .safetensors file, and what the file tells of it.

    Raises InputError if it is damaged or not finite, or is not of the `recipe` or `no_maxpool` asked for.
    """
    with runs.reading(path, "a network of hw2-q2.py"):
        if path.suffix == ".safetensors":
            tensors, content = runs.load_weights(path)
            content |= {"trained_on_digests": tensors.pop("trained_on_digests"), "network": tensors}
        else:
            content = runs.load_checkpoint(path, {"config", "dataset", "network", "trained_on_digests"})
        config, digests = Config(**content["config"]), content["trained_on_digests"]
        model = build_network(config).to(device)
        model.load_state_dict(content["network"])
        if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
            raise ValueError("some of its weights are no numbers")
        if digests.dtype != torch.uint8 or digests.shape != (len(digests), 5) or not len(digests):
            raise ValueError("it does not tell which scans it was trained on")
        if not all(isinstance(content["dataset"][key], str) for key in ("name", "kind")):
            raise TypeError("it does not tell what it was trained on")
    for flag, wanted in (("recipe", recipe), ("no_maxpool", no_maxpool)):
        if wanted is not None and wanted != (found := getattr(config, flag)):
            raise InputError(f"{path}: holds a network with {flag} {found}, not {wanted}: leave -{flag} away")
    return model, content


def export(path: Path, checkpoint: Path) -> None:
    """Save the network of a checkpoint as safetensors, with what it was trained on."""
    _, content = load_network(checkpoint, torch.device("cpu"))
    about = {key: value for key, value in content.items() if key in ("config", "dataset", "best_epoch")}
    runs.save_weights(path, content["network"] | {"trained_on_digests": content["trained_on_digests"]}, about)
    print(f"{path}: {path.stat().st_size:,} bytes")


def predict_files(paths: list[Path], model: nn.Module, dataset: dict) -> None:
    """Print the four class probabilities of each image file."""
    scans = np.stack([utils.prepare_scan(path) for path in paths])
    probabilities = predict(model, torch.from_numpy(scans).to(next(model.parameters()).device))
    if not np.isfinite(probabilities).all():
        raise InputError("the network's outputs are no numbers: its weights are too large, or damaged")
    print(f"network trained on {dataset['name']} ({dataset['kind']}); a homework exercise, no medical device")
    rows = [
        [str(path), *(f"{p:.4f}" for p in row), SHORT_NAMES[row.argmax()]]
        for path, row in zip(paths, probabilities, strict=True)
    ]
    headers = ["file", *SHORT_NAMES, "answer"]
    print(tabulate(rows, headers, disable_numparse=True, colalign=["left", *["right"] * 4, "left"]))


def evaluate_networks(networks: dict[Path, tuple[nn.Module, dict]], data: OctData, device: torch.device) -> dict:
    """Score networks trained elsewhere on `data`, without the scans that they were trained or chosen on.

    `test` is its test split. `all` are all its scans, and is there only where the networks were trained on phantoms
    and the scans are real: other scans may be of the patients that a network was trained on. Raises InputError.
    """
    started, contents = time.perf_counter(), [content for _, content in networks.values()]
    kinds = [(content["config"] | {"seed": None}, content["dataset"]) for content in contents]
    if any(kind != kinds[0] for kind in kinds):
        raise InputError("-checkpoint: networks of other settings, or trained on other data, have no common mean")
    digests = np.concatenate([content["trained_on_digests"].numpy() for content in contents])
    trained_on = contents[0]["dataset"]
    record = {"dataset": data.description, "trained_on": trained_on, "checkpoints": list(map(str, networks))}
    splits = {"test": data.splits["test"]}
    if data.kind == "real" and trained_on["kind"] == "phantom":
        splits["all"] = tuple(np.concatenate(arrays) for arrays in zip(*data.splits.values(), strict=True))
    for part, (images, labels) in splits.items():
        unseen = ~utils.are_among(utils.scan_digests(images), digests)
        if not unseen.all():
            left_out = f"{len(unseen) - unseen.sum()} of {len(unseen)} scans left out"
            print(f"{data.name}, {part}: {left_out}, the networks were trained on them")
        if not unseen.any():
            raise InputError(f"{data.name}: no {part} scan is left to score these networks on")
        images, labels = torch.from_numpy(images[unseen]).to(device), labels[unseen]
        scores = [score(predict(model, images), labels) for model, _ in networks.values()]
        record[part] = {"runs": scores}
        for metric in ("accuracy", "balanced_accuracy", "macro_auc"):
            if None not in (values := [one[metric] for one in scores]):
                record[part][metric] = runs.mean_and_std(values)
                print(f"{data.name}, {part} ({len(labels)} scans): {metric} {runs.spread(record[part][metric], '.4f')}")
    return record | {"seconds": round(time.perf_counter() - started, 2), **runs.run_environment(device)}


# ---------------------------------------------------------------------------------------------------
# What the command line asks for


def make_config(args: argparse.Namespace, seed: int) -> Config:
    """The flags given, the recipe's defaults for the others."""
    given = {field.name: getattr(args, field.name) for field in fields(Config)} | {"seed": seed}
    return replace(RECIPES[args.recipe or "homework"], **{k: v for k, v in given.items() if v is not None})


def run_name(config: Config) -> str:
    """Network, rate, seed, and whatever else is not the recipe's default."""
    name = f"{'no_maxpool' if config.no_maxpool else 'maxpool'}-lr{config.learning_rate:g}-seed{config.seed}"
    default = asdict(RECIPES[config.recipe])
    return name + "".join(f"-{k}{v}" for k, v in asdict(config).items() if k not in VARIED and v != default[k])


def print_outcome(record: dict, folder: Path, to: TextIO | None = None) -> None:
    dataset, val, test = record["dataset"], record["val"], record["test"]
    for part in ("test", "test_course_subset"):
        if metrics := record.get(part):
            about = f"{dataset['kind']}, {metrics['num_examples']} scans, epoch {record['best_epoch']}"
            auc = "n/a" if metrics["macro_auc"] is None else f"{metrics['macro_auc']:.4f}"
            scores = f"accuracy {metrics['accuracy']:.4f}, balanced {metrics['balanced_accuracy']:.4f}, AUC {auc}"
            print(f"{part.replace('_', ' ')} ({about}): {scores}", file=to)
    val_shares, test_shares = (np.array(c) / sum(c) for c in map(dataset["counts"].get, ("val", "test")))
    most = np.abs(val_shares - test_shares).argmax()
    if abs(val_shares[most] - test_shares[most]) > 0.1:
        print(
            f"validation and test mix the classes differently ({val_shares[most]:.0%} and {test_shares[most]:.0%} "
            f"{SHORT_NAMES[most]}): compare balanced accuracy ({val['balanced_accuracy']:.2f} and "
            f"{test['balanced_accuracy']:.2f}), not accuracy ({val['accuracy']:.2f} and {test['accuracy']:.2f})",
            file=to,
        )
    print(f"{record['num_parameters']:,} parameters, {record['seconds']:.0f} s; see {folder}", file=to)


def train_run_or_grid(args: argparse.Namespace, data: OctData, device: torch.device) -> None:
    config = make_config(args, 42 if args.seed is None else args.seed)
    source = "phantom" if data.kind == "phantom" else data.name.lower().replace(" ", "_")
    name = f"q2-{source}-{config.recipe}-{'grid' if args.grid else run_name(config)}"
    folder = args.out or Path("runs") / name
    print(f"{data.name} ({data.kind}), {device}; everything goes to {folder}", flush=True)
    if args.grid:
        print_grid(run_grid(config, args.seeds, data, folder, device, args.jobs, args.resume))
    else:
        print_outcome(train(config, data, folder, device, args.resume, verbose=True), folder)


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    if args.draw:
        for path in args.draw:
            draw(path, args.out or path.parent)
        return
    if args.export:
        return export(args.export, args.checkpoint[0])
    device = utils.choose_device(args.device)  # only now: a figure and an export need none
    if args.predict:
        model, content = load_network(args.checkpoint[0], device, args.recipe, args.no_maxpool)
        predict_files(args.predict, model, content["dataset"])
    elif args.evaluate:
        if len({path.resolve() for path in args.checkpoint}) < len(args.checkpoint):
            raise InputError("-checkpoint: every network once")
        networks = {path: load_network(path, device, args.recipe, args.no_maxpool) for path in args.checkpoint}
        record = evaluate_networks(networks, utils.load_oct(args.data, args.data_dir), device)
        if args.out:
            runs.write_json(args.out, record)
    else:
        train_run_or_grid(args, utils.load_oct(args.data, args.data_dir), device)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 2 for input that cannot be used (after one line on stderr), 130 when interrupted."""
    return run_script(
        "hw2-q2.py", parse_arguments, run, arguments, "stopped; a training goes on with the same command and -resume"
    )


if __name__ == "__main__":
    sys.exit(main())
