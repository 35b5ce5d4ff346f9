#!/usr/bin/env bash
# Every test and benchmark that a GPU is needed for, in a few minutes; a short table last. One that fails does not keep
# the others from running, and the exit status says whether any did. Needs torch with CUDA; the capture tests also need
# vLLM, and are skipped without it. Figures are kept in benchmarks/results as they come.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo 'gpu.sh: no GPU can be used here' >&2; exit 2; }
ends=()
failed=0

part() {
  local begun=$SECONDS status=0
  "${@:2}" || status=$?
  ((status == 0)) || failed=1
  ends+=("$(printf '%-28s %-9s %5d s' "$1" "$([[ $status == 0 ]] && echo passed || echo "exit $status")" $((SECONDS - begun)))")
}

part 'tests' "$python" -m pytest -q -m gpu tests
part 'the loss' "$python" benchmarks/sparse_kl.py --device cuda
part 'a training step' "$python" benchmarks/train_step.py --device cuda
if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)'; then
  part 'capture' "$python" benchmarks/capture.py --device cuda:0
fi
printf '%s\n' "${ends[@]}" "gpu.sh: took ${SECONDS} s"
exit "$failed"
