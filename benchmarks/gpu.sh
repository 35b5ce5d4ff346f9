#!/usr/bin/env bash
# Every test and benchmark that a GPU is needed for, in a few minutes; a short table last. Needs torch with CUDA; the
# capture tests also need vLLM, and are skipped without it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo 'gpu.sh: no GPU can be used here' >&2; exit 2; }
"$python" -m pytest -q -m gpu tests
"$python" benchmarks/sparse_kl.py --device cuda
"$python" benchmarks/train_step.py --device cuda
if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)'; then
  "$python" benchmarks/capture.py --device cuda:0
fi
echo "gpu.sh: took ${SECONDS} s"
