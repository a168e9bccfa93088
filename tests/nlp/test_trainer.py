"""DistillTrainer on the real Trainer: the promises, and everything that the Trainer does besides."""

from __future__ import annotations

import copy
import json
import logging
import warnings

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)

from kdgraft import DistillError, WiringError
from kdgraft_nlp import DistillCollator, DistillTrainer, HiddenStates, SoftTargets, distill, undistill
from kdgraft_nlp.student import graft
from support import nlp as support

ALL = [
    "SoftTargets",
    "AttentionMaps",
    dict(type="Relations"),
    "HiddenStates",
    "Embeddings",
    dict(type="PatientStates", layers="last"),
]


def trained(
    folder, terms=(), steps=4, kind=DistillTrainer, resume=None, data=None, family="bert", student=None, **settings
):
    """A trainer that has trained; a plain Trainer without terms and teacher."""
    student = student if student is not None else support.model(family, seed=1)
    more = settings.pop("more", {})
    if kind is DistillTrainer:
        more = {"teacher": support.model(family, 32, 4, seed=2), "terms": list(terms), **more}
    task = support.TASKS[family][1]
    trainer = kind(
        model=student,
        args=support.arguments(folder, max_steps=steps, **settings),
        train_dataset=data if data is not None else support.samples(12, task),
        eval_dataset=support.samples(6, task, seed=5),
        data_collator=support.collate,
        **more,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same(one, other):
    left, right = one.model.state_dict(), other.model.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def history(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# --- the promises


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "vit"])
def test_without_terms_it_is_the_plain_trainer(family, tmp_path):
    plain = trained(tmp_path, kind=Trainer, family=family)
    ours = trained(tmp_path, family=family)
    same(plain, ours)
    assert history(plain) == history(ours) and history(plain, "grad_norm") == history(ours, "grad_norm")
    wrapped = Trainer(
        model=support.model(family, seed=1),
        args=support.arguments(tmp_path),
        train_dataset=support.samples(12, support.TASKS[family][1]),
        data_collator=support.collate,
    )
    assert distill(wrapped) is wrapped
    wrapped.train()
    same(plain, wrapped)


def test_terms_at_weight_0_change_nothing(tmp_path):
    terms = [dict(type=t, weight=0) if isinstance(t, str) else {**t, "weight": 0} for t in ALL]
    plain = trained(tmp_path, kind=Trainer, max_grad_norm=0)
    ours = trained(tmp_path, terms, max_grad_norm=0)
    same(plain, ours)
    assert history(plain) == history(ours)


def test_terms_at_weight_0_leave_the_clipped_gradient_as_it_is(tmp_path):
    """The norm is a sum over the adapters' zeros too: another order of adding, equal up to fp32's rounding."""
    terms = [dict(type=t, weight=0) if isinstance(t, str) else {**t, "weight": 0} for t in ALL]
    plain, ours = trained(tmp_path, kind=Trainer), trained(tmp_path, terms)
    assert max(history(plain, "grad_norm")) > plain.args.max_grad_norm, "nothing was clipped"
    assert history(ours, "grad_norm") == pytest.approx(history(plain, "grad_norm"), rel=1e-5)
    left, right = plain.model.state_dict(), ours.model.state_dict()
    for key, values in left.items():
        torch.testing.assert_close(right[key], values, rtol=1e-5, atol=1e-6)


