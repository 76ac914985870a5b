"""Features of every row of a data set, from its captions or from a user's array, for a teacher.

The features of a row are the mean of its captions' unit vectors, or zeros for a row without one.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float32

from clipx.data import row_arrays
from clipx.data.base import Source, expand_user
from clipx.data.row_writer import Rows, RowWriter
from clipx.data.threads import in_order, progress_bar
from clipx.errors import BadSample, ConfigError, DataError, MissingLibrary, install_hint
from clipx.interop import libraries

LENGTH = 77  # most tokens of a caption, start and end marks included
WORDS = 2048  # the number of most frequent words that are counted
BLOCK = 4096  # rows that are embedded before each write

# The features of rows `start` to `stop`, float32 [stop - start, c]
Tiles = Callable[[int, int], np.ndarray]
# Unit rows, float32 [n, c], of n captions
Encode = Callable[[list[str]], np.ndarray]


class TextModel:
    """Encodes captions as unit vectors: the mean of a Hugging Face encoder's last hidden states.

    padding: "mask" is the mean over a caption's tokens, truncated to 77 with the end mark kept.
    "zero" is ProtoCLIP's own code (utils/RoBERTa.py): token ids are truncated to 77, possibly
    without the end mark, and padded with 0, which is RoBERTa's `<s>`; the mean is over all 77
    positions, so it depends on the caption's length.
    Raises `ConfigError` for missing packages and for a model that cannot be loaded.
    """

    def __init__(self, name: str, padding: Literal["mask", "zero"], batch_size: int, device: str):
        try:
            transformers = libraries.require("transformers")  # also beside an unfit torchvision
            if not transformers.utils.is_torch_available():
                raise ImportError
            from transformers import AutoModel, AutoTokenizer
        except (ImportError, MissingLibrary):
            raise ConfigError(
                "--model", f"{name!r} without the packages transformers and torch", "both packages",
                f"{install_hint('teacher')}, or --model=tfidf",
            ) from None  # fmt: skip
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        folder = pathlib.Path(expand_user(name))
        name = str(folder) if folder.is_dir() else name
        try:
            if name.startswith(("/", ".", "~", "$")) and not folder.is_dir():
                raise OSError("no such folder")
            self._tokenizer = AutoTokenizer.from_pretrained(name)
            model, loading = AutoModel.from_pretrained(
                name, dtype="float32", output_loading_info=True
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                "--model", f"{name!r}: {reason}",
                "a folder with a Hugging Face text encoder and its tokenizer, or the name of one",
            ) from None  # fmt: skip
        absent = sorted(key for key in loading["missing_keys"] if "pooler" not in key)
        if absent:
            raise ConfigError(
                "--model", f"{name!r} without {absent[0]} and {len(absent) - 1} more weights",
                "an encoder with all of its weights",
            )  # fmt: skip
        if getattr(model.config, "is_encoder_decoder", False):
            model = model.get_encoder()
        model = getattr(model, "text_model", model)  # of a model with two towers
        device = device or ("cuda" if transformers.utils.is_torch_cuda_available() else "cpu")
        # no parameter requires a gradient, so torch keeps no activations
        model = model.eval().requires_grad_(False)
        try:
            self._model = model.to(device)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError("--device", f"{device!r}: {reason}", "cpu, cuda, ...") from None
        self._device, self._padding, self._batch_size = device, padding, batch_size
        if self._tokenizer.pad_token is None:  # any token will do, because it is masked
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._length = min(LENGTH, self._tokenizer.model_max_length)

    def __call__(self, texts: list[str]) -> Float32[np.ndarray, "n c"]:
        order = np.argsort(
            [len(text) for text in texts], kind="stable"
        )  # like lengths: little padding
        encode = self._masked if self._padding == "mask" else self._zeros
        batches = []
        for start in range(0, len(order), self._batch_size):
            batches.append(encode([texts[i] for i in order[start : start + self._batch_size]]))
        features = np.concatenate(batches)
        return _unit(features[np.argsort(order)])

    def _masked(self, texts: list[str]) -> Float32[np.ndarray, "n c"]:
        tokens = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self._length, return_tensors="pt"
        ).to(self._device)
        mask = tokens["attention_mask"][..., None]
        states = self._model(**tokens).last_hidden_state
        return ((states * mask).sum(1) / mask.sum(1)).cpu().numpy()

    def _zeros(self, texts: list[str]) -> Float32[np.ndarray, "n c"]:
        from transformers import BatchEncoding

        ids = [(self._tokenizer(t)["input_ids"] + [0] * LENGTH)[:LENGTH] for t in texts]
        tokens = BatchEncoding({"input_ids": ids}, tensor_type="pt").to(self._device)["input_ids"]
        states = self._model(input_ids=tokens, attention_mask=tokens * 0 + 1).last_hidden_state
        return states.mean(1).cpu().numpy()


def _unit(x: Float[np.ndarray, "n c"]) -> Float32[np.ndarray, "n c"]:
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return (x / np.maximum(norms, 1e-12)).astype(np.float32)


def _captions(source: Source, first: bool, start: int = 0) -> Iterator[tuple[str, ...]]:
    """The captions of every row from `start` on, of which `first` keeps one; () for a bad row."""

    def read(row: int) -> tuple[str, ...]:
        with contextlib.suppress(BadSample):
            return source[start + row].texts[: 1 if first else None]
        return ()

    with progress_bar(len(source), "captions") as shown:
        shown.update(start)
        yield from in_order(read, len(source) - start, shown.update)


def embedded(
    source: Source, first: bool, encode: Encode, aside: pathlib.Path, about: Mapping[str, Any]
) -> Tiles:
    """The features of a text model, written to the `.npy` file `aside`.

    `about` identifies the model and the data. If `aside` holds rows of the same model and data, as
    after an interrupted command, encoding continues after them.
    """
    width = encode(["a"]).shape[1]
    about = {**about, "numbers": width}
    if row_arrays.has(str(aside), about):
        return _tiles(aside)
    arrays = {aside.name: Rows(np.float32, (width,))}
    with RowWriter(aside, arrays, about) as writer:
        rows: list[tuple[str, ...]] = []
        for texts in _captions(source, first, writer.done):
            rows.append(texts)
            if len(rows) == BLOCK or writer.done + len(rows) == len(source):
                done = writer.done + len(rows)
                writer.write(done, {aside.name: _means(rows, encode, width)})
                rows = []
        writer.finish(about)
    return _tiles(aside)


def _tiles(file: pathlib.Path) -> Tiles:
    features = row_arrays.load(str(file))
    return lambda start, stop: features[start:stop]


def _means(rows: list[tuple[str, ...]], encode: Encode, width: int) -> Float32[np.ndarray, "n c"]:
    """The mean of each row's captions' features; zeros for a row without a caption."""
    counts = np.array([len(texts) for texts in rows])
    out = np.zeros((len(rows), width), np.float32)
    if counts.any():
        features = encode([text for texts in rows for text in texts])
        np.add.at(out, np.repeat(np.arange(len(rows)), counts), features)
    return out / np.maximum(counts, 1)[:, None].astype(np.float32)


def word_counts(source: Source, first: bool) -> Tiles:
    """TF-IDF features of every row's captions, each caption a unit vector. The vocabulary is the
    most frequent words, without those in more than half of the captions. Features stay sparse, at
    about a hundred bytes a caption."""
    try:
        import scipy.sparse
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise ConfigError(
            "--model", "'tfidf' without scikit-learn", "scikit-learn, which counts the words",
            install_hint("eval"),
        ) from None  # fmt: skip
    counts: list[int] = []

    def texts() -> Iterator[str]:
        for captions in _captions(source, first):
            counts.append(len(captions))
            yield from captions

    vectorizer = TfidfVectorizer(
        max_features=WORDS,
        max_df=0.5,
        sublinear_tf=True,
        dtype=np.float32,  # pyright: ignore[reportArgumentType]
    )
    try:
        features = vectorizer.fit_transform(texts())
    except ValueError as error:
        raise DataError(f"the captions have no words to tell them apart by ({error})") from None
    shares = np.repeat(1 / np.maximum(counts, 1), counts).astype(np.float32)
    ends = np.append(0, np.cumsum(counts))
    columns = np.arange(len(shares))
    mean = scipy.sparse.csr_matrix((shares, columns, ends), (len(counts), len(shares)))
    features = mean @ features
    return lambda start, stop: features[start:stop].toarray()


def given(path: str, rows: int) -> Tiles:
    """The rows of a user's array, scaled to length 1; rows of zeros stay zeros. Raises `DataError`
    for an array of another shape or dtype, and for a row that is not finite."""
    features = row_arrays.load(path)
    if (
        features.ndim != 2
        or not np.issubdtype(features.dtype, np.floating)
        or len(features) != rows
    ):
        raise DataError(
            f"{path}: {features.dtype} of shape {features.shape}, expected floating-point numbers "
            f"[{rows}, any]: one row for each row of the data"
        )

    def tile(start: int, stop: int) -> np.ndarray:
        x = np.asarray(features[start:stop], np.float32)
        finite = np.isfinite(x).all(axis=1)
        if not finite.all():
            raise DataError(f"{path}: row {start + np.argmin(finite)} is not finite")
        return _unit(x)

    return tile
