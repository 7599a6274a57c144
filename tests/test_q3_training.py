"""Question 3's training: what a step does, resuming after every kind of end, two processes, records, damaged files, and
recordings transcribed with the network that was trained. The data: words whose letters are tones."""

import copy
import errno
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import resource
import shlex
import shutil
import signal
import struct
from concurrent.futures import Future
from itertools import cycle
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import papermill.cli
import pytest
import soundfile
import torch
from accelerate import Accelerator
from click.testing import CliRunner
from conftest import tree
from test_q3_models import DECODERS, RATE, both_decoders, close, nb, network, tiny

import asr
import runs as run_files
import utils
from utils import InputError

OTHER = dict(zip(DECODERS, reversed(DECODERS), strict=True))
LETTERS = "abcdef"
SPLITS = {"train": (0, 12), "val": (12, 14), "test": (14, 17), "test_other": (17, 19)}

# Children start from a process that has imported what takes long (some of it comes with utils.set_seed and with
# DistributedDataParallel) and has computed nothing yet.
CHILDREN = multiprocessing.get_context("forkserver")
SLOW_IMPORTS = (
    "accelerate torchaudio matplotlib.figure pandas soundfile scipy.signal loky jellyfish rapidfuzz.distance "
    "textdistance hypothesis pytest papermill.cli torch._inductor torch.nn.parallel.distributed"
)
CHILDREN.set_forkserver_preload(SLOW_IMPORTS.split())


def tone_word(text, rng, rate=RATE):
    """Samples of a text: 0.1 s a letter, each letter a tone of its own; a space is a pause."""
    parts = [rng.normal(0, 0.002, int(0.1 * rate))]
    for letter in text:
        time = np.arange(int(rng.uniform(0.08, 0.1) * rate)) / rate
        hertz = 400 * 1.5 ** LETTERS.index(letter) if letter in LETTERS else 0.0
        parts += [0.3 * np.sin(2 * np.pi * hertz * time) + rng.normal(0, 0.01, len(time)), np.zeros(int(0.02 * rate))]
    return np.concatenate(parts).astype(np.float32)


def make_tones(folder: Path, splits=SPLITS, seed=0) -> Path:
    """A spoken corpus in LJ Speech's layout: words of three to six letters."""
    rng = np.random.default_rng(seed)
    (folder / "wavs").mkdir(parents=True)
    rows = []
    for number in range(max(end for _, end in splits.values())):
        text = "".join(rng.choice(list(LETTERS + " "), rng.integers(3, 7))).strip() or "ab"
        soundfile.write(folder / "wavs" / f"T{number:03d}.wav", tone_word(text, rng), RATE)
        rows.append(f"T{number:03d}|{text}|{text}\n")
    (folder / "metadata.csv").write_text("".join(rows))
    (folder / "corpus.json").write_text(json.dumps({"name": "tones", "kind": "spoken", "splits": splits}))
    return folder


def small(**changes):
    """A run of three epochs of three steps, with chance in it: dropout and SpecAugment."""
    training = {"epochs": 3, "batch_size": 4, "warmup_steps": 2, "learning_rate": 2e-3}
    chance = {"dropout": 0.1, "spec_augment": True, "mel_shift": 1.0, "text_dropout": 0.2, "guide_weight": 0.3}
    return tiny(**({"n_mels": 24} | training | chance | changes))


DETERMINED = {
    "dropout": 0.0,
    "spec_augment": False,
    "mel_shift": 0.0,
    "text_dropout": 0.0,
}  # nothing but weights and order is left to chance


def features(folder: Path, settings):
    corpus = utils.load_speech(str(folder))
    extract, about = nb.extractor(corpus.sample_rate, settings)
    return utils.cached_features(corpus, extract, about, folder.parent / "features")


def make_run(folder: Path, root: Path, decoder="lstm", seed=1, **changes):
    settings = small(**changes)
    return asr.SpeechRun(decoder, "improved", settings, changes, seed, features(folder, settings), root)


def train(run, most=None):
    """In this process."""
    torch.set_num_threads(1)
    histories = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asr, "train_at_once", lambda function, runs: histories.append(function(*runs, True, most)) or [])
        asr.train_all(nb.train, [run], True, 1)
    return histories[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    forkserver.ensure_running()  # it imports while the first tests run
    return make_tones(tmp_path_factory.mktemp("q3") / "tones")


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """For each decoder a run that nothing interrupted."""
    both = {decoder: make_run(folder, tmp_path_factory.mktemp("runs"), decoder) for decoder in DECODERS}
    for run in both.values():
        train(run)
    return both


@pytest.fixture(params=DECODERS)
def whole(request, runs):
    return runs[request.param]


def weights(run):
    return run_files.load_weights(run.folder / "model.safetensors")[0]


def without_times(history):
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in history]


def assert_same_run(ours, expected):
    """Bit for bit: weights, history, scores."""
    first, second = weights(ours), weights(expected)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    records = [run.record() for run in (ours, expected)]
    assert without_times(records[0]["history"]) == without_times(records[1]["history"])
    for key in ("val", "test", "test_other", "config", "dataset", "parameters"):
        assert records[0][key] == records[1][key], key
    files = [(run.folder / "transcripts.json").read_text() for run in (ours, expected)]
    assert files[0] == files[1]
    assert {path.name for path in ours.folder.iterdir()} - {run_files.LOCK} == {
        "last.pt",
        "model.safetensors",
        "transcripts.json",
        "record.json",
    }
    assert ours.is_finished() and ours.transcripts() == expected.transcripts()


# ---------------------------------------------------------------------------------------------------
# What training does


