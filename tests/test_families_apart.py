"""Families with habits of their own: gates over all scores, blocks in place of full attention, ids that are read."""

import functools
import unittest.mock
from typing import Any

import pytest
import torch
from families import batch, build
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BigBirdConfig,
    CanineConfig,
    DynamicCache,
    EsmConfig,
    PreTrainedModel,
    UMT5Config,
    UMT5EncoderModel,
    UMT5ForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto import modeling_auto

from hf_ptune import PTuneConfig, get_ptune_model
from hf_ptune.backbone import task_of
from hf_ptune.callbacks import check_batch
from hf_ptune.errors import BackboneError, ConfigError, InjectionError
from hf_ptune.methods.base import join_prefix
from hf_ptune.position_tables import token_room

_SMALL: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def test_a_gate_over_all_scores_sees_the_prefix() -> None:
    """Granite's sinks scale by the log-sum-exp; the base's own keys as a prefix answer as its tokens do."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("granite_swa", **_SMALL, num_key_value_heads=2, sliding_window=64, pad_token_id=0)
    base = AutoModelForCausalLM.from_config(config).double().eval()
    ids = torch.randint(5, 80, (1, 10))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(0, 0.3)
        expected = base(input_ids=ids).logits[:, 4:]
        cache = DynamicCache()
        base(input_ids=ids[:, :4], past_key_values=cache, use_cache=True)
        model = get_ptune_model(base, PTuneConfig(num_virtual_tokens=4)).eval()
        model.prompt.weight.copy_(join_prefix([(layer.keys[0], layer.values[0]) for layer in cache.layers]))
        assert torch.allclose(model(input_ids=ids[:, 4:]).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("attention", "told"), [("sdpa", False), ("eager", False), ("eager", True)])
def test_positions_that_a_base_counts_twice_are_the_prompt_s_too(attention: str, told: bool) -> None:
    """Falcon adds ALiBi to its scores and to its mask, where it attends by itself."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("falcon", **_SMALL, alibi=True, bos_token_id=1, eos_token_id=2)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()
    ids, mask = torch.randint(5, 80, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(0, 0.3)
        model = get_ptune_model(base, PTuneConfig(method="prompt_tuning", num_virtual_tokens=3)).eval()
        prompt = model.prompt.weight[None].expand(2, -1, -1).double()
        with model.disable_adapter():
            rows = {"inputs_embeds": torch.cat([prompt, base.get_input_embeddings()(ids)], 1)}
            rows["attention_mask"] = torch.cat([mask.new_ones(2, 3), mask], 1)
            expected = model.backbone(**rows, output_attentions=told).logits[:, 3:]
        found = model(input_ids=ids, attention_mask=mask, output_attentions=told).logits
    assert torch.allclose(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)


def test_wrapping_leaves_blocks_as_they_were() -> None:
    """BigBird turns to full attention for good where it meets a short row, such as the one that it is tried with."""
    torch.manual_seed(0)
    config = BigBirdConfig(**_SMALL, block_size=4, num_random_blocks=1)
    ids = torch.randint(5, 99, (2, 64))
    base = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        for method in ("prompt_tuning", "bitfit"):
            model = get_ptune_model(base, PTuneConfig(method=method, num_virtual_tokens=4))
            with model.disable_adapter():
                assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-6)
            base = model.unwrap().eval()
        with pytest.raises(BackboneError, match="original_full"):
            get_ptune_model(base, PTuneConfig(method="p_tuning_v2"))
        assert torch.allclose(base(input_ids=ids).logits, expected, atol=1e-6)


