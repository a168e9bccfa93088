"""Tokens that learn on a real segmentor's own loss of its masked class scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kdgraft import WiringError
from kdgraft_seg import DistilledSegmentor
from support.seg import CLASSES, batch, build, distilled, losses_of, save_teacher, segmentor


def built(teacher, **settings):
    (term,) = DistilledSegmentor.expand(dict(type="maskd", pretrain=1))
    return build(distilled(segmentor(dropout=0.0), teacher, terms=[{**term, "name": "term", **settings}]))


def test_the_figure_is_the_loss_of_the_masked_scores(teacher):
    model, (inputs, samples) = built(teacher), batch(ignored=0.0)
    theirs = model.distiller.teacher.model
    (network,) = model.distiller.terms["term"].auxiliaries["network"].network
    with torch.no_grad():
        network.tokens.mul_(100)  # masks that differ from one another
    features = theirs.extract_feat(inputs)
    masked = network.masked(theirs.decode_head(features))[0]
    own = theirs.decode_head.loss_by_feat(masked, samples)
    whole = theirs.loss(inputs, samples)
    expected = theirs.parse_losses({**whole, **{f"decode.{key}": value for key, value in own.items()}})[0]
    found = losses_of(model, inputs, samples)
    torch.testing.assert_close(found["distill.term.task"], expected.detach())
    assert found["distill.term.loss"] == 0
    again = losses_of(model, inputs, samples)
    assert again["distill.term.loss"] > 0 and "distill.term.task" not in again


def test_labels_in_another_order_are_not_the_teachers(tmp_path):
    other = save_teacher(tmp_path / "teacher.pth", classes=CLASSES[::-1])
    features: dict[str, Any] = dict(tap="backbone[2]", adapter="auto")
    with pytest.raises(
        WiringError, match=r"term: first learns on the teacher's own loss, .*; set objective='features'$"
    ):
        built(other, **features).start_distilling(CLASSES)
    model = built(other, **features, objective="features")
    model.start_distilling(CLASSES)
    found = losses_of(model, *batch())
    assert "distill.term.unmasked" in found and "distill.term.task" not in found
