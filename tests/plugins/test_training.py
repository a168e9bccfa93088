"""The settings of ``fit``: each does what it says, a run with all of them resumes exactly, and two processes are one."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdgraft import Distiller, DistillError, Hint, Itself, SoftTargets, WarmUp
from kdgraft.fit import STATE, fit
from kdgraft.sources.teacher import read_checkpoint
from support import fit_ranks
from support.fit_ranks import X, Y, accuracy, net
from support.forking import python
from support.processes import found_by_two

BATCHES = [(X[start : start + 8], Y[start : start + 8]) for start in range(0, 40, 8)]


def distiller(source: Any = None, *, dropout: float = 0.0) -> Distiller:
    taught = source if source is not None else net(8, 1)
    return Distiller(net(4, 0, dropout), taught, [SoftTargets(2), Hint("0", schedule=WarmUp(4))], example=X[:1])


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))


class Recorded(torch.optim.SGD):
    """SGD that tells its learning rates and the norm of its gradients at each step."""

    def __init__(self, parameters: Any, lr: float, told: list[tuple[float, float]]) -> None:
        super().__init__(parameters, lr)
        self.told = told

    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        norm = torch.stack([p.grad.norm() for p in group["params"] if p.grad is not None]).norm()
        self.told.append((group["lr"], float(norm)))
        super().step()


def told(epochs: int = 2, lr: float = 0.5, **settings: Any) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    model = net(4, 0)
    fit(
        model,
        BATCHES,
        F.cross_entropy,
        epochs=epochs,
        optimizer=lambda p: Recorded(p, lr, found),
        **settings,
    )
    return found


def rates(**settings: Any) -> list[float]:
    return [rate for rate, _ in told(**settings)]


# --- the learning rate


def test_the_rate_falls_as_half_a_cosine_after_the_warm_up():
    expected = [0.5 * n / 4 for n in (1, 2, 3, 4)] + [0.25 + 0.25 * math.cos(math.pi * n / 6) for n in range(6)]
    assert rates(schedule="cosine", warmup=4) == pytest.approx(expected)
    # A run that stops early has the rates of the whole schedule.
    assert rates(epochs=4, schedule="cosine", stop=1) == pytest.approx(rates(epochs=4, schedule="cosine")[:5])
    # Three updates an epoch, from five batches.
    assert rates(schedule="cosine", accumulate=2) == pytest.approx(
        [0.25 + 0.25 * math.cos(math.pi * n / 6) for n in range(6)]
    )


def test_the_rate_is_constant_by_default_or_any_function():
    assert rates() == [0.5] * 10
    assert rates(warmup=4) == pytest.approx([0.125, 0.25, 0.375] + [0.5] * 7)
    assert rates(schedule=lambda done: 1 if done < 0.5 else 0.1) == pytest.approx([0.5] * 5 + [0.05] * 5)


def test_a_schedule_needs_an_end():
    with pytest.raises(DistillError, match="a schedule needs a loader that has a length; give schedule='constant'"):
        fit(net(4, 0), iter(BATCHES), F.cross_entropy, epochs=1, schedule="cosine")
    assert fit(net(4, 0), iter(BATCHES), F.cross_entropy, epochs=1, warmup=2).epochs == 1


# --- clipping, accumulation, precision


def test_gradients_are_clipped_to_their_norm_together():
    free, clipped = told(clip=None), told(clip=0.2)
    assert max(norm for _, norm in free) > 0.25
    assert max(norm for _, norm in clipped) == pytest.approx(0.2, rel=1e-4)
    assert clipped[0][1] == pytest.approx(min(free[0][1], 0.2), rel=1e-4)
    assert told(clip=1e6) == free


@pytest.mark.parametrize("source", ["teacher", "itself"])
@pytest.mark.parametrize("cuts", [(0, 8, 16, 32), (0, 12, 16, 20)], ids=["equal", "unequal"])
def test_accumulated_batches_are_one_large_batch(source: str, cuts: tuple[int, ...]):
    parts = [(X[a:b], Y[a:b]) for a, b in zip(cuts, (*cuts[1:], 40), strict=True)]
    whole = [(X[a:b], Y[a:b]) for a, b in ((0, cuts[2]), (cuts[2], 40))]

    def trained(batches: list, accumulate: int) -> tuple[Distiller, list]:
        model = distiller(Itself(0.5) if source == "itself" else None)
        optimizer = torch.optim.SGD(model.parameters(), 0.3)
        found = fit(model, batches, F.cross_entropy, epochs=3, optimizer=optimizer, accumulate=accumulate)
        return model, found.history

    (many, in_parts), (one, at_once) = trained(parts, 2), trained(whole, 1)
    assert many.iteration == one.iteration == 6
    for ours, theirs in zip(many.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert [entry["loss"] for entry in in_parts] == pytest.approx([entry["loss"] for entry in at_once], rel=1e-5)


def test_parts_of_which_the_size_is_unknown_count_equally():
    class Pair:
        def __init__(self, start: int) -> None:
            self.x, self.y = X[start : start + 4], Y[start : start + 4]

    def views(pair: Pair, targets: None) -> tuple[Tensor, Tensor]:
        return pair.x, pair.y

    model, other = net(4, 0), net(4, 0)
    settings = dict(epochs=1, optimizer=torch.optim.SGD, lr=0.3)
    fit(model, [(Pair(0), None), (Pair(4), None)], F.cross_entropy, accumulate=2, views=views, **settings)
    fit(other, [(X[:8], Y[:8])], F.cross_entropy, **settings)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["plain", "distiller"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_mixed_precision_only_the_models_compute_in_sixteen_bits(precision: str, kind: str):
    model, inside, outside = (net(4, 0) if kind == "plain" else distiller()), [], []
    (model if kind == "plain" else model.student)[0].register_forward_hook(lambda m, a, out: inside.append(out.dtype))

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        outside.append(output.dtype)
        return F.cross_entropy(output, targets)

    found = fit(model, BATCHES, loss, epochs=2, precision=precision)
    exact = fit(net(4, 0) if kind == "plain" else distiller(), BATCHES, F.cross_entropy, epochs=2)
    assert set(inside) == {torch.bfloat16 if precision == "bf16" else torch.float16} and set(outside) == {torch.float32}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert found.model(X).dtype == torch.float32  # nothing is left of it
    values = [entry["loss"] for entry in found.history]
    assert values == pytest.approx([entry["loss"] for entry in exact.history], rel=0.02)
    assert values != [entry["loss"] for entry in exact.history]


def test_an_update_that_overflows_is_left_out_and_the_scale_halved(tmp_path: Path):
    steep = [True, False]

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets) * (1e35 if steep.pop(0) else 1.0)

    model, before = net(4, 0), net(4, 0)
    fit(model, BATCHES[:1], loss, epochs=2, stop=1, precision="fp16", clip=1.0, folder=tmp_path)
    assert same(model, before)
    state = read_checkpoint(tmp_path / STATE)
    assert state["scaler"]["scale"] == 2.0**15 and state["updates"] == 1
    fit(model, BATCHES[:1], loss, epochs=2, precision="fp16", clip=1.0, folder=tmp_path, resume=True)
    assert not same(model, before) and all(p.isfinite().all() for p in model.parameters())


# --- the optimizer


def test_the_optimizer_is_adamw_unless_another_is_given():
    ours, theirs = net(4, 0), net(4, 0)
    fit(ours, BATCHES, F.cross_entropy, epochs=1, lr=0.01, weight_decay=0.1)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    for x, y in BATCHES:
        optimizer.zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        optimizer.step()
    assert same(ours, theirs)
    by_name = net(4, 0)
    fit(by_name, BATCHES, F.cross_entropy, epochs=1, optimizer=torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    assert same(by_name, theirs)


def test_shampoo_trains_and_resumes(tmp_path: Path):
    shampoo = pytest.importorskip("pytorch_optimizer").Shampoo
    settings = dict(epochs=4, optimizer=shampoo, lr=0.2, schedule="cosine", folder=tmp_path)
    whole = fit(distiller(), BATCHES, F.cross_entropy, **settings)
    assert whole.history[-1]["loss"] < 0.95 * whole.history[0]["loss"]
    fit(distiller(), BATCHES, F.cross_entropy, **settings, stop=2)
    assert same(fit(distiller(), BATCHES, F.cross_entropy, **settings, resume=True).model, whole.model)


# --- the best model, and the end


def scripted(values: list[float], kept: list[nn.Module]):
    """Metrics that are given beforehand; the models that they are of are kept."""

    def evaluate(model: nn.Module) -> dict[str, float]:
        kept.append(copy.deepcopy(model))
        return {"accuracy": values[len(kept) - 1]}

    return evaluate


@pytest.mark.parametrize(
    ("best", "values", "epoch"),
    [
        ("accuracy", [0.2, 0.9, 0.9, 0.1], 1),
        ("-accuracy", [0.2, 0.9, 0.1, 0.3], 2),
        ("accuracy", [math.nan, 0.1, math.nan, 0.0], 1),
        ("accuracy", [math.nan] * 4, None),
        (None, [0.9, 0.1, 0.1, 0.1], None),
    ],
)
def test_the_best_model_is_kept(best: str | None, values: list[float], epoch: int | None):
    kept: list[nn.Module] = []
    found = fit(distiller(), BATCHES, F.cross_entropy, epochs=4, evaluate=scripted(values, kept), best=best)
    assert found.best_epoch == epoch and len(found.history) == 4
    assert same(found.model, kept[3 if epoch is None else epoch])
    assert found.metrics is found.history[3 if epoch is None else epoch]


def test_the_best_model_of_before_a_stop_is_kept(tmp_path: Path):
    kept: list[nn.Module] = []
    values = [0.2, 0.9, 0.3, 0.4]
    settings = dict(epochs=4, evaluate=scripted(values, kept), best="accuracy", folder=tmp_path)
    fit(distiller(), BATCHES, F.cross_entropy, stop=3, **settings)
    found = fit(distiller(), BATCHES, F.cross_entropy, resume=True, **settings)
    assert found.best_epoch == 1 and same(found.model, kept[1])
    again = fit(distiller(), BATCHES, F.cross_entropy, resume=True, **settings)  # nothing is left to do
    assert again.best_epoch == 1 and same(again.model, kept[1]) and len(kept) == 4


def test_a_bar_shows_the_progress_and_the_time_left(capsys: pytest.CaptureFixture[str]):
    fit(net(4, 0), BATCHES, F.cross_entropy, epochs=2)
    assert capsys.readouterr().err == ""
    fit(net(4, 0), BATCHES, F.cross_entropy, epochs=2, accumulate=2, evaluate=accuracy, progress=True)
    shown = capsys.readouterr().err
    assert "6/6" in shown and "<" in shown and "accuracy=" in shown and "loss=" in shown


# --- resuming with all of it


def everything(folder: Path, **more: Any) -> dict[str, Any]:
    return dict(
        epochs=5,
        schedule="cosine",
        warmup=2,
        lr=0.02,
        accumulate=2,
        precision="fp16",
        clip=0.5,
        evaluate=accuracy,
        best="-loss",
        folder=folder,
        **more,
    )


def loader() -> DataLoader:
    return DataLoader(TensorDataset(X, Y), 8, shuffle=True)


@pytest.mark.parametrize("at", ["a step", "the middle of a file"])
def test_a_run_with_all_settings_that_was_killed_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
):
    torch.manual_seed(8)
    whole = distiller(dropout=0.3)
    expected = fit(whole, loader(), F.cross_entropy, **everything(tmp_path / "whole"))

    class Killed(BaseException):
        pass

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        if at == "a step" and torch.is_grad_enabled():
            steps.append(1)
            if len(steps) == 13:
                raise Killed
        return F.cross_entropy(output, targets)

    def save(state: Any, file: Path) -> None:
        if at != "a step" and state["epochs"] == 3:
            Path(file).write_bytes(b"the first half")
            raise Killed
        written(state, file)

    steps: list[int] = []
    written = torch.save
    monkeypatch.setattr(torch, "save", save)
    torch.manual_seed(8)
    with pytest.raises(Killed):
        fit(distiller(dropout=0.3), loader(), loss, **everything(tmp_path / "parts"))
    monkeypatch.undo()
    assert read_checkpoint(tmp_path / "parts" / STATE)["epochs"] == 2
    torch.manual_seed(99)
    rest = distiller(dropout=0.3)
    found = fit(rest, loader(), F.cross_entropy, **everything(tmp_path / "parts", resume=True))
    assert found.history == expected.history and found.best_epoch == expected.best_epoch
    assert same(rest, whole) and rest.iteration == whole.iteration == 15
    first, second = (read_checkpoint(tmp_path / name / STATE) for name in ("whole", "parts"))
    assert first["scaler"] == second["scaler"] and first["updates"] == second["updates"] == 15


KILLED = """
import os, signal, sys, threading
from pathlib import Path

