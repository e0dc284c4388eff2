"""Attention over a shared prefix: equal to copies before every row, and one sweep equal to two passes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import CONFIGS, DECODERS, VOCABULARY, batch, build
from transformers import AutoConfig, AutoModelForCausalLM, Llama4TextConfig

from hf_ptune import PTuneConfig, PTunePreTrainedModel, get_ptune_model
from hf_ptune.injection import attention, joint, kernels, merge, own_attention
from hf_ptune.injection.kernels import Kernel

Wrap = Callable[..., PTunePreTrainedModel]
ROUTE_1 = [f for f in CONFIGS if f not in ("bloom", "deberta-v2", "gemma2")]  # attention by the interface
METHODS = ["prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2"]


def naive(
    query: torch.Tensor, tensors: list[torch.Tensor], mask: torch.Tensor | None, causal: bool, scale: float
) -> torch.Tensor:
    """Softmax over the scores of a copy of the prefix before each row."""
    key, value, prefix_key, prefix_value = tensors
    rows, groups = len(key), query.shape[1] // key.shape[1]
    keys = torch.cat([prefix_key.expand(rows, *prefix_key.shape), key], 2).repeat_interleave(groups, 1)
    values = torch.cat([prefix_value.expand(rows, *prefix_value.shape), value], 2).repeat_interleave(groups, 1)
    scores = query @ keys.mT * scale
    own = scores[..., -key.shape[2] :]
    if causal:
        own = own.masked_fill(~torch.ones(own.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        own = own.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else own + mask
    scores = torch.cat([scores[..., : -key.shape[2]], own], -1)
    return scores.softmax(-1) @ values


@pytest.fixture(params=["laid out", "merged"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "laid out":
        monkeypatch.setattr(merge, "_COPY", 0)
    return str(request.param)


@pytest.fixture(params=["laid out", "merged", "copied"])
def any_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU does with short prefixes and with long ones, and a GPU with short ones."""
    if request.param == "merged":
        monkeypatch.setattr(merge, "_COPY", 0)
    elif request.param == "copied":
        for route in (attention, own_attention):
            monkeypatch.setattr(route, "merge_kernel", lambda *_: None)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 9), (70, 70)])
