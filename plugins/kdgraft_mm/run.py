"""``kdgraft train`` and ``kdgraft check`` for mmengine's Runner, on one process or several, on GPU or CPU."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config, DictAction
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper, revert_sync_batchnorm
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings

from kdgraft.errors import DistillError
from kdgraft.files import held
from kdgraft.isolation import isolated_rng
from kdgraft.launching import TIMEOUT, waiting
from kdgraft.resuming import lost_terms
from kdgraft.schedules import Constant
from kdgraft.tables import print_rows
from kdgraft.wiring import WiringRow

from .configs import PLUGINS, load_config, type_name
from .graft import Graft
from .outline import check_outline, check_terms, missing_data
from .resuming import is_resumable, lacking, newest_checkpoint, safe_loading
from .state import KEY

MISTAKES = (
    *(SyntaxError, LookupError, TypeError, ValueError, AssertionError, ImportError, AttributeError, OSError),
    *(RuntimeError, ArithmeticError),
)
"""What hosts raise over a config that is wrong."""


class Outset(Hook):
    """Compares what is to be resumed with what is to be trained, before the host does, and sees whether training has begun.

    Args:
        trusted: let the host run the config that an old checkpoint carries.
        partial: go on from a checkpoint that lacks a part of the run's state.
    """

    begun = False
    trained = False
    """Whether an iteration was made: of a run that is resumed at its end none is."""

    def __init__(self, trusted: bool = False, partial: bool = False) -> None:
        self._trusted, self._partial = trusted, partial

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Raises a :class:`DistillError` where a resumed checkpoint was made with other terms, or lacks what it needs.

        torch would otherwise find that its optimizer's parameters are others, and not say why; what is missing, the host
        starts anew in silence.
        """
        if not runner.cfg.get("resume"):
            return
        if not self._trusted and isinstance(checkpoint.get("meta"), dict):
            checkpoint["meta"].pop("config", None)  # mmengine would execute it, to compare numbers of GPUs
        lost, possible = lacking(checkpoint, runner.cfg), is_resumable(checkpoint)
        if lost and not (self._partial and possible):
            raise DistillError(
                f"the checkpoint to resume lacks {' and '.join(lost)}; to start from its weights give it as load_from, without "
                "resuming" + ("; to go on without, say --partial" if possible else "")
            )
        distiller = getattr(unwrapped(runner.model), "distiller", None)
        if distiller is None:
            return
        state = checkpoint.get("message_hub", {}).get("runtime_info", {}).get(KEY)
        if state is not None:
            distiller.check_live_state(state)
        terms = [] if self._partial else lost_terms(distiller, state)
        if terms:
            raise DistillError(
                f"the checkpoint to resume was made without these distillation terms ({', '.join(terms)}); to start from its "
                "weights give it as load_from, without resuming; to go on with these terms anew, say --partial"
            )

    def before_train(self, runner: Any) -> None:
        self.begun = True

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.trained = True


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
    kind = type_name(config.model)
    plugin = PLUGINS.get(kind)
    with config_mistakes(path):
        if plugin is not None:
            check_outline(config, plugin)
        if config.get("custom_imports"):
            import_modules_from_strings(**config.custom_imports)
    imported = plugin in sys.modules or str(config.model.get("type")).startswith(f"{plugin}.")  # a path imports itself
    if plugin is not None and not imported:
        raise DistillError(f"config {path}: {kind} is not imported; add custom_imports = dict(imports=['{plugin}'])")
    if plugin is not None:
        with config_mistakes(path):
            package = sys.modules[plugin]
            check_terms(config.model, package.TERMS, package.RECIPES, package.READER)
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
        found = Namespace()
        DictAction(["--cfg-options"], dest="options")(ArgumentParser(), found, [option])
        return key, found.options[key]
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


def train(
    path: str,
    options: Sequence[str] = (),
    work_dir: str | None = None,
    resume: str | None = None,
    amp: bool = False,
    seed: int | None = None,
    *,
    timeout: float | None = None,
    trusted: bool = False,
    partial: bool = False,
) -> Runner:
    """Trains a config as the host's own ``tools/train.py`` does; under ``accelerate launch`` on all its processes.

    Args:
        path: the config file.
        options: ``KEY=VALUE`` overrides.
        work_dir: where checkpoints and logs go; one run at a time.
        resume: a checkpoint, or ``"auto"`` for the newest whole one in ``work_dir``.
        amp: mixed precision, on a GPU.
        seed: random seed; the config's own by default.
        timeout: seconds that a process waits for the others; ``env_cfg.dist_cfg.timeout``, or half an hour, by default.
        trusted: read checkpoints that hold arbitrary pickled objects.
        partial: resume from a checkpoint that lacks a part of the run's state.

    Raises:
        DistillError: a mistake in the config, a checkpoint that will not do, or another run in ``work_dir``.
    """
    config = read_config(path, options)
    config.work_dir = work_dir or config.get("work_dir") or str(Path("work_dirs") / Path(path).stem)
    if resume is not None:
        config.resume = True
        config.load_from = None if resume == "auto" else resume
    if seed is not None:
        config.randomness = {**config.get("randomness", {}), "seed": seed}
    if timeout is not None:
        config.merge_from_dict({"env_cfg.dist_cfg.timeout": timeout})
    if amp:
        if not torch.cuda.is_available():
            raise DistillError("--amp needs a GPU: mmengine's AmpOptimWrapper does not run on a CPU")
        config.optim_wrapper.type = "AmpOptimWrapper"
    return train_config(config, path, resume is not None, trusted=trusted, partial=partial)


