"""Doing something at the Hub again when the trouble may pass, and saying plainly what is wrong when it does not.

`huggingface_hub` repeats lookups and uploads of files, but never a commit or the creation of a repository, and it
waits for an answer without limit.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

# `HTTPError` is that of httpx or httpx2, whichever the installed client is built on.
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import get_session, parse_ratelimit_headers
from transformers.utils import logging


logger = logging.get_logger(__name__)

T = TypeVar("T")

#: Seconds before the second try, the third, and so on: a minute in all.
WAITS = (1, 2, 4, 8, 15, 30)

#: The longest wait that the Hub can ask for (429) before we give up instead; its windows are five minutes.
LONGEST_WAIT = 600

#: Seconds to connect, and seconds of silence that count as a broken connection: a large commit takes the Hub a while.
CONNECTING, SILENCE = 30, 300

#: Beside 5xx: timeout, another commit at the same time (409, 412), too many requests.
TEMPORARY = (408, 409, 412, 429)

#: What a status means for someone who wants to publish, and what to do.
MEANINGS = {
    400: "the Hub refuses these files",
    401: "the Hub does not accept the token: log in with `hf auth login`, or set HF_TOKEN",
    402: "the Hub asks for payment: look at the billing page of your account",
    403: "the Hub forbids it: the token needs the right to write there, and the account enough storage",
    404: "the Hub has no such repository or revision, or the token may not see it: check the name",
    409: "someone else is writing to the repository",
    412: "someone else is writing to the repository",
    413: "the Hub finds the files too large",
    422: "the Hub refuses these files",
    429: "the Hub has had too many requests from you",
}


def with_retries(attempt: Callable[[], T]) -> T:
    """The result of `attempt()`, which is called again, after growing pauses, while its troubles may pass.

    It must be safe to repeat: the answer to a request that was carried out can be lost.

    Raises:
        Exception: that of the last attempt, or the first one that will not pass.
    """
    for pause in WAITS:
        try:
            with _time_limit():
                return attempt()
        except Exception as error:
            pause = max(pause, _asked_to_wait(error))
            if not _may_pass(error) or pause > LONGEST_WAIT:
                raise
            logger.warning(f"{explanation(error)}; trying again in {pause} s.")
        time.sleep(pause)
    with _time_limit():
        return attempt()


def explanation(error: Exception) -> str:
    """One line: what was wrong, in the Hub's words too, and what helps."""
    cause = _cause(error)
    if isinstance(cause, OfflineModeIsEnabled):
        return "the Hub client is switched off: HF_HUB_OFFLINE is set; unset it"
    if isinstance(cause, HfHubHTTPError):
        status = 404 if isinstance(cause, RepositoryNotFoundError) else cause.response.status_code
        meaning = MEANINGS.get(status, "the Hub does not work as it should")
        said = cause.server_message or cause.response.headers.get("X-Error-Message") or cause.response.reason_phrase
        return f"{meaning} ({cause.response.status_code}: {' '.join(said.split())})"
    if isinstance(cause, json.JSONDecodeError):
        return "the Hub answered with something that is no JSON"
    if isinstance(cause, HTTPError):
        return f"the connection to the Hub broke ({type(cause).__name__}: {cause})"
    return " ".join(str(cause).split())


def _cause(error: Exception) -> Exception:
    """The error itself, or the one below "Error while uploading …"."""
    below = error.__cause__
    return below if isinstance(error, RuntimeError) and isinstance(below, Exception) else error


def _may_pass(error: Exception) -> bool:
    cause = _cause(error)
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        return status in TEMPORARY or status >= 500
    # RuntimeError: what hf_xet raises, without telling the kinds apart. JSON: a proxy's page in place of an answer.
    return isinstance(cause, (HTTPError, json.JSONDecodeError, RuntimeError))


def _asked_to_wait(error: Exception) -> int:
    """Seconds that the Hub wants us to wait."""
    cause = _cause(error)
    if not isinstance(cause, HfHubHTTPError):
        return 0
    asked = cause.response.headers.get("Retry-After", "")
    limit = parse_ratelimit_headers(cause.response.headers) if cause.response.status_code == 429 else None
    return max(int(asked) if asked.isdigit() else 0, limit.reset_in_seconds if limit is not None else 0)


class _TimeLimit:
    """Inside, the client gives up a connection without a byte in either direction; by itself it waits for ever.

    All of a process share one client, so the last one out gives it back its own time limit.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: Counter[Any] = Counter()
        self._before: dict[Any, Any] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        client = get_session()
        with self._lock:
            if not self._inside[client]:
                self._before[client] = client.timeout
            self._inside[client] += 1
            client.timeout = (CONNECTING, SILENCE, SILENCE, None)  # the last: for a free connection
        try:
            yield
        finally:
            with self._lock:
                self._inside[client] -= 1
                if not self._inside[client]:
                    del self._inside[client]
                    client.timeout = self._before.pop(client)


_time_limit = _TimeLimit()
