"""Reads the files of a checkpoint: JSON objects, and safetensors with or without an index.

Names and shapes are read before any tensor is, so that a checkpoint that does not fit its config is
refused before memory is allocated for it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FREQUENCIES = "rotary_emb.inv_freq"
"""Old checkpoints carry the rotary frequencies, which follow from the config."""
FLOATS = ("F64", "F32", "F16", "BF16")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that must hold a JSON object.

    Raises:
        ValueError: it cannot be read, is not JSON in UTF-8, or holds something else.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


class Checkpoint:
    """The safetensors files of a folder.

    `shapes` has the shape of every tensor by name, `types` the name of its type in safetensors.
    `folder` is where the files are.

    Raises:
        ValueError: there is no such file, one is damaged, or the index is wrong; the message names
            the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, str] = {}
        self._files: dict[str, str] = {}
        for file in _files(folder):
            with ExitStack() as stack:
                shard = _open(stack, folder / file, "cpu")
                for name in shard.keys():  # noqa: SIM118 (not a mapping)
                    if name in self._files:
                        raise ValueError(
                            f"{folder} has the tensor {name!r} twice: in {self._files[name]} and "
                            f"in {file}"
                        )
                    described = shard.get_slice(name)
                    self.shapes[name] = tuple(described.get_shape())
                    self.types[name] = described.get_dtype()
                    self._files[name] = file

    def read(self, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
        """Read every tensor, each from its mapped file when its turn comes.

        A tensor for a GPU goes there as it lies in the file, and is converted there; from the host,
        torch would convert it into a second copy first. On a CPU it is the mapped file itself.
        """
        place = torch.device(device)
        target = _indexed(place) if place.type == "cuda" else "cpu"
        for file in dict.fromkeys(self._files.values()):
            with ExitStack() as stack:
                shard = _open(stack, self.folder / file, target)
                for name in shard.keys():  # noqa: SIM118 (not a mapping)
                    yield name, shard.get_tensor(name)

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        with ExitStack() as stack:
            return _open(stack, self.folder / self._files[name], "cpu").get_tensor(name)

    def check(self, expected: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless the tensors are the expected ones by name and shape, and of a
        floating type. Rotary frequencies may be there too."""
        for name, shape in self.shapes.items():
            if name.endswith(FREQUENCIES):
                continue
            if name not in expected:
                raise ValueError(f"{self.folder} has the tensor {name!r}, which the config has not")
            wanted = expected[name].shape
            if shape != wanted:
                raise ValueError(
                    f"tensor {name!r} in {self.folder} must be {list(wanted)} by the config, "
                    f"got {list(shape)}"
                )
        self.check_types(expected)
        if missing := sorted(set(expected) - set(self.shapes)):
            raise ValueError(f"{self.folder} lacks the tensor {', '.join(map(repr, missing))}")

    def check_types(self, names: Iterable[str]) -> None:
        """Raise ValueError if a tensor of such a name is there and is not of a floating type:
        without a scale of its own it would be read as what it is not."""
        for name in names:
            if (kind := self.types.get(name, FLOATS[0])) not in FLOATS:
                raise ValueError(
                    f"tensor {name!r} in {self.folder} must be one of {', '.join(FLOATS)}, "
                    f"got {kind}"
                )

    def fill(
        self, destinations: Mapping[str, Tensor], device: torch.device, frequencies: Tensor
    ) -> None:
        """Copy the tensors into place, one at a time, converting to each place's type.

        Args:
            destinations: name -> tensor to fill; `check` has passed for them.
            device: where the destinations are.
            frequencies: what the config makes of the rotary frequencies. A checkpoint that carries
                others gets a warning, and the config's are used, as in transformers.
        """
        others = []
        for name, tensor in self.read(device):
            if name in destinations:
                destinations[name].copy_(tensor)
            elif not _agree(tensor, frequencies):
                others.append(name)
        if others:
            logger.warning(
                "%s has rotary frequencies other than the config's, which are used: %s",
                self.folder,
                ", ".join(others),
            )

    def ties(self, tie_word_embeddings: bool) -> bool:
        """Whether embedding and output matrix are one, as transformers decides it: the config says
        so, and the files do not hold two that differ. Where they do, a warning says so."""
        if not isinstance(tie_word_embeddings, bool):
            raise ValueError(
                f"tie_word_embeddings must be true or false, got {tie_word_embeddings!r}"
            )
        if not tie_word_embeddings or not {HEAD, EMBEDDING} <= set(self.shapes):
            return tie_word_embeddings
        if torch.equal(self.tensor(HEAD), self.tensor(EMBEDDING)):
            return True
        logger.warning(
            "the config in %s has tie_word_embeddings=true, but %s in its files differs from %s: "
            "it is used, and nothing is tied",
            self.folder,
            HEAD,
            EMBEDDING,
        )
        return False


def read_tensors(folder: Path, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """Read the tensors of a checkpoint, one at a time.

    Raises:
        ValueError: there is no safetensors file, one is damaged, or the index is wrong.
    """
    return Checkpoint(folder).read(device)


def _files(folder: Path) -> list[str]:
    index = folder / INDEX
    if not index.exists():
        if not (folder / WEIGHTS).is_file():
            raise ValueError(f"{folder} has no {WEIGHTS}; other weight formats are not read")
        return [WEIGHTS]
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index} must have a weight_map of names to files, got {files!r:.80}")
    for file in files.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index} must name files of its own folder, got {file!r}")
        if not (folder / file).is_file():
            raise ValueError(f"{index} names {file!r}, which is not there")
    return sorted(set(files.values()))


def _open(stack: ExitStack, path: Path, device: str) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return stack.enter_context(safe_open(path, "pt", device=device))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _indexed(device: torch.device) -> str:
    """The name of a GPU with its number, which safetensors takes to be 0 where there is none."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return f"cuda:{index}"


def _agree(found: Tensor, frequencies: Tensor) -> bool:
    """Up to the rounding of the 16-bit types that old checkpoints were saved in."""
    if found.shape != frequencies.shape or not found.is_floating_point():
        return False
    return torch.allclose(found.to(frequencies), frequencies, rtol=1e-2, atol=1e-4)