def record_norms(patch, path):
    """Let training write the norm of each step's gradient, before it is clipped: AdamW hides the scale of a loss."""
    genuine = Accelerator.clip_grad_norm_

    def recorded(self, *args):
        norm = genuine(self, *args)
        if self.is_main_process:
            with path.open("a") as file:
                file.write(f"{norm.item()}\n")

    patch.setattr(Accelerator, "clip_grad_norm_", recorded)
    return path


@both_decoders
def test_training_is_the_stated_loop(folder, tmp_path, decoder, monkeypatch):
    """Two epochs written out: AdamW on the mean loss a token, clipped, at the stated rate, guided after the warm-up."""
    settings = {"epochs": 2, "clip_norm": 2.6, "weight_decay": 0.5}  # it clips some of the steps
    run = make_run(folder, tmp_path, decoder, **DETERMINED, **settings)
    norms = record_norms(monkeypatch, tmp_path / "norms")
    train(run)
    norms = list(map(float, norms.read_text().split()))
    settings, cache, clips = run.settings, run.cache, run.cache.clips("train")
    utils.set_seed(run.seed)
    model = nb.SpeechToText(decoder, settings)
    everything = np.concatenate([cache[clip] for clip in clips]).astype(np.float64)
    model.encoder.feature_mean.copy_(torch.from_numpy(everything.mean(axis=0)))
    model.encoder.feature_std.copy_(torch.from_numpy(everything.std(axis=0)))
    if settings.scale_positions:  # one position of the audio counts as so many characters
        characters = sum(len(clip.text) for clip in clips)
        model.encoder.position_rate.fill_(characters / (len(everything) / settings.subsampling))
    objective = nb.Objective(model, settings)
    optimizer = torch.optim.AdamW(model.parameters(), betas=settings.betas, weight_decay=settings.weight_decay)
    frames, step, guided_steps, history = np.array([cache.frames(clip) for clip in clips]), 0, 0, []
    for epoch in range(2):
        sums, tokens = torch.zeros(3), 0
        for batch in nb.make_batches(frames, settings, run.seed, epoch):
            audio, lengths, text = nb.collate([clips[i] for i in batch], cache, model.vectorizer, "cpu")
            guided = step >= 2
            guided_steps += guided
            losses = objective.train()(audio, lengths, text, guided)
            count = sum(len(clips[i].text) + 1 for i in batch)
            mix = (1 - settings.ctc_weight) * losses[0] + settings.ctc_weight * losses[1] + 0.3 * losses[2]
            optimizer.zero_grad()
            (mix / count).backward()
            norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
            for parameter in model.parameters():
                parameter.grad.mul_(min(1.0, 2.6 / (norm + 1e-6)))
            assert norms[step] == pytest.approx(norm, rel=1e-3)
            optimizer.param_groups[0]["lr"] = nb.learning_rate(step, 6, settings)
            optimizer.step()
            sums, tokens, step = sums + losses.detach(), tokens + count, step + 1
        history.append({"train": dict(zip(nb.LOSSES, (sums / tokens).tolist(), strict=True))})
        history[-1]["val"], _ = nb.evaluate(objective, cache.clips("val"), cache)
    assert guided_steps == 4
    for name, value in weights(run).items():
        close(value, model.state_dict()[name], atol=5e-4)
    for ours, expected in zip(run.record()["history"], history, strict=True):
        assert ours["train"] == pytest.approx(expected["train"], rel=1e-4)
        for key in asr.SCORES:
            assert ours["val"][key] == pytest.approx(expected["val"][key], rel=1e-3)


@both_decoders
def test_a_batch_in_parts_gives_the_gradients_of_the_whole(folder, tmp_path, decoder, monkeypatch):
    run = make_run(folder, tmp_path, decoder, **DETERMINED)
    clips, accelerator = run.cache.clips("train")[:10], Accelerator(cpu=True)
    utils.set_seed(0)
    objective = nb.Objective(nb.SpeechToText(decoder, run.settings), run.settings)
    sizes, found = [], []
    objective.register_forward_hook(lambda module, given, output: sizes.append(len(given[0])))
    for part in (16, 4):
        monkeypatch.setattr(nb, "MICRO_BATCH", part)
        objective.zero_grad()
        sums = nb.add_gradients(run, accelerator, objective, clips, 123, True)
        found.append((sums, torch.cat([parameter.grad.flatten() for parameter in objective.parameters()])))
    assert sizes == [10, 4, 4, 2]
    for whole, parts in zip(*found, strict=True):
        assert whole.abs().max() > 0.01
        close(parts, whole, atol=1e-5 * whole.abs().max().item())


