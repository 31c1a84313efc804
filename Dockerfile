# Three images that share their layers, for amd64 and arm64:
#
#   docker build -t dgmd_model_pipeline .         the pipeline: runs to completion, its exit code is the container's
#   docker build --target mlflow -t dgmd_mlflow . an MLflow server
#   docker build --target demo -t dgmd_demo .     the pipeline and a local S3 endpoint with the demo's images
#
# --build-arg VARIANT=cuda    TensorFlow for NVIDIA GPUs
# --build-arg BACKBONE=...    the backbone whose ImageNet weights are included; "" for none

FROM python:3.11-slim-bookworm AS python


# This is a separate stage, so that a change of other code or of a dependency does not download the weights again.
FROM python AS weights
ARG BACKBONE=EfficientNetV2-B1
WORKDIR /app
COPY dgmd_pipeline/__init__.py dgmd_pipeline/errors.py dgmd_pipeline/
COPY dgmd_pipeline/training/__init__.py dgmd_pipeline/training/backbones.py dgmd_pipeline/training/
RUN mkdir -p /weights/models \
    && if [ -n "$BACKBONE" ]; then python -m dgmd_pipeline.training.backbones "$BACKBONE" /weights; fi


FROM python AS runtime
ARG VARIANT=cpu
COPY locks/${VARIANT}.txt /tmp/lock.txt
# Wheels only: nothing is compiled. The removed files are never used: C++ headers, the libraries' tests (with a private
# key), Clang, which TensorFlow requires and does not load, and pip and setuptools of the base. `tensorflow/**/test` is
# no test: it is the module tf.test.
RUN python -m venv --without-pip /opt/venv \
    && pip --python /opt/venv/bin/python install --no-cache-dir --only-binary :all: --require-hashes -r /tmp/lock.txt \
    && rm -rf /tmp/lock.txt /opt/venv/lib/python3.*/site-packages/clang \
    && find /opt/venv/lib/python3.*/site-packages -depth -type d \
        \( -name tests -o -name include -o -name test -not -path '*/tensorflow/*' \) -exec rm -rf {} + \
    && rm -rf /usr/local/lib/python3.*/site-packages/* /usr/local/lib/python3.*/ensurepip /usr/local/bin/pip*
# No program changes its user. Group 0: a container with another user (--user 12345) has this group and can write like
# user 1000.
RUN find / -xdev -type f -perm /6000 -exec chmod a-s {} + \
    && useradd --create-home --uid 1000 --gid 0 pipeline \
    && install -d -o pipeline -g 0 -m 775 /app/data /mlflow /demo
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/home/pipeline \
    MLFLOW_DISABLE_TELEMETRY=true
WORKDIR /app
USER 1000


FROM runtime AS mlflow
# Job execution would start six processes for GenAI features that the pipeline does not use. An access log would have a
# line for the request of the health check every 10 seconds.
ENV MLFLOW_BACKEND_STORE_URI=sqlite:////mlflow/mlflow.db \
    MLFLOW_ARTIFACTS_DESTINATION=/mlflow/artifacts \
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
    MLFLOW_UVICORN_OPTS=--no-access-log
COPY dgmd_pipeline/__init__.py dgmd_pipeline/errors.py dgmd_pipeline/formatting.py dgmd_pipeline/
COPY dgmd_pipeline/registry/__init__.py dgmd_pipeline/registry/database.py dgmd_pipeline/registry/store.py \
     dgmd_pipeline/registry/login.py dgmd_pipeline/registry/permissions.py dgmd_pipeline/registry/
VOLUME /mlflow
EXPOSE 5000
# The start period includes the upgrade of a large database.
HEALTHCHECK --interval=10s --timeout=8s --start-period=30m --retries=5 \
    CMD ["python", "-c", "from urllib.request import *; build_opener(ProxyHandler({})).open('http://127.0.0.1:5000/health', timeout=4)"]
# The database is upgraded before any command, because MLflow itself refuses a database of an older schema, or changes it
# without a copy. The server requires a login if MLFLOW_OPERATOR_PASSWORD and MLFLOW_PIPELINE_PASSWORD are set.
ENTRYPOINT ["sh", "-c", "python -m dgmd_pipeline.registry.database \"$MLFLOW_BACKEND_STORE_URI\" && exec python -m dgmd_pipeline.registry.login \"$@\"", "sh"]
CMD ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000", "--workers", "1"]


FROM runtime AS code
USER 0
COPY setup.py requirements.txt pipeline.py ./
COPY dgmd_pipeline dgmd_pipeline
# The installation is editable, so that code that is mounted over /app is used. setuptools makes it, because TensorFlow
# requires setuptools, and the image has no pip. The code is compiled, because a read-only container cannot store the
# result.
RUN python -c 'from setuptools.build_meta import build_editable; build_editable("/tmp")' \
    && python -m zipfile --extract /tmp/*.whl /opt/venv/lib/python3.*/site-packages \
    && rm -rf /tmp/*.whl dgmd_pipeline.egg-info build \
    && python -m compileall -q dgmd_pipeline \
    && chmod -R a+rX /app
COPY --from=weights /weights /opt/venv/share/dgmd_pipeline
ENV KERAS_HOME=/app/data/.keras \
    MPLCONFIGDIR=/app/data/.matplotlib
USER 1000
VOLUME /app/data


FROM code AS demo
USER 0
COPY --from=python /usr/local/lib/python3.*/site-packages/pip /tmp/base/pip/
COPY locks/demo.txt /tmp/lock.txt
RUN PYTHONPATH=/tmp/base python -m pip install --no-cache-dir --only-binary :all: --require-hashes -r /tmp/lock.txt \
    && rm -r /tmp/lock.txt /tmp/base
USER 1000
WORKDIR /demo
VOLUME /demo
HEALTHCHECK NONE
CMD ["python", "/app/pipeline.py", "demo"]


FROM code AS pipeline
ARG GIT_REVISION=
ARG VERSION=0.1.0
ARG SOURCE=
ENV GIT_REVISION=$GIT_REVISION
LABEL org.opencontainers.image.title="dgmd_model_pipeline" \
      org.opencontainers.image.description="Trains an image classifier from a bucket of labelled images and registers it in MLflow" \
      org.opencontainers.image.source=${SOURCE:-unknown} \
      org.opencontainers.image.revision=${GIT_REVISION:-unknown} \
      org.opencontainers.image.version=$VERSION
HEALTHCHECK --interval=1m --timeout=10s CMD ["python", "pipeline.py", "health"]
CMD ["python", "pipeline.py"]
