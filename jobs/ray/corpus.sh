#!/usr/bin/env bash
# Runs the corpus stage on a running Ray cluster, with workers of one CPU each. A worker that dies is restarted.
#
#     RAY_ADDRESS=head:6379 jobs/ray/corpus.sh RUN.yaml 64
#
# Start it on a machine of the cluster. All machines need the same version of capgap, and must share the file system of
# `out` and of the sources in RUN.yaml. If the cluster needs a token, set RAY_AUTH_MODE=token and provide the token where
# Ray looks for it. Without RAY_ADDRESS the workers are processes of this machine.
set -euo pipefail

run=${1:?usage: jobs/ray/corpus.sh RUN.yaml NUM_WORKERS}
workers=${2:?usage: jobs/ray/corpus.sh RUN.yaml NUM_WORKERS}

capgap corpus "$run" --corpus.workers "$workers"
