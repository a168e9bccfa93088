"""Terms on one vector per sample: pooling, embeddings, and scores of a query's candidates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdgraft import RECIPES, Batch, Distiller, DistillError, MarginMSE, SampleEmbeddings, WiringError
from kdgraft.pooling import first_of_each, last_of_each, mean_of_each
from kdgraft.registry import expand_recipe

# --- pooling


def pool(states, valid, how, texts=None):
    return {"mean": lambda *x: mean_of_each(*x)[0], "first": first_of_each, "last": last_of_each}[how](
        states, valid, texts
    )


def test_pooling_by_hand():
    states = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [9.0, 9.0]], [[5.0, 5.0], [7.0, 1.0], [2.0, 4.0]]])
    valid = torch.tensor([[True, True, False], [False, True, True]])
    for how, expected in (
        ("mean", [[2.0, 4.0], [4.5, 2.5]]),
        ("first", [[1.0, 2.0], [7.0, 1.0]]),
        ("last", [[3.0, 6.0], [2.0, 4.0]]),
    ):
        assert pool(states, valid, how).tolist() == expected
    assert pool(states, None, "last").tolist() == [[9.0, 9.0], [2.0, 4.0]]
    # Three texts in two rows: tokens 0 and 1, then 2, then the second row.
    texts, everything = torch.tensor([[0, 0, 1], [2, 2, 2]]), torch.ones(2, 3, dtype=torch.bool)
    assert pool(states, everything, "last", texts).tolist() == [[3.0, 6.0], [9.0, 9.0], [2.0, 4.0]]
    assert pool(states, everything, "first", texts).tolist() == [[1.0, 2.0], [9.0, 9.0], [5.0, 5.0]]


@pytest.mark.parametrize("how", ["mean", "first", "last"])
def test_what_does_not_count_reaches_neither_vector_nor_gradient(how):
    student, teacher, rows = Encoder(4), Encoder(4), torch.rand(3, 4, 3)
    valid = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]).bool()
    distiller = Distiller(student, teacher, [SampleEmbeddings("part", pool=how)], example=rows)
    seen = []
    for junk in (0.0, 1e30):
        filled = rows.masked_fill(~valid[..., None], junk).requires_grad_()
        loss = distiller(filled, batch=Batch(tokens=valid)).loss
        (slope,) = torch.autograd.grad(loss, filled)
        assert not slope[~valid].any() and slope[:2].any()
        seen.append(loss.item())
    assert seen[0] == seen[1]


# --- embeddings


class Encoder(nn.Module):
    """Hands on its input, times a parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.part = nn.Linear(3, width)

    def forward(self, x):
        return self.part(x)


def test_embeddings_are_the_mean_over_positions_that_count():
    student, teacher = Encoder(4), Encoder(4)
    states = torch.rand(2, 5, 3)
    tokens = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]).bool()
    distiller = Distiller(student, teacher, [SampleEmbeddings("part")], example=states)
    (value,) = distiller(states, batch=Batch(tokens=tokens)).losses.values()
    s, t = (torch.stack([m(states)[0, :2].mean(0), m(states)[1, :4].mean(0)]) for m in (student, teacher))
    torch.testing.assert_close(value, F.mse_loss(s, t))
    again = torch.where(tokens[..., None], states, torch.full_like(states, 1e9))
    (other,) = distiller(again, batch=Batch(tokens=tokens)).losses.values()
    assert torch.equal(value, other)


def test_embeddings_of_other_widths_by_cosine_and_the_last_token():
    student, teacher = Encoder(4), Encoder(6)
    states = torch.rand(2, 5, 3)
    term = SampleEmbeddings("part", loss="cosine", teacher_pool="last")
    distiller = Distiller(student, teacher, [term], example=states)
    assert [(row.adapter, row.region) for row in distiller.rows] == [("LinearAdapter 4→6", "mean / last")]
    (value,) = distiller(states).losses.values()
    mapped = distiller.terms["sample_embeddings"].adapters[0].project(student(states).mean(1))
    torch.testing.assert_close(value, 1 - F.cosine_similarity(mapped, teacher(states)[:, -1]).mean())


def test_a_sample_without_positions_counts_for_nothing():
    student, teacher = Encoder(4), Encoder(4)
    states = torch.rand(2, 5, 3)
    distiller = Distiller(student, teacher, [SampleEmbeddings("part", adapter="linear")], example=states)
    some = distiller(states, batch=Batch(tokens=torch.tensor([[1] * 5, [0] * 5]).bool()))
    one = distiller(states[:1], batch=Batch(tokens=torch.ones(1, 5, dtype=torch.bool)))
    torch.testing.assert_close(some.loss, one.loss)
    none = distiller(states, batch=Batch(tokens=torch.zeros(2, 5, dtype=torch.bool))).loss
    assert none.item() == 0 and none.requires_grad


