"""A Hub on this machine, for tests and notebooks: the real `huggingface_hub` client talks HTTP to it.

In a test, the fixture `hub` (tests/conftest.py) starts one and connects the client of this process; in other processes
and notebooks set the environment before `huggingface_hub` is imported:

    with HubServer() as hub:
        os.environ.update(hub.environment(cache_directory))
        ...  # push_to_hub("user/model"), from_pretrained("user/model"), ...
        hub.repository("user/model").files()  # {path: bytes}; .commits(), .private, .branches
        hub.plant("commit", status=500, times=2)  # faults: tests/hub/faults.py
        hub.count("commit"), hub.uploaded_bytes  # requests of an endpoint; bytes of LFS uploads

The token is `hub.token`, of the user `user`; more come by `hub.users[token] = User(name)`.
"""

from __future__ import annotations

import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.hub.faults import Fault, Faults
from tests.hub.handler import Handler
from tests.hub.storage import Refusal, Repository, User


class HubServer:
    """The server and all that it keeps.

    Attributes:
        users: by token.
        repositories: by full name; those that nobody created are not there.
        requests: `(endpoint, method, path)` of all that came, in order, those with faults too.
        uploaded: `(SHA-256, bytes)` of every LFS upload that arrived whole.
        part_size: if set, larger files are uploaded in parts of so many bytes.
    """

    def __init__(self) -> None:
        self.token = "hf_writer"
        self.users = {self.token: User("user")}
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.uploaded: list[tuple[str, int]] = []
        self.parts: dict[tuple[str, int], bytes] = {}
        self.part_size: int | None = None
        self.faults = Faults()
        self.lock = threading.RLock()
        self.busy = 0
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self._server = _QuietServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: str | Path) -> dict[str, str]:
        """Variables that connect a process which has not imported `huggingface_hub` yet.

        Args:
            home: where its cache goes.
        """
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": self.token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # plain LFS, which this server has
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def plant(self, endpoint: str, **fault: Any) -> None:
        """Plant a `Fault` at an endpoint."""
        self.faults.plant(Fault(endpoint, **fault))

    def count(self, endpoint: str) -> int:
        """How many requests an endpoint had."""
        return sum(name == endpoint for name, _, _ in self.requests)

    def finish(self) -> None:
        """Wait until every request that came is dealt with, those too that a client has given up."""
        while self.busy:
            time.sleep(0.005)

    @property
    def uploaded_bytes(self) -> int:
        return sum(size for _, size in self.uploaded)

    def repository(self, name: str) -> Repository:
        """A repository that exists."""
        return self.repositories[name]

    def readable(self, name: str, token: str | None) -> Repository:
        """A repository as one with this token sees it; those that are hidden look as if they did not exist."""
        user = self._user(token)
        found = self.repositories.get(name)
        if found is None or (found.private and (user is None or user.name != name.split("/")[0])):
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return found

    def writable(self, name: str, token: str | None) -> Repository:
        """A repository that one with this token may write to."""
        repository = self.readable(name, token)
        self.authorize(name.split("/")[0], token)
        return repository

    def proposable(self, name: str, token: str | None) -> Repository:
        """A repository that one with this token may open pull requests in: any that they see."""
        self.whoami(token)
        return self.readable(name, token)

    def authorize(self, namespace: str, token: str | None) -> None:
        """Raise unless the token may write to a namespace."""
        user = self._user(token)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if not user.may_write or user.name != namespace:
            raise Refusal(403, f"you don't have the rights to write to {namespace} with this token")

    def whoami(self, token: str | None) -> User:
        user = self._user(token)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return user

    def _user(self, token: str | None) -> User | None:
        if token is not None and token not in self.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.users[token] if token is not None else None


class _QuietServer(ThreadingHTTPServer):
    """Ends its threads with the process, and is silent about connections that clients close."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass
