"""How often `capgap verify --rescore` detects that a teacher has changed, and how often it rejects an unchanged one.

python benchmarks/rescore_power.py MODEL               a Hugging Face folder; the figures are kept in results/

The rows of a cache are made in bfloat16 in batches, on English documentation that every Python carries. By the rule of
`verify`, they are compared with the live teacher in the same dtype and in float32. The rows come from

- unchanged models: the same model in bfloat16 with another batch size, each on another part of the text
- changed models: in every matrix of the last layer, each weight is scaled by a random share, or all by the same share

For a changed model, only the last layer and the head are computed again. A trial is a part of the text and a seed; each
takes 2048 targets, a quarter of the least that `verify` takes.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from machine import keep
from transformers import AutoModelForCausalLM

from capgap.kernels.sampling import offsets
from capgap.pipeline.cache.convert import to_targets
from capgap.pipeline.cache.scoring import Recording, Scored, record_rows, unpack
from capgap.pipeline.models.tokenizers import load_tokenizer
from capgap.pipeline.store.codec import SAMPLED, TOPK_CODECS, Codec
from capgap.pipeline.verify.compare import apart
from capgap.pipeline.verify.judge import judge
from capgap.schemas.records import Sequences, Targets
from capgap.schemas.run_cache import RecordingName

SEQ_LEN, TOP_K, NUM_SAMPLES = 256, 64, 50
SHARES = (0.001, 0.002, 0.005, 0.01)
_vocab_size = 0
NAMES: tuple[RecordingName, ...] = ("topk", "sampled")


def main() -> None:
    """Run the trials, print the figures, and write them to results/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--parts", type=int, default=3, help="number of parts of the text, each tried with every batch size"
    )
    parser.add_argument("--sequences", type=int, default=8, help=f"a trial, each of {SEQ_LEN} targets")
    parser.add_argument("--seeds", type=int, default=2, help="changed models of each share and part")
    parser.add_argument("--no-keep", action="store_true", help="only print the figures")
    flags = parser.parse_args()
    lines = []
    for line in trials(flags.model, flags.parts, flags.seeds, flags.sequences):
        lines.append(line)
        print(line, flush=True)
    figures = {"model": flags.model.name, "num_targets": flags.sequences * SEQ_LEN, "rates": rates(lines)}
    print(figures)
    if not flags.no_keep:
        keep("rescore-power", "cpu", figures | {"trials": lines})


