"""A tokenizer of SentencePiece's kind, and the facts of a text in any."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from capgap.schemas.facts import CorpusFacts, TokenizerFacts


def pieces_tokenizer(puts_blank: bool = False) -> PreTrainedTokenizerFast:
    """Of SentencePiece's kind: blanks as a mark, unknown characters as pieces of bytes, each digit by itself."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    letters = [*"thecatsondmr,;.0123456789zx"]
    words = ["th", "the", "\u2581the", "ca", "cat", "\u2581cat", "\u2581\u2581"]
    for token in ["\u2581", *letters, *words]:
        vocab.setdefault(token, len(vocab))
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("\u2581", "the"),
        ("c", "a"),
        ("ca", "t"),
        ("\u2581", "cat"),
        ("\u2581", "\u2581"),
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("\u2581")] if puts_blank else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    ends = [decoders.Strip(content=" ", left=1)] if puts_blank else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def facts_of(eos_id: int, vocab_size: int, bos_ids: tuple[int, ...] = ()) -> CorpusFacts:
    return CorpusFacts(
        tokenizer=TokenizerFacts(fingerprint="x", vocab_size=vocab_size, eos_id=eos_id),
        context="packed", bos_ids=bos_ids, splits={}, text_sources=(), whole_conversations=False,
    )  # fmt: skip
