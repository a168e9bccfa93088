"""Terms of born-again networks on models of Hugging Face: they replace the Trainer's loss."""

from __future__ import annotations

import pytest
import torch

from kdgraft_nlp import DistillTrainer
from support import nlp as support


@pytest.mark.parametrize("kind", ["CWTM", "DKPP"])
def test_the_trainers_loss_keeps_its_share(kind, tmp_path):
    student, teacher = (support.quiet(support.model("bert", width, 2, 4, seed=width)) for width in (16, 32))
    batch = support.collate(support.samples(6, support.TASKS["bert"][1]))
    own = student.train()(**batch).loss.detach()
    for share in (0.0, 0.25):
        term = dict(type=kind, hard_weight=share, name="term")
        trainer = DistillTrainer(model=student, teacher=teacher, terms=[term], args=support.arguments(tmp_path))
        total = trainer.compute_loss(trainer.model.train(), batch).detach()
        found = trainer.model.distill_link.last.losses["distill.term.loss"]
        assert found > 0
        torch.testing.assert_close(total, found + share * own)
        student = support.quiet(support.model("bert", 16, 2, 4, seed=16))
