"""A server of a causal language model that answers as vLLM and SGLang do, with real log-probabilities, and fails when it is told to.

``python -m support.language_server FOLDER PORT`` serves the model and the tokenizer in a folder. ``POST /faults`` with a list of
faults has each of the next requests for probabilities fail in one way; ``GET /seen`` says how many there were, and how many at a time.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from support.forking import Program, Started
from support.processes import free_port

VLLM, SGLANG = "/v1/completions", "/generate"


class Refused(Exception):
    """An answer that is an error of HTTP."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


class Language:
    """The model, the tokenizer and the faults to come."""

    def __init__(self, folder: str, told: Any) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.told = told
        self.lock = threading.Lock()
        self.faults: list[dict[str, Any]] = []
        self.seen = {"requests": 0, "now": 0, "together": 0}

    def logs(self, ids: list[int], raw: bool = False) -> list[list[float]]:
        """The log-probabilities after each token, ``(L, V)``."""
        import torch

        with self.lock, torch.no_grad():
            logits = self.model(input_ids=torch.tensor([ids])).logits[0].float()
        return (logits if raw else logits.log_softmax(-1)).tolist()

    def check(self, body: dict[str, Any], k: int) -> None:
        if body.get("model") not in self.told.name.split(","):
            raise Refused(404, f"The model `{body['model']}` does not exist.")
        most = self.told.max_logprobs
        if most >= 0 and k > most:
            raise Refused(400, f"Requested prompt logprobs of {k}, which is greater than max allowed: {most}")


def largest(logs: list[float], k: int) -> list[int]:
    return sorted(range(len(logs)), key=lambda token: -logs[token])[:k]


def entries(language: Language, logs: list[float], own: int, k: int) -> dict[str, dict[str, Any]]:
    """The own token of a place and the k largest ones, as vLLM orders and names them."""
    ranks = {own: sum(one >= logs[own] for one in logs)} | {
        token: rank for rank, token in enumerate(largest(logs, k), 1)
    }
    told = language.tokenizer.convert_ids_to_tokens
    return {str(t): {"logprob": logs[t], "rank": rank, "decoded_token": told(t)} for t, rank in ranks.items()}


def completion(language: Language, body: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """vLLM's /v1/completions of one prompt of token ids."""
    fault = told.get("kind", "")
    ids, k = list(body["prompt"]), body.get("prompt_logprobs") or body.get("logprobs") or 0
    language.check(body, k)
    k -= fault == "few"
    if fault == "bos":
        ids = [1, *ids]
    if fault == "other":
        ids[-1] = (ids[-1] + 1) % 40
    logs = language.logs(ids, raw=fault == "logits")
    given = [None, *(entries(language, one, token, k) for one, token in zip(logs, ids[1:], strict=False))]
    new = largest(logs[-1], 1)[0]
    last = {f"token_id:{t}": logs[-1][t] for t in largest(logs[-1], k)}
    tokens, top, own = [new], [last], [logs[-1][new]]
    if body.get("echo"):
        tokens, own = [*ids, new], [None, *(one[token] for one, token in zip(logs, [*ids[1:], new], strict=True))]
        top = [None, *({f"token_id:{t}": v["logprob"] for t, v in one.items()} for one in given[1:]), last]
    if not body.get("return_tokens_as_token_ids"):
        raise Refused(400, "the tests ask for tokens by their ids")
    choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "length"}
    choice["logprobs"] = {
        "tokens": [f"token_id:{t}" for t in tokens],
        "token_logprobs": own,
        "top_logprobs": top,
        "text_offset": [],
    }
    if "prompt_logprobs" in body and fault != "plain":
        choice["prompt_logprobs"] = given if fault != "short" else given[:-1]
    if body.get("return_token_ids") and told.get("repeats", language.told.repeats):
        choice |= {"prompt_token_ids": ids, "token_ids": [new]}
    usage = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 0,
        "model": language.told.name,
        "choices": [choice],
        "usage": usage,
    }


