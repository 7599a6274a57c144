"""The spoken corpus: its sentences, how they are spoken, and the folder they are laid out in."""

import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import soundfile
from conftest import ROOT, tree

from offline_data import speech
from offline_data.speech import LJ_SPEECH_SPLITS, NEW_WORDS, SPEECH_RATE, SPOKEN_SPLITS, SpeechError, words_of

OFFICIAL = ROOT.parent / "shared" / "data" / "ljspeech_transcripts.csv"
FRAME = 880  # samples of an encoder position of the preset `improved`: 40 ms


@pytest.fixture(scope="module")
def sentences():
    return speech.spoken_sentences(seed=0)


@pytest.fixture(scope="module")
def sample(sentences):
    """Every 25th row of the corpus, and what is spoken there."""
    texts = [text for split in sentences.values() for text in split]
    return [(texts[row], speech.spoken_clip(texts[row], 0, row)) for row in range(0, len(texts), 25)]


@pytest.fixture
def transcripts(tmp_path):
    """Twelve rows in LJ Speech's format."""
    lines = [
        "LJ901-0001|Printing began in 1440.|Printing began in fourteen forty.",
        'LJ901-0002|"Well," said he, "why not?"|"Well," said he, "why not?"',
        "LJ901-0003|a café; (and a bar)|a café; (and a bar)",
    ]
    lines += [f"LJ902-{n:04d}|Line No. {n}, as written.|Line number {n}, as spoken." for n in range(1, 10)]
    path = tmp_path / "transcripts.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def small_corpus(sentences):
    """Write the first rows of the corpus: a few seconds of speech."""

    def write(folder, number=6, seed=0, jobs=1):
        rows = [(f"spoken-{n:04d}", text, text) for n, text in enumerate(sentences["train"][:number])]
        speech.write_corpus(folder, "spoken corpus", rows, {"train": (0, number)}, seed, jobs)

    return write


# Sentences


def test_the_splits_have_their_sizes_and_no_sentence_in_common(sentences):
    assert {split: len(texts) for split, texts in sentences.items()} == SPOKEN_SPLITS
    assert 1_500 <= sum(SPOKEN_SPLITS.values()) <= 1_800
    plain = [re.sub(r"[^a-z ]", "", text.lower()) for texts in sentences.values() for text in texts]
    assert len(set(plain)) == len(plain)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_new_words_are_in_one_split_alone_and_all_others_are_in_training(seed):
    words = {split: [set(words_of(text)) for text in texts] for split, texts in speech.spoken_sentences(seed).items()}
    heard = set().union(*words["train"])
    assert heard >= set().union(*words["val"], *words["test"])
    new = set(words_of(" ".join(NEW_WORDS.values())))
    assert not new & heard
    assert all(new & sentence for sentence in words["test_new_words"])
    assert set().union(*words["test_new_words"]) <= heard | new
    assert 60 <= len(new & set().union(*words["test_new_words"])) <= 100
    assert 300 <= len(heard) <= 400


def test_a_seed_gives_the_same_sentences_and_another_seed_others(sentences):
    assert speech.spoken_sentences(seed=0) == sentences
    assert speech.spoken_sentences(seed=1)["train"] != sentences["train"]


def test_every_letter_and_every_word_is_frequent_enough_to_learn(sentences):
    letters = Counter("".join(sentences["train"]).lower())
    assert min(letters[letter] for letter in "abcdefghijklmnopqrstuvwxyz,.?") >= 100
    assert letters["-"] >= 50
    assert set(letters) == set(" ,.?-abcdefghijklmnopqrstuvwxyz")
    words = Counter(word for text in sentences["train"] for word in words_of(text))
    assert min(words.values()) >= 2


def test_sentences_look_like_sentences(sentences):
    texts = [text for split in sentences.values() for text in split]
    for text in texts:
        assert re.fullmatch(r"[A-Z][a-z-]*(,? [A-Za-z][a-z-]*)*[.?]", text), text
        assert 10 <= len(text) <= 90
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text
    assert 35 <= np.mean([len(text) for text in texts]) <= 45


def test_no_two_words_sound_alike(sentences):
    """Neither alone nor in a sentence, where `the` and `to` change with the word that follows; stress aside."""
    spelt, texts = {}, [text for split in sentences.values() for text in split]
    words = {word for text in texts for word in words_of(text)} | set(words_of(" ".join(NEW_WORDS.values())))
    for text in [*texts, *sorted(words)]:
        phonemes = re.sub("[ˈˌ.,?]", "", " ".join(speech.voice().phonemize(text))).split()
        for sound, word in zip(phonemes, words_of(text), strict=True):
            assert spelt.setdefault(sound, word) == word
    assert len(set(spelt.values())) == len(words) > 450


