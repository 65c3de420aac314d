"""The hub is asked once, with a limit; what it answers becomes a message that says what to do."""

import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from sorsa_ds.runtime import hub

ANSWERS = {
    "me/mine": (200, {}),
    "me/moved": (307, {"Location": "https://elsewhere.invalid/"}),
    "me/busy": (503, {}),
    "me/empty": (404, {"X-Error-Code": "EntryNotFound"}),
    "me/old": (404, {"X-Error-Code": "RevisionNotFound"}),
    "me/none": (401, {"X-Error-Code": "RepoNotFound"}),
    "me/gated": (403, {"X-Error-Code": "GatedRepo"}),
    "me/broken": (418, {}),
}
"""A repository -> the hub's status and headers for each of its files."""

WHO = "who am I"
"""The key of its answer to whoever asks for the owner of a token."""


class _Hub(BaseHTTPRequestHandler):
    asked: list = []  # noqa: RUF012

    def do_HEAD(self):
        self.asked.append(self.path)
        name = "/".join(self.path.removeprefix("/datasets").split("/")[1:3])
        status, headers = ANSWERS[name]
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def do_GET(self):
        self.asked.append(self.path)
        self.send_response(ANSWERS[WHO][0])
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def asked(monkeypatch):
    """A hub on this machine; gives the paths that it was asked for."""
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # as in every command
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    _Hub.asked.clear()
    yield _Hub.asked
    server.shutdown()
    server.server_close()


def test_what_can_be_read_is_asked_for_once(asked):
    assert hub.can_be_read("model", "me/mine", "config.json")
    assert hub.can_be_read("model", "me/moved", "config.json", "v2")
    assert hub.can_be_read("dataset", "me/empty", "README.md"), "a data set needs no such file"
    assert hub.can_be_read("model", "me/busy", "config.json"), "its client tries again"
    assert asked == ["/me/mine/resolve/main/config.json", "/me/moved/resolve/v2/config.json",
                     "/datasets/me/empty/resolve/main/README.md", "/me/busy/resolve/main/config.json"]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("me/empty", "me/empty on the hub has no config.json"),
        ("me/old", "no branch, tag or commit 'v1'"),
        ("me/none", r"there is no model 'me/none' on the hub, or it is private: .*hf auth login"),
        ("me/gated", r"open only to those who have asked: ask on http://127.*/me/gated, then log in"),
        ("me/broken", "the hub does not give me/broken"),
        ("not a name", "cannot be a name on the hub"),
    ],
)
def test_a_refusal_says_what_to_do(asked, name, told):
    with pytest.raises(ValueError, match=told):
        hub.can_be_read("model", name, "config.json", "v1", needed=True)


def test_a_hub_that_cannot_be_reached_costs_no_time(monkeypatch):
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    began = time.monotonic()
    assert not hub.can_be_read("model", "me/mine", "config.json")
    assert time.monotonic() - began < 3


def test_a_hub_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(hub, "SECONDS", 0.1)
    monkeypatch.setattr(hub, "_ask", lambda *_: time.sleep(60))
    assert not hub.can_be_read("model", "me/mine", "config.json")


def test_offline_mode_asks_nobody(asked, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.can_be_read("model", "me/mine", "config.json")
    assert asked == []
    assert "HF_HUB_OFFLINE is set" in hub.unreachable("the model")


def test_a_copy_in_the_cache_does_where_the_hub_cannot_be_reached(tmp_path, monkeypatch):
    said, only_cache = [], []

    def download(local_files_only):
        only_cache.append(local_files_only)
        if not tmp_path.exists():
            raise FileNotFoundError
        return str(tmp_path)

    monkeypatch.setattr(hub, "can_be_read", lambda *_: False)
    assert hub.fetched("me/mine", None, download, said.append) == tmp_path
    assert "me/mine is taken from Hugging Face's cache" in said[0]
    tmp_path.rmdir()
    with pytest.raises(ValueError, match=r"cannot be reached, and Hugging Face's cache has no copy.*HTTPS_PROXY"):
        hub.fetched("me/mine", None, download, said.append)
    assert only_cache == [True, True]


def test_a_login_is_checked_at_the_hub(asked, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_token")
    for status, told in ((200, None), (503, None), (401, "does not accept your token")):
        monkeypatch.setitem(ANSWERS, WHO, (status, {}))
        if told is None:
            hub.check_logged_in()
        else:
            with pytest.raises(ValueError, match=told):
                hub.check_logged_in()
    assert len(asked) == 3
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="you are not logged in to the hub: hf auth login"):
        hub.check_logged_in()


def test_a_copy_of_a_data_set_is_found_by_the_name_that_datasets_gives_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    assert not hub.has_copy_of_data("Me/MyData")
    (tmp_path / "Me___my_data").mkdir()
    assert hub.has_copy_of_data("Me/MyData")
    assert not hub.has_copy_of_data("Me/OtherData")
