"""What the benchmark asks of MMSegmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from kdgraft.hosts import TrainedModel

from ..data.scenes import write_segmentation_set
from ..decisions import Decisions
from ..spec import Benchmark, Model
from .base import Dataset
from .efficientnet import with_efficientnet
from .mm import Collector, RunnerBench
from .seg_setup import BACKGROUND, DATA, SIZE, SegmentationSetup, draw_masks, own_set, scenes, segmentor

PIXELS = 2000
"""The pixels of a picture whose decisions are kept, drawn at random, the same for every model."""
REACH = 0.0075
"""The distance, in lengths of the picture's diagonal, within which boundaries match, as in Perazzi et al. (2016)."""
IGNORED = 255


class SegmentationBench(RunnerBench):
    """The benchmark's part of MMSegmentation."""

    name, scope = "seg", "mmseg"
    scores: ClassVar = {"mIoU": ("mIoU", 3), "mAcc": ("mAcc", 3), "boundary F": ("boundary F", 3)}
    models = ("fpn",)
    embedded = "digit scenes"
    picture = "masks"

    def dataset(self, benchmark: Benchmark) -> Dataset:
        if benchmark.data is not None:
            root = Path(benchmark.data)
            own_set(root)  # says what is missing
            return Dataset(root.name, root, root)
        if all(model.config is not None for model in (benchmark.teacher, *benchmark.students.values())):
            return Dataset("own data", None)
        return Dataset(self.embedded, write_segmentation_set(benchmark.out / "data", size=SIZE, **DATA))

    def setup(self, dataset: Dataset, settings: Mapping[str, Any] | None = None) -> SegmentationSetup:
        return scenes() if dataset.real is None else own_set(dataset.real)

    def small(self, model: Model, dataset: Dataset, classes: int) -> dict[str, Any]:
        told = self.known(model.settings, ("width", "channels", "background", "efficientnet"))
        background = told.get("background", None if dataset.real else BACKGROUND)
        made = segmentor(told.get("width", 8), told.get("channels", 24), classes, background)
        return with_efficientnet(made, told["efficientnet"]) if "efficientnet" in told else made

    def collector(self, dataset_meta: Mapping[str, Any]) -> Collector:
        return _Pixels(tuple(dataset_meta.get("classes", ())))

    def draw(self, models: Mapping[str, TrainedModel], dataset: Dataset, samples: Sequence[int], path: Path) -> None:
        opened, tested = self.all_open(models)
        with self.entered():
            draw_masks(opened, tested, samples, path)


class _Pixels(Collector):
    """Collects the classes of some pixels of each picture, and the boundary F-measure of all."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.boundaries: list[float] = []
        self._random = torch.Generator().manual_seed(0)

    def after_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        for sample in outputs or ():
            truth, predicted = sample.gt_sem_seg.data[0].cpu().long(), sample.pred_sem_seg.data[0].cpu().long()
            self.boundaries += boundary_f(truth.numpy(), predicted.numpy(), len(self.names))
            logits = sample.seg_logits.data.cpu().flatten(1).float()
            valid = (truth.flatten() != IGNORED).nonzero().flatten()
            chosen = valid[torch.randperm(len(valid), generator=self._random)[:PIXELS]]
            scores = logits[:, chosen]
            probabilities = scores.softmax(0) if len(scores) > 1 else scores.sigmoid()
            place = torch.full_like(chosen, len(self.kept))
            picked = predicted.flatten()[chosen]
            self.kept.append((truth.flatten()[chosen], picked, probabilities.max(0).values, place))

    def metrics(self) -> dict[str, float]:
        return {"boundary F": float(np.mean(self.boundaries))} if self.boundaries else {}

    def decisions(self) -> Decisions | None:
        if not self.kept or not self.names:
            return None
        label, predicted, confidence, sample = (torch.cat(each).numpy() for each in zip(*self.kept, strict=True))
        return Decisions.of(self.names, label, predicted, confidence.astype(np.float64), sample)


def boundary_f(truth: Any, predicted: Any, classes: int) -> list[float]:
    """Return the F-measure of the boundaries of each class that is in a picture, true or predicted.

    A pixel of a boundary is matched if one of the other's is within 0.75 % of the diagonal (Perazzi et al., A Benchmark Dataset and
    Evaluation Methodology for Video Object Segmentation, CVPR 2016). Ignored pixels are of no class.

    Args:
        truth, predicted: classes of pixels, ``(H, W)``.
        classes: the number of classes.
    """
    reach = max(REACH * float(np.hypot(*truth.shape)), 1.0)
    predicted = np.where(truth == IGNORED, IGNORED, predicted)
    found = []
    for one in range(classes):
        edges = [_edge(picture == one) for picture in (truth, predicted)]
        counts = [int(edge.sum()) for edge in edges]
        if not any(counts):
            continue
        if not all(counts):
            found.append(0.0)
            continue
        near = [distance_transform_edt(~edge) <= reach for edge in edges]
        recall, precision = (edges[0] & near[1]).sum() / counts[0], (edges[1] & near[0]).sum() / counts[1]
        found.append(float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0)
    return found


def _edge(mask: Any) -> Any:
    """Return the pixels of a mask that have a neighbour to the right or below, or above or to the left, outside of it."""
    edge = np.zeros_like(mask)
    edge[:, :-1] |= mask[:, :-1] & ~mask[:, 1:]
    edge[:, 1:] |= mask[:, 1:] & ~mask[:, :-1]
    edge[:-1] |= mask[:-1] & ~mask[1:]
    edge[1:] |= mask[1:] & ~mask[:-1]
    return edge