def test_the_record_holds_what_it_must(whole):
    record = whole.record()
    config = record["config"]
    assert (config["preset"], config["decoder"]) == ("improved", whole.decoder)
    assert {name: config[name] for name in whole.identity["settings"]} == whole.identity["settings"]
    assert record["dataset"] == whole.cache.corpus.description
    assert {"name", "kind", "counts", "sha256"} <= set(record["dataset"]) and record["dataset"]["kind"] == "spoken"
    assert record["dataset"]["counts"] == {"train": 12, "val": 2, "test": 3, "test_other": 2}
    assert {"python", "torch", "numpy"} <= set(record["versions"]) and "command" in record and "date" in record
    assert (record["seed"], record["device"], record["threads"], record["processes"]) == (1, "cpu", 1, 1)
    assert record["precision"] == "no" and record["seconds"] > 0 and record["changes"] == {}
    model = nb.load_model(whole.folder / "model.safetensors", whole.decoder)
    assert model.settings == whole.settings
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    measures = {"jaccard", "cosine", "damerau_levenshtein", "osa", "cer", "wer", "loss", "ctc_loss"}
    assert [entry["epoch"] for entry in record["history"]] == [1, 2, 3]
    for entry in record["history"]:
        assert set(entry["train"]) == {"loss", "ctc_loss", "guide_loss"} and measures <= set(entry["val"])
    texts = whole.transcripts()
    objective = nb.Objective(model, whole.settings)
    for split in ("test", "test_other"):
        clips = whole.cache.clips(split)
        scores, hypotheses = nb.evaluate(objective, clips, whole.cache)
        assert measures <= set(record[split]) and measures - {"loss", "ctc_loss"} <= set(record[split]["cut_to_97"])
        assert record[split].pop("cut_to_97") == pytest.approx(scores.pop("cut_to_97"))
        assert record[split] == pytest.approx(scores)
        assert record[split]["clips"] == len(clips)
        assert texts[split] == dict(zip([clip.id for clip in clips], hypotheses, strict=True))
    scores, hypotheses = nb.evaluate(objective, whole.cache.clips("val"), whole.cache)
    assert record["val"] == record["history"][-1]["val"] and record["val"]["cer"] == pytest.approx(scores["cer"])
    assert record["history"][-1]["example"] == hypotheses[0]


def test_scores_cut_as_the_courses_are(monkeypatch):
    model = network("lstm")
    monkeypatch.setattr(nb, "transcripts", lambda model, clips, cache: ["a" * 97 + "x" * 103])
    monkeypatch.setattr(nb, "mean_loss", lambda objective, clips, cache: {})
    clips = [utils.Clip(0, "C", "a" * 200, Path("none.wav"), 1.0, RATE, "")]
    scores, _ = nb.evaluate(nb.Objective(model, model.settings), clips, None)
    assert scores["cer"] == 103 / 200 and scores["cut_to_97"]["cer"] == 0


@pytest.mark.parametrize("changes", [{}, {"learning_rate": 5e-5, "max_characters": 9, "clip_norm": None}])
def test_the_command_in_a_record_makes_the_same_run_again(tmp_path, changes, monkeypatch):
    folder = make_tones(tmp_path / "my tones")
    settings = nb.choose_settings("homework", changes)
    run = asr.SpeechRun(
        "transformer", "homework", settings, changes, 7, features(folder, settings), tmp_path, {"data": str(folder)}
    )
    program, *words = shlex.split(run.command)
    asked = {}
    monkeypatch.setattr(papermill.cli, "execute_notebook", lambda **options: asked.update(options))
    assert program == "papermill" and CliRunner().invoke(papermill.cli.papermill, words).exit_code == 0
    given = asked["parameters"]
    assert asked["input_path"] == "hw2-q3.ipynb" and set(given) <= set(vars(nb))
    assert nb.choose_settings(given["preset"], given.get("overrides", {})) == settings
    assert (given["data"], given["seed"], given["decoders"]) == (str(folder), 7, "transformer")