def test_masks_that_are_read_off_the_ids_leave_no_room_for_a_prompt() -> None:
    config = EsmConfig(**_SMALL, token_dropout=True, mask_token_id=4, pad_token_id=0)
    with pytest.raises(BackboneError, match="token_dropout"):
        get_ptune_model(AutoModelForMaskedLM.from_config(config), PTuneConfig(method="prompt_tuning"))
    get_ptune_model(AutoModelForMaskedLM.from_config(config), PTuneConfig(method="p_tuning_v2"))


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_a_rotary_encoder_decoder_generates(method: str) -> None:
    part = _SMALL | {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
    config = AutoConfig.for_model("t5gemma", encoder=part, decoder=part, vocab_size=99)
    torch.manual_seed(0)
    model = get_ptune_model(AutoModelForSeq2SeqLM.from_config(config), PTuneConfig(method=method)).eval()
    written = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, min_new_tokens=3, decoder_start_token_id=2)
    assert written.shape == (1, 4)


@pytest.mark.parametrize("family", ["led", "longt5"])
def test_an_encoder_of_windows_that_takes_no_prefix_is_told(family: str) -> None:
    sizes: dict[str, Any] = {"d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
    if family == "led":
        parts = {"layers": 2, "attention_heads": 4, "ffn_dim": 37}
        sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in parts.items()}
        sizes |= {f"max_{side}_position_embeddings": 64 for side in ("encoder", "decoder")} | {"attention_window": 4}
    base = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(family, vocab_size=99, d_model=32, **sizes)).eval()
    with unittest.mock.patch("hf_ptune.wrapping.logger.warning") as said:
        model = get_ptune_model(base, PTuneConfig(num_virtual_tokens=4))
        assert {s["where"] for s in model.config.geometry["sites"]} == {"decoder", "cross"}
        layers = [f"encoder.{'layers' if family == 'led' else 'block'}.{n}" for n in range(2)]
        assert model.config.geometry["skipped"] == layers
        said.assert_called_once_with(f"layers without attention take no prefix: {', '.join(layers)}")
        get_ptune_model(model.unwrap(), PTuneConfig(method="prompt_tuning", num_virtual_tokens=4))  # among the inputs
        said.assert_called_once()


def test_paged_caches_are_refused() -> None:
    model = get_ptune_model(build("llama"), PTuneConfig(num_virtual_tokens=4))
    with pytest.raises(InjectionError, match="generate"):
        model.generate_batch(batch("llama")["input_ids"].tolist())


