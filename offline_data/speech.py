"""A spoken corpus, a stand-in for LJ Speech: sentences of a grammar, or given texts, in a synthetic voice.

    python -m offline_data.speech -out data/spoken                             # 1.4 hours in 30 s
    python -m offline_data.speech -transcripts metadata.csv -out data/lj-text  # LJ Speech's texts, 26 hours: 5 min

The voice is espeak-ng's, with the library and voices of the package `espeakng-loader`. espeak-ng is free software
under the GPL, version 3; it is called here, and no part of it is included.
"""

import argparse
import ctypes
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, chain, pairwise
from pathlib import Path

import joblib
import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from tqdm import tqdm

from offline_data import SPEECH_RATE

# The words are chosen so that their sound decides how they are spelt: no two of them are homophones, and
# espeak-ng says each as a person would.
FRAME = 1_024  # samples between two outputs of a recogniser with hop 256 and 4x subsampling: 21.5 a second
CTC_ROOM = 1.25  # outputs in every clip, in terms of those that CTC needs: characters, and one in each double letter
SLOWEST = 80  # words a minute: espeak-ng goes no slower
RATES, PITCHES, PITCH_RANGES = (125, 150), (30, 75), (30, 80)  # words a minute; espeak's scales of 0 to 99
GAINS, PADDING, NOISE = (-6.0, 1.0), (0.0, 0.2), (25.0, 45.0)  # dB; seconds before and after; dB below the speech
Row = tuple[str, str, str]  # id, text, normalised text
LONGEST = 90  # characters of a sentence
SPOKEN_SPLITS = {"train": 1_300, "val": 100, "test": 150, "test_new_words": 100}  # sentences
LJ_SPEECH_SPLITS = {"train": (0, 9_825), "val": (9_825, 10_480), "test": (10_480, 13_100)}  # the homework's rows

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


ESPEAK_SYNCHRONOUS, ESPEAK_DONT_EXIT, ESPEAK_UTF8 = 2, 0x8000, 1  # as in espeak-ng's speak_lib.h
ESPEAK_RATE, ESPEAK_PITCH, ESPEAK_RANGE = 1, 3, 4
ESPEAK_LOCK = threading.Lock()
EspeakCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@contextmanager
def espeak(voice: str) -> Iterator[ctypes.CDLL]:
    """espeak-ng's library, loaded afresh, ready to speak with `voice`, and unloaded in the end.

    What was spoken before leaves traces in a loaded library: its place in the table of pitch flutter, its gain
    control and more are static variables that its own initialisation leaves alone. Loaded afresh, which takes
    5 ms, it says the same text with the same samples every time. One thread at a time has it; others wait.
    """
    try:
        import _ctypes  # ctypes itself never unloads

        import espeakng_loader

        voices, path = espeakng_loader.get_data_path(), espeakng_loader.get_library_path()
    except (ImportError, RuntimeError) as error:
        raise SpeechError(f"espeak-ng is missing: {error} (pip install espeakng-loader)") from None
    unload = _ctypes.FreeLibrary if os.name == "nt" else _ctypes.dlclose
    with ESPEAK_LOCK:
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            raise SpeechError(f"espeak-ng cannot be loaded: {error} (pip install espeakng-loader)") from None
        try:
            rate = library.espeak_Initialize(ESPEAK_SYNCHRONOUS, 0, voices.encode(), ESPEAK_DONT_EXIT)
            if rate != SPEECH_RATE:
                raise SpeechError(f"espeak-ng cannot use the voices in {voices} (it wants a path below 160 bytes)")
            if library.espeak_SetVoiceByName(voice.encode()) != 0:
                raise SpeechError(f"espeak-ng has no voice {voice!r}")
            yield library
        finally:
            library.espeak_Terminate()
            unload(library._handle)


def espeak_version() -> str:
    with espeak("en-us") as library:
        library.espeak_Info.restype = ctypes.c_char_p
        return library.espeak_Info(None).decode()


def speak(
    text: str, *, words_per_minute: int = 140, pitch: int = 50, pitch_range: int = 50, voice: str = "en-us"
) -> np.ndarray:
    """Speak a text: int16 [samples] at 22,050 Hz, the same ones for the same arguments.

    Pitch (50 is about 100 Hz) and its range (0 is monotonous) are on espeak-ng's scales of 0 to 99.
    Raises SpeechError if espeak-ng or the voice is missing.
    """
    pieces = []

    @EspeakCallback
    def collect(samples, number: int, _events) -> int:
        if number > 0:
            pieces.append(ctypes.string_at(samples, 2 * number))
        return 0

    with espeak(voice) as library:
        for parameter, value in ((ESPEAK_RATE, words_per_minute), (ESPEAK_PITCH, pitch), (ESPEAK_RANGE, pitch_range)):
            library.espeak_SetParameter(parameter, int(value), 0)
        library.espeak_SetSynthCallback(collect)
        data = text.encode()
        library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 1, 0, ESPEAK_UTF8, None, None)
    return np.frombuffer(b"".join(pieces), dtype=np.int16).copy()


def ctc_length(text: str) -> int:
    """The outputs that CTC needs for a text: one a character, and a blank within each pair of equal ones."""
    text = text.lower()
    return len(text) + sum(a == b for a, b in pairwise(text))


def background(samples: int, rng: np.random.Generator) -> np.ndarray:
    """White or pink noise of standard deviation 1: float32 [samples]."""
    noise = rng.standard_normal(next_fast_len(samples, real=True), dtype=np.float32)
    if rng.random() < 0.5:
        spectrum = rfft(noise)
        spectrum /= np.sqrt(np.maximum(np.arange(spectrum.size, dtype=np.float32), 1))  # power falls as 1 / frequency
        noise = irfft(spectrum, noise.size)
    return noise[:samples] / noise.std()


