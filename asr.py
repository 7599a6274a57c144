"""What hw2-q3.ipynb needs besides the question itself: settings, runs, processes, tables, figures, recordings.

Reading order: the settings that a user may change; the folder in which a run keeps its files; training in processes;
the records of finished runs; recordings cut at pauses; what went wrong in a transcript; figures.
"""

import concurrent.futures
import contextlib
import hashlib
import html
import io
import json
import math
import os
import re
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU must not start CUDA: we fork later

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rapidfuzz.distance import Levenshtein

from runs import (
    InputError,
    end_with,
    load_checkpoint,
    load_weights,
    lock_folder,
    one_line,
    read_json,
    reading,
    run_environment,
    save_checkpoint,
    save_weights,
    spread,
    summarise_speech_runs,
    write_json,
)
from utils import COLOURS, new_figure, read_wav

# ---------------------------------------------------------------------------------------------------
# The settings of a notebook


def choose_settings(presets: dict, preset: str, overrides: dict, limits: dict[str, tuple[float, float]]) -> Any:
    """The settings (a dataclass) of `presets[preset]` with the `overrides` put in.

    `limits` are the smallest and the largest value of each number. Raises InputError for what cannot be.
    """
    if not isinstance(preset, str) or preset not in presets:
        raise InputError(f"preset must be one of {', '.join(presets)}, not {shown(preset)}")
    if not isinstance(overrides, dict):
        raise InputError(f"overrides must be a mapping, such as {{epochs: 2}}, not {shown(overrides)}")
    hints = get_type_hints(type(presets[preset]))
    if unknown := set(overrides) - set(hints):
        raise InputError(f"overrides: no setting is called {', '.join(sorted(map(shown, unknown)))}")
    values = {name: read_setting(name, value, hints[name]) for name, value in overrides.items()}
    for name, (low, high) in limits.items():
        for value in (v for v in numbers(values.get(name)) if not low <= v <= high):
            raise InputError(f"overrides: {name} must lie between {low:g} and {high:g}, not {shown(value)}")
    return replace(presets[preset], **values)


def shown(value: Any) -> str:
    """A value in a message: its repr in short, if it has one (whole numbers of 4,300 digits have none)."""
    try:
        return one_line(repr(value), 60)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} of that size"


def numbers(value: Any) -> tuple:
    """The numbers of a setting: none, one, or those of a tuple."""
    return () if value is None else value if isinstance(value, tuple) else (value,)


