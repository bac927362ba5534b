"""OpenAIPreviewBackend: previews from any OpenAI-compatible server, with the weights it has.

A held-out row is asked as it was trained: by its exact token ids where the server takes them and
has the same tokenizer, else as the whole conversation, tools included. Such a server cannot say
which weights answered, so every result is labelled unverified.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from trainer.config.monitoring_section import MonitoringConfig
from trainer.config.schema import EnvironmentSection
from trainer.errors import ConfigError, PreviewError
from trainer.exchange import AwayError, BoundedClient, KeyRefusedError, RefusedError, TooSlowError
from trainer.models.chat_template import tokenizer_hash
from trainer.preview.base import (
    PreviewRequest,
    PreviewResult,
    health_flags,
    is_match,
    leak_ids,
    special_texts,
)
from trainer.preview.http import OneByOneBackend
from trainer.preview.openai_wire import Answer, read_answer, wire_messages
from trainer.preview.samples import sample_seed

logger = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"

MAX_ANSWER = 16 << 20

START_TIMEOUT_S = 10.0

ENDPOINTS = ("/chat/completions", "/completions")

INVALID = (400, 422)
"""HTTP statuses by which servers say that a field is not for them."""

OWN_SERVER, ID_SERVERS = "trainer", ("vllm", "llamacpp")
"""What `owned_by` says in the list of models of servers that take token ids."""

PROBE = "Hello, world! 3.14 \n\n\u00e9\u4f60 "

RenderAnswer = Callable[[Sequence[dict[str, Any]], dict[str, Any]], str | None]


@dataclass(frozen=True)
class _Field:
    """A field that some servers refuse, and what becomes of the request without it."""

    name: str
    option: str
    default: Any
    pattern: str
    instead: str | None = None
    """Another name that carries the same value; tried before the field is left out."""


FIELDS = (
    _Field("seed", "environment.seed", EnvironmentSection().seed, r"\bseed\b"),
    _Field(
        "max_tokens",
        "monitoring.preview_max_tokens",
        MonitoringConfig().preview_max_tokens,
        r"\bmax_tokens\b",
        instead="max_completion_tokens",
    ),
    _Field(
        "max_completion_tokens",
        "monitoring.preview_max_tokens",
        MonitoringConfig().preview_max_tokens,
        r"\bmax_completion_tokens\b",
    ),
    _Field(
        "temperature",
        "monitoring.preview_temperature",
        MonitoringConfig().preview_temperature,
        r"\btemperature\b",
    ),
)


class OpenAIPreviewBackend(OneByOneBackend):
    """Asks one prompt after the other."""

    backend_type = "openai"

    def __init__(
        self,
        *,
        base_url: str,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 120,
        max_new_tokens: int = 256,
        temperature: float = 0.7,
        seed: int = 42,
        stop: Sequence[str] = (),
        system_prompt: str | None = None,
        compare: Callable[[str, str], bool] | None = None,
        tokenizer: Any = None,
        stop_ids: Collection[int] = (),
        render_answer: RenderAnswer | None = None,
        notice: Callable[[str], None] = logger.warning,
    ) -> None:
        """Take where the server is; nothing is sent yet.

        Args:
            base_url: up to and including `/v1`; a path before it and a query behind it are kept.
            model: None: the only one that the server lists.
            api_key: None: from the environment variable OPENAI_API_KEY, if set.
            timeout: seconds for one prompt.
            stop: texts behind which an answer is cut, as a local preview is.
            compare: the profile's comparison of an answer with golden.
            tokenizer: of the run: counts, looks at the text's health, and lets servers with the
                same one be asked by ids.
            stop_ids: with a tokenizer: tokens that end an answer, before which it is cut.
            render_answer: (conversation, the assistant's turn) -> the answer as the run's template
                writes it, for servers that send calls and thoughts apart; None where it cannot.
            notice: told once what the server does not take.
        """
        self.model, self.timeout = model, timeout
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self.stop, self.system_prompt, self.compare = tuple(stop), system_prompt, compare
        self.tokenizer, self.render_answer, self.notice = tokenizer, render_answer, notice
        self.takes_ids = False
        self._stop_ids = sorted(stop_ids) if tokenizer is not None else []
        self._more: dict[str, Any] = {}
        """Fields of the one server that has them, with questions by ids."""
        key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE)
        parts = urlsplit(base_url)
        path = parts.path.rstrip("/")
        for endpoint in ENDPOINTS:  # whoever copies the address of an endpoint means its server
            path = path.removesuffix(endpoint)
        self._client = self._client_of(urlunsplit(parts._replace(path=path)), key)
        # Some questions that are not OpenAI's are asked beside `/v1`.
        root = urlunsplit(parts._replace(path=re.sub(r"/v\d+$", "", path)))
        self._root = self._client_of(root, key)
        self.url = self._client.url
        self._replaced: dict[str, str | None] = {}
        """Fields that the server refuses -> the name to use instead; None: left out."""
        self._tool_choice: str | None = None

    def _client_of(self, url: str, key: str | None) -> BoundedClient:
        return BoundedClient(
            url,
            key,
            timeout_s=self.timeout,
            timeout_name="time-out",
            max_answer=MAX_ANSWER,
            kind="OpenAI-compatible server",
            key_variable=KEY_VARIABLE,
            # Outside it is reached by the proxy of this shell; the machine under the desk is not.
            trust_env=not _is_near(urlsplit(url).hostname or ""),
        )

    def close(self) -> None:
        """Close the connections."""
        super().close()
        self._root.close()

    # ---- at start

    def check(self) -> None:
        """Find out, once, whether the server can be asked at all, and how.

        Raises:
            ConfigError: it refuses the key, does not have the model, is no such server, or refuses
                a seed that was set.
            AwayError: nobody is there.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        try:
            owner = self._find_model(deadline)
            self.takes_ids = self._finds_own_tokenizer(owner, deadline)
            if owner == "vllm":
                self._more = {"skip_special_tokens": False, "stop_token_ids": self._stop_ids}
            if self.seed != EnvironmentSection().seed:
                self._try_seed(time.monotonic() + self.timeout)
        except TooSlowError as error:
            raise TooSlowError(
                f"{self.url} did not answer within {START_TIMEOUT_S:g} s at start."
            ) from error
        except AwayError:
            raise
        except KeyRefusedError as error:
            raise ConfigError(f"{self.url} refuses the key; set {KEY_VARIABLE}.") from error
        except PreviewError as error:
            raise ConfigError(f"monitoring.openai_base_url={self.url}: {error}") from error

    def _find_model(self, deadline: float) -> str:
        """Choose the model; one that is named is taken at its word if the list is closed.

        Returns:
            What the list says of who serves it; "" where it says nothing.
        """
        owners: dict[str, str] = {}
        try:
            _, found = self._client.call("GET", "/models", deadline)
            owners = {str(one["id"]): str(one.get("owned_by", "")) for one in found["data"]}
        except RefusedError:
            pass  # some servers do not list their models
        except (KeyError, TypeError, AttributeError) as error:
            raise PreviewError("its list of models is none; is it OpenAI-compatible?") from error
        if self.model is None:
            if len(owners) != 1:
                shown = ", ".join(list(owners)[:8]) or "none"
                raise PreviewError(f"set monitoring.openai_model; the server lists {shown}")
            [self.model] = owners
        elif owners and self.model not in owners:
            raise PreviewError(
                f"no model {self.model!r} there; it lists {', '.join([*owners][:8])}"
            )
        return owners.get(self.model, "")

    def _finds_own_tokenizer(self, owner: str, deadline: float) -> bool:
        """Whether ids can be sent: the server takes them, and they mean the same text there."""
        if self.tokenizer is None or owner not in (OWN_SERVER, *ID_SERVERS):
            return False
        try:
            if owner == OWN_SERVER:
                _, found = self._root.call("GET", "/info", deadline)
                return bool(found["tokenizer_hash"] == tokenizer_hash(self.tokenizer))
            text = PROBE + "".join(special_texts(self.tokenizer).values())
            # One body for both: each reads its own names and leaves the others alone.
            body = {"model": self.model, "prompt": text, "content": text, "parse_special": True}
            body |= {"add_special_tokens": False, "add_special": False}
            _, found = self._root.call("POST", "/tokenize", deadline, body)
            return bool(found["tokens"] == self._encode(text))
        except AwayError:
            raise
        except (PreviewError, KeyError, TypeError) as error:
            logger.info("%s is asked by messages, not by ids (%s)", self.url, error)
            return False

    def _try_seed(self, deadline: float) -> None:
        """Ask for one token, so that a seed that was set and is refused stops the start.

        Raises:
            PreviewError: it is refused. What else may be wrong is told with the first preview.
        """
        body = self._body({"messages": [{"role": "user", "content": "Hi"}]}, 1)
        try:
            self._post("/chat/completions", body, deadline)
        except _ExplicitError:
            raise
        except PreviewError as error:
            logger.info("%s: a first question was not answered (%s)", self.url, error)

    # ---- one prompt

    def _ask(self, request: PreviewRequest, step: int, max_new_tokens: int) -> PreviewResult:
        started = time.monotonic()
        deadline = started + self.timeout
        if self.model is None:
            self._find_model(deadline)
        path, question = self._question(request)
        body = self._body(question, max_new_tokens, request.sample)
        found = self._post(path, body, deadline)
        try:
            answer = read_answer(found, max_new_tokens)
        except ValueError as error:
            raise PreviewError(f"{self.url} sent a completion of another shape.") from error
        return self._result(request, step, answer, time.monotonic() - started)

    def _question(self, request: PreviewRequest) -> tuple[str, dict[str, Any]]:
        """The endpoint, and what the prompt is there."""
        ids = request.prompt_token_ids
        if self.takes_ids and ids:
            return "/completions", {"prompt": list(ids), **self._more}
        if ids and not request.messages:  # plain text, which no template ever saw
            return "/completions", {"prompt": request.prompt}
        turns: Sequence[dict[str, Any]] = request.messages
        if not turns:
            turns = [{"role": "user", "content": request.prompt}]
            if self.system_prompt is not None:
                turns = [{"role": "system", "content": self.system_prompt}, *turns]
        messages, tools = wire_messages(turns)
        return "/chat/completions", {"messages": messages, **({"tools": tools} if tools else {})}

    def _body(
        self, question: dict[str, Any], max_new_tokens: int, sample: int = 0
    ) -> dict[str, Any]:
        return {
            "model": self.model,
            **question,
            "max_tokens": max_new_tokens,
            "temperature": self.temperature,
            "seed": sample_seed(self.seed, sample),
        }

    def _post(self, path: str, body: dict[str, Any], deadline: float) -> Any:
        """Ask; fields that the server refuses by name are asked without, once each.

        Raises:
            PreviewError: what is refused was set by the user, or is no such field.
        """
        replaced, tool_choice = dict(self._replaced), self._tool_choice
        reasons: dict[str, str] = {}
        while True:
            sent = _without(body, replaced)
            if tool_choice is not None and "tools" in sent:
                sent["tool_choice"] = tool_choice
            try:
                _, found = self._client.call("POST", path, deadline, sent)
                break
            except RefusedError as error:
                words = str(error)
                if "tools" in sent and tool_choice is None and _names_tool_choice(error):
                    tool_choice = "none"  # the tools stay in the prompt, the text is not parsed
                    continue
                field = self._refused_field(error, sent)
                if field is None:
                    raise
                replaced[field.name] = field.instead
                reasons[field.name] = words
        self._tell(replaced, reasons)
        self._replaced, self._tool_choice = replaced, tool_choice
        return found

    def _refused_field(self, error: RefusedError, sent: dict[str, Any]) -> _Field | None:
        """The default field that a refusal names.

        Raises:
            PreviewError: it names one that was set to something else than the default.
        """
        if error.status not in INVALID:
            return None
        # What is behind the colon are the server's words; the address may name anything.
        words = str(error).partition("): ")[2]
        for field in FIELDS:
            if field.name not in sent or not re.search(field.pattern, words):
                continue
            # The seeds of further samples are made of the one that was set, or not.
            value = self.seed if field.name == "seed" else sent[field.name]
            if field.instead is not None or value == field.default:
                return field
            raise _ExplicitError(
                f"{field.option}={value!r} is set, and {self.url} refuses "
                f"{field.name!r}: {words} Leave {field.option} at its default, which is then not "
                "sent, or take previews from elsewhere (monitoring.preview_backend)."
            )
        return None

    def _tell(self, replaced: dict[str, str | None], reasons: dict[str, str]) -> None:
        for name, words in reasons.items():
            instead = replaced[name]
            how = f"asked with {instead!r} instead" if instead else "asked without it"
            if name == "seed":
                how += ", so that a preview may read differently each time"
            self.notice(f"previews: {self.url} refuses {name!r} and is {how} ({words})")

    # ---- its answer

    def _result(
        self, request: PreviewRequest, step: int, answer: Answer, seconds: float
    ) -> PreviewResult:
        texts = [self._cut(text) for text in self._readings(request, answer)]
        text, is_stopped = next(
            (one for one in texts if is_match(request, one[0], self.compare)), texts[0]
        )
        token_ids = self._encode(text)
        tokens = answer.num_tokens
        if tokens is None:
            tokens = len(token_ids) if self.tokenizer is not None else 0
        is_stopped = is_stopped or not answer.is_cut
        return PreviewResult(
            step=step,
            prompt=request.prompt,
            text=text,
            raw_text=text,
            golden_answer=request.golden_answer,
            matches=is_match(request, text, self.compare),
            tokens_generated=tokens,
            generation_time_sec=seconds,
            tokens_per_sec=tokens / max(seconds, 1e-9),
            finish_reason="stop" if is_stopped else "length",
            weights="unverified",
            backend_type=self.backend_type,
            prompt_id=request.prompt_id,
            held_out=request.held_out,
            health=health_flags(
                text=text,
                token_ids=token_ids,
                prompt=request.prompt,
                golden=request.golden_answer,
                is_stopped=is_stopped,
                leak_ids=self._leaks(request),
            ),
        )

    def _readings(self, request: PreviewRequest, answer: Answer) -> list[str]:
        """The answer as text, what is shown first: golden answers may hold the thought or not."""
        if not (answer.thought or answer.tool_calls):
            return [answer.content]
        whole = None
        if self.render_answer is not None:
            whole = self.render_answer(request.messages, answer.turn())
        readings = [whole or answer.plain_text(), answer.plain_text()]
        if answer.content and not answer.tool_calls:
            readings.insert(0, answer.content)
        return readings

    def _cut(self, text: str) -> tuple[str, bool]:
        """The text up to its first stop token and including its first stop string.

        The server is not told to stop there: it would leave the stop string out, and an answer
        that has one could not be told from one that has not.
        """
        stop_tokens = [self.tokenizer.decode([index]) for index in self._stop_ids]
        ends = [text.find(stop) for stop in stop_tokens if stop in text]
        ends += [text.find(stop) + len(stop) for stop in self.stop if stop in text]
        return (text[: min(ends)], True) if ends else (text, False)

    def _encode(self, text: str) -> list[int]:
        """Tokens of a text; numbers of its words where there is no tokenizer."""
        if self.tokenizer is None:
            words = text.split()
            numbers = {word: n for n, word in enumerate(dict.fromkeys(words))}
            return [numbers[word] for word in words]
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _leaks(self, request: PreviewRequest) -> frozenset[int]:
        if self.tokenizer is None:
            return frozenset()
        return leak_ids(special_texts(self.tokenizer), [request.golden_answer])


class _ExplicitError(PreviewError):
    """The server refuses a value that somebody chose."""


def _is_near(host: str) -> bool:
    """Whether a host is this machine or one of the local network, by its name or address."""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith((".local", ".localhost"))


def _without(body: dict[str, Any], replaced: dict[str, str | None]) -> dict[str, Any]:
    """The body with its refused fields renamed or left out, as often as one leads to the next."""
    sent = dict(body)
    for field in FIELDS:
        if field.name in replaced and field.name in sent:
            value, instead = sent.pop(field.name), replaced[field.name]
            if instead is not None:
                sent[instead] = value
    return sent


def _names_tool_choice(error: RefusedError) -> bool:
    """Whether a server cannot choose tools by itself, such as vLLM without a parser for calls."""
    return error.status in INVALID and re.search(r"tool[ _-]choice", str(error)) is not None
