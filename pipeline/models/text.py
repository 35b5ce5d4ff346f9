"""The text of a run: its tokenizer, context rule, held-out sequences and sizes in bytes.

the run has a corpus  --> all of it comes from the corpus
only a finished cache --> it comes from the cache, which holds the same tokenizer, facts, and held-out sequences
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from capgap.pipeline.models.tokenizers import ChatTemplates, chat_template_of, load_tokenizer
from capgap.pipeline.stage.context import StageInput
from capgap.pipeline.store import ShardReader
from capgap.pipeline.store.files import files_below, write_atomically
from capgap.schemas.errors import InputError
from capgap.schemas.facts import CacheFacts, TextFacts, heldout_set, text_facts
from capgap.schemas.manifest import ShardSet
from capgap.schemas.run_cache import RecordingName

TOKENIZER_FOLDER = "tokenizer"
# names of the files that transformers writes and reads next to a tokenizer
_CHAT_TEMPLATE_NAME, _FURTHER_TEMPLATES_FOLDER, _DEFAULT = "chat_template.jinja", "additional_chat_templates", "default"

_CORPUS, _CACHE = "corpus", "cache"


@dataclass(frozen=True)
class RunText:
    """What a stage must know about the text that it works on.

    Attributes:
        made: the finished corpus, or a finished cache that takes its place.
    """

    made: StageInput

    @classmethod
    def among(cls, inputs: Mapping[str, StageInput]) -> RunText:
        """Return the text of a stage's inputs: the corpus's if it is one of them, otherwise the cache's."""
        return cls(inputs[_CORPUS if _CORPUS in inputs else _CACHE])

    @property
    def of_cache(self) -> bool:
        """Whether a cache takes the place of the corpus."""
        return self.made.manifest.read_as == _CACHE

    @property
    def facts(self) -> TextFacts:
        """Facts of the tokenizer, the context rule, and the number of bytes of text in each split."""
        return text_facts(self.made.manifest.read_as, self.made.manifest.facts)

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the tokenizer's files, on a local disk.

        Raises:
            CorruptError, InputError: the files have changed since they were written, or cannot be fetched.
        """
        return self.made.fetch(TOKENIZER_FOLDER)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer; raises the errors of `tokenizer_folder`."""
        return load_tokenizer(self.tokenizer_folder)

    @property
    def seq_len(self) -> int:
        """Number of targets per sequence."""
        return next(iter(self.made.manifest.shard_sets.values())).seq_len

    def heldout_shards(self, recording: RecordingName | None = None) -> ShardSet:
        """Return the shards of held-out sequences.

        Args:
            recording: recording of a cache whose shards to return; None for any, as all hold the same text.

        Raises:
            InputError: the cache has no held-out sequences.
        """
        sets = self.made.manifest.shard_sets
        if not self.of_cache:
            return sets["heldout"]
        known = CacheFacts.model_validate(self.made.manifest.facts).recordings
        recordings = [recording] if recording else sorted(known, reverse=True)
        for one in recordings:
            found = sets.get(heldout_set(one))
            if found is not None and found.num_sequences:
                return found
        raise InputError(
            "the cache holds no held-out sequences to measure students on, and the run has no corpus",
            where=self.made.location,
            found="cache.num_heldout_sequences was 0",
            expected="a cache with held-out sequences, or its corpus beside it",
            fix="name the corpus that the cache was made from (reuse.corpus), or make the cache again with "
            "cache.num_heldout_sequences above 0",
        )

    def heldout(self, recording: RecordingName | None = None) -> ShardReader:
        """Open the shards of held-out sequences; raises the errors of `heldout_shards` and of the reader."""
        return ShardReader(self.made.location, self.heldout_shards(recording))


def write_tokenizer(corpus: StageInput, teacher: str, folder: Path) -> None:
    """Copy the corpus's tokenizer into a cache's folder, with the teacher's chat templates if it has none of its own.

    So a student can be trained from the cache without corpus and teacher. Templates with special tokens that the
    corpus's tokenizer does not have are left out.

    Args:
        corpus: the corpus that the cache is made from.
        teacher: the teacher's folder or id; empty if the teacher is not on this machine.
        folder: folder of the cache.

    Raises:
        CorruptError, InputError: as `RunText.tokenizer_folder`, or a chat template's name is not a valid file name.
        OSError: the folder is not writable.
    """
    text, target = RunText(corpus), folder / TOKENIZER_FOLDER
    source = text.tokenizer_folder
    for file in sorted(path for path in files_below(source) if path.is_file()):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(copy, file.read_bytes())
    tokenizer = text.tokenizer()
    if teacher and tokenizer.chat_template is None:
        _write_templates(chat_template_of(teacher, tokenizer.get_vocab()), target, teacher)


def _write_templates(templates: ChatTemplates, folder: Path, where: str) -> None:
    for name, template in ({_DEFAULT: templates} if isinstance(templates, str) else templates or {}).items():
        if name == _DEFAULT:
            write_atomically(folder / _CHAT_TEMPLATE_NAME, template)
            continue
        if Path(name).name != name:
            raise InputError(
                "the name of a chat template is not a valid file name",
                where=where,
                found=ascii(name),
                expected="a name without folders",
            )
        file = folder / _FURTHER_TEMPLATES_FOLDER / f"{name}.jinja"
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, template)
