"""Question 2: classify retinal OCT scans (OCTMNIST, 28x28, four classes) with a small convolutional network.

    python hw2-q2.py                                    train on OCTMNIST, or on phantoms where it cannot be had
    python hw2-q2.py -no_maxpool                        the variant that strides instead of pooling
    python hw2-q2.py -data scans.npz -recipe strong     other scans; what a practitioner would do
    python hw2-q2.py -grid -seeds 42 43 44 -jobs 2      the whole question: three rates, the choice, both networks
    python hw2-q2.py -resume                            go on with a run that was stopped
    python hw2-q2.py -predict a.jpeg b.png -checkpoint runs/.../best.pt
    python hw2-q2.py -evaluate -data scans.npz -checkpoint runs/.../best.pt
    python hw2-q2.py -draw runs/.../record.json -out figures

A run leaves in its folder: record.json (every number), curves and confusion matrix (PNG, SVG), best.pt (the
weights of the best epoch on the validation split) and last.pt (all that is needed to go on after a stop).
"""

import argparse
import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import joblib
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score
from torch import Tensor, nn
from tqdm import tqdm

import utils
from offline_data import OCT_CLASSES
from utils import InputError, OctData, number

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


def build_network(recipe: str, dropout: float, no_maxpool: bool) -> nn.Module:
    return {"homework": CNN, "strong": StrongCNN}[recipe](dropout, no_maxpool)


def get_number_trainable_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---------------------------------------------------------------------------------------------------
# Recipes


@dataclass(frozen=True)
class Config:
    """What determines a run's numbers, together with the data."""

    recipe: str
    no_maxpool: bool
    optimizer: str
    learning_rate: float
    batch_size: int
    epochs: int
    dropout: float
    l2_decay: float
    seed: int


# What a flag is where it is not given.
RECIPES = {
    "homework": {
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "batch_size": 8,
        "epochs": 15,
        "dropout": 0.7,
        "l2_decay": 0.0,
    },
    "strong": {
        "optimizer": "adamw",
        "learning_rate": 0.003,
        "batch_size": 64,
        "epochs": 10,
        "dropout": 0.3,
        "l2_decay": 0.05,
    },
}
GRID_RATES = {"homework": (0.1, 0.01, 0.001), "strong": (0.01, 0.003, 0.001)}
# The metric on the validation split that chooses the best epoch, and the grid's learning rate.
CHOOSE_BY = {"homework": "accuracy", "strong": "balanced_accuracy"}


class PlainSGD:
    """Gradient descent without momentum: p <- p - learning_rate * (gradient + l2_decay * p).

    The same parameters as torch.optim.SGD's, bit for bit (a test compares them), without its bookkeeping,
    which costs about a tenth of a step of the homework's network at batch size 8.
    """

    def __init__(self, parameters: Iterator[nn.Parameter], lr: float, weight_decay: float = 0.0):
        self.parameters = list(parameters)
        self.param_groups = [{"lr": lr}]
        self.weight_decay = weight_decay

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        learning_rate = self.param_groups[0]["lr"]
        for parameter in self.parameters:
            gradient = parameter.grad
            if self.weight_decay:
                gradient = gradient.add(parameter, alpha=self.weight_decay)
            parameter.add_(gradient, alpha=-learning_rate)

    def state_dict(self) -> dict:
        return {}  # no momentum: nothing is carried from step to step

    def load_state_dict(self, state: dict) -> None:
        pass


OPTIMIZERS = {"sgd": PlainSGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


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


# ---------------------------------------------------------------------------------------------------
# Training


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


def train_batch(x: Tensor, y: Tensor, model: nn.Module, optimizer, criterion) -> Tensor:
    """One step on images x [B, 1, 28, 28] and labels y [B]. Returns the loss, not yet waited for."""
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


CHUNK = 128  # batches gathered and scaled at once; the loss is looked at as rarely


def train_epoch(state: "TrainingState", images: Tensor, labels: Tensor, progress: tqdm | None = None) -> float:
    """Train once over uint8 images [N, 28, 28] and labels [N]. Returns the mean loss over the epoch's examples."""
    config, strong = state.config, state.config.recipe == "strong"
    state.model.train()
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1) if strong else nn.NLLLoss()
    order = balanced_order(labels.cpu()) if strong else shuffled_order(len(labels))
    steps_an_epoch = math.ceil(len(labels) / config.batch_size)
    step, seen, loss_sum = len(state.history) * steps_an_epoch, 0, 0.0
    for chunk in order.to(images.device).split(CHUNK * config.batch_size):
        inputs = images[chunk].div(256).unsqueeze(1)  # [chunk, 1, 28, 28]; the course divides by 256, not 255
        if strong:
            inputs = shift_and_flip(inputs)
        batches = list(zip(inputs.split(config.batch_size), labels[chunk].split(config.batch_size), strict=True))
        losses = []
        for x, y in batches:
            if strong:
                rate = cosine_learning_rate(config.learning_rate, step, steps_an_epoch * config.epochs)
                state.optimizer.param_groups[0]["lr"] = rate
            losses.append(train_batch(x, y, state.model, state.optimizer, criterion))
            if state.averaged is not state.model:
                state.averaged.update_parameters(state.model)
            step += 1
        loss_sum += sum(loss * len(y) for loss, (_, y) in zip(torch.stack(losses).tolist(), batches, strict=True))
        seen += len(chunk)
        if progress is not None:
            progress.update(len(batches))
            progress.set_postfix(epoch=len(state.history) + 1, loss=f"{loss_sum / seen:.3f}")
    return loss_sum / len(labels)


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
# A run: training, checkpoints, record, figures


