"""Sets of images with boxes in COCO's format: a json file of ``images``, ``annotations`` and ``categories``, and a folder of images."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, List, Value

from kdgraft.errors import DistillError

from .columns import short

COLUMNS = ("image", "width", "height", "boxes", "classes", "crowd", "area")
"""The columns of a set: an image's file, its size, and its objects' boxes (x, y, width, height, in pixels), classes, flags and areas."""
_PARTS = ("images", "annotations", "categories")


def read_coco(file: str | Path, folder: str | Path | None = None) -> Dataset:
    """Read a set in COCO's format, one row an image; the classes are in the order of their ids.

    Args:
        file: the json file.
        folder: the folder of the images; by default the one beside ``annotations`` that has the name of the set, ``train`` for
            ``annotations/instances_train.json``.

    Raises:
        DistillError: the file is no such set, or an image is not in the folder; the message names the entry.
    """
    found = _parsed(Path(file))
    folder = _folder(Path(file), folder)
    classes = _classes(file, found["categories"])
    places = {key: place for place, key in enumerate(classes)}
    rows = _images(file, found["images"], folder)
    for number, one in enumerate(found["annotations"]):
        where = f"{file}: annotation {number}"
        if not isinstance(one, Mapping) or not {"image_id", "category_id", "bbox"} <= one.keys():
            raise DistillError(f"{where} must have image_id, category_id and bbox; got {short(one)}")
        for key, known, of in (("image_id", rows, "images"), ("category_id", classes, "categories")):
            if not isinstance(one[key], (int, str)) or one[key] not in known:
                raise DistillError(f"{where} has {key} {short(one[key])}, which is not an id of {of}")
        row, box = rows[one["image_id"]], _box(where, one["bbox"])
        area = one.get("area")
        row["boxes"].append(box)
        row["classes"].append(places[one["category_id"]])
        row["crowd"].append(int(bool(one.get("iscrowd", 0))))
        row["area"].append(float(area) if isinstance(area, (int, float)) else box[2] * box[3])
    _check_files(file, rows, folder)
    kinds = Features(
        image=Value("string"),
        width=Value("int32"),
        height=Value("int32"),
        boxes=List(List(Value("float64"))),
        classes=List(ClassLabel(names=list(classes.values()))),
        crowd=List(Value("int8")),
        area=List(Value("float64")),
    )
    return Dataset.from_list(list(rows.values()), features=kinds)


def classes_in(split: str, found: Dataset) -> list[str]:
    """Return the names of the classes of a set, in their order.

    Raises:
        DistillError: the set is not one of :func:`read_coco`.
    """
    missing = [name for name in COLUMNS if name not in found.column_names]
    kind = getattr(found.features.get("classes"), "feature", None)
    if missing or not isinstance(kind, ClassLabel):
        what = f"no column {missing[0]!r}" if missing else "no names of classes"
        raise DistillError(f"the {split} set has {what}; give a json file in COCO's format")
    return list(kind.names)


def _parsed(file: Path) -> dict[str, list[Any]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DistillError(f"{file} is no json: {error}") from None
    if not isinstance(found, Mapping) or any(not isinstance(found.get(part), list) for part in _PARTS):
        lacks = [part for part in _PARTS if not isinstance(found, Mapping) or not isinstance(found.get(part), list)]
        raise DistillError(f"{file} is not in COCO's format: it has no list of {', nor of '.join(lacks)}")
    if not found["images"]:
        raise DistillError(f"{file} holds no images")
    return {part: found[part] for part in _PARTS}


def _folder(file: Path, told: str | Path | None) -> Path:
    if told is not None:
        if not Path(told).is_dir():
            raise DistillError(f"data.images: there is no folder {told}")
        return Path(told)
    beside = file.parent.parent / file.stem.removeprefix("instances_")
    if file.parent.name == "annotations" and beside.is_dir():
        return beside
    raise DistillError(f"the images of {file} are not in {beside}; name their folder with data.images")


def _classes(file: str | Path, categories: list[Any]) -> dict[int | str, str]:
    """Return the names of the classes by their ids, in the order of these."""
    for number, one in enumerate(categories):
        fine = isinstance(one, Mapping) and isinstance(one.get("id"), (int, str)) and isinstance(one.get("name"), str)
        if not fine:
            raise DistillError(f"{file}: category {number} must have an id and a name; got {short(one)}")
    ids, names = [one["id"] for one in categories], [one["name"] for one in categories]
    for what, values in (("id", ids), ("name", names)):
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise DistillError(f"{file}: two categories have the {what} {twice[0]!r}")
    if not ids:
        raise DistillError(f"{file} has no categories")
    try:
        return dict(sorted(zip(ids, names, strict=True)))
    except TypeError:
        raise DistillError(f"{file}: the ids of categories are numbers and texts; make all of them numbers") from None


def _images(file: str | Path, images: list[Any], folder: Path) -> dict[int | str, dict[str, Any]]:
    """Return a row without objects for each image, by its id."""
    rows: dict[int | str, dict[str, Any]] = {}
    for number, one in enumerate(images):
        where = f"{file}: image {number}"
        if not isinstance(one, Mapping) or not {"id", "file_name", "width", "height"} <= one.keys():
            raise DistillError(f"{where} must have id, file_name, width and height; got {short(one)}")
        if not isinstance(one["id"], (int, str)) or one["id"] in rows:
            raise DistillError(f"{where} has the id {short(one['id'])}, which another image has or which is no id")
        for side in ("width", "height"):
            if not isinstance(one[side], int) or one[side] < 1:
                raise DistillError(f"{where}: {side} must be a number of pixels, got {short(one[side])}")
        rows[one["id"]] = {
            "image": str(folder / str(one["file_name"])),
            "width": one["width"],
            "height": one["height"],
            **{name: [] for name in ("boxes", "classes", "crowd", "area")},
        }
    return rows


def _box(where: str, box: Any) -> list[float]:
    numbers = isinstance(box, (list, tuple)) and all(isinstance(x, (int, float)) and math.isfinite(x) for x in box)
    if not numbers or len(box) != 4 or box[2] < 0 or box[3] < 0:
        raise DistillError(f"{where}: bbox must be [x, y, width, height] in pixels, got {short(box)}")
    return [float(x) for x in box]


def _check_files(file: str | Path, rows: Mapping[Any, Mapping[str, Any]], folder: Path) -> None:
    missing = [row["image"] for row in rows.values() if not Path(row["image"]).is_file()]
    if missing:
        raise DistillError(
            f"{len(missing)} of the {len(rows)} images of {file} are not there, the first is {missing[0]}; name their folder with "
            f"data.images (it is {folder})"
        )
