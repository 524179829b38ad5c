"""Pushing a directory with the real client: what is on the Hub afterwards, and what went over the wire."""

from __future__ import annotations

import hashlib
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError

from hf_qat.errors import PublishError
from hf_qat.publish import push_directory
from tests.hub.fixtures import snapshot
from tests.hub.storage import User


pytestmark = pytest.mark.usefixtures("waits")


class TestOnePush:
    def test_it_makes_one_commit_with_just_the_files_that_others_need(self, hub, directory, contents):
        before = snapshot(directory)
        commit = push_directory(directory, "user/model", commit_message="First")
        repository = hub.repository("user/model")
        assert repository.files() == contents
        assert [(made.oid, made.title) for made in repository.commits()] == [(commit.oid, "First")]
        assert str(commit) == f"{hub.url}/user/model/commit/{commit.oid}"
        assert snapshot(directory) == before and not repository.private

    def test_large_and_binary_files_go_to_lfs_and_small_ones_into_the_commit(self, hub, directory, contents):
        push_directory(directory, "user/model")
        large = {hashlib.sha256(contents[path]).hexdigest() for path in ("model.safetensors", "onnx/model.onnx")}
        assert {oid for oid, _ in hub.uploaded} == large == set(hub.repository("user/model").lfs)
        assert hub.uploaded_bytes == 500_000

    def test_it_comes_back_by_the_clients_own_downloads(self, hub, directory, contents):
        push_directory(directory, "user/model")
        assert snapshot(Path(snapshot_download("user/model"))).items() >= contents.items()
        assert Path(hf_hub_download("user/model", "onnx/model.onnx")).read_bytes() == contents["onnx/model.onnx"]
        assert ModelCard.load("user/model").data.tags == ["qat"]

    def test_a_download_that_breaks_off_goes_on_where_it_was(self, hub, directory, contents):
        push_directory(directory, "user/model")
        hub.plant("resolve", skip=1, drop=True, after_bytes=100_000)
        downloaded = Path(hf_hub_download("user/model", "model.safetensors"))
        assert downloaded.read_bytes() == contents["model.safetensors"]
        assert [method for name, method, _ in hub.requests if name == "resolve"] == ["HEAD", "GET", "GET"]

    def test_files_of_many_parts_arrive_whole(self, hub, directory, contents):
        hub.part_size = 70_000
        push_directory(directory, "user/model")
        assert hub.repository("user/model").files() == contents
        assert hub.count("lfs_part") == 5 + 3

    def test_a_name_without_a_user_is_of_the_user_of_the_token(self, hub, directory, contents):
        push_directory(directory, "model")
        assert hub.repository("user/model").files() == contents

    def test_the_token_given_is_the_one_used(self, hub, directory, contents):
        hub.users["hf_other"] = User("other")
        push_directory(directory, "other/model", token="hf_other")
        assert hub.repository("other/model").files() == contents

    def test_a_directory_of_the_repository_can_be_the_place(self, hub, directory, contents):
        push_directory(directory, "user/model", path_in_repo="last-checkpoint")
        assert hub.repository("user/model").files() == {f"last-checkpoint/{path}": contents[path] for path in contents}


class TestPushingAgain:
    def test_what_did_not_change_is_neither_sent_nor_committed(self, hub, directory):
        first = push_directory(directory, "user/model")
        again = push_directory(directory, "user/model")
        assert again.oid == first.oid
        assert hub.count("commit") == 1 and hub.uploaded_bytes == 500_000

    def test_of_what_changed_only_that_is_sent_and_committed(self, hub, directory):
        push_directory(directory, "user/model")
        (directory / "onnx" / "model.onnx").write_bytes(b"new")
        push_directory(directory, "user/model")
        assert hub.repository("user/model").commits()[-1].changed == {"onnx/model.onnx"}
        assert hub.uploaded_bytes == 500_000 + 3

    def test_files_of_the_repository_that_are_not_in_the_directory_stay(self, hub, directory):
        push_directory(directory, "user/model")
        (directory / "config.json").unlink()
        push_directory(directory, "user/model")
        assert "config.json" in hub.repository("user/model").files()


class TestBranches:
    def test_a_branch_that_is_not_there_is_made_from_main(self, hub, directory, contents):
        push_directory(directory, "user/model")
        (directory / "config.json").write_text("[]")
        push_directory(directory, "user/model", revision="int8/v2")
        repository = hub.repository("user/model")
        assert repository.files("int8/v2") == {**contents, "config.json": b"[]"} and repository.files() == contents
        assert hub.uploaded_bytes == 500_000
        assert Path(hf_hub_download("user/model", "config.json", revision="int8/v2")).read_text() == "[]"

    def test_a_branch_that_is_there_gets_a_commit(self, hub, directory):
        push_directory(directory, "user/model", revision="v2")
        (directory / "config.json").write_text("[]")
        push_directory(directory, "user/model", revision="v2")
        assert len(hub.repository("user/model").commits("v2")) == 2 and hub.repository("user/model").commits() == []

    def test_a_pull_request_leaves_main_alone_and_takes_more_pushes(self, hub, directory, contents):
        commit = push_directory(directory, "user/model", create_pr=True)
        repository = hub.repository("user/model")
        assert commit.pr_url == f"{hub.url}/user/model/discussions/1"
        assert repository.files("refs/pr/1") == contents and repository.files() == {}
        (directory / "config.json").write_text("[]")
        push_directory(directory, "user/model", revision="refs/pr/1")
        assert repository.files("refs/pr/1")["config.json"] == b"[]" and len(repository.pull_requests()) == 1

    def test_a_pull_request_can_go_to_the_repository_of_someone_else(self, hub, directory, contents):
        push_directory(directory, "user/model")
        hub.users["hf_other"] = User("other")
        (directory / "config.json").write_text("[]")
        commit = push_directory(directory, "user/model", create_pr=True, token="hf_other")
        assert commit.pr_num == 1
        assert hub.repository("user/model").files("refs/pr/1") == {**contents, "config.json": b"[]"}
        assert hub.repository("user/model").files() == contents

    def test_a_pull_request_that_does_not_exist_is_not_made_up(self, hub, directory):
        with pytest.raises(PublishError, match="no such repository or revision"):
            push_directory(directory, "user/model", revision="refs/pr/7")


class TestPrivate:
    def test_only_the_owner_sees_it(self, hub, directory, contents):
        push_directory(directory, "user/model", private=True)
        assert hub.repository("user/model").private
        assert snapshot(Path(snapshot_download("user/model"))).items() >= contents.items()
        with pytest.raises(RepositoryNotFoundError):
            huggingface_hub.model_info("user/model", token=False)

    def test_it_stays_private_when_pushed_to_without_saying_so(self, hub, directory):
        push_directory(directory, "user/model", private=True)
        push_directory(directory, "user/model")
        assert hub.repository("user/model").private

    def test_what_is_to_be_private_never_goes_to_a_public_repository(self, hub, directory):
        huggingface_hub.create_repo("user/model")
        with pytest.raises(PublishError, match="user/model exists and is public"):
            push_directory(directory, "user/model", private=True)
        assert hub.repository("user/model").files() == {} and hub.uploaded == []


class TestNothingToPush:
    @pytest.mark.parametrize(("name", "message"), [("absent", "is no directory"), ("empty", "nothing to publish")])
    def test_it_is_refused_before_a_repository_is_made(self, name, message, hub, tmp_path):
        (tmp_path / "empty" / "checkpoint-1").mkdir(parents=True)
        with pytest.raises(PublishError, match=message):
            push_directory(tmp_path / name, "user/model")
        assert hub.requests == []
