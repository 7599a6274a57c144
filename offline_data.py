"""Phantom retinal OCT scans: a seeded stand-in for OCTMNIST, for machines without the download.

Each phantom is drawn as a B-scan is built up: the vitreous, the retina between its inner limiting membrane
(ILM) and the retinal pigment epithelium (RPE), the choroid beneath, then the pathology of its class and last
the artefacts of scanner and export, which all classes share, so that pathology alone tells them apart.
Lengths are in pixels of the 28 x 28 scan (one row is about 18 rows of the original B-scan, one column about
0.2 mm of retina at zoom 1), grey values lie in [0, 1]; drawing is on a finer grid, averaged down at the end.
The distributions were set from measurements on 1,084 real scans; no real pixel is stored here.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d

OCT_CLASSES = ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal")
OCTMNIST_CLASS_COUNTS = (33_484, 10_213, 7_754, 46_026)
CNV, DME, DRUSEN, NORMAL = range(4)

SIZE = 28  # pixels per side, as OCTMNIST's
ROW_STEPS, COLUMN_STEPS = 3, 2  # grid points per pixel: layers are thin, so rows need more than columns
CHUNK = 250  # scans drawn at once: keeps the grids in the processor's cache and memory small
ROWS = ((np.arange(SIZE * ROW_STEPS, dtype=np.float32) + 0.5) / ROW_STEPS)[:, None]
COLUMNS = (np.arange(SIZE * COLUMN_STEPS, dtype=np.float32) + 0.5) / COLUMN_STEPS


@dataclass
class Retina:
    """Surfaces and optics of N scans; every field is an array [N, grid columns] unless said otherwise."""

    zoom: np.ndarray  # lateral magnification [N, 1]
    fovea: np.ndarray  # column of the fovea [N, 1]
    bruch: np.ndarray  # row of Bruch's membrane, where a healthy RPE lies
    rpe: np.ndarray  # height of the RPE above Bruch's membrane
    fluid: np.ndarray  # thickness of subretinal fluid, between the RPE and the neurosensory retina
    thickness: np.ndarray  # thickness of the neurosensory retina
    rpe_light: np.ndarray  # brightness of the RPE, relative to a healthy one
    rpe_width: np.ndarray  # thickness of the RPE's bright band
    fill: np.ndarray  # brightness of the space between the RPE and Bruch's membrane
    choroid: np.ndarray  # brightness of the choroid, relative to a healthy one
    decay: np.ndarray  # depth over which the light in the choroid falls to 1 / e [N, 1]
    neural: np.ndarray  # brightness of the neurosensory retina, relative to a healthy one [N, 1]
    layering: np.ndarray  # contrast of the retinal layers, 1 when healthy, 0 when they are all alike


def column(values) -> np.ndarray:
    """One value per scan, [N], as a float32 column [N, 1] that broadcasts over the grid's columns."""
    return np.asarray(values, dtype=np.float32)[:, None]


def waves(rng, n: int, length) -> np.ndarray:
    """Smooth random curves over the columns, deviation 1: [n, grid columns]; correlated over `length` pixels."""
    raw = rng.standard_normal((n, COLUMNS.size), dtype=np.float32)
    smooth = gaussian_filter1d(raw, length * COLUMN_STEPS, axis=1, mode="wrap")
    return smooth / np.sqrt(np.mean(smooth**2, axis=1, keepdims=True))


def hill(centre, width) -> np.ndarray:
    """Gaussian hill of height 1 over the columns: [N, grid columns] from columns [N, 1] of pixels."""
    return np.exp(-0.5 * ((COLUMNS - centre) / width) ** 2)


def dome(centre, width) -> np.ndarray:
    """Dome of height 1 with a foot at `width` pixels either side: rounder and steeper than a hill."""
    return np.sqrt(np.maximum(0, 1 - ((COLUMNS - centre) / width) ** 2))


