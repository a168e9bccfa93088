"""Who teaches a detector: several teachers, their mean, a peer that trains beside it, the detector itself."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.runner import Runner

from kdgraft import DistillError, Term, WiringError
from kdgraft.cli import main
from kdgraft.losses import Ratio
from kdgraft.sources.teacher import read_checkpoint
from kdgraft_det import TERMS
from kdgraft_mm.checkpoints import SAFE_TYPES
from kdgraft_mm.state import KEY
from support.commands import refused
from support.det import (
    BOXES,
    CLASSES,
    build,
    detector,
    distilled,
    losses,
    momentum,
    predictions,
    raw_batch,
    runner_config,
    save_teacher,
)
from support.det_stages import detr, staged
from support.det_zoo import zoo
from support.mm import history, loadable, needs_resume, run, weights
from support.tensors import assert_same, distillation

REVERSED = CLASSES[::-1]
SHUFFLED = tuple("3105948267")
STUDENT = detector(frozen_bn=True)


def taught(teachers: dict, *terms, student: dict = STUDENT, seed: int = 0):
    """A detector with several sources, ready to train on :data:`CLASSES`."""
    model = build(entry(teachers, *terms, student=student), seed)
    model.start_distilling(CLASSES)
    return model


def entry(teachers: dict, *terms, student: dict = STUDENT) -> dict:
    model = copy.deepcopy(student)
    kind = model.pop("type")
    return dict(
        model,
        type="DistilledDetector",
        student=kind,
        teachers=copy.deepcopy(teachers),
        terms=copy.deepcopy(list(terms)),
    )


def given(path: Path, model: dict, seed: int, classes=CLASSES) -> dict:
    return dict(config=model, checkpoint=save_teacher(path, model, seed, classes))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two teachers of other widths whose classes stand in two other orders."""
    folder = tmp_path_factory.mktemp("pair")
    return dict(
        a=given(folder / "a.pth", detector(width=6, channels=12), 7, REVERSED),
        b=given(folder / "b.pth", detector(width=8, channels=16), 8, SHUFFLED),
    )


