# The server in an image, with the shipped models:
#   docker build --target cpu --build-arg TORCH_INDEX_URL=<PyTorch's CPU index> -t lamamba:cpu .
#   docker build --target cuda -t lamamba:cuda .
# TORCH_INDEX_URL is where torch comes from: empty, pip's default index, whose build brings CUDA's libraries along.
# EXTRAS are the package's extras that are installed: otel, for traces; otel,ray for Ray Serve (k8s/ray/).
# REVISION is the commit, for the image's label: --build-arg REVISION="$(git rev-parse HEAD)".
# Behind a proxy, or from mirrors: the images and PIP_INDEX_URL are arguments, and two secrets, each if needed, are
#   --secret id=ca_bundle,src=FILE (what pip trusts) and --secret id=pip_conf,src=FILE (an index with a password).
ARG PYTHON_IMAGE=python:3.11-slim
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04

FROM ${PYTHON_IMAGE} AS wheel
ARG PIP_INDEX_URL=
WORKDIR /src
COPY docker/pip.sh docker/
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=ca_bundle --mount=type=secret,id=pip_conf \
    docker/pip.sh install -c constraints.txt hatchling
COPY pyproject.toml README.md LICENSE ./
COPY model ./model
COPY service ./service
RUN docker/pip.sh wheel --no-index --no-deps --no-build-isolation --wheel-dir /wheels .

FROM ${PYTHON_IMAGE} AS cpu-dependencies
ARG PIP_INDEX_URL=
ARG TORCH_INDEX_URL=
ARG EXTRAS=otel
WORKDIR /src
COPY docker/pip.sh docker/install-dependencies.sh docker/
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=ca_bundle --mount=type=secret,id=pip_conf \
    docker/install-dependencies.sh

# torch's wheel brings CUDA's libraries, so the base is the smallest that makes the driver's container runtime
# mount the driver. gcc and Python's headers stay in the image: Triton builds its launcher (driver.c of its NVIDIA
# backend) with them at the first kernel, and keeps it in TRITON_CACHE_DIR.
FROM ${CUDA_IMAGE} AS cuda-base
# hadolint ignore=DL3008
RUN --mount=type=cache,target=/var/cache/apt --mount=type=cache,target=/var/lib/apt \
    apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev python3-venv

FROM cuda-base AS cuda-dependencies
ARG PIP_INDEX_URL=
ARG TORCH_INDEX_URL=
ARG EXTRAS=otel
WORKDIR /src
COPY docker/pip.sh docker/install-dependencies.sh docker/
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=ca_bundle --mount=type=secret,id=pip_conf \
    docker/install-dependencies.sh

FROM cuda-base AS cuda
COPY --from=cuda-dependencies /opt/lamamba /opt/lamamba
# From here on both images are the same.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    /opt/lamamba/bin/pip install --no-cache-dir --no-index --no-deps /wheels/*.whl \
    && groupadd --gid 10001 lamamba \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp lamamba \
    && install -d -o lamamba -g lamamba /var/cache/lamamba
ARG REVISION=
LABEL org.opencontainers.image.title="lamamba" \
      org.opencontainers.image.description="Serves LaMamba-Diff, class-conditional latent diffusion" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
ENV PATH=/opt/lamamba/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    HF_HOME=/var/cache/lamamba/huggingface \
    TRITON_CACHE_DIR=/var/cache/lamamba/triton \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/lamamba/inductor \
    LAMAMBA_HOST=0.0.0.0 \
    LAMAMBA_PORT=8000
USER 10001:10001
VOLUME /var/cache/lamamba
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open(f'http://127.0.0.1:{os.environ[\"LAMAMBA_PORT\"]}/health/ready', timeout=4)"]
CMD ["lamamba", "serve"]

FROM ${PYTHON_IMAGE} AS cpu
COPY --from=cpu-dependencies /opt/lamamba /opt/lamamba
# From here on both images are the same.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    /opt/lamamba/bin/pip install --no-cache-dir --no-index --no-deps /wheels/*.whl \
    && groupadd --gid 10001 lamamba \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp lamamba \
    && install -d -o lamamba -g lamamba /var/cache/lamamba
ARG REVISION=
LABEL org.opencontainers.image.title="lamamba" \
      org.opencontainers.image.description="Serves LaMamba-Diff, class-conditional latent diffusion" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
ENV PATH=/opt/lamamba/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    HF_HOME=/var/cache/lamamba/huggingface \
    TRITON_CACHE_DIR=/var/cache/lamamba/triton \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/lamamba/inductor \
    LAMAMBA_HOST=0.0.0.0 \
    LAMAMBA_PORT=8000
USER 10001:10001
VOLUME /var/cache/lamamba
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open(f'http://127.0.0.1:{os.environ[\"LAMAMBA_PORT\"]}/health/ready', timeout=4)"]
CMD ["lamamba", "serve"]