def test_probabilities_that_are_laid_out_anew_are_reported() -> None:
    """XLNet permutes them by an einsum of one operand."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 37}
    base = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("xlnet", vocab_size=99, **sizes)).eval()
    ids = torch.randint(5, 99, (2, 9))
    with torch.no_grad():
        whole = base(input_ids=ids, output_attentions=True).attentions
        model = get_ptune_model(base, PTuneConfig(num_virtual_tokens=4)).eval()
        output = model(input_ids=ids, output_attentions=True)
        assert torch.equal(output.logits, model(input_ids=ids).logits)
    for found, expected in zip(output.attentions, whole, strict=True):
        assert found.shape == expected.shape == (2, 4, 9, 9)
        assert (found.sum(-1) < expected.sum(-1) - 0.1).all()  # the prefix has the rest


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_layers_that_look_tokens_up_again_take_prefixes_alone(method: str) -> None:
    """Gemma 4 finds the ids of given embeddings, which a prompt does not have."""
    if "gemma4_text" not in CONFIG_MAPPING:
        pytest.skip("this version of transformers has no Gemma 4")
    small = {"vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 8, "num_key_value_heads": 2}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma4_text", **_SMALL, **small, head_dim=8)).eval()
    config = PTuneConfig(method=method, num_virtual_tokens=4)
    if method == "prompt_tuning":
        with pytest.raises(BackboneError, match="reads token ids beside embeddings.*p_tuning_v2"):
            get_ptune_model(base, config)
        assert not base.base_model._forward_hooks and not base.base_model._forward_pre_hooks
        return
    assert get_ptune_model(base, config)(input_ids=torch.arange(6)[None]).logits.shape == (1, 6, 99)


@pytest.mark.parametrize(("family", "method"), [("bert", "prompt_tuning"), ("llama", "p_tuning")])
def test_a_device_that_fails_is_no_fault_of_the_family(family: str, method: str) -> None:
    base, calls = build(family), []
    forward = base.base_model.forward

    @functools.wraps(forward)
    def full(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:  # what follows finding its attention
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    base.base_model.forward = full
    with pytest.raises(torch.OutOfMemoryError):
        get_ptune_model(base, PTuneConfig(method=method, num_virtual_tokens=4))


@pytest.mark.parametrize(
    ("family", "listed", "task"), [("gpt2", "SEQ_TO_SEQ", "CAUSAL_LM"), ("t5", "", "SEQ_2_SEQ_LM")]
)
def test_a_class_that_is_listed_under_two_tasks(
    family: str, listed: str, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = build(family)
    mapping = f"MODEL_FOR_{listed}_CAUSAL_LM_MAPPING_NAMES".replace("__", "_")
    names = dict(getattr(modeling_auto, mapping)) | {family: type(base).__name__}
    monkeypatch.setattr(modeling_auto, mapping, names)
    assert task_of(base) == task


def test_a_base_without_word_embeddings_is_guarded_too() -> None:
    sizes = {"num_hash_buckets": 64, "num_hash_functions": 4, "local_transformer_stride": 8}
    config = CanineConfig(**_SMALL, **sizes, downsampling_rate=4, upsampling_kernel_size=3)
    base = AutoModelForSequenceClassification.from_config(config)
    ids = torch.randint(3, 90, (2, 16))
    model = get_ptune_model(base, PTuneConfig(num_virtual_tokens=4))
    check_batch(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1])})


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_states_of_an_encoder_that_have_lost_the_prompt_are_refused(family: str) -> None:
    model = get_ptune_model(build(family), PTuneConfig(method="prompt_tuning", num_virtual_tokens=4)).eval()
    inputs = batch(family)
    rows = {"attention_mask": inputs["attention_mask"], "decoder_input_ids": inputs["labels"]}
    with torch.no_grad():
        expected = model(input_ids=inputs["input_ids"], **rows)
        whole = model.get_encoder()(input_ids=inputs["input_ids"], attention_mask=rows["attention_mask"])
        found = model(encoder_outputs=whole, **rows)
        assert torch.allclose(found.logits, expected.logits, atol=1e-10)
        assert found.encoder_last_hidden_state.shape == (*inputs["input_ids"].shape, 32)
        cut = BaseModelOutput(last_hidden_state=expected.encoder_last_hidden_state)
        with pytest.raises(InjectionError, match="no virtual positions"):
            model(encoder_outputs=cut, **rows)
        with model.disable_adapter():
            model(encoder_outputs=cut, **rows)


@pytest.mark.parametrize("family", ["mpt", "switch_transformers", "longt5", "t5"])
def test_a_single_own_key_is_told_from_a_scale(family: str) -> None:
    """A bias of one key has the shape of a scale of all keys."""
    torch.manual_seed(0)
    if family == "mpt":
        config = AutoConfig.for_model("mpt", d_model=32, n_heads=4, n_layers=2, vocab_size=99)
        base: Any = AutoModelForCausalLM.from_config(config)
    else:
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        further = {"num_experts": 2} if family == "switch_transformers" else {}
        ids = {"vocab_size": 99, "pad_token_id": 0, "decoder_start_token_id": 0}
        config = AutoConfig.for_model(family, **sizes, **ids, **further, attn_implementation="eager")
        base = AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        for parameter in base.double().eval().parameters():
            parameter.normal_(0, 0.3)
    model = get_ptune_model(base, PTuneConfig(num_virtual_tokens=4))
    rows = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        model.prompt.weight.normal_(0, 0.5)
        name = "input_ids" if family == "mpt" else "decoder_input_ids"
        around = {} if family == "mpt" else {"input_ids": rows}
        whole = model(**around, **{name: rows}).logits[:, :1]
        assert torch.allclose(model(**around, **{name: rows[:, :1]}).logits, whole, atol=1e-6)
        with model.disable_adapter():
            assert not torch.allclose(model(**around, **{name: rows}).logits[:, :1], whole, atol=1e-2)


@pytest.mark.parametrize("method", ["p_tuning_v2", "prompt_tuning"])
def test_heads_that_share_one_key_take_a_prompt_by_both_kernels(method: str) -> None:
    found = []
    for kernel in ("eager", "sdpa"):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
        config = AutoConfig.for_model("falcon", **sizes, multi_query=True, new_decoder_architecture=False)
        base = AutoModelForCausalLM.from_config(config, attn_implementation=kernel).double().eval()
        torch.manual_seed(1)
        options: dict[str, Any] = {"num_virtual_tokens": 4, "prompt_tuning_init": "RANDOM"}
        model = get_ptune_model(base, PTuneConfig(method=method, **options))
        with torch.no_grad():
            found.append(model(input_ids=torch.tensor([[5, 6, 7]])).logits)
    assert torch.allclose(*found, atol=1e-9)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_tuples_of_an_encoder_decoder_have_no_virtual_positions(family: str) -> None:
    model = get_ptune_model(build(family), PTuneConfig(method="prompt_tuning", num_virtual_tokens=4)).eval()
    inputs = batch(family)
    with torch.no_grad():
        named = model(**inputs, output_hidden_states=True)
        given = model(**inputs, output_hidden_states=True, return_dict=False)
        plain = model.unwrap()(**inputs, output_hidden_states=True, return_dict=False)
    assert len(given) == len(plain) == len(named.to_tuple())
    assert given[-1][0].shape == plain[-1][0].shape and torch.equal(given[-1][0], named.encoder_hidden_states[0])


def test_a_call_for_a_tuple_that_went_down_leaves_nothing() -> None:
    model = get_ptune_model(build("t5"), PTuneConfig(method="prompt_tuning", num_virtual_tokens=4)).eval()
    ids = batch("t5")["input_ids"]
    with torch.no_grad():
        with pytest.raises(IndexError):
            model(input_ids=ids, decoder_input_ids=ids + 1000, return_dict=False)
        assert not isinstance(model(input_ids=ids, decoder_input_ids=ids), tuple)


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_rows_without_a_position_left_are_answered_with_the_room_there_is(family: str) -> None:
    model = get_ptune_model(build(family), PTuneConfig(method="prompt_tuning", num_virtual_tokens=4)).eval()
    room = token_room(model)
    assert room is not None
    ids = torch.full((1, room), 5)
    with torch.no_grad():
        model(input_ids=ids)
        with pytest.raises(InjectionError, match=f"rows of up to {room} fit.*model_max_length = {room},"):
            model(input_ids=torch.full((1, room + 1), 5))
        if family == "gpt2":
            with pytest.raises(InjectionError, match=f"rows of up to {room} fit"):
                model.generate(ids, max_new_tokens=4)
    with torch.no_grad(), pytest.raises(IndexError):  # ids that are no words are no matter of positions
        model(input_ids=torch.full((1, 3), 1000))
    with pytest.raises(ConfigError, match="leaves none for a text"):
        get_ptune_model(model.unwrap(), PTuneConfig(method="prompt_tuning", num_virtual_tokens=room + 4))


@pytest.mark.parametrize("family", ["marian", "pegasus", "blenderbot-small", "mvp", "bart", "mbart", "m2m_100"])
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_a_text_is_embedded_as_the_base_embeds_it(family: str, method: str) -> None:
    """Some scale what they look up themselves, some have scaled tables, and none scales what is given."""
    base = _scaled(family)
    encoder, ids = base.get_encoder(), torch.randint(5, 99, (2, 9))
    with torch.no_grad():
        expected = encoder(input_ids=ids)[0]
        model = get_ptune_model(base, PTuneConfig(method=method, num_virtual_tokens=3)).eval()
        inputs = model._injector.inputs
        named = inputs.insert(model.prompt()[:0], {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        with model.disable_adapter():
            assert torch.allclose(encoder(**named)[0], expected, atol=1e-9)
            assert torch.equal(encoder(input_ids=ids)[0], expected)
            embeds = torch.randn(2, 9, 32, dtype=torch.float64)
            assert torch.equal(inputs.insert(model.prompt()[:0], {"inputs_embeds": embeds})["inputs_embeds"], embeds)


@pytest.mark.parametrize("family", ["marian", "mbart"])
def test_a_prompt_starts_as_large_as_a_text_is(family: str) -> None:
    """Started as words, an encoder's prompt answers as those words before the text."""
    base = _scaled(family)
    ids, start = torch.randint(5, 99, (2, 9)), torch.tensor([7, 12, 31])
    with torch.no_grad():
        expected = base(input_ids=torch.cat([start.expand(2, -1), ids], 1), decoder_input_ids=ids).logits
        config = PTuneConfig(
            method="prompt_tuning", num_virtual_tokens=3, prompt_tuning_init="TEXT", prompt_tuning_init_text="a b c"
        )
        model = get_ptune_model(base, config, lambda text, **_: {"input_ids": start.tolist()}).eval()
        assert torch.allclose(model(input_ids=ids, decoder_input_ids=ids).logits, expected, atol=1e-6)


