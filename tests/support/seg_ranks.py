"""Distillation of a segmentor on its share of four images, alone or as one of several processes under mmengine's DDP.

:func:`steps` is also what the test computes on the whole batch.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel
from mmseg.structures import SegDataSample
from torch import Tensor

from support.processes import as_rank
from support.seg import SMALL_CRITIC, batch, build, distilled, segmentor
from support.tensors import distillation, gradients

RELATIONS: dict[str, Any] = dict(
    type="CrossImageRelations",
    nodes=64,
    anchors=10**4,
    contrast=10**4,
    new_pixels=64,
    pixels_per_class=400,
    regions_per_class=8,
)
"""Every pixel is an anchor, is remembered and compared with, so that nothing is drawn."""
TERMS: dict[str, dict[str, Any]] = {
    "pixel": dict(type="SoftTargets"),
    "labels": dict(type="SoftTargets", grid="labels"),
    "affinity": dict(type="PairwiseAffinity"),
    "channels": dict(type="ChannelWise"),
    "features": dict(type="ChannelWise", tap="backbone[2]"),
    "dist": dict(type="DIST"),
    "prototypes": dict(type="ClassPrototypes"),
    "relations": dict(**RELATIONS, across_ranks=True),
    "imitation": dict(type="FeatureImitation", tap="backbone[3]"),
    "pearson": dict(type="PearsonImitation", tap="backbone[2]"),
    "generation": dict(type="MaskedGeneration"),
    "wgan-gp": dict(type="AdversarialMask", critic=SMALL_CRITIC),
    "lsgan": dict(type="AdversarialMask", kind="lsgan", critic=SMALL_CRITIC),
    "hinge": dict(type="AdversarialMask", kind="hinge", critic=SMALL_CRITIC, condition_on_image=True, steps=2),
}


def images() -> tuple[Tensor, list[SegDataSample]]:
    """Four images; one of the second process's counts nowhere, and its other one hardly anywhere."""
    inputs, samples = batch(4, seed=3)
    samples[3].gt_sem_seg.data.fill_(255)
    samples[2].gt_sem_seg.data[:, 16:] = 255
    return inputs, samples


def steps(teacher: dict[str, Any], term: str, share: slice = slice(None), broken: int | None = None) -> dict[str, Any]:
    """Two steps without an optimizer: losses, distillation gradients (under several processes the mean that DDP takes), state.

    ``broken`` is the process whose teacher yields NaN in the first step.
    """
    torch.manual_seed(0)
    entry = distilled(segmentor(frozen_bn=True, dropout=0.0), teacher, terms=[{**TERMS[term], "name": "term"}])
    model = build(entry)
    for head in (model.decode_head, model.distiller.teacher.model.decode_head):
        head.conv_seg.weight.data.mul_(30)  # masks that differ, so that the critic has more to go by than rounding
    wrapped = model
    if dist.is_initialized():
        wrapped = MMDistributedDataParallel(
            model, device_ids=None, broadcast_buffers=False, find_unused_parameters=False
        )
    wrapped.train()
    result: dict[str, Any] = {"losses": [], "gradients": []}
    inputs, samples = images()
    weight = model.distiller.teacher.model.decode_head.conv_seg.weight
    whole = weight.detach().clone()
    for step in range(2):
        if broken is not None and step == 0 and dist.get_rank() == broken:
            weight.data.fill_(float("nan"))
        model.zero_grad()
        found = wrapped(inputs[share].clone(), copy.deepcopy(samples[share]), mode="loss")
        weight.data.copy_(whole)
        host = torch.stack([v for k, v in found.items() if "loss" in k and not k.startswith("distill.")]).sum()
        (distillation(found) + 0 * host).backward()
        result["losses"].append({k: v.detach() for k, v in found.items() if k.startswith("distill.")})
        result["gradients"].append(gradients(model))
    result["state"] = copy.deepcopy(model.distiller.live_state())
    return result


def all_steps(rank: int, teacher: str) -> dict[Any, Any]:
    """The steps of every term on this process's two images."""
    logging.disable(logging.WARNING)
    share = slice(2 * rank, 2 * rank + 2)
    entry = dict(config=segmentor("PSPNet", width=8), checkpoint=teacher)
    results: dict[Any, Any] = {term: steps(entry, term, share) for term in TERMS}
    # Memories that overflow; the second process has fewer pixels than anchors, and draws none.
    TERMS["few"] = dict(RELATIONS, anchors=50, new_pixels=8, pixels_per_class=12, regions_per_class=3)
    results["few"] = steps(entry, "few", share)
    for broken in range(dist.get_world_size()):
        results["broken", broken] = steps(entry, "wgan-gp", share, broken)
    # A term that waits has drawn nothing yet when the first process saves a checkpoint, which it does alone.
    TERMS["late"] = dict(type="AdversarialMask", critic=SMALL_CRITIC, schedule=dict(type="WarmUp", begin=5, end=6))
    model = build(distilled(segmentor(), entry, terms=[TERMS["late"]]))
    if rank == 0:
        results["late"] = copy.deepcopy(model.distiller.live_state())
    return results


if __name__ == "__main__":
    as_rank(all_steps)
