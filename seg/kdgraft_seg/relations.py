"""Terms on the relations of pixels: to the prototype of their class, and to pixels of other images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdgraft.batch import Batch
from kdgraft.distributed import SharedRandom, gather_over_ranks, gather_rows
from kdgraft.errors import DistillError, WiringError, check_flag, check_number
from kdgraft.losses import (
    Ratio,
    class_prototypes,
    memory_relations,
    pixel_relations,
    weighted_ratio,
)
from kdgraft.losses.affinity import pool_nodes
from kdgraft.losses.scale import unit
from kdgraft.losses.soft_targets import check_temperature
from kdgraft.readers import Taps
from kdgraft.taps import Recording
from kdgraft.terms import MapTerm, mean_of
from kdgraft.wiring import Wiring

from .reader import labels_on
from .registry import TERMS


class LabelledTerm(MapTerm):
    """Base of the terms that group pixels by their class.

    Args:
        tap: maps ``(B, C, H, W)``; by default the input features of the classifier.
    """

    reads = "embeddings"

    def __init__(self, *, tap: Taps | None = None, **settings: Any) -> None:
        super().__init__(tap, region="all", **settings)

    def wire(self, wiring: Wiring) -> None:
        """Wire the term, and refuse a student that is trained without classes of pixels."""
        if "labels" not in wiring.fields:
            raise WiringError(
                f"{self.name}: needs classes of pixels, and the student, a {type(wiring.student).__name__}, is trained without; "
                "use FeatureImitation or PairwiseAffinity"
            )
        super().wire(wiring)


@TERMS.register
class ClassPrototypes(LabelledTerm):
    """Class prototypes: each pixel's cosine to its class's mean feature (IFVD; Wang et al., ECCV 2020, with weight 200).

    Args:
        tap: see :class:`LabelledTerm`.
    """

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        """Return the mean over maps of the squared difference of cosines, each over its labelled positions."""
        ratios = []
        for s, t, valid in self.aligned(student, teacher, batch):
            items = class_prototypes(s, t, labels_on(batch, t.shape[-2:]), ignore_index=-1, reduction="none")
            ratios.append(weighted_ratio(items, valid))
        return mean_of(ratios)


@TERMS.register
class CrossImageRelations(LabelledTerm):
    """Cross-image relations of pixels to pixels of the batch and to remembered pixels and regions (CIRKD; Yang et al. 2022).

    The term has three parts, each a KL of a pixel's softmax over cosines: to the pixels of every image of the batch (with both
    models' own features, without an adapter), to a memory of the teacher's pixels, and to a memory of its regions (class means of
    an image). A small learned head projects the student's pixels for the memories, which hold each class's latest embeddings. These
    are taken from pixels of that class only (the authors' code permutes the number of a class's pixels but indexes the whole image).

    The batch's part pools the map to at most ``nodes`` positions and needs B² · nodes² numbers; a comparison with a memory needs
    ``anchors`` · ``contrast``. The memories hold classes · (``pixels_per_class`` + ``regions_per_class``) · C numbers, where C is
    the number of the teacher's channels (27 MB for 19 classes and 512 channels, 215 MB for 150), on the device and in every
    checkpoint; the authors' code keeps more. Only the two maps themselves grow with the resolution.

    On several processes the memories receive the images of all of them. The batch's part compares the images of one process unless
    ``across_ranks``. The authors' code does the same (its gathering is commented out).

    Args:
        pixel, memory_pixel, memory_region: weights of the parts (1, 0.1 and 0.1 in the paper).
        temperature: τ of all three.
        nodes: the maximum number of positions of an image in the batch's part.
        anchors: the number of pixels of a process's batch to compare with the memories, drawn anew in each step.
        contrast: the number of remembered embeddings to compare them with, drawn anew in each step.
        pixels_per_class, regions_per_class: the size of the memories.
        new_pixels: the number of pixels of each class and image that enter the memory.
        across_ranks: compare with the images of all processes in the batch's part.
        tap: see :class:`LabelledTerm`; one map.
    """

    pixels: Tensor
    regions: Tensor
    seen: Tensor

    def __init__(
        self,
        pixel: float = 1.0,
        memory_pixel: float = 0.1,
        memory_region: float = 0.1,
        *,
        temperature: float = 0.1,
        nodes: int = 256,
        anchors: int = 2048,
        contrast: int = 4096,
        pixels_per_class: int = 500,
        regions_per_class: int = 200,
        new_pixels: int = 16,
        across_ranks: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        check_temperature(temperature)
        sizes = dict(nodes=nodes, anchors=anchors, contrast=contrast, pixels_per_class=pixels_per_class)
        sizes.update(regions_per_class=regions_per_class, new_pixels=new_pixels)
        for name, size in sizes.items():
            check_number("CrossImageRelations", name, size, 1, whole=True)
        self.weights = (pixel, memory_pixel, memory_region)
        for name, part in zip(("pixel", "memory_pixel", "memory_region"), self.weights, strict=True):
            check_number("CrossImageRelations", name, part)
        self.temperature, self.nodes, self.anchors, self.contrast = temperature, nodes, anchors, contrast
        self.pixels_per_class, self.regions_per_class, self.new_pixels = pixels_per_class, regions_per_class, new_pixels
        check_flag("CrossImageRelations", "across_ranks", across_ranks)
        self.across_ranks = across_ranks
        self._random = SharedRandom()

    def wire(self, wiring: Wiring) -> None:
        """Wire the term on one map, and build the projection and the memories if a part needs them."""
        super().wire(wiring)
        if len(self.rows) != 1:
            raise DistillError(f"{self.name}: takes one tap of one map, got {len(self.rows)}; add a term for each")
        ((s, t, _, _),) = self.pairs(wiring.student_recording, wiring.teacher_recording)
        if not any(self.weights[1:]):
            return  # DDP would miss the gradients of a projection that is not used
        classes = int(wiring.student.num_classes)  # type: ignore[arg-type]  # the labels are the student's
        self.allocate(s.shape[1], t.shape[1], classes, s.device)
        self.rows[0] = self.rows[0]._replace(
            adapter=f"{s.shape[1]}→{t.shape[1]}→{t.shape[1]}, memory {classes} classes"
        )

    def allocate(self, student: int, teacher: int, classes: int, device: torch.device) -> None:
        """Create the projection from ``student`` to ``teacher`` channels, and empty memories."""
        self.project = nn.Sequential(nn.Linear(student, teacher), nn.ReLU(), nn.Linear(teacher, teacher)).to(device)
        self.register_buffer("pixels", torch.zeros(classes, self.pixels_per_class, teacher, device=device))
        self.register_buffer("regions", torch.zeros(classes, self.regions_per_class, teacher, device=device))
        self.register_buffer("seen", torch.zeros(2, classes, dtype=torch.long, device=device))

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        """Return the three parts on the aligned maps."""
        ((s, t, _),) = self.aligned(student, teacher, batch)
        return self.relate(s, t, labels_on(batch, t.shape[-2:]))

    def relate(self, s: Tensor, t: Tensor, labels: Tensor) -> Ratio:
        """Return the three parts on maps ``(B, C, H, W)``, given labels ``(B, H, W)`` that are -1 where a pixel does not count."""
        valid = labels >= 0
        parts = [self._batch(s, t, valid)]
        if any(self.weights[1:]):
            self._remember(t.detach(), labels)
            parts += self._memory(s, t, valid)
        weighted = [weight * part.numerator for weight, part in zip(self.weights, parts, strict=False)]
        return Ratio(torch.stack(weighted), torch.stack([part.denominator for part in parts]))

    def _batch(self, s: Tensor, t: Tensor, valid: Tensor) -> Ratio:
        patch = 1
        while -(-s.shape[2] // patch) * -(-s.shape[3] // patch) > self.nodes:
            patch += 1
        (own, present), (target, _) = (pool_nodes(maps.float(), patch, "average", valid) for maps in (s, t))
        others = (own, target, present)
        if self.across_ranks:
            others = (gather_over_ranks(own), gather_over_ranks(target), gather_over_ranks(present))
        items = pixel_relations(own, target, self.temperature, valid=present, others=others, reduction="none")
        compared = (present > 0)[:, None, :] & (others[2] > 0).any(1)[None, :, None]
        return weighted_ratio(items, compared)

    def _memory(self, s: Tensor, t: Tensor, valid: Tensor) -> list[Ratio]:
        chosen = valid.flatten().nonzero()[:, 0]
        own = self._random.of_this_rank()  # on every process, even if it does not draw
        if len(chosen) > self.anchors:
            chosen = chosen[torch.randperm(len(chosen), generator=own)[: self.anchors].to(chosen.device)]
        s, t = (_at(maps, chosen) for maps in (s, t))
        s = self.project(s.to(next(self.project.parameters()).dtype))
        ratios = []
        for memory, seen in ((self.pixels, self.seen[0]), (self.regions, self.seen[1])):
            place = torch.arange(memory.shape[1], device=seen.device)
            held = (place[None] < seen[:, None]).flatten().nonzero()[:, 0]
            if len(held) > self.contrast:
                drawn = torch.randperm(len(held), generator=self._random.of_all_ranks())[: self.contrast]
                held = held[drawn.to(held.device)]
            items = memory_relations(
                s, t, memory.flatten(0, 1)[held], contrast_temperature=self.temperature, reduction="none"
            )
            # Without anchors or embeddings the sum has no items.
            ratios.append(Ratio(items.sum(), items.new_full((), float(len(items) if len(held) else 0))))
        return ratios

    @torch.no_grad()
    def _remember(self, t: Tensor, labels: Tensor) -> None:
        """Store this step's pixels and regions. Each process chooses its own, and all store those of all in the same order."""
        classes = len(self.pixels)
        # An infinity of a teacher in half precision would stay in the memory for a long time.
        kept = (labels >= 0) & (labels < classes) & t.isfinite().all(1)
        position = kept.flatten().nonzero()[:, 0]
        image = torch.arange(len(labels), device=labels.device).view(-1, 1, 1)
        group = (labels + image * classes).flatten()[position]  # a number for each (image, class)
        drawn = torch.rand(kept.numel(), generator=self._random.of_this_rank()).to(t.device)[position].argsort()
        order = drawn[group[drawn].argsort(stable=True)]
        order = order[_number_in_group(group[order]) < self.new_pixels]
        pixels = unit(_at(t, position[order]).float(), 1)
        self._enqueue(self.pixels, self.seen[0], gather_rows(pixels), gather_rows(group[order] % classes))
        directions = unit(t.float(), 1).permute(0, 2, 3, 1).flatten(0, 2)
        sums = directions.new_zeros(len(labels) * classes, t.shape[1]).index_add(0, group, directions[position])
        present = group.unique()
        regions = F.normalize(sums[present], dim=1)
        self._enqueue(self.regions, self.seen[1], gather_rows(regions), gather_rows(present % classes))

    @staticmethod
    def _enqueue(memory: Tensor, seen: Tensor, features: Tensor, classes: Tensor) -> None:
        """Write each class's new embeddings behind its latest ones, as in a ring buffer."""
        order = classes.argsort(stable=True)
        order = order[_number_in_group(classes[order]) < memory.shape[1]]
        features, classes = features[order], classes[order]
        memory[classes, (seen[classes] + _number_in_group(classes)) % memory.shape[1]] = features
        seen += torch.bincount(classes, minlength=len(memory))

    def hidden_state(self) -> dict[str, Any]:
        return {"random": self._random.state()}

    def load_hidden_state(self, state: Mapping[str, Any]) -> None:
        self._random.load(state["random"])


def _number_in_group(group: Tensor) -> Tensor:
    """Return 0, 1, 2 … within each run of equal numbers of a sorted ``(N,)``."""
    if len(group) == 0:
        return group
    _, counts = group.unique_consecutive(return_counts=True)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(group), device=group.device) - starts.repeat_interleave(counts)


def _at(maps: Tensor, positions: Tensor) -> Tensor:
    """Return the vectors ``(N, C)`` of a map ``(B, C, H, W)`` at N flat positions of ``(B, H, W)``."""
    size = maps.shape[-2] * maps.shape[-1]
    return maps.flatten(2)[positions // size, :, positions % size]
