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
from itertools import islice
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
from kdgraft.store import Store
from kdgraft.tables import print_rows
from kdgraft.telling import MEASURED, print_shares, watch
from kdgraft.wiring import WiringRow

from .configs import PLUGINS, load_config, scope_of, type_name
from .graft import Graft
from .outline import check_outline, check_terms, missing_data
from .replaying import ReplayViews, let_replay
from .resuming import is_resumable, keep_seed, lacking, newest_checkpoint, safe_loading
from .sources import teacher_specs
from .state import KEY

MISTAKES = (
    *(SyntaxError, LookupError, TypeError, ValueError, AssertionError, ImportError, AttributeError, OSError),
    *(RuntimeError, ArithmeticError),
)
"""Exceptions that hosts raise for a mistake in a config."""


class Outset(Hook):
    """Compares a resumed checkpoint with the model to train before the host does, and notes the start of training.

    Args:
        trusted: let the host execute the config that an old checkpoint carries.
        partial: continue from a checkpoint that lacks a part of the run's state.
    """

    begun = False
    trained = False
    """True after the first iteration. A run that is resumed at its end makes none."""

    def __init__(self, trusted: bool = False, partial: bool = False) -> None:
        self._trusted, self._partial = trusted, partial

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Raise a :class:`DistillError` if a resumed checkpoint was made with other terms or is incomplete.

        Otherwise torch would find different parameters in its optimizer and not say why, and the host would silently
        initialise the missing parts.
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
        """Note that training has begun."""
        self.begun = True

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Note that an iteration was made."""
        self.trained = True


def unwrapped(model: Any) -> Any:
    """Return a model without the wrapper that distributes it."""
    return model.module if is_model_wrapper(model) else model


def read_config(path: str, options: Sequence[str] = ()) -> Config:
    """Read a config file, apply ``KEY=VALUE`` overrides, import its modules and check it.

    Raises:
        DistillError: the file does not exist, an override is not ``KEY=VALUE``, or the config has a mistake.
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
    config.setdefault("default_scope", scope_of(config))
    return config


