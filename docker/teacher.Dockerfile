# The image that scores a corpus: vLLM's own, with capgap added. Build it from the repository's root:
#     docker build -f docker/teacher.Dockerfile -t capgap-teacher .
# Another vLLM within capgap's range: --build-arg VLLM_IMAGE=vllm/vllm-openai:TAG
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0
FROM ${VLLM_IMAGE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Without PYTHONSAFEPATH, capgap's folder `kernels` could hide a package of that name.
ENV PYTHONSAFEPATH=1 \
    UV_SYSTEM_PYTHON=1 \
    UV_BREAK_SYSTEM_PACKAGES=1

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY schemas schemas
COPY kernels kernels
COPY pipeline pipeline
COPY jobs jobs

# Every package that the image brings keeps its version; the build stops where capgap cannot live with one.
RUN uv pip freeze | grep -v -e ' @ ' -e '^-e ' > /tmp/kept.txt \
    && uv pip install --no-cache -c /tmp/kept.txt . \
    && uv pip freeze | grep -F -x -f /tmp/kept.txt | cmp - /tmp/kept.txt \
    && rm -r /src/* /tmp/kept.txt

RUN useradd --create-home --uid 10001 capgap && install -d -o capgap -g capgap /runs
USER 10001
WORKDIR /runs
ENTRYPOINT ["capgap"]
