"""What the three questions share: seeds and devices, data loading, run records, plotting.

from utils import load_oct
data = load_oct("auto")                    # OCTMNIST if it can be had, else phantoms, and it says which
images, labels = data.splits["train"]      # uint8 [N, 28, 28] and int64 [N]
"""

import argparse
import hashlib
import json
import math
import os
import platform
import random
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, cached_property, partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

import offline_data
from offline_data import OCT_CLASSES


class InputError(Exception):
    """Input that cannot be used. Its message is one line: what is wrong, and what to do."""


# ---------------------------------------------------------------------------------------------------
# Seeds and devices


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and PyTorch, and ask for deterministic kernels where there is a choice."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (libraries draw from the global state)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU. Raises InputError for a device this machine lacks."""
    if name == "auto":
        available = torch.cuda.is_available(), torch.backends.mps.is_available()
        return torch.device("cuda" if available[0] else "mps" if available[1] else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a round trip: naming a device does not prove that it works
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"-device {name}: {reason} (use auto, cpu, cuda, cuda:N or mps)") from None
    return device


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of PyTorch's generators that a run on `device` draws from, by kind of device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what `random_state` took. Raises InputError if it was taken on another kind of device."""
    kinds = {"cpu", device.type}
    if set(state) != kinds:
        there = "-device " + ({*state} - {"cpu"} or {"cpu"}).pop()
        raise InputError(f"the run was started on another kind of device: go on with {there}")
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state["mps"].cpu())


