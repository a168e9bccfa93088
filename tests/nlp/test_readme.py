"""The example in nlp/README.md runs exactly as printed, from an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "nlp" / "README.md"


def test_wrapping_a_trainer_as_printed(tmp_path):
    program = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)[1]
    assert "distill(trainer" in program
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for word in ("task_loss", "distill.soft_targets.loss", "distill.attention_maps.loss", "distill.hidden_states.loss"):
        assert word in done.stdout
    assert (tmp_path / "student" / "model.safetensors").is_file()
    assert {p.name for p in tmp_path.iterdir()} <= {"out", "student"}
