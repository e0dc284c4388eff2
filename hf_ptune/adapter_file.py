"""The folder on disk: names, write, read, validate."""

import hashlib
import json
import os
import platform
import re
import shutil
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import cached_file

from hf_ptune.errors import AdapterFileError, from_system, naming, shorten

WEIGHTS_NAME = "model.safetensors"
ADAPTER_FOLDER = "adapter"  # in the output folder of a recipe's run
HUB_KEYS = ("cache_dir", "force_download", "local_files_only", "token", "proxies")  # of whatever reads the Hub
MODEL_TYPE = "ptune"  # in config.json
_ASIDE = ".ptune-"
_writing: set[Path] = set()  # by this process, now
_ABANDONED = 3600.0  # seconds after which what another machine has left aside is nobody's
_STRUCTURE, _FRESH = "ptune", "fresh"
_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_MOST_HEADER = 2**23  # bytes; some eighty thousand tensors
_DIGEST = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


@contextmanager
def staged(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Let files be written aside, and move them into a folder when all of them are on the disk.

    The weights move last: until then the folder loads as what it was. Whoever is killed meanwhile leaves the files
    aside, where nothing reads them, and the next save removes them.

    Args:
        folder: made where it is missing.

    Yields:
        Where to write.

    Raises:
        OSError: something cannot be written; names the file, or the folder.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    aside = Path(tempfile.mkdtemp(prefix=f"{_ASIDE}{platform.node()}-{os.getpid()}-", dir=target))
    _writing.add(aside)
    try:
        yield aside
        files = sorted((f for f in aside.rglob("*") if f.is_file()), key=lambda f: (f.name == WEIGHTS_NAME, f))
        for file in files:
            _flush(file)
        for file in files:
            place = target / file.relative_to(aside)
            place.parent.mkdir(exist_ok=True)
            os.replace(file, place)
        _flush(target)
    except Exception as error:  # whatever was written inside raises
        told = from_system(error, target)
        if told is not None and told.filename is not None and Path(told.filename).parent == aside:
            told = OSError(told.errno, told.strerror, str(target / Path(told.filename).name))
        if told is None or told is error:
            raise
        raise told from error
    finally:
        _writing.discard(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed saves have left aside, and nothing that another process may be writing."""
    for left in folder.glob(f"{_ASIDE}*"):
        node, _, process = left.name.removeprefix(_ASIDE).rpartition("-")[0].rpartition("-")
        if process == str(os.getpid()):
            busy = left in _writing
        elif node == platform.node():
            busy = process.isdigit() and psutil.pid_exists(int(process))
        else:
            busy = bool(node) and left.exists() and time.time() - os.path.getmtime(left) < _ABANDONED
        if not busy:
            shutil.rmtree(left, ignore_errors=True)


def write_tensors(
    folder: str | os.PathLike[str], tensors: dict[str, Tensor], structure: dict[str, Any] | None = None
) -> Path:
    """Write the adapter's tensors.

    Args:
        folder: an existing folder; one that `staged` gave, where another adapter may be overwritten.
        tensors: adapter tensors only, by their names in the wrapper's state dict.
        structure: what the tensors, and what they do to outputs, follow from; kept beside them.

    Returns:
        Path of the written file.
    """
    target = Path(folder) / WEIGHTS_NAME
    metadata = {"format": "pt"} | ({} if structure is None else {_STRUCTURE: json.dumps(structure, sort_keys=True)})
    with naming(target):
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, target, metadata=metadata)
        _settle_header(target)
    return target


def mark_fresh(folder: str | os.PathLike[str]) -> None:
    """Note beside the tensors of a folder that nobody has trained them; what is saved later does not say so.

    Args:
        folder: an adapter's.
    """
    path = Path(folder) / WEIGHTS_NAME
    write_tensors(folder, read_tensors(path), read_header(path)[1] | {_FRESH: True})


def is_fresh(folder: str | os.PathLike[str]) -> bool:
    """Whether `mark_fresh` noted that an adapter's tensors have not been trained."""
    path = Path(folder) / WEIGHTS_NAME
    return path.is_file() and bool(read_header(path)[1].get(_FRESH))


def _settle_header(path: Path) -> None:
    """Sort the metadata, which safetensors writes in another order every time: equal adapters are equal files."""
    with open(path, "r+b") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        line = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(line) <= length:
            file.seek(8)
            file.write(line.ljust(length))


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


def digest_of(settings: dict[str, Any]) -> str:
    """A digest of a JSON-ready dictionary, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def blob_id_of(path: Path) -> str:
    """The name under which the Hub, as git, keeps a small file."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    digest.update(path.read_bytes())
    return digest.hexdigest()


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what a file of tensors holds, without the values.

    Args:
        path: the safetensors file.

    Returns:
        Tensors without memory by name, and the structure that was written beside them; it is empty where none was.

    Raises:
        AdapterFileError: no safetensors file, or a damaged one.
    """
    entries, metadata = _parse_header(Path(path))
    try:
        with safe_open(path, framework="pt") as file:  # compares all offsets with the file
            names = list(file.keys())
            types = {n: file.get_slice(n).get_dtype() for n in names}
        other = {n: t for n, t in types.items() if t not in _FLOATS}
        if other:
            raise AdapterFileError(
                f"{path} holds {shorten(other)}; expected one of {', '.join(_FLOATS)}. It is no adapter of this "
                "package; fetch or train it again."
            )
        tensors = {n: torch.empty(entries[n]["shape"], dtype=_FLOATS[types[n]], device="meta") for n in names}
        structure = json.loads(metadata.get(_STRUCTURE, "{}"))
    except AdapterFileError:
        raise
    except Exception as error:  # a header of garbage fails in many ways
        raise _unreadable(path, error) from error
    if not isinstance(structure, dict):
        raise _unreadable(path, f"the structure beside the tensors is {shorten(structure, 50)}")
    return tensors, structure


def _unreadable(path: str | os.PathLike[str], found: object) -> AdapterFileError:
    return AdapterFileError(
        f"{path} cannot be read as safetensors ({shorten(found)}). It may be cut short or damaged; fetch it again."
    )


def _parse_header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The entries of a header, and its metadata, read only where its length and names are plausible."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        named = dict(pairs)
        if len(named) < len(pairs):
            twice = [n for n, count in Counter(n for n, _ in pairs).items() if count > 1]
            raise ValueError(f"its header names {twice[:5]} twice")
        return named

    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise ValueError(f"it has {size} bytes")
            length = struct.unpack("<Q", start)[0]
            if length > min(size - 8, _MOST_HEADER):
                raise ValueError(f"it says that its header has {length} bytes, and has {size} bytes itself")
            header = json.loads(file.read(length), object_pairs_hook=unique)
        if not isinstance(header, dict):
            raise ValueError(f"its header is a {type(header).__name__}")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
            raise ValueError("its metadata are not strings by name")
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    return header, metadata


def read_tensors(path: str | os.PathLike[str], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Read an adapter's tensors.

    Args:
        path: the safetensors file.
        names: those to read; all when unset.

    Returns:
        Tensors by name.

    Raises:
        AdapterFileError: no safetensors file, or a damaged one, or one with values that are not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {n: file.get_tensor(n) for n in (file.keys() if names is None else names)}
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise AdapterFileError(f"{path}: {name} holds values that are not finite; the adapter is broken.")
    return tensors


def check_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], source: str) -> None:
    """Refuse tensors that are missing, unexpected, of another shape or type.

    Raises:
        AdapterFileError: names what differs.
    """
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    shapes = [
        f"{n}: {tuple(found[n].shape)} in the file, {tuple(expected[n].shape)} expected"
        for n in sorted(set(found) & set(expected))
        if found[n].shape != expected[n].shape
    ]
    types = [
        f"{n}: {found[n].dtype} in the file, {expected[n].dtype} expected"
        for n in sorted(set(found) & set(expected))
        if found[n].is_floating_point() != expected[n].is_floating_point()
    ]
    if missing or unexpected or shapes or types:
        parts = [
            f"missing {missing[:5]}" if missing else "",
            f"unexpected {unexpected[:5]}" if unexpected else "",
            f"other shapes {shapes[:5]}" if shapes else "",
            f"other types {types[:5]}" if types else "",
        ]
        cure = "Fetch or save it anew"
        if shapes and not (missing or unexpected or types) and all(s.startswith("backbone.") for s in shapes):
            cure = (
                "Leave num_labels out, pass ignore_mismatched_sizes=True for a fresh head beside the prompt, or make "
                "an adapter for as many labels (hf-ptune init --num-labels)"
            )
        raise AdapterFileError(
            f"{source} does not hold the adapter that its config.json describes: "
            f"{shorten('; '.join(p for p in parts if p), 1000)}. {cure}."
        )
