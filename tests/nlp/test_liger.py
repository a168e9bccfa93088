"""Liger's kernels: those that leave a forward in place are the user's, the one that replaces it is refused."""

from __future__ import annotations

import pytest
import torch

from kdgraft import DistillError
from kdgraft_nlp import DistillTrainer
from support import nlp as support

KERNELS = ("rope", "rms_norm", "swiglu", "cross_entropy", "fused_linear_cross_entropy")


def trainer_of(folder, **settings):
    return DistillTrainer(
        model=support.quiet(support.model("llama", seed=1)),
        teacher=support.model("llama", seed=2),
        terms=["ForwardKL"],
        args=support.arguments(folder, max_steps=2, **settings),
        train_dataset=support.samples(8, "causal"),
        data_collator=support.collate,
    )


@pytest.mark.parametrize("told", [None, {"rope": False}, {"fused_linear_cross_entropy": True}])
def test_a_forward_without_logits_is_refused(tmp_path, told):
    with pytest.raises(DistillError, match="use_liger_kernel replaces the student's forward"):
        trainer_of(tmp_path, use_liger_kernel=True, liger_kernel_config=told)


def test_a_fact_of_the_package_it_replaces_the_forward(tmp_path):
    liger = pytest.importorskip("liger_kernel.transformers")
    trainer = trainer_of(tmp_path)
    off = dict.fromkeys(KERNELS, False)
    liger._apply_liger_kernel_to_instance(model=trainer.model, **off)
    assert "forward" not in vars(trainer.model)
    liger._apply_liger_kernel_to_instance(model=trainer.model, **{**off, "fused_linear_cross_entropy": True})
    assert "forward" in vars(trainer.model)


def test_other_kernels_leave_the_distillation(tmp_path):
    """On a CPU no kernel runs: all are off, and the trainer goes the way of Liger all the same."""
    pytest.importorskip("liger_kernel")
    plain, through = (
        trainer_of(tmp_path, **told)
        for told in ({}, dict(use_liger_kernel=True, liger_kernel_config=dict.fromkeys(KERNELS, False)))
    )
    for one in (plain, through):
        one.train()
    assert through.state.log_history[0]["distill.forward_kl.loss"] > 0
    for name, value in plain.model.named_parameters():
        assert torch.equal(dict(through.model.named_parameters())[name], value)
