"""torchdistill's loss as a peer of the benchmark of plain PyTorch."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from kdgraft import Distiller, DistillError, SoftTargets
from kdgraft_bench.benchmark.planned import plan_of_benchmark
from kdgraft_bench.benchmark.working import carry_out_one
from kdgraft_bench.core import nets
from kdgraft_bench.core.peers import HARD, TEMPERATURE, TorchdistillKD
from kdgraft_bench.hosts import bench_host
from kdgraft_bench.spec import read_benchmark

there = find_spec("torchdistill") is not None


def models():
    torch.manual_seed(0)
    return nets.conv(2, channels=1), nets.conv(3, channels=1)


@pytest.mark.skipif(there, reason="torchdistill is installed")
def test_without_torchdistill_the_peer_says_what_to_install():
    with pytest.raises(DistillError, match="pip install torchdistill"):
        TorchdistillKD(*models())


@pytest.mark.skipif(not there, reason="needs torchdistill")
def test_its_loss_is_that_of_soft_targets():
    student, teacher = models()
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
    theirs = TorchdistillKD(student, teacher)(images, targets=labels).total(torch.tensor(1e3))
    terms = [SoftTargets(temperature=TEMPERATURE, hard_weight=HARD)]
    own = Distiller(student, teacher, terms, example=images)(images)
    expected = own.total(torch.nn.functional.cross_entropy(own.student, labels))
    assert theirs.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_peer_trains_the_student_as_its_methods_do(tmp_path):
    told = read_benchmark("core", out=str(tmp_path))
    host = bench_host("torch")
    dataset = host.dataset(told)
    path, options = host.peer(told.peers["torchdistill"], "small", dataset, told)
    alone, teacher = (host.config(model, dataset, told, "x")[1] for model in (told.students["small"], told.teacher))
    assert path.endswith("peers.py:torchdistill_kd")
    assert options == {**alone, "teacher": teacher, "teacher_weights": "{teacher.weights}"}


@pytest.mark.skipif(not there, reason="needs torchdistill")
def test_the_peer_is_trained_and_tested(tmp_path):
    told = read_benchmark("core", out=str(tmp_path), iterations=8, seeds=[0], methods=["soft_targets"])
    host = bench_host("torch")
    plan = plan_of_benchmark(told, host, host.dataset(told))
    found = {
        name: carry_out_one(told, plan, name, 0) for name in ("teacher", "small-torchdistill", "small-soft_targets")
    }
    # One loss, written twice: the same training up to the order of additions.
    accuracies = [found[f"small-{name}"].metrics["accuracy"] for name in ("torchdistill", "soft_targets")]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.02) and accuracies[0] > 0