def generation(language: Language, body: dict[str, Any]) -> dict[str, Any]:
    """SGLang's /generate of one prompt of token ids."""
    ids, k = list(body["input_ids"]), body["top_logprobs_num"]
    assert body["return_logprob"] and body["logprob_start_len"] == 0 and body["sampling_params"]["max_new_tokens"] == 1
    logs = language.logs(ids)
    new = largest(logs[-1], 1)[0]
    top = [[[one[t], t, None] for t in largest(one, k)] for one in logs]
    own = [[None, ids[0], None], *([one[t], t, None] for one, t in zip(logs, ids[1:], strict=False))]
    return {
        "text": "",
        "meta_info": {
            "prompt_tokens": len(ids),
            "input_token_logprobs": own,
            "input_top_logprobs": [None, *top[:-1]],
            "output_token_logprobs": [[logs[-1][new], new, None]],
            "output_top_logprobs": [top[-1]],
        },
    }


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    language: Language

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body: Any) -> None:
        probabilities, fault = self.path in (VLLM, SGLANG), {}
        seen = self.language.seen
        if probabilities:
            with self.language.lock:
                seen["requests"] += 1
                seen["now"] += 1
                seen["together"] = max(seen["together"], seen["now"])
                fault = self.language.faults.pop(0) if self.language.faults else {}
        try:
            time.sleep(fault.get("delay", self.language.told.delay if probabilities else 0))
            if "status" in fault:
                raise Refused(fault["status"], "Engine is busy", **fault.get("headers", {}))
            self.send(200, self.found(body, fault), fault.get("kind", ""))
        except Refused as error:
            told = {"error": {"message": str(error), "type": "BadRequestError", "param": None, "code": error.status}}
            self.send(error.status, told, "", **error.headers)
        finally:
            if probabilities:
                with self.language.lock:
                    seen["now"] -= 1

    def found(self, body: Any, fault: dict[str, Any]) -> Any:
        language = self.language
        if self.path == "/faults":
            language.faults[:] = body
            return {}
        if self.path == "/seen":
            return language.seen
        if language.told.key and self.headers.get("Authorization") != f"Bearer {language.told.key}":
            raise Refused(401, "Unauthorized")
        if self.path == "/v1/models":
            return {
                "object": "list",
                "data": [{"id": name, "object": "model"} for name in language.told.name.split(",")],
            }
        if self.path == "/tokenize" and language.told.tokenizes:
            ids = language.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
            return {"count": len(ids), "max_model_len": 64, "tokens": ids}
        if self.path == VLLM:
            return completion(language, body, fault)
        if self.path == SGLANG:
            return generation(language, body)
        raise Refused(404, "Not Found")

    def send(self, status: int, found: Any, fault: str, **headers: str) -> None:
        text = json.dumps(found).encode()
        sent = text[: len(text) // 2] if fault in ("cut", "half") else text
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent if fault == "half" else text)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(sent)
        if fault == "cut":
            self.wfile.flush()
            self.close_connection = True


class Served:
    """A server in another process.

    Attributes:
        url: its address.
        process: the process.
    """

    def __init__(self, folder: Path, port: str | None = None, **settings: Any) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        told = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        command = ["-W", "ignore", "-m", "support.language_server", str(folder), self.port, *told]
        self.process = Started(Program(command, environment=dict(CUDA_VISIBLE_DEVICES="")), host="transformers")
        for _ in range(1200):
            assert self.process.code() is None, self.process.errors()
            try:
                self.ask("/seen")
            except OSError:
                time.sleep(0.05)
            else:
                return
        raise AssertionError("the server did not start")

    def ask(self, path: str, body: Any = None) -> Any:
        """What it answers."""
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data), timeout=60) as answer:
            return json.loads(answer.read())

    def fail(self, *faults: dict[str, Any]) -> None:
        """Have the next requests for probabilities fail."""
        self.ask("/faults", list(faults))

    def end(self) -> None:
        """SIGKILL."""
        self.process.end()


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[Served]:
    """A server of the model in a folder, until the block ends."""
    server = Served(folder, **settings)
    try:
        yield server
    finally:
        server.end()


@contextmanager
def small_one(folder: Path) -> Iterator[Served]:
    """A server of a small model and a tokenizer that are written to a folder, for the programs of the pages."""
    from kdgraft_nlp.data import train_tokenizer
    from support import nlp

    tokenizer = train_tokenizer(["a fine film", "a dull film", "fine work", "dull work"] * 8, vocab_size=60)
    nlp.model("llama", 32, 2, seed=2, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with serving(folder) as found:
        yield found


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("port", type=int)
    parser.add_argument("--name", default="teacher")
    parser.add_argument("--max-logprobs", type=int, default=-1)
    parser.add_argument("--key", default="")
    parser.add_argument("--tokenizes", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--delay", type=float, default=0.0)
    told = parser.parse_args()
    Handler.language = Language(told.folder, told)
    ThreadingHTTPServer(("127.0.0.1", told.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
