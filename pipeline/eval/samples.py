"""Let each model continue the same held-out prompts greedily, so that their texts can be read side by side."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from capgap.schemas.records import Sequences
from capgap.schemas.results import Sample
from capgap.schemas.run_corpus import ContextRule
from capgap.schemas.run_eval import EvalSettings

_LOG = logging.getLogger("capgap")

# Most tokens of a prompt: short enough to be read at a glance in the report.
_MOST_PROMPT_TOKENS = 48


@dataclass(frozen=True)
class Prompts:
    """Beginnings of held-out sequences, and how the text continues each.

    Attributes:
        tokenizer: Tokenizer of the corpus.
        vocab_size: Number of real ids; models write no others.
        prompts: Token ids of each beginning.
        truths: Token ids that follow each beginning in the text.
    """

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    prompts: tuple[tuple[int, ...], ...]
    truths: tuple[tuple[int, ...], ...]

    def samples(self, written: dict[str, tuple[str, ...]]) -> tuple[Sample, ...]:
        """Return the samples for `results.json`; `written` holds each model's continuations, by the model's name."""
        return tuple(
            Sample(
                prompt=self._text(prompt),
                truth=self._text(truth),
                continuations={name: texts[i] for name, texts in written.items()},
            )
            for i, (prompt, truth) in enumerate(zip(self.prompts, self.truths, strict=True))
        )

    def write(self, model: PreTrainedModel, name: str) -> tuple[str, ...] | None:
        """Return the model's greedy continuation of each prompt; None, with a warning, if its class cannot generate.

        The model's own generation settings, such as penalties, are replaced by defaults and not restored.
        """
        if not model.can_generate():
            _LOG.warning("eval: %s writes no samples: %s cannot generate", name, type(model).__name__)
            return None
        # transformers takes every setting that a call does not name from the model's own generation settings
        model.generation_config = GenerationConfig()
        eos_id = self.tokenizer.eos_token_id
        rows = model.get_output_embeddings().weight.shape[0]
        padding = list(range(self.vocab_size, rows)) or None
        texts = []
        for prompt, truth in zip(self.prompts, self.truths, strict=True):
            ids_1L = torch.tensor([prompt], device=model.device)
            settings = GenerationConfig(
                max_new_tokens=len(truth),
                do_sample=False,
                eos_token_id=eos_id,
                pad_token_id=eos_id,
                suppress_tokens=padding,
            )
            with torch.inference_mode():
                out_1M = model.generate(
                    input_ids=ids_1L, attention_mask=torch.ones_like(ids_1L), generation_config=settings
                )
            texts.append(self._text(tuple(out_1M[0, len(prompt) :].tolist())))
        return tuple(texts)

    def _text(self, ids: tuple[int, ...]) -> str:
        # special tokens, such as those that begin and end texts, are not shown to readers
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def prompts_of(
    sequences: Sequences,
    context: ContextRule,
    settings: EvalSettings,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
) -> Prompts:
    """Return the beginnings of `eval.num_text_samples` held-out sequences, spread evenly over all of them.

    A prompt starts where a document does, if one starts early enough in the sequence, so that it does not start in the
    middle of a sentence. A prompt and its continuation never pass the end of their sequence, so short sequences give
    shorter prompts. Under the context rule `document`, a prompt holds only the tokens of its last document, because the
    model sees no other.
    """
    num_tokens = sequences.tokens_BL1.shape[1]
    stop = min(_MOST_PROMPT_TOKENS, num_tokens // 2)
    places = np.linspace(0, len(sequences), min(settings.num_text_samples, len(sequences)), endpoint=False).astype(int)
    prompts, truths = [], []
    for place in places:
        begin = _first_document(sequences.starts_BL1[place, : num_tokens - 2 * stop + 1])
        row_L1 = sequences.tokens_BL1[place, begin:]
        starts = np.flatnonzero(sequences.starts_BL1[place, begin : begin + stop])
        first = int(starts[-1]) if context == "document" and len(starts) else 0
        prompts.append(tuple(map(int, row_L1[first:stop])))
        truths.append(tuple(map(int, row_L1[stop : stop + settings.text_sample_tokens])))
    return Prompts(tokenizer, vocab_size, tuple(prompts), tuple(truths))


def _first_document(starts_L: npt.NDArray[np.bool_]) -> int:
    """Return the index of the first document start; 0 where there is none."""
    found = np.flatnonzero(starts_L)
    return int(found[0]) if len(found) else 0
