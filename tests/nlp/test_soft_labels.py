"""Soft labels from a column: what they teach, in recipe files and in Python, and which are refused, with the number of the row."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding, Trainer

from kdgraft import DistillError, Ensemble, WiringError
from kdgraft.cli import main
from kdgraft.consistent import Teaching
from kdgraft_nlp import DistillCollator, DistillTrainer, SoftLabels, SoftTargets, TeacherCache, distill, fill_store
from kdgraft_nlp.data import train_tokenizer
from kdgraft_nlp.run import build
from support import nlp as support

TEXTS = ["a fine film", "a dull film", "fine work", "so so"] * 4
SOFT = [[0.7, 0.2, 0.1], [0.1, 0.9, 0.0], [0.25, 0.25, 0.5], [0.0, 0.0, 1.0]] * 4
TOKENIZER = train_tokenizer(TEXTS, vocab_size=50)


def bert(**settings):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = BertConfig(vocab_size=len(TOKENIZER), **{**sizes, "num_labels": 3, **settings})
    return support.quiet(BertForSequenceClassification(config))


def samples(soft=SOFT, **more):
    return Dataset.from_dict({**TOKENIZER(TEXTS), "labels": [0, 1, 2, 2] * 4, "soft": soft, **more})


def trainer(folder, teacher, data=None, student=None, terms=None, **settings):
    return DistillTrainer(
        model=student or bert(),
        teacher=teacher,
        terms=terms or [SoftTargets()],
        args=support.arguments(folder, **settings.pop("args", {})),
        train_dataset=data if data is not None else samples(),
        **{"data_collator": DataCollatorWithPadding(TOKENIZER), **settings},
    )


def first_loss(built):
    """The term's loss on the first batch, with that batch."""
    batch = built._prepare_inputs(next(iter(built.get_train_dataloader())))
    built.state.epoch, built.current_gradient_accumulation_steps = 0.0, 1
    built.compute_loss(built.model.train(), dict(batch))
    return built.model.distill_link.last.losses["distill.soft_targets.loss"].item(), batch


def logits_of(built, batch):
    names = ("input_ids", "attention_mask", "token_type_ids")
    with torch.no_grad():
        return built.model.plain_forward(**{k: v for k, v in batch.items() if k in names}).logits.double()


def kl(probabilities, logits, order=None):
    """KL of given probabilities to the student's, by hand; 0 log 0 is 0."""
    total = 0.0
    for row, scores in zip(probabilities, logits.log_softmax(-1).tolist(), strict=True):
        row = row if order is None else [row[i] for i in order]
        total += sum(p * (math.log(p) - q) for p, q in zip(row, scores, strict=True) if p)
    return total / len(probabilities)


# --- in Python


def test_the_loss_is_the_divergence_from_the_columns_probabilities(tmp_path):
    built = trainer(tmp_path, SoftLabels("soft"))
    loss, batch = first_loss(built)
    assert batch["soft"].shape == (4, 3)
    assert loss == pytest.approx(kl(batch["soft"].tolist(), logits_of(built, batch)), rel=1e-5)
    built.train()
    assert "distill.soft_targets.loss" in built.state.log_history[0]


def test_a_temperature_sharpens_probabilities_as_it_does_logits(tmp_path):
    for values in ("probabilities", "logits"):
        soft = SOFT if values == "probabilities" else [[3.0, 0.5, -2.0], [0.0, 0.1, 0.2]] * 8
        built = trainer(tmp_path, SoftLabels("soft", values), samples(soft), terms=[SoftTargets(temperature=2.0)])
        loss, batch = first_loss(built)
        given = batch["soft"].double()
        # By hand: p^(1/2) normalised, which keeps a probability of 0, or softmax(z/2); times T² = 4.
        raised = given.sqrt() if values == "probabilities" else (given / 2).exp()
        raised = raised / raised.sum(1, keepdim=True)
        assert loss == pytest.approx(4 * kl(raised.tolist(), logits_of(built, batch) / 2), rel=1e-5)


def test_classes_are_compared_by_name(tmp_path):
    names = dict(id2label={0: "bad", 1: "good", 2: "neither"}, label2id={"bad": 0, "good": 1, "neither": 2})
    built = trainer(tmp_path, SoftLabels("soft", classes=["good", "neither", "bad"]), student=bert(**names))
    loss, batch = first_loss(built)
    assert loss == pytest.approx(kl(batch["soft"].tolist(), logits_of(built, batch), order=[2, 0, 1]), rel=1e-5)
    with pytest.raises(WiringError, match=r"other classes: it lacks .*'neither'"):
        trainer(tmp_path, SoftLabels("soft", classes=["good", "bad", "worse"]), student=bert(**names))


