"""Steps of the terms with networks of their own on a share of a fixed batch, alone or as one of two processes.

:func:`steps` is also what the test computes on the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from kdgraft import Batch, Distiller, Engine, FactorTransfer, FreeKD, MasKD, Review, Step, Teacher
from support.distiller_ranks import IMAGES, SHARES, SIZES, Net
from support.processes import as_rank
from support.tensors import gradients


def distiller() -> Distiller:
    """One term of each kind; their networks learn in the first two steps."""
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(pretrain=2, lr=0.01)
    taps = ["trunk", "deep"]
    terms = [
        FactorTransfer(taps, **settings),
        MasKD(taps, tokens=3, student_masks_after=1, **settings),
        FreeKD(taps, prompts=2, **settings),
        Review(taps),
    ]
    return Distiller(Net(4), Net(6), terms, example=IMAGES[:1])


def steps(share: slice, *, distributed: bool) -> dict[str, Any]:
    """Four steps without an optimizer of the student: losses and figures, gradients and the networks in the end."""
    model = distiller()
    wrapped = DistributedDataParallel(model) if distributed else model
    batch = Batch(padded_size=(8, 8), image_sizes=SIZES[share])
    found: dict[str, Any] = {"losses": [], "gradients": []}
    for _ in range(4):
        model.zero_grad()
        out = wrapped(IMAGES[share], batch=batch)
        (out.loss + 0 * out.student.sum()).backward()  # DDP waits for the gradient of every parameter
        found["losses"].append({name: value.detach() for name, value in out.losses.items()})
        found["gradients"].append(gradients(model))
    networks = {term.name: term.auxiliaries for term in model.all_terms if term.auxiliaries}
    found["networks"] = {name: own["network"].network.state_dict() for name, own in networks.items()}
    return found


def examined(share: slice) -> dict[str, Any]:
    """Two steps of tokens on the teacher's own loss: the figures of each, and the tokens in the end."""
    torch.manual_seed(0)
    student, images = Net(4), IMAGES[share]
    engine = Engine(Teacher(Net(6)), [MasKD("trunk", name="term", pretrain=2, tokens=3)])
    engine.wire(student, lambda: student(IMAGES[:1]), lambda source: source.model(IMAGES[:1]))
    batch = Batch(padded_size=(8, 8), image_sizes=SIZES[share])
    losses = []
    for number in range(2):
        run = lambda source: source.model(images)  # noqa: E731
        own = lambda source: source.model(images).square().mean()  # noqa: E731
        with engine.step(student, batch, Step(number), run, run_loss=own) as step:
            student(images)
        losses.append(step.losses())
    return {"losses": losses, "tokens": engine.all_terms[0].auxiliaries["network"].network.state_dict()}


def all_steps(rank: int) -> dict[str, Any]:
    """The steps of this process's share."""
    return {**steps(SHARES[rank], distributed=True), "examined": examined(SHARES[rank])}


if __name__ == "__main__":
    as_rank(all_steps)
