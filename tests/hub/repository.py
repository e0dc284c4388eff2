"""Files, commits, branches and tags of one repository, in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from .messages import HubError

GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.bin filter=lfs diff=lfs merge=lfs -text\n"


@dataclass(frozen=True)
class Blob:
    """One version of one file, kept as a regular git object or in LFS."""

    content: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git stores in place of an LFS file."""
        lines = ["version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {len(self.content)}"]
        return "".join(f"{line}\n" for line in lines).encode()

    @cached_property
    def oid(self) -> str:
        stored = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    @property
    def lfs_info(self) -> dict[str, Any]:
        return {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}


@dataclass(frozen=True)
class Commit:
    """A title, its author and every file of the repository at that point."""

    id: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    files: dict[str, Blob]


@dataclass(frozen=True)
class PullRequest:
    """A branch of its own that asks to be merged."""

    number: int
    title: str
    author: str
    date: str

    @property
    def branch(self) -> str:
        return f"refs/pr/{self.number}"


@dataclass
class Repo:
    """A repository: commits from the first to the last, branches and tags that name them, uploaded LFS objects."""

    id: str
    type: str = "model"
    private: bool = False
    gated: str | bool = False
    readers: set[str] = field(default_factory=set)  # besides the owner, of a private or gated repository
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    pull_requests: list[PullRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit({".gitattributes": GIT_ATTRIBUTES}, "initial commit")

    @property
    def key(self) -> str:
        """Name of the repository in paths and in `HubServer.repos`."""
        return self.id if self.type == "model" else f"{self.type}s/{self.id}"

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def at(self, revision: str = "main") -> Commit:
        """Find the commit that a branch, a tag or a commit id names."""
        commit_id = self.branches.get(revision) or self.tags.get(revision) or revision
        if commit_id not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[commit_id]

    def open_pull_request(self, title: str, author: str) -> PullRequest:
        """Open a branch that starts where the main one is."""
        opened = PullRequest(len(self.pull_requests) + 1, title, author, _now())
        self.pull_requests.append(opened)
        self.branches[opened.branch] = self.branches["main"]
        return opened

    def commit(
        self,
        files: Mapping[str, Blob | bytes],
        title: str,
        description: str = "",
        author: str | None = None,
        branch: str = "main",
        deleted: Iterable[str] = (),
    ) -> Commit:
        """Put a commit on a branch; `deleted` holds paths of files, and of folders with a slash at their end."""
        parent = self.branches.get(branch)
        kept = dict(self.commits[parent].files) if parent else {}
        for path in deleted:
            gone = [name for name in kept if name == path or (path.endswith("/") and name.startswith(path))]
            if not gone:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del kept[name]
        kept |= {path: blob if isinstance(blob, Blob) else Blob(blob) for path, blob in files.items()}
        listing = [(path, kept[path].oid) for path in sorted(kept)]
        commit_id = hashlib.sha1(repr((self.key, len(self.commits), parent, title, listing)).encode()).hexdigest()
        commit = Commit(commit_id, parent, title, description, author or self.owner, _now(), dict(sorted(kept.items())))
        self.commits[commit_id] = commit
        self.branches[branch] = commit_id
        return commit


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
