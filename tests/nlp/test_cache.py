"""Cached teacher outputs: the same training, without the teacher's passes."""

from __future__ import annotations

import pytest
import torch

import nlp_support as support
from kdgraft import DistillError, WiringError
from kdgraft_nlp import DistillCollator, DistillTrainer, TeacherCache

TERMS = {
    "bert": ["SoftTargets", "HiddenStates", "Embeddings", dict(type="PatientStates", layers="last")],
    "electra": ["SoftTargets", "HiddenStates"],
    "vit": ["SoftTargets", "HiddenStates"],
    "llama": ["ForwardKL"],
}


def trained(folder, family, cache, terms=None, kind="", task="", **more):
    task = task or support.TASKS[family][1]
    data = [{**sample, "id": f"s{i}"} for i, sample in enumerate(support.samples(8, task))]
    passes = []
    teacher = support.model(family, 32, 4, seed=2, kind=kind)
    teacher.register_forward_pre_hook(lambda *_: passes.append(1))
    collate = (
        support.collate
        if cache is not None
        else lambda rows: support.collate([{k: v for k, v in r.items() if k != "id"} for r in rows])
    )
    trainer = DistillTrainer(
        model=support.model(family, seed=1, kind=kind),
        teacher=teacher,
        terms=terms or TERMS[family],
        args=support.arguments(folder, num_train_epochs=3, max_steps=-1, optim="sgd", learning_rate=0.05, **more),
        train_dataset=data,
        data_collator=DistillCollator(collate, cache=cache),
    )
    passes.clear()
    trainer.train()
    return trainer, len(passes)


@pytest.mark.parametrize("family", list(TERMS))
def test_the_same_training_with_one_pass_a_sample(family, tmp_path):
    plain, passes = trained(tmp_path, family, None)
    assert passes == 6
    cache = TeacherCache()
    cached, passes = trained(tmp_path, family, cache)
    assert passes < 6 and len(cache) == 8
    again, none = trained(tmp_path, family, cache)
    assert none == 0
    for trainer in (cached, again):
        for name, value in plain.model.state_dict().items():
            torch.testing.assert_close(trainer.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_saved_and_found_again(tmp_path):
    cache = TeacherCache(folder=tmp_path / "cache")
    trained(tmp_path, "bert", cache)
    cache.save()
    found = TeacherCache(folder=tmp_path / "cache")
    assert len(found) == 8
    _, passes = trained(tmp_path, "bert", found)
    assert passes == 0
    with pytest.raises(DistillError, match=r"TeacherCache\(folder=…\)"):
        TeacherCache().save()


def test_question_answering(tmp_path):
    settings = dict(terms=["SoftTargets"], kind="BertForQuestionAnswering", task="question")
    plain, _ = trained(tmp_path, "bert", None, **settings)
    cache = TeacherCache()
    trained(tmp_path, "bert", cache, **settings)
    again, passes = trained(tmp_path, "bert", cache, **settings)
    assert passes == 0
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_refused(tmp_path):
    with pytest.raises(WiringError, match=r"reads attention .* which is not cached"):
        trained(tmp_path, "bert", TeacherCache(), ["AttentionMaps"])
    with pytest.raises(DistillError, match="no column 'key' in input_ids"):
        trained(tmp_path, "bert", TeacherCache(id="key"))
    cache = TeacherCache()
    trained(tmp_path, "bert", cache, ["SoftTargets"])
    for row in cache._rows.values():
        row["inputs"] = row["inputs"] ^ 1
    with pytest.raises(DistillError, match="was cached with other inputs"):
        trained(tmp_path, "bert", cache, ["SoftTargets"])
