"""Who teaches a segmentor: several teachers, their mean, a peer that trains beside it."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.models.decode_heads.decode_head import BaseDecodeHead

from kdgraft import Term, WiringError
from kdgraft.cli import main
from kdgraft.losses import Ratio
from kdgraft.sources.teacher import read_checkpoint
from kdgraft_mm.checkpoints import SAFE_TYPES
from kdgraft_mm.state import KEY
from kdgraft_seg import TERMS
from support.mm import history, loadable, needs_resume, run, weights
from support.seg import CLASSES, batch, build, config, losses_of, save_teacher, segmentor
from support.tensors import assert_same

REVERSED = CLASSES[::-1]
STUDENT = segmentor(dropout=0.0, frozen_bn=True)


def entry(teachers: dict, *terms, student: dict = STUDENT) -> dict:
    model = copy.deepcopy(student)
    kind = model.pop("type")
    return dict(
        model,
        type="DistilledSegmentor",
        student=kind,
        teachers=copy.deepcopy(teachers),
        terms=copy.deepcopy(list(terms)),
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A teacher with the student's order of classes, and one of another width with the reverse."""
    folder = tmp_path_factory.mktemp("pair")
    return dict(
        a=save_teacher(folder / "a.pth", segmentor("PSPNet", width=8), 1),
        b=save_teacher(folder / "b.pth", segmentor("FCN", width=6), 2, REVERSED),
    )


@pytest.fixture(autouse=True)
def _lively(monkeypatch):
    """Freshly initialised classifiers say almost nothing; all models' scores are 40 times as large."""
    say = BaseDecodeHead.cls_seg
    monkeypatch.setattr(BaseDecodeHead, "cls_seg", lambda self, features: 40 * say(self, features))


def ratio(student, probability, valid) -> float:
    """The mean KL over pixels that count."""
    items = (probability * (probability.log() - student.log_softmax(1))).sum(1)
    return items[valid].mean().item()