@pytest.mark.parametrize("kind", ["full", "causal", "padded", "additive"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_and_gradients(
    way: str, heads: int, key_heads: int, queries: int, keys: int, kind: str, dtype: torch.dtype
) -> None:
    if kind == "causal" and queries != keys:
        pytest.skip("causal without a mask is for whole sequences")
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    query, key, value = draw(3, queries, heads, 8), draw(3, keys, key_heads, 8), draw(3, key_heads, keys, 8)
    query, key = query.transpose(1, 2), key.transpose(1, 2)  # strides as layers have them, and plain ones
    tensors = [key, value, draw(key_heads, 11, 8), draw(key_heads, 11, 8)]
    mask = None
    if kind == "padded":
        mask = torch.ones(3, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
        mask[0, ..., :3] = mask[1, ..., -2:] = False  # the first rows of left padding see none of their own keys
    elif kind == "additive":
        mask = torch.randn(3, 1, queries, keys, generator=generator, dtype=torch.float64).to(dtype)
    kernel = merge.merge_kernel(query, key, value, mask, False, 0.0, 3)
    assert kernel is not None
    found = merge.merged_attention(query, *tensors, mask, kind == "causal", 0.3, kernel)
    expected = naive(query, tensors, mask, kind == "causal", 0.3)
    grad = torch.randn(expected.shape, generator=generator, dtype=torch.float64).to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert torch.allclose(found, expected, atol=tolerance)
    pairs = [torch.autograd.grad(o, [query, *tensors], grad) for o in (found, expected)]
    for ours, plain in zip(*pairs, strict=True):
        assert torch.allclose(ours, plain, atol=10 * tolerance)
    with torch.no_grad():
        assert torch.equal(merge.merged_attention(query, *tensors, mask, kind == "causal", 0.3, kernel), found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_concatenation(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, 4, 33, 16) for _ in range(3))
    prefix = [torch.randn(4, 7, 16), torch.randn(4, 7, 16)]
    exact = naive(query, [key, value, *prefix], None, True, 0.25)
    half = [t.to(dtype) for t in (query, key, value, *prefix)]
    kernel = merge.merge_kernel(*half[:3], None, False, 0.0, 3)
    assert kernel is not None
    found = merge.merged_attention(*half, None, True, 0.25, kernel).float()
    plain = naive(half[0], half[1:], None, True, 0.25).float()
    assert (found - exact).abs().max() < 1.5 * (plain - exact).abs().max() + 1e-3


def test_autocast_reaches_the_kernels(wrap: Wrap) -> None:
    model, inputs = wrap("llama", "p_tuning_v2").float(), batch("llama")
    with torch.autocast("cpu", torch.bfloat16):
        merged = model(**inputs).loss
        with merge.concatenated_attention():
            assert torch.allclose(merged, model(**inputs).loss, rtol=2e-2)


@pytest.mark.parametrize("family", ROUTE_1)
@pytest.mark.parametrize("method", METHODS)
def test_models_equal_the_reference_path(family: str, method: str, any_way: None, wrap: Wrap) -> None:
    model, inputs, results = wrap(family, method).train(), batch(family, rows=3), []
    inputs["attention_mask"][0, -2:] = 0
    for reference in (False, True):
        model.zero_grad()
        if reference:
            with merge.concatenated_attention():
                loss = model(**inputs).loss
        else:
            loss = model(**inputs).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-10)
    for name, gradient in results[0][1].items():
        # transformers computes its losses in float32
        assert torch.allclose(gradient, results[1][1][name], rtol=1e-6, atol=1e-10), name


@pytest.mark.parametrize("masked", [False, True])
def test_a_mask_beside_a_copy_is_made_once_for_all_layers(masked: bool, wrap: Wrap, monkeypatch: Any) -> None:
    model, inputs = wrap("llama", "p_tuning_v2"), batch("llama")
    inputs["attention_mask"][0, -2:] = 0 if masked else 1
    monkeypatch.setattr(attention, "merge_kernel", lambda *_: None)
    seen: list[Any] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def watch(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["attn_mask"])
        return kernel(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    model(**inputs)
    assert len(seen) == 2 and seen[0] is seen[1] and seen[0].dtype == torch.float64 and seen[0].shape[-2:] == (7, 11)


def test_a_causal_mask_is_kept_for_its_device() -> None:
    kept = merge._causal(3, 2, torch.float32, torch.device("cpu"))
    assert merge._causal(3, 2, torch.float32, torch.device("cpu")) is kept
    assert merge._causal(3, 2, torch.float32, torch.device("meta")).device.type == "meta"


def test_a_gpu_merges_long_prefixes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "kernel_for", lambda *_: "merges")
    monkeypatch.setattr(merge, "_working_type", lambda query: query.dtype)
    query, key = (torch.empty(2, heads, 5, 8, device="meta") for heads in (4, 2))
    token = 2 * 2 * 2 * 8 * 4  # keys and values of both rows
    limit = merge._KEPT // token
    assert merge.merge_kernel(query, key, key, None, False, 0.0, limit) is None
    assert merge.merge_kernel(query, key, key, None, False, 0.0, limit + 1) == "merges"

    def chosen(queries: int, keys: int, mask: Any = None, causal: bool = False) -> Any:
        query, key = torch.empty(2, 4, queries, 8, device="meta"), torch.empty(2, 2, keys, 8, device="meta")
        return merge.merge_kernel(query, key, key, mask, causal, 0.0, 4)

    whole, mask = merge._COPY // token, torch.empty(1, 1, 1, 1)
    assert chosen(1, whole - 8) is None and chosen(1, whole) == "merges"  # a step would lay out its whole cache
    assert chosen(9, whole - 12, mask) is None and chosen(9, whole, mask) == "merges"  # shared heads are repeated
    assert chosen(9, whole) is None
    long = int((merge._COPY / 4) ** 0.5)
    assert chosen(long - 4, long - 4, causal=True) is None and chosen(long, long, causal=True) == "merges"


def test_nothing_is_laid_out_beyond_the_limit(wrap: Wrap, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (merge, attention, own_attention):
        monkeypatch.setattr(room, "lay", lambda *_: pytest.fail("a row got a copy"))
    monkeypatch.setattr(merge, "_COPY", 2 * 2 * 2 * 4 * 8 * 8 - 1)  # two rows of a layer's keys and values
    model = wrap("llama", "p_tuning_v2")
    model(**batch("llama")).loss.backward()
    model.generate(batch("llama")["input_ids"], max_new_tokens=3)


def test_concatenation_where_it_must_be(wrap: Wrap) -> None:
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    assert merge.merge_kernel(query, key, key, None, False, 0.0, 3) is not None
    assert merge.merge_kernel(query, key, key, None, False, 0.1, 3) is None  # dropout of probabilities
    assert merge.merge_kernel(query, key, key[..., :4], None, False, 0.0, 3) is None  # values of another width
    assert merge.merge_kernel(query, key, key, torch.zeros(5, 5, requires_grad=True), False, 0.0, 3) is None
    model = wrap("llama", "p_tuning_v2")
    model.set_attn_implementation("eager")
    assert model(**batch("llama"), output_attentions=True).attentions[0].shape == (2, 4, 7, 7)


def test_a_wrong_kernel_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels._KERNELS["cpu"]

    def off(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output, lse = right.forward(*args)
        return output, lse + 0.01

    def refuses(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("no kernel for this")

    def is_absent(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def is_full(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        kernels._difference(Kernel(is_full, right.backward), "cpu", torch.float32, 8)
    rejected = ((off, "differs"), (refuses, "no kernel for this"), (is_absent, "NotImplementedError"))
    for forward, said in rejected:
        found = kernels._difference(Kernel(forward, right.backward), "cpu", torch.float32, 8)
        assert found is not None and said in found
    assert kernels._difference(right, "cpu", torch.float32, 8) is None
    monkeypatch.setattr(kernels, "_KERNELS", {"cpu": Kernel(refuses, right.backward)})
    monkeypatch.setattr(kernels, "_chosen", {})
    assert kernels.kernel_for("cpu", torch.float32, 8) is None


def test_kernels_are_compared_on_their_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_chosen", {})
    with torch.device("meta"):
        assert kernels.kernel_for("cpu", torch.float32, 8) is not None


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_one_sweep_equals_two_passes(family: str, method: str) -> None:
    model = get_ptune_model(build(family), PTuneConfig(method=method, num_virtual_tokens=4)).train()
    inputs, results = batch(family, rows=3), []
    inputs["attention_mask"][0, :2] = inputs["attention_mask"][1, -3:] = 0
    for joins in (None, False):
        model._injector.joins = joins
        model.zero_grad()
        output = model(**inputs, output_hidden_states=True)
        output.loss.backward()
        real = inputs["attention_mask"].bool()
        states = [h.detach()[real] for h in output.hidden_states]
        results.append((output.loss.detach(), states, [p.grad for p in model.prompt.parameters()]))
        if joins is None:
            # BLOOM and Gemma 2 compute attention by themselves
            assert bool(model._injector.joins) == (family not in ("bloom", "gemma2"))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-7)
    for ours, plain in zip(results[0][1] + results[0][2], results[1][1] + results[1][2], strict=True):
        assert ours.shape == plain.shape and torch.allclose(ours, plain, rtol=1e-6, atol=1e-8)


def test_one_sweep_is_taken_while_training_only(wrap: Wrap, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, calls = wrap("llama", "prompt_tuning").train(), batch("llama"), []
    original = joint.attend
    model(**inputs)  # the first one compares
    monkeypatch.setattr(joint, "attend", lambda *a: (calls.append(1), original(*a))[1])
    model(**inputs)
    assert len(calls) == 2
    with torch.no_grad():
        model(**inputs)
    model(**inputs, use_cache=True)
    model(inputs["input_ids"], attention_mask=torch.ones(2, 1, 7, 7, dtype=torch.bool).tril())
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("phi3", {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}),
        ("llama", {"rope_type": "dynamic", "factor": 4.0}),
    ],
)
@pytest.mark.parametrize("length", [5, 30])
def test_frequencies_that_follow_the_length_train_as_they_serve(family: str, rope: dict[str, Any], length: int) -> None:
    """A text past the original length lets them change for all tokens of a pass, a prompt's among them."""
    torch.manual_seed(0)
    first = 16 if family == "llama" else 256
    further = {"original_max_position_embeddings": 16} if family == "phi3" else {}
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=first,
        pad_token_id=0,
        initializer_range=0.3,
        rope_parameters=rope | further | {"rope_theta": 100.0},
        **further,
    )
    base = AutoModelForCausalLM.from_config(config).double()
    model = get_ptune_model(base, PTuneConfig(method="prompt_tuning", num_virtual_tokens=4, loss_at_labels=False))
    ids = torch.randint(3, VOCABULARY, (2, length))
    trained = model.train()(input_ids=ids, labels=ids).logits
    with torch.no_grad():
        assert torch.allclose(model.eval()(input_ids=ids, labels=ids).logits, trained, atol=1e-9)
    assert model._injector.joins is False


def test_attention_in_chunks_is_never_tried_in_one_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4 masks chunks by the pads of every row; the trial would fail on the device, and take it down."""
    monkeypatch.setattr(joint, "join", lambda *a: pytest.fail("prompt and rows were laid in one sequence"))
    small = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 37, "intermediate_size_mlp": 37, "head_dim": 8}
    small |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    config = Llama4TextConfig(**small, attention_chunk_size=6, eos_token_id=2, pad_token_id=0, bos_token_id=1)
    base = AutoModelForCausalLM.from_config(config)
    model = get_ptune_model(base, PTuneConfig(method="prompt_tuning", num_virtual_tokens=4)).train()
    model(**batch("llama")).loss.backward()
    assert model._injector.joins is False
    assert model.prompt.weight.grad.abs().sum() > 0


def test_packed_sequences_stay_apart_while_training(wrap: Wrap) -> None:
    model = wrap("llama", "prompt_tuning").train()
    ids = batch("llama", rows=1, length=8)["input_ids"]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    packed = model(ids, position_ids=positions, use_cache=False).logits
    assert torch.allclose(packed[:, 3:], model(ids[:, 3:]).logits, atol=1e-10)
    assert model._injector.joins


def test_one_sweep_with_hidden_dropout_keeps_modes(wrap: Wrap) -> None:
    model = wrap("gpt2", "p_tuning", encoder_dropout=0.5).train()
    model.backbone.transformer.h[0].eval()
    before = {n: m.training for n, m in model.named_modules()}
    model(**batch("gpt2"))
    assert model._injector.joins
    assert {n: m.training for n, m in model.named_modules()} == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("key_heads", [6, 2])
def test_cuda_operators_take_and_give_these_shapes(dtype: torch.dtype, masked: bool, key_heads: int) -> None:
    query = torch.empty(2, 6, 5, 16, device="meta", dtype=dtype)
    key = torch.empty(2, key_heads, 9, 16, device="meta", dtype=dtype)
    mask = torch.empty(2, 1, 5, 9, device="meta", dtype=dtype) if masked else None
    output, lse = kernels._cuda_forward(query, key, key, mask, False, 0.25)
    assert (output.shape, lse.shape, lse.dtype) == (query.shape, (2, 6, 5), torch.float32)
    found = kernels._cuda_backward(output, query, key, key, mask, output, lse, False, 0.25)
    assert [g.shape for g in found] == [query.shape, key.shape, key.shape]


class PlainOperators:
    """Memory-efficient attention by its contract: no grouped heads, log-sum-exps in rows of a multiple of 32."""

    @staticmethod
    def _scores(query: Any, key: Any, mask: Any, causal: bool, scale: float) -> Any:
        assert query.shape[1] == key.shape[1]
        scores = query @ key.mT * scale
        if mask is not None:
            assert mask.shape == scores.shape and mask.stride(-2) % 16 == 0
            scores = scores + mask
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(later, -torch.inf) if causal else scores

    def _scaled_dot_product_efficient_attention(
        self, query: Any, key: Any, value: Any, mask: Any, wants_lse: bool, dropout: float, causal: bool, scale: float
    ) -> tuple[Any, ...]:
        scores = self._scores(query, key, mask, causal, scale)
        lse = torch.nn.functional.pad(scores.logsumexp(-1), (0, -query.shape[2] % 32), value=torch.inf)
        return scores.softmax(-1) @ value, lse, None, None

    def _scaled_dot_product_efficient_attention_backward(self, *args: Any, scale: float) -> tuple[Any, ...]:
        grad, query, key, value, mask, output, lse, _, _, _, wanted, causal = args
        assert lse.shape[2] % 32 == 0 and wanted == [True, True, True, False]
        shares = (self._scores(query, key, mask, causal, scale) - lse[..., : query.shape[2], None]).exp()
        to_scores = shares * (grad @ value.mT - (grad * output).sum(-1, keepdim=True)) * scale
        return to_scores @ key, to_scores.mT @ query, shares.mT @ grad, None


def test_what_stands_around_cuda_operators_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_ATEN", PlainOperators())
    assert kernels._difference(kernels._KERNELS["cuda"], "cpu", torch.float32, 8) is None
