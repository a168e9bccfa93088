"""Who teaches a model of Hugging Face: several teachers, their mean, a peer that trains too, the student itself."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, Trainer

from kdgraft import Distiller, DistillError, Ensemble, Itself, Peer, Peers, Specialists, WiringError
from kdgraft.specialists import combine_specialists, specialist_of
from kdgraft_nlp import (
    AttentionMaps,
    DistillCollator,
    DistillTrainer,
    ForwardKL,
    HiddenStates,
    SoftTargets,
    TeacherCache,
    UniversalLogits,
    distill,
)
from kdgraft_nlp.run import build, check
from support import nlp as support
from support.tensors import gradients

NAMES = ["cat", "dog", "owl"]


def model(family="bert", seed=1, **settings):
    return support.quiet(support.model(family, seed=seed, **settings))


def big(family="bert", seed=2, **settings):
    return model(family, seed, width=32, layers=4, **settings)


def named(built, *names):
    """The model with class names in its config."""
    built.config.id2label = dict(enumerate(names))
    built.config.label2id = {name: i for i, name in enumerate(names)}
    return built


def batch_of(family="bert", count=4, task=""):
    return support.collate(support.samples(count, task or support.TASKS[family][1]))


def trainer_of(folder, student, terms, kind=DistillTrainer, count=8, data=None, model_init=None, **settings):
    names = ("teacher", "teachers", "chunked", "host_weight", "compute_loss_func", "recipe")
    more = {name: settings.pop(name) for name in names if name in settings}
    more |= {"model_init": model_init} if model_init else {"model": student}
    family = (model_init() if model_init else student).config.model_type
    task = "causal" if family == "llama" else "sequence"
    return kind(
        args=support.arguments(folder, **{"optim": "sgd", "learning_rate": 0.1, **settings}),
        train_dataset=data if data is not None else support.samples(count, task),
        data_collator=support.collate,
        **({"terms": terms} if kind is DistillTrainer else {}),
        **more,
    )


def losses(trainer, batch):
    """The loss of one step and the terms' own."""
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    found = trainer.model.distill_link.last.losses
    return loss, {name: value for name, value in found.items() if name.endswith(".loss")}


def same_gradients(one, expected, **near):
    found = gradients(one)
    assert expected and expected.keys() <= found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **{"rtol": 1e-4, "atol": 1e-6, **near})


def same(one, other):
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def kl(student, target, temperature=1.0):
    """T²·KL(target ‖ student), mean over samples; ``target`` are probabilities."""
    return temperature**2 * F.kl_div((student / temperature).log_softmax(-1), target, reduction="batchmean")


def counted(built, batch):
    """The logits of a causal model that predict a labelled token."""
    return built(**batch).logits[:, :-1][batch["labels"][:, 1:] != -100]


# --- several teachers


def test_each_of_two_teachers_with_classes_in_other_orders_teaches_what_it_would_alone(tmp_path):
    orders = {"a": ["owl", "cat", "dog"], "b": ["dog", "owl", "cat"]}
    teachers = {
        name: named(model(seed=2 + i, width=32, layers=2 + 2 * i), *order)
        for i, (name, order) in enumerate(orders.items())
    }
    batch = batch_of()
    terms = [
        SoftTargets(2, source="a", name="first"),
        SoftTargets(1, source="b", name="second"),
        HiddenStates(source="b", name="states"),
    ]
    trainer = trainer_of(tmp_path, named(model(), *NAMES), terms, teachers=teachers)
    loss, found = losses(trainer, batch)
    # By hand, by the names of the classes.
    student, total = model(), None
    output = student(**batch)
    total = output.loss
    for name, term, temperature in (("a", "first", 2.0), ("b", "second", 1.0)):
        places = [orders[name].index(one) for one in NAMES]
        with torch.no_grad():
            target = (teachers[name](**batch).logits[:, places] / temperature).softmax(-1)
        by_hand = kl(output.logits, target, temperature)
        torch.testing.assert_close(found[f"distill.{term}.loss"], by_hand.detach())
        total = total + by_hand
    torch.testing.assert_close(loss.detach(), total.detach() + found["distill.states.loss"])
    # Alone.
    for name, term in (
        ("a", SoftTargets(2, name="first")),
        ("b", SoftTargets(1, name="second")),
        ("b", HiddenStates(name="states")),
    ):
        alone = trainer_of(tmp_path, named(model(), *NAMES), [term], teacher=copy.deepcopy(teachers[name]))
        ours, theirs = alone.distiller.terms[term.name], trainer.distiller.terms[term.name]
        ours.load_state_dict(theirs.state_dict())
        key = f"distill.{term.name}.loss"
        assert torch.equal(losses(alone, batch)[1][key], found[key])


def test_a_teacher_of_other_classes_may_teach_its_layers(tmp_path):
    other = named(big(num_labels=2, seed=3), "yes", "no")
    teachers = {"a": named(big(), *NAMES), "b": other}
    terms = [SoftTargets(source="a"), HiddenStates(source="b")]
    trainer = trainer_of(tmp_path, named(model(), *NAMES), terms, teachers=teachers)
    assert all(value > 0 for value in losses(trainer, batch_of())[1].values())
    with pytest.raises(WiringError, match="3 and 2 classes"):
        trainer_of(tmp_path, named(model(), *NAMES), [SoftTargets(source="b")], teachers={"b": other})


