"""Python files of the user's that a recipe names: trusted code, run as it is."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def run_user_file(path: Path, name: str) -> ModuleType:
    """Run a file as the module `name`, which stays in sys.modules; it may import what lies beside it. Raises what it
    raises."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module
