"""A real set in COCO's format: what is read of it, its small copies, and what a user hears of one that is wrong."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from kdgraft.errors import DistillError
from kdgraft_bench.data.coco import RealSet
from kdgraft_bench.hosts import bench_host
from kdgraft_bench.spec import read_benchmark

CATEGORIES = [dict(id=7, name="nut"), dict(id=3, name="bolt")]


@pytest.fixture
def root(tmp_path):
    """Two pictures a split: 80 x 40 with two boxes, 20 x 20 with one."""
    root = tmp_path / "set"
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / split / "deeper").mkdir(parents=True)
        picture = np.zeros((40, 80, 3), np.uint8)
        picture[:, 40:] = 200
        cv2.imwrite(str(root / split / "wide.jpg"), picture)
        cv2.imwrite(str(root / split / "deeper" / "small.png"), np.full((20, 20, 3), 90, np.uint8))
        images = [
            dict(id=5, file_name="wide.jpg", width=80, height=40),
            dict(id=9, file_name="deeper/small.png", width=20, height=20),
        ]
        boxes = [
            dict(id=1, image_id=5, category_id=3, bbox=[8, 4, 16, 12], area=150, iscrowd=0),
            dict(id=2, image_id=5, category_id=7, bbox=[40, 0, 40, 40]),
            dict(id=3, image_id=9, category_id=7, bbox=[1, 2, 3, 4], area=12, iscrowd=1),
        ]
        write(root, split, dict(images=images, annotations=boxes, categories=CATEGORIES))
    return root


def write(root, split, found):
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(found))


def change(root, split, key, value):
    path = root / "annotations" / f"instances_{split}.json"
    found = json.loads(path.read_text())
    found[key] = value
    write(root, split, found)


def test_classes_stand_in_the_order_of_their_ids(root):
    assert RealSet.read(root).classes == ("bolt", "nut")


def test_boxes_shrink_with_their_pictures(root, tmp_path):
    folder = RealSet.read(root).shrunk(tmp_path / "small", (40, 30))
    found = json.loads((folder / "annotations/instances_val.json").read_text())
    assert [(i["id"], i["width"], i["height"]) for i in found["images"]] == [(5, 40, 20), (9, 20, 20)]
    # The wide picture halves (80 -> 40); the small one fits as it is. Without an area, the box's: 40 * 40 / 4.
    assert [box["bbox"] for box in found["annotations"]] == [[4, 2, 8, 6], [20, 0, 20, 20], [1, 2, 3, 4]]
    assert [box["area"] for box in found["annotations"]] == [37.5, 400, 12]
    assert [box["iscrowd"] for box in found["annotations"]] == [0, 0, 1]
    wide, small = (cv2.imread(str(folder / "val" / image["file_name"])) for image in found["images"])
    assert wide.shape == (20, 40, 3)
    assert wide[:, :18].mean() < 10 < 190 < wide[:, 22:].mean()
    assert small.shape == (20, 20, 3) and (small == 90).all()


def test_a_copy_is_made_once_and_anew_when_the_set_changed(root, tmp_path):
    def written():
        return (RealSet.read(root).shrunk(tmp_path / "small", (40, 30)) / "train/000000.png").stat().st_mtime_ns

    first = written()
    assert written() == first
    change(root, "val", "annotations", [])
    second = written()
    assert second > first
    cv2.imwrite(str(root / "train/wide.jpg"), np.zeros((40, 80, 3), np.uint8))  # a picture alone
    third = written()
    assert third > second
    (tmp_path / "small/shrunk.json").write_text("{}")  # interrupted
    assert written() > third


def test_other_files_are_not_overwritten(root, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("all of it")
    with pytest.raises(DistillError, match="something else"):
        RealSet.read(root).shrunk(tmp_path / "mine", (40, 30))


WRONG = {
    "no annotations": (lambda root: (root / "annotations/instances_val.json").unlink(), "no annotations/instances_val"),
    "no pictures": (lambda root: (root / "train").rename(root / "elsewhere"), "no train;"),
    "no json": (lambda root: (root / "annotations/instances_train.json").write_text("boxes"), "no COCO annotation"),
    "a list": (lambda root: write(root, "train", [1]), "no COCO annotation"),
    "no categories": (lambda root: change(root, "train", "categories", []), "lists no categories"),
    "no images": (lambda root: change(root, "val", "images", []), "lists no images"),
    "other categories": (
        lambda root: change(root, "val", "categories", [*CATEGORIES, dict(id=8, name="pin")]),
        "differ",
    ),
    "a stranger": (
        lambda root: change(
            root, "val", "annotations", [dict(id=4, image_id=6, category_id=3, bbox=[0, 0, 1, 1], area=1)]
        ),
        "box 4 names no image",
    ),
    "a missing picture": (lambda root: (root / "val/wide.jpg").unlink(), "cannot read"),
}


@pytest.mark.parametrize(("spoil", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_set_is_one_line(root, tmp_path, spoil, said):
    spoil(root)
    with pytest.raises(DistillError, match=said) as error:
        bench_host("det").dataset(read_benchmark("det", data=str(root), out=str(tmp_path / "out")))
    assert str(root) in str(error.value) and "\n" not in str(error.value)
