"""Scenes of real handwritten digits, for detection and for segmentation, rendered when they are needed.

Demos and tests need pictures that a detector learns in minutes, that need no download, and that still require recognition.
The scenes consist of scikit-learn's 1797 handwritten digits (UCI *optdigits*, 8x8 pixels, drawn by people), enlarged, sheared,
coloured and painted over textured backgrounds, among clutter that looks like ink: strokes, shapes, and fragments of digits that
are too small to read. The digits of the three splits are disjoint. This module imports no mm package.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kdgraft.files import read_record, written_whole

from .digits import CLASSES, SPLITS, all_digits, sources_of

SEGMENTATION_CLASSES = ("background", *CLASSES)

# This number changes whenever the same seed gives different pictures, so that an older set on disk is written anew.
_VERSION = 2
_SIDE = 64  # the side of an enlarged digit: 8 source pixels times 8
_INK = 0.5  # the opacity from which a pixel belongs to its digit

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Digits:
    """N handwritten digits for scenes."""

    pictures: NDArray[np.uint8]  # ink from 0 (paper) to 255, (N, 64, 64)
    labels: NDArray[np.int64]  # 0 to 9, (N,)
    source: NDArray[np.int64]  # indices in sklearn's load_digits(), (N,)


@dataclass(frozen=True)
class Scene:
    """One rendered picture and its N digits, in the order in which they were painted.

    Boxes are ``x1, y1, x2, y2`` in pixel edges (``x2`` and ``y2`` exclusive), tight around a digit's ink before
    anything is painted over it. ``instances`` is ``i + 1`` where ink of digit ``i`` is *visible*, else 0.
    """

    image: NDArray[np.uint8]  # RGB, (H, W, 3)
    boxes: FloatArray  # (N, 4)
    labels: NDArray[np.int64]  # 0 to 9, (N,)
    instances: NDArray[np.int32]  # (H, W)

    @property
    def semantic(self) -> NDArray[np.uint8]:
        """Class per pixel, uint8 of shape (H, W): 0 for the background, ``label + 1`` for visible ink."""
        lookup: NDArray[np.uint8] = np.concatenate([[0], self.labels + 1]).astype(np.uint8)
        return lookup[self.instances]


@lru_cache(maxsize=len(SPLITS))
def digits_of(split: str) -> Digits:
    """Return the digits of ``'train'``, ``'val'`` or ``'test'``: disjoint sets that do not depend on the scenes' seed."""
    (images, labels), source = all_digits(), sources_of(split)
    pictures = np.zeros((len(source), _SIDE, _SIDE), dtype=np.uint8)
    for row, index in enumerate(source):
        large = cv2.resize(images[index], (_SIDE, _SIDE), interpolation=cv2.INTER_CUBIC)
        pictures[row] = np.clip(large * 255, 0, 255)
    return Digits(pictures, labels[source], source)


def render_scene(
    rng: np.random.Generator,
    digits: Digits,
    size: int = 96,
    *,
    count: tuple[int, int] = (2, 6),
    object_size: tuple[float, float] = (16, 44),
    clutter: tuple[int, int] = (2, 6),
    max_hidden: float = 0.4,
) -> Scene:
    """Paint one scene: background, clutter, digits and some more clutter, each over the earlier ones.

    A patch that would hide more than ``max_hidden`` of a digit's ink is moved or left out, so that every digit in
    the picture is labelled and every labelled digit is visible.

    Args:
        rng: the only source of randomness.
        digits: the digits to choose from, see `digits_of`.
        size: the side of the picture, in pixels.
        count: the smallest and largest number of digits to paint; in a crowded scene some are left out.
        object_size: smallest and largest nominal size of a digit, log-uniform between; the ink is a little smaller.
        clutter: the smallest and largest number of pieces of clutter, of which about a third lie above the digits.
        max_hidden: the largest fraction of a digit's ink that others may cover.

    Raises:
        ValueError: the largest object might not fit into the scene.
    """
    if not 1 <= object_size[0] <= object_size[1] <= size / 2:  # turned and sheared, ink may need half as much again
        raise ValueError(f"object_size {object_size} must ascend, from at least 1 to at most half the size, {size / 2}")
    canvas = _Canvas(_background(rng, size), max_hidden)
    pieces = int(rng.integers(clutter[0], clutter[1] + 1))
    above = int(rng.binomial(pieces, 1 / 3))
    for _ in range(pieces - above):
        _add_clutter(rng, canvas, digits, object_size)
    for _ in range(int(rng.integers(count[0], count[1] + 1))):
        _add_digit(rng, canvas, digits, object_size)
    for _ in range(above):
        _add_clutter(rng, canvas, digits, object_size)
    image = canvas.image
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (3, 3), float(rng.uniform(0.4, 0.8))).astype(np.float32)
    image = image + rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(1, 7))
    boxes, labels = np.array(canvas.boxes, dtype=np.float32), np.array(canvas.labels, dtype=np.int64)
    return Scene(np.clip(image, 0, 255).astype(np.uint8), boxes.reshape(-1, 4), labels, canvas.instances)