# ---------------------------------------------------------------------------------------------------
# The command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line instead of the whole usage, and exit status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind: type, low: float, high: float = math.inf, low_fits: bool = True):
    """An argparse type: an int or float from `low` (itself allowed if `low_fits`) to below `high`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value < high) or (value == low and not low_fits):
            wanted = "a whole number" if kind is int else "a number"
            bounds = f"{'at least' if low_fits else 'above'} {low}" + (f" and below {high}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(f"needs {wanted} {bounds}, not {text!r}")
        return value

    return parse


# ---------------------------------------------------------------------------------------------------
# Files written whole or not at all, and run records


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it to `path`.

    A process killed at any moment leaves either the old file or the new one, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: savers such as matplotlib's choose the format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, record: dict) -> None:
    """Write a record as JSON, whole or not at all. Raises ValueError for NaN: it is not JSON."""
    text = json.dumps(record, indent=1, allow_nan=False)
    # Lists of numbers (histories, confusion matrices) read better on one line.
    text = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda found: "[" + " ".join(found[1].split()) + "]", text)
    write_whole(path, lambda temporary: temporary.write_text(text + "\n"))


def run_environment() -> dict:
    """How and where a run was made: the part of a record that is the same for every question."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "gpu": gpu},
        "git": git_state(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache
def git_state() -> dict | None:
    """The commit of this code and whether tracked files differ from it; None outside a git checkout.

    Call it early: it is looked up once, and files may change while a run goes on.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # Records and figures are what a run writes; only other files make it another program.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results", ":!report", ":!*.md")
        return {"commit": git("rev-parse", "HEAD"), "clean": not changed}
    except (OSError, subprocess.SubprocessError):
        return None


def mean_and_deviation(values: list[float]) -> dict:
    """Mean and sample standard deviation (None for a single value, which has none)."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}


# ---------------------------------------------------------------------------------------------------
# Retinal scans (Q2)

OCTMNIST_URL = "https://zenodo.org/records/10519652/files/octmnist.npz?download=1"
OCTMNIST_MD5 = "c68d92d5b585d8d81f7112f81e2d0842"
STALL_SECONDS = 6.0  # a download that brings nothing for this long is given up
SCAN_SIZE = 28  # pixels
SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = {".jpeg", ".jpg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
CLASS_FOLDERS = ("CNV", "DME", "DRUSEN", "NORMAL")  # of the original OCT2017 scans, in OCTMNIST's label order


@dataclass(frozen=True)
class OctData:
    """Retinal scans: for each of train, val and test, images uint8 [N, 28, 28] and labels int64 [N]."""

    name: str  # "OCTMNIST", "OCT phantoms", or the name of the user's file or folder
    kind: str  # "real" or "phantom"
    splits: dict[str, tuple[np.ndarray, np.ndarray]]

    @cached_property
    def description(self) -> dict:
        """The `dataset` entry of a record: name, kind, scans per class of each split, checksum of the pixels."""
        digest = hashlib.sha256()
        for split in SPLITS:
            for array in self.splits[split]:
                digest.update(np.ascontiguousarray(array))
        counts = {s: np.bincount(self.splits[s][1], minlength=len(OCT_CLASSES)).tolist() for s in SPLITS}
        return {"name": self.name, "kind": self.kind, "counts": counts, "sha256": digest.hexdigest()}


def load_oct(source: str = "auto", data_dir: Path | str = "data") -> OctData:
    """Load retinal scans.

    `source` is "octmnist", "phantom", a path to an .npz of OCTMNIST's layout, a folder of images in class
    folders (see `read_oct_folder`), or "auto": OCTMNIST from `data_dir`, the working folder or ~/.medmnist,
    else downloaded, else phantoms. Raises InputError for what cannot be used.
    """
    data_dir = Path(data_dir)
    if source == "phantom":
        return load_phantoms()
    if source in ("auto", "octmnist"):
        path = find_octmnist(data_dir) or download_octmnist(data_dir)
        if path is not None:
            return OctData("OCTMNIST", "real", read_oct_npz(path))
        if source == "auto":
            print("*** OCTMNIST is not here and could not be downloaded: going on with PHANTOMS, which are")
            print("*** drawn by this program and are no real scans. No score below is a score on OCTMNIST.")
            return load_phantoms()
        raise InputError(
            f"OCTMNIST is not here and could not be downloaded: fetch {OCTMNIST_URL} by hand "
            f"(54.9 MB, MD5 {OCTMNIST_MD5}) and save it as {data_dir / 'octmnist.npz'}"
        )
    path = Path(source)
    if path.is_dir():
        return OctData(path.resolve().name, "real", read_oct_folder(path, data_dir))
    if path.is_file():
        return OctData(path.stem, "real", read_oct_npz(path))
    raise InputError(f"-data {source}: no such file or folder (or use auto, octmnist, phantom)")


def load_phantoms() -> OctData:
    """The default phantoms of `offline_data.oct_phantoms`: the same scans at each call."""
    return OctData("OCT phantoms", "phantom", check_oct_arrays(offline_data.oct_phantoms(), "phantoms"))


def find_octmnist(data_dir: Path) -> Path | None:
    """The first intact octmnist.npz in `data_dir`, the working folder or ~/.medmnist; says which are broken."""
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 (Path.home() raises where a user has no home)
    for folder in (data_dir, Path(), home / ".medmnist"):
        path = folder / "octmnist.npz"
        if path.is_file():
            if md5(path) == OCTMNIST_MD5:
                return path
            print(f"passing over {path}: its MD5 is not OCTMNIST's (cut off? delete it, or give it as -data)")
    return None


def md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()


def download_octmnist(data_dir: Path) -> Path | None:
    """Download OCTMNIST through medmnist into `data_dir`; None (and one line that says why) if it fails.

    The file gets its name only after its MD5 was checked, so that nothing broken can be found later.
    """
    print(f"looking for OCTMNIST on the network (gives up after {STALL_SECONDS:.0f} s of silence) ...", flush=True)
    target = data_dir / "octmnist.npz"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".download-", ignore_cleanup_errors=True) as folder:
            failure = _fetch_with_medmnist(Path(folder))
            fetched = Path(folder) / "octmnist.npz"
            if failure is None and not (fetched.is_file() and md5(fetched) == OCTMNIST_MD5):
                failure = "the file that came is not OCTMNIST (MD5)"
            if failure is None:
                if target.exists():  # it was passed over as broken, but it is the user's: keep it
                    target.replace(target.with_suffix(".npz.broken"))
                fetched.replace(target)
    except OSError as error:
        failure = str(error)
    if failure is None:
        return target
    print(f"no download: {failure}")
    return None


def _fetch_with_medmnist(folder: Path) -> str | None:
    """Let medmnist download OCTMNIST as long as files in `folder` grow. Returns why it failed, or None.

    It runs in a thread of its own, because neither medmnist nor a look-up in the DNS has a time limit.
    """
    import medmnist  # only here: importing it takes seconds

    failure = []

    def fetch() -> None:
        try:
            medmnist.OCTMNIST(split="train", download=True, root=str(folder))
        except Exception as error:  # medmnist turns whatever happens into a RuntimeError, with the cause behind it
            cause = error.__context__ or error
            failure.append(" ".join(str(cause).split()) or type(cause).__name__)

    former_limit = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        thread = threading.Thread(target=fetch, name="octmnist-download", daemon=True)
        thread.start()
        size, last_growth = -1, time.monotonic()
        while thread.is_alive():
            thread.join(0.1)
            now = sum(file.stat().st_size for file in folder.iterdir())
            if now != size:
                size, last_growth = now, time.monotonic()
            elif time.monotonic() - last_growth > 2 * STALL_SECONDS:  # the socket's own limit comes first
                return "the network does not answer"
    finally:
        socket.setdefaulttimeout(former_limit)
    return failure[0] if failure else None


def read_oct_npz(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read and check an .npz of OCTMNIST's layout: {train,val,test}_{images,labels}. Raises InputError."""
    keys = [f"{split}_{part}" for split in SPLITS for part in ("images", "labels")]
    try:
        with np.load(path) as file:  # allow_pickle stays False: data must not run code
            arrays = {key: file[key] for key in file.files if key in keys}
    except Exception as error:  # damaged archives raise whatever their readers do: zip, zlib, tokenizer, ...
        reason = " ".join(str(error).split())[:80]
        raise InputError(f"{path}: cannot be read as .npz ({reason}): is it cut off or of another format?") from None
    return check_oct_arrays(arrays, str(path))


def check_oct_arrays(arrays: dict[str, np.ndarray], name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Check the six arrays of OCTMNIST's layout and pair them by split. Raises InputError, naming the array."""
    splits = {}
    for split in SPLITS:
        for key in (f"{split}_images", f"{split}_labels"):
            if key not in arrays:
                raise InputError(f"{name}: array {key} is missing (found: {', '.join(sorted(arrays)) or 'none'})")
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dtype != np.uint8 or images.shape[1:] != (SCAN_SIZE, SCAN_SIZE):
            wanted = f"uint8 [N, {SCAN_SIZE}, {SCAN_SIZE}]"
            raise InputError(f"{name}: {split}_images must be {wanted}, not {images.dtype} {list(images.shape)}")
        if labels.dtype.kind not in "iu" or labels.shape not in ((len(images),), (len(images), 1)):
            wanted = f"whole numbers [{len(images)}, 1]"
            raise InputError(f"{name}: {split}_labels must be {wanted}, not {labels.dtype} {list(labels.shape)}")
        if len(images) == 0:
            raise InputError(f"{name}: the {split} split is empty")
        if labels.min() < 0 or labels.max() >= len(OCT_CLASSES):
            found = f"{labels.min()} to {labels.max()}"
            raise InputError(f"{name}: {split}_labels must lie in 0 to {len(OCT_CLASSES) - 1}, found {found}")
        splits[split] = images, labels.reshape(-1).astype(np.int64)
    return splits


def prepare_scan(path: Path) -> np.ndarray:
    """Read an image file and prepare it as MedMNIST did: uint8 [28, 28]. Raises InputError.

    The centre square of the shorter edge's length, then bicubic resizing to 28x28 (Yang et al., MedMNIST v2,
    Scientific Data 10:41, 2023). Pillow's antialiased filter gives the dataset's very pixels.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # deeper than 8 bits: convert("L") would clip, not scale
                grey = Image.fromarray(_to_8_bits(np.asarray(image, dtype=np.float64)))
            else:
                grey = image.convert("L")
    except UnidentifiedImageError:
        raise InputError(f"{path}: not an image file that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as an image ({error})") from None
    edge = min(grey.size)
    left, top = (grey.width - edge) // 2, (grey.height - edge) // 2
    square = grey.crop((left, top, left + edge, top + edge))
    return np.asarray(square.resize((SCAN_SIZE, SCAN_SIZE), Image.Resampling.BICUBIC))


def _to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Deep greys to uint8, from the smallest usual range that holds them: [0, 1], or 8, 10, 12, 14, 16 or 32 bits."""
    ranges = (1, *(2**bits - 1 for bits in (8, 10, 12, 14, 16, 32)))
    white = next((white for white in ranges if pixels.max(initial=0) <= white), np.inf)
    return (pixels.clip(0) * (255 / white)).round().astype(np.uint8)


def read_oct_folder(folder: Path, data_dir: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read scans in class folders, as OCT2017 is distributed: train/CNV/CNV-<patient>-<number>.jpeg, test/...

    Where there is no val folder, a tenth of the training patients (as many as OCTMNIST's share) becomes the
    validation split, so that no patient is in both. The prepared arrays are kept under `data_dir`, because
    a hundred thousand files take minutes. Raises InputError.
    """
    files = {split: list_scans(folder / split) for split in SPLITS}
    for split in ("train", "test"):
        if not files[split]:
            wanted = "|".join(CLASS_FOLDERS)
            raise InputError(f"{folder}: no scans in {split}/({wanted})/*.jpeg; a folder needs train and test")
    if not files["val"]:
        files["train"], files["val"] = split_by_patient(files["train"], fraction=0.1)
        if not files["train"]:
            raise InputError(f"{folder}: all training scans are of one patient, and there is no val folder")

    listing = []
    for split in SPLITS:
        for file, _ in files[split]:
            state = file.stat()
            listing.append((split, str(file.relative_to(folder)), state.st_size, state.st_mtime_ns))
    fingerprint = hashlib.sha256(json.dumps([str(folder.resolve()), listing]).encode()).hexdigest()[:12]
    prepared = data_dir / f"oct-folder-{fingerprint}.npz"
    if not prepared.exists():
        arrays = {}
        for split in SPLITS:
            progress = tqdm(files[split], desc=f"preparing {split} scans", disable=None)
            arrays[f"{split}_images"] = np.stack([prepare_scan(file) for file, _ in progress])
            arrays[f"{split}_labels"] = np.array([[label] for _, label in files[split]], np.uint8)
        write_whole(prepared, lambda temporary: np.savez_compressed(temporary, **arrays))
    return read_oct_npz(prepared)


def list_scans(folder: Path) -> list[tuple[Path, int]]:
    """The image files of a split's class folders (names in any case) with their labels, in sorted order."""
    scans = []
    for class_folder in sorted(folder.iterdir()) if folder.is_dir() else []:
        if class_folder.is_dir() and class_folder.name.upper() in CLASS_FOLDERS:
            label = CLASS_FOLDERS.index(class_folder.name.upper())
            for file in sorted(class_folder.iterdir()):
                if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."):
                    scans.append((file, label))
    return scans


def split_by_patient(scans: list[tuple[Path, int]], fraction: float) -> tuple[list, list]:
    """Set aside the scans of a `fraction` of the patients, in an order that depends on the patient alone.

    The patient is the number in CLASS-<patient>-<number>.jpeg; a name of another form counts as a patient.
    """

    def patient(file: Path) -> str:
        found = re.match(r"[A-Za-z]+-(\d+)-\d+$", file.stem)
        return found[1] if found else file.stem

    patients = sorted({patient(f) for f, _ in scans}, key=lambda p: hashlib.sha256(p.encode()).digest())
    aside = set(patients[: max(1, round(fraction * len(patients)))])
    kept = [scan for scan in scans if patient(scan[0]) not in aside]
    return kept, [scan for scan in scans if patient(scan[0]) in aside]


# ---------------------------------------------------------------------------------------------------
# Plotting

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito: colour-blind safe
matplotlib.rcParams.update(
    {
        "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "grid.color": "#e4e4e4",
        "font.size": 10,
        "legend.frameon": False,
        "savefig.dpi": 160,
        "svg.hashsalt": "hw2",  # the same drawing gives the same bytes
    }
)


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (5.0, 3.6)) -> tuple[Figure, list[Axes]]:
    """A figure with `rows` x `columns` axes, row by row, of `size` inches each."""
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def save_figure(figure: Figure, path: Path) -> None:
    """Save as PNG and SVG (`path` without suffix), each whole or not at all."""
    # Without dates and versions the same drawing gives the same bytes.
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
        write_whole(path.with_name(path.name + suffix), partial(figure.savefig, metadata=metadata))