def valid_on(samples, size) -> torch.Tensor:
    """Pixels of labels of 64×64 at the centres of a coarser grid."""
    step = 64 // size[0]
    labels = torch.stack([sample.gt_sem_seg.data[0] for sample in samples])
    return labels[:, step // 2 :: step, step // 2 :: step] != 255


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_an_ensemble_teaches_the_mean_of_every_pixel(pair, mean):
    both = dict(pair, teacher=dict(type="Ensemble", members=["a", "b"], mean=mean, weights=[3, 1]))
    single = dict(type="SoftTargets", source="b", name="single")
    model = build(entry(both, dict(type="SoftTargets"), single))
    model.start_distilling(CLASSES)
    inputs, samples = batch(ignored=0.3)
    found = losses_of(model, inputs, samples)
    with torch.no_grad():
        s = model(inputs, mode="tensor")
        a = model.distiller.sources["a"].model(inputs, mode="tensor")
        b = model.distiller.sources["b"].model(inputs, mode="tensor").flip(1)
    assert s.shape == a.shape == b.shape
    if mean == "arithmetic":
        target = 0.75 * a.softmax(1) + 0.25 * b.softmax(1)
    else:
        target = a.softmax(1) ** 0.75 * b.softmax(1) ** 0.25
        target = target / target.sum(1, keepdim=True)
    valid = valid_on(samples, s.shape[-2:])
    assert 0 < valid.sum() < valid.numel()
    expected = ratio(s, target, valid)
    assert found["distill.soft_targets.loss"].item() == pytest.approx(expected, rel=1e-4)
    assert found["distill.single.loss"].item() == pytest.approx(ratio(s, b.softmax(1), valid), rel=1e-4)
    assert expected != pytest.approx(ratio(s, a.softmax(1), valid), rel=1e-3)


def test_features_of_an_ensemble_are_a_mean_of_losses(pair):
    term = dict(type="FeatureImitation", tap="backbone[3]", name="mean")
    both = dict(pair, teacher=dict(type="Ensemble", members=["a", "b"], weights=[3, 1]))
    model = build(entry(both, term))
    alone = build(entry(pair, *(dict(term, name=f"mean_from_{name}", source=name) for name in "ab")))
    alone.load_state_dict(model.state_dict())
    alone.distiller.terms.load_state_dict(model.distiller.terms.state_dict())
    found, expected = (losses_of(one, *batch()) for one in (model, alone))
    for name, weight in (("a", 0.75), ("b", 0.25)):
        key = f"distill.mean_from_{name}.loss"
        torch.testing.assert_close(found[key], weight * expected[key])


def test_members_are_resized_alike(pair, tmp_path):
    other = segmentor("FCN", width=6)
    other["decode_head"]["align_corners"] = True
    both = dict(a=pair["a"], b=save_teacher(tmp_path / "c.pth", other))
    both["teacher"] = dict(type="Ensemble", members=["a", "b"])
    with pytest.raises(WiringError, match="members of the Ensemble 'teacher' are not of one kind"):
        build(entry(both, dict(type="SoftTargets")))


def test_specialists_are_refused_with_the_reason(pair):
    both = dict(pair, teacher=dict(type="Specialists", generalist="a", specialists=dict(b=[0])))
    with pytest.raises(
        WiringError, match="'teacher' is Specialists: they know classes of whole samples, and a segmentor scores pixels"
    ):
        build(entry(both, dict(type="SoftTargets")))


# --- a peer

PEER = segmentor("PSPNet", width=6, dropout=0.0, frozen_bn=True)
MUTUAL = (
    dict(type="SoftTargets", source="peer"),
    dict(type="FeatureImitation", tap="backbone[3]", source="peer", weight=0.5),
)


def with_peer(*terms, student: dict = STUDENT, peer: dict = PEER) -> dict:
    return entry(dict(peer=dict(type="Peer", config=peer)), *terms, student=student)


def peer_of(model):
    return model.distiller.peers["peer"]


def test_a_peers_losses_are_its_own_and_mutual_ones_are_by_hand():
    model = build(with_peer(*MUTUAL))
    student, peer = build(STUDENT), build(PEER, seed=5)
    student.load_state_dict(model.state_dict())
    peer_of(model).load_state_dict(peer.state_dict())
    inputs, samples = batch(ignored=0.3)
    found, host, own = (losses_of(one, inputs, samples) for one in (model, student, peer))
    assert {key for key in found if not key.startswith("distill.")} == {*host, *(f"peer.peer.{key}" for key in own)}
    for key, value in host.items():
        assert torch.equal(found[key], value), key
    for key, value in own.items():
        assert torch.equal(found[f"peer.peer.{key}"], value), key
    s, p = student(inputs, mode="tensor"), peer(inputs, mode="tensor")
    valid = valid_on(samples, s.shape[-2:])
    for name, ours, theirs in (("soft_targets", s, p), ("soft_targets_of_peer", p, s)):
        expected = ratio(ours, theirs.detach().softmax(1), valid)
        assert found[f"distill.{name}.loss"].item() == pytest.approx(expected, rel=1e-4), name
    for name, learns, rests in (
        ("soft_targets", model.decode_head, peer_of(model)),
        ("soft_targets_of_peer", peer_of(model).decode_head, model.decode_head),
        ("feature_imitation", model.backbone, peer_of(model)),
        ("feature_imitation_of_peer", peer_of(model).backbone, model.backbone),
    ):
        loss = found[f"distill.{name}.loss"]
        assert loss > 0
        model.zero_grad()
        loss.backward(retain_graph=True)
        assert any(q.grad is not None and q.grad.any() for q in learns.parameters()), name
        assert not any(q.grad is not None and q.grad.any() for q in rests.parameters()), name


@pytest.fixture(scope="module")
def peer_run(tmp_path_factory, scenes):
    """Both draw dropout, and have batch norms that move."""
    folder = tmp_path_factory.mktemp("peer")
    model = with_peer(*MUTUAL, student=segmentor(), peer=segmentor("PSPNet", width=6))
    return run(config(model, scenes, folder)), folder, model


def peers(runner) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in peer_of(runner.model).state_dict().items()}


def test_student_and_peer_train_beside_each_other(peer_run, plain_run):
    runner, folder, _ = peer_run
    early, late = (read_checkpoint(folder / f"iter_{i}.pth", safe_types=SAFE_TYPES) for i in (2, 4))
    for read in (
        lambda saved: saved["state_dict"],
        lambda saved: saved["message_hub"]["runtime_info"][KEY]["sources"]["peer"]["model"],
    ):
        before, after = read(early), read(late)
        moved = {key.split(".")[0] for key, value in after.items() if not torch.equal(value, before[key])}
        assert moved == {"backbone", "decode_head", "auxiliary_head"}
    assert list(late["state_dict"]) == list(plain_run.runner.model.state_dict())
    build(segmentor()).load_state_dict(late["state_dict"], strict=True)
    assert len(history(runner, "peer.peer.decode.loss_ce")) == 4


