"""Resuming in mmengine: nothing in a checkpoint runs, nothing missing goes unsaid, no run starts anew in silence."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import checkpoint as host
from torch import nn

from kdgraft.cli import main
from kdgraft.errors import UnsafeCheckpoint
from kdgraft.files import held
from kdgraft.sources.teacher import read_checkpoint
from kdgraft_mm.checkpoints import SAFE_TYPES
from kdgraft_mm.resuming import safe_loading
from support.commands import refused
from support.processes import free_port
from support.tensors import Payload

pytestmark = pytest.mark.skipif(
    not hasattr(host, "_safe_torch_load"), reason="upstream mmengine cannot load its own checkpoints on torch >= 2.6"
)
_names = count()


@pytest.fixture(autouse=True, scope="module")
def registered():
    """A model and a data set that configs can name."""

    class TinyModel(BaseModel):
        def __init__(self, init_cfg=None) -> None:
            super().__init__(init_cfg=init_cfg)
            self.layer = nn.Linear(2, 1)

        def forward(self, inputs, mode="loss"):
            return {"loss": self.layer(torch.stack(list(inputs))).square().mean()}

    class TinySet(torch.utils.data.Dataset):
        metainfo: ClassVar = dict(classes=("a",))

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return dict(inputs=torch.tensor([1.0, float(index)]))

    class DroppingModel(TinyModel):
        def forward(self, inputs, mode="loss"):
            return super().forward(nn.functional.dropout(torch.stack(list(inputs)), 0.3, self.training), mode)

    class DrawnSet(TinySet):
        def __getitem__(self, index):
            drawn = random.random() + np.random.rand() + float(torch.rand(()))
            return dict(inputs=torch.tensor([drawn, float(index)]))

    models, sets = (TinyModel, DroppingModel), (TinySet, DrawnSet)
    for registry, classes in ((MODELS, models), (DATASETS, sets)):
        for made in classes:
            registry.register_module(module=made)
    yield
    for registry, classes in ((MODELS, models), (DATASETS, sets)):
        for made in classes:
            registry.module_dict.pop(made.__name__)


@pytest.fixture
def config(tmp_path):
    """Writes a config that trains in ``tmp_path / "work"``, a checkpoint an iteration."""

    def write(iters: int = 3, **settings) -> str:
        entries = dict(
            default_scope="mmengine",
            model=dict(type="TinyModel"),
            work_dir=str(tmp_path / "work"),
            train_dataloader=dict(
                batch_size=2,
                num_workers=0,
                sampler=dict(type="DefaultSampler", shuffle=False),
                dataset=dict(type="TinySet"),
            ),
            train_cfg=dict(type="IterBasedTrainLoop", max_iters=iters),
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9)),
            param_scheduler=[dict(type="LinearLR", start_factor=0.1, by_epoch=False, end=8)],
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=1)),
            log_level="WARNING",
            experiment_name=f"test_mm_resuming{next(_names)}",
            randomness=dict(seed=3),
        )
        path = tmp_path / "tiny.py"
        Config({**entries, **settings}).dump(path)
        return str(path)

    return write


def weight(path: Path) -> torch.Tensor:
    return read_checkpoint(path, safe_types=SAFE_TYPES)["state_dict"]["layer.weight"]


def changed(source: Path, target: Path, **entries) -> Path:
    """A checkpoint with entries replaced; ``None`` takes one out."""
    saved = torch.load(source, weights_only=False)
    for key, value in entries.items():
        saved.pop(key) if value is None else saved.update({key: value})
    torch.save(saved, target)
    return target


# --- nothing runs


@pytest.mark.parametrize("how", ["resume", "load_from", "backbone"])
def test_what_a_checkpoint_would_execute_is_refused_without_the_flag(config, tmp_path, capsys, how):
    assert main(["train", config(1)]) == 0
    trace = tmp_path / "trace"
    evil = str(changed(tmp_path / "work" / "iter_1.pth", tmp_path / "evil.pth", extra=Payload(trace)))
    settings: dict = {
        "resume": {},
        "load_from": dict(load_from=evil),
        "backbone": dict(model=dict(type="TinyModel", init_cfg=dict(type="Pretrained", checkpoint=evil))),
    }[how]
    arguments = ["train", config(2, **settings), "--work-dir", str(tmp_path / "other")]
    arguments += ["--resume", evil] if how == "resume" else []
    refused(capsys, arguments, "evil.pth holds objects that loading would execute", "mkdir", "--trusted")
    assert not trace.exists()
    assert main([*arguments, "--trusted"]) == 0
    assert trace.exists()


def test_the_newest_file_is_not_passed_over_for_what_it_would_execute(config, tmp_path, capsys):
    assert main(["train", config(2)]) == 0
    trace, last = tmp_path / "trace", tmp_path / "work" / "iter_2.pth"
    changed(last, last, extra=Payload(trace))
    refused(capsys, ["train", config(3), "--resume"], "iter_2.pth holds objects that loading would execute")
    assert not trace.exists()


def test_the_config_in_an_old_checkpoint_is_not_run(config, tmp_path):
    assert main(["train", config(1)]) == 0
    trace, first = tmp_path / "trace", tmp_path / "work" / "iter_1.pth"
    meta = torch.load(first, weights_only=False)["meta"]
    changed(first, first, meta={**meta, "config": f"__import__('os').mkdir({str(trace)!r})"})
    assert main(["train", config(2), "--resume"]) == 0
    assert not trace.exists() and (tmp_path / "work" / "iter_2.pth").exists()


def test_a_download_is_read_safely_too(tmp_path, monkeypatch):
    trace, evil = tmp_path / "trace", tmp_path / "evil.pth"
    torch.save({"state_dict": {}, "extra": Payload(trace)}, evil)

    def load_url(url, map_location=None, weights_only=False, **_):
        return torch.load(evil, map_location=map_location, weights_only=weights_only)

    monkeypatch.setattr(host, "load_url", load_url)
    with safe_loading(), pytest.raises(UnsafeCheckpoint, match="mkdir"):
        host.CheckpointLoader.load_checkpoint("https://example.org/evil.pth", "cpu")
    assert not trace.exists() and host.load_url is load_url
    host.CheckpointLoader.load_checkpoint("https://example.org/evil.pth", "cpu")  # the host is as it was
    assert trace.exists()


def test_the_log_goes_on_and_is_mmengines_own(config, tmp_path):
    assert main(["train", config(4)]) == 0
    whole = weight(tmp_path / "work" / "iter_4.pth")
    assert (
        main(["train", config(4), "--work-dir", str(tmp_path / "b"), "--resume", str(tmp_path / "work" / "iter_2.pth")])
        == 0
    )
    assert torch.equal(weight(tmp_path / "b" / "iter_4.pth"), whole)
    found = torch.load(tmp_path / "b" / "iter_4.pth", weights_only=False)["message_hub"]["log_scalars"]["train/loss"]
    assert type(found) is HistoryBuffer and len(found.data[0]) == 4
    assert found.statistics("mean") == found.mean()


# --- what is drawn


@pytest.mark.parametrize("loop", ["IterBasedTrainLoop", "EpochBasedTrainLoop"])
@pytest.mark.parametrize("workers", [0, 1])
def test_what_pipeline_and_steps_draw_is_drawn_again(config, tmp_path, loop, workers):
    """Without a seed in the config, which the resumed run takes from the checkpoint."""

    def run(epochs: int, folder: str, *arguments: str) -> torch.Tensor:
        by_iter = loop == "IterBasedTrainLoop"
        loader = dict(
            batch_size=2,
            num_workers=workers,
            persistent_workers=workers > 0,
            sampler=dict(type="InfiniteSampler" if by_iter else "DefaultSampler", shuffle=True),
            dataset=dict(type="DrawnSet"),
        )
        settings = dict(
            model=dict(type="DroppingModel"),
            train_dataloader=loader,
            train_cfg=dict(type=loop, **({"max_iters": 2 * epochs} if by_iter else {"max_epochs": epochs})),
            default_hooks=dict(
                checkpoint=dict(type="CheckpointHook", by_epoch=not by_iter, interval=2 if by_iter else 1)
            ),
            custom_hooks=[dict(type="ReplayViews", seed=None)],
            randomness=dict(seed=None),
        )
        assert main(["train", config(**settings), "--work-dir", str(tmp_path / folder), *arguments]) == 0
        return weight(tmp_path / folder / (f"iter_{2 * epochs}.pth" if by_iter else f"epoch_{epochs}.pth"))

    whole = run(4, "whole")
    begun = tmp_path / "whole" / ("iter_4.pth" if loop == "IterBasedTrainLoop" else "epoch_2.pth")
    assert torch.equal(run(4, "resumed", "--resume", str(begun)), whole)
    assert not torch.equal(run(4, "other"), whole)


# --- the newest whole checkpoint


@pytest.mark.parametrize(
    "pointer", ["", *(pytest.param(at, marks=pytest.mark.slow) for at in (None, "/gone/iter_3.pth"))]
)
def test_without_a_pointer_the_newest_checkpoint_on_disk_is_found(config, tmp_path, pointer, caplog):
    assert main(["train", config(5)]) == 0
    whole = weight(tmp_path / "work" / "iter_5.pth")
    work = tmp_path / "work"
    for i in (4, 5):
        (work / f"iter_{i}.pth").unlink()
    (work / "last_checkpoint").unlink() if pointer is None else (work / "last_checkpoint").write_text(pointer)
    assert main(["train", config(5), "--resume"]) == 0
    (said,) = [r.message for r in caplog.records if "going on from" in r.message]
    assert "iter_3.pth" in said
    assert torch.equal(weight(work / "iter_5.pth"), whole)
    log = torch.load(work / "iter_5.pth", weights_only=False)["message_hub"]["log_scalars"]["train/loss"]
    assert len(log.data[0]) == 5  # not from 0


def test_a_file_that_was_cut_off_is_passed_over(config, tmp_path, caplog):
    assert main(["train", config(4)]) == 0
    work = tmp_path / "work"
    whole = weight(work / "iter_4.pth")
    (work / "iter_4.pth").unlink()
    cut = work / "iter_3.pth"  # what last_checkpoint names is cut off, too
    cut.write_bytes(cut.read_bytes()[:1000])
    (work / "last_checkpoint").write_text(str(cut))
    assert main(["train", config(4), "--resume"]) == 0
    (said,) = [r.message for r in caplog.records if "going on from" in r.message]
    assert "going on from" in said and "iter_2.pth" in said and "iter_3.pth" in said
    assert torch.equal(weight(work / "iter_4.pth"), whole)


def test_checkpoints_in_a_folder_of_their_own_are_found(config, tmp_path):
    hook = dict(type="CheckpointHook", by_epoch=False, interval=1, out_dir=str(tmp_path / "elsewhere"))
    assert main(["train", config(2, default_hooks=dict(checkpoint=hook))]) == 0
    (tmp_path / "work" / "last_checkpoint").unlink()
    assert main(["train", config(3, default_hooks=dict(checkpoint=hook)), "--resume"]) == 0
    found = read_checkpoint(tmp_path / "elsewhere" / "work" / "iter_3.pth", safe_types=SAFE_TYPES)
    assert found["meta"]["iter"] == 3 and found["param_schedulers"][0]["last_step"] == 3


def test_nothing_to_resume_never_starts_anew(config, tmp_path, capsys):
    refused(capsys, ["train", config(), "--resume"], "nothing to resume: there is no checkpoint in", "work")
    assert main(["train", config(1)]) == 0
    only = tmp_path / "work" / "iter_1.pth"
    only.write_bytes(only.read_bytes()[:500])
    before = only.read_bytes()
    refused(capsys, ["train", config(), "--resume"], "nothing to resume", "iter_1.pth")
    refused(capsys, ["train", config(resume=True)], "nothing to resume", "iter_1.pth")  # said in the config
    assert only.read_bytes() == before


def test_a_config_that_always_resumes_starts_in_an_empty_folder(config, tmp_path):
    assert main(["train", config(1, resume=True)]) == 0
    assert main(["train", config(2, resume=True)]) == 0
    assert torch.load(tmp_path / "work" / "iter_2.pth", weights_only=False)["param_schedulers"][0]["last_step"] == 2


# --- nothing is missing


@pytest.mark.parametrize(
    ("part", "said"), [("optimizer", "the optimizer's state"), ("param_schedulers", "the schedulers' state")]
)
def test_a_checkpoint_that_lacks_a_part_is_refused_unless_told_otherwise(config, tmp_path, capsys, part, said):
    assert main(["train", config(2)]) == 0
    lame = changed(tmp_path / "work" / "iter_2.pth", tmp_path / "lame.pth", **{part: None})
    explicit = ["train", config(3), "--work-dir", str(tmp_path / "other"), "--resume", str(lame)]
    refused(capsys, explicit, f"the checkpoint to resume lacks {said}", "load_from", "--partial")
    assert main([*explicit, "--partial"]) == 0
    # Of several the older one that is whole; of lame ones alone none.
    shutil.copy(lame, tmp_path / "work" / "iter_2.pth")
    assert main(["train", config(3), "--resume"]) == 0
    shutil.rmtree(tmp_path / "other")
    (tmp_path / "other").mkdir()
    shutil.copy(lame, tmp_path / "other" / "iter_2.pth")
    alone = ["train", config(3), "--work-dir", str(tmp_path / "other"), "--resume"]
    refused(capsys, alone, f"iter_2.pth lacks {said}", "--partial")
    assert main([*alone, "--partial"]) == 0
    assert (tmp_path / "other" / "iter_3.pth").exists()


def test_fewer_schedulers_than_the_run_has_are_missing_ones(config, tmp_path, capsys):
    assert main(["train", config(2)]) == 0
    two = [
        dict(type="LinearLR", start_factor=0.1, by_epoch=False, end=8),
        dict(type="ConstantLR", by_epoch=False, end=2),
    ]
    refused(capsys, ["train", config(3, param_scheduler=two), "--resume"], "iter_2.pth lacks the schedulers' state")


def test_a_checkpoint_without_the_loops_state_is_refused_in_any_case(config, tmp_path, capsys):
    assert main(["train", config(1)]) == 0
    bare = changed(tmp_path / "work" / "iter_1.pth", tmp_path / "bare.pth", message_hub=None)
    arguments = ["train", config(2), "--resume", str(bare)]
    refused(capsys, arguments, "lacks the state of the training loop")
    refused(capsys, [*arguments, "--partial"], "lacks the state of the training loop")


@pytest.mark.parametrize("explicit", [False, True])
def test_a_flipped_bit_is_no_silent_other_result(config, tmp_path, capsys, explicit):
    assert main(["train", config(1)]) == 0
    path = tmp_path / "work" / "iter_1.pth"
    momentum = torch.load(path, weights_only=False)["optimizer"]["state"][0]["momentum_buffer"]
    data = bytearray(path.read_bytes())
    at = data.find(momentum.numpy().tobytes())
    assert at > 0
    data[at + 2] ^= 1
    path.write_bytes(data)
    refused(capsys, ["train", config(2), "--resume", *([str(path)] if explicit else [])], "iter_1.pth is damaged")


# --- one run in a folder


def test_a_second_run_in_one_folder_is_refused(config, tmp_path, capsys):
    with held(tmp_path / "work"):
        refused(capsys, ["train", config(1)], "another run is at work in", "--work-dir")
        assert main(["train", config(1), "--work-dir", str(tmp_path / "other")]) == 0
    assert main(["train", config(1)]) == 0


STOPS = """
import os, time, torch
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS

