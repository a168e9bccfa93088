"""Recipes: what they expand to, and that a config may change or spell them out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.structures import InstanceData

from kdgraft import Step
from kdgraft.errors import DistillError
from kdgraft_det import DistilledDetector, fgd, fgfi, ld, mgd
from kdgraft_det.regions import valuable_region
from kdgraft_mm.configs import load_config
from support.det import TERM_NAMES, build, detector, distilled, losses, raw_batch


def test_the_localization_recipe_is_the_papers():
    main, vlr, classes = ld()
    assert (main["anchors"], main["temperature"]) == ("main", 10)
    assert (vlr["anchors"], vlr["temperature"]) == ("vlr", 10)
    assert (classes["anchors"], classes["temperature"], classes["activation"]) == ("main", 2, "softmax")


def test_the_localization_recipes_weights_are_as_strong_as_the_published_on_coco():
    """There they stand before sums over the three images of a GPU; so many positives are there, and so much IoU in the VLR."""
    height, width, levels = 800, 1216, (8, 16, 32, 64, 128)
    config = load_config("mmdet::gfl/gfl_r50_fpn_1x_coco.py").model
    head = MODELS.build(dict(config.bbox_head, train_cfg=config.train_cfg, test_cfg=config.test_cfg))
    grids = [(-(-height // stride), -(-width // stride)) for stride in levels]
    generator = np.random.default_rng(0)
    # COCO's objects: 41 % small, 34 % medium, 25 % large, seven an image; enlarged twice.
    sides = [(10, 32), (32, 96), (96, 350)]
    positives = valuable = 0.0
    for _ in range(3):
        low, high = np.transpose([sides[kind] for kind in generator.choice(3, 7, p=[0.41, 0.34, 0.25])])
        side = 2 * np.exp(generator.uniform(np.log(low), np.log(high)))
        ratio = np.exp(generator.normal(0, 0.25, 7))
        extent = np.minimum(np.stack([side * ratio, side / ratio], 1), [0.9 * width, 0.9 * height])
        corner = generator.uniform(0, 1, (7, 2)) * ([width, height] - extent)
        boxes = torch.tensor(np.concatenate([corner, corner + extent], 1)).float()
        found = InstanceData(bboxes=boxes, labels=torch.zeros(7, dtype=torch.long))
        metas = [dict(img_shape=(height, width), pad_shape=(height, width))]
        labels = head.get_targets(*head.get_anchors(grids, metas, device="cpu"), [found], metas, [None])[1]
        positives += sum(float((level < head.num_classes).sum()) for level in labels)
        anchors = torch.cat(head.prior_generator.grid_priors(grids, device="cpu"))
        valuable += valuable_region(anchors, [h * w for h, w in grids], boxes).sum().item()
    main, vlr, classes = ld()
    bins, score = head.reg_max + 1, 0.4  # of a student that has learned something
    assert main["weight"] == pytest.approx(0.25 * positives * score / bins, rel=0.2)
    assert vlr["weight"] == pytest.approx(0.25 / 4 * valuable / bins, rel=0.2)
    assert classes["weight"] == 10 / head.num_classes


def test_the_other_recipes_are_their_papers():
    (focal,) = fgd()
    assert [focal[key] for key in ("temperature", "alpha", "beta", "gamma", "lambda_")] == [0.5, 1e-3, 5e-4, 5e-4, 5e-6]
    (generation,) = mgd()
    assert (generation["mask_ratio"], generation["weight"]) == (0.65, 2e-5)
    (near,) = fgfi()
    # Half of 0.01 · (a sum over 256 channels) is 1.28 · their mean.
    assert (near["region"]["threshold"], near["weight"]) == (0.5, pytest.approx(0.01 * 256 / 2))


@pytest.mark.parametrize("recipe", ["fgd", "mgd", "pkd", "fgfi"])
def test_a_recipe_of_one_term_is_called_after_it_and_takes_a_schedule(teacher_model, teacher_checkpoint, recipe):
    settings = dict(type=recipe, tap="neck[0]", schedule=dict(type="Stop", end=1))
    model = build(distilled(detector(), teacher_model, teacher_checkpoint, recipe=settings))
    assert [(row.term, row.student_tap) for row in model.distiller.rows] == [(recipe, "neck[0]")]
    assert losses(model, raw_batch())[f"distill.{recipe}.loss"] > 0
    assert [model.distiller.terms[recipe].schedule(Step(step)) for step in (0, 1)] == [1, 0]


def test_a_recipe_is_the_terms_that_it_prints(teacher_model, teacher_checkpoint):
    found = []
    for settings in (dict(recipe="ld"), dict(terms=ld())):
        found.append(losses(build(distilled(detector(), teacher_model, teacher_checkpoint, **settings)), raw_batch()))
    for name in TERM_NAMES[:3]:
        assert torch.equal(found[0][f"distill.{name}.loss"], found[1][f"distill.{name}.loss"])


def test_a_recipes_settings_can_be_changed(teacher_model, teacher_checkpoint):
    recipe = dict(type="ld", main=2.4, classes=0)
    model = build(distilled(detector(), teacher_model, teacher_checkpoint, recipe=recipe))
    plain = build(distilled(detector(), teacher_model, teacher_checkpoint, recipe="ld"))
    a, b = losses(model, raw_batch()), losses(plain, raw_batch())
    assert a["distill.ld_main.loss"].item() == pytest.approx(2 * b["distill.ld_main.loss"].item())
    assert a["distill.ld_vlr.loss"] == b["distill.ld_vlr.loss"]
    assert a["distill.class_main.loss"] == 0


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("imitations", "did you mean 'imitation'"),
        (dict(type="ld", mian=1), "takes no argument 'mian'; did you mean 'main'"),
        (dict(main=1), "one of .*imitation"),
    ],
)
def test_a_mistake_in_a_recipe_says_what_is_right(recipe, message):
    with pytest.raises(DistillError, match=message):
        DistilledDetector.expand(recipe)
