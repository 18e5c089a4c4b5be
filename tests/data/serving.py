"""A local server for downloads, which can be made to misbehave."""

from __future__ import annotations

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from flexifed.data.download import RemoteFile

CONTENT = np.random.default_rng(0).bytes(100_000)


class Server(ThreadingHTTPServer):
    """Serves `content` under /set.tar.gz while `may_answer` is set; requests wait until then.

    Attributes:
        cut_after: number of bytes of a response after which the connection breaks.
        knows_ranges: whether it can serve a part of the file.
        range_of_answer: template of the Content-Range header; no header if empty.
        requested_ranges: the ranges of all requests, None for the whole file.
    """

    content = CONTENT
    cut_after: int | None = None
    knows_ranges = True
    range_of_answer = "bytes {start}-{last}/{total}"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requested_ranges: list[str | None] = []
        self.may_answer = threading.Event()
        self.may_answer.set()

    def file(self, path: str = "/set.tar.gz", content: bytes = CONTENT) -> RemoteFile:
        """Describe the published file."""
        url = f"http://127.0.0.1:{self.server_port}{path}"
        checksum = f"md5:{hashlib.md5(content).hexdigest()}"
        return RemoteFile(name="set.tar.gz", urls=(url,), num_bytes=len(content), checksum=checksum)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        requested = self.headers["Range"]
        self.server.requested_ranges.append(requested)
        self.server.may_answer.wait()
        if self.path != "/set.tar.gz":
            self.send_error(404)
            return
        total = len(self.server.content)
        honoured = requested if requested and self.server.knows_ranges else "bytes=0-"
        start = int(re.fullmatch(r"bytes=(\d+)-", honoured)[1])  # type: ignore[index]
        if start >= total:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start and self.server.range_of_answer:
            part = self.server.range_of_answer.format(start=start, last=total - 1, total=total)
            self.send_header("Content-Range", part)
        self.send_header("Content-Length", str(total - start))
        self.end_headers()
        self.wfile.write(self.server.content[start:][: self.server.cut_after])

    def log_message(self, *_: object) -> None:
        pass
