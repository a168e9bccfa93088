"""Every term trains a real Hugging Face model: a text classifier, a language model, or, for terms on maps, an image classifier."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from kdgraft import DistillError, Itself
from kdgraft_nlp import TERMS, DistillTrainer, OnPolicy
from kdgraft_nlp.reader import HFReader
from kdgraft_nlp.student import graft
from support import detectors, universal
from support import nlp as support
from support.methods import OF_ITSELF, assert_falls, assert_shared, own_terms, sharing, spec, split, trained

OWN = own_terms(TERMS)
USABLE, LACKING = split(TERMS, HFReader)
SETTINGS: dict[str, dict[str, Any]] = {
    "MarginMSE": dict(candidates=3),
    "Review": dict(tap=["resnet.encoder.stages[0]", "resnet.encoder.stages[1]"]),
    "BYOT": dict(tap=["resnet.encoder.stages[0]", "resnet.encoder.stages[1]"]),
    "ONE": dict(branch="resnet.encoder.stages.1"),
    "WeightMatching": dict(modules="bert.encoder.layer.1"),
}
"""Settings of a term for models of Hugging Face."""
FACTS = {"shared_tokens": torch.arange(support.VOCABULARY)[:, None].expand(-1, 2), "on_policy": OnPolicy()}
"""What a trainer knows of two tokenizers, and of the texts that its student writes."""
FAMILIES: dict[str, str] = {
    "UniversalLogits": "llama",
    "GOLD": "llama",
    "MiniLLM": "llama",
    "DSKD": "llama",
    "BoundedRegression": "regression",
    "MatchedBoxes": "detr",
    "MatchedMasks": "mask2former",
    "BYOT": "resnet",
    "ONE": "resnet",
}
"""A term's family of models, of ``support.TASKS``, where it is not BERT: ``"resnet"`` for maps, ``"regression"`` for numbers, ``"detr"`` for boxes, and so on."""


def family(kind: str) -> str:
    on_maps = {"maps", "images"} & set(OWN[kind].needs)
    return FAMILIES.get(kind, "resnet" if on_maps else "bert")


def model(name: str, width: int, seed: int) -> Any:
    if name == "resnet":
        torch.manual_seed(seed)
        config = ResNetConfig(embedding_size=width, hidden_sizes=[width, 2 * width], depths=[1, 1], num_labels=3)
        return ResNetForImageClassification(config)
    if name == "mask2former":
        return universal.segmentor(name, 2 * width, seed)
    if name == "detr":
        return detectors.detector(name, width, seed)
    if name == "regression":
        return support.quiet(support.model("bert", width, 2, 4, seed=seed, num_labels=1, problem_type="regression"))
    return support.quiet(support.model(name, width, 2, 4, seed=seed))


def batch(name: str) -> dict[str, Any]:
    if name == "resnet":
        images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return dict(pixel_values=images, labels=torch.tensor([0, 1, 2, 0]))
    if name == "mask2former":
        return universal.batch()
    if name == "detr":
        return detectors.collate(detectors.scenes(4))
    if name == "regression":
        return {**support.collate(support.samples(6)), "labels": torch.linspace(-1, 1, 6)}
    return support.collate(support.samples(6, support.TASKS[name][1]))


def student(kind: str) -> Any:
    name = family(kind)
    taps = {"resnet": "resnet.encoder.stages[1]", "bert": "bert.encoder[last_hidden_state]", "llama": "model.layers.1"}
    term = spec(OWN[kind], taps.get(name, ""), **SETTINGS.get(kind, {}))
    teacher = Itself() if kind in OF_ITSELF else model(name, 32, 2)
    return graft(model(name, 16, 1).train(), teacher, [term], facts=FACTS)


@pytest.mark.parametrize("kind", USABLE)
def test_trains_a_model(kind):
    built, given = student(kind), batch(family(kind))
    if "classifiers" in OWN[kind].needs:  # which both must get some images right
        given["labels"] = built.plain_forward(pixel_values=given["pixel_values"]).logits.argmax(1)
        built.distiller.teacher.model.classifier[-1].bias.data += 9 * given["labels"].bincount(minlength=3)

    def losses():
        built(**given)
        return built.distill_link.last.losses

    assert_falls(trained(losses, built.parameters()))


@pytest.mark.parametrize("kind", sharing(TERMS))
@pytest.mark.parametrize("share", [0.25, 0.0])
def test_takes_a_share_of_the_trainer_s_loss(kind, share, tmp_path):
    terms = [dict(type=kind, name="term", share=share), "SoftTargets"]
    trainer = DistillTrainer(
        model=model("bert", 16, 1), teacher=model("bert", 32, 2), terms=terms, args=support.arguments(tmp_path)
    )
    plain = {"loss": model("bert", 16, 1).train()(**batch("bert")).loss.detach()}
    total = trainer.compute_loss(trainer.model.train(), batch("bert")).detach()
    found = trainer.model.distill_link.last.losses
    assert_shared({"loss": total - found["distill.soft_targets.loss"], **found}, plain, share)


@pytest.mark.parametrize("kind", LACKING)
def test_what_models_of_hugging_face_lack_is_said(kind):
    with pytest.raises(DistillError) as caught:
        student(kind)
    reasons = [reason for need, reason in HFReader.lacks.items() if need in OWN[kind].needs]
    assert any(str(caught.value).endswith(reason) for reason in reasons) and "\n" not in str(caught.value)
