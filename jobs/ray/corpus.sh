#!/usr/bin/env bash
# The corpus stage on a Ray cluster that runs: workers of one CPU each, restarted where they die.
#
#     RAY_ADDRESS=head:6379 jobs/ray/corpus.sh RUN.yaml 64
#
# Start it on a machine of the cluster. capgap must be installed on all of them, in the same version; `out` and the
# sources of RUN.yaml must lie on a file system that they share. Where the cluster asks for a token, set
# RAY_AUTH_MODE=token and give it where Ray looks for it. Without RAY_ADDRESS the workers are processes of this machine.
set -euo pipefail

run=${1:?usage: jobs/ray/corpus.sh RUN.yaml NUM_WORKERS}
workers=${2:?usage: jobs/ray/corpus.sh RUN.yaml NUM_WORKERS}

capgap corpus "$run" --corpus.workers "$workers"