def test_progress_says_epoch_losses_and_time_left(folder, tmp_path, capsys):
    train(make_run(folder, tmp_path, "transformer"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("transformer epoch")]
    assert len(lines) == 3 and "epoch  1 of 3" in lines[0] and "min left" in lines[1] and "left" not in lines[2]


# ---------------------------------------------------------------------------------------------------
# Interrupted runs


def install(patch, place, die):
    """Let training come to `die` at a place of its second epoch, or of its end."""
    calls = {"fsync": 0, "evaluate": 0, "progress": 0}

    def before(owner, name, condition):
        genuine = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if condition(*args, **kwargs):
                die()
            return genuine(*args, **kwargs)

        patch.setattr(owner, name, wrapped)

    def count(name):
        calls[name] += 1
        return calls[name]

    def half_written(number):
        def fsync(file):
            if count("fsync") == number:
                os.ftruncate(file, os.fstat(file).st_size // 2)
                die()

        patch.setattr(run_files.os, "fsync", fsync)

    if place == "in the first epoch":
        before(nb, "learning_rate", lambda step, *rest: step == 1)
    elif place == "in the middle of an epoch":
        before(nb, "learning_rate", lambda step, *rest: step == 4)
    elif place == "at validation":
        before(nb, "evaluate", lambda *args: count("evaluate") == 2)
    elif place == "in the middle of the checkpoint":
        half_written(2)
    elif place == "before the checkpoint gets its name":
        before(Path, "replace", lambda path, target: target.name == "last.pt" and len(epochs_in(target)) == 1)
    elif place == "after the checkpoint":
        before(asr, "progress", lambda *args: count("progress") == 2)
    elif place == "before model.safetensors":
        before(asr, "save_weights", lambda *args: True)
    elif place == "in the middle of model.safetensors":
        half_written(4)
    else:
        before(asr, "write_json", lambda path, record: path.name == place.removeprefix("before "))


def epochs_in(path):
    return torch.load(path, weights_only=True)["history"] if path.exists() else []


PLACES = {  # and how many epochs count by then
    "in the first epoch": 0,
    "in the middle of an epoch": 1,
    "at validation": 1,
    "in the middle of the checkpoint": 1,
    "before the checkpoint gets its name": 1,
    "after the checkpoint": 2,
    "before model.safetensors": 3,
    "in the middle of model.safetensors": 3,
    "before transcripts.json": 3,
    "before record.json": 3,
}


def train_and_die(folder, root, decoder, place):
    install(pytest.MonkeyPatch(), place, lambda: os.kill(os.getpid(), signal.SIGKILL))
    train(make_run(folder, root, decoder))


def in_a_child(function, *arguments):
    process = CHILDREN.Process(target=function, args=arguments)
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        process.join()
        pytest.fail("the child hangs")
    return process.exitcode


def count_epochs(patch):
    """Numbers of the epochs that are trained from now on."""
    trained, genuine = [], nb.train_epoch
    patch.setattr(nb, "train_epoch", lambda *args: trained.append(args[-1] + 1) or genuine(*args))
    return trained


@pytest.mark.parametrize(("place", "whole"), list(zip(PLACES, cycle(DECODERS), strict=False)), indirect=["whole"])
def test_a_run_killed_anywhere_goes_on_to_the_same_end(folder, whole, tmp_path, place, monkeypatch):
    assert in_a_child(train_and_die, folder, tmp_path, whole.decoder, place) == -signal.SIGKILL
    run = make_run(folder, tmp_path, whole.decoder)
    assert not run.is_finished() and len(epochs_in(run.folder / "last.pt")) == PLACES[place]
    trained = count_epochs(monkeypatch)
    train(run)
    assert trained == [*range(PLACES[place] + 1, 4)]
    assert_same_run(run, whole)


class Interruption(BaseException):
    pass


def interrupt():
    raise Interruption


def test_a_run_interrupted_twice_by_an_exception_ends_as_if_it_had_not_been(folder, whole, tmp_path):
    run = make_run(folder, tmp_path, whole.decoder)
    for place in ("in the middle of an epoch", "before model.safetensors"):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interruption):
            install(patch, place, interrupt)
            train(run)
        torch.manual_seed(99)  # whatever happened in between must not matter
    train(run)
    assert_same_run(run, whole)


def test_a_run_of_one_epoch_at_a_time_is_the_same_run(folder, whole, tmp_path):
    run = make_run(folder, tmp_path, whole.decoder)
    for epochs in (1, 2, 3):
        assert len(train(run, most=1)) == epochs and run.is_finished() == (epochs == 3)
    assert_same_run(run, whole)


def test_a_finished_run_is_recognised_and_anything_else_has_another_folder(folder, whole, tmp_path):
    again = make_run(folder, whole.root, whole.decoder)
    assert again.folder == whole.folder and again.is_finished() and again.record() == whole.record()
    others = [make_run(folder, whole.root, whole.decoder, **changes) for changes in ({"seed": 2}, {"epochs": 4})]
    others.append(make_run(folder, whole.root, OTHER[whole.decoder]))
    others.append(make_run(make_tones(tmp_path / "tones", seed=5), whole.root, whole.decoder))
    assert len({run.folder for run in [whole, *others]}) == 5 and not any(run.is_finished() for run in others)


def test_other_sound_under_the_same_names_texts_and_lengths_is_another_run(folder, whole, tmp_path):
    other = shutil.copytree(folder, tmp_path / folder.name)
    assert make_run(other, whole.root, whole.decoder).folder == whole.folder  # a copy is the same corpus
    path = other / "wavs" / "T003.wav"
    samples, rate = soundfile.read(path, dtype="int16")
    samples[1000] ^= 1  # by one step of 65,536
    soundfile.write(path, samples, rate)
    run = make_run(other, whole.root, whole.decoder)
    assert [c.seconds for c in run.cache.clips("train")] == [c.seconds for c in whole.cache.clips("train")]
    assert run.folder != whole.folder and not run.is_finished()


@pytest.mark.parametrize("name", ["model.safetensors", "transcripts.json", "record.json"])
def test_what_was_deleted_is_made_again_without_training(folder, whole, tmp_path, name, monkeypatch):
    shutil.copytree(whole.folder, tmp_path / whole.folder.name)
    run = make_run(folder, tmp_path, whole.decoder)
    (run.folder / name).unlink()
    assert not run.is_finished()
    trained = count_epochs(monkeypatch)
    train(run)
    assert_same_run(run, whole)
    assert trained == []


def test_another_way_to_decode_scores_a_trained_run_again_and_trains_nothing(folder, whole, tmp_path, monkeypatch):
    shutil.copytree(whole.folder, tmp_path / whole.folder.name)
    run = make_run(folder, tmp_path, whole.decoder, attention_window=0.1)
    assert run.folder.name == whole.folder.name and not run.is_finished() and run.record_name != whole.record_name
    monkeypatch.setattr(nb, "train_epoch", lambda *args: pytest.fail("it trains"))
    windows, genuine = set(), nb.SpeechToText.start
    monkeypatch.setattr(nb.SpeechToText, "start", lambda *args: windows.add(genuine(*args).window) or genuine(*args))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interruption):
        install(patch, "before transcripts.json", interrupt)
        train(run)
    for half_way in (run, make_run(folder, tmp_path, whole.decoder)):  # weights of one, transcripts of the other
        assert not half_way.is_finished()
    train(run)
    assert windows == {round(0.1 * RATE / 220 / 4)}
    assert run.is_finished() and "attention_window" in run.record()["command"]
    ours, before = run.record(), whole.record()
    assert ours["config"] == before["config"] | {"attention_window": 0.1}
    assert all(ours[key] == before[key] for key in ("history", "seconds", "dataset", "seed"))
    theirs = weights(whole)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(run).items())

    model, clips = nb.load_model(run.folder / "model.safetensors"), run.cache.clips("test")
    assert list(run.transcripts()["test"].values()) == nb.transcripts(model, clips, run.cache)
    assert model.settings == run.settings
    back = make_run(folder, tmp_path, whole.decoder)
    train(back)
    assert_same_run(back, whole)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.fixture(scope="module")
def interrupted(folder, tmp_path_factory):
    """The folder of runs of one that was interrupted in its second epoch."""
    root = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interruption):
        install(patch, "at validation", interrupt)
        train(make_run(folder, root))
    return root


