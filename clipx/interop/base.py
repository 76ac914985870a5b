"""`Format`: what the files of a library are to clipx."""

from __future__ import annotations

import abc
import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int, UInt8
from safetensors.numpy import save_file

from clipx.errors import ConfigError
from clipx.interop.model import Model
from clipx.interop.rules import Arrays


@dataclasses.dataclass(frozen=True)
class Said:
    """A model's features of pictures and texts, float32 and of any length, and their scores."""

    image: Float[np.ndarray, "i d"]
    text: Float[np.ndarray, "t d"]
    logits: Float[np.ndarray, "i t"]


class Format(abc.ABC):
    """The files in which a library keeps a model: how they are written, read and verified.

    A format is one subclass in one file, listed in `formats.FORMATS`. It has no state.
    """

    name: ClassVar[str]  # of `--format`
    library: ClassVar[str]  # `library_name` of a card on the Hub
    judges: ClassVar[tuple[str, ...]]  # modules that verify an export; the last one loads it
    config: ClassVar[str]  # the JSON file that describes a model
    weights: ClassVar[str]  # the safetensors file that an export has
    torch_weights: ClassVar[str]  # torch's own file, for `--pt`
    weights_read: ClassVar[tuple[str, ...]]  # names of weights that are read, the best first
    expected: ClassVar[str]  # what a folder of this format has, for messages
    loading: ClassVar[str]  # Python that loads `{folder}`, for a card
    metadata: ClassVar[Mapping[str, str] | None] = None  # of the safetensors file
    # rules of cleaning that the format's tokenizers follow to the letter
    exact_cleaning: ClassVar[frozenset[str]] = frozenset()

    @abc.abstractmethod
    def arrays(self, model: Model) -> Arrays:
        """The library's arrays. Raises `NotExpressible` for a model that it cannot build."""

    @abc.abstractmethod
    def configs(self, model: Model, folder: str) -> dict[str, Any]:
        """The content of every JSON file, by name. Raises `NotExpressible` as `arrays` does.

        folder: where the library will load the export from.
        """

    def write_configs(self, model: Model, folder: pathlib.Path, at: str) -> None:
        """Writes the configs into `folder`, of an export that will be loaded from `at`."""
        for name, value in self.configs(model, at).items():
            text = json.dumps(value, indent=2) + "\n"
            (folder / name).write_text(text, encoding="utf-8")

    def write(self, model: Model, folder: pathlib.Path, at: str) -> Arrays:
        """Writes the weights and the configs into `folder`, and returns the arrays."""
        arrays = self.arrays(model)
        save_file(arrays, folder / self.weights, metadata=self.metadata)
        self.write_configs(model, folder, at)
        return arrays

    def has_tokenizer(self, model: Model) -> bool:
        """Whether the library has the model's tokenizer itself: then none is written."""
        return False

    def attention_mask(self, model: Model) -> bool:
        """Whether the library's tokenizer shall give a mask of padding beside the ids."""
        return True

    def also_needs(self, model: Model) -> tuple[str, ...]:
        """Modules that the library imports to load this model, beside `judges`."""
        return ()

    def notes(self, model: Model, folder: str) -> list[str]:
        """Sentences for the card of an export in `folder`."""
        return []

    @abc.abstractmethod
    def describes(self, config: Mapping[str, Any]) -> bool:
        """Whether `config`, the content of the file `self.config` or {}, is of this format."""

    @abc.abstractmethod
    def names(self, arrays: Mapping[str, np.ndarray]) -> bool:
        """Whether the arrays have the names of this format."""

    @abc.abstractmethod
    def read(
        self,
        arrays: Mapping[str, np.ndarray],
        config: Callable[[str], Any],
        file: str = "a file",
    ) -> Model:
        """The model of a folder's arrays.

        config: gives the content of a JSON file of the folder by its name, None if there is none.
        file: where the arrays come from, for messages. Raises `ConfigError` for what no tower of
        clipx does and for arrays that do not fit the configs; `where` is "" if the fault is the
        file's own.
        """

    def tokenizer_fields(self, folder: pathlib.Path, where: str) -> dict[str, Any] | None:
        """The fields of the `TokenizerConfig` that gives the ids of the folder's own tokenizer;
        None if there is none in clipx. Raises `ConfigError`, found at `where`, for settings under
        which the library's tokenizer differs."""
        return None

    @abc.abstractmethod
    def says(
        self,
        folder: pathlib.Path,
        images: Sequence[UInt8[np.ndarray, "h w 3"]],
        captions: Sequence[str],
    ) -> tuple[Said, Int[np.ndarray, "t n"]]:
        """What the library's model of the folder says, through the library's own preprocessing and
        tokenizer, and the ids of the captions. Raises `MissingLibrary`."""


def read_json(path: pathlib.Path, where: str) -> Any:
    """The content of a JSON file; None if there is none. Raises `ConfigError` at `where`."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(where, f"{path} ({error})", "a JSON file") from None
