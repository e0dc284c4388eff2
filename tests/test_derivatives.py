"""Derivatives beyond one backward: gradients of gradients, and torch.func over an adapter's parameters."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import batch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap

from hf_ptune import PTunePreTrainedModel
from hf_ptune.cross_entropy import masked_lm_loss
from hf_ptune.errors import InjectionError
from hf_ptune.injection import joint, merge

Wrap = Callable[..., PTunePreTrainedModel]


@pytest.fixture
def exact_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of float64 logits in float64, where transformers takes float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def second_order(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Gradients of the squared norm of the gradients of an adapter's parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(model(**inputs).loss, trained, create_graph=True)
    return list(torch.autograd.grad(sum(g.square().sum() for g in first), trained, materialize_grads=True))  # type: ignore[call-overload]


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("kind", ["full", "causal", "padded"])
def test_attention_over_a_shared_prefix(copied: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "_COPY", merge._COPY if copied else 0)
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 3, 8), (2, 2, 3, 8), (2, 2, 3, 8), (2, 2, 8), (2, 2, 8)
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool).tril() if kind == "padded" else None
    if mask is not None:
        mask[0, ..., :2] = False
    kernel = merge.merge_kernel(*tensors[:3], mask, False, 0.0, 2)
    assert kernel is not None

    def attend(*tensors: Tensor) -> Tensor:
        return merge.merged_attention(*tensors, mask, kind == "causal", 0.3, kernel)

    assert torch.autograd.gradgradcheck(attend, tensors, fast_mode=True)
    grad = torch.randn(2, 4, 3, 8, generator=generator, dtype=torch.float64)
    once, again = (torch.autograd.grad(attend(*tensors), tensors, grad, create_graph=c) for c in (False, True))
    for first, second in zip(once, again, strict=True):
        assert torch.allclose(first, second, atol=1e-12)


def test_a_sequence_taken_apart() -> None:
    tensors = [torch.randn(1, 2, 8, 4, dtype=torch.float64).requires_grad_() for _ in range(3)]
    layout = joint.Layout(2, 2, 3, None)

    def parts(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(p.square() for p in joint._Apart.apply(*tensors, layout))  # type: ignore[no-untyped-call]

    assert torch.autograd.gradgradcheck(parts, tensors, fast_mode=True)


def test_cross_entropy() -> None:
    logits, labels = torch.randn(5, 7).requires_grad_(), torch.tensor([3, -100, 0, 6, 2])
    pairs = []
    for loss in (masked_lm_loss(logits, labels, 7), F.cross_entropy(logits, labels)):
        (first,) = torch.autograd.grad(loss, logits, create_graph=True)
        pairs.append((first, *torch.autograd.grad(first.square().sum(), logits)))
    for ours, plain in zip(*pairs, strict=True):
        assert torch.allclose(ours, plain, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
@pytest.mark.parametrize("method", ["p_tuning_v2", "prefix_tuning"])
def test_prefixes_have_those_of_eager_attention(family: str, method: str, wrap: Wrap, exact_losses: None) -> None:
    results = []
    for attention, at_labels in (("sdpa", True), ("eager", False)):
        model, inputs = wrap(family, method, loss_at_labels=at_labels).train(), batch(family)
        inputs["attention_mask"][0, -2:] = 0
        model.set_attn_implementation(attention)
        results.append(second_order(model, inputs))
    assert all(r.abs().max() > 1e-6 for r in results[0])
    for ours, plain in zip(*results, strict=True):  # eager softmaxes are in float32
        assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_losses_at_labels_have_those_of_all_logits(method: str, wrap: Wrap, exact_losses: None) -> None:
    results = []
    for at_labels in (True, False):
        model, inputs = wrap("llama", method, loss_at_labels=at_labels).train(), batch("llama")
        model.set_attn_implementation("eager")
        inputs["labels"] = inputs["labels"].clone()
        inputs["labels"][0, :3] = -100
        results.append(second_order(model, inputs))
    for ours, plain in zip(*results, strict=True):
        assert torch.allclose(ours, plain, rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_what_has_none_says_so(wrap: Wrap) -> None:
    with pytest.raises(RuntimeError, match="not implemented"):  # as plain models with torch's fused attention do
        second_order(wrap("llama", "prompt_tuning").train(), batch("llama"))
    model = wrap("llama", "p_tuning_v2").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(InjectionError, match="use_reentrant"):
        model(**batch("llama")).loss.backward(create_graph=True)


def flat_gradients(model: Any, inputs: dict[str, Tensor], rows: slice | None = None) -> dict[str, Tensor]:
    """Gradients of the prompt's parameters, as one backward gives them."""
    model.zero_grad()
    model(**{n: t if rows is None else t[rows] for n, t in inputs.items()}).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if n.startswith("prompt.")}


