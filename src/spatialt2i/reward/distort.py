"""Images with one thing in them broken: the rejected side of some pairs, so that a score does not ignore breakage.

Both images of a preference pair are well drawn, so pairs alone teach a score nothing about smears and half objects, and
a generator that is tuned on such a score drifts there. A distorted copy of the chosen image is worse under any prompt.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import ndimage

KINDS = {"copied": 0.25, "repeated": 0.15, "warped": 0.12, "stretched": 0.12, "smeared": 0.12, "erased": 0.12,
         "mixed": 0.12}  # how often
RADIUS = (0.1, 0.2)  # of what is broken, in shorter sides of the image
_VISIBLE = 30.0  # difference from the background, of 3 x 255
_COARSE = 64  # where something is to be seen is looked for at this size


def distort(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image with a disc around something that stands out broken in one of seven ways, most often seen twice.

    Args:
        image: uint8 [H, W, 3].
        rng: decides place, size and kind.

    Returns:
        uint8 [H, W, 3].
    """
    pixels = image.astype(np.float32)
    side = min(pixels.shape[:2])
    centre, r = _eye_catcher(image, rng), rng.uniform(*RADIUS) * side
    kind = rng.choice(list(KINDS), p=list(KINDS.values()))
    angle = rng.uniform(0, 2 * np.pi)
    along = np.array([np.sin(angle), np.cos(angle)])
    if kind == "repeated":
        there = rng.uniform(r, np.array(pixels.shape[:2]) - r)
        broken, centre = _copy(pixels, there - centre, 0.0), there
    else:
        broken = _break(pixels, centre, r, along, kind, rng)
    reach = (2 if kind in ("copied", "stretched") else 1.2) * r  # these grow out of the disc
    rows, columns = np.mgrid[:pixels.shape[0], :pixels.shape[1]]
    distance = np.hypot(rows - centre[0], columns - centre[1])
    mask = np.clip((reach - distance) / (0.03 * side) + 0.5, 0, 1)[..., None]
    return np.clip(pixels + mask * (broken - pixels) + 0.5, 0, 255).astype(np.uint8)


def _eye_catcher(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random place (row, column) in pixels where colours change a lot nearby."""
    small = np.asarray(Image.fromarray(image).resize((_COARSE, _COARSE)), dtype=np.float32)
    edges = np.abs(np.diff(small, axis=0, append=small[-1:])).sum(-1)
    edges += np.abs(np.diff(small, axis=1, append=small[:, -1:])).sum(-1)
    weight = ndimage.gaussian_filter(edges, 0.05 * _COARSE).ravel()**2 + 1e-6
    row, column = divmod(int(rng.choice(len(weight), p=weight / weight.sum())), _COARSE)
    return np.array([(row + 0.5) * image.shape[0], (column + 0.5) * image.shape[1]]) / _COARSE


def _break(pixels: np.ndarray, centre: np.ndarray, r: float, along: np.ndarray, kind: str,
           rng: np.random.Generator) -> np.ndarray:
    """float32 [H, W, 3], what is to be seen in and around the disc."""
    if kind == "smeared":
        return ndimage.gaussian_filter(pixels, (0.45 * r, 0.45 * r, 0))
    if kind == "erased":
        return np.broadcast_to(np.median(pixels, axis=(0, 1)), pixels.shape)
    if kind == "mixed":  # what is elsewhere in the image shines through
        return 0.5 * pixels + 0.5 * np.roll(pixels, rng.integers(0, pixels.shape[:2]), (0, 1))
    if kind == "copied":  # beside it or grown together with it
        return _copy(pixels, rng.uniform(0.4, 1.4) * r * along, rng.uniform(0, 0.12) * r)
    at = np.mgrid[:pixels.shape[0], :pixels.shape[1]].astype(np.float32)
    if kind == "warped":
        push = ndimage.gaussian_filter(rng.normal(size=at.shape), (0, 0.35 * r, 0.35 * r))
        at += rng.uniform(0.25, 0.5) * r * push / push.std()
    else:  # stretched
        at -= (1 - 1 / rng.uniform(1.4, 2)) * np.einsum("i,j,jhw->ihw", along, along, at - centre[:, None, None])
    return _sampled(pixels, at)


def _copy(pixels: np.ndarray, offset: np.ndarray, seam: float) -> np.ndarray:
    """What stands out in the image is there once more, ``offset`` (rows, columns) pixels away; seams are blurred."""
    at = np.mgrid[:pixels.shape[0], :pixels.shape[1]].astype(np.float32) - offset[:, None, None]
    moved = _sampled(pixels, at)
    visible = np.abs(moved - np.median(pixels, axis=(0, 1))).sum(-1, keepdims=True) > _VISIBLE
    return ndimage.gaussian_filter(np.where(visible, moved, pixels), (seam, seam, 0))


def _sampled(pixels: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Pixels at fractional places ``at`` [2, H, W]."""
    return np.stack([ndimage.map_coordinates(pixels[..., c], at, order=1, mode="nearest") for c in range(3)], axis=-1)