def write_detection_set(
    root: str | os.PathLike[str], *, seed: int, train: int = 800, val: int = 200, test: int = 300, size: int = 96
) -> Path:
    """Write a detection set in COCO's layout, unless it exists already; return ``root``.

    PNGs go to ``root/{train,val,test}/``, annotations (``area`` is the box's) to
    ``root/annotations/instances_{train,val,test}.json``. ``root/scenes.json`` records the parameters and is completed
    last, so that the next call repeats an interrupted one. A scene depends only on the seed, its split, its number and
    the size: a longer set starts with the shorter one. Only one process at a time may call this.

    Args:
        root: the folder, which is made if it does not exist. Scenes with other parameters in it are replaced.
        seed: the seed of the scenes. The digits of a split do not depend on it.
        train: the number of training scenes.
        val: the number of validation scenes.
        test: the number of test scenes.
        size: the side of the pictures, in pixels.

    Raises:
        FileExistsError: ``root`` contains files that this function has not written.
    """
    return _write_set(Path(root), "detection", seed, (train, val, test), size)


def write_segmentation_set(
    root: str | os.PathLike[str], *, seed: int, train: int = 800, val: int = 200, test: int = 300, size: int = 96
) -> Path:
    """Write the same scenes in MMSegmentation's layout, unless they exist already; return ``root``.

    Images go to ``root/images/{train,val,test}/``, class indices per pixel (0 for the background, digit + 1 for its visible ink;
    see `SEGMENTATION_CLASSES`) to ``root/masks/{train,val,test}/`` under the same names. For everything else see
    `write_detection_set`.
    """
    return _write_set(Path(root), "segmentation", seed, (train, val, test), size)


def _write_set(root: Path, task: str, seed: int, numbers: tuple[int, int, int], size: int) -> Path:
    record = root / "scenes.json"
    counts = dict(zip(SPLITS, numbers, strict=True))
    wanted: dict[str, Any] = dict(version=_VERSION, task=task, seed=seed, size=size, complete=True, **counts)
    if record.is_file():
        if read_record(record) == wanted:
            return root
    elif root.exists() and any(root.iterdir()):
        raise FileExistsError(f"{root} is not empty and holds no scenes.json: choose another folder for the scenes")
    root.mkdir(parents=True, exist_ok=True)
    _write_json(record, {**wanted, "complete": False})
    for name in (*SPLITS, "annotations", "images", "masks"):
        shutil.rmtree(root / name, ignore_errors=True)
    for index, split in enumerate(SPLITS):
        scenes = (
            (f"{number:06d}.png", render_scene(np.random.default_rng((seed, index, number)), digits_of(split), size))
            for number in range(1, counts[split] + 1)
        )
        if task == "detection":
            (root / "annotations").mkdir(exist_ok=True)
            _write_json(root / "annotations" / f"instances_{split}.json", _write_detection(root / split, scenes))
        else:
            _write_masks(root / "images" / split, root / "masks" / split, scenes)
    _write_json(record, wanted)
    return root