def _parsed(option: str) -> tuple[str, Any]:
    """Return key and value of ``KEY=VALUE``."""
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
    """Turn an error that mmengine raises for a mistake in a config into one line, with the original error as its cause."""
    try:
        yield
    except DistillError:
        raise
    except MISTAKES as error:
        said = error.args[0] if isinstance(error, KeyError) and error.args else error
        if str(error) == "need at least one array to concatenate":  # mmengine's dataset has filtered out all images
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
    """Train a config as the host's own ``tools/train.py`` does; under ``accelerate launch`` on all its processes.

    Args:
        path: the config file.
        options: ``KEY=VALUE`` overrides.
        work_dir: the folder of checkpoints and logs, which one run uses at a time.
        resume: a checkpoint, or ``"auto"`` for the newest complete one in ``work_dir``.
        amp: train with mixed precision, on a GPU.
        seed: the random seed; by default the config's own.
        timeout: seconds that a process waits for the others; by default ``env_cfg.dist_cfg.timeout``, or half an hour.
        trusted: read checkpoints with arbitrary pickled objects.
        partial: resume from a checkpoint that lacks a part of the run's state.

    Raises:
        DistillError: the config has a mistake, the checkpoint cannot be used, or another run uses ``work_dir``.
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
    """Train a config that was read, in its ``work_dir``, which one run uses at a time.

    Args:
        config: the config to train.
        path: the name of the config in messages.
        resumes: refuse to start if there is no checkpoint to resume.
        trusted: see :func:`train`.
        partial: see :func:`train`.
    """
    replay_stored(config)
    with held(config.work_dir), safe_loading(trusted), waiting(timeout_of(config)):
        if config.get("resume") and not config.get("load_from"):
            config.load_from = newest_checkpoint(config, trusted=trusted, partial=partial)
            if config.load_from is None and resumes:
                raise DistillError(f"nothing to resume: there is no checkpoint in {config.work_dir}")
        keep_seed(config, trusted=trusted)
        with config_mistakes(path):
            runner = make_runner(config)
        outset = Outset(trusted, partial)
        runner.register_hook(outset)
        try:
            runner.train()
        except MISTAKES as error:
            if outset.begun:
                raise
            with config_mistakes(path):  # the Runner builds loops, optimizer and schedulers only now
                raise error
    return runner


def replay_stored(config: Config) -> None:
    """Add the hook that replays views to a config with a stored teacher, unless it has one."""
    stored = [spec["store"] for spec in teacher_specs(config.model).values() if spec.get("store") is not None]
    if stored:
        about = Store(stored[0]).about
        let_replay(config, **{key: about[key] for key in ("views", "seed") if key in about})


def timeout_of(config: Config) -> float:
    """Return the seconds that a process of a run waits for the others."""
    return (config.get("env_cfg") or {}).get("dist_cfg", {}).get("timeout", TIMEOUT)


def make_runner(config: Config) -> Runner:
    """Return a Runner for this process, set up for distributed training when a launcher started several processes."""
    if isinstance(config.get("visualizer"), dict):
        config.visualizer.pop(
            "name", None
        )  # by a name the visualizer of an earlier Runner is taken, which logs to that one's folder
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
            config.pop("sync_bn", None)  # it would convert BN to SyncBN again
            return _OnCPUs.from_cfg(config)
    return Runner.from_cfg(config)


class _OnCPUs(Runner):
    """The Runner of one of several processes on CPUs: SyncBN, which needs GPUs, becomes BN over each process's own images.

    Some models (RTMDet) build SyncBN themselves, so that the built model is converted rather than its config. (On one process
    mmengine itself converts it to BN.)
    """

    def build_model(self, model: Any) -> torch.nn.Module:
        return revert_sync_batchnorm(super().build_model(model))


def check(path: str, options: Sequence[str] = (), *, trusted: bool = False) -> list[WiringRow]:
    """Build everything, print the wiring, and run one training step on one batch of the training set without an update.

    The step computes every term at its full weight, whatever weight its schedule starts with. It and up to three more batches
    give the terms' shares of the gradient. The wiring needs no data set and is printed even if the data is not on this machine.

    Args:
        path: the config file.
        options: ``KEY=VALUE`` overrides.
        trusted: read checkpoints with arbitrary pickled objects.

    Returns:
        The rows of the wiring table.

    Raises:
        DistillError: training would stop before its first step.
    """
    config = read_config(path, options)
    replay_stored(config)
    with safe_loading(trusted), tempfile.TemporaryDirectory() as scratch:
        config.work_dir = scratch
        # mmengine names a Runner's log and pictures after the second it is made in: a training started then would write here too.
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
            _ = runner.val_loop  # this builds the validation set and its evaluator, if the config has them
        for hook in (hook for hook in runner.hooks if isinstance(hook, ReplayViews)):
            hook.before_train(runner)
        begin(runner, loader)
        if model.distiller is not None:
            watch(model.distiller)
        with isolated_rng():
            with data_on_this_machine(config, "the wiring above holds; the first step was not run"):
                drawn = list(islice(iter(loader), MEASURED))
            total, values = model.parse_losses(model(**model.data_preprocessor(drawn[0], True), mode="loss"))
            total.backward()
            for batch in drawn[1:] if model.distiller is not None else ():
                model(**model.data_preprocessor(batch, True), mode="loss")
        print_rows([{"loss": k, "first step": f"{v.item():.4g}"} for k, v in values.items()], title="one step")
        if model.distiller is not None:
            print_shares(model.distiller, len(drawn))
        for handler in [h for h in runner.logger.handlers if isinstance(h, logging.FileHandler)]:
            runner.logger.removeHandler(handler)  # so that no later model of this process writes to a closed file
            handler.close()
    return rows


def begin(runner: Runner, loader: Any) -> None:
    """Bring the model of a Runner to the start of its training on a loader, where the Runner itself is not to train."""
    model: Any = unwrapped(runner.model)
    model.init_weights()
    if isinstance(model, Graft):
        model.start_distilling((getattr(loader.dataset, "metainfo", None) or {}).get("classes"))
    model.train()
    for counter in ("iter", "epoch"):  # a train loop writes them, and some heads read them
        runner.message_hub.update_info(counter, 0)


@contextmanager
def data_on_this_machine(config: Config, said: str, *loaders: str) -> Iterator[None]:
    """Turn an error in the body into one that names the missing files of the data sets, if there are any.

    Args:
        config: the config whose data sets the body reads.
        said: the consequence, for the message.
        *loaders: the dataloader entries that the body reads; by default those of training and validation.
    """
    try:
        yield
    except (OSError, AssertionError) as error:
        missing = missing_data(config, loaders) if loaders else missing_data(config)
        if not missing:
            raise
        raise DistillError(f"{said}, as its data is not on this machine: {', '.join(missing)}") from error
