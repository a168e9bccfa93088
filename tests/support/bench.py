"""Tiny data sets in the layouts of real ones, for benchmarks."""

from __future__ import annotations

import json

from kdgraft_bench.data.scenes import write_detection_set, write_segmentation_set


def write_scenes(folder):
    return write_detection_set(folder, seed=0, train=12, val=4, test=4)


def write_masks(folder):
    """Write masks in the layout of a real set."""
    root = write_segmentation_set(folder / "scenes", seed=0, train=12, val=4, test=4)
    for ours, theirs in (("images", "img_dir"), ("masks", "ann_dir")):
        (root / ours).rename(root / theirs)
    (root / "classes.json").write_text(json.dumps({"classes": [str(place) for place in range(11)]}))
    return root


def write_texts(folder):
    words = {"cat": "the cat sat on a mat", "dog": "a dog ran in the park", "cow": "one cow ate all the grass"}
    for split, count in (("train", 30), ("val", 6)):
        lines = [{"text": f"{words[name]} {place}", "label": name} for place in range(count) for name in words]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
