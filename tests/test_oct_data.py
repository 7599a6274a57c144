"""Loading scans: files, folders, the download against local servers that fail in every way."""

import hashlib
import http.server
import io
import json
import os
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

import medmnist
import numpy as np
import pytest
from conftest import REAL_SCANS, needs_real_scans, tree
from PIL import Image

import utils
from utils import InputError

# ---------------------------------------------------------------------------------------------------
# The download


@pytest.fixture
def octmnist_bytes(small_arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **small_arrays)
    return buffer.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves one file; `behaviour` says how well. Counts the requests."""

    daemon_threads = True

    def __init__(self, content: bytes, behaviour: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.behaviour, self.requests = content, behaviour, 0
        self.url = f"http://127.0.0.1:{self.server_port}/octmnist.npz"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        """A client that gives up is what the tests are about: no traceback."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.reply(b"")

    def do_GET(self):
        self.server.requests += 1
        self.reply(self.server.content)

    def reply(self, body: bytes):
        if self.server.behaviour == "silent":
            time.sleep(60)
        if self.server.behaviour == "missing":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        if self.server.behaviour == "cut off":
            body = body[: len(body) // 2]
        if self.server.behaviour == "stalls" and body:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            time.sleep(60)
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch, octmnist_bytes, tmp_path):
    """Let medmnist download from a local server, from an empty folder and home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def start(behaviour, expected=None):
        digest = hashlib.md5(expected or octmnist_bytes).hexdigest()
        server = Server(octmnist_bytes, behaviour)
        monkeypatch.setattr(utils, "OCTMNIST_MD5", digest)
        monkeypatch.setitem(medmnist.INFO["octmnist"], "url", server.url)
        monkeypatch.setitem(medmnist.INFO["octmnist"], "MD5", digest)
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_published_address_and_checksum_are_medmnists():
    assert medmnist.INFO["octmnist"]["url"] == utils.OCTMNIST_URL
    assert medmnist.INFO["octmnist"]["MD5"] == utils.OCTMNIST_MD5


def test_a_torchvision_that_cannot_be_imported_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torchvision.datasets.utils", None)
    with pytest.raises(InputError, match="could not be downloaded"):
        utils.load_oct("octmnist", tmp_path / "data")
    assert "no download: torchvision does not work here (import of" in capsys.readouterr().out


def test_a_good_download_is_kept_and_used_again(serve, tmp_path, small_arrays):
    server = serve("right")
    data = utils.load_oct("auto", tmp_path / "data")
    assert (data.name, data.kind) == ("OCTMNIST", "real")
    np.testing.assert_array_equal(data.splits["val"][0], small_arrays["val_images"])
    assert list(tree(tmp_path / "data")) == ["octmnist.npz"]
    requests = server.requests
    utils.load_oct("octmnist", tmp_path / "data")
    assert server.requests == requests > 0


@pytest.mark.parametrize("behaviour", ["cut off", "missing", "silent", "stalls"])
def test_a_bad_network_gives_up_within_seconds_and_leaves_nothing(serve, tmp_path, capsys, monkeypatch, behaviour):
    monkeypatch.setattr(utils, "STALL_SECONDS", 1.5)
    serve(behaviour)
    started = time.monotonic()
    with pytest.raises(InputError) as error:
        utils.load_oct("octmnist", tmp_path / "data")
    assert time.monotonic() - started < 8
    assert utils.OCTMNIST_URL in str(error.value) and utils.OCTMNIST_MD5 in str(error.value)
    assert str(tmp_path / "data" / "octmnist.npz") in str(error.value)
    assert tree(tmp_path / "data") == {}
    assert "no download:" in capsys.readouterr().out
    assert socket.getdefaulttimeout() is None
    # Nor does the download go on behind the back of what follows.
    for thread in threading.enumerate():
        if thread.name == "octmnist-download":
            thread.join(3)
            assert not thread.is_alive()


@pytest.mark.parametrize("whose", ["medmnist's", "ours"])
def test_a_wrong_checksum_is_no_octmnist(serve, tmp_path, monkeypatch, whose):
    if whose == "ours":  # as if a later medmnist knew another file
        serve("right")
        monkeypatch.setattr(utils, "OCTMNIST_MD5", "0" * 32)
    else:
        serve("right", expected=b"another file")
    with pytest.raises(InputError, match="could not be downloaded"):
        utils.load_oct("octmnist", tmp_path / "data")
    assert tree(tmp_path / "data") == {}


def test_a_dead_port_gives_up_at_once_and_auto_goes_on_with_phantoms(
    serve, tmp_path, capsys, monkeypatch, small_arrays
):
    serve("right")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}/octmnist.npz"
    monkeypatch.setitem(medmnist.INFO["octmnist"], "url", dead)
    monkeypatch.setattr(utils.offline_data, "oct_phantoms", lambda: small_arrays)
    started = time.monotonic()
    data = utils.load_oct("auto", tmp_path / "data")
    assert time.monotonic() - started < 5
    assert data.kind == "phantom" and data.description["kind"] == "phantom"
    assert "PHANTOMS" in capsys.readouterr().out


def test_a_name_server_that_never_answers_gives_up_too(serve, tmp_path, monkeypatch):
    serve("right")
    monkeypatch.setattr(utils, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(30))
    started = time.monotonic()
    assert utils.download_octmnist(tmp_path / "data") is None
    assert time.monotonic() - started < 6


def test_octmnist_is_found_in_its_three_places_and_broken_files_are_passed_over(
    serve, tmp_path, octmnist_bytes, capsys
):
    serve("missing")
    places = [tmp_path / "data", tmp_path, tmp_path / "home" / ".medmnist"]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        (place / "octmnist.npz").write_bytes(octmnist_bytes)
    for place in places:
        found = utils.find_octmnist(tmp_path / "data")
        assert found.resolve() == place / "octmnist.npz"
        found.write_bytes(octmnist_bytes[:-1])
    assert utils.find_octmnist(tmp_path / "data") is None
    assert capsys.readouterr().out.count("passing over") == 1 + 2 + 3


def test_a_download_keeps_the_broken_file_it_replaces(serve, tmp_path, octmnist_bytes):
    serve("right")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "octmnist.npz").write_bytes(b"mine")
    assert utils.load_oct("octmnist", tmp_path / "data").name == "OCTMNIST"
    assert tree(tmp_path / "data") == {"octmnist.npz": octmnist_bytes, "octmnist.npz.broken": b"mine"}


# ---------------------------------------------------------------------------------------------------
# .npz files


def test_an_npz_is_read_as_it_is(small_npz, small_arrays):
    data = utils.load_oct(str(small_npz))
    assert (data.name, data.kind) == ("small", "real")
    for split in utils.SPLITS:
        images, labels = data.splits[split]
        assert images.dtype == np.uint8 and labels.dtype == np.int64 and labels.ndim == 1
        np.testing.assert_array_equal(images, small_arrays[f"{split}_images"])
        np.testing.assert_array_equal(labels, small_arrays[f"{split}_labels"][:, 0])
    description = data.description
    assert sum(description["counts"]["train"]) == len(small_arrays["train_labels"])
    assert description["sha256"] == utils.load_oct(str(small_npz)).description["sha256"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_labels": None}, "val_labels is missing"),
        ({"train_images": np.zeros((203, 28, 28), np.float32)}, "train_images must be uint8"),
        ({"train_images": np.zeros((203, 64, 64), np.uint8)}, "train_images must be uint8"),
        ({"test_images": np.zeros((), np.uint8)}, "test_images must be uint8"),
        ({"test_labels": np.zeros((39, 1), np.uint8)}, "test_labels must be whole numbers"),
        ({"test_labels": np.zeros((40, 2), np.uint8)}, "test_labels must be whole numbers"),
        ({"test_labels": np.zeros((40, 1), np.float32)}, "test_labels must be whole numbers"),
        ({"test_labels": np.full((40, 1), 4, np.uint8)}, "must lie in 0 to 3, found 4"),
        ({"test_labels": np.full((40, 1), -1, np.int8)}, "must lie in 0 to 3, found -1"),
        (
            {"val_images": np.zeros((0, 28, 28), np.uint8), "val_labels": np.zeros((0, 1), np.uint8)},
            "val split is empty",
        ),
        ({"val_images": np.array([object()])}, "cannot be read"),
    ],
)
def test_an_npz_that_does_not_fit_is_named(tmp_path, small_arrays, change, message):
    path = tmp_path / "bad.npz"
    np.savez(path, **{k: v for k, v in (small_arrays | change).items() if v is not None})
    with pytest.raises(InputError, match=message) as error:
        utils.load_oct(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_only_octmnists_own_file_goes_by_its_name(small_npz, octmnist_bytes, oct_folder, tmp_path, monkeypatch):
    path = small_npz.with_name("OCTMNIST.npz")
    small_npz.rename(path)
    assert utils.load_oct(str(path)).name == "OCTMNIST (another file)"
    shutil.copytree(oct_folder, tmp_path / "octmnist")
    assert utils.load_oct(str(tmp_path / "octmnist"), tmp_path / "data").name == "octmnist (another file)"
    monkeypatch.setattr(utils, "OCTMNIST_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    renamed = path.rename(path.with_name("scans.npz"))
    assert utils.load_oct(str(renamed)).name == "OCTMNIST"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_an_npz_cut_off_anywhere_is_named(small_npz, share):
    whole = small_npz.read_bytes()
    small_npz.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match=r"cannot be read as \.npz"):
        utils.load_oct(str(small_npz))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_with_a_damaged_byte_is_named_or_harmless(tmp_path, small_arrays, save):
    path = tmp_path / "damaged.npz"
    save(path, **small_arrays)
    whole = path.read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for place in [*rng.integers(0, len(whole), 60), *range(0, 160, 2)]:  # anywhere, and in the headers
        damaged = bytearray(whole)
        damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            data = utils.load_oct(str(path))
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
        else:  # a byte that no reader looks at, such as a date
            np.testing.assert_array_equal(data.splits["train"][0], small_arrays["train_images"])
    assert refused > 60


@pytest.mark.parametrize("content", ["an .npy file", "text"])
def test_other_files_are_no_npz(tmp_path, content):
    path = tmp_path / "scans.npz"
    if content == "text":
        path.write_text("not an archive")
    else:
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    with pytest.raises(InputError, match=r"cannot be read as \.npz"):
        utils.load_oct(str(path))


# ---------------------------------------------------------------------------------------------------
# Image files and folders


def test_the_centre_square_is_taken(tmp_path):
    wide = np.zeros((100, 300), np.uint8)
    wide[:, 100:200] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (utils.prepare_scan(tmp_path / "wide.png") == 200).all()
    Image.fromarray(wide.T).save(tmp_path / "tall.png")
    assert (utils.prepare_scan(tmp_path / "tall.png") == 200).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "I;16", "CMYK", "1"])
def test_every_kind_of_grey_image_gives_the_same_scan(tmp_path, small_arrays, mode):
    grey = Image.fromarray(small_arrays["test_images"][0]).resize((128, 112), Image.Resampling.BICUBIC)
    if mode == "1":
        grey = grey.point(lambda value: 255 * (value > 99))
    reference = tmp_path / "grey.png"
    grey.save(reference)
    path = tmp_path / ("other.tif" if mode in ("CMYK", "LA") else "other.png")
    if mode == "I;16":
        Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(path)
    elif mode == "P":
        grey.quantize(256).save(path)
    else:
        grey.convert("RGB" if mode == "CMYK" else mode).convert(mode).save(path)
    difference = utils.prepare_scan(path).astype(int) - utils.prepare_scan(reference).astype(int)
    assert np.abs(difference).max() <= (2 if mode in ("P", "CMYK") else 0)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_deep_greys_are_scaled_by_their_range_not_clipped(tmp_path, bits):
    top = 2**bits - 1
    half = np.full((28, 28), top // 2, np.uint16)
    half[:2] = top
    Image.fromarray(half).save(tmp_path / "deep.png")
    scan = utils.prepare_scan(tmp_path / "deep.png")
    assert abs(int(scan[14, 14]) - 127) <= 1 and scan[0, 0] == 255


@needs_real_scans
def test_the_preparation_gives_the_very_pixels_of_the_prepared_set():
    rows = [line.split(",") for line in (REAL_SCANS / "manifest.csv").read_text().splitlines()]
    place = {row[5]: (row[0], int(row[1])) for row in rows[1:]}
    arrays = np.load(REAL_SCANS / "kermany_subset.npz")
    originals = sorted((REAL_SCANS / "originals").iterdir())
    assert len(originals) == 8
    for path in originals:
        split, index = place[path.name]
        np.testing.assert_array_equal(utils.prepare_scan(path), arrays[f"{split}_images"][index])


@pytest.mark.parametrize("content", [b"", b"no image at all", "half a jpeg"])
def test_what_is_no_image_is_named(tmp_path, content):
    path = tmp_path / "scan.jpeg"
    if content == "half a jpeg":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300), np.uint8)).save(path)
        content = path.read_bytes()[:9000]
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"scan\.jpeg: (not an image|cannot be read)"):
        utils.prepare_scan(path)


@pytest.fixture
def oct_folder(tmp_path, small_arrays):
    """Class folders as OCT2017's: 12 patients of 3 scans a class to train on, two scans a class to test."""
    folder = tmp_path / "OCT2017"
    images = iter(np.concatenate([small_arrays["train_images"], small_arrays["test_images"]]))
    for label, name in enumerate(utils.CLASS_FOLDERS):
        for split, patients, scans in (("train", 12, 3), ("test", 2, 1)):
            (folder / split / name).mkdir(parents=True)
            for patient in range(patients):
                for scan in range(scans):
                    number = 1000 * (label + 1) + patient + (500 if split == "test" else 0)
                    path = folder / split / name / f"{name}-{number}-{scan}.jpeg"
                    Image.fromarray(next(images)).resize((70, 56)).save(path)
    (folder / "train" / "CNV" / "Thumbs.db").write_bytes(b"not a scan")
    (folder / "train" / "CNV" / "._CNV-1000-0.jpeg").write_bytes(b"what macOS leaves behind")
    return folder


