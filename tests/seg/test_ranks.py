"""Several processes: the distillation gradient of two ranks of two images is that of one batch of four; so are critic and memory."""

from __future__ import annotations

import pytest
import torch

from support import seg_ranks
from support.processes import found_by_two, launched, launchers
from support.seg import config, distilled, segmentor
from support.tensors import assert_same

ADVERSARIES = ("wgan-gp", "lsgan", "hinge")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, teacher):
    """What each of two gloo processes found."""
    return found_by_two("seg_ranks", tmp_path_factory.mktemp("ranks"), teacher["checkpoint"], host="mmseg")


@pytest.fixture(scope="module")
def one_process(teacher):
    """The same on the whole batch, computed once for each term."""
    found = {}

    def of(term):
        if term not in found:
            found[term] = seg_ranks.steps(teacher, term)
        return found[term]

    return of


@pytest.mark.parametrize("term", list(seg_ranks.TERMS))
def test_two_ranks_are_one_batch(two_ranks, one_process, term):
    whole = one_process(term)
    ranks = [found[term] for found in two_ranks]
    for step in range(2):
        losses = [found["losses"][step]["distill.term.loss"] for found in ranks]
        expected = whole["losses"][step]["distill.term.loss"]
        # The mean over the ranks, as DDP takes it of gradients and mmengine of what it logs.
        # (A constant added to every score cancels in WGAN's loss: its gradient is rounding, of which Adam makes a whole step.)
        loose = 2e-3 if term == "wgan-gp" else 1e-6
        torch.testing.assert_close(sum(losses) / 2, expected, rtol=1e-4, atol=loose)
        assert expected != 0
        gradients = [found["gradients"][step] for found in (*ranks, whole)]
        assert gradients[0].keys() == gradients[2].keys()
        largest = max(float(gradient.abs().max()) for gradient in gradients[2].values())
        assert largest > 0
        for name, gradient in gradients[2].items():
            assert torch.equal(gradients[0][name], gradients[1][name]), name
            torch.testing.assert_close(
                gradients[0][name], gradient, rtol=2e-3, atol=1e-4 * largest, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("kind", ADVERSARIES)
def test_the_critic_is_the_one_process_critic_on_every_rank(two_ranks, one_process, kind):
    hidden = [found[kind]["state"]["hidden"]["term"]["critic"] for found in two_ranks]
    whole = one_process(kind)["state"]["hidden"]["term"]["critic"]
    assert_same(dict(hidden[0]["network"]), dict(hidden[1]["network"]))
    assert torch.equal(hidden[0]["random"], hidden[1]["random"])  # however many images count on each
    assert torch.equal(hidden[0]["random"], whole["random"])
    # Adam makes a whole step of a gradient that is rounding alone (the real masks' share cancels the fake ones'), so that single
    # weights may differ by one; the gradients (its first moment, of which nothing is kept) may not.
    for name, value in whole["network"].items():
        assert (hidden[0]["network"][name] - value).abs().max() < 5e-4 and (
            hidden[0]["network"][name] - value
        ).abs().median() < 2e-5
    moments = [[state["exp_avg"] for state in each["optimizer"]["state"].values()] for each in (hidden[0], whole)]
    largest = max(float(gradient.abs().max()) for gradient in moments[1])
    for ours, theirs in zip(*moments, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * largest)
    for name in ("gap", "critic"):
        shown = [found[kind]["losses"][1][f"distill.term.{name}"] for found in two_ranks]
        assert shown[0] == shown[1]
        torch.testing.assert_close(
            shown[0], one_process(kind)["losses"][1][f"distill.term.{name}"], rtol=1e-3, atol=1e-6
        )


def test_the_memory_is_the_one_process_memory_on_every_rank(two_ranks, one_process):
    ranks = [found["relations"]["state"]["terms"] for found in two_ranks]
    whole = one_process("relations")["state"]["terms"]
    assert_same(*({name: state[name] for name in ("term.pixels", "term.regions", "term.seen")} for state in ranks))
    assert torch.equal(ranks[0]["term.seen"], whole["term.seen"])
    for kind, name in enumerate(("term.pixels", "term.regions")):
        for label, seen in enumerate(whole["term.seen"][kind].tolist()):
            ours, theirs = (state[name][label, : min(seen, state[name].shape[1])] for state in (ranks[0], whole))
            apart = torch.cdist(ours, theirs)  # a process remembers its own pixels in an order of its own
            assert len(ours) and apart.min(0).values.max() < 1e-3 and apart.min(1).values.max() < 1e-3


def test_ranks_that_draw_anchors_and_ranks_that_need_not_stay_together(two_ranks):
    states = [found["few"]["state"] for found in two_ranks]
    assert_same(*(dict(state["terms"]) for state in states))
    assert torch.equal(*(state["hidden"]["term"]["random"] for state in states))
    assert states[0]["terms"]["term.seen"][0].max() > 12  # it went round


def test_dist_correlates_over_the_pixels_of_all_ranks(two_ranks, one_process, teacher):
    # Each rank alone would correlate within its own half: another loss, which the mean of the two does not give.
    alone = [
        seg_ranks.steps(teacher, "dist", share)["losses"][0]["distill.term.loss"]
        for share in (slice(0, 2), slice(2, 4))
    ]
    together = [found["dist"]["losses"][0]["distill.term.loss"] for found in two_ranks]
    assert abs(sum(alone) / 2 - sum(together) / 2) > 1e-3


@pytest.mark.parametrize("broken", range(2))
def test_a_critic_step_that_is_not_finite_on_one_rank_is_skipped_by_both(two_ranks, broken):
    found = [ranks["broken", broken] for ranks in two_ranks]
    for each in found:
        assert each["losses"][0]["distill.term.skipped"] == 1
        assert "distill.term.gap" not in each["losses"][0] and "distill.term.gap" in each["losses"][1]
        assert torch.isfinite(each["losses"][0]["distill.term.loss"])  # the student's own masks are fine
        assert "distill.term.dropped" not in each["losses"][0]
        assert {
            int(state["step"]) for state in each["state"]["hidden"]["term"]["critic"]["optimizer"]["state"].values()
        } == {1}
    assert_same(*(dict(each["state"]["hidden"]["term"]["critic"]["network"]) for each in found))


def test_a_checkpoint_before_a_terms_first_step_waits_for_nobody(two_ranks):
    state = two_ranks[0]["late"]["hidden"]["adversarial_mask"]["critic"]
    assert state["skipped"] == 0 and state["random"].dtype == torch.uint8


@pytest.mark.slow
@launchers
def test_a_launcher_trains_every_term_on_two_processes(tmp_path, scenes, teacher, launcher):
    from support.seg import EVERY_TERM

    path = tmp_path / "distilled.py"
    model = distilled(segmentor(), teacher, **EVERY_TERM)
    config(
        model,
        scenes,
        tmp_path / "work",
        iterations=2,
        custom_imports=dict(imports=["kdgraft_seg"]),
        find_unused_parameters=False,
    ).dump(path)
    launched(launcher, path, tmp_path / "two")
    assert (tmp_path / "two" / "iter_2.pth").is_file()