def test_terms_do_not_disturb_what_is_drawn(tmp_path):
    class First(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            if state.global_step == 0:
                seen.append(({k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()))

    seen: list = []
    for terms in ((), ALL):
        trained(tmp_path, terms, steps=1, more={"callbacks": [First()]})
    assert all(torch.equal(seen[0][0][key], seen[1][0][key]) for key in seen[0][0])
    assert torch.equal(seen[0][1], seen[1][1])


def test_a_saved_student_is_a_plain_student(tmp_path, caplog):
    trainer = trained(tmp_path, ALL, save_strategy="steps", save_steps=2)
    trainer.save_model(tmp_path / "student")
    plain = support.model("bert", seed=1)
    assert trainer.model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(trainer.model.state_dict(), strict=True)
    assert isinstance(trainer.model, BertForSequenceClassification)
    for folder in (tmp_path / "student", tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"):
        with caplog.at_level(logging.WARNING), warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded, found = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert type(loaded) is BertForSequenceClassification
        assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not caplog.records
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    trainer.model.save_pretrained(tmp_path / "by_hand")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    batch = support.collate(support.samples(3))
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, trainer.model(**batch).logits)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_is_uninterrupted(accumulation, tmp_path):
    settings = dict(save_strategy="steps", save_steps=3, gradient_accumulation_steps=accumulation)
    whole = trained(tmp_path / "whole", ALL, steps=6, **settings)
    resumed = trained(
        tmp_path / "again",
        ALL,
        steps=6,
        resume=str(tmp_path / "whole" / "checkpoint-3"),
        student=support.model("bert", seed=9),
        **settings,
    )
    same(whole, resumed)
    ours, theirs = whole.distiller.terms.state_dict(), resumed.distiller.terms.state_dict()
    assert ours and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert history(whole)[3:] == history(resumed)[3:]
    states = [t.optimizer.state_dict()["state"] for t in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key]["exp_avg"], states[1][key]["exp_avg"]) for key in states[0])


def test_resuming_with_other_terms_or_without_is_refused(tmp_path):
    trained(tmp_path, ["HiddenStates"], save_strategy="steps", save_steps=2)
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(DistillError, match="made with other distillation terms"):
        trained(tmp_path, ["Embeddings"], resume=checkpoint)
    trained(tmp_path / "plain", kind=Trainer, save_strategy="steps", save_steps=2)
    with pytest.raises(DistillError, match=r"made without distillation or .* \(no distiller.pt\)"):
        trained(tmp_path, ["HiddenStates"], resume=str(tmp_path / "plain" / "checkpoint-2"))


def test_the_teacher_never_changes(tmp_path):
    teacher = support.model("bert", 32, 4, seed=2)
    before = copy.deepcopy(teacher.state_dict())
    trained(tmp_path, ALL, more={"teacher": teacher})
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert not teacher.training


def test_distilling_pulls_the_student_to_the_teacher(tmp_path):
    settings = dict(steps=60, learning_rate=5e-3, per_device_train_batch_size=12)
    trainer = trained(tmp_path, ALL, **settings)
    for name in ("attention_maps", "hidden_states", "embeddings", "patient_states", "relations"):
        values = history(trainer, f"distill.{name}.loss")
        assert sum(values[-5:]) < 0.8 * sum(values[:5]), name


def test_a_term_that_is_not_finite_is_dropped_and_counted(tmp_path, caplog):
    class Broken(SoftTargets):
        def compare(self, pairs):
            return super().compare(pairs) / 0

    trainer = trained(tmp_path, [Broken(), "HiddenStates"])
    assert history(trainer, "distill.broken.loss") == [0.0] * 4
    assert history(trainer, "distill.broken.dropped") == [1, 2, 3, 4]
    assert all(value > 0 for value in history(trainer, "distill.hidden_states.loss"))
    assert "distillation term broken was not finite" in caplog.text


# --- what the Trainer does besides


def test_every_term_is_logged_and_adds_up(tmp_path):
    trainer = trained(tmp_path, [SoftTargets(weight=0.5), HiddenStates(weight=2.0)], logging_steps=2)
    for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
        parts = ("task_loss", "distill.soft_targets.loss", "distill.hidden_states.loss")
        assert entry["loss"] == pytest.approx(sum(entry[part] for part in parts), rel=1e-4)
    assert len(history(trainer, "task_loss")) == 2


def test_raw_values_and_weights_are_logged_apart(tmp_path, caplog):
    stop = dict(type="Stop", end=1)  # counts in one step of the first two
    terms = [SoftTargets(weight=0.5), HiddenStates(weight=2.0, schedule=stop)]
    with caplog.at_level("INFO", logger="kdgraft"):
        trainer = trained(tmp_path, terms, logging_steps=2, gradient_accumulation_steps=2)
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    for entry in (first, second):
        assert entry["distill.soft_targets.weight"] == 0.5
        assert entry["distill.soft_targets.loss"] == pytest.approx(0.5 * entry["distill.soft_targets.raw"], rel=1e-5)
    # The mean of a loss over two steps, of which it is 0 in one; of a raw value over the steps that have one.
    assert first["distill.hidden_states.loss"] == pytest.approx(first["distill.hidden_states.raw"], rel=1e-5)
    assert first["distill.hidden_states.raw"] > 0 and first["distill.hidden_states.weight"] == 0
    assert "distill.hidden_states.raw" not in second
    said = [record.getMessage() for record in caplog.records if "distilling" in record.getMessage()]
    kind = "BertForSequenceClassification"
    assert said == [f"distilling {kind} into {kind} with soft_targets, hidden_states"]


