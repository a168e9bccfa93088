"""Feature terms of the core on token states: padding counts in none of them."""

from __future__ import annotations

import pytest
import torch
import transformers

from kdgraft import Hint, WiringError
from kdgraft.batch import Batch
from kdgraft.taps import Tap
from kdgraft_nlp.student import graft
from kdgraft_nlp.tokens import read_batch
from support import nlp as support

STATES = {  # the last hidden state, without its padding: of the encoder, of the decoder
    "bert": "bert.encoder[last_hidden_state]",
    "llama": "model.layers.1",
    "t5": "encoder.final_layer_norm",
}


def pair(family, terms, width=16, **settings):
    student = support.quiet(support.model(family, 16, 2, 4, seed=1)).train()
    return graft(student, support.model(family, width, 2, 4, seed=2), terms, **settings)


def states(model, family, batch):
    """The tapped states of a plain model, the real tokens alone: ``(n, C)``."""
    found = []
    hook = model.get_submodule(Tap.parse(STATES[family]).path).register_forward_hook(
        lambda *seen: found.append(seen[2])
    )
    with torch.no_grad():
        model(**batch)
    hook.remove()
    value = found[0]
    value = value if isinstance(value, torch.Tensor) else value["last_hidden_state"]
    return value[batch["attention_mask"].bool()]


