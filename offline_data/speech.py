"""A spoken corpus, a stand-in for LJ Speech: sentences of a grammar, or given texts, in a synthetic voice.

    python -m offline_data.speech -out data/spoken                             # 1.1 hours in a minute
    python -m offline_data.speech -transcripts metadata.csv -out data/lj-text  # LJ Speech's texts, 24 hours: 12 min

The voice is `heart` of hibari-tts (Apache-2.0), a small neural network inside the package: natural in kind, but
synthetic. No two clips sound alike: `spoken_clip` varies rate, pitch, room, colour, noise and level. The times
above are for two idle cores.
"""

import argparse
import glob
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate, chain
from pathlib import Path

import joblib
import numpy as np
from scipy.fft import irfft, next_fast_len, rfft, rfftfreq
from scipy.io import wavfile
from scipy.signal import resample_poly
from tqdm import tqdm

from offline_data import SPEECH_RATE

Row = tuple[str, str, str]  # id, text, normalised text
LONGEST = 90  # characters of a sentence
SPOKEN_SPLITS = {"train": 1_300, "val": 100, "test": 150, "test_new_words": 100}  # sentences
LJ_SPEECH_SPLITS = {"train": (0, 9_825), "val": (9_825, 10_480), "test": (10_480, 13_100)}  # the homework's rows

# What varies from clip to clip, each drawn evenly between two bounds
VOICE_RATE = 24_000  # Hz, of hibari-tts
RATES = (0.85, 1.15)  # of speaking, 1 is the voice's own; it keeps to it within a tenth
SHIFTS = (47, 60)  # the voice is played at 450 times this many samples a second: pitch and formants times .88 to 1.13
PADDING = (0.05, 0.25)  # seconds of silence before and after
ROOM_SECONDS, ROOM_LEVEL = (0.1, 0.5), (-25.0, -8.0)  # the time in which an echo fades by 60 dB; its energy, dB
TILTS = (-3.0, 3.0)  # dB an octave
NOISE = (20.0, 45.0)  # dB below the speech
LEVELS = (-32.0, -20.0)  # of the clip, dB of full scale

# The training clips of given texts vary more widely, so that a network that learns from them can follow a person
OTHER_VOICES, OTHERS = ("en-US", "en-GB"), 0.3  # of py-nanotts (SVOX Pico, Apache-2.0); their share of the clips
PICO_RATE, PICO_PITCHES = 16_000, (0.85, 1.2)  # Hz; times their own pitch
BAND_LIMITS = (3_000, 12_000)  # Hz: half of the clips end there, as telephones and compressed files do