@dataclass
class TrainingState:
    """Everything that a later step depends on, so that a stopped run can go on as if it had not been."""

    config: Config
    device: torch.device
    dataset: dict  # the record's description of the data
    history: list[dict] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self):
        config = self.config
        utils.set_seed(config.seed)
        self.model = build_network(config.recipe, config.dropout, config.no_maxpool).to(self.device)
        self.optimizer = OPTIMIZERS[config.optimizer](
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.l2_decay
        )
        self.averaged = self.model  # the weights that are evaluated and kept
        if config.recipe == "strong":
            average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
            self.averaged = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)

    @property
    def best(self) -> dict:
        """The epoch with the highest validation metric (the recipe's), among equals the lowest loss."""
        metric = "val_" + CHOOSE_BY[self.config.recipe]
        return max(self.history, key=lambda epoch: (epoch[metric], -epoch["val_loss"]))

    def save(self, path: Path) -> None:
        content = {
            "config": dataclasses.asdict(self.config),
            "dataset": self.dataset,
            "history": self.history,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            # What predictions are made with: the average of the strong recipe, else the model itself.
            "network": getattr(self.averaged, "module", self.averaged).state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": utils.random_state(self.device),
        }
        utils.write_whole(path, lambda temporary: torch.save(content, temporary))

    def load(self, path: Path) -> None:
        """Go back to the state saved in `path`. Raises InputError if it cannot be read."""
        content = load_checkpoint(path)
        self.history, self.seconds = content["history"], content["seconds"]
        self.model.load_state_dict(content["model"])
        self.averaged.load_state_dict(content["averaged"])
        self.optimizer.load_state_dict(content["optimizer"])
        utils.restore_random_state(content["random"], self.device)


def load_checkpoint(path: Path) -> dict:
    """Read best.pt or last.pt, to the CPU. Raises InputError if it is not one of this program's."""
    try:
        # weights_only: a checkpoint is data and must not run code.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load documents no exceptions; zip, pickle and OS errors occur
        reason = " ".join(str(error).split())[:80]
        raise InputError(f"{path}: cannot be read as a checkpoint ({type(error).__name__}: {reason})") from None
    parts = {"config", "dataset", "history", "seconds", "model", "network", "averaged", "optimizer", "random"}
    if not isinstance(content, dict) or set(content) != parts:
        raise InputError(f"{path}: not a checkpoint of hw2-q2.py")
    return content


def train(config: Config, data: OctData, folder: Path, device: torch.device, resume: bool, verbose: bool) -> dict:
    """Train, test once, and leave record, figures and checkpoints in `folder`. Returns the record.

    Raises Diverged where losses or outputs are no numbers any more, InputError for a checkpoint that cannot be read.
    """
    state = TrainingState(config, device, data.description)
    splits = {split: [torch.from_numpy(array).to(device) for array in data.splits[split]] for split in utils.SPLITS}
    last, best = folder / "last.pt", folder / "best.pt"
    if resume and last.exists():
        state.load(last)
    steps_an_epoch = math.ceil(len(splits["train"][1]) / config.batch_size)
    total, done = steps_an_epoch * config.epochs, steps_an_epoch * len(state.history)
    quiet = None if verbose else True  # None: quiet unless the output is a terminal
    with tqdm(total=total, initial=done, unit="step", disable=quiet, leave=False) as progress:
        while len(state.history) < config.epochs:
            started = time.perf_counter()
            train_loss = train_epoch(state, *splits["train"], progress)
            metrics = evaluate(state.averaged, *splits["val"])
            state.seconds += time.perf_counter() - started
            state.history.append(
                {"epoch": len(state.history) + 1, "train_loss": train_loss}
                | {f"val_{name}": metrics[name] for name in ("loss", "accuracy", "balanced_accuracy", "macro_auc")}
            )
            if verbose:
                print_epoch(state.history[-1])
            if state.best is state.history[-1]:
                state.save(best)
            state.save(last)  # after best.pt: a stop between the two repeats this epoch and writes the same again

    state.averaged.load_state_dict(load_checkpoint(best)["averaged"])
    record = make_record(state, data, splits)
    draw_run(record, folder)
    utils.write_json(folder / "record.json", record)  # last: a folder with a record is a finished run
    return record


