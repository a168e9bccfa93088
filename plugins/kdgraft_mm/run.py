"""``kdgraft train`` and ``kdgraft check`` for mmengine's Runner, on one process or several, on GPU or CPU."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config, DictAction
from mmengine.device import utils as device_utils
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings

from kdgraft.errors import DistillError
from kdgraft.isolation import isolated_rng
from kdgraft.report import print_rows
from kdgraft.schedules import Constant
from kdgraft.terms import WiringRow

from .configs import load_config
from .graft import Graft
from .outline import check_outline, check_terms, missing_data
from .state import KEY

PLUGINS = {"DistilledDetector": "kdgraft_det", "DistilledSegmentor": "kdgraft_seg"}
"""What registers the models that configs name."""
MISTAKES = (
    *(SyntaxError, LookupError, TypeError, ValueError, AssertionError, ImportError, AttributeError, OSError),
    *(RuntimeError, ArithmeticError),
)
"""What hosts raise over a config that is wrong."""


class Outset(Hook):
    """Compares what is to be resumed with what is to be trained, before the host does, and sees whether training has begun."""

    begun = False

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Raises a :class:`DistillError` where a resumed checkpoint was made with other terms.

        torch would otherwise find that its optimizer's parameters are others, and not say why.
        """
        distiller = getattr(unwrapped(runner.model), "distiller", None)
        if distiller is None or not runner._resume:
            return
        state = checkpoint.get("message_hub", {}).get("runtime_info", {}).get(KEY)
        if state is not None:
            distiller.check_live_state(state)
        elif next(distiller.terms.parameters(), None) is not None:
            raise DistillError(
                "the checkpoint to resume was made without these distillation terms; to start from its weights give it as "
                "load_from, without resuming"
            )

    def before_train(self, runner: Any) -> None:
        self.begun = True


def unwrapped(model: Any) -> Any:
    """A model without what distributes it."""
    return model.module if is_model_wrapper(model) else model


def read_config(path: str, options: Sequence[str] = ()) -> Config:
    """A config file with ``KEY=VALUE`` overrides.

    Raises:
        DistillError: no such file, or an override that is no ``KEY=VALUE``.
    """
    with config_mistakes(path):
        config = load_config(path, imports=False)
        config.merge_from_dict(dict(map(_parsed, options)))
    if not isinstance(config.get("model"), dict):
        raise DistillError(f"{path} has no 'model'; it is not the config of a training")
    kind = str(getattr(config.model.get("type"), "__name__", config.model.get("type")))
    plugin = PLUGINS.get(kind)
    with config_mistakes(path):
        if plugin is not None:
            check_outline(config, plugin)
        if config.get("custom_imports"):
            import_modules_from_strings(**config.custom_imports)
    if plugin is not None and plugin not in sys.modules:
        raise DistillError(f"config {path}: {kind} is not imported; add custom_imports = dict(imports=['{plugin}'])")
    if plugin is not None:
        with config_mistakes(path):
            check_terms(config.model, sys.modules[plugin].TERMS, sys.modules[plugin].RECIPES)
    config.setdefault("default_scope", "mmseg" if kind == "DistilledSegmentor" else "mmdet")
    return config


def _parsed(option: str) -> tuple[str, Any]:
    """Key and value of ``KEY=VALUE``."""
    key, equals, value = option.partition("=")
    if not equals or not key:
        raise DistillError(f"--cfg-options takes KEY=VALUE, got {option!r}")
    text = value.strip("'\"")
    if text[:1] in ("[", "(") and any(text.count(left) != text.count(right) for left, right in ("[]", "()")):
        raise DistillError(f"--cfg-options {option!r}: a bracket is not closed")
    try:
        return key, DictAction._parse_iterable(value)
    except (AssertionError, RecursionError):
        raise DistillError(f"--cfg-options {option!r}: the brackets do not match") from None


@contextmanager
def config_mistakes(path: str) -> Iterator[None]:
    """Turns what mmengine raises over a wrong config (its own traceback kept as the cause) into one line."""
    try:
        yield
    except DistillError:
        raise
    except MISTAKES as error:
        said = error.args[0] if isinstance(error, KeyError) and error.args else error
        if str(error) == "need at least one array to concatenate":  # a dataset of mmengine's that filtered all it had
            said = "no image of the training set is left; are metainfo.classes the names in its annotation file?"
        raise DistillError(f"config {path}: {type(error).__name__}: {said}") from error


@contextmanager
def on_device(device: str) -> Iterator[None]:
    """Has mmengine put what it builds in the body on ``"cpu"`` or ``"cuda"``, whatever else the machine has.

    Raises:
        DistillError: there is no such device.
    """
    if device not in ("cpu", "cuda"):
        raise DistillError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise DistillError("no CUDA device here; use the device 'cpu'")
    before = device_utils.DEVICE  # set once when mmengine is imported
    device_utils.DEVICE = device
    try:
        yield
    finally:
        device_utils.DEVICE = before


