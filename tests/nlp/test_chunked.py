"""Chunked language-model losses: equal to the plain ones, without the logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from transformers import Trainer

from kdgraft import DistillError, Ensemble, WiringError
from kdgraft.losses import generalized_jsd, soft_targets
from kdgraft.sources import Itself
from kdgraft_nlp import DistillTrainer
from kdgraft_nlp.chunked import Given, Head, TokenLoss, chunked_losses, tokens_at_once
from kdgraft_nlp.student import graft
from support import nlp as support
from support.tensors import gradients


def tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    hidden, weight, bias = draw(11, 4).requires_grad_(), draw(7, 4).requires_grad_(), draw(7).requires_grad_()
    targets = torch.tensor([0, -100, 3, 6, 2, -100, 1, 1, 5, 4, -100])
    counted = torch.tensor([1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 0], dtype=torch.bool)
    return hidden, weight, bias, draw(11, 6), draw(7, 6), targets, counted


def parts(targets, counted):
    return [
        TokenLoss(lambda s, t, _: soft_targets(s, t, 2.0, reduction="none"), targets != -100, torch.tensor(0.3)),
        TokenLoss(lambda s, t, _: generalized_jsd(s, t, 0.3, reduction="none"), counted, torch.tensor(0.2)),
    ]


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_equal_to_the_plain_formula(chunk):
    hidden, weight, bias, states, table, targets, counted = tensors()
    found = parts(targets, counted)
    total, sums = chunked_losses(
        hidden,
        Head(weight, bias),
        targets,
        torch.tensor(0.1),
        {"teacher": Given(states, Head(table, None))},
        found,
        chunk,
    )
    gradients = torch.autograd.grad(1.7 * total, (hidden, weight, bias))
    logits, given = F.linear(hidden, weight, bias), states @ table.t()
    plain = [
        F.cross_entropy(logits, targets, reduction="sum"),
        soft_targets(logits, given, 2.0, reduction="none")[targets != -100].sum(),
        generalized_jsd(logits, given, 0.3, reduction="none")[counted].sum(),
    ]
    torch.testing.assert_close(sums, torch.stack(plain).detach(), rtol=1e-6, atol=1e-6)
    expected = torch.autograd.grad(1.7 * (0.1 * plain[0] + 0.3 * plain[1] + 0.2 * plain[2]), (hidden, weight, bias))
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_nothing_counted_is_zero_with_a_live_graph():
    hidden, weight, _, states, table, targets, counted = tensors()
    nothing = torch.full_like(targets, -100)
    total, sums = chunked_losses(
        hidden,
        Head(weight, None),
        nothing,
        torch.tensor(1.0),
        {"teacher": Given(states, Head(table, None))},
        parts(nothing, counted & False),
        4,
    )
    assert total == 0 and not sums.any()
    assert not torch.autograd.grad(total, hidden)[0].any()


FAMILIES = ["llama", "qwen", "gpt2"]
TERMS = ["ForwardKL", dict(type="GeneralizedJSD", tokens="valid", weight=0.5), "HiddenStates"]


def trained(folder, family, chunked, terms=TERMS, kind=DistillTrainer, **settings):
    more = (
        {}
        if kind is not DistillTrainer
        else dict(teacher=support.model(family, 32, 4, seed=2), terms=terms, chunked=chunked)
    )
    more.update(settings.pop("more", {}))
    trainer = kind(
        model=support.quiet(support.model(family, seed=1)),
        args=support.arguments(folder, **{**dict(max_steps=3, learning_rate=0.1, optim="sgd"), **settings}),
        train_dataset=support.samples(12, "causal"),
        eval_dataset=support.samples(4, "causal"),
        data_collator=support.collate,
        **more,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_the_plain_one(family, accumulation, tmp_path):
    plain, ours = (
        trained(tmp_path, family, chunked, gradient_accumulation_steps=accumulation) for chunked in (False, 3)
    )
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(
            ours.model.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    for one, other in zip(plain.state.log_history, ours.state.log_history, strict=True):
        for key in one:
            if "loss" in key and "train" not in key:
                assert one[key] == pytest.approx(other[key], rel=1e-4), key
    assert "eval_loss" in ours.evaluate()
    assert any(row.adapter == "in chunks" for row in ours.distiller.rows)


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_several_teachers_are_those_of_whole_logits(mean, tmp_path):
    teachers = dict(a=support.model("llama", 32, 4, seed=2), b=support.model("llama", 24, 2, seed=3))
    teachers["both"] = Ensemble(["a", "b"], mean)
    terms = [dict(type="ForwardKL", source="a"), dict(type="GeneralizedJSD", source="both", tokens="valid")]
    terms += [dict(type="DSKD", source="b"), dict(type="HiddenStates", source="both")]
    told = dict(teacher=None, teachers=teachers, terms=terms)
    plain, ours = (trained(tmp_path, "llama", chunked, more={**told, "chunked": chunked}) for chunked in (False, 3))
    for name, value in plain.model.named_parameters():
        torch.testing.assert_close(
            dict(ours.model.named_parameters())[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    for key, value in plain.state.log_history[0].items():
        if "loss" in key:
            assert ours.state.log_history[0][key] == pytest.approx(value, rel=1e-4), key


def test_sources_that_change_and_vocabularies_that_differ_are_refused(tmp_path):
    with pytest.raises(WiringError, match="of frozen teachers, and 'teacher' is a Itself; leave out chunked"):
        trained(tmp_path, "llama", True, more=dict(teacher=Itself(momentum=0.9), terms=["ForwardKL"]))
    teachers = dict(a=support.model("llama", seed=2), b=support.model("llama", seed=3, vocab_size=48))
    told = dict(teacher=None, teachers={**teachers, "both": Ensemble(["a", "b"])})
    with pytest.raises(WiringError, match=r"the vocabularies of 'both' have 40 \(a\) and 48 \(b\) entries"):
        trained(tmp_path, "llama", True, more=dict(told, terms=[dict(type="ForwardKL", source="both")]))


def test_without_terms_only_the_hosts_loss_is_chunked(tmp_path):
    plain = trained(tmp_path, "llama", False, kind=Trainer)
    ours = trained(tmp_path, "llama", 4, terms=[dict(type="ForwardKL", weight=0)])
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_no_logits_are_held():
    student = graft(
        support.model("llama", vocab_size=5000, seed=1),
        support.model("llama", vocab_size=5000, seed=2),
        ["ForwardKL"],
        chunk=8,
    ).train()
    batch = support.collate(support.samples(8, "causal"))
    tokens = batch["input_ids"].numel()
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            sizes.append(
                max(
                    (
                        t.numel()
                        for t in (found if isinstance(found, (tuple, list)) else [found])
                        if isinstance(t, torch.Tensor)
                    ),
                    default=0,
                )
            )
            return found

    weights = max(p.numel() for p in student.parameters())
    with Watch():
        output = student(**batch)
        output.loss.backward()
    assert max(sizes) <= weights < tokens * 5000
    assert output.logits.shape[1] == 0
    assert student.lm_head.weight.grad.abs().sum() > 0


def test_a_term_that_is_not_finite_leaves_the_hosts_loss(tmp_path):
    from kdgraft_nlp import ForwardKL

    class Broken(ForwardKL):
        def compare(self, pairs):
            return super().compare(pairs) / 0

    plain = trained(tmp_path, "llama", False, kind=Trainer)
    ours = trained(tmp_path, "llama", 4, terms=[Broken()])
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert ours.distiller.dropped == {"broken": 3}


class Custom(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def test_refused(tmp_path):
    from kdgraft_nlp import distill

    with pytest.raises(DistillError, match="leave out label smoothing"):
        trained(tmp_path, "llama", True, label_smoothing_factor=0.1)
    own = Custom(model=support.model("llama"), args=support.arguments(tmp_path))
    with pytest.raises(DistillError, match="your own losses"):
        distill(own, teacher=support.model("llama", seed=2), terms=["ForwardKL"], chunked=True)
    with pytest.raises(DistillError, match="must be a whole number >= 1, got 0"):
        trained(tmp_path, "llama", 0)
    with pytest.raises(WiringError, match=r"universal_logits needs whole logits"):
        trained(tmp_path, "llama", True, terms=["UniversalLogits"])
    with pytest.raises(
        WiringError, match="is for causal language models, and BertForSequenceClassification is not one"
    ):
        graft(support.model("bert"), support.model("bert", seed=2), ["SoftTargets"], chunk=8)
    for kind, message in (
        (Shifted, "Shifted changes its logits after the output layer"),
        (Halved, "Halved changes its states before the output layer"),
    ):
        with pytest.raises(WiringError, match=message):
            graft(of(kind), support.model("llama"), ["ForwardKL"], chunk=8)
        with pytest.raises(WiringError, match=message):
            graft(support.model("llama"), of(kind), ["ForwardKL"], chunk=8)


def test_chunks_keep_small_gradients_in_half_precision():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 8, generator=generator).half().requires_grad_()
    weight = torch.randn(4096, 8, generator=generator).requires_grad_()
    targets = torch.tensor([1, 2, 3, 4])
    total, _ = chunked_losses(hidden, Head(weight, None), targets, torch.tensor(1 / 8192), {}, [], 2)
    (total * 65536).backward()
    plain = weight.detach().clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(hidden.detach().float() @ plain.t(), targets, reduction="sum") / 8192
    (loss * 65536).backward()
    torch.testing.assert_close(weight.grad, plain.grad, rtol=0.05, atol=0.02)
    assert hidden.grad.isfinite().all()


class Shifted(transformers.LlamaForCausalLM):
    """Adds to its logits, little beside those of a fresh model."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, logits_to_keep=0):
        output = super().forward(input_ids, attention_mask, labels=labels, logits_to_keep=logits_to_keep)
        output["logits"] = output["logits"] + 1e-5
        return output


