"""Loading scans: files, folders, the download against local servers that fail in every way."""

import hashlib
import http.server
import io
import os
import re
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
from offline_data import phantoms
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
        if self.server.behaviour == "silent" or (self.server.behaviour == "silent later" and body):
            time.sleep(30)
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
            time.sleep(30)
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


def test_a_torchvision_that_cannot_be_imported_is_named(serve, monkeypatch, tmp_path, capsys):
    serve("right")
    monkeypatch.setitem(sys.modules, "torchvision.datasets.utils", None)
    with pytest.raises(InputError, match="could not be downloaded"):
        utils.load_oct("octmnist", tmp_path / "data")
    assert re.search(r"no download: .*torchvision", capsys.readouterr().out)


def test_a_good_download_is_kept_and_used_again(serve, tmp_path, small_arrays):
    server = serve("right")
    data = utils.load_oct("auto", tmp_path / "data")
    assert (data.name, data.kind) == ("OCTMNIST", "real")
    np.testing.assert_array_equal(data.splits["val"][0], small_arrays["val_images"])
    assert list(tree(tmp_path / "data")) == ["octmnist.npz"]
    requests = server.requests
    utils.load_oct("octmnist", tmp_path / "data")
    assert server.requests == requests > 0


@pytest.mark.parametrize("behaviour", ["cut off", "missing", "silent", "silent later", "stalls"])
def test_a_bad_network_gives_up_within_seconds_and_leaves_nothing(serve, tmp_path, capsys, monkeypatch, behaviour):
    monkeypatch.setattr(utils, "PATIENCE", 1.0)  # it takes three times as long at most: a look, and two tries
    serve(behaviour)
    started = time.monotonic()
    with pytest.raises(InputError) as error:
        utils.load_oct("octmnist", tmp_path / "data")
    assert time.monotonic() - started < 4
    assert utils.OCTMNIST_URL in str(error.value) and utils.OCTMNIST_MD5 in str(error.value)
    assert str(tmp_path / "data" / "octmnist.npz") in str(error.value)
    assert tree(tmp_path) == {}
    assert "no download:" in capsys.readouterr().out
    assert socket.getdefaulttimeout() is None


def test_an_answer_comes_within_15_seconds():
    """Of the kinds of failure above, silence takes longest: the look-up of the name, or the look and two tries."""
    assert max(2, 3) * utils.PATIENCE <= 15


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
    monkeypatch.setattr(phantoms, "oct_phantoms", lambda: small_arrays)
    started = time.monotonic()
    data = utils.load_oct("auto", tmp_path / "data")
    assert time.monotonic() - started < 5
    assert data.kind == "phantom" and data.description["kind"] == "phantom"
    assert "PHANTOMS" in capsys.readouterr().out


def test_a_name_server_that_never_answers_gives_up_too(serve, tmp_path, monkeypatch):
    serve("right")
    monkeypatch.setattr(utils, "PATIENCE", 1.0)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(30))
    started = time.monotonic()
    assert utils.download_octmnist(tmp_path / "data") is None
    assert time.monotonic() - started < 4
    assert tree(tmp_path) == {}


def test_an_interrupted_download_leaves_nothing(serve, tmp_path, monkeypatch):
    serve("right")

    def interrupted(*_, **__):
        next((tmp_path / "data").iterdir()).joinpath("octmnist.npz").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(medmnist, "OCTMNIST", interrupted)
    with pytest.raises(KeyboardInterrupt):
        utils.load_oct("auto", tmp_path / "data")
    assert tree(tmp_path) == {} and socket.getdefaulttimeout() is None


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
    (kept,) = (tmp_path / "data").glob("octmnist.npz.broken-*")
    assert tree(tmp_path / "data") == {"octmnist.npz": octmnist_bytes, kept.name: b"mine"}


