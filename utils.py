"""What the questions share: seeds and devices, data loading (scans and speech), plotting.

from utils import load_oct, load_speech
data = load_oct("auto")                    # OCTMNIST if it can be had, else phantoms, and it says which
images, labels = data.splits["train"]      # uint8 [N, 28, 28] and int64 [N]
corpus = load_speech("auto")               # LJ Speech if it is here, else a spoken corpus, and it says which
clip = corpus.splits["train"][0]           # clip.path is a wav file, clip.text what it says
"""

import contextlib
import hashlib
import io
import json
import linecache
import math
import os
import random
import re
import shlex
import shutil
import socket
import sys
import tempfile
import threading
import time
import types
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate, chain
from pathlib import Path
from urllib.parse import urlsplit

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from offline_data import OCT_CLASSES, SPEECH_RATE
from runs import InputError, check_is_file, one_line, read_json, reading, write_json, write_whole

# ---------------------------------------------------------------------------------------------------
# Seeds and devices


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and PyTorch, and ask for deterministic kernels in full float32 where there is a choice."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (libraries draw from the global state)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.allow_tf32 = False  # convolutions in float32, as on a CPU: TF32 rounds to 10 bits
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU. Raises InputError for a device this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise InputError(f"-device {name}: use auto, cpu, cuda, cuda:N or mps")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a round trip: naming a device does not prove that it works
        if device.index is not None:
            torch.cuda.set_device(device)  # random states and names are then this device's
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = one_line(error).split(". ")[0]
        raise InputError(f"-device {name}: this machine has none that works ({reason})") from None
    return device


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of PyTorch's generators that a run on `device` draws from, by kind of device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what `random_state` took. Raises InputError if it was taken on another kind of device."""
    if "cpu" in state and set(state) != {"cpu", device.type}:
        there = max(set(state) - {"cpu"}, default="cpu")
        raise InputError(f"the run was started on another kind of device: go on with -device {there}")
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[device.type])


# ---------------------------------------------------------------------------------------------------
# Downloads

PATIENCE = 5.0  # seconds of silence after which a server is given up


def download(target: Path, url: str, fetch: Callable[[Path], None], is_right: Callable[[Path], bool]) -> bool:
    """Let `fetch` bring the file or folder `target` into a temporary folder. Returns whether it is there now.

    It gets its name only once it `is_right`, so that nothing broken can be found later. What had that name before
    is kept as NAME.broken-TIME. One line says why a download failed.
    """
    print(f"looking for {target.name} at {urlsplit(url).hostname} ...", flush=True)
    former_timeout = socket.getdefaulttimeout()
    try:
        look_for_an_answer(url)
        socket.setdefaulttimeout(PATIENCE)  # medmnist and torchaudio set none
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent, ".download-*")
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-", ignore_cleanup_errors=True) as folder:
            fetch(Path(folder))
            fetched = Path(folder) / target.name
            if not (fetched.exists() and is_right(fetched)):
                raise OSError("what came is something else, or cut off")
            if not (target.exists() and is_right(target)):  # another process may have been quicker
                if target.exists():
                    target.replace(target.with_name(f"{target.name}.broken-{time.time():.0f}"))
                fetched.replace(target)
        return True
    except Exception as error:  # medmnist turns whatever happens into a RuntimeError, with the cause behind it
        print(f"no download: {one_line(error.__context__ or error)}")
        return False
    finally:
        socket.setdefaulttimeout(former_timeout)


def look_for_an_answer(url: str) -> None:
    """Raises OSError unless the server at `url` answers something within 10 seconds, its name's look-up included."""
    failure: list[Exception] = []

    def look() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE).close()
        except urllib.error.HTTPError:
            pass  # it answers; the download will tell what is wrong
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=look, daemon=True)  # because a look-up in the DNS has no time limit
    thread.start()
    thread.join(2 * PATIENCE)
    if thread.is_alive():
        raise TimeoutError(f"no answer for {2 * PATIENCE:.0f} s")
    if failure:
        raise OSError(one_line(failure[0]))


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove temporary files and folders that a killed process left more than a day ago."""
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):  # another process removes it too
            if time.time() - path.stat().st_mtime > 86_400:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def file_checksum(path: Path, kind: str) -> str:
    """The "md5" or "sha256" of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.new, kind, usedforsecurity=False)).hexdigest()


