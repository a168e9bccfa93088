"""Attention transfer by gradients on models of Hugging Face: images only, also through fused attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTForImageClassification

from kdgraft import Tap, WiringError
from kdgraft_nlp.cache import TeacherCache
from kdgraft_nlp.student import graft
from support import nlp as support

TERM = dict(type="GradientTransfer", name="term")


def vit(width: int, seed: int) -> ViTForImageClassification:
    torch.manual_seed(seed)
    shape = dict(image_size=8, patch_size=4, num_hidden_layers=1, num_attention_heads=2, num_labels=3)
    config = ViTConfig(hidden_size=width, intermediate_size=width, hidden_dropout_prob=0.0, **shape)
    return ViTForImageClassification(config)


def test_a_vision_transformer_with_fused_attention():
    student, teacher = vit(8, 1), vit(16, 2)
    assert student.config._attn_implementation == "sdpa"
    images, labels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 0])
    slopes = []
    for model in (student, teacher):
        x = images.clone().requires_grad_()
        value = F.cross_entropy(model.eval()(x).logits, labels, reduction="sum")
        slopes.append(torch.autograd.grad(value, x)[0])
    expected = (slopes[0] - slopes[1]).square().sum((1, 2, 3)).mean() / 2
    built = graft(student.train(), teacher, [TERM])
    # The labels come first, so that the images are found by their name.
    out = built(labels=labels, pixel_values=images)
    torch.testing.assert_close(built.distill_link.last.losses["distill.term.loss"], expected, rtol=1e-4, atol=1e-7)
    out.loss.backward()
    assert built.vit.embeddings.patch_embeddings.projection.weight.grad.isfinite().all()


def test_models_of_text_are_refused():
    models = [support.model("bert", width, 2, 4, seed=width) for width in (16, 32)]
    with pytest.raises(WiringError, match=r"^term differentiates models by the images .*, and Bert\w+ reads none"):
        graft(*models, [TERM])


def test_a_cache_has_neither_gradients_nor_weights():
    leaf = replace(Tap.parse(":inputs[pixel_values]"), leaf=True)
    for tap, message in ((leaf, "differentiates the teacher"), (Tap.parse("vit:parameters"), "reads weights")):
        with pytest.raises(WiringError, match=rf"^term {message}.*leave out the term, or give the teacher$"):
            TeacherCache().check([tap], "term")
