"""A server in OpenAI's protocol that does what a test tells it to, and an environment whose vLLM
does.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Reply = tuple[int, dict[str, str], bytes]


def completion(text: object, finish: str | None = "stop", **message: object) -> Reply:
    answer = {"role": "assistant", "content": text, **message}
    choice = {"index": 0, "message": answer, "finish_reason": finish}
    return ok({"id": "x", "object": "chat.completion", "choices": [choice]})


def ok(document: object) -> Reply:
    return 200, {}, json.dumps(document).encode()


def failure(status: int, words: str = "no", **headers: str) -> Reply:
    return status, headers, json.dumps({"error": {"message": words}}).encode()


class FakeServer:
    """`reply` makes of a request and of how often that text was asked before what is sent; None
    drops the connection. Every request is kept.
    """

    def __init__(
        self, reply: Callable[[dict[str, Any], int], Reply | None], get: Callable[[str], Reply]
    ) -> None:
        self.reply, self.get = reply, get
        self.asked: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def times_asked(self, text: str) -> int:
        return self.asked.count(text)


@contextmanager
def serving(
    reply: Callable[[dict[str, Any], int], Reply | None],
    get: Callable[[str], Reply] = lambda path: failure(404),
) -> Iterator[tuple[str, Any]]:
    """The base URL of such a server, and the server; `get` answers what is asked by path alone."""
    fake = FakeServer(reply, get)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Keep quiet."""

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][-1]["content"] if "messages" in body else str(body["prompt"])
            with fake.lock:
                before = fake.times_asked(text)
                fake.asked.append(text)
                fake.requests.append({"path": self.path, **body})
                fake.headers.append({k.lower(): v for k, v in self.headers.items()})
                fake.times.append(time.monotonic())
                fake.at_once += 1
                fake.most_at_once = max(fake.most_at_once, fake.at_once)
            made = fake.reply(body, before)
            with fake.lock:
                fake.at_once -= 1
            self.close_connection = True
            if made is not None:
                self.send(made)

        def do_GET(self) -> None:
            self.close_connection = True
            with fake.lock:
                made = fake.get(self.path)
            self.send(made)

        def send(self, made: Reply) -> None:
            status, headers, content = made
            self.send_response(status)
            given = {"Content-Type": "application/json", "Content-Length": str(len(content))}
            for name, value in {**given, "Connection": "close", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_address[1]}/v1", fake
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def environment_with(folder: Path, vllm: str, **modules: str) -> Path:
    """The python of an environment in `folder` whose package `vllm` has this source and these
    modules. It runs on a CPU.
    """
    package = folder / "vllm"
    package.mkdir(exist_ok=True, parents=True)
    platform = "class current_platform:\n    is_cpu = staticmethod(lambda: True)\n"
    for name, text in {"__init__": vllm, "platforms": platform, **modules}.items():
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python
