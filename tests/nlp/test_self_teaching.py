"""Text classifiers of Hugging Face that teach themselves by exits (BYOT) and by branches (ONE)."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from kdgraft import Itself, WiringError
from kdgraft_nlp import DistillTrainer
from kdgraft_nlp.student import graft
from support import nlp as support

TERMS = {
    "BYOT": dict(type="BYOT", tap=["bert.encoder.layer[0]", "bert.encoder.layer[1]"], width=8, feature_weight=0.1),
    "ONE": dict(type="ONE", branch="bert.encoder.layer[1]", branches=2),
}
every = pytest.mark.parametrize("kind", TERMS)


def trainer_of(folder, kind, **settings):
    return DistillTrainer(
        model=support.model("bert", seed=1),
        teacher=Itself(),
        terms=[TERMS[kind]],
        args=support.arguments(folder, **{"optim": "sgd", "learning_rate": 0.1, "max_steps": 4, **settings}),
        train_dataset=support.samples(8),
        data_collator=support.collate,
    )


@every
def test_padding_counts_in_nothing(kind):
    batch = support.collate(support.samples(4))
    longer = {
        name: value if name == "labels" else torch.cat([value, torch.full((4, 3), 5 * (name == "input_ids"))], 1)
        for name, value in batch.items()
    }
    found = []
    for inputs in (batch, longer):
        model = graft(support.quiet(support.model("bert", seed=1)).train(), Itself(), [TERMS[kind]])
        torch.manual_seed(0)
        for parameter in model.distiller.parameters():
            torch.nn.init.normal_(parameter, 0, 0.3)
        model(**inputs)
        found.append(model.distill_link.last.losses[f"distill.{kind.lower()}.loss"])
    assert found[0] > 0
    torch.testing.assert_close(*found)


@every
def test_it_trains_saves_a_plain_student_and_resumes(kind, tmp_path):
    whole = trainer_of(tmp_path / "whole", kind, save_steps=2, save_strategy="steps", logging_steps=1)
    before = [p.clone() for p in whole.model.distiller.parameters()]
    whole.train()
    assert all(
        not torch.equal(p, q)
        for p, q in zip(before, whole.model.distiller.parameters(), strict=True)
        if q.grad is not None
    )
    assert any(f"distill.{kind.lower()}.accuracy_1" in entry for entry in whole.state.log_history)
    resumed = trainer_of(tmp_path / "other", kind)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for ours, theirs in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    whole.save_model(str(tmp_path / "saved"))
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert saved.state_dict().keys() == support.model("bert", seed=1).state_dict().keys()


@pytest.mark.parametrize(
    ("family", "branch", "steps"),
    [
        ("bert", "bert.encoder.layer[1]", ["", "", "", ""]),
        # Its dropout stands after the classifier and runs before it.
        (
            "distilbert",
            ["distilbert.transformer.layer[1]", "pre_classifier", "dropout", "classifier"],
            ["first", "relu", "", ""],
        ),
        ("vit", "vit.layers[1]", ["", "first", ""]),
    ],
)
def test_the_last_part_of_classifiers(family, branch, steps):
    model = graft(support.model(family, seed=1).train(), Itself(), [dict(type="ONE", branch=branch)])
    assert model.distiller.terms["one"].copies[0].steps == steps


@every
@pytest.mark.parametrize(
    ("family", "kind_of", "layers"),
    [
        ("electra", "", "electra.encoder.layer"),
        ("llama", "", "model.layers"),
        ("bert", "BertForQuestionAnswering", "bert.encoder.layer"),
    ],
)
def test_only_classifiers_of_whole_samples(kind, family, kind_of, layers):
    place = dict(tap=[f"{layers}[0]", f"{layers}[1]"]) if kind == "BYOT" else dict(branch=f"{layers}[1]")
    with pytest.raises(WiringError, match=r"(must be \(B, classes\), one class for each|of one classifier, got 2)"):
        graft(support.model(family, seed=1, kind=kind_of), Itself(), [dict(type=kind, **place)])


def test_modules_that_run_in_another_order_are_to_be_listed():
    branch = "distilbert.transformer.layer[1]"
    with pytest.raises(
        WiringError, match=r"one: classifier gives \(2, 3\), which is not what dropout .*; list the modules"
    ):
        graft(support.model("distilbert", seed=1), Itself(), [dict(type="ONE", branch=branch)])
