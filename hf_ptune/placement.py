"""Where in a backbone a prompt may stand, and what refuses it."""

from typing import Any

from transformers import PreTrainedModel

from hf_ptune.backbone import describe
from hf_ptune.configuration_ptune import PTuneConfig
from hf_ptune.errors import BackboneError, ConfigError, PTuneError
from hf_ptune.injection import (
    body_of,
    gives_layers,
    normalises_embeddings,
    parameters_of,
    reads_first_token,
    text_of,
    why_no_window,
)
from hf_ptune.methods import PromptKind, get_method
from hf_ptune.option_checks import ASKED, READINGS

# layers that a pooled head never reads: a prefix there would get no gradient
_UNREAD = {"canine": "final_char_encoder"}
_SHAPE = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
)
_POOLED = ("SEQ_CLS", "MULTIPLE_CHOICE")
_OVER_TOKENS = ("TOKEN_CLS", "QUESTION_ANS")


def choose_sites(config: PTuneConfig, kind: PromptKind, task: str) -> list[dict[str, Any]]:
    """Choose the attention sites that take a prompt; no backbone is needed.

    Args:
        config: names base, layers and sites, and holds the geometry.
        kind: what the method's encoder returns.
        task: a key of `TASKS`.

    Raises:
        BackboneError: the base cannot take the kind.
        ConfigError: layers or sites that it does not have.
    """
    geometry = config.geometry
    name = config.base_class or "the base"
    if config.places_tokens:
        return []  # they stand among the tokens
    if not geometry["sites"]:
        raise BackboneError(
            f"{name} has no attention that a prompt could enter (found {describe(geometry)}). "
            "Methods that work there: bitfit."
        )
    there = {s["where"] for s in geometry["sites"]}
    where = there if config.sites is None else there & set(config.sites)
    if not where:
        raise ConfigError(f"sites={config.sites} names none that the base has; it has {sorted(there)}.")
    if kind is PromptKind.EMBEDDINGS:
        if geometry["causal"] and geometry["skipped"]:
            raise BackboneError(
                f"{name} has layers without attention ({', '.join(geometry['skipped'][:4])}, …), through which a "
                f"prompt among the inputs cannot be shared by a batch. Methods that work there: p_tuning_v2, "
                "prefix_tuning, bitfit."
            )
        if getattr(config.base, "token_dropout", False) and not geometry["causal"]:
            raise BackboneError(
                f"{name} reads masks off the token ids (token_dropout), which a prompt among the inputs takes away. "
                "Methods that work there: p_tuning_v2, prefix_tuning, bitfit."
            )
        return list(geometry["sites"])
    if getattr(config.base, "attention_type", None) == "block_sparse":
        raise BackboneError(
            f"{name} attends by blocks (attention_type='block_sparse'), beside which no prefix can stand. Load it with "
            "attention_type='original_full'."
        )
    unread = _UNREAD.get(config.base.model_type, "\0") if task in _POOLED else "\0"
    chosen = [s for s in geometry["sites"] if s["where"] in where and not s["name"].startswith(unread)]
    if config.layers is not None:
        count = 1 + max((s["layer"] for s in chosen), default=-1)
        wrong = [n for n in config.layers if not -count <= n < count]
        if wrong:
            raise ConfigError(
                f"layers={config.layers} names {wrong}; {name} has layers 0 to {count - 1}, or -{count} to -1 from the "
                "end, counted over those with attention."
            )
        layers = {n % count for n in config.layers}
        chosen = [s for s in chosen if s["layer"] in layers]
    if not chosen:
        raise ConfigError(f"sites={config.sites} and layers={config.layers} leave no attention of {name}.")
    return chosen


def check_base(backbone: PreTrainedModel, config: PTuneConfig) -> None:
    """Refuse a backbone in memory that is not of the kind an adapter was made for.

    Args:
        backbone: the task model.
        config: of the adapter.

    Raises:
        BackboneError: another class, or another shape.
    """
    found, expected = type(backbone).__name__, config.base_class
    if expected is not None and found != expected:
        raise BackboneError(
            f"the adapter was made for a {expected}, but the backbone is a {found}. Pass a {expected}, or leave "
            "backbone out."
        )
    theirs, ours = (c.get_text_config().to_dict() for c in (backbone.config, config.base))
    differ = [n for n in _SHAPE if theirs.get(n) != ours.get(n)]
    if differ:
        listed = ", ".join(f"{n} {theirs.get(n)} instead of {ours.get(n)}" for n in differ)
        raise BackboneError(f"the backbone has another shape than the adapter's base: {listed}.")


