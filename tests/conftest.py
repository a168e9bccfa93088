"""For all tests: nothing is spent on what no test looks at."""

from __future__ import annotations

import gc
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from kdgraft.formatter import import_yapf

# These models are so small that a second thread costs more than it saves, most of all where tests share a machine.
torch.set_num_threads(1)


def pytest_configure(config):
    """Let yapf write the cache of its grammar once; workers that write and read it side by side find it cut off."""
    if not hasattr(config, "workerinput"):
        import_yapf()


@pytest.fixture(scope="session", autouse=True)
def _configs_are_written_as_they_come():
    """A Runner prints its config six times and has yapf format it each time: four fifths of a run of four iterations."""
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("yapf") is not None:
            patch.setattr("yapf.yapflib.yapf_api.FormatCode", lambda text, **_: (text, True))
        yield


@pytest.fixture(scope="session", autouse=True)
def _weights_are_initialised_without_an_account_of_it():
    """mmengine takes the mean of each parameter before and after each step, and logs a line of each: a fifth of building a model."""
    with pytest.MonkeyPatch.context() as patch:
        if "mmengine.model" in sys.modules:
            for module in ("base_module", "weight_init"):
                patch.setattr(f"mmengine.model.{module}.update_init_info", lambda *_, **__: None)
            patch.setattr("mmengine.model.BaseModule._dump_init_info", lambda *_: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _an_epoch_begins_at_once():
    """mmengine sleeps for 2 s before each epoch but the first, for workers that load data."""
    with pytest.MonkeyPatch.context() as patch:
        if "mmengine.runner" in sys.modules:
            patch.setattr("mmengine.runner.loops.time", SimpleNamespace(sleep=lambda _: None))
        yield


@pytest.fixture(scope="session", autouse=True)
def _workers_that_load_data_are_ended_at_once():
    """Workers of a loader that is garbage in a cycle, as a Runner's is, are never told to end: torch waits for each for 5 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
        yield


@pytest.fixture(scope="session", autouse=True)
def _garbage_is_collected_when_there_is_some():
    """mmengine collects at every dataset and accelerate at every training, with all that tests keep: Python does it often enough."""
    kept = gc.get_threshold()
    gc.set_threshold(50_000, 20, 20)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("mmengine.dataset.base_dataset", "accelerate.utils.memory"):
            if module in sys.modules:
                patch.setattr(f"{module}.gc", SimpleNamespace(collect=lambda: 0))
        yield
    gc.set_threshold(*kept)


def pytest_collection_finish():
    """What importing the hosts left is not garbage."""
    gc.freeze()
