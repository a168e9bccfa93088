"""The teacher: frozen, strict, safe to load."""

from __future__ import annotations

import copy
import datetime
from pathlib import Path

import pytest
import torch
from torch import nn

from kdgraft import DistillError, Teacher, UnsafeCheckpoint
from support.tensors import Payload


def net(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(0.5))


def weights(seed: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return net().state_dict()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "teacher.pth"
    torch.save({"state_dict": weights(), "meta": {"dataset_meta": {"classes": ("a", "b")}}}, path)
    return path


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- frozen and out of sight


def test_frozen_and_in_eval_mode():
    teacher = Teacher(net().train())
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not any(module.training for module in teacher.model.modules())
    teacher.model.train()
    teacher.ensure_eval()
    assert not any(module.training for module in teacher.model.modules())


def test_invisible_to_a_module_that_holds_it():
    holder = nn.Linear(2, 2)
    holder.teacher = Teacher(net())
    assert set(holder.state_dict()) == {"weight", "bias"}
    assert len(list(holder.parameters())) == 2
    assert len(list(holder.modules())) == 1
    holder.train()
    assert not holder.teacher.model.training


def test_a_deep_copy_shares_it():
    holder = nn.Linear(2, 2)
    holder.teacher = Teacher(net())
    assert copy.deepcopy(holder).teacher is holder.teacher


def test_moves_and_converts():
    model = net()
    double = lambda tensor: tensor.double() if tensor.is_floating_point() else tensor  # noqa: E731
    expected = {name: double(value) for name, value in model.state_dict().items()}
    teacher = Teacher(model)
    teacher.apply(double)
    assert teacher.model[0].weight.dtype is torch.float64
    torch.testing.assert_close(dict(teacher.model.state_dict()), expected, rtol=0, atol=0)


def test_a_placed_one_stays_as_it_is():
    teacher = Teacher(nn.Linear(2, 2))
    assert not teacher.placed
    teacher.model.hf_device_map = {"": "cpu"}
    teacher.apply(lambda tensor: tensor.double())
    assert teacher.placed and teacher.model.weight.dtype == torch.float32
    nowhere = Teacher(nn.Linear(2, 2, device="meta"))
    nowhere.apply(lambda tensor: tensor.to("cpu"))
    assert nowhere.placed and nowhere.model.weight.is_meta


@pytest.mark.parametrize(
    ("precision", "alone", "within"),
    [
        ("inherit", torch.float32, torch.bfloat16),
        ("fp32", torch.float32, torch.float32),
        ("bf16", torch.bfloat16, torch.bfloat16),
        ("fp16", torch.float16, torch.float16),
    ],
)
def test_precision(precision: str, alone: torch.dtype, within: torch.dtype):
    teacher, x = Teacher(net()[0], precision=precision), torch.ones(1, 3)
    with teacher.context("cpu"):
        assert teacher.model(x).dtype is alone
    with torch.autocast("cpu", torch.bfloat16):
        with teacher.context("cpu"):
            assert teacher.model(x).dtype is within
        assert nn.Linear(3, 1)(x).dtype is torch.bfloat16  # the host's own autocast goes on


def test_unknown_precision():
    with pytest.raises(DistillError, match="teacher precision must be 'inherit', 'fp32', 'bf16' or 'fp16', got 'half'"):
        Teacher(net(), precision="half")


# --- loading


def test_loads_when_asked_and_once(checkpoint: Path):
    teacher = Teacher(net(), checkpoint)
    before = {key: value.clone() for key, value in teacher.model.state_dict().items()}
    assert not teacher.loaded
    assert equal(teacher.model.state_dict(), before)
    teacher.load()
    assert teacher.loaded
    assert equal(teacher.model.state_dict(), weights())
    assert teacher.meta == {"dataset_meta": {"classes": ("a", "b")}}
    checkpoint.unlink()
    teacher.load()  # not again


def test_a_model_that_has_its_weights_loads_nothing():
    teacher = Teacher(net())
    assert teacher.loaded
    teacher.load()


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"model": w, "epoch": 3}, lambda w: {"state_dict": w}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_usual_layouts(tmp_path: Path, wrap, prefix: str):
    path = tmp_path / "teacher.pth"
    torch.save(wrap({prefix + key: value for key, value in weights().items()}), path)
    teacher = Teacher(net(), str(path))
    teacher.load()
    assert equal(teacher.model.state_dict(), weights())