ignore_slow_rules = pytest.mark.filterwarnings("ignore:There is a performance drop")
FUNCTIONAL = [
    (f, m) for f in ("llama", "bert", "t5") for m in ("prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2")
]


@pytest.mark.parametrize("training", [False, True])
@ignore_slow_rules
@pytest.mark.parametrize(("family", "method"), FUNCTIONAL)
def test_torch_func_gives_the_same_gradients(
    family: str, method: str, training: bool, wrap: Wrap, exact_losses: None
) -> None:
    model, inputs = wrap(family, method).train(training), batch(family)
    inputs["attention_mask"][0, -2:] = 0

    def loss(prompt: dict[str, Tensor], *rows: Tensor) -> Tensor:
        given = dict(zip(inputs, rows, strict=True))
        found: Tensor = functional_call(model, prompt, (), given).loss
        return found

    prompt = {n: p.detach() for n, p in model.named_parameters() if n.startswith("prompt.")}
    found = {"grad": grad(loss)(prompt, *inputs.values()), "jacrev": jacrev(loss)(prompt, *inputs.values())}
    expected = flat_gradients(model, inputs)
    for way, gradients in found.items():
        for name, gradient in gradients.items():
            difference = (gradient - expected[name]).abs().max()  # the loss at labels is in float32
            assert difference <= 1e-5 * expected[name].abs().max(), (way, name)


@ignore_slow_rules
@pytest.mark.parametrize(("family", "method"), FUNCTIONAL)
def test_vmap_over_rows_gives_the_gradients_of_each(family: str, method: str, wrap: Wrap, exact_losses: None) -> None:
    model, inputs = wrap(family, method), batch(family)
    del inputs["attention_mask"]  # read by value in transformers' own masks

    def loss(prompt: dict[str, Tensor], *row: Tensor) -> Tensor:
        given = {n: t[None] for n, t in zip(inputs, row, strict=True)}
        found: Tensor = functional_call(model, prompt, (), given).loss
        return found

    prompt = {n: p.detach() for n, p in model.named_parameters() if n.startswith("prompt.")}
    found = vmap(grad(loss), in_dims=(None, *(0 for _ in inputs)))(prompt, *inputs.values())
    for row in range(2):
        for name, gradient in flat_gradients(model, inputs, slice(row, row + 1)).items():
            assert torch.allclose(found[name][row], gradient, rtol=1e-5, atol=1e-8), name


@ignore_slow_rules
@pytest.mark.parametrize(("family", "method"), FUNCTIONAL)
def test_vmap_over_prompts_keeps_none_of_them(family: str, method: str, wrap: Wrap) -> None:
    model, inputs = wrap(family, method), batch(family)
    del inputs["attention_mask"]
    own = {n: p for n, p in model.named_parameters() if n.startswith("prompt.")}
    several = {n: torch.stack([p, 2 * p]).detach() for n, p in own.items()}
    with torch.no_grad():
        expected = model(**inputs).logits
        found = vmap(lambda prompt: functional_call(model, prompt, (), inputs).logits)(several)
        assert torch.allclose(found[0], expected, atol=1e-9) and not torch.allclose(found[1], expected, atol=1e-3)
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_several_gradients_at_once(method: str, wrap: Wrap) -> None:
    model, inputs = wrap("llama", method, loss_at_labels=False).train(), batch("llama")
    logits = model(**inputs).logits
    weight = next(p for p in model.prompt.parameters())
    directions = torch.randn(3, *logits.shape, dtype=torch.float64)
    (several,) = torch.autograd.grad(logits, weight, directions, is_grads_batched=True, retain_graph=True)
    for direction, found in zip(directions, several, strict=True):
        assert torch.allclose(found, torch.autograd.grad(logits, weight, direction, retain_graph=True)[0], atol=1e-9)
