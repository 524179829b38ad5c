"""What the Hub of the tests keeps: repositories with their commits, branches and large files, and who may do what."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field


#: What every repository of the real Hub starts with; it also says what goes to LFS.
GIT_ATTRIBUTES = "".join(
    f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n"
    for suffix in ("bin", "npz", "onnx", "pt", "pth", "safetensors")
)
REGULAR_LIMIT = 10_000_000


class Refusal(Exception):
    """An answer other than 200: what the real Hub says with a status and `X-Error-*` headers."""

    def __init__(self, status: int, message: str, code: str | None = None, body: dict | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass(frozen=True)
class User:
    """Who a token belongs to."""

    name: str
    may_write: bool = True


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit; `sha256` only if it is in LFS."""

    content: bytes
    sha256: str | None = None

    @property
    def oid(self) -> str:
        """Git's name of the blob; of an LFS file, that of its pointer."""
        content = self.content
        if self.sha256 is not None:
            size = len(content)
            content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    """One commit, with all files as they are after it."""

    oid: str
    title: str
    description: str
    files: dict[str, StoredFile]
    parent: Commit | None = None

    def history(self) -> list[Commit]:
        """This one and those before it, newest first."""
        return [self, *(self.parent.history() if self.parent else [])]

    @property
    def changed(self) -> set[str]:
        """Paths that this commit added, changed or deleted."""
        before = self.parent.files if self.parent else {}
        return {path for path in {*before, *self.files} if before.get(path) != self.files.get(path)}


@dataclass
class Repository:
    """A model repository.

    Attributes:
        branches: the newest commit of `main`, of other branches, and of pull requests as `refs/pr/N`.
        lfs: large files by SHA-256, whether a commit has them already or not.
    """

    name: str
    private: bool = False
    branches: dict[str, Commit] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.branches["main"] = self._commit(
            "initial commit", "", {".gitattributes": StoredFile(GIT_ATTRIBUTES.encode())}
        )

    def at(self, revision: str = "main") -> Commit:
        """The commit of a branch, or the one with that id."""
        if revision in self.branches:
            return self.branches[revision]
        for head in self.branches.values():
            for commit in head.history():
                if commit.oid == revision:
                    return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Contents by path, without the `.gitattributes` that every repository starts with."""
        stored = self.at(revision).files
        return {path: file.content for path, file in stored.items() if path != ".gitattributes"}

    def commits(self, revision: str = "main") -> list[Commit]:
        """Those pushed to a branch, oldest first: all but the initial one."""
        return self.at(revision).history()[::-1][1:]

    def branch(self, name: str, start: str) -> None:
        """Make a branch."""
        if name in self.branches:
            raise Refusal(409, f"Reference {name} already exists")
        self.branches[name] = self.at(start)

    def pull_requests(self) -> list[str]:
        return [name for name in self.branches if name.startswith("refs/pr/")]

    def commit(self, branch: str, lines: list[dict], pull_request: bool) -> tuple[Commit, str]:
        """Apply the lines of a commit request; returns the commit and the branch that it is on."""
        if branch not in self.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head = self.branches[branch]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", head.oid) != head.oid:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines:
            self._apply(line["key"], line["value"], files)
        if pull_request:
            branch = f"refs/pr/{len(self.pull_requests()) + 1}"
        self.branches[branch] = self._commit(header["summary"], header.get("description", ""), files, head)
        return self.branches[branch], branch

    def _apply(self, key: str, value: dict, files: dict[str, StoredFile]) -> None:
        path = value.get("path", "")
        if key == "file":
            files[path] = StoredFile(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.lfs:
                raise Refusal(400, f"LFS pointer of {path} points to a file that does not exist")
            files[path] = StoredFile(self.lfs[value["oid"]], value["oid"])
        elif key == "deletedFile":
            del files[path]
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(f"{path.rstrip('/')}/")]:
                del files[name]

    def _commit(
        self, title: str, description: str, files: dict[str, StoredFile], parent: Commit | None = None
    ) -> Commit:
        listing = {path: file.etag for path, file in files.items()}
        identity = json.dumps([self.name, parent.oid if parent else "", title, description, listing])
        return Commit(hashlib.sha1(identity.encode()).hexdigest(), title, description, files, parent)


def goes_to_lfs(path: str, sample: bytes, size: int) -> bool:
    """Whether the Hub stores a file in LFS: by name, by size, or because it is binary."""
    return f"*{path[path.rfind('.') :]} " in GIT_ATTRIBUTES or size > REGULAR_LIMIT or b"\0" in sample
