"""Hooks that users put on a base: they are called for the rows of a call, once each, whatever else runs through it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import DECODERS, METHODS, batch, build, takes_bitfit
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.profiler import ProfilerActivity, profile

from hf_ptune import PTuneConfig, PTunePreTrainedModel, get_ptune_model
from hf_ptune.injection import injector as seam
from hf_ptune.injection import outsiders

Wrap = Callable[..., PTunePreTrainedModel]
CASES = [(f, m) for f in [*DECODERS, "bert", "t5"] for m in METHODS if m != "bitfit" or takes_bitfit(f)]


def layers(model: Any) -> list[nn.Module]:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2]
    return list(lists[0])


def shape_of(output: Any) -> tuple[int, ...]:
    return tuple((output[0] if isinstance(output, tuple) else output).shape)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every pass in which prompt and rows are one sequence."""
    passes: list[int] = []
    join = seam.joint.join
    monkeypatch.setattr(seam.joint, "join", lambda *a: passes.append(1) or join(*a))  # type: ignore[func-returns-value]
    return passes


def hooked(family: str, method: str) -> tuple[PTunePreTrainedModel, list[Any]]:
    """A base whose layers have hooks, wrapped, and what these have seen."""
    base, seen = build(family), []
    for layer in layers(base):
        layer.register_forward_hook(lambda m, a, output: seen.append(shape_of(output)))
        layer.register_forward_pre_hook(lambda m, a: seen.append("before"))  # type: ignore[arg-type]
        layer.register_full_backward_hook(lambda m, a, given: seen.append(shape_of(given)))
    return get_ptune_model(base, PTuneConfig(method=method, num_virtual_tokens=4)), seen


@pytest.mark.parametrize(("family", "method"), CASES)
def test_they_see_nothing_of_what_is_tried_when_a_base_is_wrapped(family: str, method: str) -> None:
    assert not hooked(family, method)[1]


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize(
    ("family", "method"), [c for c in CASES if c[0] in DECODERS or c[1] not in ("prompt_tuning", "p_tuning")]
)
def test_they_see_the_rows_of_each_call_and_no_more(family: str, method: str) -> None:
    (model, seen), inputs = hooked(family, method), batch(family, rows=3)
    rows = (3, 7, 32)
    for _ in range(2):
        seen.clear()
        loss = model.train()(**inputs).loss
        assert seen == ["before", rows] * 2
        loss.backward()
        assert seen[4:] == [rows] * (len(seen) - 4)
        seen.clear()
        with torch.no_grad():
            model.eval()(**inputs)
        assert seen == ["before", rows] * 2


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_what_they_change_is_changed_alike_while_training_and_after(method: str, kept: bool, wrap: Wrap) -> None:
    model, inputs = wrap("llama", method, loss_at_labels=False), batch("llama")
    if kept:  # a prompt that was encoded before the hook came
        with torch.no_grad():
            model(**inputs)
    layers(model)[0].register_forward_hook(lambda m, a, output: output + 0.5)
    with torch.no_grad():
        steered = model(**inputs).logits
    assert torch.allclose(model.train()(**inputs).logits, steered, atol=1e-9)
    assert torch.allclose(copy.deepcopy(model)(**inputs).logits, steered, atol=1e-9)


def test_hooks_of_all_modules_count_too(wrap: Wrap, joined: list[int]) -> None:
    model, inputs, seen = wrap("llama", "prompt_tuning").train(), batch("llama"), []
    first = layers(model)[0]
    handle = torch_modules.register_module_forward_hook(
        lambda m, a, output: seen.append(shape_of(output)) if m is first else None
    )
    try:
        model(**inputs)
    finally:
        handle.remove()
    assert seen == [(2, 7, 32)] and not joined
    model(**inputs)
    assert joined


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_passes_are_joined_but_for_them(method: str, wrap: Wrap, joined: list[int]) -> None:
    model, inputs = wrap("llama", method).train(), batch("llama")
    model.backbone.enable_input_require_grads()
    seen: list[Any] = []
    model.get_input_embeddings().register_forward_hook(lambda m, a, output: seen.append(shape_of(output)))

    def joins(**further: Any) -> bool:
        joined.clear()
        seen.clear()
        model(**inputs, **further).loss.backward()
        return len(joined) == 1

    model(**inputs)  # tries what is tried once
    assert joins() and joins(output_hidden_states=True) and joins() and seen == [(2, 7, 32)]
    with profile(activities=[ProfilerActivity.CPU], with_modules=True):
        assert joins()
    handle = layers(model)[1].register_forward_hook(lambda *_: None)
    assert not joins() and not joins(output_hidden_states=True)
    handle.remove()
    assert joins()


def test_a_walk_is_taken_where_hooks_have_come(wrap: Wrap, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, walks = wrap("llama", "prompt_tuning").train(), batch("llama"), []
    outside = outsiders._outside
    monkeypatch.setattr(outsiders, "_outside", lambda hooks: walks.append(1) or outside(hooks))
    model(**inputs)
    model(**inputs)
    walks.clear()
    model(**inputs)
    assert not walks
    layers(model)[0].register_forward_hook(lambda *_: None)
    model(**inputs)
    assert walks


def test_they_come_back_in_their_places() -> None:
    layer, called = nn.Linear(2, 2), []
    theirs = [layer.register_forward_hook(lambda *_, n=n: called.append(n)) for n in range(2)]
    ours = layer.register_forward_hook(outsiders.set_aside)
    theirs.append(layer.register_forward_hook(lambda *_: called.append(2)))
    before = list(layer._forward_hooks)
    with pytest.raises(ZeroDivisionError), outsiders.set_aside(layer):
        assert list(layer._forward_hooks) == [ours.id]
        come = layer.register_forward_hook(outsiders.set_aside)
        raise ZeroDivisionError
    assert list(layer._forward_hooks) == [*before, come.id]
    ours.remove(), come.remove(), theirs[0].remove()
    layer(Tensor([1, 2]))
    assert called == [1, 2]
