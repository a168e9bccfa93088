"""Shared real material, made once a session: scenes, teachers' checkpoints, and the runs that many tests look at."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
from mmengine.logging import MessageHub
from mmengine.registry import DefaultScope

from support import det as models
from support.mm import Trained, run, zeros_for_weights  # noqa: F401  a fixture

_numbers = count()


def _enter_mmdet() -> None:
    name = f"det_test{next(_numbers)}"
    DefaultScope.get_instance(name, scope_name="mmdet")
    MessageHub.get_instance(name)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before fixtures of any scope: the test before this one may have been another host's."""
    _enter_mmdet()


@pytest.fixture(autouse=True)
def _fresh_scope_and_hub():
    """What a shared fixture's Runner left, its scope and its iteration in mmengine's hub, is no business of this test."""
    _enter_mmdet()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return models.scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="session")
def teacher_model() -> dict:
    return models.detector(width=6, channels=12)


@pytest.fixture(scope="session")
def teacher_checkpoint(tmp_path_factory: pytest.TempPathFactory, teacher_model: dict) -> str:
    return models.save_teacher(Path(tmp_path_factory.mktemp("teacher")) / "teacher.pth", teacher_model)


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory: pytest.TempPathFactory, scenes: str) -> Trained:
    """The plain student, 4 iterations."""
    work_dir = tmp_path_factory.mktemp("plain")
    return Trained(run(models.runner_config(models.detector(), scenes, work_dir)), work_dir)


@pytest.fixture(scope="session")
def distilled_run(
    tmp_path_factory: pytest.TempPathFactory, scenes: str, teacher_model: dict, teacher_checkpoint: str
) -> Trained:
    """The student with every term, 4 iterations without a stop, checkpoints after 2 and 4."""
    work_dir = tmp_path_factory.mktemp("distilled")
    model = models.distilled(models.detector(), teacher_model, teacher_checkpoint, **models.EVERY_TERM)
    return Trained(run(models.runner_config(model, scenes, work_dir)), work_dir)