# The words are chosen so that their sound decides how they are spelt: no two of them are homophones.
# Alternatives are separated by a bar or a line end; {name} stands for an alternative of that name.
GRAMMAR = {
    "sentence": """\
{who} {left} the {thing} {where}.
{who} {left} the {look} {thing} {where}.
{who} {carried} the {thing} {whither}.
{when_past}, {who} {carried} the {container} {whither}.
{who} bought {purchase} {when_past}.
we bought {purchase}, {purchase}, and {purchase} at the market.
the {animal} {moved} {whither}.
the {mood} {animal} {moved} {whither}.
{when_past}, the {animal} jumped over the {thing}.
when {event}, the {animal} {moved} {whither}.
when {event}, {who} {left} the {thing} {where}.
because the {path} was {blocked}, {who} stayed at home.
although {who} was {feeling}, nobody noticed.
although the {animal} was {mood}, it followed {who} {whither}.
{who} said that the {path} was {blocked}.
{who} thinks that the {shop} will open {when_future}.
if it rains {when_future}, we will {plan}.
if {who} comes {when_future}, please {chore}.
{name}, {name}, and {name} went {whither} {when_past}.
the {thing} {where} belongs to {who}.
the {thing} that {who} {left} {when_past} is {look}.
there is a {size} {animal} {where}.
there were {number} {plural} {where}.
the {animal} is {compare} than the {animal}.
{who} plays {game} every {day}.
{who} wants to {plan} {when_future}.
{name} and {who} {shared} {when_past}.
every {day}, the {job} {habit}.
it was {weather} {when_past}, so we stayed at home.
it was {weather} when {who} came home.
have you seen my {look} {thing}?
have you seen my {thing}?
where did {who} {find} the {thing}?
who {left} the {thing} {where}?
is the {shop} open {when_future}?
why is the {animal} so {mood}?
would you like {food}, or just {food}?
does {who} know when {departure}?
how many {plural} are in the {container}?
can you {plan} {when_future}?
did {who} really {plan}?
which {thing} do you prefer, the {look} one or the {look} one?
what would you do with {number} {plural}?
is this {look} {thing} yours?
how far is it from the {place} to the {place}?
what did {who} say about the {thing}?
shall we {plan} {when_future}?
please {favor}.
please {chore} {when_future}.
do not {touch} the {thing}.
put the {thing} {where}, please.
never give {food} to the {animal}.
please bring the {thing}, the {thing}, and the {thing}.
{name}, please {favor}.
go {whither}, then {whither}.
{greeting}, {name}.
thank you, {name}.
{name} is {feeling}.
yes, {who} is {feeling}.
well, {who} will {plan}.
{name} likes {food} and {food}.
the {thing} is {look}.""",
    "who": "the {job}|the {trait} {job}|my {relative}|{name}",
    "job": "baker|farmer|teacher|doctor|sailor|painter|judge|queen|wizard|juggler|jockey|gardener|musician",
    "trait": "young|clever|lazy|brave|cheerful|famous|kind-hearted|well-known",
    "relative": "brother|sister|mother|uncle|cousin",
    "name": "Max|Jack|Emma|Felix|Hazel|Ruby|Victor|Quentin",
    "feeling": "tired|busy|dizzy|happy|ready|hungry|amazed|quite angry",
    "animal": "fox|goat|squirrel|zebra|rabbit|kitten|lizard|goose|donkey|monkey|dog|ox",
    "mood": "lazy|noisy|playful|frightened|sleepy|curious|hungry|quick|quiet",
    "moved": "ran|hurried|rushed|wandered|escaped",
    "whither": "across the bridge|through the forest|up the hill|down the stairs|over the wall|into the castle"
    "|to the {place}|around the lake|along the {path}|toward the horizon",
    "shop": "museum|library|bakery|zoo|bank|school|market",
    "place": "{shop}|harbor|castle|village|island|church",
    "path": "road|bridge|street|harbor",
    "blocked": "frozen|closed|flooded|empty|crowded",
    "where": "in the kitchen|in the attic|behind the barn|under the table|near the {place}|beside the river"
    "|on the roof|outside the {shop}|next to the window|on top of the {container}",
    "thing": "jacket|quilt|ladder|violin|umbrella|lamp|map|letter|puzzle|candle|carpet|saddle|guitar|bicycle"
    "|magazine|clock|blanket",
    "look": "old|small|beautiful|brand-new|old-fashioned|yellow|blue|brown|dusty|expensive|tiny",
    "size": "tiny|small|young|hungry|noisy|fuzzy",
    "container": "box|bucket|basket|jar|bag",
    "purchase": "a jar of honey|a dozen eggs|a box of lemons|a bag of rice|a bottle of juice|a piece of cheese"
    "|six onions|a loaf of bread|a slice of cake",
    "food": "jam|bread|soup|cheese|honey|rice|fish|cake|juice",
    "number": "six|seven|nine|ten|twelve|twenty|twenty-five|a dozen|exactly fifty",
    "plural": "candles|boxes|lizards|apples|coins|butterflies|zebras|squirrels",
    "compare": "faster|louder|older|lazier|bigger",
    "game": "chess|jazz|the guitar|the violin|the saxophone",
    "day": "Friday|Monday|morning|evening|winter|summer|January",
    "when_past": "yesterday|last week|on Friday|this morning|after dinner|before sunrise|at noon|at midnight|in June",
    "when_future": "tomorrow|next week|on Monday|this evening|in July|next winter|after lunch"
    "|before breakfast|on Sunday",
    "event": "the bell rang|the rain stopped|the sun came up|the wind turned|the music began|the fog lifted"
    "|the train arrived|the snow melted|the lights went out|dinner was ready",
    "departure": "the train leaves|the concert begins|the {shop} closes|dinner is ready",
    "plan": "stay at home|bake a cake|fix the roof|visit the {shop}|finish the puzzle|take a taxi|play chess"
    "|explore the island|paint the fence|swim in the lake|explain the joke",
    "favor": "{chore}|{chore}|{chore}|speak slowly|keep quiet|answer the question|explain the answer",
    "chore": "open the window|close the door|wash the dishes|fix the {thing}|feed the {animal}|bring the {thing}"
    "|squeeze the lemons|mix the paint",
    "left": "left|found|lost|dropped|hid|fixed|painted|saw|examined",
    "carried": "carried|took|brought|pulled|dragged|sent",
    "find": "find|hide|buy|lose|fix",
    "touch": "touch|lose|drop|hide|squeeze",
    "shared": "danced in the kitchen|sang all evening|played chess|fixed the roof|shared the {food}"
    "|explored the {place}",
    "habit": "walks to the {place}|feeds the {animal}|sweeps the floor|waters the garden|bakes bread",
    "weather": "cold|foggy|windy|warm|freezing|ice-cold",
    "greeting": "good morning|good evening|welcome home|happy birthday",
}