def make_record(state: TrainingState, data: OctData, splits: dict[str, list[Tensor]]) -> dict:
    """The record of a finished run. A training meets the test split here alone, after its epoch was chosen."""
    images, labels = splits["test"]
    record = {
        "config": dataclasses.asdict(state.config),
        "dataset": state.dataset,
        "num_parameters": get_number_trainable_params(state.model),
        "best_epoch": state.best["epoch"],
        "chosen_by": f"val_{CHOOSE_BY[state.config.recipe]}",
        "val": evaluate(state.averaged, *splits["val"]),
        "test": evaluate(state.averaged, images, labels),
    }
    if data.name == "OCTMNIST":
        subset = torch.from_numpy(course_test_subset(data.splits["test"][1])).to(state.device)
        record["test_course_subset"] = evaluate(state.averaged, images[subset], labels[subset])
    return record | {
        "history": state.history,
        "seed": state.config.seed,
        "seconds": round(state.seconds, 2),
        "device": str(state.device),
        "threads": torch.get_num_threads(),
        **utils.run_environment(state.device),
    }


def print_epoch(epoch: dict) -> None:
    tqdm.write(
        f"epoch {epoch['epoch']:3d}   training loss {epoch['train_loss']:.4f}   "
        f"validation loss {epoch['val_loss']:.4f}   accuracy {epoch['val_accuracy']:.4f}   "
        f"balanced {epoch['val_balanced_accuracy']:.4f}",
        file=sys.stdout,
    )


# ---------------------------------------------------------------------------------------------------
# The whole question: a grid of runs


# A finished run of a grid: its settings and its record, which is None if the training diverged.
GridRun = tuple[Config, dict | None]


def run_grid(args: argparse.Namespace, data: OctData, folder: Path, device: torch.device) -> dict:
    """Train every learning rate with every seed, choose the rate, train `no_maxpool` with it. Returns the record.

    The rate is chosen by the mean over the seeds of the best validation metric; no test score plays a part.
    """
    started = time.perf_counter()
    base, rates = make_config(args, seed=0), GRID_RATES[args.recipe or "homework"]
    begun_before = any(folder.glob("*/settings.json"))
    done: list[GridRun] = []
    with tqdm(total=(len(rates) + 1) * len(args.seeds), unit="run", disable=None) as progress:

        def train_all(configs: Iterator[Config]) -> None:
            pool = joblib.Parallel(
                n_jobs=args.jobs,
                return_as="generator_unordered",  # each run as soon as it is done
                pre_dispatch="n_jobs",  # ask for the next run only when a process is free
                batch_size=1,
                mmap_mode="c",  # the processes share the scans, copied only if they were written to
            )
            for run in pool(joblib.delayed(train_in_grid)(config, data, folder, device, args) for config in configs):
                done.append(run)
                tqdm.write(f"{run_name(run[0]):28s} {outcome(run)}", file=sys.stdout)
                progress.update()

        train_all(schedule(base, rates, args.seeds, done))
        chosen = best_rate(done)
        finished = [config for config, _ in done]
        # None is missing, unless the lead changed with the last rates.
        train_all(c for c in without_pooling(base, chosen, args.seeds) if c not in finished)

    record = summarise_grid(done, rates, chosen, args.seeds) | {
        "dataset": data.description,
        "seconds": round(sum(run["seconds"] for _, run in done if run), 1),
        "wall_seconds": None if begun_before else round(time.perf_counter() - started, 1),
        "jobs": args.jobs,
        "device": str(device),
        "threads": args.threads,
        **utils.run_environment(device),
    }
    utils.write_json(folder / "grid.json", record)
    draw_grid(folder / "grid.json", folder / "grid")
    return record