@needs_resume
def test_a_resumed_peer_goes_on_bit_by_bit(scenes, tmp_path):
    # Dropout draws from the global stream, which mmengine does not resume: nothing of this run draws.
    model = with_peer(*MUTUAL, student=segmentor(dropout=0.0), peer=segmentor("PSPNet", width=6, dropout=0.0))
    whole = run(config(model, scenes, tmp_path / "whole"))
    resumed = Runner.from_cfg(
        config(model, scenes, tmp_path / "resumed", resume=True, load_from=str(tmp_path / "whole" / "iter_2.pth"))
    )
    resumed.train()
    assert_same(weights(resumed), weights(whole))
    assert_same(peers(resumed), peers(whole))
    states = [runner.optim_wrapper.optimizer.state_dict()["state"] for runner in (resumed, whole)]
    assert states[0].keys() == states[1].keys() and len(states[0])
    for place, state in states[0].items():
        assert_same(state, states[1][place])


def test_a_peer_is_exported_as_a_plain_student(peer_run, tmp_path):
    runner, folder, _ = peer_run
    out = tmp_path / "peer.pth"
    assert main(["export", str(folder / "iter_4.pth"), str(out), "--peer", "peer"]) == 0
    assert_same(dict(torch.load(out, weights_only=True)["state_dict"]), peers(runner))
    plain = Config.fromfile(out.with_suffix(".py"))
    assert plain.model.decode_head.type == "PSPHead" and "Distilled" not in plain.pretty_text
    plain.merge_from_dict(dict(load_from=loadable(out), work_dir=str(tmp_path / "test"), experiment_name="seg_peer"))
    tester = Runner.from_cfg(plain)
    assert "mIoU" in tester.test()
    inputs, _ = batch()
    with torch.no_grad():
        found = [one.eval()(inputs, mode="tensor") for one in (tester.model, peer_of(runner.model))]
    assert torch.equal(*found)


def test_a_student_that_is_exported_leaves_its_teachers_behind(peer_run, tmp_path):
    out = tmp_path / "student.pth"
    assert main(["export", str(peer_run[1] / "iter_4.pth"), str(out)]) == 0
    plain = Config.fromfile(out.with_suffix(".py"))
    assert plain.model.type == "EncoderDecoder" and not {"teachers", "teacher", "terms"} & set(plain.model)
    build(plain.model.to_dict()).load_state_dict(torch.load(out, weights_only=True)["state_dict"])


# --- peers

OTHER = segmentor("FCN", width=5, dropout=0.0, frozen_bn=True)


def with_peers(*terms, student: dict = STUDENT, models=(PEER, OTHER), **settings) -> dict:
    told = dict(type="Peers", models=[dict(config=config) for config in models], **settings)
    return entry(dict(peers=told), *terms, student=student)


@pytest.mark.parametrize("average", [False, True])
def test_three_segmentors_teach_each_other_by_hand(average):
    model = build(with_peers(dict(type="SoftTargets", source="peers"), average=average))
    names = ("student", "peers_0", "peers_1")
    alone = {name: build(config_, seed=5) for name, config_ in zip(names, (STUDENT, PEER, OTHER), strict=True)}
    model.load_state_dict(alone["student"].state_dict())
    for name, peer in model.distiller.peers.items():
        peer.load_state_dict(alone[name].state_dict())
    inputs, samples = batch(ignored=0.3)
    found = losses_of(model, inputs, samples)
    for name, one in alone.items():
        for key, value in losses_of(one, inputs, samples).items():
            assert torch.equal(found[key if name == "student" else f"peer.{name}.{key}"], value), (name, key)
    scores = {name: one(inputs, mode="tensor").detach() for name, one in alone.items()}
    valid = valid_on(samples, scores["student"].shape[-2:])
    for name in names:
        others = [other for other in names if other != name]
        twin = "" if name == "student" else f"_of_{name}"
        if average:
            targets = {f"soft_targets{twin}": (sum(scores[other].softmax(1) for other in others) / 2, 1.0)}
        else:
            targets = {f"soft_targets{twin}_from_{other}": (scores[other].softmax(1), 0.5) for other in others}
        for key, (target, weight) in targets.items():
            expected = weight * ratio(scores[name], target, valid)
            assert found[f"distill.{key}.loss"].item() == pytest.approx(expected, rel=1e-4), key


