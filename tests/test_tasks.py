"""What a model gets of rows, and what is measured of its predictions, task by task."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import build
from test_data import words_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.trainers import BpeTrainer
from tokenizers_of import tokenizer_of
from transformers import EvalPrediction, PreTrainedTokenizerFast

from hf_ptune import PTuneConfig, get_ptune_model
from hf_ptune.errors import ConfigError, RecipeError
from hf_ptune.tasks import IGNORED, Task, get_task, register_task, task_names
from hf_ptune.tasks.base import run_model
from hf_ptune.tasks.causal_lm import CausalLM
from hf_ptune.tasks.cloze import ClozeMaskedLM
from hf_ptune.tasks.masked_lm import MaskedLM
from hf_ptune.tasks.multiple_choice import MultipleChoice
from hf_ptune.tasks.question_answering import QuestionAnswering
from hf_ptune.tasks.seq2seq_lm import Seq2SeqLM
from hf_ptune.tasks.sequence_classification import SequenceClassification
from hf_ptune.tasks.token_classification import TokenClassification


def checked(task: Task, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    return [task.check_row(row, "here") for row in rows]


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids)).replace(" ##", "")


def test_names() -> None:
    assert task_names() == [
        "SEQ_CLS",
        "TOKEN_CLS",
        "MULTIPLE_CHOICE",
        "QUESTION_ANS",
        "CAUSAL_LM",
        "SEQ_2_SEQ_LM",
        "MASKED_LM",
        "CLOZE_MASKED_LM",
        "CLOZE_CAUSAL_LM",
    ]
    assert get_task("SEQ_CLS") is SequenceClassification
    with pytest.raises(ConfigError, match="'CLS' is not known; choose one of SEQ_CLS"):
        get_task("CLS")
    with pytest.raises(ConfigError, match="registered already"):

        @register_task
        class Another(Task):
            name = "SEQ_CLS"


def test_pairs() -> None:
    tokenizer = words_tokenizer()
    rows = [{"text": "a b", "text_pair": "c", "label": 1}, {"text": "a", "text_pair": "b", "label": 0}]
    task = SequenceClassification()
    encoded = task.encode(rows, tokenizer, ["0", "1"])
    assert tokenizer.decode(encoded[0]["input_ids"]) == "[CLS] a b [SEP] c [SEP]"
    batch = task.collator(tokenizer)(encoded)
    assert batch["labels"].tolist() == [1, 0] and batch["input_ids"].shape == (2, 6)


def test_chinese() -> None:
    tokenizer = words_tokenizer("你 好 a b")
    encoded = SequenceClassification().encode([{"text": "你 好", "label": "正面"}], tokenizer, ["负面", "正面"])
    assert tokenizer.decode(encoded[0]["input_ids"]) == "[CLS] 你 好 [SEP]" and encoded[0]["labels"] == 1


def test_choices_are_read_behind_the_same_text() -> None:
    tokenizer = words_tokenizer("a b c d because so")
    task = MultipleChoice()
    rows = checked(
        task,
        {"text": "a", "question": "cause", "choices": ["b", "c c"], "label": 1},
        {"text": "a b", "question": "effect", "choices": ["c", "d"], "label": "c"},
        {"text": "a", "choices": ["c", "d"], "label": "B"},
    )
    batch = task.collator(tokenizer)(task.encode(rows, tokenizer, []))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 2, 7)  # [B, C, T]
    assert batch["labels"].tolist() == [1, 0, 1]
    texts = [[tokenizer.decode(ids[ids != 0]) for ids in row] for row in batch["input_ids"]]
    assert texts == [
        ["[CLS] a because [SEP] b [SEP]", "[CLS] a because [SEP] c c [SEP]"],
        ["[CLS] a b so [SEP] c [SEP]", "[CLS] a b so [SEP] d [SEP]"],
        ["[CLS] a [SEP] c [SEP]", "[CLS] a [SEP] d [SEP]"],
    ]
    for row, message in [
        ({"text": "a", "choices": "b", "label": 0}, "choices are 'b'"),
        ({"text": "a", "choices": ["b", "c"], "label": 2}, "the label is 2; expected a number from 0 to 1"),
        ({"text": "a", "choices": ["b", "c"], "label": "other"}, "the label is 'other'"),
    ]:
        with pytest.raises(RecipeError, match=message):
            task.check_row(row, "row 1")
    with pytest.raises(RecipeError, match=r"1 of 3 rows have not 2 choices, as the one with the text a \(3\)"):
        task.encode([rows[0] | {"choices": ["a", "b", "c"]}, *rows[:2]], tokenizer, [])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("length", [9, 12, 20])
def test_the_passage_is_cut_before_question_and_choice(length: int, side: str) -> None:
    tokenizer = words_tokenizer("a b c d e f g h because")
    tokenizer.truncation_side = side
    passage = "a b c d e f g h a xy b xy c d e"
    row = {"text": f" {passage} ", "question": "cause", "choices": ["f", "g h xy"], "label": 0}
    task = MultipleChoice(max_length=length)
    feature = task.encode(checked(task, row), tokenizer, [])[0]
    words = tokenizer.convert_ids_to_tokens(tokenizer(passage, add_special_tokens=False)["input_ids"])
    for ids, mask, choice in zip(feature["input_ids"], feature["attention_mask"], row["choices"], strict=True):
        behind = tokenizer.convert_ids_to_tokens(tokenizer(choice, add_special_tokens=False)["input_ids"])
        room = length - 4 - len(behind)
        kept = words[:room] if side == "right" else words[max(0, len(words) - room) :]
        expected = ["[CLS]", *kept, "because", "[SEP]", *behind, "[SEP]"]
        assert tokenizer.convert_ids_to_tokens(ids) == expected and len(ids) == len(mask) <= length


@pytest.mark.parametrize(
    ("text", "choice", "expected"),
    [
        ("a b c d", "e f g h e f", "[CLS] a b because [SEP] e f [SEP]"),  # no room for a choice like that: half of it
        ("a", "e f g h e f", "[CLS] a because [SEP] e f g [SEP]"),
        ("a b c d", "e f g", "[CLS] a because [SEP] e f g [SEP]"),
    ],
)
def test_choices_that_are_longer_than_the_room(text: str, choice: str, expected: str) -> None:
    tokenizer, task = words_tokenizer("a b c d e f g h because"), MultipleChoice(max_length=8)
    row = {"text": text, "question": "cause", "choices": [choice, "a"], "label": 0}
    feature = task.encode(checked(task, row), tokenizer, [])[0]
    assert tokenizer.decode(feature["input_ids"][0]) == expected
    question = row | {"question": "h h h h h h"}
    assert max(map(len, task.encode(checked(task, question), tokenizer, [])[0]["input_ids"])) == 8


@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_a_question_keeps_its_tokens_whatever_the_tokenizer(kind: str) -> None:
    tokenizer = tokenizer_of("bytes") if kind == "bytes" else words_tokenizer("hello worlds")
    row = {"text": "hello worlds " * 20, "question": "worlds hello", "choices": ["hello", "worlds"], "label": 0}
    task = MultipleChoice(max_length=24)
    full = MultipleChoice(max_length=999).encode(checked(task, row), tokenizer, [])[0]["input_ids"]
    for ids, whole in zip(task.encode(checked(task, row), tokenizer, [])[0]["input_ids"], full, strict=True):
        tail = next(n for n in range(len(whole)) if "worlds hello" in tokenizer.decode(whole[len(whole) - n :]))
        assert ids == whole[: 24 - tail] + whole[len(whole) - tail :]


def test_a_word_s_first_token_bears_its_tag() -> None:
    tokenizer = words_tokenizer()
    row = {"tokens": ["a", "xy", "xy", "b"], "tags": ["O", "B-X", "I-X", "O"]}
    names = ["B-X", "I-X", "O"]
    encoded = TokenClassification().encode([row], tokenizer, names)[0]
    assert encoded["labels"] == [IGNORED, 2, 0, IGNORED, 1, IGNORED, 2, IGNORED]
    everywhere = TokenClassification(label_subwords="all")
    assert everywhere.encode([row], tokenizer, names)[0]["labels"] == [IGNORED, 2, 0, 1, 1, 1, 2, IGNORED]
    assert everywhere.encode([row], tokenizer, names, held_out=True)[0]["labels"] == encoded["labels"]
    small = {"tokens": row["tokens"], "tags": ["o", "b-X", "i-X", "o"]}
    told = everywhere.encode([small], tokenizer, ["b-X", "i-X", "o"])[0]
    assert told["labels"] == everywhere.encode([row], tokenizer, names)[0]["labels"]
    short = {"tokens": ["a"], "tags": ["O"]}
    batch = TokenClassification().collator(tokenizer)(
        [encoded, *TokenClassification().encode([short], tokenizer, names)]
    )
    assert batch["labels"].tolist()[1] == [IGNORED, 2, *[IGNORED] * 6]


@pytest.mark.parametrize("stride", [0, 1, 3])
def test_words_of_long_sentences_count_once(stride: int) -> None:
    tokenizer, names, generator = words_tokenizer(), ["B-X", "I-X", "O"], random.Random(0)
    task = TokenClassification(max_length=9, stride=stride)
    rows = []
    for length in (0, 1, 5, 7, 8, 30):
        tags = [generator.choice(names) for _ in range(length)]
        rows.append({"tokens": generator.choices(["a", "b", "xy"], k=length), "tags": tags})
    features = task.encode(rows, tokenizer, names, held_out=True)
    assert max(len(f["input_ids"]) for f in features) == 9
    for row in rows:
        found = [
            (w, f["labels"][n], f["input_ids"][n]) for f in features if f["row"] is row for n, w in f["words"].items()
        ]
        assert [word for word, _, _ in found] == list(range(len(row["tokens"])))
        assert [names[label] for _, label, _ in found] == row["tags"]
        assert [tokenizer.convert_ids_to_tokens(i) for _, _, i in found] == [
            w.replace("xy", "x") for w in row["tokens"]
        ]
    labels = np.full((len(features), 9), IGNORED)
    for place, feature in zip(labels, features, strict=True):
        place[: len(feature["labels"])] = feature["labels"]
    right = np.where(labels == IGNORED, 1, labels)
    assert task.compute_metrics(EvalPrediction(right, labels), features, names)["f1"] == 1.0
    wrong = task.compute_metrics(EvalPrediction(np.full_like(labels, 2), labels), features, names)
    tags = [tag for row in rows for tag in row["tags"]]
    assert wrong["f1"] == 0.0 and wrong["accuracy"] == pytest.approx(tags.count("O") / len(tags))


def test_a_predicate_stands_behind_its_sentence() -> None:
    tokenizer = words_tokenizer("a b *")
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    row = {"tokens": ["a", "xy", "b", "xy"], "tags": ["B-ARG0", "B-V", "O", "O"], "predicate_index": "1"}
    task = TokenClassification(unscored=["V"])
    names = ["B-ARG0", "B-V", "O"]
    feature = task.encode(checked(task, row), tokenizer, names)[0]
    assert text_of(tokenizer, feature["input_ids"]) == "[CLS] a * xy * b xy [SEP] xy [SEP]"
    assert feature["token_type_ids"] == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1]  # the first xy is meant
    assert feature["labels"] == [IGNORED, 0, IGNORED, 1, IGNORED, IGNORED, 2, 2, *[IGNORED] * 5]
    assert feature["words"] == {1: 0, 3: 1, 6: 2, 7: 3}
    bare = replace(task, predicate_marks=[])
    plain = bare.encode(checked(task, row), tokenizer, names)[0]
    assert text_of(tokenizer, plain["input_ids"]) == "[CLS] a xy b xy [SEP] xy [SEP]"
    assert plain["labels"] == [IGNORED, 0, 1, IGNORED, 2, 2, *[IGNORED] * 5]
    other = replace(task, predicate_marks=["a", "b"]).encode(checked(task, row), tokenizer, names)[0]
    assert text_of(tokenizer, other["input_ids"]) == "[CLS] a a xy b b xy [SEP] xy [SEP]"
    for wrong in (["*"], ["*", ""], ["a", "b", "c"]):
        with pytest.raises(RecipeError, match="expected the word before the predicate and the one behind it"):
            TokenClassification(predicate_marks=wrong)
    windows = replace(bare, max_length=8, stride=0).encode(checked(task, row), tokenizer, names)
    texts = [text_of(tokenizer, f["input_ids"]) for f in windows]
    assert texts == ["[CLS] a xy [SEP] xy [SEP]", "[CLS] b xy [SEP] xy [SEP]"]
    # predicates are given, so finding them is no merit: one argument of one is right
    labels = np.array([feature["labels"]])
    found = task.compute_metrics(EvalPrediction(np.where(labels == 1, 2, labels), labels), [feature], names)
    assert found["f1"] == 1.0
    with pytest.raises(RecipeError, match="predicate_index is 4; expected a number from 0, of one of 4 tokens"):
        task.check_row(row | {"predicate_index": 4}, "row 1")


def question_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        words = generator.choices(["a", "bb", "xy", "c"], k=generator.randint(4, 40))
        first = generator.randrange(len(words) - 3)
        text = " ".join(words[first : first + generator.randint(1, 3)])
        start = len(" ".join(words[:first])) + (first > 0)
        rows.append(
            {"context": " ".join(words), "question": "d e", "answers": {"text": [text], "answer_start": [start]}}
        )
    return rows


def oracle(features: Sequence[dict[str, Any]]) -> tuple[Any, Any]:
    """Logits that know the answer, and prefer no window without it."""
    longest = max(len(f["input_ids"]) for f in features)
    starts, ends = np.full((len(features), longest), -9.0), np.full((len(features), longest), -9.0)
    for n, feature in enumerate(features):
        inside = feature["start_positions"] != feature["null"]
        starts[n, feature["start_positions"]] = ends[n, feature["end_positions"]] = 9.0 if inside else 1.0
    return starts, ends


@pytest.mark.parametrize(("length", "stride"), [(64, 8), (16, 8), (16, 5)])
def test_answers_come_back_from_windows(length: int, stride: int) -> None:
    tokenizer = words_tokenizer("a bb c d e")
    task = QuestionAnswering(max_length=length, stride=stride)
    rows = checked(task, *question_rows(30))
    features = task.encode(rows, tokenizer, [])
    assert max(len(f["input_ids"]) for f in features) <= length and len(features) >= len(rows)
    for feature in features:
        span = feature["input_ids"][feature["start_positions"] : feature["end_positions"] + 1]
        if feature["start_positions"] != feature["null"]:
            assert text_of(tokenizer, span) == feature["row"]["answers"]["text"][0]
    reached = [r for r in rows if any(f["row"] is r and f["start_positions"] != f["null"] for f in features)]
    assert len(reached) == len(rows)  # strides are as long as answers
    assert task.compute_metrics(EvalPrediction(oracle(features), None), features, []) == {"exact_match": 1.0, "f1": 1.0}


def test_the_best_span_is_the_best_of_all() -> None:
    tokenizer = words_tokenizer("a bb c d e")
    generator = np.random.default_rng(0)
    task = QuestionAnswering(
        max_length=14, stride=4, n_best=99, max_answer_length=3, unanswerable=True, null_threshold=0.5
    )
    rows = checked(task, *question_rows(20))
    features = task.encode(rows, tokenizer, [])
    starts, ends = generator.normal(size=(2, len(features), 16)) * 2
    starts[:, 0] += 6
    found = {id(row): (text, score) for row, text, score in task.best_spans(starts, ends, features)}
    assert "" in {text for text, _ in found.values()} != {""}
    for row in rows:
        best, text, null = -np.inf, "", np.inf
        for n, feature in enumerate(features):
            if feature["row"] is not row:
                continue
            null = min(null, starts[n, 0] + ends[n, 0])
            places = [k for k, place in enumerate(feature["offsets"]) if place]
            for i in places:
                for j in places:
                    if i <= j < i + 3 and starts[n, i] + ends[n, j] > best:
                        best = starts[n, i] + ends[n, j]
                        text = row["context"][feature["offsets"][i][0] : feature["offsets"][j][1]]
        expected = ("", null) if null > best + 0.5 else (text, best)
        assert found[id(row)] == (expected[0], pytest.approx(expected[1]))


@pytest.mark.parametrize(
    ("context", "answer", "start", "expected"),
    [
        (" a b c", " a", 0, ("a", 1)),
        ("a b c ", "c ", 4, ("c", 4)),
        ("a b\n", " b\n", 1, ("b", 2)),
        ("a\u00a0b c", "\u00a0b c", 1, ("b c", 2)),
    ],
)
def test_spaces_around_an_answer_are_none_of_it(
    context: str, answer: str, start: int, expected: tuple[str, int]
) -> None:
    tokenizer, task = words_tokenizer(), QuestionAnswering()
    row = {"context": context, "question": "d", "answers": {"text": [answer], "answer_start": [start]}}
    (row,) = checked(task, row)
    assert row["answers"] == {"text": [expected[0]], "answer_start": [expected[1]]}
    feature = task.encode([row], tokenizer, [])[0]
    span = feature["input_ids"][feature["start_positions"] : feature["end_positions"] + 1]
    assert tokenizer.decode(span) == expected[0]
    with pytest.raises(RecipeError, match="has no answer; set task_options.unanswerable"):
        task.check_row({"context": "a b", "question": "d", "answers": [" ", 1]}, "here")


def test_questions_without_answer() -> None:
    tokenizer = words_tokenizer()
    row = {"context": "a b", "question": "c " * 9, "answers": {"text": [], "answer_start": []}}
    with pytest.raises(RecipeError, match=r"row 1: has no answer; set task_options\.unanswerable"):
        QuestionAnswering().check_row(row, "row 1")
    task = QuestionAnswering(unanswerable=True, max_question_length=3)
    feature = task.encode(checked(task, row), tokenizer, [])[0]
    assert tokenizer.decode(feature["input_ids"]) == "[CLS] c c c [SEP] a b [SEP]"
    assert feature["start_positions"] == feature["end_positions"] == 0
    starts, ends = oracle([feature])
    assert task.compute_metrics(EvalPrediction((starts, ends), None), [feature], [])["NoAns_f1"] == 1.0
    moved = {"context": "a b", "question": "c", "answers": {"text": ["b"], "answer_start": [1]}}
    with pytest.raises(RecipeError, match="the answer 'b' is not at character 1; there is ' '"):
        task.check_row(moved, "row 1")
    with pytest.raises(RecipeError, match="leaves no room for a context beside a question of 3 tokens"):
        QuestionAnswering(max_length=6, max_question_length=3, unanswerable=True).encode(
            checked(task, row), tokenizer, []
        )


def test_places_stay_where_the_tokenizer_pads_before() -> None:
    tokenizer = words_tokenizer("a bb c d e")
    tokenizer.padding_side = "left"
    questions, tags = QuestionAnswering(max_length=16, stride=8), TokenClassification()
    features = questions.encode(checked(questions, *question_rows(5)), tokenizer, [])
    batch = questions.collator(tokenizer)(features)
    for ids, start, feature in zip(batch["input_ids"], batch["start_positions"], features, strict=True):
        assert ids[: len(feature["input_ids"])].tolist() == feature["input_ids"]
        assert start == feature["start_positions"]
    rows = [{"tokens": ["a"] * n, "tags": ["O"] * n} for n in (1, 4)]
    batch = tags.collator(tokenizer)(tags.encode(rows, tokenizer, ["O"]))
    assert batch["labels"].tolist() == [[IGNORED, 0, *[IGNORED] * 4], [IGNORED, 0, 0, 0, 0, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_places_are_those_of_the_row_with_virtual_tokens(method: str) -> None:
    tokenizer = words_tokenizer("a bb c d e")
    task = QuestionAnswering(max_length=32)
    features = task.encode(checked(task, *question_rows(3)), tokenizer, [])
    model = get_ptune_model(
        build("bert", "QUESTION_ANS").float(), PTuneConfig(method=method, num_virtual_tokens=5)
    ).eval()
    batch = task.collator(tokenizer)(features)
    output = run_model(task, model, tokenizer, features)
    assert output.start_logits.shape == output.end_logits.shape == batch["input_ids"].shape
    losses = [
        torch.nn.functional.cross_entropy(logits, batch[f"{name}_positions"])
        for name, logits in (("start", output.start_logits), ("end", output.end_logits))
    ]
    assert torch.allclose(output.loss, sum(losses) / 2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_answer_alone_has_labels(side: str) -> None:
    tokenizer = words_tokenizer()
    tokenizer.padding_side = side
    rows = [{"prompt": "a b", "answer": "c"}, {"prompt": "a", "answer": "d"}]
    rows = checked(CausalLM(), *rows)
    encoded = CausalLM().encode(rows, tokenizer, [])
    assert tokenizer.decode(encoded[0]["input_ids"]) == "[CLS] a b c [SEP]"
    batch = CausalLM().collator(tokenizer)(encoded)
    for ids, labels, answer in zip(batch["input_ids"], batch["labels"], ("c [SEP]", "d [SEP]"), strict=True):
        kept = labels != IGNORED
        assert tokenizer.decode(ids[kept]) == tokenizer.decode(labels[kept]) == answer
    short = CausalLM(max_length=3).encode(rows, tokenizer, [])[0]
    assert tokenizer.decode(short["input_ids"]) == "[CLS] c [SEP]" and short["labels"][0] == IGNORED
    long = CausalLM(max_length=4).encode(checked(CausalLM(), {"prompt": "a b", "answer": "c d e f"}), tokenizer, [])[0]
    assert tokenizer.decode(long["input_ids"]) == "[CLS] b c d"  # half of the room is the prompt's


def test_instructions() -> None:
    tokenizer = words_tokenizer("Human Assistant : a b c")
    rows = [{"instruction": "a", "input": "b", "output": "c"}, {"instruction": "a", "input": "", "output": "b"}]
    task = CausalLM()
    rows = checked(task, *rows)
    assert task._prompt(rows[0], tokenizer) == "Human: a\nb\n\nAssistant: "
    assert task._prompt(rows[1], tokenizer) == "Human: a\n\nAssistant: "
    feature = task.encode(rows, tokenizer, [])[0]
    assert [i for i in feature["labels"] if i != IGNORED] == tokenizer.convert_tokens_to_ids(["c", "[SEP]"])
    own = CausalLM(template="b {instruction} :")
    assert tokenizer.decode(own.encode(rows, tokenizer, [])[1]["source_ids"]).startswith("[CLS] b a :")
    with pytest.raises(RecipeError, match="expected a text with {instruction}"):
        CausalLM(template="no place")


def test_chat_templates() -> None:
    tokenizer = words_tokenizer("user assistant a b c end")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} end\n{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    task = CausalLM()
    row = checked(task, {"instruction": "a", "input": "b", "output": "c"})[0]
    feature = task.encode([row], tokenizer, [])[0]
    assert tokenizer.decode(feature["input_ids"]) == "user a b end assistant c end"
    assert tokenizer.decode([i for i in feature["labels"] if i != IGNORED]) == "c end"
    assert tokenizer.decode(feature["source_ids"]) == "user a b end assistant"
    with pytest.raises(RecipeError, match=r"instructions are written by the tokenizer's chat template; leave task_op"):
        CausalLM(separator=" ").encode([row], tokenizer, [])
    own = CausalLM(separator=" ", template="b {instruction}").encode([row], tokenizer, [])[0]
    assert tokenizer.decode(own["input_ids"]).split()[:-1] == ["[CLS]", "b", "a", "b", "c"]
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "assistant a")
    with pytest.raises(RecipeError, match=r"set task_options\.template"):
        task.encode([row], tokenizer, [])


CONVERSATION = [
    {"role": "system", "content": "g"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


def learned(tokenizer: Any, feature: Any) -> str:
    return tokenizer.decode([i for i in feature["labels"] if i != IGNORED])  # type: ignore[no-any-return]


def test_conversations() -> None:
    tokenizer = words_tokenizer("user assistant system a b c d g end")
    with pytest.raises(RecipeError, match="has no chat template to write them by"):
        CausalLM().encode(checked(CausalLM(), {"messages": CONVERSATION}), tokenizer, [])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} end\n{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    task = CausalLM()
    row = checked(task, {"messages": CONVERSATION})[0]
    feature = task.encode([row], tokenizer, [])[0]
    before = "system g end user a end assistant b end user c end assistant"
    assert tokenizer.decode(feature["input_ids"]) == f"{before} d end"
    assert learned(tokenizer, feature) == "b end d end"
    assert learned(tokenizer, task.encode([row], tokenizer, [], held_out=True)[0]) == "d end"  # is what is asked for
    kept = [n for n, i in enumerate(feature["labels"]) if i != IGNORED]
    assert [feature["input_ids"][n] for n in kept] == [feature["labels"][n] for n in kept]
    assert tokenizer.decode(feature["source_ids"]) == before and feature["references"] == ["d"]
    assert task.example(row, tokenizer) == CONVERSATION[:-1]  # the pipeline writes them by the template
    # an instruction is a conversation of one question
    one = task.encode(
        checked(task, {"messages": CONVERSATION[1:3]}, {"instruction": "a", "output": "b"}), tokenizer, []
    )
    assert one[0] == one[1]
    short = CausalLM(max_length=7).encode([row], tokenizer, [])[0]
    assert len(short["input_ids"]) == len(short["labels"]) == 7 and learned(tokenizer, short) == "end d end"


def test_answers_that_a_chat_template_writes_anew_are_learned_where_they_are_the_last() -> None:
    tokenizer = words_tokenizer("user assistant system a b c d g end")
    # as templates that drop the thoughts of earlier answers
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}assistant g end\n"
        "{% else %}{{ m.role }} {{ m.content }} end\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    task = CausalLM()
    rows = checked(task, {"messages": CONVERSATION[1:]})
    first, second = task.encode(rows, tokenizer, [])
    assert tokenizer.decode(first["input_ids"]) == "user a end assistant b end"
    assert tokenizer.decode(second["input_ids"]) == "user a end assistant g end user c end assistant d end"
    assert [learned(tokenizer, f) for f in (first, second)] == ["b end", "d end"]
    assert task.encode(rows, tokenizer, [], held_out=True) == [second]


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_conversations_are_read_as_a_whole(scheme: str) -> None:
    """As apply_chat_template(tokenize=True) has it, whatever space a tokenizer begins its texts with."""
    words = [" ".join(["[INST]", "[/INST]", *"abcd"])] * 2
    raw = Tokenizer(BPE(unk_token="<unk>"))
    raw.pre_tokenizer = Metaspace(prepend_scheme=scheme)
    raw.train_from_iterator(words, BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"], vocab_size=60))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    feature = CausalLM().encode(checked(CausalLM(), {"messages": CONVERSATION[1:]}), tokenizer, [])[0]
    text = tokenizer.apply_chat_template(CONVERSATION[1:], tokenize=False)
    assert feature["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(learned(tokenizer, feature).split()) == "b</s>d</s>"


def test_messages_that_a_chat_template_refuses() -> None:
    tokenizer = words_tokenizer("user assistant a b c d g end")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m.role }} {{ m.content }} end\n{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    with pytest.raises(RecipeError, match=r"the row .*'system'.*refuses the messages \(.*no system here"):
        CausalLM().encode(checked(CausalLM(), {"messages": CONVERSATION}), tokenizer, [])
    for option in ({"template": "a {instruction}"}, {"separator": " "}):
        with pytest.raises(RecipeError, match=r"leave task_options\.template and separator out"):
            checked(CausalLM(**option), {"messages": CONVERSATION})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("a", "messages holds a; expected"),
        ([], r"messages holds \[\]; expected"),
        ([{"from": "human", "value": "a"}], "message 1 is .*human.*without text under role and content"),
        (CONVERSATION[:2], "the last message is of 'user'"),
        (CONVERSATION[2:3], "messages holds an answer, and nothing that it answers"),
        ([*CONVERSATION[:2], {"role": "assistant", "content": " "}], "the last message is empty"),
    ],
)
def test_messages_that_are_no_conversation(messages: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=f"row 7: {message}"):
        CausalLM().check_row({"messages": messages}, "row 7")


def test_types_that_no_tag_has_are_not_left_unscored() -> None:
    row, tokenizer = {"tokens": ["a"], "tags": ["B-PER"]}, words_tokenizer()
    assert TokenClassification(unscored=["LOC"]).encode([row], tokenizer, ["B-LOC", "B-PER", "O"])
    with pytest.raises(RecipeError, match="task_options.unscored has 'nope', .* the tags are of LOC, PER"):
        TokenClassification(unscored=["LOC", "nope"]).encode([row], tokenizer, ["B-LOC", "B-PER", "O"])


@pytest.mark.parametrize(("most", "room"), [(-1, False), (0, False), (2, False), (3, True)])
def test_a_target_has_room_beside_special_tokens(most: int, room: bool) -> None:
    row = {"text": "a", "references": ["b c"]}
    if room:
        feature = Seq2SeqLM(max_target_length=most).encode([row], words_tokenizer(), [])[0]
        assert text_of(words_tokenizer(), feature["labels"]) == "[CLS] b [SEP]"
        return
    with pytest.raises(RecipeError, match=rf"task_options.max_target_length.*{most}"):
        Seq2SeqLM(max_target_length=most).encode([row], words_tokenizer(), [])


def test_several_references() -> None:
    tokenizer = words_tokenizer()
    task = CausalLM()
    rows = checked(task, {"prompt": [["a", "b"], ["c", "d"]], "references": ["e", "f"]})
    assert rows[0]["prompt"] == "a : b | c : d"
    train, held_out = (task.encode(rows, tokenizer, [], held_out=h) for h in (False, True))
    assert [tokenizer.decode(f["input_ids"][-2:-1]) for f in train] == ["e", "f"]
    assert len(held_out) == 1 and held_out[0]["references"] == ["e", "f"]


@pytest.mark.parametrize(("family", "task"), [("gpt2", CausalLM()), ("llama", CausalLM()), ("t5", Seq2SeqLM())])
def test_answers_do_not_depend_on_the_batch(family: str, task: Any) -> None:
    tokenizer = words_tokenizer()
    torch.manual_seed(0)
    config = PTuneConfig(method="p_tuning_v2", num_virtual_tokens=3)
    model = get_ptune_model(build(family, task.name).float(), config).eval()
    sources = [tokenizer(text)["input_ids"] for text in ("a", "a b c d e", "b c")]
    together = task.write(model, tokenizer, sources, 3)
    assert together == [task.write(model, tokenizer, [s], 1)[0] for s in sources]
    assert not model.training


def test_masks_are_drawn_anew_in_training_only() -> None:
    tokenizer = words_tokenizer()
    task = MaskedLM(mask_probability=0.3)
    rows = [{"text": "a b c d e f g h"}, {"text": "a"}]
    assert task.encode(rows, tokenizer, [], held_out=True) == task.encode(rows, tokenizer, [], held_out=True)
    features = task.encode(rows, tokenizer, [])
    collate = task.collator(tokenizer)
    torch.manual_seed(0)
    batches = [collate(features) for _ in range(50)]
    original = collate([f | {"labels": [IGNORED] * len(f["input_ids"])} for f in features])["input_ids"]
    assert len({str(b["labels"].tolist()) for b in batches}) > 25
    for batch in batches:
        asked = batch["labels"] != IGNORED
        assert torch.equal(batch["labels"][asked], original[asked]) and bool(asked.any(dim=1).all())
        assert torch.equal(batch["input_ids"][~asked], original[~asked])
        assert not bool(asked[:, 0].any())
    part = np.mean([(b["labels"][0, 1:9] != IGNORED).float().mean() for b in batches])
    assert part == pytest.approx(0.3, abs=0.07)
    no_mask = words_tokenizer()
    no_mask.mask_token = None
    with pytest.raises(RecipeError, match="has no mask token"):
        task.encode(rows, no_mask, [])


def test_facts_mask_their_object() -> None:
    tokenizer = words_tokenizer()
    task = MaskedLM()
    row = {"sub_label": "a b", "obj_label": "xy", "template": "[X] c [Y] d"}
    other = row | {"template": "[Y] c [X]", "obj_label": "a"}
    features = task.encode(checked(task, row, other), tokenizer, [])
    assert [tokenizer.decode(f["input_ids"]) for f in features] == [
        "[CLS] a b c [MASK] [MASK] d [SEP]",
        "[CLS] [MASK] c a b [SEP]",
    ]
    assert [text_of(tokenizer, [i for i in f["labels"] if i != IGNORED]) for f in features] == ["xy", "a"]
    with pytest.raises(RecipeError, match=r"expected \[Y\] in it once"):
        task.check_row(row | {"template": "[X] c"}, "row 1")
    with pytest.raises(RecipeError, match="is beyond 4 tokens"):
        MaskedLM(max_length=4).encode([row], tokenizer, [])
    with pytest.raises(RecipeError, match=r"the object of 'a b c xy d' is beyond 6 tokens, in whole or in part"):
        MaskedLM(max_length=6).encode([row], tokenizer, [])
    spaced = MaskedLM(max_length=7).encode([row | {"obj_label": "xy "}], tokenizer, [])[0]
    assert text_of(tokenizer, [i for i in spaced["labels"] if i != IGNORED]) == "xy"


def test_cards_ask_as_the_model_has_learnt_to_be_asked() -> None:
    row = checked(CausalLM(), {"instruction": "say a", "output": "b"})[0]
    assert CausalLM().example(row, words_tokenizer()) == "Human: say a\n\nAssistant: "
    text = checked(SequenceClassification(), {"text": "a b", "label": "c"})[0]
    assert SequenceClassification().example(text, words_tokenizer()) == "a b"
    pair = checked(SequenceClassification(), {"text": "a b", "text_pair": "d", "label": "c"})[0]
    assert SequenceClassification().example(pair, words_tokenizer()) == {"text": "a b", "text_pair": "d"}
    prefixed = Seq2SeqLM(prefix="shorten: ")
    table = checked(prefixed, {"text": [["a", "b"], ["d"]], "target": "c"})[0]
    assert prefixed.example(table, words_tokenizer()) == "shorten: a : b | d"
    cloze = ClozeMaskedLM(template="{first} ? [MASK] , {second}", verbalizer={"c": "b"})
    facts = checked(cloze, {"first": "a b", "second": 1, "label": "c"})[0]
    assert cloze.example(facts, words_tokenizer()) == {"first": "a b", "second": "1"}
    tagged = checked(TokenClassification(), {"tokens": ["a"], "tags": ["O"]})[0]
    assert TokenClassification().example(tagged, words_tokenizer()) is None
