"""The config package is read before any rank starts, so it must stay light."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "megatron", "transformers", "numpy")


def test_importing_config_imports_nothing_heavy():
    code = f"import sys, dapo_megatron.config; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
