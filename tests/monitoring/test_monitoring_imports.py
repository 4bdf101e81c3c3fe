import subprocess
import sys


def test_the_package_loads_neither_torch_nor_matplotlib_nor_rich():
    code = (
        "import sys, dapo_megatron.monitoring\n"
        "heavy = {'torch', 'megatron', 'matplotlib', 'tensorboard', 'rich', 'numpy', 'wandb', 'mlflow'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