class Halved(transformers.LlamaForCausalLM):
    """As MiniCPM3: the states are scaled before the output layer."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head.register_forward_pre_hook(lambda _, args: (args[0] / 2,))


class WithPenalty(transformers.LlamaForCausalLM):
    """As Bamba: a little of the logits' own size is added to the loss."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, logits_to_keep=0):
        output = super().forward(input_ids, attention_mask, labels=labels, logits_to_keep=logits_to_keep)
        if labels is not None:
            output["loss"] = output["loss"] + 1e-7 * output["logits"].logsumexp(-1).square().mean()
        return output


def of(kind):
    return kind(support.model("llama").config)


def test_what_chunks_cannot_do_is_refused():
    with pytest.raises(WiringError, match="WithPenalty adds another loss"):
        graft(of(WithPenalty), support.model("llama", seed=2), ["ForwardKL"], chunk=4)
    with pytest.raises(DistillError, match="chunked=True is for distillation only"):
        graft(support.model("llama"), None, [], chunk=4)


SIZES = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    intermediate_size=32,
    vocab_size=40,
    pad_token_id=0,
    attention_dropout=0.0,
)
MOE = dict(
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    num_experts=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    output_router_logits=True,
)
ODD = {
    "cap": ("Gemma2ForCausalLM", dict(final_logit_softcapping=30.0)),
    "small cap": ("Gemma2ForCausalLM", dict(final_logit_softcapping=0.01)),
    "no cap": ("Gemma2ForCausalLM", dict(final_logit_softcapping=None)),
    "multiplied": ("CohereForCausalLM", dict(logit_scale=0.0625)),
    "divided": ("GraniteForCausalLM", dict(logits_scaling=8.0)),
    "multiplied by what others divide by": ("HyperCLOVAXForCausalLM", dict(logits_scaling=0.5)),
    "routers": ("MixtralForCausalLM", dict(MOE)),
    "small routers": ("MixtralForCausalLM", dict(MOE, router_aux_loss_coef=1e-7)),
    "large routers": ("Qwen2MoeForCausalLM", dict(MOE, router_aux_loss_coef=0.5)),
    "routers switched off": ("MixtralForCausalLM", dict(MOE, output_router_logits=False)),
    "both": ("GraniteMoeForCausalLM", dict(MOE, router_aux_loss_coef=0.5, logits_scaling=4.0)),
}


