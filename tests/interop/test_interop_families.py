"""Every night: a model of each released family is evaluated and fine-tuned by the commands."""

import json

import jax
import numpy as np
import pytest
from support import encoders, foreign_tokenizers, shards, survey
from support.libraries import with_open_clip

from clipx.serving.evaluation import evaluate_file
from clipx.train import train
from clipx.training import pretrained

CLIP = {"vocab_size": 49408}  # OpenAI's vocabulary, which every clipx has
# a config of open_clip for each family, and the kind of its tokenizer
FAMILIES = {
    "ViT-B-32": "",
    "RN50": "",
    "coca_ViT-B-32": "",
    "convnext_base": "",
    "EVA02-B-16": "",
    "PE-Core-T-16-384": "",
    "ViTamin-S": "",
    "MobileCLIP2-L-14": "",
    "ViT-SO400M-14-SigLIP": "t5",
    "ViT-B-32-SigLIP2-256": "gemma",
    "ViT-L-14-CLIPA": "bert",
    "roberta-ViT-B-32": "roberta",
    "xlm-roberta-base-ViT-B-32": "xlm-roberta",
    "mt5-base-ViT-B-32": "t5",
    "nllb-clip-base": "xlm-roberta",
}


def _tokenizer(kind, folder):
    if kind == "roberta":
        return encoders.write_tokenizer(folder, kind)
    foreign_tokenizers.made(kind).save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    values = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(values))


@pytest.mark.slow
@with_open_clip
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_evaluated_and_trained_for_an_epoch(name, tmp_path):
    """By what the commands call. Of real widths, one block deep; 16 drawn pairs are an epoch."""
    folder, kind = tmp_path / "model", FAMILIES[name]
    folder.mkdir()
    guest = survey.write(name, folder, **({} if kind else CLIP))
    if kind:
        _tokenizer(kind, folder)
    pairs = shards.shard(tmp_path / "pairs.tar", 16)
    with survey.shallow(guest):
        evals = {"retrieval": {"data": {"source": "webdataset", "path": str(pairs)}}}
        assert 0 <= evaluate_file(str(folder), evals)["retrieval/mean_recall"] <= 1
        values = pretrained.sections(str(folder), *pretrained.open_model(str(folder)))
        values |= {"init_from": str(folder)}
        values["train"] = {"batch_size": 8, "total_epochs": 1, "log_every_steps": 1}
        values["data"] |= {"source": "webdataset", "path": str(pairs)}
        values["evals"] = evals
        values["optimizer"] = {"learning_rate": 1e-4}
        run = tmp_path / "run"
        assert train(values, str(run), jax.devices()[:1]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert any("retrieval/mean_recall" in row for row in rows)
