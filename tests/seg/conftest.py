"""Shared real material, made once a session: scenes, a teacher's checkpoint, and the runs that many tests look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support import seg as models
from support.mm import Trained, run, zeros_for_weights  # noqa: F401  a fixture


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before fixtures of any scope: the test before this one may have been another host's."""
    models.enter_host()


@pytest.fixture(autouse=True)
def _in_mmseg():
    """After shared fixtures, whose Runners have a hub of their own."""
    models.enter_host()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A wider PSPNet."""
    return models.save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth")


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Trained:
    """The plain student, 4 iterations."""
    work_dir = tmp_path_factory.mktemp("plain")
    return Trained(run(models.config(models.segmentor(), scenes, work_dir)), work_dir)


@pytest.fixture(scope="session")
def distilled_run(tmp_path_factory: pytest.TempPathFactory, scenes: Path, teacher: dict[str, Any]) -> Trained:
    """The student with every term, 4 iterations without a stop, checkpoints after 2 and 4; nothing of the host's draws."""
    work_dir = tmp_path_factory.mktemp("distilled")
    model = models.distilled(models.segmentor(dropout=0.0), teacher, **models.EVERY_TERM)
    return Trained(run(models.config(model, scenes, work_dir)), work_dir)
