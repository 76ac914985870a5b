"""Text encoders of transformers and sentence-transformers become towers with the same outputs."""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import encoders
from support.encoders import bert_tower, write_bert, write_modules, write_tokenizer
from support.libraries import with_transformers
from support.runs import small

from clipx.config import binding
from clipx.data.text import tokenizers
from clipx.data.text.tokenizers import TokenizerConfig
from clipx.errors import ConfigError
from clipx.interop import libraries, verify
from clipx.interop.encoders import text
from clipx.losses.masked_language import mask_tokens
from clipx.models.bert import BERT
from clipx.training import assemble, schema
from clipx.training import encoders as resolving

WHERE = "config.text.init_from"


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), dict(a), dict(b))


def build(encoder) -> tokenizers.Tokenizer:
    section = json.loads(json.dumps(encoder.tokenizer))
    return tokenizers.build(binding.bind(TokenizerConfig, section, where="config.tokenizer"))


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet", "distilbert"])
def test_a_folder_tells_the_tower(kind, tmp_path):
    """With the prefix of a model with heads, and old names of norms."""
    tower = bert_tower(kind, pool="pooler" if kind == "bert" else "mean")
    params = write_bert(tmp_path, kind, tower, prefix=f"{kind}.")
    file = tmp_path / "model.safetensors"
    arrays = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): x
        for name, x in load_file(file).items()
    }
    save_file(arrays | {"cls.bias": np.zeros(3), "lm_head.x.weight": np.zeros(3)}, file)
    write_tokenizer(tmp_path, "bert" if kind in ("bert", "distilbert") else kind)
    found = text.describe(str(tmp_path), WHERE)
    assert found.tower == tower and found.layout == "transformers"
    assert found.differences == ()
    assert len(found.notes) == (kind != "bert")  # the pooling is guessed
    same(found.read()[0], params)
    tokenizer = build(found)
    assert (tokenizer.pad_id, tokenizer.eot_id) == (tower.pad_id, tower.eot_id)


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"pool": "mean", "normalize": True},
        {"pool": "max", "dense_width": 12},
        {"pool": "cls", "dense_width": 12, "dense_activation": "identity", "normalize": True},
    ],
)
def test_modules_tell_what_follows_the_encoder(new, fields, tmp_path):
    tower = bert_tower("bert", **fields)
    params = write_bert(tmp_path, "bert", tower)
    write_modules(tmp_path, tower, params, new=new)
    write_tokenizer(tmp_path, "bert")
    found = text.describe(str(tmp_path), WHERE)
    assert found.tower == tower and found.layout == "sentence-transformers"
    assert found.differences == found.notes == ()
    same(found.read()[0], params)
    assert found.tokenizer["cleaning"] == "strip"


def test_long_texts_are_cut_and_it_is_said(tmp_path):
    write_bert(tmp_path, "bert", bert_tower("bert", positions=512))
    write_tokenizer(tmp_path, "bert", model_max_length=10**30)
    found = text.describe(str(tmp_path), WHERE)
    assert found.tower.context == found.tokenizer["context"] == text.CONTEXT == 64
    config = {"text": {"name": "auto", "init_from": str(tmp_path)}, "tokenizer": {"name": "auto"}}
    said, typed = [], []
    assert resolving.resolve(config, say=said.append)["tokenizer"]["context"] == 64
    assert "cut to 64 tokens, marks included (the model takes 512)" in said[-1]
    config["tokenizer"]["context"] = 32
    assert resolving.resolve(config, say=typed.append)["tokenizer"]["context"] == 32
    assert typed == said[:-1]


