"""Views of images in the Trainer: consistent teaching, a teacher at a higher resolution, and what the labels are then."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from kdgraft import DistillError, SoftTargets
from kdgraft.consistent import Teaching
from kdgraft.views import Views
from kdgraft_nlp import DistillTrainer
from kdgraft_nlp.views import viewed
from support import nlp as support
from support.tensors import assert_same


def trainer(folder, views, *, student=None, teacher=None, **settings) -> DistillTrainer:
    """A trainer of small vision transformers on sixteen images of 16×16 pixels."""
    told = settings.pop("training", {})
    return DistillTrainer(
        model=student or support.quiet(support.model("vit", seed=1)),
        teacher=teacher or support.model("vit", 32, seed=2),
        args=support.arguments(folder, **told),
        train_dataset=support.samples(16, "image"),
        data_collator=support.collate,
        views=views,
        **({"recipe": "funmatch"} | settings),
    )


def kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")


class Recorded(Teaching):
    """Teaching that keeps the images of the last batch, and what became of them."""

    def __call__(self, images, targets):
        views, found = super().__call__(images, targets)
        self.last = images, views, found
        return views, found


def first_loss(built: DistillTrainer) -> float:
    """The loss of a training of one step."""
    built.train()
    return built.state.log_history[0]["loss"]


ONE = dict(max_steps=1, logging_steps=1)


def test_student_and_teacher_see_one_mixture(tmp_path):
    views = Recorded(crop=(0.3, 1.0))
    built = trainer(tmp_path, views, training=ONE)
    student, teacher = copy.deepcopy(built.model).eval(), built.distiller.teacher.model
    found = first_loss(built)
    images, seen, labels = views.last
    assert not torch.equal(seen.student, images)
    assert labels is None
    with torch.no_grad():
        logits = [model(pixel_values=seen.student).logits for model in (student, teacher)]
        plain = [model(pixel_values=images).logits for model in (student, teacher)]
    assert found == pytest.approx(kl(*logits).item(), rel=1e-3)
    assert found != pytest.approx(kl(*plain).item(), rel=1e-2)


def test_a_teacher_sees_the_same_crops_at_its_own_resolution(tmp_path):
    views = Recorded(crop=(0.5, 1.0), mixup=False, teacher_size=24)
    teacher = support.model("vit", 32, image_size=24, seed=2)
    example = {"pixel_values": torch.rand(2, 3, 16, 16), "teacher_inputs": {"pixel_values": torch.rand(2, 3, 24, 24)}}
    settings = dict(terms=[SoftTargets()], recipe=None, dry_run=example, training=ONE)
    built = trainer(tmp_path, views, teacher=teacher, **settings)
    student = copy.deepcopy(built.model).eval()
    found = first_loss(built)
    _, seen, labels = views.last
    assert seen.of("teacher").shape[-2:] == (24, 24)
    with torch.no_grad():
        own = student(pixel_values=seen.student).logits
        theirs = teacher(pixel_values=seen.of("teacher")).logits
    # Without mixup the labels stay, and the host's loss with them.
    expected = F.cross_entropy(own, labels) + kl(own, theirs)
    assert found == pytest.approx(expected.item(), rel=1e-3)


def test_a_run_that_was_stopped_sees_what_it_would_have_seen(tmp_path):
    told = dict(max_steps=4, save_steps=2, save_strategy="steps")
    whole = trainer(tmp_path / "whole", Teaching(), training=told)
    whole.train()
    resumed = trainer(tmp_path / "whole", Teaching(), training=told)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_same(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))


@pytest.mark.parametrize(
    ("views", "settings", "message"),
    [
        (Teaching(), dict(recipe=None, terms=[SoftTargets()]), r"mixup leaves images without labels .* TaskShare\(\)"),
        (3, {}, r"views must be a function such as kdgraft.consistent.Teaching\(\), got 3"),
    ],
)
def test_views_that_cannot_be_meant(tmp_path, views, settings, message):
    with pytest.raises(DistillError, match=message):
        trainer(tmp_path, views, **settings)


def test_views_are_of_images(tmp_path):
    with pytest.raises(DistillError, match="views are of images, and the student takes no pixel_values"):
        trainer(tmp_path, Teaching(), student=support.model("bert"), teacher=support.model("bert", 32, seed=2))
    built = trainer(tmp_path, lambda images, labels: (Views(images, teecher=images), labels))
    with pytest.raises(DistillError, match="'teecher' is not a source"):
        built.train()
    with pytest.raises(DistillError, match="views need pixel_values in the batch, which has labels"):
        viewed(Teaching(), {"labels": torch.zeros(2, dtype=torch.long)}, ["teacher"])
    images = torch.rand(1, 3, 16, 16)
    several = Views(images, a=images + 1)
    with pytest.raises(DistillError, match="all sources must have the same view"):
        viewed(lambda images, labels: (several, labels), {"pixel_values": images}, ["a", "b"])