def _scaled(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    sides = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = AutoConfig.for_model(
        family,
        vocab_size=99,
        d_model=32,
        encoder_ffn_dim=37,
        decoder_ffn_dim=37,
        max_position_embeddings=64,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
        scale_embedding=True,
        **sides,
    )
    base: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(config)
    return base.double().eval()


def test_an_encoder_that_does_more_to_ids_takes_no_prompt_among_embeddings() -> None:
    """ESM leaves positions and norms out for embeddings that it is given."""
    for kind in ("absolute", "rotary"):
        base = _esm(kind)
        with pytest.raises(BackboneError, match="to the embeddings of a text than to its ids.*p_tuning_v2"):
            get_ptune_model(base, PTuneConfig(method="prompt_tuning", num_virtual_tokens=3))
        get_ptune_model(base, PTuneConfig(method="p_tuning_v2", num_virtual_tokens=3))
    get_ptune_model(_esm("rotary", norm=False), PTuneConfig(method="prompt_tuning", num_virtual_tokens=3))


def _esm(kind: str, norm: bool = True) -> PreTrainedModel:
    config = EsmConfig(**_SMALL, pad_token_id=1, mask_token_id=32, position_embedding_type=kind)
    config.token_dropout, config.emb_layer_norm_before = False, norm
    base: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(0, 0.3)
    return base.eval()


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "p_tuning_v2"])
def test_an_encoder_by_itself_that_says_it_has_a_decoder(method: str) -> None:
    """Virtual positions leave what UMT5's encoder gives, as they leave T5's."""
    for made in (UMT5ForTokenClassification, UMT5EncoderModel):
        torch.manual_seed(0)
        config = UMT5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, num_labels=3)
        base = made(config).double().eval()
        ids, mask = torch.randint(5, 99, (2, 9)), torch.ones(2, 9, dtype=torch.long)
        short = {"input_ids": ids[:1, :6], "attention_mask": mask[:1, :6]}
        mask[0, 6:] = 0
        with torch.no_grad():
            plain = base(input_ids=ids, attention_mask=mask)[0]
            model = get_ptune_model(base, PTuneConfig(method=method, num_virtual_tokens=4)).eval()
            found = model(input_ids=ids, attention_mask=mask)[0]
            assert found.shape == plain.shape and not torch.allclose(found, plain)
            assert torch.allclose(model(**short)[0], found[:1, :6], atol=1e-9)
            with model.disable_adapter():
                assert torch.equal(model(input_ids=ids, attention_mask=mask)[0], plain)
        if made is UMT5ForTokenClassification:
            model.train()(input_ids=ids, attention_mask=mask, labels=ids % 3).loss.backward()


