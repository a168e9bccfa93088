"""The host's own scripts work on a distilled config as they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mmdet
import pytest
import torch

from support.det import detector, distilled, runner_config

TOOLS = Path(mmdet.__file__).parent / ".mim" / "tools"


@pytest.mark.slow
def test_mmdets_train_and_test_scripts_run_a_distilled_config(tmp_path, scenes, teacher_model, teacher_checkpoint):
    model = distilled(detector(), teacher_model, teacher_checkpoint, recipe="ld")
    config = tmp_path / "distilled.py"
    work = tmp_path / "work"
    runner_config(model, scenes, work, iters=2).dump(config)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for script, arguments in (("train.py", []), ("test.py", [str(work / "iter_2.pth")])):
        done = subprocess.run(
            [sys.executable, str(TOOLS / script), str(config), *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    saved = torch.load(work / "iter_2.pth", weights_only=False)
    assert not [key for key in saved["state_dict"] if "distiller" in key]
    assert "distill.ld_main.loss" in " ".join(saved["message_hub"]["log_scalars"])
