"""Students that teach themselves by exits (BYOT) and by branches (ONE)."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden import self_teaching as golden
from kdgraft import BYOT, ONE, Batch, Distiller, DistillError, Itself, Peer, SoftTargets, WiringError
from kdgraft.fit import fit
from kdgraft.losses import exit_imitation, gated_scores, native_ensemble

X = torch.sin(torch.arange(6 * 3 * 8 * 8.0)).reshape(6, 3, 8, 8)
Y = torch.tensor([0, 3, 1, 2, 4, 0])


class Net(nn.Module):
    """Stages that are pooled and flattened without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.layer2 = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU(inplace=True))
        self.layer3 = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Dropout(0.2))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


TERMS: dict[str, dict[str, Any]] = {
    "BYOT": dict(type="BYOT", tap=["layer1", "layer2", "layer3"], width=8, alpha=0.3, feature_weight=0.1),
    "ONE": dict(type="ONE", branch="layer3"),
}
every = pytest.mark.parametrize("kind", TERMS)


def distiller(kind: str, seed: int = 0, **settings: Any) -> Distiller:
    torch.manual_seed(seed)
    return Distiller(net(seed), Itself(), [TERMS[kind] | settings], example=X[:2])


def trained(kind: str, epochs: int, folder: Path | None = None, resume: bool = False) -> Distiller:
    model = distiller(kind)
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    fit(model, [(X, Y)] * 2, F.cross_entropy, epochs=epochs, optimizer=optimizer, folder=folder, resume=resume)
    return model


# --- in training


@every
def test_the_student_begins_as_without_it_and_is_saved_plain(kind: str):
    model, plain = distiller(kind), net()
    assert model.student.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(model.student.state_dict()[name], value)
    torch.manual_seed(7)
    out, after = model(X, targets=Y), torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(out.student, plain.train()(X))
    assert torch.equal(after, torch.rand(3))  # branches with dropout draw numbers of their own
    assert torch.equal(model.eval()(X).student, model.student.eval()(X))


@every
def test_resumed_training_is_the_uninterrupted_one(kind: str, tmp_path: Path):
    whole = trained(kind, 3)
    trained(kind, 1, tmp_path)
    resumed = trained(kind, 3, tmp_path, resume=True)
    for name, value in whole.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(resumed.state_dict()[name], value), name
    assert any(
        not torch.equal(p, q) for p, q in zip(whole.terms.parameters(), distiller(kind).terms.parameters(), strict=True)
    )


@every
def test_samples_without_a_label_count_in_nothing(kind: str):
    torch.manual_seed(0)
    model = distiller(kind)
    for part in model.modules():
        part.training = part.training and not isinstance(part, (nn.Dropout, nn.BatchNorm2d))
    some = Y.clone()
    some[4:] = -100
    loss = model(X, targets=some).loss
    # The normalisations of exits and gate see every sample; the loss and its mean those with a label.
    changed = some.clone()
    changed[4:] = 99
    assert torch.equal(loss, model(X, targets=changed).loss)
    none = model(X, targets=torch.full_like(Y, -100))
    none.loss.backward()
    assert none.loss == 0 and not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    with pytest.raises(DistillError, match=r"needs the class of each item, and the batch has none; pass targets="):
        model(X)


@every
def test_the_log_has_accuracies(kind: str):
    model = distiller(kind)
    expected = {
        "BYOT": ["accuracy_1", "accuracy_2"],
        "ONE": ["accuracy_1", "accuracy_2", "accuracy_3", "accuracy_ensemble"],
    }
    found = model(X, targets=Y)
    assert [name.split(".")[-1] for name in found.losses if "accuracy" in name] == expected[kind]
    if kind == "ONE":
        right = (found.student.argmax(1) == Y).float().mean()
        assert found.losses["distill.one.accuracy_1"] == right


# --- exits