@pytest.mark.parametrize("home", ["/" + 300 * "x", "/dev/null"])
def test_a_home_that_cannot_be_read_stops_nothing(serve, tmp_path, monkeypatch, small_arrays, home):
    serve("missing")
    monkeypatch.setattr(phantoms, "oct_phantoms", lambda: small_arrays)
    monkeypatch.setenv("HOME", home)
    assert utils.load_oct("auto", tmp_path / "data").kind == "phantom"
    monkeypatch.setattr(Path, "is_file", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert utils.find_octmnist(tmp_path / "data") is None


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


LABELS = phantoms.oct_phantoms(203, 4, 4)["train_labels"]  # of small_arrays


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
        ({"val_images": np.array([object()])}, "not an .npz file"),
        ({"val_images": np.array("text")}, "val_images must be uint8"),
        ({"train_labels": np.where(LABELS == 2, 3, LABELS)}, "the train split has no scan of drusen"),
        ({"val_labels": np.zeros((60, 1), np.uint8)}, "the val split has no scan of diabetic macular edema, drusen"),
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
    with pytest.raises(InputError, match=r"not an \.npz file, or damaged"):
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
    with pytest.raises(InputError, match=r"not an \.npz file, or damaged"):
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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_taken_as_viewers_show_it(tmp_path, small_arrays, orientation):
    """Its EXIF data may say that it was stored rotated or mirrored."""
    upright = Image.fromarray(small_arrays["test_images"][0]).resize((130, 112), Image.Resampling.BICUBIC)
    upright.save(tmp_path / "upright.png")
    # How an upright picture is stored so that a viewer that turns it back as EXIF says shows it upright.
    turns = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored, exif = upright, Image.Exif()
    for turn in turns.get(orientation, []):
        stored = stored.transpose(turn)
    exif[0x0112] = orientation
    stored.save(tmp_path / "stored.png", exif=exif)
    np.testing.assert_array_equal(*(utils.prepare_scan(tmp_path / f"{name}.png") for name in ("stored", "upright")))


def test_what_is_transparent_is_white_as_in_a_viewer(tmp_path, small_arrays):
    grey = np.asarray(Image.fromarray(small_arrays["test_images"][0]).resize((112, 112)))
    alpha = np.full_like(grey, 255)
    alpha[:40] = 0
    Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]).save(tmp_path / "transparent.png")
    Image.fromarray(np.where(alpha == 0, 255, grey).astype(np.uint8)).save(tmp_path / "shown.png")
    np.testing.assert_array_equal(*(utils.prepare_scan(tmp_path / f"{name}.png") for name in ("transparent", "shown")))


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_deep_greys_are_scaled_by_their_range_not_clipped(tmp_path, bits):
    top = 2**bits - 1
    half = np.full((28, 28), top // 2, np.uint16)
    half[:2] = top
    Image.fromarray(half).save(tmp_path / "deep.png")
    scan = utils.prepare_scan(tmp_path / "deep.png")
    assert abs(int(scan[14, 14]) - 127) <= 1 and scan[0, 0] == 255


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 2.0**40])
def test_greys_that_cannot_be_are_refused(tmp_path, value):
    pixels = np.full((30, 30), 0.5, np.float32)
    pixels[3, 4] = value
    Image.fromarray(pixels).save(tmp_path / "deep.tif")
    with pytest.raises(InputError, match=r"deep\.tif: not an image, or damaged .*grey values"):
        utils.prepare_scan(tmp_path / "deep.tif")


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
    with pytest.raises(InputError, match=r"scan\.jpeg: not an image, or damaged"):
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


