"""Loading speech: folders, bad rows, the download against local servers, features on disk, notebook cells."""

import hashlib
import inspect
import io
import json
import multiprocessing
import os
import pickle
import re
import signal
import socket
import sys
import tarfile
import threading
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torchaudio.datasets.ljspeech
from conftest import ROOT, tree
from test_oct_data import Handler, Server

import utils
from offline_data import speech
from utils import InputError

RATE = utils.SPEECH_RATE
REAL_CLIPS = ROOT.parent / "shared" / "data" / "LJSpeech-1.1"
REAL_TEXTS = ROOT.parent / "shared" / "data" / "ljspeech_transcripts.csv"
needs_real_clips = pytest.mark.skipif(not REAL_CLIPS.is_dir(), reason="the real clips are not at hand")


def noise(seconds=0.5, seed=0, rate=RATE):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, int(seconds * rate)).astype(np.float32)


def make_corpus(folder: Path, num_clips=20, seconds=0.5) -> Path:
    """A folder in LJ Speech's layout: `num_clips` different clips of noise."""
    (folder / "wavs").mkdir(parents=True)
    rows = [f'C{i:03d}|"No. {i}|"Number {i}, "quoted' for i in range(num_clips)]
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    for i in range(num_clips):
        soundfile.write(folder / "wavs" / f"C{i:03d}.wav", noise(seconds + 0.01 * i, seed=i), RATE)
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_corpus(tmp_path / "mine")


def replace_line(folder: Path, number: int, line: str | bytes) -> None:
    lines = (folder / "metadata.csv").read_bytes().split(b"\n")
    lines[number - 1] = line if isinstance(line, bytes) else line.encode()
    (folder / "metadata.csv").write_bytes(b"\n".join(lines))


# ---------------------------------------------------------------------------------------------------
# Folders


def test_a_folder_is_read_and_split_by_row(folder, capsys):
    corpus = utils.load_speech(str(folder))
    assert (corpus.name, corpus.kind, corpus.sample_rate, corpus.left_out) == ("mine", "real", 22_050, [])
    rows = {split: [clip.row for clip in clips] for split, clips in corpus.splits.items()}
    assert rows == {"train": [*range(15)], "val": [15], "test": [*range(16, 20)]}
    clip = corpus.splits["val"][0]
    assert (clip.id, clip.text, clip.rate) == ("C015", '"Number 15, "quoted', RATE)  # quotes are letters here
    assert clip.path == folder / "wavs" / "C015.wav" and clip.seconds == pytest.approx(0.65, abs=1e-4)
    assert capsys.readouterr().out == ""


def test_the_description_follows_what_is_said_and_heard(folder):
    description = utils.load_speech(str(folder)).description
    assert description["counts"] == {"train": 15, "val": 1, "test": 4} and description["left_out"] == 0
    assert description["hours"]["val"] == pytest.approx(0.65 / 3600, abs=1e-4)
    assert json.loads(json.dumps(description)) == description
    assert utils.load_speech(str(folder)).description == description
    checksums = {description["sha256"]}
    replace_line(folder, 3, "C002|2|another text")
    checksums.add(utils.load_speech(str(folder)).description["sha256"])
    for seconds, seed in ((0.9, 0), (0.9, 1)):  # another duration; then only other samples
        soundfile.write(folder / "wavs" / "C002.wav", noise(seconds, seed), RATE)
        checksums.add(utils.load_speech(str(folder)).description["sha256"])
    assert len(checksums) == 4
    clip = utils.load_speech(str(folder)).splits["train"][2]
    assert clip.sha256 == hashlib.sha256((folder / "wavs" / "C002.wav").read_bytes()).hexdigest()


def test_each_file_is_hashed_once(folder, tmp_path, monkeypatch):
    hashed, checksum = [], utils.file_checksum
    monkeypatch.setattr(utils, "file_checksum", lambda path, kind: hashed.append(path.suffix) or checksum(path, kind))
    for _ in range(2):
        utils.cached_features(utils.load_speech(str(folder)), Extract(), SETTINGS, tmp_path / "data")
    assert hashed.count(".wav") == 2 * 20


def test_the_shares_are_the_official_rows_and_no_split_is_empty(tmp_path):
    def shares(num_rows):
        name, kind, rows, unread = utils.describe_folder(tmp_path, num_rows)
        assert (name, kind, unread) == (tmp_path.name, "real", ())
        return rows

    assert shares(13_100) == {"train": range(9825), "val": range(9825, 10480), "test": range(10480, 13100)}
    for num_rows in range(3, 200):
        rows = shares(num_rows)
        assert list(rows) == ["train", "val", "test"] and all(map(len, rows.values()))
        assert [row for split in rows.values() for row in split] == [*range(num_rows)]


@needs_real_clips
def test_the_real_clips_are_not_taken_for_the_whole(capsys):
    corpus = utils.load_speech(str(REAL_CLIPS))
    assert corpus.name == "LJ Speech, 186 of 13,100 clips" and corpus.kind == "real" and corpus.left_out == []
    assert {split: len(clips) for split, clips in corpus.splits.items()} == {"train": 140, "val": 9, "test": 37}
    assert sum(corpus.description["hours"].values()) == pytest.approx(0.3325, abs=2e-4)
    assert corpus.splits["train"][1].text == "in being comparatively modern."
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(not REAL_TEXTS.is_file(), reason="LJ Speech's texts are not at hand")
def test_every_row_of_the_real_metadata_has_a_transcript(monkeypatch):
    header = SimpleNamespace(frames=6 * RATE, samplerate=RATE)
    monkeypatch.setattr(utils, "open_audio", lambda path: nullcontext(header))
    monkeypatch.setattr(utils, "file_checksum", lambda path, kind: "")
    lines = REAL_TEXTS.read_bytes().splitlines()
    clips = [utils.read_row(Path("lj"), row, line) for row, line in enumerate(lines)]
    assert len(clips) == len({clip.id for clip in clips}) == utils.LJSPEECH_CLIPS
    assert (clips[0].id, clips[-1].id) == ("LJ001-0001", "LJ050-0278")
    assert (min(len(c.text) for c in clips), max(len(c.text) for c in clips)) == (12, 187)


def write_wav(samples, rate=RATE, **options):
    return lambda path: soundfile.write(path, samples, rate, **options)


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flac_stream(path):
    """A FLAC file as a program writes it that cannot go back to its header to say how many samples there are."""
    soundfile.write(path, noise(), RATE, format="FLAC")
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # the number has 36 bits
    content[22:26] = bytes(4)
    path.write_bytes(content)


