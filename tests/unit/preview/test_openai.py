"""Backend `openai`: the whole question goes out, every shape of answer comes in, health is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from trainer.core.previews import answer_text
from trainer.data.template import ChatTemplate
from trainer.errors import ConfigError
from trainer.models.chat_template import tokenizer_hash
from trainer.preview.base import PreviewRequest, PreviewResult
from trainer.preview.openai import OpenAIPreviewBackend
from trainer.preview.samples import sample_requests, sample_seed
from trainer.preview.scheduler import samples_of

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
Reply = Callable[[str, dict[str, Any]], tuple[int, Any]]


def chat(content: Any = "ok", reason: str | None = "stop", **message: Any) -> dict[str, Any]:
    said = {"role": "assistant", "content": content, **message}
    return {"choices": [{"index": 0, "message": said, "finish_reason": reason}]}


class Fake:
    """An OpenAI-compatible server: `reply` decides, `asked` keeps (path, body)."""

    def __init__(self) -> None:
        self.reply: Reply = lambda path, body: (200, chat())
        self.models: tuple[int, Any] = (200, {"data": [{"id": "m1"}]})
        self.info: dict[str, Any] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                fake.headers.append(dict(self.headers))
                is_list = self.path.partition("?")[0].endswith("/models")
                fake.asked.append((self.path, {}))
                self._send(*(fake.models if is_list else (200, fake.info)))

            def do_POST(self) -> None:
                fake.headers.append(dict(self.headers))
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                fake.asked.append((self.path, body))
                self._send(*fake.reply(self.path, body))

            def _send(self, status: int, answer: Any) -> None:
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [body for _, body in self.asked if body]


@pytest.fixture
def fake() -> Iterator[Fake]:
    made = Fake()
    yield made
    made.server.shutdown()
    made.server.server_close()


def ask(fake: Fake, request: PreviewRequest | None = None, **options: Any) -> PreviewResult:
    backend = OpenAIPreviewBackend(
        base_url=fake.url,
        api_key=options.pop("api_key", None),
        **{"compare": lambda a, b: a.split() == b.split(), **options},
    )
    backend.check()
    [result] = backend.preview_batch([request or PreviewRequest(prompt="hi")], 1)
    backend.close()
    return result


def held_out(**changes: Any) -> PreviewRequest:
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "Answer in French.", "tools": TOOLS},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "weight": 0.0},
        {"role": "tool", "content": "rain"},
    ]
    values = {"prompt": "rain", "prompt_token_ids": (5, 6), "messages": tuple(turns)}
    return PreviewRequest(**{**values, "golden_answer": "il pleut", **changes})


def test_the_whole_conversation_and_its_tools_are_sent(fake: Fake) -> None:
    assert ask(fake, held_out()).ok
    [body] = fake.bodies
    system, user, call, result = body["messages"]
    assert system == {"role": "system", "content": "Answer in French."}
    assert user == {"role": "user", "content": "weather?"}
    function = call["tool_calls"][0]["function"]
    assert function == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert (call["content"], set(call)) == (None, {"role", "content", "tool_calls"})
    assert result == {
        "role": "tool",
        "content": "rain",
        "tool_call_id": call["tool_calls"][0]["id"],
    }
    assert body["tools"] == TOOLS


def test_a_prompt_as_text_goes_out_behind_the_system_prompt(fake: Fake) -> None:
    ask(fake, system_prompt="Be terse.")
    assert [turn["role"] for turn in fake.bodies[0]["messages"]] == ["system", "user"]


def test_plain_text_is_continued_not_chatted_about(fake: Fake) -> None:
    fake.reply = lambda path, body: (200, {"choices": [{"text": " fox", "finish_reason": "stop"}]})
    request = PreviewRequest(prompt="the quick", prompt_token_ids=(5,), golden_answer=" fox")
    result = ask(fake, request)
    assert (result.text, result.matches) == (" fox", True)
    assert fake.asked[-1] == ("/v1/completions", fake.bodies[-1])
    assert fake.bodies[-1]["prompt"] == "the quick"


@pytest.mark.parametrize("owner", ["vllm", "llamacpp", "trainer"])
@pytest.mark.parametrize("is_same", [True, False])
def test_exact_ids_go_to_servers_that_take_them_and_mean_the_same(
    fake: Fake, tokenizer: Any, owner: str, is_same: bool
) -> None:
    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/tokenize":
            ids = tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            return 200, {"tokens": ids if is_same else [*ids, 1]}
        if path == "/v1/completions":
            return 200, {"choices": [{"text": "il pleut<|im_end|>\nx", "finish_reason": "stop"}]}
        return 200, chat("il pleut")

    fake.reply, fake.models = reply, (200, {"data": [{"id": "m1", "owned_by": owner}]})
    fake.info = {"tokenizer_hash": tokenizer_hash(tokenizer) if is_same else "other"}
    result = ask(fake, held_out(), tokenizer=tokenizer, stop_ids={2})
    assert (result.text, result.matches, result.finish_reason) == ("il pleut", True, "stop")
    assert fake.bodies[-1].get("prompt") == ([5, 6] if is_same else None)
    assert ("messages" in fake.bodies[-1]) is not is_same


# ---- fields that are refused


def refuses(*fields: str, status: int = 400) -> Reply:
    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        for field in fields:
            if field in body:
                return status, {"error": {"message": f"Unsupported parameter: '{field}'."}}
        return 200, chat()

    return reply


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize(
    ("fields", "left", "renamed"),
    [
        (("seed",), {"max_tokens", "temperature"}, {}),
        (("max_tokens",), {"seed", "temperature"}, {"max_completion_tokens": 256}),
        (("temperature",), {"seed", "max_tokens"}, {}),
        (("seed", "max_tokens"), {"temperature"}, {"max_completion_tokens": 256}),
        (("max_tokens", "max_completion_tokens", "seed"), {"temperature"}, {}),
    ],
)
def test_a_refused_default_is_asked_without_once_and_said(
    fake: Fake, status: int, fields: tuple[str, ...], left: set[str], renamed: dict[str, Any]
) -> None:
    fake.reply = refuses(*fields, status=status)
    said: list[str] = []
    backend = OpenAIPreviewBackend(base_url=fake.url, notice=said.append)
    for _ in range(3):
        assert backend.preview_batch([PreviewRequest(prompt="hi")], 1)[0].ok
    assert len(fake.bodies) == 3 + len(fields)  # found out with the first question
    last = fake.bodies[-1]
    assert set(last) == {"model", "messages", *left, *renamed}
    assert renamed.items() <= last.items()
    assert len(said) == len(fields)
    assert all(any(f"'{field}'" in text for text in said) for field in fields)


def test_each_sample_is_asked_with_a_seed_of_its_own_until_seeds_are_refused(fake: Fake) -> None:
    backend = OpenAIPreviewBackend(base_url=fake.url, model="m1")
    requests = [PreviewRequest(prompt="2+2?"), PreviewRequest(prompt="3+3?")]
    results = samples_of(backend, requests, 1, 3)
    assert [[said.ok for said in one.answers] for one in results] == [[True] * 3] * 2
    expected = [sample_seed(42, sample) for sample in (0, 0, 1, 1, 2, 2)]
    assert [body["seed"] for body in fake.bodies] == expected
    assert (expected[0], len(set(expected))) == (42, 3)
    fake.reply = refuses("seed")
    [late] = backend.preview_batch(sample_requests(requests[:1], 2), 1)  # it is the first refused
    assert late.ok, late.error_message
    assert [len(one.samples) for one in samples_of(backend, requests, 1, 3)] == [2, 2]
    assert not any("seed" in body for body in fake.bodies[-6:])
    backend.close()


def test_a_server_that_is_away_is_not_asked_for_further_samples() -> None:
    asked = []

    class Away:
        backend_type = "openai"

        def preview_batch(self, requests: Any, step: int) -> list[PreviewResult]:
            asked.append(requests)
            return [PreviewResult.failed(one, step, "nobody there", "openai") for one in requests]

    [result] = samples_of(Away(), [PreviewRequest(prompt="hi")], 1, 9)  # type: ignore[arg-type]
    assert (len(asked), result.samples, result.ok) == (1, (), False)


@pytest.mark.parametrize(("field", "value"), [("seed", 7), ("temperature", 0.2)])
def test_a_refused_value_that_was_set_is_an_error(fake: Fake, field: str, value: Any) -> None:
    fake.reply = refuses(field)
    backend = OpenAIPreviewBackend(base_url=fake.url, **{field: value})
    [result] = backend.preview_batch([PreviewRequest(prompt="hi")], 1)
    assert f"{field}={value}" in (result.error_message or "")
    assert len(fake.bodies) == 1
    if field == "seed":
        with pytest.raises(ConfigError, match=r"environment\.seed=7 is set"):
            backend.check()


def test_a_limit_that_was_set_is_kept_under_its_other_name(fake: Fake) -> None:
    fake.reply = refuses("max_tokens")
    assert ask(fake, max_new_tokens=40).ok
    assert fake.bodies[-1]["max_completion_tokens"] == 40


def test_another_refusal_is_told_as_it_is(fake: Fake) -> None:
    fake.reply = lambda path, body: (400, {"error": {"message": "no such model"}})
    assert "no such model" in (ask(fake).error_message or "")
    assert len(fake.bodies) == 1


def test_a_server_that_cannot_choose_tools_is_asked_for_text(fake: Fake) -> None:
    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if body.get("tool_choice") != "none":
            return 400, {"message": '"auto" tool choice requires --enable-auto-tool-choice'}
        return 200, chat("il pleut")

    fake.reply = reply
    assert ask(fake, held_out()).matches is True
    assert fake.bodies[-1]["tools"] == TOOLS


# ---- shapes of answers


@pytest.mark.parametrize(
    ("answer", "text", "finish", "flags"),
    [
        (chat("ok"), "ok", "stop", ()),
        (chat("", "stop"), "", "stop", ("empty",)),
        (chat(None, "length"), "", "length", ("empty", "never_stopped")),
        (chat([{"type": "text", "text": "o"}, {"type": "text", "text": "k"}]), "ok", "stop", ()),
        (chat("ok", None), "ok", "stop", ()),
        (chat("ok", "eos"), "ok", "stop", ()),
        (
            chat("a b c d " * 20, "max_tokens"),
            "a b c d " * 20,
            "length",
            ("repeats", "never_stopped"),
        ),
        (
            chat(None, "length", reasoning_content="Let me think"),
            "<think>\nLet me think",
            "length",
            ("never_stopped",),
        ),
        (chat("ok", reasoning_content="Let me think"), "ok", "stop", ()),
        (chat("ok", reasoning="Let me think"), "ok", "stop", ()),
        (
            chat([{"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]}, "ok"]),
            "ok",
            "stop",
            (),
        ),
        (chat(None, refusal="I cannot."), "I cannot.", "stop", ()),
        (chat("What is it, please, tell me now? ok"), None, "stop", ("copies_prompt",)),
    ],
)
def test_answers_of_every_shape_are_taken(
    fake: Fake, answer: Any, text: str | None, finish: str, flags: tuple[str, ...]
) -> None:
    fake.reply = lambda path, body: (200, answer)
    result = ask(fake, PreviewRequest(prompt="What is it, please, tell me now?"))
    assert result.error_message is None
    assert (result.text if text is not None else None) == text
    assert (result.finish_reason, result.health) == (finish, flags)


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"completion_tokens": 5}, 5),
        ({"completion_tokens": None}, 2),
        ({"completion_tokens": -3}, 2),
        ({}, 2),
        (None, 2),
    ],
)
def test_missing_counts_are_counted_here(
    fake: Fake, tokenizer: Any, usage: Any, tokens: int
) -> None:
    fake.reply = lambda path, body: (200, {**chat("ok"), "usage": usage})
    result = ask(fake, tokenizer=tokenizer)
    assert len(tokenizer("ok")["input_ids"]) == 2
    assert (result.error_message, result.tokens_generated) == (None, tokens)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"choices": []}, "another shape"),
        ({"choices": [{"message": {"content": {"a": 1}}}]}, "another shape"),
        (chat([{"type": "image_url"}]), "another shape"),
        (chat("half", "content_filter"), "withheld"),
    ],
)
def test_what_is_no_answer_is_an_error(fake: Fake, answer: Any, words: str) -> None:
    fake.reply = lambda path, body: (200, answer)
    assert words in (ask(fake).error_message or "")


def test_calls_and_thoughts_that_come_apart_are_written_as_the_template_writes_them(
    fake: Fake, make_tokenizer: Callable[..., Any]
) -> None:
    from tests.unit.preview.test_golden import CALL_TEXT, CALLS

    template = ChatTemplate(make_tokenizer(CALLS))
    sent = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    fake.reply = lambda path, body: (
        200,
        chat(None, "tool_calls", tool_calls=[{"id": "c1", **sent}], reasoning_content="Hm"),
    )
    golden = f"<think>Hm</think>{CALL_TEXT}"
    result = ask(
        fake,
        held_out(golden_answer=golden, messages=({"role": "user", "content": "weather?"},)),
        render_answer=lambda turns, answer: answer_text(template, turns, answer),
    )
    assert (result.text, result.matches) == (golden, True)


def test_an_answer_is_cut_behind_the_profiles_stop_as_a_local_one(fake: Fake) -> None:
    fake.reply = lambda path, body: (200, chat("<<ANS_START>> 4 <<ANS_END>> and on", "length"))
    result = ask(fake, stop=("<<ANS_END>>",))
    assert (result.text, result.finish_reason) == ("<<ANS_START>> 4 <<ANS_END>>", "stop")
    assert result.health == ()


# ---- addresses


@pytest.mark.parametrize(
    ("before", "after", "path"),
    [
        ("", "/", "/v1/models"),
        ("/proxy/openai", "", "/proxy/openai/v1/models"),
        ("", "?api-version=2", "/v1/models?api-version=2"),
        ("", "/chat/completions", "/v1/models"),
    ],
)
def test_paths_and_queries_of_the_address_are_kept(
    fake: Fake, before: str, after: str, path: str
) -> None:
    fake.url = fake.url.replace("/v1", f"{before}/v1{after}")
    assert ask(fake).ok
    expected = path.replace("/models", "/chat/completions")
    assert [one for one, _ in fake.asked] == [path, expected]


@pytest.mark.parametrize("status", [404, 500, 501, 405])
def test_a_server_without_a_readable_list_is_excused(fake: Fake, status: int) -> None:
    fake.models = (status, b"<html><h1>Internal Server Error</h1></html>")
    assert ask(fake, model="m2").ok
    with pytest.raises(ConfigError, match=r"set monitoring\.openai_model; the server lists none"):
        ask(fake)


def test_secrets_of_the_address_are_used_and_never_shown(fake: Fake) -> None:
    secret, key = "s3cr3t-passw0rd", "sk-0123456789"
    fake.url = fake.url.replace("//", f"//me:{secret}@") + f"?api_key={key}&v=2"
    fake.reply = lambda path, body: (400, {"error": {"message": f"bad key {key} {secret}"}})
    result = ask(fake)
    assert fake.headers[-1]["Authorization"].startswith("Basic ")
    assert f"api_key={key}" in fake.asked[-1][0]
    assert "bad key *** ***" in (result.error_message or "")
    fake.server.shutdown()
    fake.server.server_close()
    backend = OpenAIPreviewBackend(base_url=fake.url, model="m1")
    [away] = backend.preview_batch([PreviewRequest(prompt="hi")], 1)
    for text in (result.error_message or "", away.error_message or "", backend.url):
        assert secret not in text
        assert key not in text