def test_a_schedule_counts_optimizer_steps(tmp_path):
    ramp = dict(type="WarmUp", end=4)
    trainer = trained(
        tmp_path, [dict(type="SoftTargets", schedule=ramp)], gradient_accumulation_steps=2, learning_rate=0.0
    )
    values = history(trainer, "distill.soft_targets.loss")
    assert values[0] == 0 and values[1] > 0
    assert values[3] > values[1]


def test_label_smoothing(tmp_path):
    plain = trained(tmp_path, kind=Trainer, label_smoothing_factor=0.1)
    same(plain, trained(tmp_path, label_smoothing_factor=0.1))
    ours = trained(tmp_path, ["SoftTargets"], label_smoothing_factor=0.1, learning_rate=0.0)
    flat = trained(tmp_path, kind=Trainer, label_smoothing_factor=0.1, learning_rate=0.0)
    assert history(ours, "task_loss") == pytest.approx(history(flat), rel=1e-4)
    # Labels that the Trainer takes away from the model still say which tokens count.
    tokens = [
        trained(tmp_path, ["SoftTargets"], family="electra", label_smoothing_factor=f, learning_rate=0.0)
        for f in (0, 0.1)
    ]
    values = [history(t, "distill.soft_targets.loss") for t in tokens]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_metrics_best_model_and_callbacks(tmp_path):
    def accuracy(predicted):
        return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}

    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, *_, model=None, **__):
            self.steps += 1
            assert isinstance(model, BertForSequenceClassification)

    counted = Count()
    settings = dict(
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        save_total_limit=1,
    )
    trainer = trained(tmp_path, ALL, more={"compute_metrics": accuracy, "callbacks": [counted]}, **settings)
    assert counted.steps == 4
    assert len(history(trainer, "eval_accuracy")) == 2
    best = AutoModelForSequenceClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert all(torch.equal(v, trainer.model.state_dict()[k]) for k, v in best.state_dict().items())
    assert trainer.predict(support.samples(3)).predictions.shape == (3, 3)
    assert not any(key.startswith("eval_distill") for entry in trainer.state.log_history for key in entry)


def test_bf16(tmp_path):
    trainer = trained(tmp_path, ALL, bf16=True, learning_rate=0.0)
    exact = trained(tmp_path, ALL, learning_rate=0.0)
    for name in ("soft_targets", "attention_maps", "hidden_states"):
        ours, theirs = (history(t, f"distill.{name}.loss") for t in (trainer, exact))
        assert ours != theirs
        assert ours == pytest.approx(theirs, rel=0.1, abs=0.02)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_gradient_checkpointing_changes_nothing(family, tmp_path):
    terms = ["SoftTargets", "AttentionMaps", "HiddenStates", "Relations"]
    plain = trained(tmp_path, terms, family=family)
    spared = trained(tmp_path, terms, family=family, gradient_checkpointing=True)
    for key, value in plain.model.state_dict().items():
        torch.testing.assert_close(value, spared.model.state_dict()[key], rtol=1e-4, atol=1e-5)
    assert history(plain, "distill.attention_maps.loss") == pytest.approx(
        history(spared, "distill.attention_maps.loss"), rel=1e-4
    )


def test_reentrant_checkpointing_is_refused_with_the_way_out(tmp_path):
    settings = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(WiringError, match="use_reentrant=False"):
        trained(tmp_path, ["AttentionMaps"], **settings)