def set_rate(path, rate):
    soundfile.write(path, noise(), RATE)
    content = bytearray(path.read_bytes())
    content[24:28] = rate.to_bytes(4, "little")
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("line", "spoil", "reason"),
    [
        ("C004|only a text", None, "has 2 columns, not 3"),
        ("C004|a|b|c", None, "has 4 columns, not 3"),
        ("", None, "has 1 columns, not 3"),
        (b"C004|caf\xe9|caf\xe9", None, "is not UTF-8"),
        ("C004|raw only|  ", None, "the transcript of C004 is empty"),
        ("C004|raw|a \x1b[2J text", None, "the transcript of C004 holds control characters"),
        ("|raw|text", None, "id '' names no file in wavs/"),
        ("../C004|raw|text", None, "id '../C004' names no file in wavs/"),
        ("..\\..\\C004|raw|text", None, "names no file in wavs/"),
        ("a/../../C004|raw|text", None, "names no file in wavs/"),
        ("sub/C004|raw|text", None, "names no file in wavs/"),
        ("C\0004|raw|text", None, r"id 'C\x004' names no file in wavs/"),
        ("C\x1b[2J|raw|text", None, r"id 'C\x1b[2J' names no file in wavs/"),
        ("C\u202e4|raw|text", None, r"id 'C\u202e4' names no file in wavs/"),
        ("C" * 9999 + "|raw|text", None, "CCC' names no file in wavs/"),
        ("C001|raw|the same id again", None, "id C001 was there before"),
        ("<script>|raw|text", None, "wavs/<script>.wav: no such file"),
        (None, Path.unlink, "wavs/C004.wav: no such file"),
        (None, lambda path: (path.unlink(), path.mkdir()), "wavs/C004.wav: not a file"),
        (None, lambda path: (path.unlink(), os.mkfifo(path)), "wavs/C004.wav: not a file"),
        (None, lambda path: path.write_bytes(b""), "wavs/C004.wav: is empty"),
        (None, lambda path: path.write_bytes(b"no audio" * 99), "wavs/C004.wav: not audio, or damaged ("),
        (None, lambda path: path.write_bytes(path.read_bytes()[:30]), "wavs/C004.wav: not audio, or damaged ("),
        (None, cut_in_half, "wavs/C004.wav: is cut off: 11,885 of 23,814 bytes are there"),
        (None, write_wav(np.zeros(0)), "wavs/C004.wav: lasts 0.00 s, not 0.1 to 30 s"),
        (None, write_wav(noise(0.05)), "wavs/C004.wav: lasts 0.05 s, not 0.1 to 30 s"),
        (None, write_wav(np.zeros(31 * RATE)), "wavs/C004.wav: lasts 31.00 s, not 0.1 to 30 s"),
        (None, write_wav(np.zeros(600 * 8000), rate=8000), "wavs/C004.wav: lasts 600.00 s"),
        (None, flac_stream, "wavs/C004.wav: does not say how long it is. To convert it: ffmpeg -i "),
        (None, lambda path: set_rate(path, 1), "wavs/C004.wav: is said to have 1 samples a second"),
    ],
)
def test_a_bad_row_gives_one_line_and_the_rest_goes_on(folder, capsys, line, spoil, reason):
    if line is not None:
        replace_line(folder, 5, line)
    if spoil:
        spoil(folder / "wavs" / "C004.wav")
    corpus = utils.load_speech(str(folder))
    assert len(corpus.left_out) == 1 and corpus.description["left_out"] == 1
    rows = [clip.row for clip in corpus.splits["train"]]
    assert rows == [0, 1, 2, 3, *range(5, 15)]  # the others stay where they were
    printed = capsys.readouterr().out.splitlines()
    assert printed == [corpus.left_out[0], "left out: 1 (19 clips are used)"]
    assert printed[0].startswith(f"{folder / 'metadata.csv'} line 5: ") and reason in printed[0]


def test_many_bad_rows_are_counted_and_five_are_printed(folder, capsys):
    for i in range(2, 10):
        (folder / "wavs" / f"C{i:03d}.wav").unlink()
    corpus = utils.load_speech(str(folder))
    assert len(corpus.left_out) == 8
    printed = capsys.readouterr().out.splitlines()
    assert printed == [*corpus.left_out[:5], "... and 3 more", "left out: 8 (12 clips are used)"]


def test_clips_that_are_too_long_are_left_out(folder, monkeypatch):
    monkeypatch.setattr(utils, "MAX_SECONDS", 0.675)
    corpus = utils.load_speech(str(folder))
    assert [clip.row for clip in corpus.splits["test"]] == [16, 17] and len(corpus.left_out) == 2


@pytest.mark.parametrize("ends", ["\r\n", "\n"])
def test_ends_of_lines_and_byte_order_marks_are_no_text(folder, ends):
    text = (folder / "metadata.csv").read_text().replace("\n", ends)
    (folder / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + text.encode().rstrip())
    corpus = utils.load_speech(str(folder))
    assert corpus.left_out == []
    assert (corpus.splits["train"][0].id, corpus.splits["test"][-1].text) == ("C000", '"Number 19, "quoted')


def test_streamed_wavs_and_links_are_used(folder, tmp_path):
    path = folder / "wavs" / "C004.wav"
    streamed = bytearray(path.read_bytes())
    streamed[40:44] = b"\xff\xff\xff\xff"  # what a program writes that cannot know the length yet
    path.write_bytes(streamed)
    (folder / "wavs" / "C005.wav").rename(tmp_path / "elsewhere.wav")
    (folder / "wavs" / "C005.wav").symlink_to(tmp_path / "elsewhere.wav")
    assert utils.load_speech(str(folder)).left_out == []


@pytest.mark.parametrize("missing", ["metadata.csv", "wavs", "both"])
def test_a_folder_of_another_layout_is_named(folder, missing):
    for name in ("metadata.csv", "wavs") if missing == "both" else (missing,):
        (folder / name).rename(folder / f"no-{name}")
    with pytest.raises(InputError, match=r"mine: needs metadata\.csv .* and wavs/<id>\.wav") as error:
        utils.load_speech(str(folder))
    assert "\n" not in str(error.value)


def test_too_little_is_named(folder, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        utils.load_speech(str(tmp_path / "nowhere"))
    (folder / "wavs" / "C015.wav").unlink()
    with pytest.raises(InputError, match="no clip of the val split can be used"):
        utils.load_speech(str(folder))
    for path in (folder / "wavs").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="no clip of the train split can be used"):
        utils.load_speech(str(folder))
    for content, rows in ((b"", 0), (b"a|a|a\nb|b|b", 2)):
        (folder / "metadata.csv").write_bytes(content)
        with pytest.raises(InputError, match=rf"metadata\.csv: has {rows} rows, at least 3 are needed"):
            utils.load_speech(str(folder))


def test_three_clips_are_enough(tmp_path):
    corpus = utils.load_speech(str(make_corpus(tmp_path / "three", num_clips=3)))
    assert [[clip.row for clip in clips] for clips in corpus.splits.values()] == [[0], [1], [2]]


ABOUT = {
    "name": "made",
    "kind": "spoken",
    "splits": {"train": [0, 9], "val": [9, 12], "test": [12, 15], "more": [15, 20]},
}


def test_corpus_json_gives_name_kind_and_splits(folder, capsys):
    (folder / "corpus.json").write_text(json.dumps(ABOUT))
    corpus = utils.load_speech(str(folder))
    assert (corpus.name, corpus.kind) == ("made", "spoken")
    assert corpus.description["counts"] == {"train": 9, "val": 3, "test": 3, "more": 5}
    gap = {"train": [0, 9], "val": [9, 12], "test": [12, 15]}
    (folder / "corpus.json").write_text(json.dumps(ABOUT | {"splits": gap}))
    capsys.readouterr()
    assert utils.load_speech(str(folder)).description["counts"] == {"train": 9, "val": 3, "test": 3}
    assert capsys.readouterr().out == f"{folder}: 5 of 20 clips are in no split of corpus.json: they are not used\n"
    (folder / "corpus.json").write_text(json.dumps({"name": "made", "kind": "spoken"}))
    assert utils.load_speech(str(folder)).description["counts"] == {"train": 15, "val": 1, "test": 4}


# Corpora put together


