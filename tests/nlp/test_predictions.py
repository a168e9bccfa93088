"""Whose predictions are compared, and along which axis: multi-label models, segmentors, models that see and hear."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers

from kdgraft import DistillError, WiringError
from kdgraft.schedules import Step
from kdgraft_nlp import DistillTrainer, TeacherCache
from kdgraft_nlp.link import StudentStep
from kdgraft_nlp.student import graft
from kdgraft_nlp.tasks import decoder_inputs, task_of
from support import nlp as support
from support.detectors import detector
from support.nlp import built, kl, outputs
from support.segmentors import pictures, segformers
from support.tensors import gradients

SOFT = dict(type="SoftTargets", temperature=2.0)


def distilled(student, batch):
    """The distillation loss of one step, and the gradient."""
    student.train().zero_grad()
    loss = support.loss_of(student, batch)
    loss.backward()
    return loss.detach(), gradients(student)


# Classes that are right or wrong each on its own.


def bernoulli(student, teacher, temperature):
    """T²·KL of the two Bernoulli distributions of each class, written out."""
    p, q = (torch.sigmoid(x.double() / temperature) for x in (teacher, student))
    return temperature**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())


def multi_label(count=4):
    batch = support.collate(support.samples(count))
    batch["labels"] = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])[:count]
    return batch


def berts(**settings):
    return [support.quiet(support.model("bert", 16, seed=seed, **settings)) for seed in (1, 2)]


@pytest.mark.parametrize("said", ["by the labels", "by the config"])
def test_soft_targets_of_a_multi_label_model_are_those_of_each_class(said):
    settings = dict(problem_type="multi_label_classification") if said == "by the config" else {}
    batch = multi_label()
    if said == "by the config":
        del batch["labels"]
    plain = [outputs(model, batch).logits for model in berts()]
    student = graft(*berts(**settings), [dict(type="SoftTargets", temperature=2.0)])
    loss, gradient = distilled(student, batch)
    torch.testing.assert_close(loss, bernoulli(*plain, 2.0).mean().float(), rtol=1e-4, atol=1e-6)
    assert gradient["classifier.weight"].abs().sum() > 0
    # Moving all of the teacher's logits alike, to which softmax is blind, changes it.
    with torch.no_grad():
        student.distiller.teacher.model.classifier.bias += 1
    moved = bernoulli(plain[0], plain[1] + 1, 2.0).mean().float()
    torch.testing.assert_close(distilled(student, batch)[0], moved, rtol=1e-4, atol=1e-6)


def test_without_float_labels_soft_targets_are_over_all_classes():
    batch = support.collate(support.samples(4))
    plain = [outputs(model, batch).logits for model in berts()]
    loss, _ = distilled(graft(*berts(), [dict(type="SoftTargets", temperature=2.0)]), batch)
    torch.testing.assert_close(loss, 4 * kl(*plain, 2.0).mean(), rtol=1e-4, atol=1e-6)


def test_labels_that_are_shares_of_one_class_keep_softmax_where_the_config_says_so():
    batch = multi_label()
    plain = [outputs(model, batch).logits for model in berts()]
    student = graft(*berts(problem_type="single_label_classification"), [dict(type="SoftTargets", temperature=2.0)])
    own = {k: v for k, v in batch.items() if k != "labels"}
    with student.distill_link.asking(StudentStep(Step(), batch)):
        torch.testing.assert_close(distilled(student, own)[0], 4 * kl(*plain, 2.0).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("term", ["ForwardKL", "ReverseKL", "GeneralizedJSD", "SkewedKL"])
def test_other_divergences_of_multi_label_models_are_refused(term):
    with pytest.raises(WiringError, match=r"each class on its own \(multi_label_classification.*use SoftTargets"):
        graft(*berts(problem_type="multi_label_classification"), [term])
    with pytest.raises(DistillError, match=r"each class on its own.*use SoftTargets"):
        distilled(graft(*berts(), [term]), multi_label())


def test_outputs_that_do_not_mean_the_same_are_refused():
    student, teacher = berts()
    teacher.config.problem_type = "single_label_classification"
    with pytest.raises(DistillError, match="set the student's problem_type"):
        distilled(graft(student, teacher, ["SoftTargets"]), multi_label())
    student, teacher = berts(problem_type="multi_label_classification")
    teacher.config.problem_type = "single_label_classification"
    with pytest.raises(WiringError, match="set the same in both"):
        graft(student, teacher, [SOFT])


def test_numbers_to_be_predicted_are_refused_at_the_first_batch():
    batch = support.collate(support.samples(4))
    student = graft(*berts(), [SOFT]).train()
    asked = StudentStep(Step(), {**batch, "labels": torch.rand(4)})
    del batch["labels"]
    with (
        student.distill_link.asking(asked),
        pytest.raises(DistillError, match=r"float labels \(4,\) for logits \(4, 3\) are regression targets"),
    ):
        student(**batch)


def test_multi_label_images_too():
    models = [support.model("vit", seed=seed) for seed in (1, 2)]
    batch = support.collate(support.samples(3, "image"))
    batch["labels"] = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]])
    plain = [outputs(support.quiet(support.model("vit", seed=seed)), batch).logits for seed in (1, 2)]
    loss, _ = distilled(graft(*(support.quiet(m) for m in models), [SOFT]), batch)
    torch.testing.assert_close(loss, bernoulli(*plain, 2.0).mean().float(), rtol=1e-4, atol=1e-6)


class Tagger(transformers.BertPreTrainedModel):
    """A class of the user's own: nobody knows what its positions are."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = transformers.BertModel(config)
        self.out = torch.nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        states = self.bert(input_ids, attention_mask)[0]
        return transformers.modeling_outputs.TokenClassifierOutput(logits=self.shape(self.out(states)))

    def shape(self, logits):
        return logits


