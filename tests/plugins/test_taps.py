"""Taps: what they read, what they refuse, and that they leave the model and its outputs alone."""

from __future__ import annotations

import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdgraft import Recorder, Tap, WiringError


class Neck(nn.Module):
    """A pyramid of three levels from one map."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList([nn.Conv2d(4, 4, 1) for _ in range(3)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(level(x[..., ::step, ::step]) for level, step in zip(self.levels, (1, 2, 4), strict=True))


class Head(nn.Module):
    """Runs on every level; called through ``self.forward``, as mmseg calls its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])
        self.classes, self.boxes = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 8, 1)

    def forward(self, levels: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        towers = []
        for x in levels:
            for layer in self.tower:
                x = layer(x)
            towers.append(x)
        return [self.classes(x) for x in towers], [self.boxes(x) for x in towers]

    def get_targets(self, number: int) -> dict[str, Tensor]:
        return {"weights": torch.full((number,), 7.0)}

    def loss(self, levels: tuple[Tensor, ...]) -> Tensor:
        classes, _ = self.forward(levels)
        return sum(x.mean() for x in classes) * self.get_targets(3)["weights"].mean()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential()
        self.backbone.add_module("stem", nn.Conv2d(3, 4, 3, padding=1))
        self.backbone.add_module("norm", nn.BatchNorm2d(4))
        self.backbone.add_module("relu", nn.ReLU(inplace=True))
        self.backbone.add_module("drop", nn.Dropout(0.5))
        self.neck, self.head = Neck(), Head()

    def features(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.neck(self.backbone(x))

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        classes, boxes = self.head.forward(self.features(x))
        return {"classes": classes, "boxes": boxes}


def net() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.sin(torch.arange(2 * 3 * 8 * 8.0)).reshape(2, 3, 8, 8)


def record(model: nn.Module, *taps: str, x: Tensor = X) -> list:
    parsed = [Tap.parse(tap) for tap in taps]
    with Recorder(model, parsed).record(model) as recording:
        model(x)
    return [recording[tap] for tap in parsed]


# --- the notation


@pytest.mark.parametrize(
    ("text", "path", "method", "is_input", "index"),
    [
        ("backbone.layer3", "backbone.layer3", "forward", False, ()),
        ("backbone.layer3:input", "backbone.layer3", "forward", True, ()),
        ("backbone.layer3:input[0]", "backbone.layer3", "forward", True, (0,)),
        ("bbox_head.get_targets()", "bbox_head", "get_targets", False, ()),
        ("bbox_head.get_targets()[1]", "bbox_head", "get_targets", False, (1,)),
        ("loss()", "", "loss", False, ()),
        ("head.cls_seg():input", "head", "cls_seg", True, ()),
        ("head.cls_seg():input[1]", "head", "cls_seg", True, (1,)),
        ("neck[*]", "neck", "forward", False, ("*",)),
        ("neck[-1]", "neck", "forward", False, (-1,)),
        ("bbox_head[1][*]", "bbox_head", "forward", False, (1, "*")),
        ("[logits]", "", "forward", False, ("logits",)),
        ("", "", "forward", False, ()),
        (":input", "", "forward", True, ()),
    ],
)
def test_grammar(text: str, path: str, method: str, is_input: bool, index: tuple):
    tap = Tap.parse(text)
    assert (tap.path, tap.method, tap.input, tap.index) == (path, method, is_input, index)
    assert str(tap) == (text or "(output)")


@pytest.mark.parametrize(
    "text",
    [
        "neck[",
        "neck[]",
        "neck[0",
        "neck:output",
        "neck()[0]x",
        "a b",
        "neck:input()",
        "neck():output",
        "neck()()",
        None,
        3,
    ],
)
def test_not_a_tap(text: object):
    with pytest.raises(WiringError, match="cannot read tap"):
        Tap.parse(text)


@pytest.mark.parametrize("method", ["__class__", "__init__", "__call__", "parameters", "train", "state_dict"])
def test_what_every_module_has_is_no_step_of_a_pass(method: str):
    with pytest.raises(
        WiringError,
        match=rf"tap 'neck.{method}\(\)': '{method}' is a method of every module, not a step of a model's pass",
    ):
        Tap.parse(f"neck.{method}()")
    assert Tap.parse("neck.forward():input").method == "forward"


def test_a_field_that_a_tensor_refuses_to_give():
    with pytest.raises(WiringError, match=r"tap '\[mH\]' of the model: no \[mH\] in a Tensor"):
        record(nn.Identity(), "[mH]", x=torch.ones(3))


# --- what a tap reads


def test_output_input_and_root():
    model = net()
    stem, norm_input, image, output = record(model, "backbone.stem", "backbone.norm:input", ":input", "")
    assert torch.equal(stem, model.backbone.stem(X))
    assert norm_input is stem
    assert image is X
    assert set(output) == {"classes", "boxes"}


def test_input_given_by_keyword():
    model = nn.Module()
    model.layer = nn.Linear(2, 2)
    model.forward = lambda x: model.layer(input=x)
    (value,) = record(model, "layer:input", x=torch.ones(1, 2))
    assert torch.equal(value, torch.ones(1, 2))


def test_indices():
    model = net().eval()
    with torch.no_grad():
        levels = model.features(X)
        classes, boxes = model.head(levels)
        outputs = record(model, "neck[*]", "neck[1]", "neck[-1]", "head[1][*]", "[classes][0]", "head[0][2]")
    for got, expected in zip(outputs[0], levels, strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(outputs[1], levels[1])
    assert torch.equal(outputs[2], levels[2])
    for got, expected in zip(outputs[3], boxes, strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(outputs[4], classes[0])
    assert torch.equal(outputs[5], classes[2])


def test_a_field_of_an_object():
    Output = namedtuple("Output", "logits hidden")

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Output:
            return Output(x + 1, x)

    (value,) = record(Model(), "[logits]")
    assert torch.equal(value, X + 1)


def test_module_list():
    model = net()
    first, last, every = record(model, "neck.levels[0]", "neck.levels[-1]", "neck.levels[*]")
    assert [tuple(x.shape[-2:]) for x in every] == [(8, 8), (4, 4), (2, 2)]
    assert first is every[0]
    assert last is every[2]


def test_a_module_that_runs_several_times_yields_a_list():
    shared, dotted, one = record(net(), "head.tower[1]", "head.tower.1", "head.tower[1][2]")
    assert [tuple(x.shape[-2:]) for x in shared] == [(8, 8), (4, 4), (2, 2)]
    assert all(a is b for a, b in zip(shared, dotted, strict=True))
    assert one is shared[2]


def test_a_call_of_self_forward_is_caught():
    # Module hooks do not fire on this one.
    model = net()
    fired = []
    model.head.register_forward_hook(lambda *_: fired.append(1))
    (classes,) = record(model, "head[0]")
    assert not fired
    assert [tuple(x.shape) for x in classes] == [(2, 2, 8, 8), (2, 2, 4, 4), (2, 2, 2, 2)]


def test_a_method():
    model = net()
    tap = Tap.parse("head.get_targets()[weights]")
    recorder = Recorder(model, [tap])
    with recorder.record(model) as recording:
        model.head.loss(model.features(X))
    assert torch.equal(recording[tap], torch.full((3,), 7.0))
    # The dry run of a host does not get there, which is fine for a method.
    recorder.rehearse(model, lambda: model(X))


@pytest.mark.parametrize("by_keyword", [False, True])
def test_what_a_method_is_given(by_keyword: bool):
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def classify(self, features: Tensor) -> Tensor:
            return self.layer(features)

        def forward(self, x: Tensor) -> Tensor:
            return self.classify(features=x * 2) if by_keyword else self.classify(x * 2)

    model = nn.ModuleDict({"head": Scores()})
    given, returned = (Tap.parse(f"head.classify(){side}") for side in (":input", ""))
    recorder = Recorder(model, [given, returned], "student")
    x = torch.ones(3, 4, requires_grad=True)
    recording = recorder.rehearse(model, lambda: model["head"](x))
    assert torch.equal(recording[given], x * 2)
    assert torch.equal(recording[returned], model["head"].layer(x * 2))
    # The gradient flows on through what was recorded.
    with recorder.record(model) as recording:
        model["head"](x)
    recording[given].sum().backward()
    assert torch.equal(x.grad, torch.full((3, 4), 2.0))
    assert "classify" not in vars(model["head"])
    # A prefix ends with the method's call.
    model["head"].layer.register_forward_hook(lambda *_: None)
    assert torch.equal(recorder.record_prefix(model, lambda: model["head"](x))[given], x * 2)
    with pytest.raises(WiringError, match="has no method 'clasify'; did you mean 'classify'"):
        Recorder(model, [Tap.parse("head.clasify():input")], "student")


class Sampler(nn.Module):
    """A method that takes its arguments by place or by name, and a default."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def sample(self, feat: Tensor, rois: Tensor, scale: float = 1.0) -> Tensor:
        return self.layer(feat) * rois.sum() * scale

    def forward(self, x: Tensor) -> Tensor:
        first = self.sample(x, rois=torch.tensor([1.0, 2.0]))
        return first + self.sample(rois=torch.tensor([5.0]), feat=x * 2, scale=3.0)


def test_all_arguments_by_name():
    model = nn.ModuleDict({"head": Sampler()})
    every, feats, rois = (Tap.parse(f"head.sample():inputs{index}") for index in ("", "[1][feat]", "[0][rois]"))
    recorder = Recorder(model, [every, feats, rois], "student")
    x = torch.ones(3, 4, requires_grad=True)
    recorder.rehearse(model, lambda: model["head"](x))
    with recorder.record(model) as recording:
        model["head"](x)
    by_place, by_name = recording[every]
    # Names are the method's own, whichever way it was called; a default that was not given is not there.
    assert list(by_place) == ["feat", "rois"] and set(by_name) == {"feat", "rois", "scale"}
    assert by_place["feat"] is x and by_name["scale"] == 3.0
    assert torch.equal(recording[rois], torch.tensor([1.0, 2.0])) and torch.equal(recording[feats], x * 2)
    recording[feats].sum().backward()
    assert torch.equal(x.grad, torch.full((3, 4), 2.0))
    assert "sample" not in vars(model["head"])


def test_arguments_that_are_overwritten_in_place_are_recorded_as_they_were():
    class Spoiler(Sampler):
        def sample(self, feat: Tensor, rois: Tensor) -> Tensor:
            return feat.mul_(0) + rois

        def forward(self, x: Tensor) -> Tensor:
            return self.sample(x + 1, rois=x)

    model = nn.ModuleDict({"head": Spoiler()})
    tap = Tap.parse("head.sample():inputs[feat]")
    recorder = Recorder(model, [tap])
    x = torch.ones(2)
    recorder.rehearse(model, lambda: model["head"](x))
    with recorder.record(model) as recording:
        model["head"](x)
    assert recording[tap].tolist() == [2, 2]


def test_an_argument_that_there_is_not():
    model = nn.ModuleDict({"head": Sampler()})
    tap = Tap.parse("head.sample():inputs[0][fetas]")
    with Recorder(model, [tap], "student").record(model) as recording:
        model["head"](torch.ones(1, 4))
    with pytest.raises(
        WiringError, match=r"tap 'head.sample\(\):inputs\[0\]\[fetas\]' of the student: no \[fetas\] in a dict"
    ):
        recording[tap]


@pytest.mark.parametrize(
    ("path", "text", "inside"),
    [
        ("head", "head", True),
        ("head", "head.boxes:input", True),
        ("head", "head.sample():inputs[feat]", True),
        ("head", "headless", False),
        ("head", "neck.head", False),
        ("head.boxes", "head", False),
    ],
)
def test_below(path: str, text: str, inside: bool):
    assert Tap.parse(text).below(path) is inside


def test_two_recordings_of_one_model_as_one():
    model = net().eval()
    first, second, unused = (Tap.parse(text) for text in ("backbone.stem", "head.tower[*]", "head.get_targets()"))
    with Recorder(model, [first], "teacher").record(model) as early:
        model.features(X)
    with Recorder(model, [second, unused], "teacher").record(model) as late:
        model(X * 2)
    both = early.joined(late)
    assert torch.equal(both[first], model.backbone.stem(X))  # the first pass's, though the second ran it again
    assert [x.shape for x in both.tensors(second)] == [x.shape for x in late.tensors(second)]
    assert all(a is b for a, b in zip(both.tensors(second), late.tensors(second), strict=True))
    assert [both.calls(tap) for tap in (first, second, unused)] == [1, 6, 0]
    with pytest.raises(WiringError, match=r"tap 'head.get_targets\(\)' of the teacher never fired"):
        both[unused]
    # Neither of the two was changed.
    assert early.calls(first) == 1
    with pytest.raises(KeyError):
        early[second]


def test_calls_are_counted():
    model = net()
    taps = [Tap.parse(text) for text in ("neck", "head.tower[*]", "head.get_targets()")]
    with Recorder(model, taps).record(model) as recording:
        model(X)
    assert [recording.calls(tap) for tap in taps] == [1, 6, 0]


def test_shared_module_under_two_paths():
    model = nn.Sequential(nn.Linear(2, 2))
    model.add_module("again", model[0])
    first, again = record(model, "0", "again", x=torch.ones(1, 2))
    # Both names mean the one module, which ran twice.
    assert len(first) == len(again) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert "forward" not in vars(model[0])


# --- errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("backbone.stam", "no module 'backbone.stam' (tap 'backbone.stam'); did you mean 'backbone.stem'"),
        ("stem", "did you mean 'backbone.stem'?"),
        ("head.tower", "is a list of modules; write 'head.tower[*]' or 'head.tower[0]'"),
        ("head.tower[2]", "'head.tower' has entries 0 to 1"),
        ("head.tower[first]", "'head.tower' has entries 0 to 1"),
        ("head.get_target()", "Head at 'head' of the student has no method 'get_target'; did you mean 'get_targets'?"),
        ("head.tower.get_targets()[*]", "Conv2d at 'head.tower.0' of the student has no method 'get_targets'"),
    ],
)
def test_a_path_that_does_not_exist(text: str, message: str):
    with pytest.raises(WiringError) as error:
        Recorder(net(), [Tap.parse(text)], "student")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("neck[3]", "tap 'neck[3]' of the student: no [3] in 3 entries"),
        ("[logits]", "no [logits] in a dict"),
        ("backbone.stem[shapes]", "no [shapes] in a Tensor"),
        ("backbone[*]", "[*] needs a list"),
        ("head[*][0]", "[*] can only come last"),
    ],
)
def test_an_index_that_does_not_exist(text: str, message: str):
    model, tap = net(), Tap.parse(text)
    with pytest.raises(WiringError) as error:
        Recorder(model, [tap], "student").rehearse(model, lambda: model(X))
    assert message in str(error.value)


def test_a_tap_that_never_fires():
    model, tap = net(), Tap.parse("head.boxes")
    recorder = Recorder(model, [tap], "teacher")
    with pytest.raises(
        WiringError, match=r"tap 'head\.boxes' of the teacher never fired: this step does not run head\.boxes"
    ):
        recorder.rehearse(model, lambda: model.features(X))


def test_tensors_only():
    model = net()
    taps = [Tap.parse(text) for text in ("", "head", "neck", "backbone.stem")]
    with Recorder(model, taps, "student").record(model) as recording:
        model(X)
    with pytest.raises(
        WiringError, match=r"yields a dict, not a tensor; pick a field like \(output\)\[name\] out of classes, boxes"
    ):
        recording.tensors(taps[0])
    with pytest.raises(WiringError, match=r"yields a list, not a tensor; pick an entry, as in 'head\[0\]'"):
        recording.tensors(taps[1])
    assert [len(recording.tensors(tap)) for tap in taps[2:]] == [3, 1]


# --- the model is left as it was found


def state_of(model: nn.Module) -> list:
    return [(name, type(module), dict(vars(module))) for name, module in model.named_modules()]


ALL = ("", "backbone.norm", "neck[*]", "head.tower[*]", "head[0]", "head.get_targets()")


def test_nothing_is_left_in_the_model():
    model = net()
    before = state_of(model)
    recorder = Recorder(model, [Tap.parse(tap) for tap in ALL])
    recorder.rehearse(model, lambda: model(X))
    with recorder.record(model):
        assert "forward" in vars(model.neck)
        model(X)
    recorder.record_prefix(model, lambda: model(X))
    after = state_of(model)
    assert [(name, kind, list(own)) for name, kind, own in before] == [
        (name, kind, list(own)) for name, kind, own in after
    ]
    assert not any({"forward", "get_targets"} & set(own) for _, _, own in after)


def test_nothing_is_left_after_an_exception():
    model = net()
    recorder = Recorder(model, [Tap.parse(tap) for tap in ALL])
    with pytest.raises(RuntimeError), recorder.record(model):
        model(torch.zeros(1, 5, 2, 2))
    with pytest.raises(KeyError), recorder.record(model):
        raise KeyError("host")
    with pytest.raises(RuntimeError):
        recorder.rehearse(model, lambda: model(torch.zeros(1, 5, 2, 2)))
    with pytest.raises(RuntimeError):
        recorder.record_prefix(model, lambda: model(torch.zeros(1, 5, 2, 2)))
    assert not any("forward" in own for _, _, own in state_of(model))


def test_a_forward_that_someone_else_put_there_stays():
    model = net()
    original = model.neck.forward
    calls = []

    def patched(x: Tensor) -> tuple[Tensor, ...]:
        calls.append(1)
        return original(x)

    model.neck.forward = patched
    (levels,) = record(model, "neck[*]")
    assert model.neck.forward is patched
    assert len(calls) == 1
    assert len(levels) == 3


def test_replaced_children_are_found_anew():
    model, tap = net(), Tap.parse("backbone.stem")
    recorder = Recorder(model, [tap])
    model.backbone.stem = nn.Conv2d(3, 4, 1)
    with recorder.record(model) as recording:
        model(X)
    assert torch.equal(recording[tap], model.backbone.stem(X))


def test_outputs_gradients_buffers_and_random_state_do_not_change():
    results = []
    for taps in ((), ALL):
        model = net()
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        recorder = Recorder(model, [Tap.parse(tap) for tap in taps])
        recorder._copied = {("backbone.norm", "forward")} if taps else set()
        with recorder.record(model):
            output = model(X)
        sum(x.square().mean() for x in output["classes"] + output["boxes"]).backward()
        results.append(
            [x.detach() for x in output["classes"]]
            + [p.grad for p in model.parameters()]
            + list(model.buffers())
            + [torch.rand(3), torch.tensor(random.random()), torch.tensor(np.random.rand())]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- outputs that a later module overwrites


def test_an_output_that_is_overwritten_in_place_is_recorded_as_it_was():
    model, tap = net().eval(), Tap.parse("backbone.norm")
    recorder = Recorder(model, [tap])
    expected = model.backbone.norm(model.backbone.stem(X))
    assert (expected < 0).any()
    assert torch.equal(recorder.rehearse(model, lambda: model(X))[tap], expected)
    with recorder.record(model) as recording:
        model(X)
    assert torch.equal(recording[tap], expected)
    # and a gradient gets through
    (slope,) = torch.autograd.grad(recording[tap].sum(), model.backbone.norm.bias)
    assert torch.equal(slope, torch.full((4,), 2.0 * 8 * 8))
    assert torch.equal(recorder.record_prefix(model, lambda: model(X))[tap], expected)


def test_an_input_that_is_overwritten_in_place_is_recorded_as_it_was():
    model, tap = net().eval(), Tap.parse("backbone.relu:input")
    recorder = Recorder(model, [tap])
    expected = model.backbone.norm(model.backbone.stem(X))
    recorder.rehearse(model, lambda: model(X))
    with recorder.record(model) as recording:
        model(X)
    assert torch.equal(recording[tap], expected)


def test_only_what_is_overwritten_is_copied():
    model, taps = net(), [Tap.parse("backbone.norm"), Tap.parse("backbone.stem")]
    recorder = Recorder(model, taps)
    recorder.rehearse(model, lambda: model(X))
    outputs = []
    model.backbone.stem.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with recorder.record(model) as recording:
        model(X)
    assert recording[taps[1]] is outputs[0]


@pytest.mark.parametrize("kind", ["list", "dict", "namedtuple"])
def test_overwritten_containers(kind: str):
    Pair = namedtuple("Pair", "a b")
    pack = {"list": lambda a, b: [a, b], "dict": lambda a, b: {"a": a, "b": b}, "namedtuple": Pair}[kind]

    class Maker(nn.Module):
        def forward(self, x: Tensor) -> object:
            return pack(x - 1, x + 1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maker = Maker()

        def forward(self, x: Tensor) -> Tensor:
            made = self.maker(x)
            first = made["a"] if kind == "dict" else made[0]
            return first.zero_()

    model, tap = Model(), Tap.parse("maker[0]" if kind == "list" else "maker[a]")
    recorder = Recorder(model, [tap])
    recorder.rehearse(model, lambda: model(X))
    with recorder.record(model) as recording:
        model(X)
    assert torch.equal(recording[tap], X - 1)


# --- recomputation


class Checkpointed(nn.Module):
    """Two blocks, recomputed in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(3, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Linear(4, 4))
        self.wrapper = Wrapper(self.block, reentrant)
        self.passes = 0
        self.block[0].register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.passes += 1

    def forward(self, x: Tensor) -> Tensor:
        return self.wrapper(self.stem(x))


class Wrapper(nn.Module):
    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = block, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


ROWS = torch.cos(torch.arange(15.0)).reshape(5, 3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_around_a_checkpoint_exactly_the_first_pass_is_recorded(reentrant: bool):
    model, taps = Checkpointed(reentrant), [Tap.parse("wrapper"), Tap.parse("stem")]
    with Recorder(model, taps).record(model) as recording:
        output = model(ROWS)
    (output.square().sum() + recording[taps[0]].sum()).backward()
    assert model.passes == 2
    assert [recording.calls(tap) for tap in taps] == [1, 1]
    assert recording[taps[0]] is output
    plain = Checkpointed(reentrant)
    hidden = plain.block(plain.stem(ROWS))
    (hidden.square().sum() + hidden.sum()).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("tapped", ["block.0", "block.1", "block.3", "block"])
def test_inside_a_checkpoint(tapped: str):
    model, tap = Checkpointed(False), Tap.parse(tapped)
    recorder = Recorder(model, [tap])
    with torch.no_grad():
        recorder.rehearse(model.eval(), lambda: model(ROWS))
    model.train()
    model.passes = 0
    with recorder.record(model) as recording:
        output = model(ROWS)
    value = recording[tap]
    (output.square().sum() + value.square().sum()).backward()
    assert model.passes == 2
    assert recording.calls(tap) == 1

    plain = Checkpointed(False)
    x, hidden = plain.stem(ROWS), []
    for layer in plain.block:
        x = layer(x)
        hidden.append(x.clone())
    seen = hidden[int(tapped[-1])] if tapped != "block" else x
    torch.testing.assert_close(value, seen)
    (x.square().sum() + seen.square().sum()).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("tapped", ["block.0", "block.3", "block", "block.3:input"])
def test_inside_a_reentrant_checkpoint_is_an_error(tapped: str):
    model = Checkpointed(True)
    recorder = Recorder(model, [Tap.parse(tapped)], "student")
    with (
        pytest.raises(WiringError, match=r"inside a reentrant checkpoint.*use_reentrant=False"),
        recorder.record(model),
    ):
        model(ROWS)
    assert not any("forward" in vars(module) for module in model.modules())


# --- leaving early


def test_a_prefix_stops_after_the_last_tap():
    model = net().eval()
    ran = []
    for name in ("neck", "head.tower.0", "head.classes"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    taps = [Tap.parse(text) for text in ("backbone.stem", "neck[*]", "neck[0]")]
    recorder = Recorder(model, taps)
    full = recorder.rehearse(model, lambda: model(X))
    assert ran == ["neck", "head.tower.0", "head.tower.0", "head.tower.0", *["head.classes"] * 3]
    ran.clear()
    prefix = recorder.record_prefix(model, lambda: model(X))
    # The neck's own hook does not run either: its forward is the last thing that does.
    assert not ran
    for tap in taps:
        for a, b in zip(full.tensors(tap), prefix.tensors(tap), strict=True):
            assert torch.equal(a, b)
    assert not any(tensor.requires_grad for tensor in prefix.tensors(taps[1]))


def test_a_prefix_waits_for_every_call_of_a_shared_module():
    model = net().eval()
    ran = []
    model.head.boxes.register_forward_hook(lambda *_: ran.append(1))
    tap = Tap.parse("head.tower[1]")
    recorder = Recorder(model, [tap])
    recorder.rehearse(model, lambda: model(X))
    ran.clear()
    assert len(recorder.record_prefix(model, lambda: model(X))[tap]) == 3
    assert not ran


def test_no_host_can_swallow_the_early_end():
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
            self.ran: list[str] = []

        def forward(self, x: Tensor) -> Tensor:
            try:
                x = self.first(x)
            except Exception:
                self.ran.append("handler")
            self.ran.append("second")
            return self.second(x)

    model = Careful()
    recorder = Recorder(model, [Tap.parse("first")])
    recorder.rehearse(model, lambda: model(torch.ones(1, 2)))
    model.ran.clear()
    recorder.record_prefix(model, lambda: model(torch.ones(1, 2)))
    assert not model.ran
