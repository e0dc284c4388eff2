"""Bases that read images beside text: positions are theirs, behind the prompt, however the base counts images."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    DynamicCache,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
)

from hf_ptune import PTuneConfig, get_ptune_model
from hf_ptune.methods.base import join_prefix
from hf_ptune.position_tables import token_room

P = 3
_IMAGE = 90
_TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MANY_AXES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "paddleocr_vl", "ernie4_5_vl_moe"]


def _several_axes(family: str) -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
    text = _TEXT | {"rope_parameters": rope, "head_dim": 8}
    if family == "qwen3_5":
        text |= {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2}
        text |= {"linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    if family == "ernie4_5_vl_moe":
        text |= {"moe_intermediate_size": [16, 16], "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}
    seeing: dict[str, Any] = {"depth": 1, "num_hidden_layers": 1, "hidden_size": 32, "embed_dim": 32, "num_heads": 4}
    seeing |= {"num_attention_heads": 4, "intermediate_size": 32, "mlp_ratio": 2, "patch_size": 4, "image_size": 32}
    seeing |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "temporal_merge_size": 2, "in_channels": 3}
    seeing |= {"out_hidden_size": 32, "fullatt_block_indexes": [0], "window_size": 16, "in_chans": 3}
    seeing |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    ids = {"image_token_id": _IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    ids |= {"image_start_token_id": 92, "image_end_token_id": 93, "video_start_token_id": 94, "video_end_token_id": 95}
    config = AutoConfig.for_model(family, text_config=text, vision_config=seeing, **ids)
    return _strong(AutoModelForImageTextToText.from_config(config, experts_implementation="eager"))


def _strong(model: Any) -> Any:
    """In float64 but for what sees, which some families have in float32 alone."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.model.language_model.double()
    model.lm_head.double()
    return model.eval()


def _rows(family: str) -> dict[str, Tensor]:
    """Two rows with an image of 2 x 3 tokens each, the second one behind pads."""
    seen = [92, *[_IMAGE] * 6, 93]
    ids = torch.tensor([[5, 11, 12, *seen, 7, 8], [0, 0, 6, *seen, 9, 10]])
    shape = (48, 3, 4, 4) if family == "paddleocr_vl" else (48, 48 if family == "ernie4_5_vl_moe" else 96)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "mm_token_type_ids": (ids == _IMAGE).int(),
        "pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(1)),
        "image_grid_thw": torch.tensor([[1, 4, 6], [1, 4, 6]]),
    }


def _longer(rows: dict[str, Tensor], written: Tensor) -> dict[str, Tensor]:
    more = written.shape[1] - rows["input_ids"].shape[1]
    longer = rows | {"input_ids": written}
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 1)):
        if name in rows:
            longer[name] = torch.nn.functional.pad(rows[name], (0, more), value=value)
    return longer


def _behind(base: Any, prompt: Tensor, rows: dict[str, Tensor], positions: Tensor) -> Tensor:
    """What the base says of the rows with the prompt `[P, H]` as embeddings before them, at given positions."""
    count = len(rows["input_ids"])
    embeds = torch.cat([prompt[None].expand(count, -1, -1), base.get_input_embeddings()(rows["input_ids"])], 1)
    given: dict[str, Tensor] = {n: t for n, t in rows.items() if n not in ("input_ids", "mm_token_type_ids")}
    for name in {"attention_mask", "token_type_ids"} & set(given):
        given[name] = torch.nn.functional.pad(given[name], (prompt.shape[0], 0), value=1)
    with torch.no_grad():
        logits: Tensor = base(inputs_embeds=embeds, position_ids=positions, **given).logits[:, prompt.shape[0] :]
    return logits


def _as_prefix(base: Any, prompt: Tensor, positions: Tensor) -> Tensor:
    cache = DynamicCache(config=base.config.get_text_config())
    with torch.no_grad():
        base.model.language_model(inputs_embeds=prompt[None], position_ids=positions, past_key_values=cache)
    return join_prefix([(layer.keys[0], layer.values[0]) for layer in cache.layers])


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
@pytest.mark.parametrize("family", [f for f in _MANY_AXES if f != "qwen3_5"])
def test_images_are_counted_along_several_axes(family: str, method: str) -> None:
    base, rows = _several_axes(family), _rows(family)
    own = rows["attention_mask"].bool()
    prompt = torch.randn(P, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    before = torch.arange(P)[None, None].expand(3, 1, -1)

    def expected(of: dict[str, Tensor]) -> Tensor:
        counted = {n: t for n, t in of.items() if n != "pixel_values"}
        positions = base.model.get_rope_index(**counted)[0]  # 3 B S
        base.model.rope_deltas = None
        return _behind(base, prompt, of, torch.cat([before.expand(-1, len(positions[0]), -1), positions + P], -1))

    answers = expected(rows)
    prefix = _as_prefix(base, prompt, before)
    written = torch.cat([rows["input_ids"], torch.tensor([[21, 22, 23], [31, 32, 33]])], 1)
    after = expected(_longer(rows, written))[:, -4:]
    model = get_ptune_model(base, PTuneConfig(method=method, num_virtual_tokens=P))
    with torch.no_grad():
        model.prompt.weight.copy_(prompt if method == "prompt_tuning" else prefix)
        close = {"rtol": 1e-5, "atol": 1e-5}  # rotations are in float32
        for training in (True, False):
            model.train(training)
            assert torch.allclose(model(**rows).logits[own], answers[own], **close)
        longer = model(**_longer(rows, written), use_cache=False).logits
        assert torch.allclose(longer[:, -4:], after, **close)
        out = model(**rows, use_cache=True)
        mask = rows["attention_mask"]
        for step in range(3):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            token, cache = written[:, -3 + step, None], out.past_key_values
            out = model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)
            assert torch.allclose(out.logits[:, -1], after[:, step + 1], **close)
        wishes = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        told = model.generate(**rows, max_new_tokens=3, min_new_tokens=3, **wishes)
        again = model(**_longer(rows, told.sequences), use_cache=False).logits[:, -4:-1]
        assert torch.allclose(torch.stack(told.logits, 1), again.float(), **close)


