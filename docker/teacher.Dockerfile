# The image that makes a corpus, trains or checks a teacher and scores with it: vLLM's image with capgap. Build it in the
# repository's root:
#     docker build -f docker/teacher.Dockerfile -t capgap-teacher .
# The base image is pinned by its tag, which its owner can move. If that matters, look up its digest and pin it with
#     --build-arg VLLM_IMAGE=vllm/vllm-openai@sha256:DIGEST
# For another version of vLLM that capgap supports: --build-arg VLLM_IMAGE=vllm/vllm-openai:TAG
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0
FROM ${VLLM_IMAGE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

ENV UV_SYSTEM_PYTHON=1 \
    UV_BREAK_SYSTEM_PACKAGES=1

# Packages that the base image lacks, with every file's sha256 (docker/lock.sh). vLLM and its dependencies stay those of
# the base image. The build fails if a package installed here conflicts with them.
WORKDIR /src
COPY docker/requirements-teacher.txt requirements.txt
RUN { uv pip check > /tmp/before.txt 2>&1 || true; } \
    && uv pip install --no-cache --require-hashes --no-deps -r requirements.txt

COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY schemas schemas
COPY kernels kernels
COPY pipeline pipeline
COPY jobs jobs
RUN uv pip install --no-cache --no-deps --no-index --no-build-isolation . \
    && { uv pip check > /tmp/after.txt 2>&1 || true; } \
    && ! { grep '^The package' /tmp/after.txt | grep -v -x -F -f /tmp/before.txt; } \
    && rm -r /src/* /tmp/before.txt /tmp/after.txt

RUN useradd --create-home --uid 10001 capgap && install -d -o capgap -g capgap /runs
USER 10001
WORKDIR /runs
ENTRYPOINT ["capgap"]
