"""The line by which a run says what it does."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from kdgraft import Distiller, Ensemble, Itself
from kdgraft.fit import fit
from kdgraft.telling import announced, said_aloud

X = torch.ones(2, 3)


class Small(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)


class Large(Small):
    name_or_path = "folder/large"


def test_from_whom_into_what_by_which_terms():
    one = Distiller(Small(), Small(), terms=["SoftTargets", "LogitMatching"], example=X)
    assert announced(one, one.student) == "distilling Small into Small with soft_targets, logit_matching"
    sources = {"a": Small(), "b": Large(), "both": Ensemble(["a", "b"]), "own": Itself()}
    terms = [dict(type="SoftTargets", source="both"), dict(type="Hint", tap="", source="own")]
    several = Distiller(Small(), terms=terms, example=X, teachers=sources)
    expected = (
        "distilling a: Small, b: Large (folder/large), both: the mean of a and b, own: Itself into Small with "
        "mine: soft_targets, hint"
    )
    assert announced(several, several.student, "mine") == expected
    assert announced(several, several.student, dict(type="mine", weight=2)) == expected


def test_fit_says_it_once(caplog: pytest.LogCaptureFixture):
    model = Distiller(Small(), Small(), terms=["SoftTargets"], example=X)
    with caplog.at_level(logging.INFO, "kdgraft"):
        fit(model, [(X, torch.tensor([0, 1]))], nn.functional.cross_entropy, epochs=2)
        fit(Small(), [(X, torch.tensor([0, 1]))], nn.functional.cross_entropy, epochs=1)
    assert [record.getMessage() for record in caplog.records] == ["distilling Small into Small with soft_targets"]


def test_it_is_heard_on_stderr_where_nothing_is_set_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    logger = logging.getLogger("kdgraft")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", False)
    logger.setLevel(logging.NOTSET)
    with said_aloud():
        logger.info("distilling")
    logger.info("silent")
    assert capsys.readouterr().err == "distilling\n"
    with said_aloud(), said_aloud():  # a program that has set up logging has its own way
        logger.info("once")
    assert capsys.readouterr().err == "once\n"
    assert logger.handlers == [] and logger.level == logging.NOTSET
