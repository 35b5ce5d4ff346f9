"""Read a sampled cache with tarfile, zstandard, pyarrow and numpy alone: ids and counts of every target.

python read_without_capgap.py CACHE
"""

import itertools
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import zstandard

if len(sys.argv) != 2:
    sys.exit(__doc__)
folder = Path(sys.argv[1])
shard_set = json.loads((folder / "manifest.json").read_text())["shard_sets"]["sampled"]
settings = shard_set["codec_settings"]
id_of_rank = np.fromfile(folder / settings["ranking"], "<u4")


def joined(row, name):
    """Return the numbers of one column, whose bytes are stored in planes."""
    planes = [row[f"{name}_{i}"] for i in range(3) if f"{name}_{i}" in row]
    return sum(np.asarray(plane, np.int64) << 8 * i for i, plane in enumerate(planes))


num_targets = 0
for shard in shard_set["shards"]:
    with tarfile.open(folder / shard["file"]["path"]) as tar:
        for member in tar:
            stream = zstandard.ZstdDecompressor().decompress(tar.extractfile(member).read())
            for row in pa.ipc.open_stream(stream).read_all().to_pylist():
                tokens = id_of_rank[joined(row, "tokens")]
                counts, repeated = iter(row["counts"]), iter(joined(row, "repeated"))
                once = iter(joined(row, "once"))
                for i, num_repeated in enumerate(row["num_repeated"]):
                    several = list(itertools.islice(counts, num_repeated))
                    ranks = list(itertools.islice(repeated, num_repeated))
                    ranks += itertools.accumulate(itertools.islice(once, settings["num_ids"] - sum(several)))
                    counts_of = several + [1] * (len(ranks) - num_repeated)
                    target = dict(zip(id_of_rank[ranks].tolist(), counts_of, strict=True))
                    assert sum(target.values()) == settings["num_ids"]
                    if num_targets < 3:
                        print(f"after {tokens[i]} comes {tokens[i + 1]}; sampled: {target}")
                    num_targets += 1
print(f"{num_targets} targets")