def schedule(base: Config, rates: tuple[float, ...], seeds: list[int], done: list[GridRun]) -> Iterator[Config]:
    """The runs of a grid, in order. The last ones depend on `done`, which the caller extends meanwhile.

    A process that becomes free does not wait for the last rates to end: it goes on with the rate that leads by now.
    """
    for rate in rates:
        for seed in seeds:
            yield dataclasses.replace(base, no_maxpool=False, learning_rate=rate, seed=seed)
    for i in range(len(seeds)):
        if done:  # else there is no lead yet (more processes than runs)
            yield without_pooling(base, best_rate(done), seeds)[i]


def without_pooling(base: Config, rate: float, seeds: list[int]) -> list[Config]:
    return [dataclasses.replace(base, no_maxpool=True, learning_rate=rate, seed=seed) for seed in seeds]


def train_in_grid(
    config: Config, data: OctData, folder: Path, device: torch.device, args: argparse.Namespace
) -> GridRun:
    """One run of a grid, in a process of its own; with -resume, a finished run is read instead of repeated."""
    torch.set_num_threads(args.threads)
    utils.git_state()
    folder = folder / run_name(config)
    with claim_folder(folder, settings_of(config, data), args.resume):
        try:
            record = finished_record(folder) or train(config, data, folder, device, args.resume, verbose=False)
        except Diverged:
            record = None
    return config, record


def outcome(run: GridRun) -> str:
    config, record = run
    metric = CHOOSE_BY[config.recipe]
    return f"best validation {metric} {record['val'][metric]:.4f}" if record else "diverged"


def best_rate(done: list[GridRun]) -> float:
    """The learning rate with the highest mean of the best validation metrics, among the runs with pooling."""
    scores: dict[float, list[float]] = {}
    for config, record in done:
        if not config.no_maxpool:
            score = record["val"][CHOOSE_BY[config.recipe]] if record else -math.inf
            scores.setdefault(config.learning_rate, []).append(score)
    return max(scores, key=lambda rate: float(np.mean(scores[rate])))


def summarise_grid(done: list[GridRun], rates: tuple[float, ...], chosen: float, seeds: list[int]) -> dict:
    """The grid's part of its record: a setting a row, each metric as mean and deviation over the seeds."""
    config = dataclasses.asdict(done[0][0])
    recipe = config["recipe"]
    settings = []
    for no_maxpool, rate in [(False, rate) for rate in rates] + [(True, chosen)]:
        runs = [run for run in done if (run[0].no_maxpool, run[0].learning_rate) == (no_maxpool, rate)]
        runs.sort(key=lambda run: seeds.index(run[0].seed))
        records = [record for _, record in runs if record]
        row = {
            "network": "no_maxpool" if no_maxpool else "maxpool",
            "learning_rate": rate,
            "runs": [f"{run_name(config)}/record.json" for config, record in runs if record],
            "diverged": len(runs) - len(records),
        }
        for split in ("val", "test", "test_course_subset"):
            for metric in ("accuracy", "balanced_accuracy", "macro_auc"):
                values = [record[split][metric] for record in records if split in record]
                if values and None not in values:
                    row[f"{split}_{metric}"] = utils.mean_and_deviation(values)
        if records:
            row["seconds"] = utils.mean_and_deviation([record["seconds"] for record in records])
        settings.append(row)
    return {
        "config": {k: v for k, v in config.items() if k not in ("learning_rate", "no_maxpool", "seed")},
        "seeds": seeds,
        "chosen_rate": chosen,
        "chosen_by": f"mean over seeds of the best val_{CHOOSE_BY[recipe]}",
        "settings": settings,
    }


def shown(value: dict) -> str:
    return f"{value['mean']:.4f}" + ("" if value["std"] is None else f" ± {value['std']:.3f}")


def print_grid(record: dict) -> None:
    print(f"\n{record['dataset']['name']} ({record['dataset']['kind']}), seeds {record['seeds']}, mean ± deviation")
    print(f"{'network':12s}{'rate':>7s}{'val acc':>17s}{'test acc':>17s}{'test balanced':>17s}{'test AUC':>17s}")
    for row in record["settings"]:
        names = ("val_accuracy", "test_accuracy", "test_balanced_accuracy", "test_macro_auc")
        cells = "".join(f"{shown(row[name]) if name in row else 'n/a':>17s}" for name in names)
        mark = "  <- chosen" if row["learning_rate"] == record["chosen_rate"] and row["network"] == "maxpool" else ""
        mark += f"  ({row['diverged']} diverged)" if row["diverged"] else ""
        print(f"{row['network']:12s}{row['learning_rate']:7g}{cells}{mark}")


# ---------------------------------------------------------------------------------------------------
# Figures: each is drawn from a record alone


def data_title(record: dict) -> str:
    """What a figure must say of its data before anything else."""
    name = record["dataset"]["name"]
    return "PHANTOMS, no real scans" if record["dataset"]["kind"] == "phantom" else name


