"""Gradients under checkpoints where other passes lie between a pass and its backward."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from families import ENCODERS, METHODS, batch, takes_bitfit
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from hf_ptune import PTunePreTrainedModel

Wrap = Callable[..., PTunePreTrainedModel]
Inputs = dict[str, Any]
FAMILIES = ["llama", "gpt2", "bloom", "bert", "deberta-v2", "t5"]


def other(inputs: Inputs) -> Inputs:
    """More rows of fewer tokens, so that no tensor has the shape of the first pass."""
    return {k: t.repeat_interleave(2, 0)[..., :5] if isinstance(t, Tensor) else t for k, t in inputs.items()}


def two_losses(model: Any, inputs: Inputs) -> Tensor:
    return model(**inputs).loss + 2 * model(**other(inputs)).loss


def twice_the_same(model: Any, inputs: Inputs) -> Tensor:
    return model(**inputs).loss + 2 * model(**inputs).loss


def logits_read(model: Any, inputs: Inputs) -> Tensor:
    output = model(**inputs)
    assert output.logits.shape[0] == len(inputs["input_ids"])
    return output.loss


def reference_without_the_prompt(model: Any, inputs: Inputs) -> Tensor:
    loss = model(**inputs).loss
    with torch.no_grad(), model.disable_adapter():
        model(**inputs)
    return loss


def trained_without_the_prompt(model: Any, inputs: Inputs) -> Tensor:
    loss = model(**inputs).loss
    with model.disable_adapter():
        return loss + model(**inputs).loss


def evaluated_between(model: Any, inputs: Inputs) -> Tensor:
    loss = model(**inputs).loss
    with torch.no_grad():
        model.eval()(**other(inputs))
    model.train()
    return loss


CASES = [
    two_losses,
    twice_the_same,
    logits_read,
    reference_without_the_prompt,
    trained_without_the_prompt,
    evaluated_between,
]


def gradients(model: Any, loss: Callable[[], Tensor]) -> Iterator[tuple[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(3)
    loss().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            yield name, parameter.grad.clone()


def assert_checkpoints_change_nothing(model: Any, reentrant: bool, loss: Callable[[], Tensor]) -> None:
    expected = dict(gradients(model, loss))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = dict(gradients(model, loss))
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-9), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("family", "method"), [(f, m) for f in FAMILIES for m in METHODS if m != "bitfit" or takes_bitfit(f)]
)
def test_passes_between_a_pass_and_its_backward_change_no_gradient(
    family: str, method: str, reentrant: bool, case: Callable[..., Tensor], wrap: Wrap
) -> None:
    model, inputs = wrap(family, method).train(), batch(family)
    if family not in ENCODERS:
        inputs = inputs | {"use_cache": False}
    assert_checkpoints_change_nothing(model, reentrant, lambda: case(model, inputs))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
@pytest.mark.parametrize("method", ["p_tuning_v2", "prefix_tuning"])
def test_each_pass_keeps_what_its_dropout_drew(family: str, method: str, reentrant: bool, wrap: Wrap) -> None:
    model, inputs = wrap(family, method, prefix_dropout=0.5).train(), batch(family)
    assert_checkpoints_change_nothing(model, reentrant, lambda: two_losses(model, inputs))


@pytest.mark.parametrize("case", CASES)
def test_layers_that_an_engine_wraps_in_checkpoints(case: Callable[..., Tensor], wrap: Wrap) -> None:
    """As FSDP's activation checkpointing does, once the model is made."""
    model, inputs = wrap("llama", "p_tuning_v2", prefix_dropout=0.5).train(), batch("llama") | {"use_cache": False}
    expected = dict(gradients(model, lambda: case(model, inputs)))
    layers = model.backbone.model.layers
    for number, layer in enumerate(layers):
        layers[number] = checkpoint_wrapper(layer, preserve_rng_state=False)
    found = [gradient for _, gradient in gradients(model, lambda: case(model, inputs))]
    for gradient, wanted in zip(found, expected.values(), strict=True):
        assert torch.allclose(gradient, wanted, atol=1e-9)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_a_whole_model_under_a_checkpoint_has_its_gradients_from_the_first_step_on(
    family: str, method: str, trains: bool, wrap: Wrap
) -> None:
    """What a decoder tries in its first training pass is no part of that pass."""
    inputs = batch(family)
    options = {"train_backbone": trains, "loss_at_labels": False}
    plain = dict(gradients(model := wrap(family, method, **options).train(), lambda: model(**inputs).loss))
    fresh = wrap(family, method, **options).train()
    fresh.load_state_dict(model.state_dict())
    run = partial(checkpoint, lambda ids: fresh(**inputs | {"input_ids": ids}).loss, use_reentrant=False)
    for _ in range(2):
        found = dict(gradients(fresh, lambda: run(inputs["input_ids"])))
        for name, gradient in plain.items():
            assert torch.allclose(found[name], gradient, atol=1e-9), name


@pytest.mark.parametrize("method", ["p_tuning_v2", "prompt_tuning"])
def test_a_mix_of_layers_under_checkpoints_has_the_gradient_of_both_losses(method: str, wrap: Wrap) -> None:
    model, inputs = wrap("bert", method, head_states="mix", pooling="mean").train(), batch("bert")
    assert_checkpoints_change_nothing(model, False, lambda: two_losses(model, inputs))


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_layers_get_their_checkpoints_back(reentrant: bool, wrap: Wrap) -> None:
    model, inputs = wrap("llama", "p_tuning_v2").train(), batch("llama")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    layers = model.backbone.model.layers
    before = [layer._gradient_checkpointing_func for layer in layers]
    model(**inputs).loss.backward()
    assert [layer._gradient_checkpointing_func for layer in layers] == before
    failing = layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs)
    failing.remove()
    assert [layer._gradient_checkpointing_func for layer in layers] == before


def test_compiled_layers_under_checkpoints_are_compiled_once(wrap: Wrap) -> None:
    model, inputs = wrap("llama", "p_tuning_v2").train(), batch("llama") | {"use_cache": False}
    expected = dict(gradients(model, lambda: twice_the_same(model, inputs)))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.compiler.reset()
    graphs: list[int] = []

    def backend(graph: Any, examples: Any) -> Any:
        graphs.append(len(examples))
        return graph.forward

    for layer in model.backbone.model.layers:
        layer.compile(backend=backend)
    made = []
    for _ in range(3):
        found = dict(gradients(model, lambda: twice_the_same(model, inputs)))
        made.append(len(graphs))
    assert 0 < made[0] == made[1] == made[2]
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-9), name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("method", ["p_tuning_v2", "prefix_tuning", "prompt_tuning"])
@pytest.mark.parametrize("kind", [lambda output: output, lambda output: (output[0],)], ids=["output", "tuple"])
def test_an_encoder_that_runs_by_itself_gives_the_same_gradients(
    family: str, method: str, reentrant: bool, kind: Callable[..., Any], wrap: Wrap
) -> None:
    dropout = {"prefix_dropout": 0.5} if method != "prompt_tuning" else {}
    model, inputs = wrap(family, method, **dropout).train(), batch(family)
    ids, rest = inputs.pop("input_ids"), inputs | {"use_cache": False}

    def loss() -> Tensor:
        encoded = [
            kind(model.get_encoder()(input_ids=i, attention_mask=inputs["attention_mask"])) for i in (ids, ids.flip(1))
        ]
        return model(encoder_outputs=encoded[0], **rest).loss + 2 * model(encoder_outputs=encoded[1], **rest).loss

    assert_checkpoints_change_nothing(model, reentrant, loss)
