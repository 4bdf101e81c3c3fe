"""`algorithm.extensions`: files of the user's that register advantages, policy losses and token selections.

They are run as they are, in the launching process and on every rank: trusted code, as `reward.custom` is.
"""

from collections.abc import Sequence
from pathlib import Path

from dapo_megatron.algorithms.registry import raised, registered
from dapo_megatron.errors import RequestError
from dapo_megatron.user_file import run_user_file

_loaded: set[Path] = set()


def load_extensions(files: Sequence[str]) -> None:
    """Run each file once a process; relative ones are looked up in the working directory.

    Raises:
        RequestError: a file is missing or no Python, raises, or registers nothing.
    """
    for file in files:
        path = Path(file).resolve()
        if path not in _loaded:
            _run(path, f"algorithm.extensions: {file}")
            _loaded.add(path)


def _run(path: Path, told: str) -> None:
    if path.suffix != ".py" or not path.is_file():
        raise RequestError(f"{told} is not a Python file; give the path of a file that ends in .py")
    before = registered()
    try:
        run_user_file(path, f"dapo_extension_{path.stem}")
    except RequestError as error:
        raise RequestError(f"{told}: {error}") from None
    except SyntaxError as error:
        raise RequestError(f"{told} line {error.lineno} is not valid Python: {error.msg}") from None
    except (Exception, SystemExit) as error:
        raise RequestError(f"{told} cannot be imported: {raised(error)}") from None
    if registered() == before:
        raise RequestError(
            f"{told} registers nothing; use @register_advantage, @register_policy_loss or @register_token_selection"
        )
