"""Shared by the tests: the question's module, small data sets, and the real scans where they are at hand."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("MPLBACKEND", "Agg")

# Real scans lie beside the project where it is developed; they are not part of the repository.
REAL_SCANS = ROOT.parent / "shared" / "data" / "oct"
needs_real_scans = pytest.mark.skipif(not REAL_SCANS.is_dir(), reason="the real scans are not at hand")

import utils  # noqa: E402
from offline_data.phantoms import oct_phantoms  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def q2():
    return importlib.import_module("hw2-q2")


@pytest.fixture(scope="session")
def small_arrays():
    """A few phantoms in OCTMNIST's layout: enough for every code path, too few to learn much."""
    return oct_phantoms(num_train=203, num_val=60, num_test=40)


@pytest.fixture
def small_npz(tmp_path, small_arrays):
    path = tmp_path / "small.npz"
    np.savez(path, **small_arrays)
    return path


@pytest.fixture
def run_script(tmp_path):
    """Run hw2-q2.py as a user does, in an empty folder; returns the finished process."""

    def run(*arguments, **options):
        command = [sys.executable, str(ROOT / "hw2-q2.py"), *map(str, arguments)]
        options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300} | options
        return subprocess.run(command, check=False, **options)

    return run


@pytest.fixture
def call_main(q2, tmp_path, monkeypatch, capsys):
    """Run hw2-q2.py's main in this process (quicker); returns exit status, stdout and stderr."""
    monkeypatch.setitem(utils.STYLE, "savefig.dpi", 20)  # quicker to draw
    monkeypatch.chdir(tmp_path)
    return caller(q2, capsys)


def caller(module, capsys):
    """A function that runs a module's main with some arguments; it returns exit status, stdout and stderr."""

    def call(*arguments):
        try:
            status = module.main([str(a) for a in arguments])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return call


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
