"""The tokenizer of an adapter that has none beside it: its base's."""

import os
from typing import Any

from transformers import AutoTokenizer, TokenizersBackend
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import cached_file

from hf_ptune.adapter_file import HUB_KEYS
from hf_ptune.configuration_ptune import PTuneConfig
from hf_ptune.errors import AdapterFileError
from hf_ptune.templates import name_virtual_tokens

_FILES = (
    TOKENIZER_CONFIG_FILE,
    *TokenizersBackend.vocab_files_names.values(),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "spm.model", "source.spm"),
)
_OF_THE_SOURCE = ("revision", "subfolder", "_commit_hash", "_from_auto")


def has_tokenizer(source: str | os.PathLike[str], **hub: Any) -> bool:
    """Whether a tokenizer stands beside an adapter.

    Args:
        source: folder or Hub id of the adapter.
        hub: revision, subfolder, token, cache_dir and local_files_only of the source.

    Raises:
        OSError: the Hub does not tell.
    """
    return any(cached_file(source, f, _raise_exceptions_for_missing_entries=False, **hub) for f in _FILES)


class AdapterTokenizer:
    """Read for AutoTokenizer what stands beside an adapter, where no file there names a class."""

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *inputs: Any, **kwargs: Any) -> Any:
        """Read the tokenizer beside an adapter, or its base's, with the template's virtual tokens, where there is none.

        The base's cuts texts to the base's length, which a prompt may leave less of; code of a base is not run.

        Args:
            source: folder or Hub id of the adapter.
            inputs: of the tokenizer.
            kwargs: of its `from_pretrained`; those of the source's own place go no further.

        Raises:
            AdapterFileError: there is no tokenizer, nor a base that could have one.
            OSError: the base has none.
        """
        from hf_ptune.backbone import read_tokenizer  # torch and models, which a tokenizer beside the adapter needs not

        hub = {k: kwargs[k] for k in (*HUB_KEYS, "revision", "subfolder") if kwargs.get(k) is not None}
        if has_tokenizer(source, **hub):
            return TokenizersBackend.from_pretrained(source, *inputs, **kwargs)
        config = PTuneConfig.from_pretrained(source, **hub)
        base = config.base_model_name_or_path
        if base is None or os.fspath(source) == base:
            raise AdapterFileError(
                f"{source} has no tokenizer, and names no base that could have one (base_model_name_or_path is "
                f"{base!r}); put the one that it was trained with beside it: tokenizer.save_pretrained(folder)."
            )
        rest = {k: v for k, v in kwargs.items() if k not in _OF_THE_SOURCE}
        tokenizer = read_tokenizer(base, config.base_model_revision, **rest | {"trust_remote_code": False})
        name_virtual_tokens(config, tokenizer)
        return tokenizer


AutoTokenizer.register(PTuneConfig, AdapterTokenizer, exist_ok=True)