def network_title(config: dict) -> str:
    return f"{config['recipe']} recipe, {'strided, no max-pool' if config['no_maxpool'] else 'max-pool'}"


def plot(record: dict, path: Path) -> None:
    """Training loss and validation accuracy against the epoch, as `path`.png and .svg."""
    figure, (loss_axes, accuracy_axes) = utils.new_figure(1, 2, size=(4.6, 3.5))
    config, history = record["config"], record["history"]
    epochs = [e["epoch"] for e in history]
    figure.suptitle(f"{data_title(record)}: {network_title(config)}, rate {config['learning_rate']:g}")
    loss_axes.plot(epochs, [e["train_loss"] for e in history], label="training, mean over the epoch")
    loss_axes.plot(epochs, [e["val_loss"] for e in history], "--", label="validation, after the epoch")
    loss_axes.set(title="Loss", xlabel="epoch", ylabel="negative log-likelihood [nats]")
    accuracy_axes.plot(epochs, [e["val_accuracy"] for e in history], label="accuracy")
    accuracy_axes.plot(epochs, [e["val_balanced_accuracy"] for e in history], "--", label="balanced accuracy")
    accuracy_axes.axvline(record["best_epoch"], color="0.5", linewidth=1, linestyle=":", label="epoch kept")
    accuracy_axes.set(title="Validation accuracy", xlabel="epoch", ylabel="fraction correct")
    for axes in (loss_axes, accuracy_axes):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    utils.save_figure(figure, path)


def plot_confusion(record: dict, path: Path) -> None:
    """The test split's confusion matrix, counts on row shares, as `path`.png and .svg."""
    test = record["test"]
    counts = np.array(test["confusion"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, (axes,) = utils.new_figure(size=(4.6, 4.6))
    axes.grid(False)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{count}\n{shares[row, column]:.0%}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(SHORT_NAMES)), SHORT_NAMES)
    axes.set_yticks(range(len(SHORT_NAMES)), SHORT_NAMES)
    axes.set(xlabel="predicted class (scans, share of the true class)", ylabel="true class")
    figure.suptitle(
        f"{data_title(record)}\n{network_title(record['config'])}, rate {record['config']['learning_rate']:g}"
    )
    axes.set_title(
        f"test split: accuracy {test['accuracy']:.3f}, balanced {test['balanced_accuracy']:.3f}",
        fontsize=10,
        fontweight="normal",
    )
    utils.save_figure(figure, path)


def draw_run(record: dict, folder: Path, prefix: str = "") -> None:
    plot(record, folder / f"{prefix}curves")
    plot_confusion(record, folder / f"{prefix}confusion")


