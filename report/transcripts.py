"""How the decoders err, and what the similarities see: measured on the transcripts under results/q3/details.

python report/transcripts.py       write results/q3/analysis.json, in seconds; trains nothing
"""

import json
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np
from rapidfuzz.distance import Levenshtein
from scipy.stats import pearsonr, spearmanr

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from runs import Parser, mean_and_std, run_environment, summarise, write_json

if __name__ == "__main__":
    Parser(__doc__).parse_args()  # -h is answered now: the notebook takes seconds to import

from asr import learnt_by_heart, wrong_stretches
from utils import notebook_definitions

OUT = ROOT / "results" / "q3" / "analysis.json"
nb = notebook_definitions(ROOT / "hw2-q3.ipynb")
BINS = 5  # groups of equally many sentences, by length
RUN = 4  # wrong characters side by side that make a run: about a word
Pairs = list[tuple[str, str]]  # what was said, what was written


def read_details(folder: Path) -> list[dict]:
    """The details of the recorded runs, but for those that learnt the clips of their test by heart."""
    details = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [d for d in details if not learnt_by_heart(d)]


def pairs_of(details: dict, split: str) -> Pairs:
    return [(pair["said"], pair["written"]) for pair in details["transcripts"][split].values()]


def error_by_length(pairs: Pairs) -> list[dict]:
    """Character error rate of groups of sentences of like length."""
    ordered = sorted(pairs, key=lambda pair: len(pair[0]))
    groups = [ordered[part[0] : part[-1] + 1] for part in np.array_split(np.arange(len(ordered)), BINS)]
    return [
        {
            "characters": float(np.mean([len(said) for said, _ in group])),
            "cer": sum(Levenshtein.distance(*pair) for pair in group) / sum(len(said) for said, _ in group),
        }
        for group in groups
    ]


def kinds_of_errors(pairs: Pairs) -> dict[str, float]:
    """Wrong characters in 1,000 spoken ones, by kind.

    A stretch of `RUN` or more characters that were written for nothing counts as `repeated` where the same stretch
    stands elsewhere in what was written, else as `invented`; one that was not written as `skipped`; one written in
    the place of another as `replaced`. Shorter ones are `misspelt`.
    """
    counts = dict.fromkeys(("misspelt", "skipped", "repeated", "invented", "replaced"), 0)
    for said, written in pairs:
        for source, target in wrong_stretches(said, written):
            if max(len(source), len(target)) < RUN:
                kind = "misspelt"
            elif not target:
                kind = "skipped"
            elif source:
                kind = "replaced"
            else:
                kind = "repeated" if written.count(target) > 1 else "invented"
            counts[kind] += max(len(source), len(target))
    characters = sum(len(said) for said, _ in pairs)
    return {kind: 1000 * count / characters for kind, count in counts.items()}


def commonest_share(pairs: Pairs) -> float:
    """The share of clips for which the most frequent text was written: near 1 where a decoder does not listen."""
    return max(Counter(written for _, written in pairs).values()) / len(pairs)


def describe_decoder(runs: list[dict], split: str) -> dict:
    """The errors of runs that differ in the seed alone."""
    pairs = [pairs_of(run, split) for run in runs]
    described = {
        "seeds": [run["seed"] for run in runs],
        "commonest": mean_and_std([commonest_share(p) for p in pairs]),
        "kinds": summarise([kinds_of_errors(p) for p in pairs]),
        "by_length": [summarise(list(group)) for group in zip(*map(error_by_length, pairs), strict=True)],
    }
    fates = [run["new_words"][split] for run in runs]
    if number := sum(fates[0].values()):
        described["new_words"] = number
        described["fates"] = summarise([{fate: n / number for fate, n in f.items()} for f in fates])
    return described