class Custom(Trainer):
    """A trainer of a user's own, with its own loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        output = model(**inputs)
        loss = nn.functional.cross_entropy(output.logits, labels, weight=torch.tensor([1.0, 2.0, 3.0]))
        return (loss, output) if return_outputs else loss


def test_distill_keeps_a_users_own_trainer(tmp_path):
    plain = trained(tmp_path, kind=Custom, learning_rate=0.0)
    teacher = support.model("bert", seed=2)
    trainer = Custom(
        model=support.model("bert", seed=1),
        args=support.arguments(tmp_path, learning_rate=0.0),
        train_dataset=support.samples(12),
        data_collator=support.collate,
    )
    assert distill(trainer, teacher=teacher, terms=ALL) is trainer
    assert isinstance(trainer, Custom)
    trainer.train()
    assert history(trainer, "task_loss") == pytest.approx(history(plain), rel=1e-4)
    assert history(trainer, "distill.soft_targets.loss")[0] > 0


class ByPosition(Trainer):
    """Calls the model by position, in training and in evaluation."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        given = {**inputs, "token_type_ids": None}
        labels = given.pop("labels")
        output = model(given["input_ids"], given["attention_mask"], labels=labels)
        return (output.loss, output) if return_outputs else output.loss


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_a_loss_that_calls_the_model_by_position(family, tmp_path):
    trainers = []
    for kind in (Trainer, ByPosition):
        task = support.TASKS[family][1]
        trainer = kind(
            model=support.model(family, seed=1),
            args=support.arguments(tmp_path),
            train_dataset=support.samples(12, task),
            eval_dataset=support.samples(4, task),
            data_collator=support.collate,
        )
        trainer.model_accepts_loss_kwargs = False  # ByPosition does not pass num_items_in_batch on
        terms = ["AttentionMaps" if family == "t5" else "SoftTargets"]
        distill(trainer, teacher=support.model(family, 32, 4, seed=2), terms=terms)
        trainer.train()
        trainer.evaluate()
        trainers.append(trainer)
    same(*trainers)
    for key in ("loss", "eval_loss"):
        assert history(trainers[0], key) == history(trainers[1], key)


def test_positions_are_bound_as_python_binds_them(tmp_path):
    batch = support.collate(support.samples(3))
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    student, teacher = support.quiet(support.model("bert", seed=1)), support.model("bert", 32, 4, seed=2).eval()
    with torch.no_grad():
        ours, theirs = ((model(ids, mask).logits / 2).log_softmax(-1) for model in (student, teacher))
    by_hand = 4 * nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    student = graft(student, teacher, [SoftTargets(temperature=2)]).train()
    for call in (lambda: student(ids, mask), lambda: student(ids, mask, None, labels=labels)):
        call()
        found = student.distill_link.last.losses["distill.soft_targets.loss"]
        torch.testing.assert_close(found.detach(), by_hand)
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        student(ids, mask, input_ids=ids)
    with pytest.raises(TypeError, match="too many positional arguments"):
        student(*[None] * 30)


def test_an_optimizer_of_the_users_own(tmp_path):
    def make(scheduler):
        student = support.model("bert", seed=1)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        given = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0) if scheduler else None
        return DistillTrainer(
            model=student,
            teacher=support.model("bert", 32, seed=2),
            terms=["HiddenStates"],
            args=support.arguments(tmp_path),
            train_dataset=support.samples(12),
            data_collator=support.collate,
            optimizers=(optimizer, given),
        )

    trainer = make(scheduler=False)
    before = [p.clone() for p in trainer.distiller.parameters()]
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.distiller.parameters(), strict=True))
    with pytest.raises(DistillError, match="has an optimizer and a scheduler; pass only the optimizer"):
        make(scheduler=True)


def test_model_init(tmp_path):
    trainer = DistillTrainer(
        model_init=lambda: support.model("bert", seed=1),
        teacher=support.model("bert", 32, seed=2),
        terms=[HiddenStates()],
        args=support.arguments(tmp_path),
        train_dataset=support.samples(12),
        data_collator=support.collate,
    )
    trainer.train()
    first = history(trainer, "distill.hidden_states.loss")
    trainer.train()
    assert history(trainer, "distill.hidden_states.loss") == first


