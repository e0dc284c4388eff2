"""What is refused leaves the base as it was; what would be lost in silence is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batch, build
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers_of import tokenizer_of
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from hf_ptune import PTuneConfig, PTuneForCausalLM, PTunePreTrainedModel, get_ptune_model
from hf_ptune.errors import BackboneError, ConfigError, InjectionError, PTuneError
from hf_ptune.multitask import get_multitask_model

Wrap = Callable[..., PTunePreTrainedModel]


def state_of(base: PreTrainedModel, family: str) -> tuple[Any, ...]:
    """What a base answers, what of it trains, and how many hooks it has."""
    with torch.no_grad():
        logits = base.eval()(**batch(family)).logits
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules())
    return logits.sum().item(), [p.requires_grad for p in base.parameters()], hooks


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        ("gpt2", "p_tuning_v2", {"modules_to_save": ["nothing"]}),
        ("bert", "prompt_tuning", {"modules_to_save": ["nothing"]}),
        ("llama", "p_tuning_v2", {"layers": [9]}),
        ("llama", "bitfit", {}),
    ],
)
def test_a_base_is_as_it_was_after_a_refusal(family: str, method: str, options: dict[str, Any]) -> None:
    base = build(family)
    before = state_of(base, family)
    for _ in range(2):
        with pytest.raises((BackboneError, ConfigError)):
            get_ptune_model(base, PTuneConfig(method=method, num_virtual_tokens=3, **options))
        assert state_of(base, family) == before
    model = get_ptune_model(base, PTuneConfig(method="p_tuning_v2", num_virtual_tokens=3))
    assert state_of(model, family)[0] != before[0]
    assert state_of(model.unwrap(), family) == before


@pytest.mark.parametrize(
    "options",
    [
        {"train_backbone": True},
        {"method": "bitfit"},
        {"layers": [9]},
        {"prompt_tuning_init": "CLASS_LABELS"},  # the first task names its labels, the other does not
        {"modules_to_save": ["nothing"]},
    ],
)
def test_bases_of_several_tasks_are_as_they_were_after_a_refusal(options: dict[str, Any]) -> None:
    names = {"id2label": {0: "early", 1: "late"}, "label2id": {"early": 0, "late": 1}}
    bases = {"topic": build("bert", **names), "mood": build("bert")}
    before = [state_of(base, "bert") for base in bases.values()]
    weights = [dict(base.named_parameters()) for base in bases.values()]
    with pytest.raises((BackboneError, ConfigError)):
        get_multitask_model(bases, PTuneConfig(num_virtual_tokens=3, **options), tokenizer_of("wordpiece"))
    assert [state_of(base, "bert") for base in bases.values()] == before
    for base, own in zip(bases.values(), weights, strict=True):
        assert all(parameter is own[name] for name, parameter in base.named_parameters())


def test_a_base_in_memory_is_as_it_was_after_a_file_was_refused(tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_ptune_model(base, PTuneConfig(method="p_tuning_v2", num_virtual_tokens=3))
    model.save_pretrained(tmp_path / "adapter")
    before = state_of(model.unwrap(), "gpt2")
    file = tmp_path / "adapter" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        notes = opened.metadata()
    save_file(load_file(file) | {"backbone.transformer.ln_f.weight": torch.ones(32)}, file, metadata=notes)
    with pytest.raises(PTuneError):
        PTuneForCausalLM.from_pretrained(tmp_path / "adapter", backbone=base)
    assert state_of(base, "gpt2") == before


def test_a_wrapper_that_another_has_followed_gives_nothing_back() -> None:
    base = build("llama")
    trained = state_of(base, "llama")[1]
    config = PTuneConfig(method="p_tuning_v2", num_virtual_tokens=3)
    first = get_ptune_model(base, config)
    second = get_ptune_model(base, config)
    now = state_of(second, "llama")
    for _ in range(2):
        assert first.unwrap() is base
        assert state_of(second, "llama") == now
    assert state_of(second.unwrap(), "llama")[1] == trained


def test_an_unwrapped_model_is_told_so(wrap: Wrap) -> None:
    model = wrap("llama", "prefix_tuning")
    model.unwrap()
    calls: tuple[Callable[[], Any], ...] = (
        lambda: model.generate(**{k: v for k, v in batch("llama").items() if k != "labels"}),
        model.flatten,
        lambda: model(**batch("llama")),
    )
    for call in calls:
        with pytest.raises(PTuneError, match="no longer holds its backbone"):
            call()


def test_an_adapter_of_peft_inside_is_refused(wrap: Wrap) -> None:
    model = wrap("llama", "p_tuning_v2")
    with pytest.raises(PTuneError, match="would not be saved with the prompt"):
        model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    assert model.prompt is not None and all(p.requires_grad for p in model.prompt.parameters())


@pytest.mark.parametrize(
    "options",
    [{"num_virtual_tokens": value} for value in (4.0, "4", True, None)] + [{"method": None}, {"layers": "0"}],
)
def test_options_of_a_wrong_type_are_refused_as_others_are(options: dict[str, Any]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ConfigError, match=f"'{name}'.* got {type(value).__name__} ") as refused:
        PTuneConfig(**options)
    with pytest.raises(ConfigError, match="describes no adapter .*; restore config.json") as read:
        PTuneConfig.from_dict(options)
    assert str(refused.value) in str(read.value)


def test_options_that_nothing_reads_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("hf_ptune.wrapping.logger.warning", said.append)
    with pytest.raises(ConfigError, match="did you mean 'num_virtual_tokens'"):
        get_ptune_model(build("llama"), PTuneConfig(method="p_tuning_v2", num_virtual_token=5))
    get_ptune_model(build("llama"), PTuneConfig(method="p_tuning_v2", finetuning_task="sst2", vocab_size=99))
    assert [message.split(":")[0] for message in said] == ["PTuneConfig has no option 'finetuning_task'"]


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        ("p_tuning", {}, True),
        ("p_tuning", {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1}, True),
        ("p_tuning", {"encoder_reparameterization_type": "LSTM"}, False),
        ("prefix_tuning", {}, False),
        ("p_tuning_v2", {}, True),
        ("bitfit", {}, True),
    ],
)
def test_a_dropout_that_nothing_reads_is_told(
    method: str, options: dict[str, Any], told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("hf_ptune.wrapping.logger.warning", said.append)
    config = PTuneConfig(method=method, num_virtual_tokens=3, encoder_dropout=0.1, **options)
    get_ptune_model(build("bert"), config)
    assert [message.split(":")[0] for message in said] == ["encoder_dropout=0.1 changes nothing"] * told


def test_an_offloaded_base_trains(tmp_path: Path) -> None:
    base = build("llama").float()
    base.save_pretrained(tmp_path / "base")
    devices: dict[str, str] = {name: "cpu" for name, _ in base.model.named_children()} | {"layers.1": "disk"}
    devices.pop("layers")
    places = {f"model.{n}": d for n, d in (devices | {"layers.0": "cpu"}).items()} | {"lm_head": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=places, offload_folder=str(tmp_path / "off")
    )
    model = get_ptune_model(loaded, PTuneConfig(method="p_tuning_v2", num_virtual_tokens=3))
    before = {n: t.clone() for n, t in model.adapter_state_dict().items()}
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=1, report_to="none", use_cpu=True, save_strategy="no"
    )
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4
    Trainer(model, arguments, train_dataset=rows).train()
    assert any(not torch.equal(before[n], t) for n, t in model.adapter_state_dict().items())


@pytest.mark.parametrize(("family", "method"), [("bert", "p_tuning_v2"), ("bert", "p_tuning"), ("llama", "p_tuning")])
def test_tracing_is_refused_in_words_and_export_works(family: str, method: str, wrap: Wrap) -> None:
    model, inputs = wrap(family, method), {k: v for k, v in batch(family).items() if k != "labels"}
    model.backbone.config.use_cache = False  # torch.export knows no outputs of that type
    with torch.no_grad():
        with pytest.raises(InjectionError, match=r"torch\.jit\.trace.*torch\.export"):
            torch.jit.trace(model, tuple(inputs.values()), strict=False)
        exported = torch.export.export(model, (), inputs, strict=False).module()
        assert torch.allclose(exported(**inputs).logits, model(**inputs).logits, atol=1e-9)


@pytest.mark.parametrize("method", ["p_tuning_v2", "prompt_tuning", "p_tuning"])
def test_an_export_leaves_the_batch_open(method: str, wrap: Wrap) -> None:
    model, inputs = wrap("bert", method), {k: v for k, v in batch("bert").items() if k != "labels"}
    rows = torch.export.Dim("rows", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes={n: {0: rows} for n in inputs}, strict=False)
        more = {name: torch.cat([value, value.flip(0)[:1]]) for name, value in inputs.items()}
        assert torch.allclose(program.module()(**more).logits, model(**more).logits, atol=1e-9)


@pytest.mark.parametrize("method", ["p_tuning_v2", "prompt_tuning"])
def test_an_export_has_no_kernel_of_one_device(method: str, wrap: Wrap) -> None:
    """Where keys have fewer heads than queries, runtimes take torch's general attention alone."""
    model, inputs = wrap("llama", method), {k: v for k, v in batch("llama").items() if k != "labels"}
    model.backbone.config.use_cache = False
    with torch.no_grad():
        expected = model(**inputs).logits  # what it remembers of a call is not exported
        program = torch.export.export(model, (), inputs, strict=False)
        assert "flash_attention_for_cpu" not in str(program.graph)
        assert torch.allclose(program.module()(**inputs).logits, expected, atol=1e-9)


def test_without_its_prompt_a_model_is_traced(wrap: Wrap) -> None:
    model, inputs = wrap("bert", "p_tuning_v2"), batch("bert")["input_ids"]
    with torch.no_grad(), model.disable_adapter():
        traced = torch.jit.trace(model, (inputs,), strict=False)
        assert torch.allclose(traced(inputs)["logits"], model(inputs).logits, atol=1e-9)
