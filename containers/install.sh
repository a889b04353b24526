#!/bin/sh
# Installs Bifrost with the versions of constraints.txt, in a Debian image with Python: Dockerfile and bifrost.def run it.
# g++ is for Triton, DeepSpeed's operators and torch.compile, the verbs libraries for NCCL over InfiniBand and RoCE. CUDA
# comes with PyPI's torch; the driver's libraries are mounted by the container runtime.
set -eu
cd "$(dirname "$0")/.."

apt-get update
apt-get install --yes --no-install-recommends g++ libibverbs1 ibverbs-providers librdmacm1
rm -rf /var/lib/apt/lists/*

pip install --no-cache-dir --disable-pip-version-check --constraint constraints.txt ".[s3]"
rm -rf build ./*.egg-info
bifrost --version