def changed(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_settings_that_are_not_known_are_listed(tmp_path):
    tower = bert_tower("bert", pool="mean")
    write_modules(tmp_path, tower, write_bert(tmp_path, "bert", tower, hidden_twist=3))
    write_tokenizer(tmp_path, "bert", do_lower_case=False, padding_side="left", twist=1)
    changed(tmp_path / "sentence_bert_config.json", do_lower_case=True)
    changed(tmp_path / "1_Pooling" / "config.json", pooling_twist=2)
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    found = [line.split(":")[0] for line in text.describe(str(tmp_path), WHERE).differences]
    prefix = "text.settings."
    assert found == [
        prefix + "hidden_twist",
        prefix + "sentence_bert_config.json.do_lower_case",
        prefix + "config.json.pooling_twist",
        "text.prompt",
        prefix + "tokenizer_config.json.do_lower_case",
        prefix + "tokenizer_config.json.padding_side",
        prefix + "tokenizer_config.json.twist",
    ]


@pytest.mark.parametrize(
    ("file", "values", "found"),
    [
        ("config.json", {"model_type": "t5"}, "model_type 't5'"),
        ("config.json", {"is_decoder": True}, "is_decoder"),
        ("config.json", {"hidden_act": "silu"}, "'silu'"),
        ("config.json", {"position_embedding_type": "relative_key"}, "'relative_key'"),
        ("config.json", {"hidden_size": 64}, "arrays of other shapes"),
        ("config.json", {"num_hidden_layers": 3}, "no encoder.layer.2"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "max and mean"),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "lasttoken"),
        ("tokenizer.json", {"model": {}}, "not a tokenizer.json"),
    ],
)
def test_what_clipx_does_not_have_is_refused(file, values, found, tmp_path):
    tower = bert_tower("bert", pool="mean")
    write_modules(tmp_path, tower, write_bert(tmp_path, "bert", tower))
    write_tokenizer(tmp_path, "bert")
    changed(tmp_path / file, **values)
    with pytest.raises(ConfigError) as caught:
        text.describe(str(tmp_path), WHERE).read()
    assert caught.value.where.startswith(WHERE) and found in str(caught.value)


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        (["Transformer"], "with Transformer"),
        (["Transformer", "Pooling", "Normalize", "Dense"], "Normalize, Dense"),
        (["Transformer", "Pooling", "WordWeights"], "WordWeights"),
    ],
)
def test_other_modules_are_refused(kinds, found, tmp_path):
    listed = [
        {"idx": i, "path": str(i), "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(ConfigError, match=found) as caught:
        text.describe(str(tmp_path), WHERE)
    assert caught.value.where == WHERE


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="hf download a/b"):
        text.describe("a/b", WHERE)
    with pytest.raises(ConfigError, match=r"model.safetensors or pytorch_model.bin"):
        text.describe(str(tmp_path), WHERE)
    write_bert(tmp_path, "roberta", bert_tower("roberta", pool="mean"))
    (tmp_path / "vocab.json").write_text("{}")  # of a slow tokenizer
    with pytest.raises(ConfigError, match="AutoTokenizer"):
        text.describe(str(tmp_path), WHERE)


def test_word_pieces_without_a_tokenizer_json(tmp_path):
    tower = bert_tower("bert", eot_id=102)
    write_bert(tmp_path, "bert", tower)
    pieces = [f"[unused{i}]" for i in range(400)]
    for i, mark in enumerate(["[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog"], start=100):
        pieces[i] = mark
    pieces[0] = "[PAD]"
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    found = text.describe(str(tmp_path), WHERE)
    assert found.tower == tower.clone(context=40) and "word pieces" in found.notes[0]
    assert build(found)(["A dog"])[0, :5].tolist() == [101, 104, 105, 102, 0]
    (tmp_path / "vocab.txt").write_text("\n".join(reversed(pieces)))
    with pytest.raises(ConfigError, match="other ids of its marks") as caught:
        text.describe(str(tmp_path), WHERE)
    assert "save_pretrained" in caught.value.fix


def bound(tower, tokenizer, objective=None):
    """(the objective, config and complete sections) of a small config, as a run resolves it."""
    config = small(("image.embed_dim", "16")) | {"text": tower, "tokenizer": tokenizer}
    resolved = resolving.resolve(config | ({"objective": objective} if objective else {}))
    whole = binding.bind(schema.Config, resolved)
    return (*assemble.bind_objective(whole), whole)


def entries(tower, tokenizer):
    """The parameters of the text tower that its file gives."""
    objective, _, config = bound(tower, tokenizer)
    return resolving.entries(objective, config, None)["params"]["text"]


def test_a_file_of_bert_alone(tmp_path):
    """As CLIP-Lite names it: no config.json, fewer layers, heads from the config."""
    tower = bert_tower("bert", depth=3, heads=4)
    params = write_bert(tmp_path, "bert", tower, prefix="bert.")
    (tmp_path / "config.json").unlink()
    file = str(tmp_path / "model.safetensors")
    found = text.describe(file, WHERE)
    assert "1 heads" in found.notes[0] and found.tower.depth == 3
    section = {"name": "bert", "init_from": file, "width": 32, "depth": 2, "heads": 4}
    section |= {"positions": 40, "embed_dim": 16, "dtype": "float32"}
    tokenizer = {"name": "sentencepiece", "vocab_size": 400, "context": 16}
    kept = {name: x for name, x in params.items() if name != "block_2"}
    same(entries(section, tokenizer), kept)
    with pytest.raises(ConfigError, match=r"text.token_embedding: \(400, 32\), and \(300, 32\)"):
        entries(section, tokenizer | {"vocab_size": 300})


def test_a_run_takes_tower_and_tokenizer_from_a_folder(tmp_path):
    tower = bert_tower("roberta", pool="mean")
    params = write_bert(tmp_path, "roberta", tower)
    write_tokenizer(tmp_path, "roberta")
    section = {"name": "auto", "init_from": str(tmp_path), "embed_dim": 16, "pool": "max"}
    objective, sections, config = bound(section, {})
    got = objective.text
    wanted = {"pool": "max", "embed_dim": 16, "init_from": str(tmp_path), "dtype": got.dtype}
    assert got == tower.clone(**wanted) and sections["text"]["name"] == "bert"
    same(entries(section, {}), params)
    ids = {"pad": 1, "start": 0, "end": 2, "unknown": 3, "mask": 4}
    assert binding.dump(config.tokenizer)["ids"] == ids
    with pytest.raises(ConfigError, match="'pooler', and .* has none"):
        entries(section | {"pool": "pooler"}, {})


def test_masked_words_use_the_files_own_mask(tmp_path):
    """DeCLIP's terms: no id is added, and no special id of the file is a word."""
    write_bert(tmp_path, "roberta", bert_tower("roberta", pool="mean"))
    write_tokenizer(tmp_path, "roberta")
    section = {"name": "auto", "init_from": str(tmp_path), "embed_dim": 16}
    objective, *_ = bound(section, {"mask": True}, {"name": "declip", "queue_size": 64})
    assert objective.mask_id == 4 and objective.special_ids == (1, 3, 0, 2, 4)
    assert objective.text.vocab_size == 400
    tokens = build(text.describe(str(tmp_path), WHERE))(["a small dog <mask> runs", ""])
    masked, chosen = mask_tokens(
        tokens, jax.random.key(0), vocab_size=400, mask_id=4, special_ids=(1, 3, 0, 2, 4), rate=0.9
    )
    words = ~np.isin(tokens, (0, 1, 2, 3, 4))
    assert chosen.any() and not (np.asarray(chosen) & ~words).any()
    np.testing.assert_array_equal(np.asarray(masked)[~words], tokens[~words])


# -- what the libraries say ---------------------------------------------------------------------

# sizes of real models, of which the vocabulary and the depth are cut, and their tokenizers
REAL = {
    "bert-base": ("BertConfig", "bert", {}),
    "bert-large": ("BertConfig", "bert", {"hidden_size": 1024, "num_attention_heads": 16,
                                          "intermediate_size": 4096, "hidden_act": "gelu_new"}),
    "minilm-l12": ("BertConfig", "bert", {"hidden_size": 384, "intermediate_size": 1536}),
    "roberta-base": ("RobertaConfig", "roberta", {"max_position_embeddings": 514,
                                                  "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "xlm-roberta-base": ("XLMRobertaConfig", "xlm-roberta", {"max_position_embeddings": 514,
                                                             "type_vocab_size": 1}),
    "distilbert-base": ("DistilBertConfig", "bert", {}),
    "distilbert-sinusoidal": ("DistilBertConfig", "bert", {"sinusoidal_pos_embds": True}),
    "mpnet-base": ("MPNetConfig", "mpnet", {"max_position_embeddings": 514,
                                            "layer_norm_eps": 1e-5}),
}  # fmt: skip
# transformers counts no position for a padding mark that a text spells
TEXTS = [words for words in encoders.ODD if "pad>" not in words and "PAD" not in words]


def randomized(model, torch) -> None:
    """No parameter stays 0 or 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def ours(encoder, ids):
    params, _ = encoder.read()
    with jax.default_matmul_precision("highest"):
        return jax.jit(encoder.tower.apply)({"params": params}, ids)


def theirs(folder, texts, length):
    """(ids, mask, tokens, pooler's output) of transformers."""
    torch, transformers = _libraries()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    options = {"padding": "max_length", "truncation": True, "max_length": length}
    inputs = tokenizer(texts, return_tensors="pt", **options)
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        out = model(**given)
    pooled = getattr(out, "pooler_output", None)
    return given["input_ids"].numpy(), given["attention_mask"], out.last_hidden_state, pooled


@functools.cache
def _libraries():
    return libraries.require("torch"), libraries.require("transformers")


def saved(folder, name):
    """A folder of transformers with random weights of an architecture."""
    torch, transformers = _libraries()
    config, kind, sizes = REAL[name]
    depth = "n_layers" if "Distil" in config else "num_hidden_layers"
    made = getattr(transformers, config)(**{"vocab_size": 400, depth: 2} | sizes)
    model = transformers.AutoModel.from_config(made)
    randomized(model, torch)
    model.save_pretrained(folder)
    write_tokenizer(folder, kind, model_max_length=512)


def mean(tokens, mask):
    """The documented mean over tokens that are not padding (sentence-transformers, Pooling)."""
    return (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@with_transformers
@pytest.mark.parametrize("name", REAL)
def test_outputs_are_those_of_transformers(name, tmp_path):
    saved(tmp_path, name)
    found = text.describe(str(tmp_path), WHERE)
    assert found.differences == ()
    ids, mask, tokens, pooled = theirs(tmp_path, TEXTS, 64)
    np.testing.assert_array_equal(build(found)(TEXTS), ids)
    out = ours(found, ids)
    shown = mask.numpy()[..., None].astype(bool)
    a, b = (np.where(shown, x, 0) for x in (out.tokens, tokens))
    np.testing.assert_allclose(a, b, atol=1e-4)
    expected = pooled if found.tower.pool == "pooler" else mean(tokens, mask)
    np.testing.assert_allclose(out.backbone, expected, atol=1e-4)


def embedded(folder, texts):
    """The embeddings of sentence-transformers; None where it is not installed."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return None
    return SentenceTransformer(str(folder), device="cpu").encode(texts)


@with_transformers
@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("name", ["mpnet-base", "distilbert-base"])
def test_outputs_are_those_of_sentence_transformers(name, new, tmp_path):
    torch, _ = _libraries()
    saved(tmp_path, name)
    tower = BERT(pool="mean", dense_width=96, normalize=True)
    rng = np.random.default_rng(0)
    kernel, bias = (rng.normal(size=s).astype(np.float32) * 0.05 for s in ((768, 96), (96,)))
    dense = {"kernel": kernel, "bias": bias}
    write_modules(tmp_path, tower, {"dense": dense}, new=new)
    found = text.describe(str(tmp_path), WHERE)
    assert found.differences == () and found.layout == "sentence-transformers"
    ids, mask, tokens, _ = theirs(tmp_path, [words.strip() for words in TEXTS], 32)
    np.testing.assert_array_equal(build(found)(TEXTS), ids)
    linear = mean(tokens, mask) @ torch.from_numpy(kernel) + torch.from_numpy(bias)
    expected = torch.nn.functional.normalize(torch.tanh(linear), dim=1)
    backbone = ours(found, ids).backbone
    np.testing.assert_allclose(backbone, expected, atol=1e-4)
    if (library := embedded(tmp_path, TEXTS)) is not None:
        np.testing.assert_allclose(backbone, library, atol=1e-4)


CLASSES = {
    "bert": "BertTokenizer",
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "mpnet": "MPNetTokenizer",
}


@with_transformers
@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("kind", encoders.TOKENIZERS)
def test_ids_are_those_of_transformers(kind, general, tmp_path):
    """Of the class of the kind, and of the one that reads any tokenizer.json."""
    _, transformers = _libraries()
    tower = bert_tower(kind.removeprefix("xlm-"), pool="mean")
    write_bert(tmp_path, kind, tower)
    named = "PreTrainedTokenizerFast" if general else CLASSES[kind]
    write_tokenizer(tmp_path, kind, tokenizer_class=named)
    found = build(text.describe(str(tmp_path), WHERE))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    options = {"padding": "max_length", "truncation": True, "max_length": 32}
    assert found(encoders.ODD).tolist() == tokenizer(encoders.ODD, **options)["input_ids"]


@with_transformers
def test_minilm(tmp_path):
    """The real all-MiniLM-L6-v2, on all odd texts."""
    torch, _ = _libraries()
    folder = encoders.minilm(tmp_path)
    if folder is None:
        pytest.skip(encoders.NO_MINILM)
    found = text.describe(str(folder), WHERE)
    assert found.differences == () and len(found.notes) == 1
    texts = [*encoders.ODD, *verify.CAPTIONS]
    ids, mask, tokens, _ = theirs(folder, [words.strip() for words in texts], 64)
    np.testing.assert_array_equal(build(found)(texts), ids)
    expected = torch.nn.functional.normalize(mean(tokens, mask), dim=1)
    backbone = ours(found, ids).backbone
    np.testing.assert_allclose(backbone, expected, atol=1e-5)
    if (library := embedded(folder, texts)) is not None:
        np.testing.assert_allclose(backbone, library, atol=1e-4)


@with_transformers
def test_torch_files_are_read(tmp_path):
    """A state dict of a model with heads, as one file and in parts."""
    torch, _ = _libraries()
    params = write_bert(tmp_path, "bert", bert_tower("bert"), prefix="bert.")
    write_tokenizer(tmp_path, "bert")
    arrays = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    state = {name: torch.from_numpy(x) for name, x in arrays.items()}
    state["cls.predictions.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "pytorch_model.bin")
    found = text.describe(str(tmp_path), WHERE)
    assert found.tower.pool == "pooler"
    same(found.read()[0], params)
    (tmp_path / "pytorch_model.bin").unlink()
    parts: dict[str, dict] = {"a.safetensors": {}, "b.safetensors": {}}
    for i, (name, x) in enumerate(arrays.items()):
        parts[list(parts)[i % 2]][name] = x
    for file, part in parts.items():
        save_file(part, tmp_path / file)
    index = {name: file for file, part in parts.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    same(text.describe(str(tmp_path), WHERE).read()[0], params)
