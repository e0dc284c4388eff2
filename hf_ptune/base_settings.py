"""What is written into a wrapper's configuration, and means the base: it reaches the base's own configuration."""

import re
import weakref
from typing import Any

from transformers import PreTrainedConfig

from hf_ptune.errors import ConfigError, shorten

# how a base is loaded, and what each of the two says of itself
_OF_EACH = {
    "architectures",
    "attn_implementation",
    "dtype",
    "experts_implementation",
    "is_encoder_decoder",
    "model_type",
    "name_or_path",
    "quantization_config",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
}
_UNNAMED = re.compile("LABEL_[0-9]+")  # what transformers calls labels without a name


class Live:
    """The configuration of a wrapped backbone, which is not kept alive by it; a copy belongs to no backbone yet.

    Args:
        backbone: the wrapped one; it may still be without its configuration, while it is copied.
    """

    def __init__(self, backbone: Any) -> None:
        self.backbone = None if backbone is None else weakref.ref(backbone)

    @property
    def config(self) -> PreTrainedConfig | None:
        backbone = None if self.backbone is None else self.backbone()
        return None if backbone is None else backbone.config

    def __reduce__(self) -> Any:
        return Live, (None,)


def tell(base: PreTrainedConfig | None, name: str, value: Any, own: set[str]) -> None:
    """Let a base's configuration have a setting that it knows.

    Args:
        base: its configuration, if there is one.
        name: of the setting.
        value: of the setting.
        own: names of the adapter's own settings.
    """
    if base is None or name.startswith("_") or name in own or name in _OF_EACH:
        return
    if hasattr(base, name):
        setattr(base, name, value)


def are_named(labels: dict[int, str] | None) -> bool:
    """Whether labels have names of somebody's own."""
    return any(not _UNNAMED.fullmatch(str(name)) for name in (labels or {}).values())


def tell_labels(base: PreTrainedConfig, config: PreTrainedConfig, task: str | None) -> None:
    """Let the configuration of a base have the labels that an adapter's config.json names beside it.

    Args:
        base: made of base_config; gets them.
        config: the adapter's, as the file says it.
        task: of the adapter; only some have a head of labels.

    Raises:
        ConfigError: the head has other labels.
    """
    names, numbers = config.id2label, config.label2id
    if not names or not are_named(names):
        return
    known = base.id2label or {}
    # without names of its own it is a base as it was before a head came, whose labels are counted by the weights
    count = len(known) if are_named(known) else len(names)
    if {*names} != {*range(count)}:
        if task not in ("SEQ_CLS", "TOKEN_CLS"):
            return
        raise ConfigError(
            f"id2label in config.json names {shorten(dict(names))}; expected names for the labels of the head, 0 to "
            f"{count - 1}. Name all of them; a head of other labels has to be trained."
        )
    if names != known and numbers in (None, base.label2id):
        numbers = {name: number for number, name in names.items()}
    base.id2label = names
    if numbers is not None:
        base.label2id = numbers
