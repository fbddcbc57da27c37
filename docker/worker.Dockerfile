# A worker: torch, grpcio, protobuf and optimd, for your own image to begin from. Build from the repository's root:
#
#   docker build -f docker/worker.Dockerfile -t optimd-worker .
#
# EXTRAS      what else of optimd: demo has what examples/train_digits.py needs.
# PIP_OPTIONS as in server.Dockerfile, and so are VARIANT and the wheels.
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
ARG EXTRAS="[demo]"
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY client client
COPY server server
COPY proto proto
# As a variable the constraints hold for what builds the package, too.
RUN grep -v '^torch==' constraints.txt > /tmp/constraints.txt \
    && PIP_CONSTRAINT=/tmp/constraints.txt pip install ${PIP_OPTIONS} --prefix=/opt/rest ".${EXTRAS}"

FROM ${PYTHON_IMAGE}
RUN useradd --system --uid 10001 --home-dir /home/worker --create-home worker \
    && install -d -o worker /out
COPY --from=torch /opt/optimd /opt/optimd
COPY --from=build /opt/rest /opt/optimd
COPY examples /examples
# One thread: workers on one machine would wait for each other's.
ENV PATH=/opt/optimd/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    OMP_NUM_THREADS=1
USER worker
WORKDIR /home/worker
ENTRYPOINT ["python3"]
CMD ["/examples/train_digits.py"]
