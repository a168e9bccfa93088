"""Recipes: what they expand to, that a config may change or spell them out, and that they train."""

from __future__ import annotations

import pytest
import torch

from kdgraft.cli import main
from kdgraft.errors import DistillError
from kdgraft_seg import RECIPES, DistilledSegmentor, cirkd, cwd, ifvd, maskd, skd
from support.seg import SMALL_CRITIC, batch, build, distilled, losses_of, segmentor
from support.tensors import assert_same, distillation

NAMES = ("skd", "cwd", "ifvd", "cirkd", "maskd")


def of(terms):
    return {term["type"]: term for term in terms}


def test_the_weights_are_the_papers():
    assert {name: term["weight"] for name, term in of(skd()).items()} == {
        "SoftTargets": 10.0,
        "PairwiseAffinity": 10.0,
        "AdversarialMask": 0.1,
    }
    (scores,) = cwd()
    assert (scores["type"], scores["weight"], scores["temperature"]) == ("ChannelWise", 3.0, 4.0)
    assert {name: term["weight"] for name, term in of(ifvd()).items()} == {
        "SoftTargets": 10.0,
        "ClassPrototypes": 200.0,
        "AdversarialMask": 0.1,
    }
    relations = of(cirkd())["CrossImageRelations"]
    assert (relations["pixel"], relations["memory_pixel"], relations["memory_region"]) == (1.0, 0.1, 0.1)
    assert of(cirkd())["SoftTargets"]["weight"] == 1.0
    masked = of(maskd())["MasKD"]
    assert (masked["weight"], masked["tokens"], masked["pretrain"], masked["weigh_masks"]) == (0.5, 8, 10000, False)


def test_a_term_at_0_is_left_out_and_a_schedule_reaches_all():
    assert list(of(skd(pair=0, adversarial=0))) == ["SoftTargets"]
    ramp = dict(type="WarmUp", end=10)
    for recipe in (skd, cwd, ifvd, cirkd, maskd):
        assert all(term["schedule"] == ramp for term in recipe(schedule=ramp))
    critic = of(skd(critic=dict(kind="hinge", steps=2)))["AdversarialMask"]
    assert (critic["kind"], critic["steps"]) == ("hinge", 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_prints_as_it_is_pasted_into_a_config(name, capsys):
    assert main(["list", name]) == 0
    namespace: dict = {}
    exec(capsys.readouterr().out, namespace)
    assert namespace["terms"] == RECIPES.get(name)() == DistilledSegmentor.expand(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_the_terms_that_it_prints(teacher, name):
    found = []
    for settings in (dict(recipe=name), dict(terms=RECIPES.get(name)())):
        losses = losses_of(build(distilled(segmentor(), teacher, **settings)), *batch())
        assert sum(key.endswith(".loss") and key.startswith("distill.") for key in losses) == len(RECIPES.get(name)())
        found.append({key: value.detach() for key, value in losses.items()})
    assert_same(*found)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("skdd", "did you mean 'skd'"),
        (dict(type="ifvd", prototipe=1), "takes no argument 'prototipe'; did you mean 'prototype'"),
        (dict(pixel=1), "one of .*skd"),
    ],
)
def test_a_mistake_in_a_recipe_says_what_is_right(recipe, message):
    with pytest.raises(DistillError, match=message):
        DistilledSegmentor.expand(recipe)


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(dict(type="skd", adversarial=0), id="skd without its critic"),
        pytest.param("cwd", id="cwd"),
        pytest.param(dict(type="ifvd", adversarial=0), id="ifvd without its critic"),
        pytest.param("cirkd", id="cirkd"),
        pytest.param(dict(type="skd", critic=dict(critic=SMALL_CRITIC)), id="skd"),
    ],
)
def test_every_loss_of_a_recipe_falls_on_one_batch(teacher, recipe):
    # The labels are noise, so the host's own loss would pull elsewhere. A teacher that is sure of something: at its random start
    # its scores are next to uniform, as the student's are.
    model = build(distilled(segmentor("SegFormer", dropout=0.0), teacher, recipe=recipe))
    with torch.no_grad():
        model.distiller.teacher.model.decode_head.conv_seg.weight.mul_(50)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    inputs, samples = batch()
    seen = []
    for _ in range(20):
        losses = losses_of(model, inputs, samples)
        optimizer.zero_grad()
        distillation(losses).backward()
        optimizer.step()
        seen.append({key: float(value.detach()) for key, value in losses.items() if key.startswith("distill.")})
    for key in seen[0]:
        if key.endswith(".loss") and "adversarial" not in key:
            assert seen[-1][key] < 0.9 * seen[0][key], key
    if "distill.adversarial_mask.gap" in seen[0]:
        assert all(abs(step["distill.adversarial_mask.loss"]) < 10 for step in seen)
