"""A server that speaks S3 on 127.0.0.1 (moto's), and lets a share of its answers fail, as a store on a bad day."""

import os
import random
import socket
import struct
import threading
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}

BEFORE, SLOW_DOWN, AFTER, RESET_BEFORE, RESET_AFTER, CUT = (
    "500", "503", "500 after the work was done", "reset", "reset after the work was done", "half an answer",
)  # fmt: skip
KINDS = (BEFORE, SLOW_DOWN, AFTER, RESET_BEFORE, RESET_AFTER, CUT)


class ObjectStore:
    """The server, whose faults can be changed while it runs.

    Attributes:
        share: the share of requests that fail.
        failed: how many requests failed, by kind.
        requests: how many requests there were, by method.
        refused: the status and the code of every answer, if the store is to refuse everything; else None.
    """

    def __init__(self, port: int, application: Any) -> None:
        from werkzeug.serving import make_server

        self.share, self.failed, self.requests = 0.0, Counter[str](), Counter[str]()
        self.refused: tuple[str, str] | None = None
        self._random, self._lock = random.Random(1), threading.Lock()
        self._application = application
        self.server = make_server("127.0.0.1", port, self, threaded=True)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use the store."""
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": self.url}

    @contextmanager
    def failing(self, share: float = 0.2) -> Iterator[Counter[str]]:
        """Let a share of the requests fail, in all ways in turn."""
        self.share, self.failed = share, Counter()
        try:
            yield self.failed
        finally:
            self.share = 0.0

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with self._lock:
            self.requests[environ["REQUEST_METHOD"]] += 1
            fault = None
            if self._random.random() < self.share:
                fault = KINDS[sum(self.failed.values()) % len(KINDS)]
                self.failed[fault] += 1
        if self.refused is not None:
            _drain(environ)
            return _error(start_response, *self.refused)
        if fault in (BEFORE, SLOW_DOWN):
            _drain(environ)
            return _error(start_response, *_STATUS[fault])
        if fault == RESET_BEFORE:
            _reset(environ)
            return []
        if fault is None:
            return self._application(environ, start_response)  # type: ignore[no-any-return]
        return self._spoiled(environ, start_response, fault)

    def _spoiled(self, environ: dict[str, Any], start_response: Any, fault: str) -> Iterable[bytes]:
        """Do the work, and lose the answer or half of it."""
        answer: list[Any] = []
        body = b"".join(self._application(environ, lambda *given: answer.extend(given)))
        if fault == AFTER:
            return _error(start_response, *_STATUS[BEFORE])
        if fault == CUT and len(body) > 1:
            start_response(*answer[:2])
            return _cut(environ, body)
        _reset(environ)
        return []


_STATUS = {BEFORE: ("500 Internal Server Error", "InternalError"), SLOW_DOWN: ("503 Slow Down", "SlowDown")}


def _error(start_response: Any, status: str, code: str) -> list[bytes]:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>as asked</Message></Error>".encode()
    start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


def _drain(environ: dict[str, Any]) -> None:
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))


def _cut(environ: dict[str, Any], body: bytes) -> Iterator[bytes]:
    yield body[: len(body) // 2]
    _reset(environ)


def _reset(environ: dict[str, Any]) -> None:
    """Close the connection so that the other end sees a reset."""
    connection = environ["werkzeug.socket"]
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(connection.detach())  # close() would wait for the files that werkzeug has opened on it


@contextmanager
def serving(port: int = 0) -> Iterator[ObjectStore]:
    """Run the server in this process; skip the test where a package is missing."""
    for package in ("s3fs", "moto", "flask", "flask_cors"):
        pytest.importorskip(package, reason=f"needs {package}: pip install 'scalegpt[dev]'")
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    store = ObjectStore(port, DomainDispatcherApplication(create_backend_app))
    store.thread.start()
    _forget_file_systems()
    before = {name: os.environ.get(name) for name in store.environment}
    os.environ.update(store.environment)
    try:
        yield store
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
        _forget_file_systems()
        store.server.shutdown()
        store.thread.join()


def _forget_file_systems() -> None:
    """Forget file systems of an earlier server: fsspec keeps them by their options, which do not name the server."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def new_bucket() -> str:
    """Make a bucket; returns its address."""
    import s3fs

    name = f"bucket-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)
    return f"s3://{name}"