class Classifier(Tagger):
    """A class of the user's own, with one answer a sample."""

    def shape(self, logits):
        return logits[:, 0]


def own(kind, seed):
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=40
    )
    return support.quiet(kind(config))


def test_a_model_of_unknown_kind_with_an_answer_a_sample_is_a_classifier():
    batch = support.collate(support.samples(4))
    plain = [outputs(own(Classifier, seed), batch).logits for seed in (1, 2)]
    student = graft(own(Classifier, 1), own(Classifier, 2), ["ForwardKL"])
    torch.testing.assert_close(distilled(student, batch)[0], kl(*plain).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("term", ["SoftTargets", "ForwardKL", "UniversalLogits"])
def test_other_predictions_of_a_model_of_unknown_kind_are_refused(term):
    message = "of Tagger have no known class axis" if term != "UniversalLogits" else "language models"
    with pytest.raises(WiringError, match=message):
        graft(own(Tagger, 1), own(Tagger, 2), [term])
    graft(own(Tagger, 1), own(Tagger, 2), ["HiddenStates"])  # terms on layers work


def test_tokens_of_a_model_without_are_refused():
    with pytest.raises(WiringError, match="tokens='valid' is for labels per token, which"):
        graft(*berts(), [dict(type="SoftTargets", tokens="valid")])


# Models that see and hear, and write.

IMAGE = 3


def llavas():
    text = dict(
        model_type="llama",
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=16,
        vocab_size=40,
    )
    vision = dict(
        model_type="clip_vision_model",
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=8,
    )
    return [
        built(
            "LlavaForConditionalGeneration",
            seed,
            text_config={**text, "hidden_size": 8 * seed},
            vision_config=vision,
            image_token_index=IMAGE,
        )
        for seed in (1, 2)
    ]


def asked(rows=2):
    """An image of four tokens, a question and an answer, whose three tokens have labels."""
    ids = torch.tensor([[1, IMAGE, IMAGE, IMAGE, IMAGE, 5, 6, 7, 8, 9], [1, IMAGE, IMAGE, IMAGE, IMAGE, 9, 8, 7, 6, 5]])
    labels = ids.clone()
    labels[:, :7] = -100
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=images, labels=labels)
    return {name: value[:rows] for name, value in batch.items()}


@pytest.mark.parametrize("tokens", ["auto", "labelled"])
def test_a_vision_language_model_is_compared_where_it_predicts_the_answer(tokens):
    batch = asked()
    plain = [outputs(model, batch).logits[:, 6:9] for model in llavas()]
    student = graft(*llavas(), [dict(type="ForwardKL", tokens=tokens)])
    loss, _ = distilled(student, batch)
    torch.testing.assert_close(loss, kl(*plain).mean(), rtol=1e-4, atol=1e-6)
    assert student.distiller.counts(student.distill_link.read(batch))["forward_kl"] == 6