def healthy_retina(n: int, rng) -> Retina:
    """Position, tilt, curvature, thickness and foveal pit of n healthy retinas."""
    # B-scans 512 and 768 pixels wide show the central 6 mm here, those of 1024 and 1536 the central 3 mm
    zoom = column(rng.choice([1.0, 1.9], n, p=[0.62, 0.38]) * rng.lognormal(0, 0.15, n))
    half = (COLUMNS - SIZE / 2) / (SIZE / 2)
    tilt, bend, twist = (
        column(rng.laplace(0, 0.9, n)),
        column(rng.laplace(-0.7, 0.65, n)),
        column(rng.normal(0, 0.5, n)),
    )
    # an unusually tall bowl or dome in one scan of eight: long eyes, scans far off the axis
    bend += column(rng.normal(0, 2.5, n) * (rng.random(n) < 0.1))
    middle = column(np.clip(rng.normal(12.8, 2.5, n), 7, 21))
    bruch = middle + tilt * half + bend * (half**2 - 1 / 3) + twist * (half**3 - 0.6 * half)
    fovea = column(rng.normal(SIZE / 2, 2.5, n) + rng.normal(0, 9, n) * (rng.random(n) < 0.3))
    rim = hill(fovea, column(rng.uniform(6, 10, n)) * zoom)
    pit = hill(fovea, column(rng.uniform(1.3, 2.4, n)) * zoom)
    depth = column(np.maximum(0, rng.normal(1.9, 0.7, n)))
    slant = column(rng.normal(0, 0.35, n)) * half
    thickness = column(rng.normal(4.3, 0.45, n)) + slant + column(rng.uniform(0, 1.2, n)) * rim - depth * pit
    return Retina(
        zoom=zoom,
        fovea=fovea,
        bruch=bruch.astype(np.float32),
        rpe=np.zeros_like(bruch),
        fluid=np.zeros_like(bruch),
        thickness=np.maximum(thickness, 1.2),
        rpe_light=1 + 0.04 * waves(rng, n, 2.0),
        rpe_width=np.ones_like(bruch) * column(rng.uniform(0.55, 0.9, n)),
        fill=np.full_like(bruch, 0.3),
        choroid=1 + column(rng.uniform(0, 0.12, n)) * waves(rng, n, 0.6),
        layering=column(rng.uniform(0.8, 1.2, n)),
        neural=np.ones_like(zoom),
        decay=column(rng.lognormal(np.log(2.6), 0.25, n)),
    )


@dataclass
class Spots:
    """K elliptic inclusions in each of N scans (cysts, hard exudates, scars); arrays [N, K], lengths in pixels."""

    column: np.ndarray
    row: np.ndarray
    half_width: np.ndarray
    half_height: np.ndarray
    light: np.ndarray  # grey value at the middle
    opacity: np.ndarray  # 0 (absent) to 1


def at(curve, position) -> np.ndarray:
    """Values of the curves [N, grid columns] at columns [N, K] of pixels."""
    index = np.clip(position * COLUMN_STEPS, 0, COLUMNS.size - 1).astype(int)
    return np.take_along_axis(np.broadcast_to(curve, (len(position), COLUMNS.size)), index, axis=1)


def happens(rng, n: int, probability) -> np.ndarray:
    """[n, 1] of 1 and 0: whether a sign is present in each scan."""
    return column(rng.random(n) < probability)


def cysts(retina: Retina, rng, count: int, severity, size: float) -> Spots:
    """Dark intraretinal cysts, clustered around one place of each scan, in the inner and outer nuclear layers."""
    n, shape = len(severity), (len(severity), count)
    focus = retina.fovea + column(rng.normal(0, 3, n))
    position = focus + rng.normal(0, 1, shape) * rng.uniform(0.8, 5, (n, 1)) * retina.zoom
    thickness = at(retina.thickness, position)
    half_height = np.minimum(rng.lognormal(np.log(size), 0.4, shape) * (0.6 + 0.6 * severity), 0.4 * thickness)
    half_width = half_height * rng.lognormal(0.1, 0.3, shape) * np.sqrt(retina.zoom)
    height = rng.uniform(0.35, 0.75, shape) * thickness
    row = at(retina.bruch - retina.rpe - retina.fluid, position) - height
    opacity = (rng.random(shape) < rng.uniform(0.4, 1, (n, 1))) * rng.uniform(0.6, 1, shape)
    return Spots(position, row, half_width, half_height, rng.uniform(0.05, 0.14, (n, 1)) + 0 * row, opacity)