def choose_start(config: PTuneConfig) -> str:
    """Where a new prompt starts.

    Args:
        config: with its geometry.

    Returns:
        What it asks for; for "AUTO" the backbone's own words where it is a decoder, else a random start. Words beyond
        the positions that the backbone has would have no keys.
    """
    method = get_method(config.method)
    if config.prompt_tuning_init != "AUTO" or method.kind is None:
        return config.prompt_tuning_init
    positions = getattr(config.base.get_text_config(), "max_position_embeddings", None)
    fits = positions is None or config.num_virtual_tokens <= positions
    networked = method.kind is PromptKind.EMBEDDINGS and method.reparameterised
    return "SAMPLE_VOCAB" if config.over_decoder and fits and not networked else "RANDOM"


def choose_pooling(config: PTuneConfig, backbone: PreTrainedModel, task: str) -> str:
    """What the head of an encoder reads: "mean" of the own tokens, or "cls", what it reads by itself.

    Args:
        config: with its geometry.
        backbone: the task model.
        task: a key of `TASKS`.

    Raises:
        ConfigError: the mean is asked for where no head reads the first token of an encoder.
    """
    kind, asked = get_method(config.method).kind, config.pooling
    pools_first = _is_encoder(config, backbone) and task in _POOLED and reads_first_token(body_of(backbone))
    if asked == "mean" and not pools_first:
        raise ConfigError(
            f"pooling='mean' is for encoders whose head reads the first token, in {' and '.join(_POOLED)}; "
            f"{type(backbone).__name__} does not do so. Leave it out."
        )
    if asked in ("cls", "mean"):
        return asked
    if kind is None or config.places_tokens or not pools_first:
        return "cls"
    if _brings_head(config):
        return settled_reading(_source_of(config))["pooling"]
    if asked is None and kind is PromptKind.PREFIX:
        return "cls"
    return "mean" if normalises_embeddings(body_of(backbone)) else "cls"


def choose_head_states(config: PTuneConfig, backbone: PreTrainedModel, task: str, fresh: bool) -> str:
    """What heads of an encoder read, or take the mean of: a "mix" of the states of all layers, or the "last" ones.

    Args:
        config: with its geometry, and what `choose_pooling` has chosen.
        backbone: the task model.
        task: a key of `TASKS`.
        fresh: whether the backbone has to be seen to give out such states; a saved adapter's has been.

    Raises:
        ConfigError: the mix is asked for where there is none.
    """
    asked, pooled = config.head_states, task in _POOLED
    encoder = _before_the_text(config) and _is_encoder(config, backbone)
    able = encoder and (task in _OVER_TOKENS or (pooled and config.pooling == "mean"))
    if asked == "mix":
        if encoder and pooled and not able and reads_first_token(body_of(backbone)):
            raise ConfigError(
                f"head_states='mix' in {task} is what the mean of a row's tokens is taken of, and pooling is "
                f"{config.pooling!r}. Set pooling='mean', or leave head_states out."
            )
        if not able or (fresh and not gives_layers(body_of(backbone), pooled=pooled)):
            raise ConfigError(
                f"head_states='mix' is for encoders that give out the states of all layers, in "
                f"{' and '.join(_OVER_TOKENS)}, and under pooling='mean' in {' and '.join(_POOLED)}; "
                f"{type(backbone).__name__} is none of these. Leave it out."
            )
        return asked
    if asked != "last" and able and _brings_head(config):
        return settled_reading(_source_of(config))["head_states"]
    wanted = able and ((asked == "auto_pairs" and pooled) or (asked in ASKED["head_states"] and task == "TOKEN_CLS"))
    return "mix" if wanted and gives_layers(body_of(backbone), alike=True, pooled=pooled) else "last"


