"""Data made on the spot, for machines without the downloads: phantom OCT scans and a spoken corpus.

Both are seeded, and both say what they are wherever they are used: neither passes for the real thing.

    python offline_data.py -out data/spoken                             # the spoken corpus: 1.4 hours in 30 s
    python offline_data.py -transcripts metadata.csv -out data/lj-text  # the texts of LJ Speech: 26 hours in 5 min

Speech comes from espeak-ng, whose library and voices are those of the package `espeakng-loader`. espeak-ng is
free software under the GPL, version 3; it is called here, and no part of it is included.
"""

import argparse
import ctypes
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path

import joblib
import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from scipy.ndimage import gaussian_filter1d
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------
# Phantom retinal OCT scans, a stand-in for OCTMNIST
#
# A phantom is drawn as a B-scan is built up: the vitreous, the retina between its inner limiting membrane (ILM)
# and the retinal pigment epithelium (RPE), the choroid beneath; then the pathology of its class; and last the
# artefacts of scanner and export, drawn alike for all classes, so that pathology alone tells them apart.
# Lengths are in pixels of the 28 x 28 scan (a row is about 18 rows of the B-scan, a column about 0.2 mm of
# retina at zoom 1), grey values in [0, 1]. Drawing is on a finer grid, resized at the end as OCTMNIST was.
# Ranges were fitted to summary statistics of 1,084 real scans (layer profiles per class, position, tilt and
# roughness of the RPE, grain, margins), and where they disagreed, to what a small network can learn from 20,000
# phantoms; no real pixel is stored here.

OCT_CLASSES = ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal")
OCTMNIST_CLASS_COUNTS = (33_484, 10_213, 7_754, 46_026)

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
    """Random curves of deviation 1, smoothed over `length` pixels: [n, grid columns]."""
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


# ---------------------------------------------------------------------------------------------------
# Speech: sentences from a grammar, or given texts, spoken by espeak-ng and laid out as LJ Speech is
#
# The words are chosen so that their sound decides how they are spelt: no two of them are homophones, and
# espeak-ng says each as a person would.

SPEECH_RATE = 22_050  # Hz, espeak-ng's own and LJ Speech's
FRAME = 1_024  # samples between two outputs of a recogniser with hop 256 and 4x subsampling: 21.5 a second
CTC_ROOM = 1.25  # outputs in every clip, in terms of those that CTC needs: characters, and one in each double letter
SLOWEST = 80  # words a minute: espeak-ng goes no slower
RATES, PITCHES, PITCH_RANGES = (125, 150), (30, 75), (30, 80)  # words a minute; espeak's scales of 0 to 99
GAINS, PADDING, NOISE = (-6.0, 1.0), (0.0, 0.2), (25.0, 45.0)  # dB; seconds before and after; dB below the speech
Row = tuple[str, str, str]  # id, text, normalised text
LONGEST = 90  # characters of a sentence
SPOKEN_SPLITS = {"train": 1_300, "val": 100, "test": 150, "test_new_words": 100}  # sentences
LJ_SPEECH_SPLITS = {"train": (0, 9_825), "val": (9_825, 10_480), "test": (10_480, 13_100)}  # the homework's rows

