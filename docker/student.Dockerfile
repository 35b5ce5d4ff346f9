# The image that packs the corpus, trains students, measures and reports: PyTorch's own, with capgap added and without
# vLLM. Build it from the repository's root:
#     docker build -f docker/student.Dockerfile -t capgap-student .
# If the tag below is not there, choose one with torch 2.11 or newer: --build-arg PYTORCH_IMAGE=pytorch/pytorch:TAG
ARG PYTORCH_IMAGE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
FROM ${PYTORCH_IMAGE}

# Triton compiles its launcher when a kernel first runs, with a C compiler and Python's headers.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*

# Without PYTHONSAFEPATH, capgap's folder `kernels` could hide a package of that name.
ENV PYTHONSAFEPATH=1 \
    PIP_BREAK_SYSTEM_PACKAGES=1

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY docker/constraints.txt docker/constraints.txt
COPY schemas schemas
COPY kernels kernels
COPY pipeline pipeline
COPY jobs jobs

# torch and its triton stay the image's; everything else is as last tested.
RUN python3 -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > /tmp/pins.txt \
    && grep -v -e '^torch==' -e '^triton==' docker/constraints.txt >> /tmp/pins.txt \
    && python3 -m pip install --no-cache-dir -c /tmp/pins.txt . \
    && rm -r /src/* /tmp/pins.txt

RUN useradd --create-home --uid 10001 capgap && install -d -o capgap -g capgap /runs
USER 10001
WORKDIR /runs
ENTRYPOINT ["capgap"]
