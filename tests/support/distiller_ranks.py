"""One training step of a plain-PyTorch distiller on a share of a fixed batch, alone or as one of several processes.

:func:`steps` is also what the test computes on the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdgraft import (
    BYOT,
    CWTM,
    DKD,
    DKPP,
    FSP,
    ONE,
    AdversarialScores,
    Batch,
    BoundarySamples,
    Distiller,
    FeatureImitation,
    FeatureMMD,
    GradientTransfer,
    Itself,
    NetAug,
    PearsonImitation,
    Peers,
    SoftTargets,
    WarmUp,
    WeightMatching,
)
from kdgraft.distributed import SharedRandom, copy_from_first_rank, gather_over_ranks, rank, total_over_ranks
from kdgraft.losses import hint
from support.processes import WORLD, as_rank
from support.tensors import gradients

SHARES = (slice(0, 3), slice(3, 4))  # three images on the first process, one on the second
IMAGES = torch.sin(torch.arange(4 * 3 * 8 * 8.0)).reshape(4, 3, 8, 8)
LABELS = torch.tensor([1, -100, 0, 2])
SIZES = [(8, 8), (8, 4), (4, 4), (8, 6)]
BOXES = [
    torch.tensor([[0.0, 0.0, 4.0, 4.0], [2.0, 2.0, 8.0, 8.0], [5.0, 0.0, 8.0, 3.0]]),
    torch.tensor([[0.0, 0.0, 3.0, 7.0]]),
    torch.zeros(0, 4),
    torch.zeros(0, 4),  # the second process has no box at all
]


class Net(nn.Module):
    """Features and logits, without batch statistics."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.Tanh())
        self.deep = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.deep(self.trunk(x)).mean((2, 3)))


def distiller(broken_on: int | None) -> Distiller:
    """Terms whose counts differ from process to process; another is infinite on one process alone."""
    rank = dist.get_rank() if dist.is_initialized() else 0

    def broken(student: Tensor, teacher: Tensor, *, dim: int, reduction: str) -> Tensor:
        return hint(student, teacher, dim=dim, reduction="none") / (0 if rank == broken_on else 1)

    torch.manual_seed(0)
    student, teacher = Net(4), Net(6)
    terms: list[Any] = [
        FeatureImitation(["trunk", "deep"], weight=0.7, name="valid"),
        FeatureImitation("trunk", region="foreground", weight=2, name="boxes"),
        PearsonImitation(["trunk", "deep"], weight=0.8, name="related"),
        SoftTargets(temperature=2, hard_weight=0.3, name="mixed"),
        SoftTargets(temperature=4, name="soft"),
        DKD(standardize=True, name="decoupled"),
        CWTM(hard_weight=0.5, name="sure"),
        DKPP(hard_weight=None, name="dark"),
        AdversarialScores(width=4, name="judged"),
        FeatureMMD("head", name="distribution"),
        FeatureMMD("trunk", kernel="poly", name="moments"),
        FSP(["trunk", "deep"], name="flow"),
        WeightMatching("trunk", name="weights"),
        GradientTransfer(weight=10, name="slopes"),
        BYOT(["trunk", "deep"], source="itself", width=4, name="exits"),
        ONE(["deep", "head"], source="itself", name="branches"),
        FeatureImitation("deep", name="later", schedule=WarmUp(1)),
    ]
    if broken_on is not None:
        terms.append(FeatureImitation("deep", loss=broken, name="broken"))
    teachers = dict(teacher=teacher, itself=Itself())
    return Distiller(student, terms=terms, example=IMAGES[:1], teachers=teachers)


def steps(share: slice, *, broken_on: int | None, distributed: bool) -> dict[str, Any]:
    """Two steps without an optimizer: losses, gradients of both and what was dropped."""
    model = distiller(broken_on)
    wrapped = DistributedDataParallel(model) if distributed else model
    batch = Batch(padded_size=(8, 8), image_sizes=SIZES[share], boxes=BOXES[share])
    result: dict[str, Any] = {"losses": [], "gradients": []}
    for _ in range(2):
        model.zero_grad()
        out = wrapped(IMAGES[share], targets=LABELS[share], batch=batch)
        out.loss.backward()
        result["losses"].append({name: value.detach() for name, value in out.losses.items()})
        result["gradients"].append(gradients(model))
    result["dropped"] = dict(model.dropped)
    return result


def students(share: slice, average: bool, *, distributed: bool) -> dict[str, Any]:
    """A step of three students that teach each other, each with its own loss over the whole batch."""
    torch.manual_seed(0)
    peers = Peers([Net(5), Net(6)], average=average)
    terms = [SoftTargets(temperature=2, hard_weight=0.4, weight=1.5), *([] if average else [PearsonImitation("deep")])]
    model = Distiller(Net(4), peers, terms, example=IMAGES[:1])
    wrapped = DistributedDataParallel(model) if distributed else model
    out = wrapped(IMAGES[share], targets=LABELS[share])
    scale = (WORLD if distributed else 1) / (LABELS != -100).sum()

    def own(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, LABELS[share], reduction="sum") * scale

    total = out.total(own(out.student)) + sum(out.peer_shares[name] * own(found) for name, found in out.peers.items())
    total.backward()
    losses = {name: value.detach() for name, value in out.losses.items()}
    return {"losses": losses, "gradients": gradients(model)}


