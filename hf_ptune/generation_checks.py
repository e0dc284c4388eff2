"""What `generate` cannot do with a prompt, told before it starts."""

from typing import Any

from hf_ptune.errors import InjectionError
from hf_ptune.position_tables import row_length

NOT_PAGED = "paged caches of continuous batching have no place for a prompt; use generate()"
_USUAL = 20  # new tokens where nobody says how many
# what looks the text's tokens up in the logits, or in the vocabulary
_OF_ENCODERS = ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size")
_LOOKING_UP = ("repetition_penalty", "no_repeat_ngram_size", *_OF_ENCODERS, "prompt_lookup_num_tokens")


def check_generation(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse what has no place for a prompt, or reads virtual tokens where they are none.

    Args:
        model: a wrapped model that generates.
        args: of `generate`, whose first two may come by their places.
        kwargs: of `generate`.

    Raises:
        InjectionError: says which option, and what to do.
    """
    settings = _settings(model, args, kwargs)
    cache = kwargs.get("cache_implementation", getattr(settings, "cache_implementation", None))
    if cache == "paged" and model.prompt is not None:
        raise InjectionError(f"{NOT_PAGED} with another cache_implementation.")
    if not model.config.places_tokens:
        return
    seq2seq = model.config.is_encoder_decoder
    if kwargs.get("assistant_model") is not None and not seq2seq:
        raise InjectionError(
            "an assistant_model reads the text as it stands, and knows no virtual tokens; leave it out with a template "
            "that places some."
        )
    for name in _OF_ENCODERS if seq2seq else _LOOKING_UP:
        if (value := kwargs.get(name, getattr(settings, name, None))) not in (None, 0, 1):
            raise InjectionError(
                f"{name}={value} looks the text's tokens up in the logits, which know no virtual tokens; leave it "
                "unset with a template that places some."
            )


def tokens_at_end(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens that a row has when `generate` has written all that it may; arguments are those of `check_generation`."""
    settings, length = _settings(model, args, kwargs), row_length(args, kwargs)
    asked = {n: kwargs.get(n, getattr(settings, n, None)) for n in ("max_new_tokens", "max_length")}
    if asked["max_new_tokens"] is None and asked["max_length"] is not None:
        return max(int(asked["max_length"]), length)
    return length + int(asked["max_new_tokens"] or _USUAL)


def _settings(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return kwargs.get("generation_config") or (args[1:2] or (None,))[0] or model.generation_config
