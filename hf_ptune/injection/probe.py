"""Find the attention sites of a backbone by watching it run on a handful of tokens."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ptune.errors import DEVICE_FAILURES, BackboneError, InjectionError, PTuneError
from hf_ptune.injection import attention, own_attention, sites
from hf_ptune.injection.calls import parameters_of
from hf_ptune.injection.embeddings import word_embeddings
from hf_ptune.injection.outsiders import set_aside
from hf_ptune.injection.packed import keep_unpacked
from hf_ptune.injection.sites import Site, key_groups
from hf_ptune.methods.base import SiteShape

PROBE_TOKENS = 7  # few enough for any position table
_ENCODER_TOKENS, _DECODER_TOKENS = PROBE_TOKENS, 5
_UNSUPPORTED = {
    "BltSelfAttention": "it cuts bytes into patches by a model of its own, which a prompt would change",
    "DeepseekV4Attention": "it attends to compressed blocks of tokens, among which a prefix has no place",
    "HYV4Attention": "it decodes by another computation than it trains by, which no prefix reaches",
    "LiltSelfAttention": "it adds the scores of two streams of different widths",
}
_OVER_LAYERS = re.compile("AttentionResidual")  # attends to earlier layers, not to tokens
# by which families say that they cannot run as they are asked to
_REFUSALS = (ValueError, TypeError, AttributeError, IndexError, RuntimeError)
_NAMED_ATTENTION = re.compile("atten|attn", re.IGNORECASE)


def body_of(backbone: PreTrainedModel) -> PreTrainedModel:
    """The backbone without its task head; of an encoder-decoder family's causal model, the decoder."""
    body: PreTrainedModel = backbone.base_model
    decoder = getattr(body, "decoder", None)
    if isinstance(decoder, PreTrainedModel) and not body.config.is_encoder_decoder:
        return decoder  # the task model calls it past the wrapper around it
    return body


def text_of(body: PreTrainedModel, names: list[str]) -> nn.Module:
    """The innermost model around words and all attention sites that takes `position_ids`; the body where none does.

    What is around it may count by itself, such as images along several axes.
    """
    words = word_embeddings(body)
    takes = [
        module
        for name, module in body.named_modules()
        if isinstance(module, PreTrainedModel)
        and (not name or all(n.startswith(name + ".") for n in names))
        and "position_ids" in parameters_of(module)
    ]
    return next((t for t in reversed(takes) if any(m is words for m in t.modules())), takes[0] if takes else body)


def find_geometry(backbone: PreTrainedModel) -> dict[str, Any]:
    """Describe where and how a backbone attends.

    Args:
        backbone: a loaded task model.

    Returns:
        A JSON-ready dictionary: `sites` (name, where, layer, heads, key_dim, value_dim), `causal` (whether the
        first token ignores the second), `skipped` (layers without attention), `embedding_dim`.

    Raises:
        BackboneError: it cannot run on plain tokens.
    """
    keep_unpacked(backbone)
    body = body_of(backbone)
    frozen_rng = torch.random.fork_rng(devices=[])
    with probing(backbone), frozen_rng, sparse_as_it_was(body), torch.no_grad():
        seen, first = _watch(body)
        causal = not backbone.config.is_encoder_decoder and _ignores_later(first, _states(body, changed=True))
        if not causal and body.config.get_text_config() is not body.config:
            causal = _is_masked_alone(body)
    found: list[dict[str, Any]] = [
        {
            "name": name,
            "product": product,
            "where": _where(body, name, key),
            "heads": key.shape[0],
            "key_dim": key.shape[2],
            "value_dim": value.shape[2],
        }
        for name, (key, value, product) in seen.items()
    ]
    for site in found:
        family = type(body.get_submodule(site["name"])).__name__
        if family in _UNSUPPORTED:
            raise BackboneError(f"{site['name']} ({family}): {_UNSUPPORTED[family]}. Methods that work there: bitfit.")
    counts: dict[str, int] = {}
    for site in found:
        site["layer"] = counts[site["where"]] = counts.get(site["where"], -1) + 1
    embeddings = word_embeddings(backbone)
    width = backbone.config.hidden_size if embeddings is None else _embed(backbone, embeddings).shape[-1]
    return {
        "sites": found,
        "causal": causal,
        "skipped": _layers_without(body, [s["name"] for s in found]),
        "embedding_dim": width,
    }


