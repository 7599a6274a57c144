"""The whole notebook of question 3, run as Jupyter runs it, on a corpus of tones."""

import json
import re

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from rapidfuzz.distance import Levenshtein
from test_q3_training import make_tones

SMALL = {"width": 16, "encoder_blocks": 1, "n_mels": 20, "epochs": 2, "batch_size": 6, "average_epochs": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tones(tmp_path_factory.mktemp("notebook") / "tones")


@pytest.fixture
def run_notebook(folder, tmp_path, monkeypatch):
    """Run All with parameters as papermill sets them; returns the notebook with its outputs."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # Jupyter chooses its own

    def run(**parameters):
        notebook = nbformat.read(ROOT / "hw2-q3.ipynb", as_version=4)
        (place,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
        base = folder.parent
        given = {"data": str(folder), "data_dir": str(base / "data"), "runs_dir": str(base / "runs"), "threads": 1}
        given |= {"records_dir": str(base / "records"), "device": "cpu", "extra_clips": 1, "overrides": SMALL}
        source = "\n".join(f"{name} = {value!r}" for name, value in (given | parameters).items())
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(source))
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
        return notebook

    return run


def outputs(notebook, kind):
    """The content of all outputs of a MIME type, or of all that was printed."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and kind == output.name:
                found.append(output.text)
            elif kind in output.get("data", {}):
                found.append(output.data[kind])
    return found


def assert_whole(notebook, decoders=("LSTM", "transformer")):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert not re.search("Traceback|Warning", "".join(outputs(notebook, "stderr")))
    assert len(outputs(notebook, "image/png")) >= 5
    assert sum("<audio" in page for page in outputs(notebook, "text/html")) >= 2
    assert any("<table" in page and "T014" in page for page in outputs(notebook, "text/html"))  # transcripts
    said = outputs(notebook, "text/markdown")
    assert "tones" in said[0] and "SYNTHETIC" in said[0]  # what it is, before any number
    tables = [text for text in said if "|---" in text and "Damerau-Levenshtein" in text]
    assert len(tables) >= 3 and all(name in tables[0] for name in decoders)
    for split in ("test", "test_other"):
        assert any(split in table for table in tables)


def test_run_all_trains_both_decoders_and_the_next_time_loads_them(run_notebook, folder):
    first = run_notebook()
    assert_whole(first)
    records = {path: json.loads(path.read_text()) for path in (folder.parent / "records").glob("*.json")}
    assert sorted(record["config"]["decoder"] for record in records.values()) == ["lstm", "transformer"]
    assert all(record["dataset"]["kind"] == "spoken" and len(record["history"]) == 2 for record in records.values())
    for path, record in records.items():
        details = json.loads((path.parent / "details" / path.name).read_text())
        assert details["config"] == record["config"]
        for split in ("test", "test_other"):
            pairs = [(pair["said"], pair["written"]) for pair in details["transcripts"][split].values()]
            assert len(pairs) == record[split]["clips"]
            wrong = sum(Levenshtein.distance(*pair) for pair in pairs)
            assert wrong / sum(len(said) for said, _ in pairs) == pytest.approx(record[split]["cer"])
        looked = details["cross_attention"]
        shown = details["transcripts"]["test"][looked["clip"]]
        assert (shown["said"], shown["written"]) == (looked["said"], looked["written"])
        assert len(looked["weights"]) == len(looked["written"]) + 1
        assert all(sum(row) == pytest.approx(1, abs=0.05) for row in looked["weights"])  # each weight is rounded
        assert set(details["decoding"]) == {
            "clips",
            "greedy",
            *("beam of 8", "beam of 8, reranked by CTC", "CTC alone"),
        }
    models = {path: path.stat().st_mtime_ns for path in (folder.parent / "runs").glob("*/model.pt")}
    assert len(models) == 2

    second = run_notebook()
    assert_whole(second)
    assert "".join(outputs(second, "stdout")).count(", loaded from") == 2
    assert {path: path.stat().st_mtime_ns for path in models} == models
    assert outputs(second, "text/markdown") == outputs(first, "text/markdown")
    assert outputs(second, "image/png") == outputs(first, "image/png")


def test_run_all_with_the_homework_preset_and_one_decoder(run_notebook, folder):
    notebook = run_notebook(preset="homework", decoders="transformer", memorise=3, overrides=SMALL | {"n_mels": 21})
    said = "".join(outputs(notebook, "text/markdown"))
    assert "3 clips, learnt by heart" in said and "LSTM" not in "".join(outputs(notebook, "stdout"))
