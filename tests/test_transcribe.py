"""transcribe.py and the notebook's transcript_of: recordings of any kind, damaged ones, the networks in weights/."""

import contextlib
import importlib
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from rapidfuzz.distance import Levenshtein
from scipy import signal
from test_q3_models import RATE, STOP_BIAS, nb, network, talkative
from test_q3_training import BY_HEART, DETERMINED, features, make_run, make_tones, small, train

import asr
import runs as run_files
import utils
from utils import InputError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tones(tmp_path_factory.mktemp("recordings") / "tones")


@pytest.fixture(scope="module")
def learned(folder, tmp_path_factory):
    """A run that knows its twelve clips by heart: an epoch has them twenty times."""
    run = make_run(folder, tmp_path_factory.mktemp("learned"), "lstm", **DETERMINED, **BY_HEART)
    splits = run.cache.corpus.splits
    corpus = nb.replace(run.cache.corpus, splits=splits | {"train": splits["train"] * 20})
    run = nb.replace(run, cache=nb.replace(run.cache, corpus=corpus))
    train(run)
    return run


@pytest.fixture
def model(learned):
    return nb.load_model(learned.folder / "model.safetensors")


@pytest.fixture(autouse=True)
def trusting(monkeypatch):
    """Untrained networks are asked as well, whose decoder and CTC never agree."""
    monkeypatch.setattr(nb, "MIN_AGREEMENT", 0.0)


def listening(model, longest_clip=10.0, longest_pause=0.3):
    """A network that says what it has heard, as `load_model` gives it."""
    heard = {"longest_clip": longest_clip, "longest_pause": longest_pause, "loudness": 0.05}
    model.about = {"heard": heard}
    return model


# ---------------------------------------------------------------------------------------------------
# What a person would hear

FILES = {
    "as it was": (RATE, 1, "wav", "PCM_16"),
    "stereo, 48 kHz": (48_000, 2, "wav", "PCM_16"),
    "float, 44.1 kHz": (44_100, 1, "wav", "FLOAT"),
    "FLAC, six channels": (RATE, 6, "flac", "PCM_24"),
    "MP3": (44_100, 2, "mp3", "MPEG_LAYER_III"),
    "Ogg": (48_000, 1, "ogg", "VORBIS"),
    "telephone": (8_000, 1, "wav", "PCM_16"),
}


@pytest.mark.parametrize("kind", FILES)
def test_recordings_of_any_kind_are_transcribed(learned, model, tmp_path, kind, monkeypatch):
    rate, channels, suffix, subtype = FILES[kind]
    genuine, heard = nb.best_text, []
    monkeypatch.setattr(nb, "best_text", lambda model, audio: heard.append(audio) or genuine(model, audio))
    right = 0
    for clip in learned.cache.clips("train")[:4]:
        samples, _ = utils.read_wav(clip.path, rate)
        path = tmp_path / f"{clip.id}.{suffix}"
        soundfile.write(path, np.stack([samples] * channels, axis=1), rate, subtype=subtype)
        with contextlib.suppress(InputError):  # a telephone's sound may hold nothing that it knows
            right += nb.transcript_of(path, model) == clip.text
        (audio,) = heard
        heard.clear()
        assert abs(len(audio) - learned.cache.frames(clip)) <= (12 if kind == "MP3" else 1)  # it pads
        assert audio.shape[1] == 24
    assert right == 4 or kind == "telephone"  # where the upper half of the spectrum is missing


