"""The report: current, of the stated length, its figures and its analysis what the records give."""

import base64
import io
import json
import re
import subprocess
import sys

import figures
import matplotlib.image
import pictures
import pytest
import transcripts
from conftest import ROOT

import report


def test_the_committed_report_is_what_text_and_records_give():
    command = [sys.executable, ROOT / "report" / "report.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_report_that_is_not_current_is_noticed(tmp_path, monkeypatch, capsys):
    made = report.typeset()
    (tmp_path / "report.pdf").write_bytes(made + b"\n")
    monkeypatch.setattr(report, "typeset", lambda: made)
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    assert report.main() == 1
    assert "make report" in capsys.readouterr().err


def test_the_report_has_eight_to_fourteen_pages():
    pages = re.findall(rb"/Type\s*/Page\b(?!s)", (ROOT / "report" / "report.pdf").read_bytes())
    assert 8 <= len(pages) <= 14


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
    monkeypatch.setattr(pictures, "PATH", tmp_path / "overview.png")
    pictures.draw_overview()
    assert_same_pixels(tmp_path / "overview.png", committed, "overview.png")
    assert committed.stat().st_size < 100_000


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "report").glob("*.py")))
def test_every_program_of_the_report_answers_h_and_refuses_what_it_does_not_know(script):
    command = [sys.executable, ROOT / "report" / script]
    told = subprocess.run([*command, "-h"], capture_output=True, text=True, check=False, timeout=60)
    assert told.returncode == 0 and told.stdout.startswith("usage: ") and f"report/{script}" in told.stdout
    refused = subprocess.run([*command, "-x"], capture_output=True, text=True, check=False, timeout=60)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and not refused.stdout


def test_the_analysis_is_what_the_transcripts_give(tmp_path, monkeypatch):
    recorded = json.loads((ROOT / "results" / "q3" / "analysis.json").read_text())
    monkeypatch.setattr(transcripts, "OUT", tmp_path / "analysis.json")
    transcripts.main()
    made = json.loads((tmp_path / "analysis.json").read_text())
    for key in ("groups", "similarities"):
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
    assert transcripts.kinds_of_errors([(said, written)]) == expected


def test_marked_transcripts_hold_both_texts():
    said, written = "the red fox ran", "a red dog ran off"
    pieces = transcripts.marked(said, written)
    assert "".join(p.get("same", "") + p.get("missed", "") for p in pieces) == said
    assert "".join(p.get("same", "") + p.get("added", "") for p in pieces) == written
    assert transcripts.marked("same", "same") == [{"same": "same"}]


def test_groups_by_length_hold_every_sentence_once():
    pairs = [("a" * n, "a" * (n - 1)) for n in range(20, 1, -1)]
    groups = transcripts.error_by_length(pairs)
    assert [group["characters"] for group in groups] == [3.5, 7.5, 11.5, 15.5, 19]  # 19 sentences: 4, 4, 4, 4 and 3
    assert groups[-1]["cer"] == pytest.approx(3 / (18 + 19 + 20))
