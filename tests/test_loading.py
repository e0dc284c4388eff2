"""Loading and saving: every trap of wrapping a base, each with its test."""

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import batch, build
from safetensors.torch import load_file, save_file
from tokenizers_of import tokenizer_of
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    CanineConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.utils.import_utils import direct_transformers_import

from hf_ptune import PTuneConfig, PTuneForCausalLM, PTunePreTrainedModel, get_ptune_model
from hf_ptune.backbone import TASKS
from hf_ptune.cards import RunFacts
from hf_ptune.errors import AdapterFileError, BackboneError, ConfigError, TaskError
from hf_ptune.facts import facts_of
from hf_ptune.injection import body_of
from hf_ptune.interop import save_peft

Wrap = Callable[..., PTunePreTrainedModel]


@pytest.fixture
def adapter(wrap: Wrap, tmp_path: Path) -> Path:
    wrap("llama", "p_tuning_v2").save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_base_weights_and_buffers_are_the_base_s(adapter: Path, base_folder: Any) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(adapter)
    base = AutoModelForCausalLM.from_pretrained(base_folder("llama"))
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, loaded.backbone.state_dict()[name]), name
    for name, buffer in base.named_buffers():
        assert torch.equal(buffer, dict(loaded.backbone.named_buffers())[name]), name


def test_the_causal_mask_is_intact(adapter: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(adapter)
    ids = batch("llama")["input_ids"]
    changed = ids.clone()
    changed[:, -1] = 4
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits[:, :-1], loaded(changed).logits[:, :-1])


def t5_encoder() -> PreTrainedModel:
    return T5EncoderModel(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))


def llava() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    seeing = CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=16, **sizes)
    text = LlamaConfig(vocab_size=64, **sizes)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=seeing, text_config=text, image_token_index=63))


