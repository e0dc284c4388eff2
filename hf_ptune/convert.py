"""An adapter in another form: ours, PEFT's, or a plain tensor."""

import os
import shutil
from pathlib import Path
from typing import Any

from hf_ptune.adapter_file import is_foreign
from hf_ptune.configuration_ptune import PTuneConfig
from hf_ptune.errors import PTuneError
from hf_ptune.interop import load_peft, save_peft, save_prompt_embeds
from hf_ptune.modeling_ptune import CLASSES, PTunePreTrainedModel
from hf_ptune.publishing import fit_tokenizer, save_tokenizer, tokenizer_of
from hf_ptune.templates import name_virtual_tokens

FilePath = str | os.PathLike[str]
_OF_THE_SOURCE = ("revision", "subfolder", "token", "cache_dir", "local_files_only")
FORMS = ("hf_ptune", "peft", "prompt_embeds")


def convert(source: FilePath, target: FilePath, form: str, **kwargs: Any) -> None:
    """Write an adapter in another form.

    Args:
        source: folder or Hub id of an adapter of ours, or of PEFT's.
        target: where to write.
        form: "hf_ptune" or "peft", a folder; "prompt_embeds", a file.
        kwargs: of loading.

    Raises:
        PTuneError: the source cannot be read, or has no such form.
    """
    if form not in FORMS:
        raise PTuneError(f"an adapter has no form {form!r}; expected one of {', '.join(FORMS)}.")
    path = Path(target)
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise PTuneError(f"{target} is there already and not empty; name a new one.")
    own = {k: kwargs[k] for k in _OF_THE_SOURCE if k in kwargs}
    model = load_peft(source, **kwargs) if is_foreign(source, kwargs) else _load_own(source, kwargs)
    try:
        if form == "peft":
            save_peft(model, path)
        elif form == "prompt_embeds":
            path.parent.mkdir(parents=True, exist_ok=True)
            save_prompt_embeds(model, path)
        else:
            if (tokenizer := tokenizer_of(model.config, source, **own)) is not None:
                name_virtual_tokens(model.config, tokenizer)
                save_tokenizer(tokenizer, path)
                fit_tokenizer(model, path)
            model.save_pretrained(path, flatten=True)
    except BaseException:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise


def _load_own(source: FilePath, kwargs: dict[str, Any]) -> PTunePreTrainedModel:
    config = PTuneConfig.from_pretrained(source, **kwargs)
    task_class = CLASSES[config.task or "FEATURE_EXTRACTION"]
    loaded: PTunePreTrainedModel = task_class.from_pretrained(source, **kwargs)
    return loaded
