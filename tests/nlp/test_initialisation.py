"""A student that starts from layers of its teacher: real models; what does not fit is refused and changes nothing."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from kdgraft import DistillError
from kdgraft_nlp import DistillTrainer, distill, init_from_teacher
from kdgraft_nlp.attention import stacks
from kdgraft_nlp.run import build
from support import nlp as support

# Family -> how the stack's list of layers is called.
STACKS = {
    "bert": {"layers": "bert.encoder.layer"},
    "llama": {"layers": "model.layers"},
    "t5": {"encoder": "encoder.block", "decoder": "decoder.block"},
    "distilbert": {"layers": "distilbert.transformer.layer"},
    "deberta": {"layers": "deberta.encoder.layer"},
    "vit": {"layers": "vit.layers"},
}


def pair(family: str, depth: int = 4, **settings):
    return support.model(family, layers=2, seed=1), support.model(family, layers=depth, seed=2, **settings)


def expected(family, own, given, layers):
    """The student's weights by hand: each layer's from its teacher layer, all else under its own name."""
    found = {}
    for key in own:
        other = key
        for path in STACKS[family].values():
            if key.startswith(f"{path}."):
                number, _, rest = key.removeprefix(f"{path}.").partition(".")
                other = f"{path}.{layers[int(number)]}.{rest}"
                if other not in given:  # T5's position bias is in the first layer alone
                    other = f"{path}.0.{rest}"
        found[key] = given[other]
    return found


@pytest.mark.parametrize("family", STACKS)
def test_embeddings_layers_and_head_are_the_teachers(family):
    student, teacher = pair(family)
    before = copy.deepcopy(teacher.state_dict())
    own = copy.deepcopy(student.state_dict())
    assert init_from_teacher(student, teacher, layers=[1, -1]) is student
    found = student.state_dict()
    by_hand = expected(family, own, before, [1, 3])
    assert found.keys() == by_hand.keys()
    for key, value in found.items():
        assert torch.equal(value, by_hand[key]), key
    assert any(not torch.equal(found[key], own[key]) for key in found)
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_all_layers_in_order_are_the_teacher_itself(family):
    student, teacher = support.model(family, layers=3, seed=1).eval(), support.model(family, layers=3, seed=2).eval()
    init_from_teacher(student, teacher, layers=range(3))
    batch = support.collate(support.samples(4, support.TASKS[family][1]))
    assert torch.equal(student(**batch).logits, teacher(**batch).logits)


def test_encoder_and_decoder_apart():
    student, teacher = pair("t5")
    init_from_teacher(student, teacher, layers={"encoder": [0, 2], "decoder": [3, 1]})
    mine, theirs = (
        {name: model.get_submodule(name).block for name in ("encoder", "decoder")} for model in (student, teacher)
    )
    for stack, own, other in (("encoder", 1, 2), ("decoder", 1, 1)):
        left, right = mine[stack][own].state_dict(), theirs[stack][other].state_dict()
        assert all(torch.equal(left[key], right[key]) for key in left)
    # The first layer's position bias, which only the teacher's first layer has.
    name = "layer.0.SelfAttention.relative_attention_bias.weight"
    assert torch.equal(mine["decoder"][0].state_dict()[name], theirs["decoder"][0].state_dict()[name])


def test_a_head_of_another_shape_or_task_stays():
    student, teacher = pair("bert", num_labels=5)
    own = student.classifier.weight.clone()
    init_from_teacher(student, teacher, layers=[0, 2])
    assert torch.equal(student.classifier.weight, own)
    assert torch.equal(student.bert.pooler.dense.weight, teacher.bert.pooler.dense.weight)
    masked = support.model("bert", layers=4, seed=3, kind="BertForMaskedLM")
    init_from_teacher(student, masked, layers=[0, 2])  # has no pooler and no classifier
    assert torch.equal(student.classifier.weight, own)
    layer = student.bert.encoder.layer[1].state_dict()
    assert all(torch.equal(layer[key], value) for key, value in masked.bert.encoder.layer[2].state_dict().items())


def test_embeddings_tied_to_a_head_are_not_overwritten_by_an_untied_teachers_head():
    student = support.model("llama", seed=1, tie_word_embeddings=True)
    teacher = support.model("llama", layers=4, seed=2)
    assert not torch.equal(teacher.lm_head.weight, teacher.model.embed_tokens.weight)
    init_from_teacher(student, teacher, layers=[1, 3])
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("student", "teacher", "layers", "said"),
    [
        (dict(family="bert"), dict(family="bert"), [0], "names 1 layers of the teacher, and the student has 2"),
        (dict(family="bert"), dict(family="bert"), [0, 4], "the teacher has layers 0 to 3, got 4"),
        (dict(family="bert"), dict(family="bert"), [0, True], "the teacher has layers 0 to 3, got True"),
        (dict(family="bert"), dict(family="bert"), 3, r"is a list of the teacher's layers, such as \[1, 3, 5\]; got 3"),
        (dict(family="bert"), dict(family="bert"), "13", "is a list of the teacher's layers"),
        (dict(family="bert"), dict(family="bert"), {"encoder": [0, 1]}, "has layers, got encoder"),
        (dict(family="bert"), dict(family="t5"), [0, 1], "the student has layers, and the teacher encoder and decoder"),
        (dict(family="bert"), dict(family="distilbert"), [0, 1], "layers are BertLayer, and the teacher's TransformerBlock"),
        (dict(family="llama"), dict(family="qwen"), [0, 1], "layers are LlamaDecoderLayer, and the teacher's Qwen3"),
        (dict(family="bert"), dict(family="bert", width=32), [0, 1], r"is \(16,\) in the student and \(32,\)"),
        (dict(family="bert"), dict(family="bert", vocab_size=41), [0, 1], r"word_embeddings.* \(40, 16\) in the student and \(41"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(student, teacher, layers, said):
    mine, theirs = support.model(**student, seed=1), support.model(**teacher, layers=4, seed=2)
    before = copy.deepcopy(mine.state_dict())
    with pytest.raises(DistillError, match=said) as caught:
        init_from_teacher(mine, theirs, layers=layers)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in mine.state_dict().items())


def trainer_of(folder, student, cls=DistillTrainer, **settings):
    return cls(
        model=student,
        args=support.arguments(folder, max_steps=1),
        train_dataset=support.samples(4),
        data_collator=support.collate,
        **settings,
    )


def test_trainers_take_it(tmp_path):
    student, teacher = pair("bert")
    wanted = init_from_teacher(copy.deepcopy(student), teacher, layers=[1, 3]).state_dict()
    teacher.save_pretrained(tmp_path / "teacher")
    for given in (teacher, str(tmp_path / "teacher")):
        settings = dict(teacher=given, terms=["SoftTargets"], init_from=[1, 3])
        first = trainer_of(tmp_path, copy.deepcopy(student), **settings).model
        second = distill(trainer_of(tmp_path, copy.deepcopy(student), support.transformers.Trainer), **settings).model
        for model in (first, second):
            found = model.state_dict()
            assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    for settings in (
        dict(terms=[]),
        dict(teachers={"a": teacher, "b": teacher}, terms=[dict(type="SoftTargets", source=n) for n in "ab"]),
    ):
        with pytest.raises(DistillError, match="init_from needs one frozen teacher"):
            trainer_of(tmp_path, copy.deepcopy(student), init_from=[1, 3], **settings)
    with pytest.raises(DistillError, match="init_from is given, and nothing says what to learn"):
        trainer_of(tmp_path, copy.deepcopy(student), init_from=[1, 3])


def test_a_recipe_takes_it(tmp_path):
    words = ["red cat runs", "blue dog sleeps", "green bird eats"]
    rows = [{"text": words[i % 3], "label": i % 2} for i in range(8)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes = dict(model_type="bert", hidden_size=16, num_attention_heads=2, intermediate_size=16)
    config = dict(
        task="classification",
        data=dict(train=str(tmp_path / "a.jsonl"), length=8),
        tokenizer=dict(vocab_size=60),
        student=dict(sizes, num_hidden_layers=4),
        output=str(tmp_path / "teacher"),
        training=dict(use_cpu=True, max_steps=1, save_strategy="no"),
    )
    trainer = build(config)
    trainer.save_model()
    config |= dict(teacher=str(tmp_path / "teacher"), terms=["SoftTargets"], output=str(tmp_path / "student"))
    student = build({**config, "student": dict(sizes, num_hidden_layers=2), "init_from": [1, 3]}).model
    mine, theirs = (model.bert.encoder.layer for model in (student, trainer.model))
    for own, other in ((0, 1), (1, 3)):
        left, right = mine[own].state_dict(), theirs[other].state_dict()
        assert all(torch.equal(left[key], right[key]) for key in right)
    assert len(stacks(student)["layers"]) == 2
    with pytest.raises(DistillError, match=r"init_from is a list of the teacher's layers, such as \[1, 3, 5\]; got 3"):
        build({**config, "init_from": 3})
    with pytest.raises(DistillError, match="init_from needs teacher, whose layers the student starts from"):
        build({**config, "teacher": None, "terms": None, "init_from": [1, 3]})
