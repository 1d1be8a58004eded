# LaMamba's service on the CPU, with the shipped models.
#   docker build -t lamamba .            torch from pip's default index (a CUDA build, several GB)
#   docker build --build-arg TORCH_INDEX_URL=<PyTorch's CPU index> -t lamamba .
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS build
ARG TORCH_INDEX_URL=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1
WORKDIR /src
RUN python3 -m venv /opt/lamamba
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/lamamba/bin/pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY model ./model
COPY service ./service
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/lamamba/bin/pip install -c constraints.txt .

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="lamamba" \
      org.opencontainers.image.description="Serves LaMamba-Diff, class-conditional latent diffusion" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --system --uid 10001 --no-create-home lamamba
COPY --from=build /opt/lamamba /opt/lamamba
USER 10001
ENV PATH=/opt/lamamba/bin:$PATH PYTHONUNBUFFERED=1 LAMAMBA_HOST=0.0.0.0 HOME=/tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready', timeout=2)"]
CMD ["lamamba", "serve"]
