"""An HTTP client for servers of language models: time-outs, retries with backoff, and errors in one line."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from threading import Event
from typing import Any, TypeVar

from kdgraft.errors import DistillError, check_number

from .checks import flat

try:
    import httpx2 as httpx
except ImportError:  # huggingface_hub before 2
    import httpx  # type: ignore[import-not-found,no-redef]

logger = logging.getLogger("kdgraft")
T = TypeVar("T")
RETRIED = (408, 425, 429, 500, 502, 503, 504)
"""The statuses of a server that may answer later."""
CONNECTING = 10.0
"""The seconds after which a connection that is not there yet counts as lost."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""The seconds of the first pause before a request is repeated, and of the longest one that the client chooses by itself."""


class Refused(DistillError):
    """A request that a server refused, and would refuse again.

    Attributes:
        status: the status of HTTP.
        said: what the server said.
    """

    def __init__(self, message: str, status: int, said: str) -> None:
        super().__init__(message)
        self.status, self.said = status, said


class Server:
    """A server that answers in JSON.

    Args:
        url: its address, ``http://host:port``, with or without ``/v1``.
        api_key: the name of the environment variable that holds the key; ``None`` for a server without one.
        timeout: the seconds to wait for an answer.
        retries: how often a request is repeated, with pauses that double and vary at random. A server that says when it will be
            there again (``Retry-After``) is asked no sooner.
        concurrency: the number of requests at a time.

    Raises:
        DistillError: an argument makes no sense, or the environment has no such variable.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout: float = 120.0,
        retries: int = 5,
        concurrency: int = 16,
    ) -> None:
        if not isinstance(url, str) or not re.match(r"https?://[^/\s]+", url):
            raise DistillError(
                f"Served: url must be the address of a server, such as http://localhost:8000/v1, got {url!r}"
            )
        check_number("Served", "timeout", timeout, 0, above=True)
        check_number("Served", "retries", retries, 0, whole=True)
        check_number("Served", "concurrency", concurrency, 1, whole=True)
        self.root = re.sub(r"(/v1)?/*$", "", url)
        self.retries, self.concurrency = retries, concurrency
        self._key, self._timeout = _key_in(api_key), float(timeout)
        self._key_name = api_key
        self._opened: httpx.Client | None = None
        self._chance = random.Random()  # of its own: pauses do not change what a training draws

    def get(self, path: str) -> Any:
        """Return the answer to a GET.

        Raises:
            Refused: the server refuses it.
            DistillError: the server is not there, or answers nothing that can be read.
        """
        return self._ask("GET", path, None, Event())

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the answer to a POST; errors as for :meth:`get`."""
        return self._ask("POST", path, body, Event())

    def post_all(self, path: str, bodies: Sequence[Mapping[str, Any]], read: Callable[[int, Any], T]) -> list[T]:
        """Return what ``read(place, answer)`` makes of the answers to some POSTs, which are sent side by side.

        The first error ends those that wait; it is raised as it is.
        """
        if not bodies:
            return []
        stop = Event()

        def one(place: int) -> T:
            return read(place, self._ask("POST", path, bodies[place], stop))

        with ThreadPoolExecutor(min(self.concurrency, len(bodies))) as pool:
            futures: list[Future[T]] = [pool.submit(one, place) for place in range(len(bodies))]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                stop.set()
                for future in futures:
                    future.cancel()
        failed = [error for f in futures if not f.cancelled() and (error := f.exception()) is not None]
        if failed:
            raise next((error for error in failed if not isinstance(error, _Stopped)), failed[0])
        return [future.result() for future in futures]

    @property
    def _client(self) -> httpx.Client:
        if self._opened is None:
            headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
            self._opened = httpx.Client(
                headers=headers,
                timeout=httpx.Timeout(self._timeout, connect=min(self._timeout, CONNECTING), pool=None),
                limits=httpx.Limits(max_connections=self.concurrency),
            )
        return self._opened

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None, stop: Event) -> Any:
        began, told = time.monotonic(), ""
        for attempt in range(self.retries + 1):
            if stop.is_set():
                raise _Stopped("another request failed")
            try:
                return self._once(method, path, body)
            except _Later as later:
                told = str(later)
                pause = max(later.pause, min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) * self._chance.uniform(0.5, 1.5))
            if attempt < self.retries:
                if pause > LONGEST_PAUSE:
                    logger.warning("the server at %s %s; it is asked again in %.0f s", self.root, told, pause)
                stop.wait(pause)
        raise DistillError(
            f"the server at {self.root} {told}, after {self.retries + 1} tries in {time.monotonic() - began:.0f} s; start it again and "
            "resume, or raise timeout or retries"
        )

    def _once(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        try:
            answer = self._client.request(method, self.root + path, json=body)
        except httpx.RequestError as error:  # no connection, a time-out, a connection that was cut
            raise _Later(f"does not answer ({type(error).__name__}{': ' if str(error) else ''}{flat(error)})") from None
        except httpx.InvalidURL as error:
            raise DistillError(f"{self.root} is no address of a server: {flat(error)}") from None
        if answer.is_success:
            try:
                return json.loads(answer.content)
            except ValueError:
                raise _Later("sent an answer that is not complete JSON") from None
        if answer.status_code in RETRIED:
            raise _Later(f"answers {answer.status_code} ({_said(answer)})", _asked_for(answer))
        raise self._refused(path, answer)

    def _refused(self, path: str, answer: httpx.Response) -> Refused:
        status, said = answer.status_code, _said(answer)
        if status in (401, 403):
            key = f"the key in {self._key_name}" if self._key_name else "requests without a key"
            hint = f"refuses {key} ({status}); set api_key to the name of the environment variable with the right one"
        else:
            hint = f"refuses {path} ({status}): {said}"
        return Refused(f"the server at {self.root} {hint}", status, said)


class _Later(Exception):
    """A request that failed for the moment.

    Attributes:
        pause: the seconds that the server asks to wait.
    """

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


class _Stopped(DistillError):
    """A request that was given up because another one failed."""


def _key_in(variable: str | None) -> str | None:
    """Return the key in an environment variable; its value, and what may be a key itself, are in no message."""
    if variable is None:
        return None
    if not isinstance(variable, str) or not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise DistillError(
            "Served: api_key is the name of the environment variable that holds the key, such as OPENAI_API_KEY, not the key itself"
        )
    if not os.environ.get(variable):
        raise DistillError(f"Served: the environment has no {variable}, which api_key names; export it")
    return os.environ[variable]


def _asked_for(answer: httpx.Response) -> float:
    """Return the seconds that a server asks to wait, in either form of ``Retry-After``; 0 if it does not."""
    told = answer.headers.get("Retry-After", "")
    try:
        return max(float(told), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(told).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return 0.0


def _said(answer: httpx.Response) -> str:
    """Return what a server says of an error, in one line: vLLM, SGLang and others put it at different places."""
    try:
        found = json.loads(answer.content)
        for name in ("error", "message", "detail"):
            found = found.get(name, found) if isinstance(found, dict) else found
    except ValueError:
        found = answer.text
    return flat(ValueError(found)) or answer.reason_phrase
