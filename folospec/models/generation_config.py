"""Reads what a checkpoint says about generating: end tokens and sampling defaults.

Files are written by many hands. A value that cannot be what it should be is dropped, with a warning
that names it and the file.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from folospec.models.checkpoint import read_json
from folospec.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

FILE = "generation_config.json"
SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""The fields that are sampling parameters: transformers' name -> the one of `SamplingParams`."""


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The generation config of a folder; empty if there is none.

    Raises:
        ValueError: the file is not a JSON object.
    """
    path = folder / FILE
    return read_json(path) if path.exists() else {}


def read_eos_token_ids(folder: Path, hf_config: Any, vocab_size: int) -> tuple[int, ...]:
    """Every token that ends an output: the generation config's, else the config's.

    Raises:
        ValueError: the generation config is not a JSON object.
    """
    file, found = "config.json", getattr(hf_config, "eos_token_id", None)
    generation = read_generation_config(folder)
    if "eos_token_id" in generation:
        file, found = FILE, generation["eos_token_id"]
    if found is None:
        return ()
    items = found if isinstance(found, (list, tuple)) else [found]
    ids = [item for item in items if _is_id(item, vocab_size)]
    if dropped := [item for item in items if not _is_id(item, vocab_size)]:
        logger.warning(
            "%s: eos_token_id must be token ids in 0..%d, dropped %s",
            folder / file,
            vocab_size - 1,
            ", ".join(map(repr, dropped)),
        )
    return tuple(dict.fromkeys(ids))


def read_sampling_defaults(folder: Path) -> dict[str, Any]:
    """The sampling parameters of a folder's generation config, by their names in `SamplingParams`.

    What is null or not there is left out. `do_sample` set to false is temperature 0.

    Raises:
        ValueError: the generation config is not a JSON object.
    """
    found, defaults = read_generation_config(folder), {}
    for name, parameter in SAMPLING.items():
        value = found.get(name)
        if value is None:
            continue
        try:
            SamplingParams(**{parameter: value})
        except (ValueError, TypeError) as error:
            logger.warning("%s: dropped %s=%r: %s", folder / FILE, name, value, error)
        else:
            defaults[parameter] = value
    if found.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return defaults


def _is_id(value: Any, vocab_size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size
