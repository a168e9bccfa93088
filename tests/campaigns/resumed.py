"""A run that stopped and went on ends like one that never stopped, bit for bit, with every recipe of every host."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from campaigns.recipes import detectors, grafted, in_torch, segmentors, texts, total_loss
from support.tensors import assert_same

STEPS, STOP = 4, 2


@dataclass(frozen=True)
class Run:
    """A training that can be stopped.

    Args:
        model: what is trained, with its distiller.
        state: returns what a checkpoint holds beside the optimizer.
        load: restores that.
        loss: returns the loss of the step of a number, counted from 0.
        student: the weights that the run leaves.
    """

    model: nn.Module
    state: Callable[[], Any]
    load: Callable[[Any], Any]
    loss: Callable[[int], Tensor]
    student: Callable[[], Mapping[str, Tensor]]


def resumed(begin: Callable[[], Run]) -> None:
    """Steps without a stop are steps, a state that is written and read, and the other steps."""
    ends = []
    for stop in (STEPS, STOP):
        run, optimizer = _begun(begin)
        for step in range(STEPS):
            if step == stop:
                saved = io.BytesIO()
                torch.save((run.state(), optimizer.state_dict()), saved)
                saved.seek(0)
                state, own = torch.load(saved, weights_only=False)
                run, optimizer = _begun(begin)
                run.load(state)
                optimizer.load_state_dict(own)
            torch.manual_seed(step)
            optimizer.zero_grad()
            run.loss(step).backward()
            optimizer.step()
        ends.append(run.student())
    assert_same(*ends)


def _begun(begin: Callable[[], Run]) -> tuple[Run, torch.optim.Optimizer]:
    torch.manual_seed(0)
    run = begin()
    return run, torch.optim.Adam([p for p in run.model.parameters() if p.requires_grad], lr=1e-3)


def resumed_in_torch(recipe: str) -> None:
    """In plain PyTorch, where the distiller's state is its ``state_dict``."""

    def begin() -> Run:
        distiller, images, labels = in_torch(recipe)

        return Run(
            distiller,
            distiller.state_dict,
            distiller.load_state_dict,
            lambda step: total_loss(distiller, images, labels),
            lambda: distiller.student.state_dict(),
        )

    resumed(begin)


def resumed_in_nlp(recipe: str) -> None:
    """In Hugging Face, whose trainer counts the steps."""
    from support.nlp_methods import batch

    name, terms = texts(recipe)

    def begin() -> Run:
        model = grafted(name, terms)
        given = batch(name)

        def loss(step: int) -> Tensor:
            model.distill_link.steps = step
            return model(**given).loss

        return _grafted(model, loss)

    resumed(begin)


def resumed_in_det(recipe: str) -> None:
    """In MMDetection."""
    from support.det import losses, raw_batch

    def begin() -> Run:
        model, _ = detectors(recipe)
        return _grafted(model, lambda step: _sum(model, step, lambda: losses(model, raw_batch())))

    resumed(begin)


def resumed_in_seg(recipe: str) -> None:
    """In MMSegmentation."""
    from support.seg import batch, losses_of

    def begin() -> Run:
        model, _ = segmentors(recipe)
        return _grafted(model, lambda step: _sum(model, step, lambda: losses_of(model, *batch(), seed=step)))

    resumed(begin)


def _sum(model: Any, step: int, losses: Callable[[], Mapping[str, Tensor]]) -> Tensor:
    """The host's and the distiller's losses of a step, which the message hub tells as a Runner's train loop does."""
    from mmengine.logging import MessageHub

    MessageHub.get_current_instance().update_info("iter", step)
    return torch.stack([value for name, value in losses().items() if "loss" in name]).sum()


def _grafted(model: Any, loss: Callable[[int], Tensor]) -> Run:
    """A run of a grafted student, whose own ``state_dict`` leaves the distiller out."""

    def load(state: tuple[Any, Any]) -> None:
        model.load_state_dict(state[0])
        model.distiller.load_live_state(state[1])

    return Run(model, lambda: (model.state_dict(), model.distiller.live_state()), load, loss, model.state_dict)