def read_setting(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type that the setting has. Raises InputError where it cannot be one."""
    if hint == tuple[float, float]:
        if not (isinstance(value, list | tuple) and len(value) == 2):  # YAML knows no tuples
            raise InputError(f"overrides: {name} must be two numbers, not {shown(value)}")
        return tuple(read_setting(name, part, float) for part in value)
    kinds = get_args(hint) or (hint,)
    with contextlib.suppress(TypeError, ValueError, OverflowError):  # YAML reads 1e-3 as text
        if float in kinds and value is not None and not isinstance(value, bool):
            return float(value)
    if type(value) not in kinds:
        raise InputError(f"overrides: {name} must be a {getattr(kinds[0], '__name__', kinds[0])}, not {shown(value)}")
    return value


# ---------------------------------------------------------------------------------------------------
# The folder of a run


@dataclass(frozen=True)
class SpeechRun:
    """One training of question 3: what is trained, on what, and the folder that keeps its files.

    `last.pt` is the checkpoint of the last whole epoch; `model.safetensors`, `transcripts.json` and, last of all,
    `record.json` are there when it is finished.
    """

    decoder: str
    preset: str
    settings: Any  # the notebook's Settings
    changes: dict  # what of them is not the preset's
    seed: int
    cache: Any  # utils.FeatureCache
    root: Path
    asked: dict = field(default_factory=dict)  # the notebook's parameters that name the data, as they were given
    pretrained: Path | None = None  # weights to start from

    @property
    def identity(self) -> dict:
        """What makes two runs the same training, as JSON keeps it: not how they decode."""
        settings = json.loads(json.dumps(asdict(self.settings)))
        del settings["attention_window"]
        dataset = self.cache.corpus.description
        identity = {"decoder": self.decoder, "settings": settings, "seed": self.seed, "dataset": dataset}
        return identity | self.origin

    @cached_property
    def origin(self) -> dict:
        """The entry `pretrained`, if there is one: the file, its checksum, and its training data. Raises InputError."""
        if self.pretrained is None:
            return {}
        _, about = load_weights(self.pretrained)
        with reading(self.pretrained, "a network of this notebook"):
            dataset = {key: about["dataset"][key] for key in ("name", "kind", "sha256")}
        digest = hashlib.sha256(self.pretrained.read_bytes()).hexdigest()
        return {"pretrained": {"file": self.pretrained.name, "sha256": digest, "dataset": dataset}}

    @property
    def folder(self) -> Path:
        """Named after the run, with a digest: another dataset or other settings never meet its files."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:8]
        corpus = self.cache.corpus.folder.resolve().name[:40]
        return self.root / f"{corpus}-{self.preset}-{self.decoder}-seed{self.seed}-{digest}"

    @property
    def command(self) -> str:
        """The command that makes this run's record."""
        named = {"data": "auto", **self.asked, "preset": self.preset, "decoders": self.decoder, "seed": self.seed}
        if self.cache.corpus.splits["train"] == self.cache.corpus.splits["test"]:
            named["memorise"] = len(self.cache.corpus.splits["train"])
        words = ["papermill", "hw2-q3.ipynb", "out.ipynb", "-p", "records_dir", "results/q3"]
        words += [word for name, value in named.items() for word in ("-p", name, str(value))]
        return shlex.join(words + (["-y", json.dumps({"overrides": self.changes})] if self.changes else []))

    @property
    def record_name(self) -> str:
        """What its record is called under results/."""
        window = f"-window-{self.settings.attention_window}" if "attention_window" in self.changes else ""
        return self.folder.name + window

    def is_finished(self) -> bool:
        """Whether it is trained, and scored as the settings decode. Raises InputError for a damaged record."""
        path = self.folder / "record.json"
        others = [self.folder / name for name in ("model.safetensors", "transcripts.json")]
        if not path.exists() or not all(file.is_file() for file in others):
            return False
        return self.record()["config"].get("attention_window") == self.settings.attention_window

    def record(self) -> dict:
        """The record of a finished run. Raises InputError where it is damaged or of another run."""
        path, what = self.folder / "record.json", "the record of this run: delete it to score the run again"
        record = read_json(path, what)
        with reading(path, what):
            config = {"decoder": self.decoder, **self.identity["settings"]}
            check_parts(record["config"], config)
            check_parts(record, {key: self.identity[key] for key in self.identity.keys() - {"decoder", "settings"}})
            check_history(record["history"], self.settings.epochs)
            if len(record["history"]) < self.settings.epochs:
                raise ValueError("epochs are missing")
            for scores in (record[split] for split in self.test_splits):
                check_numbers(scores, SCORES)
                check_numbers(scores["cut_to_97"], SCORES.keys() - {"loss"})
            if not isinstance(record["date"], str) or not {"changes", "command", "git", "versions"} <= set(record):
                raise ValueError("entries are missing")
        return record

    @property
    def test_splits(self) -> list[str]:
        return [split for split in self.cache.corpus.splits if split.startswith("test")]

    def transcripts(self) -> dict[str, dict[str, str]]:
        """What the trained network writes, by test split and clip. Raises InputError where the file is damaged."""
        path, what = self.folder / "transcripts.json", "the transcripts of this run: delete it to score the run again"
        texts = read_json(path, what)
        with reading(path, what):
            for split in self.test_splits:
                if not all(texts[split][clip.id].isprintable() for clip in self.cache.clips(split)):
                    raise ValueError("a transcript that is no line of text")
        return texts

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Raises InputError where the disk does not take what is written."""
        try:
            yield
        except OSError as error:
            raise InputError(f"{self.folder}: {error.strerror}: the same run goes on from the last epoch") from None

    def save(self, model: Any, optimizer: Any, history: list[dict]) -> None:
        """Replace the checkpoint by one of this moment. Raises InputError for a network that has diverged."""
        if not math.isfinite(history[-1]["val"]["loss"]):
            raise InputError(f"{self.decoder}: the loss diverged in epoch {len(history)}: try a lower learning_rate")
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]}
        with self.writing():
            save_checkpoint(self.folder / "last.pt", self.identity | states | {"history": history})

    def resume(self, model: Any, optimizer: Any) -> list[dict]:
        """Load the checkpoint, if there is one, into model and optimizer; returns the epochs so far."""
        path, what = self.folder / "last.pt", "a checkpoint of this run: delete it to train again"
        if not path.exists():
            return []
        checkpoint = load_checkpoint(path, {*self.identity, "model", "optimizer", "history"}, what)
        with reading(path, what):
            check_parts(checkpoint, self.identity)
            check_history(checkpoint["history"], self.settings.epochs)
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizer"]})
            batches = math.ceil(len(self.cache.clips("train")) / self.settings.batch_size)
            for parameter in model.parameters():  # load_state_dict does not look
                state = optimizer.state[parameter]
                fits = {state[name].shape for name in ("exp_avg", "exp_avg_sq")} == {parameter.shape}
                if not fits or state["step"] != len(checkpoint["history"]) * batches:
                    raise ValueError("the optimizer's averages do not fit")
        return checkpoint["history"]

    def finish(self, model: Any, history: list[dict], scored: dict[str, tuple[dict, list[str]]], accelerator) -> None:
        """Write weights, transcripts and record; `scored` has scores and transcripts of each test split."""
        clips = self.cache.clips("train")
        record = run_environment(accelerator.device) | {
            "command": self.command,
            "config": {"preset": self.preset, "decoder": self.decoder, **asdict(self.settings)},
            "changes": self.changes,
            "dataset": self.cache.corpus.description,
            **self.origin,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "history": history,
            "val": history[-1]["val"],
            **{split: scores for split, (scores, _) in scored.items()},
            "seed": self.seed,
            "seconds": round(sum(epoch["seconds"] for epoch in history), 1),
            "audio_hours": round(self.settings.epochs * sum(clip.seconds for clip in clips) / 3600, 2),
            "processes": accelerator.num_processes,
            "precision": accelerator.mixed_precision,
        }
        about = {
            "decoder": self.decoder,
            "settings": asdict(self.settings),
            "dataset": record["dataset"],
            **self.origin,
            "scores": {split: record[split] for split in scored},
            "heard": what_was_heard(clips, self.cache.corpus.sample_rate),
        }
        texts = {
            split: {clip.id: text for clip, text in zip(self.cache.clips(split), written, strict=True)}
            for split, (_, written) in scored.items()
        }
        with self.writing():
            (self.folder / "record.json").unlink(missing_ok=True)  # of another way to decode: not with these weights
            save_weights(self.folder / "model.safetensors", model.state_dict(), about)
            write_json(self.folder / "transcripts.json", texts)
            write_json(self.folder / "record.json", record)


def check_parts(found: dict, wanted: dict) -> None:
    """Raises ValueError where a file is of another run."""
    if differing := [
        name for name, value in wanted.items() if type(found[name]) is not type(value) or found[name] != value
    ]:
        raise ValueError(f"it is of another {' and '.join(differing)}")


def check_history(history: list[dict], epochs: int) -> None:
    """Raises an error of some kind unless these are the first of `epochs` epochs, with their losses and scores."""
    found = [entry["epoch"] for entry in history]
    if str(found) != str([*range(1, len(found) + 1)]) or not 1 <= len(found) <= epochs:
        raise ValueError("its epochs are not in order")
    for entry in history:
        check_numbers(entry, ("seconds",))
        check_numbers(entry["train"], ("loss",))
        check_numbers(entry["val"], SCORES)
        if not entry["example"].isprintable():
            raise ValueError("an example that is no line of text")


def check_numbers(found: dict, names: Collection[str]) -> None:
    """Raises an error of some kind unless `found` has finite numbers by these names."""
    for name in names:
        if type(found[name]) not in (int, float) or not math.isfinite(found[name]):
            raise ValueError(f"{name} is no number")


# ---------------------------------------------------------------------------------------------------
# Training in processes


def progress(run: SpeechRun, history: list[dict]) -> str:
    """The last epoch in a line, and in another how one sentence of the validation split is written."""
    last, left = history[-1], run.settings.epochs - len(history)
    seconds = sorted(epoch["seconds"] for epoch in history)[len(history) // 2]
    return (
        f"{run.decoder:11s} epoch {last['epoch']:2d} of {run.settings.epochs}: loss {last['train']['loss']:.3f}, "
        f"validation {last['val']['loss']:.3f}, similarity {last['val']['damerau_levenshtein']:.3f}, "
        f"CER {last['val']['cer']:.1%}{f', {left * seconds / 60:.1f} min left' if left else ''}\n"
        f"{'':12s}{last['example']}"
    )


def train_all(train: Callable, runs: list[SpeechRun], on_cpu: bool, processes: int) -> None:
    """Train what is not finished: on a CPU all at once, elsewhere one after the other in `processes` processes."""
    with contextlib.ExitStack() as locks:
        for run in runs:
            locks.enter_context(lock_folder(run.folder))
        if on_cpu and processes == 1:
            for run, history in train_at_once(train, runs) if runs else ():
                print(progress(run, history), flush=True)
            return
        for run in runs:
            if processes == 1:
                train(run, on_cpu)
            else:
                share_training(train, run, on_cpu, processes)


def share_training(train: Callable, run: SpeechRun, on_cpu: bool, processes: int) -> None:
    """Train one run in several forked processes, which find each other through a file: nothing listens on a network."""
    from torch.multiprocessing import ProcessRaisedException, start_processes

    with tempfile.TemporaryDirectory() as folder:
        arguments = train, run, on_cpu, processes, Path(folder, "store")
        try:
            start_processes(take_part, arguments, nprocs=processes, start_method="fork")
        except ProcessRaisedException as error:
            raise InputError(f"{run.decoder}: {str(error).strip().splitlines()[-1]}") from None


def take_part(rank: int, train: Callable, run: SpeechRun, on_cpu: bool, processes: int, store: Path) -> None:
    """One process of `share_training`: Accelerate reads from the environment which one it is."""
    import torch

    loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": "1",  # else Accelerate lets each process use all cores, and they wait for each other
    } | loopback
    backend = "gloo" if on_cpu else "nccl"
    torch.distributed.init_process_group(backend, init_method=store.as_uri(), rank=rank, world_size=processes)
    if rank:
        sys.stdout = io.StringIO()
    train(run, on_cpu)
    torch.distributed.destroy_process_group()


def train_at_once(train: Callable, runs: list[SpeechRun]) -> Iterator[tuple[SpeechRun, list[dict]]]:
    """Train runs on the CPU, each in a process of its own, an epoch at a time; yields (run, its epochs) after each.

    `train(run, cpu=True, most=1)` trains an epoch more and returns all of them. If one run fails, that is said at once
    and raised when the others are done. The processes end with this one, however it ends.
    """
    from loky import get_reusable_executor

    pool, failure = get_reusable_executor(max_workers=len(runs)), None
    try:
        going = {pool.submit(one_epoch, train, run, os.getpid()): run for run in runs}
        while going:
            for future in concurrent.futures.wait(going, return_when="FIRST_COMPLETED").done:
                run = going.pop(future)
                if failure_now := future.exception():
                    failure = failure or failure_now
                    print(f"{run.decoder}: FAILED: {one_line(failure_now)}", flush=True)
                    continue
                yield run, future.result()
                if len(future.result()) < run.settings.epochs:
                    going[pool.submit(one_epoch, train, run, os.getpid())] = run
    finally:  # interrupted, too: no process goes on unseen
        pool.shutdown(kill_workers=True)
    if failure:
        raise failure


def one_epoch(train: Callable, run: SpeechRun, parent: int) -> list[dict]:
    """An epoch of `run` in a worker process, on one thread: networks this small gain next to nothing from a second."""
    import torch

    end_with(parent)
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):  # the notebook prints what comes back
        return train(run, cpu=True, most=1)


# ---------------------------------------------------------------------------------------------------
# The records of finished runs


def recorded_table(folder: Path | str, split: str):
    """The runs of `summarise_speech_runs` as a pandas table: of each data set and decoder the baseline first."""
    rows = [row for row in summarise_speech_runs(folder, split) if not row["by_heart"]]
    rows.sort(key=lambda row: (row["dataset"], row["preset"] != "improved", row["decoder"], len(row["changes"])))
    baseline, table = {}, []
    for row in rows:
        similarity = row["scores"]["damerau_levenshtein"]["mean"]
        difference = similarity - baseline.setdefault((row["dataset"], row["decoder"]), similarity)
        table.append(
            {
                "data": row["dataset"],
                "decoder": row["decoder"],
                "setting": ", ".join(
                    [row["preset"]]
                    + ([f"pretrained on {row['pretrained']}"] if row["pretrained"] else [])
                    + [f"{name} {value}" for name, value in row["changes"].items()]
                ),
                "seeds": len(row["seeds"]),
                "similarity": spread(row["scores"]["damerau_levenshtein"], ".3f"),
                "CER": spread(row["scores"]["cer"], ".1%"),
                "all right": spread(row["scores"]["exact"], ".0%"),
                "minutes": f"{row['minutes']['mean']:.1f}",
                "difference": f"{difference:+.3f}" if difference else "",
            }
        )
    return pd.DataFrame(table)


# ---------------------------------------------------------------------------------------------------
# Recordings cut at pauses

PAUSE, MARGIN = 0.3, 0.1  # seconds: the shortest pause, and what its neighbours keep of one at their ends


def pauses(samples: np.ndarray, rate: int) -> list[tuple[int, int]]:
    """First and last sample (exclusive) of each stretch that is 35 dB weaker than the recording's loudest hundredth.

    Of a long recording that is at most its three loudest seconds: someone may speak in it once.
    """
    frame = max(1, rate // 100)
    padded = np.pad(samples.astype(np.float64), (0, -len(samples) % frame))
    power = np.square(padded).reshape(-1, frame).mean(axis=1)
    quiet = power <= 10**-3.5 * np.quantile(power, max(0.99, 1 - 300 / len(power)))
    edges = [0, *(np.flatnonzero(np.diff(quiet)) + 1).tolist(), len(quiet)]
    return [(start * frame, min(end * frame, len(samples))) for start, end in pairwise(edges) if quiet[start]]


def longest_pause(samples: np.ndarray, rate: int) -> float:
    """Seconds of the longest pause within a recording, silence at its ends apart; at least `PAUSE`."""
    within = [end - start for start, end in pauses(samples, rate) if start > 0 and end < len(samples)]
    return max(PAUSE, max(within, default=0) / rate)


def what_was_heard(clips: list, rate: int) -> dict[str, float]:
    """What a network that is trained on `clips` knows of recordings.

    The longest clip and the longest pause within one, in seconds; the loudness (root mean square) of the median clip.
    Of many clips every n-th is read, at least 200.
    """
    some = [read_wav(clip.path, rate)[0] for clip in clips[:: max(1, len(clips) // 200)]]
    return {
        "longest_clip": max(clip.seconds for clip in clips),
        "longest_pause": max(longest_pause(samples, rate) for samples in some),
        "loudness": float(np.median([np.sqrt(np.mean(np.square(samples))) for samples in some])),
    }


def split_at_silences(
    samples: np.ndarray, rate: int, longest: float = 10.0, pause: float = PAUSE
) -> list[tuple[int, int]]:
    """Cut a recording at pauses of more than `pause` seconds, and where it is quietest if `longest` asks for more.

    Returns the first and last sample (exclusive) of each piece; pauses are left out.
    """
    pieces, limit, margin = [], int(longest * rate), int(MARGIN * rate)
    window = max(1, rate // 10)  # loudness over 0.1 s
    energy = np.cumsum(np.concatenate([[0.0], np.square(samples, dtype=np.float64)]))
    long = [(start, end) for start, end in pauses(samples, rate) if end - start > pause * rate]
    edges = [0, *(edge for start, end in long for edge in (start + margin, end - margin)), len(samples)]
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        if long and last - first <= margin:  # nothing but the margin of a pause at either end
            continue
        while last - first > limit:
            places = np.arange(first + limit // 2, first + limit - window, max(1, rate // 100))
            cut = int(places[np.argmin(energy[places + window] - energy[places])]) + window // 2
            pieces.append((first, cut))
            first = cut
        pieces.append((first, last))
    return pieces


# ---------------------------------------------------------------------------------------------------
# What went wrong in a transcript


def character_errors(references: Sequence[str], hypotheses: Sequence[str]) -> Counter:
    """How often each character was written for each other one: counts by (said, written).

    A character that was missed is (character, ""), and one that was added ("", character).
    """
    counts = Counter()
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        for said, written in differences(reference, hypothesis):
            counts.update((said[i : i + 1], written[i : i + 1]) for i in range(max(len(said), len(written))))
    return counts


def differences(reference: Sequence, hypothesis: Sequence) -> list[tuple]:
    """The edits between two texts (or lists of words), each of one kind: what was said, what was written instead."""
    return [
        (reference[o.src_start : o.src_end], hypothesis[o.dest_start : o.dest_end])
        for o in Levenshtein.opcodes(reference, hypothesis)
        if o.tag != "equal"
    ]


def wrong_stretches(reference: str, hypothesis: str) -> list[tuple[str, str]]:
    """The stretches in which two texts differ, edits side by side put together: what was said, what was written."""
    stretches = []
    for wrong, group in groupby(Levenshtein.opcodes(reference, hypothesis), lambda operation: operation.tag != "equal"):
        operations = list(group)
        if wrong:
            said = reference[operations[0].src_start : operations[-1].src_end]
            stretches.append((said, hypothesis[operations[0].dest_start : operations[-1].dest_end]))
    return stretches


LONG = 4  # wrong characters side by side: about a word


def kinds_of_errors(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Wrong characters in 1,000 spoken ones, by kind; `pairs` are what was said and what was written.

    A stretch of `LONG` or more characters that were written for nothing counts as `repeated` where the same stretch
    stands elsewhere in what was written, else as `invented`; one that was not written as `skipped`; one written in
    the place of another as `replaced`. Shorter ones are `misspelt`.
    """
    counts = dict.fromkeys(("misspelt", "skipped", "repeated", "invented", "replaced"), 0)
    for said, written in pairs:
        for source, target in wrong_stretches(said, written):
            if max(len(source), len(target)) < LONG:
                kind = "misspelt"
            elif source:
                kind = "replaced" if target else "skipped"
            else:
                kind = "repeated" if written.count(target) > 1 else "invented"
            counts[kind] += max(len(source), len(target))
    characters = sum(len(said) for said, _ in pairs)
    return {kind: 1000 * count / characters for kind, count in counts.items()}


def words(text: str) -> list[str]:
    """The words of a transcript; `#` stands for characters outside the vocabulary, as the apostrophe."""
    return re.findall(r"[a-z#][a-z#-]*", text)


def fate_of_new_words(references: Sequence[str], hypotheses: Sequence[str], known: set[str]) -> dict[str, int]:
    """What became of the words of the references that are not `known`: written right, as a known word, or otherwise."""
    counts = Counter(right=0, known=0, otherwise=0)
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        said, written = words(reference), words(hypothesis)
        new = sum(word not in known for word in said)
        for wrong, instead in differences(said, written):
            for i, word in enumerate(wrong):
                if word not in known:
                    counts["known" if instead[i : i + 1] and instead[i] in known else "otherwise"] += 1
                    new -= 1
        counts["right"] += new
    return dict(counts)


def transcript_table(said: Sequence[str], written: dict[str, list[str]]) -> str:
    """HTML: a row for what was said, and below it one for what each decoder wrote, with the wrong words marked."""
    rows = []
    for number, text in enumerate(said):
        cells = {"said": html.escape(text)}
        cells |= {name: mark_words(text, texts[number]) for name, texts in written.items()}
        for name, cell in cells.items():
            line = "border-top:1px solid #bbb" if name == "said" else ""
            rows.append(
                f'<tr style="background:none;{line}"><th style="text-align:right">{html.escape(name)}</th>'
                f'<td style="text-align:left;font-family:monospace">{cell}</td></tr>'
            )
    return f"<table>{''.join(rows)}</table>"


def mark_words(reference: str, hypothesis: str) -> str:
    """HTML of a transcript: words that were not said are orange, words that were left out stand in brackets."""
    said, written, parts = reference.split(), hypothesis.split(), []
    for o in Levenshtein.opcodes(said, written):
        instead = html.escape(" ".join(written[o.dest_start : o.dest_end]))
        missed = html.escape(" ".join(said[o.src_start : o.src_end]))
        if o.tag == "equal":
            parts.append(instead)
        elif o.tag == "delete":
            parts.append(f'<span style="color:#888">[{missed}]</span>')
        else:
            parts.append(f'<b style="color:#c04a00">{instead}</b>')
    return " ".join(parts) or "<i>nothing</i>"


SCORES = {  # of a table, with their headings and formats
    "loss": ("loss (nats per token)", "{:.3f}"),
    "jaccard": ("Jaccard", "{:.3f}"),
    "cosine": ("cosine", "{:.3f}"),
    "damerau_levenshtein": ("Damerau-Levenshtein", "{:.3f}"),
    "osa": ("OSA", "{:.3f}"),
    "cer": ("CER", "{:.1%}"),
    "wer": ("WER", "{:.1%}"),
    "exact": ("all right", "{:.0%}"),
}


def score_table(rows: dict[str, dict[str, float]]):
    """Scores as a pandas table: a row for each name in `rows`, a column for each score that all rows have."""
    columns = [key for key in SCORES if all(key in scores for scores in rows.values())]
    table = {SCORES[key][0]: [SCORES[key][1].format(s[key]) for s in rows.values()] for key in columns}
    return pd.DataFrame(table, index=list(rows))


# ---------------------------------------------------------------------------------------------------
# Figures


def plot_sound(samples: np.ndarray, rate: int, title: str) -> Figure:
    """Waveform over spectrogram, seconds below: `samples` [N] in [-1, 1] at `rate` Hz."""
    figure, (wave, spectrum) = new_figure(2, 1, size=(9.0, 1.9))
    seconds = len(samples) / rate
    wave.plot(np.arange(len(samples)) / rate, samples, linewidth=0.4)
    wave.set(title=title, ylabel="amplitude", xlim=(0, seconds))
    spectrum.specgram(samples + 1e-6, NFFT=512, Fs=rate, noverlap=384, cmap="magma", vmin=-120)
    spectrum.set(ylabel="frequency (Hz)", xlabel="time (s)", xlim=(0, seconds))
    spectrum.grid(False)
    return figure


def plot_log_mel(pictures: dict[str, np.ndarray], frequencies: np.ndarray, seconds: float) -> Figure:
    """Log-mel spectrograms [frames, n_mels] by title; `frequencies` [n_mels] are the middles of the bands in Hz."""
    figure, axes = new_figure(len(pictures), 1, size=(9.0, 2.2))
    hertz = [200, 500, 1000, 2000, 4000, 8000]
    for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
        extent = (0, seconds, 0, len(frequencies))
        drawn = axis.imshow(picture.T, origin="lower", aspect="auto", cmap="magma", extent=extent)
        axis.set_yticks(np.interp(hertz, frequencies, np.arange(len(frequencies)) + 0.5), [f"{f:,}" for f in hertz])
        axis.set(title=title, ylabel="frequency (Hz)")
        axis.grid(False)
        figure.colorbar(drawn, ax=axis, label="log power", pad=0.01)
    axes[-1].set_xlabel("time (s)")
    return figure


def plot_matrix(matrix: np.ndarray, title: str, xlabel: str, ylabel: str) -> Figure:
    figure, (axes,) = new_figure(size=(5.0, 3.6))
    figure.colorbar(axes.imshow(matrix, cmap="Greys", origin="lower"), ax=axes)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(False)
    return figure


def plot_ctc(
    probabilities: np.ndarray, shown: str, tokens: str, spans: list[tuple[int, int]], guide: np.ndarray, text: str
) -> Figure:
    """CTC's forced alignment of `text`, and what the guide makes of it.

    `probabilities` [S, tokens] of each position, of which the characters `shown` are drawn; `spans`, first and last
    position of each character of the text; `guide` bool [characters + 1, S], where the cross-attention should look.
    """
    figure, (left, right) = new_figure(1, 2, size=(5.6, 2.8))
    rows = [tokens.index(character) for character in shown]
    left.imshow(probabilities[:, rows].T, cmap="Greys", aspect="auto")
    path = np.zeros(len(probabilities), dtype=int)  # the blank, where no character is
    for character, (first, last) in zip(text, spans, strict=True):
        path[first : last + 1] = shown.index(character)
    left.plot(path, "o-", color=COLOURS[1], markersize=4)
    left.set_yticks(range(len(shown)), shown, family="DejaVu Sans Mono")
    left.set(title="CTC's output and the likeliest path", xlabel="position", ylabel="token")
    right.imshow(guide, cmap="Greys", aspect="auto")
    right.set_yticks(range(len(guide)), [*text, "stop"], family="DejaVu Sans Mono")
    right.set(title="where the guide asks to look", xlabel="position", ylabel="character written")
    for axes in (left, right):
        axes.grid(False)
    return figure


SIMILARITIES = {"jaccard": "Jaccard", "cosine": "cosine", "damerau_levenshtein": "Damerau-Levenshtein"}


def plot_speech_curves(histories: dict[str, list[list[dict]]], title: str) -> Figure:
    """Loss and the three similarities over the epochs, of all decoders: `histories` by the decoder's name.

    Of each there may be several, one per seed: the mean is drawn.
    """
    figure, (loss, similarity) = new_figure(1, 2, size=(5.4, 3.8))
    for colour, (name, runs) in zip(COLOURS, histories.items(), strict=False):
        mean = pd.concat(map(pd.json_normalize, runs)).groupby("epoch").mean(numeric_only=True)
        loss.plot(mean["train.loss"], "--", color=colour, label=f"{name}, training")
        loss.plot(mean["val.loss"], color=colour, label=f"{name}, validation")
        for (key, label), style in zip(SIMILARITIES.items(), (":", "--", "-"), strict=True):
            similarity.plot(mean[f"val.{key}"], style, color=colour, label=f"{name}, {label}")
    loss.set(title=title, xlabel="epoch", ylabel="cross-entropy per token (nats)")
    similarity.set(title="Similarity to the text, validation", xlabel="epoch", ylabel="similarity", ylim=(0, 1.02))
    for axes in (loss, similarity):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=8)
    return figure