@pytest.fixture(scope="module")
def rois(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rois")
    return dict(
        a=given(folder / "a.pth", staged("Faster R-CNN", width=6), 7, REVERSED),
        b=given(folder / "b.pth", staged("Faster R-CNN", width=8), 8, SHUFFLED),
    )


def inputs_of(model):
    return model.data_preprocessor(copy.deepcopy(raw_batch()), True)["inputs"]


def rows(levels) -> torch.Tensor:
    """Class outputs of all anchors of a batch, ``(N, 10)``."""
    return torch.cat([level.permute(0, 2, 3, 1).reshape(-1, 10) for level in levels])


def places(classes: tuple[str, ...]) -> list[int]:
    """Where each of the student's classes stands among a teacher's."""
    return [classes.index(name) for name in CLASSES]


def kl(student: torch.Tensor, probability: torch.Tensor) -> torch.Tensor:
    """Of independent classes, element by element."""
    ours = student.sigmoid()
    return probability * (probability / ours).log() + (1 - probability) * ((1 - probability) / (1 - ours)).log()


# --- several teachers


def test_each_teacher_teaches_what_it_would_alone(pair):
    terms = [
        dict(type="SoftTargets", source="a"),
        dict(type="SoftTargets", source="b", name="second"),
        dict(type="LocalizationDistillation", source="b"),
        dict(type="FeatureImitation", tap="neck[*]", source="a", region="foreground"),
        dict(type="FeatureImitation", tap="neck[*]", source="b", name="wider"),
    ]
    model = taught(pair, *terms)
    orders = {name: source.class_order.tolist() for name, source in model.distiller.sources.items()}
    assert orders == {"a": places(REVERSED), "b": places(SHUFFLED)}
    found = losses(model, raw_batch())
    for term, (name, wired) in zip(terms, model.distiller.terms.items(), strict=True):
        one = pair[term["source"]]
        settings = {key: value for key, value in term.items() if key != "source"}
        alone = build(distilled(STUDENT, one["config"], one["checkpoint"], terms=[settings]))
        alone.start_distilling(CLASSES)
        alone.distiller.terms[name].load_state_dict(wired.state_dict())
        expected = losses(alone, raw_batch())
        assert torch.equal(found[f"distill.{name}.loss"], expected[f"distill.{name}.loss"]), name
        assert found[f"distill.{name}.loss"] > 0
    assert found["distill.soft_targets.loss"] != found["distill.second.loss"]


@pytest.mark.parametrize(
    ("terms", "error", "message"),
    [
        ([dict(type="SoftTargets", source="c")], DistillError, "soft_targets: there is no source 'c'"),
        ([dict(type="SoftTargets")], DistillError, r"there is no source 'teacher'.*set source=…"),
        ([dict(type="SoftTargets", source="a")], DistillError, "no term uses 'b'; add source='b'"),
    ],
)
def test_terms_and_teachers_that_do_not_meet(pair, terms, error, message):
    with pytest.raises(error, match=message) as caught:
        build(entry(pair, *terms))
    assert "\n" not in str(caught.value)


def test_a_teacher_with_another_class_is_named(pair, tmp_path):
    other = given(tmp_path / "c.pth", detector(width=6, channels=12), 7, (*CLASSES[:9], "ten"))
    terms = [dict(type="SoftTargets", source=name, name=name) for name in ("a", "c")]
    model = build(entry(dict(a=pair["a"], c=other), *terms))
    with pytest.raises(DistillError, match="ten"):
        model.start_distilling(CLASSES)


# --- an ensemble


def both(pair: dict, **settings) -> dict:
    return dict(pair, teacher=dict(type="Ensemble", members=["a", "b"], **settings))


def averaged(a: torch.Tensor, b: torch.Tensor, mean: str, share: float = 0.5) -> torch.Tensor:
    """Probabilities of independent classes."""
    if mean == "arithmetic":
        return share * a.sigmoid() + (1 - share) * b.sigmoid()
    yes = a.sigmoid() ** share * b.sigmoid() ** (1 - share)
    no = (-a).sigmoid() ** share * (-b).sigmoid() ** (1 - share)
    return yes / (yes + no)


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_an_ensemble_of_dense_heads_teaches_the_mean(pair, mean):
    model = taught(both(pair, mean=mean, weights=[3, 1]), dict(type="SoftTargets"))
    found = losses(model, raw_batch())
    inputs, sources = inputs_of(model), model.distiller.sources
    with torch.no_grad():
        s = rows(model(inputs, mode="tensor")[0])
        a = rows(sources["a"].model(inputs, mode="tensor")[0])[:, places(REVERSED)]
        b = rows(sources["b"].model(inputs, mode="tensor")[0])[:, places(SHUFFLED)]
    target = averaged(a, b, mean, 0.75)
    expected = kl(s, target).sum() / target.amax(1).sum()
    assert found["distill.soft_targets.loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    # Neither member alone, nor classes in an order of their own.
    for wrong in (a.sigmoid(), b.sigmoid(), averaged(a.flip(1), b, mean, 0.75)):
        assert (kl(s, wrong).sum() / wrong.amax(1).sum()).item() != pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_an_ensemble_averages_the_distributions_of_edges(pair, mean):
    """A single teacher whose edges are the mean by hand teaches the same."""
    term = dict(type="LocalizationDistillation", temperature=2.0)
    model = taught(both(pair, mean=mean), term)
    found = losses(model, raw_batch())["distill.localization_distillation.loss"]
    inputs = inputs_of(model)
    with torch.no_grad():
        edges = [model.distiller.sources[name].model(inputs, mode="tensor")[1] for name in "ab"]
    means = []
    for a, b in zip(*edges, strict=True):
        a, b = (level.unflatten(1, (4, -1)) for level in (a, b))
        level = (a.softmax(2) / 2 + b.softmax(2) / 2).log() if mean == "arithmetic" else (a + b) / 2
        means.append(level.flatten(1, 2))
    alone = build(distilled(STUDENT, pair["a"]["config"], pair["a"]["checkpoint"], terms=[term]))
    alone.start_distilling(CLASSES)
    for scale, level in zip(alone.distiller.teacher.model.bbox_head.scales, means, strict=True):
        scale.register_forward_hook(lambda module, args, output, level=level: level)
    expected = losses(alone, raw_batch())["distill.localization_distillation.loss"]
    assert expected > 0
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_an_ensemble_of_roi_heads_teaches_the_mean_on_the_students_proposals(rois, mean):
    student = staged("Faster R-CNN", frozen_bn=True)
    model = taught(both(rois, mean=mean), dict(type="SoftTargets"), student=student)
    seen = []
    forward = model.roi_head._bbox_forward

    def watched(x, rois):
        found = forward(x, rois)
        seen.append((rois, found["cls_score"]))
        return found

    model.roi_head._bbox_forward = watched
    found = losses(model, raw_batch())["distill.soft_targets.loss"].item()
    ((regions, s),) = seen
    members = []
    for name, classes in (("a", REVERSED), ("b", SHUFFLED)):
        teacher = model.distiller.sources[name].model
        with torch.no_grad():
            scores = teacher.roi_head._bbox_forward(teacher.extract_feat(inputs_of(model)), regions)["cls_score"]
        members.append(scores[:, [*places(classes), 10]].softmax(1))
    target = sum(members) / 2 if mean == "arithmetic" else (members[0] * members[1]).sqrt()
    target = target / target.sum(1, keepdim=True)
    expected = F.kl_div(s.log_softmax(1), target, reduction="batchmean").item()
    assert found == pytest.approx(expected, rel=1e-4) and expected > 0


@pytest.mark.parametrize(
    "term",
    [
        dict(type="FeatureImitation", tap="neck[*]", region="foreground"),
        dict(type="FocalGlobal"),
        dict(type="CrossHead", weight=2.0),
    ],
    ids=lambda term: term["type"],
)
def test_features_of_an_ensemble_are_a_mean_of_losses(pair, term):
    model = taught(both(pair, weights=[3, 1]), dict(term, name="mean"))
    alone = taught(pair, *(dict(term, name=f"mean_from_{name}", source=name) for name in "ab"))
    alone.load_state_dict(model.state_dict())
    assert list(model.distiller.terms) == list(alone.distiller.terms) == ["mean_from_a", "mean_from_b"]
    alone.distiller.terms.load_state_dict(model.distiller.terms.state_dict())
    found, expected = (losses(one, raw_batch()) for one in (model, alone))
    for name, weight in (("a", 0.75), ("b", 0.25)):
        key = f"distill.mean_from_{name}.loss"
        torch.testing.assert_close(found[key], weight * expected[key])
        assert found[key] > 0


def test_queries_have_no_mean(tmp_path):
    model = detr("DeformableDETR")
    two = {name: given(tmp_path / f"{name}.pth", model, seed) for seed, name in enumerate("ab")}
    with pytest.raises(
        WiringError, match="soft_targets: the predictions that it compares have no mean over several models"
    ):
        build(entry(both(two), dict(type="SoftTargets"), student=model))


def test_heads_of_two_kinds_whose_classes_are_read_alike_have_a_mean(pair, tmp_path):
    other = given(tmp_path / "c.pth", detector("ATSS", width=6, channels=12), 9, REVERSED)
    model = taught(both(dict(a=other, b=pair["b"])), dict(type="SoftTargets"))
    found = losses(model, raw_batch())["distill.soft_targets.loss"].item()
    inputs, sources = inputs_of(model), model.distiller.sources
    with torch.no_grad():
        s = rows(model(inputs, mode="tensor")[0])
        a = rows(sources["a"].model(inputs, mode="tensor")[0])[:, places(REVERSED)]
        b = rows(sources["b"].model(inputs, mode="tensor")[0])[:, places(SHUFFLED)]
    target = averaged(a, b, "arithmetic")
    assert found == pytest.approx((kl(s, target).sum() / target.amax(1).sum()).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "term"),
    [
        ("TOOD", "SoftTargets"),  # gives probabilities, the others logits
        ("YOLOX", "SoftTargets"),  # a class counts together with the objectness
        ("RTMDet", "BoundedRegression"),  # distances, not distributions of them
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_members_have_to_be_read_alike(pair, tmp_path, kind, term, first):
    other = given(tmp_path / "c.pth", zoo(kind, width=6, channels=12), 7)
    members = dict(a=other, b=pair["b"]) if first else dict(a=pair["a"], b=other)
    with pytest.raises(WiringError, match="members of the Ensemble 'teacher' are not of one kind"):
        build(entry(both(members), dict(type=term)))


def test_members_whose_boxes_are_one_for_each_class_or_one_for_all(rois, tmp_path):
    agnostic = staged("Faster R-CNN", width=6)
    agnostic["roi_head"]["bbox_head"]["reg_class_agnostic"] = True
    other = given(tmp_path / "c.pth", agnostic, 7)
    student = staged("Faster R-CNN", frozen_bn=True)
    with pytest.raises(WiringError, match="members of the Ensemble 'teacher' are not of one kind"):
        build(entry(both(dict(a=rois["a"], b=other)), dict(type="BoundedRegression"), student=student))
    # Both outputs come from one module; the message names those that differ.
    with pytest.raises(WiringError, match=r"gives \(\d+, 4\) in 'b' and \(\d+, 40\) in 'a'; .* must predict alike"):
        build(entry(both(dict(a=rois["a"], b=other)), dict(type="SoftTargets"), student=student))


def test_specialists_are_refused_with_the_reason(pair):
    together = dict(pair, teacher=dict(type="Specialists", generalist="a", specialists=dict(b=[0])))
    with pytest.raises(
        WiringError,
        match="'teacher' is Specialists: they know classes of whole samples, and a detector scores places of an image",
    ):
        taught(together, dict(type="SoftTargets"))


def test_members_of_an_ensemble_each_see_their_own_view(rois, tmp_path):
    """One in a normalisation and a channel order of its own, one at twice the resolution; both with classes in another order."""
    own = staged("Faster R-CNN", width=6)
    own["data_preprocessor"].update(mean=[100.0, 110.0, 120.0], std=[50.0, 60.0, 70.0], bgr_to_rgb=False)
    members = dict(a=given(tmp_path / "a.pth", own, 7, REVERSED), b=dict(rois["b"], scale=2.0))
    model = taught(
        both(members, weights=[3, 1]), dict(type="SoftTargets"), student=staged("Faster R-CNN", frozen_bn=True)
    )
    seen = {}

    def watched(name, one):
        inner, first = one.roi_head._bbox_forward, one.backbone
        first.register_forward_pre_hook(lambda _, args: seen.update({f"{name} sees": args[0].detach().clone()}))

        def forward(x, rois):
            seen[name] = rois  # a teacher runs as far as its last tap, inside this call
            found = inner(x, rois)
            seen[f"{name} says"] = found["cls_score"].detach()
            return found

        one.roi_head._bbox_forward = forward

    watched("student", model)
    for name in "ab":
        watched(name, model.distiller.sources[name].model)
    batch = raw_batch(
        [[[2 * value for value in box] for box in image] for image in BOXES], sizes=[(192, 192)] * len(BOXES)
    )
    found = losses(model, batch)["distill.soft_targets.loss"]
    small = seen["student sees"]
    mean, std = (torch.tensor(model_) for model_ in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
    pixels = small * std.view(3, 1, 1) + mean.view(3, 1, 1)  # of the student, in RGB
    theirs = [torch.tensor(own["data_preprocessor"][key]).view(3, 1, 1) for key in ("mean", "std")]
    torch.testing.assert_close(seen["a sees"], (pixels.flip(1) - theirs[0]) / theirs[1], rtol=1e-4, atol=1e-4)
    assert seen["b sees"].shape[-2:] == (2 * small.shape[-2], 2 * small.shape[-1])
    assert torch.equal(seen["a"], seen["student"])
    torch.testing.assert_close(seen["b"][:, 1:], 2 * seen["student"][:, 1:])
    probabilities = []
    for name, classes in (("a", REVERSED), ("b", SHUFFLED)):
        teacher = model.distiller.sources[name].model
        with torch.no_grad():
            said = teacher.roi_head._bbox_forward(teacher.extract_feat(seen[f"{name} sees"]), seen[name])["cls_score"]
        probabilities.append(said[:, [*places(classes), 10]].softmax(1))
    target = 0.75 * probabilities[0] + 0.25 * probabilities[1]
    expected = F.kl_div(seen["student says"].log_softmax(1), target, reduction="batchmean")
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=0)


# --- a peer

PEER = detector(width=6, channels=12, frozen_bn=True)
MUTUAL = (
    dict(type="SoftTargets", source="peer"),
    dict(type="FeatureImitation", tap="neck[*]", source="peer", region="foreground", weight=0.5),
)


def with_peer(*terms, config=None, student: dict = STUDENT) -> dict:
    return entry(dict(peer=dict(type="Peer", config=PEER if config is None else config)), *terms, student=student)


def peer_of(model):
    return model.distiller.peers["peer"]


def test_a_peers_losses_are_its_own_and_mutual_ones_are_by_hand():
    model = build(with_peer(*MUTUAL))
    student, peer = build(STUDENT), build(PEER, seed=5)
    student.load_state_dict(model.state_dict())
    peer_of(model).load_state_dict(peer.state_dict())
    found = losses(model, raw_batch())
    host = losses(student, raw_batch())
    own = losses(peer, raw_batch())
    assert {key for key in found if not key.startswith("distill.")} == {*host, *(f"peer.peer.{key}" for key in own)}
    for key, value in host.items():
        assert torch.equal(found[key], value), key
    for key, value in own.items():
        assert torch.equal(found[f"peer.peer.{key}"], value), key
    inputs = inputs_of(student)
    s, p = (rows(one(inputs, mode="tensor")[0]) for one in (student, peer))
    for name, ours, theirs in (("soft_targets", s, p), ("soft_targets_of_peer", p, s)):
        target = theirs.detach().sigmoid()
        expected = kl(ours, target).sum() / target.amax(1).sum()
        assert found[f"distill.{name}.loss"].item() == pytest.approx(expected.item(), rel=1e-4), name
    # Either side is a constant for the other.
    for name, learns, rests in (
        ("soft_targets", model.bbox_head, peer_of(model)),
        ("soft_targets_of_peer", peer_of(model).bbox_head, model.bbox_head),
        ("feature_imitation", model.neck, peer_of(model)),
        ("feature_imitation_of_peer", peer_of(model).neck, model.neck),
    ):
        loss = found[f"distill.{name}.loss"]
        assert loss > 0
        model.zero_grad()
        loss.backward(retain_graph=True)
        assert any(p.grad is not None and p.grad.any() for p in learns.parameters()), name
        assert not any(p.grad is not None and p.grad.any() for p in rests.parameters()), name


@pytest.fixture(scope="module")
def peer_run(tmp_path_factory, scenes):
    folder = tmp_path_factory.mktemp("peer")
    model = with_peer(*MUTUAL, student=detector())
    runner = Runner.from_cfg(runner_config(model, scenes, folder))
    runner.model.init_weights()
    before = copy.deepcopy(runner.model.state_dict()), copy.deepcopy(peer_of(runner.model).state_dict())
    runner = run(runner_config(model, scenes, folder))
    return runner, folder, model, before


def peers(runner) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in peer_of(runner.model).state_dict().items()}


def test_student_and_peer_train_beside_each_other(peer_run, plain_run):
    runner, folder, _, (student, peer) = peer_run
    for now, then in ((weights(runner), student), (peers(runner), peer)):
        moved = [key for key, value in now.items() if not torch.equal(value, then[key])]
        assert {key.split(".")[0] for key in moved} == {"backbone", "neck", "bbox_head"}
    assert len(history(runner, "peer.peer.loss_cls")) == 4
    parameters = [name for name, _ in peer_of(runner.model).named_parameters()]
    assert {f"distiller.peers.peer.{name}" for name in parameters} <= set(momentum(runner))
    saved = read_checkpoint(folder / "iter_4.pth", safe_types=SAFE_TYPES)
    assert list(saved["state_dict"]) == list(plain_run.runner.model.state_dict())
    build(detector()).load_state_dict(saved["state_dict"], strict=True)
    live = saved["message_hub"]["runtime_info"][KEY]["sources"]["peer"]["model"]
    assert_same(dict(live), peers(runner))


@needs_resume
def test_a_resumed_peer_goes_on_bit_by_bit(peer_run, scenes, tmp_path):
    whole, folder, model, _ = peer_run
    config = runner_config(model, scenes, tmp_path, resume=True, load_from=str(folder / "iter_2.pth"))
    resumed = run(config)
    assert_same(weights(resumed), weights(whole))
    assert_same(peers(resumed), peers(whole))
    assert_same(momentum(resumed), momentum(whole))
    assert history(resumed, "loss") == history(whole, "loss")


def test_a_peer_is_exported_as_a_plain_student(peer_run, scenes, tmp_path, capsys):
    runner, folder, _, _ = peer_run
    out = tmp_path / "peer.pth"
    assert main(["export", str(folder / "iter_4.pth"), str(out), "--peer", "peer"]) == 0
    assert "peer.py" in capsys.readouterr().out
    saved = torch.load(out, weights_only=True)
    assert_same(dict(saved["state_dict"]), peers(runner))
    config = Config.fromfile(out.with_suffix(".py"))
    assert config.model.type == "GFL" and config.model.backbone.base_channels == 6
    assert "kdgraft" not in config.pretty_text and "Distilled" not in config.pretty_text
    config.load_from = loadable(out)
    config.work_dir = str(tmp_path / "test")
    config.experiment_name = "exported_peer"
    tester = Runner.from_cfg(config)
    assert "coco/bbox_mAP" in tester.test()
    found = predictions(tester.model, raw_batch()), predictions(peer_of(runner.model), raw_batch())
    assert all(torch.equal(a, b) and len(a) for a, b in zip(*found, strict=True))
    # A student that it teaches hears it like any other teacher.
    build(distilled(STUDENT, str(out.with_suffix(".py")), str(out), terms=["SoftTargets"])).start_distilling(CLASSES)


@pytest.mark.parametrize(
    ("name", "message"), [("per", "has no peer 'per'; did you mean 'peer'"), ("x", "has no peer 'x'")]
)
def test_a_peer_that_is_not_there_is_one_line(peer_run, tmp_path, capsys, name, message):
    out = tmp_path / "peer.pth"
    line = refused(capsys, ["export", str(peer_run[1] / "iter_4.pth"), str(out), "--peer", name])
    assert message in line and not out.exists()


def test_a_peers_config_that_is_a_file_is_read_from_trusted_checkpoints_alone(peer_run, tmp_path, capsys):
    saved = torch.load(peer_run[1] / "iter_4.pth", weights_only=False)
    told, traces = tmp_path / "peer_config.py", tmp_path / "executed"
    told.write_text(f"open({str(traces)!r}, 'w').close()\n" + Config(dict(model=PEER)).pretty_text)
    config = Config.fromstring(saved["meta"]["cfg"], ".py")
    config.model.teachers.peer.config = str(told)
    saved["meta"]["cfg"] = config.pretty_text
    checkpoint, out = tmp_path / "checkpoint.pth", tmp_path / "peer.pth"
    torch.save(saved, checkpoint)
    line = refused(capsys, ["export", str(checkpoint), str(out), "--peer", "peer"])
    assert str(told) in line and "--trusted" in line and not out.exists() and not traces.exists()
    assert main(["export", str(checkpoint), str(out), "--peer", "peer", "--trusted"]) == 0
    model = build(Config.fromfile(out.with_suffix(".py")).model.to_dict())
    model.load_state_dict(torch.load(out, weights_only=True)["state_dict"], strict=True)
    assert_same(dict(model.state_dict()), peers(peer_run[0]))


def test_the_one_source_may_be_a_peer(scenes, tmp_path):
    model = entry({}, dict(type="SoftTargets"), student=detector())
    del model["teachers"]
    model["teacher"] = dict(type="Peer", config=PEER)
    settings = dict(custom_hooks=[dict(type="EMAHook", momentum=0.5)])
    runner = run(runner_config(model, scenes, tmp_path, iters=2, **settings))
    saved = read_checkpoint(tmp_path / "iter_2.pth", safe_types=SAFE_TYPES)
    plain = build(detector()).state_dict()
    assert list(saved["state_dict"]) == list(plain)
    assert {key.removeprefix("module.") for key in saved["ema_state_dict"]} == {*plain, "steps"}
    out = tmp_path / "peer.pth"
    assert main(["export", str(tmp_path / "iter_2.pth"), str(out), "--peer", "teacher"]) == 0
    own = runner.model.distiller.peers["teacher"].state_dict()
    assert_same(dict(torch.load(out, weights_only=True)["state_dict"]), dict(own))
    assert len(history(runner, "peer.teacher.loss_bbox")) == 2


def test_check_shows_both_directions_of_a_peer(scenes, tmp_path, capsys):
    config = tmp_path / "peer.py"
    runner_config(with_peer(*MUTUAL, student=detector()), scenes, tmp_path / "work").dump(config)
    assert main(["check", str(config)]) == 0
    said = capsys.readouterr().out
    assert all(f"{name}{twin}" in said for name in ("soft_targets", "feature_imitation") for twin in ("", "_of_peer"))
    assert not (tmp_path / "work").exists()


def test_a_run_without_peers_has_none_to_export(plain_run, tmp_path, capsys):
    out = tmp_path / "peer.pth"
    line = refused(capsys, ["export", str(plain_run.checkpoint(4)), str(out), "--peer", "peer"])
    assert "has no peer 'peer'" in line and not out.exists()


def test_a_peer_trains_on_proposals_of_its_own():
    student = staged("Faster R-CNN", frozen_bn=True)
    with pytest.raises(
        WiringError, match=r"'peer' trains on its own proposals.*tap a module before 'roi_head'"
    ) as caught:
        build(with_peer(dict(type="SoftTargets", source="peer"), config=student, student=student))
    assert "\n" not in str(caught.value)
    # What comes before its RoI head is compared.
    terms = [
        dict(type="FeatureImitation", tap="neck[*]", source="peer"),
        dict(type="SoftTargets", head="rpn_head", source="peer"),
    ]
    model = build(with_peer(*terms, config=student, student=student))
    found = losses(model, raw_batch())
    assert {"peer.peer.loss_rpn_cls", "peer.peer.loss_bbox", "distill.soft_targets_of_peer.loss"} <= set(found)
    assert distillation(found) > 0


# --- peers

OTHER = detector(width=5, channels=8, frozen_bn=True)


def with_peers(*terms, models=(PEER, OTHER), student: dict = STUDENT, **settings) -> dict:
    told = dict(type="Peers", models=[dict(config=config) for config in models], **settings)
    return entry(dict(peers=told), *terms, student=student)


@pytest.mark.parametrize("average", [False, True])
def test_three_detectors_teach_each_other_by_hand(average):
    model = build(with_peers(dict(type="SoftTargets", source="peers", weight=2.0), average=average))
    names = ("student", "peers_0", "peers_1")
    alone = {name: build(config, seed=5) for name, config in zip(names, (STUDENT, PEER, OTHER), strict=True)}
    model.load_state_dict(alone["student"].state_dict())
    for name, peer in model.distiller.peers.items():
        peer.load_state_dict(alone[name].state_dict())
    found = losses(model, raw_batch())
    own = {name: losses(one, raw_batch()) for name, one in alone.items()}
    for name, host in own.items():
        for key, value in host.items():
            assert torch.equal(found[key if name == "student" else f"peer.{name}.{key}"], value), (name, key)
    inputs = inputs_of(alone["student"])
    scores = {name: rows(one(inputs, mode="tensor")[0]).detach() for name, one in alone.items()}
    for name in names:
        others = [other for other in names if other != name]
        twin = "" if name == "student" else f"_of_{name}"
        if average:
            targets = {f"soft_targets{twin}": (sum(scores[other].sigmoid() for other in others) / 2, 2.0)}
        else:
            targets = {f"soft_targets{twin}_from_{other}": (scores[other].sigmoid(), 1.0) for other in others}
        for key, (target, weight) in targets.items():
            expected = weight * kl(scores[name], target).sum() / target.amax(1).sum()
            assert found[f"distill.{key}.loss"].item() == pytest.approx(expected.item(), rel=1e-4), key
    assert len([key for key in found if key.startswith("distill.")]) == (3 if average else 6)


@needs_resume
def test_peers_resume_bit_by_bit_and_each_is_exported(scenes, tmp_path, capsys):
    terms = [dict(type="FeatureImitation", tap="neck[*]", source="peers")]
    models = [detector(width=6, channels=12), detector(width=5, channels=8)]
    model = with_peers(*terms, models=models, student=detector()) | dict(recipe=dict(type="dml", source="peers"))
    whole = run(runner_config(model, scenes, tmp_path / "whole"))
    told = dict(resume=True, load_from=str(tmp_path / "whole" / "iter_2.pth"))
    resumed = run(runner_config(model, scenes, tmp_path / "resumed", **told))
    assert_same(weights(resumed), weights(whole))
    assert history(resumed, "loss") == history(whole, "loss") and len(history(whole, "peer.peers_1.loss_cls")) == 4
    assert list(torch.load(tmp_path / "whole/iter_4.pth", weights_only=False)["state_dict"]) == list(
        build(detector()).state_dict()
    )
    for name, plain in zip(("peers_0", "peers_1"), models, strict=True):
        states = [dict(one.model.distiller.peers[name].state_dict()) for one in (resumed, whole)]
        assert_same(*states)
        out = tmp_path / f"{name}.pth"
        assert main(["export", str(tmp_path / "whole" / "iter_4.pth"), str(out), "--peer", name]) == 0
        built = build(Config.fromfile(out.with_suffix(".py")).model.to_dict())
        built.load_state_dict(torch.load(out, weights_only=True)["state_dict"], strict=True)
        assert_same(dict(built.state_dict()), states[1])
        assert built.backbone.base_channels == plain["backbone"]["base_channels"]
    line = refused(capsys, ["export", str(tmp_path / "whole/iter_4.pth"), str(tmp_path / "x.pth"), "--peer", "peers"])
    assert "has no peer 'peers'; did you mean" in line and "'peers_0'" in line


@pytest.mark.parametrize(
    ("models", "settings", "message"),
    [
        ([], {}, "a single student has no peers"),
        ([dict(config=PEER)], dict(average=True), "leave average out"),
        ([dict(config=PEER, checkpoint="a.pth")], {}, r"peer 0 of 1, takes no argument 'checkpoint'"),
        ([dict(confi=PEER)], {}, r"takes no argument 'confi'; did you mean 'config'"),
        ([{}], {}, r"teachers\['peers'\], peer 0 of 1, needs config=…; write dict\(config='…'\)"),
        ([3], {}, r"peer 0 of 1, must be dict\(config='…'\), got 3"),
        ([dict(config=PEER)], dict(avrage=True), "source Peers takes no argument 'avrage'; did you mean 'average'"),
    ],
)
def test_what_peers_of_a_detector_refuse(models, settings, message):
    told = dict(type="Peers", models=models, **settings)
    with pytest.raises(DistillError, match=message) as caught:
        build(entry(dict(peers=told), dict(type="SoftTargets", source="peers")))
    assert "\n" not in str(caught.value)


# --- itself


def followed(average: dict, student: dict, share: float) -> dict:
    """The next moving average; buffers are copied."""
    return {
        key: average[key] * share + value * (1 - share) if key in average and value.is_floating_point() else value
        for key, value in student.items()
    }


MEAN_TEACHER = dict(teacher=dict(type="Itself", momentum=0.9))


def test_a_moving_average_of_the_student_by_hand():
    model = taught(MEAN_TEACHER, dict(type="SoftTargets"), student=STUDENT)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    names = {name for name, _ in model.named_parameters()}
    average = None
    for step in range(3):
        ours = {key: value.detach().clone() for key, value in model.named_parameters()}
        average = ours if average is None else {key: 0.9 * average[key] + 0.1 * value for key, value in ours.items()}
        plain = build(STUDENT)
        plain.load_state_dict({**model.state_dict(), **average})
        inputs = inputs_of(plain)
        with torch.no_grad():
            target = rows(plain.eval()(inputs, mode="tensor")[0]).sigmoid()
            s = rows(model.train()(inputs, mode="tensor")[0])
        found = losses(model, raw_batch())
        expected = (kl(s, target).sum() / target.amax(1).sum()).item()
        # The average starts as the student does, and stays behind it.
        assert found["distill.soft_targets.loss"].item() == pytest.approx(expected, rel=5e-3, abs=1e-6)
        assert (expected > 1e-6) == (step > 0)
        kept = dict(model.distiller.teacher.model.named_parameters())
        assert kept.keys() == names
        for key, value in average.items():
            torch.testing.assert_close(kept[key], value)
        optimizer.zero_grad()
        sum(value for key, value in found.items() if "loss" in key).backward()
        optimizer.step()


@needs_resume
def test_a_moving_average_resumes_bit_by_bit(scenes, tmp_path):
    model = entry(MEAN_TEACHER, dict(type="SoftTargets"), student=detector())
    whole = run(runner_config(model, scenes, tmp_path / "whole"))
    resumed = run(
        runner_config(
            model, scenes, tmp_path / "resumed", resume=True, load_from=str(tmp_path / "whole" / "iter_2.pth")
        )
    )
    assert_same(weights(resumed), weights(whole))
    states = [dict(one.model.distiller.teacher.model.state_dict()) for one in (resumed, whole)]
    assert_same(*states)
    assert any(not torch.equal(value, weights(whole)[key]) for key, value in states[1].items())
    assert history(resumed, "distill.soft_targets.loss") == history(whole, "distill.soft_targets.loss")
    saved = read_checkpoint(tmp_path / "whole" / "iter_4.pth", safe_types=SAFE_TYPES)
    build(detector()).load_state_dict(saved["state_dict"], strict=True)


def test_deeper_layers_teach_earlier_ones():
    term = dict(type="FeatureImitation", student_tap="neck[0]", teacher_tap="neck[1]", adapter="none")
    strides = dict(student=detector(frozen_bn=True, channels=8))
    model = build(entry(dict(teacher=dict(type="Itself")), term, **strides))
    plain = build(STUDENT)
    plain.load_state_dict(model.state_dict())
    found, host = losses(model, raw_batch()), losses(plain, raw_batch())
    assert {key for key in found if not key.startswith("distill.")} == set(host)
    assert all(torch.equal(found[key], value) for key, value in host.items())
    early, late, _ = plain.extract_feat(inputs_of(plain))
    early = F.interpolate(early, late.shape[-2:], mode="bilinear", antialias=False)
    loss = found["distill.feature_imitation.loss"]
    assert loss.item() == pytest.approx((early - late.detach()).square().mean().item(), rel=1e-4)
    assert model.distiller.live_state()["sources"] == {}


# --- shares of the host's loss


def test_a_third_partys_share_scales_all_of_the_hosts_losses(teacher_model, teacher_checkpoint, monkeypatch):
    class Third(Term):
        host_share = 0.5

        def forward(self, student, teacher, batch):
            return Ratio(torch.ones(()), torch.ones(()))

    monkeypatch.setattr(TERMS, "_own", dict(TERMS._own))
    TERMS.register(Third)
    model = build(distilled(STUDENT, teacher_model, teacher_checkpoint, terms=["Third", "SoftTargets"]))
    plain = build(STUDENT)
    plain.load_state_dict(model.state_dict())
    found, host = losses(model, raw_batch()), losses(plain, raw_batch())
    assert len(host) == 3
    for key, value in host.items():
        assert found[key].item() == pytest.approx(0.5 * value.item(), rel=1e-6), key
    assert found["distill.third.loss"] == 1


def test_a_peer_shares_its_own_loss_with_the_twin():
    model = build(with_peer(dict(type="SoftTargets", source="peer", hard_weight=0.25)))
    student, peer = build(STUDENT), build(PEER)
    student.load_state_dict(model.state_dict())
    peer.load_state_dict(peer_of(model).state_dict())
    found = losses(model, raw_batch())
    for prefix, plain in (("", student), ("peer.peer.", peer)):
        for key, value in losses(plain, raw_batch()).items():
            share = 0.25 if key == "loss_cls" else 1.0
            assert found[prefix + key].item() == pytest.approx(share * value.item(), rel=1e-6), key


def test_a_share_of_the_losses_that_are_named(teacher_model, teacher_checkpoint):
    def build_with(*names):
        share = dict(type="TaskShare", share=0.5, losses=list(names))
        return build(distilled(STUDENT, teacher_model, teacher_checkpoint, terms=[share, "SoftTargets"]))

    model, plain = build_with("loss_bbox"), build(STUDENT)
    plain.load_state_dict(model.state_dict())
    found, host = losses(model, raw_batch()), losses(plain, raw_batch())
    for key, value in host.items():
        assert found[key].item() == pytest.approx((0.5 if key == "loss_bbox" else 1) * value.item(), rel=1e-6), key
    with pytest.raises(DistillError, match=r"^task_share: the host has no loss 'loss_box'; did you mean 'loss_bbox'"):
        losses(build_with("loss_box"), raw_batch())
