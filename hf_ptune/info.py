"""What an adapter is, told without loading its base's weights."""

import os
import shlex
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import cached_file

from hf_ptune.adapter_file import is_foreign, read_tensors
from hf_ptune.backbone import describe, read_tokenizer, resolve
from hf_ptune.cards import FACTS_NAME, RunFacts, human_bytes, summarise
from hf_ptune.configuration_ptune import PTuneConfig
from hf_ptune.errors import AdapterFileError, BackboneError, PTuneError, shorten
from hf_ptune.loading import find_adapter
from hf_ptune.methods import PromptKind, get_method

_NEAREST = 3
_ROWS = 8192  # of the vocabulary, compared at a time
# names under which word embeddings are kept, most common first
_EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight", "shared.weight", "tok_embeddings.weight")


def describe_adapter(source: str, **hub: Any) -> str:
    """Say method, base, sizes, metrics, and the tokens nearest to each virtual one.

    Args:
        source: folder or id on the Hub.
        hub: revision, token, cache_dir.

    Returns:
        Lines of text.

    Raises:
        AdapterFileError: the source holds no adapter of ours.
    """
    hub = {k: v for k, v in hub.items() if v is not None}
    if is_foreign(source, hub):
        raise AdapterFileError(
            f"{source} holds an adapter of PEFT's, not one of this package. To have it as one: "
            f"{shlex.join(['hf-ptune', 'convert', source, 'FOLDER'])}"
        )
    try:
        config = AutoConfig.from_pretrained(source, **hub)
    except PTuneError:
        raise
    except ValueError as error:  # a config.json that names no kind of model, or none at all
        raise AdapterFileError(
            f"{source} holds no adapter ({shorten(error, 120)}); name what a run, save_pretrained or a push wrote."
        ) from error
    if not isinstance(config, PTuneConfig):
        raise AdapterFileError(f"{source} holds a {config.model_type}, not an adapter of this package.")
    path, _, _, config = find_adapter(source, config, **hub)
    tensors = read_tensors(path)
    method = get_method(config.method)
    count = sum(t.numel() for t in tensors.values())
    lines = [
        f"method: {method.title} ({method.paper})",
        f"base: {config.base_model_name_or_path}, commit {config.base_model_revision or 'not pinned'}",
        f"task: {config.task}" + (f", {describe(config.geometry)}" if config.geometry else ""),
        f"adapter: {count:,} values in {len(tensors)} tensors, {human_bytes(os.path.getsize(path))}",
    ]
    if method.kind is not None:
        state = (
            "flattened" if config.flattened else "with its reparameterisation" if method.reparameterised else "direct"
        )
        reads = ["the mean of the own tokens"] if config.pooling == "mean" else []
        reads += ["a mix of all layers"] if config.head_states == "mix" else []
        reads = [" in ".join(reads)] if reads else []
        reads += ["a token's neighbours too"] if config.head_window == "neighbours" else []
        read = f", the head reads {', and '.join(reads)}" if reads else ""
        lines.append(f"virtual tokens: {config.num_virtual_tokens}, {state}{read}")
    if config.template is not None:
        lines.append(f"template: {config.template}")
    lines += _metrics(source, hub)
    prompt = tensors.get("prompt.weight")
    if method.kind is PromptKind.EMBEDDINGS and prompt is not None:
        lines += _nearest_tokens(prompt.float(), config, {k: v for k, v in hub.items() if k != "revision"})
    return "\n".join(lines)


def _metrics(source: str, hub: dict[str, Any]) -> list[str]:
    path = cached_file(source, FACTS_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if path is None:
        return []
    try:
        found = summarise(RunFacts.load(Path(path).parent).metrics)
    except PTuneError as error:
        return [f"metrics: not known, {error}"]
    return [f"{name}: {value:.4f}" for name, (value, _) in found.items()]


def _nearest_tokens(prompt: Tensor, config: PTuneConfig, hub: dict[str, Any]) -> list[str]:
    """The vocabulary's tokens of the highest cosine with each virtual token, where the base is at hand."""
    found = _embedding_file(config, hub)
    if found is None:
        return ["nearest tokens: the base's embeddings are not at hand"]
    path, name = found
    hub = hub | {"trust_remote_code": False}
    try:
        tokenizer = read_tokenizer(str(config.base_model_name_or_path), config.base_model_revision, **hub)
    except (OSError, ValueError):
        return ["nearest tokens: the base's tokenizer is not at hand"]
    prompt = torch.nn.functional.normalize(prompt, dim=-1)
    best = torch.empty(len(prompt), 0)
    ids = torch.empty(len(prompt), 0, dtype=torch.long)
    with safe_open(path, framework="pt") as file:
        rows = file.get_slice(name)
        for start in range(0, rows.get_shape()[0], _ROWS):
            words = torch.nn.functional.normalize(rows[start : start + _ROWS].float(), dim=-1)
            cosines, places = (prompt @ words.T).topk(min(_NEAREST, len(words)), dim=-1)
            best, ids = torch.cat([best, cosines], 1), torch.cat([ids, places + start], 1)
            best, order = best.topk(min(_NEAREST, best.shape[1]), dim=-1)
            ids = ids.gather(1, order)
    lines = ["nearest tokens by cosine:"]
    for number, (scores, tokens) in enumerate(zip(best.tolist(), ids.tolist(), strict=True)):
        words_ = ", ".join(f"{tokenizer.decode([t])!r} {s:.2f}" for s, t in zip(scores, tokens, strict=True))
        lines.append(f"  {number}: {words_}")
    return lines


def _embedding_file(config: PTuneConfig, hub: dict[str, Any]) -> tuple[str, str] | None:
    """The base's file with its word embeddings, and their name in it; none is fetched, other weights are not read."""
    base = config.base_model_name_or_path
    if base is None:
        return None
    try:
        folder = resolve(base)
        here = hub | {"revision": config.base_model_revision or "main", "local_files_only": True}
        path = cached_file(folder, "model.safetensors", **here)
    except (OSError, ValueError, BackboneError):  # in a package that is not installed
        return None
    if path is None:
        return None
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    name = next((n for end in _EMBEDDINGS for n in names if n.endswith(end)), None)
    return None if name is None else (path, name)