class _Canvas:
    """A picture in progress: its pixels, and the digit whose ink is visible at each of them."""

    def __init__(self, image: FloatArray, max_hidden: float) -> None:
        self.image = image
        self.instances = np.zeros(image.shape[:2], dtype=np.int32)
        self.boxes: list[tuple[int, int, int, int]] = []
        self.labels: list[int] = []
        self._max_hidden = max_hidden
        self._ink = [0]  # of each instance, in pixels, before occlusion

    def place(self, rng: np.random.Generator, alpha: FloatArray, label: int | None = None) -> bool:
        """Paint a patch at a random place, or return False if it would hide too much of a digit there."""
        height, width = alpha.shape
        x, y = (int(rng.integers(0, len(self.image) - extent + 1)) for extent in (width, height))
        where = np.s_[y : y + height, x : x + width]
        colour = _contrasting_colour(rng, self.image[where], alpha)
        ink = alpha >= _INK
        covered = self.instances[where][ink]
        for other in np.unique(covered[covered > 0]):
            visible = np.count_nonzero(self.instances == other) - np.count_nonzero(covered == other)
            if visible < (1 - self._max_hidden) * self._ink[other]:
                return False
        self.image[where] += alpha[..., None] * (colour - self.image[where])
        if label is not None:
            left, top, width, height = cv2.boundingRect(ink.astype(np.uint8))
            self.boxes.append((x + left, y + top, x + left + width, y + top + height))
            self.labels.append(label)
            self._ink.append(int(np.count_nonzero(ink)))
        self.instances[where][ink] = 0 if label is None else len(self.labels)
        return True


