"""The example in nlp/README.md runs exactly as printed, from an empty folder."""

from __future__ import annotations

from pathlib import Path

from support.pages import PROGRAMS, program, run_program


def test_wrapping_a_trainer_as_printed(tmp_path: Path):
    (code,) = [p.text for p in PROGRAMS if p.page == "nlp/README.md" and "distill(trainer" in p.text]
    said = run_program(code, tmp_path)
    for word in ("task_loss", "distill.soft_targets.loss", "distill.attention_maps.loss", "distill.hidden_states.loss"):
        assert word in said
    assert (tmp_path / "student" / "model.safetensors").is_file()
    assert {p.name for p in tmp_path.iterdir()} <= {"out", "student"}


def test_training_on_texts_of_the_student_as_printed(tmp_path: Path):
    said = run_program(program("OnPolicy(share=0.5", "DataCollatorForSeq2Seq"), tmp_path)
    for word in ("on_policy.fraction", "on_policy.seconds", "on_policy.length", "distill.generalized_jsd.loss"):
        assert word in said