class OneAfterTheOther:
    """In the place of processes, which cannot load the notebook's definitions from a test."""

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except InputError as error:
            future.set_exception(error)
        return future

    def shutdown(self, kill_workers):
        assert kill_workers


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr("loky.get_reusable_executor", lambda max_workers: OneAfterTheOther())
    return lambda *runs: asr.train_all(nb.train, [*runs], True, 1)


def test_both_decoders_at_once_are_the_same_runs(folder, runs, tmp_path, at_once, capsys):
    both = [make_run(folder, tmp_path, decoder) for decoder in DECODERS]
    at_once(*both)
    for run in both:
        assert_same_run(run, runs[run.decoder])
    printed = capsys.readouterr().out.splitlines()
    epochs = [line.split(":")[0] for line in printed if " epoch " in line]
    assert sorted(epochs) == sorted(f"{d:11s} epoch {n:2d} of 3" for d in DECODERS for n in (1, 2, 3))
    assert len(printed) == 12  # and a sentence below each


def test_a_decoder_that_fails_is_named_and_the_other_one_finishes(folder, interrupted, tmp_path, at_once, capsys):
    shutil.copytree(interrupted, tmp_path / "runs")
    broken, other = (make_run(folder, tmp_path / "runs", decoder) for decoder in DECODERS)
    cut(broken.folder / "last.pt")
    with pytest.raises(InputError, match="delete it"):
        at_once(broken, other)
    assert "lstm: FAILED: " in capsys.readouterr().out
    assert other.is_finished() and not broken.is_finished()


def test_a_second_process_does_not_train_the_same_run(folder, interrupted, tmp_path, at_once):
    run = make_run(folder, tmp_path / "runs")
    shutil.copytree(interrupted, tmp_path / "runs")
    before = tree(run.folder) | {run_files.LOCK: b""}
    with run_files.lock_folder(run.folder), pytest.raises(InputError) as error:
        at_once(run)
    assert str(run.folder) in str(error.value) and "another process" in str(error.value)
    assert tree(run.folder) == before
    at_once(run)
    assert run.is_finished()


