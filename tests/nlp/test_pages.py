"""The examples in nlp/README.md run exactly as printed, from an empty folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.pages import program, run_program


def test_wrapping_a_trainer_as_printed(tmp_path: Path):
    said = run_program(program("distill(trainer", "DataCollatorWithPadding(tokenizer)", "AttentionMaps()"), tmp_path)
    for word in ("task_loss", "distill.soft_targets.loss", "distill.attention_maps.loss", "distill.hidden_states.loss"):
        assert word in said
    assert (tmp_path / "student" / "model.safetensors").is_file()
    assert {p.name for p in tmp_path.iterdir()} <= {"out", "student"}


def test_an_sft_trainer_with_adapters_as_printed(tmp_path: Path):
    pytest.importorskip("trl")
    said = run_program(program("SFTTrainer(", "peft_config="), tmp_path)
    for word in ("mean_token_accuracy", "task_loss", "distill.forward_kl.loss", "distill.hidden_states.loss"):
        assert word in said
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_an_embedding_model_as_printed(tmp_path: Path):
    pytest.importorskip("sentence_transformers")
    said = run_program(program("SentenceTransformerTrainer("), tmp_path)
    assert "distill.sample_embeddings.loss" in said and (tmp_path / "embedder" / "model.safetensors").is_file()


def test_a_store_as_printed(tmp_path: Path):
    said = run_program(program('fill_store(trainer(llama(32)), "store"'), tmp_path)
    assert "distill.forward_kl.loss" in said and (tmp_path / "store" / "store.json").is_file()


def test_a_server_as_printed(tmp_path: Path):
    said = run_program(program("teacher=Served("), tmp_path)
    assert "distill.forward_kl.loss" in said and {p.name for p in tmp_path.iterdir()} <= {"out", "teacher"}


def test_training_on_texts_of_the_student_as_printed(tmp_path: Path):
    said = run_program(program("OnPolicy(share=0.5", "DataCollatorForSeq2Seq"), tmp_path)
    for word in ("on_policy.fraction", "on_policy.seconds", "on_policy.length", "distill.generalized_jsd.loss"):
        assert word in said


def test_soft_labels_as_printed(tmp_path: Path):
    assert "distill.soft_targets.loss" in run_program(program('SoftLabels("soft", classes='), tmp_path)


def test_label_words_as_printed(tmp_path: Path):
    said = run_program(program("LabelWords(", "words.labelled(data"), tmp_path)
    assert "distill.soft_targets.loss" in said
    first = json.loads((tmp_path / "soft.jsonl").read_text().splitlines()[0])
    assert sum(first["soft_labels"]) == pytest.approx(1)


def test_a_detector_as_printed(tmp_path: Path):
    said = run_program(program("RTDetrForObjectDetection", "MatchedBoxes()"), tmp_path)
    for word in ("task_loss", "soft_targets", "matched_boxes", "hidden_states", "feature_imitation"):
        assert word in said
    assert (tmp_path / "student" / "model.safetensors").is_file()
