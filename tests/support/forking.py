"""Python processes that need not import a framework again: one that has, and has none of our modules, forks for each.

``python -m support.forking NAME…`` is that process; the first call for a host starts it. Importing torch takes 2 s, what its
optimizers import with them 2 s more, and a host's framework 5 s.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

TORCH = ("torch", "torch._dynamo", "torch.nn.parallel", "accelerate", "numpy", "pytest")
# DeepSpeed is what a Trainer imports where it is installed.
TRANSFORMERS = ("transformers.trainer", "transformers.models.auto.modeling_auto", "datasets", "deepspeed")
TRANSFORMERS += ("transformers.models.llama.modeling_llama", "transformers.models.bert.modeling_bert")
MM = ("mmengine.runner", "mmdet.apis", "mmdet.models", "mmseg.apis", "mmseg.models")
HOSTS = (*TORCH, *TRANSFORMERS, *MM)
IMPORTED = {"torch": TORCH, "transformers": HOSTS, "mmdet": HOSTS, "mmseg": HOSTS}
"""By host: what is imported beforehand, as far as it is installed. One process serves all that import the same."""


class Program(NamedTuple):
    """What ``python ARGUMENTS`` is to run, where, and with which environment variables beside this process's.

    Args:
        arguments: ``-c CODE …``, ``-m MODULE …`` or ``FILE …``, after ``-W ignore`` if warnings are not to be seen.
    """

    arguments: Sequence[str]
    folder: Path | None = None
    environment: Mapping[str, str] = {}


def environment(**more: str) -> dict[str, str]:
    """An environment in which a process finds the modules that this one finds."""
    path = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **more}


def python(
    *arguments: str, host: str = "torch", folder: Path | None = None, timeout: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What became of ``python ARGUMENTS`` in a process that has imported the host's framework."""
    (done,) = side_by_side(Program(arguments, folder, environment), host=host, timeout=timeout)
    return done


def side_by_side(
    *programs: Program, host: str = "torch", timeout: float = 240
) -> list[subprocess.CompletedProcess[str]]:
    """What became of programs that ran at the same time; one that took longer was killed."""
    with tempfile.TemporaryDirectory() as kept:
        jobs = [_job(program, f"{kept}/{number}") for number, program in enumerate(programs)]
        codes = _server(host).ask(dict(jobs=jobs, timeout=timeout))
        return [
            subprocess.CompletedProcess(job["arguments"], code, *map(_text, job["said"]))
            for job, code in zip(jobs, codes, strict=True)
        ]


class Started:
    """A program that runs beside this process, until :meth:`end`."""

    def __init__(self, program: Program, *, host: str = "torch") -> None:
        self._kept = tempfile.TemporaryDirectory()
        self._job = _job(program, f"{self._kept.name}/it")
        self._server = _server(host)
        self.pid = self._server.ask(dict(start=self._job))

    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._server.ask(dict(poll=self.pid))

    def errors(self) -> str:
        """What it has written to stderr."""
        return _text(self._job["said"][1])

    def end(self) -> None:
        """Send SIGKILL."""
        if self.code() is None:
            os.kill(self.pid, signal.SIGKILL)
            while self.code() is None:
                time.sleep(0.01)
        self._kept.cleanup()


def _job(program: Program, said: str) -> dict[str, Any]:
    """What is sent; what the program writes comes into files whose names begin so."""
    return dict(
        arguments=list(program.arguments),
        folder=str(program.folder or Path.cwd()),
        environment=environment(**program.environment),
        said=[f"{said}.out", f"{said}.err"],
    )


def _text(file: str) -> str:
    return Path(file).read_text(errors="replace")


class _Server:
    """The client's end of a process that forks."""

    def __init__(self, names: Sequence[str]) -> None:
        command = [sys.executable, "-m", "support.forking", *names]
        self.process = subprocess.Popen(
            command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        atexit.register(self.end)

    def ask(self, question: dict[str, Any]) -> Any:
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps(question), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except BaseException:  # a test that took too long: what it started ends with it
            self.end()
            raise

    def end(self) -> None:
        atexit.unregister(self.end)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


_SERVERS: dict[tuple[str, ...], _Server] = {}


def _server(host: str) -> _Server:
    names = IMPORTED[host]
    if names not in _SERVERS or _SERVERS[names].process.poll() is not None:
        _SERVERS[names] = _Server(names)
    return _SERVERS[names]


# --- the process that forks


def _serve(names: Sequence[str]) -> None:
    """Answers each line of stdin, which has programs, with a line of their exit codes.

    A program to start is answered with its process, and a process with its exit code.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    for name in names:
        import_module(name)
    if "mmengine.runner.loops" in sys.modules:  # as conftest.py does: it sleeps for 2 s before each epoch but the first
        vars(sys.modules["mmengine.runner.loops"])["time"] = SimpleNamespace(sleep=lambda _: None)
    gc.collect()
    gc.freeze()  # what was imported is no garbage; a Trainer collects at each start
    ended: dict[int, int] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if "start" in asked:
            answer: Any = _fork(asked["start"])
        elif "poll" in asked:
            answer = _code(asked["poll"], ended)
        else:
            running = {_fork(job): number for number, job in enumerate(asked["jobs"])}
            answer = _wait(running, time.monotonic() + asked["timeout"])
        print(json.dumps(answer), file=answers, flush=True)


def _code(process: int, ended: dict[int, int]) -> int | None:
    """The exit code of a process that was started; None while it runs."""
    if process not in ended:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            ended[process] = os.waitstatus_to_exitcode(status)
    return ended.get(process)


def _fork(job: dict[str, Any]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = _run(**job)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(arguments: list[str], folder: str, environment: dict[str, str], said: list[str]) -> int:
    """Runs a program in this process; its exit code."""
    for stream, path in ((0, os.devnull), *enumerate(said, 1)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = ["", *environment["PYTHONPATH"].split(os.pathsep)]
    if arguments[:2] == ["-W", "ignore"]:
        warnings.simplefilter("ignore")
        arguments = arguments[2:]
    try:
        _execute(arguments)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    atexit._run_exitfuncs()
    return 0


def _execute(arguments: list[str]) -> None:
    """Does what ``python ARGUMENTS`` does."""
    how = arguments[0] if arguments[0] in ("-c", "-m") else ""
    what, *rest = arguments[bool(how) :]
    sys.argv = [how or what, *rest]
    if how == "-c":
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), main.__dict__)
    elif how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(what).resolve().parent)
        runpy.run_path(what, run_name="__main__")


def _wait(running: dict[int, int], deadline: float) -> list[int]:
    """The exit codes of processes, in the order of their numbers; what runs at the deadline is killed."""
    codes = [0] * len(running)
    while running:
        if time.monotonic() > deadline:
            for child in running:
                os.kill(child, signal.SIGKILL)
        for child in list(running):
            done, status = os.waitpid(child, 0 if time.monotonic() > deadline else os.WNOHANG)
            if done:
                codes[running.pop(child)] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return codes


if __name__ == "__main__":
    _serve([name for name in sys.argv[1:] if find_spec(name.partition(".")[0])])
