"""Two processes are one: the distillation gradient of unequal shares equals that of the whole batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kdgraft import distributed
from kdgraft.distributed import SharedRandom, gather_over_ranks, sum_over_ranks, total_over_ranks, world_size
from support import distiller_ranks
from support.processes import found_by_two

RANKS = 2
WHOLE = slice(0, 4)
SCHEMES = {"near": "near_the_boundary", "generated": "generators", "balanced": "balanced"}
"""The functions of ``support.distiller_ranks`` by the names of their results."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of the two processes saw, by which of them had the infinite term."""
    return found_by_two("distiller_ranks", tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return distiller_ranks.steps(WHOLE, broken_on=None, distributed=False)


def test_random_numbers_of_rows_are_those_of_splitmix64():
    random = SharedRandom()
    random.load(torch.Generator().manual_seed(3).get_state())
    found = random.of_rows((50, 4), torch.device("cpu"))
    seed, whole = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(3))), (1 << 64) - 1
    for place, number in enumerate(found.flatten().tolist(), 1):
        mixed = (place * 0x9E3779B97F4A7C15 + seed) & whole
        mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) & whole
        mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & whole
        assert number == (mixed ^ mixed >> 31) & ((1 << 62) - 1)
    many = random.of_rows((20000, 1), torch.device("cpu")) / 2.0**62
    assert abs(many.mean() - 0.5) < 0.01 and abs(many.var() - 1 / 12) < 0.002


