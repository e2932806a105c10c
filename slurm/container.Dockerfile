# Everything for NVIDIA GPUs, for CUDA 13: torch 2.13.0, vLLM 0.32.0, Megatron-Core 0.19.2, transformer-engine 2.11.0 on
# Python 3.12. All other releases are in tools/gpu-constraints.txt. Build it in the folder of the repository:
#
#     docker build -f slurm/container.Dockerfile -t spell_megatron .
#     enroot import -o spell.sqsh dockerd://spell_megatron       # for Slurm with pyxis (docs/cluster.md, container.image)
#     apptainer build spell.sif docker-daemon://spell_megatron:latest
#
# It is a Dockerfile because enroot and Apptainer both read Docker's images, and nothing but Apptainer reads its own
# recipes. The image is a development one: transformer-engine's part for torch is compiled here against the headers of
# CUDA, cuDNN and NCCL, and vLLM's libraries compile kernels with nvcc while they run. No GPU is needed to build it.
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git make python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/spell_megatron
COPY setup.py pyproject.toml MANIFEST.in README.md LICENSE ./
COPY tools tools
COPY spell_megatron spell_megatron

# The same steps as `make environment-gpu`. PIP_INDEX_URL and the like can be given as build arguments.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV CUDA_HOME=/usr/local/cuda PIP_NO_CACHE_DIR=1
RUN PYTHON312=/usr/bin/python3.12 python3.12 tools/setup_environment.py .venv-gpu \
    || { tail -n 100 .venv-gpu/install.log; exit 1; }

ENV PATH=/opt/spell_megatron/.venv-gpu/bin:$PATH
COPY examples examples
COPY benchmarks benchmarks
CMD ["spell", "--help"]
