"""A pass that is stopped by the keyboard leaves nothing behind, in the model or in the process."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from families import batch, build
from torch.overrides import _get_current_function_mode_stack as function_modes

from hf_ptune import PTunePreTrainedModel
from hf_ptune.injection.interrupts import OnInterrupt

Wrap = Callable[..., PTunePreTrainedModel]


def stop(*args: Any) -> None:
    raise KeyboardInterrupt


def interrupt(model: PTunePreTrainedModel, where: str, run: Callable[[], Any]) -> None:
    handle = model.base_model.get_submodule(where).register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        run()
    handle.remove()


def answers(model: Any, family: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(family)).logits


@pytest.mark.parametrize(
    ("family", "method", "where"),
    [
        ("bloom", "p_tuning_v2", "h.1.self_attention.dense"),
        ("bloom", "prompt_tuning", "h.1.self_attention.dense"),
        ("t5", "p_tuning_v2", "encoder.block.1.layer.0.SelfAttention.o"),
        ("llama", "prompt_tuning", "layers.1.mlp"),
        ("llama", "p_tuning_v2", "layers.1.mlp"),
        ("bert", "prompt_tuning", "encoder.layer.1.output"),
    ],
)
@pytest.mark.parametrize("first", [True, False], ids=["first pass", "later pass"])
def test_the_next_passes_are_as_if_it_had_not_been(
    family: str, method: str, where: str, first: bool, wrap: Wrap
) -> None:
    """Of the model, and of another that lives beside it."""
    model, other = wrap(family, method), build("bert")
    expected, beside = answers(model, family), answers(other, "bert")
    model.train()
    if not first:
        model(**batch(family)).loss.backward()
    interrupt(model, where, lambda: model(**batch(family)))
    assert not function_modes()
    model.eval()
    assert torch.equal(answers(other, "bert"), beside)
    assert torch.allclose(answers(model, family), expected, atol=1e-9)
    model.train()
    model(**batch(family)).loss.backward()


def test_an_interrupt_in_a_layer_that_runs_again(wrap: Wrap) -> None:
    model = wrap("bloom", "p_tuning_v2")
    expected = answers(model, "bloom")
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**batch("bloom")).loss
    interrupt(model, "h.1.self_attention.dense", loss.backward)
    assert not function_modes()
    assert torch.allclose(answers(model.eval(), "bloom"), expected, atol=1e-9)


@pytest.mark.parametrize(("family", "where"), [("t5", "decoder.block.1.layer.1"), ("bart", "decoder.layers.1.fc1")])
def test_generating_after_an_interrupt_begins_with_an_encoder_of_its_own(family: str, where: str, wrap: Wrap) -> None:
    model, ids = wrap(family, "p_tuning_v2"), batch(family)["input_ids"]

    def generated() -> torch.Tensor:
        with model.disable_adapter():
            given = model.generate(ids, max_new_tokens=2, output_logits=True, return_dict_in_generate=True)
        return torch.stack(given.logits)

    expected = generated()
    interrupt(model.train(), where, lambda: model(**batch(family)))
    model.eval()
    assert torch.allclose(generated(), expected, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "method"), [("llama", "prompt_tuning"), ("llama", "p_tuning_v2"), ("t5", "p_tuning_v2")]
)
def test_an_interrupt_before_the_body_runs(
    family: str, method: str, wrap: Wrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a hook behind the one that begins a pass; accelerate's may stand there while prompt and rows train as one."""
    monkeypatch.setattr(stop, "__module__", "accelerate.hooks")
    model, inputs = wrap(family, method), batch(family)
    ids = inputs["input_ids"]

    def generated() -> torch.Tensor:
        with model.disable_adapter():
            given = model.generate(ids, max_new_tokens=2, output_logits=True, return_dict_in_generate=True)
        return torch.stack(given.logits)

    expected, bare = answers(model, family), generated()
    model.train()(**inputs)
    interrupt(model, "", lambda: model(**inputs))
    assert torch.allclose(generated(), bare, atol=1e-9)
    assert torch.allclose(answers(model.eval(), family), expected, atol=1e-9)


def test_an_interrupt_while_it_is_tried_whether_prompt_and_rows_train_as_one(
    wrap: Wrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again; a hook of others would not be called in a trial."""
    monkeypatch.setattr(stop, "__module__", "accelerate.hooks")
    model = wrap("llama", "prompt_tuning", loss_at_labels=False).train()  # which is tried before
    interrupt(model, "layers.1.mlp", lambda: model(**batch("llama")))
    assert model._injector.joins is None and not model._injector.trying
    model(**batch("llama"))
    assert model._injector.joins


@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_a_forward_is_given_back(family: str, wrap: Wrap) -> None:
    model = wrap(family, "p_tuning_v2")
    assert "forward" in vars(model.base_model)
    assert not any("forward" in vars(module) for module in model.unwrap().modules())


def test_forwards_that_stand_before_one_another_leave_in_any_order() -> None:
    module, cleaned = torch.nn.Linear(2, 2), []
    first, second = (OnInterrupt(module, partial(cleaned.append, name)) for name in ("first", "second"))
    first.remove()
    assert vars(module)["forward"] is second and module(torch.ones(2)).shape == (2,)
    second.remove()
    assert "forward" not in vars(module) and not cleaned


def test_a_forward_that_a_device_map_puts_before_it_stays_behind(wrap: Wrap) -> None:
    model = wrap("bloom", "p_tuning_v2")
    expected, body = answers(model, "bloom"), model.base_model
    add_hook_to_module(body, ModelHook())
    assert torch.equal(answers(model, "bloom"), expected)
    backbone = model.unwrap()
    bare = answers(backbone, "bloom")
    remove_hook_from_module(body)
    assert torch.equal(answers(backbone, "bloom"), bare) and not torch.allclose(bare, expected)