def train_on_a_small_disk(folder, root):
    """No file may be larger than 50 kB, which a checkpoint is; 3 tells that training ended in one line about it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    run = make_run(folder, root)
    try:
        train(run)
    except InputError as error:
        assert os.strerror(errno.EFBIG) in str(error) and str(run.folder) in str(error) and "\n" not in str(error)
        os._exit(3)


def test_a_disk_that_is_full_is_said_in_one_line_and_costs_an_epoch(folder, interrupted, runs, tmp_path, monkeypatch):
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    run = make_run(folder, tmp_path)
    before = tree(run.folder) | {run_files.LOCK: b""}
    assert len(before["last.pt"]) > 50_000
    assert in_a_child(train_on_a_small_disk, folder, tmp_path) == 3
    assert tree(run.folder) == before  # no part of a checkpoint is left
    trained = count_epochs(monkeypatch)
    train(run)
    assert trained == [2, 3]
    assert_same_run(run, runs["lstm"])


@pytest.mark.parametrize("name", ["model.safetensors", "transcripts.json", "record.json"])
def test_a_disk_that_is_full_at_the_end_costs_nothing(folder, runs, tmp_path, name, monkeypatch):
    shutil.copytree(runs["lstm"].folder, tmp_path / runs["lstm"].folder.name)
    run, genuine = make_run(folder, tmp_path), run_files.write_whole
    (run.folder / "record.json").unlink()

    def full(path, content):
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        genuine(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(run_files, "write_whole", full)
        with pytest.raises(InputError, match=os.strerror(errno.ENOSPC)) as error:
            train(run)
    assert "\n" not in str(error.value) and not run.is_finished()
    train(run)
    assert_same_run(run, runs["lstm"])


# ---------------------------------------------------------------------------------------------------
# Damaged files, and files of strangers


class Code:
    """What a pickle from a stranger can do."""

    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize("name", ["last.pt", "model.safetensors"])
@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(pickle.dumps(Code())),
        lambda path: torch.save(Code(), path),
        lambda path: torch.save({"model": {}, "history": Code()}, path),
        lambda path: torch.save({"history": Code()}, path, _use_new_zipfile_serialization=False),
    ],
)
def test_no_file_of_a_run_can_run_code(folder, interrupted, tmp_path, name, write, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(interrupted, tmp_path / "runs")
    run = make_run(folder, tmp_path / "runs")
    write(path := run.folder / name)
    with pytest.raises(InputError) as error:
        train(run) if name == "last.pt" else nb.load_model(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def with_history(change):
    return lambda content: content | {"history": change(content["history"])}


FOREIGN = {
    "an emptied history": with_history(lambda history: []),
    "a history that goes on": with_history(lambda history: [history[0] | {"epoch": n} for n in range(1, 6)]),
    "a history of later epochs": with_history(lambda history: [history[0] | {"epoch": 2}]),
    "an epoch twice": with_history(lambda history: history * 2),
    "other settings": lambda content: content | {"settings": content["settings"] | {"label_smoothing": 0.2}},
    "another dataset": lambda content: content | {"dataset": content["dataset"] | {"sha256": 64 * "0"}},
    "another seed": lambda content: content | {"seed": 2},
    "another decoder": lambda content: content | {"decoder": "transformer"},
    "weights of another network": lambda content: content | {"model": network("lstm", width=8).state_dict()},
    "no averages": lambda content: content | {"optimizer": {}},
    "averages of another epoch": lambda content: (
        content | {"optimizer": {n: state | {"step": state["step"] + 3} for n, state in content["optimizer"].items()}}
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_nothing_is_trained_on_a_checkpoint_of_something_else(folder, interrupted, tmp_path, kind, monkeypatch):
    shutil.copytree(interrupted, tmp_path / "runs")
    run = make_run(folder, tmp_path / "runs")
    path = run.folder / "last.pt"
    torch.save(FOREIGN[kind](torch.load(path, weights_only=True)), path)
    before, trained = tree(run.folder) | {run_files.LOCK: b""}, count_epochs(monkeypatch)
    with pytest.raises(InputError) as error:
        train(run)
    message = str(error.value)
    assert message.startswith(str(path)) and "delete it" in message and "\n" not in message
    assert trained == [] and tree(run.folder) == before


STRANGE = (None, True, 0, -1, 3, 2.5, math.inf, math.nan, 10**400, "", "lstm", "\ud800", "a\nb", [], [1], {}, {"a": 1})


def places(value, path=()):
    """The paths to all values within JSON-like `value`."""
    yield path
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(part, (*path, key))


def altered(content, rng):
    """A copy of a JSON-like content with one value deleted, replaced by a strange one, or by another value of it."""
    whole = {"": copy.deepcopy(content)}
    paths = [path for path in places(content) if path]
    (*way, last), (*_, other) = ("", *paths[rng.integers(len(paths))]), paths[rng.integers(len(paths))]
    target = whole
    for key in way:
        target = target[key]
    kind = rng.integers(4)
    if kind == 0:
        del target[last]
    elif kind == 1:
        target[last] = STRANGE[rng.integers(len(STRANGE))]
    elif kind == 2 and isinstance(target, dict) and "optimizer" not in way[1:] and "model" not in way[1:]:
        target[last] = target[other if other in target else rng.choice(list(target))]
    else:
        deep = []
        for _ in range(100):
            deep = [deep]
        target[last] = deep
    return whole[""]


def damaged_bytes(content, rng):
    """Cut off, with a bit flipped, with a stretch overwritten or lost, or with something added."""
    place = int(rng.integers(len(content)))
    return [
        lambda: content[:place],
        lambda: content[:place] + bytes([content[place] ^ (1 << int(rng.integers(8)))]) + content[place + 1 :],
        lambda: content[:place] + rng.bytes(64) + content[place + 64 :],
        lambda: content[:place] + content[place + 64 :],
        lambda: content[:place] + content[place : place + 64] + content[place:],
        lambda: content[:8] + struct.pack("<Q", 2**62) + content[16:],
    ][rng.integers(6)]()


def damage(path, rng):
    """Damage a file's bytes, or what they say."""
    if rng.random() < 0.4:
        path.write_bytes(damaged_bytes(path.read_bytes(), rng))
    elif path.suffix == ".json":
        text = json.dumps(altered(json.loads(path.read_text()), rng))
        path.write_text(text if rng.random() < 0.9 else text.replace("1", "1" + 5000 * "0", 1))
    elif path.suffix == ".pt":
        torch.save(altered(torch.load(path, weights_only=True), rng), path)
    else:
        tensors, about = run_files.load_weights(path)
        about = json.loads(json.dumps(altered(about, rng) if rng.random() < 0.5 else about).replace("NaN", "1"))
        one, other = rng.choice(list(tensors), 2)
        for name, tensor in [(one, torch.zeros(3)), (f"{one}.", tensors[other].clone())]:
            if rng.random() < 0.3:
                tensors[name] = tensor
        run_files.save_weights(path, tensors, json.loads(json.dumps(about).replace("Infinity", "1")))


def read_as_a_notebook_does(run):
    """What is made of a finished run's files, down to what is shown of them; whatever it raises."""
    if run.is_finished():
        record, texts = run.record(), run.transcripts()
        asr.progress(run, record["history"]).encode()
        asr.plot_speech_curves({"LSTM": [record["history"]]}, record["date"][:10])
        asr.score_table({split: record[split] for split in run.test_splits})
        asr.score_table({split: record[split]["cut_to_97"] for split in run.test_splits})
        asr.transcript_table(["said"] * 3, {"LSTM": list(texts["test"].values())[:3]}).encode()
    model = nb.load_model(run.folder / "model.safetensors", run.decoder)
    going_on = nb.new_model(run)
    history = run.resume(going_on, optimizer := torch.optim.AdamW(going_on.parameters()))
    asr.progress(run, history).encode()
    sum(parameter.sum() for parameter in going_on.parameters()).backward()
    optimizer.step()
    return model.state_dict(), going_on.state_dict()


def test_every_number_that_is_shown_of_a_record_is_looked_at(folder, whole, tmp_path):
    run = make_run(folder, tmp_path, whole.decoder)
    shutil.copytree(whole.folder, run.folder)
    record, rng = whole.record(), np.random.default_rng(0)
    for way in [("test",), ("test_other", "cut_to_97"), ("history", 1, "val"), ("history", 2, "train")]:
        for key in asr.SCORES.keys() - {"loss"} if way[-1] != "train" else {"loss"}:
            spoilt = copy.deepcopy(record)
            scores = spoilt
            for step in way:
                scores = scores[step]
            scores[key] = [None, "0.5", [], math.nan, math.inf, 10**400, True][rng.integers(7)]
            (run.folder / "record.json").write_text(json.dumps(spoilt))
            with pytest.raises(InputError, match="delete it"):
                run.is_finished()