def netaug(share: slice, *, distributed: bool) -> dict[str, Any]:
    """Two steps of NetAug with an optimizer; on two processes both have two images, so that the mean of the gradients is that of all."""
    torch.manual_seed(3 + (dist.get_rank() if distributed else 0))
    model = NetAug(lambda width: Net(round(4 * width)), example=IMAGES[:1])
    wrapped = DistributedDataParallel(model) if distributed else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        out = wrapped(IMAGES[share])
        loss = out.student.square().mean() + (out.peers["augmented"] - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def near_the_boundary(share: slice, *, distributed: bool) -> dict[str, Any]:
    """Two steps on samples near the boundary, of which the first process has more than the second."""
    torch.manual_seed(0)
    student, teacher = Net(4), Net(6)
    labels = student(IMAGES).argmax(1)
    teacher.head.bias.data += 2.0 * labels.bincount(minlength=3)
    model = Distiller(student, teacher, [BoundarySamples(samples=3, steps=3, step_size=2.0)], example=IMAGES[:1])
    return _steps(model, share, labels[share], distributed=distributed)


class Generator(nn.Module):
    """Images of images, without batch statistics."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x).tanh())


def generators(share: slice, *, distributed: bool) -> dict[str, Any]:
    """Two steps of GAN compression, whose discriminator learns from the images of both processes."""
    torch.manual_seed(5)
    recipe = dict(type="gan_compression", tap="inner", layers=1, width=4, lr=0.01)
    model = Distiller(Generator(3), Generator(5), recipe=recipe, example=IMAGES[:1])
    for layer in model.terms["adversarial_images"].opponent.network.model:
        if isinstance(layer, nn.Conv2d):  # those of 0.02 hardly judge
            layer.weight.data *= 10
    return _steps(model, share, IMAGES[share, :2].flip(-1), distributed=distributed)


def balanced(share: slice, *, distributed: bool) -> dict[str, Any]:
    """Two steps with weights that are set by the share of the gradient of both processes."""
    torch.manual_seed(0)
    auto = dict(type="auto", share=0.5, batches=1)
    terms = [
        FeatureImitation("trunk", weight=auto, name="hinted"),
        SoftTargets(temperature=4, weight="auto", name="soft"),
    ]
    model = Distiller(Net(4), Net(6), terms, example=IMAGES[:1])
    wrapped = DistributedDataParallel(model) if distributed else model
    scale = (WORLD if distributed else 1) / (LABELS != -100).sum()
    result: dict[str, Any] = {"losses": [], "gradients": []}
    for _ in range(2):
        model.zero_grad()
        out = wrapped(IMAGES[share], targets=LABELS[share])
        out.total(F.cross_entropy(out.student, LABELS[share], reduction="sum") * scale).backward()
        result["losses"].append({name: value.detach() for name, value in out.losses.items()})
        result["gradients"].append(gradients(model))
    return result | {"weights": {name: term.weight for name, term in model.terms.items()}}


def _steps(model: Distiller, share: slice, targets: Tensor, *, distributed: bool) -> dict[str, Any]:
    """Two steps without an optimizer of the student."""
    wrapped = DistributedDataParallel(model) if distributed else model
    result: dict[str, Any] = {"losses": [], "gradients": []}
    for _ in range(2):
        model.zero_grad()
        out = wrapped(IMAGES[share], targets=targets)
        out.loss.backward()
        result["losses"].append({name: value.detach() for name, value in out.losses.items()})
        result["gradients"].append(gradients(model))
    return result


def exchanges() -> dict[str, Any]:
    """What a process sends and gets, with the gradient that comes back to it."""
    own = rank()
    values = torch.tensor([1.0 + own, 10.0], requires_grad=True)
    (total_over_ranks(values).square() * (1 + own)).sum().backward()
    rows = torch.full((2, 3), float(own), requires_grad=True)
    gathered = gather_over_ranks(rows)
    (gathered * torch.arange(4.0)[:, None] * (1 + own)).sum().backward()
    torch.manual_seed(100 + own)  # as with one seed a rank
    random, layer = SharedRandom(), nn.Linear(2, 2)
    saved = random.state() if own == 0 else None  # one process saves alone, before anything was drawn
    copy_from_first_rank(layer)
    before = torch.get_rng_state()
    drawn = [torch.rand(3, generator=random.of_all_ranks()) for _ in range(2)]
    apart = torch.rand(3, generator=random.of_this_rank())
    after = torch.rand(3, generator=random.of_all_ranks())
    return dict(
        rank=own, total=total_over_ranks(values).detach(), total_slope=values.grad, gathered=gathered.detach(),
        gathered_labels=gather_over_ranks(torch.tensor([own])), gathered_slope=rows.grad, saved=saved, drawn=drawn, apart=apart,
        after=after, state=random.state(), untouched=torch.equal(before, torch.get_rng_state()),
        weight=layer.weight.detach().clone(),
    )  # fmt: skip


def all_steps(rank: int) -> dict[Any, Any]:
    """The steps of this process's share, without and with a term that is infinite on one process, and what it exchanges."""
    share = SHARES[rank]
    results: dict[Any, Any] = {on: steps(share, broken_on=on, distributed=True) for on in (None, *range(WORLD))}
    mutual = {average: students(share, average, distributed=True) for average in (False, True)}
    halves = (slice(0, 2), slice(2, 4))
    wider = netaug(halves[rank], distributed=True)
    schemes = near_the_boundary, generators, balanced
    near, generated, balance = (scheme(share, distributed=True) for scheme in schemes)
    return results | {
        "exchanges": exchanges(),
        "students": mutual,
        "netaug": wider,
        "near": near,
        "generated": generated,
        "balanced": balance,
    }


if __name__ == "__main__":
    as_rank(all_steps)
