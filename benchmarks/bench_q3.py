"""Training and decoding of hw2-q3.ipynb against the course's way, interleaved in one process on one thread.

    python benchmarks/bench_q3.py -data ../shared/data/LJSpeech-1.1 [-rounds 3] [-out results/q3/bench.json]

Training, in seconds of speech a second (padding does not count). Ours: the notebook's `train_epoch` with the preset
`improved`, eight clips of like length a step. The course's way, with the notebook's modules: every clip padded to 20 s
(2,754 frames) and taken for that long, two convolutions of kernel 3 that shorten it by 2, texts padded to 99 tokens of
which the pads count in the loss; eight clips per step, for the course's 64 want some 20 GB and take longer a clip. Also
timed, without a bar: that way at its fastest: two clips per step, and attention without a mask to apply.

Greedy decoding, in seconds for the same clips by the same trained network, whose texts must be the same. Ours:
`generate`, which keeps what it has computed and stops at the stop. The course's way: audio padded to 20 s (masked, so
that the texts are ours), and at each of 98 steps the whole text so far goes through the decoder. Also timed, without a
bar: the skeleton's LSTM keeps its state, but makes keys and values of the audio anew at every step. The networks are
those that `make q3` on the spoken corpus leaves in runs/q3; `-checkpoints` names others, and `-checkpoint_data` what
they were trained on.

All in float32. A ratio compares medians over the rounds. Exit status 1 if one is below its bar, or texts differ.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from runs import InputError, Parser, number


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("-rounds", type=number(int, 1), default=3)
    parser.add_argument("-data", default="spoken", help="to train on: ljspeech, spoken, or a folder")
    parser.add_argument("-data_dir", type=Path, default=Path("data"))
    parser.add_argument(
        "-checkpoints", type=Path, nargs=2, metavar=("LSTM", "TRANSFORMER"), help="two files model.safetensors"
    )
    parser.add_argument("-checkpoint_data", default="spoken", help="what the networks of -checkpoints were trained on")
    parser.add_argument("-out", type=Path, help="write a record")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse_arguments(None)  # -h and mistakes are answered now: PyTorch takes seconds to import

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

import asr
import runs
import utils

q3 = utils.notebook_definitions(Path(__file__).parents[1] / "hw2-q3.ipynb")

TRAINING_BAR, DECODING_BAR = 12, 15  # so many times as fast
PADDED_SECONDS, PADDED_FRAMES, PADDED_HOP, PADDED_TOKENS = 20, 2754, 160, 99  # of the course's skeleton
TRAINING_BATCH, TRAINING_BATCHES, FASTEST_BATCH = 8, 4, 2
DECODING_CLIPS, DECODING_BATCH = 32, 16  # the skeleton tests with batches of 16
LEAST_SECONDS = 2.0
SEED = 42


def interleave(ways: dict[str, Callable], rounds: int) -> tuple[dict, dict]:
    """Seconds a call, by clock and way, each way once a round; and what each way returned last.

    A way is called again until LEAST_SECONDS have passed, and the mean of these calls counts.
    """
    times, results = {"wall": {name: [] for name in ways}, "cpu": {name: [] for name in ways}}, {}
    for _ in range(rounds):
        for name, way in ways.items():
            calls, started, started_cpu = 0, time.perf_counter(), time.process_time()
            while calls == 0 or time.perf_counter() - started < LEAST_SECONDS:
                results[name] = way()
                calls += 1
            times["wall"][name].append((time.perf_counter() - started) / calls)
            times["cpu"][name].append((time.process_time() - started_cpu) / calls)
    return times, results


# ---------------------------------------------------------------------------------------------------
# Training


class OurTraining:
    """The notebook's own `train_epoch`, untouched, with CTC and guide on, in float32."""

    def __init__(self, decoder: str, batches: list[list], cache: utils.FeatureCache):
        utils.set_seed(SEED)
        settings = replace(q3.PRESETS["improved"], warmup_steps=0)  # the guide waits for the warm-up's end
        model = q3.SpeechToText(decoder, settings)
        optimizer = torch.optim.AdamW(
            model.parameters(), settings.learning_rate, settings.betas, weight_decay=settings.weight_decay, fused=True
        )
        self.accelerator = Accelerator(cpu=True, mixed_precision="no")
        self.objective, self.optimizer = self.accelerator.prepare(q3.Objective(model, settings), optimizer)
        self.run = asr.SpeechRun(decoder, "improved", settings, {}, SEED, cache, Path())
        self.batches = batches

    def __call__(self) -> float:
        parts = self.accelerator, self.objective, self.optimizer, self.batches
        return q3.train_epoch(self.run, *parts, epoch=0)["loss"]


