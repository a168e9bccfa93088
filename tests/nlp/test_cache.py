"""Cached teacher outputs: the same training, without the teacher's passes."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from kdgraft import DistillError, WiringError
from kdgraft_nlp import DistillCollator, DistillTrainer, TeacherCache
from support import nlp as support

TERMS = {
    "bert": ["SoftTargets", "HiddenStates", "Embeddings", dict(type="PatientStates", layers="last")],
    "electra": ["SoftTargets", "HiddenStates"],
    "vit": ["SoftTargets", "HiddenStates"],
    "llama": ["ForwardKL"],
}


def trained(folder, family, cache, terms=None, kind="", task="", teacher=True, seed=2, count=8, **more):
    more = {"num_train_epochs": 3, "max_steps": -1, "optim": "sgd", "learning_rate": 0.05, **more}
    callbacks = more.pop("callbacks", None)
    task = task or support.TASKS[family][1]
    data = [{**sample, "id": f"s{i}"} for i, sample in enumerate(support.samples(count, task))]
    passes = []
    known = support.model(family, 32, 4, seed=seed, kind=kind) if teacher else None
    if known is not None:
        known.register_forward_pre_hook(lambda *_: passes.append(1))
    collate = (
        support.collate
        if cache is not None
        else lambda rows: support.collate([{k: v for k, v in r.items() if k != "id"} for r in rows])
    )
    trainer = DistillTrainer(
        model=support.model(family, seed=1, kind=kind),
        teacher=known,
        terms=terms or TERMS[family],
        args=support.arguments(folder, **more),
        train_dataset=data,
        data_collator=DistillCollator(collate, cache=cache),
        callbacks=callbacks,
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


@pytest.mark.parametrize("family", TERMS)
def test_a_full_folder_needs_no_teacher(family, tmp_path):
    plain, _ = trained(tmp_path, family, None)
    trained(tmp_path, family, TeacherCache(folder=tmp_path / "cache"))
    found = TeacherCache(folder=tmp_path / "cache")
    assert len(found) == 8
    alone, _ = trained(tmp_path, family, found, teacher=False)
    assert all(parameter.is_meta for parameter in alone.distiller.teacher.model.parameters())
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(alone.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    keys = [key for key in plain.state.log_history[0] if key.startswith("distill.")]
    for key in keys:
        values = [[entry[key] for entry in t.state.log_history if key in entry] for t in (plain, alone)]
        assert values[1] == pytest.approx(values[0], rel=1e-3, abs=1e-5), key


def test_what_the_folder_does_not_have_asks_for_the_teacher(tmp_path):
    folder = tmp_path / "cache"
    with pytest.raises(DistillError, match="terms need teacher=…"):
        trained(tmp_path, "bert", TeacherCache(folder=folder), ["SoftTargets"], teacher=False)
    trained(tmp_path, "bert", TeacherCache(folder=folder), ["SoftTargets"])
    settings = dict(teacher=False, max_steps=9)
    with pytest.raises(DistillError, match=r"no stored output of sample 's\d+' \(\[logits\]\); give teacher=…"):
        trained(tmp_path, "bert", TeacherCache(folder=folder), ["SoftTargets"], count=12, **settings)
    with pytest.raises(WiringError, match=r"the cache holds nothing of 'bert.encoder.layer.1' of the BertForSeq"):
        trained(tmp_path, "bert", TeacherCache(folder=folder), ["HiddenStates"], **settings)
    # With the teacher both are added.
    trained(tmp_path, "bert", TeacherCache(folder=folder), ["SoftTargets", "HiddenStates"], count=12)
    _, passes = trained(tmp_path, "bert", TeacherCache(folder=folder), ["HiddenStates"], count=12)
    assert passes == 0
    trained(tmp_path, "bert", TeacherCache(folder=folder), ["SoftTargets", "HiddenStates"], count=12, **settings)


def test_another_teacher_gets_nothing_of_the_first(tmp_path):
    folder = tmp_path / "cache"
    trained(tmp_path, "bert", TeacherCache(folder=folder), ["SoftTargets"])
    with pytest.raises(DistillError, match=r"outputs of another teacher \(a BertForSeq.* with other weights\)"):
        trained(tmp_path, "bert", TeacherCache(folder=folder), ["SoftTargets"], seed=3)
    with pytest.raises(DistillError, match=r"outputs of another teacher \(a BertForSequenceClassification\)"):
        trained(tmp_path, "distilbert", TeacherCache(folder=folder), ["SoftTargets"])


class Stopped(TrainerCallback):
    """Ends the process's training in its third step."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_written_while_it_trains(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, "bert", TeacherCache(folder=tmp_path / "stopped"), callbacks=[Stopped()])
    assert len(TeacherCache(folder=tmp_path / "stopped")) == 8

    seen = []
    monkeypatch.setattr("kdgraft_nlp.cache.SHARD", 4)

    class Look(TrainerCallback):
        def on_step_end(self, *_, **__):
            seen.append(len(TeacherCache(folder=tmp_path / "shards")))

    trained(tmp_path, "bert", TeacherCache(folder=tmp_path / "shards"), callbacks=[Look()])
    assert seen[:2] == [4, 8]
    assert not [file for file in (tmp_path / "shards").iterdir() if file.suffix == ".tmp"]


def test_other_inputs_are_refused_also_where_a_tap_is_missing(tmp_path):
    cache = TeacherCache()
    trained(tmp_path, "bert", cache, ["SoftTargets"])
    for row in cache._rows.values():
        row["inputs"] = row["inputs"] ^ 1
    with pytest.raises(DistillError, match="was cached with different inputs"):
        trained(tmp_path, "bert", cache, ["SoftTargets", "HiddenStates"])


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
    with pytest.raises(WiringError, match=r"reads attention .* whose maps are too large for a cache"):
        trained(tmp_path, "bert", TeacherCache(), ["AttentionMaps"])
    with pytest.raises(DistillError, match=r"outputs for input tokens only, and T5\w+ is a model with a decoder"):
        trained(tmp_path, "t5", TeacherCache(), ["ForwardKL"])
    with pytest.raises(DistillError, match="needs column 'key', not in input_ids"):
        trained(tmp_path, "bert", TeacherCache(id="key"))
    cache = TeacherCache()
    trained(tmp_path, "bert", cache, ["SoftTargets"])
    for row in cache._rows.values():
        row["inputs"] = row["inputs"] ^ 1
    with pytest.raises(DistillError, match="was cached with different inputs"):
        trained(tmp_path, "bert", cache, ["SoftTargets"])