@pytest.mark.parametrize("name", ["last.pt", "model.safetensors", "record.json", "transcripts.json"])
def test_a_damaged_file_gives_the_right_result_or_one_line(folder, whole, tmp_path, name):
    shutil.copytree(whole.folder, tmp_path / whole.folder.name)
    run = make_run(folder, tmp_path, whole.decoder)
    content, expected = (run.folder / name).read_bytes(), read_as_a_notebook_does(run)
    rng, refused = np.random.default_rng([len(name), DECODERS.index(whole.decoder)]), 0
    for number in range(25):
        (run.folder / name).write_bytes(content)
        damage(run.folder / name, rng)
        try:
            found = read_as_a_notebook_does(run)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 600, number
        else:
            for ours, theirs in zip(found, expected, strict=True):
                assert all(torch.equal(ours[key], theirs[key]) for key in theirs), number
    assert refused > 12


@pytest.mark.parametrize("guide_weight", [0.0, 0.3])
def test_a_loss_that_diverges_is_said_in_one_line(folder, tmp_path, guide_weight):
    run = make_run(folder, tmp_path, learning_rate=1e30, warmup_steps=0, clip_norm=None, guide_weight=guide_weight)
    with pytest.raises(InputError) as error:
        train(run)
    assert "try a lower learning_rate" in str(error.value) and "\n" not in str(error.value)
    assert not run.is_finished() and not (run.folder / "last.pt").exists()


def test_a_network_that_diverges_in_the_last_step_of_an_epoch_is_not_kept(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(nb, "learning_rate", lambda step, *rest: 1e-3 if step < 5 else 1e38)
    run = make_run(folder, tmp_path, clip_norm=None)
    with pytest.raises(InputError, match="diverged in epoch 2: try a lower learning_rate"):
        train(run)
    assert len(epochs_in(run.folder / "last.pt")) == 1


# ---------------------------------------------------------------------------------------------------
# Several processes, bfloat16


def train_in_two_processes(folder, root, decoder):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    nb.MICRO_BATCH = 1  # gradients are exchanged once a batch, not once a part
    record_norms(pytest.MonkeyPatch(), root / "norms")
    run = make_run(folder, root, decoder, **DETERMINED)
    asr.train_all(nb.train, [run], True, 2)


@both_decoders
def test_two_processes_learn_what_one_learns(folder, tmp_path, decoder, monkeypatch):
    one, two = (make_run(folder, tmp_path / name, decoder, **DETERMINED) for name in ("one", "two"))
    for run in (one, two):
        run.root.mkdir()
    record_norms(monkeypatch, one.root / "norms")
    train(one)
    assert in_a_child(train_in_two_processes, folder, tmp_path / "two", decoder) == 0
    assert (one.record()["processes"], two.record()["processes"]) == (1, 2)
    norms = [list(map(float, (run.root / "norms").read_text().split())) for run in (one, two)]
    assert len(norms[0]) == 9 and norms[1] == pytest.approx(norms[0], rel=1e-3)
    for ours, expected in zip(two.record()["history"], one.record()["history"], strict=True):
        assert ours["train"] == pytest.approx(expected["train"], rel=2e-4)
        for loss in ("loss", "ctc_loss"):
            assert ours["val"][loss] == pytest.approx(expected["val"][loss], rel=2e-4)
    expected = weights(one)
    for name, value in weights(two).items():
        close(value, expected[name], atol=1e-3)


def test_more_processes_than_a_batch_has_clips_are_refused(folder, tmp_path, monkeypatch):
    run = make_run(folder, tmp_path, batch_size=5)  # twelve clips make batches of four
    monkeypatch.setattr(Accelerator, "num_processes", 5)
    with pytest.raises(InputError, match="5 processes cannot share a batch of 4 clips"):
        train(run)


def train_in_bfloat16(folder, root):
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # Accelerate's own variable, for who wants it
    train(make_run(folder, root, "transformer", **DETERMINED))


def test_bfloat16_learns_nearly_the_same(folder, tmp_path):
    """With the transformer alone: without hardware for it, PyTorch has no LSTM in bfloat16 on a CPU."""
    half, full = (make_run(folder, tmp_path / name, "transformer", **DETERMINED) for name in ("bf16", "no"))
    assert in_a_child(train_in_bfloat16, folder, tmp_path / "bf16") == 0
    train(full)
    assert half.record()["precision"] == "bf16"
    losses = [[entry["train"]["loss"] for entry in run.record()["history"]] for run in (half, full)]
    assert losses[0] == pytest.approx(losses[1], rel=0.03) and losses[0] != losses[1]


# ---------------------------------------------------------------------------------------------------
# Checkpoints of finished runs


KINDS = {"lstm": nb.TextDecoderRecurrent, "transformer": nb.TextDecoderTransformer}


def test_a_model_is_loaded_as_it_was_saved(whole):
    model = nb.load_model(whole.folder / "model.safetensors")
    assert not model.training and isinstance(model.decoder, KINDS[whole.decoder])
    for name, value in weights(whole).items():
        assert torch.equal(model.state_dict()[name], value)


def test_training_goes_on_from_pretrained_weights(whole, folder, tmp_path, monkeypatch):
    path, other = whole.folder / "model.safetensors", make_tones(tmp_path / "others", seed=5)
    corpus = json.loads((other / "corpus.json").read_text())
    (other / "corpus.json").write_text(json.dumps(corpus | {"name": "others"}))
    run = nb.replace(make_run(other, tmp_path / "runs", whole.decoder, epochs=1), pretrained=path)
    for name, value in nb.load_model(path).state_dict().items():  # statistics among them
        assert torch.equal(nb.new_model(run).state_dict()[name], value)
    train(run)
    record, about = run.record(), run_files.load_weights(run.folder / "model.safetensors")[1]
    assert record["pretrained"] == about["pretrained"] == run.origin["pretrained"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert record["pretrained"]["sha256"] == digest and record["pretrained"]["dataset"]["name"] == "tones"
    told = nb.load_model(run.folder / "model.safetensors").about["trained_on"]
    assert told == "tones (SYNTHETIC speech), then others (SYNTHETIC speech)"
    fresh = make_run(other, tmp_path / "runs", whole.decoder, epochs=1)
    assert run.folder != fresh.folder and not fresh.is_finished() and run.is_finished()
    assert record["history"][0]["train"]["loss"] < 0.95 * whole.record()["history"][0]["train"]["loss"]
    assert f"-p pretrained {path}" in nb.replace(run, asked={"pretrained": str(path)}).command
    shutil.copy(path, tmp_path / "moved.safetensors")
    assert nb.replace(run, pretrained=tmp_path / "moved.safetensors").folder != run.folder  # its name is in the record


def test_a_pretrained_network_says_how_it_computes(whole, tmp_path):
    path = whole.folder / "model.safetensors"
    wanted = {name: getattr(whole.settings, name) for name in nb.NETWORK}
    assert nb.network_settings(path) == wanted and wanted["local_kernel"] is not None
    tensors, about = run_files.load_weights(path)
    del about["settings"]["local_kernel"]  # trained before there was a convolution
    run_files.save_weights(tmp_path / "old.safetensors", tensors, about)
    assert nb.network_settings(tmp_path / "old.safetensors") == wanted | {"local_kernel": None}
    with pytest.raises(InputError, match="no such file"):
        nb.network_settings(tmp_path / "gone.safetensors")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block_form": "pre-norm"}, "was trained with other settings: block_form"),
        ({"heads": 1, "n_fft": 512}, "was trained with other settings: n_fft, heads"),
        ({"ctc_weight": 0.0, "guide_weight": 0.0}, "not a network of these settings, or damaged"),
    ],
)
def test_pretrained_weights_of_another_network_are_refused(runs, folder, tmp_path, changes, reason):
    path = runs["lstm"].folder / "model.safetensors"
    assert getattr(runs["lstm"].settings, next(iter(changes))) != next(iter(changes.values()))
    run = nb.replace(make_run(folder, tmp_path, "lstm", **changes), pretrained=path)
    with pytest.raises(InputError) as error:
        train(run)
    assert str(path) in str(error.value) and reason in str(error.value)
    with pytest.raises(InputError, match=r"gone\.safetensors: no such file"):
        _ = nb.replace(run, pretrained=tmp_path / "gone.safetensors").folder


