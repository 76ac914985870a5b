"""`Format`: how clipx writes, reads and verifies the files of another library."""

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

from clipx.config import reading, secrets
from clipx.errors import ConfigError
from clipx.interop.model import Model
from clipx.interop.rules import Arrays


@dataclasses.dataclass(frozen=True)
class Said:
    """A model's outputs in float32: features of images and texts, not normalised, and logits."""

    image: Float[np.ndarray, "i d"]
    text: Float[np.ndarray, "t d"]
    logits: Float[np.ndarray, "i t"]


class Format(abc.ABC):
    """The files in which a library keeps a model: how they are written, read and verified.

    A format is a stateless subclass in its own file, listed in `formats.FORMATS`.
    """

    name: ClassVar[str]  # value of `--format`
    library: ClassVar[str]  # `library_name` on a Hub model card
    judges: ClassVar[tuple[str, ...]]  # modules that verify an export; the last one loads it
    config: ClassVar[str]  # name of the JSON file that describes a model
    weights: ClassVar[str]  # name of the safetensors file that an export writes
    torch_weights: ClassVar[str]  # name of the torch file that `--pt` writes; "": none
    weights_read: ClassVar[tuple[str, ...]]  # names of readable weight files, preferred first
    expected: ClassVar[str]  # files that a folder of this format has, for error messages
    loading: ClassVar[str]  # Python code that loads `{folder}`, for the model card
    metadata: ClassVar[dict[str, str] | None] = None  # metadata of the safetensors file
    # caption cleaning rules that the format's tokenizers reproduce exactly
    exact_cleaning: ClassVar[frozenset[str]] = frozenset()
    extra: ClassVar[str] = "interop"  # of setup.py, with the modules that write and verify
    readable: ClassVar[bool] = True  # whether clipx reads what it writes
    # whether an export has a `tokenizer.json` that pads and cuts, whatever the tokenizer
    tokenizer_json: ClassVar[bool] = False
    # whether the library makes one space of several before a text reaches any tokenizer
    collapses_spaces: ClassVar[bool] = False

    @abc.abstractmethod
    def arrays(self, model: Model) -> Arrays:
        """The model's arrays under the library's names.

        Raises `NotExpressible` for a model that the library cannot build.
        """

    @abc.abstractmethod
    def configs(self, model: Model, folder: str) -> dict[str, Any]:
        """The content of every JSON file, by file name.

        folder: path from which the library will load the export. Raises `NotExpressible` for a
        model that the library cannot build.
        """

    def write_configs(self, model: Model, folder: pathlib.Path, at: str) -> None:
        """Writes the JSON files into `folder`, for an export that will be loaded from `at`."""
        for name, value in self.configs(model, at).items():
            text = json.dumps(secrets.cut_all(value), indent=2) + "\n"
            (folder / name).write_text(text, encoding="utf-8")

    def write(self, model: Model, folder: pathlib.Path, at: str) -> Arrays:
        """Writes the weights and the JSON files into `folder`, and returns the arrays."""
        arrays = self.arrays(model)
        save_file(arrays, folder / self.weights, metadata=self.metadata)
        self.write_configs(model, folder, at)
        return arrays

    def has_tokenizer(self, model: Model) -> bool:
        """Whether the library ships the model's tokenizer, so that the export needs none."""
        return False

    def attention_mask(self, model: Model) -> bool:
        """Whether the exported tokenizer also returns an attention mask."""
        return True

    def also_needs(self, model: Model) -> tuple[str, ...]:
        """Modules, besides `judges`, that the library imports to load this model."""
        return ()

    def notes(self, model: Model, folder: str) -> list[str]:
        """Sentences for the model card of an export in `folder`."""
        return []

    @abc.abstractmethod
    def describes(self, config: Mapping[str, Any]) -> bool:
        """Whether `config` describes a model of this format. It is the content of the file
        `self.config`, or {} without that file."""

    @abc.abstractmethod
    def names(self, arrays: Mapping[str, np.ndarray]) -> bool:
        """Whether the arrays' names are those of this format."""

    @abc.abstractmethod
    def read(
        self,
        arrays: Mapping[str, np.ndarray],
        config: Callable[[str], Any],
        file: str = "a file",
    ) -> Model:
        """Returns the model that a folder's arrays and JSON files describe.

        config: returns the content of a JSON file of the folder by its name; None if the folder
        has no such file.
        file: where the arrays come from, for error messages.

        Raises `ConfigError` for a setting that no clipx tower has, and for arrays that do not fit
        the JSON files. Its `where` is "" if the weights file itself is at fault.
        """

    def tokenizer_fields(self, folder: pathlib.Path, where: str) -> dict[str, Any] | str | None:
        """Fields of the `TokenizerConfig` that gives the same ids as the folder's tokenizer. A
        sentence about the tokenizer if clipx has none like it. None for CLIP's own vocabulary.
        Raises `ConfigError` at `where` for settings of a SigLIP tokenizer that clipx cannot
        reproduce."""
        return None

    @abc.abstractmethod
    def says(
        self,
        folder: pathlib.Path,
        images: Sequence[UInt8[np.ndarray, "h w 3"]],
        captions: Sequence[str],
    ) -> tuple[Said, Int[np.ndarray, "t n"]]:
        """Returns (the outputs of the folder's model, token ids of the captions). Loads the model
        with the library and uses the library's own preprocessing and tokenizer. Raises
        `MissingLibrary`."""


def read_json(path: pathlib.Path, where: str, shape: Any = dict[str, Any]) -> Any:
    """The value in a JSON file, by default an object; None without the file. Raises `ConfigError`
    at `where` for a file that is not JSON, or of another `shape`, as `reading.parse_json` has it.
    """
    try:
        return reading.read_json(path, shape)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        expected = f"a JSON file with {reading.spelled(shape)}"
        raise ConfigError(where, f"{path} ({reason})", expected) from None
