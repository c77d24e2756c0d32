# The service, in two stages: one builds an environment, the other holds it and nothing that built it.
#
#   docker build -t pennyweight:0.1.0 .
#   docker build -t pennyweight:0.1.0-cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#
# Both variants stand on the same base: PyTorch's CUDA wheels bring CUDA with them, and the host its driver. No Debian package
# is installed, so the base's digest and constraints.txt pin everything. See docs/deploy.md.
ARG BASE=python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1

FROM ${BASE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=serve,onnx,valkey
WORKDIR /src
COPY constraints.txt ./
# The variable pins what builds the package as well, which an option of pip would not.
ENV PATH=/opt/pennyweight/bin:$PATH PIP_CONSTRAINT=/src/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1
# PyTorch first and alone: most of the bytes, and they change with constraints.txt only. Its index is asked for nothing else.
# hadolint ignore=DL3013
RUN python3 -m venv /opt/pennyweight \
    && pip install --no-cache-dir --no-deps -i "${TORCH_INDEX}" torch
COPY pyproject.toml README.md LICENSE ./
COPY pennyweight ./pennyweight
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[${EXTRAS}]"

FROM ${BASE}
LABEL org.opencontainers.image.title=pennyweight org.opencontainers.image.licenses=Apache-2.0
ENV PATH=/opt/pennyweight/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PENNYWEIGHT_SERVE_HOST=0.0.0.0 \
    PENNYWEIGHT_SERVE_PORT=8000 \
    PENNYWEIGHT_SERVE_STORE=/data/events.db
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /data --shell /usr/sbin/nologin pennyweight \
    && install --directory --owner=10001 --group=10001 /data
COPY --from=build /opt/pennyweight /opt/pennyweight
# By number, so that Kubernetes can see that it is not root.
USER 10001:10001
WORKDIR /data
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import os, sys; from http.client import HTTPConnection as C; c = C('127.0.0.1', int(os.environ['PENNYWEIGHT_SERVE_PORT']), timeout=4); c.request('GET', '/health'); sys.exit(c.getresponse().status != 200)"]
# A bundle is mounted at /bundle, or copied there by an image of your own.
CMD ["pennyweight", "serve", "/bundle"]
