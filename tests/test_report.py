"""The report: current, of the stated length, its figures and its analysis what the records give."""

import base64
import io
import json
import re
import subprocess
import sys

import figures
import matplotlib.image
import pytest
import transcripts
from conftest import ROOT

import report
from asr import kinds_of_errors


def test_the_committed_report_is_what_text_and_records_give():
    assert (ROOT / "report" / "report.pdf").read_bytes() == report.typeset(), "run `make report`"


def test_the_report_has_twelve_to_eighteen_pages():
    pages = re.findall(rb"/Type\s*/Page\b(?!s)", (ROOT / "report" / "report.pdf").read_bytes())
    assert 12 <= len(pages) <= 18


NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")
IMAGE = re.compile(r"data:image/png;base64,([\w+/=\s]+)")


def assert_same_pixels(ours, expected, name):
    """Two PNG files of the same size; a few pixels may differ between kinds of CPU."""
    ours, expected = matplotlib.image.imread(ours), matplotlib.image.imread(expected)
    assert ours.shape == expected.shape, name
    assert (abs(ours - expected) > 0.1).mean() < 1e-4, name


def assert_alike(ours, expected, name, tolerance):
    """Two texts, equal but for the last digits of their numbers, which may differ between kinds of CPU."""
    for image, wanted in zip(IMAGE.findall(ours), IMAGE.findall(expected), strict=True):
        assert_same_pixels(io.BytesIO(base64.b64decode(image)), io.BytesIO(base64.b64decode(wanted)), name)
    ours, expected = (IMAGE.sub("", text) for text in (ours, expected))
    ours, expected = (re.sub(r"\b[a-zA-Z]?[0-9a-f]{10}\b", "ID", text) for text in (ours, expected))
    assert NUMBER.sub("", ours) == NUMBER.sub("", expected), name
    found, wanted = ([float(number) for number in NUMBER.findall(text)] for text in (ours, expected))
    assert found == pytest.approx(wanted, rel=1e-6, abs=tolerance), name


def test_the_figures_are_what_the_records_give(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    figures.draw_all()
    committed = {path.name: path.read_text() for path in (ROOT / "report" / "figures" / "report").iterdir()}
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert drawn.keys() == committed.keys()
    for name in drawn:
        assert_alike(drawn[name], committed[name], name, 0.01)


def test_the_picture_of_the_readme_is_what_the_records_give(tmp_path, monkeypatch):
    committed = ROOT / "report" / "figures" / "overview.png"
    monkeypatch.setattr(figures, "OVERVIEW", tmp_path / "overview.png")
    figures.draw_overview()
    assert_same_pixels(tmp_path / "overview.png", committed, "overview.png")
    assert committed.stat().st_size < 100_000


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "report").glob("*.py")))
def test_every_program_of_the_report_answers_h_and_refuses_what_it_does_not_know(script):
    command = [sys.executable, ROOT / "report" / script]
    told = subprocess.run([*command, "-h"], capture_output=True, text=True, check=False, timeout=60)
    assert told.returncode == 0 and told.stdout.startswith("usage: ") and script in told.stdout
    refused = subprocess.run([*command, "-x"], capture_output=True, text=True, check=False, timeout=60)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and not refused.stdout


def test_the_analysis_is_what_the_transcripts_give(tmp_path, monkeypatch):
    recorded = json.loads((ROOT / "results" / "q3" / "analysis.json").read_text())
    monkeypatch.setattr(transcripts, "OUT", tmp_path / "analysis.json")
    transcripts.main()
    made = json.loads((tmp_path / "analysis.json").read_text())
    for key in ("groups", "real", "similarities"):
        assert_alike(json.dumps(made[key]), json.dumps(recorded[key]), key, 1e-9)


@pytest.mark.parametrize(
    ("said", "written", "kind", "characters"),
    [
        ("a cat sat", "a bat sat", "misspelt", 1),
        ("the red fox ran", "the fox ran", "skipped", 4),
        ("the fox ran", "the fox fox ran", "repeated", 4),
        ("the fox ran", "the blue fox ran", "invented", 5),
        ("one cup", "one jigsaw", "replaced", 6),
        ("no error", "no error", "misspelt", 0),
    ],
)
def test_kinds_of_errors_by_hand(said, written, kind, characters):
    expected = dict.fromkeys(("misspelt", "skipped", "repeated", "invented", "replaced"), 0)
    expected[kind] = pytest.approx(1000 * characters / len(said))
    assert kinds_of_errors([(said, written)]) == expected


def test_marked_transcripts_hold_both_texts():
    said, written = "the red fox ran", "a red dog ran off"
    pieces = transcripts.marked(said, written)
    assert "".join(p.get("same", "") + p.get("missed", "") for p in pieces) == said
    assert "".join(p.get("same", "") + p.get("added", "") for p in pieces) == written
    assert transcripts.marked("same", "same") == [{"same": "same"}]


def test_real_clips_are_chosen_by_their_error_rate_in_the_best_adapted_run():
    def row(decoder, pretrained, *written):
        texts = {str(i): {"said": "abcd", "written": text} for i, text in enumerate(written)}
        run = {"dataset": {"name": "real"}, "config": {"decoder": decoder}, "transcripts": {"test": texts}}
        return {"kind": "real", "pretrained": pretrained, "runs": [run]}

    worse, alone = row("lstm", "spoken", "", "", "", "a"), row("lstm", None, *["abcd"] * 4)
    better = row("transformer", "spoken", "ab", "xyz?", "abcd", "abc")
    assert transcripts.describe_real([alone]) is None
    found = transcripts.describe_real([worse, alone, better])
    assert found["decoder"] == "transformer"
    chosen = [(clip["cer"], clip["written"], clip["rate"]) for clip in found["clips"]]
    assert chosen == [("lowest", "abcd", 0), ("median", "abc", 0.25), ("highest", "xyz?", 1)]
