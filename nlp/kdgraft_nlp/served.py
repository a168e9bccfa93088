"""A teacher behind a server of language models, such as vLLM's: it is asked for the log-probabilities of the tokens at each step."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdgraft.errors import DistillError, WiringError, check_number, nearest
from kdgraft.sources import KnownRecording, Teacher
from kdgraft.taps import Recording, Tap
from kdgraft.terms import ScoreTerm, Term
from kdgraft.topk import TopK

from .absent import Absent
from .answers import APIS, Known, known_of, too_few
from .registry import SOURCES
from .server import Refused, Server
from .stored import FOLLOW, LOGITS, texts_in
from .tasks import STORED, task_of

logger = logging.getLogger("kdgraft")

ENTRIES = 2000
"""The entries of the tokenizer that are compared with the server's."""
Kind = Literal["vllm", "echo", "sglang"]


class ServedOutputs:
    """The log-probabilities that a server gives; a :class:`kdgraft.sources.cached.Outputs`.

    Attributes:
        server: the server.
        api: how it is asked; one of :data:`kdgraft_nlp.answers.APIS`.
        model: the name of the model there.
        top_k: the number of entries that were asked for.
        classes: the number of entries of the student's vocabulary.
        temperatures: those at which terms compare; others than 1 only where all entries are known.
    """

    def __init__(self, server: Server, api: Kind, model: str, top_k: int) -> None:
        self.server, self.api, self.model, self.top_k = server, api, model, top_k
        self.classes = 0
        self.temperatures: tuple[float, ...] = (1.0,)

    @property
    def k(self) -> int:
        """The number of entries that the server gives of each token."""
        return min(self.top_k, self.classes)

    @property
    def whole(self) -> bool:
        """True if that is all entries."""
        return self.k == self.classes

    def ask(self, texts: Sequence[Sequence[int]]) -> list[Known]:
        """Return what the server knows of each text.

        Args:
            texts: the token ids of each.

        Raises:
            DistillError: the server is gone, refuses a text, or answers anything else than its log-probabilities.
        """
        how = APIS[self.api]

        def read(place: int, answer: Any) -> Known:
            return known_of(self.api, answer, texts[place], self.k, self.classes)

        try:
            return self.server.post_all(how.path, [how.body(ids, self.k, self.model) for ids in texts], read)
        except Refused as error:
            if "max allowed" in error.said or "max_logprobs" in error.said:
                raise DistillError(too_few("fewer", self.k)) from None
            raise

    def look_up(self, ids: Sequence[Any], inputs: Mapping[str, Tensor], taps: Sequence[Tap]) -> Recording | None:
        others = sorted(inputs.keys() - FOLLOW - {"input_ids"})
        if others or "input_ids" not in inputs:
            raise DistillError(
                f"a server reads token ids alone, not {others[0] if others else 'inputs of another kind'}; give the teacher itself"
            )
        tokens = inputs["input_ids"]
        texts = [(row, where.cpu()) for row, where in texts_in(inputs)[1] if where is not None and len(where)]
        answers = self.ask([tokens[row][where.to(tokens.device)].tolist() for row, where in texts])
        entries = torch.zeros(*tokens.shape, self.k, dtype=torch.long)
        logs = torch.zeros(*tokens.shape, self.k, dtype=torch.float64)
        for (row, where), known in zip(texts, answers, strict=True):
            entries[row, where], logs[row, where] = torch.from_numpy(known.ids), torch.from_numpy(known.logs)
        found = TopK.of_largest(entries, logs, self.classes, self.temperatures).to(tokens.device)
        return KnownRecording(dict.fromkeys(taps, found))  # type: ignore[arg-type]

    def lacks(self, ids: Sequence[Any], taps: Sequence[Tap]) -> str | None:
        return None

    def store(self, *_: Any) -> None:
        """Do nothing: a server is asked anew."""

    def example(self, inputs: Mapping[str, Tensor], taps: Sequence[Tap]) -> Recording:
        for tap in taps:
            if str(tap) != LOGITS:
                raise WiringError(
                    f"a server gives the probabilities of tokens alone, and a term reads '{tap}' of the teacher; leave out the term, or give "
                    "the teacher itself"
                )
        tokens = inputs["input_ids"]
        device = tokens.device if tokens.device.type != "meta" else "cpu"
        return KnownRecording({tap: torch.zeros(*tokens.shape, self.classes, device=device) for tap in taps})