def test_a_folder_is_tested_on_all_clips_of_another(folder, tmp_path):
    other = make_corpus(tmp_path / "other", 5, 0.8)
    corpus = utils.load_speech(str(folder), also_test=str(other))
    assert corpus.name == "mine, tested on other" and corpus.kind == "real"
    ids = {split: [clip.id for clip in clips] for split, clips in corpus.splits.items()}
    assert ids == {
        "train": [f"C{i:03d}" for i in range(18)],
        "val": ["C018", "C019"],
        "test": [f"C{i:03d}" for i in range(5)],
    }
    assert {clip.path.parent for clip in corpus.splits["test"]} == {other / "wavs"}
    rows = [clip.row for clips in corpus.splits.values() for clip in clips]
    assert len(set(rows)) == len(rows)
    assert corpus.description["sha256"] != utils.load_speech(str(folder)).description["sha256"]


def test_splits_that_are_given_stay_when_another_folder_is_tested_on(folder, tmp_path):
    (folder / "corpus.json").write_text(json.dumps(ABOUT | {"unread": ["LJ001-0001"]}))
    other = make_corpus(tmp_path / "other", 5, 0.8)
    alone, both = (utils.load_speech(str(folder), also_test=name) for name in ("", str(other)))
    assert both.splits.keys() == {*ABOUT["splits"], "test_real"} and len(both.splits["test_real"]) == 5
    assert all(both.splits[split] == alone.splits[split] for split in ABOUT["splits"])
    assert both.description["unread"] == ["LJ001-0001"]


def test_as_many_clips_of_another_corpus_are_mixed_in(folder, tmp_path):
    other = make_corpus(tmp_path / "other", 100, 0.1)  # 75 to train on
    corpus, alone = utils.load_speech(str(folder), mixed_with=str(other)), utils.load_speech(str(folder))
    assert corpus.name == "mine, with 15 clips of other"
    assert corpus.splits["train"][:15] == alone.splits["train"]
    assert [clip.id for clip in corpus.splits["train"][15:]] == [f"C{i:03d}" for i in range(0, 75, 5)]
    assert {clip.path.parent for clip in corpus.splits["train"][15:]} == {other / "wavs"}
    assert all(corpus.splits[split] == alone.splits[split] for split in ("val", "test"))
    few = utils.load_speech(str(other), mixed_with=str(folder))  # which has fewer
    assert len(few.splits["train"]) == 75 + 15


def test_corpora_put_together_have_features_of_their_own(folder, tmp_path):
    other = make_corpus(tmp_path / "other", 5, 0.8)
    extract, data = Extract(), tmp_path / "data"
    alone, both = (utils.load_speech(str(folder), also_test=name) for name in ("", str(other)))
    first = utils.cached_features(alone, extract, SETTINGS, data)
    second = utils.cached_features(both, extract, SETTINGS, data)
    assert first.path != second.path and len(list(data.glob("*.f16"))) == 2
    for clip in both.splits["test"]:
        samples, rate = utils.read_wav(other / "wavs" / f"{clip.id}.wav")
        assert np.array_equal(second[clip], extract(samples, rate).astype(np.float16))
    with pytest.raises(InputError, match="nowhere: no such folder"):
        utils.load_speech(str(folder), also_test=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "about",
    [
        "{",
        "[]",
        ABOUT | {"kind": "phantom"},
        ABOUT | {"name": 3},
        ABOUT | {"name": ""},
        ABOUT | {"name": "x" * 101},
        ABOUT | {"name": "two\nlines"},
        ABOUT | {"name": "\x1b[2J"},
        ABOUT | {"name": "half a pair \ud83d"},
        ABOUT | {"splits": ABOUT["splits"] | {"<b>": [20, 20]}},
        ABOUT | {"unread": ["<b>"]},
        ABOUT | {"unread": [3]},
        ABOUT | {"unread": 3},
        ABOUT | {"splits": ABOUT["splits"] | {"a/b": [20, 20]}},
        ABOUT | {"splits": ABOUT["splits"] | {"a\x1b": [20, 20]}},
        ABOUT | {"splits": ABOUT["splits"] | {"train": [False, 9]}},
        ABOUT | {"splits": ABOUT["splits"] | {"more": [15, 20.0]}},
        ABOUT | {"splits": ABOUT["splits"] | {"more": [15, float("nan")]}},
        "[" * 10**6,
        '{"name": "a", "kind": "real", "splits": {"train": [0, ' + "9" * 10_000 + "]}}",
        {"kind": "spoken"},
        ABOUT | {"splits": {"train": [0, 10], "val": [9, 12], "test": [12, 20]}},
        ABOUT | {"splits": {"train": [0, 9], "val": [9, 12], "test": [12, 21]}},
        ABOUT | {"splits": {"train": [-1, 9], "val": [9, 12], "test": [12, 20]}},
        ABOUT | {"splits": {"train": [9, 0], "val": [9, 12], "test": [12, 20]}},
        ABOUT | {"splits": {"train": [0, 9], "test": [12, 20]}},
        ABOUT | {"splits": {"train": [0], "val": [9, 12], "test": [12, 20]}},
        ABOUT | {"splits": {"train": 3, "val": [9, 12], "test": [12, 20]}},
    ],
)
def test_a_corpus_json_that_does_not_fit_is_named(folder, about):
    (folder / "corpus.json").write_text(about if isinstance(about, str) else json.dumps(about))
    with pytest.raises(InputError, match=r"corpus\.json: not the description of a corpus, or damaged") as error:
        utils.load_speech(str(folder))
    assert str(error.value).isprintable() and len(str(error.value)) < 500


