"""A WebDataset pipeline over a shard set, and a pipeline stage that decodes its members in any WebDataset pipeline.

    webdataset_of:   members of the manifest --ranks--> --workers--> --shuffled--> read by offset --> samples
    MemberDecoder:   wds.WebDataset(urls): members as bytes, in the order of the tar --> samples

WebDataset distributes whole shards: three ranks get 2, 1 and 1 of four shards, and a worker without a shard stops the
loop with an error. `webdataset_of` distributes members instead, of which a shard has hundreds. Each member belongs to
exactly one worker of one rank, whatever their number. Members are distributed before they are shuffled, so that workers
do not have to agree on an order, and no member is lost or read twice.

Only the pipeline and the splitters of webdataset are used. `.decode` is never called, because it passes other entries
of a shard to decoders of its own, one of which unpickles.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info
from webdataset import FluidWrapper, split_by_node, split_by_worker
from webdataset.utils import pytorch_worker_info

from capgap.pipeline.store.plain_tar import SUFFIX
from capgap.pipeline.store.reader import ShardReader
from capgap.pipeline.store.samples import DictSample, SampleShape
from capgap.schemas.errors import CorruptError, InputError

_FIELD = SUFFIX.removeprefix(".")

Place = dict[str, Any]
"""A member to be read: the numbers of its shard and of itself in the shard, and the shard's `url`, as in WebDataset."""

Splitter = Callable[[Iterable[Place]], Iterable[Place]]


def webdataset_of(
    reader: ShardReader,
    shape: SampleShape,
    *,
    shuffle: bool = False,
    seed: int = 0,
    nodesplitter: Splitter | None = split_by_node,
    workersplitter: Splitter | None = split_by_worker,
) -> FluidWrapper:
    """Return a webdataset pipeline that yields the sequences of a shard set; `Cache.webdataset` lists their keys.

    Args:
        reader: Reader of the shards.
        shape: What the samples hold.
        shuffle: Whether each worker shuffles its members in every epoch.
        seed: Seed of the shuffling.
        nodesplitter: Distributes the members over ranks; None gives all members to each rank.
        workersplitter: Distributes a rank's members over its workers; None gives all of them to each worker.
    """
    members = _Members(reader, needs_one_a_rank=nodesplitter is split_by_node)
    stages = [nodesplitter, workersplitter, _Shuffle(seed) if shuffle else None, _Read(reader, shape)]
    return FluidWrapper(members).compose(*(stage for stage in stages if stage is not None))


class MemberDecoder:
    """A stage for `wds.WebDataset(urls).compose(decoder)` that turns samples of WebDataset into sequences.

    It runs no code from data. It checks each member's crc32 in the manifest, the checksum of its zstd frame, its shape,
    and that its targets belong to their tokens. When the stream ends, it checks that no shard gave only some members.
    It cannot see a shard that gave none, which WebDataset allows behind a damaged first header: count the samples.

    Args:
        reader: Reader of the shard set, of which only the manifest is used; no shard is opened.
        shape: What the samples hold.
        whole_shards: Raise at the end of the stream if a shard gave only some of its members, which WebDataset allows
            behind a damaged tar header. Set it to False if an earlier stage drops members on purpose.
    """

    def __init__(self, reader: ShardReader, shape: SampleShape, whole_shards: bool = True) -> None:
        self._reader, self._shape, self._whole_shards = reader, shape, whole_shards
        shards = reader.shard_set.shards
        self._numbers = {shard.file.path.removesuffix(".tar"): number for number, shard in enumerate(shards)}

    def __call__(self, source: Iterable[dict[str, Any]]) -> Iterator[DictSample]:
        """Yield the sequences of these members.

        Raises:
            CorruptError: A member is damaged, or members of a shard are missing.
            InputError: A sample belongs to no shard that the manifest lists.
        """
        seen: Counter[int] = Counter()
        for sample in source:
            shard, member = self._place(sample)
            seen[shard] += 1
            block = self._reader.decode_member(shard, member, sample[_FIELD])
            yield from self._shape.samples_of(*block, str(sample["__key__"]), str(sample.get("__url__", "")))
        if self._whole_shards:
            self._require_whole(seen)

    def _place(self, sample: dict[str, Any]) -> tuple[int, int]:
        key = str(sample.get("__key__"))
        stem, _, number = key.rpartition("-")
        shard = self._numbers.get(stem)
        num_members = 0 if shard is None else len(self._reader.shard_set.shards[shard].members)
        if shard is None or not number.isdecimal() or int(number) >= num_members:
            raise InputError(
                "a sample of no shard that the manifest lists",
                where=str(sample.get("__url__", "")) or None,
                found=repr(key),
                expected="a member of the cache that the decoder was made for",
                fix="decode other sources before they are mixed with this one",
            )
        if not isinstance(sample.get(_FIELD), bytes):
            raise InputError(
                "a member without its bytes",
                where=key,
                found=sorted(name for name in sample if not name.startswith("__")),
                expected=_FIELD,
                fix="compose the decoder directly onto wds.WebDataset, without `.decode`",
            )
        return shard, int(number)

    def _require_whole(self, seen: Counter[int]) -> None:
        for number, count in sorted(seen.items()):
            shard = self._reader.shard_set.shards[number]
            # a multiple is allowed because a resampled shard comes more than once
            if count % len(shard.members):
                raise CorruptError(
                    "a shard ended before its last member",
                    where=self._reader.place.name_of(shard.file),
                    found=f"{count} members",
                    expected=f"{len(shard.members)}, as the manifest lists",
                    fix="run `capgap verify` on the cache; whole_shards=False turns this check off",
                )


class _Members(IterableDataset[Place]):
    """Yields every member in the order of the manifest."""

    def __init__(self, reader: ShardReader, needs_one_a_rank: bool) -> None:
        self._reader, self._needs_one_a_rank = reader, needs_one_a_rank

    def __iter__(self) -> Iterator[Place]:
        num_members, num_ranks = self._reader.shard_set.num_members, pytorch_worker_info()[1]
        if self._needs_one_a_rank and num_members < num_ranks:
            raise InputError(
                "fewer members than ranks, so a rank would have nothing",
                found=f"{num_members} members, {num_ranks} ranks",
                expected="at least one a rank",
                fix="use Cache.batches, which deals out sequences",
            )
        for number, shard in enumerate(self._reader.shard_set.shards):
            url = self._reader.place.name_of(shard.file)
            for member in range(len(shard.members)):
                yield {"url": url, "shard": number, "member": member}


class _Shuffle:
    """Shuffles the members of this worker, in a new order in each epoch."""

    def __init__(self, seed: int) -> None:
        self._seed, self._epoch = seed, -1

    def __call__(self, source: Iterable[Place]) -> Iterator[Place]:
        self._epoch += 1
        info = get_worker_info()
        # a worker that lives for one epoch always counts epoch 0, but torch gives it a new seed each time
        seed = f"{self._seed}/{self._epoch}/{None if info is None else info.seed}"
        members = list(source)
        random.Random(seed).shuffle(members)
        return iter(members)


class _Read:
    """Reads members by their offsets, with all checks of the reader."""

    def __init__(self, reader: ShardReader, shape: SampleShape) -> None:
        self._reader, self._shape = reader, shape

    def __call__(self, source: Iterable[Place]) -> Iterator[DictSample]:
        for place in source:
            entry = self._reader.shard_set.shards[place["shard"]]
            sequences, targets = self._reader.read_member(place["shard"], place["member"])
            yield from self._shape.samples_of(sequences, targets, entry.member(place["member"]).key, place["url"])