def test_exits_by_hand():
    model = distiller("BYOT")
    plain = copy.deepcopy(model.student)
    torch.manual_seed(3)
    out = model(X, targets=Y)
    torch.manual_seed(3)
    maps, features = [plain.train().layer1(X)], []
    maps.append(plain.layer2(maps[0]))
    maps.append(plain.layer3(maps[1]))
    logits = plain.fc(F.relu(maps[2]).mean((2, 3)))
    expected = torch.zeros(())
    for exit_, own in zip(model.terms["byot"].exits, maps[:2], strict=True):
        scores, features = exit_(own)
        deepest = maps[2].mean((2, 3)).detach()
        expected = expected + exit_imitation(
            scores, logits.detach(), Y, features, deepest, alpha=0.3, feature_weight=0.1
        )
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    expected.backward()
    for ours, theirs in zip(model.student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    # The deepest layer teaches, and learns nothing from its pupils.
    assert model.student.layer3[0].weight.grad is None and model.student.fc.weight.grad is None
    assert [tuple(exit_.reduce.kernel_size) for exit_ in model.terms["byot"].exits] == [(4, 4), (2, 2)]


def test_the_wiring_of_exits():
    rows = distiller("BYOT").rows
    assert [(row.student_tap, row.adapter, row.teacher_tap) for row in rows[1:]] == [
        ("layer1", "Exit 4→8→5", "layer3"),
        ("layer2", "Exit 6→8→5", "layer3"),
    ]


def test_exits_of_vectors_and_of_an_average():
    torch.manual_seed(0)
    layers = OrderedDict(a=nn.Linear(3, 6), relu=nn.ReLU(), b=nn.Linear(6, 7), tanh=nn.Tanh(), head=nn.Linear(7, 4))
    x = torch.rand(5, 3)
    for source in (Itself(), Itself(momentum=0.9)):
        model = Distiller(nn.Sequential(layers), source, [BYOT(["relu", "tanh"], width=8)], example=x)
        out = model(x, targets=torch.tensor([0, 1, 2, 3, 0]))
        assert out.losses["distill.byot.loss"] > 0
        out.loss.backward()
        assert model.student.a.weight.grad.any() and model.student.b.weight.grad is None


def test_padded_images_leave_their_padding_out():
    model = distiller("BYOT", tap=["layer1", "layer2"])
    found = []
    for filling in (0.0, 5.0):
        images = X.clone()
        images[:, :, :, 4:] = filling
        student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1, stride=2))
        model = Distiller(Pooled(student), Itself(), [BYOT(["stages.0", "stages.1"], width=8)], example=X[:1])
        batch = Batch(padded_size=(8, 8), image_sizes=[(8, 4)] * 6)
        torch.manual_seed(5)
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -1, 1)
        out = model(images, targets=Y, batch=batch)
        found.append(out.loss)
    torch.testing.assert_close(*found)


class Pooled(nn.Module):
    """Stages, of which the left half is pooled."""

    def __init__(self, stages: nn.Sequential) -> None:
        super().__init__()
        self.stages, self.fc = stages, nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stages(x)[..., :2].mean((2, 3)))


# --- branches


def test_branches_have_weights_of_their_own_and_learn():
    model = distiller("ONE")
    first, second = model.terms["one"].copies
    own, names = [model.student.layer3[0], model.student.fc], ["parts.0.0.weight", "parts.1.weight"]
    for name, module in zip(names, own, strict=True):
        a, b = (dict(copy_.named_parameters())[name] for copy_ in (first, second))
        assert not torch.equal(a, b) and not torch.equal(a, module.weight)
    model(X, targets=Y).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert first.training and first.steps == ["relumean", ""]
    assert model.rows[-1].adapter == "2 × (layer3 → fc), Gate 6→3"


def test_branches_by_hand():
    model = distiller("ONE")
    term = model.terms["one"]
    for dropout in (part for part in model.modules() if isinstance(part, nn.Dropout)):
        dropout.p = 0.0
    plain = copy.deepcopy(model.student)
    out = model(X, targets=Y)
    trunk = plain.train().layer2(plain.layer1(X))
    pooled = lambda maps: F.relu(maps).mean((2, 3))  # noqa: E731
    scores = [plain.fc(pooled(plain.layer3(trunk)))]
    scores += [copy_.parts[1](pooled(copy_.parts[0](trunk))) for copy_ in term.copies]
    gate = term.gate(trunk.mean((2, 3)))
    both = torch.stack(scores)
    expected = native_ensemble(both, gated_scores(both, gate), Y)
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    expected.backward()
    for ours, theirs in zip(model.student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_branches_are_those_of_the_authors():
    x, labels = golden.trunk()
    parts = dict(
        trunk=nn.Identity(),
        layer3=nn.Conv2d(4, 6, 1, stride=2),
        pool=nn.AvgPool2d(8),
        flat=nn.Flatten(),
        fc=nn.Linear(6, 5),
    )
    model = Distiller(nn.Sequential(OrderedDict(parts)).double(), Itself(), [ONE("layer3")], example=x[:2]).double()
    term = model.terms["one"]
    own = [model.student.layer3, model.student.fc]
    pairs = [own, *([copy_.parts[0], copy_.parts[-1]] for copy_ in term.copies)]
    for k, (conv, classifier) in enumerate(pairs, 1):
        golden.fill(conv, 0.5 + 0.2 * k), golden.fill(classifier, 0.6 + 0.2 * k)
    golden.fill(term.gate.project, 1.1), golden.fill(term.gate.norm, 1.7)
    x.requires_grad_()
    out = model(x, targets=labels)
    own_loss = F.cross_entropy(out.student, labels)
    assert own_loss.item() == pytest.approx(golden.OWN_CROSS_ENTROPY)
    total = out.total(own_loss)
    (slope,) = torch.autograd.grad(total, x)
    assert (total.item(), slope[0, 0, 0, 0].item(), slope.square().sum().item()) == pytest.approx(golden.ONE, rel=2e-6)


@pytest.mark.parametrize(
    ("model", "branch", "steps"),
    [
        ("net", ["layer2", "layer3", "fc"], ["", "relumean", ""]),
        ("nested", "features.2", ["", "flatten", ""]),
        ("preactivation", "1", ["", "", "", ""]),
    ],
)
def test_the_last_part_of_a_model(model: str, branch: Any, steps: list[str]):
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Tanh())
            self.classifier = nn.Sequential(nn.Linear(32, 7), nn.Dropout(0.5, inplace=True), nn.Linear(7, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(torch.flatten(self.features(x), 1))

    torch.manual_seed(0)
    models = dict(
        net=Net,
        nested=Nested,
        preactivation=lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(32, 5)
        ),
    )
    found = Distiller(models[model](), Itself(), [ONE(branch, branches=2)], example=X[:2])
    assert found.terms["one"].copies[0].steps == steps
    loss = found(X, targets=Y).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in found.parameters())