@SOURCES.register
class Served(Absent):
    """A causal language model behind a server such as vLLM's, which is asked at each step for the log-probabilities of the texts.

    The server gives the ``top_k`` most probable entries of each token at temperature 1. Divergences are computed with all other
    entries joined into one, as with :class:`~kdgraft_nlp.Stored`; at other temperatures only where the server gives all entries.
    It reads the student's token ids, so that both must have one tokenizer; this is checked where the server has ``/tokenize``.

    Args:
        url: the address of the server, ``http://localhost:8000/v1``.
        model: the name of the model there; ``None`` for the only one.
        top_k: the number of entries of each token. vLLM gives 20 at most unless it was started with ``--max-logprobs``.
        api: ``"vllm"`` asks ``/v1/completions`` for ``prompt_logprobs``; ``"echo"`` asks it to repeat the prompt with its
            ``logprobs``, and tokens as ids; ``"sglang"`` asks SGLang's ``/generate``.
        api_key: the name of the environment variable that holds the server's key.
        timeout: the seconds to wait for an answer.
        retries: how often a request is repeated that the server did not answer, or refused for the moment (429, 5xx).
        concurrency: the number of texts that are asked for at a time.

    Raises:
        DistillError: an argument makes no sense.

    Example:
        >>> Served("localhost:8000")
        Traceback (most recent call last):
        kdgraft.errors.DistillError: Served: url must be the address of a server, such as http://localhost:8000/v1, got 'localhost:8000'
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        top_k: int = 50,
        *,
        api: Kind = "vllm",
        api_key: str | None = None,
        timeout: float = 120.0,
        retries: int = 5,
        concurrency: int = 16,
    ) -> None:
        check_number("Served", "top_k", top_k, 1, whole=True)
        if api not in APIS:
            raise DistillError(f"Served: api must be one of {', '.join(APIS)}, got {api!r}")
        if model is not None and (not isinstance(model, str) or not model):
            raise DistillError(f"Served: model must be the name of a model of the server, got {model!r}")
        server = Server(url, api_key, timeout, retries, concurrency)
        self.outputs = ServedOutputs(server, api, model or "", top_k)
        self._connected = False
        super().__init__(Teacher(nn.Identity()), self.outputs, absent=True)

    def stand_for(self, student: nn.Module) -> None:
        task = task_of(student)
        if task != "causal":
            raise DistillError(
                f"a server gives the next tokens' probabilities of causal language models, and {type(student).__name__} is none; give the "
                "teacher itself"
            )
        own: Any = student
        kind: Any = type(student)
        with torch.device("meta"):
            self.model = kind(copy.deepcopy(own.config)).requires_grad_(False).eval()
        setattr(self.model, STORED, True)
        self.outputs.classes = int(own.get_output_embeddings().out_features)

    def load(self) -> None:
        """Find the model on the server, and ask for one text.

        Raises:
            DistillError: the server is not there, lacks the model, or gives no log-probabilities as they are needed.
        """
        if not self.outputs.classes:
            raise WiringError(
                "Served teaches language models of Hugging Face; give it to a DistillTrainer, or to distill"
            )
        if self._connected:
            return
        self.outputs.model = self._model_there()
        self.outputs.ask([[0, min(1, self.outputs.classes - 1)]])
        self._connected = True

    def check_terms(self, terms: Sequence[Term]) -> None:
        told = {float(getattr(term, "temperature", 1.0)) for term in terms}
        for term in terms:
            if isinstance(term, ScoreTerm) and not term.joins:
                raise WiringError(
                    f"{term.name} compares all classes one by one, and a server gives probabilities; take a divergence such as ForwardKL, or "
                    "give the teacher itself"
                )
            one = float(getattr(term, "temperature", 1.0))
            if one != 1 and not self.outputs.whole:
                raise WiringError(
                    f"{term.name}: at temperature {one:g} the {self.outputs.k} largest probabilities do not say what the others are; take "
                    f"temperature 1, or top_k={self.outputs.classes} for all entries"
                )
        self.outputs.temperatures = tuple(sorted(told | {1.0}))

    def check_tokenizer(self, tokenizer: Any) -> None:
        if tokenizer is None:
            self._tell_unchecked("no tokenizer is known here; pass processing_class=tokenizer to the trainer")
            return
        text = _probe(tokenizer)
        body = {"model": self.outputs.model, "prompt": text, "add_special_tokens": False}
        try:
            answer = self.outputs.server.post("/tokenize", body)
            theirs = [int(token) for token in answer["tokens"]]
        except Refused as error:
            if error.status in (401, 403):
                raise
            self._tell_unchecked(f"/tokenize answers {error.status}")
            return
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, DistillError):
                raise
            self._tell_unchecked("/tokenize answers in another form")
            return
        ours = tokenizer(text, add_special_tokens=False)["input_ids"]
        if list(ours) != theirs:
            raise DistillError(
                f"the model {self.outputs.model!r} on the server has another tokenizer than the student, whose token ids it would read; "
                "take a student of the same family"
            )

    def _tell_unchecked(self, why: str) -> None:
        logger.warning(
            "whether the server's tokenizer is the student's could not be checked (%s); it must be, as token ids are sent",
            why,
        )

    def _model_there(self) -> str:
        """Return the name of the model on the server."""
        named = self.outputs.model
        try:
            names = [str(one["id"]) for one in self.outputs.server.get("/v1/models")["data"]]
        except Refused as error:
            if error.status != 404 or not named:
                raise
            return named  # a server without the list
        except (KeyError, TypeError):
            raise DistillError(
                f"{self.outputs.server.root} lists no models at /v1/models; is it a server of language models?"
            ) from None
        if not named and len(names) == 1:
            return names[0]
        if named not in names:
            said = (
                f"has no model {named!r}{nearest(named, names)}"
                if named
                else f"has several models; set model to one of {', '.join(names)}"
            )
            raise DistillError(f"the server at {self.outputs.server.root} {said}")
        return named


def _probe(tokenizer: Any) -> str:
    """Return a text in which entries from all over a vocabulary are, and its special tokens, but padding, which is never sent."""
    ids = sorted(tokenizer.get_vocab().values())
    chosen = islice(ids, 0, None, max(len(ids) // ENTRIES, 1))
    special = {token for token in tokenizer.all_special_tokens if token != tokenizer.pad_token}
    padding = {tokenizer.pad_token_id}
    return "\n".join([*(tokenizer.decode([one]) for one in chosen if one not in padding), *sorted(special)])