def add_drusen(retina: Retina, rng) -> list[Spots]:
    """Several small deposits under the RPE; the retina above hardly gives way, so it thins over them."""
    n = len(retina.bruch)
    severity = column(rng.beta(2.5, 1.0, n))
    spread, many = column(rng.uniform(5, 13, n)), column(rng.uniform(0.4, 1, n))
    for _ in range(10):
        position = retina.fovea + column(rng.normal(0, 1, n)) * spread
        width = column(rng.lognormal(np.log(0.7), 0.3, n)) * np.sqrt(retina.zoom)
        height = (0.4 + column(rng.uniform(0.5, 1.4, n)) * severity) * happens(rng, n, many[:, 0])
        retina.rpe = np.maximum(retina.rpe, height * hill(position, width))
    retina.thickness = retina.thickness - 0.8 * retina.rpe
    retina.rpe_light += column(rng.uniform(-0.1, 0.3, n)) * np.minimum(retina.rpe, 1)
    retina.rpe_light += column(rng.uniform(0, 0.15, n)) * waves(rng, n, 0.5)
    retina.fill = retina.fill + column(rng.uniform(0, 0.25, n))
    weaken_epithelium(retina, severity)
    return []


def weaken_epithelium(retina: Retina, severity) -> None:
    """A diseased RPE lets more light through to the choroid (measured: a fifth more, and deeper)."""
    retina.choroid = retina.choroid * (1 + 0.25 * severity)
    retina.decay = retina.decay * (1 + 0.3 * severity)


def swell(retina: Retina, rng, severity, rows: float) -> None:
    """Thicken the retina around a place near the fovea, by up to `rows` rows."""
    n = len(severity)
    place = retina.fovea + column(rng.normal(0, 4, n))
    mound = hill(place, column(rng.uniform(2, 5, n)) * retina.zoom)
    retina.thickness = retina.thickness + severity**2 * column(rng.uniform(0, 1, n) * rows) * mound


def add_edema(retina: Retina, rng) -> list[Spots]:
    """Diabetic edema: swelling, cysts, hard exudates, sometimes subretinal fluid; the RPE stays smooth."""
    n = len(retina.bruch)
    severity = column(rng.beta(2.5, 1.0, n))
    retina.thickness = retina.thickness - column(rng.uniform(0, 0.6, n)) * severity
    pit_lost = severity * column(rng.uniform(0.2, 1, n))
    retina.thickness += pit_lost * np.maximum(0, np.median(retina.thickness, axis=1, keepdims=True) - retina.thickness)
    swell(retina, rng, severity, 5.0)
    retina.thickness += 0.35 * severity * waves(rng, n, 1.2) * happens(rng, n, 0.6)
    fluid = column(rng.uniform(0.5, 3.0, n)) * severity * happens(rng, n, 0.2)
    retina.fluid = fluid * dome(retina.fovea, column(rng.uniform(2, 6, n)) * retina.zoom)
    retina.layering = retina.layering * (1 - 0.7 * severity * column(rng.random(n)))
    weaken_epithelium(retina, severity)
    retina.neural = retina.neural * (1 - column(rng.uniform(0, 0.25, n)) * severity)
    retina.rpe_light += column(rng.uniform(0, 0.15, n)) * waves(rng, n, 0.6)
    large, small = cysts(retina, rng, 4, severity, 1.4), cysts(retina, rng, 4, severity, 0.7)
    shape = (n, 3)
    position = rng.uniform(2, SIZE - 2, shape)
    row = at(retina.bruch - retina.fluid, position) - rng.uniform(0.3, 0.8, shape) * at(retina.thickness, position)
    size = rng.uniform(0.3, 0.7, shape)
    exudates = Spots(
        position, row, size, size, rng.uniform(0.5, 0.8, shape), 1.0 * (rng.random(shape) < 0.35 * severity)
    )
    return [small, large, exudates]


