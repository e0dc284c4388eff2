"""What each address of the Hub does."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from .messages import HubError, Request, Response, json_response
from .repository import Blob, Commit, Repo

if TYPE_CHECKING:
    from .server import HubServer

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".npz", ".parquet", ".zip", ".gz")

View = Callable[..., Response]
ROUTES: list[tuple[str, re.Pattern[str], View]] = []

REPO_ID = r"(?P<repo_id>[^/]+(?:/[^/]+)??)"
API = r"/api/(?P<kind>models|datasets|spaces)/" + REPO_ID
PAGE = r"/(?:(?P<kind>datasets|spaces)/)?" + REPO_ID
GIT = PAGE + r"\.git/info/lfs"


def route(method: str, pattern: str) -> Callable[[View], View]:
    def register(view: View) -> View:
        ROUTES.append((method, re.compile(pattern), view))
        return view

    return register


@route("GET", r"/api/whoami-v2")
def whoami(hub: HubServer, request: Request) -> Response:
    user = hub.user_of(request)
    if user is None:
        raise HubError(401, "Invalid username or password.")
    token = {"displayName": "test", "role": "write" if user.write else "read"}
    return json_response(
        {"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "orgs": []}
        | {"auth": {"type": "access_token", "accessToken": token}}
    )


@route("POST", r"/api/validate-yaml")
def validate_yaml(hub: HubServer, request: Request) -> Response:
    content = request.json()["content"]
    if not content.startswith("---"):
        return json_response({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    if front_matter(content) is None:
        return json_response({"errors": [{"message": "metadata has no end"}], "warnings": []}, 400)
    return json_response({"errors": [], "warnings": []})


def front_matter(card: str) -> dict[str, str] | None:
    """Read the top-level `key: value` lines of a model card; None where its metadata has no end."""
    match = re.match(r"---\r?\n(.*?)^---", card, re.DOTALL | re.MULTILINE)
    return match and dict(re.findall(r"^(\w+):[ ]*([^\s#].*?)\s*$", match[1], re.MULTILINE))


@route("POST", r"/api/repos/create")
def create_repo(hub: HubServer, request: Request) -> Response:
    user, wanted = hub.user_of(request, write=True), request.json()
    repo_id = f"{wanted.get('organization') or user.name}/{wanted['name']}"
    if not repo_id.startswith(f"{user.name}/"):
        raise HubError(403, f"Forbidden: {user.name} may not create {repo_id}")
    repo = Repo(repo_id, wanted.get("type") or "model", wanted.get("visibility") == "private")
    url = f"{hub.url}/{repo.key}"
    if repo.key in hub.repos:
        raise HubError(409, f"You already created this {repo.type} repo: {repo_id}", url=url)
    hub.repos[repo.key] = repo
    return json_response({"url": url, "name": repo_id, "id": repo_id})


@route("DELETE", r"/api/repos/delete")
def delete_repo(hub: HubServer, request: Request) -> Response:
    user, wanted = hub.user_of(request, write=True), request.json()
    repo_id = f"{wanted.get('organization') or user.name}/{wanted['name']}"
    repo = hub.repo_for(request, f"{wanted.get('type') or 'model'}s", repo_id, write=True)
    del hub.repos[repo.key]
    return json_response({})


@route("PUT", API + r"/settings")
def change_settings(hub: HubServer, request: Request, kind: str, repo_id: str) -> Response:
    repo, wanted = hub.repo_for(request, kind, repo_id, write=True), request.json()
    repo.gated = wanted.get("gated", repo.gated)
    if "visibility" in wanted:
        repo.private = wanted["visibility"] == "private"
    return json_response({})


@route("GET", API + r"(?:/revision/(?P<revision>[^/]+))?")
def repo_info(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str | None) -> Response:
    repo = hub.repo_for(request, kind, repo_id)
    commit = repo.at(revision or "main")
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in commit.files]
    if "blobs" in request.query:
        for sibling, blob in zip(siblings, commit.files.values(), strict=True):
            sibling |= {"size": len(blob.content), "blobId": blob.oid}
            if blob.lfs:
                sibling["lfs"] = {"size": len(blob.content), "sha256": blob.sha256, "pointerSize": len(blob.pointer)}
    info = {"id": repo.id, "author": repo.owner, "sha": commit.id, "siblings": siblings}
    info |= {"private": repo.private, "gated": repo.gated, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
    info |= {"createdAt": next(iter(repo.commits.values())).date, "lastModified": commit.date}
    if repo.type == "model":
        info |= {"modelId": repo.id} | library_and_task(commit.files)
    return json_response(info)


def library_and_task(files: Mapping[str, Blob]) -> dict[str, str]:
    """What a model is loaded with and what for, as its card tells, or as its config.json does."""
    known = front_matter(files["README.md"].content.decode()) or {} if "README.md" in files else {}
    if "config.json" in files and "model_type" in json.loads(files["config.json"].content):
        known = {"library_name": "transformers"} | known
    return {name: known[name] for name in ("library_name", "pipeline_tag") if name in known}


@route("GET", API + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
def tree(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str, folder: str | None) -> Response:
    commit = hub.repo_for(request, kind, repo_id).at(revision)
    start = f"{folder.strip('/')}/" if folder else ""
    inside = {path: blob for path, blob in commit.files.items() if path.startswith(start)}
    if folder and not inside:
        raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound", commit.id)
    entries: dict[str, dict[str, Any]] = {}
    recursive = request.query.get("recursive", "").lower() == "true"
    for path, blob in inside.items():
        parents = [path[:end] for end, letter in enumerate(path) if letter == "/" and end >= len(start)]
        shown = parents if recursive else parents[:1]
        entries |= {parent: folder_entry(parent) for parent in shown}
        if recursive or not parents:
            entries[path] = file_entry(path, blob)
    return json_response(list(entries.values()))


def folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}


def file_entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.content)}
    return entry | ({"lfs": blob.lfs_info} if blob.lfs else {})


@route("POST", API + r"/paths-info/(?P<revision>[^/]+)")
def paths_info(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str) -> Response:
    files = hub.repo_for(request, kind, repo_id).at(revision).files
    paths = parse_qs(request.body.decode()).get("paths", [])
    folders = [path for path in paths if any(name.startswith(f"{path}/") for name in files)]
    found = [file_entry(path, files[path]) for path in paths if path in files]
    return json_response(found + [folder_entry(path) for path in folders])


@route("GET", API + r"/refs")
def refs(hub: HubServer, request: Request, kind: str, repo_id: str) -> Response:
    repo = hub.repo_for(request, kind, repo_id)

    def listing(names: dict[str, str], prefix: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": prefix + name, "targetCommit": commit} for name, commit in names.items()]

    opened = {pr.branch: repo.branches[pr.branch] for pr in repo.pull_requests}
    own = {name: commit for name, commit in repo.branches.items() if name not in opened}
    found = {"branches": listing(own, "refs/heads/"), "tags": listing(repo.tags, "refs/tags/")}
    return json_response(found | {"converts": [], "pullRequests": listing(opened, "")})


@route("GET", API + r"/discussions")
def discussions(hub: HubServer, request: Request, kind: str, repo_id: str) -> Response:
    repo = hub.repo_for(request, kind, repo_id)
    told = [
        {"num": pr.number, "title": pr.title, "author": {"name": pr.author}, "createdAt": pr.date, "status": "open"}
        | {"repo": {"name": repo.id, "type": repo.type}, "isPullRequest": True}
        for pr in repo.pull_requests
        if request.query.get("author") in (None, pr.author) and request.query.get("type") != "discussion"
    ]
    return json_response({"discussions": told, "count": len(told), "start": 0})


@route("GET", API + r"/commits/(?P<revision>[^/]+)")
def commits(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str) -> Response:
    repo = hub.repo_for(request, kind, repo_id)
    commit: Commit | None = repo.at(revision)
    history = []
    while commit is not None:
        entry = {"id": commit.id, "title": commit.title, "message": commit.description, "date": commit.date}
        history.append(entry | {"authors": [{"user": commit.author}]})
        commit = repo.commits[commit.parent] if commit.parent else None
    return json_response(history)


@route("POST", API + r"/(?P<ref>branch|tag)/(?P<name>[^/]+)")
def create_ref(hub: HubServer, request: Request, kind: str, repo_id: str, ref: str, name: str) -> Response:
    repo, wanted = hub.repo_for(request, kind, repo_id, write=True), request.json()
    names, revision = repo.branches, wanted.get("startingPoint", "main")
    if ref == "tag":
        names, revision, name = repo.tags, name, wanted["tag"]
    if name in names:
        raise HubError(409, f"Reference already exists: {name}")
    names[name] = repo.at(revision).id
    return json_response({})


@route("DELETE", API + r"/(?P<ref>branch|tag)/(?P<name>[^/]+)")
def delete_ref(hub: HubServer, request: Request, kind: str, repo_id: str, ref: str, name: str) -> Response:
    repo = hub.repo_for(request, kind, repo_id, write=True)
    if (repo.branches if ref == "branch" else repo.tags).pop(name, None) is None:
        raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
    return json_response({})


@route("POST", API + r"/preupload/(?P<revision>[^/]+)")
def preupload(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str) -> Response:
    commit = hub.repo_for(request, kind, repo_id, "create_pr" not in request.query, revision).at(revision)
    answers = []
    for wanted in request.json()["files"]:
        path, size = wanted["path"], wanted["size"]
        large = size >= hub.lfs_size or (size > 0 and path.endswith(LFS_SUFFIXES))
        answer = {"path": path, "uploadMode": "lfs" if large and not hub.regular_only else "regular"}
        known = commit.files.get(path)
        answers.append(answer | {"shouldIgnore": False, "oid": known.etag if known else None})
    return json_response({"files": answers, "commitOid": commit.id})


@route("POST", GIT + r"/objects/batch")
def lfs_batch(hub: HubServer, request: Request, kind: str | None, repo_id: str) -> Response:
    repo = hub.repo_for(request, kind, repo_id, write=True)
    answers = []
    for wanted in request.json()["objects"]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in repo.objects:
            base = f"{hub.url}/{repo.key}.git/info/lfs"
            upload, verify = {"href": f"{base}/storage/{wanted['oid']}"}, {"href": f"{base}/objects/verify"}
            answer["actions"] = {"upload": upload, "verify": verify}
        answers.append(answer)
    return json_response({"transfer": "basic", "objects": answers})


@route("PUT", GIT + r"/storage/(?P<oid>[0-9a-f]{64})")
def lfs_put(hub: HubServer, request: Request, kind: str | None, repo_id: str, oid: str) -> Response:
    repo = hub.repos.get(f"{kind}/{repo_id}" if kind else repo_id)  # such a link is its own permission
    if repo is None or hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, "The content does not match its oid")
    repo.objects[oid] = request.body
    return Response()


@route("POST", GIT + r"/objects/verify")
def lfs_verify(hub: HubServer, request: Request, kind: str | None, repo_id: str) -> Response:
    repo, wanted = hub.repo_for(request, kind, repo_id, write=True), request.json()
    if len(repo.objects.get(wanted["oid"], b"")) != wanted["size"]:
        raise HubError(404, "Object not found")
    return json_response({})


@route("POST", API + r"/commit/(?P<revision>[^/]+)")
def create_commit(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str) -> Response:
    asks = "create_pr" in request.query
    repo = hub.repo_for(request, kind, repo_id, not asks, revision)
    if revision not in repo.branches:
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    header: dict[str, str] = {}
    files: dict[str, Blob] = {}
    deleted: list[str] = []
    for line in request.body.splitlines():
        key, value = (entry := json.loads(line))["key"], entry["value"]
        if key == "header":
            header = value
        elif key == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in repo.objects:
                raise HubError(400, f"LFS object {value['oid']} was not uploaded")
            files[value["path"]] = Blob(repo.objects[value["oid"]], lfs=True)
        elif key == "deletedFile":
            deleted.append(value["path"])
        elif key == "deletedFolder":
            deleted.append(value["path"].rstrip("/") + "/")
        else:
            raise HubError(400, f"Unknown operation {key}")
    if header.get("parentCommit") not in (None, repo.branches[revision]):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    author = hub.user_of(request, write=True).name
    answer: dict[str, Any] = {"success": True, "hookOutput": ""}
    if asks:
        opened = repo.open_pull_request(header["summary"], author)
        revision = opened.branch
        answer["pullRequestUrl"] = f"{hub.url}/{repo.key}/discussions/{opened.number}"
    commit = repo.commit(files, header["summary"], header.get("description", ""), author, revision, deleted)
    url = f"{hub.url}/{repo.key}/commit/{commit.id}"
    return json_response(answer | {"commitOid": commit.id, "commitUrl": url})


@route("GET", PAGE + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(hub: HubServer, request: Request, kind: str | None, repo_id: str, revision: str, path: str) -> Response:
    repo = hub.repo_for(request, kind, repo_id)
    user = hub.user_of(request)
    if repo.gated and (user is None or user.name not in {repo.owner, *repo.readers}):
        raise HubError(401 if user is None else 403, f"Access to {repo.key} is restricted", "GatedRepo")
    commit = repo.at(revision)
    if path not in commit.files:
        raise HubError(404, "Entry not found", "EntryNotFound", commit.id)
    blob = commit.files[path]
    response = ranged(blob.content, request.headers.get("Range"))
    response.headers |= {"ETag": f'"{blob.etag}"', "X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
    if blob.lfs:
        response.headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
    return response


def ranged(content: bytes, wanted: str | None) -> Response:
    """Answer with the bytes that a Range header asks for."""
    headers, size = {"Content-Type": "application/octet-stream"}, len(content)
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
    if match is None or match[0] == "bytes=-":
        return Response(200, content, headers)
    first, last = match.groups()
    start = int(first) if first else max(size - int(last), 0)
    end = min(int(last) + 1, size) if first and last else size
    if start >= end:
        return Response(416, b"", headers | {"Content-Range": f"bytes */{size}"})
    return Response(206, content[start:end], headers | {"Content-Range": f"bytes {start}-{end - 1}/{size}"})