def test_a_vision_language_model_learns_from_a_text_model_only_with_its_inputs():
    text = built(
        "LlamaForCausalLM",
        3,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=16,
        vocab_size=40,
    )
    batch = asked()
    plain = [
        outputs(llavas()[0], batch).logits[:, 6:9],
        outputs(text, {"input_ids": batch["input_ids"]}).logits[:, 6:9],
    ]
    loss, _ = distilled(graft(llavas()[0], text, ["ForwardKL"]), batch)
    torch.testing.assert_close(loss, kl(*plain).mean(), rtol=1e-4, atol=1e-6)


def test_a_decoder_whose_labels_stand_where_they_are_predicted():
    settings = dict(
        d_model=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        vocab_size=40,
        max_position_embeddings=16,
        pad_token_id=0,
        dropout=0.0,
    )
    batch = support.collate(support.samples(2, "causal"))
    batch["labels"][:] = -100
    batch["labels"][0, 2] = 7
    models = [[built("BartForCausalLM", seed, **settings) for seed in (1, 2)] for _ in range(2)]
    plain = [outputs(model, batch).logits[0, 2] for model in models[0]]
    # The model's own loss is the cross-entropy at position 2, not 1.
    with torch.no_grad():
        assert torch.allclose(models[0][0](**batch).loss, -plain[0].log_softmax(-1)[7])
    loss, _ = distilled(graft(*models[1], ["ForwardKL"]), batch)
    torch.testing.assert_close(loss, kl(*plain), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("XLNetLMHeadModel", "aligned"),
        ("LlavaForConditionalGeneration", "causal"),
        ("Qwen2_5_VLForConditionalGeneration", "causal"),
        ("Qwen2AudioForConditionalGeneration", "causal"),
        ("FuyuForCausalLM", "causal"),
        ("WhisperForConditionalGeneration", "seq2seq"),
        ("VisionEncoderDecoderModel", "seq2seq"),
        ("Pix2StructForConditionalGeneration", "seq2seq"),
        ("BartForConditionalGeneration", "seq2seq"),
        ("Wav2Vec2ForCTC", "ctc"),
        ("Wav2Vec2ForSequenceClassification", "audio"),
        ("BertForMultipleChoice", "choice"),
        ("RTDetrForObjectDetection", "detection"),
        ("SegformerForSemanticSegmentation", "segmentation"),
        ("DiffusionGemmaForBlockDiffusion", "other"),
    ],
)
def test_tasks_are_told_by_class_and_decoder(kind, task):
    found = getattr(transformers, kind)

    class Stub(found):
        """The class without its weights."""

        def __init__(self):
            torch.nn.Module.__init__(self)
            self.config = found.config_class.__new__(found.config_class)
            self.config.__dict__["is_encoder_decoder"] = getattr(found.config_class, "is_encoder_decoder", False)

    assert task_of(Stub()) == task


def whispers(**settings):
    sizes = dict(
        vocab_size=40,
        num_mel_bins=4,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_source_positions=8,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        dropout=0.0,
    )
    return [
        built("WhisperForConditionalGeneration", seed, **{**sizes, "d_model": 8 * seed, **settings}) for seed in (1, 2)
    ]


def spoken(padding=0):
    labels = torch.tensor([[5, 6, 7, 2], [8, 9, 2, -100]])
    labels = torch.cat([labels, torch.full((2, padding), -100)], 1)
    return {"input_features": torch.rand(2, 4, 16, generator=torch.Generator().manual_seed(0)), "labels": labels}


