"""Universal segmentation: classes and masks of queries that are matched by both."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
import transformers
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from kdgraft import DistillError, WiringError
from kdgraft_nlp import DistillTrainer
from kdgraft_nlp.student import graft
from kdgraft_nlp.tasks import task_of
from support import detectors, universal
from support import nlp as support
from support.detectors import losses, training
from support.nlp import kl
from support.tensors import gradients

FAMILIES = {"mask2former": (2.0, 5.0, 5.0), "maskformer": (1.0, 20.0, 1.0)}
"""Family -> the weights of class, pixels and dice in its own matching."""
TERMS = ["SoftTargets", "MatchedMasks"]


def pair(family, width=32):
    return universal.segmentor(family, 32, 1), universal.segmentor(family, width, 2, queries=6)


def outputs(model, batch):
    takes = {name: batch[name] for name in ("pixel_values", "pixel_mask")}
    with torch.no_grad():
        found = model.eval()(**takes)
    return found.class_queries_logits, found.masks_queries_logits


def naive(student, teacher, costs, columns):
    """Tries every assignment; only the first columns of the masks lie in the images. Returns the means of both losses."""
    found = []
    for s, masks, t, others in zip(*student, *teacher, strict=True):
        masks = interpolate(masks[None], size=others.shape[-2:], mode="bilinear")[0]
        masks, others = (x[..., :columns].flatten(1) for x in (masks, others))
        p, q = s.softmax(-1), t.softmax(-1)
        weight = q[:, : universal.CLASSES].amax(-1)
        apart = (p[:, None] - q[None]).abs().sum(-1) / 2
        truth = others.sigmoid()
        pixels, dice = torch.zeros(len(s), len(t)), torch.zeros(len(s), len(t))
        for i in range(len(s)):
            for j in range(len(t)):
                own = binary_cross_entropy_with_logits(others[j], truth[j])
                pixels[i, j] = binary_cross_entropy_with_logits(masks[i], truth[j]) - own
                a, b = masks[i].sigmoid(), truth[j]
                dice[i, j] = 1 - (2 * (a * b).sum() + 1) / (a.square().sum() + b.square().sum() + 1)
        cost = (costs[0] * apart + costs[1] * pixels + costs[2] * dice) * weight
        best = min(permutations(range(len(t)), len(s)), key=lambda to: sum(cost[i, j] for i, j in enumerate(to)))
        rows, chosen = torch.arange(len(s)), torch.tensor(best)
        share = weight[chosen] / weight[chosen].sum()
        parts = kl(s, t[chosen]), 5 * pixels[rows, chosen] + 5 * dice[rows, chosen]
        found.append([(share * part).sum() for part in parts])
    return [torch.stack(values).mean() for values in zip(*found, strict=True)]


@pytest.mark.parametrize("right", [0, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_matched_classes_and_masks_are_those_of_the_best_assignment(family, right):
    student, teacher = pair(family)
    assert task_of(student) == "universal"
    batch = universal.batch(right=right)
    plain = [outputs(model, batch) for model in (student, teacher)]
    expected = naive(*plain, FAMILIES[family], 16)  # an image of 64 columns, by strides of 4
    built = training(graft(student, teacher, TERMS))
    found, output = losses(built, batch)
    assert output.loss.isfinite() and output.loss > 0  # the host's own
    for term, value in zip(("soft_targets", "matched_masks"), expected, strict=True):
        torch.testing.assert_close(found[term].detach(), value, rtol=1e-3, atol=1e-5, msg=lambda m, n=term: f"{n}: {m}")
    assert built.distiller.counts(built.distill_link.read(batch)) == {"soft_targets": 2, "matched_masks": 2}
    sum(found.values()).backward()
    grads = gradients(built)
    assert sum(float(g.abs().sum()) for g in grads.values()) > 0 and all(g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_that_is_its_teacher_has_no_loss(family):
    built = training(graft(*(universal.segmentor(family, 32, 1) for _ in range(2)), TERMS))
    for value in losses(built, universal.batch())[0].values():
        torch.testing.assert_close(value.detach(), torch.zeros(()), rtol=0, atol=1e-5)


def test_the_order_of_the_teachers_queries_means_nothing():
    built, batch = training(graft(*pair("maskformer"), TERMS)), universal.batch()
    first, _ = losses(built, batch)
    teacher = built.distiller.teacher.model
    before = outputs(teacher, batch)[0]
    order, queries = torch.tensor([3, 0, 5, 1, 4, 2]), teacher.model.transformer_module.queries_embedder.weight
    with torch.no_grad():
        queries.copy_(queries[order])
    torch.testing.assert_close(outputs(teacher, batch)[0], before[:, order])
    second, _ = losses(built, batch)
    for name in first:
        assert first[name] > 0
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_finite_under_autocast(family):
    built = training(graft(*pair(family), TERMS))
    with torch.autocast("cpu", torch.bfloat16):
        found, output = losses(built, universal.batch())
        (output.loss + sum(found.values())).backward()
    assert all(value.dtype == torch.float32 and value > 0 for value in found.values())
    assert all(g.isfinite().all() for g in gradients(built).values())


@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=[pytest.mark.slow] * (one != "mask2former")) for one in FAMILIES]
)
def test_a_trainer_teaches_by_a_bigger_one(family, tmp_path):
    def trainer_of(kind, model, folder, **settings):
        told = dict(max_steps=24, logging_steps=4, learning_rate=3e-3, remove_unused_columns=False)
        return kind(
            model=model,
            args=support.arguments(folder, **told),
            train_dataset=detectors.scenes(4),
            data_collator=universal.collate,
            **settings,
        )

    student, teacher = pair(family, 64)
    trainer_of(transformers.Trainer, teacher, tmp_path / "teacher").train()  # by the host alone
    trainer = trainer_of(DistillTrainer, student, tmp_path, teacher=teacher, terms=TERMS)
    trainer.train()
    first, *_, last = [entry for entry in trainer.state.log_history if "task_loss" in entry]
    names = [name for name in first if name.startswith("distill.") and name.endswith(".loss")]
    assert len(names) == 2 and all(last[name] < first[name] for name in names), [(first[n], last[n]) for n in names]
    assert last["task_loss"] < first["task_loss"]
    trainer.save_model(tmp_path / "student")
    loaded = type(student).__mro__[2].from_pretrained(tmp_path / "student")
    assert not any("distill" in name for name in loaded.state_dict())


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ("DKD", "compares the queries of objects, which are known for detectors"),
        (dict(type="SoftTargets", queries="objects"), "compares the queries of objects, which are known for detectors"),
        ("MatchedBoxes", "compares boxes, and MaskFormerForInstanceSegmentation predicts none by queries"),
        ("BoundedRegression", "compares the queries of objects, which are known for detectors"),
        (dict(type="BoundedRegression", bounded=False), "predicts masks; use MatchedMasks"),
        (dict(type="MatchedMasks", masks=0, dice=0), "leave nothing to compare"),
        ("HiddenStates", "are object queries, in an order of each model's own"),
    ],
)
def test_what_has_no_meaning_is_refused(term, message):
    with pytest.raises(DistillError, match=message) as caught:
        graft(*pair("maskformer"), [term])
    assert "\n" not in str(caught.value)


def test_models_that_predict_other_things_are_refused():
    with pytest.raises(WiringError, match=r"different tasks: universal .* and detection"):
        graft(universal.segmentor("maskformer"), detectors.detector("detr"), ["SoftTargets"])
    with pytest.raises(WiringError, match="matched_masks compares masks, and DetrForObjectDetection predicts none"):
        graft(*(detectors.detector("detr") for _ in range(2)), ["MatchedMasks"])


def test_a_detector_with_masks_is_taught_as_a_detector():
    models = []
    for seed in (1, 2):
        config = detectors.detector("detr", 64, seed, encoder_attention_heads=8, decoder_attention_heads=8).config
        config.backbone_config.out_features = ["stage1", "stage2", "stage3", "stage4"]
        torch.manual_seed(seed)
        models.append(support.quiet(transformers.DetrForSegmentation(config)))
    batch = detectors.collate(detectors.scenes(2))
    for label in batch["labels"]:
        label["masks"] = torch.ones(len(label["boxes"]), 64, 64)
    found, output = losses(training(graft(*models, ["SoftTargets", "MatchedBoxes"])), batch)
    assert output.loss.isfinite() and all(value > 0 for value in found.values())