def test_a_folder_is_split_by_patient_and_prepared_once(oct_folder, tmp_path, monkeypatch):
    data = utils.load_oct(str(oct_folder), tmp_path / "data")
    assert (data.name, data.kind) == ("OCT2017", "real")
    counts = data.description["counts"]
    assert counts["test"] == [2, 2, 2, 2]
    assert sum(counts["train"]) + sum(counts["val"]) == 144 and sum(counts["val"]) == round(0.1 * 48) * 3

    scans = utils.list_scans(oct_folder / "train")
    train, val = utils.split_by_patient(scans, 0.1)
    patients = [{path.stem.split("-")[1] for path, _ in part} for part in (train, val)]
    assert not patients[0] & patients[1] and len(patients[1]) == 5
    assert sorted(train + val) == sorted(scans)
    expected = np.stack([utils.prepare_scan(path) for path, _ in val])
    np.testing.assert_array_equal(data.splits["val"][0], expected)
    assert data.splits["val"][1].tolist() == [label for _, label in val]

    monkeypatch.setattr(utils, "prepare_scan", lambda path: pytest.fail("prepared a second time"))
    again = utils.load_oct(str(oct_folder), tmp_path / "data")
    assert again.description == data.description


def test_a_changed_folder_is_prepared_anew_and_a_val_folder_is_used(oct_folder, tmp_path):
    before = utils.load_oct(str(oct_folder), tmp_path / "data").description
    shutil.copytree(oct_folder / "test", oct_folder / "val")
    after = utils.load_oct(str(oct_folder), tmp_path / "data").description
    assert after["counts"]["val"] == [2, 2, 2, 2]
    assert sum(after["counts"]["train"]) == 144
    assert before["counts"] != after["counts"]
    scan = next((oct_folder / "train" / "DME").iterdir())
    os.utime(scan, (1, 1))  # another file of the same size, for all one can tell
    utils.load_oct(str(oct_folder), tmp_path / "data")
    assert len(tree(tmp_path / "data")) == 3