@pytest.mark.parametrize(
    ("family", "name", "axes"),
    [
        ("layoutlm", "bbox", (4,)),
        ("roc_bert", "input_shape_ids", ()),
        ("markuplm", "xpath_tags_seq", (50,)),
        ("xlm", "langs", ()),
        ("xlnet", "input_mask", ()),
    ],
)
def test_what_is_said_of_every_token_is_refused_beside_a_prompt_among_them(
    family: str, name: str, axes: tuple[int, ...]
) -> None:
    sizes = {"xlm": {"emb_dim": 32, "n_layers": 2}, "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 37}}
    base = AutoModelForTokenClassification.from_config(
        AutoConfig.for_model(family, **(sizes.get(family, _SMALL) | {"vocab_size": 99}))
    ).eval()
    ids = torch.randint(5, 99, (2, 9))
    given = {name: torch.zeros(2, 9, *axes, dtype=torch.float if family == "xlnet" else torch.long)}
    with torch.no_grad():
        expected = base(input_ids=ids, **given).logits
        model = get_ptune_model(base, PTuneConfig(method="prompt_tuning", num_virtual_tokens=4)).eval()
        with pytest.raises(InjectionError, match=f"{name} .*of every token.*p_tuning_v2"):
            model(input_ids=ids, **given)
        assert model(input_ids=ids).logits.shape == expected.shape
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids, **given).logits, expected)
        model = get_ptune_model(model.unwrap(), PTuneConfig(method="p_tuning_v2", num_virtual_tokens=4)).eval()
        assert model(input_ids=ids, **given).logits.shape == expected.shape