def test_a_single_teacher_by_another_name(tmp_path):
    """In chunks and with a cache too."""
    batch = batch_of("llama")
    expected, _ = losses(trainer_of(tmp_path, model("llama"), [ForwardKL()], teacher=big("llama")), batch)
    for chunked in (False, 3):
        term = ForwardKL(source="large")
        trainer = trainer_of(tmp_path, model("llama"), [term], teachers={"large": big("llama")}, chunked=chunked)
        torch.testing.assert_close(losses(trainer, batch)[0], expected)
    cache = TeacherCache()
    found = []
    for _ in range(2):
        trainer = DistillTrainer(
            model=model(),
            teachers={"large": big()},
            terms=[SoftTargets(source="large")],
            args=support.arguments(tmp_path, optim="sgd"),
            train_dataset=[{**sample, "id": i} for i, sample in enumerate(support.samples(8))],
            data_collator=DistillCollator(support.collate, cache=cache),
        )
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(cache) == 8 and found[0] == pytest.approx(found[1], rel=1e-4)


def test_what_several_sources_cannot_mean(tmp_path):
    def refused(said, student=None, terms=("SoftTargets",), **given):
        with pytest.raises(DistillError, match=said) as error:
            trainer_of(tmp_path, student or model(), list(terms), **given)
        assert "\n" not in str(error.value)

    refused("give teacher=…, or several as teachers", teacher=big(), teachers={"a": big()})
    refused("teachers must be a dict of sources by name", teachers=[big()])
    refused(r"teachers\['a'\] must be a model or a folder, got 3", teachers={"a": 3})
    refused("there is no source 'teacher'; known: 'a'", teachers={"a": big()})
    refused("no term uses 'b'", teachers={"teacher": big(), "b": big(seed=3)})
    refused("share parameters", (one := model()), teachers={"teacher": one})
    refused("student and the peer .teacher. share parameters", (one := model()), teachers={"teacher": Peer(one)})
    refused(
        "chunked=True computes the losses on logits of frozen teachers, and 'b' is a Itself",
        model("llama"),
        [ForwardKL(source="a"), ForwardKL(source="b", name="other")],
        teachers={"a": big("llama"), "b": Itself(momentum=0.9)},
        chunked=True,
    )
    with pytest.raises(DistillError, match="a cache holds the outputs of one teacher"):
        DistillTrainer(
            model=model(),
            teachers={"peer": Peer(model(seed=2))},
            terms=[SoftTargets(source="peer")],
            args=support.arguments(tmp_path),
            data_collator=DistillCollator(support.collate, cache=TeacherCache()),
        )


# --- an ensemble


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_an_ensemble_by_hand(family, mean, tmp_path):
    a, b = big(family, 2), model(family, 3, width=24)
    if family == "bert":
        named(a, *NAMES), named(b, "owl", "cat", "dog")
    batch = batch_of(family)
    student = model(family)
    output = student(**batch)
    with torch.no_grad():
        if family == "bert":
            ours, pa, pb = output.logits, a(**batch).logits, b(**batch).logits[:, [1, 2, 0]]
        else:
            ours, pa, pb = counted(student, batch), counted(a, batch), counted(b, batch)
        pa, pb = (logits.double().softmax(-1) for logits in (pa, pb))
        target = 0.75 * pa + 0.25 * pb if mean == "arithmetic" else pa**0.75 * pb**0.25
        target = (target / target.sum(-1, keepdim=True)).float()
    if family == "llama":
        ours = output.logits[:, :-1][batch["labels"][:, 1:] != -100]
    by_hand = kl(ours, target)
    (output.loss + by_hand).backward()
    expected = gradients(student)

    teachers = {"a": a, "b": b, "both": Ensemble(["a", "b"], mean, weights=[3, 1])}
    fresh = named(model(family), *NAMES) if family == "bert" else model(family)
    trainer = trainer_of(tmp_path, fresh, [SoftTargets(1, source="both")], teachers=teachers)
    loss, found = losses(trainer, batch)
    torch.testing.assert_close(found["distill.soft_targets.loss"], by_hand.detach())
    torch.testing.assert_close(loss.detach(), (output.loss + by_hand).detach())
    loss.backward()
    same_gradients(trainer.model, expected)


def test_an_ensemble_trains_and_its_members_never_change(tmp_path):
    teachers = {"a": big(), "b": big(seed=3), "both": {"type": "Ensemble", "members": ["a", "b"]}}
    before = [copy.deepcopy(teachers[name].state_dict()) for name in "ab"]
    terms = [SoftTargets(2, source="both"), HiddenStates(source="a")]
    trainer = trainer_of(tmp_path, model(), terms, teachers=teachers)
    trainer.train()
    for name, state in zip("ab", before, strict=True):
        assert not teachers[name].training
        assert all(torch.equal(state[key], value) for key, value in teachers[name].state_dict().items())
    assert trainer.model.state_dict().keys() == model().state_dict().keys()


