"""Templates: what they say, and that their tokens are those of the written text."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers_of import KINDS, tokenizer_of
from transformers import AutoTokenizer

from hf_ptune.cloze import word_ids
from hf_ptune.errors import ConfigError, TemplateError
from hf_ptune.templates import Template, add_virtual_tokens, virtual_tokens

TEXT = "[P2] {first} it was [MASK] . [P1] {second}"
ROW = {"first": "hello world", "second": "a b c"}


def test_parts() -> None:
    template = Template.parse(TEXT)
    assert template.num_virtual_tokens == 3 and template.fields == ["first", "second"]
    assert template.has_mask and template.spaced
    kinds = [kind for kind, _ in template.parts]
    assert kinds == ["virtual", "words", "field", "words", "mask", "words", "virtual", "words", "field"]
    braces = Template.parse("{{{a}}} [P12]")
    assert braces.render({"a": "x"}, tokenizer_of("wordpiece")).startswith("{x} <|prompt_0|><|prompt_1|>")
    assert braces.num_virtual_tokens == 12 and not braces.has_mask


@pytest.mark.parametrize("text", ["", "[MASK] [MASK]", "[P0] {a}", "[P] {a}", "{a", "a}", "{a b}", "[mask] {a}", "[P3"])
def test_what_is_no_template(text: str) -> None:
    with pytest.raises(ConfigError, match="template"):
        Template.parse(text)


@pytest.mark.parametrize("text", ["[MASK] {a}", "{a}[MASK]", "[P2][MASK]"])
def test_a_mask_without_a_space_before_it(text: str) -> None:
    assert not Template.parse(text).spaced


@pytest.mark.parametrize("kind", KINDS)
def test_virtual_tokens_in_a_tokenizer(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(kind)
    known = len(tokenizer)
    ids = add_virtual_tokens(tokenizer, 3)
    assert ids == [known, known + 1, known + 2] == add_virtual_tokens(tokenizer, 3)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for reader in (tokenizer, loaded):
        read = reader("<|prompt_0|> hello world <|prompt_1|> it<|prompt_2|>")["input_ids"]
        assert [i for i in read if i >= known] == ids and read[1] == ids[0] and read[-2] == ids[2]
        # no token for the space before one, and words as they are elsewhere
        assert reader.convert_ids_to_tokens(read[2:4]) == reader.tokenize("it hello world")[1:]
        assert read[4] == ids[1] and len(read) == 8
        assert reader.decode(read, skip_special_tokens=True).split() == ["hello", "world", "it"]
    assert add_virtual_tokens(loaded, 3) == ids


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_written_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = add_virtual_tokens(tokenizer, 3)
    template = Template.parse(TEXT)
    encoded = template.encode(tokenizer, ROW)
    text = "<|prompt_0|><|prompt_1|> hello world it was [MASK] . <|prompt_2|> a b c"
    assert template.render(ROW, tokenizer) == text
    assert encoded.inputs == dict(tokenizer(text))
    read = encoded.inputs["input_ids"]
    assert encoded.answer_at is not None and read[encoded.answer_at] == tokenizer.mask_token_id
    assert [i for i in read if i in ids] == ids


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_longest_field_is_cut(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = add_virtual_tokens(tokenizer, 3)
    template = Template.parse(TEXT)
    # as many tokens of words as the short row has, and the words that stay are the first
    expected = template.encode(tokenizer, {"first": "hello world yes", "second": "a b c"})
    length = len(expected.inputs["input_ids"])
    long = {"first": "hello world yes no maybe good bad hello world", "second": "a b c"}
    assert template.encode(tokenizer, long, length) == expected
    both = {"first": "hello world yes no maybe good bad hello world", "second": "a b c hello world yes no good"}
    cut = template.encode(tokenizer, both, length)
    assert len(cut.inputs["input_ids"]) == length and cut.answer_at is not None
    assert [i for i in cut.inputs["input_ids"] if i in ids] == ids
    alone = template.encode(tokenizer, {"first": ".", "second": "."}, length).inputs["input_ids"]
    with pytest.raises(TemplateError, match="alone has"):
        template.encode(tokenizer, both, len(alone) - 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["hello é è hello 红 楼 梦 é", "yes\n\n\nno\n \n \nmaybe\n\n\né", "a   b    c    x é"])
def test_what_is_cut_of_a_field_is_its_end(kind: str, text: str) -> None:
    """Spaces that are tokens of their own go with the words around them."""
    tokenizer = tokenizer_of(kind)
    add_virtual_tokens(tokenizer, 3)
    template = Template.parse(TEXT)
    whole = template.encode(tokenizer, {"first": text, "second": "a b"}).inputs["input_ids"]
    without = template.encode(tokenizer, {"first": "", "second": "a b"}).inputs["input_ids"]
    behind = whole[whole.index(tokenizer.convert_tokens_to_ids("<|prompt_1|>")) + 1 :]
    end = next(n for n in range(1, len(behind)) if without[-n] != behind[-n]) - 1
    for length in range(len(without) + 3, len(whole)):
        cut = template.encode(tokenizer, {"first": text, "second": "a b"}, length).inputs["input_ids"]
        assert cut == whole[: length - end] + whole[-end:]


def test_causal_models_read_up_to_the_mask() -> None:
    tokenizer = tokenizer_of("bytes", mask=False)
    add_virtual_tokens(tokenizer, 4)
    template = Template.parse("[P2] {first} [P2] it was [MASK]")
    encoded = template.encode(tokenizer, ROW, causal=True)
    text = "<|prompt_0|><|prompt_1|> hello world <|prompt_2|><|prompt_3|> it was"
    assert encoded.inputs == dict(tokenizer(text)) and encoded.answer_at == len(encoded.inputs["input_ids"]) - 1
    with pytest.raises(ConfigError, match="Let .MASK. stand last"):
        Template.parse(TEXT).encode(tokenizer, ROW, causal=True)
    with pytest.raises(TemplateError, match="no mask token"):
        template.encode(tokenizer, ROW)
    closing = tokenizer_of("bytes")  # closes texts
    add_virtual_tokens(closing, 4)
    assert template.encode(closing, ROW, causal=True).inputs["input_ids"][-1] != closing.eos_token_id


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"first": "a"}, "has the field 'second', the row has first"),
        ({"first": "a [MASK]", "second": "b"}, "a special token"),
        ({"first": "a", "second": "<|prompt_1|>"}, "a special token"),
    ],
)
def test_rows_that_do_not_fit(row: dict[str, Any], message: str) -> None:
    tokenizer = tokenizer_of("wordpiece")
    add_virtual_tokens(tokenizer, 3)
    with pytest.raises(TemplateError, match=message.replace("|", r"\|")):
        Template.parse(TEXT).encode(tokenizer, row)


def test_a_tokenizer_that_does_not_know_the_virtual_tokens() -> None:
    with pytest.raises(TemplateError, match="does not know the virtual tokens"):
        Template.parse(TEXT).encode(tokenizer_of("wordpiece"), ROW)
    assert virtual_tokens(2) == ["<|prompt_0|>", "<|prompt_1|>"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", ["Paris", "great", "terrible"])
def test_words_stand_at_the_mask_as_in_the_text(kind: str, word: str) -> None:
    tokenizer = tokenizer_of(kind)
    before = tokenizer("it was", add_special_tokens=False)["input_ids"]
    whole = tokenizer(f"it was {word}", add_special_tokens=False)["input_ids"]
    assert whole == before + word_ids(word, tokenizer, spaced=True)
    assert tokenizer(word, add_special_tokens=False)["input_ids"] == word_ids(word, tokenizer, spaced=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["{a}.[MASK]", "{a} ,[MASK]"])
def test_words_behind_a_sign_stand_as_in_the_text(kind: str, text: str) -> None:
    tokenizer, template = tokenizer_of(kind), Template.parse(text)
    before = tokenizer(text.replace("{a}", "it was").replace("[MASK]", ""), add_special_tokens=False)["input_ids"]
    whole = tokenizer(text.replace("{a}", "it was").replace("[MASK]", "yes"), add_special_tokens=False)["input_ids"]
    assert whole == before + word_ids("yes", tokenizer, template.spaced, template.behind)


def test_an_answer_on_a_line_of_its_own() -> None:
    template, tokenizer = Template.parse("{a}\n[MASK]"), tokenizer_of("bytes", mask=False)
    assert not template.spaced and template.behind == "\n"
    assert (
        template.encode(tokenizer, {"a": "it was"}, causal=True).inputs["input_ids"]
        == tokenizer("it was\n")["input_ids"]
    )
    assert tokenizer.convert_ids_to_tokens(word_ids("it", tokenizer, False, "\n")) == ["it"]
