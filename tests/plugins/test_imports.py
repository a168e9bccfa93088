"""The core imports no host framework and nothing that only demos and tables need."""

from __future__ import annotations

import subprocess
import sys

import pytest

FOREIGN = ("mmengine", "mmdet", "mmseg", "mmcv", "transformers", "sklearn", "pandas", "matplotlib", "scipy", "cv2")


@pytest.mark.parametrize("module", ["kdgraft", "kdgraft.cli"])
def test_import(module: str):
    program = f"import sys, {module}; print(sorted(set({FOREIGN!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def test_everything_that_is_promised_is_there():
    import kdgraft

    assert len(set(kdgraft.__all__)) == len(kdgraft.__all__)
    for name in kdgraft.__all__:
        assert getattr(kdgraft, name) is not None
