"""Train a student from a cache with WebDataset's own loader, whose worker processes decode.

python webdataset_loader.py CACHE STUDENT
"""

import sys

import torch
import webdataset as wds
from transformers import AutoModelForCausalLM

import capgap


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    cache = capgap.open_cache(sys.argv[1])
    print(cache)
    student = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32)
    loss = capgap.DistillationLoss(student, cache, alpha=0.9)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)

    samples = cache.webdataset(shuffle=True).shuffle(1000)
    batches = wds.WebLoader(samples.batched(4, collation_fn=capgap.collate_samples), batch_size=None, num_workers=2)
    student.train()
    num_sequences, losses = 0, []
    for step, batch in enumerate(batches, start=1):
        result = loss(batch)
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        num_sequences += len(batch.input_ids_BL)
        losses.append(result.loss.detach())
        if step % 10 == 0:
            print(f"loss {torch.stack(losses[-10:]).mean():.4f} on average over ten steps")
    print(f"{num_sequences} sequences")


if __name__ == "__main__":
    main()
