"""What happens to a push when the Hub or the connection fails: done in the end, or one clear error and a way on."""

from __future__ import annotations

import shlex

import huggingface_hub
import pytest
from huggingface_hub import constants

from hf_qat.cli import main as cli
from hf_qat.errors import PublishError
from hf_qat.publish import push_directory, retry
from tests.hub.faults import ALWAYS
from tests.hub.fixtures import snapshot
from tests.hub.storage import User


pytestmark = pytest.mark.usefixtures("waits")


#: Troubles that pass. Each: the endpoint and what `tests.hub.faults.Fault` takes.
PASSING = {
    "no repository, 500": ("create_repo", dict(status=500, times=2)),
    "no repository, dropped": ("create_repo", dict(drop=True)),
    "repository made, answer lost": ("create_repo", dict(drop=True, lost=True)),
    "card not checked, 500": ("validate_yaml", dict(status=500)),
    "card not checked, a page of a proxy": ("validate_yaml", dict(status=502, body=b"<html>Bad gateway</html>")),
    "preupload, 500": ("preupload", dict(status=500, times=2)),
    "preupload, 429": ("preupload", dict(status=429, headers={"Retry-After": "3"})),
    "LFS batch, 500": ("lfs_batch", dict(status=500, times=2)),
    "LFS put, 500": ("lfs_put", dict(status=500, times=2)),
    "LFS put, 500 for longer than the client tries": ("lfs_put", dict(status=500, times=13)),
    "LFS put, dropped after 100 kB": ("lfs_put", dict(drop=True, after_bytes=100_000)),
    "LFS part, dropped": ("lfs_part", dict(drop=True)),
    "LFS verify, 500": ("lfs_verify", dict(status=500)),
    "commit, 500": ("commit", dict(status=500, times=2)),
    "commit, 503 with Retry-After": ("commit", dict(status=503, headers={"Retry-After": "5"})),
    "commit, 409": ("commit", dict(status=409)),
    "commit, 412": ("commit", dict(status=412)),
    "commit, 429 with Retry-After": ("commit", dict(status=429, headers={"Retry-After": "90"})),
    "commit, 429 with RateLimit": ("commit", dict(status=429, headers={"RateLimit": '"api";r=0;t=55'})),
    "commit, dropped": ("commit", dict(drop=True, times=2)),
    "commit, dropped in the middle of it": ("commit", dict(drop=True, after_bytes=50)),
    "commit, silence": ("commit", dict(delay=1.5, status=500)),
    "commit made, answer lost": ("commit", dict(drop=True, lost=True)),
    "commit held up, and let go after ours": ("commit", dict(delay=1.5, lost=True, drop=True)),
    "commit made, 504": ("commit", dict(status=504, lost=True)),
}


@pytest.mark.parametrize("trouble", PASSING)
def test_troubles_that_pass_end_in_one_whole_commit(trouble, hub, directory, contents, monkeypatch):
    before, (endpoint, fault) = snapshot(directory), PASSING[trouble]
    if "delay" in fault:
        monkeypatch.setattr(retry, "SILENCE", 1)
    hub.part_size = 150_000 if endpoint == "lfs_part" else None
    hub.plant(endpoint, **fault)
    commit = push_directory(directory, "user/model")
    hub.finish()
    repository = hub.repository("user/model")
    assert repository.files() == contents
    assert [made.oid for made in repository.commits()] == [commit.oid]
    assert hub.uploaded_bytes == 500_000
    assert snapshot(directory) == before


def test_the_pauses_grow_and_are_those_that_the_hub_asks_for(hub, directory, waits):
    hub.plant("commit", status=500, times=3)
    hub.plant("commit", status=429, headers={"Retry-After": "90"})
    hub.plant("commit", status=429, headers={"RateLimit": '"api";r=0;t=55'})
    push_directory(directory, "user/model")
    assert waits == [1, 2, 4, 90, 55]


def test_a_large_file_that_arrived_is_not_sent_again_after_the_commit_failed(hub, directory):
    hub.plant("commit", status=500, times=3)
    push_directory(directory, "user/model")
    assert hub.count("commit") == 4 and hub.count("lfs_put") == 2


def test_what_another_pushed_in_between_stays(hub, directory, contents, monkeypatch):
    """The commit is refused because someone else was faster, and then goes on top of theirs."""
    huggingface_hub.create_repo("user/model")
    theirs = [{"key": "header", "value": {"summary": "theirs"}}]
    theirs.append({"key": "file", "value": {"path": "theirs.txt", "content": "aGk="}})
    hub.plant("commit", status=412)
    pause = retry.time.sleep

    def meanwhile(seconds: float) -> None:
        pause(seconds)
        hub.repository("user/model").commit("main", theirs, pull_request=False)

    monkeypatch.setattr(retry.time, "sleep", meanwhile)
    push_directory(directory, "user/model")
    assert hub.repository("user/model").files() == {**contents, "theirs.txt": b"hi"}


@pytest.mark.parametrize("fault", [dict(drop=True), dict(status=504)], ids=["dropped", "504"])
def test_a_pull_request_whose_answer_was_lost_is_found_again(fault, hub, directory, contents):
    huggingface_hub.create_repo("user/model")
    push_directory(directory, "user/model", create_pr=True, commit_message="An older one")
    (directory / "config.json").write_text("[]")
    hub.plant("commit", lost=True, **fault)
    commit = push_directory(directory, "user/model", create_pr=True)
    repository = hub.repository("user/model")
    assert repository.pull_requests() == ["refs/pr/1", "refs/pr/2"]
    assert commit.pr_url == f"{hub.url}/user/model/discussions/2"
    assert commit.oid == repository.at("refs/pr/2").oid


