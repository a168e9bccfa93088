"""Terms of born-again networks on detectors: they replace the loss of the classes and no other."""

from __future__ import annotations

import torch

from support.det import build, distilled, losses, raw_batch, save_teacher
from support.det_stages import staged


def test_the_class_loss_alone_is_replaced(tmp_path):
    teacher = staged("Faster R-CNN", width=6, channels=12)
    terms = [dict(type="CWTM", hard_weight=0.25), dict(type="DKPP", hard_weight=None)]
    entry = distilled(staged("Faster R-CNN"), teacher, save_teacher(tmp_path / "teacher.pth", teacher), terms=terms)
    built, plain = build(entry), build(staged("Faster R-CNN"))
    plain.load_state_dict(built.state_dict())
    found, own = (losses(model, raw_batch()) for model in (built, plain))
    assert found["distill.cwtm.loss"] > 0 and found["distill.dkpp.loss"] > 0
    torch.testing.assert_close(found["loss_cls"], 0.25 * own["loss_cls"])
    for name in ("loss_bbox", "loss_rpn_cls", "loss_rpn_bbox"):
        torch.testing.assert_close(found[name], own[name])
