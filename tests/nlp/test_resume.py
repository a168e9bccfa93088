"""Resuming: from the newest complete checkpoint; what is missing or damaged is said, and never goes on in silence."""

from __future__ import annotations

import json
import random
import shutil
import zipfile

import pytest
import torch

from kdgraft import DistillError
from kdgraft.cli import main
from kdgraft_nlp import DistillTrainer
from support import nlp as support

STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "distiller.pt")
ESSENTIAL = ("model.safetensors", "trainer_state.json", "config.json")


def trainer(folder, steps=6, terms=("SoftTargets", "HiddenStates"), **settings):
    return DistillTrainer(
        model=support.model("bert", layers=1, seed=1),
        args=support.arguments(folder, max_steps=steps, save_strategy="steps", save_steps=2, **settings),
        train_dataset=support.samples(12),
        data_collator=support.collate,
        teacher=support.model("bert", 32, 1, seed=2),
        terms=list(terms),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps with checkpoints 2, 4 and 6, and its last weights."""
    folder = tmp_path_factory.mktemp("whole")
    done = trainer(folder)
    done.train()
    return folder, {key: value.clone() for key, value in done.model.state_dict().items()}


@pytest.fixture
def stopped(whole, tmp_path):
    """The same run, stopped after checkpoint 4."""
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    return tmp_path / "run"


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file, bit=None):
    """Flips a bit; by default one in the middle of what is stored, not in what pads it."""
    content = bytearray(file.read_bytes())
    if bit is None:
        stored = bytes(content)
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                stored = max((archive.read(name) for name in archive.namelist()), key=len)
        bit = 8 * (bytes(content).index(stored) + len(stored) // 2)
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def ends_like(found, whole):
    return all(torch.equal(value, whole[1][key]) for key, value in found.model.state_dict().items())


@pytest.mark.parametrize(
    ("kept", "half"),
    [
        (["config.json"], "model.safetensors"),
        (["config.json", "model.safetensors"], None),
        (["config.json", "model.safetensors"], "optimizer.pt"),
        (["config.json", "model.safetensors", "optimizer.pt", "scheduler.pt"], "distiller.pt"),
        (["config.json", "model.safetensors", *STATES], None),
        (["config.json", "model.safetensors", *STATES], "trainer_state.json"),
    ],
)
def test_a_run_killed_while_it_saved_goes_on_from_the_checkpoint_before(kept, half, stopped, whole, caplog):
    last = stopped / "checkpoint-4"
    for file in last.iterdir():
        if file.name == half:
            truncate(file)
        elif file.name not in kept:
            file.unlink()
    again = trainer(stopped)
    again.train(resume_from_checkpoint=True)
    assert ends_like(again, whole)
    said = [record.getMessage() for record in caplog.records if record.name == "kdgraft"]
    assert len(said) == 1 and said[0].startswith(f"resuming from {stopped / 'checkpoint-2'}, as ")
    assert f" in {last}" in said[0]


def test_the_newest_checkpoint_is_taken_without_a_word_where_it_is_complete(stopped, whole, caplog):
    again = trainer(stopped)
    again.train(resume_from_checkpoint=True)
    assert ends_like(again, whole) and again.state.global_step == 6
    assert not [record for record in caplog.records if record.name == "kdgraft"]


def test_a_weight_that_is_set_by_the_gradient_resumes_exactly(tmp_path):
    # Accumulated batches are measured one by one: after the second step three of the four.
    terms = [dict(type="SoftTargets", weight=dict(type="auto", batches=4)), dict(type="HiddenStates", weight="auto")]
    settings = dict(terms=terms, gradient_accumulation_steps=2, logging_steps=1)
    done = trainer(tmp_path, 5, **settings)
    done.train()
    logged = [
        entry["distill.soft_targets.share"] for entry in done.state.log_history if "distill.soft_targets.share" in entry
    ]
    assert len(logged) == 3 and all(0.05 < share < 2 for share in logged)
    again = trainer(tmp_path, 5, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert ends_like(again, (tmp_path, done.model.state_dict()))
    for name, term in done.distiller.terms.items():
        assert again.distiller.terms[name].weight == term.weight != 1


def test_a_weight_that_is_set_by_the_gradient_needs_the_models_own_loss(tmp_path):
    with pytest.raises(DistillError, match="compares with its model's own loss; leave out label smoothing"):
        trainer(tmp_path, terms=[dict(type="SoftTargets", weight="auto")], label_smoothing_factor=0.1)


@pytest.mark.parametrize("steps", [3, 5])
def test_a_run_that_is_over_makes_no_step_more(steps, tmp_path):
    # The host alone makes one, where the last step is within an epoch (here of three steps).
    done = trainer(tmp_path, steps, lr_scheduler_type="constant")
    done.train()
    again = trainer(tmp_path, steps, lr_scheduler_type="constant")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == steps
    assert ends_like(again, (tmp_path, done.model.state_dict()))


@pytest.mark.parametrize("name", [*STATES, *ESSENTIAL[:2]])
@pytest.mark.parametrize(("harm", "word"), [("unlink", "is missing"), (truncate, "is damaged"), (flip, "is damaged")])
def test_a_checkpoint_without_a_part_of_it_is_refused(name, harm, word, stopped):
    file = stopped / "checkpoint-4" / name
    file.unlink() if harm == "unlink" else harm(file)
    with pytest.raises(DistillError, match=rf"{name} {word} in .*checkpoint-4; .*\w") as caught:
        trainer(stopped).train(resume_from_checkpoint=str(stopped / "checkpoint-4"))
    assert f"{stopped / 'checkpoint-2'} is complete" in str(caught.value)


def test_nothing_complete_is_said_with_the_reasons(stopped):
    (stopped / "checkpoint-2" / "optimizer.pt").unlink()
    (stopped / "checkpoint-4" / "scheduler.pt").unlink()
    with pytest.raises(
        DistillError, match=r"scheduler.pt is missing in .*-4; optimizer.pt is missing in .*-2; .*--partial"
    ):
        trainer(stopped).train(resume_from_checkpoint=True)
    with pytest.raises(DistillError, match="there is no checkpoint in"):
        trainer(stopped / "elsewhere").train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", STATES)
def test_told_to_it_goes_on_and_says_what_begins_anew(name, stopped, whole, caplog):
    shutil.rmtree(stopped / "checkpoint-2")
    missing = stopped.parent / "missing"
    shutil.copytree(stopped, missing)
    (missing / "checkpoint-4" / name).unlink()
    flip(stopped / "checkpoint-4" / name)
    ends = []
    for folder in (stopped, missing):
        again = trainer(folder)
        again.train(resume_from_checkpoint=True, partial=True)
        ends.append(again)
        assert again.state.global_step == 6
    said = [record.getMessage() for record in caplog.records if record.name == "kdgraft"]
    assert f"{name} is damaged, so that it starts afresh" in said[0]
    assert f"{name} is missing, so that it starts afresh" in said[1]
    # Nothing of a damaged state is read: the run is the one without that file.
    assert all(torch.equal(value, ends[1].model.state_dict()[key]) for key, value in ends[0].model.state_dict().items())


def test_weights_are_never_begun_anew(stopped):
    shutil.rmtree(stopped / "checkpoint-2")
    (stopped / "checkpoint-4" / "model.safetensors").unlink()
    with pytest.raises(DistillError, match=r"cannot resume: model.safetensors is missing"):
        trainer(stopped).train(resume_from_checkpoint=True, partial=True)


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_is_found_or_changes_nothing(seed, stopped, whole):
    draw = random.Random(seed)
    shutil.rmtree(stopped / "checkpoint-2")
    file = stopped / "checkpoint-4" / ([*STATES, *ESSENTIAL] * 2)[seed]
    flip(file, draw.randrange(8 * file.stat().st_size))
    again, said = trainer(stopped), ""
    try:
        again.train(resume_from_checkpoint=True)
    except DistillError as error:
        said = str(error)
    assert f"{file.name} is damaged" in said or (not said and ends_like(again, whole))


def test_terms_without_state_need_none(stopped, tmp_path):
    plain = trainer(tmp_path / "plain", 2, terms=())
    plain.train()
    again = trainer(tmp_path / "plain", 4, terms=("SoftTargets",))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


def test_another_student_is_said_in_one_line(stopped):
    again = trainer(stopped)
    other = DistillTrainer(
        model=support.model("bert", 8, 1),
        args=again.args,
        train_dataset=again.train_dataset,
        data_collator=support.collate,
    )
    with pytest.raises(DistillError, match=r"cannot resume from .*checkpoint-4: ") as caught:
        other.train(resume_from_checkpoint=True)
    assert "\n" not in str(caught.value)


@pytest.fixture
def recipe(tmp_path):
    """A recipe file of a small plain training, trained for two steps with a checkpoint after each."""
    rows = [json.dumps({"text": f"word {i}", "label": i % 2}) for i in range(8)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    sizes = "hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16"
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"task: classification\ndata: {{train: {tmp_path}/a.jsonl}}\ntokenizer: {{vocab_size: 60}}\noutput: {tmp_path}/out\n"
        f"student: {{model_type: bert, {sizes}}}\n"
        "training: {use_cpu: true, max_steps: 2, save_steps: 1, logging_steps: 1, disable_tqdm: true}\n"
    )
    assert main(["train", str(path)]) == 0
    return path


def test_the_command_resumes_from_the_newest_complete_checkpoint(recipe, capsys):
    last = recipe.parent / "out" / "checkpoint-2"
    (last / "optimizer.pt").unlink()
    (recipe.parent / "out" / "checkpoint-best").mkdir()
    capsys.readouterr()
    line = support.refused(capsys, ["train", str(recipe), "--resume", str(last)])
    assert "optimizer.pt is missing" in line and "checkpoint-1 is complete" in line
    assert main(["train", str(recipe), "--resume", str(last), "--partial"]) == 0
    assert main(["train", str(recipe), "--resume"]) == 0
    assert (last / "optimizer.pt").is_file()


def test_partial_belongs_to_resume(recipe, capsys):
    assert main(["train", str(recipe), "--partial"]) == 2
    assert "--partial belongs to --resume" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path):
    run = trainer(tmp_path, 2)
    (tmp_path / "checkpoint-2" / "optimizer.pt").mkdir(parents=True)
    with pytest.raises(DistillError, match=r"^cannot write .*checkpoint-2: RuntimeError: .*Is a directory$"):
        run.train()
