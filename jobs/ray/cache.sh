#!/usr/bin/env bash
# The cache stage on a Ray cluster that runs: one replica of the teacher per GPU, restarted where it dies.
#
#     RAY_ADDRESS=head:6379 jobs/ray/cache.sh RUN.yaml 16
#
# Start it on a machine of the cluster. capgap must be installed on all of them, in the same version, and `out` in
# RUN.yaml must lie on a file system that they share. Where the cluster asks for a token, set RAY_AUTH_MODE=token and
# give it where Ray looks for it. Without RAY_ADDRESS, Ray is started on this machine for the stage.
set -euo pipefail

run=${1:?usage: jobs/ray/cache.sh RUN.yaml NUM_REPLICAS}
replicas=${2:?usage: jobs/ray/cache.sh RUN.yaml NUM_REPLICAS}

capgap cache "$run" --cache.replicas "$replicas"