@pytest.mark.parametrize("extra", [0, 4])
@pytest.mark.parametrize("loss", ["hint", "cosine"])
@pytest.mark.parametrize("family", STATES)
def test_features_of_real_tokens_by_hand(family, loss, extra):
    task = support.TASKS[family][1]
    batch = support.collate(support.samples(6, task), extra)
    student, teacher = (
        support.quiet(support.model(family, 16, 2, 4, seed=1)),
        support.model(family, 16, 2, 4, seed=2).eval(),
    )
    s, t = states(student, family, batch), states(teacher, family, batch)
    expected = (s - t).square().mean() if loss == "hint" else (1 - torch.cosine_similarity(s, t, -1)).mean()
    for kind in ("FeatureImitation", "Hint"):
        built = pair(family, [dict(type=kind, tap=STATES[family], adapter="none", loss=loss)])
        torch.testing.assert_close(support.distilled_step(built, batch)[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("extra", [0, 4])
def test_correlation_over_real_tokens_by_hand(extra):
    batch = support.collate(support.samples(6), extra)
    plain = (support.quiet(support.model("bert", 16, 2, 4, seed=seed)).eval() for seed in (1, 2))
    s, t = (states(model, "bert", batch) for model in plain)
    expected = 1 - torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(s.T, t.T, strict=True)]).mean()
    built = pair("bert", [dict(type="PearsonImitation", tap=STATES["bert"])])
    torch.testing.assert_close(support.distilled_step(built, batch)[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "tap"),
    [
        ("bert", "bert.encoder[last_hidden_state]"),
        ("bert", "bert.embeddings"),
        ("bert", "bert.pooler"),
        ("llama", "model.layers.1.mlp"),
        ("t5", "encoder.block.0.layer.1"),
        ("t5", "decoder.final_layer_norm"),
        ("t5", "lm_head:input"),
        ("t5", "[encoder_last_hidden_state]"),
    ],
)
@pytest.mark.parametrize("kind", ["FeatureImitation", "PearsonImitation"])
def test_padding_changes_no_loss_and_no_gradient(kind, family, tap):
    built = pair(family, [dict(type=kind, tap=tap)], width=32)
    data = support.samples(6, support.TASKS[family][1])
    first, padded = (support.distilled_step(built, support.collate(data, extra)) for extra in (0, 5))
    assert first[0] > 0
    torch.testing.assert_close(first[0], padded[0], rtol=1e-4, atol=1e-6)
    for name, gradient in first[1].items():
        torch.testing.assert_close(gradient, padded[1][name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_an_infinity_on_padding_reaches_nothing():
    built = pair("bert", [dict(type="Hint", tap="bert.embeddings", adapter="none")])
    teacher = built.distiller.teacher.model
    batch = support.collate(support.samples(4))
    padding = ~batch["attention_mask"].bool()
    teacher.bert.embeddings.register_forward_hook(lambda *seen: seen[2].masked_fill(padding[..., None], torch.inf))
    loss, gradient = support.distilled_step(built, batch)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradient.values())
    assert not built.distiller.dropped["hint"]


def test_what_has_no_place_among_the_tokens_is_refused():
    query = "bert.encoder.layer.0.attention.self.attention()[query]"
    with pytest.raises(
        WiringError, match=r"hint: region 'all' cannot exclude the padding of .* tap states \(B, L, C\)"
    ):
        pair("bert", [Hint(query)])
    ids = torch.ones(2, 6, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    batch, whole = (
        read_batch({"input_ids": ids, "attention_mask": mask}, "masked"),
        read_batch({"input_ids": ids}, "masked"),
    )
    term, tap = Hint("pooled.layer"), Tap.parse("pooled.layer")
    halves = torch.zeros(2, 3, 4)  # as of a model that joins tokens two by two
    with pytest.raises(WiringError, match=r"\(2, 3, 4\) does not lie on the \(2, 6\) tokens of the batch"):
        term.region(batch.at(tap, halves), halves)
    assert term.region(whole.at(tap, halves), halves) is None  # nothing is padding
    apart = read_batch({"input_ids": ids, "attention_mask": mask, "token_pairs": torch.zeros(2, 3, 2).long()}, "masked")
    with pytest.raises(WiringError, match="the tokens of two tokenizers differ; use HiddenStates"):
        apart.at(tap, torch.zeros(2, 6, 4))
    assert term.region(apart.at(tap, torch.zeros(2, 4)), torch.zeros(2, 4)) is None  # a vector a text


def test_what_reads_images_has_no_padded_tokens():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    batch = read_batch(
        {"input_ids": torch.ones(2, 3).long(), "attention_mask": mask, "pixel_values": torch.ones(2, 3, 8, 8)}, "other"
    )
    patches, words = torch.zeros(2, 16, 4), torch.zeros(2, 3, 4)
    region = Hint("x").region
    assert region(batch.at(Tap.parse("model.vision_tower.encoder"), patches), patches) is None
    found = region(batch.at(Tap.parse("model.language_model.layers.0"), words), words)
    assert found is not None and found.tolist() == mask.tolist()


def test_padding_of_images_does_not_count():
    """DETR's processor pads images at the right and below and says so in pixel_mask."""
    mask = torch.zeros(2, 8, 16, dtype=torch.long)
    mask[0, :8, :8] = mask[1, :4, :16] = 1
    batch = read_batch({"pixel_values": torch.zeros(2, 3, 8, 16), "pixel_mask": mask}, "other")
    maps = torch.zeros(2, 5, 2, 4)  # cells of 4 × 4 pixels
    weight = Hint("x").region(batch.at(Tap.parse("backbone"), maps), maps)
    assert weight is not None and weight.tolist() == [[[1, 1, 0, 0], [1, 1, 0, 0]], [[1, 1, 1, 1], [0, 0, 0, 0]]]
    queries = torch.zeros(2, 8, 5)
    with pytest.raises(WiringError, match="contains padding of images"):
        batch.at(Tap.parse("model.encoder.layers.0"), queries)
    assert Hint("x").region(batch.at(Tap.parse("model.decoder.layers.0"), queries), queries) is None


def test_a_detectors_padded_images_change_nothing():
    config = transformers.DetrConfig
    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    sizes |= dict(encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=4, num_labels=3, use_pretrained_backbone=False)
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found = config(backbone_config=backbone, use_timm_backbone=False, backbone=None, dropout=0.0, **sizes)
        models.append(transformers.DetrForObjectDetection(found).eval())
    tap = "model.input_projection"
    images = torch.rand(1, 3, 32, 32)
    example = {"pixel_values": images, "pixel_mask": torch.ones(1, 32, 32).long()}
    padded = {"pixel_values": torch.nn.functional.pad(images, (0, 32)), "pixel_mask": torch.zeros(1, 32, 64).long()}
    padded["pixel_mask"][:, :, :32] = 1
    seen = []
    for model in models:
        hook = model.get_submodule(tap).register_forward_hook(lambda *call: seen.append(call[2].detach()))
        model(**padded)
        hook.remove()
    student = graft(models[0], models[1], [dict(type="Hint", tap=tap, adapter="none")], dry_run=example)
    for module in student.modules():
        module.training = module is student  # the batch statistics of the backbone stay out of it
    width = seen[0].shape[-1] // 2
    expected = (seen[0] - seen[1]).square()[..., :width].mean()
    torch.testing.assert_close(support.loss_of(student, padded).detach(), expected)


def test_the_cores_region_on_tokens_by_hand():
    tokens = torch.tensor([[True, True, False], [True, False, False]])
    region, batch = Hint("x").region, Batch(tokens=tokens)
    assert region(batch, torch.zeros(2, 3, 4)).tolist() == [[1, 1, 0], [1, 0, 0]]
    assert region(batch, torch.zeros(6, 4)).tolist() == [
        1,
        1,
        0,
        1,
        0,
        0,
    ]  # all tokens in one list, as routers see them
    assert region(batch, torch.zeros(2, 4)) is None
    for shape in ((3, 2, 4), (2, 4, 4), (5, 4), (2, 4, 3, 3)):
        with pytest.raises(WiringError, match="does not lie on the"):
            region(batch, torch.zeros(shape))