def json_checksum(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------
# Retinal scans (Q2)

OCTMNIST_URL = "https://zenodo.org/records/10519652/files/octmnist.npz?download=1"
OCTMNIST_MD5 = "c68d92d5b585d8d81f7112f81e2d0842"
SCAN_SIZE = 28  # pixels
SPLITS = ("train", "val", "test")
OCT_ARRAYS = [f"{split}_{part}" for split in SPLITS for part in ("images", "labels")]
IMAGE_SUFFIXES = {".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
CLASS_FOLDERS = ("CNV", "DME", "DRUSEN", "NORMAL")  # of the original OCT2017 scans, in OCTMNIST's label order
Splits = dict[str, tuple[np.ndarray, np.ndarray]]  # of each split, images uint8 [N, 28, 28] and labels int64 [N]
Scans = list[tuple[Path, int]]  # image files and their labels


@dataclass(frozen=True)
class OctData:
    """Retinal scans: for each of train, val and test, images uint8 [N, 28, 28] and labels int64 [N]."""

    name: str  # "OCTMNIST" for that file alone, "OCT phantoms", or the name of the user's file or folder
    kind: str  # "real" or "phantom"
    splits: Splits

    @cached_property
    def description(self) -> dict:
        """The `dataset` entry of a record: name, kind, scans per class of each split, checksum of pixels and labels."""
        digest = hashlib.sha256()
        for split in SPLITS:
            for array in self.splits[split]:
                digest.update(np.ascontiguousarray(array))
        counts = {s: np.bincount(self.splits[s][1], minlength=len(OCT_CLASSES)).tolist() for s in SPLITS}
        return {"name": self.name, "kind": self.kind, "counts": counts, "sha256": digest.hexdigest()}

    @cached_property
    def trained_on_digests(self) -> np.ndarray:
        """Which scans a network is trained and chosen on, uint8 [N, 5], so that it is never scored on them."""
        return np.concatenate([scan_digests(self.splits[split][0]) for split in ("train", "val")])


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
            return OctData("OCTMNIST", "real", check_oct_arrays(read_npz(path), str(path)))
        if source == "auto":
            print("*** OCTMNIST is not here and could not be downloaded: going on with PHANTOMS, which are")
            print("*** drawn by this program and are no real scans. No score below is a score on OCTMNIST.")
            return load_phantoms()
        raise InputError(
            f"OCTMNIST is not here and could not be downloaded: fetch {OCTMNIST_URL} by hand "
            f"(54.9 MB, MD5 {OCTMNIST_MD5}) and save it as {data_dir / 'octmnist.npz'}"
        )
    path = Path(source)
    if source and path.is_dir():
        return OctData(own_name(path.resolve().name), "real", read_oct_folder(path, data_dir))
    if path.is_file():
        name = "OCTMNIST" if file_checksum(path, "md5") == OCTMNIST_MD5 else own_name(path.stem)
        return OctData(name, "real", check_oct_arrays(read_npz(path), str(path)))
    raise InputError(f"-data {source}: no such file or folder (or use auto, octmnist, phantom)")


def own_name(name: str) -> str:
    """The name of a user's data: what is not OCTMNIST's file must not go by its name."""
    return f"{name} (another file)" if name.upper() == "OCTMNIST" else name


def load_phantoms() -> OctData:
    """The default phantoms of `offline_data.phantoms`: the same scans at each call."""
    from offline_data import phantoms

    return OctData("OCT phantoms", "phantom", check_oct_arrays(phantoms.oct_phantoms(), "phantoms"))


def find_octmnist(data_dir: Path) -> Path | None:
    """The first intact octmnist.npz in `data_dir`, the working folder or ~/.medmnist; says which are broken."""
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 (Path.home() raises where a user has no home)
    for folder in (data_dir, Path(), home / ".medmnist"):
        path = folder / "octmnist.npz"
        try:
            if path.is_file():
                if file_checksum(path, "md5") == OCTMNIST_MD5:
                    return path
                print(f"passing over {path}: its MD5 is not OCTMNIST's (cut off? delete it, or give it as -data)")
        except OSError as error:
            print(f"passing over {path}: {one_line(error)}")
    return None


def download_octmnist(data_dir: Path) -> Path | None:
    """Download OCTMNIST through medmnist into `data_dir`; None, and one line that says why, if it fails."""
    import medmnist  # only here: importing it takes seconds

    def fetch(folder: Path) -> None:
        medmnist.OCTMNIST(split="train", download=True, root=str(folder))

    target, url = data_dir / "octmnist.npz", medmnist.INFO["octmnist"]["url"]
    return target if download(target, url, fetch, lambda path: file_checksum(path, "md5") == OCTMNIST_MD5) else None


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of OCTMNIST's layout in an .npz file; others are named. Raises InputError for a damaged file."""
    with reading(path, "an .npz file"):
        check_is_file(path)
        with np.load(path) as file:  # allow_pickle stays False: data must not run code
            if ignored := set(file.files) - set(OCT_ARRAYS):
                print(f"{path}: ignored arrays: {', '.join(sorted(ignored))}")
            return {name: np.asarray(file[name]) for name in file.files if name in OCT_ARRAYS}


def check_oct_arrays(arrays: dict[str, np.ndarray], name: str) -> Splits:
    """Check the six arrays of OCTMNIST's layout and pair them by split. Raises InputError, naming the array.

    Each class must occur in train and in val. Says how many scans two splits share.
    """
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
        check_classes(splits[split][1], split, name)
    report_shared_scans(splits, name)
    return splits


def check_classes(labels: Sequence[int], split: str, name: str) -> None:
    """Raises InputError if a class has no scan to train or to validate on: its scores would mean nothing."""
    present = set(labels)
    if split != "test" and (missing := [c for i, c in enumerate(OCT_CLASSES) if i not in present]):
        where = "to train on" if split == "train" else "to validate on (those of one patient stay together)"
        raise InputError(f"{name}: the {split} split has no scan of {', '.join(missing)} {where}")


def scan_digests(images: np.ndarray) -> np.ndarray:
    """Five bytes of a checksum of each scan's pixels [N, 28, 28]: uint8 [N, 5]. They tell the same scan elsewhere."""
    digests = (hashlib.blake2b(image, digest_size=5).digest() for image in np.ascontiguousarray(images))
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 5)


def are_among(digests: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of N scans are among others, by their `scan_digests`: bool [N]."""
    known = set(map(bytes, others))
    return np.array([bytes(digest) in known for digest in digests], bool)


def report_shared_scans(splits: Splits, name: str) -> None:
    """Say how many scans of a split lie, pixel for pixel, in another one too: scores on them are too good."""
    digests = {split: scan_digests(images) for split, (images, _) in splits.items()}
    for split, other in (("val", "train"), ("test", "train"), ("test", "val")):
        if shared := are_among(digests[split], digests[other]).sum():
            print(f"{name}: {shared} of {len(digests[split]):,} {split} scans are in {other} as well, pixel for pixel")


def prepare_scan(path: Path) -> np.ndarray:
    """Read an image file as a viewer shows it and prepare it as MedMNIST did: uint8 [28, 28]. Raises InputError.

    The centre square of the shorter edge's length, then bicubic resizing to 28x28 (Yang et al., MedMNIST v2,
    Scientific Data 10:41, 2023). Pillow's antialiased filter gives the dataset's very pixels.
    """
    from PIL import Image, ImageOps

    with reading(path, "an image"):
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: not an image, not even a file")
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)  # a camera's way to say which side is up
            if image.has_transparency_data:  # viewers show white behind it
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if image.mode.startswith(("I", "F")):  # deeper than 8 bits: convert("L") would clip, not scale
                image = Image.fromarray(to_8_bits(np.asarray(image, dtype=np.float64)))
            grey = image.convert("L")
    edge = min(grey.size)
    left, top = (grey.width - edge) // 2, (grey.height - edge) // 2
    square = grey.crop((left, top, left + edge, top + edge))
    return np.asarray(square.resize((SCAN_SIZE, SCAN_SIZE), Image.Resampling.BICUBIC))


def to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Deep greys to uint8, from the smallest usual range that holds them: [0, 1], or 8, 10, 12, 14, 16 or 32 bits."""
    if not (pixels >= 0).all() or pixels.max(initial=0) > 2**32:
        raise ValueError("grey values that are negative, no numbers or above 32 bits")
    ranges = (1, *(2**bits - 1 for bits in (8, 10, 12, 14, 16)), 2**32)
    white = next(white for white in ranges if pixels.max(initial=0) <= white)
    return (pixels * (255 / white)).round().astype(np.uint8)


def read_oct_folder(folder: Path, data_dir: Path) -> Splits:
    """Read scans in class folders, as OCT2017 is distributed: train/CNV/CNV-<patient>-<number>.jpeg, test/...

    Where there is no val folder, a tenth of the training patients (as many as OCTMNIST's share) becomes the
    validation split. The prepared arrays are kept under `data_dir`, because a hundred thousand files take minutes;
    they are made again if they are damaged or if a file, its size or its time has changed. Raises InputError.
    """
    files = list_scans(folder)
    for split in ("train", "test"):
        if not files[split]:
            wanted = "|".join(CLASS_FOLDERS)
            raise InputError(f"{folder}: no scans in {split}/({wanted})/*.jpeg; a folder needs train and test")
    for split in SPLITS:
        if files[split]:  # said now, before minutes of work
            check_classes([label for _, label in files[split]], split, str(folder))
    prepared = data_dir / f"oct-folder-{fingerprint(folder, files)}.npz"
    if prepared.exists():
        try:
            return check_oct_arrays(read_npz(prepared), str(folder))
        except InputError as error:
            print(f"{prepared}: {error}: the scans are prepared again")
    arrays, buffer = prepare_scans(files), io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    try:
        write_whole(prepared, buffer.getvalue())
    except OSError as error:
        print(f"the prepared scans cannot be kept and are made anew each time ({one_line(error)})")
    return check_oct_arrays(arrays, str(folder))


def list_scans(folder: Path) -> dict[str, Scans]:
    """The image files of train, val and test/(CNV|DME|DRUSEN|NORMAL) with their labels, in sorted order.

    These folders may be in any case. All other files are ignored, and a line names and counts them.
    """
    scans: dict[str, Scans] = {split: [] for split in SPLITS}
    ignored: Counter[str] = Counter()
    for file in sorted(walk(folder)):
        *parents, name = file.relative_to(folder).parts
        in_class = len(parents) == 2 and parents[0].lower() in SPLITS and parents[1].upper() in CLASS_FOLDERS
        if in_class and file.suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
            scans[parents[0].lower()].append((file, CLASS_FOLDERS.index(parents[1].upper())))
        else:
            ignored["/".join([*parents, f"*{file.suffix}" if file.suffix else name])] += 1
    if ignored:
        listed = ", ".join(f"{count} {kind}" for kind, count in ignored.most_common(6))
        more = f" and {len(ignored) - 6} more kinds" if len(ignored) > 6 else ""
        print(f"{folder}: ignored {ignored.total()} files that are no scans in class folders: {listed}{more}")
    return scans


def walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, through links to other folders, each folder once. Raises OSError for one kept shut."""

    def fail(error: OSError) -> None:
        raise error

    visited = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        folders[:] = [name for name in folders if Path(parent, name).resolve() not in visited]
        visited.update(Path(parent, name).resolve() for name in folders)
        yield from (Path(parent, name) for name in names)


def fingerprint(folder: Path, files: dict[str, Scans]) -> str:
    """Twelve digits that change with the folder and with the name, size or time of any of its scans."""
    listing = []
    for split in SPLITS:
        for file, _ in files[split]:
            state = file.stat()
            listing.append((split, str(file.relative_to(folder)), state.st_size, state.st_mtime_ns))
    # "2" is the version of `prepare_scan` and of how we split: what an earlier one prepared is not taken.
    return json_checksum(["2", str(folder.resolve()), listing])[:12]


def prepare_scans(files: dict[str, Scans]) -> dict[str, np.ndarray]:
    """The six arrays of OCTMNIST's layout from image files; without files for val, it is split off train."""
    images, labels = {}, {}
    for split, scans in files.items():
        progress = tqdm(scans, desc=f"preparing {split} scans", disable=None)
        images[split] = np.array([prepare_scan(file) for file, _ in progress], np.uint8)
        labels[split] = np.array([label for _, label in scans], np.uint8)
    if not files["val"]:
        aside = choose_validation([file for file, _ in files["train"]], images["train"], labels["train"])
        for parts in (images, labels):
            parts["train"], parts["val"] = parts["train"][~aside], parts["train"][aside]
    return {f"{s}_images": images[s] for s in SPLITS} | {f"{s}_labels": labels[s][:, None] for s in SPLITS}


def choose_validation(files: list[Path], images: np.ndarray, labels: np.ndarray, fraction: float = 0.1) -> np.ndarray:
    """Which of N training scans to validate on: bool [N], those of a `fraction` of the patients.

    No patient and no scan is on both sides: scans of one patient, and scans with the same pixels, stay together. The
    order in which patients are chosen depends on their names alone, and every class gets a scan to validate on. The
    patient is the number in CLASS-<patient>-<number>.jpeg; a name of another form counts as a patient.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    names = [found[1] if (found := re.match(r"[A-Za-z]+-(\d+)-\d", file.stem)) else file.stem for file in files]
    patients, patient = np.unique(names, return_inverse=True)  # patient [N]: an index into patients
    _, picture = np.unique(scan_digests(images), axis=0, return_inverse=True)
    nodes = len(patients) + len(files)  # a graph of patients and pictures, with an edge for each scan
    edges = coo_array((np.ones(len(files)), (patient, len(patients) + picture.reshape(-1))), shape=(nodes, nodes))
    group_of_patient = connected_components(edges, directed=False)[1][: len(patients)]
    order = np.argsort([hashlib.sha256(os.fsencode(str(name))).digest() for name in patients])
    groups = list(dict.fromkeys(group_of_patient[order].tolist()))
    group = group_of_patient[patient]  # [N]
    chosen = groups[: max(1, round(fraction * len(groups)))]
    for label in np.unique(labels):
        if not np.isin(group[labels == label], chosen).any():
            chosen.append(next(g for g in groups if g in group[labels == label]))
    return np.isin(group, chosen)


# ---------------------------------------------------------------------------------------------------
# Speech (Q3)

LJSPEECH_URL = "https://data.keithito.com/data/speech/LJSpeech-1.1.tar.bz2"
LJSPEECH_SHA256 = "be1a30453f28eb8dd26af4101ae40cbf2c50413b1bb21936cbcdc6fae3de8aa5"
LJSPEECH_CLIPS = 13_100
LJSPEECH_BYTES = 6.6e9  # the archive and its content side by side
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
    sha256: str  # of the file's bytes


@dataclass(frozen=True)
class SpeechCorpus:
    """Clips with transcripts, by split: train, val, test, and what else corpus.json names."""

    name: str  # "LJ Speech", "LJ Speech, 186 of 13,100 clips", the name in corpus.json, or the folder's
    kind: str  # "real" or "spoken"
    folder: Path
    sample_rate: int  # Hz, at which features are to be made; files of another rate are resampled
    splits: dict[str, list[Clip]]
    left_out: list[str]  # a line for each row that cannot be used
    unread: tuple[str, ...] = ()  # ids of rows that are in no training split on purpose, so that one may test on them

    @cached_property
    def description(self) -> dict:
        """The `dataset` entry of a record. Its checksum is over rows, ids, texts, durations and the files' bytes."""
        clips = [(split, clip) for split, clips in self.splits.items() for clip in clips]
        rows = [(split, clip.row, clip.id, clip.text, f"{clip.seconds:.6f}", clip.sha256) for split, clip in clips]
        return {
            "name": self.name,
            "kind": self.kind,
            "counts": {split: len(clips) for split, clips in self.splits.items()},
            "hours": {s: round(sum(c.seconds for c in clips) / 3600, 4) for s, clips in self.splits.items()},
            "left_out": len(self.left_out),
            "sha256": json_checksum(rows),
        } | ({"unread": list(self.unread)} if self.unread else {})

    def learn_by_heart(self, clips: int) -> "SpeechCorpus":
        """The first clips of the train split alone, to train on and to score: no result, but proof that all works."""
        few = self.splits["train"][:clips]
        return replace(self, name=f"{self.name}: {len(few)} clips, learnt by heart", splits=dict.fromkeys(SPLITS, few))

    def tested_on(self, other: "SpeechCorpus") -> "SpeechCorpus":
        """Tested on all clips of another folder: as `test_real` beside splits that are given, else as `test`.

        Then the last tenth of our own clips is for validation, and all others are for training.
        """
        clips, splits = self.renumbered(chain(*other.splits.values())), self.splits
        if self.name == "LJ Speech" or os.path.lexists(self.folder / "corpus.json"):
            splits = splits | {"test_real": clips}
        else:
            own = list(chain(*splits.values()))
            cut = math.ceil(0.9 * len(own))
            splits = {"train": own[:cut], "val": own[cut:], "test": clips}
        name = f"{self.name}, tested on {other.name}"
        return replace(self, name=name, splits=splits, left_out=self.left_out + other.left_out)

    def mixed_with(self, other: "SpeechCorpus") -> "SpeechCorpus":
        """With as many training clips of another corpus among our own: who learns only new things forgets old ones."""
        own, others = self.splits["train"], other.splits["train"]
        some = self.renumbered(others[:: max(1, len(others) // len(own))][: len(own)])
        name = f"{self.name}, with {len(some)} clips of {other.name}"
        return replace(self, name=name, splits=self.splits | {"train": own + some}, unread=other.unread)

    def renumbered(self, clips: Iterable[Clip]) -> list[Clip]:
        """Clips of another corpus, numbered as rows that follow on our own."""
        first = 1 + max(clip.row for clip in chain(*self.splits.values()))
        return [replace(clip, row=row) for row, clip in enumerate(clips, first)]


def load_speech(
    source: str = "auto", data_dir: Path | str = "data", seed: int = 0, also_test: str = "", mixed_with: str = ""
) -> SpeechCorpus:
    """Load clips of speech with their transcripts, by itself or with another corpus to test on, or to mix in.

    See `load_one_corpus` for the names, `SpeechCorpus.tested_on` and `SpeechCorpus.mixed_with`. Raises InputError for
    what cannot be used.
    """
    corpus = load_one_corpus(source, data_dir, seed)
    if also_test:
        corpus = corpus.tested_on(load_one_corpus(also_test, data_dir, seed))
    if mixed_with:
        corpus = corpus.mixed_with(load_one_corpus(mixed_with, data_dir, seed))
    return corpus


def load_one_corpus(source: str, data_dir: Path | str, seed: int) -> SpeechCorpus:
    """Load a corpus as it lies on the disk.

    `source` is "ljspeech" (the only one that downloads: 2.6 GB), "spoken" (made on first use, `seed` says which one),
    a folder in LJ Speech's layout (see `read_speech_folder`), or "auto": LJ Speech if it lies in `data_dir`, else
    the spoken corpus. Raises InputError for what cannot be used.
    """
    data_dir = Path(data_dir)
    if source in ("auto", "ljspeech"):
        folder = data_dir / "LJSpeech-1.1"
        is_here = is_ljspeech(folder)
        if folder.exists() and not is_here:
            print(f"passing over {folder}: it is not the whole of LJ Speech (to use it, name it as data)")
        if is_here or (source == "ljspeech" and download_ljspeech(folder)):
            return read_speech_folder(folder)
        if source == "ljspeech":
            raise InputError(
                f"LJ Speech is not here and could not be downloaded: fetch {LJSPEECH_URL} by hand "
                f"(2.6 GB, SHA-256 {LJSPEECH_SHA256}) and unpack it as {folder}"
            )
        print("*** LJ Speech is not here: going on with sentences of a grammar, spoken by a SYNTHETIC voice.")
        print('*** No score below is a score on LJ Speech. data = "ljspeech" downloads the real thing (2.6 GB).')
    if source in ("auto", "spoken"):
        from offline_data import speech

        folder = data_dir / f"spoken-seed{seed}"
        try:
            speech.make_spoken_corpus(folder, seed)  # nothing to do if it is there
        except (speech.SpeechError, OSError) as error:
            raise InputError(f"the spoken corpus cannot be made: {error}") from None
        return read_speech_folder(folder)
    if Path(source).is_dir():
        return read_speech_folder(Path(source))
    raise InputError(f"data {source}: no such folder (or use auto, ljspeech, spoken)")


def is_ljspeech(folder: Path) -> bool:
    """Whether a folder has all rows of LJ Speech and at least 99 % of its files: single bad ones can be left out."""
    if os.path.lexists(folder / "corpus.json"):
        return False  # LJ Speech has none: these are its texts in another voice
    metadata = folder / "metadata.csv"
    rows = len(metadata.read_bytes().splitlines()) if metadata.is_file() else 0
    return rows == LJSPEECH_CLIPS and len([*(folder / "wavs").glob("*.wav")]) >= 0.99 * LJSPEECH_CLIPS


def download_ljspeech(target: Path) -> bool:
    """Download LJ Speech's folder `target` through torchaudio. Returns whether it is there; if not, a line says why."""

    def fetch(folder: Path) -> None:
        import torchaudio.datasets  # only here: importing it takes a while, and only Q3 needs it

        if shutil.disk_usage(folder).free < LJSPEECH_BYTES:
            raise OSError(f"{target.parent} has less than {LJSPEECH_BYTES / 1e9:.1f} GB free")
        print("2.6 GB are downloaded and then unpacked, which takes some minutes more", flush=True)
        # torchaudio checks the archive. In the end it reads the texts in the system's encoding; we read them as UTF-8.
        with contextlib.suppress(UnicodeDecodeError):
            torchaudio.datasets.LJSPEECH(folder, url=LJSPEECH_URL, download=True)

    return download(target, LJSPEECH_URL, fetch, is_ljspeech)


def read_speech_folder(folder: Path) -> SpeechCorpus:
    """Read a folder in LJ Speech's layout: metadata.csv (id|text|normalised text, no quoting), wavs/<id>.wav.

    Rows that cannot be used (see `read_row`) are printed and left out; they do not move the splits, which are cut
    by row (see `describe_folder`). Raises InputError where no clip of a split is left.
    """
    metadata = folder / "metadata.csv"
    if not (metadata.is_file() and (folder / "wavs").is_dir()):
        raise InputError(f"{folder}: needs metadata.csv (rows of id|text|normalised text) and wavs/<id>.wav")
    with reading(metadata, "a list of clips"):
        lines = metadata.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()  # without a byte order mark
    if len(lines) < 3:
        raise InputError(f"{metadata}: has {len(lines)} rows, at least 3 are needed")
    name, kind, rows, unread = describe_folder(folder, len(lines))
    clips, left_out = {}, []
    for row, line in enumerate(lines):
        try:
            clip = read_row(folder, row, line)
            if clip.id in clips:
                raise InputError(f"id {clip.id} was there before")
            clips[clip.id] = clip
        except InputError as error:
            left_out.append(f"{metadata} line {row + 1}: {error}")
    splits = {split: [clip for clip in clips.values() if clip.row in rows[split]] for split in rows}
    check_clips(folder, splits, left_out)
    if unused := len(clips) - sum(map(len, splits.values())):
        print(f"{folder}: {unused} of {len(clips)} clips are in no split of corpus.json: they are not used")
    if odd := sum(clip.rate != SPEECH_RATE for clip in clips.values()):
        print(f"{folder}: {odd} of {len(clips)} clips are not at {SPEECH_RATE} Hz: they are resampled")
    if name == "LJSpeech-1.1":  # never to be taken for the whole if it is a part
        whole = len(clips) == len(lines) == LJSPEECH_CLIPS
        name = "LJ Speech" if whole else f"LJ Speech, {len(clips):,} of {LJSPEECH_CLIPS:,} clips"
    elif kind == "real" and re.match(r"lj[\W_]*speech", name, re.IGNORECASE):
        name = f"{name} (another folder)"
    return SpeechCorpus(name, kind, folder, SPEECH_RATE, splits, left_out, unread)


def describe_folder(folder: Path, num_rows: int) -> tuple[str, str, dict[str, range], tuple[str, ...]]:
    """Name, kind, the rows of each split, and ids that were left unread: what corpus.json says.

    Without it the folder's name, "real", and 75, 5 and 20 % of the rows, at least one each: of LJ Speech's 13,100
    these are the course's splits. Raises InputError for splits that overlap or lie outside the rows, and for names
    that are no short line of printable characters.
    """
    val = min(max(1, round(0.75 * num_rows)), num_rows - 2)
    test = min(max(val + 1, round(0.80 * num_rows)), num_rows - 1)
    spans = {"train": [0, val], "val": [val, test], "test": [test, num_rows]}
    path = folder / "corpus.json"
    name = folder.name or folder.resolve().name
    about = {"name": "".join(c if c.isprintable() else "?" for c in name)[:100], "kind": "real"}
    with reading(path, what := "the description of a corpus"):
        if os.path.lexists(path):
            about = read_json(path, what)
        name, kind, spans = about["name"].strip(), about["kind"], about.get("splits", spans)
        if kind not in ("real", "spoken") or not (name.isprintable() and 0 < len(name) <= 100):
            raise ValueError(f"name {name!r}, kind {kind!r}")
        if odd := [split for split in spans if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", split)]:
            raise ValueError(f"split {odd[0]!r}")
        edges = [0, *chain.from_iterable(sorted(spans.values())), num_rows]
        if edges != sorted(edges) or {*map(type, edges)} != {int} or not {*SPLITS} <= {*spans}:
            raise ValueError(f"splits {spans} do not fit {num_rows} rows")
        unread = tuple(about.get("unread", ()))
        if not all(isinstance(row, str) and re.fullmatch(r"[\w-]{1,100}", row) for row in unread):
            raise ValueError("unread rows that are no names")
        return name, kind, {split: range(first, end) for split, (first, end) in spans.items()}, unread


def read_row(folder: Path, row: int, line: bytes) -> Clip:
    """Check one row of metadata.csv and the header of its wav file. Raises InputError for a row without use."""
    try:
        columns = line.decode().split("|")
    except UnicodeDecodeError:
        raise InputError("is not UTF-8") from None
    if len(columns) != 3:
        raise InputError(f"has {len(columns)} columns, not 3 (id|text|normalised text)")
    name, text = columns[0].strip(), columns[2].strip()
    if not re.fullmatch(r"[^/\\]{1,100}", name) or not name.isprintable():
        raise InputError(f"id {name[:100]!r} names no file in wavs/")
    path = folder / "wavs" / f"{name}.wav"
    if not text:
        raise InputError(f"the transcript of {name} is empty")
    if re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]", text):  # they could steer a terminal; a tab is a space
        raise InputError(f"the transcript of {name} holds control characters")
    with open_audio(path) as audio:
        seconds, rate = audio.frames / audio.samplerate, audio.samplerate
        sha256 = file_checksum(path, "sha256")
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise InputError(f"{path}: lasts {seconds:.2f} s, not {MIN_SECONDS} to {MAX_SECONDS:g} s")
    return Clip(row, name, text, path, seconds, rate, sha256)


def check_clips(folder: Path, splits: dict[str, list[Clip]], left_out: list[str]) -> None:
    """Print why clips are left out (five reasons at most). Raises InputError if a split has none left."""
    if left_out:
        more = [f"... and {len(left_out) - 5} more"] if len(left_out) > 5 else []
        usable = sum(map(len, splits.values()))
        print(*left_out[:5], *more, f"left out: {len(left_out)} ({usable} clips are used)", sep="\n")
    if empty := [split for split, clips in splits.items() if not clips]:
        raise InputError(f"{folder}: no clip of the {empty[0]} split can be used")


@contextlib.contextmanager
def silent_libraries() -> Iterator[None]:
    """What C libraries, such as the one that reads MP3, print of their own to standard error is not shown."""
    try:
        shown = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(shown, 2)
        os.close(shown)
        os.close(nowhere)


@contextlib.contextmanager
def open_audio(path: Path | str) -> Iterator:
    """An audio file as a soundfile.SoundFile. Raises InputError for one that is absent, cut off or cannot be read."""
    import soundfile

    path = Path(path)
    convert = "ffmpeg -i {} -ar 22050 {}".format(*map(shlex.quote, (str(path), f"{path}.wav")))
    with reading(path, "audio"):
        check_is_file(path)
        if path.stat().st_size == 0:
            raise InputError(f"{path}: is empty")
        try:
            with silent_libraries():
                file = soundfile.SoundFile(path if os.name == "nt" else os.fsencode(path))  # it need not be UTF-8
        except Exception as error:
            reason = one_line(getattr(error, "error_string", error))  # libsndfile's, without the path
            raise InputError(f"{path}: not audio, or damaged ({reason}). To convert it: {convert}") from None
        with file:
            log = file.extra_info  # libsndfile shortens what was cut off to what there is, and only notes it here
            sizes = re.search(r"(?:data|SSND|riff|Riff size|Data Size) *: (\d+) \(should be (\d+)\)", log)
            promised, there = map(int, sizes.groups()) if sizes else (0, 0)
            if there < promised < 2**31 - 2**16:  # streams promise all that 32 bits can count
                raise InputError(f"{path}: is cut off: {there:,} of {promised:,} bytes are there")
            if "Junk after the last page" in log:
                raise InputError(f"{path}: is cut off in the middle of an Ogg page")
            if file.frames > 2**40:  # a FLAC stream
                raise InputError(f"{path}: does not say how long it is. To convert it: {convert}")
            if not 4_000 <= file.samplerate <= 768_000:  # Hz: nobody records speech outside of these
                raise InputError(f"{path}: is said to have {file.samplerate:,} samples a second: its header is damaged")
            yield file


def read_wav(path: Path | str, rate: int | None = None, rumble: float = 0) -> tuple[np.ndarray, int]:
    """Read an audio file: samples float32 [n] in about [-1, 1], mixed by `mix_channels`, and their rate in Hz.

    With `rate` they are resampled to it, with `rumble` frequencies below it (Hz) are taken out. Raises InputError for a
    file that is absent, empty, cut off or unreadable.
    """
    with open_audio(path) as file, silent_libraries():
        samples, file_rate = file.read(file.frames, dtype="float32", always_2d=True), file.samplerate
        if len(samples) < file.frames and file.format != "MP3":  # whose length is a guess
            raise InputError(f"{path}: is cut off: {len(samples):,} of {file.frames:,} samples are there")
    if len(samples) == 0:
        raise InputError(f"{path}: holds no samples")
    if not (peak := np.abs(samples).max()) < np.inf:
        raise InputError(f"{path}: holds samples that are no finite numbers")
    if peak > 8:  # 18 dB above full scale: nobody overdrives so much
        raise InputError(f"{path}: its samples reach {peak:,.0f}, not 1: divide them by 32,768 if they had 16 bits")
    if rumble:
        for channel in samples.T:
            channel[:] = without_rumble(channel, file_rate, rumble)
    samples = mix_channels(samples)
    if rate in (None, file_rate):
        return samples, file_rate
    from scipy.signal import resample_poly  # torchaudio's takes gigabytes where the rates share no factor

    shared = math.gcd(rate, file_rate)
    return resample_poly(samples, rate // shared, file_rate // shared).astype(np.float32), rate


def without_rumble(samples: np.ndarray, rate: int, lowest: float) -> np.ndarray:
    """`samples` [n] without what lies below `lowest` Hz: a constant offset, hum, steps."""
    from scipy.signal import butter, sosfilt, sosfilt_zi

    sections = butter(8, lowest, "highpass", fs=rate, output="sos")
    return sosfilt(sections, samples, zi=sosfilt_zi(sections) * samples[0])[0]  # as if the first sample lasted for ever


def mix_channels(samples: np.ndarray) -> np.ndarray:
    """The mean of the channels of float32 [n, channels], without constant offsets: float32 [n].

    Channels that nowhere come within 20 dB of the strongest are left out. One that is inverted to the channel that it
    is most like is turned over first: the two would cancel.
    """
    samples = samples - samples.mean(axis=0, dtype=np.float64).astype(np.float32)
    blocks = np.add.reduceat(np.square(samples), range(0, len(samples), 4096), axis=0)  # of some tenths of a second
    power = blocks.sum(axis=0, dtype=np.float64)  # [channels]
    strong = np.flatnonzero(blocks.max(axis=0) >= 0.01 * blocks.max())
    strong = strong[np.argsort(-power[strong], kind="stable")]
    likeness = (samples.T @ samples) / np.maximum(np.sqrt(np.outer(power, power)), 1e-30)
    signs = np.ones(len(power), dtype=np.float32)
    for number, channel in enumerate(strong[1:], start=1):
        others = likeness[channel, strong[:number]] * signs[strong[:number]]
        if others[np.abs(others).argmax()] < -0.1:  # -0.1: two voices are just unlike
            signs[channel] = -1
    return samples[:, strong] @ (signs[strong] / len(strong))


# ---------------------------------------------------------------------------------------------------
# Features of speech, kept on disk (Q3)

Extract = Callable[[np.ndarray, int], np.ndarray]  # (samples float32 [n], rate) -> float32 [frames, n_mels]


@dataclass
class FeatureCache:
    """The features of a corpus: `cache[clip]` is float16 [frames, n_mels], read-only, mapped from the disk."""

    path: Path
    corpus: SpeechCorpus  # without the clips that turned out to be of no use, such as silent ones
    mean: np.ndarray  # float32 [n_mels], over all frames of the train split
    std: np.ndarray  # float32 [n_mels], at least 1e-3, so that one can divide by it
    places: dict[int, tuple[int, int]]  # row of a clip -> its first and end frame in the file

    def __post_init__(self) -> None:
        self.features = np.memmap(self.path, "<f2", "r").reshape(-1, len(self.mean))

    def __reduce__(self) -> tuple:
        """For other processes: they map the file again instead of being sent its content."""
        return FeatureCache, (self.path, self.corpus, self.mean, self.std, self.places)

    def __getitem__(self, clip: Clip) -> np.ndarray:
        first, end = self.places[clip.row]
        return self.features[first:end]

    def frames(self, clip: Clip) -> int:
        first, end = self.places[clip.row]
        return end - first

    def clips(self, split: str) -> list[Clip]:
        return self.corpus.splits[split]


def cached_features(corpus: SpeechCorpus, extract: Extract, settings: dict, data_dir: Path | str) -> FeatureCache:
    """The features that `extract` makes of every clip: made once, then mapped from a file in `data_dir`.

    `settings` is all that `extract` depends on (it must fit into JSON): other settings have another file. They are
    made again where they, the audio or the splits have changed since. Clips that are silent or cannot be read are
    printed and left out. Raises InputError if a split has none left.
    """
    data_dir, folder = Path(data_dir), corpus.folder.resolve()
    folders = {clip.path.parents[1] for clips in corpus.splits.values() for clip in clips}  # of a mixture, several
    digest = json_checksum([*sorted(str(part.resolve()) for part in folders), settings])[:12]
    path = data_dir / f"features-{folder.name[:40]}-{digest}.f16"
    audio = [(split, clip.row, clip.sha256) for split, clips in corpus.splits.items() for clip in clips]
    source = json_checksum([settings, corpus.sample_rate, audio])
    remove_leftovers(data_dir, ".features-*")
    try:
        cache = open_features(path, corpus, source)
    except InputError as error:
        if path.exists():
            print(f"{error}: the features are made again")
        write_features(path, corpus, extract, source)
        cache = open_features(path, corpus, source)
    check_clips(corpus.folder, cache.corpus.splits, cache.corpus.left_out[len(corpus.left_out) :])
    return cache


def write_features(path: Path, corpus: SpeechCorpus, extract: Extract, source: str) -> None:
    """Write the features of all clips to `path`, one after another, and to a JSON file beside it what they are.

    `source` is the checksum of what they are made from. Raises InputError if no clip of the train split can be used.
    """
    members = [(split, clip) for split, clips in corpus.splits.items() for clip in clips]
    frames, left_out = [], []
    sums = np.zeros((3, 1))  # of the train split's features to the power of 0, 1 and 2, in float64
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            for split, clip in tqdm(members, desc="features", unit="clip", disable=None):
                try:
                    features = clip_features(clip, extract, corpus.sample_rate)
                except InputError as error:
                    left_out.append(str(error))
                    continue
                file.write(features)
                frames.append([clip.row, len(features)])
                if split == "train":
                    exact = features.astype(np.float64)
                    sums = sums + [np.sum(exact**power, axis=0) for power in range(3)]
        number, total, squares = sums
        if not number.all():
            raise InputError(f"{corpus.folder}: no clip of the train split can be used (such as {left_out[0]})")
        mean = total / number
        std = np.sqrt((squares / number - mean**2).clip(0))
        about = {"source": source, "mean": mean.tolist(), "std": std.tolist(), "left_out": left_out, "frames": frames}
        seal = json_checksum([about, file_checksum(temporary, "sha256")])
        temporary.replace(path)
        write_json(path.with_suffix(".json"), about | {"sha256": seal})  # last: an older one fits no new features
    finally:
        temporary.unlink(missing_ok=True)


def clip_features(clip: Clip, extract: Extract, rate: int) -> np.ndarray:
    """The features of one clip as they are stored: float16 [frames, n_mels]. Raises InputError for a bad clip."""
    samples, _ = read_wav(clip.path, rate)
    if np.ptp(samples) < SILENCE:
        raise InputError(f"{clip.path}: is silent")
    with np.errstate(over="ignore"):
        features = np.ascontiguousarray(extract(samples, rate), "<f2")
    if not np.isfinite(features).all():
        raise InputError(f"{clip.path}: its features do not fit into float16")
    return features


def open_features(path: Path, corpus: SpeechCorpus, source: str) -> FeatureCache:
    """Map a file of features, all of it checked (a second a gigabyte). Raises InputError if it does not fit."""
    about = read_json(path.with_suffix(".json"), "what is known of the features")
    with reading(path, "the features of this corpus"):
        check_is_file(path)
        seal = about.pop("sha256")
        if about["source"] != source:
            raise ValueError("made from other audio, splits or settings")
        if seal != json_checksum([about, file_checksum(path, "sha256")]):
            raise ValueError("a checksum does not fit")
        ends = accumulate(frames for _, frames in about["frames"])
        places = {row: (end - frames, end) for (row, frames), end in zip(about["frames"], ends, strict=True)}
        splits = {split: [c for c in clips if c.row in places] for split, clips in corpus.splits.items()}
        corpus = replace(corpus, splits=splits, left_out=corpus.left_out + about["left_out"])
        mean, std = np.array([about["mean"], np.maximum(about["std"], 1e-3)], np.float32)
        return FeatureCache(path, corpus, mean, std, places)


# ---------------------------------------------------------------------------------------------------
# Notebooks (Q3)


def notebook_definitions(path: Path) -> types.ModuleType:
    """Run the cells of a notebook tagged `parameters` or `definitions`, in order, as a module named after it.

    Tests and benchmarks import a notebook by this, without its training. Tracebacks show the lines of its cells,
    which are numbered as Jupyter does after Run All.
    """
    path = Path(path).resolve()
    module = types.ModuleType(re.sub(r"\W", "_", path.stem))
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and pickle look there
    cells = [cell for cell in json.loads(path.read_bytes())["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, start=1):
        if {"parameters", "definitions"} & {*cell["metadata"].get("tags", [])}:
            source, name = "".join(cell["source"]) + "\n", f"{path.name}[cell {number}]"
            linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # tracebacks read it
            exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)
    return module


# ---------------------------------------------------------------------------------------------------
# Plotting

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito: colour-blind safe
STYLE = {
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
    "text.parse_math": False,  # names of strangers' files may hold a $
    "svg.hashsalt": "hw2",  # the same drawing gives the same bytes
}


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (5.0, 3.6)) -> tuple[Figure, list[Axes]]:
    """A figure with `rows` x `columns` axes, row by row, of `size` inches each, in our style from now on."""
    matplotlib.rcParams.update(STYLE)  # here, so that importing this file changes no one's settings
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def save_figure(figure: Figure, path: Path) -> None:
    """Save as PNG and SVG (`path` without suffix), each whole or not at all."""
    # Without dates and versions the same drawing gives the same bytes.
    for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, metadata=metadata)
        write_whole(path.with_name(f"{path.name}.{suffix}"), buffer.getvalue())