def test_layers_and_attention_of_an_ensemble_are_a_mean_of_losses(tmp_path):
    """Of a teacher of 4 layers and one of 2, each paired with the student's by the term's own rule."""
    teachers = {"a": big(), "b": model(seed=3, width=24), "both": Ensemble(["a", "b"], weights=[3, 1])}
    terms = [HiddenStates(source="both"), AttentionMaps(source="both", weight=2.0)]
    trainer = trainer_of(tmp_path, model(), terms, teachers=teachers)
    _, found = losses(trainer, batch_of())
    names = ("hidden_states", "attention_maps")
    assert [key for key in found if key.endswith(".loss")] == [
        f"distill.{n}_from_{m}.loss" for n in names for m in "ab"
    ]
    for member, weight in (("a", 0.75), ("b", 0.25)):
        single = {"teacher": copy.deepcopy(teachers[member])}
        alone = trainer_of(tmp_path, model(), [HiddenStates(), AttentionMaps(weight=2.0)], teachers=single)
        for name in names:
            wired = trainer.distiller.terms[f"{name}_from_{member}"]
            alone.distiller.terms[name].load_state_dict(wired.state_dict())
        _, expected = losses(alone, batch_of())
        for name in names:
            ours, theirs = found[f"distill.{name}_from_{member}.loss"], expected[f"distill.{name}.loss"]
            torch.testing.assert_close(ours, weight * theirs)


def test_what_an_ensemble_cannot_teach(tmp_path):
    def refused(said, term, one, kind="", task="", student=None, **settings):
        teachers = {"a": big(one, kind=kind), "b": settings.pop("b", None) or big(one, 3, kind=kind)}
        teachers["teacher"] = Ensemble(["a", "b"])
        with pytest.raises(WiringError, match=said) as error:
            trainer_of(tmp_path, student or model(one, kind=kind), [term], teachers=teachers, **settings)
        assert "\n" not in str(error.value)

    message = (
        r"the predictions that it compares have no mean over several models; add a term for each of a, b, source='a'"
    )
    refused(f"soft_targets: {message}", SoftTargets(), "bert", "BertForQuestionAnswering")
    different = dict(b=big("llama", 3, vocab_size=50), chunked=True)
    refused("have 40 .* entries; the members of an Ensemble must predict alike", ForwardKL(), "llama", **different)
    refused(
        "the members of an Ensemble must predict alike", UniversalLogits(), "llama", b=big("llama", 3, vocab_size=50)
    )
    refused("the models have different tasks", SoftTargets(), "bert", b=big("roberta", 3))


# --- specialists


def test_a_generalist_and_specialists_by_hand(tmp_path):
    teachers = {"all": named(big(), "owl", "cat", "dog")}  # permuted into the student's order: cat, dog, owl
    teachers |= {"a": specialist_of(big(seed=3), [0, 2]), "b": specialist_of(big(seed=4), [1, 2])}
    assert teachers["a"].config.num_labels == teachers["a"].num_labels == 3
    together = {"type": "Specialists", "generalist": "all", "specialists": {"a": [0, 2], "b": [1, 2]}}
    student = named(model(), *NAMES)
    trainer = trainer_of(tmp_path, student, [SoftTargets(2, source="both")], teachers={**teachers, "both": together})
    batch = batch_of()
    _, found = losses(trainer, batch)
    with torch.no_grad():
        everything, a, b = (one(**{**batch, "labels": None}).logits for one in teachers.values())
        said = combine_specialists(everything[:, [1, 2, 0]], [a, b], [[0, 2], [1, 2]])
        by_hand = kl(model()(**batch).logits, (said / 2).softmax(-1), 2)
    torch.testing.assert_close(found["distill.soft_targets.loss"], by_hand)
    trainer.train()
    assert "distill.soft_targets" in str(trainer.state.log_history)


def test_specialists_know_classes_of_whole_samples(tmp_path):
    teachers = {"g": big("llama"), "a": big("llama", seed=3), "teacher": Specialists("g", {"a": [0, 1]})}
    with pytest.raises(
        WiringError, match=r"Specialists: they know classes of whole samples, which LlamaForCausalLM does not"
    ):
        trainer_of(tmp_path, model("llama"), [SoftTargets()], teachers=teachers)


# --- a peer


def mutual(student, peer, batch, temperature=2.0, weight=1.0):
    """Deep mutual learning by hand: the loss of both, with its gradient in both."""
    ours, theirs = student(**batch), peer(**batch)
    pairs = ((ours, theirs), (theirs, ours))
    divergences = [weight * kl(s.logits, (t.logits.detach() / temperature).softmax(-1), temperature) for s, t in pairs]
    total = ours.loss + theirs.loss + sum(divergences)
    total.backward()
    return total.detach(), [value.detach() for value in (ours.loss, theirs.loss, *divergences)]


def test_peers_teach_each_other_by_hand(tmp_path):
    a, b = model(), big(seed=3)
    plain = copy.deepcopy(a), copy.deepcopy(b)
    batch = batch_of()
    expected, parts = mutual(*plain, batch)
    trainer = trainer_of(tmp_path, a, [SoftTargets(2, source="peer")], teachers={"peer": Peer(b)})
    loss, found = losses(trainer, batch)
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(found["distill.soft_targets.loss"], parts[2])
    torch.testing.assert_close(found["distill.soft_targets_of_peer.loss"], parts[3])
    loss.backward()
    same_gradients(a, gradients(plain[0]))
    same_gradients(b, gradients(plain[1]))


