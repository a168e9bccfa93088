"""Recipes: what they expand to, and that a config may change or spell them out."""

from __future__ import annotations

import pytest
import torch

from det_support import TERM_NAMES, build, detector, distilled, losses, raw_batch
from taskdistill import Step
from taskdistill.errors import DistillError
from taskdistill_det import DistilledDetector, fine_grained, focal_global, localization, masked_generation


def test_the_localization_recipe_is_the_papers():
    main, vlr, classes = localization()
    assert (main["region"], main["temperature"], main["weight"]) == ("main", 10, 0.25)
    assert (vlr["region"], vlr["temperature"], vlr["weight"]) == ("vlr", 10, 0.25)
    assert (classes["region"], classes["temperature"], classes["weight"], classes["classes"]) == ("main", 2, 10, "mean")


def test_the_other_recipes_are_their_papers():
    (focal,) = focal_global()
    assert [focal[key] for key in ("temperature", "alpha", "beta", "gamma", "lambda_")] == [0.5, 1e-3, 5e-4, 5e-4, 5e-6]
    (generation,) = masked_generation()
    assert (generation["mask_ratio"], generation["weight"]) == (0.65, 2e-5)
    (near,) = fine_grained()
    # Half of 0.01 · (a sum over 256 channels) is 1.28 · their mean.
    assert (near["region"]["threshold"], near["weight"]) == (0.5, pytest.approx(0.01 * 256 / 2))


@pytest.mark.parametrize("recipe", ["focal_global", "masked_generation", "fine_grained"])
def test_a_recipe_of_one_term_is_called_after_it_and_takes_a_schedule(teacher_model, teacher_checkpoint, recipe):
    settings = dict(type=recipe, tap="neck[0]", schedule=dict(type="Stop", end=1))
    model = build(distilled(detector(), teacher_model, teacher_checkpoint, recipe=settings))
    assert [(row.term, row.student_tap) for row in model.distiller.rows] == [(recipe, "neck[0]")]
    assert losses(model, raw_batch())[f"distill.{recipe}.loss"] > 0
    assert [model.distiller.terms[recipe].schedule(Step(step)) for step in (0, 1)] == [1, 0]


def test_a_recipe_is_the_terms_that_it_prints(teacher_model, teacher_checkpoint):
    found = []
    for settings in (dict(recipe="localization"), dict(terms=localization())):
        found.append(losses(build(distilled(detector(), teacher_model, teacher_checkpoint, **settings)), raw_batch()))
    for name in TERM_NAMES[:3]:
        assert torch.equal(found[0][f"distill.{name}.loss"], found[1][f"distill.{name}.loss"])


def test_a_recipes_settings_can_be_changed(teacher_model, teacher_checkpoint):
    recipe = dict(type="localization", main=0.5, classes=0)
    model = build(distilled(detector(), teacher_model, teacher_checkpoint, recipe=recipe))
    plain = build(distilled(detector(), teacher_model, teacher_checkpoint, recipe="localization"))
    a, b = losses(model, raw_batch()), losses(plain, raw_batch())
    assert a["distill.ld_main.loss"].item() == pytest.approx(2 * b["distill.ld_main.loss"].item())
    assert a["distill.ld_vlr.loss"] == b["distill.ld_vlr.loss"]
    assert a["distill.class_main.loss"] == 0


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("localisation", "did you mean 'localization'"),
        (dict(type="localization", mian=1), "takes no argument 'mian'; did you mean 'main'"),
        (dict(main=1), "one of .*localization"),
    ],
)
def test_a_mistake_in_a_recipe_says_what_is_right(recipe, message):
    with pytest.raises(DistillError, match=message):
        DistilledDetector.expand(recipe)