def test_a_trainer_that_exists_and_a_collator_around_its_own(tmp_path):
    plain = Trainer(
        bert(),
        support.arguments(tmp_path),
        DataCollatorWithPadding(TOKENIZER),
        train_dataset=samples(),
        eval_dataset=samples().remove_columns("soft"),
    )
    distill(plain, teacher=SoftLabels("soft"), terms=["SoftTargets"])
    plain.train()
    assert plain.evaluate()["eval_loss"] > 0  # the column need not be there
    wrapped = trainer(tmp_path, SoftLabels("soft"), data_collator=DistillCollator(DataCollatorWithPadding(TOKENIZER)))
    assert first_loss(wrapped)[0] == pytest.approx(first_loss(trainer(tmp_path, SoftLabels("soft")))[0])


def test_several_labels_have_a_probability_each(tmp_path):
    soft = [[0.9, 0.8, 0.0], [1.0, 0.5, 0.25]] * 8
    data = samples(soft).remove_columns("labels").add_column("labels", [[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]] * 8)
    built = trainer(tmp_path, SoftLabels("soft"), data, bert(problem_type="multi_label_classification"))
    loss, batch = first_loss(built)
    ours = logits_of(built, batch).sigmoid()
    expected = 0.0
    for row, own in zip(batch["soft"].tolist(), ours.tolist(), strict=True):
        for p, q in zip(row, own, strict=True):
            expected += sum(a * math.log(a / b) for a, b in ((p, q), (1 - p, 1 - q)) if a)
    assert loss == pytest.approx(
        expected / (3 * len(ours)), rel=1e-4
    )  # a mean over classes, as of the student's own loss


def test_an_ensemble_of_a_column_and_a_model(tmp_path):
    torch.manual_seed(3)
    model = bert(hidden_size=32)
    teachers = dict(soft=SoftLabels("soft"), model=model, both=Ensemble(["soft", "model"]))
    built = trainer(tmp_path, None, teachers=teachers, terms=[SoftTargets(source="both")])
    loss, batch = first_loss(built)
    names = ("input_ids", "attention_mask", "token_type_ids")
    with torch.no_grad():
        theirs = model.eval()(**{k: v for k, v in batch.items() if k in names}).logits.double().softmax(-1)
    mean = (theirs + batch["soft"].double()) / 2
    assert loss == pytest.approx(kl(mean.tolist(), logits_of(built, batch)), rel=1e-4)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([0.5, 0.5], "has 2 numbers, and there are 3 classes"),
        ([1.2, -0.2, 0.0], "has -0.2, which is no probability; say values: logits"),
        ([0.5, 0.5, float("nan")], "has the number nan"),
        ([float("inf"), 0.0, 0.0], "has the number inf"),
        ([0.5, 0.4, 0.05], "has probabilities with a sum of 0.95, which must be 1"),
        (None, "must be a list of 3 probabilities, one for each class, got None"),
    ],
)
@pytest.mark.parametrize("kind", ["set", "list", "stream"])
def test_rows_that_are_refused(kind, row, said, tmp_path):
    data = samples([*SOFT[:5], row, *SOFT[6:]])
    where = "sample 5 of column 'soft'"
    if kind == "list":
        data = [data[i] for i in range(len(data))]
    if kind == "stream":
        if row is None or len(row) == 2:
            row, said = (
                [0.5, 0.4, 0.0],
                "has probabilities with a sum of 0.9",
            )  # others are no tensor, as the collator says
            data = samples([*SOFT[:5], row, *SOFT[6:]])
        data, where = data.to_iterable_dataset(), "'soft' of row 1 of a batch"
    with pytest.raises(DistillError) as caught:
        trainer(tmp_path, SoftLabels("soft"), data).train()
    assert f"{where} {said}" in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_refused(tmp_path, monkeypatch):
    cases = [
        (dict(terms=["HiddenStates"]), "hidden_states reads more than class scores, and SoftLabels has nothing else"),
        (dict(terms=["LogitMatching"]), "logit_matching compares logits, which probabilities determine only up to"),
        (dict(terms=[SoftTargets(standardize=True)]), "soft_targets compares logits"),
        (dict(student=bert(num_labels=1, problem_type="regression")), "SoftLabels gives classes of whole samples"),
        (dict(student=support.model("gpt2")), "SoftLabels gives classes of whole samples, which GPT2LMHeadModel"),
        (dict(data=samples().remove_columns("soft")), "the training set has no column 'soft' but"),
        (dict(init_from=[0]), "init_from: SoftLabels has no layers to start from"),
        (
            dict(data_collator=DistillCollator(DataCollatorWithPadding(TOKENIZER), cache=TeacherCache())),
            "a cache is for a classifier, and SoftLabels is none",
        ),
    ]
    for settings, said in cases:
        with pytest.raises(DistillError) as caught:
            trainer(tmp_path, SoftLabels("soft"), **settings)
        assert said in str(caught.value)
    trainer(tmp_path, SoftLabels("soft", "logits"), terms=["LogitMatching"])
    with pytest.raises(DistillError, match="a store is of a classifier, and SoftLabels is none"):
        fill_store(trainer(tmp_path, SoftLabels("soft")), tmp_path / "store")
    for wrong in (dict(column=""), dict(column="labels"), dict(column="soft", values="scores")):
        with pytest.raises(DistillError, match=r"^SoftLabels: (column|values) must be"):
            SoftLabels(**wrong)