@pytest.mark.parametrize("spoil", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_a_corpus_json_that_is_no_file_is_named(folder, spoil):
    spoil(folder / "corpus.json")
    with pytest.raises(InputError, match=r"corpus\.json: (not a file|no such file)"):
        utils.load_speech(str(folder))


def damaged(content: bytes, number: int) -> bytes:
    """A JSON file with one of many kinds of damage: cut off, bits flipped, values of other types and sizes."""
    rng = np.random.default_rng(number)
    kind, place = number % 5, int(rng.integers(len(content)))
    if kind == 0:
        return content[:place]
    if kind == 1:
        flipped = bytearray(content)
        for at in rng.integers(len(content), size=rng.integers(1, 9)):
            flipped[at] ^= 1 << int(rng.integers(8))
        return bytes(flipped)
    if kind == 2:
        return content[:place] + rng.bytes(int(rng.integers(1, 99))) + content[place:]
    strange = ["-1", "NaN", "-Infinity", "1e999", "9" * 10_000, "null", "true", '"\\ud800"', '"\\u001b[2J"', "[]", "{}"]
    strange += ["[" * 10**5, '{"a":' * 10**5, "[" * 500 + "]" * 500, '[[0, 1], "2"]', '"train"', "0.5", "1" + "0" * 400]
    values = [*re.finditer(rb'"[^"]*"|[\d.]+|\[[^][]*\]|\{[^{}]*\}', content)]
    found = values[int(rng.integers(len(values)))]
    return content[: found.start()] + strange[int(rng.integers(len(strange)))].encode() + content[found.end() :]


def test_a_corpus_json_with_any_damage_gives_one_line_or_a_corpus(tmp_path):
    folder, refused = make_corpus(tmp_path / "three", num_clips=3), 0
    about = {"name": "made", "kind": "spoken", "splits": {"train": [0, 1], "val": [1, 2], "test": [2, 3]}, "hours": 1.3}
    content = json.dumps(about, indent=1).encode()
    for number in range(150):
        (folder / "corpus.json").write_bytes(damaged(content, number))
        try:
            corpus = utils.load_speech(str(folder))
        except InputError as error:
            assert str(error).isprintable() and len(str(error)) < 500, number
            refused += 1
        else:
            assert (
                corpus.kind in ("real", "spoken") and corpus.name.isprintable() and {*utils.SPLITS} <= {*corpus.splits}
            )
            json.dumps(corpus.description, allow_nan=False)
        assert isinstance(speech.holds(folder, about), bool)
    assert 100 < refused < 150


# ---------------------------------------------------------------------------------------------------
# Which corpus


@pytest.fixture
def spoken(monkeypatch):
    """A quick stand-in for the speech synthesiser; a list of what was made."""
    made = []

    def make(folder, seed=0):
        if not folder.exists():
            made.append(folder)
            make_corpus(folder)
            (folder / "corpus.json").write_text(json.dumps(ABOUT))

    monkeypatch.setattr(speech, "make_spoken_corpus", make)
    return made


def test_the_spoken_corpus_is_made_once_for_each_seed(tmp_path, spoken, monkeypatch, capsys):
    monkeypatch.setattr(utils, "download_ljspeech", lambda target: pytest.fail("it needs no network"))
    for seed in (0, 3, 0):
        corpus = utils.load_speech("spoken", tmp_path / "data", seed)
        assert (corpus.name, corpus.kind) == ("made", "spoken")
    assert spoken == [tmp_path / "data" / "spoken-seed0", tmp_path / "data" / "spoken-seed3"]
    assert "***" not in capsys.readouterr().out


@pytest.mark.parametrize("error", [speech.SpeechError("the voice is missing"), OSError(28, "No space left")])
def test_a_spoken_corpus_that_cannot_be_made_is_named(tmp_path, monkeypatch, error):
    def fail(folder, seed):
        raise error

    monkeypatch.setattr(speech, "make_spoken_corpus", fail)
    with pytest.raises(InputError, match=re.escape(f"the spoken corpus cannot be made: {error}")):
        utils.load_speech("spoken", tmp_path)


def test_auto_takes_ljspeech_where_it_is_and_passes_over_a_part(tmp_path, spoken, monkeypatch, capsys):
    monkeypatch.setattr(utils, "download_ljspeech", lambda target: False)
    folder = make_corpus(tmp_path / "data" / "LJSpeech-1.1")
    monkeypatch.setattr(utils, "LJSPEECH_CLIPS", 20)
    for source in ("auto", "ljspeech"):
        corpus = utils.load_speech(source, tmp_path / "data")
        assert (corpus.name, corpus.kind) == ("LJ Speech", "real")
    assert capsys.readouterr().out == ""

    (folder / "wavs" / "C019.wav").unlink()
    assert utils.load_speech("auto", tmp_path / "data").kind == "spoken"
    passing, *printed = capsys.readouterr().out.splitlines()
    assert passing.startswith(f"passing over {folder}") and len(printed) == 2
    assert all(line.startswith("*** ") for line in printed) and "SYNTHETIC voice" in printed[0]
    assert 'data = "ljspeech" downloads' in printed[1] and "2.6 GB" in printed[1]
    with pytest.raises(InputError) as error:
        utils.load_speech("ljspeech", tmp_path / "data")
    assert utils.LJSPEECH_URL in str(error.value) and utils.LJSPEECH_SHA256 in str(error.value)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert utils.load_speech(str(folder)).name == "LJ Speech, 19 of 20 clips"


def test_ljspeech_s_texts_in_another_voice_are_not_taken_for_ljspeech(tmp_path, spoken, monkeypatch):
    folder = make_corpus(tmp_path / "LJSpeech-1.1")
    monkeypatch.setattr(utils, "LJSPEECH_CLIPS", 20)
    monkeypatch.setattr(utils, "download_ljspeech", lambda target: False)
    (folder / "corpus.json").write_text(json.dumps(ABOUT))
    assert utils.load_speech("auto", tmp_path).folder == spoken[0]
    with pytest.raises(InputError, match="could not be downloaded"):
        utils.load_speech("ljspeech", tmp_path)


@pytest.mark.parametrize("source", ["auto", "spoken"])
def test_only_ljspeech_uses_the_network(tmp_path, spoken, monkeypatch, source):
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("a connection"))
    monkeypatch.setattr(utils, "download", lambda *_: pytest.fail("a download"))
    assert utils.load_speech(source, tmp_path).kind == "spoken"


def test_a_whole_ljspeech_may_miss_a_clip_or_two(tmp_path, monkeypatch):
    folder = make_corpus(tmp_path / "LJSpeech-1.1", num_clips=200, seconds=0.1)
    monkeypatch.setattr(utils, "LJSPEECH_CLIPS", 200)
    (folder / "wavs" / "C007.wav").unlink()
    (folder / "wavs" / "C009.wav").unlink()
    assert utils.load_speech("ljspeech", tmp_path).name == "LJ Speech, 198 of 200 clips"
    (folder / "wavs" / "C011.wav").unlink()
    assert not utils.is_ljspeech(folder)


# ---------------------------------------------------------------------------------------------------
# The download


class SlowHandler(Handler):
    """Also serves slowly, but without a pause."""

    def reply(self, body):
        if self.server.behaviour != "slow":
            return super().reply(body)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for start in range(0, len(body), 2**16):
            self.wfile.write(body[start : start + 2**16])
            self.wfile.flush()
            time.sleep(0.2)


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
    """A small LJSpeech-1.1.tar.bz2 of 20 clips: 0.6 MB."""
    root = tmp_path_factory.mktemp("archive")
    replace_line(make_corpus(root / "LJSpeech-1.1"), 1, "C000|No. 0|Number 0, \u201cquoted\u201d")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:bz2") as tar:
        tar.add(root / "LJSpeech-1.1", "LJSpeech-1.1")
    return buffer.getvalue()