def test_a_folder_is_split_by_patient_and_prepared_once(oct_folder, tmp_path, monkeypatch, capsys):
    data = utils.load_oct(str(oct_folder), tmp_path / "data")
    assert "ignored 2 files that are no scans in class folders" in capsys.readouterr().out
    assert (data.name, data.kind) == ("OCT2017", "real")
    counts = data.description["counts"]
    assert counts["test"] == [2, 2, 2, 2]
    assert sum(counts["train"]) + sum(counts["val"]) == 144
    assert 5 * 3 <= sum(counts["val"]) <= 8 * 3 and min(counts["val"]) >= 3  # a tenth, and every class

    scans = utils.list_scans(oct_folder)["train"]
    patients = [path.stem.split("-")[1] for path, _ in scans]
    images = np.stack([utils.prepare_scan(path) for path, _ in scans])
    is_val = np.array([any(np.array_equal(image, other) for other in data.splits["val"][0]) for image in images])
    np.testing.assert_array_equal(data.splits["val"][0], images[is_val])
    assert data.splits["val"][1].tolist() == [label for (_, label), chosen in zip(scans, is_val, strict=True) if chosen]
    aside = {patient for patient, chosen in zip(patients, is_val, strict=True) if chosen}
    assert aside.isdisjoint(patient for patient, chosen in zip(patients, is_val, strict=True) if not chosen)

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
    images = iter(np.random.default_rng(0).integers(0, 255, (24, 30, 30), np.uint8))
    for split in ("train", "test"):
        for name in utils.CLASS_FOLDERS:
            (tmp_path / "one" / split / name).mkdir(parents=True)
            for i in range(3):
                Image.fromarray(next(images)).save(tmp_path / "one" / split / name / f"{name}-7-{i}.png")
    with pytest.raises(InputError, match="the train split is empty"):
        utils.load_oct(str(tmp_path / "one"), tmp_path / "data")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("train/DRUSEN", "train/DRUSEN_", "36 train/DRUSEN_/*.jpeg"),
        ("train/DRUSEN", "train/more/DRUSEN", "36 train/more/DRUSEN/*.jpeg"),
        ("train/DRUSEN", "DRUSEN", "36 DRUSEN/*.jpeg"),
        ("train/DRUSEN/*.jpeg", ".dcm", "36 train/DRUSEN/*.dcm"),
    ],
)
def test_a_class_that_is_not_found_is_refused_and_what_is_ignored_is_named(
    oct_folder, tmp_path, capsys, old, new, said
):
    if "*" in old:
        for path in oct_folder.glob(old):
            path.rename(path.with_suffix(new))
    else:
        (oct_folder / new).parent.mkdir(exist_ok=True)
        (oct_folder / old).rename(oct_folder / new)
    with pytest.raises(InputError, match="the train split has no scan of drusen"):
        utils.load_oct(str(oct_folder), tmp_path / "data")
    assert said in capsys.readouterr().out
    assert not (tmp_path / "data").exists()


def test_the_usual_endings_of_jpegs_are_all_read(oct_folder, tmp_path):
    expected = utils.load_oct(str(oct_folder), tmp_path / "data").description["counts"]
    endings = [".jfif", ".JPG", ".jpe", ".jpeg"]
    for i, path in enumerate(sorted(oct_folder.glob("*/*/*.jpeg"))):
        if not path.name.startswith("."):
            path.rename(path.with_suffix(endings[i % 4]))
    assert utils.load_oct(str(oct_folder), tmp_path / "data").description["counts"] == expected


def test_links_that_lead_in_circles_are_followed_once(oct_folder, tmp_path):
    expected = utils.load_oct(str(oct_folder), tmp_path / "data").description["counts"]
    (oct_folder / "train" / "CNV").rename(tmp_path / "elsewhere")
    (oct_folder / "train" / "CNV").symlink_to(tmp_path / "elsewhere")
    for name in ("a", "b", "c"):
        (oct_folder / name).symlink_to(oct_folder)
    assert utils.load_oct(str(oct_folder), tmp_path / "data").description["counts"] == expected


def test_names_in_another_case_or_encoding_are_read(oct_folder, tmp_path):
    expected = sum(utils.load_oct(str(oct_folder), tmp_path / "data").description["counts"]["train"])
    (oct_folder / "train").rename(oct_folder / "Train")
    scan = next((oct_folder / "Train" / "DME").iterdir())
    scan.rename(os.fsdecode(os.fsencode(scan.parent) + b"/\xff.jpeg"))
    counts = utils.load_oct(str(oct_folder), tmp_path / "data").description["counts"]
    assert abs(sum(counts["train"]) - expected) <= 6 and sum(counts["train"]) + sum(counts["val"]) == 144


def test_a_class_without_a_validation_scan_is_refused(oct_folder, tmp_path):
    shutil.copytree(oct_folder / "test", oct_folder / "val")
    shutil.rmtree(oct_folder / "val" / "DME")
    with pytest.raises(InputError, match="the val split has no scan of diabetic macular edema"):
        utils.load_oct(str(oct_folder), tmp_path / "data")


@pytest.mark.parametrize("name", ["{stem} (1).jpeg", "copy of {stem}.jpeg", "renamed-{i}-0.jpeg", "x{i}.png"])
def test_the_same_scan_is_never_split_apart(oct_folder, tmp_path, name):
    """However a copy of it is called."""
    originals = [path for path in sorted(oct_folder.glob("train/*/*-0.jpeg")) if not path.name.startswith(".")]
    assert len(originals) == 48
    for i, path in enumerate(originals):
        copy = path.with_name(name.format(stem=path.stem, i=i))
        if copy.suffix == path.suffix:
            shutil.copy(path, copy)
        else:
            with Image.open(path) as image:
                image.save(copy)
    data = utils.load_oct(str(oct_folder), tmp_path / "data")
    sides = [set(map(bytes, data.splits[split][0])) for split in ("train", "val")]
    assert not sides[0] & sides[1] and len(data.splits["train"][0]) + len(data.splits["val"][0]) == 144 + 48


