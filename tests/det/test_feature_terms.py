"""Every term of the core on features trains a real detector: a new one is in the registry, and so here."""

from __future__ import annotations

import pytest

from kdgraft import TERMS, FeatureTerm, MapTerm
from support.det import build, detector, distilled, losses, raw_batch, save_teacher
from support.tensors import gradients

KINDS = [name for name in TERMS if issubclass(TERMS.get(name), FeatureTerm)]


@pytest.mark.parametrize("kind", KINDS)
def test_trains_on_the_pyramid(kind, tmp_path):
    teacher = detector(width=6, channels=12)
    term = dict(type=kind, tap="neck[*]", name="term")
    entry = distilled(detector(), teacher, save_teacher(tmp_path / "teacher.pth", teacher), terms=[term])
    model = build(entry)
    found = losses(model, raw_batch())["distill.term.loss"]
    found.backward()
    assert found.isfinite() and found > 0
    slopes = gradients(model)
    assert any(value.abs().sum() > 0 for name, value in slopes.items() if name.startswith("backbone"))
    assert len(model.distiller.rows) == len(model.neck.fpn_convs)
    assert issubclass(TERMS.get(kind), MapTerm) or "ConvAdapter 8→12" in model.distiller.rows[0].adapter
