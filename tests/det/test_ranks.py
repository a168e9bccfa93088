"""Several processes: the distillation gradient of two ranks of two images is that of one batch of four."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from mmengine.config import ConfigDict

from kdgraft_mm.run import _OnCPUs
from support import det_ranks
from support.det import build, detector, distilled, losses, raw_batch, runner_config, save_plain, save_teacher
from support.det_zoo import zoo
from support.mm import run
from support.processes import found_by_two, launched, launchers
from support.tensors import assert_same


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, teacher_checkpoint):
    """What each of two gloo processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    for kind in {det_ranks.kind_of(term) for term in det_ranks.ON_PROPOSALS}:
        save_teacher(Path(f"{teacher_checkpoint}.{kind}"), det_ranks.without_dense_head(kind, width=6))
    return found_by_two("det_ranks", folder, teacher_checkpoint, host="mmdet")


@pytest.fixture(scope="module")
def whole_batch(teacher_checkpoint):
    """The same on the whole batch, computed once for each term."""
    return cache(lambda term: det_ranks.gradients_of(teacher_checkpoint, term))


@pytest.mark.parametrize("batch", list(det_ranks.BATCHES))
@pytest.mark.parametrize("term", [*det_ranks.TERMS, *det_ranks.ON_PROPOSALS, *det_ranks.WITH_A_PEER])
def test_two_ranks_are_one_batch(two_ranks, whole_batch, term, batch):
    whole = whole_batch(term)[batch]
    first, second = (ranks[term][batch] for ranks in two_ranks)
    # The mean over the ranks, as DDP takes it of gradients and mmengine of what it logs.
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, whole["loss"], rtol=1e-5, atol=1e-9)
    assert whole["loss"] > 0
    assert_same(first["gradients"], second["gradients"])
    assert first["gradients"].keys() == whole["gradients"].keys()
    # Some gradients are 0 but for rounding, as of a bias in front of an alignment.
    rounding = 1e-6 * max(gradient.abs().max().item() for gradient in whole["gradients"].values())
    for name, gradient in whole["gradients"].items():
        close = 1e-4 * gradient.abs().max().item() + rounding + 1e-9
        torch.testing.assert_close(
            first["gradients"][name], gradient, rtol=1e-3, atol=close, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_hosts_own_loss_is_left_as_it_scales_itself(two_ranks, whole_batch):
    # GFL divides its box losses by the mean over ranks of the sum of scores, but by no less than 1: a student that is not sure
    # of anything yet (sum below 1) gets half of the one-batch loss on two ranks. The classes are scaled right.
    whole = whole_batch("layer")["unequal"]["host"]
    ranks = [found["layer"]["unequal"]["host"] for found in two_ranks]
    mean = {name: (ranks[0][name] + ranks[1][name]) / 2 for name in whole}
    assert mean["loss_cls"] == pytest.approx(whole["loss_cls"], rel=1e-4)
    assert mean["loss_bbox"] == pytest.approx(whole["loss_bbox"] / 2, rel=1e-4)


def test_roi_heads_divide_their_own_losses_by_the_proposals_of_each_rank(two_ranks, whole_batch):
    # The mean over ranks of means over unlike numbers of proposals is not the mean over all; it is left as the host has it.
    whole = whole_batch("roi_boxes")["one sided"]["host"]
    ranks = [found["roi_boxes"]["one sided"]["host"] for found in two_ranks]
    assert ranks[1]["loss_bbox"] == 0  # no object there
    mean = (ranks[0]["loss_bbox"] + ranks[1]["loss_bbox"]) / 2
    assert mean != pytest.approx(whole["loss_bbox"], rel=1e-3)


@pytest.fixture
def config(tmp_path, scenes, teacher_model, teacher_checkpoint):
    """A config file of two iterations in which four images are one batch, or one share of it on each of two processes."""

    def write(batch_size):
        student = detector(frozen_bn=True)
        # Sure enough of its classes for GFL to scale its own box losses alike on one and on two processes.
        sure = build(student)
        torch.nn.init.zeros_(sure.bbox_head.gfl_cls.bias)
        model = distilled(student, teacher_model, teacher_checkpoint, recipe="ld")
        found = runner_config(
            model,
            scenes,
            tmp_path / f"of{batch_size}",
            iters=2,
            batch_size=batch_size,
            load_from=save_plain(tmp_path / "sure.pth", sure),
        )
        path = tmp_path / f"of{batch_size}.py"
        found.dump(path)
        return path, found

    return write


@pytest.mark.slow
@launchers
def test_a_launcher_trains_on_two_processes_as_on_one(tmp_path, config, launcher):
    launched(launcher, config(2)[0], tmp_path / "two")
    one = run(config(4)[1])
    two = torch.load(tmp_path / "two" / "iter_2.pth", weights_only=False)["state_dict"]
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_norms_over_all_processes_are_norms_over_ones_own_images_on_cpus(monkeypatch):
    # RTMDet makes SyncBN of its norms by itself, whatever its config says.
    monkeypatch.setattr("mmdet.models.detectors.rtmdet.get_world_size", lambda: 2)
    entry = ConfigDict(zoo("RTMDet"))
    entry.backbone.norm_cfg.type = "SyncBN"
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in build(entry).modules())
    model = object.__new__(_OnCPUs).build_model(entry)
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules())
    assert all(value.isfinite() for value in losses(model, raw_batch()).values())


@pytest.mark.slow
def test_a_detector_that_makes_syncbn_of_its_norms_trains_on_two_cpu_processes(tmp_path, scenes):
    teacher = zoo("RTMDet", width=6, channels=12)
    checkpoint = save_teacher(tmp_path / "teacher.pth", teacher)
    model = distilled(zoo("RTMDet"), teacher, checkpoint, terms=[dict(type="FeatureImitation", tap="neck[*]")])
    path = tmp_path / "rtmdet.py"
    runner_config(model, scenes, tmp_path / "work", iters=2, batch_size=2, sync_bn="torch").dump(path)
    launched(["torch.distributed.run", "--nproc_per_node", "2"], path, tmp_path / "two")
    assert (tmp_path / "two" / "iter_2.pth").is_file()