# Alternatives are separated by a bar or a line end; {name} stands for an alternative of that name.
GRAMMAR = {
    "sentence": """\
{who} {left} the {thing} {where}.
{who} {left} the {look} {thing} {where}.
{who} {carried} the {thing} {whither}.
{when_past}, {who} {carried} the {container} {whither}.
{who} bought {purchase} {when_past}.
we bought {purchase}, {purchase}, and {purchase} at the market.
the {animal} {moved} {whither}.
the {mood} {animal} {moved} {whither}.
{when_past}, the {animal} jumped over the {thing}.
when {event}, the {animal} {moved} {whither}.
when {event}, {who} {left} the {thing} {where}.
because the {path} was {blocked}, {who} stayed at home.
although {who} was {feeling}, nobody noticed.
although the {animal} was {mood}, it followed {who} {whither}.
{who} said that the {path} was {blocked}.
{who} thinks that the {shop} will open {when_future}.
if it rains {when_future}, we will {plan}.
if {who} comes {when_future}, please {chore}.
{name}, {name}, and {name} went {whither} {when_past}.
the {thing} {where} belongs to {who}.
the {thing} that {who} {left} {when_past} is {look}.
there is a {size} {animal} {where}.
there were {number} {plural} {where}.
the {animal} is {compare} than the {animal}.
{who} plays {game} every {day}.
{who} wants to {plan} {when_future}.
{name} and {who} {shared} {when_past}.
every {day}, the {job} {habit}.
it was {weather} {when_past}, so we stayed at home.
it was {weather} when {who} came home.
have you seen my {look} {thing}?
have you seen my {thing}?
where did {who} {find} the {thing}?
who {left} the {thing} {where}?
is the {shop} open {when_future}?
why is the {animal} so {mood}?
would you like {food}, or just {food}?
does {who} know when {departure}?
how many {plural} are in the {container}?
can you {plan} {when_future}?
did {who} really {plan}?
which {thing} do you prefer, the {look} one or the {look} one?
what would you do with {number} {plural}?
is this {look} {thing} yours?
how far is it from the {place} to the {place}?
what did {who} say about the {thing}?
shall we {plan} {when_future}?
please {favor}.
please {chore} {when_future}.
do not {touch} the {thing}.
put the {thing} {where}, please.
never give {food} to the {animal}.
please bring the {thing}, the {thing}, and the {thing}.
{name}, please {favor}.
go {whither}, then {whither}.
{greeting}, {name}.
thank you, {name}.
{name} is {feeling}.
yes, {who} is {feeling}.
well, {who} will {plan}.
{name} likes {food} and {food}.
the {thing} is {look}.""",
    "who": "the {job}|the {trait} {job}|my {relative}|{name}",
    "job": "baker|farmer|teacher|doctor|sailor|painter|judge|queen|wizard|juggler|jockey|gardener|musician",
    "trait": "young|clever|lazy|brave|cheerful|famous|kind-hearted|well-known",
    "relative": "brother|sister|mother|uncle|cousin",
    "name": "Max|Jack|Emma|Felix|Hazel|Ruby|Victor|Quentin",
    "feeling": "tired|busy|dizzy|happy|ready|hungry|amazed|quite angry",
    "animal": "fox|goat|squirrel|zebra|rabbit|kitten|lizard|goose|donkey|monkey|dog|ox",
    "mood": "lazy|noisy|playful|frightened|sleepy|curious|hungry|quick|quiet",
    "moved": "ran|hurried|rushed|wandered|escaped",
    "whither": "across the bridge|through the forest|up the hill|down the stairs|over the wall|into the castle"
    "|to the {place}|around the lake|along the {path}|toward the horizon",
    "shop": "museum|library|bakery|zoo|bank|school|market",
    "place": "{shop}|harbor|castle|village|island|church",
    "path": "road|bridge|street|harbor",
    "blocked": "frozen|closed|flooded|empty|crowded",
    "where": "in the kitchen|in the attic|behind the barn|under the table|near the {place}|beside the river"
    "|on the roof|outside the {shop}|next to the window|on top of the {container}",
    "thing": "jacket|quilt|ladder|violin|umbrella|lamp|map|letter|puzzle|candle|carpet|saddle|guitar|bicycle"
    "|magazine|clock|blanket",
    "look": "old|small|beautiful|brand-new|old-fashioned|yellow|blue|brown|dusty|expensive|tiny",
    "size": "tiny|small|young|hungry|noisy|fuzzy",
    "container": "box|bucket|basket|jar|bag",
    "purchase": "a jar of honey|a dozen eggs|a box of lemons|a bag of rice|a bottle of juice|a piece of cheese"
    "|six onions|a loaf of bread|a slice of cake",
    "food": "jam|bread|soup|cheese|honey|rice|fish|cake|juice",
    "number": "six|seven|nine|ten|twelve|twenty|twenty-five|a dozen|exactly fifty",
    "plural": "candles|boxes|lizards|apples|coins|butterflies|zebras|squirrels",
    "compare": "faster|louder|older|lazier|bigger",
    "game": "chess|jazz|the guitar|the violin|the saxophone",
    "day": "Friday|Monday|morning|evening|winter|summer|January",
    "when_past": "yesterday|last week|on Friday|this morning|after dinner|before sunrise|at noon|at midnight|in June",
    "when_future": "tomorrow|next week|on Monday|this evening|in July|next winter|after lunch"
    "|before breakfast|on Sunday",
    "event": "the bell rang|the rain stopped|the sun came up|the wind turned|the music began|the fog lifted"
    "|the train arrived|the snow melted|the lights went out|dinner was ready",
    "departure": "the train leaves|the concert begins|the {shop} closes|dinner is ready",
    "plan": "stay at home|bake a cake|fix the roof|visit the {shop}|finish the puzzle|take a taxi|play chess"
    "|explore the island|paint the fence|swim in the lake|explain the joke",
    "favor": "{chore}|{chore}|{chore}|speak slowly|keep quiet|answer the question|explain the answer",
    "chore": "open the window|close the door|wash the dishes|fix the {thing}|feed the {animal}|bring the {thing}"
    "|squeeze the lemons|mix the paint",
    "left": "left|found|lost|dropped|hid|fixed|painted|saw|examined",
    "carried": "carried|took|brought|pulled|dragged|sent",
    "find": "find|hide|buy|lose|fix",
    "touch": "touch|lose|drop|hide|squeeze",
    "shared": "danced in the kitchen|sang all evening|played chess|fixed the roof|shared the {food}"
    "|explored the {place}",
    "habit": "walks to the {place}|feeds the {animal}|sweeps the floor|waters the garden|bakes bread",
    "weather": "cold|foggy|windy|warm|freezing|ice-cold",
    "greeting": "good morning|good evening|welcome home|happy birthday",
}