def test_lengths_of_rows_count_the_prompt() -> None:
    """XLM takes them in place of a mask."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("xlm", vocab_size=99, emb_dim=32, n_layers=2, n_heads=4)
    base = AutoModelForTokenClassification.from_config(config).double().eval()
    model = get_ptune_model(base, PTuneConfig(method="prompt_tuning", num_virtual_tokens=4)).eval()
    ids, mask, lengths = torch.randint(5, 99, (2, 9)), torch.ones(2, 9, dtype=torch.long), torch.tensor([9, 6])
    mask[1, 6:] = 0
    with torch.no_grad():
        expected, found = model(input_ids=ids, attention_mask=mask).logits, model(input_ids=ids, lengths=lengths).logits
        assert torch.allclose(found[mask.bool()], expected[mask.bool()], atol=1e-9)
        assert torch.equal(lengths, torch.tensor([9, 6]))


def test_types_of_several_axes_are_lengthened() -> None:
    """TAPAS tells rows and columns of a table by them."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("tapas", **_SMALL, num_labels=2)).eval()
    model = get_ptune_model(base, PTuneConfig(method="prompt_tuning", num_virtual_tokens=4)).eval()
    ids, types = torch.randint(5, 99, (2, 9)), torch.zeros(2, 9, 7, dtype=torch.long)
    with torch.no_grad():
        logits = model(input_ids=ids, token_type_ids=types).logits
        assert torch.allclose(logits, model(input_ids=ids).logits, atol=1e-6)
        types[:, 4:, 2] = 1
        assert not torch.allclose(logits, model(input_ids=ids, token_type_ids=types).logits, atol=1e-6)


def test_an_encoder_that_cannot_run_with_a_prompt_among_its_inputs() -> None:
    """LayoutLMv3 adds the boxes of ids to embeddings."""
    sizes = {"coordinate_size": 5, "shape_size": 6, "visual_embed": False}
    base = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("layoutlmv3", **_SMALL, **sizes)).eval()
    with pytest.raises(BackboneError, match="cannot run with a prompt among its inputs.*p_tuning_v2"):
        get_ptune_model(base, PTuneConfig(method="prompt_tuning", num_virtual_tokens=4))
    model = get_ptune_model(base, PTuneConfig(method="p_tuning_v2", num_virtual_tokens=4))
    assert model(input_ids=torch.arange(6)[None] + 5).logits.shape == (1, 2)
