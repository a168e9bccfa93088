"""What is known to go wrong in other projects' distillation of detectors, a test each with what goes wrong there."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdgraft import REGIONS
from kdgraft.errors import DistillError
from support.det import (
    BOXES,
    EVERY_TERM,
    TERM_NAMES,
    build,
    detector,
    distilled,
    losses,
    part,
    raw_batch,
    save_teacher,
)

FEATURES = dict(terms=[dict(type="FeatureImitation", tap="neck[*]")])
CORRELATION = [dict(type="PearsonImitation", tap="neck[*]"), dict(type="ChannelWise", tap="neck[*]")]


@pytest.mark.parametrize("region", ["foreground", "all"])
def test_a_padded_batch_puts_a_box_where_the_unpadded_one_does(teacher_model, teacher_checkpoint, region):
    # Elsewhere boxes are scaled by the image's own size, though the map covers the padded one: every box shifts and grows.
    model = build(distilled(detector(), teacher_model, teacher_checkpoint, **FEATURES))
    found = []
    for images in (slice(0, 1), slice(0, 2)):  # 64 × 32 alone, and beside an image that pads it to 96 × 96
        batch = part(raw_batch([[[9.0, 10.0, 26.0, 50.0]], BOXES[1]], [(64, 32), (96, 96)]), images)
        data = model.data_preprocessor(copy.deepcopy(batch), True)
        height, width = data["inputs"].shape[-2:]
        feature = torch.zeros(len(data["inputs"]), 1, height // 8, width // 8)
        weights = REGIONS.build(region)(model._batch(**data), feature)
        found.append(torch.ones(8, 4) if weights is None else weights[0])
    alone, padded = found
    assert alone.shape == (8, 4) and padded.shape == (12, 12)
    assert torch.equal(padded[:8, :4], alone)
    assert padded.sum() == alone.sum() > 0  # and nothing beyond the image


def test_the_teachers_dropout_is_off_in_every_step(tmp_path):
    # Elsewhere the teacher is a submodule, and the train() that the host calls before each epoch turns its dropout on again.
    teacher = detector(width=8, channels=12, backbone="PyramidVisionTransformer")
    teacher["backbone"].update(drop_rate=0.5, drop_path_rate=0.5)
    entry = distilled(detector(), teacher, save_teacher(tmp_path / "teacher.pth", teacher), **FEATURES)
    model = build(entry)
    inner = model.distiller.teacher.model
    outputs: list[Tensor] = []
    inner.backbone.register_forward_hook(lambda module, args, output: outputs.append(output[-1]))
    for seed in (0, 1):
        torch.manual_seed(seed)
        model.train()  # as the host's loop
        losses(model, raw_batch())
    assert torch.equal(*outputs)
    # It has dropout that would show.
    assert any(isinstance(module, nn.Dropout) and module.p == 0.5 for module in inner.modules())
    inner.train()
    inner(torch.randn(1, 3, 96, 96), None, mode="tensor")
    inner(torch.randn(1, 3, 96, 96), None, mode="tensor")
    assert not torch.equal(*outputs[2:])


def test_no_loss_grows_with_the_batch(teacher_model, teacher_checkpoint):
    # Elsewhere positions are summed and divided by nothing, or by a constant: twice the images, twice the loss.
    terms = [dict(t, mask_ratio=0.0) if t["type"] == "MaskedGeneration" else t for t in EVERY_TERM["terms"]]
    terms += CORRELATION
    settings = dict(recipe="ld", terms=terms)
    model = build(distilled(detector(frozen_bn=True), teacher_model, teacher_checkpoint, **settings))
    once, twice = raw_batch(), raw_batch()
    for key, values in twice.items():
        twice[key] = [*values, *copy.deepcopy(values)]
    found, doubled = losses(model, once), losses(model, twice)
    for name in (*TERM_NAMES, "pearson_imitation", "channel_wise"):
        key = f"distill.{name}.loss"
        assert found[key] > 0, name
        torch.testing.assert_close(doubled[key], found[key], rtol=1e-4, atol=0, msg=name)


def _tensors_kept(model: nn.Module) -> set[str]:
    """Attributes of a model's modules that hold tensors which are no parameters or buffers."""

    def holds(value: Any) -> bool:
        if isinstance(value, dict):
            return any(holds(entry) for entry in value.values())
        if isinstance(value, (list, tuple)):
            return any(holds(entry) for entry in value)
        return isinstance(value, Tensor)

    registries = ("_parameters", "_buffers", "_modules")
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in registries and holds(value)
    }


def test_a_step_leaves_no_activation_on_the_model_or_in_its_checkpoint(teacher_model, teacher_checkpoint):
    # Elsewhere features are kept as attributes or buffers: checkpoints grow and do not load, memory is never freed.
    model = build(distilled(detector(), teacher_model, teacher_checkpoint, **EVERY_TERM))
    plain = list(build(detector()).state_dict())
    owners = (model, model.distiller.teacher.model)
    seen: list[weakref.ref[Tensor]] = []
    for owner in owners:
        owner.neck.register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output[0])))
    assert list(model.state_dict()) == plain
    before = [_tensors_kept(owner) for owner in owners]
    found = losses(model, raw_batch())
    sum(value for name, value in found.items() if "loss" in name).backward()
    assert list(model.state_dict()) == plain
    assert [_tensors_kept(owner) for owner in owners] == before
    del found
    gc.collect()
    assert len(seen) == 2 and not any(reference() is not None for reference in seen)


@pytest.mark.parametrize("kind", ["missing", "unexpected"])
def test_a_teachers_checkpoint_that_lacks_or_exceeds_keys_is_refused(tmp_path, teacher_model, kind):
    # Elsewhere it is loaded with strict=False: a teacher of half random weights teaches without a word.
    state = build(teacher_model).state_dict()
    key = "bbox_head.gfl_cls.weight"
    if kind == "missing":
        del state[key]
    else:
        key = "bbox_head.gfl_centre.weight"
        state[key] = torch.zeros(1)
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "teacher.pth")
    with pytest.raises(DistillError, match=rf"does not fit the teacher GFL.*{kind}.*{key}"):
        build(distilled(detector(), teacher_model, str(tmp_path / "teacher.pth"), **FEATURES))