def test_views_of_images_have_no_soft_labels(tmp_path):
    data = [{**one, "soft": [0.2, 0.3, 0.5]} for one in support.samples(8, "image")]
    settings = dict(
        model=support.model("vit"), teacher=SoftLabels("soft"), args=support.arguments(tmp_path), train_dataset=data
    )
    DistillTrainer(terms=[SoftTargets()], **settings).train()
    with pytest.raises(DistillError, match="SoftLabels gives classes of the samples as they are; leave out views"):
        DistillTrainer(recipe="funmatch", views=Teaching(), **{**settings, "model": support.model("vit")})


# --- in recipe files


ROWS = [
    {"text": text, "label": ["good", "bad", "neither", "neither"][i % 4], "soft": soft}
    for i, (text, soft) in enumerate(zip(TEXTS, SOFT, strict=True))
]


def recipe(folder, rows=ROWS, **entries):
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = dict(train=str(folder / "train.jsonl"), length=16, soft_labels="soft", **entries.pop("data", {}))
    student = dict(model_type="bert", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    student |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    training = dict(use_cpu=True, max_steps=2, save_strategy="no", disable_tqdm=True)
    return {
        "task": "classification",
        "data": data,
        "tokenizer": dict(vocab_size=60),
        "student": student,
        "training": training,
        "terms": ["SoftTargets"],
        "output": str(folder / "out"),
        **entries,
    }


def test_a_recipe_file_learns_from_a_column(tmp_path, capsys):
    config = recipe(tmp_path, data=dict(classes=["good", "neither", "bad"]))
    config["data"]["eval"] = config["data"]["train"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    assert main(["check", str(tmp_path / "recipe.yaml")]) == 0
    assert "distill.soft_targets.loss" in capsys.readouterr().out
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    assert main(["test", str(tmp_path / "recipe.yaml"), str(tmp_path / "out")]) == 0
    built = build(config)
    loss, batch = first_loss(built)
    assert [*built.model.config.id2label.values()] == ["good", "neither", "bad"]
    assert loss == pytest.approx(kl(batch["soft_labels"].tolist(), logits_of(built, batch)), rel=1e-5)


def test_without_labels_the_column_alone_teaches(tmp_path):
    rows = [{key: value for key, value in row.items() if key != "label"} for row in ROWS]
    (tmp_path / "eval.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    config = recipe(tmp_path, rows, data=dict(eval=str(tmp_path / "eval.jsonl"), labels=False), host_weight=0)
    built = build(config)
    built.train()
    assert "eval_accuracy" in built.evaluate()
    batch = next(iter(built.get_train_dataloader()))
    assert "labels" not in batch and batch["soft_labels"].shape == (8, 3)


def test_beside_named_teachers(tmp_path):
    bert(id2label={0: "bad", 1: "good", 2: "neither"}, label2id={"bad": 0, "good": 1, "neither": 2}).save_pretrained(
        tmp_path / "big"
    )
    TOKENIZER.save_pretrained(tmp_path / "big")
    teachers = dict(big=str(tmp_path / "big"), both=dict(type="Ensemble", members=["big", "soft_labels"]))
    terms = [dict(type="SoftTargets", source="both"), dict(type="HiddenStates", source="big")]
    built = build(recipe(tmp_path, teachers=teachers, terms=terms))
    built.train()
    assert {*built.distiller.sources} == {"soft_labels", "big", "both"}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (dict(data=dict(soft_labels="soft"), teacher="x"), "data.soft_labels teach by themselves; leave out teacher"),
        (
            dict(data=dict(soft_labels="there")),
            "no column 'there' but text, label, soft; name it with data.soft_labels",
        ),
        (
            dict(data=dict(soft_labels=dict(column="soft", value="logits"))),
            "no argument 'value'; did you mean 'values'",
        ),
        (dict(data=dict(soft_labels=dict(values="logits"))), "data.soft_labels needs column"),
        (dict(data=dict(soft_labels=5)), "data.soft_labels is a column's name, or {column: name, values: logits}"),
        (dict(data=dict(classes=["good", "bad"])), "has the class 'neither', which data.classes lacks"),
        (dict(task="regression", data={}), "data.soft_labels is not read for task regression"),
        (dict(terms=None), "a teacher is given, and nothing says what to learn"),
        (dict(teachers=dict(soft_labels="x")), "no teachers.soft_labels at x"),
    ],
)
def test_recipes_that_are_refused(entries, said, tmp_path, capsys):
    config = recipe(tmp_path)
    config["data"] |= entries.pop("data", {})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**config, **entries}))
    support.refused(capsys, ["check", str(tmp_path / "recipe.yaml")], said)


def test_a_malformed_row_of_a_recipe_is_named(tmp_path, capsys):
    rows = [*ROWS[:9], {**ROWS[9], "soft": [0.5, 0.6, 0.0]}, *ROWS[10:]]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(tmp_path, rows, data=dict(fraction=0.25))))
    said = "sample 9 of column 'soft' has probabilities with a sum of 1.1, which must be 1"
    support.refused(capsys, ["train", str(tmp_path / "recipe.yaml")], said)