import torch
from support.fit_ranks import run

torch.manual_seed(0)
if float(sys.argv[1]):
    threading.Timer(float(sys.argv[1]), lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
folder = Path(sys.argv[2])
found = run(4, 1, folder, dropout=0.3, epochs=10, resume=True)
torch.save(found, folder / "found.pt")
os._exit(0)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_ends_at_the_same_weights(tmp_path: Path):
    whole = fit_ranks.run(4, 1, dropout=0.3, epochs=10)
    moments = (0.1, 0.23, 0.31, 0.4, 0.57, 0.8, 0.0)
    done = [python("-c", KILLED, str(moment), str(tmp_path)).returncode for moment in moments]
    assert done[-1] == 0 and done[0] != 0
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    assert found["history"] == whole["history"] and found["iterations"] == whole["iterations"] == 100
    for name, value in whole["student"].items():
        assert torch.equal(found["student"][name], value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(precision="no"), "cannot resume from .*fit.pt: it was trained with another precision"),
        (dict(best=None), "it was trained with best='-loss'; resume with the same"),
        (dict(best="loss"), "it was trained with best='-loss'; resume with the same"),
        (dict(optimizer=torch.optim.SGD), None),
    ],
)
def test_a_state_of_other_settings_is_refused(tmp_path: Path, settings: dict[str, Any], said: str | None):
    fit(distiller(), loader(), F.cross_entropy, **everything(tmp_path, stop=1))
    if said is None:  # of other parameters
        model, said = distiller(), "its optimizer has other parameters"
        settings = dict(optimizer=torch.optim.SGD(model.student[0].parameters(), 0.1), lr=None)
    else:
        model = distiller()
    with pytest.raises(DistillError, match=said) as caught:
        fit(model, loader(), F.cross_entropy, **{**everything(tmp_path, resume=True), **settings})
    assert "\n" not in str(caught.value)