SHIFTED = torch.tensor([[3, 5, 6, 7], [3, 8, 9, 2]])


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("tokens", ["auto", "valid"])
def test_whisper_is_compared_at_its_targets(given, tokens):
    inputs = {"input_features": spoken()["input_features"], "decoder_input_ids": SHIFTED}
    plain = [outputs(model, inputs).logits for model in whispers()]
    counted = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)
    expected = kl(*plain)[counted].mean()
    losses = []
    for padding in (0, 5):
        batch = spoken(padding)
        if given:
            batch["decoder_input_ids"] = torch.cat([SHIFTED, torch.zeros(2, padding, dtype=torch.long)], 1)
        losses.append(distilled(graft(*whispers(), [dict(type="ForwardKL", tokens=tokens)]), batch))
    torch.testing.assert_close(losses[0][0], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses[1][0], expected, rtol=1e-4, atol=1e-6)
    for name, value in losses[0][1].items():
        if "k_proj.bias" not in name:
            torch.testing.assert_close(losses[1][1].get(name, torch.zeros(())), value, rtol=1e-3, atol=1e-5)


def test_targets_are_moved_on_by_what_the_config_names():
    class Plain(torch.nn.Module):
        def __init__(self, **settings):
            super().__init__()
            self.config = transformers.PreTrainedConfig(**settings)
            self.config.decoder_start_token_id = settings.get("decoder_start_token_id")

    labels = torch.tensor([[5, 6, 2], [7, 2, -100]])
    moved = decoder_inputs(Plain(decoder_start_token_id=3, pad_token_id=0), labels)
    assert moved.tolist() == [[3, 5, 6], [3, 7, 2]]
    assert labels.tolist() == [[5, 6, 2], [7, 2, -100]]
    for settings in (dict(pad_token_id=0), dict(decoder_start_token_id=3)):
        missing = ({"pad_token_id", "decoder_start_token_id"} - set(settings)).pop()
        with pytest.raises(DistillError, match=f"its config lacks {missing}; set it, or add decoder_input_ids"):
            decoder_inputs(Plain(**settings), labels)