def rates(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each kind of trial, the number of trials and the number in which `verify` found a difference."""
    kinds: dict[tuple[str, str, float], list[bool]] = {}
    for line in lines:
        kinds.setdefault((line["name"], line["how"], line["share"]), []).append(line["told"])
    names = ("name", "how", "share")
    return [
        dict(zip(names, kind, strict=True)) | {"trials": len(told), "told": sum(told)} for kind, told in kinds.items()
    ]


def trials(folder: Path, num_parts: int, num_seeds: int, num_sequences: int) -> Iterator[dict[str, Any]]:
    """Yield a line for each trial and recording."""
    models = {dtype: _load(folder, dtype) for dtype in (torch.bfloat16, torch.float32)}
    narrow, wide = models.values()
    tokens_SL1 = _text(folder, num_parts * num_sequences)
    for part in range(num_parts):
        tokens_BL1 = tokens_SL1[part * num_sequences :][:num_sequences]
        before = _before_last(narrow, tokens_BL1, 8)
        own = {size: _rows(narrow, _before_last(narrow, tokens_BL1, size), tokens_BL1) for size in (4, 2, 1)}
        live, exact = _rows(narrow, before, tokens_BL1), _rows(wide, _before_last(wide, tokens_BL1, 4), tokens_BL1)
        views = [live, own[1]]
        for size in (4, 2):
            yield from _judged(own[size], views, exact, tokens_BL1, {"how": f"batches of {size}", "share": 0.0})
        for share in SHARES:
            for seed in range(num_seeds):
                for how in ("each", "all"):
                    moved = _moved(narrow, share, how, seed)
                    rows = _rows(moved, before, tokens_BL1)
                    yield from _judged(rows, views, exact, tokens_BL1, {"how": how, "share": share})


def _judged(
    kept: list[Scored], views: list[list[Scored]], exact: list[Scored], tokens_BL1: torch.Tensor, about: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    for name in NAMES:
        codec = _codec(name)
        stored = [_stored(codec, name, view, tokens_BL1) for view in (kept, *views)]
        num_ids, reference = codec.num_ids, to_targets(exact, name)
        found, *own = (apart(view, reference, num_ids, codec.error) for view in stored)
        _, wrong = judge(name, found, own, max(codec.error.kept_nats, codec.error.label_nats))
        figures = {"rms_nats": found.rms_nats, "common": found.common, "moved_samples": found.moved_samples}
        yield about | {"name": name, "told": bool(wrong)} | figures


def _codec(name: RecordingName) -> Codec:
    kind, num_ids = (TOPK_CODECS["near-lossless"], TOP_K) if name == "topk" else (SAMPLED, NUM_SAMPLES)
    return Codec(kind, SEQ_LEN, _vocab_size, num_ids)


def _stored(codec: Codec, name: RecordingName, scored: list[Scored], tokens_BL1: torch.Tensor) -> Targets:
    tokens = tokens_BL1.numpy().astype(np.int32)
    flags = np.zeros(tokens.shape, np.bool_)
    _, targets = codec.decode(codec.encode(Sequences(tokens, flags, flags), to_targets(scored, name)), "a trial")
    assert targets is not None
    return targets


def _load(folder: Path, dtype: torch.dtype) -> Any:
    global _vocab_size
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    _vocab_size = model.config.vocab_size
    return model


def _text(folder: Path, num_sequences: int) -> torch.Tensor:
    tokenizer = load_tokenizer(str(folder))
    ids: list[int] = []
    for name in sorted(topics):
        ids += [*tokenizer(topics[name], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(ids[: num_sequences * (SEQ_LEN + 1)]).view(num_sequences, SEQ_LEN + 1)


class _Stop(Exception):  # noqa: N818  it ends a forward pass and is no error
    """Raised when the input of the last layer is known."""


@torch.inference_mode()
def _before_last(model: Any, tokens_BL1: torch.Tensor, size: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the arguments of the last layer's call for each batch."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep_call(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append((arguments, named))
        raise _Stop

    hook = model.model.layers[-1].register_forward_pre_hook(keep_call, with_kwargs=True)
    for start in range(0, len(tokens_BL1), size):
        try:
            model.model(input_ids=tokens_BL1[start : start + size, :-1], use_cache=False)
        except _Stop:
            continue
    hook.remove()
    return calls


@torch.inference_mode()
def _rows(model: Any, calls: list[tuple[tuple[Any, ...], dict[str, Any]]], tokens_BL1: torch.Tensor) -> list[Scored]:
    """Return what an engine records of every sequence, from the calls of the last layer."""
    layer, head_VH = model.model.layers[-1], model.get_output_embeddings().weight.float()
    hidden = torch.cat([model.model.norm(layer(*arguments, **named)) for arguments, named in calls]).float()
    recording = Recording(NUM_SAMPLES, TOP_K, 1.0, 0, _vocab_size, 1024)
    found = []
    for row, (hidden_LH, tokens_L1) in enumerate(zip(hidden, tokens_BL1, strict=True)):
        offsets_L = torch.from_numpy(offsets(0, row.to_bytes(16, "little"), 0, SEQ_LEN))
        packed = record_rows(recording, hidden_LH @ head_VH.T, tokens_L1[1:], offsets_L)
        found.append(unpack(recording, packed.ids_NC.numpy(), packed.numbers_NW.numpy(), f"sequence {row}"))
    return found


def _moved(model: Any, share: float, how: str, seed: int) -> Any:
    """Return a model with a changed last layer, which shares everything else with the given one."""
    moved = copy.copy(model)
    moved._modules = dict(model._modules)
    moved.model = copy.copy(model.model)
    moved.model._modules = dict(model.model._modules)
    layers = list(model.model.layers)
    layers[-1] = copy.deepcopy(layers[-1])
    generator = torch.Generator().manual_seed(seed)
    for parameter in layers[-1].parameters():
        if parameter.ndim > 1:
            noise = torch.randn(parameter.shape, generator=generator) if how == "each" else 1 - 2 * (seed % 2)
            parameter.data = (parameter.data.float() * (1 + share * noise)).to(parameter.dtype)
    moved.model.layers = torch.nn.ModuleList(layers)
    return moved


if __name__ == "__main__":
    main()
