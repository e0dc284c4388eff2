"""What a configuration from elsewhere may say: nothing that fills the memory, and a geometry that could be a base's."""

import copy
import re
from collections import Counter
from typing import Any

from hf_ptune.errors import ConfigError, shorten

SITES = ("encoder", "decoder", "cross")
_MOST_LAYERS, _MOST_LABELS = 4096, 2**20
_COUNTED = re.compile("layer|depth|attention_types")  # transformers makes lists of that many as it reads them
_SITE: dict[str, tuple[type, int, int]] = {
    "layer": (int, 0, _MOST_LAYERS),
    "heads": (int, 1, 2**16),
    "key_dim": (int, 1, 2**20),
    "value_dim": (int, 1, 2**20),
    "product": (int, 0, 16),
    "name": (str, 0, 0),
    "where": (str, 0, 0),
}


def without(settings: Any, names: set[str]) -> Any:
    """A deep copy without some names, however deep they are."""
    if isinstance(settings, dict):
        return {k: without(v, names) for k, v in settings.items() if k not in names}
    return [without(v, names) for v in settings] if isinstance(settings, list) else copy.deepcopy(settings)


def check_counts(settings: Any, name: str = "") -> None:
    """Refuse counts that fill the memory as soon as transformers reads them."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            check_counts(value, str(key))
    elif isinstance(settings, list):
        for value in settings:
            check_counts(value, name)
    elif isinstance(settings, int):
        most = _MOST_LABELS if name == "num_labels" else _MOST_LAYERS if _COUNTED.search(name) else None
        if most is not None and settings > most:
            raise ConfigError(f"{name}={settings} in config.json; expected at most {most}. Restore the file.")


def check_geometry(geometry: dict[str, Any]) -> None:
    """Refuse a geometry that `find_geometry` cannot have written."""
    kinds: dict[str, type] = {"sites": list, "causal": bool, "skipped": list, "embedding_dim": int}
    wrong = [f"{n}={geometry.get(n)!r}" for n, kind in kinds.items() if type(geometry.get(n)) is not kind]
    if not wrong:
        wrong = [f"skipped holds {n!r}" for n in geometry["skipped"] if not isinstance(n, str)]
        wrong += [] if 1 <= geometry["embedding_dim"] <= 2**20 else [f"embedding_dim={geometry['embedding_dim']}"]
        wrong += [message for site in geometry["sites"] for message in _wrong_in(site)]
    if not wrong:
        named = Counter(site["name"] for site in geometry["sites"])
        wrong = [f"{name} {count} times" for name, count in named.items() if count > 1]
    if wrong:
        raise ConfigError(
            f"geometry in config.json is not that of a base: {shorten('; '.join(wrong[:3]))}. Restore the file, or "
            "remove geometry from it, so that it is found anew."
        )


def _wrong_in(site: Any) -> list[str]:
    if not isinstance(site, dict):
        return [f"sites holds {site!r}"]
    wrong = []
    for name, (kind, least, most) in _SITE.items():
        value = site.get(name)
        fits = least <= value <= most if type(value) is int and kind is int else type(value) is kind
        if not fits or (name == "where" and value not in SITES):
            wrong.append(f"{name}={value!r} in {shorten(site.get('name'))}")
    return wrong
