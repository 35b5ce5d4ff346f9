# The image that makes initial weights, trains students, runs eval and writes the report: PyTorch's image with capgap and
# without vLLM. Build it in the repository's root:
#     docker build -f docker/student.Dockerfile -t capgap-student .
# The base image is pinned by its tag, which its owner can move. If that matters, look up its digest and pin it with
#     --build-arg PYTORCH_IMAGE=pytorch/pytorch@sha256:DIGEST
# If the tag below does not exist, choose one with torch 2.11 or newer and Python 3.12.
ARG PYTORCH_IMAGE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
FROM ${PYTORCH_IMAGE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Triton compiles its launcher when a kernel first runs, which needs a C compiler and Python's headers. Their versions are
# those of the base image's distribution and are not pinned, because no result depends on them.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# Packages that the base image lacks, with every file's sha256 (docker/lock.sh). torch and its dependencies stay those of
# the base image. The build fails if a package installed here conflicts with them.
WORKDIR /src
COPY docker/requirements-student.txt requirements.txt
RUN { python3 -m pip check > /tmp/before.txt || true; } \
    && python3 -m pip install --no-cache-dir --require-hashes --no-deps -r requirements.txt

COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY schemas schemas
COPY kernels kernels
COPY pipeline pipeline
COPY jobs jobs
RUN python3 -m pip install --no-cache-dir --no-deps --no-index --no-build-isolation . \
    && { python3 -m pip check > /tmp/after.txt || true; } \
    && ! grep -v -x -F -e 'No broken requirements found.' -f /tmp/before.txt /tmp/after.txt \
    && rm -r /src/* /tmp/before.txt /tmp/after.txt

RUN useradd --create-home --uid 10001 capgap && install -d -o capgap -g capgap /runs
USER 10001
WORKDIR /runs
ENTRYPOINT ["capgap"]
