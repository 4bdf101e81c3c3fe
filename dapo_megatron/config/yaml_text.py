"""YAML as recipes use it: PyYAML's safe subset, with 1e-4 a number and a repeated key an error."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from dapo_megatron.errors import RequestError

# YAML 1.1 asks for a dot and a signed exponent and would read 1e-4 and 1.5e4 as text
_EXPONENT = re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} stands twice in one mapping", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def analyze_scalar(self, scalar: str) -> yaml.emitter.ScalarAnalysis:
        analysis = super().analyze_scalar(scalar)
        if not scalar.isprintable():
            # PyYAML folds some line breaks (NEL, LS, PS) of plain and quoted text; double quotes escape them
            analysis.allow_flow_plain = analysis.allow_block_plain = False
            analysis.allow_single_quoted = analysis.allow_block = False
        return analysis

    def ignore_aliases(self, data: Any) -> bool:
        return True


# the dumper must know it too: text that looks like a number is then written in quotes
for _either in (_Loader, _Dumper):
    _either.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """The value that one YAML document holds; None for an empty one.

    Raises RequestError "WHERE, line L, column C: what is wrong" (both counted from 1).
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        # one line whatever PyYAML says: it quotes the offending characters, which may be newlines
        what = " ".join(str(error.problem or error.context).split())
        raise RequestError(f"{where}{place}: broken YAML: {what}") from None
    except yaml.YAMLError as error:  # characters that no YAML file may hold
        raise RequestError(f"{where}: broken YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise RequestError(f"{where}: broken YAML: nested too deeply") from None
    except ValueError as error:  # a scalar of the right form without a value, such as the date 2024-13-45
        raise RequestError(f"{where}: broken YAML: {error}") from None


def to_yaml(value: Any) -> str:
    """`value` (mappings, lists, text, numbers, truth values, None) as block YAML, keys in their order.

    `parse_yaml` reads it back equal.
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