def add_neovascularization(retina: Retina, rng) -> list[Spots]:
    """CNV: a rough, broken RPE, pigment epithelial detachment, subretinal scar and fluid, bright choroid."""
    n = len(retina.bruch)
    severity = column(rng.beta(2.5, 1.0, n))
    focus = retina.fovea + column(rng.normal(0, 3.5, n))
    width = column(rng.uniform(2.5, 8, n)) * np.sqrt(retina.zoom)
    near = np.maximum(hill(focus, width), column(rng.uniform(0.1, 0.7, n)))
    rough = np.abs(waves(rng, n, 0.9)) * column(rng.uniform(0.1, 0.8, n)) + waves(rng, n, 2.2) * column(
        rng.uniform(0.2, 1.2, n)
    )
    detachment = dome(focus + column(rng.normal(0, 2, n)), width * column(rng.uniform(0.5, 1.3, n)))
    detachment = detachment * happens(rng, n, 0.6) * column(rng.gamma(2, 1.3, n)) * severity
    smooth_detachment = gaussian_filter1d(detachment, 1.2, axis=1)
    retina.rpe = np.maximum(0, smooth_detachment + near * rough * (0.4 + severity))
    retina.thickness = retina.thickness - column(rng.uniform(0, 0.5, n)) * np.minimum(retina.rpe, 2.5)
    retina.thickness = retina.thickness - column(rng.uniform(0, 0.8, n)) * severity
    swell(retina, rng, severity, 2.0)
    flat = np.median(retina.thickness, axis=1, keepdims=True) - retina.thickness
    retina.thickness += column(rng.random(n)) * severity * np.maximum(0, flat)
    fluid = column(rng.uniform(0.5, 2.5, n)) * severity * happens(rng, n, 0.3)
    retina.fluid = fluid * dome(focus + column(rng.normal(0, 3, n)), width)
    retina.thickness = np.maximum(retina.thickness, 1.5)
    retina.rpe_light = retina.rpe_light * (1 + near * severity * column(rng.uniform(-0.6, 0.4, n)))
    retina.rpe_light += 0.3 * near * severity * waves(rng, n, 0.7)
    retina.rpe_width = retina.rpe_width * (1 + near * severity * column(rng.uniform(-0.2, 1.2, n)))
    retina.fill = retina.fill * column(rng.choice([0.4, 0.8, 1.2, 1.9], n))
    retina.choroid = retina.choroid * (1 + severity * near * column(rng.uniform(-0.5, 0.9, n)))
    retina.choroid += near * severity * column(rng.uniform(0.05, 0.4, n)) * waves(rng, n, 0.6)
    weaken_epithelium(retina, severity)
    retina.neural = retina.neural * (1 - column(rng.uniform(0, 0.25, n)) * severity)
    retina.layering = retina.layering * (1 - severity * near * column(rng.random(n)))
    scar_shape = (n, 3)
    position = focus + rng.normal(0, 2.5, scar_shape)
    row = at(retina.bruch - retina.rpe, position) - rng.uniform(-0.4, 1.0, scar_shape)
    scars = Spots(
        position,
        row,
        rng.uniform(0.8, 3, scar_shape),
        rng.uniform(0.4, 1.2, scar_shape) * (0.5 + 0.5 * severity),
        rng.uniform(0.35, 0.65, scar_shape),
        (rng.random(scar_shape) < 0.5 * severity) * rng.uniform(0.5, 1, scar_shape),
    )
    few = cysts(retina, rng, 3, severity, 0.6)
    few.opacity *= happens(rng, n, 0.2)
    return [scars, few]


