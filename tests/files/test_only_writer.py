from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_qat.errors import InUseError
from hf_qat.files.atomic import INCOMPLETE, written_whole
from hf_qat.files.only_writer import only_writer


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the system has no such lock")

OTHER = """
import sys
from hf_qat.files.only_writer import only_writer
with only_writer(sys.argv[1]):
    print("in", flush=True)
    sys.stdin.read()
"""


def other_process(directory: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "in\n"
    return process


def test_two_processes_do_not_write_to_one_directory_and_a_killed_one_is_in_nobodys_way(tmp_path: Path):
    with other_process(tmp_path / "run") as other:
        with pytest.raises(InUseError, match="another process .* choose another output_dir"):
            with only_writer(tmp_path / "run"):
                pytest.fail("two at once")
        with only_writer(tmp_path / "elsewhere"):
            pass
        os.kill(other.pid, signal.SIGKILL)
    with only_writer(tmp_path / "run"):
        assert list((tmp_path / "run").iterdir()) == []
    with only_writer(tmp_path / "run"):
        pass


def test_a_model_is_not_saved_where_another_process_is_writing_and_what_that_has_begun_stays(tmp_path: Path):
    run = tmp_path / "run"
    (run / INCOMPLETE / "checkpoint-1").mkdir(parents=True)
    with other_process(run) as other:
        with pytest.raises(InUseError, match="another process or thread is saving to"), written_whole(run):
            pytest.fail("two at once")
        assert (run / INCOMPLETE / "checkpoint-1").is_dir()
        with written_whole(tmp_path / "elsewhere") as place:
            (place / "config.json").write_text("{}")
        os.kill(other.pid, signal.SIGKILL)
    with only_writer(run), written_whole(run) as place:  # a training that saves its model
        (place / "config.json").write_text("{}")
    assert [path.name for path in run.iterdir()] == ["config.json"]
    with written_whole(run) as place, pytest.raises(InUseError), only_writer(run):
        pytest.fail("a training began while a model was saved")


def test_another_thread_does_not_save_where_this_one_is_writing(tmp_path: Path):
    def save() -> None:
        with written_whole(tmp_path) as place:
            (place / "config.json").write_text("the other's")

    with ThreadPoolExecutor() as threads, only_writer(tmp_path), written_whole(tmp_path) as place:
        (place / "config.json").write_text("ours")
        assert isinstance(threads.submit(save).exception(), InUseError)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"config.json": "ours"}
