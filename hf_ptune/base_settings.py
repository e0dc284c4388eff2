"""What is written into a wrapper's configuration, and means the base: it reaches the base's own configuration."""

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
    """The configuration of a wrapped backbone; a copy of it belongs to no backbone yet.

    Args:
        config: the backbone's own object.
    """

    def __init__(self, config: PreTrainedConfig | None) -> None:
        self.config = config

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
