"""What is learned of a conversation stands behind what the model is asked with, token by token."""

from typing import Any

import pytest
from tokenizers_of import KINDS, tokenizer_of

from hf_ptune.tasks import IGNORED
from hf_ptune.tasks.causal_lm import CausalLM

ANSWERS = ["Paris was", "yes"]
CONVERSATION = [
    {"role": "user", "content": "hello world ?"},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": "it was ?"},
    {"role": "assistant", "content": ANSWERS[1]},
]
ASKING = ["bad: ", "bad\n", "bad\n\n", "bad:", "bad  "]


def chat_of(kind: str, asking: str, end: str = "{{ eos_token }}") -> Any:
    """A tokenizer whose template writes a text before every answer, and another behind it."""
    tokenizer = tokenizer_of(kind, mask=False)
    said = f"{{{{ {asking!r} + m.content }}}}{end}"
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{{% if m.role == 'user' %}}good {{{{ m.content }}}}\n{{% else %}}{said}{{% endif %}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {asking!r} }}}}{{% endif %}}"
    )
    return tokenizer


def asked_by_users(tokenizer: Any, messages: Any) -> list[int]:
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    return ids  # type: ignore[no-any-return]


def learned_behind(tokenizer: Any, asked: list[int], features: Any) -> list[str]:
    """What each feature has learned to say behind the ids that a user sends."""
    found = []
    for f in features:
        if f["input_ids"][: len(asked)] == asked and f["labels"][len(asked)] != IGNORED:
            rest = [*f["labels"][len(asked) :], IGNORED]
            found.append(tokenizer.decode(rest[: rest.index(IGNORED)]).strip())
    return found


@pytest.mark.parametrize("asking", ASKING)
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_learned_behind_what_users_send(kind: str, asking: str) -> None:
    tokenizer = chat_of(kind, asking)
    task = CausalLM()
    row = task.check_row({"messages": CONVERSATION}, "row 1")
    features = task.encode([row], tokenizer, [])
    for place, answer in ((1, ANSWERS[0]), (3, ANSWERS[1])):
        asked = asked_by_users(tokenizer, CONVERSATION[:place])
        said = learned_behind(tokenizer, asked, features)
        assert [text.replace(" ", "") for text in said] == [f"{answer}[SEP]".replace(" ", "")]
    assert features[-1]["source_ids"] == asked_by_users(tokenizer, CONVERSATION[:3])
    (held_out,) = task.encode([row], tokenizer, [], held_out=True)
    assert held_out["source_ids"] == features[-1]["source_ids"]
    assert held_out["input_ids"][: len(held_out["source_ids"])] == held_out["source_ids"]
    for f in features:
        assert all(i in (IGNORED, j) for i, j in zip(f["labels"], f["input_ids"], strict=True))
    # an instruction is a conversation of one question
    one = task.check_row({"instruction": "hello world ?", "output": "yes"}, "row 1")
    two = task.check_row({"messages": [CONVERSATION[0], CONVERSATION[3]]}, "row 1")
    assert task.encode([one], tokenizer, []) == task.encode([two], tokenizer, [])


def test_an_answer_of_one_token_is_learned_and_not_given() -> None:
    tokenizer = chat_of("bytes", "bad: ")
    task = CausalLM()
    row = task.check_row({"instruction": "it was ?", "output": "yes"}, "row 1")
    feature = task.encode([row], tokenizer, [])[0]
    assert tokenizer.decode([i for i in feature["labels"] if i != IGNORED]) == "yes[SEP]"
    assert tokenizer.decode(feature["source_ids"]) == "good it was ?\nbad: "


def test_conversations_are_told_once_where_all_prompts_are_read_as_in_the_whole() -> None:
    for kind, asking in (("wordpiece", "bad: "), ("bytes", "bad:"), ("bytes", "bad\n")):
        tokenizer = chat_of(kind, asking)
        task = CausalLM()
        (feature,) = task.encode([task.check_row({"messages": CONVERSATION}, "row 1")], tokenizer, [])
        assert feature["input_ids"] == tokenizer.apply_chat_template(CONVERSATION)["input_ids"]


def test_answers_that_are_told_by_themselves_have_an_end_of_their_own() -> None:
    """Where the template writes nothing behind an answer."""
    tokenizer = chat_of("bytes", "bad: ", end="{{ '\\n' if not loop.last }}")
    task = CausalLM()
    features = task.encode([task.check_row({"messages": CONVERSATION}, "row 1")], tokenizer, [])
    said = [tokenizer.decode([i for i in f["labels"] if i != IGNORED]) for f in features]
    assert said == [f"{answer}[SEP]" for answer in ANSWERS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["good {instruction}\nbad: ", "{instruction}\n\n", "{instruction} "])
def test_instructions_without_chats_too(kind: str, template: str) -> None:
    tokenizer = tokenizer_of(kind)
    task = CausalLM(template=template)
    row = task.check_row({"instruction": "it was ?", "output": "Paris was"}, "row 1")
    feature = task.encode([row], tokenizer, [])[0]
    asked = tokenizer(template.format(instruction="it was ?"))["input_ids"][:-1]  # its closing token
    assert feature["source_ids"] == asked == feature["input_ids"][: len(asked)]
    assert set(feature["labels"][: len(asked)]) == {IGNORED} and feature["labels"][len(asked) :] == [
        *tokenizer("Paris was", add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]
