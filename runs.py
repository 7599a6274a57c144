"""A run's folder, files, record and command-line manners, shared by the questions.

Whatever a user gives us ends in a result or in one line that says what is wrong (`InputError`). Whatever a run
writes is written whole, so that a run can be killed at any moment and goes on with its last checkpoint.
"""

import argparse
import contextlib
import errno
import hashlib
import io
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

# PyTorch and NumPy take seconds to import: they are imported where they are used, so that `-h` answers at once.


class InputError(Exception):
    """Input that cannot be used. Its message is one line: what is wrong, and what to do."""

    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows: that one line."""
        return [f"InputError: {self}"]


def one_line(error: BaseException, longest: int = 160) -> str:
    """The message of an error (its class where it has none) on one line, cut at `longest` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else text[: longest - 3] + "..."


# ---------------------------------------------------------------------------------------------------
# The command line


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose description is the script's docstring, and whose errors are one line."""

    def __init__(self, description: str, prog: str | None = None):
        super().__init__(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> None:
        """One line instead of the whole usage, and exit status 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def number(kind: type, low: float, high: float = math.inf, low_fits: bool = True) -> Callable:
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


def run_script(name: str, parse: Callable, run: Callable, arguments: list[str] | None, stopped: str) -> int:
    """Parse the arguments and run; `stopped` is said when the user interrupts.

    Returns the exit status: 0, 2 for input that cannot be used (after one line on stderr), 130 when interrupted.
    """
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None or getattr(getattr(sys, stream), "closed", False):  # by whoever started us
            setattr(sys, stream, Path(os.devnull).open("w"))  # noqa: SIM115 (open to the end)
        with contextlib.suppress(AttributeError):  # Jupyter's streams cannot be reconfigured, and need not be
            getattr(sys, stream).reconfigure(errors="backslashreplace")  # an odd terminal must not stop a run
    args = parse(arguments)
    git_state()  # now: files may change while a run goes on
    try:
        run(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print(f"\n{name}: {stopped}", file=sys.stderr)
        return 130
    except (InputError, OSError) as error:  # OSError: a folder that cannot be written, a full disk, a closed pipe
        reason = one_line(error, 1000)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        reason = "out of memory: try a smaller -batch_size, fewer -jobs, or another -device"
    with contextlib.suppress(OSError):
        print(f"{name}: {reason}", file=sys.stderr)
    return 2


# ---------------------------------------------------------------------------------------------------
# Files: written whole or not at all, read with one line for what is damaged


def write_whole(path: Path, content: bytes) -> None:
    """Write a temporary file beside `path`, flush it to the disk, and rename it to `path`.

    A process killed at any moment leaves either the old file or the new one, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # a full disk does not say which file it has no place for
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, record: dict) -> None:
    """Write a record as JSON, whole or not at all. Raises ValueError for NaN: it is not JSON."""
    text = json.dumps(record, indent=1, allow_nan=False)
    # Lists of numbers (histories, confusion matrices) read better on one line. Text is left alone.
    text = re.sub(r'\[\n([^][{}"]*)\n *\]', lambda found: "[" + " ".join(found[1].split()) + "]", text)
    write_whole(path, text.encode() + b"\n")


OTHER_FILES = (errno.EPIPE, errno.ENOSPC, errno.EFBIG, errno.EDQUOT)  # errors that no file gives when it is read


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever the content of a damaged or foreign file raises into an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{error.filename or path}: {error.strerror}") from None
    except Exception as error:  # zip, zlib, pickle, JSON, and our own look at values of any type and size
        if isinstance(error, OSError) and (error.errno in OTHER_FILES or error.filename not in (None, str(path))):
            raise  # it is about a file that is written meanwhile
        raise InputError(f"{path}: not {what}, or damaged ({type(error).__name__}: {one_line(error)})") from None


def read_json(path: Path, what: str = "a record") -> dict:
    """A record from its file. Raises InputError where it cannot be read or is no JSON object."""
    with reading(path, what):
        check_is_file(path)
        record = json.loads(path.read_bytes())
        if not isinstance(record, dict):
            raise TypeError(f"{type(record).__name__} instead of an object")
        return record


