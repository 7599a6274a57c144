"""The whole notebook of question 3, run by run_notebook.py as `make q3` does, on a corpus of tones: what it prints,
keeps and shows, what a stranger's corpus can put on its page, what it says of bad parameters, that it ends when killed.
"""

import html
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import ROOT, caller
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from rapidfuzz.distance import Levenshtein
from test_q3_models import STRANGE, Elements
from test_q3_training import OneAfterTheOther, make_tones
from traitlets.config import Config

import run_notebook

SMALL = {"width": 16, "encoder_blocks": 1, "n_mels": 20, "epochs": 2, "batch_size": 6}
EVIL = "<img src=x onerror=alert(1)>"  # may be the name of a file


def make_evil(folder: Path) -> Path:
    """Tones whose names and texts, where they are scored, would be live on a page that trusts them."""
    make_tones(folder)
    about = json.loads((folder / "corpus.json").read_text())
    (folder / "corpus.json").write_text(json.dumps(about | {"name": f"tones {STRANGE[0]} {STRANGE[2]}"}))
    rows = [line.split("|") for line in (folder / "metadata.csv").read_text().splitlines()]
    for number, row in enumerate(rows[12:], start=12):
        name = f"{EVIL} {number}"
        (folder / "wavs" / f"{row[0]}.wav").rename(folder / "wavs" / f"{name}.wav")
        rows[number] = [name, row[1], f"{row[2]} {STRANGE[number % 4]}"]
    (folder / "metadata.csv").write_text("".join("|".join(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("notebook")


def given_to(base, data, **parameters):
    given = {"data": str(data), "data_dir": str(base / "data"), "runs_dir": str(base / "runs"), "device": "cpu"}
    return given | {"extra_clips": 1, "overrides": SMALL} | parameters


def words(base, data, **parameters):
    """The command line after `run_notebook.py`."""
    given = given_to(base, data, records_dir=base / "records", **parameters)
    pairs = [word for name, value in given.items() if name != "overrides" for word in ("-p", name, str(value))]
    return ["-out", str(base / "out"), *pairs, "-y", yaml.safe_dump({"overrides": given["overrides"]})]


def start(base, *arguments):
    """run_notebook.py in a process of its own, called from another folder."""
    (base / "elsewhere").mkdir(exist_ok=True)
    environment = os.environ | {"IPYTHONDIR": str(base / "ipython")}
    environment.pop("MPLBACKEND", None)  # Jupyter chooses its own
    command = [sys.executable, str(ROOT / "run_notebook.py"), *arguments]
    options = {"cwd": base / "elsewhere", "env": environment, "text": True}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


@pytest.fixture(scope="module")
def evil(base):
    return make_evil(base / EVIL)


@pytest.fixture(scope="module")
def first(base, evil):
    """What a run of both decoders printed, the notebook with its outputs, and the page."""
    process = start(base, *words(base, evil))
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert list((base / "elsewhere").iterdir()) == []  # nothing is left where one happens to be
    notebook = nbformat.read(base / "out" / "hw2-q3.ipynb", as_version=4)
    return printed, notebook, (base / "out" / "hw2-q3.html").read_text()


@pytest.fixture
def run_here(base, tmp_path, monkeypatch):
    """Run All in this process, which has imported everything; returns what was printed, and all HTML."""
    monkeypatch.setenv("IPYTHONDIR", str(base / "ipython"))
    monkeypatch.setattr("loky.get_reusable_executor", lambda max_workers: OneAfterTheOther())
    monkeypatch.chdir(ROOT)
    shell = InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}))

    def run(**parameters):
        with capture_output() as captured:
            for cell in nbformat.read(ROOT / "hw2-q3.ipynb", as_version=4).cells:
                if cell.cell_type == "code":
                    shell.run_cell(cell.source.replace("%matplotlib inline", "")).raise_error()
                if "parameters" in cell.metadata.get("tags", []):
                    shell.user_ns.update(parameters)
        return captured.stdout, [output.data["text/html"] for output in captured.outputs if "text/html" in output.data]

    yield run
    shell.restore_sys_module_state()
    InteractiveShell.clear_instance()


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
    assert all(cell.execution_count for cell in code)
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert not re.search("Traceback|Warning", "".join(outputs(notebook, "stderr")))
    assert len(outputs(notebook, "image/png")) >= 8
    shown = outputs(notebook, "text/html")
    assert "tones" in shown[0] and "SYNTHETIC" in shown[0]  # what it is, before any number
    assert any("<audio" in page for page in shown)
    tables = [page for page in shown if "<table" in page and "Damerau-Levenshtein" in page]
    assert len(tables) >= 3 and all(name in tables[0] for name in decoders)
    for split in ("test", "test_other"):
        assert any(split in table for table in tables)
    assert {name for name in ("LSTM", "transformer") if name in tables[0]} == set(decoders)


