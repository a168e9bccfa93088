"""On a GPU: mixed precision, and a teacher in bfloat16."""

from __future__ import annotations

import pytest
import torch

from support.det import EVERY_TERM, TERM_NAMES, build, detector, distilled, losses, raw_batch, runner_config
from support.mm import history, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device; run make test-gpu on a machine with one"
    ),
]


@pytest.mark.parametrize("precision", ["inherit", "bf16", "fp32"])
def test_bf16_autocast_keeps_losses_in_float32(teacher_model, teacher_checkpoint, precision):
    entry = distilled(detector(frozen_bn=True), teacher_model, teacher_checkpoint, **EVERY_TERM)
    entry["teacher"]["precision"] = precision
    exact = losses(build(entry).cuda(), raw_batch())
    with torch.autocast("cuda", torch.bfloat16):
        found = losses(build(entry).cuda(), raw_batch())
    for name in TERM_NAMES:
        value = found[f"distill.{name}.loss"]
        assert value.dtype == torch.float32 and value.is_cuda
        assert value.item() == pytest.approx(exact[f"distill.{name}.loss"].item(), rel=0.1), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_amp_trains_through_the_runner(tmp_path, scenes, teacher_model, teacher_checkpoint, dtype):
    entry = distilled(detector(), teacher_model, teacher_checkpoint, **EVERY_TERM)
    entry["teacher"]["precision"] = "bf16"
    wrapper = dict(type="AmpOptimWrapper", dtype=dtype, optimizer=dict(type="SGD", lr=0.01, momentum=0.9))
    runner = run(runner_config(entry, scenes, tmp_path, iters=4, optim_wrapper=wrapper))
    teacher = runner.model.distiller.teacher.model
    assert next(teacher.parameters()).is_cuda
    for name in TERM_NAMES:
        values = torch.tensor(history(runner, f"distill.{name}.loss"))
        assert torch.isfinite(values).all() and (values > 0).all()
    assert not any(runner.model.distiller.dropped.values())
