"""Templates: where in a text the fields of a row, virtual tokens and the word to predict stand."""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerBase

from hf_ptune.endings import closing_ids, without_closing
from hf_ptune.errors import ConfigError, TemplateError

_TOKEN = "<|prompt_{}|>"
_PART = re.compile(r"\[P(?P<count>\d+)\]|(?P<mask>\[MASK\])|\{(?P<field>\w+)\}|(?P<brace>\{\{|\}\})")
_BROKEN = re.compile(r"\[P\d*\]?|\[MASK|\[mask|[{}]")


def virtual_tokens(count: int) -> list[str]:
    """Names of virtual tokens in a tokenizer, in the order of the prompt."""
    return [_TOKEN.format(n) for n in range(count)]


def add_virtual_tokens(tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """Make a tokenizer know the virtual tokens, as special tokens; nothing changes where it knows them.

    Their ids may lie beyond the base's embeddings, which are not resized: no such id reaches them.

    Args:
        tokenizer: changed in place.
        count: P.

    Returns:
        Their ids, in the order of the prompt.
    """
    names = virtual_tokens(count)
    known = tokenizer.get_vocab()
    # the space before one is its own, so that a field ends as it would at the end of a text
    new = [AddedToken(n, lstrip=True, special=True, normalized=False) for n in names if n not in known]
    if new:
        tokenizer.add_special_tokens({"extra_special_tokens": new}, replace_extra_special_tokens=False)
    ids: list[int] = tokenizer.convert_tokens_to_ids(names)
    return ids


def name_virtual_tokens(config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer know the virtual tokens of a configuration's template, and the configuration their ids.

    Args:
        config: a PTuneConfig; nothing happens where its template places none.
        tokenizer: changed in place.

    Raises:
        ConfigError: the configuration has other ids, those of another tokenizer.
    """
    if not config.places_tokens:
        return
    ids = add_virtual_tokens(tokenizer, config.num_virtual_tokens)
    if config.virtual_token_ids not in (None, ids):
        raise ConfigError(
            f"virtual tokens have the ids {ids[0]} … {ids[-1]} in the tokenizer, but {config.virtual_token_ids[0]} … "
            f"{config.virtual_token_ids[-1]} in the configuration. Use the tokenizer that the adapter was made with."
        )
    config.virtual_token_ids = ids


@dataclass(frozen=True)
class Encoded:
    """Hold a row's tokens.

    Args:
        inputs: what the model takes, without a batch axis (input_ids, attention_mask, …).
        answer_at: the position whose logits answer, that of the mask, or of the last token before the answer of a
            causal model; `None` without `[MASK]`.
    """

    inputs: dict[str, list[int]]
    answer_at: int | None


@dataclass(frozen=True)
class Template:
    """Place fields, virtual tokens and a mask in a text (P-Tuning, Liu et al. 2021, section 3.1).

    Args:
        text: words, `{field}` for a field of the row, `[Pn]` for n virtual tokens, at most one `[MASK]` for the word
            to predict; `{{` and `}}` are braces.
        parts: kind ("words", "field", "virtual", "mask") and content of its parts in order.
    """

    text: str
    parts: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, text: str) -> "Template":
        """Read a template, e.g. `"[P3] {sentence} [P3] [MASK] [P2]"`.

        Raises:
            ConfigError: it is empty, has two masks, or something that looks like a part and is none.
        """
        parts: list[tuple[str, str]] = []
        end = 0
        for match in _PART.finditer(text):
            parts += _words(text[end : match.start()], text)
            end = match.end()
            if match["count"]:
                if int(match["count"]) < 1:
                    raise ConfigError(f"the template {text!r} has {match[0]}; expected at least one token: [P1].")
                parts.append(("virtual", match["count"]))
            elif match["mask"]:
                parts.append(("mask", ""))
            elif match["field"]:
                parts.append(("field", match["field"]))
            else:
                parts.append(("words", match[0][0]))
        parts += _words(text[end:], text)
        if not parts or sum(kind == "mask" for kind, _ in parts) > 1:
            raise ConfigError(f"the template {text!r} needs some part, and at most one [MASK].")
        return cls(text, tuple(parts))

    @property
    def num_virtual_tokens(self) -> int:
        """P, over all `[Pn]`."""
        return sum(int(content) for kind, content in self.parts if kind == "virtual")

    @property
    def fields(self) -> list[str]:
        """Names of the fields, each once, in order."""
        return list(dict.fromkeys(content for kind, content in self.parts if kind == "field"))

    @property
    def has_mask(self) -> bool:
        return any(kind == "mask" for kind, _ in self.parts)

    @property
    def spaced(self) -> bool:
        """Whether the word to predict follows a space, and so is a word's beginning to most tokenizers."""
        before = self.text.partition("[MASK]")[0]
        return bool(before.strip()) and before[-1] == " "

    @property
    def behind(self) -> str:
        """The sign of punctuation, or end of a line, of the template's own that the word to predict follows, if any."""
        kinds = [kind for kind, _ in self.parts]
        at = kinds.index("mask") if self.has_mask else 0
        last = self.parts[at - 1][1][-1] if at and kinds[at - 1] == "words" else ""
        return last if last == "\n" or (last and unicodedata.category(last).startswith("P")) else ""

    def check_causal(self) -> None:
        """Refuse a template that a causal model could not answer.

        Raises:
            ConfigError: something stands after the mask.
        """
        if self.has_mask and (self.parts[-1][0] != "mask"):
            raise ConfigError(
                f"the template {self.text!r} goes on after [MASK], but a causal model predicts what follows all it "
                "has read. Let [MASK] stand last."
            )

    def render(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, causal: bool = False) -> str:
        """Write the text that the tokenizer reads.

        Args:
            row: has a value for every field.
            tokenizer: names the mask.
            causal: whether the mask is the end of the text, rather than a token.

        Raises:
            TemplateError: the row lacks a field, or holds the text of a virtual token or of the mask.
        """
        return self._write(row, tokenizer, causal)[0]

    def encode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        row: Mapping[str, Any],
        max_length: int | None = None,
        causal: bool = False,
        closing: list[int] | None = None,
    ) -> Encoded:
        """Turn a row into tokens: those of the rendered text, the longest field cut at its end where they are too many.

        Args:
            tokenizer: knows the virtual tokens (`add_virtual_tokens`); a fast one where something has to be cut.
            row: has a value for every field.
            max_length: tokens at most, the tokenizer's own special tokens included.
            causal: see `render`.
            closing: the `closing_ids` of the tokenizer, for whoever reads many rows; asked for when unset.

        Raises:
            ConfigError: a causal model could not answer the template.
            TemplateError: the row does not fit the template, or the template alone is too long.
        """
        if causal:
            self.check_causal()
        text, spans = self._write(row, tokenizer, causal)
        encoding = tokenizer(text, return_offsets_mapping=tokenizer.is_fast)
        offsets = encoding.pop("offset_mapping", None)
        kept = list(range(len(encoding["input_ids"])))
        if causal and self.has_mask:  # the answer goes on where a closing token would stand
            closing = closing_ids(tokenizer) if closing is None else closing
            kept = kept[: len(without_closing(encoding["input_ids"], closing))]
        if max_length is not None and len(kept) > max_length:
            kept = self._cut(text, spans, offsets, kept, max_length)
        inputs = {name: [values[i] for i in kept] for name, values in encoding.items()}
        self._check_virtual(inputs["input_ids"], tokenizer)
        if not self.has_mask:
            return Encoded(inputs, None)
        return Encoded(inputs, len(kept) - 1 if causal else inputs["input_ids"].index(tokenizer.mask_token_id))

    def _write(
        self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, causal: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the span of every field in it."""
        mask = "" if causal else self._mask_of(tokenizer)
        tokens = iter(virtual_tokens(self.num_virtual_tokens))
        text, spans = "", []
        for kind, content in self.parts:
            if kind == "field":
                value = self._value(row, content, mask)
                spans.append((len(text), len(text) + len(value)))
                text += value
            elif kind == "virtual":
                text += "".join(next(tokens) for _ in range(int(content)))
            else:
                text += mask if kind == "mask" else content
        return (text.rstrip(" ") if causal else text), spans

    def _mask_of(self, tokenizer: PreTrainedTokenizerBase) -> str:
        if self.has_mask and tokenizer.mask_token is None:
            raise TemplateError(
                f"the template {self.text!r} has [MASK], but {type(tokenizer).__name__} has no mask token. With a "
                "causal model let [MASK] stand last."
            )
        return str(tokenizer.mask_token)

    def _value(self, row: Mapping[str, Any], field: str, mask: str) -> str:
        if row.get(field) is None:
            raise TemplateError(
                f"the template {self.text!r} has the field {field!r}, the row has {', '.join(map(str, row))}. Give the "
                "row that field, or name another in the template."
            )
        value = str(row[field]).strip()
        special = [t for t in (*virtual_tokens(self.num_virtual_tokens), mask if self.has_mask else "") if t]
        if found := [t for t in special if t in value]:
            raise TemplateError(
                f"the field {field!r} of a row holds the text {found[0]!r}, a special token. Remove it."
            )
        return value

    def _cut(
        self,
        text: str,
        spans: list[tuple[int, int]],
        offsets: list[tuple[int, int]] | None,
        kept: list[int],
        max_length: int,
    ) -> list[int]:
        if offsets is None:
            raise TemplateError(
                f"a row has {len(kept)} tokens, more than max_length={max_length}, and only a fast tokenizer tells "
                "which of them are the fields'. Use a fast one, or shorten the rows."
            )
        inside: list[list[int]] = [[] for _ in spans]
        for i in kept:
            start, end = offsets[i]
            start += len(text[start:end]) - len(text[start:end].lstrip())  # some count the space before
            for number, (first, last) in enumerate(spans):
                if first <= start <= end <= last and first < end:  # a token of spaces alone ends where it starts
                    inside[number].append(i)
        excess = len(kept) - max_length
        if sum(map(len, inside)) < excess:
            raise TemplateError(
                f"the template {self.text!r} alone has {len(kept) - sum(map(len, inside))} tokens, more than "
                f"max_length={max_length}. Raise it, or take fewer virtual tokens."
            )
        gone = {max(inside, key=len).pop() for _ in range(excess)}
        return [i for i in kept if i not in gone]

    def _check_virtual(self, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
        if not self.num_virtual_tokens:
            return
        names = virtual_tokens(self.num_virtual_tokens)
        expected = tokenizer.convert_tokens_to_ids(names)
        wanted = set(expected)
        if [i for i in ids if i in wanted] != expected:
            raise TemplateError(
                f"{type(tokenizer).__name__} does not know the virtual tokens {names[0]} … {names[-1]}. Load it from "
                "the adapter's folder, or call hf_ptune.templates.add_virtual_tokens on it."
            )


def _words(words: str, text: str) -> list[tuple[str, str]]:
    if broken := _BROKEN.search(words):
        raise ConfigError(
            f"the template {text!r} has {broken[0]!r}, which is no part of a template. Parts are [P3] (three virtual "
            "tokens), [MASK], {field}, and words; write {{ and }} for braces."
        )
    return [("words", words)] if words else []
