"""Tokenizers of released models, as transformers writes them, with small vocabularies."""

import json

from clipx.interop import libraries
from support import encoders


def _bpe(texts):
    """(vocabulary, merges) of a small BPE with Gemma's marks and bytes."""
    import tokenizers as library
    from tokenizers import models, normalizers, trainers

    core = library.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "\u2581")
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=marks, show_progress=False)
    core.train_from_iterator(texts, trainer)
    content = json.loads(core.to_str())["model"]
    return content["vocab"], [tuple(pair) for pair in content["merges"]]


def _unigram(texts, marks):
    import tokenizers as library
    from tokenizers import models, pre_tokenizers, trainers

    core = library.Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=220, special_tokens=marks, unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return [tuple(piece) for piece in json.loads(core.to_str())["model"]["vocab"]]


def siglip2():
    """SigLIP 2's own tokenizer in transformers, with a small vocabulary and an end mark."""
    vocab, merges = _bpe([text.lower() for text in encoders.CORPUS])
    kind = libraries.require("transformers").Siglip2Tokenizer
    own = kind(vocab=vocab, merges=merges, padding_side="right")
    _marked(own)
    return own


def made(kind):
    """transformers' own tokenizer of a kind, with a small vocabulary."""
    transformers = libraries.require("transformers")
    lower = [text.lower() for text in encoders.CORPUS]
    if kind in ("gemma", "siglip2"):
        vocab, merges = _bpe(lower)
        if kind == "siglip2":
            return transformers.PreTrainedTokenizerFast(
                tokenizer_object=_marked(transformers.Siglip2Tokenizer(vocab=vocab, merges=merges)),
                pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right",
            )  # fmt: skip
        own = transformers.GemmaTokenizer(vocab=vocab, merges=merges, padding_side="right")
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=_marked(own), pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
            padding_side="right",
        )  # fmt: skip
    if kind == "t5":
        vocab = _unigram(encoders.CORPUS, ["<pad>", "</s>", "<unk>"])
        return transformers.T5Tokenizer(vocab=vocab, extra_ids=0)
    if kind == "xlm-roberta":
        vocab = _unigram(encoders.CORPUS, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
        return transformers.XLMRobertaTokenizer(vocab=vocab)
    content = json.loads(encoders.content("bert"))
    return transformers.BertTokenizer(vocab=content["model"]["vocab"])


def _marked(own):
    """The core of a tokenizer, with an end mark behind every text."""
    from tokenizers import processors

    core = own.backend_tokenizer
    end = ("<eos>", core.token_to_id("<eos>"))
    core.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[end])
    return core
