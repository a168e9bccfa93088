"""The command of the README that trains under FSDP2, as printed, on two processes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kdgraft_nlp.data import train_tokenizer

ROOT = Path(__file__).parents[2]
README = (ROOT / "nlp/README.md").read_text(encoding="utf-8")
# accelerate shards by FSDP2 on accelerators alone: a process of several on CPUs says that it is one, and notes what follows from it.
SITE = """
import os
from accelerate import state
from accelerate.utils import DistributedType

plain, accelerated = state.PartialState.__init__, state.AcceleratorState.__init__

def begin(self, *args, **settings):
    plain(self, *args, **settings)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU

def told(self, *args, **settings):
    accelerated(self, *args, **settings)
    rank = os.environ.get("RANK")
    if rank is not None and self.distributed_type == DistributedType.FSDP:
        with open(f"fsdp{self.fsdp_plugin.fsdp_version}.{rank}", "w"):
            pass

state.PartialState.__init__, state.AcceleratorState.__init__ = begin, told
"""
RECIPE = """
task: causal
data: {train: texts.jsonl, length: 8}
student: {model_type: llama, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 32}
teacher: teacher
recipe: gkd
training: {max_steps: 3, per_device_train_batch_size: 2, use_cpu: true, report_to: [], save_strategy: "no", logging_steps: 1}
output: student
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_under_fsdp2_trains_as_printed(tmp_path):
    (command,) = {
        line.strip()
        for line in README.splitlines()
        if line.strip().startswith("accelerate launch --config_file nlp/configs/fsdp2")
    }
    (tmp_path / "nlp").symlink_to(ROOT / "nlp")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SITE)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    texts = ["a fine film", "a dull film", "fine work", "dull work"] * 8
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    tokenizer = train_tokenizer(texts, vocab_size=60)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    paths = [str(tmp_path / "site"), *(str(ROOT / folder) for folder in ("plugins", "det", "seg", "nlp"))]
    told = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(shlex.split(command), cwd=tmp_path, env=told, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert sorted(path.name for path in tmp_path.glob("fsdp*")) == ["fsdp2.0", "fsdp2.1"]
    assert "distill.generalized_jsd.loss" in done.stdout and done.stdout.count("student in student") == 1
    student = LlamaForCausalLM.from_pretrained(tmp_path / "student")  # plain, and whole
    assert not [name for name in student.state_dict() if "distill" in name]