def train(
    path: str,
    options: Sequence[str] = (),
    work_dir: str | None = None,
    resume: str | None = None,
    amp: bool = False,
    seed: int | None = None,
) -> Runner:
    """Trains a config as the host's own ``tools/train.py`` does; under ``accelerate launch`` on all its processes.

    Args:
        path: the config file.
        options: ``KEY=VALUE`` overrides.
        work_dir: where checkpoints and logs go.
        resume: a checkpoint, or ``"auto"`` for the latest in ``work_dir``.
        amp: mixed precision, on a GPU.
        seed: random seed; the config's own by default.
    """
    config = read_config(path, options)
    config.work_dir = work_dir or config.get("work_dir") or str(Path("work_dirs") / Path(path).stem)
    if resume is not None:
        config.resume = True
        config.load_from = None if resume == "auto" else resume
    if seed is not None:
        config.randomness = {**config.get("randomness", {}), "seed": seed}
    if amp:
        if not torch.cuda.is_available():
            raise DistillError("--amp needs a GPU: mmengine's AmpOptimWrapper does not run on a CPU")
        config.optim_wrapper.type = "AmpOptimWrapper"
    with config_mistakes(path):
        runner = make_runner(config)
    outset = Outset()
    runner.register_hook(outset)
    try:
        runner.train()
    except MISTAKES as error:
        if outset.begun:
            raise
        with config_mistakes(path):  # the Runner builds loops, optimizer and schedulers late
            raise error
    return runner


def make_runner(config: Config) -> Runner:
    """A Runner for this process: set up for several when a launcher started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        config.launcher = "pytorch"
        if not torch.cuda.is_available():
            # mmengine would set a CUDA device and give DDP a device id; neither exists on a CPU.
            if not dist.is_initialized():
                dist.init_process_group("gloo")
            wrapper = dict(
                type="MMDistributedDataParallel",
                device_ids=None,
                broadcast_buffers=False,
                find_unused_parameters=config.get("find_unused_parameters", False),
            )
            config.model_wrapper_cfg = {**wrapper, **config.get("model_wrapper_cfg", {})}
            # SyncBN asks for GPUs. (On one process mmengine itself makes BN of it.)
            config.model = _without_sync_batchnorm(config.model)
    return Runner.from_cfg(config)


def _without_sync_batchnorm(entry: Any) -> Any:
    """A config whose SyncBN is BN: each process normalises over its own images."""
    if isinstance(entry, dict):
        return type(entry)(
            {k: "BN" if k == "type" and v == "SyncBN" else _without_sync_batchnorm(v) for k, v in entry.items()}
        )
    if isinstance(entry, (list, tuple)):
        return type(entry)(_without_sync_batchnorm(item) for item in entry)
    return entry


def check(path: str, options: Sequence[str] = ()) -> list[WiringRow]:
    """Builds everything, prints the wiring, and runs one training step on one batch of the training set without updating.

    The step runs every term at its full weight, whatever its schedule begins with. The wiring needs no data set: where that is
    not on this machine, it is printed all the same.

    Returns:
        The rows of the table.

    Raises:
        DistillError: whatever would stop training before its first step.
    """
    config = read_config(path, options)
    with tempfile.TemporaryDirectory() as scratch:
        config.work_dir = scratch
        config.log_level = "WARNING"
        with config_mistakes(path):
            runner = make_runner(config)
        model: Any = unwrapped(runner.model)
        if not isinstance(model, Graft):
            raise DistillError(
                f"{path} trains a plain {type(model).__name__}; set model.type='DistilledDetector' or 'DistilledSegmentor'"
            )
        rows = model.distiller.rows if model.distiller is not None else []
        print_rows([row._asdict() for row in rows], title=f"{type(model).__name__}: wiring")
        with config_mistakes(path):
            runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        with config_mistakes(path), _data_on_this_machine(config):
            loader = runner.train_loop.dataloader
            if runner.param_schedulers is not None:
                runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
            _ = runner.val_loop  # builds the validation set and its evaluator, where there is one
        classes = (getattr(loader.dataset, "metainfo", None) or {}).get("classes")
        model.init_weights()
        model.start_distilling(classes)
        model.train()
        if model.distiller is not None:
            for term in model.distiller._all_terms():
                term.schedule = Constant()  # a warm-up starts at weight 0, where a term is not computed at all
        for counter in ("iter", "epoch"):  # what a train loop writes and some heads read
            runner.message_hub.update_info(counter, 0)
        with isolated_rng():
            with _data_on_this_machine(config):
                drawn = next(iter(loader))
            data = model.data_preprocessor(drawn, True)
            losses = model(**data, mode="loss")
            total, values = model.parse_losses(losses)
            total.backward()
        print_rows([{"loss": k, "first step": f"{v.item():.4g}"} for k, v in values.items()], title="one step")
        for handler in [h for h in runner.logger.handlers if isinstance(h, logging.FileHandler)]:
            runner.logger.removeHandler(handler)  # or a model built later in this process writes to a closed file
            handler.close()
    return rows


@contextmanager
def _data_on_this_machine(config: Config) -> Iterator[None]:
    """Says which files of the data sets are missing, where reading them fails for that."""
    try:
        yield
    except (OSError, AssertionError) as error:
        missing = missing_data(config)
        if not missing:
            raise
        raise DistillError(
            f"the wiring above holds; the first step was not run, as its data is not on this machine: {', '.join(missing)}"
        ) from error
