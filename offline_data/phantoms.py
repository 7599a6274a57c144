"""Phantom retinal OCT scans, a stand-in for OCTMNIST: drawn by a program, seeded, never to pass for real ones.

from offline_data.phantoms import oct_phantoms
arrays = oct_phantoms()  # the six arrays of OCTMNIST's file: 20,000 scans to train on, 2,000 and 1,000 more
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d

from offline_data import OCT_CLASSES, OCTMNIST_CLASS_COUNTS

# ---------------------------------------------------------------------------------------------------
# A phantom is drawn as a B-scan is built up: the vitreous, the retina between its inner limiting membrane (ILM)
# and the retinal pigment epithelium (RPE), the choroid beneath; then the pathology of its class; and last the
# artefacts of scanner and export, drawn alike for all classes, so that pathology alone tells them apart.
# Lengths are in pixels of the 28 x 28 scan (a row is about 18 rows of the B-scan, a column about 0.2 mm of
# retina at zoom 1), grey values in [0, 1]. Drawing is on a finer grid, resized at the end as OCTMNIST was.
# Ranges were fitted to summary statistics of 1,084 real scans (layer profiles per class, position, tilt and
# roughness of the RPE, grain, margins), and where they disagreed, to what a small network can learn from 20,000
# phantoms; no real pixel is stored here.

SIZE = 28  # pixels per side
ROW_STEPS, COLUMN_STEPS = 3, 2  # grid points per pixel: layers are thin, so rows need more than columns
CHUNK = 250  # scans drawn at once: the grids stay small
ROWS = ((np.arange(SIZE * ROW_STEPS, dtype=np.float32) + 0.5) / ROW_STEPS)[:, None]
COLUMNS = (np.arange(SIZE * COLUMN_STEPS, dtype=np.float32) + 0.5) / COLUMN_STEPS


@dataclass
class Retina:
    """Surfaces and optics of N scans: [N, grid columns], or [N, 1] where one value serves a whole scan."""

    zoom: np.ndarray  # lateral magnification [N, 1]
    fovea: np.ndarray  # column of the fovea [N, 1]
    bruch: np.ndarray  # row of Bruch's membrane, on which a healthy RPE lies
    rpe: np.ndarray  # height of the RPE above Bruch's membrane
    fluid: np.ndarray  # thickness of subretinal fluid, between the RPE and the neurosensory retina
    thickness: np.ndarray  # thickness of the neurosensory retina
    rpe_light: np.ndarray  # brightness of the RPE, relative to a healthy one
    rpe_width: np.ndarray  # half the thickness of the RPE's bright band
    fill: np.ndarray  # grey value of the space between a raised RPE and Bruch's membrane
    choroid: np.ndarray  # brightness of the choroid, relative to a healthy one
    decay: np.ndarray  # depth over which the light in the choroid falls to 1 / e [N, 1]
    neural: np.ndarray  # brightness of the neurosensory retina, relative to a healthy one [N, 1]
    layering: np.ndarray  # contrast of the retinal layers: 1 in a typical scan, 0 where they cannot be told


@dataclass
class Spots:
    """K elliptic inclusions in each of N scans (cysts, hard exudates, scars): arrays [N, K]."""

    column: np.ndarray
    row: np.ndarray
    half_width: np.ndarray
    half_height: np.ndarray
    light: np.ndarray  # grey value in the middle
    opacity: np.ndarray  # 0 (absent) to 1


def per_scan(values: np.ndarray) -> np.ndarray:
    """One value per scan, [N], as a float32 column [N, 1] that broadcasts over the grid's columns."""
    return np.asarray(values, dtype=np.float32)[:, None]


def between(rng: np.random.Generator, n: int, low: float, high: float) -> np.ndarray:
    """A uniform value for each of n scans: [n, 1]."""
    return per_scan(rng.uniform(low, high, n))


def happens(rng: np.random.Generator, n: int, probability: float | np.ndarray) -> np.ndarray:
    """1 for the scans that show a sign, else 0: [n, 1]."""
    return per_scan(rng.random(n) < probability)


