"""How the decoders err, and what the similarities see: measured on the transcripts under results/q3/details.

python report/transcripts.py       write results/q3/analysis.json, in seconds; trains nothing
"""

import json
import sys
from collections import Counter
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results" / "q3"
sys.path.insert(0, str(RESULTS.parents[1]))

from runs import Parser, mean_and_std, read_json, run_environment, summarise, summarise_speech_runs, write_json

if __name__ == "__main__":
    Parser(__doc__).parse_args()  # -h is answered now: the notebook takes seconds to import

import numpy as np
import pandas as pd
from rapidfuzz.distance import Levenshtein

from asr import SIMILARITIES, kinds_of_errors
from utils import notebook_definitions

OUT = RESULTS / "analysis.json"
nb = notebook_definitions(RESULTS.parents[1] / "hw2-q3.ipynb")
Pairs = list[tuple[str, str]]  # what was said, what was written


def pairs_of(run: dict, split: str) -> Pairs:
    return [(pair["said"], pair["written"]) for pair in run["transcripts"][split].values()]


def error_rate(pairs: Pairs) -> float:
    return sum(Levenshtein.distance(*pair) for pair in pairs) / sum(len(said) for said, _ in pairs)


def describe_decoder(runs: list[dict], split: str) -> dict:
    """The errors of runs that differ in the seed alone; `commonest`: how many clips got the most frequent text."""
    pairs = [pairs_of(run, split) for run in runs]
    commonest = [max(Counter(written for _, written in p).values()) / len(p) for p in pairs]
    described = {"commonest": mean_and_std(commonest), "kinds": summarise([kinds_of_errors(p) for p in pairs])}
    if number := sum(runs[0]["new_words"][split].values()):
        described["new_words"] = number
        shares = [{fate: n / number for fate, n in run["new_words"][split].items()} for run in runs]
        described["fates"] = summarise(shares)
    return described


def marked(said: str, written: str) -> list[dict]:
    """A transcript as pieces: `same`, `missed` (said, not written) and `added` (written, not said)."""
    pieces = []
    for operation in Levenshtein.opcodes(said, written):
        source = said[operation.src_start : operation.src_end]
        target = written[operation.dest_start : operation.dest_end]
        parts = {"same": source} if operation.tag == "equal" else {"missed": source, "added": target}
        pieces += [{kind: part} for kind, part in parts.items() if part]
    return pieces


def examples(runs: dict[str, dict], split: str) -> list[dict]:
    """The first two sentences of a split that not all decoders wrote right, in the runs of the first seed."""
    together = zip(*(pairs_of(run, split) for run in runs.values()), strict=True)
    wrong = [pairs for pairs in together if any(said != written for said, written in pairs)]
    return [{d: marked(*pair) for d, pair in zip(runs, pairs, strict=True)} for pairs in wrong[:2]]


def describe_groups(rows: list[dict]) -> list[dict]:
    """The runs that differ in decoder and seed alone, put together."""
    groups = {}
    for row in rows:
        shared = {"dataset": {"name": row["dataset"], "kind": row["kind"]}}
        shared |= {key: row[key] for key in ("preset", "changes", "pretrained")}
        groups.setdefault(json.dumps(shared), {}).setdefault(row["decoder"], []).extend(row["runs"])
    described = []
    for shared, decoders in groups.items():
        splits, first = next(iter(decoders.values()))[0]["transcripts"], {d: runs[0] for d, runs in decoders.items()}
        by_split = {s: {d: describe_decoder(same, s) for d, same in decoders.items()} for s in splits}
        told = {split: examples(first, split) for split in splits}
        described.append(json.loads(shared) | {"splits": by_split, "examples": told})
    return described


def describe_real(rows: list[dict]) -> dict | None:
    """The clips of real speech of lowest, median and highest error rate, in the best run that was adapted to them."""
    adapted = [run for row in rows if row["pretrained"] and row["kind"] == "real" for run in row["runs"]]
    if not adapted:
        return None
    best = min(adapted, key=lambda run: error_rate(pairs_of(run, "test")))
    pairs = sorted(pairs_of(best, "test"), key=lambda pair: (error_rate([pair]), pair))
    chosen = {"lowest": pairs[0], "median": pairs[(len(pairs) - 1) // 2], "highest": pairs[-1]}
    clips = [{"cer": kind, "said": p[0], "written": p[1], "rate": error_rate([p])} for kind, p in chosen.items()]
    return {"decoder": best["config"]["decoder"], "dataset": best["dataset"]["name"], "clips": clips}


def describe_similarities(rows: list[dict]) -> dict:
    """The three similarities where the truth is known, and how they go with the error rate where it is measured."""
    runs = [run for row in rows if row["dataset"] == "spoken corpus" and not row["changes"] for run in row["runs"]]
    rng, said = np.random.default_rng(0), [pair[0] for pair in pairs_of(runs[0], "test")]
    made = {
        "anagram": [(text, "".join(rng.permutation(list(text)))) for text in said],
        "other sentence": list(zip(said, said[1:] + said[:1], strict=True)),
    }

    def scores(pairs: Pairs) -> pd.DataFrame:
        return pd.DataFrame([nb.string_similarities(*pair) for pair in pairs])[[*SIMILARITIES]]

    every = {pair for run in runs for split in run["transcripts"] for pair in pairs_of(run, split)}
    wrong = sorted((said, written) for said, written in every if written and written != said)
    found = scores(wrong).assign(cer=[error_rate([pair]) for pair in wrong])
    correlation = pd.DataFrame({way: found.corr(way)["cer"] for way in ("pearson", "spearman")}).loc[[*SIMILARITIES]]
    apart = found.assign(said=[p[0] for p in wrong], written=[p[1] for p in wrong])
    apart["gap"] = apart["damerau_levenshtein"] - apart["jaccard"]
    return {
        "made": {kind: scores(pairs).agg(["mean", "std"]).to_dict() for kind, pairs in made.items()},
        "sentences": len(said),
        "wrong_transcripts": len(wrong),
        "correlation_with_character_error_rate": correlation.to_dict("index"),
        "farthest_apart": apart.sort_values("gap", kind="stable").drop(columns=["gap", "cer"])[:2].to_dict("records"),
    }


def main() -> int:
    rows = [row for row in summarise_speech_runs(RESULTS) if not row["by_heart"]]
    for row in rows:
        row["runs"] = [read_json(RESULTS / "details" / file) for file in row["files"]]
    found = {"groups": describe_groups(rows), "real": describe_real(rows), "similarities": describe_similarities(rows)}
    write_json(OUT, run_environment() | found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