@pytest.fixture
def serve(monkeypatch, archive, tmp_path):
    """Let torchaudio download from a local server."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(utils, "LJSPEECH_CLIPS", 20)
    monkeypatch.setattr(utils, "LJSPEECH_BYTES", 1e6)
    monkeypatch.setattr(utils, "PATIENCE", 0.7)
    servers = []

    def start(behaviour, expected=archive):
        digest = hashlib.sha256(expected).hexdigest()
        server = Server(archive, behaviour)
        server.RequestHandlerClass = SlowHandler
        server.url = server.url.replace("octmnist.npz", "LJSpeech-1.1.tar.bz2")
        monkeypatch.setattr(utils, "LJSPEECH_URL", server.url)
        release = torchaudio.datasets.ljspeech._RELEASE_CONFIGS["release1"]
        monkeypatch.setitem(release, "checksum", digest)
        servers.append(server)
        return server

    yield start
    for server in servers:  # shutting down takes half a second: not while the next test waits
        threading.Thread(target=lambda s=server: (s.shutdown(), s.server_close()), daemon=True).start()


def assert_nothing_is_left(data_dir):
    assert [*data_dir.iterdir()] == [] and socket.getdefaulttimeout() is None


def test_the_published_address_and_checksum_are_torchaudios():
    release = torchaudio.datasets.ljspeech._RELEASE_CONFIGS["release1"]
    assert (release["url"], release["checksum"]) == (utils.LJSPEECH_URL, utils.LJSPEECH_SHA256)


def test_a_good_download_is_unpacked_kept_and_used_again(serve, tmp_path):
    server = serve("right")
    corpus = utils.load_speech("ljspeech", tmp_path / "data")
    assert (corpus.name, corpus.kind, corpus.left_out) == ("LJ Speech", "real", [])
    assert corpus.description["counts"] == {"train": 15, "val": 1, "test": 4}
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["LJSpeech-1.1"]  # and no archive
    requests = server.requests
    utils.load_speech("auto", tmp_path / "data")
    assert server.requests == requests > 0 and socket.getdefaulttimeout() is None


def test_a_download_is_kept_where_the_system_s_encoding_is_not_utf8(serve, tmp_path, monkeypatch):
    def locale_open(path, *args, **named):  # as torchaudio reads metadata.csv on Windows
        return Path(path).open(*args, **{"encoding": "cp1252", **named})

    monkeypatch.setattr(torchaudio.datasets.ljspeech, "open", locale_open, raising=False)
    serve("right")
    corpus = utils.load_speech("ljspeech", tmp_path / "data")
    assert corpus.name == "LJ Speech" and "\u201d" in corpus.splits["train"][0].text


@pytest.mark.parametrize("name", ["LJ Speech", "lj speech, mine", "LJSpeech", "lj_speech-1.1"])
def test_another_folder_of_real_speech_does_not_go_by_the_name_of_ljspeech(tmp_path, name):
    corpus = utils.load_speech(str(make_corpus(tmp_path / name)))
    assert corpus.name == f"{name} (another folder)" and corpus.kind == "real"


@pytest.mark.parametrize("behaviour", ["cut off", "missing", "silent", "stalls"])
def test_a_bad_network_gives_up_within_seconds_and_leaves_nothing(serve, tmp_path, capsys, behaviour):
    serve(behaviour)
    started = time.monotonic()
    with pytest.raises(InputError, match="could not be downloaded"):
        utils.load_speech("ljspeech", tmp_path / "data")
    assert time.monotonic() - started < 5
    assert capsys.readouterr().out.count("no download: ") == 1
    if (tmp_path / "data").exists():
        assert_nothing_is_left(tmp_path / "data")


def test_a_wrong_checksum_is_no_ljspeech(serve, tmp_path, capsys):
    serve("right", expected=b"another archive")
    with pytest.raises(InputError, match="could not be downloaded"):
        utils.load_speech("ljspeech", tmp_path / "data")
    assert "no download: invalid hash value" in capsys.readouterr().out
    assert_nothing_is_left(tmp_path / "data")


def test_an_archive_without_all_clips_is_no_ljspeech(serve, tmp_path, capsys, monkeypatch):
    serve("right")
    monkeypatch.setattr(utils, "LJSPEECH_CLIPS", 21)
    assert not utils.download_ljspeech(tmp_path / "data" / "LJSpeech-1.1")
    assert "no download: what came is something else, or cut off" in capsys.readouterr().out
    assert_nothing_is_left(tmp_path / "data")


def test_a_dead_port_gives_up_at_once(serve, tmp_path, monkeypatch):
    serve("right")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}/LJSpeech-1.1.tar.bz2"
    monkeypatch.setattr(utils, "LJSPEECH_URL", dead)
    started = time.monotonic()
    with pytest.raises(InputError, match="could not be downloaded"):
        utils.load_speech("ljspeech", tmp_path / "data")
    assert time.monotonic() - started < 5


def test_a_slow_download_goes_on_as_long_as_it_is_not_silent(serve, tmp_path):
    serve("slow")  # ten pieces, 0.2 s each: longer than any silence that is waited for
    started = time.monotonic()
    assert utils.load_speech("ljspeech", tmp_path / "data").name == "LJ Speech"
    assert time.monotonic() - started > 2 * utils.PATIENCE


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_half_an_unpacking_leaves_nothing(serve, tmp_path, monkeypatch, capsys, error):
    serve("right")
    extract, unpacked = tarfile.TarFile.extract, []

    def spoiled(tar, member, path):
        unpacked.append(member)
        if len(unpacked) > 12:
            raise error
        extract(tar, member, path)

    monkeypatch.setattr(tarfile.TarFile, "extract", spoiled)
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            utils.download_ljspeech(tmp_path / "data" / "LJSpeech-1.1")
    else:
        assert not utils.download_ljspeech(tmp_path / "data" / "LJSpeech-1.1")
        assert "no download: [Errno 28] No space left" in capsys.readouterr().out
    assert len(unpacked) == 13
    assert_nothing_is_left(tmp_path / "data")


def test_a_dead_name_server_gives_up_and_starts_no_download(serve, tmp_path, monkeypatch, capsys):
    server = serve("right")
    answers = threading.Event()
    look_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: (answers.wait(8), look_up(*a, **k))[1])
    started = time.monotonic()
    assert not utils.download_ljspeech(tmp_path / "data" / "LJSpeech-1.1")
    assert time.monotonic() - started < 5
    assert "no download: no answer" in capsys.readouterr().out
    answers.set()
    time.sleep(0.3)
    assert server.requests == 0 and not (tmp_path / "data").exists()


def test_what_killed_downloads_left_is_never_used_and_removed_when_old(serve, tmp_path):
    serve("missing")
    old, new = (make_corpus(tmp_path / f".download-{age}" / "LJSpeech-1.1").parent for age in ("old", "new"))
    for path in (old, *old.rglob("*")):
        os.utime(path, (1, 1))
    with pytest.raises(InputError, match="could not be downloaded"):
        utils.load_speech("ljspeech", tmp_path)
    assert new.exists() and not old.exists()


def test_a_download_keeps_the_part_it_replaces(serve, tmp_path):
    serve("right")
    part = make_corpus(tmp_path / "LJSpeech-1.1", num_clips=3)
    before = tree(part)
    assert utils.load_speech("ljspeech", tmp_path).name == "LJ Speech"
    (kept,) = tmp_path.glob("LJSpeech-1.1.broken-*")
    assert tree(kept) == before


def test_a_disk_too_small_is_known_before_the_download(serve, tmp_path, monkeypatch, capsys):
    server = serve("right")
    monkeypatch.setattr(utils, "LJSPEECH_BYTES", 1e18)
    assert not utils.download_ljspeech(tmp_path / "LJSpeech-1.1")
    assert f"no download: {tmp_path} has less than" in capsys.readouterr().out and server.requests == 0


def test_a_data_folder_that_cannot_be_written_ends_the_download_alone(serve, tmp_path, capsys):
    serve("right")
    (tmp_path / "data").write_text("a file")
    assert not utils.download_ljspeech(tmp_path / "data" / "LJSpeech-1.1")
    assert "no download:" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------
# Audio


def tone(frequency, rate, seconds=1.0):
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def test_a_wav_is_read_as_the_mean_of_its_channels(tmp_path):
    left, right = tone(300, RATE), noise(1.0)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], 1), RATE, subtype="FLOAT")
    samples, rate = utils.read_wav(tmp_path / "stereo.wav")
    assert samples.dtype == np.float32 and samples.ndim == 1 and rate == RATE
    np.testing.assert_allclose(samples, (left + right) / 2 - np.mean(left + right) / 2, atol=1e-6)


VOICE = noise(1.0, seed=1) - noise(1.0, seed=1).mean()


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        ([VOICE, -VOICE], VOICE),
        ([-VOICE / 2, VOICE], 0.75 * VOICE),
        ([VOICE, 0 * VOICE], VOICE),
        ([noise(1.0, seed=2) * 0.05, VOICE, VOICE, 0 * VOICE], VOICE),
        ([VOICE + 0.2], VOICE),
        ([VOICE + 0.2, -VOICE - 0.9, 0 * VOICE + 1], VOICE),  # offsets are louder than what is said
        ([VOICE, np.roll(VOICE, 99)], (VOICE + np.roll(VOICE, 99)) / 2),  # unlike, as two speakers are: both stay
        ([0 * VOICE, 0 * VOICE], 0 * VOICE),
    ],
)
def test_channels_that_are_inverted_or_silent_do_not_spoil_the_mean(tmp_path, channels, expected):
    soundfile.write(tmp_path / "my.wav", np.stack(channels, 1), RATE, subtype="FLOAT")
    samples, _ = utils.read_wav(tmp_path / "my.wav")
    assert samples.dtype == np.float32 and samples.shape == VOICE.shape
    if np.dot(samples, expected) < 0:
        samples = -samples  # which of two is the inverted one, nobody can tell
    np.testing.assert_allclose(samples, expected, atol=1e-5)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000, 22_049])
def test_another_rate_is_resampled(tmp_path, rate):
    soundfile.write(tmp_path / "tone.wav", tone(1000, rate), rate, subtype="FLOAT")
    assert utils.read_wav(tmp_path / "tone.wav")[1] == rate
    samples, new_rate = utils.read_wav(str(tmp_path / "tone.wav"), RATE)
    assert new_rate == RATE and samples.dtype == np.float32 and abs(len(samples) - RATE) <= 1
    middle = slice(2000, 20_000)
    np.testing.assert_allclose(samples[middle], tone(1000, RATE)[middle], atol=5e-3)


def test_what_lies_above_half_the_new_rate_is_not_folded_down(tmp_path):
    soundfile.write(tmp_path / "tone.wav", tone(16_000, 48_000), 48_000)
    samples, _ = utils.read_wav(tmp_path / "tone.wav", RATE)
    assert np.abs(samples[2000:20_000]).max() < 0.005


CONVERT = r"To convert it: ffmpeg -i \S+/my\.wav -ar 22050 \S+/my\.wav\.wav$"


def cut(share=0.5, **options):
    """Write ten seconds of noise in some format, and cut it off."""

    def spoil(path):
        soundfile.write(path, noise(10.0), 24_000, **options)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (None, "no such file"),
        (Path.mkdir, "not a file"),
        (os.mkfifo, "not a file"),
        (lambda path: path.symlink_to("my.wav"), "no such file|not audio"),
        (Path.touch, "is empty"),
        (lambda path: path.write_text("text"), rf"not audio, or damaged \(.*\)\. {CONVERT}"),
        (
            lambda path: path.write_bytes(b"\0\0\0\x20ftypM4A " + noise().tobytes()),
            rf"not audio, or damaged .* {CONVERT}",
        ),
        (flac_stream, rf"does not say how long it is\. {CONVERT}"),
        (lambda path: set_rate(path, 0), "not audio, or damaged"),
        (lambda path: set_rate(path, 1), "is said to have 1 samples a second"),
        (lambda path: set_rate(path, 2**31 - 1), "is said to have 2,147,483,647 samples a second"),
        (lambda path: set_rate(path, 4_000_000_000), "not audio, or damaged"),
        (write_wav(np.zeros(0)), "holds no samples"),
        (write_wav(np.full(99, np.nan), subtype="FLOAT"), "holds samples that are no finite numbers"),
        (write_wav(np.full(99, -np.inf), subtype="FLOAT"), "holds samples that are no finite numbers"),
        (write_wav(np.full(99, 1e300), subtype="DOUBLE"), "holds samples that are no finite numbers"),
        (write_wav(noise() * 32_768, subtype="FLOAT"), r"its samples reach 16,38\d, not 1: divide them by 32,768"),
        (cut(), r"is cut off: 220,\d+ of 441,000 bytes are there"),
        (cut(0.99, format="AIFF"), "is cut off: "),
        (cut(format="AU"), "is cut off: "),
        (cut(format="W64"), "is cut off: "),
        (cut(format="RF64"), "is cut off: "),
        (cut(format="FLAC"), "not audio, or damaged"),
        (cut(format="OGG"), "is cut off"),
        (cut(format="OGG", subtype="OPUS"), "is cut off"),
    ],
)
def test_a_wav_that_cannot_be_used_is_named(tmp_path, spoil, message):
    if spoil:
        spoil(tmp_path / "my.wav")
    with pytest.raises(InputError, match=rf"my\.wav: {message}") as error:
        utils.read_wav(tmp_path / "my.wav")
    assert str(error.value).isprintable()


@pytest.mark.parametrize("format", ["AIFF", "AU", "CAF", "FLAC", "MP3", "OGG", "RF64", "W64", "WAV", "WAVEX"])
def test_other_formats_are_read(tmp_path, format):
    soundfile.write(tmp_path / "my.wav", tone(300, RATE), RATE, format=format)
    samples, rate = utils.read_wav(tmp_path / "my.wav")
    assert rate == RATE and len(samples) == RATE
    assert np.corrcoef(samples, tone(300, RATE))[0, 1] > 0.99


def test_an_mp3_whose_length_is_a_guess_is_read(tmp_path):
    """Without a Xing header, libsndfile divides the size by the bit rate, and counts the picture of the cover too."""
    frame = bytes([0xFF, 0xF3, 0x40, 0xC4]) + bytes(100)  # 576 samples of silence at 22,050 Hz and 32 kbit/s
    cover = b"ID3\x03\0\0" + bytes([0, 6, 26, 0]) + bytes(6 * 2**14 + 26 * 2**7)
    (tmp_path / "my.mp3").write_bytes(cover + 100 * frame)
    assert soundfile.info(tmp_path / "my.mp3").frames > 2 * 57_600
    assert len(utils.read_wav(tmp_path / "my.mp3")[0]) == 57_600


def test_overdriven_samples_are_read(tmp_path):
    soundfile.write(tmp_path / "my.wav", 6 * noise(), RATE, subtype="FLOAT")
    assert 2.9 < np.abs(utils.read_wav(tmp_path / "my.wav")[0]).max() < 3.1


def test_samples_without_a_header_are_named(tmp_path):
    (tmp_path / "my.raw").write_bytes(noise().tobytes())
    with pytest.raises(InputError, match=r"my\.raw: not audio, or damaged"):
        utils.read_wav(tmp_path / "my.raw")


# ---------------------------------------------------------------------------------------------------
# Features

SETTINGS = {"hop": 256, "n_mels": 8}


class Extract:
    """Log energies of eight bands; counts its calls."""

    def __init__(self):
        self.calls, self.rates = 0, set()

    def __call__(self, samples, rate):
        self.calls += 1
        self.rates.add(rate)
        assert samples.dtype == np.float32
        blocks = samples[: len(samples) // 256 * 256].reshape(-1, 256)
        spectrum = np.abs(np.fft.rfft(blocks, axis=1))[:, :128] ** 2
        return np.log(spectrum.reshape(len(blocks), 8, 16).sum(2) + 1e-5).astype(np.float32)


def assert_cache_is_right(cache, corpus, left_out=()):
    extract, train = Extract(), []
    for split, clips in corpus.splits.items():
        assert cache.clips(split) == [clip for clip in clips if clip.row not in left_out]
        for clip in cache.clips(split):
            expected = extract(*utils.read_wav(clip.path, corpus.sample_rate))
            assert cache[clip].dtype == np.float16 and cache.frames(clip) == len(expected)
            np.testing.assert_array_equal(cache[clip], expected.astype(np.float16))
            np.testing.assert_allclose(cache[clip], expected, rtol=2**-11)
            if split == "train":
                train.append(cache[clip].astype(np.float64))
    train = np.concatenate(train)
    np.testing.assert_allclose(cache.mean, train.mean(0), rtol=1e-5)
    np.testing.assert_allclose(cache.std, train.std(0), rtol=1e-4)


@pytest.fixture
def corpus(folder):
    return utils.load_speech(str(folder))


def test_features_are_made_once_and_mapped_from_one_file(corpus, tmp_path):
    extract = Extract()
    cache = utils.cached_features(corpus, extract, SETTINGS, tmp_path / "data")
    assert extract.calls == 20 and cache.corpus.left_out == []
    assert_cache_is_right(cache, corpus)
    assert [*tree(tmp_path / "data")] == [cache.path.name, cache.path.with_suffix(".json").name]
    frames = sum(cache.frames(clip) for clips in corpus.splits.values() for clip in clips)
    assert cache.path.stat().st_size == frames * 8 * 2

    sent = pickle.dumps(cache)  # to another process
    assert len(sent) < 0.5 * cache.path.stat().st_size
    for one in (cache, pickle.loads(sent)):
        assert_cache_is_right(one, corpus)
        features, bases = one[corpus.splits["test"][2]], []
        assert not features.flags.writeable and not features.flags.owndata
        while isinstance(features, np.ndarray):
            features = features.base
            bases.append(type(features).__name__)
        assert "mmap" in bases

    again = utils.cached_features(corpus, extract, SETTINGS, tmp_path / "data")
    assert extract.calls == 20
    assert_cache_is_right(again, corpus)


@needs_real_clips
def test_features_of_real_clips(tmp_path):
    corpus = utils.load_speech(str(REAL_CLIPS))
    cache = utils.cached_features(corpus, Extract(), SETTINGS, tmp_path)
    assert cache.corpus.left_out == []
    assert_cache_is_right(cache, corpus)


def test_other_settings_have_another_file(corpus, tmp_path):
    extract = Extract()
    first = utils.cached_features(corpus, extract, SETTINGS, tmp_path / "data")
    other = utils.cached_features(corpus, lambda s, r: 2 * extract(s, r), SETTINGS | {"hop": 99}, tmp_path / "data")
    assert extract.calls == 40 and first.path != other.path
    clip = corpus.splits["train"][0]
    np.testing.assert_allclose(other[clip], 2 * first[clip].astype(np.float32), rtol=1e-3)
    utils.cached_features(corpus, extract, dict(reversed(SETTINGS.items())), tmp_path / "data")
    assert extract.calls == 40


@pytest.mark.parametrize("change", ["one sample", "rows", "splits", "another folder"])
def test_a_changed_corpus_is_extracted_anew(corpus, folder, tmp_path, capsys, change):
    extract = Extract()
    first = utils.cached_features(corpus, extract, SETTINGS, tmp_path / "data")
    path = folder / "wavs" / "C003.wav"
    if change == "one sample":  # of the same size, at the same time
        before, content = path.stat(), bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    elif change == "rows":
        replace_line(folder, 4, "a bad row, which moves the others\nC003|3|three")
    elif change == "splits":
        (folder / "corpus.json").write_text(json.dumps(ABOUT))
    else:
        folder = make_corpus(tmp_path / "other" / "mine", num_clips=9)
    corpus = utils.load_speech(str(folder))
    cache = utils.cached_features(corpus, extract, SETTINGS, tmp_path / "data")
    assert extract.calls == 20 + (9 if change == "another folder" else 20)
    assert_cache_is_right(cache, corpus)
    assert (cache.path == first.path) == (change != "another folder")
    message = "made from other audio, splits or settings): the features are made again"
    assert (message in capsys.readouterr().out) == (change != "another folder")


def test_a_corpus_of_the_same_content_is_not_extracted_anew(corpus, folder, tmp_path):
    extract = Extract()
    utils.cached_features(corpus, extract, SETTINGS, tmp_path / "data")
    os.utime(folder / "wavs" / "C003.wav", (1, 1))
    replace_line(folder, 4, "C003|3|another text")
    corpus = utils.load_speech(str(folder))
    assert_cache_is_right(utils.cached_features(corpus, extract, SETTINGS, tmp_path / "data"), corpus)
    assert extract.calls == 20


@pytest.fixture
def three(tmp_path):
    """Features of three clips: their cache, and a function that looks whether they are made again, and are right."""
    corpus, extract = utils.load_speech(str(make_corpus(tmp_path / "three", num_clips=3))), Extract()
    cache = utils.cached_features(corpus, extract, SETTINGS, tmp_path / "data")
    whole = tree(tmp_path / "data")

    def made_again():
        before = extract.calls
        assert_cache_is_right(utils.cached_features(corpus, extract, SETTINGS, tmp_path / "data"), corpus)
        assert tree(tmp_path / "data") == whole
        return extract.calls == before + 3

    return cache, made_again


@pytest.mark.parametrize("suffix", [".f16", ".json"])
def test_features_that_are_cut_off_or_missing_are_made_again(three, capsys, suffix):
    cache, made_again = three
    path = cache.path.with_suffix(suffix)
    whole = path.read_bytes()
    assert not made_again()
    for share in (0.0, 0.01, 0.5, 0.9, 1 - 2 / len(whole)):
        path.write_bytes(whole[: int(share * len(whole))])
        assert made_again(), share
        printed = capsys.readouterr().out
        assert printed.startswith(f"{path}: ") and printed.endswith(": the features are made again\n")
        assert printed.count("\n") == 1
    for filler in (b"\0", whole[-64:]):  # a file system that forgot what it was told, or wrote it twice
        path.write_bytes(whole[: len(whole) // 2] + filler * 999)
        assert made_again()
    path.unlink()
    assert made_again()
    path.write_text("{}")
    assert made_again()


def test_features_with_any_damage_are_made_again_with_one_line(three, capsys):
    cache, made_again = three
    about = cache.path.with_suffix(".json")
    whole = {path: path.read_bytes() for path in (cache.path, about)}
    for number in range(150):
        path = about if number % 5 > 2 or number % 2 else cache.path
        content = damaged(whole[path], number)
        path.write_bytes(content)
        same = content == whole[path] or (path == about and harmless(content, whole[path]))
        assert made_again() == (not same), number
        printed = capsys.readouterr().out
        assert printed.count("\n") == (not same) and printed.rstrip("\n").isprintable(), number


def harmless(content, whole):
    try:
        return json.loads(content) == json.loads(whole)
    except (ValueError, RecursionError):
        return False


@pytest.mark.parametrize("suffix", [".f16", ".json"])
def test_features_that_are_no_file_are_made_again(three, suffix):
    cache, made_again = three
    path = cache.path.with_suffix(suffix)
    path.unlink()
    os.mkfifo(path)
    assert made_again()


@pytest.mark.parametrize("suffix", [".f16", ".json"])
def test_features_with_a_flipped_bit_are_made_again(three, suffix):
    cache, made_again = three
    path, rng = cache.path.with_suffix(suffix), np.random.default_rng(0)
    whole = path.read_bytes()
    places = [*rng.integers(0, len(whole), 40), 0, len(whole) - 2]
    for place in (place for place in places if whole[place] not in b" \n" or suffix == ".f16"):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        assert made_again(), (place, damaged[place - 20 : place + 20])


def killed(target, *arguments, when=lambda: False):
    """Run a function in a child process that is killed by -9 `when` something holds, if it does not end so itself."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    deadline = time.monotonic() + 30
    while process.is_alive() and not when() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_kill_9_in_the_middle_leaves_nothing_that_is_used(corpus, tmp_path):
    data, extract = tmp_path / "data", Extract()

    def slowly(samples, rate):
        time.sleep(0.1)
        return extract(samples, rate)

    something = lambda: data.exists() and any(path.stat().st_size for path in data.iterdir())  # noqa: E731
    killed(utils.cached_features, corpus, slowly, SETTINGS, data, when=something)
    (part,) = data.iterdir()
    assert part.name.startswith(".features-")
    assert part.stat().st_size > 0
    cache = utils.cached_features(corpus, extract, SETTINGS, data)
    assert extract.calls == 20 and part.exists()  # for all one can tell, another process still writes it
    assert_cache_is_right(cache, corpus)
    os.utime(part, (time.time() - 86_401,) * 2)
    utils.cached_features(corpus, extract, SETTINGS, data)
    assert extract.calls == 20 and not part.exists() and len([*data.iterdir()]) == 2