def _ignores_later(first: Tensor, second: Tensor) -> bool:
    """Whether the first token's state stayed where the later ones' moved."""
    moved = (first - second).abs()
    return bool(moved[:, 0].max() <= 1e-4 * moved[:, 1:].max())


def _is_masked_alone(body: PreTrainedModel) -> bool:
    """Whether a body of text and images is causal by a mask alone, which is left out where no token is a pad.

    So is PaliGemma, whose start may be read both ways, and whose attention says of itself that it is not causal.
    """
    if "attention_mask" not in parameters_of(body):
        return False
    mask = torch.ones(1, PROBE_TOKENS, dtype=torch.long, device=device_of(body))
    mask[:, -1] = 0
    return _ignores_later(*(_states(body, changed, attention_mask=mask)[:, :-1] for changed in (False, True)))


def _embed(backbone: PreTrainedModel, embeddings: nn.Module) -> Tensor:
    with torch.no_grad():
        embedded: Any = embeddings(torch.tensor([[0]], device=device_of(backbone)))
    return embedded[0] if isinstance(embedded, tuple) else embedded


def device_of(module: nn.Module) -> torch.device:
    """Where a module's first parameter is that has memory, or comes to be while it runs; its inputs go there."""
    held = (p.device for p in module.parameters() if p.device.type != "meta")
    # what accelerate offloads has no memory in between
    hooks = (getattr(getattr(m, "_hf_hook", None), "execution_device", None) for m in module.modules())
    comes = (torch.device(device) for device in hooks if device is not None)
    return next(held, None) or next(comes, torch.device("cpu"))


def _tokens(body: PreTrainedModel, count: int, changed: bool) -> Tensor:
    ids = torch.arange(count) * 7 + 11
    if changed:
        ids[1:] += 5
    return (ids % vocabulary_of(body))[None].to(device_of(body))


def vocabulary_of(body: PreTrainedModel) -> int:
    """A number of tokens that the body surely knows."""
    return max(int(getattr(body.config.get_text_config(), "vocab_size", None) or 100) - 3, 1)


def run_on_tokens(body: PreTrainedModel, changed: bool = False, **further: Any) -> Any:
    """What a body gives for a handful of tokens.

    Args:
        body: with all that is attached to it.
        changed: whether to give it other tokens, the first one apart.
        further: arguments of its forward.

    Raises:
        BackboneError: it cannot run on them.
    """
    accepted = parameters_of(body)
    inputs: dict[str, Any] = {"input_ids": _tokens(body, _ENCODER_TOKENS, changed)}
    if body.config.is_encoder_decoder and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _tokens(body, _DECODER_TOKENS, changed)
    if "attention_mask" in accepted:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    try:
        return body(**inputs | further)
    except PTuneError:
        raise
    except DEVICE_FAILURES:
        raise
    except Exception as error:  # whatever a family raises, the user needs the same cure
        raise BackboneError(
            f"{type(body).__name__} could not run on {_ENCODER_TOKENS} plain tokens "
            f"({type(error).__name__}: {error}). Expected a text backbone that takes input_ids alone."
        ) from error


def _states(body: PreTrainedModel, changed: bool = False, **further: Any) -> Tensor:
    hidden: Any = run_on_tokens(body, changed, **further)[0]
    return torch.as_tensor(hidden).float()


def complaint(body: PreTrainedModel) -> str | None:
    """What a body says that cannot run on a handful of tokens with all that is attached to it; `None` if it can."""
    try:
        with probing(body), sparse_as_it_was(body), torch.no_grad():
            run_on_tokens(body)
    except (BackboneError, InjectionError) as error:
        return str(error.__cause__ or error)
    return None


