"""Terms with a network that learns from the teacher first: its stage, its file, its resumption, and what counts in it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdgraft import (
    Batch,
    Distiller,
    DistillError,
    FactorTransfer,
    FreeKD,
    Itself,
    MasKD,
    Peer,
    PretrainedTerm,
    UnsafeCheckpoint,
    WiringError,
)
from kdgraft.losses import factor_transfer, frequency_imitation, masked_imitation
from support.pretrained_ranks import examined, steps
from support.processes import found_by_two
from support.tensors import Payload

X = torch.zeros(1)
TERMS = [FactorTransfer, MasKD, FreeKD]
every = pytest.mark.parametrize("kind", TERMS, ids=lambda kind: kind.__name__)


class Fixed(nn.Module):
    """Yields two maps of its own."""

    def __init__(self, channels: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = ((6, 6), (3, 3))
        self.maps = nn.ParameterList(torch.randn(2, channels, *size, generator=generator) for size in sizes)
        self.neck = nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.neck(tuple(each * 1 for each in self.maps))


def distil(kind: type[PretrainedTerm], student: int = 4, teacher: int = 6, **settings: Any) -> Distiller:
    torch.manual_seed(0)
    settings = {"pretrain": 2, "lr": 0.01, "name": "term", **settings}
    return Distiller(Fixed(student, 1), Fixed(teacher, 2), [kind("neck[*]", **settings)], example=X)


def term_of(model: Distiller) -> PretrainedTerm:
    term = model.terms["term"]
    assert isinstance(term, PretrainedTerm)
    return term


def network_of(model: Distiller) -> nn.Module:
    return term_of(model).auxiliaries["network"].network


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# The two stages.


@every
def test_infinite_features_harm_no_adapter_while_the_network_learns(kind: type[PretrainedTerm]):
    model = distil(kind)
    for maps in model.student.parameters():
        maps.data[0, 0, 0, 0] = torch.inf
    out = model(X)
    out.loss.backward()
    assert out.loss == 0 and all(slope.grad.isfinite().all() for slope in model.terms.parameters())


@every
def test_the_network_learns_first_and_the_student_then(kind: type[PretrainedTerm]):
    model = distil(kind)
    for step in range(4):
        before = copy.deepcopy(network_of(model))
        model.zero_grad()
        out = model(X)
        out.loss.backward()
        assert same(before, network_of(model)) == (step >= 2)
        slopes = [p.grad for p in (*model.student.parameters(), *model.terms.parameters())]
        assert all(slope is not None for slope in slopes)  # as DDP needs
        assert all(bool(slope.any()) == (step >= 2) for slope in slopes)
        assert bool(out.losses["distill.term.loss"]) == (step >= 2)
        assert (len(out.losses) > 1) == (step < 2)  # the network's own figures
    assert not any(p.requires_grad for p in network_of(model).parameters())


def test_the_factors_of_the_student_follow_those_of_the_paraphraser():
    model = distil(FactorTransfer, weight=3.0)
    paraphrasers = copy.deepcopy(network_of(model))
    told = model(X).losses["distill.term.reconstruction"]
    teacher, student = model.teacher.model.maps, model.student.maps
    expected = [network.errors(t).mean() for network, t in zip(paraphrasers, teacher, strict=True)]
    torch.testing.assert_close(told, torch.stack(expected).sum())
    model(X)
    pairs = zip(student, teacher, term_of(model).translators, network_of(model), strict=True)
    losses = [factor_transfer(translator(s), network.encode(t)) for s, t, translator, network in pairs]
    torch.testing.assert_close(model(X).loss, 3 * torch.stack(losses).mean())
    assert losses[0] > 0


def test_the_paraphraser_learns_to_restore_the_features():
    model = distil(FactorTransfer, pretrain=60, lr=0.03, rate=1.0)
    told = [model(X).losses["distill.term.reconstruction"].item() for _ in range(60)]
    assert told[-1] < 0.5 * told[0]


def test_the_masks_weigh_the_errors_and_later_those_of_the_student_too():
    model = distil(MasKD, student_masks_after=1, tokens=3, weight=7.0)
    model(X), model(X)
    for both in (False, True):
        expected = []
        for level, network in enumerate(network_of(model)):
            s, t = term_of(model).adapters[level].project(model.student.maps[level]), model.teacher.model.maps[level]
            masks = network.masks(t) * (network.masks(s) if both else 1)
            expected.append(masked_imitation(s, t, masks, shares=network.shares(t)))
        torch.testing.assert_close(model(X).loss, 7 * torch.stack(expected).sum())


def test_bands_and_features_are_compared_on_every_level():
    model = distil(FreeKD, imitation=0.5, weight=2.0)
    model(X), model(X)
    expected = []
    for level, network in enumerate(network_of(model)):
        s, t = term_of(model).adapters[level].project(model.student.maps[level]), model.teacher.model.maps[level]
        expected.append(frequency_imitation(s, t, network.masks(t)) + 0.5 * nn.functional.mse_loss(s, t))
    torch.testing.assert_close(model(X).loss, 2 * torch.stack(expected).sum())


# Its file.


@every
def test_a_network_of_an_earlier_run_teaches_at_once(kind: type[PretrainedTerm], tmp_path: Path):
    first = distil(kind, save_network=tmp_path / "network.pth")
    for _ in range(2):
        assert not (tmp_path / "network.pth").exists()
        first(X)
    second = distil(kind, network=tmp_path / "network.pth")
    assert same(network_of(first), network_of(second))
    torch.testing.assert_close(second(X).losses, first(X).losses)
    assert same(network_of(first), network_of(second))
    with pytest.raises(DistillError, match=r"does not fit the network of term ModuleList; .* of another shape"):
        distil(kind, teacher=8, network=tmp_path / "network.pth")


def test_a_file_must_be_there_when_training_starts(tmp_path: Path):
    model = distil(FactorTransfer, network=tmp_path / "absent.pth")  # as for inference, which needs no file
    with pytest.raises(DistillError, match="checkpoint not found"):
        model(X)
    torch.save({"state_dict": {}, "other": Payload(tmp_path / "trace")}, tmp_path / "unsafe.pth")
    with pytest.raises(UnsafeCheckpoint):
        distil(FactorTransfer, network=tmp_path / "unsafe.pth")
    assert not (tmp_path / "trace").exists()


# Its state.


@every
@pytest.mark.parametrize("done", [1, 3])
def test_both_stages_resume_where_they_were(kind: type[PretrainedTerm], done: int, tmp_path: Path):
    model = distil(kind)
    for _ in range(done):
        model(X)
    assert not any("network" in key for key in model.state_dict() if not key.endswith("_extra_state"))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = distil(kind)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(4 - done):
        torch.testing.assert_close(model(X).losses, other(X).losses, rtol=0, atol=0)
    assert same(network_of(model), network_of(other)) and term_of(other).steps == 4


def test_a_resumed_run_does_not_need_the_file(tmp_path: Path):
    first = distil(FactorTransfer, save_network=tmp_path / "network.pth")
    first(X), first(X)
    model = distil(FactorTransfer, network=tmp_path / "network.pth")
    model(X)
    (tmp_path / "network.pth").unlink()
    other = distil(FactorTransfer, network=tmp_path / "network.pth")
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(X).loss, model(X).loss, rtol=0, atol=0)


# What counts.


@every
def test_padding_counts_in_nothing(kind: type[PretrainedTerm]):
    batch = Batch(padded_size=(24, 24), image_sizes=[(24, 24), (16, 8)])

    def figures(junk: float) -> list[Any]:
        model = distil(kind)
        for maps in (model.student.maps, model.teacher.model.maps):
            for level, side in zip(maps, (4, 8), strict=True):
                level.data[1, :, 16 // side :], level.data[1, :, :, 8 // side :] = junk, junk
        found = []
        for _ in range(3):
            out = model(X, batch=batch)
            out.loss.backward()
            found.append(out.losses)
        slopes = [p.grad for p in model.terms.parameters()]
        return [found, slopes, list(network_of(model).state_dict().values())]

    torch.testing.assert_close(figures(0.0), figures(1e4), rtol=0, atol=0)


@every
def test_a_batch_without_any_position_is_no_step(kind: type[PretrainedTerm]):
    nothing = Batch(padded_size=(24, 24), image_sizes=[(0, 0)] * 2)
    model = distil(kind)
    before = copy.deepcopy(network_of(model))
    for _ in range(3):
        out = model(X, batch=nothing)
        out.loss.backward()
        assert out.loss == 0
    assert same(before, network_of(model)) and term_of(model).auxiliaries["network"].skipped == 0
    assert all(torch.isfinite(p.grad).all() and not p.grad.any() for p in model.student.parameters())


@every
def test_half_precision_computes_in_float32(kind: type[PretrainedTerm]):
    alike: dict[str, Any] = {} if kind is FactorTransfer else dict(adapter="none")  # which the host's autocast governs
    exact, model = (distil(kind, student=6, **alike) for _ in range(2))
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            found = model(X).losses
        torch.testing.assert_close(found, exact(X).losses)
        assert found["distill.term.loss"].dtype == torch.float32


def test_two_processes_are_one(tmp_path: Path):
    ranks = found_by_two("pretrained_ranks", tmp_path)
    whole = steps(slice(None), distributed=False)
    for found in ranks:
        torch.testing.assert_close(found["networks"], whole["networks"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["gradients"], whole["gradients"], rtol=1e-4, atol=1e-5)
    for place, losses in enumerate(whole["losses"]):
        both = [found["losses"][place] for found in ranks]
        for name, value in losses.items():  # DDP averages losses; figures are those of all images already
            torch.testing.assert_close((both[0][name] + both[1][name]) / 2, value, rtol=1e-4, atol=1e-6)

    alone = examined(slice(None))
    assert alone["losses"][0]["distill.term.task"] > 0
    for found in ranks:
        torch.testing.assert_close(found["examined"]["tokens"], alone["tokens"], rtol=1e-4, atol=1e-6)
        for own, value in zip(found["examined"]["losses"], alone["losses"], strict=True):
            torch.testing.assert_close(own["distill.term.task"], value["distill.term.task"])


# Mistakes.


@pytest.mark.parametrize(
    "source", [lambda: Peer(Fixed(6, 2)), Itself, lambda: Itself(momentum=0.9)], ids=["peer", "itself", "average"]
)
def test_a_source_that_changes_is_refused(source: Any):
    with pytest.raises(WiringError, match="learns from a frozen teacher first, and this source changes"):
        Distiller(Fixed(4, 1), source(), [FactorTransfer("neck[*]")], example=X)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(pretrain=0), "FactorTransfer: pretrain must be a whole number >= 1"),
        (dict(pretrain=1.5), "FactorTransfer: pretrain must be a whole number"),
        (dict(lr=0), "FactorTransfer: lr must be a number > 0"),
        (dict(betas=0.9), "betas must be two numbers"),
        (dict(rate=0), "FactorTransfer: rate must be a number > 0"),
        (dict(variant="fast"), "variant must be one of code, paper"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], said: str):
    with pytest.raises(DistillError, match=said):
        FactorTransfer("neck[*]", **settings)


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        (MasKD, dict(tokens=0), "MasKD: tokens must be a whole number >= 1"),
        (MasKD, dict(weigh_masks="no"), "MasKD: weigh_masks must be true or false"),
        (MasKD, dict(student_masks_after=-1), "MasKD: student_masks_after must be a whole number >= 0"),
        (FreeKD, dict(prompts=0), "FreeKD: prompts must be a whole number >= 1"),
        (FreeKD, dict(imitation=-1), "FreeKD: imitation must be a number >= 0"),
    ],
)
def test_settings_of_tokens_that_make_no_sense(kind: type[PretrainedTerm], settings: dict[str, Any], said: str):
    with pytest.raises(DistillError, match=said):
        kind("neck[*]", **settings)