# Kept for the split `test_new_words`: heard in no other sentence, and spelt as they sound.
NEW_WORDS = {
    "job": "dentist|pilot|hunter|banker|printer|singer|dancer|driver|drummer|robber|barber|carpenter|inspector|actor",
    "trait": "grumpy|clumsy|timid|modest|stubborn|humble",
    "name": "Martin|Linda|Robin|Hector|Wilma|Gilbert",
    "animal": "tiger|panda|camel|hamster|parrot|rat|pig|badger|beetle|otter|lobster|spider",
    "thing": "lantern|hammer|trumpet|magnet|helmet|pencil|ribbon|mirror|spoon|shovel|rocket|napkin|pillow|banner"
    "|locket|sponge|button|chisel",
    "look": "silver|purple|crimson|plastic|slender|splendid|rusty|wooden",
    "shop": "cabin|temple|factory|prison|hotel|fort",
    "food": "pepper|mustard|melon|spinach|bacon|pumpkin|ginger|garlic|corn",
    "plural": "insects|trumpets|lobsters|buttons|rockets|pumpkins",
    "weather": "humid|sunny|misty",
}


class SpeechError(Exception):
    """Speech that cannot be made. Its message is one line: what is wrong, and where."""


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def sentence_maker(grammar: dict[str, str], rng: np.random.Generator) -> Callable[[], str]:
    """A function that returns another random sentence of the grammar at each call.

    Alternatives are dealt like cards, all of them before any comes again: no word stays rare by chance.
    """
    decks: dict[str, list[str]] = {name: [] for name in grammar}

    def draw(name: str) -> str:
        if not decks[name]:
            decks[name] = rng.permutation(re.split(r"[|\n]", grammar[name])).tolist()
        return re.sub(r"\{(\w+)\}", lambda found: draw(found[1]), decks[name].pop())

    def sentence() -> str:
        text = draw("sentence")
        return text[0].upper() + text[1:]

    return sentence


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, hyphenated ones whole."""
    return re.findall(r"[a-z]+(?:-[a-z]+)*", text.lower())


def spoken_sentences(seed: int = 0) -> dict[str, list[str]]:
    """The sentences of the splits `train`, `val`, `test` and `test_new_words`, all distinct.

    Every word of `val` and `test` occurs in `train`; every sentence of `test_new_words` has at least one word
    that occurs in no other split.
    """
    rng = np.random.default_rng(seed)
    known = sentence_maker(GRAMMAR, rng)
    extended = sentence_maker(GRAMMAR | {k: f"{GRAMMAR[k]}|{v}" for k, v in NEW_WORDS.items()}, rng)
    new_words = set(words_of(" ".join(NEW_WORDS.values())))
    splits: dict[str, list[str]] = {}
    taken: set[tuple[str, ...]] = set()
    heard: set[str] = set()
    for split, number in SPOKEN_SPLITS.items():
        sentence = extended if split == "test_new_words" else known
        splits[split] = []
        while len(splits[split]) < number:
            text = sentence()
            words = words_of(text)
            long_words = [word for word in words if len(word) > 3]
            # a long word that comes twice makes a clumsy sentence: 'the goat is older than the goat'
            if tuple(words) in taken or len(set(long_words)) < len(long_words) or len(text) > LONGEST:
                continue
            if split in ("val", "test") and not heard.issuperset(words):
                continue
            if split == "test_new_words" and new_words.isdisjoint(words):
                continue
            splits[split].append(text)
            taken.add(tuple(words))
        if split == "train":
            heard.update(*map(words_of, splits["train"]))
    return splits


@cache
def voice():
    """The synthesiser of this process: `voice()(text, speed=1.0, seed=0)` gives float32 samples at 24 kHz."""
    try:
        from hibari import Hibari

        return Hibari(threads=1)
    except Exception as error:  # not installed, not for this machine, or damaged: onnxruntime has errors of its own
        raise SpeechError(f"the voice is missing: {one_line(error)} (pip install hibari-tts)") from None


@cache
def other_voices():
    """The second synthesiser: `other_voices()(text, voice, speed, pitch)` gives float32 samples at 16 kHz.

    Its breath noise depends on all that it has spoken before: the same call sounds alike, but is not bit-identical.
    """
    try:
        from py_nanotts import NanoTTS
    except ImportError as error:
        raise SpeechError(f"the second voice is missing: {one_line(error)} (pip install py-nanotts)") from None
    return lambda *arguments: np.frombuffer(NanoTTS().speak(*arguments), np.int16) / np.float32(32_768)


def spoken_clip(text: str, seed: int, row: int, wide: bool = False) -> np.ndarray:
    """A text in a voice, a room, at a level and with a noise that are functions of (seed, row): int16 [samples].

    `wide` adds limited bands, and other voices, whose clips are alike each time, but not identical. Raises SpeechError
    for a text that has no sound, or that the voice cannot speak.
    """
    rng = np.random.default_rng((seed, row))
    shift = rng.integers(*SHIFTS, endpoint=True)  # played faster, the voice is higher: it speaks so much slower
    speed = rng.uniform(*RATES) * VOICE_RATE / (450 * shift)
    try:
        if wide and rng.random() < OTHERS:
            shift = round(shift * PICO_RATE / VOICE_RATE)
            speech = other_voices()(text, str(rng.choice(OTHER_VOICES)), speed, rng.uniform(*PICO_PITCHES))
        else:
            speech = voice()(text, speed=speed, seed=int(rng.integers(2**31)))
    except SpeechError:
        raise
    except Exception as error:  # it stumbles over a number of 200 digits
        raise SpeechError(f"{text[:40]!r} cannot be spoken ({one_line(error)})") from None
    if not (speech.any() and any(map(str.isalnum, text))):  # the voice breathes for "..."
        raise SpeechError(f"{text[:40]!r} has no sound")
    speech = resample_poly(speech, SPEECH_RATE // 450, shift).astype(np.float32)
    loud = np.flatnonzero(np.abs(speech) > 0.01 * np.abs(speech).max())  # it begins and ends with silence
    speech = speech[loud[0] : loud[-1] + 1]
    before, after = (rng.uniform(*PADDING, 2) * SPEECH_RATE).astype(int)
    limit = np.exp(rng.uniform(*np.log(BAND_LIMITS))) if wide and rng.random() < 0.5 else SPEECH_RATE / 2
    samples = coloured(np.pad(speech, (before, after)), room_response(rng), rng.uniform(*TILTS), limit)
    loudness = np.sqrt(np.mean(samples**2))
    samples += loudness * 10 ** (-rng.uniform(*NOISE) / 20) * background(samples.size, rng)
    samples *= 10 ** (rng.uniform(*LEVELS) / 20) / loudness
    return np.rint(32_767 * np.clip(samples, -1, 1)).astype(np.int16)


def room_response(rng: np.random.Generator) -> np.ndarray:
    """The impulse response of a small room: the sound itself, then noise that fades exponentially. float32 [samples]"""
    seconds, level = rng.uniform(*ROOM_SECONDS), rng.uniform(*ROOM_LEVEL)
    time = np.arange(int(seconds * SPEECH_RATE)) / SPEECH_RATE
    echo = rng.standard_normal(time.size) * 10 ** (-3 * time / seconds)
    response = echo * 10 ** (level / 20) / np.sqrt(np.sum(echo**2))
    response[0] = 1
    return response.astype(np.float32)


def coloured(samples: np.ndarray, response: np.ndarray, tilt: float, limit: float = SPEECH_RATE / 2) -> np.ndarray:
    """Samples in a room, `tilt` dB an octave louder at the top, without what is above `limit` Hz: float32 [samples]."""
    size = next_fast_len(samples.size + response.size, real=True)
    frequencies = rfftfreq(size, 1 / SPEECH_RATE)
    octaves = np.log2(np.maximum(frequencies, 100) / 1_000)  # flat below 100 Hz
    spectrum = rfft(samples, size) * rfft(response, size) * (10 ** (tilt * octaves / 20)).astype(np.float32)
    spectrum[frequencies > limit] = 0
    return irfft(spectrum, size)[: samples.size]


def background(samples: int, rng: np.random.Generator) -> np.ndarray:
    """White or pink noise of standard deviation 1: float32 [samples]."""
    noise = rng.standard_normal(next_fast_len(samples, real=True), dtype=np.float32)
    if rng.random() < 0.5:
        spectrum = rfft(noise)
        spectrum /= np.sqrt(np.maximum(np.arange(spectrum.size, dtype=np.float32), 1))  # power falls as 1 / frequency
        noise = irfft(spectrum, noise.size)
    return noise[:samples] / noise.std()


def write_clip(path: Path, text: str, seed: int, row: int, wide: bool) -> int:
    """Speak one row into a wav file; returns its number of samples."""
    samples = spoken_clip(text, seed, row, wide)
    wavfile.write(path, SPEECH_RATE, samples)
    return samples.size


def holds(folder: Path, record: dict) -> bool:
    """Whether a folder is a complete corpus with this record."""
    path = folder / "corpus.json"
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}  # on a pipe one would wait
        return json.loads(json.dumps(record)).items() <= found.items()
    except (OSError, ValueError, AttributeError, RecursionError):  # RecursionError: lists in lists in lists
        return False


def write_corpus(
    folder: Path, name: str, rows: list[Row], splits: dict, seed: int, jobs: int | None, wide: int = 0, **about
) -> None:
    """Speak the rows and lay them out as LJ Speech is, with a corpus.json that says what they are, and `about` them.

    The first `wide` rows vary more than the others.
    Everything is written to a folder beside `folder`, which takes its name at the end: a process killed at any
    moment leaves nothing that looks complete, and the next one clears away what it left. A second process that
    wants the same folder waits for the first. A folder that holds this very corpus is left as it is.
    Raises FileExistsError if something else is there, SpeechError for what cannot be spoken.
    """
    from filelock import FileLock

    try:
        voices = f"hibari-tts {version('hibari-tts')}, heart"
        if wide:
            voices += f"; py-nanotts {version('py-nanotts')}, {' and '.join(OTHER_VOICES)}"
    except PackageNotFoundError as error:
        raise SpeechError(f"the voice is missing: pip install {error.name}") from None
    metadata = "".join(f"{'|'.join(row)}\n" for row in rows)
    record = {
        "name": name,
        "kind": "spoken",
        "seed": seed,
        "voice": voices,
        "sample_rate": SPEECH_RATE,
        "clips": len(rows),
        "splits": {split: list(bounds) for split, bounds in splits.items()},  # first row, end row
        "varied": {
            "rate": RATES,
            "pitch_and_formants": [round(450 * shift / VOICE_RATE, 3) for shift in SHIFTS],
            "room_seconds": ROOM_SECONDS,
            "room_level_db": ROOM_LEVEL,
            "tilt_db_per_octave": TILTS,
            "noise_db_below": NOISE,
            "level_db": LEVELS,
        }
        | ({"train_band_limit_hz": BAND_LIMITS, "train_other_voices": OTHERS} if wide else {}),
        "metadata_sha256": hashlib.sha256(metadata.encode()).hexdigest(),
        **about,
    }
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.part-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if holds(folder, record):
            return
        if folder.exists():
            raise FileExistsError(f"{folder} exists and holds something else: remove it, or choose another folder")
        temporary = folder.with_name(f".{folder.name}.part-{os.getpid()}")
        try:
            (temporary / "wavs").mkdir(parents=True)
            tasks = (
                joblib.delayed(write_clip)(temporary / "wavs" / f"{identity}.wav", text, seed, number, number < wide)
                for number, (identity, _, text) in enumerate(rows)
            )
            clips = joblib.Parallel(n_jobs=jobs or joblib.cpu_count(), return_as="generator")(tasks)
            samples = sum(tqdm(clips, name, total=len(rows), unit="clip", disable=None))
            (temporary / "metadata.csv").write_bytes(metadata.encode())
            record["hours"] = round(samples / SPEECH_RATE / 3600, 3)
            (temporary / "corpus.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            temporary.rename(folder)
        except BrokenExecutor as error:  # the system kills a process where memory runs out
            raise SpeechError(f"a process that spoke was killed: try fewer -jobs ({one_line(error)})") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def consecutive(sizes: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Sizes of splits as bounds (first row, end row), one split after the other."""
    ends = list(accumulate(sizes.values()))
    return {split: (end - size, end) for (split, size), end in zip(sizes.items(), ends, strict=True)}


