"""Which commit of its base an adapter is pinned to: one that holds the weights that the backbone has."""

from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import extract_commit_hash, logging

from hf_ptune.backbone import is_hub_id

logger = logging.get_logger(__name__)
UNPINNED = "_ptune_unpinned"  # on a wrapped model: its base has the weights of no commit that is known
_COMPARED = 8  # tensors, of each the first row


def find_commit(backbone: PreTrainedModel, base: str | None, revision: str | None = None) -> str | None:
    """The commit of a base on the Hub that a backbone was loaded from; transformers itself keeps none.

    Args:
        backbone: as it was loaded.
        base: what it was loaded by.
        revision: a branch or commit that is known, taken without a look at its weights; the main branch first, then
            all that are in the cache, when unset.

    Returns:
        The commit, which is the main branch's too where weights could not be compared; empty, with a warning, where
        none of those in the cache has these weights; `None` where none is there, so that it cannot be told.
    """
    if base is None or not is_hub_id(base) or Path(base).exists():
        return None
    try:
        path = try_to_load_from_cache(base, "config.json", revision=revision)
    except HFValidationError:
        return None
    if revision is not None:
        return extract_commit_hash(path, None) if isinstance(path, str) else None
    # .../snapshots/<commit>/config.json
    folder = Path(path).parent if isinstance(path, str) else None
    if folder is not None and _holds(folder, backbone) is not False:
        return folder.name
    others = [snapshot for snapshot in sorted(_snapshots(base)) if snapshot != folder]
    for snapshot in others:
        if _holds(snapshot, backbone):
            return snapshot.name
    if folder is None and not others:
        return None
    logger.warning(
        f"no commit of {base} in the cache has the weights of this base, so that the adapter pins none; set "
        "base_model_revision in the PTuneConfig to the commit or branch that it was loaded from."
    )
    return ""


def _snapshots(base: str) -> Iterator[Path]:
    """Folders of the commits of a repository in the cache."""
    root = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=base, repo_type="model") / "snapshots"
    return root.iterdir() if root.is_dir() else iter(())


def _holds(snapshot: Path, backbone: PreTrainedModel) -> bool | None:
    """Whether a commit's files have a backbone's weights; `None` where that cannot be told."""
    if getattr(backbone.config, "quantization_config", None) is not None:
        return None
    named = ((n, p) for n, p in backbone.named_parameters() if type(p.data) is Tensor)
    ours = {n: p for n, p in named if p.is_floating_point() and p.numel() and p.dim() and not p.is_meta}
    prefix = f"{backbone.base_model_prefix}."
    compared = 0
    for file in sorted(snapshot.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                found = ((n, _named(ours, n, prefix)) for n in tensors.keys())  # noqa: SIM118
                both = [(name, parameter) for name, parameter in found if parameter is not None]
                for name, parameter in both[:: max(len(both) // _COMPARED, 1)]:
                    rows = tensors.get_slice(name)
                    if list(rows.get_shape()) != list(parameter.shape):
                        continue  # a vocabulary that was resized, or another head
                    if not _equal(rows[:1], parameter):
                        return False
                    compared += 1
        except (SafetensorError, OSError):
            return None
    return True if compared else None


def _named(ours: dict[str, Tensor], name: str, prefix: str) -> Tensor | None:
    return next((ours[n] for n in (name, prefix + name, name.removeprefix(prefix)) if n in ours), None)


def _equal(row: Tensor, parameter: Tensor) -> bool:
    with torch.no_grad():
        return bool(torch.equal(row.to(parameter.dtype), parameter[:1].cpu()))
