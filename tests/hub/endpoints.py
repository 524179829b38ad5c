"""The endpoints of the Hub that the client needs to push and to load: one function each, and the table of them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import yaml

from tests.hub.storage import Refusal, Repository, StoredFile, goes_to_lfs


if TYPE_CHECKING:
    from tests.hub.handler import Handler
    from tests.hub.server import HubServer


#: Of commits, which are not dated here.
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Answer:
    """What goes back."""

    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200


def _json(value: Any, status: int = 200) -> Answer:
    return Answer(json.dumps(value).encode(), status=status)


def whoami(hub: HubServer, request: Handler) -> Answer:
    user = hub.whoami(request.token)
    role = "write" if user.may_write else "read"
    auth = {"accessToken": {"displayName": "test", "role": role}}
    return _json({"type": "user", "name": user.name, "orgs": [], "auth": auth})


def agent_harnesses(hub: HubServer, request: Handler) -> Answer:
    return _json({"harnesses": []})


def validate_yaml(hub: HubServer, request: Handler) -> Answer:
    """Errors and warnings of a model card's front matter, in the words of the real Hub."""
    content = json.loads(request.body)["content"]
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", content, re.DOTALL)
    if match is None:
        return _json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    try:
        yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        message = str(error).splitlines()[0]
        raise Refusal(400, "Invalid metadata", body={"errors": [{"message": message}], "warnings": []}) from error
    return _json({"errors": [], "warnings": []})


def create_repo(hub: HubServer, request: Handler) -> Answer:
    asked = json.loads(request.body)
    namespace = asked.get("organization") or hub.whoami(request.token).name
    name = f"{namespace}/{asked['name']}"
    hub.authorize(namespace, request.token)
    if name in hub.repositories:
        raise Refusal(409, "You already created this model repo", body={"url": f"{hub.url}/{name}", "error": "exists"})
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    hub.repositories[name] = Repository(name, private)
    return _json({"url": f"{hub.url}/{name}", "name": name})


def preupload(hub: HubServer, request: Handler, repo: str, revision: str) -> Answer:
    """How each file is to be sent, and what of it is there already."""
    stored = _target(hub, request, repo).at(revision).files
    answers = []
    for file in json.loads(request.body)["files"]:
        path = file["path"]
        large = goes_to_lfs(path, base64.b64decode(file["sample"]), file["size"])
        there = {"oid": stored[path].etag} if path in stored else {}
        answers.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **there})
    return _json({"files": answers})


