"""``DistilledDetector``: what a config names to distil a detector of MMDetection."""

from __future__ import annotations

from typing import Any

from mmdet.models.detectors import SemiBaseDetector
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from torch import Tensor

from kdgraft.errors import WiringError
from kdgraft.regions import Batch
from kdgraft_mm.graft import Graft, GraftDistiller, image_sizes
from kdgraft_mm.resolution import Resolution
from kdgraft_mm.views import TeacherView

from .dense import anchor_levels
from .heads import reads_classes
from .regions import enclosing_boxes
from .registry import RECIPES, TERMS
from .resolution import reduced_sample
from .rois import REPLAY, check_masks, check_samplers


@MODELS.register_module()
class DistilledDetector(Graft):
    """A detector that learns from a teacher; an instance of the student's own class.

    In a config, eight lines::

        custom_imports = dict(imports=['kdgraft_det'])
        model = dict(
            type='DistilledDetector', student=_base_.model.type,
            teacher=dict(config='mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py', checkpoint='teacher.pth'),
            recipe='localization')

    The arguments are those of :meth:`kdgraft_mm.graft.Graft.build`.
    """

    _models = MODELS
    _terms = TERMS
    _recipes = RECIPES
    _fields = frozenset({"boxes", "labels", "image_sizes"})
    _replay = REPLAY
    _reads_classes = staticmethod(reads_classes)
    _scales = True

    @classmethod
    def _example_samples(cls, size: int) -> list[DetDataSample]:
        shape = (size, size)
        meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape, scale_factor=(1.0, 1.0))
        return [DetDataSample(metainfo=meta)]

    @classmethod
    def _distiller(
        cls, student: Any, teacher: Any, specs: list[Any], size: int | None
    ) -> tuple[GraftDistiller, TeacherView, Resolution | None]:
        if isinstance(student, SemiBaseDetector):
            raise WiringError(
                f"a {type(student).__name__} trains on several views at once and cannot be the student; distil its detector alone"
            )
        made = super()._distiller(student, teacher, specs, size)
        if made[0].replays:
            check_samplers(student.roi_head)
            check_masks(student.roi_head, made[0])
        return made

    def _batch(self, inputs: Tensor, data_samples: Any) -> Batch:
        batch = super()._batch(inputs, data_samples)
        batch.boxes = [enclosing_boxes(sample.gt_instances.bboxes) for sample in data_samples]
        batch.labels = [sample.gt_instances.labels for sample in data_samples]
        batch.extra["base_anchors"] = anchor_levels(self)
        return batch

    def _reduced(self, inputs: Tensor, data_samples: Any, resolution: Resolution) -> tuple[Tensor, Any]:
        small = resolution.student_inputs(inputs, image_sizes(data_samples))
        padded = (small.shape[-2], small.shape[-1])
        return small, [reduced_sample(sample, resolution, padded, self.data_preprocessor) for sample in data_samples]
