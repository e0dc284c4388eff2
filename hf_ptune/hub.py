"""Push a finished adapter folder to the Hub, in one commit whatever happens on the way."""

import os
import random
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_url

# HTTPError is that of the client which the installed huggingface_hub is built on
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.hf_api import RepoFile
from tqdm.auto import tqdm
from transformers.utils import logging

from hf_ptune.adapter_file import WEIGHTS_NAME, blob_id_of, sha256_of
from hf_ptune.cards import CARD_NAME
from hf_ptune.errors import AdapterFileError, HubError, shorten

logger = logging.get_logger(__name__)
ATTEMPTS = 6
_MESSAGE = "Upload adapter"
_LONGEST_WAIT = 30.0  # seconds
# transformers hands a repository with one of these to PEFT
_FOREIGN = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# what a training folder holds besides a finished adapter
_LEFT_OUT = (".git", "checkpoint-", "runs", "_", ".cache", "__pycache__")
_LEFT_OUT_ENDS = (".partial", ".bin", ".pt", ".pth", ".pyc")
_Result = TypeVar("_Result")


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = _MESSAGE,
    commit_description: str | None = None,
    instead: Mapping[str, Path] | None = None,
) -> str:
    """Upload a finished adapter folder in one commit.

    What PEFT keeps an adapter in is deleted there, since transformers would load that, and a README.md that is no card
    of ours stays as it is. What the Hub answers with 429, 5xx or a dropped connection is tried again, after a look at
    whether the commit has arrived all the same.

    Args:
        folder: what `save_pretrained` wrote, tokenizer and card beside it.
        repo_id: `user/name`, or a name of your own; the repository is made where it is missing.
        private: of a repository that is made here.
        token: a write token; the saved one when unset.
        revision: a branch; made where it is missing.
        create_pr: open a pull request instead of committing.
        commit_message: first line of the commit.
        commit_description: the rest of it.
        instead: files to upload in the place of the folder's, or beside them, by their names in the repository.

    Returns:
        The address of the repository.

    Raises:
        AdapterFileError: the folder holds no adapter.
        HubError: the Hub refused, or could not be reached; says how to push again.
    """
    files = adapter_files(folder) | dict(instead or {})
    api = HfApi(token=token)
    branch = None if revision is None or revision.startswith("refs/pr") else revision
    with tqdm(total=2 if branch is None else 3, desc=f"push to {repo_id}", unit="step", leave=False) as bar:
        try:
            url = _persist(lambda: api.create_repo(repo_id, private=private, exist_ok=True), bar)
            if branch is not None:
                _persist(lambda: api.create_branch(url.repo_id, branch=branch, exist_ok=True), bar)
            push = _Push(api, url.repo_id, revision, create_pr, files, commit_message, commit_description)
            _persist(push, bar)
        except (HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
            options = {"revision": revision, "commit-message": commit_message, "commit-description": commit_description}
            if commit_message == _MESSAGE:
                del options["commit-message"]
            again = ["hf-ptune", "push", os.fspath(folder), repo_id]
            again += [f"--{name}={value}" for name, value in options.items() if value is not None]
            again += [f"--{name}" for name, given in {"private": private, "create-pr": create_pr}.items() if given]
            raise HubError(
                f"{folder} could not be pushed to {repo_id}: {shorten(error).rstrip('.')}. The finished adapter is in "
                f"{folder}; push it again: {shlex.join(again)}"
            ) from error
    return str(url)


def commit_of(repo_id: str, token: str | bool | None = None) -> str | None:
    """The commit that a repository's main branch is at, or `None` where the Hub does not tell."""
    try:
        return HfApi(token=token).model_info(repo_id).sha
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        logger.warning(f"the commit of {repo_id} is not known ({shorten(error)}), so the adapter does not pin it.")
        return None


def license_of(repo_id: str, token: str | bool | None = None) -> dict[str, str]:
    """What a repository's card says of its licence, a link to it made whole; nothing where it cannot be read.

    Returns:
        `license`, and of one that the Hub has no name for (`other`) `license_name` and `license_link`.
    """
    try:
        data = ModelCard.load(
            repo_id, token=token if isinstance(token, str) else None, ignore_metadata_errors=True
        ).data
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError):
        return {}
    names = ("license", "license_name", "license_link")
    found = {name: value for name in names if isinstance(value := data.get(name), str)}
    link = found.get("license_link")
    if link is not None and "://" not in link:  # a file beside that card
        found["license_link"] = hf_hub_url(repo_id, link).replace("/resolve/", "/blob/")
    return found if "license" in found else {}


