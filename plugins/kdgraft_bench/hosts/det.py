"""What the benchmark asks of MMDetection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from mmdet.structures.bbox import bbox_overlaps
from torch import Tensor

from kdgraft.hosts import TrainedModel
from kdgraft_mm.configs import load_config

from ..data.coco import RealSet
from ..decisions import Decisions
from ..mmdet_ld import mmdet_ld
from ..spec import TEACHER, Benchmark, Model
from . import det_setup
from .base import Dataset
from .det_setup import (
    CHANNELS,
    SCENES,
    DetectionSetup,
    detector,
    draw_detections,
    own_set,
    scenes,
    with_schedule_of_queries,
)
from .detr import with_queries
from .efficientnet import with_efficientnet
from .mm import Collector, RunnerBench, write_config

OVERLAP = 0.5
"""The IoU from which a detection is one of an annotated object."""


class DetectionBench(RunnerBench):
    """The benchmark's part of MMDetection."""

    name, scope = "det", "mmdet"
    scores: ClassVar = {"AP": ("coco/bbox_mAP", 3), "AP50": ("coco/bbox_mAP_50", 3), "AP75": ("coco/bbox_mAP_75", 3)}
    models = ("gfl", "dino")
    peers = ("mmdet_ld",)
    embedded, of_embedded = "digit scenes", ("scenes",)
    picture = "detections"

    def dataset(self, benchmark: Benchmark) -> Dataset:
        if benchmark.data is None:
            own = any(model.config is None for model in (benchmark.teacher, *benchmark.students.values()))
            return (
                Dataset(self.embedded, det_setup.write_data(benchmark.out / "data"))
                if own
                else Dataset("own data", None)
            )
        real = RealSet.read(Path(benchmark.data))
        folder = real.shrunk(benchmark.out / "data", det_setup.REAL_SIZE)
        return Dataset(real.root.resolve().name, folder, real.root)

    def setup(self, dataset: Dataset, settings: Mapping[str, Any] | None = None) -> DetectionSetup:
        told, real = settings or {}, dataset.real  # a real set is taken as a whole, whatever the number of scenes
        found = scenes(told.get("scenes", SCENES)) if real is None else own_set(RealSet.read(real))
        return with_schedule_of_queries(found) if told.get("model") == "dino" else found

    def small(self, model: Model, dataset: Dataset, classes: int) -> dict[str, Any]:
        told = self.known(model.settings, ("width", "channels", "efficientnet", "scenes"))
        made = detector(told.get("width", 6), told.get("channels", CHANNELS), classes)
        if "efficientnet" in told:
            made = with_efficientnet(made, told["efficientnet"])
        return with_queries(made) if model.settings["model"] == "dino" else made

    def peer(self, peer: Model, student: str, dataset: Dataset, benchmark: Benchmark) -> tuple[str, dict[str, Any]]:
        if peer.settings.get("model") not in self.peers:
            return super().peer(peer, student, dataset, benchmark)
        files = [
            self.config(model, dataset, benchmark, name)[0]
            for name, model in ((student, benchmark.students[student]), (TEACHER, benchmark.teacher))
        ]
        config, teacher = map(load_config, files)
        config.model = mmdet_ld(config.model.to_dict(), dict(model=teacher.model.to_dict()), "")
        path = write_config(config, benchmark.out / "configs" / f"{student}-mmdet_ld.py")
        return path, {"model.teacher_ckpt": "{teacher.weights}"}

    def collector(self, dataset_meta: Mapping[str, Any]) -> Collector:
        return _Objects(tuple(dataset_meta.get("classes", ())))

    def draw(self, models: Mapping[str, TrainedModel], dataset: Dataset, samples: Sequence[int], path: Path) -> None:
        opened, tested = self.all_open(models)
        with self.entered():
            draw_detections(opened, tested, samples, path)


class _Objects(Collector):
    """Collects the class that a detector gives to each annotated object, and whether each of its detections is right.

    An object gets the class of the detection with the highest score among those that overlap it by an IoU of 0.5 or more. A detection
    is right if it overlaps an object of its class, which no detection of a higher score has taken.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.objects: dict[Any, tuple[int, Tensor, Tensor]] = {}
        self.label: list[Tensor] = []
        self.predicted: list[Tensor] = []
        self.confidence: list[Tensor] = []
        self.right: list[Tensor] = []
        self.sample: list[Tensor] = []

    def before_test(self, runner: Any) -> None:
        """Note the objects of each picture in its own coordinates, as pipelines may or may not resize them."""
        dataset = runner.test_dataloader.dataset
        for place in range(len(dataset)):
            info = dataset.get_data_info(place)
            kept = [one for one in info["instances"] if not one.get("ignore_flag")]
            boxes = torch.tensor([one["bbox"] for one in kept]).reshape(-1, 4)
            labels = torch.tensor([one["bbox_label"] for one in kept], dtype=torch.long)
            self.objects[info["img_id"]] = place, boxes, labels

    def after_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        for sample in outputs or ():
            place, boxes, labels = self.objects[sample.img_id]
            found = sample.pred_instances.to("cpu")
            overlaps = bbox_overlaps(_tensor(found.bboxes), boxes) >= OVERLAP  # (detections, objects)
            self.label.append(labels)
            self.predicted.append(self._classes(overlaps, found))
            self.confidence.append(found.scores)
            self.right.append(_right(overlaps & (found.labels[:, None] == labels), found.scores))
            self.sample.append(torch.full_like(labels, place))

    def _classes(self, overlaps: Tensor, found: Any) -> Tensor:
        """Return the class that is given to each object."""
        missed = torch.full((1, overlaps.shape[1]), -1.0)
        score, best = torch.cat([missed, torch.where(overlaps, found.scores[:, None], -1.0)]).max(0)
        classes = torch.cat([torch.tensor([len(self.names)]), found.labels])
        return torch.where(score > 0, classes[best], len(self.names))

    def decisions(self) -> Decisions | None:
        if not self.label or not self.names:
            return None
        columns = self.label, self.predicted, self.confidence, self.right, self.sample
        label, predicted, confidence, right, sample = (torch.cat(each).numpy() for each in columns)
        return Decisions(self.names, label, predicted, confidence.astype(np.float64), right, sample)


def _right(matches: Tensor, scores: Tensor) -> Tensor:
    """Return true for detections that take an object which none of a higher score has taken.

    Args:
        matches: detections × objects that may be matched.
        scores: of the detections.
    """
    taken, right = torch.zeros(matches.shape[1], dtype=torch.bool), torch.zeros(len(scores), dtype=torch.bool)
    for place in scores.argsort(descending=True).tolist():
        free = (matches[place] & ~taken).nonzero().flatten()
        if len(free):
            taken[free[0]], right[place] = True, True
    return right


def _tensor(boxes: Any) -> Tensor:
    found: Tensor = getattr(boxes, "tensor", boxes)
    return found.cpu().float()