def lfs_batch(hub: HubServer, request: Handler, repo: str) -> Answer:
    """Where to put each file; nothing for those that are there."""
    stored = hub.proposable(repo, request.token).lfs
    objects = []
    for asked in json.loads(request.body)["objects"]:
        oid, size = asked["oid"], asked["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in stored:
            upload: dict[str, Any] = {"href": f"{hub.url}/lfs/{repo}/{oid}"}
            if hub.part_size is not None and size > hub.part_size:
                numbers = range(1, -(-size // hub.part_size) + 1)
                parts = {str(number): f"{hub.url}/lfs/{repo}/{oid}/{number}" for number in numbers}
                upload["header"] = {"chunk_size": str(hub.part_size), **parts}
            answer["actions"] = {"upload": upload, "verify": {"href": f"{hub.url}/lfs/{repo}/{oid}/verify"}}
        objects.append(answer)
    return _json({"transfer": "basic", "objects": objects})


def lfs_put(hub: HubServer, request: Handler, repo: str, oid: str) -> Answer:
    _store(hub, repo, oid, request.body)
    return Answer()


def lfs_part(hub: HubServer, request: Handler, repo: str, oid: str, part: str) -> Answer:
    hub.parts[oid, int(part)] = request.body
    return Answer(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


def lfs_complete(hub: HubServer, request: Handler, repo: str, oid: str) -> Answer:
    numbers = [part["partNumber"] for part in json.loads(request.body)["parts"]]
    _store(hub, repo, oid, b"".join(hub.parts.pop((oid, number)) for number in numbers))
    return Answer()


def lfs_verify(hub: HubServer, request: Handler, repo: str, oid: str) -> Answer:
    if len(hub.proposable(repo, request.token).lfs.get(oid, b"")) != json.loads(request.body)["size"]:
        raise Refusal(404, "the file was not uploaded")
    return _json({})


def commit(hub: HubServer, request: Handler, repo: str, revision: str) -> Answer:
    repository = _target(hub, request, repo)
    lines = [json.loads(line) for line in request.body.splitlines() if line]
    made, branch = repository.commit(revision, lines, _is_proposal(request))
    answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{hub.url}/{repo}/commit/{made.oid}"}
    if branch != revision:
        answer["pullRequestUrl"] = f"{hub.url}/{repo}/discussions/{branch.removeprefix('refs/pr/')}"
    return _json(answer)


def info(hub: HubServer, request: Handler, repo: str, revision: str = "main") -> Answer:
    repository = hub.readable(repo, request.token)
    head = repository.at(revision)
    card = _card(head.files.get("README.md"))
    return _json(
        {
            "_id": "0",
            "id": repo,
            "modelId": repo,
            "author": repo.split("/")[0],
            "sha": head.oid,
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "createdAt": DATE,
            "lastModified": DATE,
            "tags": card.get("tags") or [],
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
            "cardData": card,
            "siblings": [{"rfilename": path} for path in sorted(head.files)],
        }
    )


def tree(hub: HubServer, request: Handler, repo: str, revision: str, path: str = "") -> Answer:
    files = hub.readable(repo, request.token).at(revision).files
    recursive = request.query.get("recursive", ["false"])[0].lower() in ("1", "true")
    below = f"{path}/" if path else ""
    entries: dict[str, dict[str, Any]] = {}
    for name in sorted(files):
        if name.startswith(below):
            first, *rest = name[len(below) :].split("/")
            if rest:
                entries[below + first] = {"type": "directory", "path": below + first, "oid": "0" * 40, "size": 0}
            if recursive or not rest:
                entries[name] = _entry(name, files[name])
    if path and not entries:
        raise Refusal(404, f"{path} does not exist", "EntryNotFound")
    return _json(list(entries.values()))


def paths_info(hub: HubServer, request: Handler, repo: str, revision: str) -> Answer:
    files = hub.readable(repo, request.token).at(revision).files
    if "json" in request.headers.get("Content-Type", ""):
        paths = json.loads(request.body)["paths"]
    else:
        paths = parse_qs(request.body.decode()).get("paths", [])
    return _json([_entry(path, files[path]) for path in paths if path in files])


def refs(hub: HubServer, request: Handler, repo: str) -> Answer:
    kinds: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    for name, head in hub.readable(repo, request.token).branches.items():
        pull = name.startswith("refs/pr/")
        reference = {"name": name.removeprefix("refs/pr/"), "ref": name if pull else f"refs/heads/{name}"}
        kinds["pullRequests" if pull else "branches"].append({**reference, "targetCommit": head.oid})
    return _json(kinds)


def create_branch(hub: HubServer, request: Handler, repo: str, branch: str) -> Answer:
    if branch.startswith("refs/"):
        raise Refusal(400, f"Invalid reference for a branch: {branch}")
    start = json.loads(request.body or b"{}").get("startingPoint", "main")
    hub.writable(repo, request.token).branch(branch, start)
    return _json({})


def commits(hub: HubServer, request: Handler, repo: str, revision: str) -> Answer:
    history = hub.readable(repo, request.token).at(revision).history()
    authors = [{"user": repo.split("/")[0]}]
    return _json(
        [{"id": c.oid, "title": c.title, "message": c.description, "date": DATE, "authors": authors} for c in history]
    )


def resolve(hub: HubServer, request: Handler, repo: str, revision: str, path: str) -> Answer:
    """A file, or the part of it that the `Range` header asks for."""
    head = hub.readable(repo, request.token).at(revision)
    if path not in head.files:
        refusal = Refusal(404, "Entry not found", "EntryNotFound")
        return Answer(b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": head.oid}, refusal.status)
    file = head.files[path]
    headers = {
        "Content-Type": "application/octet-stream",
        "ETag": f'"{file.etag}"',
        "X-Linked-Etag": f'"{file.etag}"',
        "X-Linked-Size": str(len(file.content)),
        "X-Repo-Commit": head.oid,
        "Accept-Ranges": "bytes",
    }
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if asked is None:
        return Answer(file.content, headers)
    start, size = int(asked[1]), len(file.content)
    end = min(int(asked[2]) if asked[2] else size - 1, size - 1)
    if start >= size:
        return Answer(b"", {"Content-Range": f"bytes */{size}"}, 416)
    headers["Content-Range"] = f"bytes {start}-{end}/{size}"
    return Answer(file.content[start : end + 1], headers, 206)


def _is_proposal(request: Handler) -> bool:
    return request.query.get("create_pr") == ["1"]


def _target(hub: HubServer, request: Handler, repo: str) -> Repository:
    return (hub.proposable if _is_proposal(request) else hub.writable)(repo, request.token)


def _store(hub: HubServer, repo: str, oid: str, content: bytes) -> None:
    if hashlib.sha256(content).hexdigest() != oid:
        raise Refusal(400, "the content does not have the SHA-256 that was announced")
    hub.repositories[repo].lfs[oid] = content
    hub.uploaded.append((oid, len(content)))


def _entry(path: str, file: StoredFile) -> dict[str, Any]:
    size = len(file.content)
    large = {"lfs": {"oid": file.sha256, "size": size, "pointerSize": 130}} if file.sha256 else {}
    return {"type": "file", "path": path, "size": size, "oid": file.oid, **large}


def _card(readme: StoredFile | None) -> dict[str, Any]:
    match = re.match(r"---\s*\n(.*?)\n---", readme.content.decode(), re.DOTALL) if readme else None
    return (yaml.safe_load(match[1]) or {}) if match else {}


_REPO, _REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
_OID = rf"/lfs/{_REPO}/(?P<oid>[0-9a-f]{{64}})"

#: Endpoint: the methods, the path, the function. Faults are planted by these names.
ROUTES = {
    "whoami": ("GET", "/api/whoami-v2", whoami),
    "agent_harnesses": ("GET", "/api/agent-harnesses", agent_harnesses),
    "validate_yaml": ("POST", "/api/validate-yaml", validate_yaml),
    "create_repo": ("POST", "/api/repos/create", create_repo),
    "preupload": ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}", preupload),
    "lfs_batch": ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", lfs_batch),
    "lfs_put": ("PUT", _OID, lfs_put),
    "lfs_part": ("PUT", rf"{_OID}/(?P<part>\d+)", lfs_part),
    "lfs_complete": ("POST", _OID, lfs_complete),
    "lfs_verify": ("POST", f"{_OID}/verify", lfs_verify),
    "commit": ("POST", f"/api/models/{_REPO}/commit/{_REVISION}", commit),
    "tree": ("GET", f"/api/models/{_REPO}/tree/{_REVISION}(/(?P<path>.+))?", tree),
    "paths_info": ("POST", f"/api/models/{_REPO}/paths-info/{_REVISION}", paths_info),
    "refs": ("GET", f"/api/models/{_REPO}/refs", refs),
    "create_branch": ("POST", f"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", create_branch),
    "commits": ("GET", f"/api/models/{_REPO}/commits/{_REVISION}", commits),
    "info": ("GET", f"/api/models/{_REPO}(/revision/{_REVISION})?", info),
    "resolve": ("GET HEAD", f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", resolve),
}