def waves(rng: np.random.Generator, n: int, length: float) -> np.ndarray:
    """Random curves of standard deviation 1, smoothed over `length` pixels: [n, grid columns]."""
    raw = rng.standard_normal((n, COLUMNS.size), dtype=np.float32)
    smooth = gaussian_filter1d(raw, length * COLUMN_STEPS, axis=1, mode="wrap")
    return smooth / np.sqrt(np.mean(smooth**2, axis=1, keepdims=True))


def hill(centre: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Gaussian hills of height 1, from [N, 1] to [N, grid columns]."""
    return np.exp(-0.5 * ((COLUMNS - centre) / width) ** 2)


def dome(centre: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Half ellipses of height 1 and half width `width`: rounder and steeper than a hill."""
    return np.sqrt(np.maximum(0, 1 - ((COLUMNS - centre) / width) ** 2))


def at(curve: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Values of the curves [N, grid columns] at the columns `position` [N, K]: [N, K]."""
    index = np.clip(position * COLUMN_STEPS, 0, COLUMNS.size - 1).astype(int)
    return np.take_along_axis(curve, index, axis=1)


def healthy_retina(n: int, rng: np.random.Generator) -> Retina:
    """Position, tilt, curvature, thickness and foveal pit of n healthy retinas."""
    # the cut shows some 6 mm of a B-scan 512 or 768 pixels wide, and 3 mm of one of 1024 or 1536 (38 %)
    zoom = per_scan(rng.choice([1.0, 1.9], n, p=[0.62, 0.38]) * rng.lognormal(0, 0.15, n))
    half = (COLUMNS - SIZE / 2) / (SIZE / 2)  # -1 at the left edge, 1 at the right
    tilt, bend = per_scan(rng.laplace(0, 0.9, n)), per_scan(rng.laplace(-0.7, 0.65, n))
    twist = per_scan(rng.normal(0, 0.5, n))
    bend += per_scan(rng.normal(0, 2.5, n)) * happens(rng, n, 0.1)  # deep bowls and domes: one eye in ten
    middle = per_scan(np.clip(rng.normal(12.8, 2.5, n), 7, 21))
    bruch = middle + tilt * half + bend * (half**2 - 1 / 3) + twist * (half**3 - 0.6 * half)
    fovea = per_scan(rng.normal(SIZE / 2, 2.5, n))
    fovea += per_scan(rng.normal(0, 9, n)) * happens(rng, n, 0.3)  # not every scan runs through the fovea
    rim = between(rng, n, 0, 1.2) * hill(fovea, between(rng, n, 6, 10) * zoom)
    pit = per_scan(np.maximum(0, rng.normal(1.9, 0.7, n))) * hill(fovea, between(rng, n, 1.3, 2.4) * zoom)
    thickness = per_scan(rng.normal(4.3, 0.45, n)) + per_scan(rng.normal(0, 0.35, n)) * half + rim - pit
    return Retina(
        zoom=zoom,
        fovea=fovea,
        bruch=bruch,
        rpe=np.zeros_like(bruch),
        fluid=np.zeros_like(bruch),
        thickness=np.maximum(thickness, 1.2),
        rpe_light=1 + 0.04 * waves(rng, n, 2.0),
        rpe_width=between(rng, n, 0.77, 1.26),
        fill=np.full_like(zoom, 0.3),
        choroid=1 + between(rng, n, 0, 0.12) * waves(rng, n, 0.6),  # shadows of the vessels above
        decay=per_scan(rng.lognormal(np.log(2.6), 0.25, n)),
        neural=np.ones_like(zoom),
        layering=between(rng, n, 0.8, 1.2),
    )


def fill_pit(retina: Retina, share: np.ndarray) -> None:
    """Fill the foveal pit up to `share` [N, 1] of its depth."""
    level = np.median(retina.thickness, axis=1, keepdims=True)
    retina.thickness += share * np.maximum(0, level - retina.thickness)


def swell(retina: Retina, rng: np.random.Generator, rows: np.ndarray) -> None:
    """Thicken the retina in a mound near the fovea, by up to `rows` [N, 1]."""
    n = len(rows)
    place = retina.fovea + per_scan(rng.normal(0, 4, n))
    retina.thickness += between(rng, n, 0, 1) * rows * hill(place, between(rng, n, 2, 5) * retina.zoom)


def dim_and_weaken(retina: Retina, rng: np.random.Generator, dimming: float, severity: np.ndarray) -> None:
    """A diseased retina reflects less, and its RPE lets more light through (measured: 20 %)."""
    retina.choroid = retina.choroid * (1 + 0.25 * severity)
    retina.decay = retina.decay * (1 + 0.3 * severity)
    retina.neural = retina.neural * (1 - between(rng, len(severity), 0, dimming) * severity)


def cluster(
    retina: Retina,
    rng: np.random.Generator,
    position: np.ndarray,
    heights: tuple[float, float],
    half_height: np.ndarray,
    aspect: np.ndarray,
    light: tuple[float, float],
    chance: np.ndarray,
) -> Spots:
    """Spots of `half_height` at the columns `position` [N, K], each present with probability `chance` [N, 1].

    `heights` above the retina's outer border are shares of its thickness, `aspect` is width by height.
    """
    shape = half_height.shape
    outer_border = at(retina.bruch - retina.rpe - retina.fluid, position)
    row = outer_border - rng.uniform(*heights, shape) * at(retina.thickness, position)
    opacity = (rng.random(shape) < chance) * rng.uniform(0.6, 1, shape)
    return Spots(position, row, aspect * half_height, half_height, rng.uniform(*light, shape), opacity)


def cysts(retina: Retina, rng: np.random.Generator, severity: np.ndarray, size: float, chance: np.ndarray) -> Spots:
    """Up to 4 dark intraretinal cysts near the fovea, of a half height of `size` rows on average."""
    n, shape = len(severity), (len(severity), 4)
    focus, spread = retina.fovea + per_scan(rng.normal(0, 3, n)), between(rng, n, 0.8, 5) * retina.zoom
    position = focus + spread * rng.normal(0, 1, shape)
    half_height = rng.lognormal(np.log(size), 0.4, shape) * (0.6 + 0.6 * severity)
    half_height = np.minimum(half_height, 0.4 * at(retina.thickness, position))
    aspect = rng.lognormal(0.1, 0.3, shape) * np.sqrt(retina.zoom)
    return cluster(retina, rng, position, (0.35, 0.75), half_height, aspect, (0.05, 0.14), chance)


def add_neovascularization(retina: Retina, rng: np.random.Generator) -> list[Spots]:
    """CNV: an uneven RPE, pigment epithelial detachment, subretinal scars and fluid, a bright choroid."""
    n = len(retina.bruch)
    severity = per_scan(rng.beta(2.5, 1.0, n))
    focus = retina.fovea + per_scan(rng.normal(0, 3.5, n))
    width = between(rng, n, 2.5, 8) * np.sqrt(retina.zoom)
    lesion = severity * np.maximum(hill(focus, width), between(rng, n, 0.1, 0.7))
    uneven = between(rng, n, 0, 0.6) * np.abs(waves(rng, n, 0.9))
    uneven += between(rng, n, 0.4, 1.7) * waves(rng, n, 2.2)
    detachment = dome(focus + per_scan(rng.normal(0, 2, n)), width * between(rng, n, 0.5, 1.3))
    detachment *= happens(rng, n, 0.6) * per_scan(rng.gamma(2, 1.3, n)) * severity
    # filtered, as the foot of a detachment is not a sharp edge
    retina.rpe = np.maximum(0, gaussian_filter1d(detachment, 1.2, axis=1) + lesion * uneven)
    retina.fluid = dome(focus + per_scan(rng.normal(0, 3, n)), width) * happens(rng, n, 0.3)
    retina.fluid *= between(rng, n, 0.5, 2.5) * severity
    # the retina above thins (atrophy), swells in places, and often loses its pit
    retina.thickness -= between(rng, n, 0, 0.5) * np.minimum(retina.rpe, 2.5)
    retina.thickness -= between(rng, n, 0, 0.8) * severity
    swell(retina, rng, 2.0 * severity)
    fill_pit(retina, between(rng, n, 0.3, 1) * severity)
    retina.thickness = np.maximum(retina.thickness, 1.5)
    retina.rpe_light *= 1 + lesion * between(rng, n, -0.6, 0.4)
    retina.rpe_light += 0.3 * lesion * waves(rng, n, 0.7)
    retina.rpe_width = retina.rpe_width * (1 + lesion * between(rng, n, -0.2, 1.2))
    retina.fill = retina.fill * per_scan(rng.choice([0.4, 0.8, 1.2, 1.9], n))  # serous to fibrovascular
    retina.choroid *= 1 + lesion * between(rng, n, -0.5, 0.9)
    retina.choroid += lesion * between(rng, n, 0.05, 0.4) * waves(rng, n, 0.6)
    dim_and_weaken(retina, rng, 0.25, severity)
    retina.layering = retina.layering * (1 - lesion * between(rng, n, 0, 1))
    place, aspect = focus + rng.normal(0, 2.5, (n, 3)), rng.uniform(1.2, 4, (n, 3))
    half_height = rng.uniform(0.4, 1.2, (n, 3)) * (0.5 + 0.5 * severity)
    scars = cluster(retina, rng, place, (-0.1, 0.25), half_height, aspect, (0.35, 0.65), 0.5 * severity)
    return [scars, cysts(retina, rng, severity, 0.6, 0.6 * happens(rng, n, 0.2))]


def add_edema(retina: Retina, rng: np.random.Generator) -> list[Spots]:
    """Diabetic edema: swelling, cysts, hard exudates, sometimes subretinal fluid; the RPE stays smooth."""
    n = len(retina.bruch)
    severity = per_scan(rng.beta(3.0, 0.9, n))
    fill_pit(retina, between(rng, n, 0.3, 1) * severity)
    swell(retina, rng, 6.0 * severity)
    retina.thickness += 0.35 * severity * waves(rng, n, 1.2) * happens(rng, n, 0.6)
    retina.fluid = dome(retina.fovea, between(rng, n, 2, 6) * retina.zoom) * happens(rng, n, 0.2)
    retina.fluid *= between(rng, n, 0.5, 3.0) * severity
    retina.layering = retina.layering * (1 - 0.7 * severity * between(rng, n, 0, 1))
    dim_and_weaken(retina, rng, 0.15, 1.2 * severity)
    retina.rpe_light *= 1 - between(rng, n, 0, 0.2) * severity
    retina.rpe_light += between(rng, n, 0, 0.15) * waves(rng, n, 0.6)
    place, size = rng.uniform(0, SIZE, (n, 3)), rng.uniform(0.3, 0.7, (n, 3))
    exudates = cluster(retina, rng, place, (0.3, 0.8), size, np.ones_like(size), (0.5, 0.8), 0.35 * severity)
    many = between(rng, n, 0.4, 1)
    return [cysts(retina, rng, severity, 0.7, many), cysts(retina, rng, severity, 1.4, many), exudates]


def add_drusen(retina: Retina, rng: np.random.Generator) -> list[Spots]:
    """Small deposits under the RPE; the ILM above stays where it was, so the retina thins over them."""
    n = len(retina.bruch)
    severity = per_scan(rng.beta(1.5, 0.8, n))
    # more ripple than measured: the milder drusen of real scans are not learnt from so few examples
    spread, many = between(rng, n, 5, 13), between(rng, n, 0.6, 1)[:, 0]
    for _ in range(14):
        position = retina.fovea + per_scan(rng.normal(0, 1, n)) * spread
        width = per_scan(rng.lognormal(np.log(0.75), 0.3, n)) * np.sqrt(retina.zoom)
        height = (0.45 + between(rng, n, 0.4, 1.5) * severity) * happens(rng, n, many)
        retina.rpe = np.maximum(retina.rpe, height * hill(position, width))
    retina.thickness -= 0.95 * retina.rpe
    retina.rpe_light += between(rng, n, 0, 0.25) * np.minimum(retina.rpe, 1)
    retina.rpe_light += between(rng, n, 0, 0.15) * waves(rng, n, 0.5)
    retina.fill = retina.fill + between(rng, n, 0, 0.15)
    dim_and_weaken(retina, rng, 0.0, 0.2 + 0.4 * severity)
    retina.neural = retina.neural * 1.05  # measured: a little brighter than in normal scans
    return []


def no_pathology(retina: Retina, rng: np.random.Generator) -> list[Spots]:
    """A normal scan stays as it is."""
    return []


def ramp(height: np.ndarray, softness: np.ndarray) -> np.ndarray:
    """0 below a border, 1 above it, rising linearly over `softness` rows."""
    return np.clip(height / softness + np.float32(0.5), 0, 1)


def bump(distance: np.ndarray) -> np.ndarray:
    """A parabola of height 1 at distance 0, which reaches 0 at distance 1."""
    return np.maximum(0, 1 - distance**2)


def shade(retina: Retina, rng: np.random.Generator) -> np.ndarray:
    """Grey values of vitreous, retina and choroid: [N, grid rows, grid columns]."""
    n = len(retina.bruch)

    def level(low: float, high: float) -> np.ndarray:
        return between(rng, n, low, high)[:, None]

    def curve(values: np.ndarray) -> np.ndarray:
        return values.astype(np.float32)[:, None]

    softness = level(0.4, 0.9)
    height = curve(retina.bruch) - ROWS  # above Bruch's membrane
    choroid = np.exp(np.minimum(height, 0) / curve(retina.decay))
    choroid = choroid * (curve(retina.choroid) * level(0.26, 0.38)) + level(0.03, 0.06)
    below_rpe = choroid + (curve(retina.fill) - choroid) * ramp(height, softness)

    height -= curve(retina.rpe)  # above the RPE
    rpe = bump(height / curve(retina.rpe_width)) * (curve(retina.rpe_light) * level(0.53, 0.67))
    above = height - curve(retina.fluid)  # above the outer border of the neurosensory retina
    depth = curve(retina.thickness) - above  # below the ILM
    nerve_fibres = level(0.0, 0.12) * ramp(level(0.7, 1.3) - depth, np.float32(0.8))
    outer_nuclear = level(0.08, 0.18) * bump((above - level(1.3, 1.8)) / level(0.8, 1.2))
    layers = curve(retina.layering) * (nerve_fibres - outer_nuclear)
    neural = level(0.28, 0.37) * curve(retina.neural) + layers

    vitreous = level(0.065, 0.105)
    image = vitreous + (neural - vitreous) * ramp(depth, softness)
    # where there is no fluid, its soft upper border would darken the RPE
    image += (level(0.05, 0.12) - image) * (ramp(-above, softness) * curve(retina.fluid > 0.15))
    image += (below_rpe - image) * ramp(-height, softness)
    return np.maximum(image, rpe)


def paint(image: np.ndarray, spots: Spots) -> None:
    """Paint the spots, with soft rims, into the grid [N, grid rows, grid columns], in place."""
    for k in range(spots.column.shape[1]):
        one = {name: per_scan(values[:, k])[:, None] for name, values in vars(spots).items()}
        across = (COLUMNS - one["column"]) / one["half_width"]
        down = (ROWS - one["row"]) / one["half_height"]
        cover = one["opacity"] * np.clip(2.1 - 1.6 * (across**2 + down**2), 0, 1)
        image += (one["light"] - image) * cover


def bicubic_weights(steps: int) -> np.ndarray:
    """Weights [28, 28 * steps] of an antialiased bicubic resize by 1 / steps."""
    x = np.abs((np.arange(SIZE)[:, None] + 0.5) - (np.arange(SIZE * steps) + 0.5) / steps)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def add_artefacts(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Uneven light, haze, grain, and the white margins of the export: [N, 28, 28] to the same."""
    n, pixel = len(image), np.arange(SIZE, dtype=np.float32)
    half = (pixel - (SIZE - 1) / 2) / (SIZE / 2)

    def level(values: np.ndarray) -> np.ndarray:
        return per_scan(values)[:, None]

    light = 1 + level(rng.normal(0, 0.12, n)) * half - level(np.abs(rng.normal(0, 0.12, n))) * half**2
    image = image * light * level(rng.lognormal(0.04, 0.14, n))
    haze = level(rng.exponential(0.15, n) * (rng.random(n) < 0.04))
    image += haze * (1 - image)
    # speckle grows with the light only in the dark, as scanners show brightness on a compressed scale
    speckle = level(rng.lognormal(np.log(0.065), 0.35, n)) * np.minimum(image, 0.12)
    noise = level(np.minimum(rng.lognormal(np.log(0.0015), 0.9, n), 0.03))
    image += np.hypot(speckle, noise) * rng.standard_normal(image.shape, dtype=np.float32)
    # the scan was shifted and tilted in its frame, which left white at the top (43 %) or the bottom (32 %)
    side = rng.choice(4, n, p=[0.28, 0.40, 0.29, 0.03])  # neither, top, bottom, both
    tilt = level(rng.laplace(0, 1.0, n)) * half
    top = (level(rng.exponential(1.6, n)) + tilt) - pixel[:, None]
    bottom = (level(rng.exponential(1.2, n)) - tilt) - pixel[::-1, None]
    white = np.clip(top, 0, 1) * level(side % 2 == 1) + np.clip(bottom, 0, 1) * level(side >= 2)
    return image + (1 - image) * np.minimum(white, 1)


PATHOLOGIES = (add_neovascularization, add_edema, add_drusen, no_pathology)  # in the order of OCT_CLASSES


def draw_class(label: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw n phantoms of one class: [n, 28, 28] uint8."""
    retina = healthy_retina(n, rng)
    inclusions = PATHOLOGIES[label](retina, rng)
    grid = shade(retina, rng)
    for spots in inclusions:
        paint(grid, spots)
    resized = bicubic_weights(ROW_STEPS) @ grid @ bicubic_weights(COLUMN_STEPS).T
    image = add_artefacts(resized, rng)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def draw_oct_phantoms(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw one phantom scan for each label: [N] ints (0 to 3, as OCT_CLASSES) to [N, 28, 28] uint8."""
    labels = np.asarray(labels).ravel()
    if labels.size and not 0 <= labels.min() <= labels.max() < len(OCT_CLASSES):
        raise ValueError(f"labels must be 0 to {len(OCT_CLASSES) - 1}")
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
    """The six arrays of OCTMNIST's file: {split}_images [N, 28, 28] and {split}_labels [N, 1], all uint8.

    Training and validation have OCTMNIST's class proportions, the test split equal ones. Each split has
    a child seed of its own, so that the size of one leaves the others as they are.
    """
    natural = np.array(OCTMNIST_CLASS_COUNTS) / sum(OCTMNIST_CLASS_COUNTS)
    equal = np.full(len(OCT_CLASSES), 1 / len(OCT_CLASSES))
    plan = (("train", num_train, natural), ("val", num_val, natural), ("test", num_test, equal))
    arrays = {}
    seeds = np.random.SeedSequence(seed).spawn(len(plan))
    for (split, number, shares), child in zip(plan, seeds, strict=True):
        rng = np.random.default_rng(child)
        class_ends = np.rint(np.cumsum(shares) * number)
        labels = rng.permutation(np.searchsorted(class_ends, np.arange(number), side="right"))
        arrays[f"{split}_images"] = draw_oct_phantoms(labels, rng)
        arrays[f"{split}_labels"] = labels.astype(np.uint8)[:, None]
    return arrays
