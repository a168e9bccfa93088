"""Every term of the core on features trains a real segmentor, and ignored pixels take no part: a new one is in the registry, and so
here."""

from __future__ import annotations

import pytest

from kdgraft import TERMS, FeatureTerm, FocalGlobal, WiringError
from support.seg import batch, build, distilled, losses_of, segmentor

KINDS = [name for name in TERMS if issubclass(TERMS.get(name), FeatureTerm)]


@pytest.mark.parametrize("kind", KINDS)
def test_trains_on_features_where_pixels_count(teacher, kind):
    entry = distilled(segmentor(dropout=0.0), teacher, terms=[dict(type=kind, tap="backbone[2]", name="term")])
    if TERMS.get(kind) is FocalGlobal:
        with pytest.raises(WiringError, match="needs boxes around objects"):
            build(entry)
        return
    model = build(entry)
    found = losses_of(model, *batch(ignored=0.3))["distill.term.loss"]
    found.backward()
    assert found.isfinite() and found > 0
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.backbone.parameters())
    assert [row.region for row in model.distiller.rows] == ["all"]
    ignored = losses_of(build(entry), *batch(ignored=1.0))["distill.term.loss"]
    assert ignored == 0