def test_a_folder_of_a_single_patient_is_named(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "one" / split / "CNV").mkdir(parents=True)
        for i in range(3):
            Image.new("L", (30, 30)).save(tmp_path / "one" / split / "CNV" / f"CNV-7-{i}.png")
    with pytest.raises(InputError, match="all training scans are of one patient"):
        utils.load_oct(str(tmp_path / "one"), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_data_folder_that_cannot_be_written_ends_the_download_alone(tmp_path, monkeypatch, capsys, small_arrays):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(utils.offline_data, "oct_phantoms", lambda: small_arrays)
    (tmp_path / "data").write_text("a file")
    assert utils.load_oct("auto", tmp_path / "data").kind == "phantom"
    assert "no download:" in capsys.readouterr().out


def test_a_folder_without_the_splits_is_named(tmp_path):
    (tmp_path / "scans").mkdir()
    with pytest.raises(InputError, match="no scans in train/"):
        utils.load_oct(str(tmp_path / "scans"), tmp_path / "data")
    with pytest.raises(InputError, match="no such file or folder"):
        utils.load_oct(str(tmp_path / "nowhere"), tmp_path / "data")


# ---------------------------------------------------------------------------------------------------
# Whole files


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "record.json"
    utils.write_json(path, {"a": [1, 2], "b": {"c": None}})
    before = tree(tmp_path)

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        utils.write_whole(path, fail)
    with pytest.raises(ValueError, match="not JSON compliant"):
        utils.write_json(path, {"a": float("nan")})
    assert tree(tmp_path) == before


def test_a_write_waits_for_another_process_that_reads_the_old_file(tmp_path, monkeypatch):
    replace, refused = Path.replace, []

    def as_on_windows(temporary, target):
        if len(refused) < 2:
            refused.append(target)
            raise PermissionError("the file is being used by another process")
        return replace(temporary, target)

    monkeypatch.setattr(Path, "replace", as_on_windows)
    path = tmp_path / "live.json"
    utils.write_json(path, {"step": 1})
    assert len(refused) == 2 and [*tree(tmp_path)] == ["live.json"] and json.loads(path.read_text()) == {"step": 1}


def test_json_comes_back_as_it_went(tmp_path):
    import json

    record = {"history": [{"epoch": 1, "loss": 0.5}], "confusion": [[1, 2], [3, 4]], "none": []}
    record |= {"note": "a [1,\n 2] b, c [ 1  2 ].npz", "files": ["runs/my  run/best.pt"]}
    utils.write_json(tmp_path / "r.json", record)
    assert json.loads((tmp_path / "r.json").read_text()) == record