# Kept for the split `test_new_words`: heard in no other sentence, and spelt as they sound.
NEW_WORDS = {
    "job": "dentist|pilot|hunter|banker|printer|singer|dancer|driver|drummer|robber|barber|carpenter|inspector|actor",
    "trait": "grumpy|clumsy|timid|modest|stubborn|humble",
    "name": "Martin|Linda|Robin|Hector|Wilma|Gilbert",
    "animal": "tiger|panda|camel|hamster|parrot|rat|pig|badger|beetle|otter|lobster|spider",
    "thing": "lantern|hammer|trumpet|magnet|helmet|pencil|ribbon|mirror|spoon|shovel|rocket|napkin|pillow|banner"
    "|locket|sponge|button|chisel",
    "look": "silver|purple|crimson|plastic|slender|splendid|rusty|wooden",
    "shop": "cabin|temple|factory|prison|hotel|fort",
    "food": "pepper|mustard|melon|spinach|bacon|pumpkin|ginger|garlic|corn",
    "plural": "insects|trumpets|lobsters|buttons|rockets|pumpkins",
    "weather": "humid|sunny|misty",
}


class SpeechError(Exception):
    """Speech that cannot be made. Its message is one line: what is wrong, and where."""


def sentence_maker(grammar: dict[str, str], rng: np.random.Generator) -> Callable[[], str]:
    """A function that returns another random sentence of the grammar at each call.

    Alternatives are dealt like cards, all of them before any comes again: no word stays rare by chance.
    """
    decks: dict[str, list[str]] = {name: [] for name in grammar}

    def draw(name: str) -> str:
        if not decks[name]:
            decks[name] = rng.permutation(re.split(r"[|\n]", grammar[name])).tolist()
        return re.sub(r"\{(\w+)\}", lambda found: draw(found[1]), decks[name].pop())

    def sentence() -> str:
        text = draw("sentence")
        return text[0].upper() + text[1:]

    return sentence


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, hyphenated ones whole."""
    return re.findall(r"[a-z]+(?:-[a-z]+)*", text.lower())


def spoken_sentences(seed: int = 0) -> dict[str, list[str]]:
    """The sentences of the splits `train`, `val`, `test` and `test_new_words`, all distinct.

    Every word of `val` and `test` occurs in `train`; every sentence of `test_new_words` has at least one word
    that occurs in no other split.
    """
    rng = np.random.default_rng(seed)
    known = sentence_maker(GRAMMAR, rng)
    extended = sentence_maker(GRAMMAR | {k: f"{GRAMMAR[k]}|{v}" for k, v in NEW_WORDS.items()}, rng)
    new_words = set(words_of(" ".join(NEW_WORDS.values())))
    splits: dict[str, list[str]] = {}
    taken: set[tuple[str, ...]] = set()
    heard: set[str] = set()
    for split, number in SPOKEN_SPLITS.items():
        sentence = extended if split == "test_new_words" else known
        splits[split] = []
        while len(splits[split]) < number:
            text = sentence()
            words = words_of(text)
            long_words = [word for word in words if len(word) > 3]
            # a long word that comes twice makes a clumsy sentence: 'the goat is older than the goat'
            if tuple(words) in taken or len(set(long_words)) < len(long_words) or len(text) > LONGEST:
                continue
            if split in ("val", "test") and not heard.issuperset(words):
                continue
            if split == "test_new_words" and new_words.isdisjoint(words):
                continue
            splits[split].append(text)
            taken.add(tuple(words))
        if split == "train":
            heard.update(*map(words_of, splits["train"]))
    return splits


ESPEAK_SYNCHRONOUS, ESPEAK_DONT_EXIT, ESPEAK_UTF8 = 2, 0x8000, 1  # as in espeak-ng's speak_lib.h
ESPEAK_RATE, ESPEAK_PITCH, ESPEAK_RANGE = 1, 3, 4
ESPEAK_LOCK = threading.Lock()
EspeakCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@contextmanager
def espeak(voice: str) -> Iterator[ctypes.CDLL]:
    """espeak-ng's library, loaded afresh, ready to speak with `voice`, and unloaded in the end.

    What was spoken before leaves traces in a loaded library: its place in the table of pitch flutter, its gain
    control and more are static variables that its own initialisation leaves alone. Loaded afresh, which takes
    5 ms, it says the same text with the same samples every time. One thread at a time has it; others wait.
    """
    try:
        import _ctypes  # ctypes itself never unloads

        import espeakng_loader

        voices, path = espeakng_loader.get_data_path(), espeakng_loader.get_library_path()
    except (ImportError, RuntimeError) as error:
        raise SpeechError(f"espeak-ng is missing: {error} (pip install espeakng-loader)") from None
    unload = _ctypes.FreeLibrary if os.name == "nt" else _ctypes.dlclose
    with ESPEAK_LOCK:
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            raise SpeechError(f"espeak-ng cannot be loaded: {error} (pip install espeakng-loader)") from None
        try:
            rate = library.espeak_Initialize(ESPEAK_SYNCHRONOUS, 0, voices.encode(), ESPEAK_DONT_EXIT)
            if rate != SPEECH_RATE:
                raise SpeechError(f"espeak-ng cannot use the voices in {voices} (it wants a path below 160 bytes)")
            if library.espeak_SetVoiceByName(voice.encode()) != 0:
                raise SpeechError(f"espeak-ng has no voice {voice!r}")
            yield library
        finally:
            library.espeak_Terminate()
            unload(library._handle)


def espeak_version() -> str:
    with espeak("en-us") as library:
        library.espeak_Info.restype = ctypes.c_char_p
        return library.espeak_Info(None).decode()


def speak(
    text: str, *, words_per_minute: int = 140, pitch: int = 50, pitch_range: int = 50, voice: str = "en-us"
) -> np.ndarray:
    """Speak a text: int16 [samples] at 22,050 Hz, the same ones for the same arguments.

    Pitch (50 is about 100 Hz) and its range (0 is monotonous) are on espeak-ng's scales of 0 to 99.
    Raises SpeechError if espeak-ng or the voice is missing.
    """
    pieces = []

    @EspeakCallback
    def collect(samples, number: int, _events) -> int:
        if number > 0:
            pieces.append(ctypes.string_at(samples, 2 * number))
        return 0

    with espeak(voice) as library:
        for parameter, value in ((ESPEAK_RATE, words_per_minute), (ESPEAK_PITCH, pitch), (ESPEAK_RANGE, pitch_range)):
            library.espeak_SetParameter(parameter, int(value), 0)
        library.espeak_SetSynthCallback(collect)
        data = text.encode()
        library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 1, 0, ESPEAK_UTF8, None, None)
    return np.frombuffer(b"".join(pieces), dtype=np.int16).copy()


def ctc_length(text: str) -> int:
    """The outputs that CTC needs for a text: one a character, and a blank within each pair of equal ones."""
    text = text.lower()
    return len(text) + sum(a == b for a, b in pairwise(text))


def background(samples: int, rng: np.random.Generator) -> np.ndarray:
    """White or pink noise of deviation 1: float32 [samples]."""
    noise = rng.standard_normal(next_fast_len(samples, real=True), dtype=np.float32)
    if rng.random() < 0.5:
        spectrum = rfft(noise)
        spectrum /= np.sqrt(np.maximum(np.arange(spectrum.size, dtype=np.float32), 1))  # power falls as 1 / frequency
        noise = irfft(spectrum, noise.size)
    return noise[:samples] / noise.std()


def spoken_clip(text: str, seed: int, row: int) -> np.ndarray:
    """A text in a voice, at a level and with a noise that are functions of (seed, row): int16 [samples].

    It is spoken more slowly than drawn where the characters would come too fast for CTC. Raises SpeechError for a
    text that has no sound.
    """
    rng = np.random.default_rng((seed, row))
    rate = rng.integers(*RATES, endpoint=True)
    pitch, pitch_range = rng.integers(*PITCHES, endpoint=True), rng.integers(*PITCH_RANGES, endpoint=True)
    before, after = (rng.uniform(*PADDING, 2) * SPEECH_RATE).astype(int)
    enough = int(CTC_ROOM * ctc_length(text) + 1) * FRAME
    speech = speak(text, words_per_minute=rate, pitch=pitch, pitch_range=pitch_range)
    if not speech.any():
        raise SpeechError(f"{text!r} has no sound")
    while before + speech.size + after < enough and rate > SLOWEST:
        rate = max(SLOWEST, int(0.96 * rate))
        speech = speak(text, words_per_minute=rate, pitch=pitch, pitch_range=pitch_range)
    after = max(after, enough - before - speech.size)  # a row of dots has more characters than sound
    samples = np.pad(speech.astype(np.float32), (before, after))
    noise = np.sqrt(np.mean(samples**2)) * 10 ** (-rng.uniform(*NOISE) / 20) * background(samples.size, rng)
    samples = (samples + noise) * 10 ** (rng.uniform(*GAINS) / 20)
    return np.rint(np.clip(samples, -32_768, 32_767)).astype(np.int16)


def write_clip(path: Path, text: str, seed: int, row: int) -> int:
    """Speak one row into a wav file; returns its number of samples."""
    import soundfile

    samples = spoken_clip(text, seed, row)
    soundfile.write(path, samples, SPEECH_RATE, subtype="PCM_16")
    return samples.size


def holds(folder: Path, record: dict) -> bool:
    """Whether a folder is a complete corpus with this record."""
    try:
        found = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        return record.items() <= found.items()
    except (OSError, ValueError, AttributeError):
        return False


def write_corpus(folder: Path, name: str, rows: list[Row], splits: dict, seed: int, jobs: int | None) -> None:
    """Speak the rows and lay them out as LJ Speech is, with a corpus.json that says what they are.

    Everything is written to a folder beside `folder`, which takes its name at the end: a process killed at any
    moment leaves nothing that looks complete, and the next one clears away what it left. A second process that
    wants the same folder waits for the first. A folder that holds this very corpus is left as it is.
    Raises FileExistsError if something else is there.
    """
    from filelock import FileLock

    metadata = "".join(f"{'|'.join(row)}\n" for row in rows)
    record = {
        "name": name,
        "kind": "spoken",
        "seed": seed,
        "voice": f"espeak-ng {espeak_version()}, en-us",
        "sample_rate": SPEECH_RATE,
        "clips": len(rows),
        "splits": {split: list(bounds) for split, bounds in splits.items()},  # first row, end row
        "words_per_minute": list(RATES),
        "signal_to_noise_db": list(NOISE),
        "metadata_sha256": hashlib.sha256(metadata.encode()).hexdigest(),
    }
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.part-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if holds(folder, record):
            return
        if folder.exists():
            raise FileExistsError(f"{folder} exists and holds something else: remove it, or choose another folder")
        temporary = folder.with_name(f".{folder.name}.part-{os.getpid()}")
        try:
            (temporary / "wavs").mkdir(parents=True)
            tasks = (
                joblib.delayed(write_clip)(temporary / "wavs" / f"{identity}.wav", text, seed, number)
                for number, (identity, _, text) in enumerate(rows)
            )
            clips = joblib.Parallel(n_jobs=jobs or joblib.cpu_count(), return_as="generator")(tasks)
            samples = sum(tqdm(clips, f"speaking the {name}", total=len(rows), unit="clip"))
            (temporary / "metadata.csv").write_bytes(metadata.encode())
            record["hours"] = round(samples / SPEECH_RATE / 3600, 3)
            (temporary / "corpus.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def consecutive(sizes: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Sizes of splits as bounds (first row, end row), one split after the other."""
    ends = list(accumulate(sizes.values()))
    return {split: (end - size, end) for (split, size), end in zip(sizes.items(), ends, strict=True)}


