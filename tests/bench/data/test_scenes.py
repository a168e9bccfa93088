"""Scenes of handwritten digits: reproducible, honest about their splits, with labels that fit the pixels."""

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits

from kdgraft_bench.data.scenes import (
    CLASSES,
    SEGMENTATION_CLASSES,
    SPLITS,
    Scene,
    digits_of,
    render_scene,
    write_detection_set,
    write_segmentation_set,
)


def scenes(number: int, **options: object) -> list[Scene]:
    digits = digits_of("train")
    return [render_scene(np.random.default_rng(seed), digits, **options) for seed in range(number)]


def extent(mask: np.ndarray) -> list[int]:
    rows, columns = np.nonzero(mask)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_splits_share_no_digit_and_lose_none():
    sources = {split: set(digits_of(split).source.tolist()) for split in SPLITS}
    assert sum(len(source) for source in sources.values()) == 1797
    assert set.union(*sources.values()) == set(range(1797))
    for split in SPLITS:
        # optdigits has 174 to 183 pictures of each class: a fifth of them is 34 to 37.
        assert np.bincount(digits_of(split).labels).min() >= 34


def test_splits_hold_the_pictures_they_claim():
    data = load_digits()
    for split in SPLITS:
        digits = digits_of(split)
        np.testing.assert_array_equal(digits.labels, data.target[digits.source])
        # Averaged over blocks of 8x8 pixels, an enlarged digit resembles none of the 1797 pictures more than its own,
        # except where two pictures are all but the same.
        blocks = digits.pictures.reshape(-1, 8, 8, 8, 8).mean(axis=(2, 4)).reshape(-1, 64) * (16 / 255)
        assert (cdist(blocks, data.data).argmin(1) == digits.source).mean() > 0.99


def test_unknown_split():
    with pytest.raises(ValueError, match="train, val, test"):
        digits_of("training")


def test_same_seed_same_scene():
    for first, second in zip(scenes(5), scenes(5), strict=True):
        for field in ("image", "boxes", "labels", "instances", "semantic"):
            np.testing.assert_array_equal(getattr(first, field), getattr(second, field))
    first, second = scenes(2)
    assert (first.image != second.image).any()


def test_shapes_and_types():
    for scene in scenes(20, size=64, object_size=(8, 32)):
        assert (scene.image.shape, scene.image.dtype) == ((64, 64, 3), np.uint8)
        assert (scene.instances.shape, scene.instances.dtype) == ((64, 64), np.int32)
        assert (scene.boxes.shape, scene.boxes.dtype) == ((len(scene.labels), 4), np.float32)
        assert 1 <= len(scene.labels) <= 9


def test_a_single_digit_fills_its_box():
    for scene in scenes(50, count=(1, 1), clutter=(0, 0)):
        assert len(scene.labels) == 1
        assert scene.boxes[0].tolist() == extent(scene.instances == 1)


def test_boxes_lie_in_the_picture_and_hold_all_visible_ink():
    for scene in scenes(100):
        assert (scene.boxes[:, :2] >= 0).all() and (scene.boxes[:, 2:] <= 96).all()
        assert (scene.boxes[:, 2:] > scene.boxes[:, :2]).all()
        assert set(np.unique(scene.instances)) - {0} == set(range(1, len(scene.labels) + 1))
        for index, (x1, y1, x2, y2) in enumerate(scene.boxes):
            left, top, right, bottom = extent(scene.instances == index + 1)
            assert x1 <= left and y1 <= top and right <= x2 and bottom <= y2
    # The digit painted last is covered by nothing once there is no clutter above it.
    for scene in scenes(50, clutter=(0, 0)):
        assert scene.boxes[-1].tolist() == extent(scene.instances == len(scene.labels))


def test_no_label_is_hidden_by_more_than_allowed():
    digits = digits_of("train")
    overlaps = 0
    for seed in range(40):
        # The same random numbers paint the same first digit; painting more over it may hide at most 30 % of it.
        alone = render_scene(np.random.default_rng(seed), digits, count=(1, 1), clutter=(0, 0), max_hidden=0.3)
        crowd = render_scene(np.random.default_rng(seed), digits, count=(12, 12), clutter=(0, 0), max_hidden=0.3)
        shared = np.flatnonzero((crowd.boxes == alone.boxes[0]).all(1))
        if len(shared):
            before, after = (alone.instances == 1).sum(), (crowd.instances == shared[0] + 1).sum()
            assert after >= 0.7 * before
            overlaps += after < before
    assert overlaps >= 5


