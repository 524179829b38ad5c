"""Pushing a directory to the Hub in one commit, which is made once even if its answer is lost."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, RevisionNotFoundError

from hf_qat.errors import PublishError
from hf_qat.publish.files import published_files
from hf_qat.publish.retry import explanation, with_retries
from hf_qat.version import __version__


COMMIT_MESSAGE = "Upload with hf_qat"

#: What the client raises. `HTTPError` is that of httpx or httpx2; hf_xet has RuntimeError.
TROUBLES = (HTTPError, OSError, ValueError, RuntimeError)


def push_directory(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = COMMIT_MESSAGE,
    create_pr: bool = False,
    path_in_repo: str = "",
    ignore: Sequence[str] = (),
) -> CommitInfo:
    """Upload a directory to a model repository, which is made if it is not there, in a single commit.

    What may pass (a broken connection, 5xx, 409, 412, 429, a silent server) is tried again for about a minute. Files
    that the Hub has already are not sent again, and where nothing changed there is no commit: to push once more is
    always safe, and completes what was interrupted. The directory is only read. `hf_qat.publish.files` says what is
    left out: hidden and temporary files, Trainer's `checkpoint-*` and `training_args.bin`.

    Args:
        directory: what `save_quantized`, `export` or `save_pretrained` wrote.
        repo_id: `"user/model"`, or `"model"` for the user of the token.
        token: the one of `hf auth login` or `HF_TOKEN` if left out.
        private: of a new repository.
        revision: a branch, made from `main` if it is not there, or `refs/pr/N`; `main` if left out.
        commit_message: its first line.
        create_pr: open a pull request with the commit.
        path_in_repo: a directory of the repository to put the files into.
        ignore: patterns of names in the top directory to leave out too.

    Returns:
        The commit: `str()` is its address, and there are `.oid`, `.pr_url`. The newest one if there was nothing to do.

    Raises:
        PublishError: nothing to push, the Hub refuses, or the trouble lasts: with the command to go on.
    """
    push = Push(Path(directory), repo_id, private, revision, commit_message, create_pr, path_in_repo, tuple(ignore))
    published_files(push.directory, push.ignore)  # raises before anything is made on the Hub
    api = _api(token)
    with _told_how_to_go_on(push, token):
        name = _made(api, repo_id, private)
        return _PullRequest(api, name, push).commit() if create_pr else _commit(api, name, push)


@dataclass(frozen=True)
class Push:
    """What goes where. See `push_directory`."""

    directory: Path
    repo_id: str
    private: bool | None = None
    revision: str | None = None
    commit_message: str = COMMIT_MESSAGE
    create_pr: bool = False
    path_in_repo: str = ""
    ignore: tuple[str, ...] = ()

    def command(self, with_token: bool) -> str:
        """The line for a shell that does the same."""
        words = ["hf-qat", "push", str(self.directory), self.repo_id]
        for flag, wanted in (("--private", self.private), ("--create-pr", self.create_pr)):
            words += [flag] if wanted else []
        values = [("--revision", self.revision), ("--path-in-repo", self.path_in_repo)]
        for flag, value in (*values, *(("--ignore", pattern) for pattern in self.ignore)):
            words += [flag, value] if value else []
        if self.commit_message != COMMIT_MESSAGE:
            words += ["--message", self.commit_message]
        return shlex.join(words) + (' --token "$HF_TOKEN"' if with_token else "")

    def operations(self) -> list[CommitOperationAdd]:
        """The files, as the client wants them. To be made anew for each try: it asks the Hub only once about each."""
        below = f"{self.path_in_repo.strip('/')}/" if self.path_in_repo else ""
        files = published_files(self.directory, self.ignore)
        return [CommitOperationAdd(below + path, str(file)) for path, file in files.items()]


def make_repository(repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Make a model repository unless it is there, with the patience of `push_directory`.

    Returns:
        Its full name.

    Raises:
        PublishError: the Hub refuses, or it is to be private and is there already for all to see.
    """
    try:
        return _made(_api(token), repo_id, private)
    except TROUBLES as error:
        if isinstance(error, PublishError):
            raise
        raise PublishError(f"the repository {repo_id} could not be made: {explanation(error)}.") from error


def _api(token: str | None) -> HfApi:
    return HfApi(token=token, library_name="hf_qat", library_version=__version__)


def _made(api: HfApi, repo_id: str, private: bool | None) -> str:
    name = with_retries(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
    if private and not with_retries(lambda: api.model_info(name)).private:
        raise PublishError(
            f"{name} exists and is public, so nothing was pushed to it: make it private in its settings on the Hub, "
            "or push without private."
        )
    return name


def _commit(api: HfApi, name: str, push: Push) -> CommitInfo:
    """Commit to a branch, making it if needed."""

    def attempt() -> CommitInfo:
        # Asks the Hub what it has. Hence, after a commit whose answer was lost, nothing is left to do. The parent is
        # given so that a commit which was held up on its way cannot come on top of ours.
        parent = api.model_info(name, revision=push.revision).sha
        return api.create_commit(
            name,
            push.operations(),
            commit_message=push.commit_message,
            revision=push.revision,
            parent_commit=parent,
        )

    try:
        return with_retries(attempt)
    except RevisionNotFoundError:
        branch = push.revision
        if branch is None or branch.startswith("refs/"):
            raise
        with_retries(lambda: api.create_branch(name, branch=branch, exist_ok=True))
        return with_retries(attempt)


class _PullRequest:
    """A commit in a pull request. One whose answer was lost is found again by its title among the new ones."""

    def __init__(self, api: HfApi, name: str, push: Push) -> None:
        self.api, self.name, self.push = api, name, push
        self.before = with_retries(self._references)

    def commit(self) -> CommitInfo:
        """Open the pull request, once."""
        return with_retries(lambda: self._found() or self._opened())

    def _found(self) -> CommitInfo | None:
        for reference in self._references() - self.before:
            newest = self.api.list_repo_commits(self.name, revision=reference)[0]
            if newest.title == self.push.commit_message:
                here = f"{self.api.endpoint}/{self.name}"
                return CommitInfo(
                    commit_url=f"{here}/commit/{newest.commit_id}",
                    commit_message=newest.title,
                    commit_description=newest.message,
                    oid=newest.commit_id,
                    pr_url=f"{here}/discussions/{reference.removeprefix('refs/pr/')}",
                )
        return None

    def _opened(self) -> CommitInfo:
        return self.api.create_commit(
            self.name,
            self.push.operations(),
            commit_message=self.push.commit_message,
            revision=self.push.revision,
            create_pr=True,
        )

    def _references(self) -> set[str]:
        found = self.api.list_repo_refs(self.name, include_pull_requests=True).pull_requests
        return {reference.ref for reference in found or ()}


@contextmanager
def _told_how_to_go_on(push: Push, token: str | None) -> Iterator[None]:
    """Turns what the client raises within into one `PublishError`."""
    try:
        yield
    except TROUBLES as error:
        if isinstance(error, PublishError):
            raise
        if isinstance(error, HFValidationError):
            raise PublishError(f"{push.repo_id!r} is no name of a model on the Hub: {explanation(error)}") from error
        raise PublishError(
            f"{push.directory} was not pushed to {push.repo_id}: {explanation(error)}. The directory is as it was, "
            f"and what the Hub has already is not sent again. To go on:\n  {push.command(token is not None)}"
        ) from error
