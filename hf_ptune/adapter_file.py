"""The folder on disk: names, write, read, validate."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import cached_file

from hf_ptune.errors import AdapterFileError

WEIGHTS_NAME = "model.safetensors"
_DIGEST = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


def write_tensors(folder: str | os.PathLike[str], tensors: dict[str, Tensor]) -> Path:
    """Write the adapter's tensors so that the folder holds the old file or the new one, never a part.

    Args:
        folder: an existing folder.
        tensors: adapter tensors only, by their names in the wrapper's state dict.

    Returns:
        Path of the written file.
    """
    target = Path(folder) / WEIGHTS_NAME
    partial = target.with_name(f".{WEIGHTS_NAME}.{os.getpid()}.partial")
    try:
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, partial, metadata={"format": "pt"})
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def find_weights(source: str, **hub: Any) -> str:
    """Find an adapter's weights in a folder, the cache or the Hub.

    Args:
        source: folder or Hub id.
        hub: revision, token, cache_dir and the like.

    Raises:
        AdapterFileError: there are none.
    """
    path: str | None = cached_file(source, WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if path is None:
        raise AdapterFileError(f"{source} has no {WEIGHTS_NAME}; expected an adapter that save_pretrained wrote.")
    if not os.path.isdir(source):
        check_download(Path(path), source)
    return path


def is_foreign(source: str | os.PathLike[str], hub: dict[str, Any]) -> bool:
    """Whether a source holds what another library saved, and nothing of ours.

    Args:
        source: folder or Hub id.
        hub: options of loading, some of which are the Hub's.
    """
    own = {k: hub[k] for k in ("cache_dir", "token", "local_files_only", "revision", "subfolder") if k in hub}

    def has(name: str) -> bool:
        try:
            return cached_file(os.fspath(source), name, _raise_exceptions_for_missing_entries=False, **own) is not None
        except OSError:
            return False  # said where it is read

    return not has("config.json") and has("adapter_config.json")


def check_download(path: Path, source: str) -> None:
    """Compare a file of the Hub's cache with the name it is kept under, which is the digest the Hub gave for it.

    The Hub's client accepts a damaged body, and serves it ever after; here it is taken out of the cache.

    Raises:
        AdapterFileError: they differ.
    """
    kept = path.resolve()
    expected = kept.name
    if not _DIGEST.fullmatch(expected):
        return  # a cache without links, or another kind of store
    found = sha256_of(kept) if len(expected) == 64 else blob_id_of(kept)
    if found != expected:
        kept.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise AdapterFileError(
            f"{path.name} of {source} was damaged on its way: its digest is {found[:12]}…, the Hub says "
            f"{expected[:12]}…. It has been taken out of the cache; load it again."
        )


def sha256_of(path: Path) -> str:
    """The name under which the Hub keeps a large file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def blob_id_of(path: Path) -> str:
    """The name under which the Hub, as git, keeps a small file."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    digest.update(path.read_bytes())
    return digest.hexdigest()


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read an adapter's tensors.

    Args:
        path: the safetensors file.

    Returns:
        Tensors by name.

    Raises:
        AdapterFileError: no safetensors file, or a damaged one, or one with values that are not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(
            f"{path} cannot be read as safetensors ({error}). It may be cut short or damaged; fetch it again."
        ) from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise AdapterFileError(f"{path}: {name} holds values that are not finite; the adapter is broken.")
    return tensors


def check_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], source: str) -> None:
    """Refuse tensors that are missing, unexpected or of another shape.

    Raises:
        AdapterFileError: names what differs.
    """
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    shapes = [
        f"{n}: {tuple(found[n].shape)} in the file, {tuple(expected[n].shape)} expected"
        for n in sorted(set(found) & set(expected))
        if found[n].shape != expected[n].shape
    ]
    if missing or unexpected or shapes:
        parts = [
            f"missing {missing[:5]}" if missing else "",
            f"unexpected {unexpected[:5]}" if unexpected else "",
            f"other shapes {shapes[:5]}" if shapes else "",
        ]
        raise AdapterFileError(
            f"{source} does not hold the adapter that its config.json describes: {'; '.join(p for p in parts if p)}."
        )
