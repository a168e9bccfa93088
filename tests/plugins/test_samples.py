"""Terms on the relations between samples: one vector per sample, padding, processes, mistakes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from kdgraft import Batch, Distiller, DistillError, Ensemble, Teacher, WiringError
from kdgraft.pooling import first_of_each, mean_of_each
from support import sample_ranks
from support.processes import found_by_two
from support.samples import EVERY, IMAGES, SIZES, Pointwise, Spread, distiller, steps
from support.tensors import gradients

every = pytest.mark.parametrize("name", EVERY)


# --- pooling


def test_means_by_hand():
    maps = torch.tensor([[[[1.0, 3.0], [5.0, math.inf]]], [[[2.0, 2.0], [2.0, 2.0]]]])
    weight = torch.tensor([[[1.0, 1.0], [2.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    vectors, present = mean_of_each(maps, weight)
    assert vectors.tolist() == [[3.5], [0.0]]  # (1 + 3 + 2 · 5) / 4
    assert present.tolist() == [True, False]
    assert mean_of_each(maps[1:].half(), None)[0].dtype is torch.float32


def test_means_and_first_tokens_of_packed_texts():
    states = torch.arange(8.0).reshape(2, 4, 1)
    texts = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 3]])
    real = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0]])
    vectors, present = mean_of_each(states, real.float(), texts)
    assert vectors[:, 0].tolist() == [0.5, 3.0, 5.0, 0.0]
    assert present.tolist() == [True, True, True, False]
    assert first_of_each(states, real.bool(), texts)[:, 0].tolist() == [0.0, 3.0, 4.0]


# --- what counts


def test_the_loss_by_hand():
    model = distiller("Spread")
    ours, theirs = (net.mix(IMAGES[0]).mean((2, 3)) for net in (model.student, model.teacher.model))
    s, t = ((x - x.mean(0)).square().sum() / 4 for x in (ours, theirs))
    torch.testing.assert_close(model(IMAGES[0]).loss, (s - t).square())


def first_loss_on(name: str, samples: torch.Tensor, example: torch.Tensor, **settings: Any) -> Any:
    """The loss and gradients, in float64, of the second of two equal steps, as a memory is empty in the first."""
    model = distiller(name, example, **settings.pop("term", {})).double()
    samples = samples.double()
    for _ in range(2):
        model.zero_grad()
        out = model(samples, batch=Batch(**settings))
        out.loss.backward()
    return out.loss.detach(), gradients(model)


@every
def test_padding_changes_nothing(name: str):
    images = IMAGES[0][:, :, :4, :3]
    padded = torch.full((4, 3, 6, 5), 1e4)
    padded[:, :, :4, :3] = images
    found = first_loss_on(name, padded, images, padded_size=(6, 5), image_sizes=[(4, 3)] * 4)
    expected = first_loss_on(name, images, images)
    torch.testing.assert_close(found, expected)
    assert expected[0] != 0


@every
@pytest.mark.parametrize("pool", ["mean", "first"])
@pytest.mark.parametrize("left", [False, True])
def test_padded_tokens_change_nothing(name: str, pool: str, left: bool):
    words = IMAGES[0].flatten(2).transpose(1, 2)[:, :5]
    padded = torch.full((4, 8, 3), 9.0)
    place = slice(3, 8) if left else slice(0, 5)
    padded[:, place] = words
    tokens = torch.zeros(4, 8, dtype=torch.bool)
    tokens[:, place] = True
    term = dict(term=dict(pool=pool))
    torch.testing.assert_close(
        first_loss_on(name, padded, words, tokens=tokens, **term),
        first_loss_on(name, words, words, **term),
    )


@every
def test_a_sample_without_a_position_is_left_out(name: str):
    valid = torch.ones(4, 6, 5, dtype=torch.bool)
    valid[2] = False
    found = first_loss_on(name, IMAGES[0], IMAGES[0], valid=valid)
    torch.testing.assert_close(found, first_loss_on(name, IMAGES[0][[0, 1, 3]], IMAGES[0]))


@every
@pytest.mark.parametrize("samples", [0, 1])
def test_too_few_samples_to_relate(name: str, samples: int):
    valid = torch.zeros(4, 6, 5, dtype=torch.bool)
    valid[:samples] = True
    loss, slopes = first_loss_on(name, IMAGES[0], IMAGES[0], valid=valid)
    assert loss.isfinite()
    assert all(slope.isfinite().all() for slope in slopes.values())


def test_other_regions_weigh_the_positions():
    boxes = [torch.tensor([[0.0, 0.0, 2.0, 2.0]])] * 4
    inside = IMAGES[0].clone()
    inside[:, :, 2:] = inside[:, :, :, 2:] = 7.0
    settings = dict(padded_size=(6, 5), boxes=boxes, term=dict(region="foreground"))
    found = first_loss_on("Spread", IMAGES[0], IMAGES[0], **settings)
    torch.testing.assert_close(first_loss_on("Spread", inside, IMAGES[0], **settings), found)


def test_grids_and_widths_may_differ_and_vectors_are_taken_as_they_are():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Flatten(), nn.LazyLinear(5))
    teacher = nn.Sequential(nn.Conv2d(3, 7, 1), nn.Flatten(), nn.LazyLinear(9))
    student(IMAGES[0]), teacher(IMAGES[0])
    model = Distiller(student, teacher, [Spread(["0", "2"])], IMAGES[0])
    assert [row.region for row in model.rows] == ["all", "–"]
    term = Spread("0")
    present = torch.ones(4, dtype=torch.bool)
    maps, vectors = (
        term.compare(*pair, present)
        for pair in (
            [net[0](IMAGES[0]).mean((2, 3)) for net in (student, teacher)],
            [net(IMAGES[0]) for net in (student, teacher)],
        )
    )
    torch.testing.assert_close(model(IMAGES[0]).loss, (maps + vectors) / 2)


# --- processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return found_by_two("sample_ranks", tmp_path_factory.mktemp("ranks"))


@every
def test_two_processes_are_one(name: str, ranks: list[dict[str, Any]]):
    whole = steps(name, slice(0, 4))
    assert any(loss != 0 for loss, _ in whole)
    for step, (loss, slopes) in enumerate(whole):
        found = [rank[name][step] for rank in ranks]
        torch.testing.assert_close((found[0][0] + found[1][0]) / 2, loss)
        for rank in found:
            torch.testing.assert_close(rank[1], slopes, rtol=1e-4, atol=1e-6)


def test_flattened_maps_lie_on_the_largest_grid_of_all_processes(ranks: list[dict[str, Any]]):
    # The second process has one image, which is not padded there.
    for step, (loss, slopes) in enumerate(steps("SimilarityPreserving", slice(0, 4), pool="flat")):
        assert loss > 0
        for found in (rank["flat"][step] for rank in ranks):
            torch.testing.assert_close(found[0], loss)
            torch.testing.assert_close(found[1], slopes, rtol=1e-4, atol=1e-6)


def test_rows_of_unequal_number_are_gathered(ranks: list[dict[str, Any]]):
    assert sample_ranks.SHARES[0].stop == 3
    for gathered, _, numbers in (rank["rows"] for rank in ranks):
        assert gathered.tolist() == [[1.0, 1.0], [1.0, 1.0]]
        assert numbers.tolist() == [0, 0, 1]
    # The gradients of both processes' losses: 1 + 2 times each row's factor.
    assert ranks[0]["rows"][1].tolist() == [[3.0, 3.0], [30.0, 30.0]]
    assert ranks[1]["rows"][1].shape == (0, 2)


# --- mistakes


@pytest.mark.parametrize(
    ("example", "settings", "message"),
    [
        (IMAGES[0], dict(tap=None), "Spread needs a tap, or both student_tap and teacher_tap"),
        (IMAGES[0], dict(pool="max"), "Spread: pool must be one of mean, first, flat, got 'max'"),
        (IMAGES[0], dict(pool="first"), r"mix \(4, 4, 6, 5\) gives no vector per sample; tap states \(B, L, C\)"),
        (IMAGES[0], dict(pool="first", region="foreground"), "pool='first' takes one token whatever the region"),
        (IMAGES[0], dict(region="inside"), "no region is called 'inside'"),
        (IMAGES[0, 0], dict(region="foreground"), "cannot place the positions of mix"),
    ],
)
def test_mistakes(example: torch.Tensor, settings: dict[str, Any], message: str):
    example = example.transpose(0, -1) if example.ndim == 3 else example
    with pytest.raises(DistillError, match=message):
        Distiller(Pointwise(4), Pointwise(6), [Spread(**{"tap": "mix", **settings})], example)


def test_both_models_must_read_the_same_samples():
    class Twice(Pointwise):
        def forward(self, x):
            return super().forward(torch.cat([x, x]))

    with pytest.raises(WiringError, match=r"mix \(4, 4, 6, 5\) and mix \(8, 6, 6, 5\) must hold the same samples"):
        Distiller(Pointwise(4), Twice(6), [Spread("mix")], IMAGES[0])


def test_relations_of_an_ensemble_are_a_mean_of_losses():
    torch.manual_seed(3)
    members = dict(a=Teacher(Pointwise(6)), b=Teacher(Pointwise(7)), both=Ensemble(["a", "b"], weights=[3, 1]))
    terms = [Spread("mix", source=name, name=name) for name in ("both", "a", "b")]
    found = Distiller(Pointwise(4), None, terms, IMAGES[0], teachers=members)(IMAGES[0]).losses
    for name, weight in (("a", 0.75), ("b", 0.25)):
        torch.testing.assert_close(found[f"distill.both_from_{name}.loss"], weight * found[f"distill.{name}.loss"])


def test_sizes_cover_what_is_tested():
    assert len(SIZES) == IMAGES.shape[1]
    assert len(set(SIZES)) == 4