# Speech


@pytest.fixture
def plain(monkeypatch):
    """Fix what varies: plain(RATES=1.0, ...) speaks a text without room, tilt, noise and padding, but for these."""

    def speak(text, row=0, **fixed):
        quiet = {"ROOM_LEVEL": -99.0, "TILTS": 0.0, "NOISE": 99.0, "PADDING": 0.0, "RATES": 1.0, "SHIFTS": 53}
        for name, value in (quiet | fixed).items():
            monkeypatch.setattr(speech, name, value if isinstance(value, tuple) else (value, value))
        return speech.spoken_clip(text, 0, row)

    return speak


def decibels(samples) -> float:
    return 10 * np.log10(np.mean(np.square(samples, dtype=float)) / 32_767**2)


def pitch(samples) -> float:
    """The median fundamental of the loud windows of 46 ms, by autocorrelation, Hz."""
    windows = samples[: samples.size // 1024 * 1024].reshape(-1, 1024).astype(float)
    windows = windows[np.std(windows, axis=1) > np.std(samples)]
    power = np.abs(np.fft.rfft(windows, 2048)) ** 2
    return float(np.median(SPEECH_RATE / (60 + np.fft.irfft(power)[:, 60:200].argmax(axis=1))))


TEXT = "The young queen wandered along the road."


def test_a_row_has_its_samples_whatever_was_spoken_before():
    first = speech.spoken_clip(TEXT, 0, 5)
    assert first.dtype == np.int16 and first.ndim == 1 and 1.5 < first.size / SPEECH_RATE < 5
    speech.spoken_clip("Is it quite cold, or only damp?", 3, 6)
    np.testing.assert_array_equal(speech.spoken_clip(TEXT, 0, 5), first)


def test_another_row_or_seed_is_another_voice():
    clips = [speech.spoken_clip(TEXT, seed, row) for seed, row in [(0, row) for row in range(12)] + [(1, 0), (2, 0)]]
    assert len({clip.size for clip in clips}) == len(clips)
    pitches, levels = [pitch(clip) for clip in clips], [decibels(clip) for clip in clips]
    assert 1.12 < max(pitches) / min(pitches) < 1.4 and max(levels) - min(levels) > 6


def test_the_rate_changes_the_duration_and_not_the_pitch(plain, sentences):
    """Over several sentences: the voice rounds the durations of its sounds, and so misses a rate by up to a tenth."""
    slow, normal, fast = ([plain(text, RATES=r) for text in sentences["train"][:9]] for r in (0.85, 1.0, 1.15))
    long, middle, short = (sum(clip.size for clip in clips) for clips in (slow, normal, fast))
    assert long / middle == pytest.approx(1 / 0.85, rel=0.1) and short / middle == pytest.approx(1 / 1.15, rel=0.1)
    assert np.median([pitch(a) / pitch(b) for a, b in zip(slow, fast, strict=True)]) == pytest.approx(1, abs=0.03)


def test_the_shift_changes_the_pitch_and_hardly_the_duration(plain, sentences):
    low, high = ([plain(text, SHIFTS=shift) for text in sentences["train"][:9]] for shift in (47, 60))
    assert np.median([pitch(b) / pitch(a) for a, b in zip(low, high, strict=True)]) == pytest.approx(60 / 47, rel=0.03)
    assert sum(clip.size for clip in low) == pytest.approx(sum(clip.size for clip in high), rel=0.2)


def test_silence_before_and_after_lasts_as_long_as_stated(plain):
    bare, padded = plain(TEXT), plain(TEXT, PADDING=0.15)
    assert padded.size == bare.size + 2 * int(0.15 * SPEECH_RATE)
    assert np.abs(padded[:3000]).max() <= 3


def test_the_noise_lies_as_far_below_as_stated(plain):
    """White or pink: the same clip without noise is taken away."""
    flat = []
    for row, level in enumerate([20.0, 30.0, 45.0] * 2):
        noise = plain(TEXT, row, NOISE=level, LEVELS=-20.0) - plain(TEXT, row, LEVELS=-20.0).astype(float)
        assert -20 - decibels(noise) == pytest.approx(level, abs=1)
        power = np.abs(np.fft.rfft(noise)) ** 2
        flat.append(power[: power.size // 8].mean() / power.mean() < 2)
    assert 0 < sum(flat) < len(flat)


def test_the_room_fades_and_the_tilt_is_steady():
    for seed in range(5):
        response = speech.room_response(np.random.default_rng(seed))
        assert response[0] == 1 and 0.1 <= response.size / SPEECH_RATE <= 0.5
        assert -25.5 < 10 * np.log10(np.sum(response[1:] ** 2)) < -7.5
        begin, end = np.array_split(response[1:], 10)[::9]
        assert 10 * np.log10(np.mean(begin**2) / np.mean(end**2)) == pytest.approx(54, abs=2)
    white = np.random.default_rng(0).standard_normal(2**17).astype(np.float32)
    for tilt in (-3.0, 2.0):
        power = np.abs(np.fft.rfft(speech.coloured(white, np.ones(1, np.float32), tilt))) ** 2
        low, high = (power[int(hz / SPEECH_RATE * 2**17) :][:5000].mean() for hz in (1000, 8000))
        assert 10 * np.log10(high / low) == pytest.approx(tilt * np.log2(8.42 / 1.42), abs=0.5)


def test_levels_are_those_stated_and_nothing_is_clipped(sample):
    levels = [decibels(clip) for _, clip in sample]
    assert min(levels) > -32.1 and max(levels) < -19.9 and np.ptp(levels) > 9
    assert np.mean([np.mean(np.abs(clip.astype(int)) >= 32_767) for _, clip in sample]) < 1e-5
    assert all(clip.dtype == np.int16 and abs(clip.mean()) < 0.1 * clip.std() for _, clip in sample)
    assert len({clip.size for _, clip in sample}) > 0.9 * len(sample)


def test_every_clip_has_room_for_ctc(sample):
    for text, clip in sample:
        repeats = sum(a == b for a, b in zip(text.lower(), text.lower()[1:], strict=False))
        assert clip.size // FRAME >= len(text) + repeats, text
    characters, seconds = sum(len(text) for text, _ in sample), sum(clip.size for _, clip in sample) / SPEECH_RATE
    assert 14 < characters / seconds < 19


def test_the_corpus_lasts_about_the_hours_it_should(sample):
    seconds = np.mean([clip.size for _, clip in sample]) / SPEECH_RATE
    assert 1.0 <= seconds * sum(SPOKEN_SPLITS.values()) / 3600 <= 1.4


@pytest.mark.parametrize("text", ["...", "?!", "\U0001f642", "", " ", "\u4f60\u597d"])
def test_a_text_without_sound_is_named(text):
    with pytest.raises(SpeechError, match=re.escape(f"{text!r} has no sound")):
        speech.spoken_clip(text, 0, 0)


def test_long_texts_are_spoken_or_named():
    assert 5 < speech.spoken_clip("word " * 40, 0, 0).size / SPEECH_RATE < 20
    assert speech.spoken_clip("x" * 200, 0, 0).any()
    with pytest.raises(SpeechError, match=r"^'1{40}' cannot be spoken \(.*\)$"):
        speech.spoken_clip("1" * 200, 0, 0)


@pytest.fixture
def no_voice_yet():
    speech.voice.cache_clear(), speech.other_voices.cache_clear()
    yield
    speech.voice.cache_clear(), speech.other_voices.cache_clear()


def test_a_missing_voice_is_named(no_voice_yet, tmp_path, small_corpus, monkeypatch):
    import hibari

    def fail(*_, **__):
        raise RuntimeError("no such\nfile")

    with monkeypatch.context() as patch:
        patch.setattr(hibari, "Hibari", fail)
        with pytest.raises(
            SpeechError, match=r"^the voice is missing: RuntimeError: no such file \(pip install hibari"
        ):
            speech.spoken_clip("Hello.", 0, 0)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "hibari", None)
        with pytest.raises(SpeechError, match=r"^the voice is missing: .*pip install hibari-tts"):
            small_corpus(tmp_path / "spoken")
    monkeypatch.setattr(speech, "version", lambda name: (_ for _ in ()).throw(PackageNotFoundError(name)))
    with pytest.raises(SpeechError, match="the voice is missing: pip install hibari-tts"):
        small_corpus(tmp_path / "spoken")
    assert not (tmp_path / "spoken").exists()
    monkeypatch.setitem(sys.modules, "py_nanotts", None)
    with pytest.raises(SpeechError, match=r"^the second voice is missing: .*pip install py-nanotts"):
        for row in range(20):  # three in ten of these speak with it
            speech.spoken_clip("Hello.", 0, row, wide=True)


def test_questions_about_scans_do_not_load_the_voice():
    code = "import sys, offline_data.phantoms; sys.exit(not {'hibari', 'soundfile'}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# The folder


def test_the_same_seed_makes_the_same_bytes_in_any_number_of_processes(tmp_path, small_corpus):
    small_corpus(tmp_path / "one", jobs=1)
    small_corpus(tmp_path / "two", jobs=2)
    small_corpus(tmp_path / "other", seed=1)
    one = tree(tmp_path / "one")
    assert len(one) == 8
    assert one == tree(tmp_path / "two")
    assert one["wavs/spoken-0003.wav"] != tree(tmp_path / "other")["wavs/spoken-0003.wav"]


def test_the_layout_is_that_of_lj_speech(tmp_path, sentences, monkeypatch):
    small = {split: texts[:3] for split, texts in sentences.items()}
    monkeypatch.setattr(speech, "spoken_sentences", lambda seed: small)
    folder = tmp_path / "made" / "spoken"
    speech.make_spoken_corpus(folder, seed=3, jobs=1)
    rows = [line.split("|") for line in (folder / "metadata.csv").read_bytes().decode().removesuffix("\n").split("\n")]
    assert [row[1] for row in rows] == [row[2] for row in rows] == [text for split in small.values() for text in split]
    assert {path.stem for path in (folder / "wavs").iterdir()} == {row[0] for row in rows}
    seconds = 0.0
    for identity, *_ in rows:
        info = soundfile.info(folder / "wavs" / f"{identity}.wav")
        assert (info.samplerate, info.channels, info.subtype) == (SPEECH_RATE, 1, "PCM_16")
        seconds += info.duration
    record = json.loads((folder / "corpus.json").read_text())
    assert record["name"] == "spoken corpus" and record["kind"] == "spoken" and record["seed"] == 3
    assert re.fullmatch(r"hibari-tts [\d.]+, heart", record["voice"])
    assert record["splits"] == {"train": [0, 3], "val": [3, 6], "test": [6, 9], "test_new_words": [9, 12]}
    assert record["hours"] == pytest.approx(seconds / 3600, abs=1e-3)


def test_what_is_there_is_never_overwritten(tmp_path, small_corpus, monkeypatch):
    folder = tmp_path / "spoken"
    small_corpus(folder)
    before = tree(folder)
    (folder / "wavs" / "spoken-0000.wav").write_bytes(b"mine")
    small_corpus(folder)  # the same corpus: nothing to do
    assert (folder / "wavs" / "spoken-0000.wav").read_bytes() == b"mine"
    with pytest.raises(FileExistsError, match="holds something else"):
        small_corpus(folder, seed=1)
    assert tree(folder).keys() == before.keys()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileExistsError):
        small_corpus(tmp_path / "empty")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b"\xff",
        b"[" * 10**6,
        b'{"name": ' + b"9" * 10_000 + b"}",
        b"NaN",
        b'{"seed": 1e999}',
    ],
)
def test_a_damaged_record_is_no_corpus_and_gives_one_line(tmp_path, transcripts, capsys, content):
    folder = tmp_path / "spoken"
    folder.mkdir()
    (folder / "corpus.json").write_bytes(content)
    assert not speech.holds(folder, {"name": "spoken corpus"})
    assert speech.main(["-transcripts", str(transcripts), "-out", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "holds something else" in said and said.count("\n") == 1


def test_a_record_or_lock_that_is_no_file_gives_one_line(tmp_path, transcripts, capsys):
    for make in (os.mkfifo, os.mkdir):
        folder = tmp_path / f"spoken-{make.__name__}"
        folder.mkdir()
        make(folder / "corpus.json")
        assert not speech.holds(folder, {"name": "spoken corpus"})
    (tmp_path / ".new.lock").mkdir()
    assert speech.main(["-transcripts", str(transcripts), "-out", str(tmp_path / "new")]) == 2
    said = capsys.readouterr().err
    assert ".new.lock" in said and said.count("\n") == 1


def test_a_process_that_is_killed_gives_one_line(tmp_path, small_corpus, monkeypatch):
    monkeypatch.setattr(speech, "write_clip", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(SpeechError, match="a process that spoke was killed: try fewer -jobs") as error:
        small_corpus(tmp_path / "spoken", jobs=2)
    assert "\n" not in str(error.value)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_progress_is_one_line_and_nothing_where_nobody_watches(tmp_path):
    (tmp_path / "metadata.csv").write_text("a|one|one\nb|two|two\n")

    def speak(name, jobs, **options):
        command = [sys.executable, "-m", "offline_data.speech", "-transcripts", tmp_path / "metadata.csv"]
        return subprocess.run([*command, "-out", tmp_path / name, "-jobs", jobs], cwd=ROOT, check=True, **options)

    done = speak("unseen", "2", capture_output=True)
    assert done.stdout == done.stderr == b""
    watched, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    speak("seen", "1", stdout=terminal, stderr=terminal)
    os.close(terminal)
    line, rest = os.read(watched, 99_999).decode().split("\n")
    assert "LJ Speech texts, spoken: 100%" in line and rest == ""


def test_two_that_want_the_same_folder_make_it_once(tmp_path, small_corpus):
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(small_corpus, tmp_path / "spoken") for _ in range(2)]:
            done.result()
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == ["spoken"]


def test_a_killed_run_leaves_nothing_that_passes_as_complete(tmp_path, small_corpus):
    command = [sys.executable, "-m", "offline_data.speech", "-out", tmp_path / "spoken", "-jobs", "1"]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".spoken.part-*/wavs/*.wav")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert list(tmp_path.glob(".spoken.part-*/wavs/*.wav"))
    assert not (tmp_path / "spoken").exists()
    small_corpus(tmp_path / "spoken", 2)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == ["spoken"]
    assert len(tree(tmp_path / "spoken")) == 4


def test_a_full_disk_gives_one_line_and_leaves_nothing(tmp_path, transcripts, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # bytes a file, of this process
    try:
        assert speech.main(["-transcripts", str(transcripts), "-out", str(tmp_path / "out"), "-jobs", "1"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert "File too large" in said and said.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"transcripts.csv", ".out.lock"}


# Given transcripts


def test_transcripts_keep_rows_and_ids(tmp_path, transcripts):
    folder = tmp_path / "lj"
    assert speech.main(["-transcripts", str(transcripts), "-out", str(folder), "-jobs", "1"]) == 0
    assert (folder / "metadata.csv").read_bytes() == transcripts.read_bytes()
    identities = [line.split("|")[0] for line in transcripts.read_text(encoding="utf-8").splitlines()]
    assert sorted(path.stem for path in (folder / "wavs").iterdir()) == sorted(identities)
    record = json.loads((folder / "corpus.json").read_text())
    assert record["name"] == "LJ Speech texts, spoken" and record["clips"] == 12
    assert record["splits"] == {"train": [0, 9], "val": [9, 9], "test": [9, 12]}
    # the third column is what is spoken
    samples, _ = soundfile.read(folder / "wavs" / "LJ902-0007.wav", dtype="int16")  # of the test split
    assert np.array_equal(samples, speech.spoken_clip("Line number 7, as spoken.", 0, 9))


def test_training_texts_are_spoken_in_more_voices_than_the_texts_of_a_test(tmp_path, monkeypatch):
    kept, path = {}, tmp_path / "metadata.csv"
    path.write_text("".join(f"A-{n:02d}|a|a\n" for n in range(20)))
    monkeypatch.setattr(speech, "write_clip", lambda path, text, seed, row, wide: kept.update({row: wide}) or 1)
    speech.speak_transcripts(path, tmp_path / "out", jobs=1)
    assert [kept[row] for row in range(20)] == [True] * 15 + [False] * 5
    assert "py-nanotts" in json.loads((tmp_path / "out" / "corpus.json").read_text())["voice"]


def test_wide_clips_have_other_voices_and_limited_bands():
    def top(samples):  # the frequency below which 99.9 % of the power lies, Hz
        power = np.abs(np.fft.rfft(samples)) ** 2
        return np.searchsorted(np.cumsum(power), 0.999 * power.sum()) * speech.SPEECH_RATE / len(samples)

    spoken = []
    with pytest.MonkeyPatch.context() as patch:
        genuine = speech.other_voices()
        patch.setattr(speech, "other_voices", lambda: lambda *words: spoken.append(words[1]) or genuine(*words))
        patch.setattr(speech, "NOISE", (80.0, 80.0))
        wide = [speech.spoken_clip("Hello, my old friend.", 0, row, wide=True) for row in range(60)]
    assert set(spoken) == {"en-US", "en-GB"} and 8 <= len(spoken) <= 28  # 18 expected
    assert sum(top(samples) < 4_500 for samples in wide) >= 5 and sum(top(samples) > 5_000 for samples in wide) >= 5


def test_unread_chapters_and_lists_are_left_out_of_training_alone(tmp_path, monkeypatch):
    rows = [f"LJ{chapter:03d}-{n:04d}" for chapter in range(1, 5) for n in range(5)]  # 15 to train on, one, four
    path, other, kept = tmp_path / "metadata.csv", tmp_path / "other.csv", {}
    path.write_text("".join(f"{row}|a|a\n" for row in rows))
    other.write_text("LJ002-0003|a|a\nLJ004-0000|a|a\nLJ004-0004|a|a\n")  # in train, val and test
    monkeypatch.setattr(
        speech, "write_corpus", lambda *args, **about: kept.update(rows=args[2], splits=args[3], **about)
    )
    speech.speak_transcripts(path, tmp_path / "out", unread=["LJ001", "LJ999"])
    assert kept["unread"] == rows[:5] and kept["splits"] == {"train": (0, 10), "val": (10, 11), "test": (11, 15)}
    assert [row[0] for row in kept["rows"]] == rows[5:]
    speech.speak_transcripts(path, tmp_path / "out", unread=["LJ001", str(other)])
    assert kept["unread"] == [*rows[:5], "LJ002-0003", "LJ004-0000"]
    assert kept["splits"] == {"train": (0, 9), "val": (9, 9), "test": (9, 13)} and kept["rows"][-1][0] == "LJ004-0004"
    with pytest.raises(OSError, match=r"gone\.csv"):
        speech.speak_transcripts(path, tmp_path / "out", unread=["gone.csv"])


def test_all_of_lj_speech_has_the_official_splits(tmp_path, monkeypatch):
    path, kept = tmp_path / "metadata.csv", {}
    path.write_text("".join(f"LJ-{n:05d}|a|a\n" for n in range(13_100)))
    monkeypatch.setattr(speech, "write_corpus", lambda *args, **_: kept.update(splits=args[3], rows=args[2]))
    speech.speak_transcripts(path, tmp_path / "out")
    assert kept["splits"] == LJ_SPEECH_SPLITS and len(kept["rows"]) == 13_100


@pytest.mark.skipif(not OFFICIAL.is_file(), reason="the transcripts of LJ Speech are not at hand")
def test_the_transcripts_of_lj_speech_can_be_read():
    assert len(speech.read_metadata(OFFICIAL)) == 13_100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"LJ1-1|one|one\nLJ1-2|two\n", "row 2: 2 columns instead of 3"),
        (b"LJ1-1|one|one\n\nLJ1-2|two|two\n", "row 2: 1 columns instead of 3"),
        (b"LJ1-1|a|b|c\n", "row 1: 4 columns instead of 3"),
        (b"LJ1-1|one|\n", "row 1: LJ1-1 has no text to speak"),
        (b"LJ1-1|one|...\n", "row 1: LJ1-1 has no text to speak"),
        (b"LJ1-1|one|one\nLJ1-1|two|two\n", "row 2: LJ1-1 comes twice"),
        (b"../../etc/x|one|one\n", "row 1: '../../etc/x' cannot name a file"),
        (b"LJ1-1|caf\xe9|caf\xe9\n", "is not UTF-8 text"),
        (b"", "row 1: 1 columns"),
        (None, "No such file"),
    ],
)
def test_bad_metadata_is_one_clear_line(tmp_path, capsys, content, message):
    path, folder = tmp_path / "metadata.csv", tmp_path / "out"
    if content is not None:
        path.write_bytes(content)
    assert speech.main(["-transcripts", str(path), "-out", str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("offline_data.speech: ") and said.count("\n") == 1
    assert str(path) in said and message in said
    assert not folder.exists()


@pytest.mark.parametrize(
    "arguments", [[], ["-out", "x", "-seed", "-1"], ["-out", "x", "-jobs", "0"], ["-out", "x", "-voice", "y"]]
)
def test_bad_arguments_are_one_clear_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        speech.main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_that_is_taken_is_one_clear_line(tmp_path, transcripts, capsys):
    folder = tmp_path / "taken"
    shutil.copytree(transcripts.parent, folder, ignore=shutil.ignore_patterns("taken"))
    assert speech.main(["-transcripts", str(transcripts), "-out", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "holds something else" in said and said.count("\n") == 1