def test_a_cell_fits_a_screen_and_something_is_soon_to_be_seen():
    cells = [c.source for c in nbformat.read(ROOT / "hw2-q3.ipynb", as_version=4).cells if c.cell_type == "code"]
    sizes = [len(source.splitlines()) for source in cells]
    first = next(number for number, source in enumerate(cells) if "display(" in source)
    assert max(sizes) <= 45 and sum(sizes[:first]) <= 60


def test_a_run_trains_both_decoders_and_keeps_records(first, base):
    _, notebook, _ = first
    assert_whole(notebook)
    records = {path: json.loads(path.read_text()) for path in (base / "records").glob("*.json")}
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
        ways = {"greedy", "beam of 8", "beam of 8, reranked by CTC", "CTC alone"}
        assert set(details["decoding"]) == {"clips", *ways}


def test_what_a_run_prints_is_short_and_for_people(first, base):
    printed, _, _ = first
    assert not re.search(r"Executing|<IPython|<Figure|Warning|\[IPKernelApp\]|Traceback|it/s", printed)
    for decoder in ("lstm       ", "transformer"):
        assert all(f"{decoder} epoch  {n} of 2: loss " in printed for n in (1, 2))
    assert printed.splitlines()[-1].startswith(f"open {base / 'out' / 'hw2-q3.html'}")
    assert len(printed.splitlines()) < 60


def test_the_page_needs_no_network_and_its_formulas_no_script(first):
    _, notebook, page = first
    found = Elements(page)
    assert not [value for name, value in found.attributes if name == "src" and not (value or "").startswith("data:")]
    assert "link" not in found.tags and 'src="http' not in page and "@import" not in page
    formulas = sum(len(re.findall(r"\$\$.+?\$\$", cell.source, re.DOTALL)) for cell in notebook.cells)
    assert page.count("<math") > formulas >= 5 and r"\frac" not in "".join(found.text)
    assert found.tags.count("img") >= 8 and "audio" in found.tags


def test_a_second_run_loads_what_the_first_has_trained(first, run_here, evil, base):
    models = {path: path.stat().st_mtime_ns for path in (base / "runs").glob("*/model.safetensors")}
    assert len(models) == 2
    printed, pages = run_here(**given_to(base, evil))
    assert " epoch " not in printed and printed.count(": finished on ") == 2
    assert {path: path.stat().st_mtime_ns for path in models} == models
    before = {page for page in outputs(first[1], "text/html") if "<table" in page}
    assert len(before) > 8 and before <= set(pages)


def test_the_homework_preset_one_decoder_and_clips_learnt_by_heart(run_here, base):
    parameters = {"preset": "homework", "decoders": "transformer", "memorise": 3, "overrides": SMALL | {"n_mels": 21}}
    printed, pages = run_here(**given_to(base, make_tones(base / "tones"), **parameters))
    assert "3 clips, learnt by heart" in "".join(pages)
    assert "LSTM" not in printed and "transformer epoch  2 of 2" in printed


def live(page):
    """What a page runs or loads: scripts that are no data, without their elements' names; handlers; addresses; tags."""
    found = Elements(page)
    scripts = re.findall(r"<script\b.*?</script>", page, re.DOTALL | re.IGNORECASE)
    assert len(scripts) == found.tags.count("script")
    handlers = {(name, value) for name, value in found.attributes if name.startswith("on")}
    addresses = {value for name, value in found.attributes if name in ("href", "src", "xlink:href") and value}
    addresses = {value for value in addresses if not value.startswith(("data:", "#"))}
    tags = {*found.tags} & {"iframe", "object", "embed", "base", "meta", "form"}
    scripts = {re.sub(r"[0-9a-f-]{36}", "", s) for s in scripts if not s.startswith('<script type="application/')}
    return scripts, handlers, addresses, tags