def test_a_teacher_from_its_folder(tmp_path, caplog):
    teacher = support.model("bert", 32, 4, seed=2)
    teacher.save_pretrained(tmp_path / "teacher")
    by_model = trained(tmp_path, ["SoftTargets"])
    by_folder = trained(tmp_path, ["SoftTargets"], more={"teacher": tmp_path / "teacher"})
    same(by_model, by_folder)
    with pytest.raises(DistillError, match=r"no teacher at .*nowhere: there is no config.json"):
        trained(tmp_path, ["SoftTargets"], more={"teacher": str(tmp_path / "nowhere")})
    support.model("bert", kind="BertForMaskedLM").save_pretrained(tmp_path / "other")
    with pytest.raises(
        DistillError, match=r"does not fit the teacher BertForSequenceClassification; .*missing.*classifier"
    ):
        trained(tmp_path, ["SoftTargets"], more={"teacher": str(tmp_path / "other")})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(teacher=None), "terms need teacher=…"),
        (dict(teacher=nn.Linear(2, 2)), "the teacher must be a Hugging Face model, got Linear"),
        (dict(teacher=3), "teacher must be a model or a folder, got 3"),
        (dict(terms="SoftTargets"), "terms must be a list, got 'SoftTargets'"),
        (dict(recipe="tinybret"), "no recipe 'tinybret'|no recipe is called 'tinybret'"),
        (dict(terms=["HiddenStates", "Hiddenstates"]), "no term is called 'Hiddenstates'; did you mean 'HiddenStates'"),
        (dict(recipe=dict(type="tinybert", hiden=2)), "takes no argument 'hiden'; did you mean 'hidden'"),
    ],
)
def test_one_clear_line(more, message, tmp_path):
    with pytest.raises(DistillError, match=message) as caught:
        trained(tmp_path, ["SoftTargets"], more=more)
    assert "\n" not in str(caught.value)


def test_a_teacher_without_terms_or_a_recipe_is_refused(tmp_path):
    def plain():
        return Trainer(model=support.model("bert", seed=1), args=support.arguments(tmp_path))

    teacher, example = support.model("bert", 32, 4, seed=2), support.collate(support.samples(2))
    for given, name in (
        (dict(teacher=teacher), "teacher"),
        (dict(teacher=str(tmp_path)), "teacher"),
        (dict(dry_run=example), "dry_run"),
    ):
        trainer = plain()
        with pytest.raises(DistillError, match=rf"{name} is given, and nothing says what to learn; .* terms=\[\]"):
            distill(trainer, **given)
        assert type(trainer) is Trainer and type(trainer.model) is BertForSequenceClassification
        with pytest.raises(DistillError, match=f"{name} is given"):
            DistillTrainer(model=support.model("bert"), args=support.arguments(tmp_path), **given)
    assert distill(plain(), teacher=teacher, terms=[]).distiller is None


def test_distilling_twice_is_refused(tmp_path):
    trainer = trained(tmp_path, ["SoftTargets"])
    with pytest.raises(DistillError, match="already distils"):
        distill(trainer, teacher=support.model("bert"), terms=["SoftTargets"])
    with pytest.raises(DistillError, match="already being distilled"):
        DistillTrainer(
            model=trainer.model, teacher=support.model("bert"), terms=["SoftTargets"], args=support.arguments(tmp_path)
        )
    with pytest.raises(DistillError, match=r"takes a transformers.Trainer, got BertForSequence"):
        distill(support.model("bert"))
    same_model = support.model("bert")
    with pytest.raises(WiringError, match="share parameters"):
        DistillTrainer(model=same_model, teacher=same_model, terms=["SoftTargets"], args=support.arguments(tmp_path))


def test_a_failed_start_leaves_the_student_as_it_was(tmp_path):
    student = support.model("bert")
    names = [name for name, _ in student.named_modules()]
    with pytest.raises(WiringError):
        DistillTrainer(
            model=student,
            teacher=support.model("bert", heads=2),
            terms=["AttentionMaps"],
            args=support.arguments(tmp_path),
        )
    assert type(student) is BertForSequenceClassification
    assert names == [name for name, _ in student.named_modules()]


@pytest.mark.parametrize(
    ("family", "terms"),
    [
        ("gpt2", ["GeneralizedJSD"]),
        ("roberta", ["SoftTargets"]),
        ("t5", ["ForwardKL"]),
        ("vit", ["SoftTargets", "AttentionMaps"]),
        ("electra", ["SoftTargets"]),
    ],
)
def test_other_tasks_train(family, terms, tmp_path):
    trainer = trained(tmp_path, terms, family=family, gradient_accumulation_steps=2)
    key = next(key for key in trainer.state.log_history[0] if key.startswith("distill."))
    assert len(history(trainer, key)) == 4 and history(trainer, key)[0] > 0