def _positions_read(model: Any) -> list[Tensor]:
    """Positions that reach the rotation from now on."""
    read: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        read.append(args[1] if len(args) > 1 else kwargs["position_ids"])

    model.base_model.language_model.rotary_emb.register_forward_pre_hook(note, with_kwargs=True)
    return read


@pytest.mark.parametrize("shift", [None, False])
def test_images_beside_layers_without_attention_are_counted_so_too(shift: bool | None) -> None:
    base, rows = _several_axes("qwen3_5"), _rows("qwen3_5")
    read = _positions_read(base)
    with torch.no_grad():
        base(**rows)
        model = get_ptune_model(base, PTuneConfig(num_virtual_tokens=P, position_shift=shift)).eval()
        told = model.generate(
            **rows, max_new_tokens=3, min_new_tokens=3, output_logits=True, return_dict_in_generate=True
        )
        longer = _longer(rows, told.sequences)
        base_read = read[0] + (0 if shift is False else P)
        read.clear()
        again = model(**longer, use_cache=False).logits[:, -4:-1]
    own = rows["attention_mask"].bool()
    assert torch.equal(read[-1][..., :-3][:, own], base_read[:, own])
    assert torch.allclose(torch.stack(told.logits, 1), again.float(), rtol=1e-4, atol=1e-4)


def test_images_of_an_earlier_call_do_not_move_a_prompt() -> None:
    """Qwen2-VL's kin keep how far images have moved the text, for what goes on from there."""
    base, rows = _several_axes("qwen2_vl"), _rows("qwen2_vl")
    text = {"input_ids": rows["input_ids"][:1, :3], "attention_mask": rows["attention_mask"][:1, :3]}
    model = get_ptune_model(base, PTuneConfig(method="prompt_tuning", num_virtual_tokens=P)).train()
    before = model(**text).logits
    model(**rows)
    assert torch.equal(model(**text).logits, before)
    base = model.unwrap()
    assert base.model.rope_deltas is not None
    get_ptune_model(base, PTuneConfig(method="prompt_tuning", num_virtual_tokens=P))


def _paligemma(attention: str) -> PaliGemmaForConditionalGeneration:
    seeing = {"hidden_size": 32, "intermediate_size": 36, "num_hidden_layers": 1, "num_attention_heads": 4}
    seeing |= {"image_size": 16, "patch_size": 8, "projection_dim": 32}
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**seeing),
        text_config=GemmaConfig(**_TEXT, head_dim=8),
        image_token_index=_IMAGE,
        projection_dim=32,
    )
    config._attn_implementation = attention
    return _strong(PaliGemmaForConditionalGeneration(config))


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_base_that_reads_its_start_both_ways_and_counts_from_one(attention: str, method: str, typed: bool) -> None:
    """PaliGemma: image and question see each other, a prompt and the answer what stands before them."""
    base = _paligemma(attention)
    ids = torch.tensor([[5, *[_IMAGE] * 4, 7, 8, 9], [0, 6, *[_IMAGE] * 4, 11, 12]])
    rows = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    rows["pixel_values"] = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    if typed:
        rows["token_type_ids"] = (torch.arange(8) > 6).long().expand(2, -1)
    own = rows["attention_mask"].bool()
    prompt = torch.randn(P, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    before = torch.arange(1, P + 1)[None]

    def expected(of: dict[str, Tensor]) -> Tensor:
        positions = of["attention_mask"].cumsum(-1).clamp(min=1) + P
        return _behind(base, prompt, of, torch.cat([before.expand(2, -1), positions], 1))

    answers = expected(rows)
    base.set_attn_implementation("eager")  # which masks the prompt without types
    prefix = _as_prefix(base, prompt, before)
    base.set_attn_implementation(attention)
    model = get_ptune_model(base, PTuneConfig(method=method, num_virtual_tokens=P))
    assert model.config.geometry["causal"]
    with torch.no_grad():
        model.prompt.weight.copy_(prompt if method == "prompt_tuning" else prefix)
        for training in (True, False):
            model.train(training)
            assert torch.allclose(model(**rows).logits[own], answers[own], rtol=1e-5, atol=1e-5)
        if typed:
            wishes = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
            told = model.generate(**rows, max_new_tokens=4, min_new_tokens=4, suppress_tokens=[_IMAGE], **wishes)
            again = model(**_longer(rows, told.sequences), use_cache=False).logits[:, -5:-1]
            assert torch.allclose(torch.stack(told.logits, 1), again.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("language", "room"), [("llama", None), ("gpt2", 64 - 20)])
@pytest.mark.parametrize("method", ["p_tuning_v2", "bitfit"])
def test_places_in_an_image_are_no_positions_of_a_text(language: str, room: int | None, method: str) -> None:
    seeing = {"hidden_size": 32, "intermediate_size": 36, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = _TEXT if language == "llama" else {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}
    config = AutoConfig.for_model(
        "idefics3",
        vision_config=seeing | {"image_size": 16, "patch_size": 8},
        text_config=text | {"model_type": language} | ({} if language == "llama" else {"n_positions": 64}),
        image_token_id=_IMAGE,
    )
    base = AutoModelForImageTextToText.from_config(config)
    model = get_ptune_model(base, PTuneConfig(method=method, num_virtual_tokens=20))
    assert token_room(model) == (64 if room and method == "bitfit" else room)