@pytest.mark.parametrize("fault", [dict(status=500), dict(drop=True, lost=True)], ids=["500", "answer lost"])
def test_a_branch_is_made_in_spite_of_troubles(fault, hub, directory, contents):
    hub.plant("create_branch", **fault)
    push_directory(directory, "user/model", revision="v2")
    assert hub.repository("user/model").files("v2") == contents


#: Troubles that do not pass: endpoint, fault, and what the error has to say.
LASTING = {
    "always 500": ("commit", dict(status=500), r"does not work as it should \(500: planted\)"),
    "always dropped": ("commit", dict(drop=True), "connection to the Hub broke"),
    "always 409": ("commit", dict(status=409), "someone else is writing"),
    "uploads always 500": ("lfs_put", dict(status=500), r"does not work as it should \(500: planted\)"),
    "rate limit of an hour": ("commit", dict(status=429, headers={"Retry-After": "3600"}), "too many requests"),
    "token revoked": ("preupload", dict(status=401, message="Invalid credentials in Authorization header"), "hf auth"),
    "no right to write": ("preupload", dict(status=403, message="read-only token"), "right to write.*read-only token"),
    "quota": ("lfs_batch", dict(status=403, message="storage limit reached"), "enough storage.*storage limit reached"),
    "not paid": ("create_repo", dict(status=402, message="payment required"), "billing"),
    "too large": ("commit", dict(status=413, message="payload too large"), "too large"),
    "commit refused": ("commit", dict(status=400, message="a file is not allowed"), "refuses.*a file is not allowed"),
}


@pytest.mark.parametrize("trouble", LASTING)
def test_troubles_that_last_are_one_clear_error_whose_command_completes_the_push(
    trouble, hub, directory, contents, waits, capsys
):
    before, (endpoint, fault, message) = snapshot(directory), LASTING[trouble]
    hub.plant(endpoint, times=ALWAYS, **fault)
    with pytest.raises(PublishError, match=message) as raised:
        push_directory(directory, "user/model", private=True, revision="v 2", commit_message="It's done")
    assert f"{directory} was not pushed to user/model: " in str(raised.value)
    assert snapshot(directory) == before
    assert sum(waits) <= 60 + 7 * 2 * 23  # ours, and in each of our tries those of the client for two files

    hub.faults.clear()
    program, *arguments = shlex.split(str(raised.value).split("To go on:\n")[1])
    assert program == "hf-qat" and cli.main(arguments) == 0
    repository = hub.repository("user/model")
    assert repository.private and repository.files("v 2") == contents
    assert [commit.title for commit in repository.commits("v 2")] == ["It's done"]
    assert hub.uploaded_bytes == 500_000


@pytest.mark.parametrize("status", [400, 401, 403, 413, 422])
def test_a_refusal_is_not_asked_for_again(status, hub, directory, waits):
    hub.plant("commit", status=status)
    with pytest.raises(PublishError, match=str(status)):
        push_directory(directory, "user/model")
    assert hub.count("commit") == 1 and waits == []


def test_the_token_is_never_in_the_message(hub, directory):
    hub.users["hf_secret"] = User("user", may_write=False)
    with pytest.raises(PublishError, match="needs the right to write") as raised:
        push_directory(directory, "user/model", token="hf_secret")
    assert "hf_secret" not in str(raised.value) and str(raised.value).endswith('user/model --token "$HF_TOKEN"')


def test_an_unknown_token_says_how_to_log_in(hub, directory):
    with pytest.raises(PublishError, match=r"hf auth login.*\(401: Invalid credentials"):
        push_directory(directory, "user/model", token="hf_unknown")


def test_the_repository_of_someone_else_is_refused(hub, directory):
    with pytest.raises(PublishError, match=r"forbids it.*\(403: you don't have the rights to write to someone"):
        push_directory(directory, "someone/model")


def test_a_card_that_is_no_yaml_is_refused_before_anything_is_sent(hub, directory):
    (directory / "README.md").write_text("---\ntags: [qat\n---\n")
    with pytest.raises(PublishError, match="Invalid metadata in README.md"):
        push_directory(directory, "user/model")
    assert hub.uploaded == []


def test_offline_mode_says_so(hub, directory, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE is set; unset it"):
        push_directory(directory, "user/model")


def test_an_impossible_name_says_so(hub, directory):
    with pytest.raises(PublishError, match="'user/mo del' is no name of a model on the Hub: Repo id must") as raised:
        push_directory(directory, "user/mo del")
    assert "To go on" not in str(raised.value)  # the same would fail again


def test_the_command_line_ends_with_status_2_and_the_error(hub, directory, capsys):
    hub.plant("commit", times=ALWAYS, status=500)
    assert cli.main(["push", str(directory), "user/model"]) == 2
    error = capsys.readouterr().err
    assert f"hf-qat push: error: {directory} was not pushed to user/model: the Hub does not work" in error
    assert error.endswith(f"\n  hf-qat push {directory} user/model\n")


def test_overlapping_pushes_leave_the_client_the_time_limit_that_it_had():
    client = huggingface_hub.utils.get_session()
    before = client.timeout
    first, second = retry._time_limit(), retry._time_limit()
    first.__enter__()
    second.__enter__()
    assert (client.timeout.connect, client.timeout.read, client.timeout.write) == (30, 300, 300)
    first.__exit__(None, None, None)
    assert client.timeout.read == 300  # the second one still goes on
    second.__exit__(None, None, None)
    assert client.timeout == before
