"""Samples near the decision boundary of image classifiers of Hugging Face (BSS), and the models that have none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

from kdgraft import DistillError, SoftTargets
from kdgraft.boundary import base_samples, boundary_samples, target_classes
from kdgraft.losses import soft_targets
from kdgraft_nlp import TeacherCache
from kdgraft_nlp.student import graft
from support import nlp as support

IMAGES = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5


def classifier(width: int, seed: int) -> Any:
    torch.manual_seed(seed)
    config = ResNetConfig(embedding_size=width, hidden_sizes=[width, 2 * width], depths=[1, 1], num_labels=3)
    return ResNetForImageClassification(config)


def distilled(*terms: Any, **settings: Any) -> Any:
    return graft(classifier(8, 1).train(), classifier(12, 2), list(terms), **settings)


def labels_for(student: Any) -> Tensor:
    """The student's classes, which the teacher is made to give, too."""
    labels = copy.deepcopy(student).train()(pixel_values=IMAGES).logits.argmax(1)
    student.distiller.teacher.model.classifier[-1].bias.data += 3.0 * labels.bincount(minlength=3)
    return labels


def test_the_loss_by_hand():
    built = distilled(dict(type="BoundarySamples", name="near", steps=3, step_size=4.0, bound=0.6, weight=2.0))
    labels, teacher, term = labels_for(built), built.distiller.teacher.model, built.distiller.terms["near"]
    scores = teacher(pixel_values=IMAGES).logits
    plain = copy.deepcopy(built).train()
    first = plain(pixel_values=IMAGES).logits
    chosen, count = base_samples(first, scores, labels, 64)
    assert count > 2
    random = torch.Generator()
    random.set_state(term.hidden_state()["random"])
    drawn = copy.copy(term._random)
    drawn._generator = random
    targets = target_classes(scores, drawn.of_rows((6, 1), IMAGES.device)[:, 0] / 2.0**62)
    run = lambda x: teacher(pixel_values=x).logits  # noqa: E731
    moved = boundary_samples(run, IMAGES[chosen], targets[chosen], steps=3, step_size=4.0, bound=0.6)
    assert moved.abs().max() <= 0.6 and not torch.equal(moved, IMAGES[chosen])
    expected = soft_targets(plain(pixel_values=moved).logits, run(moved), 3.0)
    built(pixel_values=IMAGES, labels=labels)
    found = built.distill_link.last.losses
    torch.testing.assert_close(found["distill.near.loss"], 2 * expected)
    assert found["distill.near.samples"] == count
    # The running statistics are those of two passes.
    own, twin = (dict(one.named_buffers()) for one in (built, plain))
    assert all(torch.allclose(own[name], x) for name, x in twin.items() if "running" in name)


def test_the_recipe_trains():
    built = distilled(*[dict(type="SoftTargets"), "BoundarySamples"])
    labels = labels_for(built)
    built(pixel_values=IMAGES, labels=labels).loss.backward()
    slopes = [p.grad for p in built.parameters() if p.grad is not None]
    assert slopes and all(slope.isfinite().all() for slope in slopes)
    assert isinstance(built.distiller.terms["soft_targets"], SoftTargets)


def segmentor(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1])
    return SegformerForSemanticSegmentation(SegformerConfig(**sizes, decoder_hidden_size=8, num_labels=3))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: graft(support.model("bert", 16, 2, 4), support.model("bert", 16, 2, 4), ["BoundarySamples"]),
            "boundary_samples differentiates models by the images that they see, and BertForSequenceClassification reads none",
        ),
        (
            lambda: graft(segmentor(1), segmentor(2), ["BoundarySamples"]),
            "boundary_samples needs one row of class scores for each sample",
        ),
        (
            lambda: distilled("BoundarySamples", cache=TeacherCache()),
            "boundary_samples attacks a frozen model on new samples, and its source is a Cached; use a Teacher without a cache",
        ),
    ],
)
def test_what_has_no_such_samples_is_refused(build: Any, message: str):
    with pytest.raises(DistillError) as error:
        build()
    assert message in str(error.value) and "\n" not in str(error.value)