def plot_alignments(
    weights: dict[str, np.ndarray],
    texts: dict[str, str],
    heard: dict[str, np.ndarray | None],
    seconds: float,
    title: str,
) -> Figure:
    """Cross-attention of each decoder on one clip, side by side: a row per character that it wrote, seconds across.

    By decoder: `weights` [characters + 1, positions], the last row for the stop; `texts`, what it wrote; `heard`
    [characters], the seconds at which its CTC layer hears them, or None.
    """
    longest = max(map(len, texts.values()))
    figure, axes = new_figure(1, len(weights), size=(5.6, min(12.0, max(3.6, 0.16 * longest))))
    for axis, (name, matrix) in zip(axes, weights.items(), strict=True):
        extent = (0, seconds, len(matrix), 0)
        axis.imshow(matrix, aspect="auto", cmap="Greys", extent=extent, interpolation="nearest")
        if heard[name] is not None:
            places = np.arange(len(heard[name])) + 0.5
            axis.plot(heard[name], places, "o", color=COLOURS[1], markersize=3, label="heard by CTC")
            axis.legend(loc="upper right")
        rows = [*texts[name].replace(" ", "␣"), "stop"]
        axis.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=8, family="DejaVu Sans Mono")
        axis.tick_params(axis="y", length=0)
        axis.set(title=f"{name}: {title}", xlabel="time (s)", ylabel="character written")
        axis.grid(False)
    return figure


