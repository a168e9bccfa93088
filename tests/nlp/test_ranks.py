"""One batch of 8 ≡ 8 accumulated batches of 1 ≡ two processes with 4 each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support import nlp as support
from support import nlp_ranks
from support.processes import found_by_two

HERE = Path(__file__).parents[1]


def close(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def without_host(found, plain):
    return {name: g - plain.get(name, 0) for name, g in found.items()}


@pytest.mark.parametrize("family", list(nlp_ranks.TERMS))
def test_accumulated_batches_are_one_batch(family, tmp_path):
    terms = nlp_ranks.TERMS[family]
    found = {}
    for batch, accumulation in ((8, 1), (2, 4), (1, 8), (3, 3)):
        whole = nlp_ranks.gradients(family, tmp_path, terms, batch, accumulation).found
        host = nlp_ranks.gradients(family, tmp_path, [], batch, accumulation).found
        # BERT's own loss is added up over micro-batches; what distilling adds is not.
        found[batch] = without_host(whole, host)
        if family == "llama":
            found[batch, "host"] = host
    for batch in (2, 1, 3):
        close(found[8], found[batch])
        if family == "llama":
            close(found[8, "host"], found[batch, "host"])


def test_the_host_adds_up_what_it_does_not_scale(tmp_path, caplog):
    """A fact of the host, pinned: BERT ignores num_items_in_batch and the Trainer takes its loss to be scaled."""
    one = nlp_ranks.gradients("bert", tmp_path, [], 8, 1).found
    many = nlp_ranks.gradients("bert", tmp_path, [], 2, 4).found
    close({name: 4 * g for name, g in one.items()}, many)
    assert not caplog.records
    nlp_ranks.gradients("bert", tmp_path, ["SoftTargets"], 2, 4)
    assert [r.message for r in caplog.records if "ignores num_items_in_batch" in r.message].__len__() == 1
    caplog.clear()
    nlp_ranks.gradients("llama", tmp_path, ["ForwardKL"], 2, 4)
    assert not caplog.records


def on_two_processes(family, tmp_path):
    """What the first of two processes with four samples each has found."""
    return found_by_two("nlp_ranks", tmp_path, family, str(tmp_path), host="transformers")[0]


@pytest.mark.parametrize("family", list(nlp_ranks.TERMS))
def test_two_processes_are_one(family, tmp_path):
    found = on_two_processes(family, tmp_path)
    alone = nlp_ranks.gradients(family, tmp_path, nlp_ranks.TERMS[family], 8, 1)
    host = nlp_ranks.gradients(family, tmp_path, [], 8, 1).found
    # The Trainer multiplies a loss that it takes to be scaled by the number of processes; BERT's is not.
    times = 2 if family == "bert" else 1
    doubled = {name: times * g for name, g in host.items()}
    close(without_host(alone.found, host), without_host(found["gradient"], doubled))
    mine = next(entry for entry in alone.state.log_history if "distill.hidden_states.loss" in entry)
    for name in mine:
        if name.startswith("distill."):
            assert found["logged"][name] == pytest.approx(mine[name], rel=1e-3), name


@pytest.mark.parametrize("family", list(nlp_ranks.WITHOUT_LABELS))
def test_without_labels_too(family, tmp_path):
    terms = nlp_ranks.WITHOUT_LABELS[family]
    whole = nlp_ranks.gradients(family, tmp_path, terms, 8, 1).found
    assert any(gradient.any() for gradient in whole.values())
    close(whole, nlp_ranks.gradients(family, tmp_path, terms, 2, 4).found)
    close(whole, on_two_processes(family, tmp_path)["gradient"])


@pytest.mark.parametrize("family", list(nlp_ranks.DETECTORS))
def test_detectors_too(family, tmp_path):
    terms = nlp_ranks.DETECTORS[family]
    whole = nlp_ranks.gradients(family, tmp_path, terms, 8, 1)
    for batch, accumulation in ((1, 8), (3, 3)):
        close(whole.found, nlp_ranks.gradients(family, tmp_path, terms, batch, accumulation).found)
    two = on_two_processes(family, tmp_path)
    close(whole.found, two["gradient"])
    mine = next(entry for entry in whole.state.log_history if "distill.hidden_states.loss" in entry)
    losses = [name for name in mine if name.endswith(".loss") and name.startswith("distill.")]
    assert len(losses) == len(terms)
    for name in losses:
        assert mine[name] > 0 and two["logged"][name] == pytest.approx(mine[name], rel=1e-3), name


def test_attention_between_two_models_is_that_of_all_processes(tmp_path):
    (family,) = nlp_ranks.ATTENTION
    alone = nlp_ranks.gradients(family, tmp_path, nlp_ranks.ATTENTION[family], 8, 1).found
    close(alone, on_two_processes(family, tmp_path)["gradient"])


def test_one_process_on_several_gpus_is_refused(tmp_path, monkeypatch):
    from kdgraft import DistillError
    from kdgraft_nlp import DistillTrainer

    arguments = support.arguments(tmp_path)
    arguments._n_gpu = 2
    monkeypatch.setattr(type(arguments), "n_gpu", property(lambda self: 2))
    with pytest.raises(DistillError, match="accelerate launch"):
        DistillTrainer(
            model=support.model("bert"), teacher=support.model("bert"), terms=["SoftTargets"], args=arguments
        )
