"""A teacher behind a server: what the running teacher gives, over HTTP; and one line where the server fails."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithFlattening

from kdgraft import Distiller, DistillError, WiringError
from kdgraft.cli import main
from kdgraft.store import KEYS, LENGTHS
from kdgraft.terms import ScoreTerm
from kdgraft_nlp import TERMS, DistillTrainer, ForwardKL, OnPolicy, Served, Stored, distill, fill_store
from kdgraft_nlp.student import graft
from support import nlp as support
from support.language_server import serving

DIVERGENCES = ["ForwardKL", "ReverseKL", dict(type="GeneralizedJSD", beta=0.3), "SkewedKL", "SoftTargets"]
APIS = ("vllm", "echo", "sglang")


def student(family="llama", **settings):
    return support.quiet(support.model(family, seed=1, **settings))


def teacher():
    return support.model("llama", 32, 2, seed=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("teacher")
    teacher().save_pretrained(found)
    support.by_word().save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def process(folder):
    with serving(folder) as found:
        yield found


@pytest.fixture
def server(process):
    process.fail()
    return process


def batch_of(count=6):
    return support.collate(support.samples(12, "causal")[3 : 3 + count])


def step_of(given, terms, batch=None, chunk=None, built=None):
    """The losses of one pass, and their gradients."""
    one = graft(student() if built is None else built, given, copy.deepcopy(terms), chunk=chunk)
    one.train()
    return support.distilled_step(one, batch_of() if batch is None else batch)


def trainer_of(folder, given, terms, kind=DistillTrainer, data=None, collator=support.collate, more=None, **settings):
    return kind(
        model=student(),
        teacher=given,
        terms=terms,
        args=support.arguments(folder, **settings),
        train_dataset=support.samples(12, "causal") if data is None else data,
        data_collator=collator,
        **(more or {}),
    )


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


# --- the same losses


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("term", [*DIVERGENCES, dict(type="SoftTargets", temperature=3.0)], ids=str)
def test_with_all_entries_losses_and_gradients_are_those_of_the_running_teacher(server, term, api):
    served = Served(server.url, top_k=support.VOCABULARY, api=api)
    support.same_step(step_of(teacher(), [term]), step_of(served, [term]))


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("k", [1, 7, 39])
def test_with_fewer_entries_they_are_those_of_a_store(server, tmp_path, k, chunk):
    fill_store(
        trainer_of(tmp_path, teacher(), DIVERGENCES), tmp_path / "store", top_k=k, values="float32", progress=False
    )
    stored, served = Stored(tmp_path / "store"), Served(server.url, top_k=k)
    if chunk is None:
        for term in DIVERGENCES:
            support.same_step(step_of(stored, [term]), step_of(served, [term]))
    else:
        found = []
        for given in (stored, served):
            one = graft(student(), given, DIVERGENCES, chunk=chunk).train()
            loss = one(**batch_of())["loss"]
            loss.backward()
            found.append((loss.detach(), {name: p.grad for name, p in one.named_parameters() if p.grad is not None}))
        support.same_step(*found)


def test_the_place_after_the_last_token_is_known_too(server):
    terms = [dict(type="ForwardKL", tokens="valid")]
    whole = step_of(teacher(), terms)
    assert abs(float(whole[0] - step_of(teacher(), ["ForwardKL"])[0])) > 1e-3
    for api in APIS:
        support.same_step(whole, step_of(Served(server.url, top_k=support.VOCABULARY, api=api), terms))


def test_padding_and_packing_change_nothing(server):
    rows = support.samples(12, "causal")[3:9]
    given = Served(server.url, top_k=support.VOCABULARY)
    whole = step_of(given, ["ForwardKL"])
    for batch in (
        support.collate(rows, extra=4),
        DataCollatorWithFlattening()(rows[::-1]),
        DataCollatorWithFlattening(return_seq_idx=True)(rows),
    ):
        built = student()
        built.config.use_cache = False
        torch.testing.assert_close(step_of(given, ["ForwardKL"], batch, built=built)[0], whole[0], rtol=1e-4, atol=1e-6)
    left = {name: value.flip(1) for name, value in batch_of().items()}
    assert left["attention_mask"][0, 0] == 0
    support.same_step(step_of(teacher(), ["ForwardKL"], left), step_of(given, ["ForwardKL"], left))


def test_a_teacher_that_is_sure_leaves_no_noise_in_the_rest(tmp_path):
    """Where the mass of the rest is below what rounded logarithms show, it is bounded by the smallest entry that is known."""
    sure = teacher()
    with torch.no_grad():
        sure.lm_head.weight.mul_(60)
    sure.save_pretrained(tmp_path / "sure")
    support.by_word().save_pretrained(tmp_path / "sure")
    trainer = trainer_of(tmp_path, sure, ["ReverseKL"])
    fill_store(trainer, tmp_path / "store", top_k=12, values="float32", progress=False)
    with serving(tmp_path / "sure") as process:
        found = [step_of(one, ["ReverseKL"])[0] for one in (Stored(tmp_path / "store"), Served(process.url, top_k=12))]
    probabilities = sure(**batch_of()).logits.softmax(-1).sort(-1, descending=True).values
    assert float(probabilities[..., 12:].sum(-1).median()) < 1e-9  # far below what 1 − Σp shows
    torch.testing.assert_close(*found, rtol=0.05, atol=0.0)


# --- training


@pytest.mark.parametrize("chunked", [False, 3])
def test_training_is_that_with_the_teacher(server, tmp_path, chunked):
    runs = []
    for given in (teacher(), Served(server.url, top_k=support.VOCABULARY)):
        more = dict(chunked=chunked)
        trainer = trainer_of(
            tmp_path, given, DIVERGENCES[:3], more=more, optim="sgd", gradient_accumulation_steps=2, learning_rate=0.05
        )
        trainer.train()
        runs.append(weights(trainer))
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_around_an_sft_trainer(tmp_path):
    pytest.importorskip("trl")
    from support import sft

    sft.teacher().save_pretrained(tmp_path / "teacher")
    sft.tokenizer().save_pretrained(tmp_path / "teacher")
    found = []
    with serving(tmp_path / "teacher") as process:
        for given in (sft.teacher(), Served(process.url, top_k=support.VOCABULARY)):
            trainer = distill(sft.trainer_of(tmp_path), teacher=given, terms=[ForwardKL()])
            found.append(sft.step(trainer, sft.first_batch(trainer)))
        trainer.train()
    support.same_step(*found)
    assert trainer.state.log_history[0]["distill.forward_kl.loss"] > 0


def test_it_reads_what_the_student_writes(server, tmp_path):
    """A store knows the texts of the data set alone; a server is asked about any."""
    runs = []
    for given in (teacher(), Served(server.url, top_k=support.VOCABULARY)):
        told = dict(on_policy=OnPolicy(share=1.0, max_new_tokens=4, prompt=3))
        trainer = trainer_of(tmp_path, given, ["GeneralizedJSD"], more=told, max_steps=2, optim="sgd")
        trainer.train()
        runs.append([entry["distill.generalized_jsd.loss"] for entry in trainer.state.log_history[:2]])
        assert trainer.state.log_history[0]["on_policy.fraction"] == 1
    assert runs[0] == pytest.approx(runs[1], rel=1e-3)
    with pytest.raises(
        DistillError, match=r"mix needs one frozen teacher that writes along; leave mix out .* a server"
    ):
        trainer_of(tmp_path, Served(server.url), ["ReverseKL"], more=dict(on_policy=OnPolicy(share=1.0, mix=0.2)))


def test_texts_are_asked_for_side_by_side(folder):
    with serving(folder, delay=0.2) as process:
        for concurrency in (1, 3):
            before = process.ask("/seen")["requests"]
            step_of(Served(process.url, concurrency=concurrency, top_k=4), ["ForwardKL"])
            seen = process.ask("/seen")
            assert seen["requests"] - before == 7  # six texts, and one when the training began
            assert seen["together"] == concurrency


# --- stores


def test_a_store_that_is_filled_through_the_server_is_that_of_the_teacher(server, tmp_path):
    stores = []
    for name, given in (("local", teacher()), ("served", Served(server.url, top_k=9, concurrency=3))):
        trainer = trainer_of(tmp_path / name, given, DIVERGENCES)
        stores.append(
            fill_store(trainer, tmp_path / name / "store", top_k=9, values="float32", per_part=5, progress=False)
        )
    local, served = stores
    assert served.about["teacher"]["served"] == "teacher" and served.about["taps"] == local.about["taps"]
    for part in range(local.parts):
        for column in (KEYS, LENGTHS, "[logits]/ids"):
            assert np.array_equal(local.whole(part, column), served.whole(part, column))
        for column in ("logs", "norms", "rests"):
            one, other = (store.whole(part, f"[logits]/{column}") for store in stores)
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)
    given = [Stored(tmp_path / name / "store") for name in ("local", "served")]
    support.same_step(*(step_of(one, DIVERGENCES[:1]) for one in given))


def test_it_is_filled_with_what_the_server_gives(server, tmp_path):
    for asked, told in ((50, 50), (None, "all logits")):
        with pytest.raises(DistillError, match=f"asked for 9 entries of each token, and the store for {told}; give"):
            fill_store(trainer_of(tmp_path, Served(server.url, top_k=9), ["ForwardKL"]), tmp_path / "s", top_k=asked)
    # With all entries every temperature is known.
    terms = [dict(type="SoftTargets", temperature=2.0)]
    trainer = trainer_of(tmp_path, Served(server.url), terms)
    fill_store(trainer, tmp_path / "whole", top_k=40, values="float32", progress=False)
    support.same_step(step_of(teacher(), terms), step_of(Stored(tmp_path / "whole"), terms))


def test_packed_rows_are_stored_text_by_text(server, tmp_path):
    trainer = trainer_of(tmp_path, Served(server.url, top_k=9), ["ForwardKL"], collator=DataCollatorWithFlattening())
    fill_store(trainer, tmp_path / "store", top_k=9, values="float32", progress=False)
    support.same_step(
        step_of(Served(server.url, top_k=9), ["ForwardKL"]), step_of(Stored(tmp_path / "store"), ["ForwardKL"])
    )


# --- what is refused before anything is trained


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        (["HiddenStates"], r"a server gives the probabilities of tokens alone, and a term reads 'model\."),
        (["AttentionMaps"], "a server gives the probabilities of tokens alone"),
        (["LogitMatching"], "logit_matching compares all classes one by one, and a server gives probabilities"),
        (["UniversalLogits"], "compares all classes one by one"),
        ([dict(type="SoftTargets", standardize=True)], "compares all classes one by one"),
        (
            [dict(type="SoftTargets", temperature=2.0)],
            "soft_targets: at temperature 2 the 9 largest .* take temperature 1, or top_k=40",
        ),
    ],
    ids=str,
)
def test_terms_that_compare_what_is_not_known(server, terms, said):
    with pytest.raises(WiringError, match=said):
        step_of(Served(server.url, top_k=9), terms)


def test_every_term_is_refused_or_exact(server):
    """No term computes something else: with all entries it is that of the running teacher."""
    exact = []
    for name in sorted(TERMS):
        if not issubclass(TERMS.get(name), ScoreTerm):
            continue
        try:
            served = step_of(Served(server.url, top_k=40), [name])
        except DistillError:
            continue
        support.same_step(step_of(teacher(), [name]), served)
        exact.append(name)
    assert exact == ["ForwardKL", "GeneralizedJSD", "ReverseKL", "SkewedKL", "SoftTargets"]


def test_a_student_with_adapters(server):
    peft = pytest.importorskip("peft")
    found = []
    for given in (teacher(), Served(server.url, top_k=support.VOCABULARY)):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        one = peft.get_peft_model(student(), config)
        graft(one, given, ["ForwardKL"])
        base = one.base_model.model.train()
        found.append(support.distilled_step(base, batch_of()))
    support.same_step(*found)


def test_models_and_sources_that_a_server_cannot_teach(server):
    with pytest.raises(DistillError, match="causal language models, and BertForSequenceClassification is none"):
        graft(student("bert"), Served(server.url), ["SoftTargets"])
    terms = [dict(type="ForwardKL", source=s, name=s) for s in "ab"]
    with pytest.raises(DistillError, match="'a' is served, which stands for one teacher; leave out other sources"):
        graft(student(), None, terms, teachers=dict(a=Served(server.url), b=teacher()))
    with pytest.raises(DistillError, match="those of a stored or served teacher are not here"):
        graft(student(), Served(server.url), ["ForwardKL"], init_from=[0, 1])
    with pytest.raises(WiringError, match="Served teaches language models of Hugging Face"):
        Distiller(torch.nn.Linear(2, 2), Served(server.url), ["ForwardKL"], example=torch.ones(1, 2))
    outputs = graft(student(), Served(server.url, top_k=4), ["ForwardKL"]).distiller.teacher.outputs
    images = {"input_ids": torch.ones(1, 2).long(), "pixel_values": torch.ones(1)}
    with pytest.raises(DistillError, match="a server reads token ids alone, not pixel_values"):
        outputs.look_up((), images, [])


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (dict(url="localhost:8000"), "url must be the address of a server, such as http://localhost:8000/v1"),
        (dict(top_k=0), "top_k must be a whole number >= 1"),
        (dict(api="tgi"), "api must be one of vllm, echo, sglang, got 'tgi'"),
        (dict(timeout=0), "timeout must be a number > 0"),
        (dict(retries=-1), "retries must be a whole number >= 0"),
        (dict(concurrency=0), "concurrency must be a whole number >= 1"),
        (dict(model=""), "model must be the name of a model of the server, got ''"),
        (dict(api_key="sk-secret"), "api_key is the name of the environment variable that holds the key, such as"),
        (dict(api_key="NO_SUCH_KEY"), "the environment has no NO_SUCH_KEY, which api_key names; export it"),
    ],
    ids=str,
)
def test_arguments_without_a_meaning(told, said):
    with pytest.raises(DistillError, match=said) as error:
        Served(**{"url": "http://localhost:1", **told})
    assert "secret" not in str(error.value)


def test_it_is_listed_beside_the_sources_of_the_core(capsys):
    assert main(["list"]) == 0
    core, own = capsys.readouterr().out.split("\nnlp sources\n")
    assert "\n  Served  " in f"\n{own}" and "\n  Stored  " in f"\n{own}" and "\n  Ensemble  " not in own
    assert "\n  Ensemble  " in core
    assert main(["list", "Served"]) == 0
    assert "concurrency = 16    the number of texts" in capsys.readouterr().out
