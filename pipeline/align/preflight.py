"""Checks the student's tokenizer before anything of a run is made."""

from __future__ import annotations

from capgap.pipeline.models.given import TOKENIZER_FILES, require_findable
from capgap.schemas.run_file import RunFile


def require_tokenizer(run: RunFile) -> None:
    """Refuse a tokenizer that cannot be found or loaded, or whose tokens do not spell the text that they encode.

    Raises:
        InputError, MachineError: the tokenizer cannot be found or loaded, or is not reversible.
    """
    assert run.align is not None
    path, setting = run.align.tokenizer, "align.tokenizer"
    require_findable(path, setting, TOKENIZER_FILES)
    # imported here: these modules import transformers
    from capgap.pipeline.align.token_bytes import TextTokenizer
    from capgap.pipeline.models.checks import named
    from capgap.pipeline.models.tokenizers import load_tokenizer, tokenizer_facts

    with named(f"{setting}: {path}"):
        tokenizer = load_tokenizer(path)
        TextTokenizer.of(tokenizer, tokenizer_facts(tokenizer).vocab_size, path)