def ramp(height, softness) -> np.ndarray:
    """0 below a border, 1 above it, rising linearly over `softness` rows."""
    return np.clip(height / softness + np.float32(0.5), 0, 1)


def shade(retina: Retina, rng) -> np.ndarray:
    """Grey values on the grid [N, grid rows, grid columns] of the retinas, the vitreous and the choroid."""
    n = len(retina.bruch)

    def level(low, high):
        return rng.uniform(low, high, (n, 1, 1)).astype(np.float32)

    bruch, rpe, fluid, thickness, rpe_light, rpe_width, fill, choroid, layering = (
        np.asarray(curve, dtype=np.float32)[:, None, :]
        for curve in (
            retina.bruch,
            retina.rpe,
            retina.fluid,
            retina.thickness,
            retina.rpe_light,
            retina.rpe_width,
            retina.fill,
            retina.choroid,
            retina.layering,
        )
    )
    vitreous, background = level(0.065, 0.105), level(0.03, 0.06)
    softness = level(0.4, 0.9)
    height = bruch - ROWS  # above Bruch's membrane
    deep = np.exp(np.minimum(height, 0) / column(retina.decay)) * (choroid * level(0.24, 0.36)) + background
    deep += (fill - deep) * ramp(height, softness)
    height -= rpe  # above the RPE
    band = np.maximum(0, 1 - (height / (rpe_width * 1.4)) ** 2) * (rpe_light * level(0.50, 0.65))
    above = height - fluid  # above the outer border of the neurosensory retina
    below_ilm = thickness - above
    nerve_fibres = level(0.0, 0.12) * layering * ramp(level(0.7, 1.3) - below_ilm, np.float32(0.8))
    nuclear = level(0.08, 0.18) * layering * np.maximum(0, 1 - ((above - level(1.3, 1.8)) / level(0.8, 1.2)) ** 2)
    neural = level(0.28, 0.37) * column(retina.neural) + nerve_fibres - nuclear
    image = vitreous + (neural - vitreous) * ramp(below_ilm, softness)
    subretinal = ramp(-above, softness) * (fluid > 0.15)
    image += (level(0.05, 0.12) - image) * subretinal
    image += (deep - image) * ramp(-height, softness)
    return np.maximum(image, band)


def paint(image: np.ndarray, spots: Spots) -> None:
    """Paint the spots into the grid [N, grid rows, grid columns], in place, with soft rims."""
    for k in range(spots.column.shape[1]):
        middle, row, half_width, half_height, light, opacity = (
            column(field[:, k])[:, None]
            for field in (spots.column, spots.row, spots.half_width, spots.half_height, spots.light, spots.opacity)
        )
        inside = 1.3 - ((COLUMNS - middle) / half_width) ** 2 - ((ROWS - row) / half_height) ** 2
        image += (light - image) * (opacity * np.clip(1.6 * inside, 0, 1))


def bicubic_weights(steps: int) -> np.ndarray:
    """Antialiased bicubic resize by 1 / steps, as OCTMNIST's images were made: weights [28, 28 * steps]."""
    pixel, point = np.arange(SIZE)[:, None] + 0.5, (np.arange(SIZE * steps) + 0.5) / steps
    x = np.abs(pixel - point)
    weights = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def resized(grid: np.ndarray) -> np.ndarray:
    """Resize the grid [N, grid rows, grid columns] down to pixels: [N, 28, 28]."""
    return bicubic_weights(ROW_STEPS) @ grid @ bicubic_weights(COLUMN_STEPS).T


