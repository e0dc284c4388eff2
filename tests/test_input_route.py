"""What encoders make of their inputs by themselves, and do beside a prompt among them: pooled states, pads, types."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from hf_ptune import PTuneConfig, get_ptune_model
from hf_ptune.errors import BackboneError, InjectionError
from hf_ptune.position_tables import token_room

AMONG_INPUTS = ["prompt_tuning", "p_tuning"]
_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "embedding_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_SIZES: dict[str, dict[str, Any]] = {
    "funnel": {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 37, "block_sizes": [1, 1], "num_decoder_layers": 1},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4},
    "flaubert": {"emb_dim": 32, "n_layers": 2, "n_heads": 4},
}


def _base(family: str, auto: Any = AutoModelForTokenClassification) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=99, **_SIZES.get(family, _SMALL))
    base: PreTrainedModel = auto.from_config(config)
    return base.double().eval()


@pytest.mark.parametrize("method", AMONG_INPUTS)
@pytest.mark.parametrize("virtual", [1, 4, 20])
@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForMultipleChoice])
def test_states_that_are_pooled_leave_no_prompt_to_be_taken_out(auto: Any, virtual: int, method: str) -> None:
    """Funnel's encoder gives one state for two tokens, or more."""
    base = _base("funnel", auto)
    with pytest.raises(BackboneError, match="FunnelBaseModel gives .* states for .*p_tuning_v2, prefix_tuning, bitfit"):
        get_ptune_model(base, PTuneConfig(method=method, num_virtual_tokens=virtual))
    model = get_ptune_model(base, PTuneConfig(num_virtual_tokens=virtual)).eval()
    ids = torch.randint(5, 99, (1, 2, 16) if auto is AutoModelForMultipleChoice else (1, 16))
    assert len(model(input_ids=ids, output_hidden_states=True).hidden_states) == 3


@pytest.mark.parametrize("auto", [AutoModelForTokenClassification, AutoModelForQuestionAnswering])
def test_pooled_states_are_not_reported_beside_a_prompt(auto: Any) -> None:
    """Funnel's decoder brings them back to the length of the text, from which the prompt is taken out."""
    model = get_ptune_model(_base("funnel", auto), PTuneConfig(method="prompt_tuning", num_virtual_tokens=4)).eval()
    ids = torch.randint(5, 99, (2, 16))
    assert model(input_ids=ids)[0].shape[:2] == ids.shape
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(InjectionError, match="gives 10 states for 20 tokens.*Leave output_hidden_states"):
            model(input_ids=ids, **{name: True})
        with model.disable_adapter():
            assert model(input_ids=ids, **{name: True})[0].shape[:2] == ids.shape


@pytest.mark.parametrize("method", AMONG_INPUTS)
@pytest.mark.parametrize("family", ["xlm", "flaubert"])
def test_pads_that_a_base_tells_by_their_ids_stay_pads(family: str, method: str) -> None:
    """Where they are given no mask, XLM and Flaubert count the ids that are no pads."""
    base, ids = _base(family), torch.randint(5, 99, (3, 9))
    ids[1, 6:] = ids[2, 2:] = base.config.pad_index
    mask = ids.ne(base.config.pad_index)
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        model = get_ptune_model(base, PTuneConfig(method=method, num_virtual_tokens=4)).eval()
        for parameter in model.prompt.parameters():
            parameter.normal_(0, 0.5)
        found = model(input_ids=ids).logits
        assert torch.allclose(found[mask], model(input_ids=ids, attention_mask=mask.long()).logits[mask], atol=1e-9)
        assert torch.allclose(found[2, :2], model(input_ids=ids[2:, :2]).logits[0], atol=1e-9)
        inputs = model._injector.inputs
        named = inputs.insert(model.prompt()[:0], {"input_ids": ids})
        with model.disable_adapter():
            assert torch.allclose(base.base_model(**named)[0], base.base_model(input_ids=ids)[0], atol=1e-9)
            assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("method", AMONG_INPUTS)
@pytest.mark.parametrize("family", ["convbert", "bert", "electra", "ernie", "roberta"])
def test_rows_of_full_length_need_no_types(family: str, method: str) -> None:
    """Types that a base has for as many tokens as it has positions do for no prompt besides."""
    base = _base(family)
    table = base.base_model.embeddings
    offset = 0 if table.position_embeddings.padding_idx is None else table.position_embeddings.padding_idx + 1
    model = get_ptune_model(base, PTuneConfig(method=method, num_virtual_tokens=4)).eval()
    for length in (64 - offset, 9):
        ids = torch.randint(5, 99, (2, length))
        with torch.no_grad():
            found = model(input_ids=ids).logits
            assert torch.equal(found, model(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits)
            del table.token_type_ids  # the base makes zeros itself then
            assert torch.equal(found, model(input_ids=ids).logits)
        table.register_buffer("token_type_ids", torch.zeros(1, 64, dtype=torch.long), persistent=False)


@pytest.mark.parametrize("auto", [AutoModelForTokenClassification, AutoModelForMultipleChoice])
def test_choices_without_a_position_left_are_answered_with_the_room_there_is(auto: Any) -> None:
    """RoFormer counts the tokens of a prompt among its inputs."""
    base = _base("roformer", auto)
    axes = (2, 3) if auto is AutoModelForMultipleChoice else (2,)
    model = get_ptune_model(base, PTuneConfig(method="prompt_tuning", num_virtual_tokens=4)).eval()
    assert token_room(model) == 60
    ids = torch.full((*axes, 61), 5)
    model(input_ids=ids[..., :60])
    for given in ({"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids)}):
        with pytest.raises(InjectionError, match="rows of up to 60 fit"):
            model(**given)
    with pytest.raises(IndexError):  # ids that are no words are no matter of positions
        model(input_ids=torch.full((*axes, 3), 1000))