@MODELS.register_module()
class StoppingModel(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.passes = 0

    def forward(self, inputs, mode="loss"):
        self.passes += 1
        if self.passes == 2 and os.environ["RANK"] == "1":
            time.sleep(300)
        return {"loss": self.layer(torch.stack(list(inputs))).square().mean()}

@DATASETS.register_module()
class Four(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return dict(inputs=torch.tensor([1.0, float(index)]))
"""


@pytest.mark.slow
def test_a_process_that_stops_ends_the_run_of_the_other(config, tmp_path):
    (tmp_path / "stopping.py").write_text(STOPS)
    written = Config.fromfile(config())
    written.update(custom_imports=dict(imports=["stopping"]), model=dict(type="StoppingModel"))
    written.train_dataloader.dataset.type = "Four"
    written.dump(tmp_path / "stops.py")
    port = free_port()
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    shared = dict(PYTHONPATH=paths, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", OMP_NUM_THREADS="1")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "kdgraft", "train", "stops.py", "--timeout", "20"],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, said = ranks[0].communicate(timeout=200)
        assert ranks[0].returncode
        assert "kdgraft: error: another process did not answer within 20 s (--timeout)" in said
        assert "Traceback" not in said
    finally:
        for process in ranks:
            process.kill()
            process.wait(10)


def test_partial_belongs_to_resume(config, capsys):
    refused(capsys, ["train", config(1), "--partial"], "--partial belongs to --resume")