SPOILT = {
    "12 dB weaker": lambda x: x * 10**-0.6,
    "30 dB weaker": lambda x: x * 10**-1.5,
    "60 dB weaker": lambda x: x * 1e-3,
    "12 dB louder, and not cut": lambda x: x * 4,
    "turned over": lambda x: -x,
    "a constant added": lambda x: x + 0.3,
    "one channel inverted": lambda x: np.stack([x, -x], axis=1),
    "one channel silent": lambda x: np.stack([np.zeros_like(x), x], axis=1),
    "one channel weaker, and noise": lambda x: np.stack(
        [x, 0.003 * np.random.default_rng(0).normal(size=len(x))], axis=1
    ),
    "constants of opposite signs": lambda x: np.stack([x + 0.5, x - 0.5], axis=1),
}


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("normalise", [True, False])
def test_what_does_not_change_the_words_does_not_change_the_text(learned, model, tmp_path, how, normalise, monkeypatch):
    model.settings = nb.replace(model.settings, normalise_clips=normalise)
    frames, texts, genuine = [], [], nb.best_text
    monkeypatch.setattr(nb, "best_text", lambda model, audio: frames.append(audio) or genuine(model, audio))
    clip = learned.cache.clips("train")[0]
    samples, _ = utils.read_wav(clip.path, RATE)
    for name, content in (("as it was", samples), ("spoilt", SPOILT[how](samples))):
        soundfile.write(tmp_path / f"{name}.wav", content, RATE, "FLOAT")
        texts.append(nb.transcript_of(tmp_path / f"{name}.wav", model))
    assert texts[0] == texts[1] and (texts[0] == clip.text or normalise != learned.settings.normalise_clips)
    assert (frames[0] - frames[1]).abs().max() < 2e-2


TIME = np.arange(20 * RATE) / RATE
RUMBLES = {
    "hum": lambda x: 0.1 * x + 0.5 * np.sin(2 * np.pi * 50 * TIME[: len(x)]),
    "an offset that jumps": lambda x: x + np.where(TIME[: len(x)] > len(x) / RATE / 2, 0.4, -0.4),
    "hum in a channel of its own": lambda x: np.stack([0.9 * np.sin(2 * np.pi * 50 * TIME[: len(x)]), 0.1 * x], axis=1),
    "hum, and two inverted channels": lambda x: np.stack([np.sin(2 * np.pi * 50 * TIME[: len(x)]), x, -x], axis=1),
}


@pytest.mark.parametrize("how", RUMBLES)
def test_what_lies_below_a_voice_does_not_change_the_text(learned, model, tmp_path, how):
    clip = learned.cache.clips("train")[0]
    soundfile.write(tmp_path / "rumble.wav", RUMBLES[how](utils.read_wav(clip.path, RATE)[0]), RATE, "FLOAT")
    assert nb.transcript_of(tmp_path / "rumble.wav", model) == clip.text


def test_channels_are_mixed_so_that_nobody_is_lost():
    rng = np.random.default_rng(0)
    voice, tone = rng.normal(0, 0.1, RATE).astype("f4"), np.sin(2 * np.pi * 440 * TIME[:RATE]).astype("f4")
    mixed = utils.mix_channels(np.stack([tone, voice, -voice], axis=1))  # each is unlike the strongest channel
    assert abs(np.corrcoef(mixed, voice)[0, 1]) > 0.1
    host, guest = np.tile(voice, 200), np.zeros(200 * RATE, "f4")
    guest[100 * RATE : 101 * RATE], host[100 * RATE : 101 * RATE] = voice, 0  # speaks once, as loud as the other
    mixed = utils.mix_channels(np.stack([host, guest], axis=1))
    assert np.std(mixed[100 * RATE : 101 * RATE]) == pytest.approx(np.std(voice) / 2, rel=0.01)


def test_seldom_speech_in_a_long_recording_is_no_pause():
    samples = 3e-4 * np.random.default_rng(0).normal(size=400 * RATE)
    samples[200 * RATE : 203 * RATE] = 0.1 * np.random.default_rng(1).normal(size=3 * RATE)
    ((first, last),) = asr.split_at_silences(samples.astype("f4"), RATE)
    assert first == pytest.approx(200 * RATE, abs=0.2 * RATE) and last == pytest.approx(203 * RATE, abs=0.2 * RATE)


def test_files_with_odd_codes_and_odd_names_are_read(tmp_path):
    samples, path = 0.1 * np.random.default_rng(0).normal(size=RATE), tmp_path / os.fsdecode(b"caf\xe9.wav")
    with path.open("wb") as file:
        soundfile.write(file, samples, RATE, format="WAV", subtype="GSM610")
    assert len(utils.read_wav(path)[0]) == pytest.approx(RATE, abs=400)


def test_a_clip_is_brought_to_the_loudness_of_the_training_clips(learned):
    heard = nb.load_model(learned.folder / "model.safetensors").about["heard"]
    clips = [utils.read_wav(clip.path, RATE)[0] for clip in learned.cache.clips("train")[:12]]
    assert heard["loudness"] == pytest.approx(np.median([np.sqrt(np.mean(x**2)) for x in clips]), rel=0.05)
    assert heard["longest_clip"] == max(len(x) for x in clips) / RATE
    assert heard["longest_pause"] == max(asr.longest_pause(x, RATE) for x in clips) >= 0.3