def plot_error_by_length(errors: dict[str, np.ndarray], lengths: np.ndarray, title: str, bins: int = 6) -> Figure:
    """Character error rate against the length of the sentence, in bins of equally many sentences.

    `errors` by decoder [sentences]: edit distance of each; `lengths` [sentences] characters of the references.
    """
    figure, (axes,) = new_figure(size=(6.4, 3.8))
    groups = np.array_split(np.argsort(lengths, kind="stable"), min(bins, len(lengths)))
    middles = [lengths[group].mean() for group in groups]
    for colour, (name, distances) in zip(COLOURS, errors.items(), strict=False):
        rates = [100 * distances[group].sum() / lengths[group].sum() for group in groups]
        axes.plot(middles, rates, "o-", color=colour, label=name)
    axes.set(title=title, xlabel="characters of the sentence (mean of a bin)", ylabel="character error rate (%)")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def plot_error_kinds(errors: dict[str, Counter], characters: int, title: str) -> Figure:
    """Bars of how many characters were substituted, missed and added, in % of the `characters` said, by decoder.

    `errors` are counts by (said, written), as `character_errors` gives them.
    """
    figure, (axes,) = new_figure(size=(6.4, 2.6))
    kinds = {"substituted": (True, True), "missed": (True, False), "added": (False, True)}
    for row, (name, counts) in enumerate(errors.items()):
        numbers = [sum(n for (a, b), n in counts.items() if (bool(a), bool(b)) == kind) for kind in kinds.values()]
        places = np.arange(len(kinds)) + 0.38 * row
        bars = axes.barh(places, [100 * number / max(1, characters) for number in numbers], 0.34, label=name)
        axes.bar_label(bars, [f"{number:,}" for number in numbers], padding=3)
    axes.set_yticks(np.arange(len(kinds)) + 0.19 * (len(errors) - 1), kinds)
    axes.invert_yaxis()
    axes.set(title=title, xlabel="% of the characters that were said")
    axes.margins(x=0.12)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
