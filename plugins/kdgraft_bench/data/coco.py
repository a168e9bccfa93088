"""A real set in COCO's format: checks of its annotations, and small copies of its pictures."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2

from kdgraft.errors import DistillError
from kdgraft.files import digest, read_record

from . import check_layout, describe

SPLITS = ("train", "val")


@dataclass(frozen=True)
class RealSet:
    """A folder with ``annotations/instances_{train,val}.json`` and the pictures that they name in ``train/`` and ``val/``.

    Attributes:
        root: the folder.
        classes: the names in the order of their ids.
        annotations: split -> the content of its json.
    """

    root: Path
    classes: tuple[str, ...]
    annotations: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, root: Path) -> RealSet:
        """Read a set's annotations.

        Raises:
            DistillError: a part is missing or is not a COCO annotation.
        """
        annotations = {split: _read_split(root, split) for split in SPLITS}
        categories = sorted(annotations["train"]["categories"], key=lambda category: category["id"])
        if annotations["val"]["categories"] != annotations["train"]["categories"]:
            raise DistillError(f"--data {root}: the categories of instances_train.json and instances_val.json differ")
        return cls(root, tuple(str(category["name"]) for category in categories), annotations)

    def shrunk(self, folder: Path, size: tuple[int, int]) -> Path:
        """Write the set with pictures of at most ``size`` (width, height) pixels to ``folder``, unless it exists already.

        Decoding large pictures would take longer than training on small ones. Boxes and areas shrink with their pictures.

        Raises:
            DistillError: a picture cannot be read, or ``folder`` contains something else.
        """
        record = folder / "shrunk.json"
        source = digest([self.annotations, *(describe(self.root / split) for split in SPLITS)])
        wanted = dict(source=source, size=list(size))
        if read_record(record) == wanted:
            return folder
        if folder.exists() and any(folder.iterdir()) and not record.is_file():
            raise DistillError(f"{folder} holds files of something else; choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        record.write_text("{}")  # it is completed last, so that an interrupted copy is made anew
        for split in SPLITS:
            shutil.rmtree(folder / split, ignore_errors=True)
            written = self._shrink_split(split, folder / split, size)
            path = folder / "annotations" / f"instances_{split}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(written))
        record.write_text(json.dumps(wanted))
        return folder

    def _shrink_split(self, split: str, folder: Path, size: tuple[int, int]) -> dict[str, Any]:
        """Write a split's pictures under numbers, and return its annotations."""
        folder.mkdir(parents=True)
        scales: dict[Any, float] = {}
        images, boxes = [], []
        for number, image in enumerate(self.annotations[split]["images"]):
            path = self.root / split / image["file_name"]
            picture = cv2.imread(str(path))
            if picture is None:
                raise DistillError(f"--data {self.root}: cannot read {path}")
            height, width = picture.shape[:2]
            scale = scales[image["id"]] = min(size[0] / width, size[1] / height, 1.0)
            width, height = round(width * scale), round(height * scale)
            name = f"{number:06d}.png"
            cv2.imwrite(str(folder / name), cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA))
            images.append(dict(id=image["id"], file_name=name, width=width, height=height))
        for box in self.annotations[split]["annotations"]:
            scale = scales[box["image_id"]]
            kept = {key: box[key] for key in ("id", "image_id", "category_id")}
            area = box.get("area", box["bbox"][2] * box["bbox"][3]) * scale**2
            bbox = [value * scale for value in box["bbox"]]
            boxes.append(dict(kept, bbox=bbox, area=area, iscrowd=box.get("iscrowd", 0)))
        return dict(images=images, annotations=boxes, categories=self.annotations[split]["categories"])


def _read_split(root: Path, split: str) -> dict[str, Any]:
    """Return a split's annotations, and check the entries that are read."""
    name = f"annotations/instances_{split}.json"
    check_layout(root, (name, split), "annotations/instances_{train,val}.json, train/ and val/")
    try:
        found = json.loads((root / name).read_text())
        images = {image["id"] for image in found["images"] if image["file_name"]}
        names = {category["id"] for category in found["categories"] if category["name"]}
        strangers = [
            box["id"]
            for box in found["annotations"]
            if box["image_id"] not in images or box["category_id"] not in names or len(box["bbox"]) != 4
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise DistillError(f"--data {root}: {name} is no COCO annotation ({type(error).__name__}: {error})") from None
    if not images or not names:
        raise DistillError(f"--data {root}: {name} lists no {'images' if not images else 'categories'}")
    if strangers:
        raise DistillError(f"--data {root}: {name}: box {strangers[0]} names no image, no category or no four numbers")
    return {key: found[key] for key in ("images", "annotations", "categories")}