def test_seq2seq_trainer_and_question_answering(tmp_path):
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    plain = support.arguments(tmp_path)
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path),
        max_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        predict_with_generate=True,
        logging_steps=1,
        save_strategy="no",
        per_device_train_batch_size=plain.per_device_train_batch_size,
    )
    trainer = Seq2SeqTrainer(
        model=support.model("t5", seed=1),
        args=arguments,
        train_dataset=support.samples(8, "seq2seq"),
        eval_dataset=support.samples(4, "seq2seq"),
        data_collator=support.collate,
    )
    distill(
        trainer,
        teacher=support.model("t5", 32, seed=2),
        terms=["ForwardKL", dict(type="AttentionMaps", stack="decoder")],
    )
    trainer.train()
    assert history(trainer, "distill.attention_maps.loss")[0] > 0
    assert "eval_loss" in trainer.evaluate(max_new_tokens=3)
    kind = "BertForQuestionAnswering"
    asked = DistillTrainer(
        model=support.model("bert", seed=1, kind=kind),
        teacher=support.model("bert", 32, 4, seed=2, kind=kind),
        terms=["SoftTargets", "AttentionMaps"],
        args=support.arguments(tmp_path),
        train_dataset=support.samples(12, "question"),
        data_collator=support.collate,
    )
    asked.train()
    assert history(asked, "distill.soft_targets.loss")[0] > 0


def test_recipes_train_and_print(tmp_path):
    from kdgraft_nlp import RECIPES

    lists = {
        name for name in RECIPES if RECIPES.get(name).__module__ == "kdgraft_nlp.recipes"
    }  # the others are one term each
    assert lists == {"tinybert", "minilm", "minilmv2", "distilbert", "pkd", "mobilebert", "gkd"}
    for recipe in ("tinybert", "minilm", "minilmv2", "distilbert", "pkd", "mobilebert"):
        layers = 2 if recipe == "mobilebert" else 4
        trainer = trained(
            tmp_path,
            more={"recipe": recipe, "teacher": support.model("bert", 16 if recipe == "pkd" else 32, layers, seed=2)},
            steps=1,
        )
        assert trainer.distiller.terms
        assert all(isinstance(spec, dict) for spec in RECIPES.get(recipe)())
    assert trained(tmp_path, more={"recipe": "gkd"}, family="llama", steps=1).distiller.terms


def trainer_of(folder, kind=DistillTrainer, **settings):
    more = (
        dict(teacher=support.model("bert", 32, seed=2), terms=["SoftTargets", "HiddenStates"])
        if kind is DistillTrainer
        else {}
    )
    return kind(
        model=support.model("bert", seed=1),
        args=support.arguments(folder, **settings),
        train_dataset=support.samples(12),
        eval_dataset=support.samples(4),
        data_collator=support.collate,
        **more,
    )


def test_distilling_after_an_evaluation_in_mixed_precision(tmp_path):
    trainer = trainer_of(tmp_path, Trainer, bf16=True, bf16_full_eval=False)
    trainer.evaluate()
    distill(trainer, teacher=support.model("bert", 32, seed=2), terms=["HiddenStates"])
    trainer.train()
    assert any("distill.hidden_states.loss" in entry for entry in trainer.state.log_history)


def test_a_patched_forward_is_said(tmp_path):
    student = support.model("bert")
    student.forward = lambda **inputs: None
    with pytest.raises(WiringError, match=r"no \[logits\] .*; the forward of this Bert.* was replaced on the instance"):
        graft(student, support.model("bert", seed=2), ["SoftTargets"])


def test_a_student_that_runs_its_children_in_turn_is_refused():
    student = nn.Sequential(support.model("bert"))  # as a SentenceTransformer is
    student.config = student[0].config
    with pytest.raises(DistillError, match="a Sequential runs and saves all its modules in order"):
        graft(student, support.model("bert", seed=2), ["SoftTargets"])


def test_figures_of_a_second_run_and_after_resuming(tmp_path):
    trainer = trainer_of(tmp_path, logging_steps=2, save_strategy="steps", save_steps=1, learning_rate=0.0)
    trainer.train()
    trainer.train()
    resumed = trainer_of(tmp_path, logging_steps=2, learning_rate=0.0)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for found in (trainer, resumed):
        entries = [entry for entry in found.state.log_history if "task_loss" in entry]
        for entry in entries if found is trainer else entries[-1:]:
            parts = [v for k, v in entry.items() if k.endswith(".loss") or k == "task_loss"]
            assert sum(parts) == pytest.approx(entry["loss"], rel=1e-3)