def test_kill_9_between_the_two_files_leaves_nothing_that_is_used(corpus, folder, tmp_path, monkeypatch):
    """The features are those of the new audio, the JSON file beside them still that of the old."""
    data, extract = tmp_path / "data", Extract()
    old = utils.cached_features(corpus, extract, SETTINGS, data).path.read_bytes()
    soundfile.write(folder / "wavs" / "C003.wav", noise(0.53, seed=99), RATE)
    changed = utils.load_speech(str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(utils, "write_json", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        killed(utils.cached_features, changed, Extract(), SETTINGS, data)
    assert next(data.glob("*.f16")).read_bytes() != old
    soundfile.write(folder / "wavs" / "C003.wav", noise(0.53, seed=3), RATE)  # as it was: what the JSON file says
    corpus = utils.load_speech(str(folder))
    cache = utils.cached_features(corpus, extract, SETTINGS, data)
    assert_cache_is_right(cache, corpus)
    assert extract.calls == 40 and cache.path.read_bytes() == old


def test_an_extraction_that_fails_leaves_nothing(corpus, tmp_path):
    def fail(samples, rate):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        utils.cached_features(corpus, fail, SETTINGS, tmp_path / "data")
    shapes = iter([(9, 8), (9, 7)])
    with pytest.raises(ValueError, match="broadcast"):
        utils.cached_features(corpus, lambda s, r: np.zeros(next(shapes), np.float32), SETTINGS, tmp_path / "data")
    assert tree(tmp_path / "data") == {}


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (np.zeros(9999), "is silent"),
        (np.full(9999, 0.3), "is silent"),
        (np.random.default_rng(0).integers(-1, 2, 9999) / 2**15, "is silent"),
        (np.stack([np.zeros(9999), np.full(9999, -0.3)], 1), "is silent"),
        (np.where(np.arange(9999) == 99, np.nan, 0.1), "holds samples that are no finite numbers"),
        (noise() * 32_768, "its samples reach 16,38"),
        (noise() * 14, "its features do not fit into float16"),
    ],
)
def test_silent_and_broken_audio_is_left_out_and_said_each_time(folder, tmp_path, capsys, samples, reason):
    soundfile.write(folder / "wavs" / "C004.wav", samples, RATE, subtype="FLOAT")
    corpus, extract = utils.load_speech(str(folder)), Extract()
    huge = lambda s, r: np.where(np.abs(s).max() > 6, 1e9, extract(s, r))  # noqa: E731
    for _ in range(2):
        cache = utils.cached_features(corpus, huge, SETTINGS, tmp_path / "data")
        assert len(cache.corpus.left_out) == 1 and corpus.left_out == []
        printed = capsys.readouterr().out.splitlines()
        assert printed == [cache.corpus.left_out[0], "left out: 1 (19 clips are used)"]
        assert printed[0].startswith(f"{folder / 'wavs' / 'C004.wav'}: ") and reason in printed[0]
        assert_cache_is_right(cache, corpus, left_out=[4])
        assert cache.corpus.description["counts"]["train"] == 14 and cache.corpus.description["left_out"] == 1


