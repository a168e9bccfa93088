"""Every term trains a real segmentor, ignored pixels take no part, and what segmentors lack is said."""

from __future__ import annotations

import pytest

from kdgraft import DistillError, FeatureTerm
from kdgraft_seg import TERMS
from kdgraft_seg.reader import SegReader
from support.methods import assert_falls, assert_shared, own_terms, sharing, spec, split, trained
from support.seg import batch, build, distilled, losses_of, segmentor
from support.seg_methods import SETTINGS

OWN = own_terms(TERMS)
USABLE, LACKING = split(TERMS, SegReader)


def student(kind, teacher):
    term = spec(OWN[kind], "backbone[2]", **SETTINGS.get(kind, {}))
    return build(distilled(segmentor(dropout=0.0, frozen_bn=True), teacher, terms=[term]))


@pytest.mark.parametrize("kind", USABLE)
def test_trains_a_segmentor(kind, teacher):
    model = student(kind, teacher)
    images = batch(6 if "samples" in OWN[kind].needs else 2, ignored=0.3)  # two samples have one relation
    assert_falls(trained(lambda: losses_of(model, *images), model.parameters()))
    if issubclass(OWN[kind], FeatureTerm):
        assert {row.region for row in model.distiller.rows} == {"all"}
        assert losses_of(student(kind, teacher), *batch(ignored=1.0))["distill.term.loss"] == 0


@pytest.mark.parametrize("kind", sharing(TERMS))
@pytest.mark.parametrize("share", [0.25, 0.0])
def test_takes_a_share_of_a_segmentor_s_losses(kind, share, teacher):
    settings = dict(dropout=0.0)
    terms = [dict(type=kind, name="term", share=share), "SoftTargets"]
    built, plain = build(distilled(segmentor(**settings), teacher, terms=terms)), build(segmentor(**settings))
    plain.load_state_dict(built.state_dict())
    assert_shared(losses_of(built, *batch()), losses_of(plain, *batch()), share)


@pytest.mark.parametrize("kind", LACKING)
def test_what_segmentors_lack_is_said(kind, teacher):
    with pytest.raises(DistillError) as caught:
        build(distilled(segmentor(), teacher, terms=[kind]))
    reasons = [reason for need, reason in SegReader.lacks.items() if need in OWN[kind].needs]
    assert any(str(caught.value).endswith(reason) for reason in reasons) and "\n" not in str(caught.value)
