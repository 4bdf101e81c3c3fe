"""`reward.custom: FILE.py:FUNCTION`, a reward function of the user's.

    def FUNCTION(responses: list[str], answers: list[str], prompts: list[str]) -> Sequence[float]

It is called by keyword in a worker process, with several responses at a time or one alone, and returns one finite
number a response, each from that response alone. What it raises, and what exceeds a limit, costs the item and is
counted; a result of the wrong length or with a number that is none ends the run, as no response is to blame.
"""

import ast
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from dapo_megatron.errors import RequestError
from dapo_megatron.rewards.pool import RewardContractError, Score
from dapo_megatron.user_file import run_user_file

ARGUMENTS = ("responses", "answers", "prompts")

_loaded: dict[str, Callable] = {}
_told: set[str] = set()


class CustomReward:
    """A grade function (response, answer, prompt) → Score around the user's function; right where reward > threshold.

    Args:
        location: "FILE.py:FUNCTION"; a relative file is looked up in the working directory.
        bound: rewards must lie in −bound … bound.
    """

    def __init__(self, location: str, bound: float, threshold: float) -> None:
        path, self.name = _parts(location)
        self.path, self.location = str(path.resolve()), location
        self.bound, self.threshold = bound, threshold

    def prepare(self) -> None:
        """Import the file, once a process."""
        if self.location not in _loaded:
            _loaded[self.location] = _load(Path(self.path), self.name, self.location)

    def __call__(self, response: str, answer: str, prompt: str) -> Score:
        try:
            return self.score_many([(response, answer, prompt)])[0]
        except (RewardContractError, MemoryError):
            raise
        except Exception as error:  # the pool counts it, and nobody else would see what it was
            self._tell(error)
            raise

    def _tell(self, error: Exception) -> None:
        """The first exception of a worker process, with its line in the user's file, on standard error."""
        if self.location in _told:
            return
        _told.add(self.location)
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self.path]
        what = "".join(c if c.isprintable() else "?" for c in _shown(error))  # it may hold a response
        print(
            f"reward.custom={self.location} raised {what}{f' in line {lines[-1]}' if lines else ''}; such responses "
            "count as wrong and in grader/failures (told once a worker)",
            file=sys.stderr,
            flush=True,
        )

    def score_many(self, items: list[tuple[str, str, str]]) -> list[Score]:
        """Scores of several items; RewardContractError for a result that is not one finite number each."""
        self.prepare()
        columns = [list(column) for column in zip(*items, strict=True)]
        result = _loaded[self.location](**dict(zip(ARGUMENTS, columns, strict=True)))
        try:
            rewards = [float(reward) for reward in result]
        except (TypeError, ValueError) as error:
            raise RewardContractError(
                f"reward.custom={self.location} returned {_shown(result)} for {len(items)} responses; it must return a "
                "sequence of one number a response"
            ) from error
        if len(rewards) != len(items):
            raise RewardContractError(
                f"reward.custom={self.location} returned {len(rewards)} rewards for {len(items)} responses; it must "
                "return one number a response"
            )
        for reward, item in zip(rewards, items, strict=True):
            if not math.isfinite(reward):
                raise RewardContractError(
                    f"reward.custom={self.location} returned {reward} for the response {_shown(item[0])}; rewards must "
                    "be finite"
                )
            if abs(reward) > self.bound:
                raise RewardContractError(
                    f"reward.custom={self.location} returned {reward} for the response {_shown(item[0])}; it must lie "
                    f"in -{self.bound:g} … {self.bound:g} (reward.custom_bound)"
                )
        return [Score(reward > self.threshold, reward) for reward in rewards]


def check_custom(location: str) -> None:
    """Refuse a location whose file is missing or no Python, or has no such function; runs none of it.

    Raises:
        RequestError: what is wrong with `reward.custom`.
    """
    path, name = _parts(location)
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except OSError as error:
        raise RequestError(f"reward.custom={location}: cannot read {path}: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:
        raise RequestError(f"reward.custom={location}: {path} is not valid Python: {error}") from None
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if name not in functions:
        has = f"it has {', '.join(functions)}" if functions else "it has none"
        raise RequestError(f"reward.custom={location}: {path} has no function {name} at its top level; {has}")
    arguments = functions[name].args
    named = {argument.arg for argument in (*arguments.args, *arguments.kwonlyargs)}
    missing = [argument for argument in ARGUMENTS if argument not in named]
    if missing and arguments.kwarg is None:
        raise RequestError(
            f"reward.custom={location}: {name} does not take {', '.join(missing)}; it is called as "
            f"{name}(responses=…, answers=…, prompts=…)"
        )


def _parts(location: str) -> tuple[Path, str]:
    path, colon, name = location.rpartition(":")
    if not colon or not path.endswith(".py") or not name.isidentifier():
        raise RequestError(f"reward.custom={location} must be FILE.py:FUNCTION, for example my_reward.py:score")
    return Path(path), name


def _load(path: Path, name: str, location: str) -> Callable:
    try:
        return getattr(run_user_file(path, "dapo_custom_reward"), name)
    except BaseException as error:
        raise RewardContractError(f"reward.custom={location} cannot be imported: {error!r}") from error


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