def choose_head_window(config: PTuneConfig, backbone: PreTrainedModel, task: str, fresh: bool) -> str:
    """What heads over tokens read of a row: a "token" alone, or its two "neighbours" too.

    Args:
        config: with its geometry.
        backbone: the task model.
        task: a key of `TASKS`.
        fresh: whether the head has to be seen to be one linear layer over each token; a saved adapter's has been.

    Raises:
        ConfigError: neighbours are asked for where no head reads tokens so.
    """
    asked = config.head_window
    able = _before_the_text(config) and task in _OVER_TOKENS
    if asked == "neighbours":
        if not able:
            raise ConfigError(
                f"head_window='neighbours' is for {' and '.join(_OVER_TOKENS)}, not {task}. Leave it out."
            )
        if fresh and (why := why_no_window(backbone, task)):
            raise ConfigError(
                "head_window='neighbours' is for encoders and decoders whose head is one linear layer over every "
                f"token: {why.rstrip('.')}. Leave it out."
            )
        return asked
    if asked != "token" and able and _brings_head(config):
        return settled_reading(_source_of(config))["head_window"]
    wanted = able and asked in ASKED["head_window"]
    return "neighbours" if wanted and why_no_window(backbone, task) is None else "token"


def settled_reading(config: PTuneConfig) -> dict[str, str]:
    """What the head of a saved adapter reads; unset options are decided for new prompts alone."""
    return {
        name: other if getattr(config, name) == other else published for name, (published, other) in READINGS.items()
    }


def reading_for(config: PTuneConfig, task: str) -> PTuneConfig:
    """A configuration of several tasks for one of them: what its heads cannot read is left out."""
    changes = {}
    if config.pooling == "mean" and task not in _POOLED:
        changes["pooling"] = "cls"
    if config.head_states == "mix" and task not in _OVER_TOKENS and not (task in _POOLED and config.pooling == "mean"):
        # a mean that is still to be chosen may have it
        changes["head_states"] = "auto_pairs" if task in _POOLED else "last"
    if config.head_window == "neighbours" and task not in _OVER_TOKENS:
        changes["head_window"] = "token"
    return type(config).from_dict(config.to_dict() | changes) if changes else config


def _brings_head(config: PTuneConfig) -> bool:
    """Whether the head comes along with the adapter that a prompt starts from: it reads what it has learnt to read."""
    return config.prompt_tuning_init == "ADAPTER" and config.prompt_tuning_init_head


def _before_the_text(config: PTuneConfig) -> bool:
    """Whether there is a prompt, and it is not a template that places it."""
    return get_method(config.method).kind is not None and not config.places_tokens


def _is_encoder(config: PTuneConfig, backbone: PreTrainedModel) -> bool:
    return not config.geometry["causal"] and not backbone.config.is_encoder_decoder


def _source_of(config: PTuneConfig) -> PTuneConfig:
    """The adapter that a prompt starts from; what is wrong with it is told elsewhere."""
    try:
        source: PTuneConfig = PTuneConfig.from_pretrained(config.prompt_tuning_init_adapter)
        return source
    except (OSError, ValueError, PTuneError):
        return PTuneConfig()


def shifts_positions(backbone: PreTrainedModel, config: PTuneConfig) -> bool:
    """Whether own tokens stand after the virtual ones in the position count.

    Raises:
        ConfigError: asked for where the backbone takes no `position_ids`, or where the prompt stands among the
            inputs of an encoder.
    """
    if config.places_tokens:
        return False
    body = body_of(backbone)
    accepted = parameters_of(text_of(body, [s["name"] for s in config.geometry["sites"]]))
    causal, takes = bool(config.geometry["causal"]), "position_ids" in accepted
    prefixed = get_method(config.method).kind is PromptKind.PREFIX and not backbone.config.is_encoder_decoder
    if config.position_shift and not (takes and (causal or prefixed)):
        why = "takes no position_ids" if not takes else f"is an encoder, where {config.method} moves no positions"
        raise ConfigError(f"position_shift=True, but {type(backbone).__name__} {why}.")
    return causal and takes if config.position_shift is None else config.position_shift