def test_sizes_vary_from_small_to_large():
    heights = np.concatenate([scene.boxes[:, 3] - scene.boxes[:, 1] for scene in scenes(200, object_size=(12, 48))])
    # Log-uniform from 12 to 48: the outer deciles are 12 * 4 ** 0.1 = 13.8 and 12 * 4 ** 0.9 = 41.8, three times as much;
    # large digits find a place less often. Shear and thin pens leave the ink within a half of its nominal size.
    low, high = np.quantile(heights, [0.1, 0.9])
    assert high > 2.3 * low
    assert heights.min() > 6 and heights.max() < 72


def test_semantic_mask_names_the_classes_of_the_instances():
    scene = scenes(1)[0]
    for index, label in enumerate(scene.labels):
        assert (scene.semantic[scene.instances == index + 1] == label + 1).all()
    assert (scene.semantic[scene.instances == 0] == 0).all()


@pytest.mark.parametrize("object_size", [(10, 60), (20, 10), (0, 10)])
def test_objects_that_cannot_fit_are_refused(object_size):
    with pytest.raises(ValueError, match="object_size"):
        scenes(1, object_size=object_size)


def test_written_set_loads_as_coco(tmp_path):
    root = write_detection_set(tmp_path / "set", seed=3, train=6, val=2, test=3)
    for split, number in dict(train=6, val=2, test=3).items():
        coco = COCO(str(root / "annotations" / f"instances_{split}.json"))
        assert coco.getImgIds() == list(range(1, number + 1))
        assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(CLASSES)
        files = {image["file_name"] for image in coco.loadImgs(coco.getImgIds())}
        assert files == {path.name for path in (root / split).iterdir()}
        for annotation in coco.loadAnns(coco.getAnnIds()):
            x, y, width, height = annotation["bbox"]
            assert x >= 0 and y >= 0 and x + width <= 96 and y + height <= 96
            assert annotation["area"] == width * height > 0
            assert annotation["iscrowd"] == 0


def test_written_pictures_are_the_rendered_ones(tmp_path):
    cv2 = pytest.importorskip("cv2")
    root = write_detection_set(tmp_path / "set", seed=3, train=1, val=1, test=2)
    scene = render_scene(np.random.default_rng((3, 2, 2)), digits_of("test"))
    stored = cv2.imread(str(root / "test" / "000002.png"))
    np.testing.assert_array_equal(stored[..., ::-1], scene.image)
    annotations = json.loads((root / "annotations" / "instances_test.json").read_text())["annotations"]
    ours = [annotation for annotation in annotations if annotation["image_id"] == 2]
    assert [annotation["category_id"] - 1 for annotation in ours] == scene.labels.tolist()
    x, y, width, height = np.array([annotation["bbox"] for annotation in ours]).T
    np.testing.assert_array_equal(np.stack([x, y, x + width, y + height], 1), scene.boxes)


def test_same_parameters_same_bytes_and_a_longer_set_begins_with_the_shorter(tmp_path):
    first = contents(write_detection_set(tmp_path / "a", seed=1, train=3, val=1, test=1))
    second = contents(write_detection_set(tmp_path / "b", seed=1, train=3, val=1, test=1))
    longer = contents(write_detection_set(tmp_path / "c", seed=1, train=4, val=1, test=1))
    other = contents(write_detection_set(tmp_path / "d", seed=2, train=3, val=1, test=1))
    assert first == second
    for number in (1, 2, 3):
        name = f"train/{number:06d}.png"
        assert first[name] == longer[name] != other[name]


def test_a_finished_set_is_left_alone(tmp_path):
    root = write_detection_set(tmp_path / "set", seed=1, train=2, val=1, test=1)
    (root / "train" / "000001.png").write_bytes(b"touched")
    write_detection_set(root, seed=1, train=2, val=1, test=1)
    assert (root / "train" / "000001.png").read_bytes() == b"touched"