def test_the_other_decoder_and_no_file_are_named(whole, tmp_path):
    other = OTHER[whole.decoder]
    path = whole.folder / "model.safetensors"
    with pytest.raises(InputError) as error:
        nb.load_model(path, other)
    assert str(error.value) == f"{path}: holds the {whole.decoder} decoder, not the {other} decoder"
    with pytest.raises(InputError) as error:
        nb.load_model(tmp_path / "model.safetensors", other)
    assert str(error.value) == f"{tmp_path / 'model.safetensors'}: no such file"


# ---------------------------------------------------------------------------------------------------
# Learning by heart, and recordings


@pytest.fixture(scope="module", params=DECODERS)
def learned(request, folder, tmp_path_factory):
    """A run that knows its twelve clips by heart: an epoch has them twenty times."""
    run = make_run(folder, tmp_path_factory.mktemp("learned"), request.param, **DETERMINED, **BY_HEART)
    splits = run.cache.corpus.splits
    corpus = nb.replace(run.cache.corpus, splits=splits | {"train": splits["train"] * 20})
    run = nb.replace(run, cache=nb.replace(run.cache, corpus=corpus))
    train(run)
    return run


BY_HEART = {"epochs": 5, "batch_size": 6, "width": 32, "label_smoothing": 0.0}
BY_HEART |= {"learning_rate": 5e-3, "warmup_steps": 10}


def test_a_few_clips_are_learned_by_heart(learned):
    history = learned.record()["history"]
    losses = [entry["train"]["loss"] for entry in history]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.1 * losses[0]
    model = nb.load_model(learned.folder / "model.safetensors", learned.decoder)
    clips = learned.cache.clips("train")[:12]
    heard = 5 * 20 * sum(clip.seconds for clip in clips) / 3600
    assert learned.record()["audio_hours"] == pytest.approx(heard, abs=0.01)
    scores = nb.score([clip.text for clip in clips], nb.transcripts(model, clips, learned.cache))
    assert scores["damerau_levenshtein"] > 0.98 and scores["cer"] < 0.03, scores


def test_the_other_ways_of_decoding_read_them_too(learned):
    model = nb.load_model(learned.folder / "model.safetensors", learned.decoder)
    clips = learned.cache.clips("train")[:12]
    written = {"ctc": [], "beam": [], "both": []}
    for clip in clips:
        audio, lengths, _ = nb.collate([clip], learned.cache, model.vectorizer, "cpu")
        written["ctc"] += nb.ctc_transcript(model, audio, lengths)
        found = nb.beam_search(model, audio[0], width=4)
        written["beam"].append(found[0][0])
        written["both"].append(nb.rank_with_ctc(model, audio[0], found))
        places = nb.heard_at(model, clip, learned.cache, clip.text, learned.settings.subsampling * 220 / RATE)
        spoken = 0.1 + 0.11 * (np.arange(len(clip.text)) + 0.4)  # see tone_word
        assert np.abs(places - spoken).max() < 0.12
    for way, tokens in written.items():
        scores = nb.score([clip.text for clip in clips], list(map(model.vectorizer.decode, tokens)))
        assert scores["cer"] < 0.06, (way, scores)
