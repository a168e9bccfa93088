"""Tokens that learn on a real detector's own loss of its masked pyramid."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from support.det import build, detector, distilled, losses, raw_batch, save_teacher
from support.det_stages import detr, staged


def model(name: str, **sizes: int) -> dict[str, Any]:
    if name == "GFL":
        return detector(frozen_bn=True, **sizes)
    return staged(name, **sizes) if name == "Faster R-CNN" else detr(name, **sizes)


@pytest.mark.parametrize(("kind", "name"), [("MasKD", "GFL"), ("FreeKD", "Faster R-CNN"), ("MasKD", "DINO")])
def test_tokens_learn_on_the_teachers_own_loss(kind, name, tmp_path):
    teacher = model(name, width=6)
    term = dict(type=kind, name="term", tap="neck[*]", pretrain=2)
    built = build(distilled(model(name), teacher, save_teacher(tmp_path / "teacher.pth", teacher), terms=[term]))
    theirs, batch = built.distiller.teacher.model, raw_batch()
    before = {key: value.clone() for key, value in theirs.state_dict().items()}
    network = built.distiller.terms["term"].auxiliaries["network"].network
    first = copy.deepcopy(network)
    torch.manual_seed(3)
    found = losses(built, batch)
    assert found["distill.term.loss"] == 0 and found["distill.term.task"] > 0
    assert all(torch.equal(before[key], value) for key, value in theirs.state_dict().items())
    assert not any(module.training for module in theirs.modules())
    moved = [not torch.equal(a, b) for a, b in zip(first.parameters(), network.parameters(), strict=True)]
    assert all(moved)
    plain = build(model(name))
    torch.manual_seed(3)
    for key, value in losses(plain, batch).items():  # the student's own losses, with the same draws
        torch.testing.assert_close(found[key], value, rtol=0, atol=0)
    losses(built, batch)
    assert losses(built, batch)["distill.term.loss"] > 0


def test_the_figure_is_the_loss_of_the_masked_pyramid(tmp_path):
    teacher = model("GFL", width=6)
    term = dict(type="MasKD", name="term", tap="neck[*]", pretrain=2)
    built = build(distilled(model("GFL"), teacher, save_teacher(tmp_path / "teacher.pth", teacher), terms=[term]))
    theirs, batch = built.distiller.teacher.model, raw_batch()
    networks = copy.deepcopy(built.distiller.terms["term"].auxiliaries["network"].network)
    found = losses(built, batch)["distill.term.task"]
    data = built.data_preprocessor(copy.deepcopy(batch), True)
    sizes = [sample.img_shape for sample in data["data_samples"]]
    padded = data["inputs"].shape[-2:]

    def hook(module, args, output):
        maps = []
        for network, level in zip(networks, output, strict=True):
            stride = padded[0] / level.shape[-2], padded[1] / level.shape[-1]
            valid = torch.zeros_like(level[:, 0])
            for image, (height, width) in zip(valid, sizes, strict=True):
                # A position counts whose centre lies in the image.
                rows = (torch.arange(len(image)) + 0.5) * stride[0] < height
                columns = (torch.arange(image.shape[1]) + 0.5) * stride[1] < width
                image[rows[:, None] & columns] = 1
            maps.append(torch.where(valid[:, None] > 0, network.masked(level, valid)[0], level))
        return tuple(maps)

    handle = theirs.neck.register_forward_hook(hook)
    expected = theirs.parse_losses(theirs.loss(data["inputs"], data["data_samples"]))[0]
    handle.remove()
    torch.testing.assert_close(found, expected.detach())
