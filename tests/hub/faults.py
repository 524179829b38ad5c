"""Faults planted in the Hub of the tests: how often, at which endpoint, and what happens there."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field


ALWAYS = 10**9


@dataclass
class Fault:
    """What happens instead of a plain answer.

    Attributes:
        endpoint: a name in `tests.hub.server.ROUTES`.
        times: how many requests it befalls.
        skip: how many requests pass unharmed before.
        status: the request is not carried out and this is answered.
        message: of that answer, as `X-Error-Message` and in the body.
        headers: of that answer, such as `{"Retry-After": "1"}`.
        drop: the connection is closed instead of an answer.
        after_bytes: with `drop`, when so much of the body was received (an upload) or sent (a download).
        lost: the request is carried out first; only then comes `status` or `drop`.
        delay: seconds before anything happens.
        until: nothing happens before this is set.
        body: of the answer, if it is not JSON, such as a proxy's HTML.
    """

    endpoint: str
    times: int = 1
    skip: int = 0
    status: int | None = None
    message: str = "planted"
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False
    after_bytes: int | None = None
    lost: bool = False
    delay: float = 0
    until: threading.Event | None = None
    body: bytes | None = None


class Faults:
    """The list of them; each request takes the first that is due."""

    def __init__(self) -> None:
        self._planted: list[Fault] = []

    def plant(self, fault: Fault) -> None:
        self._planted.append(fault)

    def clear(self) -> None:
        self._planted.clear()

    def take(self, endpoint: str) -> Fault | None:
        """The one that befalls this request."""
        for fault in self._planted:
            if fault.endpoint != endpoint or fault.times == 0:
                continue
            if fault.skip:
                fault.skip -= 1
                continue
            fault.times -= 1
            return fault
        return None
