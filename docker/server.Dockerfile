# The server. Build from the repository's root:
#
#   docker build -f docker/server.Dockerfile -t optimd-server .
#   docker build -f docker/server.Dockerfile -t optimd-server:cuda --build-arg VARIANT=cuda .
#
# VARIANT     cpu or cuda. It chooses torch's wheel by TORCH_CPU or TORCH_CUDA. Which GPUs a container sees, its runtime is
#             told by who starts it (compose.gpu.yaml, Kubernetes' device plugin).
# PIP_OPTIONS what pip needs besides. PyPI's torch for x86-64 Linux has CUDA in it, gigabytes that a CPU has no use for:
#             name the index that pytorch.org has for CPU wheels, by --extra-index-url, and TORCH_CPU="torch==2.13.0+cpu".
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG VARIANT=cpu
ARG TORCH_CPU="torch==2.13.0"
ARG TORCH_CUDA="torch==2.13.0"

FROM ${PYTHON_IMAGE} AS torch
ARG VARIANT
ARG TORCH_CPU
ARG TORCH_CUDA
ARG PIP_OPTIONS=""
RUN python3 -m venv /opt/optimd
ENV PATH=/opt/optimd/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN pip install ${PIP_OPTIONS} "$([ "$VARIANT" = cuda ] && echo "$TORCH_CUDA" || echo "$TORCH_CPU")"

# What else is needed goes into a folder of its own: a layer of some megabytes above torch's, which changes seldom.
FROM torch AS build
ARG PIP_OPTIONS=""
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY client client
COPY server server
COPY proto proto
# As a variable the constraints hold for what builds the package, too.
RUN grep -v '^torch==' constraints.txt > /tmp/constraints.txt \
    && PIP_CONSTRAINT=/tmp/constraints.txt pip install ${PIP_OPTIONS} --prefix=/opt/rest '.[server]'

FROM ${PYTHON_IMAGE}
RUN useradd --system --uid 10001 --no-create-home --home-dir /nonexistent optimd \
    && install -d -o optimd /var/lib/optimd
COPY --from=torch /opt/optimd /opt/optimd
COPY --from=build /opt/rest /opt/optimd
COPY docker/healthcheck.py /usr/local/lib/optimd/healthcheck.py
ENV PATH=/opt/optimd/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    OPTIMD_ADDRESS=0.0.0.0:50551 \
    OPTIMD_METRICS_ADDRESS=0.0.0.0:9464 \
    OPTIMD_METRICS_INSECURE=1 \
    OPTIMD_DATA_DIR=/var/lib/optimd \
    OPTIMD_LOG_FORMAT=json
USER optimd
VOLUME /var/lib/optimd
EXPOSE 50551 9464
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python3", "/usr/local/lib/optimd/healthcheck.py"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["optimd"]
# Refuses to speak plaintext to other hosts until it is given a certificate, or OPTIMD_INSECURE=1.
CMD ["serve"]
