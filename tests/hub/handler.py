"""HTTP of the Hub of the tests: finds the endpoint, lets planted faults happen, reads and answers."""

from __future__ import annotations

import json
import re
import time
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.endpoints import ROUTES, Answer
from tests.hub.faults import Fault
from tests.hub.storage import Refusal


if TYPE_CHECKING:
    from tests.hub.server import HubServer


class Dropped(Exception):
    """The connection is to be closed without an answer."""


class Handler(BaseHTTPRequestHandler):
    """One connection. After `_read`, `body`, `query` and `token` are those of the request."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    timeout = 30
    disable_nagle_algorithm = True

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def handle_request(self) -> None:
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        header = self.headers.get("Authorization", "")
        self.token = header.removeprefix("Bearer ") or None
        name, serve, values = self._route(address.path)
        with self.hub.lock:
            self.hub.requests.append((name, self.command, unquote(address.path)))
            self.hub.busy += 1
            fault = self.hub.faults.take(name)
        try:
            self._serve(serve, values, fault or Fault(name))
        except Dropped:
            self.close_connection = True
        finally:
            with self.hub.lock:
                self.hub.busy -= 1

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def _route(self, path: str) -> tuple[str, Any, dict[str, str]]:
        for name, (methods, pattern, serve) in ROUTES.items():
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split():
                return name, serve, {key: unquote(value) for key, value in match.groupdict().items() if value}
        return "unknown", _unknown, {}

    def _serve(self, serve: Any, values: dict[str, str], fault: Fault) -> None:
        time.sleep(fault.delay)
        if fault.until is not None:
            fault.until.wait(self.timeout)
        upload = self.command in ("POST", "PUT")
        self.body = self._read(fault.after_bytes if fault.drop and upload else None)
        if (fault.drop or fault.status) and not fault.lost and (upload or fault.after_bytes is None):
            answer = None
        else:
            answer = self._answer(serve, values)
        if fault.status:
            self._send(self._refused(Refusal(fault.status, fault.message), fault))
        elif fault.drop and (upload or fault.after_bytes is None):
            raise Dropped
        elif answer is not None:
            self._send(answer, fault.after_bytes)

    def _answer(self, serve: Any, values: dict[str, str]) -> Answer:
        try:
            with self.hub.lock:
                return serve(self.hub, self, **values)
        except Refusal as refusal:
            return self._refused(refusal)

    def _refused(self, refusal: Refusal, fault: Fault | None = None) -> Answer:
        headers = {"X-Error-Message": refusal.message, **(fault.headers if fault else {})}
        if refusal.code is not None:
            headers["X-Error-Code"] = refusal.code
        body = refusal.body if refusal.body is not None else {"error": refusal.message}
        content = json.dumps(body).encode() if fault is None or fault.body is None else fault.body
        return Answer(content, headers, refusal.status)

    def _read(self, at_most: int | None) -> bytes:
        """The body of the request; `Dropped` once `at_most` bytes of it have come."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length if at_most is None else min(length, at_most))
            if len(body) < length:
                raise Dropped
            return body
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
            if at_most is not None and len(body) > at_most:
                raise Dropped
        self.rfile.readline()
        return body

    def _send(self, answer: Answer, at_most: int | None = None) -> None:
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[:at_most])
        if at_most is not None:
            raise Dropped


def _unknown(hub: HubServer, request: Handler) -> Answer:
    raise Refusal(404, f"this Hub has no {request.command} {request.path}")