def test_patients_are_told_by_their_number_whatever_follows_it(oct_folder, tmp_path):
    files = [
        Path(f"DRUSEN-{patient}-{scan}{end}.jpeg") for patient in range(40) for scan, end in ((1, ""), (2, " (1)"))
    ]
    images = np.random.default_rng(0).integers(0, 255, (80, 28, 28), np.uint8)
    aside = utils.choose_validation(files, images, np.zeros(80, int))
    assert aside.sum() == 8 and (aside[::2] == aside[1::2]).all()


def test_scans_that_the_users_splits_share_are_counted(oct_folder, tmp_path, small_arrays, capsys):
    shutil.copytree(oct_folder / "test", oct_folder / "val")
    (oct_folder / "val" / "CNV" / "CNV-1500-0.jpeg").unlink()
    for i, path in enumerate(sorted((oct_folder / "train" / "DME").iterdir())[:10]):
        shutil.copy(path, oct_folder / "test" / "DME" / f"DME-99-{i}.jpeg")
    utils.load_oct(str(oct_folder), tmp_path / "data")
    out = capsys.readouterr().out
    assert "10 of 18 test scans are in train as well" in out and "7 of 18 test scans are in val as well" in out
    arrays = dict(small_arrays)
    for part in ("images", "labels"):
        arrays[f"val_{part}"] = np.concatenate([arrays[f"val_{part}"], arrays[f"train_{part}"][:7]])
    np.savez(tmp_path / "shared.npz", **arrays, more_images=np.zeros(3), objects=np.array([object()]))
    utils.load_oct(str(tmp_path / "shared.npz"))
    out = capsys.readouterr().out
    assert "7 of 67 val scans are in train as well" in out and "ignored arrays: more_images, objects" in out
    np.savez(tmp_path / "apart.npz", **small_arrays)
    utils.load_oct(str(tmp_path / "apart.npz"))
    assert capsys.readouterr().out == ""


def test_prepared_scans_that_are_damaged_are_prepared_again(oct_folder, tmp_path, capsys):
    expected = utils.load_oct(str(oct_folder), tmp_path / "data").description
    (prepared,) = (tmp_path / "data").iterdir()
    whole = prepared.read_bytes()
    foreign = io.BytesIO()
    np.savez(foreign, x=np.zeros(3))
    for damaged in (b"", b"text", whole[:-100], whole[:3000] + bytes(500) + whole[3500:], foreign.getvalue()):
        prepared.write_bytes(damaged)
        assert utils.load_oct(str(oct_folder), tmp_path / "data").description == expected
        assert "prepared again" in capsys.readouterr().out and prepared.read_bytes() == whole


def test_a_data_folder_that_cannot_be_written_does_not_stop_an_image_folder(oct_folder, tmp_path, capsys):
    (tmp_path / "data").write_text("a file")
    assert utils.load_oct(str(oct_folder), tmp_path / "data").description["counts"]["test"] == [2, 2, 2, 2]
    assert "cannot be kept" in capsys.readouterr().out and (tmp_path / "data").read_text() == "a file"


def test_a_data_folder_that_cannot_be_written_ends_the_download_alone(tmp_path, monkeypatch, capsys, small_arrays):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(phantoms, "oct_phantoms", lambda: small_arrays)
    (tmp_path / "data").write_text("a file")
    assert utils.load_oct("auto", tmp_path / "data").kind == "phantom"
    assert "no download:" in capsys.readouterr().out


def test_a_folder_without_the_splits_is_named(tmp_path):
    (tmp_path / "scans").mkdir()
    with pytest.raises(InputError, match="no scans in train/"):
        utils.load_oct(str(tmp_path / "scans"), tmp_path / "data")
    with pytest.raises(InputError, match="no such file or folder"):
        utils.load_oct(str(tmp_path / "nowhere"), tmp_path / "data")
