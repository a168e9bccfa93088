"""A loss that runs the student several times: every pass counts, with the batch that it runs on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import SequentialSampler
from transformers import Trainer

from kdgraft import DistillError
from kdgraft_nlp import DistillTrainer, distill
from support import nlp as support
from support.tensors import gradients

TERMS = [
    dict(type="HiddenStates", adapter="none"),
    dict(type="SoftTargets", temperature=1.0),
    dict(type="Relations", of="value", heads=4),
]


class Host(Trainer):
    """Runs the model itself, in the order of the data; keeps the gradient of the first step."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)

    def _clip_grad_norm(self, model):
        self.found = getattr(self, "found", None) or gradients(self.model)
        return super()._clip_grad_norm(model)


class Siamese(Host):
    """Two texts of different lengths a sample; nothing in the batch is called as the model calls it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = [
            model(input_ids=inputs[f"{side}_ids"], attention_mask=inputs[f"{side}_mask"]) for side in ("one", "other")
        ]
        loss = (outputs[0].logits - outputs[1].logits).square().mean()
        return (loss, outputs[0]) if return_outputs else loss


class Nested(Host):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = [model(**inputs[side]) for side in ("one", "other")]
        loss = (outputs[0].logits - outputs[1].logits).square().mean()
        return (loss, outputs[0]) if return_outputs else loss


class Half(Host):
    """The first text as the model takes it, the second beside it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        first = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        second = model(input_ids=inputs["other_ids"], attention_mask=inputs["other_mask"])
        loss = (first.logits - second.logits).square().mean()
        return (loss, first) if return_outputs else loss


class Regularised(Host):
    """R-Drop: the same batch twice; the labels are taken out first."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = [model(**inputs) for _ in range(2)]
        loss = sum(F.cross_entropy(out.logits, labels) for out in outputs)
        return (loss, outputs[0]) if return_outputs else loss


class Pairs(Host):
    """SimCSE: (B, 2, L) flattened into one pass of 2B texts."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, mask = (inputs[name].flatten(0, 1) for name in ("input_ids", "attention_mask"))
        output = model(input_ids=ids, attention_mask=mask)
        loss = output.logits.square().mean()
        return (loss, output) if return_outputs else loss


def texts(first, lengths):
    rows = [[1, *range(first + i, first + i + n - 1)] for i, n in enumerate(lengths)]
    batch = support.collate([{"input_ids": row} for row in rows])
    return batch["input_ids"], batch["attention_mask"]


ONE, OTHER = texts(5, (3, 6, 4, 5)), texts(11, (8, 2, 3, 7))


def batch_of(kind, rows):
    (one, one_mask), (other, other_mask) = ((ids[rows], mask[rows]) for ids, mask in (ONE, OTHER))
    if kind is Siamese:
        return {"one_ids": one, "one_mask": one_mask, "other_ids": other, "other_mask": other_mask}
    if kind is Nested:
        sides = (("one", one, one_mask), ("other", other, other_mask))
        return {name: {"input_ids": ids, "attention_mask": mask} for name, ids, mask in sides}
    if kind is Half:
        return {"input_ids": one, "attention_mask": one_mask, "other_ids": other, "other_mask": other_mask}
    if kind is Regularised:
        return {"input_ids": one, "attention_mask": one_mask, "labels": torch.arange(4)[rows] % 3}
    wide = [F.pad(x, (0, 8 - x.shape[1])) for x in (one, one_mask, other, other_mask)]
    return {"input_ids": torch.stack(wide[::2], 1), "attention_mask": torch.stack(wide[1::2], 1)}