def test_a_step_of_the_trainer_moves_both_as_by_hand(tmp_path):
    a, b = model(), big(seed=3)
    plain = copy.deepcopy(a), copy.deepcopy(b)
    trainer = trainer_of(
        tmp_path,
        a,
        [SoftTargets(2, source="peer")],
        teachers={"peer": Peer(b)},
        max_steps=3,
        per_device_train_batch_size=8,
        max_grad_norm=0,
        lr_scheduler_type="constant",
    )
    logged = []
    for _ in range(3):
        for one in plain:
            one.train().zero_grad()
        # The order of the samples is the Trainer's; a mean does not depend on it.
        logged.append(mutual(*plain, batch_of(count=8)))
        with torch.no_grad():
            for one in plain:
                for parameter in one.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
    trainer.train()
    for built, by_hand in zip((a, b), plain, strict=True):
        for name, value in by_hand.state_dict().items():
            torch.testing.assert_close(built.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, (whole, parts) in zip(entries, logged, strict=True):
        assert entry["loss"] == pytest.approx(whole.item(), rel=1e-3)
        keys = ("task_loss", "peer.peer.loss", "distill.soft_targets.loss", "distill.soft_targets_of_peer.loss")
        assert [entry[key] for key in keys] == pytest.approx([part.item() for part in parts], rel=1e-3)


@pytest.mark.parametrize(
    "terms", [[SoftTargets(2, source="peer")], [HiddenStates(source="peer"), ForwardKL(source="peer")]]
)
def test_accumulation_is_one_big_batch_for_the_peer_too(terms, tmp_path):
    found = []
    for size, accumulation in ((8, 1), (4, 2)):
        a, b = model("llama"), big("llama", 3)
        trainer = trainer_of(
            tmp_path,
            a,
            copy.deepcopy(terms),
            teachers={"peer": Peer(b)},
            max_steps=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0,
        )
        trainer.train()
        found.append((a, b, [entry for entry in trainer.state.log_history if "loss" in entry]))
    before = {"a": model("llama").state_dict(), "b": big("llama", 3).state_dict()}
    for place, name in enumerate("ab"):
        whole, parts = (run[place].state_dict() for run in found)
        assert any(not torch.equal(whole[key], value) for key, value in before[name].items())
        for key, value in whole.items():
            torch.testing.assert_close(parts[key], value, rtol=1e-4, atol=1e-5)
    for one, other in zip(found[0][2], found[1][2], strict=True):
        names = [key for key in one if key.endswith("loss")]
        assert "peer.peer.loss" in names
        assert [one[key] for key in names] == pytest.approx([other[key] for key in names], rel=1e-4)


def test_a_peer_resumes_bit_for_bit_and_every_saved_model_is_plain(tmp_path):
    def run(folder, resume=None, seed=1):
        a = support.model("bert", seed=seed)  # with dropout
        b = support.model("bert", 32, 4, seed=seed + 2)
        terms = [SoftTargets(2, source="peer"), HiddenStates(source="peer")]
        trainer = trainer_of(
            folder,
            a,
            terms,
            teachers={"peer": Peer(b)},
            optim="adamw_torch",
            learning_rate=1e-3,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer, a, b

    whole, a, b = run(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed, again, other = run(tmp_path / "again", str(checkpoint), seed=8)
    same(a, again)
    same(b, other)
    same(whole.distiller.terms, resumed.distiller.terms)
    plain = support.model("bert")
    whole.save_model(tmp_path / "student")
    for folder, built, expected in (
        (tmp_path / "student", plain, a),
        (tmp_path / "student" / "peers" / "peer", support.model("bert", 32, 4), b),
        (checkpoint, plain, None),
    ):
        loaded, told = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert type(loaded) is BertForSequenceClassification
        assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert loaded.state_dict().keys() == built.state_dict().keys()
        if expected is not None:
            same(loaded, expected)
    # What was saved of a run with a peer does not resume without it.
    with pytest.raises(DistillError, match="made with other distillation terms"):
        trainer_of(tmp_path / "x", model(), [SoftTargets(2)], teacher=big(), max_steps=4).train(
            resume_from_checkpoint=str(checkpoint)
        )


def test_a_student_draws_what_it_would_without_a_peer(tmp_path):
    """With a term at weight 0 the student of two peers is that of the plain Trainer, dropout and all."""
    settings = dict(optim="adamw_torch", learning_rate=1e-3, max_grad_norm=0)
    alone = trainer_of(tmp_path, support.model("bert", seed=1), None, Trainer, **settings)
    alone.train()
    peer = support.model("bert", 32, 4, seed=3)
    before = copy.deepcopy(peer)
    term = SoftTargets(source="peer", weight=0)
    both = trainer_of(tmp_path, support.model("bert", seed=1), [term], teachers={"peer": Peer(peer)}, **settings)
    both.train()
    same(alone.model, both.model)
    assert any(not torch.equal(one, other) for one, other in zip(before.parameters(), peer.parameters(), strict=True))


def test_a_peer_of_another_family_gets_its_own_inputs(tmp_path):
    """The student takes no kinds of tokens, and its peer does."""
    a, b = model("distilbert"), big(seed=3)
    batch = {**batch_of(), "token_type_ids": torch.ones(4, 6, dtype=torch.long)[:, : batch_of()["input_ids"].shape[1]]}
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    plain = copy.deepcopy(b)
    expected = plain(**batch).loss
    without = plain(**{k: v for k, v in batch.items() if k != "token_type_ids"}).loss
    assert not torch.allclose(expected, without)
    trainer = trainer_of(tmp_path, a, [SoftTargets(source="peer")], teachers={"peer": Peer(b)})
    losses(trainer, batch)
    torch.testing.assert_close(trainer.model.distill_link.last.peers["peer"], expected)


@pytest.mark.parametrize("weight", [0, 0.25])
def test_the_share_of_the_host_holds_for_a_peer_too(weight, tmp_path):
    a, b = model(), big(seed=3)
    batch = batch_of()
    _, parts = mutual(copy.deepcopy(a), copy.deepcopy(b), batch)
    trainer = trainer_of(tmp_path, a, [SoftTargets(2, source="peer")], teachers={"peer": Peer(b)}, host_weight=weight)
    loss, _ = losses(trainer, batch)
    torch.testing.assert_close(loss.detach(), weight * (parts[0] + parts[1]) + parts[2] + parts[3])
    loss.backward()
    if weight:
        return
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    loss, _ = losses(trainer, unlabelled)
    torch.testing.assert_close(loss.detach(), parts[2] + parts[3])


def test_a_peer_begins_anew_with_each_model_that_is_initialised(tmp_path):
    peer = big(seed=3)
    trainer = trainer_of(
        tmp_path,
        None,
        [SoftTargets(2, source="peer"), SoftTargets(2, source="average", name="mean")],
        model_init=lambda: model(),
        teachers={"peer": Peer(peer), "average": Itself(0.5)},
        max_steps=3,
    )
    found = []
    for _ in range(2):
        trainer.train()
        found.append((copy.deepcopy(trainer.model.state_dict()), copy.deepcopy(peer.state_dict())))
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_what_a_peer_cannot_be(tmp_path):
    def refused(said, student=None, peer=None, terms=None, **given):
        student = student or model()
        with pytest.raises(DistillError, match=said) as error:
            trainer_of(
                tmp_path,
                student,
                terms or [SoftTargets(source="peer")],
                teachers={"peer": Peer(peer or big(seed=3))},
                **given,
            )
        assert "\n" not in str(error.value)
        assert type(student).__mro__[0].__module__.startswith("transformers") and not hasattr(student, "distill_link")

    refused(
        "the peer 'peer' has the student's classes in another order",
        named(model(), *NAMES),
        named(big(seed=3), *reversed(NAMES)),
    )
    refused("trained on other classes", named(model(), *NAMES), named(big(seed=3), "x", "y", "z"))
    refused("a peer trains on its model's own loss", label_smoothing_factor=0.1)
    refused("a peer trains on its model's own loss", compute_loss_func=lambda *_, **__: None)
    refused(
        "chunked=True computes the losses on logits of frozen teachers, and 'peer' is a Peer",
        model("llama"),
        big("llama", 3),
        [ForwardKL(source="peer")],
        chunked=True,
    )
    # Tokens of a second tokenizer are not the peer's.
    trainer = trainer_of(tmp_path, model(), [SoftTargets(source="peer")], teachers={"peer": Peer(big(seed=3))})
    batch = {**batch_of(), "teacher_inputs": {"input_ids": batch_of()["input_ids"]}}
    with pytest.raises(DistillError, match="'peer' reads the student's"):
        losses(trainer, batch)


@pytest.mark.parametrize("layers", ["uniform", [[0, 1], [1, 3]]])
def test_layers_of_peers_pair_the_same_way_in_both_directions(layers, tmp_path):
    """A student of 2 layers and a peer of 4; the second is no shallower than the first, and its twin would be."""
    a, b = model(), model(seed=3, layers=4)
    batch = batch_of()
    term = HiddenStates(layers=layers, source="peer", adapter="none")
    plain = copy.deepcopy(a), copy.deepcopy(b)
    ours, theirs = (one(**batch, output_hidden_states=True) for one in plain)
    real = batch["attention_mask"].bool()
    pairs = [(ours.hidden_states[i][real], theirs.hidden_states[j][real]) for i, j in ((1, 2), (2, 4))]
    parts = [sum(F.mse_loss(s, t.detach()) for s, t in pairs) / 2, sum(F.mse_loss(t, s.detach()) for s, t in pairs) / 2]
    (ours.loss + theirs.loss + sum(parts)).backward()
    trainer = trainer_of(tmp_path, a, [term], teachers={"peer": Peer(b)})
    loss, found = losses(trainer, batch)
    torch.testing.assert_close(found["distill.hidden_states.loss"], parts[0].detach())
    torch.testing.assert_close(found["distill.hidden_states_of_peer.loss"], parts[1].detach())
    loss.backward()
    same_gradients(a, gradients(plain[0]))
    same_gradients(b, gradients(plain[1]))


# --- peers


@pytest.mark.parametrize("average", [False, True])
def test_three_students_teach_each_other_by_hand(average, tmp_path):
    built = model(), big(seed=3), model(seed=4, width=24)
    plain = copy.deepcopy(built)
    batch = batch_of()
    outputs = [one(**batch) for one in plain]
    total = 0
    for i, output in enumerate(outputs):
        others = [other.logits.detach().softmax(-1) for j, other in enumerate(outputs) if j != i]
        parts = [sum(others) / 2] if average else others
        total = total + output.loss + sum(3.0 * kl(output.logits, part) for part in parts) / len(parts)
    total.backward()
    student, *others = built
    peers = Peers(others, average=average)
    terms = dict(terms=None, recipe=dict(type="dml", source="peers", weight=3.0))
    trainer = trainer_of(tmp_path, student, teachers={"peers": peers}, **terms)
    loss, found = losses(trainer, batch)
    torch.testing.assert_close(loss.detach(), total.detach())
    assert len([key for key in found if key.startswith("distill.") and key.endswith(".loss")]) == (3 if average else 6)
    loss.backward()
    for one, by_hand in zip(built, plain, strict=True):
        same_gradients(one, gradients(by_hand))


@pytest.mark.parametrize(
    ("layers", "pairs"),
    [("uniform", ((2, 1), (3, 2), (4, 3))), ([[0, 1], [1, 2]], ((2, 2), (3, 3)))],
    ids=["a rule", "pairs"],
)
def test_layers_of_two_peers(layers, pairs, tmp_path):
    """A student of 2 layers; of its peers one has 4, the other 3. Rules pair the deeper one's with those of the other."""
    peers = model(seed=3, layers=4), model(seed=4, layers=3)
    plain = copy.deepcopy(peers)
    batch = batch_of()
    term = HiddenStates(layers=layers, source="peers", adapter="none")
    trainer = trainer_of(tmp_path, model(), [term], teachers={"peers": Peers(peers)})
    _, found = losses(trainer, batch)
    ours, theirs = (one(**batch, output_hidden_states=True).hidden_states for one in plain)
    real = batch["attention_mask"].bool()
    by_hand = sum(F.mse_loss(ours[i][real], theirs[j][real]) for i, j in pairs) / len(pairs)
    for name in ("peers_0_from_peers_1", "peers_1_from_peers_0"):
        torch.testing.assert_close(found[f"distill.hidden_states_of_{name}.loss"], by_hand.detach() / 2)


def test_peers_resume_bit_for_bit_and_each_is_saved_plain(tmp_path):
    def run(folder, resume=None, seed=1):
        built = [
            support.model("bert", *size, seed=seed + k) for k, size in enumerate(((), (32, 4), (24, 4)))
        ]  # dropout
        settings = dict(optim="adamw_torch", learning_rate=1e-3, max_steps=4, save_strategy="steps", save_steps=2)
        terms = [SoftTargets(2, source="peers"), HiddenStates(source="peers", name="layers")]
        trainer = trainer_of(folder, built[0], terms, teachers={"peers": Peers(built[1:])}, **settings)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, built

    whole, built = run(tmp_path / "whole")
    _, again = run(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-2"), seed=8)
    for one, other in zip(built, again, strict=True):
        same(one, other)
    whole.save_model(tmp_path / "student")
    for name, peer in zip(("peers_0", "peers_1"), built[1:], strict=True):
        same(AutoModelForSequenceClassification.from_pretrained(tmp_path / "student" / "peers" / name), peer)


def test_what_peers_of_a_text_model_refuse(tmp_path):
    def refused(said, teachers, term=None):
        with pytest.raises(DistillError, match=said) as error:
            trainer_of(tmp_path, model(), [term or SoftTargets(source="peers")], teachers=teachers)
        assert "\n" not in str(error.value)

    a = model(seed=3)
    refused("share parameters", {"peers": Peers([a, a])})
    refused("does not compare predictions", {"peers": Peers([a, big()], average=True)}, HiddenStates(source="peers"))
    refused("peer 1 of 2, must be a model or a folder, got 5", {"peers": dict(type="Peers", models=[a, 5])})
    refused("no peers", {"peers": dict(type="Peers", models=[])})


# --- itself


def test_the_moving_average_by_hand(tmp_path):
    """The student's average teaches predictions and states; it follows each step of the optimizer."""
    seen = []

    class Watched(DistillTrainer):
        def compute_loss(self, model, inputs, *args, **settings):
            student = {name: value.clone() for name, value in self.model.state_dict().items()}
            loss = super().compute_loss(model, inputs, *args, **settings)
            found = {key: value.clone() for key, value in self.model.distill_link.last.losses.items()}
            seen.append((student, {k: v.clone() for k, v in inputs.items()}, found))
            return loss

    average = Itself(momentum=0.75)
    trainer = Watched(
        model=model(),
        teacher=average,
        terms=[SoftTargets(1), HiddenStates(adapter="none")],
        args=support.arguments(tmp_path, optim="sgd", learning_rate=0.5, max_steps=3, gradient_accumulation_steps=2),
        train_dataset=support.samples(8),
        data_collator=support.collate,
    )
    trainer.train()
    assert len(seen) == 6
    mean = None
    for place, (state, batch, found) in enumerate(seen):
        student = model().eval()
        student.load_state_dict(state)
        if place == 0:
            mean = {name: value.clone() for name, value in state.items()}
        elif place % 2 == 0:
            mean = {name: 0.75 * mean[name] + 0.25 * value for name, value in state.items()}
        follower = model().eval()
        follower.load_state_dict(mean)
        with torch.no_grad():
            ours, theirs = (one(**batch, output_hidden_states=True) for one in (student, follower))
        count = 2 * len(batch["labels"])  # over both parts of the batch
        by_hand = kl(ours.logits, theirs.logits.softmax(-1)) * len(batch["labels"]) / count
        torch.testing.assert_close(found["distill.soft_targets.loss"], by_hand, rtol=1e-4, atol=1e-6)
        if place >= 2:
            assert by_hand > 0 and found["distill.hidden_states.loss"] > 0
        else:
            assert found["distill.hidden_states.loss"] == 0
    assert not any("distiller" in name for name in trainer.model.state_dict())


def test_a_moving_average_resumes_bit_for_bit(tmp_path):
    def run(folder, resume=None, seed=1):
        trainer = trainer_of(
            folder,
            support.model("bert", seed=seed),
            [SoftTargets(2)],
            teacher=Itself(0.5),
            optim="adamw_torch",
            learning_rate=1e-2,
            max_steps=5,
            save_strategy="steps",
            save_steps=3,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-3"), seed=7)
    same(whole.model, resumed.model)
    same(whole.distiller.teacher.model, resumed.distiller.teacher.model)
    assert any(
        not torch.equal(one, other)
        for one, other in zip(whole.model.parameters(), whole.distiller.teacher.model.parameters(), strict=False)
    )


def test_its_own_deeper_layers_by_hand(tmp_path):
    """The last layer's states teach those of the first, without gradient to themselves."""
    batch = batch_of()
    student = model()
    output = student(**batch, output_hidden_states=True)
    real = batch["attention_mask"].bool()
    first, last = (output.hidden_states[k][real] for k in (1, 2))
    by_hand = F.mse_loss(first, last.detach())
    (output.loss + by_hand).backward()
    expected = gradients(student)

    term = HiddenStates(layers=[[0, 1]], adapter="none")
    trainer = trainer_of(tmp_path, model(), [term, AttentionMaps(layers=[[0, 1]], weight=0)], teacher=Itself())
    loss, found = losses(trainer, batch)
    torch.testing.assert_close(found["distill.hidden_states.loss"], by_hand.detach())
    loss.backward()
    same_gradients(trainer.model, expected)
    trainer = trainer_of(tmp_path, model(), [AttentionMaps(layers=[[0, 1]])], teacher={"type": "Itself"})
    assert losses(trainer, batch)[1]["distill.attention_maps.loss"] > 0
    trainer.train()


# --- shares of the host's own loss


class Sharing(SoftTargets):
    """A third party's term, which replaces a part of the host's loss."""

    host_share = 0.3


class SharingKL(ForwardKL):
    host_share = 0.3


@pytest.mark.parametrize("weight", [1, 0.5])
@pytest.mark.parametrize("family", ["bert", "llama", "chunked"])
def test_a_term_leaves_a_share_to_the_host(family, weight, tmp_path):
    chunked, family = (3, "llama") if family == "chunked" else (False, family)
    batch = batch_of(family)
    student, teacher = model(family), big(family)
    output = student(**batch)
    if family == "bert":
        with torch.no_grad():
            target = teacher(**batch).logits.softmax(-1)
        by_hand = kl(output.logits, target)
    else:
        with torch.no_grad():
            target = counted(teacher, batch).softmax(-1)
        by_hand = kl(output.logits[:, :-1][batch["labels"][:, 1:] != -100], target)
    total = 0.3 * weight * output.loss + by_hand
    total.backward()
    expected = gradients(student)

    term = Sharing(1) if family == "bert" else SharingKL()
    trainer = trainer_of(tmp_path, model(family), [term], teacher=teacher, chunked=chunked, host_weight=weight)
    loss, _ = losses(trainer, batch)
    torch.testing.assert_close(loss.detach(), total.detach())
    loss.backward()
    same_gradients(trainer.model, expected)


def test_shares_multiply_and_follow_the_schedule(tmp_path):
    batch = batch_of()
    own = model()(**batch).loss
    terms = [Sharing(1, weight=2.0), Sharing(1, name="second", schedule=dict(type="Ramp", end=10))]
    trainer = trainer_of(tmp_path, model(), terms, teacher=big())
    for step, share in ((0, 0.3), (5, 0.3 * (1 - 0.7 * 0.5)), (10, 0.09)):
        trainer.state.global_step = step
        loss, found = losses(trainer, batch)
        torch.testing.assert_close(loss.detach(), (share * own + sum(found.values())).detach())


@pytest.mark.parametrize("chunked", [False, 3])
def test_a_term_that_is_dropped_takes_no_share(chunked, tmp_path):
    class Broken(SharingKL):
        def compare(self, pairs):
            return super().compare(pairs) / 0

    batch = batch_of("llama")
    own = model("llama")(**batch).loss.detach()
    trainer = trainer_of(tmp_path, model("llama"), [Broken(), ForwardKL()], teacher=big("llama"), chunked=chunked)
    loss, found = losses(trainer, batch)
    assert found["distill.broken.loss"] == 0
    torch.testing.assert_close(loss.detach(), own + found["distill.forward_kl.loss"])


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_in_chunks_the_routers_loss_is_the_hosts_own_too(share, tmp_path):
    settings = dict(
        kind="MixtralForCausalLM",
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
    )

    class Share(ForwardKL):
        host_share = share

    batch = batch_of("llama")
    found = []
    for chunked in (False, 3):
        trainer = trainer_of(
            tmp_path,
            model("llama", **settings),
            [Share(weight=0.5)],
            teacher=big("llama"),
            chunked=chunked,
            host_weight=0.5,
            data=support.samples(8, "causal"),
        )
        loss, _ = losses(trainer, batch)
        loss.backward()
        found.append((loss.detach(), gradients(trainer.model)))
    torch.testing.assert_close(found[0][0], found[1][0])
    same_gradients(trainer.model, found[0][1])


def test_a_peer_keeps_the_share_that_its_twin_leaves(tmp_path):
    a, b = model(), big(seed=3)
    batch = batch_of()
    _, parts = mutual(copy.deepcopy(a), copy.deepcopy(b), batch)
    trainer = trainer_of(tmp_path, a, [Sharing(2, source="peer")], teachers={"peer": Peer(b)})
    loss, _ = losses(trainer, batch)
    torch.testing.assert_close(loss.detach(), 0.3 * (parts[0] + parts[1]) + parts[2] + parts[3])


def test_a_share_in_plain_pytorch():
    from kdgraft import SoftTargets as PlainTargets

    class Shared(PlainTargets):
        host_share = 0.3

    torch.manual_seed(0)
    student, teacher = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    x, y = torch.randn(6, 3), torch.arange(6) % 4
    plain = copy.deepcopy(student)
    own = F.cross_entropy(plain(x), y)
    with torch.no_grad():
        target = teacher(x).softmax(-1)
    expected = 0.3 * own + 0.5 * kl(plain(x), target)
    expected.backward()
    distiller = Distiller(student, teacher, terms=[Shared(1, weight=0.5)], example=x).train()
    out = distiller(x)
    assert out.host_share == pytest.approx(0.3)
    total = out.total(F.cross_entropy(out.student, y))
    torch.testing.assert_close(total.detach(), expected.detach())
    total.backward()
    same_gradients(student, gradients(plain))


# --- recipe files


BERT = dict(model_type="bert", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)


@pytest.fixture
def saved(tmp_path):
    """Two trained teachers of different sizes, with their tokenizer, and the recipe's entries for the data."""
    import json

    rows = [{"text": f"word {i} and {i * i}", "label": "ab"[i % 2]} for i in range(8)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    training = dict(use_cpu=True, max_steps=2, save_strategy="no", disable_tqdm=True, per_device_train_batch_size=4)
    plain = dict(task="classification", data=dict(train=str(tmp_path / "a.jsonl"), length=16), training=training)
    for name, width in (("a", 16), ("b", 32)):
        folder = str(tmp_path / name)
        student = {**BERT, "hidden_size": width}
        build({**plain, "student": student, "tokenizer": dict(vocab_size=60), "output": folder}).save_model(folder)
    return {**plain, "student": BERT, "output": str(tmp_path / "out")}


def test_teachers_in_a_recipe_file(saved, tmp_path, capsys):
    import yaml

    from kdgraft.cli import main

    path = tmp_path / "r.yaml"
    recipe = {
        **saved,
        "teachers": {
            "a": str(tmp_path / "a"),
            "b": str(tmp_path / "b"),
            "both": {"type": "Ensemble", "members": ["a", "b"], "mean": "geometric"},
        },
        "terms": [
            {"type": "SoftTargets", "temperature": 2, "source": "both"},
            {"type": "HiddenStates", "source": "b"},
        ],
    }
    path.write_text(yaml.safe_dump(recipe))
    assert main(["check", str(path)]) == 0
    told = capsys.readouterr().out
    assert "distill.soft_targets.loss" in told and "distill.hidden_states.loss" in told
    assert main(["train", str(path)]) == 0
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.hidden_size == 16
    # The student as its own teacher; the tokenizer is in no folder then.
    own = {
        **saved,
        "tokenizer": dict(vocab_size=60),
        "teacher": {"type": "Itself", "momentum": 0.9},
        "terms": ["SoftTargets"],
    }
    path.write_text(yaml.safe_dump(own))
    check(path)

    def fails(*said, **entries):
        path.write_text(yaml.safe_dump({**recipe, **entries}))
        capsys.readouterr()
        line = support.refused(capsys, ["check", str(path)])
        for part in said:
            assert part in line

    second = dict(BERT, hidden_size=32)
    peers = dict(type="Peers", models=[str(tmp_path / "a"), second], average=True)
    single = dict(type="Peer", **second)
    mutual_ = {**saved, "tokenizer": dict(vocab_size=60), "teachers": dict(peers=peers, one=single)}
    mutual_["terms"] = [{"type": "SoftTargets", "source": name} for name in ("peers", "one")]
    path.write_text(yaml.safe_dump(mutual_))
    assert main(["train", str(path)]) == 0
    for name, width in (("peers_0", 16), ("peers_1", 32), ("one", 32)):
        found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "peers" / name).config
        assert found.hidden_size == width and set(found.label2id) == {"a", "b"}

    def fails_of_peers(said, *models):
        path.write_text(yaml.safe_dump({**mutual_, "teachers": dict(peers=dict(peers, models=[*models]), one=single)}))
        capsys.readouterr()
        assert said in support.refused(capsys, ["check", str(path)])

    fails_of_peers("teachers.peers_1", second, dict(second, hiden_size=3))
    fails_of_peers("no teachers.peers_0 at nowhere", "nowhere", second)
    fails_of_peers("teachers.peers_0 is a folder, or a config", 5, second)

    fails("no teachers.c at nowhere", teachers={**recipe["teachers"], "c": "nowhere"})
    fails("teachers is folders by name", teachers=["a"])
    fails("teachers['a'] must be a model or a folder, got 5", teachers={**recipe["teachers"], "a": 5})
    fails("give teacher=…, or several", teacher=str(tmp_path / "a"))
    fails("there is no source 'c'", terms=[{"type": "SoftTargets", "source": "c"}])
    fails("no term uses 'a'", terms=[{"type": "SoftTargets", "source": "b"}])


def test_a_wrapped_trainer_takes_several_sources(tmp_path):
    trainer = Trainer(
        model=model(),
        args=support.arguments(tmp_path, max_steps=2),
        train_dataset=support.samples(8),
        data_collator=support.collate,
    )
    peer = big(seed=3)
    before = copy.deepcopy(peer)
    distill(
        trainer,
        teachers={"large": big(), "peer": Peer(peer)},
        terms=[SoftTargets(source="large"), SoftTargets(source="peer", name="mutual")],
    )
    trainer.train()
    assert any(not torch.equal(one, other) for one, other in zip(before.parameters(), peer.parameters(), strict=True))
    trainer.save_model(tmp_path / "student")
    same(AutoModelForSequenceClassification.from_pretrained(tmp_path / "student" / "peers" / "peer"), peer)
