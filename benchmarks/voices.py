"""What each variation of the synthetic voice is worth to a network that has to follow a person.

    python benchmarks/voices.py -texts metadata.csv -real LJSpeech-1.1 -out results/q3/voices.json

The same texts of LJ Speech are spoken several times: with everything varied, with nothing, and with one kind of
variation left out. A network is trained on each for the same number of epochs, and scored on 30 real clips, none of
whose texts it has read. It takes twenty minutes on two cores, and resumes: corpora and runs lie under data/voices and
runs/voices.
"""

import argparse
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest import mock

import joblib

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from runs import InputError, Parser, number, run_environment, run_script, write_json

# What stays as it is in each variant: names of offline_data.speech, with a value that varies nothing
STEADY = {
    "rate": {"RATES": (1.0, 1.0)},
    "pitch and formants": {"SHIFTS": (53, 53), "PICO_PITCHES": (1.0, 1.0)},
    "room": {"ROOM_LEVEL": (-60.0, -60.0)},
    "noise": {"NOISE": (45.0, 45.0)},
    "tilt and band limits": {"TILTS": (0.0, 0.0), "BAND_LIMITS": (11_025, 11_025)},
    "other voices": {"OTHERS": 0.0},
}
VARIANTS = {
    "everything varied": {},
    "nothing varied": {name: value for names in STEADY.values() for name, value in names.items()},
    **{f"without: {kind}": names for kind, names in STEADY.items()},
}
SETTINGS = {"local_kernel": None, "dropout": 0.1, "spec_augment": True, "attention_window": 1.0}
SEED, REAL_CLIPS = 42, 30


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("-texts", type=Path, required=True, metavar="FILE", help="metadata.csv of LJ Speech")
    parser.add_argument("-real", type=Path, required=True, metavar="FOLDER", help="real clips, of chapter LJ001")
    parser.add_argument("-out", type=Path, required=True, metavar="FILE", help="the record")
    parser.add_argument("-rows", type=number(int, 20), default=500, help="texts (default: %(default)s)")
    parser.add_argument("-epochs", type=number(int, 1), default=10, help="of each network (default: %(default)s)")
    parser.add_argument("-jobs", type=number(int, 1), default=2, help="networks at once (default: %(default)s)")
    return parser.parse_args(arguments)


def speak(texts: Path, rows: int, folder: Path, steady: dict) -> None:
    """Speak every n-th text of a list, chapter LJ001 apart, with what is `steady` not varied."""
    from offline_data import speech

    chosen = [row for row in speech.read_metadata(texts) if not row[0].startswith("LJ001")]
    chosen = chosen[:: max(1, len(chosen) // rows)][:rows]
    val = len(chosen) // 20
    splits = speech.consecutive({"train": len(chosen) - 2 * val, "val": val, "test": val})
    with ExitStack() as stack:
        for name, value in steady.items():
            stack.enter_context(mock.patch.object(speech, name, value))
        speech.write_corpus(folder, folder.name, chosen, splits, SEED, jobs=1, wide=splits["train"][1])


def measure(name: str, args: argparse.Namespace) -> dict:
    """Speak, train and score one variant."""
    import torch

    import asr
    import utils

    torch.set_num_threads(1)
    q3 = utils.notebook_definitions(ROOT / "hw2-q3.ipynb")
    folder = Path("data", "voices", f"{args.rows} texts, {name.replace(':', '')}")
    speak(args.texts, args.rows, folder, VARIANTS[name])
    corpus = utils.load_speech(str(folder), also_test=str(args.real))
    clips = corpus.splits["test_real"]
    clips = clips[:: max(1, len(clips) // REAL_CLIPS)][:REAL_CLIPS]
    corpus = replace(corpus, splits=corpus.splits | {"test_real": clips})
    changes = SETTINGS | {"epochs": args.epochs}
    settings = q3.choose_settings("improved", changes)
    cache = utils.cached_features(corpus, *q3.extractor(corpus.sample_rate, settings), folder.parent)
    run = asr.SpeechRun("transformer", "improved", settings, changes, SEED, cache, Path("runs", "voices"))
    if not run.is_finished():
        q3.train(run, cpu=True)
    record, model = run.record(), q3.load_model(run.folder / "model.safetensors")
    scores = {split: {key: record[split][key] for key in ("damerau_levenshtein", "cer")} for split in run.test_splits}
    for split, found in scores.items():
        batches = [q3.collate([clip], cache, model.vectorizer, model.device)[:2] for clip in cache.clips(split)]
        texts = [model.vectorizer.decode(q3.ctc_transcript(model, *batch)[0]) for batch in batches]
        said = [model.vectorizer.reference(clip.text) for clip in cache.clips(split)]
        found |= {"cer_by_ctc": q3.score(said, texts)["cer"], "clips": len(said)}
    print(f"{name}: real speech, CER {scores['test_real']['cer']:.1%}, by CTC {scores['test_real']['cer_by_ctc']:.1%}")
    return {
        "variant": name,
        "steady": VARIANTS[name],
        "seconds": record["seconds"],
        "dataset": record["dataset"],
        **scores,
    }


def run(args: argparse.Namespace) -> None:
    if not args.texts.is_file() or not args.real.is_dir():
        raise InputError(f"{args.texts} must be a file, and {args.real} a folder")
    tasks = (joblib.delayed(measure)(name, args) for name in VARIANTS)
    variants = joblib.Parallel(n_jobs=args.jobs)(tasks)
    about = {"rows": args.rows, "epochs": args.epochs, "preset": "improved", **SETTINGS, "decoder": "transformer"}
    write_json(args.out, run_environment() | {"seed": SEED, "config": about, "variants": variants})


if __name__ == "__main__":
    sys.exit(run_script("voices", parse_arguments, run, None, "stopped; the same command goes on"))
