"""Checkpoints between Hugging Face folders and Megatron shards: `dapo-megatron convert` as a script.

python tools/convert_checkpoint.py hf-to-megatron HF_FOLDER CHECKPOINT parallel.tensor=4 parallel.pipeline=2
python tools/convert_checkpoint.py --help
"""

from dapo_megatron.cli import convert
from dapo_megatron.errors import exit_with_message

if __name__ == "__main__":
    with exit_with_message():
        convert()