def test_names_and_texts_of_a_corpus_stay_names_and_texts(first, tmp_path):
    _, notebook, page = first
    text = "".join(Elements(page).text)
    assert STRANGE[0] in text and EVIL in text  # they are there
    harmless = json.dumps(notebook)
    for strange in (*STRANGE, EVIL):
        for form in (strange, html.escape(strange), html.escape(strange, quote=False)):
            harmless = harmless.replace(json.dumps(form)[1:-1], "harmless")
    run_notebook.write_page(nbformat.from_dict(json.loads(harmless)), tmp_path / "page.html")
    for ours, expected in zip(live(page), live((tmp_path / "page.html").read_text()), strict=True):
        assert ours == expected
    for shown in outputs(notebook, "text/html"):
        scripts, handlers, _, tags = live(shown)
        assert not scripts and not handlers and not tags


# ---------------------------------------------------------------------------------------------------
# What cannot be used


@pytest.fixture
def call(base, tmp_path, monkeypatch, capsys):
    """run_notebook.py's main in this process, from another folder."""
    monkeypatch.setenv("IPYTHONDIR", str(base / "ipython"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run_notebook.py"])
    call = caller(run_notebook, capsys)
    return lambda **parameters: call(*words(tmp_path, **{"data": "tones", **parameters}))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["-p", "epoch", "2"], "epoch"),
        (["-p", "overrides", "{epochs: 2"], "YAML"),
        (["-y", "overrides: {epochs: 2"], "YAML"),
        (["-y", "[1, 2]"], "YAML"),
        (["-y", "two"], "YAML"),
        (["-y", "{[1]: 2}"], ""),
        (["-p", "seed"], "-p"),
        (["-q"], "-q"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_named_in_one_line(tmp_path, monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run_notebook.py"])
    status, printed, complaint = caller(run_notebook, capsys)(*arguments)
    assert status == 2 and printed == "" and complaint.count("\n") == 1
    assert complaint.startswith("run_notebook.py: ") and named in complaint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("parameters", "named"), [({"data": "no/such/folder"}, "no/such/folder"), ({"preset": "better"}, "better")]
)
def test_parameters_that_cannot_be_used_are_named_in_the_last_line(call, base, first, evil, parameters, named):
    status, printed, complaint = call(**{"data": evil, "data_dir": base / "data"} | parameters)
    lines = (printed + complaint).strip().splitlines()
    assert status == 2 and len(lines) <= 5 and lines[-1].startswith("run_notebook.py: ") and named in lines[-1]
    assert "Traceback" not in printed + complaint


# ---------------------------------------------------------------------------------------------------
# Killed


def processes_of(root):
    """The processes that descend from `root`, itself among them, as (id, time of start): ids are used again."""
    parents, starts = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(entry.name)], starts[int(entry.name)] = int(fields[1]), fields[19]
    tree, size = {root}, 0
    while len(tree) > size:
        size = len(tree)
        tree |= {child for child, parent in parents.items() if parent in tree}
    return {(child, starts[child]) for child in tree if child in starts}


def alive(process):
    try:
        fields = Path(f"/proc/{process[0]}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] != "Z" and fields[19] == process[1]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_all_processes_end_when_the_run_is_killed(first, base, evil, tmp_path):
    process = start(base, *words(base, evil, runs_dir=tmp_path, decoders="lstm", overrides=SMALL | {"epochs": 10_000}))
    try:
        for line in process.stdout:
            if " epoch " in line:
                break
        family = processes_of(process.pid)
        assert len(family) >= 3  # it, the kernel, and a process that trains
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 10
    while (left := [one for one in family if alive(one)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    for one, _ in left:
        os.kill(one, signal.SIGKILL)  # not to train on behind the other tests
    process.stdout.close()
    assert not left