def add_artefacts(image: np.ndarray, rng) -> np.ndarray:
    """Uneven light, speckle and noise, exposure, and the white margins of the export: [N, 28, 28] -> the same."""
    n = len(image)

    def level(values):
        return np.asarray(values, dtype=np.float32)[:, None, None]

    half = (np.arange(SIZE, dtype=np.float32) - (SIZE - 1) / 2) / (SIZE / 2)
    light = 1 + level(rng.normal(0, 0.12, n)) * half - level(np.abs(rng.normal(0, 0.12, n))) * half**2
    image = image * light * level(rng.lognormal(0.04, 0.14, n))
    image += level(rng.exponential(0.15, n) * (rng.random(n) < 0.04)) * (1 - image)  # haze
    speckle = rng.standard_normal(image.shape, dtype=np.float32)
    # speckle grows with the light only in the dark: the scanner shows brightness on a compressed scale
    image += level(rng.lognormal(np.log(0.065), 0.35, n)) * np.minimum(image, 0.12) * speckle
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    image += level(np.minimum(rng.lognormal(np.log(0.0015), 0.9, n), 0.03)) * noise
    # the scan was shifted and tilted in its frame, which leaves white at the top (43 %) or the bottom (32 %)
    side = rng.choice(4, n, p=[0.28, 0.40, 0.29, 0.03])
    tilt = level(rng.laplace(0, 1.0, n)) * half
    margin = level(rng.exponential(1.6, n)) + tilt
    row = np.arange(SIZE, dtype=np.float32)[:, None]
    white = np.clip(margin - row, 0, 1) * level((side == 1) | (side == 3))
    margin = level(rng.exponential(1.2, n)) + tilt * level(rng.choice([-1, 1], n))
    white += np.clip(margin - (SIZE - 1 - row), 0, 1) * level((side == 2) | (side == 3))
    return image + (1 - image) * np.minimum(white, 1)


PATHOLOGY = {CNV: add_neovascularization, DME: add_edema, DRUSEN: add_drusen, NORMAL: lambda retina, rng: []}


def draw_class(label: int, n: int, rng) -> np.ndarray:
    """n phantoms of one class: [n, 28, 28] uint8."""
    retina = healthy_retina(n, rng)
    inclusions = PATHOLOGY[label](retina, rng)
    grid = shade(retina, rng)
    for spots in inclusions:
        paint(grid, spots)
    image = add_artefacts(resized(grid), rng)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def draw_oct_phantoms(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw one phantom scan for each label: [N] ints (0 to 3, as OCT_CLASSES) -> [N, 28, 28] uint8."""
    labels = np.asarray(labels).ravel()
    images = np.empty((labels.size, SIZE, SIZE), dtype=np.uint8)
    for label in range(len(OCT_CLASSES)):
        of_class = np.flatnonzero(labels == label)
        for start in range(0, of_class.size, CHUNK):
            chunk = of_class[start : start + CHUNK]
            images[chunk] = draw_class(label, chunk.size, rng)
    return images


def oct_phantoms(
    num_train: int = 20_000, num_val: int = 2_000, num_test: int = 1_000, seed: int = 2024
) -> dict[str, np.ndarray]:
    """The six arrays of OCTMNIST's file: {split}_images [N, 28, 28] and {split}_labels [N, 1], both uint8."""
    natural = np.array(OCTMNIST_CLASS_COUNTS) / sum(OCTMNIST_CLASS_COUNTS)
    balanced = np.full(len(OCT_CLASSES), 1 / len(OCT_CLASSES))
    plan = {"train": (num_train, natural), "val": (num_val, natural), "test": (num_test, balanced)}
    arrays = {}
    for (split, (number, shares)), child in zip(plan.items(), np.random.SeedSequence(seed).spawn(3), strict=True):
        rng = np.random.default_rng(child)
        borders = np.rint(np.cumsum(shares) * number).astype(int)
        labels = rng.permutation(np.searchsorted(borders, np.arange(number), side="right"))
        arrays[f"{split}_images"] = draw_oct_phantoms(labels, rng)
        arrays[f"{split}_labels"] = labels.astype(np.uint8)[:, None]
    return arrays
