"""What people bring, as small as it can be: a tokenizer of bytes with roles, models of a few thousand weights, texts;
and the command as they type it, in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store import read_blocks

END, START, TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 304  # 300 pieces, three special tokens, and a row of padding
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "eos_token_id": 300,
    "bos_token_id": None,
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [f"line {i} says that {i * i} is its square, and {' '.join(str(i * k) for k in range(9))}." for i in range(60)]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


def tokenizer(
    chat: str | None = CHATML, puts: str | None = None, more: tuple[str, ...] = (), **names: str | None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as Qwen's; `puts` stands before every text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([END, START, TURN, *more])
    if puts is not None:
        special = [(puts, backend.token_to_id(puts))]
        backend.post_processor = TemplateProcessing(
            single=f"{puts} $A", pair=f"{puts} $A {puts} $B", special_tokens=special
        )
    given = {name: one for name, one in ({"eos_token": END, "pad_token": END} | names).items() if one is not None}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **given)
    made.chat_template = chat
    return made


def qwen(**sizes: Any) -> Any:
    return tiny_model(Qwen2Config(**SIZES | {"tie_word_embeddings": True} | sizes))


def llama(**sizes: Any) -> Any:
    return tiny_model(LlamaConfig(**SIZES | {"tie_word_embeddings": False} | sizes))


def save(folder: Path, model: Any, with_tokenizer: Any = None, **how: Any) -> Path:
    model.save_pretrained(folder, **how)
    (with_tokenizer or tokenizer()).save_pretrained(folder)
    return folder


def edit(file: Path, **values: Any) -> Path:
    """A JSON file with other values, without those that are None; its folder."""
    merged = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in merged.items() if value is not None}))
    return file.parent


def change(folder: Path, how: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """A model's folder with other tensors."""
    file = folder / "model.safetensors"
    save_file({name: one.contiguous() for name, one in how(load_file(file)).items()}, file, {"format": "pt"})
    return folder


def without(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {name: one for name, one in tensors.items() if name not in names}


class Typed:
    """`capgap` as it is typed, of a run file that can be changed.

    Args:
        folder: of everything.
        base: a model with its tokenizer.
        run: a command; how it ends, and what it says.
    """

    def __init__(self, folder: Path, base: Path, run: Callable[..., tuple[int, str]]) -> None:
        self.folder, self.base, self._run = folder, base, run
        self.said = ""

    def copy(self, name: str = "model") -> Path:
        """The model, to be spoilt."""
        return Path(shutil.copytree(self.base, self.folder / name))

    def source(self, name: str, data: bytes | str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    def records(self, records: list[Any], name: str = "records.jsonl") -> Path:
        return self.source(name, "".join(json.dumps(record) + "\n" for record in records))

    def type(self, *words: str, **sections: dict[str, Any]) -> int:
        """The command's exit code; what it says is kept."""
        text = self.folder / "texts.jsonl"
        if not text.exists():
            self.records([{"text": one} for one in TEXTS], text.name)
        settings: dict[str, Any] = {
            "name": "typed",
            "out": str(self.folder / "out"),
            "device": "cpu",
            "corpus": {
                "sources": [str(text)],
                "tokenizer": str(self.base),
                "seq_len": 32,
                "teacher_fraction": 0.0,
                "heldout_fraction": 0.2,
            },
            "teacher": {"path": str(self.base)},
            "cache": {"engine": "transformers", "recording": "topk", "top_k": 8, "max_tokens": 256},
            "student": {"path": str(self.base)},
            "train": {"learning_rate": 1e-3, "batch_sequences": 4, "max_tokens": 256},
        }
        for section, values in sections.items():
            settings[section] = settings.get(section, {}) | values
        run_file = self.folder / "run.json"
        run_file.write_text(json.dumps(settings, default=str))
        code, self.said = self._run(words[0], run_file, *words[1:])
        return code

    def makes(self, *stages: str, **sections: dict[str, Any]) -> None:
        """Each of these stages is made."""
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        for stage in stages:
            assert self.type(stage, **sections) == 0, self.said

    def refused(self, command: str = "corpus", code: int = 2, **sections: dict[str, Any]) -> str:
        """The one line that is said; no manifest stands after it."""
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        assert self.type(command, **sections) == code, self.said
        assert "Traceback" not in self.said
        lines = [line for line in self.said.splitlines() if line.startswith("capgap: ")]
        assert len(lines) == 1, self.said
        assert not list((self.folder / "out").glob("*/manifest.json"))
        return lines[0]

    def tokens(self, split: str = "student") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All tokens of the corpus's split, one after another, where documents start, and which are labels."""
        folder = self.folder / "out" / "corpus"
        manifest = read_manifest(folder)
        assert manifest is not None
        blocks = [block for block, _ in read_blocks(folder, manifest.shard_sets[split])]
        return tuple(
            np.concatenate([getattr(block, name) for block in blocks]).ravel()
            for name in ("tokens_BL1", "starts_BL1", "mask_BL1")
        )  # type: ignore[return-value]

    def text(self, learnt: bool = False) -> str:
        """All that the corpus holds, or what of it is learnt."""
        both = [self.tokens(split) for split in ("student", "heldout")]
        ids = np.concatenate([tokens[mask] if learnt else tokens for tokens, _, mask in both])
        return str(PreTrainedTokenizerFast.from_pretrained(self.folder / "out" / "corpus" / "tokenizer").decode(ids))