def _watch(body: PreTrainedModel) -> tuple[dict[str, tuple[Tensor, Tensor, int]], Tensor]:
    """Keys and values `[K, T, D]` that each attention module used, in order of use, and the hidden states."""
    names = {module: name for name, module in body.named_modules()}
    seen: dict[str, tuple[Tensor, Tensor, int]] = {}
    candidates: dict[str, tuple[nn.Module, Site]] = {}
    handles: list[Any] = []

    def heard(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
        if module in names:
            seen[names[module]] = (key[0], value[0], 0)

    for module, name in names.items():
        family = type(module).__name__
        if _NAMED_ATTENTION.search(family) and not _OVER_LAYERS.search(family) and own_attention.is_own(module):
            site = Site(name, "decoder", 0, SiteShape(1, 1, 1))
            site.recording = site.probing = True
            candidates[name] = (module, site)
            sites.place(module, site)
            handles += own_attention.follow(module)
    for function in _implementations(body):
        attention.install(function)
    attention.listen(heard)
    try:
        hidden = _states(body)
    finally:
        attention.listen(None)
        for handle in handles:
            handle.remove()
        for module, _ in candidates.values():
            sites.remove(module)
    for name, (module, site) in candidates.items():
        if site.recorded is not None:
            seen.setdefault(name, (*_ungrouped(module, site.recorded), site.product))
    order = {name: i for i, name in enumerate(names.values())}
    inner = [n for n in seen if not any(other != n and other.startswith(n + ".") for other in seen)]
    return {name: seen[name] for name in sorted(inner, key=order.__getitem__)}, hidden


def _ungrouped(module: nn.Module, recorded: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    key, value = recorded
    return key, value if key.shape[0] == value.shape[0] else value[:: key_groups(module)]


def _implementations(body: PreTrainedModel) -> set[str]:
    configs = [m.config for m in body.modules() if isinstance(m, PreTrainedModel)]
    configs += [body.config.get_text_config()]
    return {c._attn_implementation for c in configs if c._attn_implementation not in (None, "eager")}


def _where(body: PreTrainedModel, name: str, key: Tensor) -> str:
    if not body.config.is_encoder_decoder:
        return "decoder"
    if name.startswith("encoder"):
        return "encoder"
    return "cross" if key.shape[1] == _ENCODER_TOKENS else "decoder"


def _layers_without(body: PreTrainedModel, found: list[str]) -> list[str]:
    """Members of the layer lists in which no attention was seen, in parts of them or, in encoder-decoders, in all."""
    skipped: list[str] = []
    lists = [n for n, m in body.named_modules() if isinstance(m, nn.ModuleList)]
    for name in lists:
        nested = any(name.startswith(other + ".") for other in lists)
        # LED's encoder attends by windows alone
        whole = body.config.is_encoder_decoder and name.rpartition(".")[0] in ("encoder", "decoder")
        if nested or not (whole or any(f.startswith(name + ".") for f in found)):
            continue
        module = body.get_submodule(name)
        assert isinstance(module, nn.ModuleList)
        for number, _ in enumerate(module):
            layer = f"{name}.{number}"
            if not any(f == layer or f.startswith(layer + ".") for f in found):
                skipped.append(layer)
    return skipped


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether two answers of a backbone of a precision are the same."""
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 0.1
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@contextmanager
def sparse_as_it_was(body: nn.Module) -> Iterator[None]:
    """Undo that BigBird and its kin turn to full attention for good where they meet a short row."""
    sparse: list[Any] = [m for m in body.modules() if callable(getattr(m, "set_attention_type", None))]
    kept = [(m, m.attention_type) for m in sparse]
    try:
        yield
    finally:
        for module, kind in kept:
            module.set_attention_type(kind)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put every module into eval mode for a while."""
    training = [m for m in module.modules() if m.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def trying(*refusals: type[Exception]) -> Iterator[None]:
    """End a trial on a backbone where its family refuses; a device that fails is no refusal.

    Args:
        refusals: errors that are one here too.
    """
    try:
        yield
    except DEVICE_FAILURES:
        raise
    except _REFUSALS + refusals:
        pass


@contextmanager
def probing(module: nn.Module) -> Iterator[None]:
    """Run a module for the sake of what it shows: in eval mode, without hooks of others, and in its own types.

    Autocast would round what is compared. Casts of parameters that it made here would serve the pass around it too,
    in some versions of torch without their gradients.
    """
    with evaluating(module), set_aside(module), torch.autocast(device_of(module).type, enabled=False):
        yield