def marked(said: str, written: str) -> list[dict]:
    """A transcript as pieces: `same`, `missed` (said, not written) and `added` (written, not said)."""
    pieces = []
    for operation in Levenshtein.opcodes(said, written):
        source = said[operation.src_start : operation.src_end]
        target = written[operation.dest_start : operation.dest_end]
        if operation.tag == "equal":
            pieces.append({"same": source})
            continue
        pieces += [{"missed": source}] if source else []
        pieces += [{"added": target}] if target else []
    return pieces


def examples(runs: dict[str, dict], split: str, number: int = 3) -> list[dict]:
    """The first sentences of a split that not all decoders wrote right, in the runs of the first seed."""
    pairs = {decoder: pairs_of(run, split) for decoder, run in runs.items()}
    together = zip(*pairs.values(), strict=True)
    wrong = [i for i, of_all in enumerate(together) if any(said != written for said, written in of_all)]
    return [{decoder: marked(*pairs[decoder][i]) for decoder in pairs} for i in wrong[:number]]


def describe_similarities(details: list[dict]) -> dict:
    """The three similarities where the truth is known, and how they go with the error rate where it is measured."""
    rng = np.random.default_rng(0)
    names = ("jaccard", "cosine", "damerau_levenshtein")
    said = [pair[0] for pair in pairs_of(details[0], "test")]
    made = {
        "anagram": [(text, "".join(rng.permutation(list(text)))) for text in said],
        "other sentence": list(zip(said, said[1:] + said[:1], strict=True)),
    }
    writer = {}  # wrong transcript -> the first run that wrote it, of those with a preset's own settings
    for d in details:
        for split in [] if d["changes"] else d["transcripts"]:
            for text, written in pairs_of(d, split):
                if written and written != text:
                    writer.setdefault((text, written), f"{d['config']['preset']}, {d['config']['decoder']}")
    wrong = sorted(writer)
    scores = [nb.string_similarities(*pair) for pair in wrong]
    rates = [Levenshtein.distance(*pair) / len(pair[0]) for pair in wrong]
    correlation = {}
    for name in names:
        values = [score[name] for score in scores]
        correlation[name] = {
            "pearson": float(pearsonr(values, rates).statistic),
            "spearman": float(spearmanr(values, rates).statistic),
        }
    apart = sorted(range(len(wrong)), key=lambda i: scores[i]["damerau_levenshtein"] - scores[i]["jaccard"])
    return {
        "made": {
            kind: {name: mean_and_std([nb.string_similarities(*p)[name] for p in pairs]) for name in names}
            for kind, pairs in made.items()
        },
        "sentences": len(said),
        "sentences_of": details[0]["dataset"]["name"],
        "wrong_transcripts": len(wrong),
        "correlation_with_character_error_rate": correlation,
        "farthest_apart": [
            {"said": wrong[i][0], "written": wrong[i][1], "by": writer[wrong[i]], **scores[i]} for i in apart[:3]
        ],
    }


def main() -> int:
    details = read_details(ROOT / "results" / "q3" / "details")

    def shared(d: dict) -> tuple[str, str, str]:
        return d["dataset"]["name"], d["config"]["preset"], json.dumps(d["changes"], sort_keys=True)

    groups = []
    for (dataset, preset, changes), members in groupby(sorted(details, key=shared), shared):
        members = list(members)
        by_decoder = {}
        for member in sorted(members, key=lambda d: (d["config"]["decoder"], d["seed"])):
            by_decoder.setdefault(member["config"]["decoder"], []).append(member)
        splits = members[0]["transcripts"]
        groups.append(
            {
                "dataset": {"name": dataset, "kind": members[0]["dataset"]["kind"]},
                "preset": preset,
                "changes": json.loads(changes),
                "splits": {s: {d: describe_decoder(runs, s) for d, runs in by_decoder.items()} for s in splits},
                "examples": {s: examples({d: runs[0] for d, runs in by_decoder.items()}, s) for s in splits},
            }
        )
    record = {**run_environment(), "groups": groups, "similarities": describe_similarities(details)}
    write_json(OUT, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