# --- candidates


def margins(scores: torch.Tensor) -> torch.Tensor:
    return scores[0::2] - scores[1::2]


def test_a_cross_encoder_scores_pairs_in_consecutive_rows():
    student, teacher, rows = nn.Linear(3, 1), nn.Linear(3, 1), torch.rand(6, 3)
    (value,) = Distiller(student, teacher, [MarginMSE()], example=rows[:2])(rows).losses.values()
    torch.testing.assert_close(value, (margins(student(rows)) - margins(teacher(rows))).square().mean())


def test_a_bi_encoder_learns_from_a_cross_encoder():
    """Student: query, positive and negative as rows of vectors. Teacher: one row of three scores per query, of one width."""

    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.score = nn.Linear(3, 1)

        def forward(self, rows):
            return self.score(rows.view(-1, 3, 3)[:, 1:] + rows.view(-1, 3, 3)[:, :1]).flatten(0, 1)

    student, teacher, rows = nn.Linear(3, 5), Cross(), torch.rand(6, 3)
    (value,) = Distiller(student, teacher, [MarginMSE()], example=rows)(rows).losses.values()
    q, p, n = student(rows).view(2, 3, 5).unbind(1)
    expected = ((q * p).sum(1) - (q * n).sum(1) - margins(teacher(rows)).flatten()).square().mean()
    torch.testing.assert_close(value, expected)
    (cosine,) = Distiller(student, teacher, [MarginMSE(similarity="cosine")], example=rows)(rows).losses.values()
    both = F.cosine_similarity(q, p) - F.cosine_similarity(q, n)
    torch.testing.assert_close(cosine, (both - margins(teacher(rows)).flatten()).square().mean())


def test_several_negatives_in_a_row_and_in_rows():
    student, teacher, rows = nn.Linear(3, 4), nn.Linear(3, 4), torch.rand(2, 3)
    (value,) = Distiller(student, teacher, [MarginMSE(candidates=4)], example=rows)(rows).losses.values()
    parts = [(m(rows)[:, :1] - m(rows)[:, 1:]) for m in (student, teacher)]
    torch.testing.assert_close(value, F.mse_loss(*parts))


def test_scores_are_computed_in_float32_under_autocast():
    student, teacher, rows = nn.Linear(3, 5), nn.Linear(3, 5), 40 * torch.rand(3, 3)
    distiller = Distiller(student, teacher, [MarginMSE()], example=rows)
    with torch.autocast("cpu", torch.bfloat16):
        (value,) = distiller(rows).losses.values()
        s, t = ((m(rows).double().view(1, 3, 5)) for m in (student, teacher))
    a, b = ((x[:, :1] * x[:, 1:]).sum(-1) for x in (s, t))
    expected = ((a[:, 0] - a[:, 1]) - (b[:, 0] - b[:, 1])).square().mean()
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=0)


def test_mistakes_are_told_in_one_line():
    with pytest.raises(DistillError, match="candidates must be a whole number >= 2, got 1"):
        MarginMSE(candidates=1)
    with pytest.raises(DistillError, match="pool must be one of mean, first, last, got 'max'"):
        SampleEmbeddings("part", pool="max")
    with pytest.raises(DistillError, match="student_pool must be one of mean, first, last, got 'cls'"):
        SampleEmbeddings("part", student_pool="cls")
    with pytest.raises(DistillError, match="needs a tap"):
        Distiller(nn.Linear(3, 1), nn.Linear(3, 1), [SampleEmbeddings()], example=torch.rand(2, 3))
    rows = torch.rand(3, 3)
    distiller = Distiller(nn.Linear(3, 1), nn.Linear(3, 1), [MarginMSE()], example=rows[:2])
    with pytest.raises(DistillError, match="the student's 3 rows are no queries of 2 rows each"):
        distiller(rows)
    images, conv = torch.rand(2, 3, 4, 4), [nn.Conv2d(3, 4, 1) for _ in range(2)]
    with pytest.raises(WiringError, match=r"\(2, 4, 4, 4\) gives no vector per sample"):
        Distiller(*conv, [SampleEmbeddings("", pool="last")], example=images)


def test_the_acronym_is_the_term():
    assert expand_recipe("marginmse", RECIPES) == [{"type": "MarginMSE"}]
    assert expand_recipe(dict(type="embeddings", loss="cosine"), RECIPES) == [
        {"type": "SampleEmbeddings", "loss": "cosine"}
    ]