class Scaled(nn.Module):
    """A layer that cannot draw its weights anew."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale[:, None, None]


def test_what_cannot_branch_is_refused():
    def build(branch: Any, model: nn.Module | None = None) -> None:
        Distiller(model or net(), Itself(), [ONE(branch)], example=X[:2])

    with pytest.raises(WiringError, match=r"one: the student has no module 'layr3'; did you mean 'layer3'"):
        build("layr3")
    with pytest.raises(
        WiringError, match=r"one: layer2 gives \(2, 6, 4, 4\), which is not what fc \(2, 8\) is made from; list"
    ):
        build(["layer2", "fc"])
    with pytest.raises(DistillError, match="ONE: branch is missing; name the module"):
        build(None)
    with pytest.raises(DistillError, match="branch must be the path of a module or a list of paths, got 3"):
        build(3)
    other = net()
    other.layer3.append(Scaled())
    with pytest.raises(WiringError, match=r"one: layer3.2 \(Scaled\) has weights and no reset_parameters\(\)"):
        build("layer3", other)
    with pytest.raises(DistillError, match="branches must be a whole number >= 2, got 1"):
        ONE("layer3", branches=1)


@every
def test_who_is_no_classifier_or_has_another_teacher_is_refused(kind: str):
    pixels = nn.Sequential(OrderedDict(layer1=nn.Conv2d(3, 4, 1), layer2=nn.ReLU(), layer3=nn.Conv2d(4, 5, 1)))
    with pytest.raises(
        WiringError, match=r"the class scores \(2, 5, 8, 8\) must be \(B, classes\), one class for each"
    ):
        Distiller(pixels, Itself(), [TERMS[kind]], example=X[:2])
    for other in (net(1), Peer(net(1))):
        with pytest.raises(WiringError, match=r"the student teaches itself here; give it the source Itself\(\)"):
            Distiller(net(), other, [TERMS[kind]], example=X[:2])
    both = dict(teacher=net(1), itself=Itself())
    found = Distiller(net(), teachers=both, terms=[SoftTargets(2), TERMS[kind] | {"source": "itself"}], example=X[:2])
    assert len([name for name in found(X, targets=Y).losses if name.endswith(".loss")]) == 2


def test_what_exits_refuse():
    for tap in (None, "layer1", ["layer1"]):
        with pytest.raises(DistillError, match="BYOT: tap two or more layers from shallow to deep"):
            Distiller(net(), Itself(), [BYOT(tap)], example=X[:2])
    with pytest.raises(DistillError, match=r"BYOT: alpha must be in \[0, 1\], got 2"):
        BYOT(["layer1", "layer3"], alpha=2)
    with pytest.raises(WiringError, match="no module 'layr1'"):
        Distiller(net(), Itself(), [BYOT(["layr1", "layer3"])], example=X[:2])
    with pytest.raises(WiringError, match=r"one: the student teaches itself"):
        Distiller(net(), Itself(momentum=0.9), [ONE("layer3")], example=X[:2])


def test_recipes(caplog: pytest.LogCaptureFixture):
    exits = Distiller(net(), Itself(), recipe=dict(type="byot", tap=["layer1", "layer3"]), example=X[:2])
    branches = Distiller(net(), Itself(), recipe=dict(type="one", branch="layer3"), example=X[:2])
    assert (exits.terms["byot"].alpha, exits.terms["byot"].temperature, exits.terms["byot"].weight) == (0.5, 3, 1)
    assert (branches.terms["one"].branches, branches.terms["one"].temperature) == (3, 3)
    with caplog.at_level(logging.INFO, "kdgraft"):
        fit(exits, [(X, Y)], F.cross_entropy, epochs=1)
    assert "distilling Itself into Net with byot" in caplog.text
