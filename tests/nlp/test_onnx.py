"""Saved students as ONNX, by the command line."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from kdgraft.cli import main
from support.commands import refused

ort = pytest.importorskip("onnxruntime")


def save(built, folder):
    built.save_pretrained(folder)
    return str(folder)


def exported(folder, out, capsys, *more):
    capsys.readouterr()
    assert main(["export", folder, str(out), "--onnx", *more]) == 0
    return ort.InferenceSession(out), capsys.readouterr().out


@pytest.mark.parametrize(
    "kind",
    ["bert", "causal", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("seq2seq", "question", "choice"))],
)
def test_texts_of_any_number_and_length(kind, tmp_path, capsys):
    torch.manual_seed(0)
    built = MODELS[kind]().eval()
    session, said = exported(save(built, tmp_path / "student"), tmp_path / "student.onnx", capsys)
    assert "batch and length may vary" in said and "left out: tokenizer" in said
    shape = (3, 2, 9) if kind == "choice" else (3, 9)
    ids = torch.randint(3, 30, shape, generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given["attention_mask"][..., 6:] = 0
    if kind == "seq2seq":
        given["decoder_input_ids"] = ids[:, :4]
    with torch.no_grad():
        wanted = built(**given)
    names = [one.name for one in session.get_outputs()]
    assert names[0] in ("logits", "start_logits")
    found = dict(zip(names, session.run(None, {name: value.numpy() for name, value in given.items()}), strict=True))
    for name in names:
        if name.endswith("logits"):
            torch.testing.assert_close(torch.from_numpy(found[name]), wanted[name], atol=1e-5, rtol=1e-4)


SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40)


def of(kind, **told):
    def build():
        config = transformers.AutoConfig.for_model(kind, **told)
        return getattr(transformers, NAMES[kind])(config)

    return build


NAMES = {"llama": "LlamaForCausalLM", "t5": "T5ForConditionalGeneration", "vit": "ViTForImageClassification"}
MODELS = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)),
    "question": lambda: transformers.BertForQuestionAnswering(transformers.BertConfig(**SIZES)),
    "choice": lambda: transformers.BertForMultipleChoice(transformers.BertConfig(**SIZES)),
    "causal": of("llama", **SIZES),
    "seq2seq": of(
        "t5", d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=40, decoder_start_token_id=0
    ),
}


def test_images_in_any_number(tmp_path, capsys):
    torch.manual_seed(0)
    built = of(
        "vit",
        image_size=16,
        patch_size=8,
        num_labels=3,
        id2label={0: "a", 1: "b", 2: "c"},
        **{k: v for k, v in SIZES.items() if k != "vocab_size"},
    )()
    session, said = exported(save(built, tmp_path / "student"), tmp_path / "student.onnx", capsys)
    assert "batch may vary" in said
    assert session.get_modelmeta().custom_metadata_map["labels"] == "a, b, c"
    given = torch.randn(5, 3, 16, 16)
    found = torch.from_numpy(session.run(None, {"pixel_values": given.numpy()})[0])
    torch.testing.assert_close(found, built.eval()(given).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_classifier_without_a_padding_token_reads_one_text_at_a_time(tmp_path, capsys):
    torch.manual_seed(0)
    built = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3)).eval()
    session, said = exported(save(built, tmp_path / "student"), tmp_path / "student.onnx", capsys)
    assert "the length may vary" in said
    ids = torch.randint(3, 30, (1, 11))
    given = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    found = session.run(None, {one.name: given[one.name] for one in session.get_inputs()})[0]
    torch.testing.assert_close(torch.from_numpy(found), built(ids).logits, atol=1e-5, rtol=1e-4)


def test_refusals(tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    out = str(tmp_path / "student.onnx")
    refused(
        capsys, ["export", str(empty), out, "--onnx"], "empty is not the folder of a saved model: it has no config.json"
    )
    base = MODELS["causal"]()
    adapters = save(get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])), tmp_path / "adapters")
    refused(capsys, ["export", adapters, out, "--onnx"], "has adapters alone; merge them first")
    folder = save(MODELS["bert"](), tmp_path / "student")
    refused(capsys, ["export", folder, out, "--onnx", "--size", "8", "8"], "--size is for detectors and segmentors")
    refused(capsys, ["export", folder, str(tmp_path / "student.pth")], "is already plain", "or say --onnx")
    refused(capsys, ["export", folder, out, "--onnx", "--trusted"], "--trusted is for configs of MMDetection")
    refused(capsys, ["export", folder, out, "--size", "8", "8"], "--size belongs to --onnx")
    refused(capsys, ["export", folder, out], "student.onnx would hold weights for PyTorch; say --onnx")
