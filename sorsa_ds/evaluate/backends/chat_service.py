"""A model that is asked over HTTP in the format of OpenAI's chat completions, as most services and servers offer it.

Nothing else in this package asks a service for words, and this does so only where the user has named one. The key is
read from the environment; it is sent to that service alone and is in no message.
"""

import os
import threading
import time
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from sorsa_ds.runtime.json_text import parse_json
from sorsa_ds.runtime.words import cut

KEY_VARIABLE = "JUDGE_API_KEY"
"""The environment variable with the key; a service on one's own machine may need none."""

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds before each further attempt, where the service is busy or cannot be reached."""

LONGEST_WAIT = 120.0
"""The most seconds that a service may ask for with its header Retry-After."""

ANSWER_SECONDS = 600.0
"""How long one answer may take."""

_PATH = "/chat/completions"
_PASSING = (408, 409, 425, 429)
_TOLD = 400


class ChatService:
    """A model behind an address. Several threads may ask at once.

    Args:
        url: the service's URL up to its version, as in `https://api.openai.com/v1`, or with `/chat/completions` behind
            it.
        option: the option that the address comes from, for messages.
        model: the model's name there.

    Raises:
        ValueError: the address is none of HTTP, or has a name, a password or a query in it.
    """

    def __init__(self, url: str, option: str, model: str, temperature: float):
        self.url, self.model = _completions(url, option), model
        self._option, self._temperature = option, temperature
        self._closed = threading.Event()
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            self._client = httpx.Client(headers=headers, timeout=httpx.Timeout(ANSWER_SECONDS, connect=30.0))
        except UnicodeError:
            raise ValueError(f"{KEY_VARIABLE}: the key has characters that no HTTP header can hold") from None

    def answer(self, messages: Sequence[dict[str, str]]) -> str:
        """What the model says to a conversation, without the key; an empty text where it says nothing, as in refusing.

        Raises:
            ValueError: the service refuses the request, is still busy or unreachable after the last attempt, or answers
                in another format. The message has the address, the status and the service's words.
        """
        body = {"model": self.model, "messages": list(messages), "temperature": self._temperature}
        for wait in (*WAITS, None):
            try:
                answer = self._client.post(self.url, json=body)
            except httpx.TransportError as error:
                told, passing, asked = f"cannot be reached: {error or type(error).__name__}", True, None
            except httpx.HTTPError as error:
                told, passing, asked = f"{type(error).__name__}: {error}", False, None
            else:
                if answer.status_code == httpx.codes.OK:
                    return self._content(answer)
                told = f"status {answer.status_code}: {self._words(answer)}"
                if answer.has_redirect_location:  # not followed: the key is for the address that the user has named
                    told += f"; it points to {cut(answer.headers['Location'], _TOLD)}: name the address that answers"
                passing = answer.status_code in _PASSING or answer.status_code >= 500
                asked = _retry_after(answer.headers.get("Retry-After"))
            if not passing or wait is None:
                attempts = f" after {1 + len(WAITS)} attempts" if passing else ""
                raise ValueError(f"{self._option}: {self.url}{attempts}: {self._safe(told)}{self._hint(told)}")
            if self._closed.wait(wait if asked is None else min(asked, LONGEST_WAIT)):
                raise ValueError(f"{self._option}: {self.url} is asked no more, since another request failed")
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        """Close the connections, and end the waiting of other threads."""
        self._closed.set()
        self._client.close()

    def _content(self, answer: httpx.Response) -> str:
        try:
            content = parse_json(answer.content)["choices"][0]["message"]["content"]
            if not isinstance(content, str | None):
                raise TypeError(f"content is {type(content).__name__}")
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{self._option}: {self.url} does not answer in the format of OpenAI's chat completions "
                f"({type(error).__name__}: {self._safe(str(error))}): {self._words(answer)}"
            ) from None
        return self._safe((content or "").encode("utf-8", "replace").decode())  # JSON can hold halves of a character

    def _words(self, answer: httpx.Response) -> str:
        """What the service says of an error: the message in its JSON, else the beginning of its text."""
        words: Any = answer.text
        try:
            error = parse_json(answer.content)["error"]
            words = error["message"] if isinstance(error, dict) else error
        except (ValueError, KeyError, TypeError):
            pass
        return cut(" ".join(self._safe(str(words)).split()), _TOLD) or "(no words)"

    def _safe(self, text: str) -> str:
        """A text without the key, which a service may repeat."""
        return text.replace(self._key, f"${KEY_VARIABLE}") if self._key else text

    def _hint(self, told: str) -> str:
        if told.startswith(("status 401", "status 403")):
            return f"; the key is read from the environment variable {KEY_VARIABLE}" + ("" if self._key else ", unset")
        return ""


def _completions(url: str, option: str) -> str:
    """The address that questions are posted to."""
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"{option}: {url!r} is no address: {error}") from error
    if parts.userinfo or parts.query or parts.fragment:
        raise ValueError(
            f"{option}: the address must have no name, password, query or fragment; a key is read from the environment "
            f"variable {KEY_VARIABLE}"
        )
    if parts.scheme not in ("http", "https") or not parts.host:
        raise ValueError(f"{option}: {url!r} is no address of HTTP, such as https://api.openai.com/v1")
    url = str(parts).rstrip("/")
    return url if url.endswith(_PATH) else url + _PATH


def _retry_after(header: str | None) -> float | None:
    """The seconds that a service asks to wait, given as a number or as a date; None where it asks for none."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None
