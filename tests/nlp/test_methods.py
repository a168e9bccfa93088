"""Every term trains a real Hugging Face model: a text classifier, a language model, or, for terms on maps, an image classifier."""

from __future__ import annotations

from typing import Any

import pytest

from kdgraft import DistillError, Itself
from kdgraft_nlp import TERMS, DistillTrainer
from kdgraft_nlp.reader import HFReader
from kdgraft_nlp.student import graft
from support import nlp as support
from support.methods import OF_ITSELF, assert_falls, assert_shared, own_terms, sharing, spec, split, trained
from support.nlp_methods import FACTS, SETTINGS, batch, family, model

OWN = own_terms(TERMS)
USABLE, LACKING = split(TERMS, HFReader)


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