def test_a_copy_of_a_student_in_training(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    twin = copy.deepcopy(trainer.model)
    batch = support.collate(support.samples(2))
    twin.eval(), trainer.model.eval()
    assert torch.equal(twin(**batch).logits, trainer.model(**batch).logits)


def passes_of(teacher):
    """A list that grows with each pass of the teacher."""
    passes = []
    teacher.register_forward_pre_hook(lambda *_: passes.append(1))
    return passes


def trains_plainly(student, folder, **settings):
    """Continues with a plain Trainer and checks against one that has never seen a distiller; both plain SGD."""
    fresh = support.model("bert", seed=7)
    fresh.load_state_dict(student.state_dict())
    ours, plain = (
        trained(folder, kind=Trainer, student=model, optim="sgd", learning_rate=0.1, **settings)
        for model in (student, fresh)
    )
    same(plain, ours)
    assert history(plain) == history(ours) and history(plain, "grad_norm") == history(ours, "grad_norm")


@pytest.mark.parametrize("bf16", [False, True])
def test_a_pickled_student_is_a_plain_student(bf16, tmp_path):
    trainer = trainer_of(tmp_path, bf16=bf16)
    trainer.train()
    state = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    torch.save(trainer.model, tmp_path / "student.pt")
    loaded = torch.load(tmp_path / "student.pt", weights_only=False)
    batch = support.collate(support.samples(3))
    expected = support.model("bert", seed=3).eval()
    expected.load_state_dict(state)
    for twin in (loaded, copy.deepcopy(trainer.model), copy.copy(trainer.model)):
        assert type(twin) is BertForSequenceClassification
        assert [name for name, _ in twin.named_modules()] == [name for name, _ in expected.named_modules()]
        assert vars(twin).keys() - {"_is_accelerate_prepared"} == vars(expected).keys()
        with torch.no_grad():
            assert torch.equal(twin.eval()(**batch).logits, expected(**batch).logits)
    # The one in training goes on.
    assert trainer.distiller is not None
    trainer.train()
    assert history(trainer, "distill.soft_targets.loss")


@pytest.mark.parametrize("bf16", [False, True])
def test_a_plain_trainer_takes_the_model_afterwards(bf16, tmp_path):
    trainer = trainer_of(tmp_path, bf16=bf16)
    teacher = trainer.distiller.teacher.model
    trainer.train()
    passes = passes_of(teacher)
    trains_plainly(trainer.model, tmp_path, bf16=bf16)
    assert not passes
    student = undistill(trainer.model)
    assert student is trainer.model and type(student) is BertForSequenceClassification
    assert vars(student).keys() - {"_is_accelerate_prepared"} == vars(support.model("bert")).keys()
    trains_plainly(student, tmp_path, bf16=bf16)
    assert not passes
    # The trainer that it comes from evaluates, saves and trains it, plainly; another one distils it anew.
    assert trainer.distiller is None and "eval_loss" in trainer.evaluate()
    trainer.save_model(tmp_path / "student")
    trainer.train()
    assert not passes
    trainer = trained(tmp_path, ["SoftTargets"], student=student)
    assert history(trainer, "distill.soft_targets.loss")[0] > 0
    with pytest.raises(DistillError, match="BertForSequenceClassification is not being distilled"):
        undistill(support.model("bert"))


def test_generation_in_the_evaluation(tmp_path):
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path),
        max_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        predict_with_generate=True,
        save_strategy="no",
    )
    data = [{**sample, "teacher_token_type_ids": torch.zeros(3)} for sample in support.samples(4, "seq2seq")]
    trainer = Seq2SeqTrainer(
        model=support.model("t5", seed=1),
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        data_collator=DistillCollator(support.collate),
        compute_metrics=lambda predicted: {"rows": float(len(predicted.predictions))},
    )
    distill(trainer, teacher=support.model("t5", 32, seed=2), terms=["ForwardKL"])
    trainer.args.remove_unused_columns = False
    trainer.train()
    assert trainer.evaluate(max_new_tokens=3)["eval_rows"] == 4
