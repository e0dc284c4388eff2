"""Which options of a configuration are known, in range, and go together."""

from typing import Any

from hf_ptune.config_checks import SITES, check_geometry
from hf_ptune.errors import ConfigError, shorten
from hf_ptune.methods import PromptKind, get_method
from hf_ptune.templates import Template

INITS = ("AUTO", "RANDOM", "SAMPLE_VOCAB", "TEXT", "CLASS_LABELS", "ZERO", "ADAPTER")
# what a head reads -> as it does in the papers, and what may take the place of that
READINGS = {"pooling": ("cls", "mean"), "head_states": ("last", "mix"), "head_window": ("token", "neighbours")}
# what leaves the choice between them to the base and its task
ASKED = {"pooling": ("auto",), "head_states": ("auto", "auto_pairs"), "head_window": ("auto",)}
# more than anybody has trained, and little enough that nothing runs out of memory before it is compared with the file
_MOST = {"num_virtual_tokens": 2**20, "encoder_hidden_size": 2**20, "encoder_num_layers": 64}


def check_options(config: Any) -> None:
    """Refuse options that are not known, out of range, or of no use to the method.

    Args:
        config: a `PTuneConfig`.

    Raises:
        ConfigError: with what was found, and what was expected.
    """
    kind = get_method(config.method).kind
    _check_ranges(config, kind)
    _check_init(config, kind)
    _check_places(config, kind)
    _check_readings(config, kind)
    _check_verbalizer(config)
    _check_template(config, kind)
    if config.geometry:
        check_geometry(config.geometry)


def _check_ranges(config: Any, kind: PromptKind | None) -> None:
    choices: list[tuple[str, Any, tuple[str, ...]]] = [
        ("prompt_tuning_init", config.prompt_tuning_init, INITS),
        ("encoder_reparameterization_type", config.encoder_reparameterization_type, ("MLP", "LSTM")),
    ]
    choices += [("sites", site, SITES) for site in config.sites or []]
    for name, value, allowed in choices:
        if value not in allowed:
            raise ConfigError(f"{name}={value!r} is not known; choose one of {', '.join(allowed)}.")
    for name, most in _MOST.items():
        value = getattr(config, name)
        used = value is not None and (kind is not None or name != "num_virtual_tokens")
        if used and not 1 <= value <= most:
            raise ConfigError(f"{name}={value}; expected at least 1 and at most {most}.")
    for name in ("encoder_dropout", "prefix_dropout"):
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ConfigError(f"{name}={getattr(config, name)}; expected 0 or more and less than 1.")


def _check_init(config: Any, kind: PromptKind | None) -> None:
    init = config.prompt_tuning_init
    text = config.prompt_tuning_init_text
    # a configuration that names its geometry was saved: some tokenizers have tokens for blanks, which were taken once
    if init == "TEXT" and not (text if config.geometry else (text or "").strip()):
        raise ConfigError(
            f"prompt_tuning_init='TEXT' needs prompt_tuning_init_text, the text to start from; found {text!r}. Give it "
            "words, such as those of the task, or leave prompt_tuning_init out."
        )
    if init == "ADAPTER" and not config.prompt_tuning_init_adapter:
        raise ConfigError("prompt_tuning_init='ADAPTER' needs prompt_tuning_init_adapter, a folder or Hub id.")
    if init == "ADAPTER" and kind is None:
        raise ConfigError(f"prompt_tuning_init='ADAPTER' needs a prompt to start, which {config.method} does not have.")


def _check_places(config: Any, kind: PromptKind | None) -> None:
    # a configuration that names its geometry was saved when other methods took these, to no effect
    if kind is PromptKind.PREFIX:
        return
    asked = {"layers": config.layers, "sites": config.sites}
    if config.geometry:
        asked = {} if kind is None else {"layers": config.layers}
    why = "has no prompt" if kind is None else "puts its prompt into the input only"
    for name, value in asked.items():
        if value is not None:
            raise ConfigError(f"{name} is for prefixes; {config.method} {why}.")


def _check_readings(config: Any, kind: PromptKind | None) -> None:
    for name, (published, other) in READINGS.items():
        value = getattr(config, name)
        allowed = (published, other, *ASKED[name])
        if value is not None and value not in allowed:
            raise ConfigError(f"{name}={value!r}; expected {', '.join(map(repr, allowed))} or None.")
        if value == other and (kind is None or config.places_tokens):
            why = "a template places the virtual tokens" if config.places_tokens else f"{config.method} has no prompt"
            raise ConfigError(f"{name}={value!r} comes with a prompt before the text, but {why}.")


def _check_verbalizer(config: Any) -> None:
    words = config.verbalizer
    if words is None:
        return
    if config.template is None or not Template.parse(config.template).has_mask:
        raise ConfigError(
            "verbalizer needs a template with [MASK], where its words stand; add one, such as '{text} [MASK]'."
        )
    if len(words) < 2 or not all(_are_words(w) for w in words.values()):
        raise ConfigError(f"verbalizer={words}; expected two labels or more, each with a word or a list of words.")


def _check_template(config: Any, kind: PromptKind | None) -> None:
    ids = config.virtual_token_ids
    if not config.places_tokens:
        if ids is not None:
            raise ConfigError("virtual_token_ids is for a template that places virtual tokens, such as '[P3] {text}'.")
        return
    count = Template.parse(str(config.template)).num_virtual_tokens
    if kind is not PromptKind.EMBEDDINGS:
        raise ConfigError(
            f"the template {config.template!r} places virtual tokens, but {config.method} has none among the inputs. "
            "Methods that have: prompt_tuning, p_tuning; for others take a template of words and fields alone."
        )
    if count != config.num_virtual_tokens:
        raise ConfigError(
            f"the template {config.template!r} has {count} virtual tokens, but num_virtual_tokens="
            f"{config.num_virtual_tokens}; leave it unset, or make them agree."
        )
    if config.position_shift:
        raise ConfigError("position_shift=True, but a template's virtual tokens are counted as tokens are.")
    if ids is not None and (len(set(ids)) != count or len(ids) != count or min(ids) < 0):
        raise ConfigError(f"virtual_token_ids={shorten(ids)}; expected {count} different ids, each 0 or more.")


def _are_words(words: Any) -> bool:
    return isinstance(words, list) and bool(words) and all(isinstance(w, str) and w.strip() for w in words)