def test_a_quiet_clip_is_no_silent_one(folder, tmp_path):
    soundfile.write(folder / "wavs" / "C004.wav", noise() / 2**11, RATE)
    cache = utils.cached_features(utils.load_speech(str(folder)), Extract(), SETTINGS, tmp_path / "data")
    assert cache.corpus.left_out == []


def test_a_split_of_silence_is_named(folder, tmp_path, capsys):
    soundfile.write(folder / "wavs" / "C015.wav", np.zeros(9999), RATE)
    with pytest.raises(InputError, match="no clip of the val split can be used"):
        utils.cached_features(utils.load_speech(str(folder)), Extract(), SETTINGS, tmp_path / "data")
    assert "C015.wav: is silent" in capsys.readouterr().out
    for path in (folder / "wavs").iterdir():
        soundfile.write(path, np.zeros(9999), RATE)
    with pytest.raises(InputError, match=r"no clip of the train split can be used \(such as .*C000\.wav: is silent\)"):
        utils.cached_features(utils.load_speech(str(folder)), Extract(), SETTINGS, tmp_path / "data")


def test_clips_of_another_rate_are_counted_and_resampled(folder, tmp_path, capsys):
    for i in (3, 7):
        soundfile.write(folder / "wavs" / f"C{i:03d}.wav", tone(500, 16_000), 16_000)
    corpus = utils.load_speech(str(folder))
    assert capsys.readouterr().out == f"{folder}: 2 of 20 clips are not at 22050 Hz: they are resampled\n"
    assert corpus.splits["train"][3].rate == 16_000 and corpus.splits["train"][3].seconds == 1.0
    extract = Extract()
    cache = utils.cached_features(corpus, extract, SETTINGS, tmp_path / "data")
    assert extract.rates == {RATE} and cache.frames(corpus.splits["train"][3]) == RATE // 256
    assert_cache_is_right(cache, corpus)


