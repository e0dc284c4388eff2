"""What is written into a wrapper's configuration, and means the base: it reaches the base's own configuration."""

import weakref
from typing import Any

from transformers import PreTrainedConfig

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
