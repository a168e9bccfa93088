"""Shared real material, made once a session: scenes and teachers' checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

import det_support as models


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return models.scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="session")
def teacher_model() -> dict:
    return models.detector(width=6, channels=12)


@pytest.fixture(scope="session")
def teacher_checkpoint(tmp_path_factory: pytest.TempPathFactory, teacher_model: dict) -> str:
    return models.save_teacher(Path(tmp_path_factory.mktemp("teacher")) / "teacher.pth", teacher_model)