def adapter_files(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """The files of a finished adapter by their names in the repository; checkpoints and caches stay out.

    Links are followed within the folder, and from a snapshot of the Hub's cache to its blobs; others are left out.

    Raises:
        AdapterFileError: no configuration or no weights, or links to those that are not followed.
    """
    root = Path(folder)
    found = {}
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        hidden = any(part.startswith(_LEFT_OUT) for part in parts) or path.name.endswith(_LEFT_OUT_ENDS)
        if path.is_file() and not hidden and _belongs(path, root):
            found["/".join(parts)] = path
    missing = [name for name in ("config.json", WEIGHTS_NAME) if name not in found]
    if links := [name for name in missing if (root / name).is_file()]:
        raise AdapterFileError(
            f"{', '.join(links)} in {folder} {'are links' if len(links) > 1 else 'is a link'} to outside of it, which "
            "is not followed; put the file itself there."
        )
    if missing:
        raise AdapterFileError(f"{folder} holds no finished adapter: {', '.join(missing)} missing; save_pretrained it.")
    return found


def _belongs(path: Path, root: Path) -> bool:
    """Whether a file is the folder's own, be it by a link within it, or within the Hub's cache."""
    target, root = path.resolve(), root.resolve()
    if target.is_relative_to(root):
        return True
    # <cache>/models--user--name/snapshots/<commit> links to the blobs beside the snapshots
    blobs = root.parents[1] / "blobs" if len(root.parents) > 1 and root.parent.name == "snapshots" else None
    return blobs is not None and target.is_relative_to(blobs)


@dataclass
class _Push:
    """One commit, tried until it is there."""

    api: HfApi
    repo_id: str
    revision: str | None
    create_pr: bool
    files: dict[str, Path]
    message: str
    description: str | None
    tried: bool = False

    def __call__(self) -> None:
        info = self.api.model_info(self.repo_id, revision=self.revision)
        parent, there = info.sha, {file.rfilename for file in info.siblings or ()}
        # the answer to an earlier try may be all that was lost
        if self.tried and any(self._arrived(revision) for revision in self._targets()):
            return
        if CARD_NAME in self.files and self._has_another_card(parent, there):
            logger.warning(
                f"{self.repo_id} has a {CARD_NAME} that is no card of this package; it is kept, and the adapter's own "
                "is not pushed. Delete it there and push again to have that."
            )
            del self.files[CARD_NAME]
        self.tried = True
        self.api.create_commit(
            self.repo_id,
            [
                *(CommitOperationAdd(name, path) for name, path in self.files.items()),
                *(CommitOperationDelete(name) for name in _FOREIGN if name in there - self.files.keys()),
            ],
            commit_message=self.message,
            commit_description=self.description,
            revision=self.revision,
            create_pr=self.create_pr,
            parent_commit=None if self.create_pr else parent,
        )

    def _targets(self) -> list[str | None]:
        """Where an earlier try may have put the files: the branch, or one of the user's open pull requests."""
        if not self.create_pr:
            return [self.revision]
        me = self.api.whoami()["name"]
        opened = self.api.get_repo_discussions(
            self.repo_id, author=me, discussion_type="pull_request", discussion_status="open"
        )
        return [f"refs/pr/{request.num}" for request in opened if request.title == self.message]

    def _has_another_card(self, parent: str | None, there: set[str]) -> bool:
        """Whether somebody has written a card there, which says more than its metadata."""
        if CARD_NAME not in there & self.files.keys():
            return False
        try:
            path = self.api.hf_hub_download(self.repo_id, CARD_NAME, revision=parent)
        except LocalEntryNotFoundError as error:  # what the client makes of every fault
            raise ConnectionError(str(error)) from error
        try:
            card = ModelCard.load(path, ignore_metadata_errors=True)
        except (yaml.YAMLError, ValueError):
            return True  # metadata that cannot be read are none of ours
        return "hf_ptune" not in (card.data.get("tags") or []) and bool(card.text.strip())

    def _arrived(self, revision: str | None) -> bool:
        names = [*self.files, *(name for name in _FOREIGN if name not in self.files)]
        infos = self.api.get_paths_info(self.repo_id, names, revision=revision)
        there = {i.path: i.lfs.sha256 if i.lfs else i.blob_id for i in infos if isinstance(i, RepoFile)}
        return there.keys() <= self.files.keys() and all(
            there.get(name) in (sha256_of(path), blob_id_of(path)) for name, path in self.files.items()
        )


def _persist(action: Callable[[], _Result], bar: Any) -> _Result:
    for attempt in range(ATTEMPTS):
        try:
            result = action()
            bar.update()
            return result
        except (HTTPError, ConnectionError) as error:
            if attempt + 1 == ATTEMPTS or isinstance(error, OfflineModeIsEnabled) or not _passes(error):
                raise
            wait = _wait(error, attempt)
            bar.set_postfix_str(f"{shorten(error, 60)}; again in {wait:.0f} s")
            logger.info(f"the Hub answered with {shorten(error)}; trying again in {wait:.1f} s.")
            time.sleep(wait)
    raise AssertionError("unreachable")


def _passes(error: Exception) -> bool:
    """Whether an error may be gone the next time."""
    response = getattr(error, "response", None)
    # 412: somebody, perhaps an earlier try of this very push, has moved the branch
    return response is None or response.status_code in (408, 412, 429) or response.status_code >= 500


def _wait(error: Exception, attempt: int) -> float:
    headers = getattr(getattr(error, "response", None), "headers", {})
    asked = headers.get("Retry-After", "")
    if asked.isdigit():
        return min(float(asked), _LONGEST_WAIT)
    return min(0.5 * 2**attempt, _LONGEST_WAIT) * random.uniform(0.8, 1.2)