def test_targets_without_labels_or_mask_are_refused():
    batch = spoken()
    del batch["labels"]
    batch["decoder_input_ids"] = SHIFTED
    with pytest.raises(DistillError, match="decoder_attention_mask"):
        distilled(graft(*whispers(), ["ForwardKL"]), batch)
    batch["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    plain = [outputs(model, batch).logits for model in whispers()]
    loss, _ = distilled(graft(*whispers(), ["ForwardKL"]), batch)
    torch.testing.assert_close(loss, kl(*plain)[batch["decoder_attention_mask"].bool()].mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("term", ["HiddenStates", dict(type="HiddenStates", stack="decoder"), "AttentionMaps"])
def test_terms_on_layers_of_whisper(term):
    batch = spoken()
    loss, _ = distilled(graft(*whispers(), [term]), batch)
    assert loss > 0
    if isinstance(term, dict):
        torch.testing.assert_close(distilled(graft(*whispers(), [term]), spoken(3))[0], loss)


# Detectors, sound in frames, multiple choice.


def test_a_detector_that_calls_itself_an_encoder_decoder_learns_features():
    student, teacher = (detector("rtdetr", 16, seed) for seed in (1, 2))
    tap = "model.encoder.fpn_blocks[0]"
    batch = {"pixel_values": torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
    seen = []
    handle = teacher.model.encoder.fpn_blocks[0].register_forward_hook(lambda *call: seen.append(call[2]))
    outputs(teacher, batch)
    handle.remove()
    term = dict(type="FeatureImitation", tap=tap)
    grafted = graft(student, teacher, [term], dry_run=batch)
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}] * 2
    own = []
    handle = student.model.encoder.fpn_blocks[0].register_forward_hook(lambda *call: own.append(call[2]))
    loss, gradient = distilled(grafted, {**batch, "labels": labels})
    handle.remove()
    with torch.no_grad():
        adapted = grafted.distiller.terms["feature_imitation"].adapters[0](own[0], seen[0])
    torch.testing.assert_close(loss, (adapted - seen[0]).square().mean(), rtol=1e-4, atol=1e-6)
    assert any("encoder" in name and value.abs().sum() > 0 for name, value in gradient.items())


def listeners(kind="Wav2Vec2ForCTC", **settings):
    sizes = dict(
        vocab_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=[8, 8],
        conv_kernel=[10, 4],
        conv_stride=[5, 3],
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        layerdrop=0.0,
        mask_time_prob=0.0,
        apply_spec_augment=False,
        pad_token_id=0,
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
    )
    return [built(kind, seed, **{**sizes, "hidden_size": 8 * seed, **settings}) for seed in (1, 2)]


def heard(padding=0):
    """Two sounds of 400 and 250 samples."""
    sound = torch.randn(2, 400 + padding, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 400 + padding, dtype=torch.long)
    mask[0, :400], mask[1, :250] = 1, 1
    sound = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
    sound = torch.cat([sound, torch.zeros(2, padding)], 1) * mask
    return {"input_values": sound, "attention_mask": mask, "labels": torch.tensor([[3, 4, 5], [6, 7, -100]])}


# Convolutions of 10 by 5 and of 4 by 3: 400 samples -> 79 -> 26 frames, 250 -> 49 -> 16.
FRAMES = torch.arange(26) < torch.tensor([[26], [16]])


@pytest.mark.parametrize("term", [SOFT, "HiddenStates", dict(type="HiddenStates", loss="cosine")])
def test_a_mask_of_samples_counts_frames(term):
    batch = heard()
    student = graft(*listeners(), [term])
    loss, _ = distilled(student, batch)
    counts = student.distiller.counts(student.distill_link.read(batch))
    assert list(counts.values()) == [42]
    if term is SOFT:
        plain = [outputs(model, batch).logits for model in listeners()]
        torch.testing.assert_close(loss, 4 * kl(*plain, 2.0)[FRAMES].mean(), rtol=1e-4, atol=1e-6)
    padded, _ = distilled(graft(*listeners(), [term]), heard(150))
    torch.testing.assert_close(padded, loss, rtol=1e-4, atol=1e-6)


def test_a_classifier_of_sounds():
    kind = "Wav2Vec2ForSequenceClassification"
    batch = {**heard(), "labels": torch.tensor([0, 2])}
    plain = [outputs(model, batch).logits for model in listeners(kind, num_labels=3)]
    student = graft(*listeners(kind, num_labels=3), [SOFT, "HiddenStates"])
    distilled(student, batch)
    losses = student.distill_link.last.losses
    torch.testing.assert_close(losses["distill.soft_targets.loss"], 4 * kl(*plain, 2.0).mean(), rtol=1e-4, atol=1e-6)
    assert losses["distill.hidden_states.loss"] > 0


def test_labels_that_are_no_frames_cannot_say_which_count():
    with pytest.raises(WiringError, match="tokens='labelled' is for labels per token, which"):
        graft(*listeners(), [dict(type="SoftTargets", tokens="labelled")])


def quizzed(extra=0):
    """Three questions with four choices of their own lengths."""
    lengths = torch.tensor([[3, 5, 4, 2], [5, 5, 3, 4], [2, 3, 4, 5]])
    ids = torch.randint(5, 40, (3, 4, 5), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(5) < lengths[..., None]).long()
    ids, mask = (torch.cat([x, torch.zeros(3, 4, extra, dtype=torch.long)], -1) for x in (ids * mask, mask))
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 3, 1])}


def choosers():
    return [support.quiet(support.model("bert", 16 * seed, seed=seed, kind="BertForMultipleChoice")) for seed in (1, 2)]


def test_soft_targets_of_multiple_choice_are_over_the_choices():
    batch = quizzed()
    plain = [outputs(model, batch).logits for model in choosers()]
    assert plain[0].shape == (3, 4)
    student = graft(*choosers(), [SOFT])
    torch.testing.assert_close(distilled(student, batch)[0], 4 * kl(*plain, 2.0).mean(), rtol=1e-4, atol=1e-6)
    assert student.distiller.counts(student.distill_link.read(batch))["soft_targets"] == 3


@pytest.mark.parametrize(
    ("term", "count"),
    [
        ("HiddenStates", 45),
        ("Embeddings", 45),
        ("AttentionMaps", None),
        (dict(type="Relations", of=("query", "value")), 12),
        (dict(type="PatientStates", layers="last"), 12),
    ],
)
def test_layers_see_each_choice_as_a_text(term, count):
    student = graft(*choosers(), [term])
    loss, _ = distilled(student, quizzed())
    torch.testing.assert_close(distilled(student, quizzed(3))[0], loss, rtol=1e-4, atol=1e-6)
    counts = student.distiller.counts(student.distill_link.read(quizzed()))
    if count is not None:
        assert list(counts.values()) == [count]
    # The same choices as plain texts of the encoder beneath.
    flat = {name: value.flatten(0, 1) for name, value in quizzed().items() if name != "labels"}
    texts = graft(*(model.bert for model in choosers()), [term]).train()
    texts.distiller.terms.load_state_dict(student.distiller.terms.state_dict())
    torch.testing.assert_close(support.loss_of(texts, flat), loss, rtol=1e-4, atol=1e-6)