def check_is_file(path: Path) -> None:
    """Raises InputError for what is not there, a folder, or a pipe, on which a reader would wait."""
    if not path.is_file():
        raise InputError(f"{path}: not a file" if path.exists() else f"{path}: no such file")


def save_checkpoint(path: Path, content: dict) -> None:
    """Save tensors, numbers and texts whole or not at all. torch.save stores a CRC-32 of every part."""
    import torch

    buffer = io.BytesIO()  # torch.save turns a full disk into a RuntimeError that does not say so
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())


def load_checkpoint(path: Path, keys: set[str], what: str = "a checkpoint") -> dict:
    """What `save_checkpoint` wrote, on the CPU. Raises InputError unless it is intact and has the `keys`."""
    import torch

    with reading(path, what):
        check_is_file(path)
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # PyTorch does not compare the CRC-32 that it stores
                raise ValueError("a checksum does not fit")
        content = torch.load(path, map_location="cpu", weights_only=True)  # data must not run code
        if not isinstance(content, dict):
            raise TypeError(f"{type(content).__name__} instead of a dictionary")
        if missing := keys - set(content):
            raise KeyError(", ".join(sorted(missing)))
        return content


def save_weights(path: Path, tensors: dict, about: dict) -> None:
    """Save a trained network as safetensors; `about` (JSON) and a checksum of the tensors go into its metadata."""
    import safetensors.torch

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(about, allow_nan=False)
    write_whole(path, safetensors.torch.save(tensors, {"about": text, "sha256": checksum(tensors, text)}))


def load_weights(path: Path, what: str = "a trained network") -> tuple[dict, dict]:
    """The tensors and the `about` of a file that `save_weights` wrote. Raises InputError unless all of it is intact."""
    import safetensors

    with reading(path, what):
        check_is_file(path)
        with safetensors.safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata(), dict(zip(file.keys(), map(file.get_tensor, file.keys()), strict=True))
        if metadata["sha256"] != checksum(tensors, metadata["about"]):
            raise ValueError("its checksum does not fit")
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("tensors that are not of finite numbers")
        return tensors, dict(json.loads(metadata["about"]))


def checksum(tensors: dict, text: str) -> str:
    """The SHA-256 of a text and of names, types, shapes and values of some tensors."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        array = tensors[name].numpy()
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------
# The folder of a run

LOCK = ".lock"
LEFTOVER = re.compile(r"\.\w+\.(json|pt|png|svg|safetensors)\.\d+\.part")  # what `write_whole` leaves when it is killed


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other processes from training in `folder`, which is made. Raises InputError while one does.

    What a process left half-written when it was killed is removed.
    Where the file system has no locks, as some network drives, a line warns and the run goes on.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"{folder}: another process is training this run: wait for it or stop it") from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        print(f"{folder}: its file system has no locks: do not train twice in this folder", file=sys.stderr)
    try:
        for path in folder.iterdir():
            if LEFTOVER.fullmatch(path.name):
                path.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def do_once(
    path: Path, resume: bool, identity: dict, make: Callable[[], dict], is_whole: Callable[[dict], bool]
) -> tuple[dict, bool]:
    """Lock the folder of the record `path` and let `make` do the run; if it is finished, read the record instead.

    Returns the record, and whether it was there before.

    A run is finished if it has a record, of which `is_whole` says that nothing else of the run is lost. A folder that
    holds files is used only to `resume`, and only if a checkpoint or record is among them; one in which a run was
    killed before it had written any counts as empty. Raises InputError for a record of another `identity`.
    """
    folder = path.parent
    files = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    others = {name for name in files if name != LOCK and not LEFTOVER.fullmatch(name)}
    if others := {name for name in others if not (folder / name).is_dir() or any((folder / name).iterdir())}:
        if not resume:
            raise InputError(
                f"{folder}: already holds files: choose another -out, or add -resume to go on with its run"
            )
        if not any(next(folder.glob(name), None) for name in ("last.pt", path.name, "*/last.pt", "*/.lock")):
            raise InputError(
                f"{folder}: holds no run to go on with (but {min(others)}): empty it or choose another -out"
            )
    with lock_folder(folder):
        if path.exists():
            try:
                record = read_json(path)
                with reading(path, "a record"):
                    whole = is_whole(record)
            except InputError as error:
                raise InputError(f"{error}: delete it, and the same command with -resume makes it again") from None
            check_identity(path, record, identity)
            if whole:
                return record, True
        return make(), False


def check_identity(path: Path, found: dict, wanted: dict) -> None:
    """Raises InputError if a checkpoint or record is of another config or dataset."""
    if differing := [part for part in wanted if found.get(part) != wanted[part]]:
        differing = " and ".join(differing)
        raise InputError(f"{path}: cannot resume, it holds a run with another {differing}: choose another -out")


def end_with(parent: int) -> None:
    """End this process within a second of its `parent` (a process id), however that one ends.

    For the processes of a grid: they would otherwise train on for minutes. (Windows does not tell; there they do.)
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if os.getpid() != parent:
        threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


