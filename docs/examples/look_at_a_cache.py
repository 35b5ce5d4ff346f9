"""Print a teacher's predictions from its cache: the text, and the most probable next tokens with their probabilities.

python look_at_a_cache.py CACHE TOKENIZER
"""

import sys

from transformers import AutoTokenizer

from capgap import open_cache

if len(sys.argv) != 3:
    sys.exit(__doc__)
cache = open_cache(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
print({name: recording.num_ids for name, recording in cache.facts.recordings.items()}, cache.vocab_size)

batch = next(iter(cache.batches(1)))
for row in range(5):
    print(repr(tokenizer.decode(batch.input_ids_BL[0, : row + 1])), "->")
    weights_K, order_K = batch.weights_NK[row].sort(descending=True)
    for weight, column in list(zip(weights_K.tolist(), order_K.tolist(), strict=True))[:3]:
        print(f"  {weight:6.1%} {tokenizer.decode([int(batch.ids_NK[row, column])])!r}")