def make_spoken_corpus(folder: Path, seed: int = 0, jobs: int | None = None) -> None:
    """Make the spoken corpus of `spoken_sentences` in a folder, as `write_corpus` does, in `jobs` processes.

    The same seed makes the same bytes, whatever the number of processes (by default one a core).
    """
    sentences = spoken_sentences(seed)
    splits = consecutive({split: len(texts) for split, texts in sentences.items()})
    texts = enumerate(chain.from_iterable(sentences.values()))
    rows = [(f"spoken-{number:04d}", text, text) for number, text in texts]
    write_corpus(folder, "spoken corpus", rows, splits, seed, jobs)


def read_metadata(path: Path) -> list[Row]:
    """The rows (id, text, normalised text) of a metadata.csv in LJ Speech's format.

    Raises SpeechError, with the row, for anything that cannot be spoken.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise SpeechError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    rows, seen = [], set()
    for number, line in enumerate(lines, start=1):
        row = tuple(line.split("|"))
        if len(row) != 3:
            raise SpeechError(f"{path}, row {number}: {len(row)} columns instead of 3 (id|text|normalised text)")
        if not re.fullmatch(r"[\w-]+", row[0]):
            raise SpeechError(f"{path}, row {number}: {row[0]!r} cannot name a file")
        if row[0] in seen:
            raise SpeechError(f"{path}, row {number}: {row[0]} comes twice")
        if not any(character.isalnum() for character in row[2]):
            raise SpeechError(f"{path}, row {number}: {row[0]} has no text to speak")
        seen.add(row[0])
        rows.append(row)
    return rows


def speak_transcripts(
    metadata: Path, folder: Path, seed: int = 0, jobs: int | None = None, unread: list[str] | None = None
) -> None:
    """Speak the normalised texts of a metadata.csv into a folder with the same rows, as `write_corpus` does.

    The splits are the homework's for all of LJ Speech's 13,100 rows, else the same shares. `unread` names chapters
    (LJ001) and other lists (metadata.csv): their rows are left out of train and val, so that whoever learns from
    this corpus may be tested on recordings of them. Raises SpeechError for rows that cannot be spoken.
    """
    rows = read_metadata(Path(metadata))
    total = LJ_SPEECH_SPLITS["test"][1]
    members = {
        split: rows[first * len(rows) // total : end * len(rows) // total]
        for split, (first, end) in LJ_SPEECH_SPLITS.items()
    }
    chapters = {name for name in unread or [] if re.fullmatch(r"\w+", name)}
    ids = {row[0] for name in unread or [] if name not in chapters for row in read_metadata(Path(name))}
    left_out = [row[0] for row in members["train"] + members["val"] if row[0] in ids or row[0][:5] in chapters]
    for split in ("train", "val"):
        members[split] = [row for row in members[split] if row[0] not in set(left_out)]
    splits = consecutive({split: len(kept) for split, kept in members.items()})
    rows, wide = list(chain.from_iterable(members.values())), len(members["train"])
    write_corpus(folder, "LJ Speech texts, spoken", rows, splits, seed, jobs, wide, unread=left_out)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 2 for input that cannot be used (after one line on stderr), 130 when interrupted."""
    parser = argparse.ArgumentParser(
        description="Make the spoken corpus, or speak the texts of a metadata.csv.", usage=argparse.SUPPRESS
    )
    parser.add_argument("-out", type=Path, required=True, metavar="FOLDER", help="made in LJ Speech's layout")
    parser.add_argument("-transcripts", type=Path, metavar="FILE", help="rows of id|text|normalised text")
    parser.add_argument(
        "-unread", nargs="+", metavar="NAME", help="chapters and lists of rows to leave out of training: LJ001 a.csv"
    )
    parser.add_argument("-seed", type=int, default=0, help="of sentences, voices and noise (default: 0)")
    parser.add_argument("-jobs", type=int, help="processes (default: one a core)")
    args = parser.parse_args(arguments)
    if args.seed < 0 or (args.jobs is not None and args.jobs < 1):
        parser.error("-seed is at least 0, and -jobs at least 1")
    try:
        if args.transcripts:
            speak_transcripts(args.transcripts, args.out, args.seed, args.jobs, args.unread)
        else:
            make_spoken_corpus(args.out, args.seed, args.jobs)
    except (SpeechError, OSError) as error:
        print(f"offline_data.speech: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\noffline_data.speech: stopped; no part of a corpus is left", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    from offline_data import speech  # worker processes find its functions by this name, those of __main__ they do not

    sys.exit(speech.main())