def spoken_clip(text: str, seed: int, row: int) -> np.ndarray:
    """A text in a voice, at a level and with a noise that are functions of (seed, row): int16 [samples].

    It is spoken more slowly than drawn where the characters would come too fast for CTC. Raises SpeechError for a
    text that has no sound.
    """
    rng = np.random.default_rng((seed, row))
    rate = rng.integers(*RATES, endpoint=True)
    pitch, pitch_range = rng.integers(*PITCHES, endpoint=True), rng.integers(*PITCH_RANGES, endpoint=True)
    before, after = (rng.uniform(*PADDING, 2) * SPEECH_RATE).astype(int)
    enough = int(CTC_ROOM * ctc_length(text) + 1) * FRAME
    speech = speak(text, words_per_minute=rate, pitch=pitch, pitch_range=pitch_range)
    if not speech.any():
        raise SpeechError(f"{text!r} has no sound")
    while before + speech.size + after < enough and rate > SLOWEST:
        rate = max(SLOWEST, int(0.96 * rate))
        speech = speak(text, words_per_minute=rate, pitch=pitch, pitch_range=pitch_range)
    after = max(after, enough - before - speech.size)  # a row of dots has more characters than sound
    samples = np.pad(speech.astype(np.float32), (before, after))
    noise = np.sqrt(np.mean(samples**2)) * 10 ** (-rng.uniform(*NOISE) / 20) * background(samples.size, rng)
    samples = (samples + noise) * 10 ** (rng.uniform(*GAINS) / 20)
    return np.rint(np.clip(samples, -32_768, 32_767)).astype(np.int16)


def write_clip(path: Path, text: str, seed: int, row: int) -> int:
    """Speak one row into a wav file; returns its number of samples."""
    import soundfile

    samples = spoken_clip(text, seed, row)
    soundfile.write(path, samples, SPEECH_RATE, subtype="PCM_16")
    return samples.size


def holds(folder: Path, record: dict) -> bool:
    """Whether a folder is a complete corpus with this record."""
    try:
        found = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        return record.items() <= found.items()
    except (OSError, ValueError, AttributeError):
        return False


def write_corpus(folder: Path, name: str, rows: list[Row], splits: dict, seed: int, jobs: int | None) -> None:
    """Speak the rows and lay them out as LJ Speech is, with a corpus.json that says what they are.

    Everything is written to a folder beside `folder`, which takes its name at the end: a process killed at any
    moment leaves nothing that looks complete, and the next one clears away what it left. A second process that
    wants the same folder waits for the first. A folder that holds this very corpus is left as it is.
    Raises FileExistsError if something else is there.
    """
    from filelock import FileLock

    metadata = "".join(f"{'|'.join(row)}\n" for row in rows)
    record = {
        "name": name,
        "kind": "spoken",
        "seed": seed,
        "voice": f"espeak-ng {espeak_version()}, en-us",
        "sample_rate": SPEECH_RATE,
        "clips": len(rows),
        "splits": {split: list(bounds) for split, bounds in splits.items()},  # first row, end row
        "words_per_minute": list(RATES),
        "signal_to_noise_db": list(NOISE),
        "metadata_sha256": hashlib.sha256(metadata.encode()).hexdigest(),
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
                joblib.delayed(write_clip)(temporary / "wavs" / f"{identity}.wav", text, seed, number)
                for number, (identity, _, text) in enumerate(rows)
            )
            clips = joblib.Parallel(n_jobs=jobs or joblib.cpu_count(), return_as="generator")(tasks)
            samples = sum(tqdm(clips, f"speaking the {name}", total=len(rows), unit="clip"))
            (temporary / "metadata.csv").write_bytes(metadata.encode())
            record["hours"] = round(samples / SPEECH_RATE / 3600, 3)
            (temporary / "corpus.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            temporary.rename(folder)
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


def speak_transcripts(metadata: Path, folder: Path, seed: int = 0, jobs: int | None = None) -> None:
    """Speak the normalised texts of a metadata.csv into a folder with the same rows, as `write_corpus` does.

    The splits are the homework's for all of LJ Speech's 13,100 rows, else the same shares. All of LJ Speech
    takes about five minutes on two idle cores. Raises SpeechError for rows that cannot be spoken.
    """
    rows = read_metadata(Path(metadata))
    total = LJ_SPEECH_SPLITS["test"][1]
    splits = {
        split: (first * len(rows) // total, end * len(rows) // total)
        for split, (first, end) in LJ_SPEECH_SPLITS.items()
    }
    write_corpus(folder, "LJ Speech texts, spoken", rows, splits, seed, jobs)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 2 for input that cannot be used (after one line on stderr), 130 when interrupted."""
    parser = argparse.ArgumentParser(
        description="Make the spoken corpus, or speak the texts of a metadata.csv.", usage=argparse.SUPPRESS
    )
    parser.add_argument("-out", type=Path, required=True, metavar="FOLDER", help="made in LJ Speech's layout")
    parser.add_argument("-transcripts", type=Path, metavar="FILE", help="rows of id|text|normalised text")
    parser.add_argument("-seed", type=int, default=0, help="of sentences, voices and noise (default: 0)")
    parser.add_argument("-jobs", type=int, help="processes (default: one a core)")
    args = parser.parse_args(arguments)
    if args.seed < 0 or (args.jobs is not None and args.jobs < 1):
        parser.error("-seed is at least 0, and -jobs at least 1")
    try:
        if args.transcripts:
            speak_transcripts(args.transcripts, args.out, args.seed, args.jobs)
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
