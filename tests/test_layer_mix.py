"""What heads over the tokens of an encoder read: a trained mix of the states of all layers."""

import pickle
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ENCODERS, assert_checkpoints_change_no_gradient, batch, build, compiles_several_hooks
from torch import Tensor
from transformers import (
    AlbertConfig,
    AutoConfig,
    AutoModelForTokenClassification,
    BigBirdConfig,
    ElectraConfig,
    FunnelConfig,
    MPNetConfig,
    PretrainedConfig,
    XLNetConfig,
)

from hf_ptune import PTuneConfig, PTunePreTrainedModel, get_ptune_model
from hf_ptune.errors import ConfigError, InjectionError
from hf_ptune.info import describe_adapter
from hf_ptune.interop import prompt_embeds, save_peft

Wrap = Callable[..., PTunePreTrainedModel]
PROMPTED = ["prompt_tuning", "p_tuning", "p_tuning_v2", "prefix_tuning"]


def mixed(wrap: Wrap, family: str, method: str, task: str = "TOKEN_CLS", **options: Any) -> PTunePreTrainedModel:
    """A wrapped model whose mix is no longer the mean."""
    model = wrap(family, method, task, head_states="mix", **options)
    torch.manual_seed(5)
    with torch.no_grad():
        model.mix.weight.normal_()
        model.mix.scale.fill_(1.7)
    return model


def weighed(model: PTunePreTrainedModel, states: Sequence[Tensor]) -> Any:
    """The states of all layers in the shares that a model's mix has."""
    weights = torch.exp(model.mix.weight) / torch.exp(model.mix.weight).sum()
    return sum(w * s for w, s in zip(weights, states, strict=True)) * model.mix.scale


def without_mix(wrap: Wrap, model: PTunePreTrainedModel, family: str, task: str, **options: Any) -> Any:
    """A model with the same prompt and head whose head reads the last states."""
    plain = wrap(family, model.config.method, task, **options)
    plain.load_adapter_state_dict({n: t for n, t in model.adapter_state_dict().items() if not n.startswith("mix.")})
    return plain


