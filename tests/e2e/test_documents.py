"""`capgap run` on conversations under the context rule `document`, from the corpus to the report."""

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command import capgap
from transformers import AutoModelForCausalLM, AutoTokenizer

from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store import read_blocks

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] "
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
)
SEQ_LEN = 48
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every stage, with a training that mixes both recordings in rows of two sequences."""
    folder = tmp_path_factory.mktemp("documents")
    with (folder / "chat.jsonl").open("w") as file:
        for i in range(400):
            asked = {"role": "user", "content": f"what is {i} and {i % 7}?"}
            messages = [asked, {"role": "assistant", "content": f"it is {i + i % 7}, " * (1 + i % 9)}]
            file.write(json.dumps({"messages": messages}) + "\n")
    tokenizer = train_tokenizer([f"[user] what is {i}? [assistant] it is {i}, " for i in range(200)], 300)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "tokenizer")
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}
    settings = {
        "name": "documents",
        "out": str(folder / "out"),
        "device": "cpu",
        "corpus": {
            "sources": [str(folder / "chat.jsonl")],
            "messages_field": "messages",
            "tokenizer": str(folder / "tokenizer"),
            "context": "document",
            "seq_len": SEQ_LEN,
            "teacher_fraction": 0.4,
            "heldout_fraction": 0.2,
        },
        "teacher": {"model": shape, "training": {"num_epochs": 4, "learning_rate": 1e-2}},
        "cache": {"engine": "transformers", "recording": "both", "top_k": 8},
        "student": {"model": shape | {"num_layers": 1}},
        "train": {"batch_sequences": 4, "num_epochs": 4, "learning_rate": 1e-2, "recording": "sampled"},
        "arms": {
            "distilled": {},
            "mixed": {"caches": {"kept": {"recording": "topk"}}, "row_len": 2 * SEQ_LEN + 5, "decode": "device"},
        },
        "eval": {"num_sequences": 32, "num_full_sequences": 8, "num_bootstrap": 100},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    done = capgap("run", folder / "run.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out"


def _counted_losses(out: Path, folder: Path) -> tuple[float, int]:
    """Nats per counted token and their number, every document by itself, from plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    manifest = read_manifest(out / "corpus")
    assert manifest is not None
    nats: list[float] = []
    sequences = [
        (block.tokens_BL1[row], block.starts_BL1[row], block.mask_BL1[row])
        for block, _ in read_blocks(out / "corpus", manifest.shard_sets["heldout"])
        for row in range(len(block))
        if block.mask_BL1[row, 1:].any()
    ]
    for tokens_L1, starts_L1, mask_L1 in sequences[:32]:
        firsts = [0, *(int(i) for i in np.flatnonzero(starts_L1) if 0 < i < SEQ_LEN), SEQ_LEN]
        for first, end in itertools.pairwise(firsts):
            tokens = torch.from_numpy(tokens_L1[first : end + 1]).long()
            with torch.no_grad():
                logprobs = model(input_ids=tokens[None, :-1]).logits[0].log_softmax(-1)
            found = -logprobs.gather(1, tokens[1:, None])[:, 0].numpy()
            nats += found[mask_L1[first + 1 : end + 1]].tolist()
    return float(np.mean(nats)), len(nats)


def test_every_model_is_measured_on_what_the_assistant_says_document_by_document(out: Path) -> None:
    results = json.loads((out / "eval" / "results.json").read_text())
    folders = {"teacher": out / "teacher" / "model"}
    folders |= {f"train/{arm}/seed-0": out / f"train/{arm}/seed-0/model" for arm in ("distilled", "mixed")}
    assert {model["name"] for model in results["models"]} == set(folders)
    for model in results["models"]:
        loss, count = _counted_losses(out, folders[model["name"]])
        assert results["num_labels"] == count < 32 * SEQ_LEN
        # float32 logits in batches of another shape
        assert model["loss"] == pytest.approx(loss, abs=1e-4), model["name"]


def test_the_student_comes_near_its_teacher(out: Path) -> None:
    results = json.loads((out / "eval" / "results.json").read_text())
    for model in results["models"]:
        # a vocabulary of 300: 5.7 nats untrained
        assert model["loss"] < 3.5, model["name"]
    for arm in ("distilled", "mixed"):
        with (out / "train" / arm / "seed-0" / "metrics.csv").open() as file:
            kl = [float(row["train_kl"]) for row in csv.DictReader(file) if row["train_kl"]]
        assert kl[-1] < 0.5 * kl[0], arm


def test_the_students_folder_carries_the_chat_template(out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(out / "train" / "distilled" / "seed-0" / "model")
    assert tokenizer.chat_template == TEMPLATE
