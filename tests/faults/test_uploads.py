"""A process that is killed while it uploads: the repository is whole at its last commit, and a second push completes.

It talks HTTP to the Hub of the tests, which takes a while for each answer. Faults of the Hub and of the connection are
in `tests/publish/test_retry.py` and `tests/trainer/test_pushing.py`.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.hub.endpoints import ROUTES
from tests.hub.faults import ALWAYS
from tests.hub.server import HubServer


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(sys.platform == "win32", reason="processes are forked, and killed by a signal"),
]

KILLS = 30

#: Seconds that the Hub takes for each answer.
PACE = 0.03

#: Forks a process that pushes for each line that it reads; says its number, and how it ended.
UPLOADER = """
import os, sys
from hf_qat.publish import push_directory

for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        push_directory(sys.argv[1], "user/model")
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Uploader:
    """A process of which others are forked that upload a directory."""

    def __init__(self, process: subprocess.Popen, hub: HubServer) -> None:
        self.process, self.hub = process, hub

    def push(self, kill_at: int | None = None, after: float = 0.0) -> int:
        """Exit code of a push, which is killed so many seconds after the Hub has had its request of that number."""
        before = len(self.hub.requests)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if kill_at is not None:
            with contextlib.suppress(ProcessLookupError):  # it needed fewer, or was faster
                while len(self.hub.requests) < before + kill_at:
                    os.kill(child, 0)  # is it there?
                    time.sleep(0.001)
                time.sleep(after)
                os.kill(child, signal.SIGKILL)
        code = int(self.process.stdout.readline())
        self.hub.finish()
        return code


@contextmanager
def uploader(directory: Path, hub: HubServer, home: Path) -> Iterator[Uploader]:
    environment = {**os.environ, **hub.environment(home)}
    with subprocess.Popen(
        [sys.executable, "-c", UPLOADER, str(directory)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Uploader(process, hub)
        process.stdin.close()


def change(directory: Path, contents: dict[str, bytes], number: int) -> dict[str, bytes]:
    """A small file and a large one get other contents; returns what is to be on the Hub."""
    new = {
        **contents,
        "config.json": f'{{"number": {number}}}\n'.encode(),
        "model.safetensors": random.Random(number).randbytes(300_000),
    }
    for path, content in new.items():
        (directory / path).write_bytes(content)
    return new


def test_wherever_an_upload_is_killed_the_repository_is_whole_and_the_next_push_completes_it(
    directory: Path, contents: dict[str, bytes], tmp_path: Path
):
    draw, seen = random.Random(0), Counter()
    with HubServer() as hub, uploader(directory, hub, tmp_path / "home") as pushes:
        for endpoint in ROUTES:
            hub.plant(endpoint, delay=PACE, times=ALWAYS)
        assert pushes.push() == 0
        change(directory, contents, -1)
        count = len(hub.requests)
        assert pushes.push() == 0
        count, before = len(hub.requests) - count, hub.repository("user/model").files()
        for number in range(KILLS):
            after = change(directory, contents, number)
            killed = pushes.push(kill_at=draw.randint(1, count), after=draw.uniform(0, PACE)) == -signal.SIGKILL
            there = hub.repository("user/model").files()
            assert there in (before, after), number
            seen[killed, there == after] += 1
            assert pushes.push() == 0
            assert hub.repository("user/model").files() == after
            assert len(hub.repository("user/model").commits()) == number + 3  # each version once
            before = after
    assert seen[True, False] >= 10  # killed before the commit, or this test shows little
    assert len(hub.uploaded) <= 3 + 2 * KILLS and sum(seen.values()) == KILLS
