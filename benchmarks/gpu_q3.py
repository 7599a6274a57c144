"""Question 3 on a GPU, for bench_gpu.py: training, decoding, and what the notebook reaches.

Of the notebook this uses the names PRESETS, SpeechToText (with `generate`), Objective, TokenVectorizer, extractor and
collate, and the records that its runs leave.
"""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from bench_q1 import DTYPES, device_costs

import utils
from runs import InputError, one_line, read_json

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK, DECODERS, PRESET = ROOT / "hw2-q3.ipynb", ("lstm", "transformer"), "improved"
RATE = 22_050  # Hz


class Piece(NamedTuple):
    """What `collate` needs of a clip."""

    row: int
    text: str
    seconds: float


class Speech(NamedTuple):
    """The notebook's definitions, and features [frames, mels] of clips, the shortest first."""

    q3: ModuleType
    features: dict[Piece, np.ndarray]
    kind: str  # "spoken", or "random": noise of such lengths


def load(number: int, quick: bool, leave_out: Callable[[str], None]) -> Speech:
    """Clips of the spoken corpus; where that cannot be made, and for `quick`, noise."""
    q3, rate, kind = utils.notebook_definitions(NOTEBOOK), RATE, "random"
    try:
        if quick:
            raise InputError("it takes too long for -quick")
        corpus = utils.load_speech("spoken", ROOT / "data")
        kind, rate = corpus.kind, corpus.sample_rate
        clips = [(utils.read_wav(clip.path, rate)[0], clip.text) for clip in corpus.splits["train"][:number]]
    except (ImportError, InputError) as error:
        leave_out(f"the spoken corpus, for which noise stands in; {one_line(error)}")
        rng = np.random.default_rng(42)
        lengths = rng.uniform(2, 10, number)  # seconds; LJ Speech's are 1 to 10
        clips = [
            (rng.normal(0, 0.05, int(n * rate)), "".join(rng.choice([*"etaoin shr"], int(12 * n)))) for n in lengths
        ]
    extract, _ = q3.extractor(rate, q3.PRESETS[PRESET])
    clips = enumerate(sorted(clips, key=lambda clip: len(clip[0])))
    return Speech(q3, {Piece(i, text, len(x) / rate): extract(np.float32(x), rate) for i, (x, text) in clips}, kind)


def training(
    speech: Speech, decoder: str, dtype: str, device: str, settings=None
) -> Callable[[list[Piece]], torch.Tensor]:
    """A step on a batch of clips, as the notebook's after its warm-up; it returns the three sums of losses."""
    q3, features, _ = speech
    settings = settings or q3.PRESETS[PRESET]
    utils.set_seed(42)
    model = q3.SpeechToText(decoder, settings).to(device)
    objective, vectorizer = q3.Objective(model, settings), q3.TokenVectorizer()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def step(clips: list[Piece]) -> torch.Tensor:
        batch = q3.collate(clips, features, vectorizer, device)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            losses = objective(*batch, True)
        (losses.sum() / len(clips)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return losses.detach()

    return step


def in_steps(step: Callable, clips: list, size: int) -> list:
    return [step(clips[first : first + size]) for first in range(0, len(clips), size)]


def training_speed(
    speech: Speech, device: str, sizes: list[int], rounds: int, left: Callable, leave_out: Callable
) -> dict:
    """Seconds of speech trained a second, and peak memory, by the number of clips per step."""
    clips, rows = [*speech.features][:: max(1, len(speech.features) // 64)][:64], []
    seconds = sum(clip.seconds for clip in clips)
    for decoder in DECODERS:
        for dtype in DTYPES if device == "cuda" else ["float32"]:
            if left() < 0:
                leave_out(f"training of the {decoder} decoder in {dtype}; no time is left")
                continue
            step = training(speech, decoder, dtype, device)
            try:
                costs = device_costs({str(size): partial(in_steps, step, clips, size) for size in sizes}, rounds)
            except RuntimeError as error:  # out of memory, or a device without bfloat16
                leave_out(f"training of the {decoder} decoder in {dtype}; {one_line(error)}")
                continue
            rates = {size: 1e3 * seconds / ms for size, ms in costs["ms"].items()}
            rows.append({"decoder": decoder, "dtype": dtype, "speech_seconds_per_second": rates} | costs)
    return {"speech": speech.kind, "clips": len(clips), "rows": rows}


def decoding_speed(speech: Speech, device: str) -> dict:
    """Greedy decoding in batches of 64, float32, by networks that are not trained: they write as much as they may."""
    (q3, features, kind), written = speech, {}

    def decode(decoder: str, model: torch.nn.Module) -> None:
        def characters(clips: list[Piece]) -> int:
            audio, lengths, _ = q3.collate(clips, features, q3.TokenVectorizer(), device)
            return sum(map(len, model.generate(audio, lengths)))

        written[decoder] = sum(in_steps(characters, [*features], 64))

    utils.set_seed(42)
    models = {decoder: q3.SpeechToText(decoder, q3.PRESETS[PRESET]).to(device).eval() for decoder in DECODERS}
    costs = device_costs({decoder: partial(decode, decoder, model) for decoder, model in models.items()}, 1)
    return {"speech": kind, "clips": len(features), "characters": written} | costs


def similarity(results: Path, seconds: float, leave_out: Callable[[str], None]) -> dict | None:
    """The notebook's validation similarity after all epochs, seed 42, beside the record of the same on a CPU.

    Its runs are kept in runs/gpu-q3, and go on there where `seconds` were too short.
    """
    folder = ROOT / "runs" / "gpu-q3"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "papermill", NOTEBOOK, folder / "out.ipynb", "--cwd", ROOT, "--no-progress-bar"]
    for name, value in {"data": "spoken", "data_dir": ROOT / "data", "runs_dir": folder, "seed": 42}.items():
        command += ["-p", name, value]
    try:
        subprocess.run(list(map(str, command)), check=True, timeout=max(1.0, seconds), stdout=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return leave_out("the notebook did not finish in time; it goes on with -q3 -minutes 15")
    here = [read_json(path) for path in sorted(folder.glob("*/record.json"))]
    recorded = [read_json(path) for path in sorted((results / "q3").glob("*.json"))]
    rows = {}
    for record in here:
        about = [record[key] for key in ("config", "dataset", "seed")]
        alike = [r for r in recorded if [r.get(key) for key in ("config", "dataset", "seed")] == about]
        rows[record["config"]["decoder"]] = {
            r["device"]: {"similarity": r["val"]["damerau_levenshtein"], "seconds": r["seconds"]}
            for r in [*alike, record]
        }
    return rows
