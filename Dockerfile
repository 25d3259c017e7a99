# syntax=docker/dockerfile:1
# The image of the fraud-scoring flow.
#
#   docker build --tag fraud-scoring .                            the flow; mount a model
#   docker build --tag fraud-scoring --target with-model .        … with data/model in it
#   docker build --tag fraud-scoring --target waxctl .            … for waxctl/
#
#   docker run --read-only --env KAFKA_BOOTSTRAP_SERVERS=… --volume fraud:/var/lib/fraud \
#       --volume $PWD/data/model:/models/fraud:ro \
#       --volume $PWD/features/feast_repo/data:/app/features/feast_repo/data:ro fraud-scoring
#
# Two paths are written, both volumes: /var/lib/fraud (the recovery store: keep it) and /tmp (scratch,
# 64 MB are plenty). What else is mounted is read only:
#   /models/fraud                     the model package (model.train --out), unless it is baked in
#   /app/features/feast_repo/data     the Feast registry and, with SQLite, the profiles. With Redis:
#                                     FEAST_REPO=/app/features/feast_repo/feature_store.redis.yaml
#                                     and FEAST_REDIS=host:port,password=…
#   any path, named by STATE_DIR      the window state to start from
# Any other module is run with --entrypoint python, such as `-m dataflows.topics create`.
#
# tests/deploy/test_image.py replays these steps where there is no engine: it knows the instructions
# used here, and refuses others.

# A tag moves with Debian's and Python's security releases. The workflow builds weekly, and
# .github/dependabot.yml can replace the tag by a digest.
FROM python:3.12-slim-trixie AS base
ENV PATH=/app/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /app


# What the flow runs on, by hash; wheels only, so nothing is compiled and no foreign code runs here.
# The environment has no pip: nothing can be installed into the finished image.
FROM base AS packages
COPY requirements-runtime.lock ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip .venv \
    && /usr/local/bin/python -m pip --python .venv/bin/python install --no-deps \
        --only-binary=:all: --require-hashes --requirement requirements-runtime.lock


# CycloneDX 1.6: every Python package of the image, with version, licence and hash.
FROM packages AS sbom
COPY .ci/sbom.lock pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/pip \
    /usr/local/bin/python -m venv /sbom \
    && /sbom/bin/python -m pip install --no-deps --only-binary=:all: --require-hashes \
        --requirement sbom.lock \
    && /sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
        --output-file sbom.cdx.json .venv/bin/python


# The code, its bytecode, and its compiled kernels.
FROM packages AS code
COPY dataflows ./dataflows
COPY features ./features
COPY model ./model
# generic: the kernels run on every processor of the architecture, not only on the builder's.
ENV NUMBA_CPU_NAME=generic \
    NUMBA_CPU_FEATURES=
RUN python -m compileall -q --invalidation-mode unchecked-hash dataflows features model \
    && NUMBA_CACHE_DIR=/app/.kernels python -m dataflows.kernels \
    && mkdir features/feast_repo/data


FROM base AS runtime
LABEL org.opencontainers.image.title="fraud-scoring" \
      org.opencontainers.image.description="Real-time card-fraud scoring: Kafka, exact windows, Feast and ONNX in one Bytewax dataflow" \
      org.opencontainers.image.documentation="README.md" \
      org.opencontainers.image.base.name="python:3.12-slim-trixie"
RUN groupadd --gid 10001 fraud \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent \
        --shell /usr/sbin/nologin fraud \
    && install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/fraud \
    && install --directory /models/fraud
COPY --from=code /app ./
COPY --from=sbom /app/sbom.cdx.json ./
ENV FEAST_REPO=/app/features/feast_repo \
    LOG_FORMAT=json \
    METRICS_HOST=0.0.0.0 \
    METRICS_PORT=9100 \
    MODEL_DIR=/models/fraud \
    NUMBA_CACHE_DIR=/tmp/kernels \
    NUMBA_CACHE_LOCATOR_CLASSES=dataflows.kernels.Baked \
    NUMBA_CPU_FEATURES= \
    NUMBA_CPU_NAME=generic
USER 10001:10001
VOLUME ["/var/lib/fraud", "/tmp"]
EXPOSE 9100
# The flow drains at SIGTERM, within the time of a snapshot: docker stop --time 30.
STOPSIGNAL SIGTERM
# For engines without probes; Kubernetes ignores it, and asks /healthz and /readyz itself.
HEALTHCHECK --interval=10s --timeout=6s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['METRICS_PORT'] + '/healthz', timeout=5)"]
# In exec form, so that Python is process 1 and gets the signal.
ENTRYPOINT ["python", "-m", "bytewax.run", "dataflows.fraud"]
CMD ["-r", "/var/lib/fraud/recovery", "-s", "10", "-b", "0"]


FROM runtime AS with-model
COPY data/model /models/fraud


# For waxctl, whose chart runs `sh -c "sh ./entrypoint.sh"`: Debian's sh would stay process 1 and hear
# no SIGTERM; bash gives its place to what it runs, so that Python gets there even so.
FROM with-model AS waxctl
COPY waxctl/entrypoint.sh waxctl/entrypoint-recovery.sh ./
USER 0:0
# hadolint ignore=DL4005
RUN ln -sf bash /bin/sh
USER 10001:10001


# Last, so that it is what a build without --target makes.
FROM runtime AS fraud-scoring