def test_a_feature_that_never_changes_can_be_divided_by(corpus, tmp_path):
    constant = lambda samples, rate: np.full((9, 3), [-11.5, 0.0, 7.1], np.float32)  # noqa: E731
    cache = utils.cached_features(corpus, constant, SETTINGS, tmp_path)
    np.testing.assert_allclose(cache.mean, [-11.5, 0, 7.1], rtol=1e-3)
    assert (cache.std > 0).all() and np.isfinite(1 / cache.std).all()


# ---------------------------------------------------------------------------------------------------
# Notebooks

CELLS = [
    ("markdown", [], "# Title"),
    ("code", ["parameters"], "width = 3\n"),
    (
        "code",
        ["definitions"],
        ["from dataclasses import dataclass\n", "\n", "@dataclass\n", "class Box:\n", "    side: int = width"],
    ),
    ("code", [], "raise SystemExit('training')"),
    ("code", ["definitions", "hide"], "def area(box):\n    # a comment\n    return box.side / zero\n\nzero = 0"),
    ("code", [], "also_not_run = True"),
]


@pytest.fixture
def notebook(tmp_path):
    cells = [{"cell_type": kind, "metadata": {"tags": tags}, "source": source} for kind, tags, source in CELLS]
    cells.append({"cell_type": "code", "metadata": {}, "source": "no_tags = 1"})
    path = tmp_path / "hw9-q9.ipynb"
    path.write_text(json.dumps({"cells": cells, "nbformat": 4, "nbformat_minor": 5, "metadata": {}}))
    yield path
    sys.modules.pop("hw9_q9", None)


def test_definitions_are_imported_and_nothing_else_runs(notebook):
    module = utils.notebook_definitions(notebook)
    assert module.__name__ == "hw9_q9" and sys.modules["hw9_q9"] is module and module.__file__ == str(notebook)
    assert module.Box() == module.Box(3) and not hasattr(module, "also_not_run") and not hasattr(module, "no_tags")
    assert pickle.loads(pickle.dumps(module.Box(4))) == module.Box(4)
    assert inspect.getsource(module.area) == "def area(box):\n    # a comment\n    return box.side / zero\n"
    with pytest.raises(ZeroDivisionError) as error:
        module.area(module.Box())
    lines = "".join(traceback.format_exception(error.value))
    assert 'File "hw9-q9.ipynb[cell 4]", line 3, in area\n    return box.side / zero\n' in lines
