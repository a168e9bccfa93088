"""Weight matching, and what a student inherits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdgraft import Distiller, DistillError, Itself, Peer, Recorder, Stop, Tap, WeightMatching, WiringError, inherit
from kdgraft.losses import weight_matching


class Net(nn.Module):
    """A stem, two layers that run twice, and a head."""

    def __init__(self, width: int, kernel: int = 3, head: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, kernel, padding=kernel // 2)
        self.stage = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
        self.head = nn.Linear(width, head)
        self.spare = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.stage(self.stage(x)).mean((2, 3)))


IMAGES = torch.sin(torch.arange(2 * 3 * 4 * 4.0)).reshape(2, 3, 4, 4)


def distilled(*terms: Any, student: Any = None, teacher: Any = None) -> Distiller:
    torch.manual_seed(0)
    return Distiller(student or Net(4), teacher or Net(4), list(terms), IMAGES)


def test_by_hand():
    student = [torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([[3.0]], requires_grad=True)]
    value = weight_matching(student, [torch.tensor([4.0, -2.0]), torch.tensor([[1.0]])])
    assert value.item() == 9 + 4
    value.backward()
    assert [weight.grad.tolist() for weight in student] == [[-6, 0], [[4]]]
    assert weight_matching(student, student).item() == 0


def test_half_precision_is_summed_in_float32():
    student, teacher = torch.full((4096,), 3.0, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        value = weight_matching([student], [teacher])
    assert value.dtype is torch.float32
    assert value.item() == 9 * 4096


def test_gradient():
    rows = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(lambda *given: weight_matching(given[:2], given[2:]), rows)


def test_mistakes_of_the_loss():
    one = torch.ones(2)
    with pytest.raises(DistillError, match="at least one tensor, and as many of each, got 0 and 0"):
        weight_matching([], [])
    with pytest.raises(DistillError, match=r"student \(2,\) and teacher \(1,\) must have the same shape"):
        weight_matching([one], [one[:1]])


# --- the term


def test_all_weights_of_a_module_by_name():
    distiller = distilled(WeightMatching(["stem", "stage"]))
    assert [row.student_tap for row in distiller.rows] == [
        *("stem.weight", "stem.bias", "stage.0.weight", "stage.0.bias", "stage.1.weight", "stage.1.bias")
    ]
    assert {row.adapter for row in distiller.rows} == {"–"}
    student, teacher = distiller.student, distiller.teacher.model
    theirs = dict(teacher.named_parameters())
    expected = sum(
        (weight - theirs[name]).square().sum()
        for name, weight in student.named_parameters()
        if name.startswith(("stem.", "stage."))
    )
    # Once, although the stage runs twice, and neither the batch nor its size matters.
    for images in (IMAGES, IMAGES[:1] * 3):
        torch.testing.assert_close(distiller(images).loss, 0.01 * expected)
    distiller(IMAGES).loss.backward()
    torch.testing.assert_close(student.stem.weight.grad, 0.02 * (student.stem.weight - teacher.stem.weight))
    assert student.head.weight.grad is None
    assert all(weight.grad is None for weight in teacher.parameters())
    assert not list(distiller.terms.parameters())


def test_a_map_where_shapes_differ():
    distiller = distilled(WeightMatching(["stage.0", "head"], weight=1.0), teacher=Net(6, head=4))
    maps = distiller.terms["weight_matching"].maps
    assert [row.adapter for row in distiller.rows] == [
        *("WeightMap 6×6×3×3→4×4×3×3", "WeightMap 6→4", "WeightMap 4×6→5×4", "WeightMap 4→5")
    ]
    student, teacher = distiller.student, distiller.teacher.model
    # At first the outputs and inputs beyond the student's are cut off, and missing ones are 0.
    cut = torch.zeros(5, 4)
    cut[:4] = teacher.head.weight[:, :4]
    torch.testing.assert_close(maps[2](teacher.head.weight), cut)
    torch.testing.assert_close(maps[0](teacher.stage[0].weight), teacher.stage[0].weight[:4, :4])
    nn.init.normal_(maps[0].outputs), nn.init.normal_(maps[0].inputs)
    weight = teacher.stage[0].weight
    expected = torch.stack(
        [torch.stack([maps[0].outputs @ weight[..., i, j] @ maps[0].inputs.T for j in range(3)], -1) for i in range(3)],
        -2,
    )
    torch.testing.assert_close(maps[0](weight), expected)
    out = distiller(IMAGES)
    out.loss.backward()
    assert maps[0].outputs.grad.any()
    assert maps[3].outputs.grad.any()
    assert not any("terms" in name or "maps" in name for name in student.state_dict())


def test_a_student_that_learns_from_weights_alone_becomes_the_teacher():
    distiller = distilled(WeightMatching(["stem", "stage", "head"], weight=1.0, schedule=Stop(40)))
    optimizer = torch.optim.SGD(distiller.student.parameters(), 0.25)
    for _ in range(40):
        optimizer.zero_grad()
        distiller(IMAGES).loss.backward()
        optimizer.step()
    ours, theirs = distiller.student.state_dict(), distiller.teacher.model.state_dict()
    for name in ("stem.weight", "stage.1.weight", "head.bias"):
        torch.testing.assert_close(ours[name], theirs[name])
    assert distiller(IMAGES).loss == 0


def test_other_paths_other_sources_and_copies():
    distiller = distilled(WeightMatching(student_modules="stage.0", teacher_modules=["stage.0"], name="w"))
    twin = copy.deepcopy(distiller)
    torch.testing.assert_close(twin(IMAGES).loss, distiller(IMAGES).loss)
    with torch.no_grad():
        twin.student.stage[0].weight += 1
    assert twin(IMAGES).loss > distiller(IMAGES).loss
    peers = Distiller(Net(4), Peer(Net(6)), [WeightMatching("head", name="w")], IMAGES)
    out = peers(IMAGES)
    assert set(out.losses) == {"distill.w.loss", "distill.w_of_teacher.loss"}
    out.loss.backward()
    assert peers.student.head.weight.grad.any()
    assert peers.peers["teacher"].head.weight.grad.any()
    itself = Distiller(Net(4), Itself(momentum=0.5), [WeightMatching("head")], IMAGES)
    assert itself(IMAGES).loss == 0
    with torch.no_grad():
        itself.student.head.bias += 4
    # The average follows by half before the step: what is left is 2 for each of five numbers.
    torch.testing.assert_close(itself(IMAGES).loss, torch.tensor(0.01 * 5 * 4))


@pytest.mark.parametrize(
    ("term", "teacher", "message"),
    [
        (dict(modules="stem"), Net(4, kernel=1), "stem.weight (4, 3, 3, 3) and the teacher's stem.weight (4, 3, 1, 1) are of different kinds of layers or kernel sizes"),
        (dict(modules="head", adapter="none"), Net(6), "head.weight (5, 4) and the teacher's head.weight (5, 6) differ; use adapter='auto'"),
        (dict(student_modules="stage.0", teacher_modules="stage"), None, "'stage' of the teacher has no weight 'weight', which 'stage.0' of the student has"),
        (dict(student_modules="stage", teacher_modules="stage.0"), None, "'stage.0' of the teacher has no weight '0.weight'"),
        (dict(student_modules=["stem", "head"], teacher_modules="stem"), None, "2 modules of the student, and 1 of the teacher"),
        (dict(modules="stages"), None, "the student has no module 'stages' (tap 'stages:parameters'); did you mean 'stage'"),
        (dict(modules="spare"), None, "tap 'spare:parameters' of the student never fired"),
    ],
)  # fmt: skip
def test_wiring_mistakes(term: dict[str, Any], teacher: nn.Module | None, message: str):
    with pytest.raises(WiringError) as caught:
        distilled(dict(type="WeightMatching", **term), teacher=teacher)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_mistakes():
    with pytest.raises(DistillError, match=r"WeightMatching needs modules, or both .*; teacher_modules is missing"):
        WeightMatching(student_modules="stem")
    with pytest.raises(DistillError, match="adapter must be one of auto, none"):
        WeightMatching("stem", adapter="conv1x1")
    with pytest.raises(WiringError, match=r"'0' of the student has no weights; name a module that has some"):
        Distiller(*(nn.Sequential(nn.ReLU(), nn.Linear(3, 2)) for _ in "ab"), [WeightMatching("0")], torch.rand(2, 3))


def test_quantised_weights_are_refused():
    teacher = Net(4)
    teacher.head.weight = nn.Parameter(torch.zeros(5, 4, dtype=torch.int8), requires_grad=False)
    teacher.head.forward = lambda x: x[:, :1].expand(-1, 5)
    with pytest.raises(WiringError, match=r"as one is torch.int8 \(quantised\); leave the module out"):
        distilled(WeightMatching("head"), teacher=teacher)


def test_frozen_weights_are_told(caplog: pytest.LogCaptureFixture):
    student = Net(4)
    student.stem.requires_grad_(False)
    distilled(WeightMatching("stem"), student=student)
    assert "no trained parameter of the student contributes to stem:parameters" in caplog.text
    caplog.clear()
    student = Net(4)
    student.stage[0].requires_grad_(False)
    distilled(WeightMatching("stage"), student=student)
    assert not caplog.text


def test_sharded_weights_are_refused(tmp_path: Path):
    fully_shard = pytest.importorskip("torch.distributed.fsdp").fully_shard
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        distiller = distilled(WeightMatching("stage"))
        fully_shard(distiller.student.stage, mesh=dist.init_device_mesh("cpu", (1,)))
        with pytest.raises(DistillError, match=r"the weights of 'stage' of the student are sharded \(FSDP\).*use DDP"):
            distiller(IMAGES)
    finally:
        dist.destroy_process_group()


def test_parameters_as_a_tap():
    net, tap = Net(4), Tap.parse("stem:parameters[weight]")
    assert (tap.path, tap.side, tap.index) == ("stem", "parameters", ("weight",))
    with Recorder(net, [tap]).record(net) as recording:
        net(IMAGES)
    assert recording[tap] is net.stem.weight
    with pytest.raises(WiringError, match="cannot read tap 'stem:weights'"):
        Tap.parse("stem:weights")


# --- inheriting


def test_inheriting():
    student, teacher = Net(4), Net(4)
    teacher.stage[1].running_mean += 3
    before = copy.deepcopy(student.head.state_dict())
    assert inherit(student, teacher, ["stem", "stage"]) is student
    for path in ("stem", "stage"):
        ours, theirs = (model.get_submodule(path).state_dict() for model in (student, teacher))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(student.head.weight, before["weight"])
    assert student.stem.weight.data_ptr() != teacher.stem.weight.data_ptr()


def test_what_differs_is_not_inherited():
    student, teacher = Net(4), Net(4, head=6)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(
        WiringError, match=r"inherit: 'head' differs, weight is \(5, 4\) in the student and \(6, 4\) in the teacher"
    ):
        inherit(student, teacher, ["stem", "head"])
    with pytest.raises(WiringError, match="inherit: the student has no module 'steam'; did you mean 'stem'"):
        inherit(student, teacher, "steam")
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