class UnmaskedAttention(q3.MultiHeadAttention):
    """As in the course's skeleton: nothing is masked, and queries and keys are scaled instead of their products."""

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        query = self.split(self.query(x))
        scale = query.shape[3] ** -0.25
        weights = ((query * scale) @ (keys * scale).transpose(2, 3)).softmax(dim=3)
        return self.output((weights @ values).transpose(1, 2).flatten(2))


class CourseTraining:
    """A step as in the course's skeleton, with the statement's four blocks. Features are made and padded beforehand."""

    def __init__(self, decoder: str, clips: Sequence, sample_rate: int, attention=q3.MultiHeadAttention):
        utils.set_seed(SEED)
        settings = replace(q3.PRESETS["homework"], hop_length=PADDED_HOP)
        self.model = q3.SpeechToText(decoder, settings)
        for block in (*self.model.encoder.blocks, self.model.decoder.cross_block):
            block.attention = attention(settings.width, settings.heads)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), settings.learning_rate)
        self.label_smoothing = settings.label_smoothing

        extract, _ = q3.extractor(sample_rate, settings)
        vectorizer = q3.TokenVectorizer(PADDED_TOKENS - 2)
        self.audio = torch.zeros(len(clips), PADDED_FRAMES, settings.n_mels)
        self.text = torch.full((len(clips), PADDED_TOKENS), vectorizer.PAD)
        for row, clip in enumerate(clips):
            samples, _ = utils.read_wav(clip.path, sample_rate)
            features = torch.from_numpy(extract(samples, sample_rate))[:PADDED_FRAMES]
            self.audio[row, : len(features)] = features
            tokens = torch.tensor(vectorizer.encode(clip.text))
            self.text[row, : len(tokens)] = tokens
        self.lengths = torch.full((len(clips),), PADDED_FRAMES)

    def __call__(self) -> float:
        self.optimizer.zero_grad()
        logits = self.model(self.audio, self.lengths, self.text[:, :-1])
        loss = F.cross_entropy(logits.transpose(1, 2), self.text[:, 1:], label_smoothing=self.label_smoothing)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def choose_batches(cache: utils.FeatureCache, number: int) -> list[list]:
    """`number` batches of training clips, spread over all lengths; in the first epoch batches go by length."""
    settings = replace(q3.PRESETS["improved"], batch_size=TRAINING_BATCH)
    clips = cache.clips("train")
    lengths = np.array([cache.frames(clip) for clip in clips])
    batches = q3.make_batches(lengths, settings, SEED, epoch=0)
    if len(batches) < number:
        raise InputError(f"{cache.corpus.name}: {len(clips)} training clips are too few: {number} batches are needed")
    chosen = [batches[(2 * i + 1) * len(batches) // (2 * number)] for i in range(number)]
    return [[clips[i] for i in batch] for batch in chosen]


def compare_training(decoder: str, cache: utils.FeatureCache, rounds: int) -> dict:
    batches = choose_batches(cache, TRAINING_BATCHES)
    clips = [clip for rank in zip(*batches, strict=False) for clip in rank]  # of each length in turn
    rate = cache.corpus.sample_rate
    ways = {
        "ours": OurTraining(decoder, batches, cache),
        "course": CourseTraining(decoder, clips[:TRAINING_BATCH], rate),
        "course, at its fastest": CourseTraining(decoder, clips[:FASTEST_BATCH], rate, UnmaskedAttention),
    }
    times, _ = interleave(ways, rounds)
    # A padded step takes as long whatever its clips: it is credited with clips of the mean length of ours.
    mean = sum(clip.seconds for clip in clips) / len(clips)
    speech = {name: mean * (len(clips) if name == "ours" else len(way.text)) for name, way in ways.items()}
    medians = {clock: {name: statistics.median(t) for name, t in by_way.items()} for clock, by_way in times.items()}
    rates = {clock: {name: speech[name] / t for name, t in by_way.items()} for clock, by_way in medians.items()}
    return {
        "clips": len(clips),
        "mean_clip_seconds": mean,
        "speech_seconds_per_round": speech,
        "speech_seconds_per_second": rates,
        "ratio_wall": {name: rates["wall"]["ours"] / rate for name, rate in rates["wall"].items()},
        "ratio_cpu": {name: rates["cpu"]["ours"] / rate for name, rate in rates["cpu"].items()},
        "rounds": times,
    }


# ---------------------------------------------------------------------------------------------------
# Decoding


def until_stop(tokens: Tensor) -> list[list[int]]:
    """Rows of `tokens` [B, U], start first, up to and without the stop, as `generate` gives them."""
    stop = q3.TokenVectorizer.STOP
    rows = tokens[:, 1:].tolist()
    return [row[: row.index(stop)] if stop in row else row for row in rows]


@torch.inference_mode()
def course_generate(
    model, padded_frames: int, audio: Tensor, audio_lengths: Tensor, steps: int, keep_state: bool = False
) -> list[list[int]]:
    """Greedy decoding as in the course's skeleton, but with its audio's padding masked, so that the texts are ours.

    `steps` times the whole text so far goes through the decoder; with `keep_state` (the skeleton's LSTM) only the last
    token does. Keys and values of the audio are computed at every step.
    """
    audio = F.pad(audio, (0, 0, 0, padded_frames - audio.shape[1]))  # [B, padded_frames, n_mels]
    memory, memory_mask = model.encoder(audio, audio_lengths)
    text = torch.full((len(audio), 1), q3.TokenVectorizer.START)
    past = None
    for _ in range(steps):
        if keep_state:
            state = replace(model.decoder.start(memory, memory_mask), past=past)
            logits, state = model.decoder.step(text[:, -1:], state)
            past = state.past
        else:
            logits = model.decoder(text, memory, memory_mask)
        text = torch.cat([text, logits[:, -1:].argmax(dim=2)], dim=1)
    return until_stop(text)


def compare_decoding(model, cache: utils.FeatureCache, rounds: int) -> dict:
    model.settings = replace(model.settings, attention_window=None)  # the course's way has none
    clips = cache.clips("test")
    clips = clips[:: max(1, len(clips) // DECODING_CLIPS)][:DECODING_CLIPS]
    batches = [q3.collate(b, cache, model.vectorizer, "cpu") for b in q3.in_batches(clips, cache, DECODING_BATCH)]
    steps = max(PADDED_TOKENS, *(text.shape[1] for _, _, text in batches)) - 1
    padded_frames = PADDED_SECONDS * cache.corpus.sample_rate // q3.PRESETS["improved"].hop_length + 1
    padded_frames = max(padded_frames, *(audio.shape[1] for audio, _, _ in batches))

    def decode(generate: Callable) -> list[list[int]]:
        return [tokens for audio, lengths, _ in batches for tokens in generate(audio, lengths, steps)]

    ways = {
        "ours": partial(decode, model.generate),
        "course": partial(decode, partial(course_generate, model, padded_frames)),
    }
    if isinstance(model.decoder, q3.TextDecoderRecurrent):
        ways["course, state kept"] = partial(decode, partial(course_generate, model, padded_frames, keep_state=True))
    times, texts = interleave(ways, rounds)
    medians = {clock: {name: statistics.median(t) for name, t in by_way.items()} for clock, by_way in times.items()}
    return {
        "clips": len(clips),
        "speech_seconds": sum(clip.seconds for clip in clips),
        "steps": steps,
        "padded_frames": padded_frames,
        "texts_identical": all(text == texts["ours"] for text in texts.values()),
        "stopped": sum(len(tokens) < steps for tokens in texts["ours"]),
        "seconds": medians,
        "ratio_wall": {name: t / medians["wall"]["ours"] for name, t in medians["wall"].items()},
        "ratio_cpu": {name: t / medians["cpu"]["ours"] for name, t in medians["cpu"].items()},
        "rounds": times,
    }


def load_speech(source: str, data_dir: Path) -> utils.FeatureCache:
    corpus = utils.load_speech(source, data_dir)
    return utils.cached_features(corpus, *q3.extractor(corpus.sample_rate, q3.PRESETS["improved"]), data_dir)


def find_checkpoints(cache: utils.FeatureCache) -> list[Path]:
    """Those of the finished runs of `make q3` on the clips of `cache`. Raises InputError if there are none."""
    shared = "improved", q3.PRESETS["improved"], {}, SEED, cache, Path("runs/q3")
    runs = [asr.SpeechRun(decoder, *shared) for decoder in q3.NAMES]
    if not all(run.is_finished() for run in runs):
        raise InputError(f"no finished runs on {cache.corpus.name} in runs/q3: run `make q3` on them first")
    return [run.folder / "model.safetensors" for run in runs]


def judge(record: dict) -> list[dict]:
    """What was measured beside its bar."""
    rows = []
    for what, bar in (("training", TRAINING_BAR), ("decoding", DECODING_BAR)):
        for decoder, result in record[what].items():
            value = result["ratio_wall"]["course"]
            rows.append({"what": f"{what}, {q3.NAMES[decoder]}", "value": value, "bar": bar, "kept": value >= bar})
    return rows


def measure(args: argparse.Namespace) -> dict:
    decoding_cache = load_speech(args.checkpoint_data, args.data_dir)
    checkpoints = dict(zip(q3.NAMES, args.checkpoints or find_checkpoints(decoding_cache), strict=True))
    models = {decoder: q3.load_model(path, decoder) for decoder, path in checkpoints.items()}
    training_cache = load_speech(args.data, args.data_dir)
    training, decoding = {}, {}
    for decoder in tqdm(q3.NAMES, desc="benchmark", disable=None, leave=False):
        training[decoder] = compare_training(decoder, training_cache, args.rounds)
        decoding[decoder] = compare_decoding(models[decoder], decoding_cache, args.rounds)
    return {
        "config": {
            "rounds": args.rounds,
            "seed": SEED,
            "dtype": "float32",
            "batch": {"training": TRAINING_BATCH, "course, at its fastest": FASTEST_BATCH, "decoding": DECODING_BATCH},
            "course": {"frames": PADDED_FRAMES, "hop_length": PADDED_HOP, "tokens": PADDED_TOKENS},
            "checkpoints": {decoder: str(path) for decoder, path in checkpoints.items()},
        },
        "dataset": {"training": training_cache.corpus.description, "decoding": decoding_cache.corpus.description},
        "training": training,
        "decoding": decoding,
    }


def show(record: dict) -> None:
    def row(name: str, value: str, result: dict) -> None:
        wall, cpu = result["ratio_wall"][name], result["ratio_cpu"][name]
        print(f"    {name:28s}{value:>10s}" + (f"{wall:10.1f}{cpu:10.1f}" if name != "ours" else ""))

    columns = f"{'ratio':>10s}{'CPU time':>10s}"
    print(f"{'training: seconds of speech a second':42s}{columns}   {record['dataset']['training']['name']}")
    for decoder, result in record["training"].items():
        print(f"  {q3.NAMES[decoder]}")
        for name, value in result["speech_seconds_per_second"]["wall"].items():
            row(name, f"{value:.2f}", result)
    print(f"{'greedy decoding: seconds':42s}{columns}   {record['dataset']['decoding']['name']}")
    for decoder, result in record["decoding"].items():
        same = "the same texts" if result["texts_identical"] else "DIFFERENT TEXTS"
        print(f"  {q3.NAMES[decoder]}: {result['clips']} clips, {same}")
        for name, value in result["seconds"]["wall"].items():
            row(name, f"{value:.3f}", result)
    print(f"{'times as fast as the course':32s}{'measured':>10s}{'bar':>10s}")
    for bar in record["bars"]:
        print(f"{bar['what']:32s}{bar['value']:10.1f}{bar['bar']:10g}{'' if bar['kept'] else '   MISSED'}")


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)

    runs.git_state()
    torch.set_num_threads(1)
    try:
        record = measure(args)
    except InputError as error:
        print(f"bench_q3.py: {error}", file=sys.stderr)
        return 2
    record["bars"] = judge(record)
    show(record)
    if args.out:
        runs.write_json(args.out, record | {"threads": 1, "device": "cpu"} | runs.run_environment())
    same = all(result["texts_identical"] for result in record["decoding"].values())
    return 0 if same and all(bar["kept"] for bar in record["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
