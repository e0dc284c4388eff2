"""What heads over tokens read beside a token's own state: those of its two neighbours in the row."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DECODERS, ENCODERS, assert_checkpoints_change_no_gradient, batch, build, compiles_several_hooks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_layer_mix import inputs_of
from test_train import write_base, write_recipe
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    BigBirdConfig,
    DynamicCache,
    GPT2Config,
    UMT5Config,
    XLNetConfig,
    XLNetForQuestionAnswering,
)

from hf_ptune import PTuneConfig, PTuneModel, PTunePreTrainedModel, get_ptune_model
from hf_ptune.errors import ConfigError, InjectionError
from hf_ptune.info import describe_adapter
from hf_ptune.injection import HeadWindow
from hf_ptune.interop import prompt_embeds, save_peft
from hf_ptune.recipe import make_recipe
from hf_ptune.train import run

Wrap = Callable[..., PTunePreTrainedModel]
PROMPTED = ["prompt_tuning", "p_tuning", "p_tuning_v2", "prefix_tuning"]
TASKS = ["TOKEN_CLS", "QUESTION_ANS"]
# transformers has no head of some tasks for these
CASES = [(family, "TOKEN_CLS") for family in (*ENCODERS, *DECODERS)]
CASES += [(family, "QUESTION_ANS") for family in (*ENCODERS, *DECODERS) if family != "gemma2"]


def windowed(wrap: Wrap, family: str, method: str, task: str = "TOKEN_CLS", **options: Any) -> PTunePreTrainedModel:
    """A wrapped model whose window is no longer zero."""
    model = wrap(family, method, task, head_window="neighbours", **options)
    torch.manual_seed(5)
    with torch.no_grad():
        model.window.weight.normal_(std=4)
    return model


def logits_of(output: Any) -> Tensor:
    if "logits" in output:
        return output.logits
    return torch.stack([output.start_logits, output.end_logits], -1)


def head_of(model: PTunePreTrainedModel) -> nn.Linear:
    """The layer that makes a token's logits, found by its name."""
    names = ("classifier", "score", "qa_outputs")
    return next(getattr(model.backbone, n) for n in names if hasattr(model.backbone, n))