@pytest.mark.parametrize("step", [0, 1])
def test_gradients_are_those_of_the_one_batch(results: list[dict], whole: dict[str, Any], step: int):
    expected = whole["gradients"][step]
    for rank in range(RANKS):
        found = results[rank][None]["gradients"][step]
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("step", [0, 1])
def test_the_mean_of_the_losses_is_that_of_the_one_batch(results: list[dict], whole: dict[str, Any], step: int):
    for name, expected in whole["losses"][step].items():
        shares = [results[rank][None]["losses"][step][name] for rank in range(RANKS)]
        torch.testing.assert_close(sum(shares) / RANKS, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("average", [False, True])
def test_students_that_teach_each_other_learn_what_they_would_on_one_process(results: list[dict], average: bool):
    expected = distiller_ranks.students(WHOLE, average, distributed=False)
    found = [result["students"][average] for result in results]
    for name, value in expected["losses"].items():
        torch.testing.assert_close(sum(one["losses"][name] for one in found) / RANKS, value, rtol=1e-5, atol=1e-7)
    assert len({name.split(".")[1] for name in expected["gradients"] if name.startswith("peers")}) == 2
    for one in found:
        assert one["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            torch.testing.assert_close(one["gradients"][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_schemes_within_the_step_are_one(results: list[dict], scheme: str):
    one = getattr(distiller_ranks, SCHEMES[scheme])(WHOLE, distributed=False)
    for step in (0, 1):
        for name, expected in one["losses"][step].items():
            shares = [found[scheme]["losses"][step][name] for found in results]
            torch.testing.assert_close(sum(shares) / RANKS, expected, rtol=1e-4, atol=1e-6)
            assert not name.endswith(".loss") or expected != 0
        for found in results:
            assert found[scheme]["gradients"][step].keys() == one["gradients"][step].keys()
            for name, gradient in one["gradients"][step].items():
                torch.testing.assert_close(found[scheme]["gradients"][step][name], gradient, rtol=1e-3, atol=1e-6)


def test_weights_by_the_share_of_the_gradient_are_those_of_the_one_batch(results: list[dict]):
    expected = distiller_ranks.balanced(WHOLE, distributed=False)["weights"]
    found = [one["balanced"]["weights"] for one in results]
    assert found[0] == found[1] == pytest.approx(expected, rel=1e-4)
    # Each process by its own gradients would find others.
    alone = [distiller_ranks.balanced(share, distributed=False)["weights"] for share in distiller_ranks.SHARES]
    assert all(abs(one["hinted"] / expected["hinted"] - 1) > 0.01 for one in alone)


def test_the_shares_are_unequal_enough_to_tell(results: list[dict]):
    # Each process dividing by its own count would give other gradients: the second has one image of four, no box at all,
    # and one label of three.
    alone = [
        distiller_ranks.steps(share, broken_on=None, distributed=False)["gradients"][0]
        for share in distiller_ranks.SHARES
    ]
    wrong = {name: sum(g[name] for g in alone) / RANKS for name in alone[0]}
    right = results[0][None]["gradients"][0]
    assert (wrong["student.trunk.0.weight"] - right["student.trunk.0.weight"]).abs().max() > 1e-2
    assert results[1][None]["losses"][0]["distill.boxes.loss"] == 0


def test_soft_targets_of_unequal_shares_by_hand(results: list[dict]):
    # KL at T = 4 of each of the four images, their sum divided by 4; a process reports its own share of it times 2.
    model = distiller_ranks.distiller(None)
    student, teacher = model.student(distiller_ranks.IMAGES), model.teacher.model(distiller_ranks.IMAGES)
    p, q = (torch.softmax(x / 4, 1) for x in (teacher, student))
    items = 16 * F.kl_div(q.log(), p, reduction="none").sum(1).detach()
    for rank, share in enumerate(distiller_ranks.SHARES):
        torch.testing.assert_close(results[rank][None]["losses"][0]["distill.soft.loss"], 2 * items[share].sum() / 4)


def test_a_term_at_weight_0_keeps_its_parameters_in_the_graph(results: list[dict]):
    # DDP would refuse the second step if the first had left some out.
    first, second = results[1][None]["gradients"]
    names = [name for name in first if name.startswith("terms.later.")]
    assert len(names) == 2
    for name in names:
        assert torch.equal(first[name], torch.zeros_like(first[name]))
        assert second[name].abs().max() > 0


@pytest.mark.parametrize("broken_on", range(RANKS))
def test_a_term_infinite_on_one_process_is_dropped_by_all(results: list[dict], whole: dict[str, Any], broken_on: int):
    terms = distiller_ranks.distiller(None).terms
    for rank in range(RANKS):
        result = results[rank][broken_on]
        assert result["dropped"] == {**dict.fromkeys(terms, 0), "broken": 2}
        for step in range(2):
            assert result["losses"][step]["distill.broken.loss"] == 0
            assert result["losses"][step]["distill.broken.dropped"] == step + 1
            for name, gradient in result["gradients"][step].items():
                if name.startswith("terms.broken."):
                    assert torch.equal(gradient, torch.zeros_like(gradient))
                else:
                    torch.testing.assert_close(gradient, whole["gradients"][step][name], rtol=1e-4, atol=1e-6)


def test_a_total_is_the_same_on_all_with_the_gradient_of_all(results: list[dict]):
    # Of (1 + 2)² and (10 + 10)², of the first process once and of the second twice: 2 · total · (1 + 2).
    for found in (results[r]["exchanges"] for r in range(RANKS)):
        assert found["total"].tolist() == [3, 20]
        assert found["total_slope"].tolist() == [18, 120]


def test_what_is_gathered_comes_in_the_order_of_ranks_with_the_gradient_of_all(results: list[dict]):
    for own, found in enumerate(results[r]["exchanges"] for r in range(RANKS)):
        assert found["rank"] == own
        assert found["gathered"].tolist() == [[0] * 3, [0] * 3, [1] * 3, [1] * 3]
        assert found["gathered_labels"].tolist() == [0, 1]
        # Row i weighs i on the first process and 2 i on the second.
        assert found["gathered_slope"].tolist() == [[3 * (2 * own)] * 3, [3 * (2 * own + 1)] * 3]


def test_shared_random_numbers_are_one_stream_for_all(results: list[dict]):
    first, second = (results[r]["exchanges"] for r in range(RANKS))
    for a, b in zip(first["drawn"], second["drawn"], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(*first["drawn"])
    assert not torch.equal(first["apart"], second["apart"])
    assert torch.equal(first["after"], second["after"]) and torch.equal(first["state"], second["state"])
    assert first["untouched"] and second["untouched"]
    # It is the first process's stream, from what that one would have saved alone before the first draw.
    random = SharedRandom()
    random.load(first["saved"])
    assert torch.equal(torch.rand(3, generator=random.of_all_ranks()), first["drawn"][0])
    assert torch.equal(first["weight"], second["weight"])


def test_shared_random_numbers_go_on_where_they_were():
    torch.manual_seed(0)
    random = SharedRandom()
    state = random.state()
    drawn = [torch.rand(2, generator=random.of_all_ranks()) for _ in range(2)]
    random.load(state)
    assert torch.equal(torch.rand(2, generator=random.of_all_ranks()), drawn[0])
    other = SharedRandom()
    assert not torch.equal(other.state(), state)
    other.load(random.state())
    assert torch.equal(torch.rand(2, generator=other.of_all_ranks()), drawn[1])
    torch.manual_seed(0)
    assert torch.equal(SharedRandom().state(), state)  # made under the seed of the run
    assert copy.deepcopy(random) is random


def test_without_other_processes():
    values = torch.ones(2, requires_grad=True)
    assert (world_size(), distributed.rank()) == (1, 0)
    for exchange in (sum_over_ranks, total_over_ranks, gather_over_ranks):
        assert exchange(values) is values


def test_a_net_inside_wider_ones_learns_as_on_one_process(results: list[dict]):
    # The seeds of the two processes differ; the widths are those that the first one draws.
    expected = distiller_ranks.netaug(WHOLE, distributed=False)
    for found in (results[rank]["netaug"] for rank in range(RANKS)):
        for name, parameter in expected.items():
            torch.testing.assert_close(found[name], parameter, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
