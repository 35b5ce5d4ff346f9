"""Check, once when the engine starts, that the server serves the teacher of this cache.

first sequence --corpus's tokenizer--> text --server's tokenizer--> the same ids?    another tokenizer gives other ids
finished shards --> the name and root of the model that they were scored with --> the same?
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from capgap.pipeline.cache.scoring import Recording
from capgap.pipeline.cache.server_engine import ServerEngine
from capgap.pipeline.models.text import TOKENIZER_FOLDER
from capgap.pipeline.models.tokenizers import load_tokenizer
from capgap.pipeline.stage.events import event
from capgap.pipeline.store import ShardReader
from capgap.pipeline.store.sidecars import read_sidecar
from capgap.schemas.errors import MismatchError
from capgap.schemas.facts import ShardFacts
from capgap.schemas.manifest import ShardSet
from capgap.schemas.run_endpoint import EndpointSettings

_PROBE_TOKENS = 256
# The same tokenizer in another program may split a text slightly differently, mostly at its beginning. Another
# tokenizer shares hardly any ids.
_LEAST_SHARED = 0.5


def start_served(
    settings: EndpointSettings, model: str, recording: Recording, corpus: Path, source: ShardSet, scored: Path
) -> ServerEngine:
    """Start the engine of a served teacher, and check that the server serves the right one.

    Args:
        settings: address and limits of the server.
        model: the server's name for the teacher.
        recording: what to keep of each row.
        corpus: folder of the corpus.
        source: the corpus's shards to be scored.
        scored: folder with the facts of finished shards; may be missing or empty.

    Raises:
        CapgapError: as `ServerEngine`.
        MismatchError: the server's tokenizer is not the corpus's, or finished shards come from another model.
    """
    engine = ServerEngine(settings, model, recording, source.seq_len)
    try:
        _require_begun_by(engine, scored, settings.base_url)
        _require_same_ids(engine, corpus, source, f"teacher.served: {model}")
    except BaseException:
        engine.close()
        raise
    return engine


def _require_begun_by(engine: ServerEngine, scored: Path, where: str) -> None:
    for path in sorted(scored.glob("*.json")):
        facts = read_sidecar(path, ShardFacts)
        if facts is not None and facts.engine != engine.name:
            raise MismatchError(
                "another model is served than the one that began the cache",
                where=where,
                found=engine.name,
                expected=facts.engine,
                fix="serve the model that began the cache again, or start over with --remake cache",
            )


def _require_same_ids(engine: ServerEngine, corpus: Path, source: ShardSet, where: str) -> None:
    tokenizer = load_tokenizer(corpus / TOKENIZER_FOLDER)
    sequences, _ = ShardReader(corpus, source).read(0)
    text = tokenizer.decode(sequences.tokens_BL1[0][:_PROBE_TOKENS], skip_special_tokens=True)
    own = tokenizer.encode(text, add_special_tokens=False)
    served = engine.ids_of(text)
    if served is None or served == own:
        return
    shared = sum((Counter(own) & Counter(served)).values()) / max(len(own), len(served), 1)
    if shared < _LEAST_SHARED:
        raise MismatchError(
            "the served teacher has another tokenizer than the corpus",
            where=where,
            found=f"{len(served)} ids for a text, {shared:.0%} of them equal to the corpus's",
            expected=f"the {len(own)} ids of the corpus's tokenizer",
            fix="serve the intended teacher, or set corpus.tokenizer to its folder",
        )
    event(
        "server_tokenizer",
        f"cache: the server's tokenizer gives {len(served)} ids for a text, and the corpus's gives {len(own)}; "
        f"{shared:.0%} of them agree: does the server serve the intended teacher?",
        logging.WARNING,
        shared=shared,
    )
