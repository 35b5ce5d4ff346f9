#!/usr/bin/env bash
# Runs the cache stage on a running Ray cluster, with one replica of the teacher per GPU. A replica that dies is restarted.
#
#     RAY_ADDRESS=head:6379 jobs/ray/cache.sh RUN.yaml 16
#
# Start it on a machine of the cluster. All machines need the same version of capgap, and must share the file system of
# `out` in RUN.yaml. If the cluster needs a token, set RAY_AUTH_MODE=token and provide the token where Ray looks for it.
# Without RAY_ADDRESS, Ray is started on this machine for the stage.
set -euo pipefail

run=${1:?usage: jobs/ray/cache.sh RUN.yaml NUM_REPLICAS}
replicas=${2:?usage: jobs/ray/cache.sh RUN.yaml NUM_REPLICAS}

capgap cache "$run" --cache.replicas "$replicas"
