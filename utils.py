"""What the three questions share: seeds and devices, data loading, run records, plotting.

from utils import load_oct, load_speech
data = load_oct("auto")                    # OCTMNIST if it can be had, else phantoms, and it says which
images, labels = data.splits["train"]      # uint8 [N, 28, 28] and int64 [N]
corpus = load_speech("auto")               # LJ Speech if it can be had, else a spoken corpus, and it says which
clip = corpus.splits["train"][0]           # clip.path is a wav file, clip.text what it says
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import linecache
import math
import os
import platform
import random
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache, cached_property, partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from filelock import FileLock, Timeout
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

import offline_data
from offline_data import OCT_CLASSES, SPEECH_RATE


class InputError(Exception):
    """Input that cannot be used. Its message is one line: what is wrong, and what to do."""

    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows: that one line."""
        return [f"InputError: {self}"]


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
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state["mps"])


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

STALE_SECONDS = 300.0  # temporary files are written to all the time; after so long a pause nobody does


def run_script(
    name: str,
    parse: Callable[[list[str] | None], argparse.Namespace],
    run: Callable[[argparse.Namespace], None],
    arguments: list[str] | None,
    stopped: str,
) -> int:
    """Parse and run; `stopped` is said when it is interrupted.

    Returns the exit status: 0, 2 for input that cannot be used (after one line on stderr), 130 when interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a file name or a ± must not stop a run on an odd terminal
    args = parse(arguments)
    git_state()  # now: files may change while a run goes on
    try:
        run(args)
    except (InputError, OSError) as error:  # OSError: a folder that cannot be written, a full disk
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: {stopped}", file=sys.stderr)
        return 130
    return 0


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
        for wait in (0.01, 0.1, 1.0):
            with contextlib.suppress(PermissionError):
                temporary.replace(path)
                return
            time.sleep(wait)  # on Windows another process may be reading the old file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, record: dict) -> None:
    """Write a record as JSON, whole or not at all. Raises ValueError for NaN: it is not JSON."""
    text = json.dumps(record, indent=1, allow_nan=False)
    # Lists of numbers (histories, confusion matrices) read better on one line. Text is left alone.
    text = re.sub(r'\[\n([^][{}"]*)\n *\]', lambda found: "[" + " ".join(found[1].split()) + "]", text)
    write_whole(path, lambda temporary: temporary.write_text(text + "\n"))


def run_environment(device: torch.device | None = None) -> dict:
    """How and where a run was made: the part of a record that is the same for every question.

    `device` is the one that was computed on: its GPU is named, else the current one.
    """
    on_gpu = device is not None and device.type == "cuda"
    gpu = torch.cuda.get_device_name(device if on_gpu else None) if torch.cuda.is_available() else None
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
        # Records, figures and texts are what a run writes; only other files make it another program.
        written = (":!results", ":!report/figures", ":!*.md", ":!*.typ", ":!*.yml", ":!*.pdf")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
        return {"commit": git("rev-parse", "HEAD"), "clean": not changed}
    except (OSError, subprocess.SubprocessError):
        return None


def mean_and_deviation(values: list[float]) -> dict:
    """Mean and sample standard deviation (None for a single value, which has none)."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def summarise(values: list) -> dict | None:
    """Mean and deviation of every number in dicts alike, of any depth; None where one of them is None."""
    if isinstance(values[0], dict):
        return {key: summarise([value[key] for value in values]) for key in values[0]}
    return None if None in values else mean_and_deviation(values)


LOCK = ".lock"  # a file that `lock_folder` leaves behind


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in `folder`, which is made. Raises InputError while one does."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout:
        raise InputError(f"{folder}: another process is training this run: wait for it or stop it") from None


def remove_stale(folder: Path, pattern: str) -> None:
    """Remove temporary files and folders in which nothing was written for minutes: a killed process left them."""
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):  # another process removes it too, or still writes
            newest = max(file.stat().st_mtime for file in (path, *path.rglob("*")))
            if time.time() - newest > STALE_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


# ---------------------------------------------------------------------------------------------------
# Downloads

STALL_SECONDS = 6.0  # a download that brings nothing for this long is given up


def fetch_while_growing(
    fetch: Callable[[], object], folder: Path, thread_name: str, progress: Callable[[int], None] | None = None
) -> str | None:
    """Let `fetch` bring files into `folder` as long as they grow. Returns why it failed, or None.

    It runs in a thread of its own, because neither the libraries nor a look-up in the DNS has a time limit.
    `progress` is told the bytes below the folder at each look.
    """
    failure = []

    def run() -> None:
        try:
            fetch()
        except SystemExit:  # it was told to end
            pass
        except Exception as error:  # medmnist turns whatever happens into a RuntimeError, with the cause behind it
            cause = error.__context__ or error
            failure.append(" ".join(str(cause).split()) or type(cause).__name__)

    former_limit = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    thread = threading.Thread(target=run, name=thread_name, daemon=True)
    try:
        thread.start()
        size, last_growth, pause = -1, time.monotonic(), 0.1
        while thread.is_alive():
            thread.join(pause)
            started = time.monotonic()
            now = folder_size(folder)
            if progress:
                progress(now)
            if now != size:
                size, last_growth = now, time.monotonic()
            elif time.monotonic() - last_growth > 2 * STALL_SECONDS:  # the socket's own limit comes first
                return f"nothing came for {2 * STALL_SECONDS:.0f} s"
            pause = max(0.1, 20 * (time.monotonic() - started))  # thousands of files take a while to look at
    finally:
        socket.setdefaulttimeout(former_limit)
        if thread.is_alive():  # given up or interrupted: it must not go on behind the back of what follows
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
            thread.join(1)
    return failure[0] if failure else None


