"""``kdgraft test``: the host's own evaluation of a checkpoint, as in its ``tools/test.py``; and models ready to predict."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, MODELS, DefaultScope

from kdgraft.errors import DistillError
from kdgraft.isolation import isolated_rng
from kdgraft.launching import waiting
from kdgraft.sources.teacher import load_strictly, read_checkpoint, weights_of

from .checkpoints import SAFE_TYPES
from .configs import model_of, plain_config, scope_of
from .resuming import safe_loading
from .run import config_mistakes, data_on_this_machine, make_runner, read_config, timeout_of, unwrapped


def evaluate(
    path: str,
    checkpoint: str,
    options: Sequence[str] = (),
    *,
    trusted: bool = False,
    hooks: Sequence[Hook] = (),
) -> dict[str, float]:
    """Evaluate a checkpoint of the plain or distilled student on the config's test set.

    Args:
        path: the plain or distilled config. If it has no test set, its validation set is used.
        checkpoint: a file of a training or of ``kdgraft export``. It has to fit the student.
        options: ``KEY=VALUE`` overrides.
        trusted: read a checkpoint with arbitrary pickled objects.
        hooks: further hooks of the Runner, which see the predictions.

    Returns:
        The metrics that the config's evaluator computes.

    Raises:
        DistillError: the config has a mistake, the checkpoint cannot be read or does not fit, or the data is missing.
    """
    config = plain_config(read_config(path, options))
    _choose_set(config, path)
    weights = weights_of(read_checkpoint(checkpoint, trusted=trusted, safe_types=SAFE_TYPES))
    with tempfile.TemporaryDirectory() as scratch, safe_loading(trusted), waiting(timeout_of(config)):
        config.work_dir, config.experiment_name = scratch, f"test {scratch}"
        config.log_level = "WARNING"
        config.load_from, config.resume = None, False  # the weights are loaded here, which upstream's Runner cannot do
        with config_mistakes(path):
            runner = make_runner(config)
        for hook in hooks:
            runner.register_hook(hook)
        load_strictly(unwrapped(runner.model), weights, str(checkpoint), "student")
        with config_mistakes(path), data_on_this_machine(config, "the student was not evaluated", "test_dataloader"):
            _ = runner.test_loop  # this builds the data set and its evaluator
        with torch.no_grad():
            return {name: float(value) for name, value in runner.test().items()}


def open_model(path: str, checkpoint: str) -> tuple[Any, Any]:
    """Return the plain model of a checkpoint, ready to predict on the device that the host chooses, and the config's test set.

    Args:
        path: the plain or distilled config. If it has no test set, its validation set is used.
        checkpoint: a file of a training or of ``kdgraft export``.

    Raises:
        DistillError: as for :func:`evaluate`.
    """
    config = plain_config(read_config(path))
    _choose_set(config, path)
    weights = weights_of(read_checkpoint(checkpoint, safe_types=SAFE_TYPES))
    model = built_model(config, weights, path, str(checkpoint))
    model.to(get_device())  # some detectors of mmdet return nothing here
    with config_mistakes(path), DefaultScope.overwrite_default_scope(scope_of(config)):
        samples = DATASETS.build(config.test_dataloader.dataset)
    return model, samples


def built_model(config: Config, weights: dict[str, Any], path: str, checkpoint: str) -> Any:
    """Return the plain model of a config with weights, in eval mode on the CPU.

    Args:
        config: a plain config.
        weights: its weights.
        path, checkpoint: where both are from, for messages.

    Raises:
        DistillError: the config has a mistake, or the weights do not fit.
    """
    with config_mistakes(path), DefaultScope.overwrite_default_scope(scope_of(config)), isolated_rng():
        model = MODELS.build(copy.deepcopy(model_of(config)))  # some models write into their config
    load_strictly(model, weights, checkpoint, "student")
    model.eval()  # some detectors of mmdet return nothing here
    return model


def _choose_set(config: Config, path: str) -> None:
    """Put the validation set in the place of the test set where the config has none.

    Raises:
        DistillError: the config has neither.
    """
    if config.get("test_dataloader") is None:
        for part in ("dataloader", "evaluator"):
            config[f"test_{part}"] = config.get(f"val_{part}")
        config.test_cfg = dict(type="TestLoop")
    if config.get("test_dataloader") is None or config.get("test_evaluator") is None:
        raise DistillError(
            f"{path} has no test set and no validation set with an evaluator; add test_dataloader and test_evaluator"
        )