# --- settings that make no sense


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(accumulate=0), "accumulate must be a whole number >= 1, got 0"),
        (dict(stop=3), "stop must be at most the 2 epochs of the schedule, got 3"),
        (dict(stop=0), "stop must be a whole number >= 1, got 0"),
        (dict(schedule="step"), "schedule must be 'constant', 'cosine' or a function, got 'step'"),
        (dict(schedule="cosine", warmup=10), "warmup must be less than the 10 updates of the training, got 10"),
        (dict(warmup=-1), "warmup must be a whole number >= 0"),
        (dict(clip=0), "clip must be a number > 0, got 0"),
        (dict(precision="fp8"), "precision must be 'no', 'bf16' or 'fp16', got 'fp8'"),
        (dict(lr=-1.0), "lr must be a number >= 0"),
        (dict(best="accuracy"), "best='accuracy' is no metric of evaluate; known: 'loss'"),
        (
            dict(best="accuracyy", evaluate=accuracy),
            "best='accuracyy' is no metric of evaluate; did you mean 'accuracy'",
        ),
        (dict(optimizer=torch.optim.LBFGS, weight_decay=0.1), "the optimizer takes no weight_decay"),
        (dict(optimizer=lambda parameters: None), "must build an optimizer from parameters, got a NoneType"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], said: str):
    with pytest.raises(DistillError, match=said) as caught:
        fit(net(4, 0), BATCHES, F.cross_entropy, **{"epochs": 2, **settings})
    assert "\n" not in str(caught.value)


def test_a_setting_of_an_optimizer_that_is_built_is_refused():
    model = net(4, 0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(DistillError, match="built already, with its own lr; set it there"):
        fit(model, BATCHES, F.cross_entropy, epochs=1, optimizer=optimizer, lr=0.2)


# --- two processes


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return found_by_two("fit_ranks", folder, str(folder / "state"))


@pytest.mark.parametrize("way", ["both", "parts"])
def test_two_processes_are_one(by_two: list[dict[str, Any]], way: str):
    alone = fit_ranks.run(20, 1)
    for found in (one[way] for one in by_two):
        for name, value in alone["student"].items():
            torch.testing.assert_close(found["student"][name], value, rtol=1e-4, atol=1e-6)
        assert found["iterations"] == alone["iterations"] == 6 and found["best"] == alone["best"] == 2
        for ours, theirs in zip(found["history"], alone["history"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)


def test_two_processes_resume_exactly(by_two: list[dict[str, Any]]):
    for found in by_two:
        assert found["rest"]["history"] == found["whole"]["history"] and found["first"]["best"] == 0
        for name, value in found["whole"]["student"].items():
            assert torch.equal(found["rest"]["student"][name], value)
    assert by_two[0]["rest"]["history"] == by_two[1]["rest"]["history"]