@needs_resume
def test_peers_resume_bit_by_bit_and_each_is_exported(scenes, tmp_path):
    models = [segmentor("PSPNet", width=6, dropout=0.0), segmentor("FCN", width=5, dropout=0.0)]
    soft = dict(type="SoftTargets", source="peers")
    model = with_peers(soft, student=segmentor(dropout=0.0), models=models, average=True)
    whole = run(config(model, scenes, tmp_path / "whole"))
    told = dict(resume=True, load_from=str(tmp_path / "whole" / "iter_2.pth"))
    resumed = run(config(model, scenes, tmp_path / "resumed", **told))
    assert_same(weights(resumed), weights(whole))
    for name, head in (("peers_0", "PSPHead"), ("peers_1", "FCNHead")):
        states = [dict(one.model.distiller.peers[name].state_dict()) for one in (resumed, whole)]
        assert_same(*states)
        out = tmp_path / f"{name}.pth"
        assert main(["export", str(tmp_path / "whole" / "iter_4.pth"), str(out), "--peer", name]) == 0
        plain = Config.fromfile(out.with_suffix(".py"))
        assert plain.model.decode_head.type == head
        built = build(plain.model.to_dict())
        built.load_state_dict(torch.load(out, weights_only=True)["state_dict"], strict=True)
        assert_same(dict(built.state_dict()), states[1])


# --- plans


def test_a_plan_of_teacher_and_student(scenes, tmp_path, capsys):
    for name, width in (("large", 6), ("small", 4)):
        config(segmentor(width=width), scenes, tmp_path / "unused", 2).dump(tmp_path / f"{name}.py")
    out, path = tmp_path / "out", tmp_path / "plan.toml"
    path.write_text(
        f"""out = "{out}"
seeds = [3]
[runs.student]
config = "small.py"
teachers = {{ a = "teacher", peer = {{ type = "Peer", config = "{tmp_path}/small.py" }} }}
terms = [{{ type = "SoftTargets", source = "a" }}, {{ type = "DIST", source = "peer" }}]
[runs.teacher]
config = "large.py"
"""
    )
    assert main(["plan", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if " (seed 3, seg): " in line]
    assert [line.split(" ")[0] for line in said] == ["teacher", "teacher", "student", "student"]
    assert all("mIoU" in line for line in said[1::2])
    for name in ("teacher", "student"):
        folder = out / name / "seed3"
        plain = Config.fromfile(folder / "student.py")
        assert plain.model.type == "EncoderDecoder" and "teachers" not in plain.model
        saved = torch.load(folder / "student.pth", weights_only=True)["state_dict"]
        build(plain.model.to_dict()).load_state_dict(saved, strict=True)
    live = read_checkpoint(out / "student/seed3/iter_2.pth", safe_types=SAFE_TYPES)["message_hub"]["runtime_info"]
    assert set(live[KEY]["sources"]) == {"peer"} and len(live[KEY]["sources"]["peer"]["model"]) == len(saved)
    assert main(["plan", str(path)]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if " (seed 3, seg): " in line]
    assert len(said) == 2 and all("finished, in" in line for line in said)


# --- shares of the host's loss


def test_a_share_of_the_hosts_loss_is_left_to_it(pair):
    class Third(Term):
        host_share = 0.25

        def forward(self, student, teacher, batch):
            return Ratio(torch.ones(()), torch.ones(()))

    class Named(Third):
        host_losses = ("aux.loss_ce",)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TERMS, "_own", dict(TERMS._own))
        TERMS.register(Third)
        TERMS.register(Named)
        inputs, samples = batch()
        plain = build(STUDENT)
        host = losses_of(plain, inputs, samples)
        scaled = {key for key in host if "loss" in key}
        assert {"decode.loss_ce", "aux.loss_ce"} <= scaled
        for terms, share in ((["Third"], {}), (["Named"], {"aux.loss_ce"}), ([], None)):
            model = build(entry(dict(teacher=pair["a"]), *terms, "SoftTargets"))
            model.load_state_dict(plain.state_dict())
            found = losses_of(model, inputs, samples)
            for key in scaled:
                part = 1.0 if share is None or (share and key not in share) else 0.25
                assert found[key].item() == pytest.approx(part * host[key].item(), rel=1e-6), (terms, key)