def draw_grid(grid_path: Path, path: Path) -> None:
    """Compare a grid's settings: curves as mean and range over the seeds, test scores as a mark a seed."""
    grid = json.loads(grid_path.read_text())
    figure, (loss_axes, accuracy_axes, test_axes) = utils.new_figure(1, 3, size=(4.3, 3.9))
    recipe, num_seeds = grid["config"]["recipe"], len(grid["seeds"])
    figure.suptitle(f"{data_title(grid)}: {recipe} recipe, {num_seeds} seeds (line: mean, band: range)")
    ticks = []
    for i, row in enumerate(grid["settings"]):
        runs = [json.loads((grid_path.parent / run).read_text()) for run in row["runs"]]
        strided, colour = row["network"] == "no_maxpool", utils.COLOURS[i]
        if not runs:  # every seed diverged
            ticks.append(f"diverged\n{row['learning_rate']:g}")
            continue
        ticks.append(f"{'no max-pool' if strided else 'max-pool'}\n{row['learning_rate']:g}")
        epochs = [e["epoch"] for e in runs[0]["history"]]
        for axes, name in ((loss_axes, "train_loss"), (accuracy_axes, "val_accuracy")):
            curves = np.array([[e[name] for e in run["history"]] for run in runs])
            line = "--" if strided else "-"
            axes.plot(epochs, curves.mean(axis=0), line, color=colour, label=ticks[-1].replace("\n", ", rate "))
            axes.fill_between(epochs, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        for metric, marker, shift, face in (("accuracy", "o", -0.12, colour), ("balanced_accuracy", "s", 0.12, "none")):
            values = [run["test"][metric] for run in runs]
            test_axes.plot([i + shift] * len(values), values, marker, color=colour, markerfacecolor=face)
    for marker, face, label in (("o", "0.3", "accuracy"), ("s", "none", "balanced accuracy")):
        test_axes.plot([], [], marker, color="0.3", markerfacecolor=face, label=label)
    loss_axes.set(title="Training loss", xlabel="epoch", ylabel="negative log-likelihood [nats]")
    accuracy_axes.set(title="Validation accuracy", xlabel="epoch", ylabel="fraction correct")
    test_axes.set(title="Test split, a mark a seed", xlabel="network and learning rate", ylabel="fraction correct")
    test_axes.set_xticks(range(len(ticks)), ticks)
    bottom, top = test_axes.get_ylim()
    test_axes.set_ylim(bottom, top + 0.18 * (top - bottom))  # room for the legend above the marks
    test_axes.legend(loc="upper right", fontsize=9)
    loss_axes.legend(fontsize=9)
    for axes in (loss_axes, accuracy_axes):
        axes.xaxis.get_major_locator().set_params(integer=True)
    utils.save_figure(figure, path)


def draw(record_path: Path, folder: Path) -> None:
    """Draw the figures of a record again, of a run or of a grid, into `folder`. Raises InputError."""
    name = record_path.resolve().parent.name
    try:
        record = json.loads(record_path.read_text(encoding="utf-8"))
        if "settings" in record:
            draw_grid(record_path, folder / f"{name}-grid")
        else:
            draw_run(record, folder, prefix=f"{name}-")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{record_path}: not a record of hw2-q2.py ({type(error).__name__}: {error})") from None


# ---------------------------------------------------------------------------------------------------
# Using a trained network


def load_network(path: Path, args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, dict]:
    """The network of a checkpoint, and the description of the data it was trained on. Raises InputError."""
    content = load_checkpoint(path)
    try:
        config = content["config"]
        model = build_network(config["recipe"], config["dropout"], config["no_maxpool"]).to(device)
        model.load_state_dict(content["network"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{path}: its weights do not fit its network ({str(error).splitlines()[0]})") from None
    for flag in ("recipe", "no_maxpool"):
        wanted, found = getattr(args, flag), config[flag]
        if wanted is not None and wanted != found:
            raise InputError(f"{path}: holds a network with {flag} {found}, not {wanted}: leave -{flag} away")
    return model, content["dataset"]


def predict_files(args: argparse.Namespace) -> None:
    """Print the four class probabilities of each image file."""
    device = utils.choose_device(args.device)
    if len(args.checkpoint) != 1:
        raise InputError(f"-predict takes one -checkpoint, not {len(args.checkpoint)}")
    model, dataset = load_network(args.checkpoint[0], args, device)
    scans = np.stack([utils.prepare_scan(path) for path in args.predict])
    probabilities = predict(model, torch.from_numpy(scans).to(device))
    print(f"network trained on {dataset['name']} ({dataset['kind']}); a homework exercise, no medical device")
    width = max(len(str(path)) for path in args.predict)
    print(" " * width + "".join(f"{name:>9s}" for name in SHORT_NAMES))
    for path, row in zip(args.predict, probabilities, strict=True):
        print(f"{path!s:{width}s}" + "".join(f"{p:9.4f}" for p in row) + f"  {OCT_CLASSES[row.argmax()]}")


def evaluate_checkpoints(args: argparse.Namespace, data: OctData, device: torch.device) -> dict:
    """Score networks trained elsewhere on `data`: its test split, and all its scans if none was trained on them."""
    dataset = data.description
    networks = [load_network(path, args, device) for path in args.checkpoint]
    parts = {"test": data.splits["test"]}
    if all(trained_on["sha256"] != dataset["sha256"] for _, trained_on in networks):
        parts["all"] = tuple(np.concatenate(arrays) for arrays in zip(*data.splits.values(), strict=True))
    started = time.perf_counter()
    record = {"dataset": dataset, "trained_on": networks[0][1], "checkpoints": [str(path) for path in args.checkpoint]}
    for part, arrays in parts.items():
        images, labels = (torch.from_numpy(array).to(device) for array in arrays)
        runs = [evaluate(model, images, labels) for model, _ in networks]
        record[part] = {"runs": runs}
        for metric in ("accuracy", "balanced_accuracy", "macro_auc"):
            values = [run[metric] for run in runs]
            if None not in values:
                record[part][metric] = mean = utils.mean_and_deviation(values)
                print(f"{data.name}, {part} ({len(labels)} scans): {metric} {shown(mean)}")
    return record | {
        "seconds": round(time.perf_counter() - started, 2),
        "device": str(device),
        "threads": args.threads,
        **utils.run_environment(device),
    }


# ---------------------------------------------------------------------------------------------------
# The command line


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = utils.Parser(prog="hw2-q2.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, rate = parser.add_argument, number(float, 0, low_fits=False)

    add("-data", default="auto", help="auto (default), octmnist, phantom, an .npz, or a folder of class folders")
    add("-data_dir", type=Path, default=Path("data"), help="where OCTMNIST lies or is saved (default: data)")

    add("-recipe", choices=RECIPES, help="homework (default): as the course states it; strong: a practitioner's")
    add("-no_maxpool", action="store_true", default=None, help="stride by 2 instead of pooling")
    add("-epochs", type=number(int, 1), help="default: 15 (strong: 10)")
    add("-batch_size", type=number(int, 1, 2**20), help="default: 8 (strong: 64)")
    add("-learning_rate", type=rate, help="default: 0.01 (strong: 0.003)")
    add("-l2_decay", type=number(float, 0), help="weight decay; default: 0 (strong: 0.05)")
    add("-dropout", type=number(float, 0, 1), help="default: 0.7 (strong: 0.3)")
    add("-optimizer", choices=OPTIMIZERS, help="default: sgd (strong: adamw)")
    add("-seed", type=number(int, 0, 2**32), help="default: 42")

    add("-device", default="auto", help="auto (default: CUDA, MPS, CPU), cpu, cuda, cuda:N or mps")
    add("-threads", type=number(int, 1, 1025), default=1, help="CPU threads of a process; more than 1 rarely helps")
    add("-out", type=Path, help="folder of the run (default: a name that tells the settings, under runs/)")
    add("-resume", action="store_true", help="go on with the stopped run or grid of the same settings")

    add("-grid", action="store_true", help="the whole question: all rates and seeds, then no_maxpool")
    add("-seeds", type=number(int, 0, 2**32), nargs="+", default=[42, 43, 44], help="of a grid (default: 42 43 44)")
    add("-jobs", type=number(int, 1, 1025), default=2, help="processes of a grid (default: 2)")

    add("-predict", type=Path, nargs="+", metavar="IMAGE", help="classify image files with -checkpoint")
    add("-evaluate", action="store_true", help="score the networks of -checkpoint on -data")
    add("-checkpoint", type=Path, nargs="+", help="best.pt of one run (-predict) or of several (-evaluate)")
    add("-draw", type=Path, nargs="+", metavar="RECORD", help="draw a record.json or grid.json again, into -out")

    args = parser.parse_args(arguments)
    modes = [flag for flag in ("grid", "predict", "evaluate", "draw") if getattr(args, flag)]
    if len(modes) > 1:
        parser.error(f"-{modes[0]} and -{modes[1]} exclude each other")
    if (args.predict or args.evaluate) and not args.checkpoint:
        parser.error(f"-{modes[0]} needs -checkpoint runs/.../best.pt")
    if args.checkpoint and not (args.predict or args.evaluate):
        parser.error("-checkpoint goes with -predict or -evaluate (to go on with a stopped run, use -resume)")
    if args.grid and (args.no_maxpool or args.learning_rate or args.seed is not None):
        parser.error("-grid sets -learning_rate and -no_maxpool itself, and takes -seeds instead of -seed")
    if args.seed is None:
        args.seed = 42
    if args.evaluate and args.out and args.out.exists():
        parser.error(f"-out {args.out}: is there already; choose another name for the scores")
    if len(set(args.seeds)) < len(args.seeds):
        parser.error("-seeds: every seed once")
    return args


def make_config(args: argparse.Namespace, seed: int) -> Config:
    """The flags given, the recipe's defaults for the others."""
    recipe = args.recipe or "homework"
    values = {name: getattr(args, name) for name in RECIPES[recipe] if getattr(args, name) is not None}
    return Config(recipe=recipe, no_maxpool=bool(args.no_maxpool), seed=seed, **RECIPES[recipe] | values)


def run_name(config: Config) -> str:
    """Network, rate, seed, and whatever else is not the recipe's default."""
    network = "no_maxpool" if config.no_maxpool else "maxpool"
    others = [
        f"-{name}{getattr(config, name)}"
        for name, default in RECIPES[config.recipe].items()
        if name != "learning_rate" and getattr(config, name) != default
    ]
    return f"{network}-lr{config.learning_rate:g}-seed{config.seed}" + "".join(others)


def settings_of(config: Config, data: OctData, **others) -> dict:
    """What a run's folder is claimed for."""
    return {"config": dataclasses.asdict(config), "dataset": data.description, **others}


@contextlib.contextmanager
def claim_folder(folder: Path, settings: dict, resume: bool) -> Iterator[None]:
    """Make `folder` that of one run or grid, or, with `resume`, make sure that it is; keep other processes out.

    Raises InputError if it holds anything else, or while another process trains there.
    """
    path = folder / "settings.json"
    is_used = folder.is_dir() and any(file.name != utils.LOCK for file in folder.iterdir())
    if is_used and not resume:
        raise InputError(f"{folder}: already holds files; choose another -out, or add -resume")
    if is_used and not path.exists():
        raise InputError(f"{folder}: holds no run of hw2-q2.py to go on with; choose another -out")
    if is_used:
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = [part for part in settings if found.get(part) != settings[part]]
        if differing:
            raise InputError(f"{folder}: cannot resume, it holds a run with another {' and '.join(differing)}")
    with utils.lock_folder(folder):
        for leftover in folder.glob(".*.*"):  # parts of files that a kill left behind
            leftover.unlink()
        if not is_used:
            utils.write_json(path, settings)
        yield


def default_folder(settings: dict, name: str, resume: bool) -> Path:
    """runs/q2-<data>-<name>, or the first of -2, -3, ... that is free; to resume, the last one of these settings."""
    dataset = settings["dataset"]
    source = "phantom" if dataset["kind"] == "phantom" else dataset["name"].lower().replace(" ", "_")
    first = Path("runs") / f"q2-{source}-{name}"
    mine, number, folder = None, 1, first
    while folder.exists():
        path = folder / "settings.json"
        if path.exists() and json.loads(path.read_text(encoding="utf-8")) == settings:
            mine = folder
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    return mine if resume and mine else folder


def finished_record(folder: Path) -> dict | None:
    """The record of the run in `folder`, if it is finished and its network still there."""
    path = folder / "record.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() and (folder / "best.pt").exists() else None


def grid_or_finish(args: argparse.Namespace, data: OctData, device: torch.device) -> dict:
    """A grid, from the start or from where it stopped."""
    config = make_config(args, seed=0)
    settings = settings_of(config, data, seeds=args.seeds)
    folder = args.out or default_folder(settings, f"{config.recipe}-grid", args.resume)
    with claim_folder(folder, settings, args.resume):
        path = folder / "grid.json"
        if path.exists():
            record = json.loads(path.read_text(encoding="utf-8"))
            runs = [folder / run for row in record["settings"] for run in row["runs"]]
            if all(finished_record(run.parent) for run in runs):
                print(f"{folder} holds this grid, finished")
                return record
        processes = f"{args.jobs} processes"
        print(f"grid on {data.name} ({data.kind}), {device}, {processes}; everything goes to {folder}", flush=True)
        return run_grid(args, data, folder, device)


def train_or_finish(args: argparse.Namespace, data: OctData, device: torch.device) -> dict:
    """One run, from the start or from where it stopped."""
    config = make_config(args, args.seed)
    settings = settings_of(config, data)
    folder = args.out or default_folder(settings, f"{config.recipe}-{run_name(config)}", args.resume)
    with claim_folder(folder, settings, args.resume):
        record = finished_record(folder)
        if record is None:
            print(f"training on {data.name} ({data.kind}), {device}; everything goes to {folder}", flush=True)
            record = train(config, data, folder, device, args.resume, verbose=True)
        else:
            print(f"{folder} holds this run, finished")
    for part in ("test", "test_course_subset"):
        if part in record:
            metrics = record[part]
            auc = "n/a" if metrics["macro_auc"] is None else f"{metrics['macro_auc']:.4f}"
            print(
                f"{part.replace('_', ' ')} ({record['dataset']['kind']}, {metrics['num_examples']} scans, epoch "
                f"{record['best_epoch']}): accuracy {metrics['accuracy']:.4f}, "
                f"balanced {metrics['balanced_accuracy']:.4f}, AUC {auc}"
            )
    print(f"{record['num_parameters']:,} parameters, {record['seconds']:.0f} s; see {folder}")
    return record


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    if args.draw:
        for path in args.draw:
            draw(path, args.out or path.parent)
        return None
    if args.predict:
        return predict_files(args)
    device = utils.choose_device(args.device)
    data = utils.load_oct(args.data, args.data_dir)
    if args.evaluate:
        record = evaluate_checkpoints(args, data, device)
        if args.out:
            utils.write_json(args.out, record)
    elif args.grid:
        print_grid(grid_or_finish(args, data, device))
    else:
        train_or_finish(args, data, device)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 2 for input that cannot be used (after one line on stderr), 130 when interrupted."""
    return utils.run_script(
        "hw2-q2.py", parse_arguments, run, arguments, "stopped; a training goes on with the same command and -resume"
    )


if __name__ == "__main__":
    sys.exit(main())