def test_states_of_several_texts_a_sample_are_not_cached():
    cache = TeacherCache()
    student = graft(*choosers(), ["SoftTargets", "HiddenStates"], cache=cache).train()
    with pytest.raises(WiringError, match=r"12 rows for 3 samples.*leave out the cache or the term"):
        student(**quizzed(), sample_ids=["a", "b", "c"])


def test_outputs_of_decoders_and_frames_are_not_cached():
    for models in (whispers(), listeners()):
        with pytest.raises(WiringError, match=r"outputs for input tokens only, .*; leave out the cache"):
            graft(*models, ["SoftTargets"], cache=TeacherCache())


EVERY = {
    "segmentation": (segformers, pictures, dict(type="SoftTargets")),
    "vision-language": (llavas, asked, dict(type="ForwardKL")),
    "whisper": (whispers, spoken, dict(type="ForwardKL")),
    "frames": (listeners, heard, dict(type="SoftTargets")),
    "choice": (choosers, quizzed, dict(type="SoftTargets")),
    "multi-label": (berts, multi_label, dict(type="SoftTargets")),
}


@pytest.mark.parametrize("kind", EVERY)
def test_accumulated_batches_train_as_one(kind, tmp_path):
    make, inputs, term = EVERY[kind]
    rows = [dict(zip(inputs(), values, strict=True)) for values in zip(*inputs().values(), strict=True)][:2]
    found = []
    for size in (1, 2):
        student, teacher = make()
        for module in student.modules():  # a batch's own statistics are not those of two
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum, module.track_running_stats = 0.0, True
                module.forward = lambda x, m=module: F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias)
        trainer = DistillTrainer(
            model=student,
            teacher=teacher,
            terms=[term],
            args=support.arguments(
                tmp_path, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=2 // size
            ),
            train_dataset=rows,
            data_collator=lambda features: {k: torch.stack([f[k] for f in features]) for k in features[0]},
        )
        trainer.train()
        found.append(next(v for k, v in trainer.state.log_history[0].items() if k.startswith("distill.")))
    assert found[0] == pytest.approx(found[1], rel=1e-3) and found[0] > 0


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ASTForAudioClassification", dict(max_length=64, num_mel_bins=16)),
        ("VideoMAEForVideoClassification", dict(image_size=8, patch_size=4, num_frames=2, tubelet_size=2)),
        ("Wav2Vec2BertForCTC", dict(vocab_size=12)),
    ],
)
def test_the_dry_run_is_made_of_sound_and_video(kind, settings):
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    student = graft(*(built(kind, seed, **sizes, **settings) for seed in (1, 2)), ["SoftTargets"])
    assert len(student.distiller.rows) == 1


def test_a_vision_language_model_in_chunks():
    batch = asked()
    plain = llavas()
    scores = [outputs(model, batch).logits[:, 6:9] for model in plain]
    host = plain[0].train()(**batch).loss
    student = graft(*llavas(), ["ForwardKL"], chunk=2).train()
    output = student(**batch)
    torch.testing.assert_close(output.loss, host, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        student.distill_link.last.losses["distill.forward_kl.loss"], kl(*scores).mean(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("kind", EVERY)
def test_a_batch_of_training_serves_as_the_dry_run(kind):
    make, inputs, term = EVERY[kind]
    batch = inputs()
    given = graft(*make(), [term], dry_run=batch)
    made = graft(*make(), [term])
    torch.testing.assert_close(distilled(given, batch)[0], distilled(made, batch)[0])


def test_a_batch_of_training_serves_as_the_dry_run_of_chunks():
    student = graft(*llavas(), ["ForwardKL"], chunk=2, dry_run={**asked(), "sample_ids": ["a", "b"]})
    assert student.distiller.rows[0].adapter == "in chunks"
