"""Train a student from a cache in a loop of plain torch; after a kill, the same command continues where it saved.

python plain_torch.py CACHE STUDENT OUT
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from capgap import DistillationLoss, open_cache

if len(sys.argv) != 4:
    sys.exit(__doc__)
cache, out = open_cache(sys.argv[1]), Path(sys.argv[3])
device = "cuda" if torch.cuda.is_available() else "cpu"
student = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32).to(device)
loss = DistillationLoss(student, cache, alpha=0.9)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
batches = cache.batches(8, num_epochs=2, seed=0)

if (out / "state.pt").exists():
    state = torch.load(out / "state.pt", weights_only=True)
    student.load_state_dict(state["student"])
    optimizer.load_state_dict(state["optimizer"])
    batches.load_state_dict(state["batches"])

student.train()
for step, batch in enumerate(batches, start=1):
    result = loss(batch)
    result.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"loss {result.loss:.4f}, KL {result.kl_N.mean():.4f}, cross-entropy {result.ce_N.mean():.4f}")
        out.mkdir(parents=True, exist_ok=True)
        state = {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "batches": batches.state_dict()}
        torch.save(state, out / "state.new.pt")
        (out / "state.new.pt").replace(out / "state.pt")

student.save_pretrained(out / "model")
