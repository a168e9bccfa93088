"""MMDetection's own distillation of detectors, as a reference."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any


def mmdet_ld(student: Mapping[str, Any], teacher_config: Any, checkpoint: str) -> dict[str, Any]:
    """Build mmdet's ``KnowledgeDistillationSingleStageDetector`` with ``LDHead``: LD's main region (arXiv 2102.12252), as published.

    Args:
        student: the ``model`` entry of a plain GFL detector.
        teacher_config: the path of the teacher's config, or ``dict(model=…)``.
        checkpoint: the teacher's checkpoint.
    """
    model = copy.deepcopy(dict(student))
    model.update(
        type="KnowledgeDistillationSingleStageDetector",
        teacher_config=copy.deepcopy(teacher_config),
        teacher_ckpt=checkpoint,
    )
    loss = dict(type="KnowledgeDistillationKLDivLoss", loss_weight=0.25, T=10)
    model["bbox_head"] = dict(model["bbox_head"], type="LDHead", loss_ld=loss)
    return model