def by_hand(model: PTunePreTrainedModel, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits of one row without pads, token by token, and the gradients of their squares.

    The head's own inputs are taken where the head takes them; what it makes of them is made here.
    """
    seen: list[Tensor] = []
    head = head_of(model)
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(input_ids=ids[None])
    handle.remove()
    (states,) = seen
    rows = []
    for place in range(len(ids)):
        logits = head.weight @ states[0, place] + (0 if head.bias is None else head.bias)
        if place > 0:
            logits = logits + model.window.weight[0] @ states[0, place - 1] / 4
        if place + 1 < len(ids):
            logits = logits + model.window.weight[1] @ states[0, place + 1] / 4
        rows.append(logits)
    logits = torch.stack(rows)
    return logits, list(torch.autograd.grad(logits.square().sum(), trained(model)))


def trained(model: PTunePreTrainedModel) -> list[nn.Parameter]:
    prompt = [p for p in model.prompt.parameters() if p.requires_grad]
    return [model.window.weight, head_of(model).weight, *prompt]


@pytest.mark.parametrize(("family", "task"), CASES)
@pytest.mark.parametrize("method", PROMPTED)
def test_equals_the_window_by_hand(family: str, task: str, method: str, wrap: Wrap) -> None:
    """Logits and gradients of every row by itself, token by token, and of the batch, whose rows are padded."""
    model = windowed(wrap, family, method, task)
    ids = batch(family)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    logits = logits_of(model(input_ids=ids, attention_mask=mask))
    found = list(torch.autograd.grad(logits[mask.bool()].square().sum(), trained(model)))
    expected = [torch.zeros_like(g) for g in found]
    for row, real, own in zip(ids, mask.bool(), logits, strict=True):
        wanted, gradients = by_hand(model, row[real])
        assert torch.allclose(own[real], wanted, atol=1e-9)
        expected = [a + b for a, b in zip(expected, gradients, strict=True)]
    for mine, theirs in zip(found, expected, strict=True):
        # norms of decoders compute in float32
        assert theirs.abs().sum() > 0 and (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(("family", "task"), CASES)
def test_it_starts_as_without_it(family: str, task: str, wrap: Wrap) -> None:
    model = wrap(family, "p_tuning_v2", task, head_window="neighbours")
    plain = wrap(family, "p_tuning_v2", task)
    tensors = model.adapter_state_dict()
    assert set(tensors) - set(plain.adapter_state_dict()) == {"window.weight"}
    plain.load_adapter_state_dict({n: t for n, t in tensors.items() if n != "window.weight"})
    ids = batch(family)["input_ids"]
    assert torch.equal(logits_of(model(input_ids=ids)), logits_of(plain(input_ids=ids)))


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_the_side_of_padding_changes_nothing(family: str, method: str, wrap: Wrap) -> None:
    model, ids = windowed(wrap, family, method), batch(family)["input_ids"][:1]
    pads, own = ids.new_zeros(1, 2), torch.ones_like(ids)
    alone = model(input_ids=ids).logits
    for parts in ([(pads, ids), (pads, own)], [(ids, pads), (own, pads)]):
        row, mask = (torch.cat(p, 1) for p in parts)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found = model(input_ids=row, attention_mask=mask, position_ids=positions).logits
        assert torch.allclose(found[mask.bool()], alone[0], atol=1e-9)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_texts_that_share_a_row_are_no_neighbours(method: str, wrap: Wrap) -> None:
    model = windowed(wrap, "llama", method)
    texts = [t["input_ids"][:1] for t in (batch("llama", length=3), batch("llama", length=5))]
    positions = torch.cat([torch.arange(3), torch.arange(5)])[None]
    packed = model(input_ids=torch.cat(texts, 1), position_ids=positions, use_cache=False).logits
    assert torch.allclose(packed, torch.cat([model(input_ids=t).logits for t in texts], 1), atol=1e-9)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("task", TASKS)
def test_other_ways_to_call_it(family: str, task: str, wrap: Wrap) -> None:
    model, ids = windowed(wrap, family, "p_tuning_v2", task), batch(family)["input_ids"]
    expected = logits_of(model(input_ids=ids))
    embedded = model.get_input_embeddings()(ids)
    assert torch.allclose(logits_of(model(inputs_embeds=embedded)), expected, atol=1e-12)
    listed = model(input_ids=ids, return_dict=False)
    assert torch.equal(listed[0], expected if task == "TOKEN_CLS" else expected[..., 0])
    one = ids[:, :1]
    assert torch.allclose(logits_of(model(input_ids=one)), head_alone(model, one), atol=1e-9)
    with pytest.raises(InjectionError, match=r"neighbours needs \[B, S\]"):
        model(input_ids=ids, attention_mask=torch.ones(2, 1, ids.shape[1], ids.shape[1]))


def head_alone(model: PTunePreTrainedModel, ids: Tensor) -> Tensor:
    kept = model.window.weight.detach().clone()
    with torch.no_grad():
        model.window.weight.zero_()
        logits = logits_of(model(input_ids=ids))
        model.window.weight.copy_(kept)
    return logits


@pytest.mark.parametrize("family", [*ENCODERS, "llama", "gpt2"])
def test_turned_off_or_taken_away_the_base_reads_as_before(family: str, wrap: Wrap) -> None:
    model, ids = windowed(wrap, family, "p_tuning_v2"), batch(family)["input_ids"]
    expected = build(family, "TOKEN_CLS")
    named = next(n for n, m in model.backbone.named_modules() if m is head_of(model))
    expected.get_submodule(named).load_state_dict(head_of(model).state_dict())
    wanted = expected.double().eval()(input_ids=ids).logits
    with_it = model(input_ids=ids).logits
    with model.disable_adapter(), torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-9)
    assert torch.equal(model(input_ids=ids).logits, with_it)
    assert torch.allclose(model.unwrap()(input_ids=ids).logits, wanted, atol=1e-9)


def test_only_the_adapter_trains_and_all_of_it(wrap: Wrap) -> None:
    model = wrap("bert", "p_tuning_v2", "TOKEN_CLS", head_window="neighbours", head_states="mix").train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(**inputs_of("bert")).loss.backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == model.adapter_parameter_names() >= {"mix.weight", "window.weight", "prompt.weight"}


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2", "prefix_tuning"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(family: str, method: str, reentrant: bool, wrap: Wrap) -> None:
    model = windowed(wrap, family, method).train()
    model.backbone.dropout.p = 0.0  # of the head, which its family's configuration sets by itself
    assert_checkpoints_change_no_gradient(model, inputs_of(family), reentrant)


@pytest.mark.parametrize(
    ("family", "task", "method", "asked", "has"),
    [
        ("bert", "TOKEN_CLS", "p_tuning_v2", None, "token"),
        ("bert", "TOKEN_CLS", "p_tuning_v2", "token", "token"),
        ("bert", "TOKEN_CLS", "p_tuning_v2", "auto", "neighbours"),
        ("roberta", "QUESTION_ANS", "prompt_tuning", "auto", "neighbours"),
        ("llama", "TOKEN_CLS", "prefix_tuning", "auto", "neighbours"),
        ("bert", "TOKEN_CLS", "bitfit", "auto", "token"),
        ("bert", "SEQ_CLS", "p_tuning_v2", "auto", "token"),
        ("bert", "MULTIPLE_CHOICE", "p_tuning_v2", "auto", "token"),
        ("bert", "MASKED_LM", "p_tuning_v2", "auto", "token"),
        ("llama", None, "p_tuning_v2", "auto", "token"),
        ("bart", "QUESTION_ANS", "p_tuning_v2", "auto", "token"),
    ],
)
def test_who_has_it(family: str, task: str | None, method: str, asked: Any, has: str, wrap: Wrap) -> None:
    model = wrap(family, method, task, head_window=asked)
    assert model.config.head_window == has and (model.window is None) == (has == "token")


@pytest.mark.parametrize(
    ("family", "task", "options"),
    [
        ("bart", "QUESTION_ANS", {"method": "p_tuning_v2"}),
        ("t5", None, {"method": "prompt_tuning"}),
        ("bert", "SEQ_CLS", {"method": "p_tuning_v2"}),
        ("bert", "TOKEN_CLS", {"method": "bitfit"}),
    ],
)
def test_refused_where_no_head_reads_tokens(family: str, task: str | None, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="head_window='neighbours'"):
        get_ptune_model(build(family, task), PTuneConfig(**options, head_window="neighbours"))


def test_a_head_of_several_layers_reads_as_it_does() -> None:
    """XLNet's own head for answers looks for the start, and for the end given the start."""
    small = {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 37}
    backbone = XLNetForQuestionAnswering(XLNetConfig(**small, start_n_top=2, end_n_top=2))
    config = PTuneConfig(method="p_tuning_v2", num_virtual_tokens=4, head_window="auto")
    model = get_ptune_model(backbone, config)
    assert model.config.head_window == "token"
    with pytest.raises(ConfigError, match="XLNetForQuestionAnswering has no such head"):
        get_ptune_model(model.unwrap(), PTuneConfig(method="p_tuning_v2", head_window="neighbours"))


@pytest.mark.parametrize(("task", "field"), [("TOKEN_CLS", "logits"), ("QUESTION_ANS", "end_logits")])
def test_what_comes_behind_the_layer_is_seen(task: str, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = build("bert", task)
    forward = type(backbone).forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output[field] = output[field] * 2
        return output

    monkeypatch.setattr(type(backbone), "forward", scaled)
    config = PTuneConfig(method="p_tuning_v2", num_virtual_tokens=4, head_window="auto")
    model = get_ptune_model(backbone, config)
    assert model.config.head_window == "token"
    with pytest.raises(ConfigError, match="does not answer what its (classifier|qa_outputs) gives. Leave it out"):
        get_ptune_model(model.unwrap(), PTuneConfig(method="p_tuning_v2", head_window="neighbours"))


def test_sparse_attention_stays_sparse() -> None:
    """BigBird turns to full attention for good where it meets a short row, as a trial is."""
    small = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sparse = BigBirdConfig(**small, intermediate_size=37, attention_type="block_sparse", block_size=4)
    config = PTuneConfig(method="prompt_tuning", num_virtual_tokens=4, head_window="auto")
    model = get_ptune_model(AutoModelForTokenClassification.from_config(sparse), config)
    assert model.config.head_window == "neighbours" and model.backbone.bert.attention_type == "block_sparse"


def test_encoders_of_a_family_with_decoders_have_it() -> None:
    """UMT5's encoders say of themselves that they have a decoder."""
    small = UMT5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    config = PTuneConfig(method="p_tuning_v2", num_virtual_tokens=4, head_window="neighbours")
    assert get_ptune_model(AutoModelForTokenClassification.from_config(small), config).window is not None


def test_xlnet_s_own_mask_is_read() -> None:
    small = XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=37)
    config = PTuneConfig(method="p_tuning_v2", num_virtual_tokens=4, head_window="neighbours")
    model = get_ptune_model(AutoModelForTokenClassification.from_config(small).double(), config).eval()
    torch.nn.init.normal_(model.window.weight, std=4)
    ids, mask = torch.randint(5, 99, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, :2] = 0
    named, inverted = model(input_ids=ids, attention_mask=mask), model(input_ids=ids, input_mask=1 - mask)
    assert torch.allclose(named.logits, inverted.logits, atol=1e-9)


def test_rows_that_cannot_have_neighbours_are_refused(wrap: Wrap) -> None:
    model, ids = windowed(wrap, "llama", "p_tuning_v2"), batch("llama")["input_ids"]
    cache = DynamicCache(config=model.backbone.config)
    first = model(input_ids=ids[:, :4], past_key_values=cache, use_cache=True)  # an empty one holds nothing
    assert torch.isfinite(first.logits).all() and cache.get_seq_length() > 0
    with pytest.raises(InjectionError, match="goes on from a cache .* Train with head_window='token'"):
        model(input_ids=ids[:, 4:], past_key_values=cache, use_cache=True)
    masks = {"full_attention": None, "sliding_attention": None}
    with pytest.raises(InjectionError, match=r"attention_mask is a dict; .* Train with head_window='token'"):
        model(input_ids=ids, attention_mask=masks)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model(attention_mask=torch.ones_like(ids))


def test_a_head_that_takes_another_one_s_place_has_it(wrap: Wrap, tmp_path: Path) -> None:
    model, ids = windowed(wrap, "bert", "p_tuning_v2"), batch("bert")["input_ids"]
    expected, old = model(input_ids=ids).logits, model.backbone.classifier
    model.backbone.classifier = copy.deepcopy(old)
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert not old._forward_hooks
    model.save_pretrained(tmp_path)
    loaded = AutoModelForTokenClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.allclose(loaded(input_ids=ids).logits, expected, atol=1e-5)
    model.backbone.classifier = nn.Linear(32, 5).double()
    with pytest.raises(InjectionError, match="classifier gives 5 logits of 32 .* gives 2 of 32.*head_window='token'"):
        model(input_ids=ids)
    model.backbone.classifier = old
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert not model.unwrap().classifier._forward_hooks


def test_a_head_is_copied_alone(wrap: Wrap) -> None:
    head = windowed(wrap, "bert", "p_tuning_v2").backbone.classifier
    states = torch.randn(2, 7, 32, dtype=torch.float64)
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(twin(states), head(states))


def test_a_head_on_another_device_than_the_ids(wrap: Wrap) -> None:
    """Only shapes: `meta` stands for a second device."""
    window = HeadWindow("classifier", 3, 8).to("meta")
    adjacent = torch.ones(2, 4, dtype=torch.bool)
    assert window(torch.zeros(2, 5, 8, device="meta"), adjacent).shape == (2, 5, 3)


def test_a_word_that_is_none_of_its_values() -> None:
    with pytest.raises(ConfigError, match="expected 'token', 'neighbours', 'auto'"):
        PTuneConfig(head_window="sentence")


@pytest.mark.parametrize(("family", "task"), [("bert", "TOKEN_CLS"), ("llama", "QUESTION_ANS")])
@pytest.mark.parametrize("method", PROMPTED)
@pytest.mark.parametrize("flatten", [False, True])
def test_survives_the_disk(family: str, task: str, method: str, flatten: bool, wrap: Wrap, tmp_path: Path) -> None:
    model, ids = windowed(wrap, family, method, task), batch(family)["input_ids"]
    model.save_pretrained(tmp_path, flatten=flatten)
    auto = AutoModelForTokenClassification if task == "TOKEN_CLS" else AutoModelForQuestionAnswering
    loaded = auto.from_pretrained(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(logits_of(loaded(input_ids=ids)), logits_of(model(input_ids=ids)), atol=1e-5)
    assert "the head reads a token's neighbours too" in describe_adapter(str(tmp_path))
    if task == "QUESTION_ANS":
        return
    body = PTuneModel.from_pretrained(tmp_path)
    assert body.config.head_window == "token" and body.window is None


@pytest.mark.parametrize("value", ["auto", None])
def test_adapters_that_do_not_name_it_read_tokens_alone(value: str | None, wrap: Wrap, tmp_path: Path) -> None:
    wrap("bert", "p_tuning_v2", "TOKEN_CLS").save_pretrained(tmp_path)
    weights, settings = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = load_file(weights)
    with safe_open(weights, "pt") as file:
        beside = file.metadata()
    structure, config = json.loads(beside["ptune"]), json.loads(settings.read_text())
    for place in (structure, config):
        assert place.pop("head_window") == "token"
        place |= {} if value is None else {"head_window": value}
    save_file(tensors, weights, beside | {"ptune": json.dumps(structure)})
    settings.write_text(json.dumps(config))
    model = AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert model.config.head_window == "token" and model.window is None


def test_other_labels_start_a_window_anew(wrap: Wrap, tmp_path: Path) -> None:
    model = windowed(wrap, "bert", "p_tuning_v2")
    model.save_pretrained(tmp_path)
    load = AutoModelForTokenClassification.from_pretrained
    fresh = load(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert fresh.window.weight.shape == (2, 5, 32) and not fresh.window.weight.any()
    assert torch.allclose(fresh.prompt.weight.double(), model.prompt.weight, atol=1e-6)
    assert torch.isfinite(fresh(input_ids=batch("bert")["input_ids"]).logits).all()


def test_other_formats_have_no_such_head(wrap: Wrap, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="head_window='token'"):
        save_peft(wrap("bert", "p_tuning_v2", "TOKEN_CLS", head_window="neighbours"), tmp_path / "peft")
    with pytest.raises(ConfigError, match="head_window='token'"):
        prompt_embeds(wrap("bert", "prompt_tuning", "TOKEN_CLS", head_window="neighbours"))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_copies_have_their_own(family: str, wrap: Wrap) -> None:
    model, ids = windowed(wrap, family, "p_tuning_v2"), batch(family)["input_ids"]
    expected = model(input_ids=ids).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.allclose(twin(input_ids=ids).logits, expected, atol=1e-12)
        with torch.no_grad():
            twin.window.weight.zero_()
        assert not torch.allclose(twin(input_ids=ids).logits, expected, atol=1e-3)
    assert torch.equal(model(input_ids=ids).logits, expected)


@compiles_several_hooks
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_it_is_compiled_whole(family: str, wrap: Wrap) -> None:
    model, ids = windowed(wrap, family, "p_tuning_v2"), batch(family)["input_ids"]
    expected = model(input_ids=ids).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(input_ids=ids).logits, expected, atol=1e-9)


def test_half_precision_keeps_its_weights_whole() -> None:
    backbone = build("bert", "TOKEN_CLS").to(torch.bfloat16)
    config = PTuneConfig(method="p_tuning_v2", num_virtual_tokens=4, head_window="neighbours")
    model = get_ptune_model(backbone, config)
    assert model.window.weight.dtype == torch.float32
    assert model(input_ids=batch("bert")["input_ids"]).logits.dtype == torch.bfloat16


def test_a_head_that_reads_fewer_states_than_tokens(wrap: Wrap) -> None:
    model = windowed(wrap, "bert", "p_tuning_v2")
    model.backbone.dropout.register_forward_hook(lambda module, args, output: output[:, 1:])
    with pytest.raises(InjectionError, match="Train with head_window='token'"):
        model(input_ids=batch("bert")["input_ids"])


def test_presets_of_papers_read_tokens_alone() -> None:
    from hf_ptune.presets import preset, preset_names

    assert {preset(name).options["head_window"] for name in preset_names()} == {"token"}
    small = GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4)
    assert PTuneConfig(base_config=small.to_dict()).head_window is None


@pytest.mark.parametrize(("family", "task"), [("bert", "TOKEN_CLS"), ("llama", "TOKEN_CLS"), ("bert", "QUESTION_ANS")])
def test_recipes_train_it(family: str, task: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", family, task)
    content = write_recipe(tmp_path, task, base, "p_tuning_v2")
    content["training"] |= {"max_steps": 3}
    outcome = run(make_recipe(content, folder=tmp_path))
    auto = AutoModelForTokenClassification if task == "TOKEN_CLS" else AutoModelForQuestionAnswering
    model = auto.from_pretrained(outcome.folder)
    assert model.config.head_window == "neighbours" and model.window.weight.abs().sum() > 0
    card = (outcome.folder / "README.md").read_text()
    assert "| `head_window` | neighbours |" in card
    content["options"] |= {"head_window": "token"}
    plain = auto.from_pretrained(run(make_recipe(content, folder=tmp_path)).folder)
    assert plain.config.head_window == "token" and plain.window is None


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_an_export_leaves_the_batch_open(family: str, wrap: Wrap) -> None:
    model = windowed(wrap, family, "p_tuning_v2")
    model.backbone.config.use_cache = False  # torch.export knows no outputs of that type
    inputs = {n: t for n, t in batch(family).items() if n in ("input_ids", "attention_mask")}
    rows = torch.export.Dim("rows", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes={n: {0: rows} for n in inputs}, strict=False)
        more = {n: t for n, t in batch(family, rows=3).items() if n in inputs}
        more["attention_mask"][1, -2:] = 0
        assert torch.allclose(program.module()(**more).logits, model(**more).logits, atol=1e-9)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_vmap_over_rows_gives_the_gradients_of_each(family: str, wrap: Wrap) -> None:
    model, ids = windowed(wrap, family, "p_tuning_v2"), batch(family)["input_ids"]
    weights = {"window.weight": model.window.weight.detach()}

    def size(given: dict[str, Tensor], row: Tensor) -> Tensor:
        output: Tensor = functional_call(model, given, (), {"input_ids": row[None]}).logits
        return output.square().sum()

    found = vmap(grad(size), in_dims=(None, 0))(weights, ids)["window.weight"]
    for row, mine in zip(ids, found, strict=True):
        (expected,) = torch.autograd.grad(model(input_ids=row[None]).logits.square().sum(), model.window.weight)
        assert torch.allclose(mine, expected, rtol=1e-5)
