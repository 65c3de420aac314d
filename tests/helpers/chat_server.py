"""A stand-in for a service that answers in the format of OpenAI's chat completions, in a thread of this process."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = str | tuple[int, dict[str, str], str]
"""What a model says; or status, headers and body of another answer."""


@dataclass
class ChatServer:
    """A service that stands for a judge.

    url: the service's URL.
    asked: the bodies of all requests.
    keys: the header Authorization of each request.
    """

    url: str
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


@contextmanager
def serving(reply: Callable[[dict[str, Any], int], Reply]) -> Iterator[ChatServer]:
    """A context with a server.

    Args:
        reply: takes the body of a request and how many there were with the same body before.
    """
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                before = server.asked.count(body)
                server.asked.append(body)
                server.keys.append(self.headers["Authorization"])
                made = reply(body, before) if self.path == "/v1/chat/completions" else (404, {}, "no such path")
            if isinstance(made, str):
                message = {"role": "assistant", "content": made}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                made = 200, {}, json.dumps({"object": "chat.completion", "model": body["model"], "choices": [choice]})
            status, headers, text = made
            self.send_response(status)
            for name, value in {"Content-Length": str(len(text.encode())), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            """Keep the console of the tests quiet."""

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = ChatServer(f"http://127.0.0.1:{listening.server_port}/v1")
    thread = threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()
