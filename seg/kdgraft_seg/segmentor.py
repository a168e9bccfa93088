"""``DistilledSegmentor``: the model type of a config that distils a segmentor of MMSegmentation."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor

from kdgraft.batch import Batch
from kdgraft.errors import check_flag
from kdgraft.regions import valid_positions
from kdgraft.taps import Tap
from kdgraft_mm.class_outputs import scores_classes
from kdgraft_mm.graft import Graft

from .mixing import check_mixable, mixed_batch
from .reader import SegReader, main_head, reads_scores, scores_pixels
from .registry import RECIPES, TERMS


@MODELS.register_module()
class DistilledSegmentor(Graft):
    """A segmentor that learns from a teacher; an instance of the student's own class.

    In a config::

        custom_imports = dict(imports=['kdgraft_seg'])
        model = dict(
            type='DistilledSegmentor', student=_base_.model.type,
            teacher=dict(config='mmseg::pspnet/pspnet_r101-d8_4xb2-80k_cityscapes-512x1024.py', checkpoint='teacher.pth'),
            recipe='skd')

    The arguments are those of :meth:`kdgraft_mm.graft.Graft.build`, and ``mixup``.
    """

    _models = MODELS
    _terms = TERMS
    _recipes = RECIPES
    _reader = SegReader
    _fields = frozenset({"labels", "valid", "image_sizes"})

    @classmethod
    def build(cls, *given: Any, mixup: bool = False, **settings: Any) -> Any:
        """Build the student as the host would, and graft the distiller onto it.

        Args:
            given, settings: see :meth:`kdgraft_mm.graft.Graft.build`.
            mixup: mix each image of a training batch with the one before it, by one share for the batch, uniform on [0, 1]; student
                and teacher see the same mixture (arXiv 2106.05237). Mixed images have no labels, so that the terms alone train:
                ``recipe='funmatch'``, or ``dict(type='TaskShare')`` beside other terms on predictions or features.
        """
        check_flag(cls.__name__, "mixup", mixup)
        grafted = super().build(*given, **settings)
        if mixup:
            check_mixable(grafted)
        grafted.distill_context.mixup = mixup
        return grafted

    def loss(self, inputs: Tensor, data_samples: Any) -> dict[str, Any]:
        """Return the losses of :meth:`kdgraft_mm.graft.Graft.loss`, with ``mixup`` those of mixed images."""
        if self.distill_context.mixup and self.training and torch.is_grad_enabled():
            inputs, data_samples = mixed_batch(inputs, data_samples, main_head(self).ignore_index)
        return super().loss(inputs, data_samples)

    @classmethod
    def _example_samples(cls, size: int) -> list[SegDataSample]:
        sample = SegDataSample(metainfo=dict(img_shape=(size, size), ori_shape=(size, size), pad_shape=(size, size)))
        sample.gt_sem_seg = PixelData(data=torch.zeros(1, size, size, dtype=torch.long))
        return [sample]

    @classmethod
    def _given(cls, student: Any) -> frozenset[str]:
        return cls._fields if scores_pixels(student) else cls._fields - {"labels"}

    @staticmethod
    def _reads_classes(model: Any, tap: Tap, tensor: Tensor) -> bool:
        return scores_pixels(model) and (reads_scores(tap) or scores_classes(model, tap, tensor))

    def _batch(self, inputs: Tensor, data_samples: Any, model: Any = None) -> Batch:
        batch, model = super()._batch(inputs, data_samples, model), self if model is None else model
        if scores_pixels(model):
            batch.labels = torch.cat([sample.gt_sem_seg.data for sample in data_samples])
            batch.valid = batch.labels != main_head(model).ignore_index
        else:
            batch.valid = torch.ones_like(inputs[:, 0], dtype=torch.bool)
        inside = None
        if batch.image_sizes is not None and batch.padded_size is not None:
            inside = valid_positions(batch.image_sizes, batch.padded_size, batch.valid[:, None])
        if inside is not None:
            batch.valid &= inside > 0
        batch.extra["images"] = inputs
        return batch
