"""The benchmark of question 3: both ways compute the same, every bar is measured, the record keeps its bars."""

import importlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT
from test_speech_data import make_corpus

import run_notebook

RECORD = ROOT / "results" / "q3" / "bench.json"
DECODERS = ("lstm", "transformer")


@pytest.fixture
def bench(monkeypatch):
    """The benchmark with tiny networks and steps; the notebook's definitions are its own, so nobody else sees them."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    bench = importlib.import_module("bench_q3")
    tiny = {"width": 24, "encoder_blocks": 1, "n_mels": 20, "attention_window": None}
    presets = {name: replace(settings, **tiny) for name, settings in bench.q3.PRESETS.items()}
    monkeypatch.setattr(bench.q3, "PRESETS", presets)
    for name, value in {"TRAINING_BATCH": 3, "TRAINING_BATCHES": 2, "DECODING_CLIPS": 4, "DECODING_BATCH": 3}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "PADDED_FRAMES", 250)
    monkeypatch.setattr(bench, "PADDED_SECONDS", 2)
    monkeypatch.setattr(bench, "LEAST_SECONDS", 0)
    AcceleratorState._reset_state(reset_partial_state=True)  # another test may have asked for another precision
    yield bench
    AcceleratorState._reset_state(reset_partial_state=True)


def make_model(bench, decoder, stop_bias=0.0):
    torch.manual_seed(3)
    model = bench.q3.SpeechToText(decoder, bench.q3.PRESETS["improved"]).eval()
    with torch.no_grad():
        model.decoder.output.weight.mul_(3)  # clear favourites
        model.decoder.output.bias[bench.q3.TokenVectorizer.STOP] += stop_bias
    return model


def save_checkpoint(bench, path, decoder):
    model = make_model(bench, decoder)
    about = {
        "decoder": decoder,
        "settings": asdict(bench.q3.PRESETS["improved"]),
        "dataset": {"name": "x", "kind": "spoken"},
    }
    about["scores"] = {"test": {"damerau_levenshtein": 0.0, "cer": 1.0}}
    about["heard"] = {"longest_clip": 10.0, "longest_pause": 0.3, "loudness": 0.05}
    bench.runs.save_weights(path, model.state_dict(), about)
    return path


def test_the_skeletons_attention_is_the_notebooks_where_nothing_is_masked(bench):
    torch.manual_seed(0)
    ours, plain = bench.q3.MultiHeadAttention(24, 2), bench.UnmaskedAttention(24, 2)
    plain.load_state_dict(ours.state_dict())
    x, source = torch.randn(2, 5, 24), torch.randn(2, 7, 24)
    everything = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    torch.testing.assert_close(plain(x, source, everything), ours(x, source, everything), atol=1e-5, rtol=0)


@pytest.mark.parametrize("decoder", DECODERS)
def test_both_ways_of_decoding_write_the_same_texts(bench, decoder):
    torch.manual_seed(1)
    lengths = torch.tensor([90, 61, 40, 75, 33, 88])
    audio = 3 * torch.randn(6, 90, 20)
    found = set()
    for stop_bias in (-9.0, 0.5, 1.0, 1.5, 2.0):
        model = make_model(bench, decoder, stop_bias)
        ours = model.generate(audio, lengths, 30)
        found |= {len(tokens) for tokens in ours}
        assert bench.course_generate(model, 200, audio, lengths, 30) == ours
        if decoder == "lstm":
            assert bench.course_generate(model, 200, audio, lengths, 30, keep_state=True) == ours
    assert 30 in found and len(found) > 2  # some never stop, others do at different places


def test_what_follows_a_stop_is_cut_off(bench):
    start, stop = bench.q3.TokenVectorizer.START, bench.q3.TokenVectorizer.STOP
    assert bench.until_stop(torch.tensor([[start, 9, stop, 8], [start, stop, stop, 7], [start, 5, 6, 7]])) == [
        [9],
        [],
        [5, 6, 7],
    ]


def test_the_courses_step_pads_audio_and_text_and_counts_the_pads(bench, tmp_path):
    corpus = bench.utils.load_speech(str(make_corpus(tmp_path / "mine")), tmp_path)
    way = bench.CourseTraining("transformer", corpus.splits["train"][:3], corpus.sample_rate)
    assert way.audio.shape == (3, bench.PADDED_FRAMES, 20) and way.text.shape == (3, 99)
    assert [int((row == 0).all(dim=1).sum()) for row in way.audio] == [181, 179, 178]  # 0.50, 0.51, 0.52 s at hop 160
    assert way.text[0, :8].tolist() == bench.q3.TokenVectorizer().encode("#number")[:-1] and way.text[0, -1] == 0
    before, losses = way.model.decoder.output.weight.clone(), [way() for _ in range(12)]
    assert losses[-1] < losses[0] and not torch.equal(way.model.decoder.output.weight, before)
    with torch.no_grad():
        pads = way.model(way.audio, way.lengths, way.text[:, :-1])[:, -1].argmax(dim=1)
    assert (pads == bench.q3.TokenVectorizer.PAD).all()  # what the loss asks for most


def test_batches_are_spread_over_all_lengths(bench, tmp_path):
    cache = bench.load_speech(str(make_corpus(tmp_path / "mine")), tmp_path)
    (short, long) = bench.choose_batches(cache, 2)
    assert len(short) == len(long) == 3
    assert sum(map(cache.frames, short)) < sum(map(cache.frames, long))
    with pytest.raises(bench.InputError, match="mine: 15 training clips are too few: 9 batches"):
        bench.choose_batches(cache, 9)


def test_the_benchmark_measures_every_bar(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = make_corpus(tmp_path / "mine", seconds=1.2)
    checkpoints = [save_checkpoint(bench, tmp_path / f"{d}.safetensors", d) for d in DECODERS]
    arguments = ["-rounds", 2, "-data", folder, "-checkpoint_data", folder, "-out", "results/bench.json"]
    arguments += ["-data_dir", tmp_path, "-checkpoints", *checkpoints]
    status = bench.main(list(map(str, arguments)))
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "results" / "bench.json").read_text())
    assert [bar["what"] for bar in record["bars"]] == [
        "training, LSTM",
        "training, transformer",
        "decoding, LSTM",
        "decoding, transformer",
    ]
    assert status == (0 if all(bar["kept"] for bar in record["bars"]) else 1)
    assert printed.count("MISSED") == sum(not bar["kept"] for bar in record["bars"])
    assert "DIFFERENT" not in printed and "training, transformer" in printed
    assert {"command", "versions", "git", "date", "threads", "config", "dataset"} <= set(record)
    assert record["dataset"]["training"]["name"] == record["dataset"]["decoding"]["name"] == "mine"
    for part in ("training", "decoding"):
        for d in DECODERS:
            result = record[part][d]
            for clock in ("wall", "cpu"):
                assert all(len(times) == 2 and min(times) > 0 for times in result["rounds"][clock].values())
    assert record["decoding"]["lstm"]["texts_identical"] and record["decoding"]["transformer"]["texts_identical"]
    assert "course, state kept" in record["decoding"]["lstm"]["seconds"]["wall"]

    # Throughput counts speech, not padding.
    training = record["training"]["lstm"]
    seconds = sorted(training["rounds"]["wall"]["ours"])
    rate = training["clips"] * training["mean_clip_seconds"] / (sum(seconds) / 2)
    assert training["speech_seconds_per_second"]["wall"]["ours"] == pytest.approx(rate)


def test_without_finished_runs_it_says_what_to_do(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = make_corpus(tmp_path / "mine")
    assert bench.main(["-data", str(folder), "-checkpoint_data", str(folder)]) == 2
    assert capsys.readouterr().err == (
        "bench_q3.py: no finished runs on mine in runs/q3: run `make q3` on them first\n"
    )


def test_a_checkpoint_of_the_other_decoder_is_refused(bench, tmp_path, capsys):
    folder = make_corpus(tmp_path / "mine")
    path = save_checkpoint(bench, tmp_path / "lstm.safetensors", "lstm")
    arguments = ["-data", folder, "-checkpoint_data", folder, "-data_dir", tmp_path, "-checkpoints", path, path]
    assert bench.main(list(map(str, arguments))) == 2
    assert "holds the lstm decoder, not the transformer decoder" in capsys.readouterr().err


@pytest.mark.skipif(not RECORD.exists(), reason="not recorded yet")
def test_the_record_keeps_its_bars():
    """The bars are those of the benchmark itself; here they stand again, so that loosening one is noticed."""
    record = json.loads(RECORD.read_text())
    assert record["threads"] == 1 and record["config"]["dtype"] == "float32" and record["config"]["rounds"] >= 3
    assert record["dataset"]["training"]["kind"] == "real" and record["dataset"]["decoding"]["kind"] == "spoken"
    for d in DECODERS:
        training, decoding = record["training"][d], record["decoding"][d]
        assert training["ratio_wall"]["course"] >= 12
        assert decoding["ratio_wall"]["course"] >= 15
        assert decoding["texts_identical"] and decoding["stopped"] == decoding["clips"] >= 32
        assert decoding["steps"] >= 98


# ---------------------------------------------------------------------------------------------------
# Whole runs


@pytest.mark.parametrize(("minutes", "difference", "status"), [(9.0, 1e-5, 0), (11.0, 1e-5, 1), (9.0, 0.01, 1)])
def test_whole_runs_are_timed_and_compared(tmp_path, monkeypatch, minutes, difference, status):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    run_q3 = importlib.import_module("run_q3")
    clock, notebooks = [0.0], []

    def run(command, check):
        words = list(map(str, command))
        clock[0] += 60 * minutes
        assert words[1] == str(ROOT / "run_notebook.py")
        options = run_notebook.parse_arguments(words[2:])
        given = run_notebook.read_parameters(options)
        folder, processes = Path(given["runs_dir"]), given.get("processes", 1)
        assert options.out == folder and not folder.exists() and not Path(given["data_dir"]).exists()
        notebooks.append(given)
        for decoder in given.get("decoders", "lstm transformer").split():
            record = {"config": {"decoder": decoder}, "processes": processes, "seconds": 200.0, "seed": 42}
            record |= {"dataset": {"name": "spoken corpus"}, "device": "cpu", "threads": 1}
            losses = [2.0, 1.0 + difference * (processes - 1)]
            record |= {"history": [{"train": {"loss": loss}} for loss in losses], "test": {"damerau_levenshtein": 0.9}}
            (folder / decoder).mkdir(parents=True)
            (folder / decoder / "record.json").write_text(json.dumps(record))

    monkeypatch.setattr(run_q3.subprocess, "run", run)
    monkeypatch.setattr(run_q3.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(run_q3.runs, "run_environment", dict)
    monkeypatch.setattr(sys, "argv", ["run_q3.py", "-out", str(tmp_path / "run.json")])
    assert run_q3.main() == status
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["seconds"] == pytest.approx(60 * minutes) and set(record["training_seconds"]) == set(DECODERS)
    assert record["one_and_two"]["train_loss"]["1"] == [2.0, 1.0]
    assert record["one_and_two"]["relative_difference"] == pytest.approx(difference, rel=0.02)
    assert [n.get("processes") for n in notebooks] == [None, 1, 2]
    assert {n["data"] for n in notebooks} == {"spoken"} and len({n["data_dir"] for n in notebooks}) == 1


RUN_RECORD = ROOT / "results" / "q3" / "run.json"


@pytest.mark.skipif(not RUN_RECORD.exists(), reason="not recorded yet")
def test_the_record_of_a_whole_run_keeps_its_bars():
    record = json.loads(RUN_RECORD.read_text())
    assert record["seconds"] <= 600 and record["dataset"]["kind"] == "spoken" and record["hardware"]["cpus"] == 2
    assert min(record["damerau_levenshtein"].values()) >= 0.95
    assert record["one_and_two"]["relative_difference"] <= 1e-3
