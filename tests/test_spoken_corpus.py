"""The spoken corpus: its sentences, how they are spoken, and the folder they are laid out in."""

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
from conftest import ROOT, tree

from offline_data import speech
from offline_data.speech import LJ_SPEECH_SPLITS, NEW_WORDS, SPEECH_RATE, SPOKEN_SPLITS, SpeechError, words_of

OFFICIAL = ROOT.parent / "shared" / "data" / "ljspeech_transcripts.csv"
FRAME = 4 * 256  # samples between the outputs of a recogniser with hop 256 and 4x subsampling


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
    words = {word for split in sentences.values() for text in split for word in words_of(text)}
    sounds = Counter()
    with speech.espeak("en-us") as library:
        library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        for word in words | set(words_of(" ".join(NEW_WORDS.values()))):
            text = ctypes.c_char_p(word.encode())
            sounds[library.espeak_TextToPhonemes(ctypes.byref(text), 1, 2)] += 1
    assert sounds.most_common(1)[0][1] == 1


# Speech


def test_the_same_text_has_the_same_samples_whatever_was_spoken_before():
    text = "The old sailor waited by the river until the boat came home."
    first = speech.speak(text)
    speech.speak("Is it quite cold, or only damp?", words_per_minute=125, pitch=80, pitch_range=90)
    again = speech.speak(text)
    assert np.array_equal(first, again)
    assert first.dtype == np.int16 and first.ndim == 1
    assert 3 < first.size / SPEECH_RATE < 6
    assert not speech.speak("").any()


def test_pitch_and_rate_do_what_they_say():
    def fundamental(samples):
        power = np.abs(np.fft.rfft(samples, 2**18)) ** 2
        return SPEECH_RATE / (60 + np.fft.irfft(power)[60:400].argmax())

    text = "The young queen wandered along the road."
    low, high = (speech.speak(text, pitch=pitch, pitch_range=0) for pitch in (30, 75))
    assert fundamental(high) > 1.3 * fundamental(low)
    assert speech.speak(text, words_per_minute=110).size > 1.2 * speech.speak(text).size


def test_clips_are_speech_with_a_little_noise(sample):
    for text, clip in sample:
        assert clip.dtype == np.int16
        assert 2_000 < np.abs(clip.astype(int)).max() < 32_767, text  # neither faint nor clipped
        loudness = np.sqrt(
            np.mean(clip.astype(float).reshape(-1)[: clip.size // 256 * 256].reshape(-1, 256) ** 2, axis=1)
        )
        assert 12 < 20 * np.log10(np.sqrt(np.mean(loudness**2)) / max(loudness.min(), 0.5)) < 80, text
    assert len({clip.size for _, clip in sample}) > 0.9 * len(sample)


def test_every_clip_has_room_for_ctc(sample):
    for text, clip in sample:
        repeats = sum(a == b for a, b in zip(text.lower(), text.lower()[1:], strict=False))
        assert clip.size // FRAME >= 1.2 * (len(text) + repeats), text
    characters, seconds = sum(len(text) for text, _ in sample), sum(clip.size for _, clip in sample) / SPEECH_RATE
    assert 12 < characters / seconds < 14.5


def test_the_corpus_lasts_about_the_hours_it_should(sample):
    seconds = np.mean([clip.size for _, clip in sample]) / SPEECH_RATE
    assert 1.0 <= seconds * sum(SPOKEN_SPLITS.values()) / 3600 <= 1.4


def test_more_characters_than_sound_are_made_up_for_by_silence():
    clip = speech.spoken_clip("a" + 60 * ".", 0, 0)
    assert clip.size // FRAME >= 1.2 * 120


def test_what_is_missing_is_said(monkeypatch):
    with pytest.raises(SpeechError, match="has no voice 'en-mars'"):
        speech.speak("Hello.", voice="en-mars")
    import espeakng_loader

    with monkeypatch.context() as patch:
        patch.setattr(espeakng_loader, "get_library_path", lambda: "/nowhere/libespeak-ng.so")
        with pytest.raises(SpeechError, match="pip install espeakng-loader"):
            speech.speak("Hello.")
    with monkeypatch.context() as patch:
        patch.setattr(espeakng_loader, "get_data_path", lambda: "/nowhere/espeak-ng-data")
        with pytest.raises(SpeechError, match="/nowhere/espeak-ng-data"):
            speech.speak("Hello.")
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(SpeechError, match="pip install espeakng-loader"):
        speech.speak("Hello.")


def test_questions_about_scans_do_not_load_espeak():
    code = "import sys, offline_data; sys.exit('espeakng_loader' in sys.modules or 'soundfile' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# The folder


def test_the_same_seed_makes_the_same_bytes_in_any_number_of_processes(tmp_path, small_corpus):
    small_corpus(tmp_path / "one", 12, jobs=1)
    small_corpus(tmp_path / "two", 12, jobs=2)
    small_corpus(tmp_path / "other", 12, seed=1)
    one = tree(tmp_path / "one")
    assert len(one) == 14
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
    assert re.fullmatch(r"espeak-ng [\d.]+, en-us", record["voice"])
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


def test_a_failed_run_leaves_nothing(tmp_path, small_corpus, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(soundfile, "write", full)
    with pytest.raises(OSError, match="no space left"):
        small_corpus(tmp_path / "spoken")
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


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
    samples, _ = soundfile.read(folder / "wavs" / "LJ901-0001.wav", dtype="int16")
    assert np.array_equal(samples, speech.spoken_clip("Printing began in fourteen forty.", 0, 0))


def test_all_of_lj_speech_has_the_official_splits(tmp_path, monkeypatch):
    path, kept = tmp_path / "metadata.csv", {}
    path.write_text("".join(f"LJ-{n:05d}|a|a\n" for n in range(13_100)))
    monkeypatch.setattr(speech, "write_corpus", lambda *args: kept.update(splits=args[3], rows=args[2]))
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