@pytest.mark.parametrize("damage", ["interrupted", "other parameters"])
def test_anything_else_is_written_anew(tmp_path, damage):
    wanted = contents(write_detection_set(tmp_path / "reference", seed=1, train=2, val=1, test=1))
    root = write_detection_set(tmp_path / "set", seed=1 + (damage != "interrupted"), train=3, val=1, test=1)
    record = root / "scenes.json"
    if damage == "interrupted":
        record.write_text(json.dumps({**json.loads(wanted["scenes.json"]), "complete": False}))
    write_detection_set(root, seed=1, train=2, val=1, test=1)
    assert contents(root) == wanted


def test_a_folder_of_somebody_else_is_not_touched(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        write_detection_set(tmp_path, seed=1, train=1, val=1, test=1)
    assert (tmp_path / "train" / "precious.txt").read_text() == "mine"


# --- the same scenes with masks


def test_the_segmentation_set_has_mmsegs_layout_and_the_scenes_own_labels(tmp_path):
    cv2 = pytest.importorskip("cv2")
    numbers = dict(train=3, val=1, test=2)
    root = write_segmentation_set(tmp_path / "set", seed=3, **numbers)
    assert set(contents(root)) == {
        "scenes.json",
        *(
            f"{kind}/{split}/{n:06d}.png"
            for kind in ("images", "masks")
            for split, count in numbers.items()
            for n in range(1, count + 1)
        ),
    }
    assert ("background", *CLASSES) == SEGMENTATION_CLASSES
    for index, split in enumerate(SPLITS):
        for number in range(1, numbers[split] + 1):
            scene = render_scene(np.random.default_rng((3, index, number)), digits_of(split))
            mask = cv2.imread(str(root / "masks" / split / f"{number:06d}.png"), cv2.IMREAD_UNCHANGED)
            assert mask.shape == (96, 96) and mask.dtype == np.uint8
            np.testing.assert_array_equal(mask, scene.semantic)
            assert {int(label) for label in np.unique(mask)} == {0, *(scene.labels + 1).tolist()}
            stored = cv2.imread(str(root / "images" / split / f"{number:06d}.png"))
            np.testing.assert_array_equal(stored[..., ::-1], scene.image)


def test_both_sets_of_one_seed_show_the_same_pictures(tmp_path):
    boxes = contents(write_detection_set(tmp_path / "det", seed=4, train=2, val=1, test=1))
    masks = contents(write_segmentation_set(tmp_path / "seg", seed=4, train=2, val=1, test=1))
    for split in SPLITS:
        assert boxes[f"{split}/000001.png"] == masks[f"images/{split}/000001.png"]
    assert boxes["scenes.json"] != masks["scenes.json"]


@pytest.mark.parametrize("damage", ["interrupted", "other parameters", "boxes"])
def test_a_segmentation_set_that_is_not_finished_is_written_anew(tmp_path, damage):
    wanted = contents(write_segmentation_set(tmp_path / "reference", seed=1, train=2, val=1, test=1))
    if damage == "boxes":  # the other task's set in the same folder leaves nothing behind
        root = write_detection_set(tmp_path / "set", seed=1, train=2, val=1, test=1)
    else:
        root = write_segmentation_set(tmp_path / "set", seed=1 + (damage != "interrupted"), train=3, val=1, test=1)
    if damage == "interrupted":
        record = root / "scenes.json"
        record.write_text(json.dumps({**json.loads(wanted["scenes.json"]), "complete": False}))
        (root / "masks" / "train" / "000002.png").unlink()
    write_segmentation_set(root, seed=1, train=2, val=1, test=1)
    assert contents(root) == wanted
    assert {path.name for path in root.iterdir()} == {"scenes.json", "images", "masks"}


def test_a_finished_segmentation_set_is_left_alone(tmp_path):
    root = write_segmentation_set(tmp_path / "set", seed=1, train=2, val=1, test=1)
    (root / "masks" / "train" / "000001.png").write_bytes(b"touched")
    write_segmentation_set(root, seed=1, train=2, val=1, test=1)
    assert (root / "masks" / "train" / "000001.png").read_bytes() == b"touched"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        write_segmentation_set(tmp_path / "mine", seed=1, train=1, val=1, test=1)