def _background(rng: np.random.Generator, size: int) -> FloatArray:
    """Return coloured noise of several scales, a gradient and, in half of the cases, stripes: float32, (size, size, 3)."""
    image = np.full((size, size, 3), rng.uniform(15, 115, 3), dtype=np.float32)
    for cells in (3, 7, 15, 31):
        grey, colour = rng.uniform(0, 50 / np.sqrt(cells), 2) * (1.0, 0.7)
        noise = grey * rng.standard_normal((cells, cells, 1)) + colour * rng.standard_normal((cells, cells, 3))
        image += cv2.resize(noise.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    axis = np.arange(size, dtype=np.float32) / size - 0.5
    for periods in (None, rng.uniform(3, 24)):
        if periods is not None and rng.random() < 0.5:
            break
        angle = rng.uniform(0, 2 * np.pi)
        ramp = np.float32(np.cos(angle)) * axis + np.float32(np.sin(angle)) * axis[:, None]
        wave = ramp if periods is None else np.sin(np.float32(2 * np.pi * periods) * ramp) / 4
        image += wave[..., None] * rng.uniform(-40, 40, 3).astype(np.float32)
    return np.clip(image, 0, 255, out=image)


def _contrasting_colour(rng: np.random.Generator, background: FloatArray, alpha: FloatArray) -> FloatArray:
    """Return the first of eight bright colours with enough contrast to nine tenths of the covered pixels, or the best one."""
    candidates = rng.uniform(120, 255, (8, 3)).astype(np.float32)
    enough = rng.uniform(35, 100)
    covered = background[alpha >= (_INK if alpha.max() >= _INK else 0)]
    covered = covered[:: 1 + len(covered) // 100]
    distances = np.sort(np.abs(candidates[:, None] - covered).mean(2), axis=1)
    contrast = np.minimum(distances[:, len(covered) // 10], enough)
    return np.asarray(candidates[np.argmax(contrast)], dtype=np.float32)


def _warp(rng: np.random.Generator, picture: NDArray[np.uint8], scale: float, tilt: float = 15) -> FloatArray:
    """Scale and shear ink and turn it by up to ``tilt`` degrees; return its opacity, cropped to the ink."""
    angle, shear = np.deg2rad(rng.uniform(-tilt, tilt)), rng.uniform(-0.2, 0.2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = scale * turn @ np.array([[rng.uniform(0.85, 1.15), shear], [0, 1]])
    reach = int(np.ceil(1.5 * scale * len(picture))) + 2
    offset = reach / 2 - matrix.sum(1) * len(picture) / 2 + rng.uniform(-0.5, 0.5, 2)
    ink = cv2.warpAffine(picture, np.column_stack([matrix, offset]), (reach, reach)).astype(np.float32) / 255
    # The threshold and the softness of the ink's rim vary like those of thick and thin, sharp and blunt pens.
    alpha = np.clip((ink - rng.uniform(0.4, 0.55)) / rng.uniform(0.15, 0.35), 0, 1)
    x, y, width, height = cv2.boundingRect((alpha > 0).astype(np.uint8))
    return np.asarray(alpha[y : y + max(height, 1), x : x + max(width, 1)], dtype=np.float32)


def _add_digit(rng: np.random.Generator, canvas: _Canvas, digits: Digits, object_size: tuple[float, float]) -> None:
    index = int(rng.integers(len(digits.labels)))
    alpha = _warp(rng, digits.pictures[index], np.exp(rng.uniform(*np.log(object_size))) / _SIDE)
    if (alpha >= _INK).any():
        any(canvas.place(rng, alpha, int(digits.labels[index])) for _ in range(8))


def _add_clutter(rng: np.random.Generator, canvas: _Canvas, digits: Digits, object_size: tuple[float, float]) -> None:
    """Paint a fragment of a digit, a stroke, a rectangle or an ellipse, unless it would hide a digit."""
    kind = rng.choice(("fragment", "stroke", "rectangle", "ellipse"), p=(0.4, 0.3, 0.15, 0.15))
    extent = np.exp(rng.uniform(*np.log(object_size)))
    if kind == "fragment":
        # Less than a quarter of a digit, turned by any angle, shows a bend or a crossing that cannot be read.
        half = _SIDE * 7 // 16
        x, y = rng.integers(0, _SIDE - half + 1, 2)
        piece = digits.pictures[int(rng.integers(len(digits.labels))), y : y + half, x : x + half]
        canvas.place(rng, _warp(rng, piece, extent / _SIDE, tilt=180))
        return
    side = max(int(extent * 0.7), 4)
    mask = np.zeros((side, side), dtype=np.uint8)
    thickness = int(rng.integers(1, 2 + side // 8))
    if kind == "stroke":
        points = rng.integers(0, side, (int(rng.integers(2, 4)), 1, 2)).astype(np.int32)
        cv2.polylines(mask, [points], False, 255, thickness, cv2.LINE_AA)
    elif kind == "rectangle":
        x1, y1, x2, y2 = (int(v) for v in rng.integers(0, side, 4))
        cv2.rectangle(mask, (x1, y1), (x2, y2), 255, -1 if rng.random() < 0.5 else thickness)
    else:
        axes = (int(rng.integers(1, max(side // 4, 2))), int(rng.integers(side // 4, side // 2)))
        # A closed outline could be read as a zero.
        arc, line = (360, -1) if rng.random() < 0.5 else (int(rng.integers(90, 200)), thickness)
        cv2.ellipse(mask, (side // 2, side // 2), axes, float(rng.uniform(0, 360)), 0, arc, 255, line, cv2.LINE_AA)
    canvas.place(rng, mask.astype(np.float32) * np.float32(rng.uniform(0.5, 1) / 255))


def _write_detection(folder: Path, scenes: Iterable[tuple[str, Scene]]) -> dict[str, Any]:
    """Write one split's pictures to a folder, and return their COCO annotations."""
    folder.mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (name, scene) in enumerate(scenes, 1):
        _write_png(folder / name, scene.image[..., ::-1])
        height, width = scene.image.shape[:2]
        images.append(dict(id=image_id, file_name=name, width=width, height=height))
        for (x1, y1, x2, y2), label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True):
            box = [x1, y1, x2 - x1, y2 - y1]
            keys = dict(id=len(annotations) + 1, image_id=image_id, category_id=label + 1)
            annotations.append(dict(keys, bbox=box, area=box[2] * box[3], iscrowd=0))
    categories = [dict(id=label + 1, name=name) for label, name in enumerate(CLASSES)]
    return dict(images=images, annotations=annotations, categories=categories)


def _write_masks(images: Path, masks: Path, scenes: Iterable[tuple[str, Scene]]) -> None:
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    for name, scene in scenes:
        _write_png(images / name, scene.image[..., ::-1])
        _write_png(masks / name, scene.semantic)


def _write_png(path: Path, picture: NDArray[np.uint8]) -> None:
    if not cv2.imwrite(str(path), picture):
        raise OSError(f"could not write {path}")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with written_whole(path) as part:
        part.write_text(json.dumps(content))
