"""Asking a service: it is asked again where it is busy, otherwise its own words are told; its key is told nobody."""

import json
import time

import pytest

from sorsa_ds.evaluate.backends import chat_service
from sorsa_ds.evaluate.backends.chat_service import KEY_VARIABLE, ChatService
from sorsa_ds.runtime.ports import free_port
from tests.helpers.chat_server import serving

MESSAGES = [{"role": "user", "content": "Well?"}]
KEY = "key-of-nobody-123"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(chat_service, "WAITS", (0.01, 0.01, 0.01))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv(KEY_VARIABLE, KEY)


def _service(url, temperature=0.0):
    return ChatService(url, "--judge_url", "judge-1", temperature)


@pytest.mark.parametrize("path", ["", "/", "/chat/completions"])
def test_a_request_is_in_openais_format(path):
    with serving(lambda body, before: "Fine. é") as server:
        assert _service(server.url + path, 0.5).answer(MESSAGES) == "Fine. é"
    assert server.asked == [{"model": "judge-1", "messages": MESSAGES, "temperature": 0.5}]
    assert server.keys == [f"Bearer {KEY}"]


def test_without_a_key_none_is_sent(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE)
    with serving(lambda body, before: "Fine.") as server:
        assert _service(server.url).answer(MESSAGES) == "Fine."
    assert server.keys == [None]


@pytest.mark.parametrize("status", [429, 500, 503, 529])
def test_a_busy_service_is_asked_again(status):
    with serving(lambda body, before: "Fine." if before == 2 else (status, {}, "busy")) as server:
        assert _service(server.url).answer(MESSAGES) == "Fine."
    assert len(server.asked) == 3


def test_the_time_that_a_service_asks_for_is_waited():
    with serving(lambda body, before: "Fine." if before else (429, {"Retry-After": "0.4"}, "")) as server:
        began = time.monotonic()
        assert _service(server.url).answer(MESSAGES) == "Fine."
    assert time.monotonic() - began > 0.4


@pytest.mark.parametrize(
    ("header", "seconds"), [(None, None), ("3", 3.0), ("-1", 0.0), ("soon", None), ("Mon, 01 Jan 2001 00:00:00 GMT", 0)]
)
def test_times_to_wait_are_numbers_or_dates(header, seconds):
    assert chat_service._retry_after(header) == seconds


def test_a_service_that_stays_broken_is_an_error_with_its_words():
    error = json.dumps({"error": {"message": f"the key {KEY} has no\nquota", "code": 7}})
    with serving(lambda body, before: (500, {}, error)) as server, pytest.raises(ValueError) as raised:
        _service(server.url).answer(MESSAGES)
    told = str(raised.value)
    assert told == (
        f"--judge_url: {server.url}/chat/completions after 4 attempts: status 500: the key ${KEY_VARIABLE} has no quota"
    )
    assert len(server.asked) == 4


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (401, '{"error": {"message": "who are you?"}}', r"status 401: who are you\?; the key is read from "),
        (404, "not <here>", "status 404: not <here>"),
        (400, '{"error": "temperature must be 1"}', "status 400: temperature must be 1"),
        (302, "", r"status 302: \(no words\)"),
        (200, '{"choices": []}', r"does not answer in the format .*IndexError.*: \{\"choices\": \[\]\}"),
        (200, "<html>", "does not answer in the format .*<html>"),
        (200, '{"choices": [{"message": {"content": 3}}]}', "content is int"),
    ],
)  # fmt: skip
def test_what_a_service_refuses_is_not_asked_again(status, body, told):
    with serving(lambda *_: (status, {}, body)) as server, pytest.raises(ValueError, match=told):
        _service(server.url).answer(MESSAGES)
    assert len(server.asked) == 1


def test_where_a_service_points_to_is_told_and_not_asked():
    with serving(lambda body, before: (302, {"Location": "http://127.0.0.1:9/v1"}, "")) as server:
        with pytest.raises(ValueError, match=r"status 302: .*; it points to http://127.0.0.1:9/v1: name the address"):
            _service(server.url).answer(MESSAGES)
        assert len(server.asked) == 1


def test_a_refusal_to_answer_is_an_empty_text():
    silent = json.dumps({"choices": [{"message": {"role": "assistant", "content": None, "refusal": "no"}}]})
    with serving(lambda *_: (200, {}, silent)) as server:
        assert _service(server.url).answer(MESSAGES) == ""


def test_nobody_listens():
    with pytest.raises(
        ValueError, match=r"--judge_url: http://127.0.0.1:\d+/v1/.* after 4 attempts: cannot be reached"
    ):
        _service(f"http://127.0.0.1:{free_port()}/v1").answer(MESSAGES)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("api.openai.com/v1", "no address of HTTP"),
        ("ftp://host/v1", "no address of HTTP"),
        ("http://", "no address of HTTP"),
        ("https://me:secret@host/v1", "must have no name, password"),
        ("https://host/v1?key=secret", "must have no name, password"),
        ("http://host:port/v1", "is no address"),
    ],
)
def test_addresses_that_cannot_be_are_refused_without_telling_secrets(url, told):
    with pytest.raises(ValueError, match=told) as raised:
        _service(url)
    assert "secret" not in str(raised.value)
