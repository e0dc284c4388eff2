"""What holds on a GPU as on a CPU; skipped where there is none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CONFIGS, METHODS, batch, build, main_task, takes_bitfit
from test_trainer import train
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ptune import MemoryCallback, PTuneConfig, PTuneForCausalLM, PTunePreTrainedModel, get_ptune_model
from hf_ptune.injection import kernels, merge

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
Wrap = Callable[..., PTunePreTrainedModel]
PAIRS = [(f, m) for f in CONFIGS for m in METHODS if m != "bitfit" or takes_bitfit(f)]
DECODE: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True}


def padded(family: str) -> dict[str, Tensor]:
    """Rows of which one has pads behind it."""
    inputs = batch(family, rows=3)
    inputs["attention_mask"][1, -3:] = 0
    return inputs


def outcome(model: Any, inputs: dict[str, Tensor], own: Tensor) -> list[Tensor]:
    """Loss, logits where a row has tokens of its own, and the gradient of every adapter parameter, on the CPU."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    logits = output.logits[own] if output.logits.shape[:2] == own.shape else output.logits
    found = [output.loss, logits, *(p.grad for p in model.parameters() if p.requires_grad)]
    return [t.detach().cpu() for t in found]


def on(device: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.to(device) for n, t in inputs.items()}


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= tolerance * (1 + theirs.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 64, 80, 128])
def test_the_kernel_equals_plain_attention(dtype: torch.dtype, width: int) -> None:
    assert kernels._difference(kernels._KERNELS["cuda"], "cuda", dtype, width) is None


@pytest.mark.parametrize(("family", "method"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kept", [merge._KEPT, 0])
def test_outputs_and_gradients_are_those_of_a_cpu(
    family: str, method: str, dtype: torch.dtype, kept: int, wrap: Wrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prefix that is copied before every row, and one that is merged in."""
    monkeypatch.setattr(merge, "_KEPT", kept)
    model, inputs = wrap(family, method).to(dtype).train(), padded(family)
    own = inputs["attention_mask"].bool() if main_task(family) != "SEQ_2_SEQ_LM" else torch.ones(3, 5, dtype=torch.bool)
    expected = outcome(model, inputs, own)
    assert len(expected) > 2
    found = outcome(model.cuda(), on("cuda", inputs), own)
    # transformers computes losses and rotations in float32
    assert_near(found, expected, 1e-6 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2", "mistral", "t5", "bart"])
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
@pytest.mark.parametrize("kept", [merge._KEPT, 0])
def test_it_writes_what_a_cpu_writes(
    family: str, method: str, kept: int, wrap: Wrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "_KEPT", kept)
    model, inputs = wrap(family, method), batch(family)
    inputs.pop("labels")
    expected = model.generate(**inputs, **DECODE)
    model.cuda()
    assert torch.equal(model.generate(**on("cuda", inputs), **DECODE).cpu(), expected)
    static = model.generate(**on("cuda", inputs), **DECODE, cache_implementation="static")
    assert torch.equal(static.cpu(), expected)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2", "prefix_tuning"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(method: str, reentrant: bool, wrap: Wrap) -> None:
    model, inputs = wrap("llama", method).cuda().train(), on("cuda", padded("llama"))
    own = inputs["attention_mask"].bool()
    expected = outcome(model, inputs, own)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_near(outcome(model, inputs, own), expected, 1e-9)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [merge._KEPT, 0])
def test_half_precision_stays_near(method: str, dtype: torch.dtype, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base in half precision whose prompt is in full: near to the same in float32, and a kernel is there for it."""
    monkeypatch.setattr(merge, "_KEPT", kept)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=99, pad_token_id=0,
    )  # fmt: skip
    results = []
    for base_dtype in (torch.float32, dtype):
        torch.manual_seed(0)
        base = LlamaForCausalLM(config).to("cuda", base_dtype)
        torch.manual_seed(2)
        model = get_ptune_model(base, PTuneConfig(method=method, num_virtual_tokens=8)).train()
        assert model.prompt.weight.dtype == torch.float32
        results.append(outcome(model, on("cuda", batch("llama", rows=4, length=16)), torch.ones(4, 16) > 0))
    assert kernels.kernel_for("cuda", dtype, 64) is not None
    assert_near([t.float() for t in results[1]], results[0], 5e-2)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_a_compiled_step_is_the_same(method: str, wrap: Wrap) -> None:
    model, inputs = wrap("llama", method).float().cuda().train(), on("cuda", batch("llama"))
    own = inputs["attention_mask"].bool()
    expected = outcome(model, inputs, own)
    model.zero_grad()
    output = torch.compile(model)(**inputs)
    output.loss.backward()
    found = [output.loss, output.logits[own], *(p.grad for p in model.parameters() if p.requires_grad)]
    assert_near([t.detach().cpu() for t in found], expected, 1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}])
def test_trainer_trains_saves_and_resumes(method: str, precision: dict[str, bool], wrap: Wrap, tmp_path: Path) -> None:
    model = wrap("gpt2", method).float()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    trained = set(model.adapter_parameter_names())
    trainer = train(model, tmp_path, "CAUSAL_LM", use_cpu=False, **precision)
    assert next(model.parameters()).is_cuda
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t.cpu(), before[n])}
    assert trained and moved == trained
    memory = next(c for c in trainer.callback_handler.callbacks if isinstance(c, MemoryCallback))
    assert memory.summary["device_peak"] > 0 and memory.summary["device"] == torch.cuda.get_device_name()
    again = train(wrap("gpt2", method).float(), tmp_path, "CAUSAL_LM", True, use_cpu=False, max_steps=6, **precision)
    assert again.state.global_step == 6


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_comes_back_on_either_device(method: str, base_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = type(build("gpt2")).from_pretrained(base_folder("gpt2")).float().cuda()
    model = get_ptune_model(base, PTuneConfig(method=method, num_virtual_tokens=4)).eval()
    ids = batch("gpt2")["input_ids"].cuda()
    model.save_pretrained(tmp_path)
    for device in ("cuda", "cpu"):
        loaded = PTuneForCausalLM.from_pretrained(tmp_path, device_map=device, dtype=torch.float32).eval()
        assert {p.device.type for p in loaded.parameters()} == {device}
        assert torch.allclose(loaded(ids.to(device)).logits.cuda(), model(ids).logits, atol=1e-3)