# ---------------------------------------------------------------------------------------------------
# Records


def run_environment(device=None) -> dict:
    """How and where a run was made: the part of a record that is the same for every question.

    With the torch.device that was computed on, that and the number of threads; its GPU is named, else the current one.
    """
    import numpy as np
    import torch

    on_gpu = device is not None and device.type == "cuda"
    gpu = torch.cuda.get_device_name(device if on_gpu else None) if torch.cuda.is_available() else None
    return ({} if device is None else {"device": str(device), "threads": torch.get_num_threads()}) | {
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


def mean_and_std(values: list[float]) -> dict:
    """Mean and sample standard deviation (None for a single value, which has none)."""
    import numpy as np

    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def summarise(values: list) -> dict | None:
    """Mean and standard deviation of every number in dicts alike, of any depth; None where one of them is None."""
    if isinstance(values[0], dict):
        return {key: summarise([value[key] for value in values]) for key in values[0]}
    return None if None in values else mean_and_std(values)


def spread(value: dict, form: str) -> str:
    """Mean ± standard deviation, as `mean_and_std` gives them."""
    return f"{value['mean']:{form}}" + ("" if value["std"] is None else f" ± {value['std']:{form}}")


def summarise_speech_runs(folder: Path | str, split: str = "test") -> list[dict]:
    """The records of question 3 in `folder`: a row for those that differ in the seed alone.

    `scores` holds mean and standard deviation of each score on `split`; `changes` what differs from the preset.
    """
    groups = {}
    for path in sorted(Path(folder).glob("*.json")):
        record = read_json(path)
        if split in record and "decoder" in record.get("config", {}):
            same = record["dataset"]["sha256"], record["config"], record["changes"], record.get("pretrained")
            groups.setdefault(json.dumps(same, sort_keys=True), {})[path.name] = record
    return [summarise_seeds([*group], [*group.values()], split) for group in groups.values()]


def summarise_seeds(files: list[str], records: list[dict], split: str) -> dict:
    first = records[0]
    newer = {} if "local_kernel" in first["config"] else {"local_kernel": None}  # than the record: then there was none
    return {
        "dataset": first["dataset"]["name"],
        "kind": first["dataset"]["kind"],
        **{key: first["config"][key] for key in ("preset", "decoder")},
        "changes": newer | first["changes"],
        "by_heart": " memorise " in first["command"],  # scored on the clips it was trained on: no result
        "pretrained": first["pretrained"]["dataset"]["name"] if "pretrained" in first else None,
        "clips": first[split]["clips"],
        "seeds": [record["seed"] for record in records],
        "files": files,
        "minutes": mean_and_std([record["seconds"] / 60 for record in records]),
        "scores": summarise([{k: v for k, v in r[split].items() if isinstance(v, float)} for r in records]),
    }