def test_missing_file(tmp_path: Path):
    with pytest.raises(DistillError, match=r"checkpoint not found: .*absent\.pth"):
        Teacher(net(), tmp_path / "absent.pth").load()
    with pytest.raises(DistillError, match=r"not found: https://example.org/teacher\.pth; download it first"):
        Teacher(net(), "https://example.org/teacher.pth").load()


def test_a_home_directory_is_expanded(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    teacher = Teacher(net(), "~/teacher.pth")
    teacher.load()
    assert equal(teacher.model.state_dict(), weights())


def test_weights_that_do_not_fit_change_nothing_and_are_listed(tmp_path: Path):
    path, state = tmp_path / "other.pth", weights()
    state["2.weight"] = torch.ones(1)
    del state["1.running_mean"]
    state["0.weight"] = torch.ones(5, 3)
    torch.save({"state_dict": state}, path)
    teacher = Teacher(net(), path)
    before = {key: value.clone() for key, value in teacher.model.state_dict().items()}
    with pytest.raises(DistillError) as error:
        teacher.load()
    message = str(error.value)
    assert "other.pth does not fit the teacher Sequential" in message
    assert "1 missing: 1.running_mean" in message
    assert "1 unexpected: 2.weight" in message
    assert "1 of another shape: 0.weight (5, 3) for (4, 3)" in message
    assert "\n" not in message
    assert equal(teacher.model.state_dict(), before)
    assert not teacher.loaded


def test_many_wrong_keys_are_cut_short(tmp_path: Path):
    path = tmp_path / "other.pth"
    torch.save({f"layer{i}": torch.ones(1) for i in range(9)}, path)
    with pytest.raises(DistillError, match="9 unexpected: layer0, layer1, layer2, layer3, …"):
        Teacher(net(), path).load()


def test_a_pickle_that_would_execute_is_refused(tmp_path: Path):
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    torch.save({"state_dict": weights(), "payload": Payload(trace)}, path)
    with pytest.raises(
        UnsafeCheckpoint, match=r"evil\.pth holds objects that loading would execute.*trusted=True"
    ) as error:
        Teacher(net(), path).load()
    assert "mkdir" in str(error.value)
    assert "\n" not in str(error.value)
    assert not trace.exists()
    teacher = Teacher(net(), path, trusted=True)
    teacher.load()
    assert trace.exists()
    assert equal(teacher.model.state_dict(), weights())


def test_a_host_may_allow_harmless_types(tmp_path: Path):
    path = tmp_path / "dated.pth"
    torch.save({"state_dict": weights(), "meta": {"made": datetime.timedelta(days=1)}}, path)
    with pytest.raises(UnsafeCheckpoint, match=r"datetime\.timedelta"):
        Teacher(net(), path).load()
    teacher = Teacher(net(), path, safe_types=[datetime.timedelta])
    teacher.load()
    assert teacher.meta == {"made": datetime.timedelta(days=1)}
    with pytest.raises(UnsafeCheckpoint):  # and the allowance does not outlive the load
        Teacher(net(), path).load()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_a_damaged_file(tmp_path: Path, content: bytes):
    path = tmp_path / "damaged.pth"
    path.write_bytes(content)
    with pytest.raises(DistillError, match=r"damaged\.pth") as error:
        Teacher(net(), path).load()
    assert "\n" not in str(error.value)


def test_a_file_without_weights(tmp_path: Path):
    path = tmp_path / "list.pth"
    torch.save([1, 2], path)
    with pytest.raises(DistillError, match="holds a list, not a dict of weights"):
        Teacher(net(), path).load()