def make_spoken_corpus(folder: Path, seed: int = 0, jobs: int | None = None) -> None:
    """Make the spoken corpus of `spoken_sentences` in a folder, as `write_corpus` does, in `jobs` processes.

    The same seed makes the same bytes, whatever the number of processes (by default one a core).
    """
    sentences = spoken_sentences(seed)
    splits = consecutive({split: len(texts) for split, texts in sentences.items()})
    texts = enumerate(chain.from_iterable(sentences.values()))
    rows = [(f"spoken-{number:04d}", text, text) for number, text in texts]
    write_corpus(folder, "spoken corpus", rows, splits, seed, jobs)


def read_metadata(path: Path) -> list[Row]:
    """The rows (id, text, normalised text) of a metadata.csv in LJ Speech's format.

    Raises SpeechError, with the row, for anything that cannot be spoken.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise SpeechError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    rows, seen = [], set()
    for number, line in enumerate(lines, start=1):
        row = tuple(line.split("|"))
        if len(row) != 3:
            raise SpeechError(f"{path}, row {number}: {len(row)} columns instead of 3 (id|text|normalised text)")
        if not re.fullmatch(r"[\w-]+", row[0]):
            raise SpeechError(f"{path}, row {number}: {row[0]!r} cannot name a file")
        if row[0] in seen:
            raise SpeechError(f"{path}, row {number}: {row[0]} comes twice")
        if not any(character.isalnum() for character in row[2]):
            raise SpeechError(f"{path}, row {number}: {row[0]} has no text to speak")
        seen.add(row[0])
        rows.append(row)
    return rows


def speak_transcripts(metadata: Path, folder: Path, seed: int = 0, jobs: int | None = None) -> None:
    """Speak the normalised texts of a metadata.csv into a folder with the same rows, as `write_corpus` does.

    The splits are the homework's for all of LJ Speech's 13,100 rows, else the same shares. All of LJ Speech
    takes about five minutes on two idle cores. Raises SpeechError for rows that cannot be spoken.
    """
    rows = read_metadata(Path(metadata))
    total = LJ_SPEECH_SPLITS["test"][1]
    splits = {
        split: (first * len(rows) // total, end * len(rows) // total)
        for split, (first, end) in LJ_SPEECH_SPLITS.items()
    }
    write_corpus(folder, "LJ Speech texts, spoken", rows, splits, seed, jobs)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 2 for input that cannot be used (after one line on stderr), 130 when interrupted."""
    parser = argparse.ArgumentParser(
        description="Make the spoken corpus, or speak the texts of a metadata.csv.", usage=argparse.SUPPRESS
    )
    parser.add_argument("-out", type=Path, required=True, metavar="FOLDER", help="made in LJ Speech's layout")
    parser.add_argument("-transcripts", type=Path, metavar="FILE", help="rows of id|text|normalised text")
    parser.add_argument("-seed", type=int, default=0, help="of sentences, voices and noise (default: 0)")
    parser.add_argument("-jobs", type=int, help="processes (default: one a core)")
    args = parser.parse_args(arguments)
    if args.seed < 0 or (args.jobs is not None and args.jobs < 1):
        parser.error("-seed is at least 0, and -jobs at least 1")
    try:
        if args.transcripts:
            speak_transcripts(args.transcripts, args.out, args.seed, args.jobs)
        else:
            make_spoken_corpus(args.out, args.seed, args.jobs)
    except (SpeechError, OSError) as error:
        print(f"offline_data.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\noffline_data.py: stopped; no part of a corpus is left", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    import offline_data  # worker processes find its functions by this name, those of __main__ they do not

    sys.exit(offline_data.main())
