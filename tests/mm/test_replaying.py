"""Views that are replayed: samplers that tell the pass, data sets that draw from it, in any order and on any process."""

from __future__ import annotations

import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.structures import BaseDataElement
from torch.utils.data import BatchSampler, DataLoader, Dataset

from kdgraft.errors import DistillError
from kdgraft_mm.replaying import VIEW, ReplayViews, replay


class Draws(Dataset):
    """Samples that are three random numbers, of the three generators from which pipelines draw."""

    def __init__(self, size=5):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return {"inputs": torch.tensor([float(index), *drawn]), "data_samples": BaseDataElement()}

    def get_data_info(self, index):
        return {"index": index}


def loader(sampler=DefaultSampler, size=5, batch=2, **settings):
    data = Draws(size)
    drawn = BatchSampler(sampler(data, **settings), batch, drop_last=False)
    return DataLoader(data, batch_sampler=drawn, collate_fn=list)


def seen(given, count=None):
    found = {}
    for place, batch in enumerate(given):
        for sample in batch:
            view = sample["data_samples"].metainfo[VIEW]
            assert torch.equal(found.setdefault(view, sample["inputs"]), sample["inputs"])
        if count is not None and place + 1 == count:
            break
    return found


def test_an_image_has_another_view_in_each_pass_and_the_same_one_in_each_run():
    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        given = loader(seed=seed)
        replay(given, None, 0)
        views = {}
        for epoch in range(3):
            given.batch_sampler.sampler.set_epoch(epoch)
            views |= seen(given)
        assert sorted(views) == [(view, index) for view in range(3) for index in range(5)]
        runs.append(views)
    assert all(torch.equal(runs[0][view], runs[1][view]) for view in runs[0])
    numbers = [float(value) for inputs in runs[0].values() for value in inputs[1:]]
    assert len(set(numbers)) == 45
    assert all(int(inputs[0]) == index for (_, index), inputs in runs[0].items())


def test_other_seeds_give_other_views():
    found = []
    for seed in (0, 1):
        given = loader(seed=0)
        replay(given, None, seed)
        found.append(seen(given))
    assert not any(torch.equal(found[0][view], found[1][view]) for view in found[0])


def test_what_the_run_draws_is_as_without_views():
    given = loader(seed=0)
    replay(given, None, 0)
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = float(torch.rand(())), random.random(), float(np.random.rand())
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    given.dataset[1], given.dataset[8]
    assert (float(torch.rand(())), random.random(), float(np.random.rand())) == expected


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_sampler_without_an_end_counts_on_all_processes(ranks):
    found = []
    for rank in range(ranks):
        given = loader(InfiniteSampler, seed=4)
        sampler = given.batch_sampler.sampler
        sampler.rank, sampler.world_size, sampler.indices = rank, ranks, None
        sampler.indices = sampler._indices_of_rank()
        replay(given, None, 0)
        found += [place for batch, _ in zip(given.batch_sampler, range(30 // ranks), strict=False) for place in batch]
    passes = [divmod(place, 5) for place in sorted(found)][:30]
    assert passes == [(view, index) for view in range(6) for index in range(5)]  # each image once a pass


@pytest.mark.skipif(not hasattr(InfiniteSampler, "skip"), reason="this mmengine cannot skip")
def test_a_resumed_sampler_goes_on_in_its_pass():
    whole, resumed = loader(InfiniteSampler, seed=4), loader(InfiniteSampler, seed=4)
    for given in (whole, resumed):
        replay(given, 3, 0)
    resumed.batch_sampler.sampler.skip(8)
    places = [batch for batch, _ in zip(whole.batch_sampler, range(20), strict=False)]
    again = [batch for batch, _ in zip(resumed.batch_sampler, range(16), strict=False)]
    assert again == places[4:] and {place // 5 for batch in again for place in batch} == {0, 1, 2}
    assert not hasattr(loader().batch_sampler.sampler, "skip")


def test_passes_beyond_the_views_begin_again():
    given = loader(seed=0)
    replay(given, 2, 0)
    views = []
    for epoch in range(4):
        given.batch_sampler.sampler.set_epoch(epoch)
        views.append(seen(given))
    assert [{view for view, _ in found} for found in views] == [{0}, {1}, {0}, {1}]
    assert all(torch.equal(views[0][view], views[2][view]) for view in views[0])


def test_they_are_sent_to_workers_that_are_spawned():
    given = loader(seed=0)
    replay(given, 2, 7)
    data, sampler = pickle.loads(pickle.dumps((given.dataset, given.batch_sampler.sampler)))
    assert torch.equal(data[8]["inputs"], given.dataset[8]["inputs"]) and list(sampler) == list(
        given.batch_sampler.sampler
    )
    assert isinstance(data, Draws) and data.get_data_info(8) == {"index": 3}


def test_what_cannot_be_replayed_is_said():
    given = loader(seed=0)
    replay(given, 2, 7)
    replay(given, 2, 7)
    with pytest.raises(DistillError, match="two ReplayViews with other settings"):
        replay(given, 3, 7)
    endless = SimpleNamespace(dataset=iter([1]), batch_sampler=SimpleNamespace(sampler=[1]))
    with pytest.raises(DistillError, match="a list_iterator has none"):
        replay(endless, None, 0)
    for settings in (dict(views=0), dict(views=1.5), dict(seed=-1), dict(seed="run")):
        with pytest.raises(DistillError, match="ReplayViews"):
            ReplayViews(**settings)
