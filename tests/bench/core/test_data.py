"""The embedded set of hard digits: deterministic, no digit in two splits, and read at two resolutions; a real set in folders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from kdgraft import DistillError
from kdgraft_bench.core.batches import Accuracies, Batches
from kdgraft_bench.core.data import COPIES, SIDE, part_of, pictures_of
from kdgraft_bench.data.digits import SPLITS, sources_of


def test_no_digit_is_in_two_splits():
    used = [set(pictures_of(split).source.tolist()) for split in SPLITS]
    assert sum(map(len, used)) == len(set.union(*used)) == 1797
    for split in SPLITS:
        pictures, count = pictures_of(split), len(sources_of(split))
        assert pictures.large.shape == (COPIES[split] * count, 1, SIDE, SIDE)
        assert torch.equal(pictures.labels, torch.from_numpy(load_digits().target[pictures.source.numpy()]))
        assert pictures.small.shape == (COPIES[split] * count, 1, SIDE // 2, SIDE // 2)


def test_pictures_are_the_same_at_every_call_and_differ_from_each_other():
    first = pictures_of("val")
    pictures_of.cache_clear()
    assert torch.equal(pictures_of("val").large, first.large)
    count = len(sources_of("val"))
    assert not torch.equal(first.large[0], first.large[count])  # the same digit, moved and among other clutter
    assert abs(first.large.mean()) < 0.5 and 0.5 < first.large.std() < 1.5


def test_a_share_is_drawn_from_each_class():
    whole = pictures_of("train")
    torch.manual_seed(0)
    part = part_of(whole, 0.03)
    expected = [max(round(0.03 * int((whole.labels == label).sum())), 1) for label in range(10)]
    assert torch.bincount(part.labels).tolist() == expected
    torch.manual_seed(1)
    assert not torch.equal(part_of(whole, 0.03).source, part.source)


def test_batches_take_every_picture_once_before_any_twice():
    pictures, labels = torch.arange(10.0).reshape(10, 1, 1, 1), torch.arange(10)
    drawn = [labels.tolist() for _, labels in Batches(pictures, labels, 5, 4)]
    assert [len(batch) for batch in drawn] == [5] * 4
    assert sorted(drawn[0] + drawn[1]) == sorted(drawn[2] + drawn[3]) == list(range(10))


def test_accuracy_is_the_share_of_right_answers():
    class Always(torch.nn.Linear):
        def forward(self, images):
            return torch.nn.functional.one_hot(torch.full((len(images),), 3), 10).float()

    pictures = pictures_of("val")
    found = Accuracies({"val": pictures}, large=False)(Always(1, 1))
    assert found["val"] == pytest.approx(float((pictures.labels == 3).float().mean()))


def test_a_real_set_is_read_from_folders(tmp_path):
    for split, count in (("train", 2), ("val", 1)):
        for label in range(10):
            folder = tmp_path / split / str(label)
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(np.full((70, 90, 3), 25 * label, dtype=np.uint8)).save(folder / f"{number}.jpg")
    train, tested = (pictures_of(split, str(tmp_path)) for split in ("train", "test"))
    assert train.large.shape == (20, 3, 64, 64) and tested.labels.tolist() == list(range(10))
    assert tested.large[9].mean() > tested.large[0].mean()
    with pytest.raises(DistillError, match="must have ten folders"):
        pictures_of("train", str(tmp_path / "train"))