def odd(name, seed):
    """A model whose logits are large enough for what becomes of them to matter."""
    kind, settings = ODD[name]
    found = getattr(transformers, kind)
    torch.manual_seed(seed)
    model = support.quiet(found(found.config_class(**{**SIZES, **settings})))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
        model.get_output_embeddings().weight.mul_(20)
    return model


@pytest.mark.parametrize("name", ODD)
def test_what_becomes_of_logits_and_loss_is_what_the_plain_model_does(name):
    batch = support.collate(support.samples(4, "causal"))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    plain, teacher = odd(name, 1).train(), odd(name, 2).eval()
    output = plain(**batch)
    with torch.no_grad():
        given = teacher(**inputs).logits[:, :-1].log_softmax(-1)
    counted = batch["labels"][:, 1:] != -100
    divergence = (given.exp() * (given - output.logits[:, :-1].log_softmax(-1))).sum(-1)[counted].mean()
    (output.loss + divergence).backward()
    student = graft(odd(name, 1), odd(name, 2), ["ForwardKL"], chunk=3).train()
    ours = student(**batch)
    torch.testing.assert_close(ours.loss, output.loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        student.distill_link.last.losses["distill.forward_kl.loss"], divergence, rtol=1e-4, atol=1e-6
    )
    ours.loss.backward()
    gradient = gradients(student)
    for key, value in gradients(plain).items():
        torch.testing.assert_close(
            gradient[key],
            value,
            rtol=1e-3,
            atol=1e-4 * float(value.abs().max()) + 1e-8,
            msg=lambda m, n=key: f"{n}: {m}",
        )