def train_config(
    config: Config, path: str, resumes: bool = False, *, trusted: bool = False, partial: bool = False
) -> Runner:
    """Trains a config that was read, in its ``work_dir``, which one run holds at a time.

    Args:
        config: what to train.
        path: what messages call it.
        resumes: a checkpoint to resume has to be there.
        trusted, partial: see :func:`train`.
    """
    with held(config.work_dir), safe_loading(trusted), waiting(timeout_of(config)):
        if config.get("resume") and not config.get("load_from"):
            config.load_from = newest_checkpoint(config, trusted=trusted, partial=partial)
            if config.load_from is None and resumes:
                raise DistillError(f"nothing to resume: there is no checkpoint in {config.work_dir}")
        with config_mistakes(path):
            runner = make_runner(config)
        outset = Outset(trusted, partial)
        runner.register_hook(outset)
        try:
            runner.train()
        except MISTAKES as error:
            if outset.begun:
                raise
            with config_mistakes(path):  # the Runner builds loops, optimizer and schedulers late
                raise error
    return runner


def timeout_of(config: Config) -> float:
    """Seconds that a process of a run waits for the others."""
    return (config.get("env_cfg") or {}).get("dist_cfg", {}).get("timeout", TIMEOUT)


def make_runner(config: Config) -> Runner:
    """A Runner for this process: set up for several when a launcher started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        config.launcher = "pytorch"
        if not torch.cuda.is_available():
            # mmengine would set a CUDA device and give DDP a device id; neither exists on a CPU.
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_of(config)))
            wrapper = dict(
                type="MMDistributedDataParallel",
                device_ids=None,
                broadcast_buffers=False,
                find_unused_parameters=config.get("find_unused_parameters", False),
            )
            config.model_wrapper_cfg = {**wrapper, **config.get("model_wrapper_cfg", {})}
            config.pop("sync_bn", None)  # would make SyncBN of BN once more
            return _OnCPUs.from_cfg(config)
    return Runner.from_cfg(config)


class _OnCPUs(Runner):
    """The Runner of one of several processes on CPUs: SyncBN, which asks for GPUs, is BN over each process's own images.

    Models make SyncBN of their norms by themselves too (RTMDet), so it is the model that is looked at and not its config. (On one
    process mmengine itself makes BN of it.)
    """

    def build_model(self, model: Any) -> torch.nn.Module:
        return revert_sync_batchnorm(super().build_model(model))


def check(path: str, options: Sequence[str] = (), *, trusted: bool = False) -> list[WiringRow]:
    """Builds everything, prints the wiring, and runs one training step on one batch of the training set without updating.

    The step runs every term at its full weight, whatever its schedule begins with. The wiring needs no data set: where that is
    not on this machine, it is printed all the same.

    Args:
        path: the config file.
        options: ``KEY=VALUE`` overrides.
        trusted: read checkpoints that hold arbitrary pickled objects.

    Returns:
        The rows of the table.

    Raises:
        DistillError: whatever would stop training before its first step.
    """
    config = read_config(path, options)
    with safe_loading(trusted), tempfile.TemporaryDirectory() as scratch:
        config.work_dir = scratch
        # mmengine names a Runner's log and pictures after the second it is made in: a training of the same second would write here.
        config.experiment_name = f"check {scratch}"
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
        with config_mistakes(path), data_on_this_machine(config, "the wiring above holds; the first step was not run"):
            loader = runner.train_loop.dataloader
            if runner.param_schedulers is not None:
                runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
            _ = runner.val_loop  # builds the validation set and its evaluator, where there is one
        classes = (getattr(loader.dataset, "metainfo", None) or {}).get("classes")
        model.init_weights()
        model.start_distilling(classes)
        model.train()
        if model.distiller is not None:
            for term in model.distiller.all_terms:
                term.schedule = Constant()  # a warm-up starts at weight 0, where a term is not computed at all
        for counter in ("iter", "epoch"):  # what a train loop writes and some heads read
            runner.message_hub.update_info(counter, 0)
        with isolated_rng():
            with data_on_this_machine(config, "the wiring above holds; the first step was not run"):
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
def data_on_this_machine(config: Config, said: str, *loaders: str) -> Iterator[None]:
    """Names the files of the data sets that are missing, where reading them fails for that.

    Args:
        config: whose data sets are read.
        said: the consequence, for the message.
        loaders: the entries of the sets that are read; by default those of training and validation.
    """
    try:
        yield
    except (OSError, AssertionError) as error:
        missing = missing_data(config, loaders) if loaders else missing_data(config)
        if not missing:
            raise
        raise DistillError(f"{said}, as its data is not on this machine: {', '.join(missing)}") from error