def by_hand(models, passes):
    """The three terms of some texts, from the plain models' outputs; the mean over what these texts hold."""
    total = 0.0
    for ids, mask in passes:
        real = mask.bool()
        outputs, values = [], []
        for model in models:
            seen: list[torch.Tensor] = []
            layers = model.bert.encoder.layer
            hook = layers[-1].attention.self.value.register_forward_hook(lambda *call, seen=seen: seen.append(call[2]))
            outputs.append(model(input_ids=ids, attention_mask=mask, output_hidden_states=True))
            hook.remove()
            values.append(seen[0].unflatten(-1, (4, -1)).transpose(1, 2))
        s, t = outputs
        pairs = zip(s.hidden_states[1:], t.hidden_states[1:], strict=True)
        total = total + torch.stack([(a - b)[real].square().mean() for a, b in pairs]).mean()
        total = total + F.kl_div(
            s.logits.log_softmax(-1), t.logits.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        related = [
            (v @ v.transpose(-1, -2) / v.shape[-1] ** 0.5).masked_fill(~real[:, None, None], -torch.inf).log_softmax(-1)
            for v in values
        ]
        rows = F.kl_div(related[0], related[1], log_target=True, reduction="none").nan_to_num(0).sum(-1).mean(1)
        total = total + ((rows * real).sum(1) / real.sum(1)).mean()
    return total


def models():
    student, teacher = (support.quiet(support.model("bert", 16, 2, 4, seed=seed)) for seed in (1, 2))
    return student.train(), teacher.eval()


def run(kind, folder, batches, terms=TERMS, **settings):
    student, teacher = models()
    size = len(range(4)) // len(batches)
    trainer = kind(
        model=student,
        args=support.arguments(
            folder,
            max_steps=1,
            per_device_train_batch_size=size,
            max_grad_norm=1e9,
            remove_unused_columns=False,
            **settings,
        ),
        train_dataset=[{"row": i} for i in range(4)],
        data_collator=lambda rows: batch_of(kind, [row["row"] for row in rows]),
    )
    distill(trainer, teacher=teacher, terms=terms)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("kind", "passes"),
    [
        (Siamese, [ONE, OTHER]),
        (Nested, [ONE, OTHER]),
        (Half, [ONE, OTHER]),
        (Regularised, [ONE, ONE]),
        (Pairs, None),
    ],
)
def test_every_pass_counts_with_its_own_batch_by_hand(kind, passes, tmp_path):
    if passes is None:
        found = batch_of(Pairs, list(range(4)))
        passes = [(found["input_ids"].flatten(0, 1), found["attention_mask"].flatten(0, 1))]
    plain, teacher = models()
    host = run(kind, tmp_path, [0], terms=[dict(type="HiddenStates", weight=0.0, adapter="none")])
    trainer = run(kind, tmp_path, [0])
    expected = by_hand((plain, teacher), passes)
    logged = next(entry for entry in trainer.state.log_history if "distill.soft_targets.loss" in entry)
    mine = sum(value for key, value in logged.items() if key.startswith("distill.") and key.endswith(".loss"))
    assert mine == pytest.approx(expected.item(), rel=1e-4)
    expected.backward()
    for name, p in plain.named_parameters():
        if p.grad is not None:
            found = trainer.found[name] - host.found[name]
            torch.testing.assert_close(found, p.grad, rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_passes_of_accumulated_batches_weigh_alike(tmp_path):
    """Two batches of two: the mean over the batches of what their passes add up to."""
    trainer = run(Siamese, tmp_path, [0, 1], gradient_accumulation_steps=2)
    both = [[(ids[rows], mask[rows]) for ids, mask in (ONE, OTHER)] for rows in ([0, 1], [2, 3])]
    expected = sum(by_hand(models(), passes).item() for passes in both) / 2
    logged = next(entry for entry in trainer.state.log_history if "distill.soft_targets.loss" in entry)
    mine = sum(value for key, value in logged.items() if key.startswith("distill.") and key.endswith(".loss"))
    assert mine == pytest.approx(expected, rel=1e-4)


def test_a_pass_without_gradient_or_a_trainer_does_not_add_up(tmp_path):
    trainer = run(Siamese, tmp_path, [0])
    student = trainer.model.train()
    batch = {"input_ids": ONE[0], "attention_mask": ONE[1]}
    once = support.loss_of(student, batch)
    with torch.no_grad():
        student(**batch)
    torch.testing.assert_close(support.loss_of(student, batch), once)


def test_a_loss_that_goes_round_distilling_is_refused(tmp_path):
    class Round(DistillTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs)["loss"]

    student, teacher = models()
    data = support.samples(4)
    settings = dict(args=support.arguments(tmp_path, max_steps=1), train_dataset=data, data_collator=support.collate)
    with pytest.raises(DistillError, match=r"Round.compute_loss skips the distillation; call super\(\)"):
        Round(model=student, teacher=teacher, terms=TERMS, **settings).train()
    Round(model=models()[0], **settings).train()  # nothing to distil
