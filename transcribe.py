"""Write down what is said in recordings: a line of text for each file.

    python transcribe.py talk.mp3 "my notes.flac"
    python transcribe.py -weights runs/q3/.../model.safetensors talk.wav
    python transcribe.py -weights runs/q3/.../model.safetensors -export weights/mine.safetensors

It reads what soundfile reads (wav, flac, mp3, ogg), at any rate, with any number of channels, of any length. ffmpeg
converts the rest: ffmpeg -i memo.m4a memo.wav. The texts go to standard output, everything else to standard error.
The exit status is 2 if a file could not be used; the others are transcribed all the same.

In Python, from the folder of this script:

    import utils
    q3 = utils.notebook_definitions("hw2-q3.ipynb")
    model = q3.load_model("weights/q3-lstm.safetensors")
    print(q3.transcript_of("talk.mp3", model))
"""

import argparse
import sys
from pathlib import Path

from runs import InputError, Parser, load_weights, run_script, save_weights

HERE = Path(__file__).parent
BEST = "lstm"  # the better decoder of those in results/q3; its network is in weights/, made by `make weights`


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="recordings")
    parser.add_argument("-weights", type=Path, metavar="FILE", help="a trained network (default: weights/q3-*)")
    parser.add_argument("-decoder", choices=("lstm", "transformer"), help=f"the network's decoder (default: {BEST})")
    parser.add_argument("-device", default="auto", help="auto (the default), cpu, cuda, cuda:1, mps")
    parser.add_argument("-export", type=Path, metavar="FILE", help="write the network of -weights in half the size")
    args = parser.parse_args(arguments)
    if bool(args.files) == bool(args.export) or (args.export and not args.weights):
        parser.error("name recordings, or a network with -weights and a file for it with -export")
    if args.export and args.export.exists():
        parser.error(f"{args.export} exists: name another file, or remove it")
    return args


def say(text: str) -> None:
    """One line on standard error; what cannot be shown, as in odd names of files, becomes `?`."""
    print("".join(c if c.isprintable() else "?" for c in text), file=sys.stderr, flush=True)


def export(weights: Path, path: Path) -> None:
    """Write a network with its matrices in float16. Raises InputError if it is damaged."""
    tensors, about = load_weights(weights)
    save_weights(path, {name: t.half() if t.ndim > 1 else t for name, t in tensors.items()}, about)
    say(f"{path}: {path.stat().st_size:,} bytes")


def run(args: argparse.Namespace) -> None:
    if args.export:
        return export(args.weights, args.export)
    import utils

    weights = args.weights or HERE / "weights" / f"q3-{args.decoder or BEST}.safetensors"
    if not args.weights and not weights.exists():
        raise InputError(f"no network with the {args.decoder or BEST} decoder in weights/: name one with -weights")
    q3 = utils.notebook_definitions(HERE / "hw2-q3.ipynb")
    model = q3.load_model(weights, args.decoder).to(utils.choose_device(args.device))
    about = model.about
    say(f"{weights}: {q3.NAMES[about['decoder']]} decoder, trained on {about['trained_on']},")
    say(f"with a character error rate of {about['scores']['test']['cer']:.1%} on its test split")
    bad = 0
    for number, path in enumerate(args.files, start=1):
        say(f"[{number}/{len(args.files)}] {path}")
        try:
            print(q3.transcript_of(path, model), flush=True)
        except InputError as error:
            say(f"transcribe: {error}")
            bad += 1
        except MemoryError:
            say(f"transcribe: {path}: takes more memory than there is: cut it into shorter recordings")
            bad += 1
    if bad:
        raise InputError(f"{bad} of {len(args.files)} files could not be used")


def main(arguments: list[str] | None = None) -> int:
    return run_script("transcribe", parse_arguments, run, arguments, "stopped")


if __name__ == "__main__":
    sys.exit(main())