@pytest.mark.parametrize("method", ["p_tuning_v2", "prompt_tuning"])
@pytest.mark.parametrize(("make", "auto"), [(t5_encoder, AutoModel), (llava, AutoModelForCausalLM)])
def test_bases_that_their_auto_class_would_not_make(
    make: Callable[[], PreTrainedModel], auto: Any, method: str, tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path / "base")
    base = type(make()).from_pretrained(tmp_path / "base")
    model = get_ptune_model(base, PTuneConfig(method=method, num_virtual_tokens=3)).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = auto.from_pretrained(tmp_path / "adapter").eval()
    assert type(loaded.backbone) is type(base)
    ids = torch.randint(3, 60, (2, 5))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids)[0], model(input_ids=ids)[0])
    assert type(auto.from_config(loaded.config).backbone) is type(base)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_attention_reaches_the_base(attention: str, adapter: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(adapter, attn_implementation=attention)
    assert loaded.backbone.config._attn_implementation == attention
    assert loaded.config._attn_implementation == attention


def test_the_precision_that_a_base_was_brought_to_comes_back(base_folder: Any, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(base_folder("llama"), dtype=torch.float32).to(torch.bfloat16)
    get_ptune_model(base, PTuneConfig(num_virtual_tokens=4)).save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert loaded.dtype == torch.bfloat16
    loaded.to(torch.float16).save_pretrained(tmp_path / "b")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b").dtype == torch.float16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32).dtype == torch.float32


def test_a_head_in_half_precision_is_told_in_python_too(caplog: pytest.LogCaptureFixture) -> None:
    get_ptune_model(build("bert"), PTuneConfig(num_virtual_tokens=4))
    assert "small steps are lost" not in caplog.text
    get_ptune_model(build("llama").to(torch.bfloat16), PTuneConfig(num_virtual_tokens=4))  # trains its prompt alone
    assert "small steps are lost" not in caplog.text
    get_ptune_model(build("bert").to(torch.bfloat16), PTuneConfig(num_virtual_tokens=4))
    assert "its head, biases or weights) is in torch.bfloat16, in which small steps are lost" in caplog.text


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForMultipleChoice, AutoModel])
def test_a_fresh_pooler_is_kept(auto: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a base that was trained on masked words alone, which has none."""
    build("bert", "MASKED_LM").save_pretrained(tmp_path / "base")
    model = get_ptune_model(auto.from_pretrained(tmp_path / "base"), PTuneConfig(num_virtual_tokens=4)).eval()
    assert "has no pooler" in caplog.text and "pooler" in (model.config.modules_to_save or [])
    model.save_pretrained(tmp_path / "adapter")
    loaded = auto.from_pretrained(tmp_path / "adapter")
    theirs = dict(loaded.named_parameters())
    assert all(torch.equal(p, theirs[n]) for n, p in model.named_parameters())
    caplog.clear()
    build("bert", "FEATURE_EXTRACTION").save_pretrained(tmp_path / "whole")  # has one
    assert get_ptune_model(auto.from_pretrained(tmp_path / "whole"), PTuneConfig()).config.modules_to_save is None
    assert get_ptune_model(build("bert"), PTuneConfig()).config.modules_to_save is None  # nothing was loaded
    assert "has no pooler" not in caplog.text


def test_what_an_option_of_loading_cannot_change_is_told(adapter: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(adapter, num_virtual_tokens=7)
    assert loaded.config.num_virtual_tokens == 4 and "says num_virtual_tokens=7 (it is 4)" in caplog.text
    caplog.clear()
    AutoModelForCausalLM.from_pretrained(adapter)
    assert "weights tell" not in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bf16"}, "or correct what was given besides: dtype"),
        ({"nonsense": 3}, "or correct what was given for it: nonsense"),
        ({"variant": "fp16"}, "or correct what was given for it: variant"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str, adapter: Path) -> None:
    with pytest.raises((BackboneError, ConfigError), match=message):
        AutoModelForCausalLM.from_pretrained(adapter, **options)


def test_an_adapter_of_another_task_is_refused(adapter: Path) -> None:
    for load in (AutoModelForSequenceClassification.from_pretrained, lambda a: pipeline("text-classification", str(a))):
        with pytest.raises(TaskError, match="'CAUSAL_LM' on a LlamaForCausalLM, not SEQ_CLS: load it by AutoModelForC"):
            load(adapter)  # pipelines would go on to the class that config.json names, and read logits as their own


BODIES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("bert", "SEQ_CLS", "p_tuning_v2", {}),
    ("bert", "MULTIPLE_CHOICE", "p_tuning", {}),
    ("bert", "TOKEN_CLS", "bitfit", {}),  # without a pooler
    ("bert", "MASKED_LM", "prefix_tuning", {}),
    ("deberta-v2", "SEQ_CLS", "prompt_tuning", {}),
    ("distilbert", "QUESTION_ANS", "bitfit", {}),
    ("llama", "CAUSAL_LM", "p_tuning_v2", {"modules_to_save": ["lm_head", "norm"]}),
    ("llama", "CAUSAL_LM", "p_tuning_v2", {"modules_to_save": ["lm_head"]}),
    ("gpt2", "CAUSAL_LM", "prompt_tuning", {"train_backbone": True}),
    ("t5", "SEQ_2_SEQ_LM", "p_tuning_v2", {"modules_to_save": ["shared"]}),  # one without a model inside
    ("bart", "SEQ_CLS", "bitfit", {}),
]


@pytest.mark.parametrize(("family", "task", "method", "options"), BODIES)
def test_hidden_states_are_those_under_the_model_of_the_task(
    family: str, task: str, method: str, options: Any, wrap: Wrap, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = wrap(family, method, task, pooling="cls", **options)
    with torch.no_grad():
        for name in model.adapter_parameter_names():  # whatever of the base is trained
            if name.startswith("backbone."):
                model.get_parameter(name).add_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    config = AutoConfig.from_pretrained(tmp_path / "adapter")
    loaded = AutoModel.from_pretrained(tmp_path / "adapter", config=config)
    assert f"was trained for '{task}'; its head is left out" in caplog.text and config.task == task
    caplog.clear()
    loaded.save_pretrained(tmp_path / "body")
    again = AutoModel.from_pretrained(tmp_path / "body")
    assert not caplog.text and type(again.backbone) is type(loaded.backbone)
    inputs = {k: v for k, v in batch(family).items() if k != "labels"} | {"output_hidden_states": True}
    inputs |= {"decoder_input_ids": inputs["input_ids"][:, :3]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        states = [m(**inputs) for m in (body_of(model.backbone), loaded, again)]
    names = [n for n in states[0] if n.endswith("hidden_states")]
    for one in states[1:]:
        assert all(torch.equal(a, b) for n in names for a, b in zip(states[0][n], one[n], strict=True))
        assert torch.equal(one.last_hidden_state, states[0][names[-1 if "hidden_states" in names else 0]][-1])
    assert not any(part in n for n in loaded.adapter_parameter_names() for part in ("classif", "lm_head", "outputs"))


@pytest.mark.parametrize("options", [{"pooling": "mean"}, {"pooling": "mean", "head_states": "mix"}])
def test_what_a_head_reads_changes_no_hidden_states(options: Any, wrap: Wrap, tmp_path: Path) -> None:
    model, plain = wrap("bert", "p_tuning_v2", **options), wrap("bert", "p_tuning_v2", pooling="cls")
    model.save_pretrained(tmp_path)
    tokenizer_of("wordpiece").save_pretrained(tmp_path)
    plain.prompt.load_state_dict(model.prompt.state_dict())
    ids = tokenizer_of("wordpiece")("a b c", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = plain.backbone.bert(ids)
        found = AutoModel.from_pretrained(tmp_path)(ids)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(found.pooler_output, expected.pooler_output)
    features = pipeline("feature-extraction", str(tmp_path), tokenizer=tokenizer_of("wordpiece"))("a b c")
    assert torch.allclose(torch.tensor(features, dtype=torch.float64), expected.last_hidden_state)


@pytest.mark.parametrize(("family", "task"), [("bert", "TOKEN_CLS"), ("roberta", "SEQ_CLS")])
def test_a_body_s_pooler_that_nobody_trained_is_kept(
    family: str, task: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And nobody is told that it has been."""
    build(family, "MASKED_LM").save_pretrained(tmp_path / "base")
    whole = TASKS[task].from_pretrained(tmp_path / "base")
    get_ptune_model(whole, PTuneConfig(method="bitfit")).save_pretrained(tmp_path / "adapter")
    body = AutoModel.from_pretrained(tmp_path / "adapter")
    assert "nor the checkpoint" in caplog.text and "is drawn anew and untrained" in caplog.text
    assert "is trained" not in caplog.text and body.config.modules_to_save == ["pooler"]
    body.save_pretrained(tmp_path / "body")
    again = dict(AutoModel.from_pretrained(tmp_path / "body").named_parameters())
    assert all(torch.equal(p, again[n]) for n, p in body.named_parameters())


def test_another_model_s_hidden_states_are_refused(tmp_path: Path) -> None:
    """An encoder alone tags; AutoModel would bring its decoder along."""
    build("t5", "TOKEN_CLS").save_pretrained(tmp_path / "base")
    tagger = AutoModelForTokenClassification.from_pretrained(tmp_path / "base")
    get_ptune_model(tagger, PTuneConfig(num_virtual_tokens=3)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(TaskError, match=r"T5Model, which AutoModel.*load it by AutoModelForTokenClassification"):
        AutoModel.from_pretrained(tmp_path / "adapter")
    build("bart", "SEQ_2_SEQ_LM").float().save_pretrained(tmp_path / "whole")
    for method in ("p_tuning_v2", "bitfit"):
        decoder = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
        get_ptune_model(decoder, PTuneConfig(method=method)).save_pretrained(tmp_path / method)
        with pytest.raises(TaskError, match=r"BartModel, which AutoModel.*load it by AutoModelForCausalLM"):
            AutoModel.from_pretrained(tmp_path / method)
    # its last layer is read by no head that classifies, and has no prefix there
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    hashes = {"num_hash_buckets": 64, "num_hash_functions": 4, "local_transformer_stride": 8}
    small = CanineConfig(**sizes, **hashes, downsampling_rate=4, upsampling_kernel_size=3)
    model = get_ptune_model(AutoModelForSequenceClassification.from_config(small), PTuneConfig(num_virtual_tokens=3))
    model.save_pretrained(tmp_path / "canine")
    with pytest.raises(TaskError, match="not FEATURE_EXTRACTION: load it by AutoModelForSequenceClassification"):
        AutoModel.from_pretrained(tmp_path / "canine")


@pytest.mark.parametrize(("family", "given"), [("bert", "SEQ_CLS"), ("roberta", "MASKED_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_a_head_in_memory_gives_no_hidden_states(family: str, given: str, base_folder: Any, tmp_path: Path) -> None:
    """The message names what does."""
    base = AutoModelForSequenceClassification.from_pretrained(base_folder(family, "SEQ_CLS"))
    get_ptune_model(base, PTuneConfig(num_virtual_tokens=3)).save_pretrained(tmp_path)
    whole = build(family, given)
    with pytest.raises(BackboneError, match=f"is a {type(whole).__name__}, but .* without a head.*leave backbone out"):
        AutoModel.from_pretrained(tmp_path, backbone=whole)
    inputs = {"input_ids": torch.tensor([[5]])} | ({"decoder_input_ids": torch.tensor([[5]])} if family == "t5" else {})
    bodies = {"backbone": AutoModel.from_pretrained(base_folder(family, "SEQ_CLS"))}, {}
    with torch.no_grad():
        first, second = (AutoModel.from_pretrained(tmp_path, **body)(**inputs)[0] for body in bodies)
    assert torch.equal(first, second)


@pytest.mark.parametrize("auto", [AutoModelForMaskedLM, AutoModelForSeq2SeqLM])
def test_a_class_that_does_two_tasks_loads_by_both(auto: Any, base_folder: Any, tmp_path: Path) -> None:
    base = AutoModelForMaskedLM.from_pretrained(base_folder("bart"))
    model = get_ptune_model(base, PTuneConfig(num_virtual_tokens=3)).eval()
    model.save_pretrained(tmp_path / "adapter")
    config = AutoConfig.from_pretrained(tmp_path / "adapter")
    loaded = auto.from_pretrained(tmp_path / "adapter", config=config)
    assert loaded.config.task == loaded.task and config.task == model.task == "SEQ_2_SEQ_LM"
    loaded.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        for again in (loaded, *(a.from_pretrained(tmp_path / "again") for a in (auto, AutoModelForSeq2SeqLM))):
            assert torch.equal(again(**batch("bart")).logits, model(**batch("bart")).logits)
    with pytest.raises(TaskError, match="'SEQ_2_SEQ_LM' on a BartForC.*, not SEQ_CLS: load it by AutoModelForSeq2SeqL"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")


def test_dtype_and_device_map_reach_the_base(adapter: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(adapter, dtype=torch.bfloat16, device_map="cpu")
    assert loaded.dtype == torch.bfloat16 and loaded.prompt.weight.dtype == torch.float32
    with torch.no_grad():
        assert torch.isfinite(loaded(**batch("llama")).logits).all()


@pytest.mark.parametrize("method", ["p_tuning_v2", "prefix_tuning", "prompt_tuning", "p_tuning"])
def test_word_embeddings_may_be_offloaded_to_the_disk(method: str, base_folder: Any, tmp_path: Path) -> None:
    parts = {"model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    placed = parts | {"model.embed_tokens": "disk", "lm_head": "cpu"}
    found = []
    for options in ({}, {"device_map": placed, "offload_folder": str(tmp_path)}):
        base = LlamaForCausalLM.from_pretrained(base_folder("llama"), **options)
        torch.manual_seed(0)
        model = get_ptune_model(base, PTuneConfig(method=method, num_virtual_tokens=4)).eval()
        found.append(model(**batch("llama")).logits)
        assert next(model.prompt.parameters()).device.type == "cpu"
    assert torch.allclose(found[0], found[1], atol=1e-6)
    save_peft(model, tmp_path / "peft")
    model.train()
    ids = batch("llama")["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.prompt.parameters())


def test_tied_weights_stay_tied(wrap: Wrap, tmp_path: Path) -> None:
    wrap("gpt2", "p_tuning_v2").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_the_live_config_is_not_shared(wrap: Wrap) -> None:
    model = wrap("llama", "p_tuning_v2")
    assert model.config.base is not model.backbone.config
    assert model.backbone.config._attn_implementation == "sdpa"


def test_loading_twice_by_class_and_by_config(adapter: Path) -> None:
    config = AutoConfig.from_pretrained(adapter)
    assert isinstance(config, PTuneConfig)
    by_class = PTuneForCausalLM.from_pretrained(adapter)
    by_config = AutoModelForCausalLM.from_pretrained(adapter, config=config)
    inputs = batch("llama")
    with torch.no_grad():
        assert torch.equal(by_class(**inputs).logits, by_config(**inputs).logits)


def test_transformers_has_the_classes_that_configurations_name(adapter: Path) -> None:
    """As `transformers serve` looks them up, in a module that may have been made before or after ours."""
    before = sys.modules["transformers"]
    again = direct_transformers_import(str(Path(transformers.__file__).parent))
    sys.modules["transformers"] = before
    name = AutoConfig.from_pretrained(adapter).architectures[0]
    for module in (before, again):
        assert getattr(module, name) is PTuneForCausalLM
        assert not hasattr(module, "PTuneForNothing") and module.AutoConfig is AutoConfig
    assert not hasattr(transformers.models, name)


def test_a_trained_adapter_trains_on(adapter: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(adapter).train()
    loaded(**batch("llama")).loss.backward()
    assert {n for n, p in loaded.named_parameters() if p.grad is not None} == {"prompt.weight"}


def test_head_and_labels_come_back(wrap: Wrap, tmp_path: Path) -> None:
    backbone = build("bert", num_labels=3, id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})
    backbone.save_pretrained(tmp_path / "base")
    encoder: PreTrainedModel = type(backbone).from_pretrained(tmp_path / "base")
    model = get_ptune_model(encoder, PTuneConfig(num_virtual_tokens=3))
    with torch.no_grad():
        model.backbone.classifier.weight.fill_(0.25)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"} and loaded.config.num_labels == 3
    assert (loaded.backbone.classifier.weight == 0.25).all()


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("of", [lambda m: (m.prompt, "weight"), lambda m: (m.backbone.classifier, "weight")])
@pytest.mark.parametrize(
    ("make", "undo"),
    [
        (lambda m, n: register_parametrization(m, n, nn.Tanh()), remove_parametrizations),
        (lambda m, n: parametrizations.weight_norm(m, n), remove_parametrizations),
        (lambda m, n: nn.utils.weight_norm(m, n), nn.utils.remove_weight_norm),
        (lambda m, n: prune.l1_unstructured(m, n, 0.5), prune.remove),
    ],
)
def test_parameters_made_of_others_are_refused_before_writing(
    make: Any, undo: Any, of: Any, wrap: Wrap, tmp_path: Path
) -> None:
    model, inputs = wrap("bert", "p_tuning_v2"), batch("bert")
    module, name = of(model)
    make(module, name)
    expected = model(**inputs).logits
    with pytest.raises(AdapterFileError, match="made of others.*plain"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    undo(module, name)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert torch.allclose(loaded(**inputs).logits, expected, atol=1e-9)


def test_what_is_no_part_of_an_adapter_may_be_made_of_others(wrap: Wrap, tmp_path: Path) -> None:
    model = wrap("bert", "p_tuning_v2")
    parametrizations.weight_norm(model.backbone.bert.encoder.layer[0].output.dense)
    model.save_pretrained(tmp_path / "adapter")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kept", [None, ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_embeddings_that_are_not_saved_are_told_before_they_are_lost(
    when: str, kept: list[str] | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build("llama").float().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if when == "before":
        base.resize_token_embeddings(105)
    model = get_ptune_model(base, PTuneConfig(num_virtual_tokens=3, modules_to_save=kept))
    if when == "after":
        model.resize_token_embeddings(105)
    missing = [n for n in ("embed_tokens", "lm_head") if n not in (kept or [])]
    told = f"base' 99: of the new ones {', '.join(missing)} would not be saved"
    assert (told in caplog.text) is (when == "after" and missing != [])
    caplog.clear()
    for _ in range(2):
        model.save_pretrained(tmp_path / "adapter")
    assert caplog.text.count(told) == bool(missing)
    assert ("modules_to_save=['embed_tokens', 'lm_head']" in caplog.text) is (missing != [])


def test_a_vocabulary_of_the_base_or_cut_short_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build("llama").float().save_pretrained(tmp_path / "base")
    model = get_ptune_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), PTuneConfig(num_virtual_tokens=3))
    model.save_pretrained(tmp_path / "adapter")
    model.resize_token_embeddings(90)
    model.save_pretrained(tmp_path / "adapter")
    assert "tokens" not in caplog.text


@pytest.mark.parametrize("given", ["options", "config"])
def test_other_labels_take_a_fresh_head_where_that_is_asked_for(
    given: str, base_folder: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(base_folder("bert", "SEQ_CLS"))
    saved = get_ptune_model(base, PTuneConfig(num_virtual_tokens=3))
    saved.save_pretrained(tmp_path)
    options: dict[str, Any] = {"num_labels": 3}
    if given == "config":
        options = {"config": AutoConfig.from_pretrained(tmp_path, num_labels=3)}
    with pytest.raises(AdapterFileError, match="ignore_mismatched_sizes=True"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, **options)
    if given == "config":
        options = {"config": AutoConfig.from_pretrained(tmp_path, num_labels=3)}
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, ignore_mismatched_sizes=True, output_loading_info=True, **options
    )
    names = {f"backbone.classifier.{n}" for n in ("weight", "bias")}
    assert {key[0] for key in info["mismatched_keys"]} == names and all(n in caplog.text for n in names)
    assert torch.equal(model.prompt.weight, saved.prompt.weight)
    assert model.config.num_labels == model.num_labels == 3
    assert model(**batch("bert")).logits.shape == (2, 3)
    assert names < model.adapter_parameter_names()
    model.save_pretrained(tmp_path / "new")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "new")
    assert torch.equal(loaded.backbone.classifier.weight, model.backbone.classifier.weight)


def test_a_prompt_of_another_shape_is_no_matter_of_other_labels(base_folder: Any, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(base_folder("bert", "SEQ_CLS"))
    get_ptune_model(base, PTuneConfig(num_virtual_tokens=3)).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"prompt.weight": torch.zeros(3, 5)}))
    with pytest.raises(AdapterFileError, match="other shapes"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_resized_vocabulary_loads(when: str, base_folder: Any, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(base_folder("llama"))
    if when == "before":
        base.resize_token_embeddings(105)
    model = get_ptune_model(base, PTuneConfig(num_virtual_tokens=3)).eval()
    if when == "after":
        model.resize_token_embeddings(105)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == loaded.backbone.config.vocab_size == 105
    with torch.no_grad():
        found, expected = loaded(**batch("llama")).logits, model(**batch("llama")).logits
    assert found.shape[-1] == 105 and torch.allclose(found[..., :99], expected[..., :99], atol=1e-6)


def test_loading_info(adapter: Path) -> None:
    _, info = AutoModelForCausalLM.from_pretrained(adapter, output_loading_info=True)
    assert not any(info.values())


def rewrite(adapter: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(adapter / "model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "model.safetensors")


BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (lambda t: t.clear() or t.update(other=torch.zeros(1)), "missing"),
    "unexpected": (lambda t: t.update(extra=torch.zeros(1)), "unexpected"),
    "shape": (lambda t: t.update({"prompt.weight": torch.zeros(3, 2)}), "other shapes"),
    "nan": (lambda t: t["prompt.weight"].fill_(float("nan")), "not finite"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_broken_adapters_are_refused(case: str, adapter: Path) -> None:
    change, message = BROKEN[case]
    rewrite(adapter, change)
    with pytest.raises(AdapterFileError, match=message):
        AutoModelForCausalLM.from_pretrained(adapter)


def test_a_truncated_file_is_refused(adapter: Path) -> None:
    path = adapter / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(AdapterFileError, match="cut short or damaged"):
        AutoModelForCausalLM.from_pretrained(adapter)


def test_a_missing_file_and_a_missing_base_name_are_refused(adapter: Path) -> None:
    settings = json.loads((adapter / "config.json").read_text())
    (adapter / "config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="base_model_name_or_path"):
        AutoModelForCausalLM.from_pretrained(adapter)
    (adapter / "model.safetensors").unlink()
    with pytest.raises(AdapterFileError, match="has no model.safetensors"):
        AutoModelForCausalLM.from_pretrained(adapter)


def test_a_base_of_another_shape_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = build("llama", num_key_value_heads=4)
    other.save_pretrained(tmp_path / "other")
    settings = json.loads((adapter / "config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "other")
    (adapter / "config.json").write_text(json.dumps(settings))
    with pytest.raises(BackboneError, match=r"other. cannot be loaded .*Set base_model_name_or_path"):
        AutoModelForCausalLM.from_pretrained(adapter)


def test_a_model_knows_where_it_came_from_and_no_token(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizer and facts of a run are taken from there when it is pushed."""
    monkeypatch.chdir(adapter.parent)
    loaded = AutoModelForCausalLM.from_pretrained(adapter.name, token="secret")
    assert facts_of(loaded).metrics == [] and loaded.__dict__["_ptune_source"][0] == str(adapter)
    RunFacts("p_tuning_v2", "CAUSAL_LM", metrics=[{"loss": 1.5}]).save(adapter)
    assert facts_of(loaded).metrics == [{"loss": 1.5}]
    with torch.no_grad():
        loaded.prompt.weight.add_(1)
    assert facts_of(loaded).metrics == []
    assert b"secret" not in pickle.dumps(loaded)


def test_the_folder_of_the_base_is_not_overwritten(tmp_path: Path) -> None:
    build("llama").float().save_pretrained(tmp_path / "base")
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    model = get_ptune_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), PTuneConfig(num_virtual_tokens=3))
    with pytest.raises(AdapterFileError, match="is the folder of the base"):
        model.save_pretrained(tmp_path / "base")
    rows = [{k: v[0] for k, v in batch("llama").items()}]
    arguments = TrainingArguments(tmp_path / "base", max_steps=1, report_to=[], use_cpu=True)
    with pytest.raises(AdapterFileError, match="is the folder of the base"):
        Trainer(model, arguments, train_dataset=rows).train()
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before


def test_an_output_folder_may_be_spelt_like_a_base_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = get_ptune_model(build("llama"), PTuneConfig(num_virtual_tokens=3, base_model_name_or_path="org/tiny"))
    rows = [{k: v[0] for k, v in batch("llama").items()}]
    Trainer(model, TrainingArguments("org/tiny", max_steps=1, report_to=[], use_cpu=True), train_dataset=rows).train()
    model.save_pretrained("org/tiny")
    model.save_pretrained("org/tiny")


def test_a_relative_base_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama").float().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = get_ptune_model(AutoModelForCausalLM.from_pretrained("base"), PTuneConfig(num_virtual_tokens=3))
    model.save_pretrained("adapter")
    monkeypatch.chdir("/")
    AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")


def test_a_base_with_an_adapter_of_peft_inside_is_refused() -> None:
    peft = pytest.importorskip("peft")
    base = build("llama")
    try:
        base.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    except ValueError as error:
        pytest.skip(f"this version of transformers takes another PEFT: {error}")
    with pytest.raises(BackboneError, match="has an adapter of PEFT inside"):
        get_ptune_model(base, PTuneConfig(num_virtual_tokens=3))


def test_tensors_that_are_given_come_before_those_of_the_file(adapter: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(adapter)
    state = {n: t + 1 for n, t in model.state_dict().items()}
    loaded = AutoModelForCausalLM.from_pretrained(adapter, state_dict=state)
    assert torch.equal(loaded.prompt.weight, state["prompt.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_bases_that_are_stored_quantised(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    build("llama", hidden_size=64, head_dim=16, intermediate_size=64).float().save_pretrained(tmp_path / "full")
    how = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=how)
    stored.save_pretrained(tmp_path / "base")
    model = get_ptune_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), PTuneConfig(num_virtual_tokens=3))
    model.eval().save_pretrained(tmp_path / "adapter")
    assert "quantization_config" not in (tmp_path / "adapter" / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(loaded(**batch("llama")).logits, model(**batch("llama")).logits, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_backbones(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    build("llama", hidden_size=64, head_dim=16, intermediate_size=64).float().save_pretrained(tmp_path / "base")
    quantisation = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantisation)
    model = get_ptune_model(base, PTuneConfig(num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB"))
    model(**batch("llama")).loss.backward()
    assert model.prompt.weight.grad is not None
    with pytest.raises(ValueError, match="not supported"):
        model.half()  # the base's own words
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", quantization_config=quantisation)
    with torch.no_grad():
        same = torch.allclose(loaded(**batch("llama")).logits, model.eval()(**batch("llama")).logits, atol=1e-4)
    assert same and getattr(loaded.backbone, "is_quantized", False)


# whatever is imported first, the Auto classes have to know ours afterwards
ROOMS = ["backbone", "placement", "interop", "injection", "callbacks", "train", "cli"]


def in_a_fresh_process(*lines: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_a_base_in_four_bits_that_has_answered_gives_gradients(method: str, tmp_path: Path) -> None:
    """Some CPUs' layers pack their weights as soon as they answer, and let no gradient through from then on."""
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    build("llama", **sizes).float().save_pretrained(tmp_path)
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    inputs, found = batch("llama"), []
    for answered in (True, False):
        base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantised)
        with torch.no_grad():
            if answered:
                base(**inputs)
            torch.manual_seed(0)
            model = get_ptune_model(base, PTuneConfig(method=method, num_virtual_tokens=3))
            model.eval()(**inputs)
        model.train()(**inputs).loss.backward()
        found.append(model.prompt.weight.grad)
    # scales of packed weights have been rounded to bfloat16
    assert (found[0] - found[1]).norm() < 0.1 * found[1].norm()


def test_a_loader_of_many_modules_stays_as_it_is() -> None:
    """Transformers' finder of former names loads each by itself; changed for one, it would be changed for all."""
    found = in_a_fresh_process(
        "import hf_ptune, sys, transformers",
        "import transformers.tokenization_utils_fast, transformers.tokenization_utils",
        "print([f for f in sys.meta_path if not isinstance(f, type) and 'exec_module' in vars(f)])",
    )
    assert found.splitlines()[-1] == "[]"


def test_importing_loads_nothing_more_than_transformers_does() -> None:
    found = in_a_fresh_process(
        "import importlib.abc, importlib.machinery, sys, transformers",
        "before = set(sys.modules)",
        "import hf_ptune",
        "print(sorted(set(sys.modules) - before))",
    )
    assert found == "['hf_ptune', 'hf_ptune.auto']"


@pytest.mark.parametrize(
    "lines",
    [
        *((f"import hf_ptune.{room}", "from transformers import AutoModelForCausalLM") for room in ROOMS),
        ("import hf_ptune", "from transformers import AutoModelForCausalLM"),
        ("from transformers import AutoModelForCausalLM", "import hf_ptune"),
        ("from transformers import AutoConfig", "import hf_ptune", "from transformers import AutoModelForCausalLM"),
        ("import hf_ptune.modeling_ptune", "from transformers import AutoModelForCausalLM"),
        ("import hf_ptune.configuration_ptune", "from transformers import AutoModelForCausalLM"),
        ("from hf_ptune import get_ptune_model", "from transformers import AutoModelForCausalLM"),
    ],
)
def test_auto_classes_know_ours_whatever_is_imported_first(lines: tuple[str, ...], wrap: Any, tmp_path: Path) -> None:
    wrap("llama", "p_tuning_v2").save_pretrained(tmp_path)
    load = f"print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)"
    assert in_a_fresh_process(*lines, load) == "PTuneForCausalLM"


@pytest.mark.parametrize(
    "lines",
    [
        ("import hf_ptune", "from transformers import AutoTokenizer"),
        ("import hf_ptune", "from transformers import AutoTokenizer, Trainer"),
        ("import hf_ptune", "from transformers import AutoTokenizer, pipeline"),
        ("import hf_ptune", "from transformers import AutoConfig", "from transformers import AutoTokenizer"),
        ("import hf_ptune", "from transformers import AutoProcessor"),
        ("import hf_ptune", "from transformers import EncoderDecoderModel"),
        ("import transformers", "import hf_ptune", "from transformers import AutoTokenizer"),
    ],
)
def test_auto_classes_and_pipelines_know_ours_when_the_tokenizers_are_imported_first(
    lines: tuple[str, ...], wrap: Wrap, tmp_path: Path
) -> None:
    wrap("bert", "p_tuning_v2", "SEQ_CLS").save_pretrained(tmp_path)
    tokenizer_of("wordpiece").save_pretrained(tmp_path)
    said = in_a_fresh_process(
        *lines,
        "import sys",
        "sys.stderr = sys.stdout",
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline",
        f"folder = {str(tmp_path)!r}",
        "model = AutoModelForSequenceClassification.from_pretrained(folder)",
        "ask = pipeline('text-classification', model=model, tokenizer=AutoTokenizer.from_pretrained(folder))",
        "print(type(model).__name__, len(ask('a')))",
    )
    assert said.splitlines()[-1] == "PTuneForSequenceClassification 1" and "not supported" not in said


@pytest.mark.parametrize(("family", "task"), [("llama", None), ("bert", "SEQ_CLS"), ("bart", None)])
def test_an_adapter_loads_on_a_base_in_memory(family: str, task: str | None, wrap: Wrap, tmp_path: Path) -> None:
    model, inputs = wrap(family, "p_tuning_v2", task), batch(family)
    model.save_pretrained(tmp_path, flatten=True)
    with torch.no_grad():
        expected = model(**inputs).logits
    backbone = model.unwrap()
    loaded = type(model).from_pretrained(tmp_path, backbone=backbone)
    assert loaded.backbone is backbone and not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, expected)


def test_a_base_in_memory_takes_the_labels_and_pads_that_were_saved(wrap: Wrap, tmp_path: Path) -> None:
    model = wrap("gpt2", "p_tuning_v2", "SEQ_CLS")
    names = [f"topic {n}" for n in range(model.config.num_labels)]
    model.config.id2label, model.config.pad_token_id = dict(enumerate(names)), 7
    model.save_pretrained(tmp_path)
    rows = torch.tensor([[5, 6, 9, 8], [5, 6, 7, 7]])
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, backbone=build("gpt2", "SEQ_CLS"))
    assert loaded.config.pad_token_id == loaded.backbone.config.pad_token_id == 7
    assert list(loaded.config.id2label.values()) == list(loaded.backbone.config.id2label.values()) == names
    with torch.no_grad():
        assert torch.allclose(loaded(rows).logits, model(rows).logits, atol=1e-6)
    loaded.save_pretrained(tmp_path / "again")
    assert list(AutoConfig.from_pretrained(tmp_path / "again").id2label.values()) == names


def test_a_base_in_memory_keeps_what_an_adapter_does_not_say(wrap: Wrap, tmp_path: Path) -> None:
    model = wrap("gpt2", "p_tuning_v2", "SEQ_CLS")
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path)
    base = build("gpt2", "SEQ_CLS")
    names = {n: f"topic {n}" for n in range(base.config.num_labels)}
    base.config.pad_token_id, base.config.id2label = 5, names
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, backbone=base)
    assert loaded.backbone.config.pad_token_id == 5 and loaded.backbone.config.id2label == names


def test_another_base_in_memory_is_refused(adapter: Path) -> None:
    with pytest.raises(BackboneError, match="hidden_size 64 instead of 32"):
        PTuneForCausalLM.from_pretrained(adapter, backbone=build("llama", hidden_size=64, num_attention_heads=8))
    for other in (build("gpt2"), build("llama").model):
        with pytest.raises(BackboneError, match="made for a LlamaForC.* is a .*Model. Pass a LlamaForC.*backbone out"):
            PTuneForCausalLM.from_pretrained(adapter, backbone=other)


def test_a_fresh_adapter_tells_where_its_base_came_from(tmp_path: Path) -> None:
    """Trainers that compare with the model that training began from load that by its name."""
    build("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_ptune_model(base, PTuneConfig(method="p_tuning_v2", num_virtual_tokens=2))
    assert model.name_or_path == model.config.name_or_path == str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert "name_or_path" not in json.loads((tmp_path / "adapter" / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert loaded.name_or_path == str(tmp_path / "adapter")


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """An adapter without a tokenizer, and its base that has one."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    build("distilbert", "SEQ_CLS").float().save_pretrained(base)
    tokenizer_of("wordpiece").save_pretrained(base)
    backbone = AutoModelForSequenceClassification.from_pretrained(base)
    get_ptune_model(backbone, PTuneConfig(method="p_tuning_v2")).save_pretrained(adapter)
    return adapter


def test_an_adapter_without_a_tokenizer_has_its_base_s(classifier: Path) -> None:
    said = in_a_fresh_process(
        "import hf_ptune",
        "from transformers import AutoTokenizer, pipeline",
        f"folder = {str(classifier)!r}",
        "tokenizer = AutoTokenizer.from_pretrained(folder, padding_side='left')",
        "ask = pipeline('text-classification', folder)",
        "print(tokenizer.padding_side, tokenizer('good x')['input_ids'] == ask.tokenizer('good x')['input_ids'])",
        "print(tokenizer.tokenize('good x'), ask('good x')[0]['label'][:6])",
    )
    assert said.splitlines()[-2:] == ["left True", "['good', 'x'] LABEL_"]


@pytest.mark.parametrize("named", [True, False])
def test_a_tokenizer_beside_an_adapter_is_taken_before_the_base_s(named: bool, classifier: Path) -> None:
    tokenizer_of("wordpiece", further="further").save_pretrained(classifier)
    if not named:
        (classifier / "tokenizer_config.json").write_text("{}")
    assert AutoTokenizer.from_pretrained(classifier).tokenize("further") == ["further"]
    (classifier / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="Expecting property name"):
        AutoTokenizer.from_pretrained(classifier)


def test_an_adapter_without_a_tokenizer_or_base_says_so(classifier: Path) -> None:
    path = classifier / "config.json"
    settings = json.loads(path.read_text())
    for base in (None, str(classifier)):
        path.write_text(json.dumps(settings | {"base_model_name_or_path": base}))
        with pytest.raises(AdapterFileError, match=r"has no tokenizer.*tokenizer\.save_pretrained"):
            AutoTokenizer.from_pretrained(classifier)


def test_virtual_tokens_of_a_template_come_to_the_base_s_tokenizer(tmp_path: Path) -> None:
    tokenizer, base = tokenizer_of("wordpiece"), tmp_path / "base"
    build("bert", "MASKED_LM").float().save_pretrained(base)
    tokenizer.save_pretrained(base)
    config = PTuneConfig(method="prompt_tuning", template="[P2] {text} [MASK]")
    model = get_ptune_model(AutoModelForMaskedLM.from_pretrained(base), config, tokenizer)
    model.save_pretrained(tmp_path / "adapter")
    found = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert found.convert_tokens_to_ids(["<|prompt_0|>", "<|prompt_1|>"]) == model.config.virtual_token_ids


@pytest.mark.parametrize("trust", [None, False])
def test_a_base_s_code_is_neither_run_nor_asked_about_for_its_tokenizer(
    trust: bool | None, classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody is asked"))
    base = tmp_path / "base"
    (base / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    mapped = {"model_type": "unheard", "auto_map": {"AutoConfig": "code.C", "AutoTokenizer": ["code.T", None]}}
    (base / "config.json").write_text(json.dumps(mapped))
    (base / "tokenizer_config.json").write_text(json.dumps({"auto_map": mapped["auto_map"]}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoTokenizer.from_pretrained(classifier, trust_remote_code=trust)
    assert not (tmp_path / "ran").exists()


def test_no_package_is_run_for_a_base_s_tokenizer(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outer" / "inner" / "x").mkdir(parents=True)
    (tmp_path / "outer" / "__init__.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    (tmp_path / "outer" / "inner" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    path = classifier / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "package:outer.inner/x"}))
    with pytest.raises(BackboneError, match="names no package"):
        AutoTokenizer.from_pretrained(classifier)
    assert not (tmp_path / "ran").exists()


def test_a_base_that_names_its_tokenizer_s_class_gives_its_tokenizer(classifier: Path, tmp_path: Path) -> None:
    for folder, at in ((tmp_path / "base", None), (classifier, "base_config")):
        settings = json.loads((folder / "config.json").read_text())
        (settings if at is None else settings[at])["tokenizer_class"] = "BertTokenizer"
        (folder / "config.json").write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(classifier).tokenize("good x") == ["good", "x"]


def test_a_base_whose_configuration_is_damaged_costs_no_adapter(classifier: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dim": "x"}))
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").exists()


def test_a_copy_of_a_configuration_is_set_by_itself(classifier: Path) -> None:
    config = PTuneConfig.from_pretrained(classifier)
    other = copy.copy(config)
    other.id2label = {0: "a", 1: "b", 2: "c"}
    assert (config.num_labels, config.base.num_labels) == (2, 2) and (other.num_labels, other.base.num_labels) == (3, 3)