def test_student_and_teacher_keep_their_own_caps():
    batch = support.collate(support.samples(4, "causal"))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        s, t = (
            odd(name, seed).eval()(**inputs).logits[:, :-1].log_softmax(-1)
            for name, seed in (("cap", 1), ("divided", 2))
        )
    expected = (t.exp() * (t - s)).sum(-1)[batch["labels"][:, 1:] != -100].mean()
    student = graft(odd("cap", 1), odd("divided", 2), ["ForwardKL"], chunk=5).train()
    student(**batch)
    torch.testing.assert_close(
        student.distill_link.last.losses["distill.forward_kl.loss"], expected, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", ["cap", "routers", "both"])
def test_heads_are_found_in_half_precision(name):
    student = graft(odd(name, 1).bfloat16(), odd(name, 2).bfloat16(), ["ForwardKL"], chunk=8).train()
    exact = graft(odd(name, 1).bfloat16().float(), odd(name, 2).bfloat16().float(), ["ForwardKL"], chunk=8).train()
    batch = support.collate(support.samples(4, "causal"))
    torch.testing.assert_close(support.loss_of(student, batch), support.loss_of(exact, batch), rtol=0.1, atol=0)


def test_chunks_beside_terms_on_layers_alone():
    student = graft(
        support.quiet(support.model("llama", seed=1)), support.model("llama", 32, seed=2), ["HiddenStates"], chunk=4
    )
    batch = support.collate(support.samples(4, "causal"))
    plain = support.quiet(support.model("llama", seed=1))
    torch.testing.assert_close(student.train()(**batch).loss, plain(**batch).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_divergence_and_gradient_are_those_of_trl(tmp_path, beta):
    trl = pytest.importorskip("trl")

    def models():
        return [support.quiet(support.model("llama", width, 2, seed=seed)) for width, seed in ((16, 1), (32, 2))]

    student, teacher = models()
    tokenizer = support.by_letter("left")
    tokenizer.eos_token = "<pad>"
    told = dict(report_to=[], use_cpu=True, bf16=False, activation_checkpointing=False, per_device_train_batch_size=2)
    trainer = trl.DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=trl.DistillationConfig(str(tmp_path), beta=beta, **told),
        train_dataset=Dataset.from_dict({"prompt": ["a cat"] * 2}),
        processing_class=tokenizer,
    )
    ids = torch.randint(5, support.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    parts = {name: ids[:, cut] for name, cut in (("prompt_ids", slice(4)), ("completion_ids", slice(4, None)))}
    parts |= {name.replace("ids", "mask"): torch.ones_like(value) for name, value in parts.items()}
    expected = trainer.compute_loss(trainer.model.train(), parts)
    expected.backward()
    theirs = gradients(student)

    student, teacher = models()
    grafted = graft(student, teacher, [dict(type="GeneralizedJSD", beta=beta)], chunk=5).train()
    grafted.distill_link.host_weight = 0.0
    labels = ids.clone()
    labels[:, :4] = -100
    output = grafted(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    loss = grafted.distill_link.last.losses["distill.generalized_jsd.loss"]
    (output.loss + loss).backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-4, atol=1e-6)
    for name, value in theirs.items():
        torch.testing.assert_close(
            gradients(grafted)[name], value, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("entries", "tokens"), [(32_768, 128), (131_072, 32), (1_000_000, 16)])
def test_a_chunk_has_four_million_logits_and_sixteen_tokens_at_least(entries, tokens):
    config = transformers.LlamaConfig(
        vocab_size=entries, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
    )
    with torch.device("meta"):
        assert tokens_at_once(transformers.LlamaForCausalLM(config)) == tokens