def by_hand(model: PTunePreTrainedModel, plain: PTunePreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the states that the plain model gives out, weighed here and put through its head."""
    total = weighed(model, plain(**inputs, output_hidden_states=True).hidden_states)
    head = plain.backbone.qa_outputs if hasattr(plain.backbone, "qa_outputs") else plain.backbone.classifier
    if hasattr(plain.backbone, "head"):  # ModernBERT has a layer before it
        total = plain.backbone.head(total)
    return head(total)


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("method", PROMPTED)
def test_equals_the_mix_by_hand(family: str, method: str, wrap: Wrap) -> None:
    """The states of a model without the mix, weighed by hand: logits, and the gradient of every parameter."""
    model = mixed(wrap, family, method)
    plain = without_mix(wrap, model, family, "TOKEN_CLS")
    inputs = {n: t for n, t in batch(family).items() if n in ("input_ids", "attention_mask")}
    inputs["attention_mask"][1, -2:] = 0
    found, expected = model(**inputs).logits, by_hand(model, plain, inputs)
    assert torch.allclose(found, expected, atol=1e-9)
    assert not torch.allclose(found, plain(**inputs).logits, atol=1e-3)
    mix = list(model.mix.parameters())
    gradients = [
        torch.autograd.grad(logits.square().sum(), [*mix, *(p for p in m.prompt.parameters() if p.requires_grad)])
        for m, logits in ((model, found), (plain, expected))
    ]
    for mine, theirs in zip(*gradients, strict=True):
        assert theirs.abs().sum() > 0 and torch.allclose(mine, theirs, atol=1e-7)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_spans_can_be_read_off_it(method: str, wrap: Wrap) -> None:
    model = mixed(wrap, "bert", method, "QUESTION_ANS")
    plain = without_mix(wrap, model, "bert", "QUESTION_ANS")
    inputs = {"input_ids": batch("bert")["input_ids"]}
    output, expected = model(**inputs), by_hand(model, plain, inputs)
    assert torch.allclose(torch.stack([output.start_logits, output.end_logits], -1), expected, atol=1e-9)


def test_it_starts_as_the_mean_of_all_layers(wrap: Wrap) -> None:
    model = wrap("bert", "p_tuning_v2", "TOKEN_CLS", head_states="mix")
    ids = batch("bert")["input_ids"]
    states = model.backbone.bert(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(states) == 3
    assert torch.allclose(model(input_ids=ids).logits, model.backbone.classifier(sum(states) / 3), atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_padding_changes_nothing(side: str, method: str, wrap: Wrap) -> None:
    model, ids = mixed(wrap, "bert", method), batch("bert")["input_ids"][:1]
    pads, own = ids.new_zeros(1, 2), torch.ones_like(ids)
    parts = [(pads, ids), (pads, own)] if side == "left" else [(ids, pads), (own, pads)]
    row, mask = (torch.cat(p, 1) for p in parts)
    found = model(input_ids=row, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    kept = found[:, 2:] if side == "left" else found[:, :-2]
    assert torch.allclose(kept, model(input_ids=ids).logits, atol=1e-9)


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "distilbert"])
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_what_a_caller_asks_for_is_given(family: str, method: str, wrap: Wrap) -> None:
    model = mixed(wrap, family, method)
    plain = without_mix(wrap, model, family, "TOKEN_CLS")
    ids = batch(family)["input_ids"]
    bare = model(input_ids=ids)
    assert "hidden_states" not in bare and bare.hidden_states is None
    states, theirs = (m(input_ids=ids, output_hidden_states=True).hidden_states for m in (model, plain))
    assert len(states) == len(theirs) and all(torch.equal(a, b) for a, b in zip(states, theirs, strict=True))
    listed = model(input_ids=ids, return_dict=False)
    assert isinstance(listed, tuple) and len(listed) == 1 and torch.equal(listed[0], bare.logits)
    listed = model(input_ids=ids, return_dict=False, output_hidden_states=True)
    assert len(listed) == 2 and len(listed[1]) == len(states)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, bare.logits)


def test_states_of_single_layers(wrap: Wrap) -> None:
    model, ids = mixed(wrap, "bert", "p_tuning_v2"), batch("bert")["input_ids"]
    every = model.backbone.bert(input_ids=ids, output_hidden_states=True).hidden_states
    for asked, there in ((1, {1}), ([0, -1], {0, 2})):
        some = model.backbone.bert(input_ids=ids, output_hidden_states=asked).hidden_states
        assert {n for n, s in enumerate(some) if s is not None} == there
        assert all(torch.equal(some[n], every[n]) for n in there)


@pytest.mark.parametrize("family", ENCODERS)
def test_turned_off_or_taken_away_the_base_reads_as_before(family: str, wrap: Wrap) -> None:
    model, ids = mixed(wrap, family, "p_tuning_v2"), batch(family)["input_ids"]
    expected = build(family, "TOKEN_CLS")
    expected.classifier.load_state_dict(model.backbone.classifier.state_dict())
    wanted = expected.double().eval()(input_ids=ids).logits
    with model.disable_adapter(), torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-9)
    backbone = model.unwrap()
    assert torch.allclose(backbone(input_ids=ids).logits, wanted, atol=1e-9)


def test_only_the_adapter_trains_and_all_of_it(wrap: Wrap) -> None:
    model = mixed(wrap, "bert", "p_tuning_v2").train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(**inputs_of("bert")).loss.backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == model.adapter_parameter_names() >= {"mix.weight", "mix.scale", "prompt.weight"}


def inputs_of(family: str) -> dict[str, Tensor]:
    """A batch with a tag for every token."""
    inputs = batch(family)
    return inputs | {"labels": inputs["input_ids"] % 2}


_SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FURTHER: dict[str, PretrainedConfig] = {
    "albert, whose layers share their weights": AlbertConfig(**_SMALL, embedding_size=16, intermediate_size=37),
    "electra, whose embeddings are narrower": ElectraConfig(**_SMALL, embedding_size=16, intermediate_size=37),
    "mpnet": MPNetConfig(**_SMALL, intermediate_size=37),
    "xlnet, which has another order of axes": XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=37),
}


@pytest.mark.parametrize("name", FURTHER)
def test_further_encoders(name: str) -> None:
    torch.manual_seed(0)
    backbone = AutoModelForTokenClassification.from_config(FURTHER[name]).double().eval()
    ids = torch.randint(5, 99, (2, 6))
    config = PTuneConfig(method="p_tuning_v2", num_virtual_tokens=4, head_states="mix")
    model = get_ptune_model(backbone, config).eval()
    states = model.backbone.base_model(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.allclose(model(input_ids=ids).logits, model.backbone.classifier(sum(states) / len(states)), atol=1e-9)


@pytest.mark.parametrize(
    ("family", "task", "method", "asked", "has"),
    [
        ("bert", "TOKEN_CLS", "p_tuning_v2", None, "last"),
        ("bert", "TOKEN_CLS", "p_tuning_v2", "auto", "mix"),
        ("roberta", "TOKEN_CLS", "prompt_tuning", "auto", "mix"),
        ("bert", "TOKEN_CLS", "prefix_tuning", "last", "last"),
        ("bert", "TOKEN_CLS", "bitfit", "auto", "last"),
        ("bert", "QUESTION_ANS", "p_tuning_v2", "auto", "last"),
        ("bert", "SEQ_CLS", "p_tuning_v2", "auto", "last"),
        ("bert", "MASKED_LM", "p_tuning_v2", "auto", "last"),
        ("gpt2", "TOKEN_CLS", "p_tuning_v2", "auto", "last"),
    ],
)
def test_who_has_it(family: str, task: str, method: str, asked: Any, has: str, wrap: Wrap) -> None:
    model = wrap(family, method, task, head_states=asked)
    assert model.config.head_states == has and (model.mix is None) == (has == "last")


@pytest.mark.parametrize(
    ("family", "task", "options"),
    [
        ("gpt2", "TOKEN_CLS", {"method": "p_tuning_v2"}),
        ("t5", None, {"method": "prompt_tuning"}),
        ("bert", "SEQ_CLS", {"method": "p_tuning_v2"}),
        ("bert", "TOKEN_CLS", {"method": "bitfit"}),
    ],
)
def test_refused_where_there_is_no_mix(family: str, task: str | None, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="head_states='mix'"):
        get_ptune_model(build(family, task), PTuneConfig(**options, head_states="mix"))


def test_a_body_whose_layers_have_other_lengths() -> None:
    small = {"vocab_size": 99, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 37}
    backbone = AutoModelForTokenClassification.from_config(FunnelConfig(**small, num_decoder_layers=1))
    with pytest.raises(ConfigError, match="FunnelForTokenClassification is none of these"):
        get_ptune_model(backbone, PTuneConfig(method="p_tuning_v2", num_virtual_tokens=4, head_states="mix"))
    auto = PTuneConfig(method="p_tuning_v2", num_virtual_tokens=4, head_states="auto")
    assert get_ptune_model(backbone, auto).config.head_states == "last"


def test_rows_of_whole_blocks_are_left_alone() -> None:
    """Inner states of sparse attention have more places than the row has tokens."""
    sparse = BigBirdConfig(**_SMALL, intermediate_size=37, attention_type="block_sparse", block_size=4)
    backbone = AutoModelForTokenClassification.from_config(sparse)
    config = PTuneConfig(method="prompt_tuning", num_virtual_tokens=4, head_states="auto")
    model = get_ptune_model(backbone, config)
    assert model.config.head_states == "last" and backbone.bert.attention_type == "block_sparse"
    with pytest.raises(ConfigError, match="head_states='mix'"):
        get_ptune_model(model.unwrap(), PTuneConfig(method="prompt_tuning", head_states="mix"))


def test_layers_of_unlike_size_are_mixed_only_where_asked() -> None:
    backbone = build("modernbert", "TOKEN_CLS")
    with torch.no_grad():
        backbone.model.layers[1].mlp.Wo.weight.mul_(100)  # as residual streams grow that are normalised at the end
    config = PTuneConfig(method="p_tuning_v2", num_virtual_tokens=4, head_states="auto")
    model = get_ptune_model(backbone, config)
    assert model.config.head_states == "last"
    config = PTuneConfig(method="p_tuning_v2", num_virtual_tokens=4, head_states="mix")
    assert get_ptune_model(model.unwrap(), config).config.head_states == "mix"


@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
def test_it_can_be_pickled_and_its_base_too(family: str, wrap: Wrap) -> None:
    """transformers leaves hooks that cannot be, where states are asked for."""
    model, ids = mixed(wrap, family, "p_tuning_v2"), batch(family)["input_ids"]
    expected = model(input_ids=ids).logits
    twin = pickle.loads(pickle.dumps(model))
    for whole in (twin, model):
        assert torch.allclose(whole(input_ids=ids).logits, expected, atol=1e-12)
    states = model.unwrap()(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(states) == 3
    wrapped = get_ptune_model(model.backbone, PTuneConfig(method="p_tuning_v2", num_virtual_tokens=4))
    wrapped(input_ids=ids, output_hidden_states=True)
    assert pickle.loads(pickle.dumps(wrapped.unwrap())).config.model_type == family


@pytest.mark.parametrize(
    "option",
    [
        {"head_states": "mix"},
        {"pooling": "mean"},
        {"head_states": "mix", "pooling": "mean"},
        {"head_window": "neighbours"},
    ],
)
def test_threads_do_not_disturb_each_other(option: dict[str, str], wrap: Wrap) -> None:
    task = "SEQ_CLS" if "pooling" in option else "TOKEN_CLS"
    model = wrap("bert", "p_tuning_v2", task, **option)
    if model.window is not None:
        torch.nn.init.normal_(model.window.weight)
    rows = [batch("bert", length=length)["input_ids"] for length in (5, 7, 9)]
    with torch.no_grad():
        alone = [model(input_ids=ids).logits for ids in rows]
    wrong: list[Any] = []

    def run(ids: Tensor, expected: Tensor, states: bool) -> None:
        for _ in range(30):
            try:
                with torch.no_grad():
                    output = model(input_ids=ids, output_hidden_states=states)
                if not torch.allclose(output.logits, expected, atol=1e-12) or (output.hidden_states is None) == states:
                    wrong.append(ids.shape)
            except Exception as error:
                wrong.append(error)

    given = zip(rows * 2, alone * 2, [True, False, False, False, True, True], strict=True)
    threads = [threading.Thread(target=run, args=args) for args in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@compiles_several_hooks
def test_it_is_compiled_whole(wrap: Wrap) -> None:
    model, ids = mixed(wrap, "bert", "p_tuning_v2"), batch("bert")["input_ids"]
    expected = model(input_ids=ids).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(input_ids=ids).logits, expected, atol=1e-9)


def test_a_word_that_is_none_of_its_values() -> None:
    with pytest.raises(ConfigError, match="expected 'last', 'mix'"):
        PTuneConfig(head_states="first")


@pytest.mark.parametrize("method", PROMPTED)
@pytest.mark.parametrize("flatten", [False, True])
def test_survives_the_disk(method: str, flatten: bool, wrap: Wrap, tmp_path: Path) -> None:
    model, inputs = mixed(wrap, "bert", method), batch("bert")
    model.save_pretrained(tmp_path, flatten=flatten)
    loaded = AutoModelForTokenClassification.from_pretrained(tmp_path, dtype=torch.float64)
    ids = {"input_ids": inputs["input_ids"]}
    with torch.no_grad():
        assert torch.allclose(loaded(**ids).logits, model(**ids).logits, atol=1e-5)
    assert "the head reads a mix of all layers" in describe_adapter(str(tmp_path))


def test_adapters_that_do_not_name_it_read_the_last_states(wrap: Wrap, tmp_path: Path) -> None:
    wrap("bert", "p_tuning_v2", "TOKEN_CLS").save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert '"head_states": "last"' in text
    (tmp_path / "config.json").write_text(text.replace('"head_states": "last"', '"head_states": "auto"'))
    assert AutoModelForTokenClassification.from_pretrained(tmp_path).config.head_states == "last"


def test_other_formats_have_no_such_mix(wrap: Wrap, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="head_states='last'"):
        save_peft(wrap("bert", "p_tuning_v2", "TOKEN_CLS", head_states="mix"), tmp_path / "peft")
    with pytest.raises(ConfigError, match="head_states='last'"):
        prompt_embeds(wrap("bert", "prompt_tuning", "TOKEN_CLS", head_states="mix"))


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2", "prefix_tuning"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(method: str, reentrant: bool, wrap: Wrap) -> None:
    model, inputs = mixed(wrap, "bert", method).train(), inputs_of("bert")
    assert_checkpoints_change_no_gradient(model, inputs, reentrant)


def test_checkpoints_around_hooks_are_refused(wrap: Wrap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions of transformers that checkpoint a layer's call record states inside, without a graph."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    def call(layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return torch.nn.Module.__call__(layer, *args, **kwargs)

    monkeypatch.setattr(GradientCheckpointingLayer, "__call__", call, raising=False)
    model = mixed(wrap, "bert", "p_tuning_v2").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**inputs_of("bert")).loss.backward()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(InjectionError, match="use_reentrant"):
        model(**inputs_of("bert"))


def test_half_precision_keeps_the_mix_whole() -> None:
    backbone = build("bert", "TOKEN_CLS").to(torch.bfloat16)
    model = get_ptune_model(backbone, PTuneConfig(method="p_tuning_v2", num_virtual_tokens=4, head_states="mix"))
    assert model.mix.weight.dtype == torch.float32
    assert model(input_ids=batch("bert")["input_ids"]).logits.dtype == torch.bfloat16


def test_layers_fewer_than_the_mix_was_made_for(wrap: Wrap) -> None:
    model = mixed(wrap, "bert", "p_tuning_v2")
    del model.backbone.bert.encoder.layer[1]
    with pytest.raises(InjectionError, match="head_states='last'"):
        model(input_ids=batch("bert")["input_ids"])


def test_presets_of_papers_read_the_last_states() -> None:
    from hf_ptune.presets import preset, preset_names

    assert {preset(name).options["head_states"] for name in preset_names()} == {"last"}
    assert AutoConfig.for_model("ptune").head_states is None
