"""``DistilledDetector``: the model type of a config that distils a detector of MMDetection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmdet.models.dense_heads import condinst_head
from mmdet.models.detectors import SemiBaseDetector
from mmdet.models.detectors.single_stage_instance_seg import SingleStageInstanceSegmentor
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData
from torch import Tensor

from kdgraft.batch import Batch
from kdgraft.engine import Engine
from kdgraft.errors import WiringError
from kdgraft_mm.graft import Graft
from kdgraft_mm.resolution import Resolution
from kdgraft_mm.views import image_sizes

from .dense import anchor_levels
from .heads import reads_classes
from .reader import DetReader
from .regions import enclosing_boxes
from .registry import RECIPES, TERMS
from .resolution import reduced_sample
from .rois import REPLAY, check_masks, check_samplers


@contextmanager
def _alone() -> Iterator[None]:
    """Keep CondInst's loss from communicating between processes: it runs for its side effects, also in the dry run on a CPU."""
    before = condinst_head.reduce_mean
    condinst_head.reduce_mean = lambda tensor: tensor
    try:
        yield
    finally:
        condinst_head.reduce_mean = before


@MODELS.register_module()
class DistilledDetector(Graft):
    """A detector that learns from a teacher; an instance of the student's own class.

    In a config::

        custom_imports = dict(imports=['kdgraft_det'])
        model = dict(
            type='DistilledDetector', student=_base_.model.type,
            teacher=dict(config='mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py', checkpoint='teacher.pth'),
            recipe='ld')

    The arguments are those of :meth:`kdgraft_mm.graft.Graft.build`.
    """

    _models = MODELS
    _terms = TERMS
    _recipes = RECIPES
    _reader = DetReader
    _fields = frozenset({"boxes", "labels", "image_sizes"})
    _replay = REPLAY
    _reads_classes = staticmethod(reads_classes)
    _scales = True

    @classmethod
    def _example_samples(cls, size: int) -> list[DetDataSample]:
        shape = (size, size)
        meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape, scale_factor=(1.0, 1.0))
        sample = DetDataSample(metainfo=meta)
        first, last = size // 4, size - size // 4
        mask = np.zeros((1, size, size), dtype=np.uint8)
        mask[:, first:last, first:last] = 1
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor([[float(first)] * 2 + [float(last)] * 2]),
            labels=torch.zeros(1, dtype=torch.long),
            masks=BitmapMasks(mask, *shape),
        )
        return [sample]

    @classmethod
    def _raw_outputs(cls, model: Any, inputs: Tensor, samples: Any) -> Any:
        if not isinstance(model, SingleStageInstanceSegmentor) or not model.with_bbox:
            return super()._raw_outputs(model, inputs, samples)
        # Masks are predicted for the positives of the box head, which only its loss finds. The host's own code for these outputs
        # runs the box head twice, but once in training.
        features = model.extract_feat(inputs)
        with _alone():
            model.bbox_head.loss(features, samples)
        return model.mask_head(features, model.bbox_head.get_positive_infos())

    @classmethod
    def _check_student(cls, student: Any) -> None:
        if isinstance(student, SemiBaseDetector):
            raise WiringError(
                f"a {type(student).__name__} trains on several views at once and cannot be the student; distil its detector alone"
            )

    @classmethod
    def _check_wired(cls, student: Any, engine: Engine) -> None:
        if engine.replays():
            check_samplers(student.roi_head)
            check_masks(student.roi_head, engine)

    def _batch(self, inputs: Tensor, data_samples: Any, model: Any = None) -> Batch:
        batch = super()._batch(inputs, data_samples, model)
        batch.boxes = [enclosing_boxes(sample.gt_instances.bboxes) for sample in data_samples]
        batch.labels = [sample.gt_instances.labels for sample in data_samples]
        batch.extra["base_anchors"] = anchor_levels(self if model is None else model)
        return batch

    def _reduced(self, inputs: Tensor, data_samples: Any, resolution: Resolution) -> tuple[Tensor, Any]:
        small = resolution.student_inputs(inputs, image_sizes(data_samples))
        padded = (small.shape[-2], small.shape[-1])
        return small, [reduced_sample(sample, resolution, padded, self.data_preprocessor) for sample in data_samples]