def test_sentences_in_a_row_are_transcribed_one_by_one(folder, tmp_path, monkeypatch):
    model, cache = listening(network("lstm"), 1.5), features(folder, small())
    pieces = []
    monkeypatch.setattr(nb, "best_text", lambda model, audio: pieces.append(len(audio)) or [5 + len(pieces)])
    clips = cache.clips("train")
    pause = np.zeros(RATE // 2, np.float32)
    parts = [part for clip in clips for part in (utils.read_wav(clip.path, RATE)[0], pause)]
    soundfile.write(tmp_path / "row.wav", np.concatenate(parts), RATE)
    expected = " ".join(nb.TokenVectorizer.TOKENS[6 + i] for i in range(len(clips)))
    assert nb.transcript_of(tmp_path / "row.wav", model) == expected
    for frames, clip in zip(pieces, clips, strict=True):
        assert abs(frames - cache.frames(clip)) <= 11  # hundredths of a second: the pause's own tenth


def test_a_pause_like_those_in_training_clips_does_not_cut_a_recording(folder, tmp_path, monkeypatch):
    model, cache = network("lstm"), features(folder, small())
    pieces = []
    monkeypatch.setattr(nb, "best_text", lambda model, audio: pieces.append(len(audio)) or [5])
    first, second = (utils.read_wav(clip.path, RATE)[0] for clip in cache.clips("train")[:2])
    samples = np.concatenate([first, np.zeros(RATE // 2, np.float32), second])
    soundfile.write(tmp_path / "comma.wav", samples, RATE)
    pause = asr.longest_pause(samples, RATE)
    assert 0.5 <= pause < 0.75 and asr.longest_pause(first[: RATE // 3], RATE) == 0.3
    nb.transcript_of(tmp_path / "comma.wav", listening(model, 10.0, pause))
    assert pieces == [len(samples) // 220 + 1]
    nb.transcript_of(tmp_path / "comma.wav", listening(model))
    assert len(pieces) == 3


def test_ten_minutes_are_transcribed_in_pieces_and_silent_ones_passed_over(tmp_path, monkeypatch):
    model = listening(talkative("lstm", STOP_BIAS["lstm"]))
    pieces = []

    def spy(model, audio):
        pieces.append(len(audio) / 100)
        return model.generate(audio[None], torch.tensor([len(audio)]), 3)[0]

    monkeypatch.setattr(nb, "best_text", spy)
    rng = np.random.default_rng(0)
    loud = np.repeat(rng.uniform(0.05, 0.3, 4800), 1000) * rng.standard_normal(4_800_000)
    soundfile.write(tmp_path / "long.wav", loud, 8_000, "PCM_16")
    words = nb.transcript_of(tmp_path / "long.wav", model)
    assert sum(pieces) == pytest.approx(600, abs=3) and max(pieces) <= 10.02 and len(pieces) <= 120
    assert isinstance(words, str) and words
    pieces.clear()
    loud[16_000 : 4_800_000 - 16_000] = 0.0  # two seconds at either end are left
    soundfile.write(tmp_path / "pause.wav", loud, 8_000, "PCM_16")
    nb.transcript_of(tmp_path / "pause.wav", model)
    assert len(pieces) == 2


TONE = 0.5 * np.sin(2 * np.pi * 300 * np.arange(RATE) / RATE)
NO_SPEECH = {
    "silence": (np.zeros(30 * RATE), "nothing but silence"),
    "a constant": (np.full(RATE, 0.5), "nothing but silence"),
    "dither": (np.random.default_rng(0).integers(-1, 2, RATE).astype(np.int16), "nothing but silence"),
    "three samples": (TONE[1:4], "too short"),
    "half a tenth of a second": (TONE[: RATE // 20], "too short"),
    "no samples": (np.zeros(0), "holds no samples"),
    "whole numbers as floats": (TONE * 32_768, "divide them by 32,768"),
    "not finite": (np.where(np.arange(RATE) == 99, np.nan, TONE), "no finite numbers"),
    "no sound": ("no sound", "not audio, or damaged"),
    "nothing": ("", "is empty"),
    "no file": (None, "no such file"),
}


@pytest.mark.parametrize("kind", NO_SPEECH)
def test_a_recording_that_cannot_be_transcribed_is_named_in_one_line(tmp_path, kind):
    content, reason = NO_SPEECH[kind]
    path = tmp_path / "my_recording.wav"
    if isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        soundfile.write(path, content, RATE, "PCM_16" if content.dtype == np.int16 else "FLOAT")
    with pytest.raises(InputError) as error:
        nb.transcript_of(path, listening(talkative("lstm", 3.0)))
    message = str(error.value)
    assert message.startswith(str(path)) and reason in message and "\n" not in message


@pytest.fixture(scope="module")
def shipped():
    return nb.load_model(ROOT / "weights" / "q3-lstm.safetensors")


def hum(seconds: float) -> np.ndarray:
    time = np.arange(seconds * RATE) / RATE
    return 0.2 * np.sin(2 * np.pi * 50 * time) + 0.1 * np.sin(2 * np.pi * 150 * time)


NOISES = {
    "white": lambda rng: 0.1 * rng.standard_normal(4 * RATE),
    "faint": lambda rng: 0.001 * rng.standard_normal(4 * RATE),
    "brown": lambda rng: signal.lfilter([0.01], [1, -0.99], rng.standard_normal(4 * RATE)),
    "bursts": lambda rng: 0.2 * rng.standard_normal(4 * RATE) * (np.arange(4 * RATE) // (RATE // 3) % 2),
    "hum": lambda rng: hum(4.0),
    "chord": lambda rng: sum(signal.sawtooth(2 * np.pi * f * np.arange(4 * RATE) / RATE) for f in (262, 330, 392)) / 9,
    "clicks": lambda rng: 0.8 * (rng.random(4 * RATE) < 5 / RATE),
    "alarm": lambda rng: 0.2 * np.sin(2 * np.pi * 440 * TIME) * (np.sin(2 * np.pi * 4 * TIME) > 0),
    "buzzer": lambda rng: 0.1 * signal.sawtooth(2 * np.pi * 300 * TIME) * (np.sin(2 * np.pi * 5 * TIME) > 0),
}


@pytest.mark.parametrize("kind", NOISES)
def test_noise_is_given_no_sentence(shipped, tmp_path, kind, monkeypatch):
    monkeypatch.undo()
    soundfile.write(tmp_path / "noise.wav", NOISES[kind](np.random.default_rng(5)), RATE)
    with pytest.raises(InputError, match=r"noise\.wav: (noise, or a voice|nothing but)"):
        nb.transcript_of(tmp_path / "noise.wav", shipped)


def test_what_is_clear_beside_noise_keeps_its_text(shipped, tmp_path, monkeypatch):
    monkeypatch.undo()
    speech, _ = utils.read_wav(ROOT / "examples" / "LJ050-0270.wav", RATE)
    alone = nb.transcript_of(ROOT / "examples" / "LJ050-0270.wav", shipped)
    pause = np.zeros(2 * RATE)
    soundfile.write(tmp_path / "both.wav", np.concatenate([hum(4.0), pause, speech, pause, hum(3.0), pause]), RATE)
    text = nb.transcript_of(tmp_path / "both.wav", shipped)
    assert re.fullmatch(r"\[unclear\] .{40,} \[unclear\]", text)
    assert Levenshtein.normalized_similarity(text.replace("[unclear]", "").strip(), alone) > 0.6


def test_half_a_file_is_said_to_be_half_a_file(learned, model, tmp_path):
    samples, _ = utils.read_wav(learned.cache.clips("train")[0].path, RATE)
    for suffix in ("wav", "flac", "ogg"):
        path = tmp_path / f"whole.{suffix}"
        soundfile.write(path, samples, RATE)
        half = tmp_path / f"half.{suffix}"
        half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(InputError, match=r"half\.\w+: .*(cut off|damaged)"):
            nb.transcript_of(half, model)


# ---------------------------------------------------------------------------------------------------
# The script


def transcribe(*arguments, **options):
    command = [sys.executable, str(ROOT / "transcribe.py"), *map(str, arguments)]
    options = {"capture_output": True, "text": True, "timeout": 120} | options
    return subprocess.run(command, check=False, **options)


def test_a_line_a_file_and_bad_files_stop_no_others(learned, tmp_path):
    clips = learned.cache.clips("train")[:3]
    names = ["talk.mp3", "my notes.flac", "ünïcode.wav"]
    for clip, name in zip(clips, names, strict=True):
        samples, rate = utils.read_wav(clip.path)
        soundfile.write(tmp_path / name, samples, rate)
    (tmp_path / "memo.m4a").write_bytes(b"\0\0\0\x18ftypM4A " + bytes(200))
    (tmp_path / "odd\nname.mp3").write_bytes(b"\xff\xfb\x90\x00" + np.random.default_rng(0).bytes(50_000))
    weights = learned.folder / "model.safetensors"
    files = names[0], "memo.m4a", names[1], "gone.wav", "odd\nname.mp3", names[2]
    done = transcribe("-weights", weights, *files, cwd=tmp_path)
    assert done.stdout.splitlines() == [clip.text for clip in clips]
    assert done.returncode == 2
    assert "lstm" in done.stderr.lower() and "trained on tones (SYNTHETIC speech)" in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("transcribe: ")]
    assert len(lines) == 4 and "Traceback" not in done.stderr
    assert "ffmpeg -i memo.m4a" in lines[0] and "gone.wav" in lines[1]
    assert "odd?name.mp3" in lines[2] and "3 of 6 files" in lines[3]
    assert len(done.stderr.splitlines()) == 2 + len(files) + len(lines)  # the library for MP3 says nothing of its own
    done = transcribe("-weights", weights, names[0], cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == clips[0].text + "\n"


def test_help_is_quick_and_its_lines_of_python_do_the_same(learned, tmp_path, monkeypatch, capsys):
    listing = "import sys; sys.argv = ['transcribe.py', '-h']; import runpy, atexit; "
    listing += (
        "atexit.register(lambda: print('torch' in sys.modules)); runpy.run_path('transcribe.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("False")  # PyTorch is not imported for it
    lines = re.search(r"\n    import utils\n(?:    .*\n){3}", done.stdout)[0]
    readme = (ROOT / "README.md").read_text()
    assert textwrap.dedent(lines).strip() in readme
    clip = learned.cache.clips("train")[0]
    monkeypatch.chdir(ROOT)
    code = textwrap.dedent(lines).replace("talk.mp3", str(clip.path))
    exec(re.sub(r"weights/[\w-]+\.safetensors", str(learned.folder / "model.safetensors"), code), {})
    assert capsys.readouterr().out == clip.text + "\n"


@pytest.mark.parametrize(
    ("name", "value"),
    [("longest_clip", 0), ("longest_pause", -5), ("loudness", 1e300), ("nan", 1), ("wings", 2)],
)
def test_weights_that_no_training_leaves_are_refused(learned, tmp_path, name, value):
    tensors, about = run_files.load_weights(learned.folder / "model.safetensors")
    if name == "nan":
        tensors["decoder.output.bias"] = tensors["decoder.output.bias"] * torch.nan
    else:
        part = "settings" if name == "wings" else "heard"
        about = about | {part: about[part] | {name: value}}
    run_files.save_weights(tmp_path / "odd.safetensors", tensors, about)
    with pytest.raises(InputError, match=r"odd\.safetensors: ") as error:
        nb.load_model(tmp_path / "odd.safetensors")
    assert "\n" not in str(error.value) and "overrides" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "name recordings"),
        (["-weights", "gone.safetensors", "a.wav"], "gone.safetensors: no such file"),
        (["-weights", "other.safetensors", "a.wav"], "other.safetensors: not a network of this notebook, or damaged"),
        (["-weights", "code.safetensors", "a.wav"], "code.safetensors: not a trained network, or damaged"),
        (["-weights", "q3.safetensors", "-decoder", "transformer", "a.wav"], "not the transformer decoder"),
        (["-weights", "q3.safetensors", "-device", "warp", "a.wav"], "warp"),
        (["-decoder", "transformer", "a.wav"], "no network with the transformer decoder in weights/"),
        (["-export", "b.safetensors", "a.wav"], "name recordings"),
        (["-weights", "q3.safetensors", "-export", "other.safetensors"], "other.safetensors exists"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(learned, tmp_path, arguments, reason, monkeypatch, capsys):
    (tmp_path / "q3.safetensors").write_bytes((learned.folder / "model.safetensors").read_bytes())
    tensors, about = run_files.load_weights(tmp_path / "q3.safetensors")
    run_files.save_weights(tmp_path / "other.safetensors", tensors, {k: about[k] for k in about if k != "heard"})
    torch.save({"run": os.system}, tmp_path / "code.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["transcribe.py"])
    with pytest.raises(SystemExit) as ended:
        sys.exit(importlib.import_module("transcribe").main(arguments))
    told = capsys.readouterr()
    assert ended.value.code == 2 and told.out == ""
    assert reason in told.err and len(told.err.splitlines()) == 1 and told.err.startswith("transcribe")


def test_an_exported_network_has_half_the_size_and_writes_the_same(learned, model, tmp_path):
    whole, half = learned.folder / "model.safetensors", tmp_path / "mine.safetensors"
    assert transcribe("-weights", whole, "-export", half).returncode == 0
    assert half.stat().st_size < 0.7 * whole.stat().st_size
    smaller = nb.load_model(half)
    assert smaller.about == model.about and smaller.settings == model.settings
    for clip in learned.cache.clips("train")[:5]:
        assert nb.transcript_of(clip.path, smaller) == clip.text
    for name, tensor in model.state_dict().items():
        assert torch.allclose(smaller.state_dict()[name], tensor, rtol=2e-3, atol=1e-6), name


# ---------------------------------------------------------------------------------------------------
# The network in weights/

(SHIPPED,) = (ROOT / "weights").glob("q3-*.safetensors")


def recorded():
    """The record of the run that the network in weights/ comes from."""
    about = run_files.load_weights(SHIPPED)[1]
    records = [(path.name, run_files.read_json(path)) for path in (ROOT / "results" / "q3").glob("lj-text-*.json")]
    config = about["settings"] | {"decoder": about["decoder"]}
    alike = [(n, r) for n, r in records if config.items() <= r["config"].items() and r["dataset"] == about["dataset"]]
    ((name, record),) = alike
    return about, name, record


def test_the_network_in_weights_is_the_better_one_of_its_records():
    about, _, record = recorded()
    assert SHIPPED.stat().st_size < 6e6 and SHIPPED.stem == f"q3-{about['decoder']}"
    assert about["scores"] == {split: record[split] for split in ("test", "test_real")}
    assert about["settings"] == {k: record["config"][k] for k in about["settings"]}
    assert about["dataset"]["kind"] == "spoken" and len(about["dataset"]["unread"]) > 500
    others = [run_files.read_json(path) for path in (ROOT / "results" / "q3").glob("lj-text-*.json")]
    assert record["test"]["cer"] == min(other["test"]["cer"] for other in others)
    tensors, _ = run_files.load_weights(SHIPPED)
    assert {t.dtype for t in tensors.values() if t.ndim > 1} == {torch.float16}


def test_the_recording_in_examples_is_written_as_recorded(shipped):
    _, name, _ = recorded()
    done = transcribe(ROOT / "examples" / "LJ050-0270.wav")
    assert done.returncode == 0 and "SYNTHETIC speech" in done.stderr
    details = run_files.read_json(ROOT / "results" / "q3" / "details" / name)
    pair = details["transcripts"]["test_real"]["LJ050-0270"]
    assert pair["said"].rstrip(".") in (ROOT / "examples" / "README.md").read_text().lower()
    samples, rate = utils.read_wav(ROOT / "examples" / "LJ050-0270.wav", utils.SPEECH_RATE)
    features = torch.from_numpy(nb.extractor(rate, shipped.settings)[0](samples, rate))
    greedy = shipped.vectorizer.decode(shipped.generate(features[None], torch.tensor([len(features)]))[0])
    assert nb.score([pair["written"]], [greedy])["cer"] < 0.15  # the network is that of the record, in half precision
    # the script cuts the clip at its pause, and uses a beam
    by_script, as_recorded = (nb.score([pair["said"]], [t])["cer"] for t in (done.stdout.strip(), pair["written"]))
    assert by_script <= as_recorded + 0.05  # on most clips it makes fewer errors, on a single one it may not
