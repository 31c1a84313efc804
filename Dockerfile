# The pipeline as a batch job: runs to completion and exits with the pipeline's exit code.
#
#   docker build -t dgmd_model_pipeline .
#   docker run --rm -v ./data:/app/data -e AWS_DATA_BUCKET=... dgmd_model_pipeline
FROM python:3.11-slim-bookworm

ARG GIT_REVISION=unknown
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    KERAS_HOME=/app/data/.keras \
    MPLCONFIGDIR=/app/data/.matplotlib \
    GIT_REVISION=$GIT_REVISION

WORKDIR /app

# Dependencies first: a change of the code does not install them again.
COPY requirements.txt setup.py ./
RUN pip install --no-cache-dir -r requirements.txt

COPY pipeline.py ./
COPY dgmd_pipeline dgmd_pipeline
RUN pip install --no-cache-dir --no-deps --editable . \
    && useradd --create-home --uid 1000 pipeline \
    && mkdir data \
    && chown pipeline:pipeline data

USER pipeline
VOLUME /app/data
CMD ["python", "pipeline.py"]