def folder_size(folder: Path) -> int:
    """Bytes in the files below a folder, while files come and go."""
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(directory, name).stat().st_size
    return total


# ---------------------------------------------------------------------------------------------------
# Retinal scans (Q2)

OCTMNIST_URL = "https://zenodo.org/records/10519652/files/octmnist.npz?download=1"
OCTMNIST_MD5 = "c68d92d5b585d8d81f7112f81e2d0842"
SCAN_SIZE = 28  # pixels
SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = {".jpeg", ".jpg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
CLASS_FOLDERS = ("CNV", "DME", "DRUSEN", "NORMAL")  # of the original OCT2017 scans, in OCTMNIST's label order


@dataclass(frozen=True)
class OctData:
    """Retinal scans: for each of train, val and test, images uint8 [N, 28, 28] and labels int64 [N]."""

    name: str  # "OCTMNIST" for that file alone, "OCT phantoms", or the name of the user's file or folder
    kind: str  # "real" or "phantom"
    splits: dict[str, tuple[np.ndarray, np.ndarray]]

    @cached_property
    def description(self) -> dict:
        """The `dataset` entry of a record: name, kind, scans per class of each split, checksum of pixels and labels."""
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
        return OctData(own_name(path.resolve().name), "real", read_oct_folder(path, data_dir))
    if path.is_file():
        name = "OCTMNIST" if md5(path) == OCTMNIST_MD5 else own_name(path.stem)
        return OctData(name, "real", read_oct_npz(path))
    raise InputError(f"-data {source}: no such file or folder (or use auto, octmnist, phantom)")


def own_name(name: str) -> str:
    """The name of a user's data: what is not OCTMNIST's file must not go by its name."""
    return f"{name} (another file)" if name.upper() == "OCTMNIST" else name


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
    """Let medmnist download OCTMNIST into `folder`. Returns why it failed, or None."""
    import medmnist  # only here: importing it takes seconds

    try:
        import torchvision.datasets.utils  # noqa: F401 (what medmnist would import while silence is timed)
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        return f"torchvision does not work here ({' '.join(str(error).split())})"
    fetch = partial(medmnist.OCTMNIST, split="train", download=True, root=str(folder))
    return fetch_while_growing(fetch, folder, "octmnist-download")


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
# Speech (Q3)

LJSPEECH_URL = "https://data.keithito.com/data/speech/LJSpeech-1.1.tar.bz2"
LJSPEECH_SHA256 = "be1a30453f28eb8dd26af4101ae40cbf2c50413b1bb21936cbcdc6fae3de8aa5"
LJSPEECH_CLIPS = 13_100
LJSPEECH_ARCHIVE, LJSPEECH_UNPACKED = 2.75e9, 3.8e9  # bytes
MIN_SECONDS, MAX_SECONDS = 0.1, 30.0  # shorter clips hold no speech; LJ Speech's longest has 10.1 s
SILENCE = 1e-4  # samples that stay within this range hold nothing but dither


@dataclass(frozen=True)
class Clip:
    """One row of metadata.csv: what is said, and the file in which it is said."""

    row: int  # in metadata.csv, counted from 0 as the official splits count
    id: str
    text: str  # the normalised transcript: numbers and abbreviations written out
    path: Path
    seconds: float
    rate: int  # of the file, Hz


@dataclass(frozen=True)
class SpeechCorpus:
    """Clips with transcripts, by split: train, val, test, and what else corpus.json names."""

    name: str  # "LJ Speech", "LJ Speech, 186 of 13,100 clips", the name in corpus.json, or the folder's
    kind: str  # "real" or "spoken"
    folder: Path
    sample_rate: int  # Hz, at which features are to be made; files of another rate are resampled
    splits: dict[str, list[Clip]]
    left_out: list[str]  # a line for each row that cannot be used

    @cached_property
    def description(self) -> dict:
        """The `dataset` entry of a record. The checksum is over rows, ids, texts and durations, not over samples."""
        rows = [(s, c.row, c.id, c.text, f"{c.seconds:.6f}") for s, clips in self.splits.items() for c in clips]
        return {
            "name": self.name,
            "kind": self.kind,
            "counts": {split: len(clips) for split, clips in self.splits.items()},
            "hours": {s: round(sum(c.seconds for c in clips) / 3600, 4) for s, clips in self.splits.items()},
            "left_out": len(self.left_out),
            "sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        }


def load_speech(source: str = "auto", data_dir: Path | str = "data", seed: int = 0) -> SpeechCorpus:
    """Load clips of speech with their transcripts.

    `source` is "ljspeech", "spoken" (made on first use, `seed` says which one), a folder in LJ Speech's layout
    (see `read_speech_folder`), or "auto": LJ Speech from `data_dir`, else downloaded, else the spoken corpus.
    Raises InputError for what cannot be used.
    """
    data_dir = Path(data_dir)
    if source in ("auto", "ljspeech"):
        folder = find_ljspeech(data_dir) or download_ljspeech(data_dir)
        if folder is None and source == "ljspeech":
            raise InputError(
                f"LJ Speech is not here and could not be downloaded: fetch {LJSPEECH_URL} by hand "
                f"(2.6 GB, SHA-256 {LJSPEECH_SHA256}) and unpack it as {data_dir / 'LJSpeech-1.1'}"
            )
        if folder is not None:
            return read_speech_folder(folder)
        print("*** LJ Speech is not here and could not be downloaded: going on with a SPOKEN corpus, made by a")
        print("*** speech synthesiser from sentences of a grammar. No score below is a score on LJ Speech.")
    if source in ("auto", "spoken"):
        folder = data_dir / f"spoken-seed{seed}"
        try:
            offline_data.make_spoken_corpus(folder, seed)  # nothing to do if it is there
        except (offline_data.SpeechError, OSError) as error:
            raise InputError(f"the spoken corpus cannot be made: {error}") from None
        return read_speech_folder(folder)
    if Path(source).is_dir():
        return read_speech_folder(Path(source))
    raise InputError(f"data {source}: no such folder (or use auto, ljspeech, spoken)")


def find_ljspeech(data_dir: Path) -> Path | None:
    """LJ Speech's folder in `data_dir`, if next to nothing of it is missing; says when it is passed over."""
    folder = data_dir / "LJSpeech-1.1"
    if is_ljspeech(folder):
        return folder
    if folder.exists():
        print(f"passing over {folder}: it is not the whole of LJ Speech (it can be used if it is named as data)")
    return None


def is_ljspeech(folder: Path) -> bool:
    """Whether a folder has all rows of LJ Speech and at least 99 % of its files: single bad ones can be left out."""
    metadata = folder / "metadata.csv"
    rows = len(read_lines(metadata)) if metadata.is_file() else 0
    files = sum(1 for _ in (folder / "wavs").glob("*.wav"))
    return rows == LJSPEECH_CLIPS and files >= 0.99 * LJSPEECH_CLIPS


def download_ljspeech(data_dir: Path) -> Path | None:
    """Download LJ Speech through torchaudio into `data_dir`; None (and one line that says why) if it fails.

    The folder gets its name only after the archive's SHA-256 was checked and all of it was unpacked, so that
    nothing broken can be found later.
    """
    print(f"looking for LJ Speech on the network (gives up after {STALL_SECONDS:.0f} s of silence) ...", flush=True)
    target = data_dir / "LJSpeech-1.1"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        remove_stale(data_dir, ".download-*")
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".download-", ignore_cleanup_errors=True) as folder:
            failure = _fetch_with_torchaudio(Path(folder))
            if failure is None and sha256(Path(folder) / Path(LJSPEECH_URL).name) != LJSPEECH_SHA256:
                failure = "the archive that came is not LJ Speech (SHA-256)"
            if failure is None and not is_ljspeech(target):  # another process may have been quicker
                if target.exists():  # it was passed over as a part, but it is the user's: keep it
                    target.replace(target.with_name(f"{target.name}.part-{time.time():.0f}"))
                (Path(folder) / target.name).replace(target)
    except OSError as error:
        failure = str(error)
    if failure is None:
        return target
    print(f"no download: {failure}")
    return None


def _fetch_with_torchaudio(folder: Path) -> str | None:
    """Let torchaudio download, check and unpack LJ Speech into `folder`. Returns why it failed, or None."""
    import torchaudio.datasets  # only here: importing it takes a while, and only Q3 needs it

    needed, free = LJSPEECH_ARCHIVE + LJSPEECH_UNPACKED, shutil.disk_usage(folder).free
    if free < needed:
        return f"{needed / 1e9:.1f} GB are needed in {folder.parent}, and {free / 1e9:.1f} GB are free"
    archive = folder / Path(LJSPEECH_URL).name
    bar = tqdm(desc="unpacking", total=LJSPEECH_UNPACKED, unit="B", unit_scale=True, delay=0.1, disable=None)

    def fetch() -> None:
        # Last of all torchaudio reads the texts, in the system's encoding, which need not be UTF-8. We read them anew.
        with contextlib.suppress(UnicodeDecodeError):
            torchaudio.datasets.LJSPEECH(folder, url=LJSPEECH_URL, download=True)

    def show_unpacking(size: int) -> None:  # the download shows itself
        if archive.exists():  # it has its name once it is whole and checked
            if not bar.n:
                bar.unpause()
            bar.update(size - archive.stat().st_size - bar.n)

    with bar:
        return fetch_while_growing(fetch, folder, "ljspeech-download", show_unpacking)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_speech_folder(folder: Path) -> SpeechCorpus:
    """Read a folder in LJ Speech's layout: metadata.csv (id|text|normalised text, no quoting), wavs/<id>.wav.

    Rows that cannot be used (see `read_row`) are printed and left out. Splits are cut by row before that: as
    corpus.json says, else 75, 5 and 20 %, which for LJ Speech's 13,100 rows are the course's. Raises InputError.
    """
    if not ((folder / "metadata.csv").is_file() and (folder / "wavs").is_dir()):
        raise InputError(f"{folder}: needs metadata.csv (rows of id|text|normalised text) and wavs/<id>.wav")
    lines = read_lines(folder / "metadata.csv")
    about = read_corpus_json(folder, len(lines))
    clips, left_out, ids = [], [], set()
    for row, line in enumerate(lines):
        try:
            clip = read_row(folder, row, line)
            if clip.id in ids:
                raise InputError(f"id {clip.id} was there before")
            ids.add(clip.id)
            clips.append(clip)
        except InputError as error:
            left_out.append(f"{name_row(folder, row)}: {error}")
    report_left_out(left_out, len(lines))
    if len(clips) < 3:
        raise InputError(f"{folder}: {len(clips)} of {len(lines)} rows can be used; at least 3 are needed")
    if odd := sum(clip.rate != SPEECH_RATE for clip in clips):
        print(f"{folder}: {odd} of {len(clips)} clips are not at {SPEECH_RATE} Hz: they are resampled")

    rows = about.get("splits") or split_rows(len(lines))
    splits = {split: [c for c in clips if first <= c.row < end] for split, (first, end) in rows.items()}
    check_splits(folder, splits)
    name, kind = about.get("name") or folder.name or folder.resolve().name, about.get("kind", "real")
    if name == "LJSpeech-1.1":  # never to be taken for the whole if it is a part
        whole = len(clips) == len(lines) == LJSPEECH_CLIPS
        name = "LJ Speech" if whole else f"LJ Speech, {len(clips):,} of {LJSPEECH_CLIPS:,} clips"
    elif kind == "real" and name.upper().startswith("LJ SPEECH"):
        name = f"{name} (another folder)"
    return SpeechCorpus(name, kind, folder, SPEECH_RATE, splits, left_out)


def read_lines(path: Path) -> list[bytes]:
    """The lines of a text file without their ends; a byte order mark and a last empty line are none of it."""
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    lines = content.split(b"\n")
    return [line.removesuffix(b"\r") for line in (lines[:-1] if lines[-1] == b"" else lines)]


def read_corpus_json(folder: Path, num_rows: int) -> dict:
    """Name, kind and splits ({split: [first row, end row]}) of a made corpus; empty without a corpus.json.

    Raises InputError for splits that lie outside the rows or overlap.
    """
    path = folder / "corpus.json"
    if not path.exists():
        return {}
    try:
        about = json.loads(path.read_bytes())
        spans = sorted(tuple(map(int, span)) for span in about.get("splits", {}).values())
        edges = [edge for first, end in spans for edge in (first, end)]
        fits = {*SPLITS} <= {*about["splits"]} if spans else True
        if not (fits and edges == sorted(edges) and all(0 <= edge <= num_rows for edge in edges)):
            raise ValueError(f"splits {about['splits']} do not fit {num_rows} rows")
        if about["kind"] not in ("real", "spoken") or not isinstance(about["name"], str):
            raise ValueError(f"name {about['name']!r}, kind {about['kind']!r}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: does not describe a corpus ({error})") from None
    return about


def read_row(folder: Path, row: int, line: bytes) -> Clip:
    """Check one row of metadata.csv and the header of its wav file. Raises InputError for a row without use."""
    try:
        columns = line.decode().split("|")
    except UnicodeDecodeError:
        raise InputError("is not UTF-8") from None
    if len(columns) != 3:
        raise InputError(f"has {len(columns)} columns, not 3 (id|text|normalised text)")
    name, text = columns[0].strip(), columns[2].strip()
    file = f"wavs/{name}.wav"
    # By the text alone: a link in wavs/ may well lead elsewhere.
    if not name or "\0" in name or not os.path.normpath(file.replace("\\", "/")).startswith("wavs" + os.sep):
        raise InputError(f"id {name!r} names no file in wavs/")
    if not text:
        raise InputError(f"the transcript of {file} is empty")
    seconds, rate = read_wav_header(folder / file)
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise InputError(f"{file} lasts {seconds:.2f} s, not {MIN_SECONDS} to {MAX_SECONDS:g} s")
    return Clip(row, name, text, folder / file, seconds, rate)


def split_rows(num_rows: int) -> dict[str, tuple[int, int]]:
    """First and end row of train, val and test: 75, 5 and 20 % of at least 3 rows, at least one each."""
    val = min(max(1, round(0.75 * num_rows)), num_rows - 2)
    test = min(max(val + 1, round(0.80 * num_rows)), num_rows - 1)
    return {"train": (0, val), "val": (val, test), "test": (test, num_rows)}


def check_splits(folder: Path, splits: dict[str, list[Clip]]) -> None:
    for split, clips in splits.items():
        if not clips:
            raise InputError(f"{folder}: no clip of the {split} split can be used")


def name_row(folder: Path, row: int) -> str:
    return f"{folder / 'metadata.csv'} line {row + 1}"


def report_left_out(reasons: list[str], num_rows: int) -> None:
    """Print why rows were left out (five of them at most), and how many were."""
    if reasons:
        print(*reasons[:5], sep="\n")
        print(f"... and {len(reasons) - 5} more\n" * (len(reasons) > 5), end="")
        print(f"left out: {len(reasons)} of {num_rows} rows")


def read_wav_header(path: Path) -> tuple[float, int]:
    """Seconds and rate (Hz) of an audio file, by its header alone. Raises InputError."""
    import soundfile

    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        info = soundfile.info(path, verbose=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise InputError(f"{path}: cannot be read as audio ({_one_line(error)})") from None
    # libsndfile shortens a clip that was cut off to what there is. Streams claim all that 32 bits can count.
    cut_off = re.search(r"^data : (\d+) \(should be (\d+)\)", info.extra_info, re.MULTILINE)
    if cut_off and int(cut_off[2]) < int(cut_off[1]) < 2**31 - 2**16:
        raise InputError(f"{path}: cut off, {int(cut_off[2]):,} of {int(cut_off[1]):,} bytes are there")
    if info.frames == 0:
        raise InputError(f"{path}: holds no samples")
    return info.frames / info.samplerate, info.samplerate


def read_wav(path: Path | str, rate: int | None = None) -> tuple[np.ndarray, int]:
    """Read an audio file: samples float32 [n] in [-1, 1], the mean of its channels, and their rate in Hz.

    With `rate` they are resampled to it. Raises InputError for a file that is absent, empty or unreadable.
    """
    import soundfile

    try:
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file")
        channels, file_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise InputError(f"{path}: cannot be read as audio ({_one_line(error)})") from None
    if len(channels) == 0:
        raise InputError(f"{path}: holds no samples")
    samples = channels.mean(axis=1)
    if not np.isfinite(samples).all():
        raise InputError(f"{path}: holds samples that are no finite numbers")
    if rate in (None, file_rate):
        return samples, file_rate
    from scipy.signal import resample_poly  # torchaudio's takes gigabytes where the rates share no factor

    shared = math.gcd(rate, file_rate)
    return resample_poly(samples, rate // shared, file_rate // shared).astype(np.float32), rate


def _one_line(error: Exception) -> str:
    """An error of libsndfile or the system without the path, which is named already."""
    return " ".join(str(error).split()).rpartition("': ")[2]


# ---------------------------------------------------------------------------------------------------
# Features of speech, kept on disk (Q3)
#
# One file: FEATURES_MAGIC, the features of all clips one after another (float16 [frames, n_mels]), a JSON text
# that describes them, and its length and CRC-32. What describes comes last, so that a part is never the whole.

FEATURES_MAGIC = b"hw2 speech features, version 1\n".ljust(64, b"\0")
FEATURES_END = struct.Struct("<QI")
Extract = Callable[[np.ndarray, int], np.ndarray]  # (samples float32 [n], rate) -> float32 [frames, n_mels]


@dataclass(frozen=True)
class FeatureCache:
    """The features of a corpus: `cache[clip]` is float16 [frames, n_mels], read-only, mapped from the disk."""

    path: Path
    corpus: SpeechCorpus  # without the clips that turned out to be of no use, such as silent ones
    left_out: list[str]  # a line for each of those
    mean: np.ndarray  # float32 [n_mels], over all frames of the train split
    std: np.ndarray  # float32 [n_mels], at least 1e-3, so that one can divide by it
    features: np.ndarray  # float16 [frames of all clips, n_mels]
    places: dict[int, tuple[int, int]]  # row of a clip -> its first and end frame

    def __getitem__(self, clip: Clip) -> np.ndarray:
        first, end = self.places[clip.row]
        return self.features[first:end]

    def frames(self, clip: Clip) -> int:
        first, end = self.places[clip.row]
        return end - first

    def clips(self, split: str) -> list[Clip]:
        return self.corpus.splits[split]

    def __getstate__(self) -> dict:
        """For other processes: they map the file again instead of being sent its contents."""
        return {**self.__dict__, "features": self.features.shape}

    def __setstate__(self, state: dict) -> None:
        features = np.memmap(state["path"], "<f2", "r", len(FEATURES_MAGIC), state["features"]).view(np.ndarray)
        self.__dict__.update(state, features=features)


def cached_features(corpus: SpeechCorpus, extract: Extract, settings: dict, data_dir: Path | str) -> FeatureCache:
    """The features that `extract` makes of every clip: made once, then mapped from one file in `data_dir`.

    `settings` is all that `extract` depends on (it must fit into JSON): other settings have another file. The
    file is made again if a clip, its size or its time has changed, or if it is damaged. Clips that are silent or
    cannot be read are printed and left out. Raises InputError if nothing of a split is left.
    """
    data_dir = Path(data_dir)
    folder = corpus.folder.resolve()
    which = hashlib.sha256(json.dumps([str(folder), settings], sort_keys=True).encode()).hexdigest()[:12]
    path = data_dir / f"features-{folder.name[:40]}-{which}.f16"
    fingerprint = fingerprint_files(corpus, settings)
    remove_stale(data_dir, ".features-*")
    try:
        cache = open_features(path, corpus, fingerprint) if path.exists() else None
    except (OSError, ValueError) as error:
        print(f"{path}: {error}: the features are made again")
        cache = None
    if cache is None:
        write_whole(path, partial(write_features, corpus=corpus, extract=extract, fingerprint=fingerprint))
        cache = open_features(path, corpus, fingerprint)
    report_left_out(cache.left_out, sum(map(len, corpus.splits.values())))
    check_splits(corpus.folder, cache.corpus.splits)
    return cache


def fingerprint_files(corpus: SpeechCorpus, settings: dict) -> str:
    """A checksum that changes with the settings, the splits, and the size or time of any audio file."""
    rows = []
    for split, clips in corpus.splits.items():
        for clip in clips:
            try:
                state = clip.path.stat()
            except OSError as error:
                raise InputError(f"{name_row(corpus.folder, clip.row)}: {clip.path}: {error.strerror}") from None
            rows.append([split, clip.row, clip.id, state.st_size, state.st_mtime_ns])
    return hashlib.sha256(json.dumps([settings, corpus.sample_rate, rows], sort_keys=True).encode()).hexdigest()


def write_features(path: Path, corpus: SpeechCorpus, extract: Extract, fingerprint: str) -> None:
    """Make the features of every clip and write them to `path`, as described above. Raises InputError."""
    members = [(split, clip) for split, clips in corpus.splits.items() for clip in clips]
    frames, left_out, crc, n_mels = [], {}, 0, None
    num_train, total, squares = 0, 0.0, 0.0  # of the train split's frames, in float64
    with path.open("wb") as file:
        file.write(FEATURES_MAGIC)
        for split, clip in tqdm(members, desc="features", unit="clip", disable=None):
            try:
                features = clip_features(clip, extract, corpus.sample_rate)
            except InputError as error:
                left_out[clip.row] = f"{name_row(corpus.folder, clip.row)}: {error}"
                continue
            if n_mels not in (None, features.shape[1]):
                raise ValueError(f"{clip.path}: {features.shape[1]} features a frame, {n_mels} before")
            n_mels = features.shape[1]
            file.write(features)
            crc = zlib.crc32(features, crc)
            frames.append([clip.row, len(features)])
            if split == "train":
                exact = features.astype(np.float64)
                num_train, total, squares = num_train + len(exact), total + exact.sum(0), squares + (exact**2).sum(0)
        if not num_train:
            report_left_out([*left_out.values()], len(members))
            raise InputError(f"{corpus.folder}: no clip of the train split can be used")
        mean = total / num_train
        about = {
            "fingerprint": fingerprint,
            "crc32": crc,
            "mean": mean.tolist(),
            "std": np.sqrt((squares / num_train - mean**2).clip(0)).tolist(),
            "left_out": [*left_out.items()],
            "frames": frames,
        }
        text = json.dumps(about).encode()
        file.write(text + FEATURES_END.pack(len(text), zlib.crc32(text)))


def clip_features(clip: Clip, extract: Extract, rate: int) -> np.ndarray:
    """The features of one clip as they are stored: float16 [frames, n_mels]. Raises InputError for a bad clip."""
    samples, _ = read_wav(clip.path, rate)
    if np.ptp(samples) < SILENCE:
        raise InputError(f"{clip.path}: is silent")
    features = np.asarray(extract(samples, rate))
    if features.ndim != 2 or not features.size:
        raise ValueError(f"{clip.path}: features must be [frames, n_mels], not {list(features.shape)}")
    with np.errstate(over="ignore"):
        features = np.ascontiguousarray(features, "<f2")
    if not np.isfinite(features).all():
        raise InputError(f"{clip.path}: its features do not fit into float16")
    return features


def open_features(path: Path, corpus: SpeechCorpus, fingerprint: str) -> FeatureCache:
    """Map a file of features, all of it checked (half a second a gigabyte). Raises ValueError if it does not fit."""
    content = np.memmap(path, np.uint8, "r").view(np.ndarray)
    end = len(content) - FEATURES_END.size
    length, crc = FEATURES_END.unpack(content[end:].tobytes()) if end > 0 else (0, 0)
    text = content[end - length : end].tobytes()
    if content[: len(FEATURES_MAGIC)].tobytes() != FEATURES_MAGIC or not text or zlib.crc32(text) != crc:
        raise ValueError("is cut off or damaged")
    about = json.loads(text)
    if about["fingerprint"] != fingerprint:
        raise ValueError("was made from other audio files, splits or settings")
    features = content[len(FEATURES_MAGIC) : end - length]
    if zlib.crc32(features) != about["crc32"]:
        raise ValueError("is damaged")
    ends = np.cumsum([frames for _, frames in about["frames"]]).tolist()
    places = {row: (end - frames, end) for (row, frames), end in zip(about["frames"], ends, strict=True)}
    splits = {split: [c for c in clips if c.row in places] for split, clips in corpus.splits.items()}
    left_out = [reason for _, reason in about["left_out"]]
    return FeatureCache(
        path=path,
        corpus=replace(corpus, splits=splits, left_out=corpus.left_out + left_out),
        left_out=left_out,
        mean=np.array(about["mean"], np.float32),
        std=np.array(about["std"], np.float32).clip(1e-3),
        features=features.view("<f2").reshape(ends[-1], -1),
        places=places,
    )


# ---------------------------------------------------------------------------------------------------
# Records of trained networks (Q3)


def learnt_by_heart(record: dict) -> bool:
    """Whether a run was scored on the clips it was trained on: no result."""
    return " memorise " in record["command"]


def summarise_speech_runs(folder: Path | str, split: str = "test") -> list[dict]:
    """The records of `folder`, those that differ in the seed alone put together: a dict a group, by its `title`.

    `scores` holds mean and deviation of each score on `split`; `changes` what differs from the preset's settings.
    """
    groups = {}
    for path in sorted(Path(folder).glob("*.json")):
        record = json.loads(path.read_text())
        if split in record and "decoder" in record.get("config", {}):
            shared = json.dumps([record["dataset"]["sha256"], record["config"], record["changes"]], sort_keys=True)
            groups.setdefault(shared, []).append((path.name, record))
    rows = []
    for runs in groups.values():
        names, records = zip(*runs, strict=True)
        first = records[0]
        scores = [{k: v for k, v in record[split].items() if isinstance(v, float)} for record in records]
        rows.append(
            {
                "dataset": first["dataset"]["name"],
                "kind": first["dataset"]["kind"],
                "preset": first["config"]["preset"],
                "changes": first["changes"],
                "decoder": first["config"]["decoder"],
                "seeds": [record["seed"] for record in records],
                "by_heart": learnt_by_heart(first),
                "scored_again": first.get("scored_again", False),  # then another record has the same training
                "clips": first[split]["clips"],
                "minutes": mean_and_deviation([record["seconds"] / 60 for record in records]),
                "scores": {key: mean_and_deviation([s[key] for s in scores]) for key in scores[0]},
                "files": list(names),
            }
        )
    return rows


# ---------------------------------------------------------------------------------------------------
# Notebooks (Q3)


def notebook_definitions(path: Path) -> types.ModuleType:
    """Run the cells of a notebook tagged `parameters` or `definitions`, in order, as a module named after it.

    Tests and benchmarks import a notebook by this, without its training. The module is in sys.modules (dataclasses
    and pickle look there), and the lines of its cells, numbered as Jupyter does after Run All, are in tracebacks.
    """
    path = Path(path).resolve()
    cells = [cell for cell in json.loads(path.read_bytes())["cells"] if cell["cell_type"] == "code"]
    name = re.sub(r"\W", "_", path.stem)
    module = types.ModuleType(name)
    module.__file__ = str(path)
    former = sys.modules.get(name)
    sys.modules[name] = module
    sources = []
    try:
        for number, cell in enumerate(cells, start=1):
            if {"parameters", "definitions"} & {*cell["metadata"].get("tags", [])}:
                sources.append("".join(cell["source"]) + "\n")
                cell_name = f"{path.name}[cell {number}]"
                _remember_source(cell_name, sources[-1])
                exec(compile(sources[-1], cell_name, "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        sys.modules.pop(name) if former is None else sys.modules.update({name: former})
        raise
    _remember_source(str(path), "".join(sources))  # inspect looks for the source of a class under __file__
    return module


def _remember_source(name: str, source: str) -> None:
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)


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


def plot_recording(samples: np.ndarray, rate: int, log_mel: np.ndarray, frequencies: np.ndarray, title: str) -> Figure:
    """Waveform over log-mel spectrogram, seconds below both.

    `samples` [N] in [-1, 1] at `rate` Hz, `log_mel` [frames, n_mels], `frequencies` [n_mels]: the filters' middles, Hz.
    """
    figure, (wave, mel) = new_figure(2, 1, size=(9.0, 2.2))
    seconds = len(samples) / rate
    wave.plot(np.arange(len(samples)) / rate, samples, linewidth=0.4)
    wave.set(title=title, ylabel="amplitude", xlim=(0, seconds))
    picture = mel.imshow(
        log_mel.T, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, 0, len(frequencies))
    )
    hertz = [200, 500, 1000, 2000, 4000, 8000]
    mel.set_yticks(np.interp(hertz, frequencies, np.arange(len(frequencies)) + 0.5), [f"{f:,}" for f in hertz])
    mel.set(ylabel="frequency (Hz)", xlabel="time (s)")
    mel.grid(False)
    figure.colorbar(picture, ax=mel, label="log power", pad=0.01)
    return figure


SIMILARITIES = {"jaccard": "Jaccard", "cosine": "cosine", "damerau_levenshtein": "Damerau-Levenshtein"}


def plot_speech_curves(histories: dict[str, list[dict]], title: str) -> Figure:
    """Loss and the three similarities over the epochs, of all decoders: `histories` by the decoder's name."""
    figure, (loss, similarity) = new_figure(1, 2, size=(5.4, 3.8))
    styles = dict(zip(SIMILARITIES, (":", "--", "-"), strict=True))
    for colour, (name, history) in zip(COLOURS, histories.items(), strict=False):
        epochs = [entry["epoch"] for entry in history]
        loss.plot(
            epochs, [e["train"]["loss"] for e in history], color=colour, linestyle="--", label=f"{name}, training"
        )
        loss.plot(epochs, [e["val"]["loss"] for e in history], color=colour, label=f"{name}, validation")
        for key, label in SIMILARITIES.items():
            values = [entry["val"][key] for entry in history]
            similarity.plot(epochs, values, color=colour, linestyle=styles[key], label=f"{name}, {label}")
    loss.set(title=title, xlabel="epoch", ylabel="cross-entropy per token (nats)")
    similarity.set(title="Similarity to the text, validation", xlabel="epoch", ylabel="similarity", ylim=(0, 1.02))
    for axes in (loss, similarity):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=8)
    return figure


def plot_alignments(
    weights: dict[str, np.ndarray],
    texts: dict[str, str],
    heard: dict[str, np.ndarray | None],
    seconds: float,
    title: str,
) -> Figure:
    """Cross-attention of each decoder on one clip, side by side: a row a character that it wrote, seconds across.

    By decoder: `weights` [characters + 1, positions], the last row for the stop; `texts`, what it wrote; `heard`
    [characters], the seconds at which its CTC layer hears them, or None.
    """
    longest = max(map(len, texts.values()))
    figure, axes = new_figure(1, len(weights), size=(5.6, min(12.0, max(3.6, 0.16 * longest))))
    for axis, (name, matrix) in zip(axes, weights.items(), strict=True):
        extent = (0, seconds, len(matrix), 0)
        axis.imshow(matrix, aspect="auto", cmap="Greys", extent=extent, interpolation="nearest")
        if heard[name] is not None:
            places = np.arange(len(heard[name])) + 0.5
            axis.plot(heard[name], places, "o", color=COLOURS[1], markersize=3, label="heard by CTC")
            axis.legend(loc="upper right")
        rows = [*texts[name].replace(" ", "␣"), "stop"]
        axis.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=8, family="DejaVu Sans Mono")
        axis.tick_params(axis="y", length=0)
        axis.set(title=f"{name}: {title}", xlabel="time (s)", ylabel="character written")
        axis.grid(False)
    return figure


def plot_error_by_length(errors: dict[str, np.ndarray], lengths: np.ndarray, title: str, bins: int = 6) -> Figure:
    """Character error rate against the length of the sentence, in bins of equally many sentences.

    `errors` by decoder [sentences]: edit distance of each; `lengths` [sentences] characters of the references.
    """
    figure, (axes,) = new_figure(size=(6.4, 3.8))
    groups = np.array_split(np.argsort(lengths, kind="stable"), min(bins, len(lengths)))
    middles = [lengths[group].mean() for group in groups]
    for colour, (name, distances) in zip(COLOURS, errors.items(), strict=False):
        rates = [100 * distances[group].sum() / lengths[group].sum() for group in groups]
        axes.plot(middles, rates, "o-", color=colour, label=name)
    axes.set(title=title, xlabel="characters of the sentence (mean of a bin)", ylabel="character error rate (%)")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def plot_confusions(counts: dict[str, np.ndarray], tokens: Sequence[str], title: str) -> Figure:
    """Which character was written for which, by decoder: counts [tokens, tokens], rows the truth.

    The last row and column, ∅, hold insertions and deletions. The diagonal (correct) is left blank.
    """
    figure, axes = new_figure(1, len(counts), size=(6.0, 5.6))
    for axis, (name, matrix) in zip(axes, counts.items(), strict=True):
        wrong = np.where(np.eye(len(matrix), dtype=bool), 0, matrix)
        shown = np.ma.masked_equal(wrong, 0)
        picture = axis.imshow(shown, cmap="viridis_r", vmin=0)
        axis.grid(False)
        axis.set_xticks(range(len(tokens)), tokens, fontsize=9, family="DejaVu Sans Mono")
        axis.set_yticks(range(len(tokens)), tokens, fontsize=9, family="DejaVu Sans Mono")
        axis.set(title=f"{name}: {title}", xlabel="written", ylabel="spoken")
        figure.colorbar(picture, ax=axis, label="times", shrink=0.8)
    return figure
