"""README.md, ARCHITECTURE.md and the pages of docs/ say what the code does: names, options, links, messages and imports
agree."""

import ast
import importlib.util
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from dapo_megatron.cli import app
from dapo_megatron.config import Recipe
from dapo_megatron.config.load import build_recipe
from dapo_megatron.config.problems import known_names

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
PAGES = tuple(sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
DOCUMENTS = ("README.md", "ARCHITECTURE.md", *PAGES)
# pages that name no key of a recipe
KEYLESS = {f"docs/{page}.md" for page in ("README", "commands", "compare", "ladder", "solvable", "tiny-task")}
SOURCES = {"dapo_megatron": ROOT / "dapo_megatron", "dapo_kernels": ROOT / "kernels" / "dapo_kernels"}
KNOWN_KEYS = set(known_names(Recipe))
GROUPS = ("convert", "analyze")  # commands that only hold others
ADOPTED = {"torch", "megatron", "transformers", "numpy", "dapo_kernels", "triton"}


def _tool(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def _commands(text: str) -> list[tuple[list[str], list[str]]]:
    """(names, the words after them) of every `dapo-megatron …` in the shell blocks and inline code of `text`."""
    shell = "\n".join(_code_blocks(text, "bash")).replace("\\\n", " ")
    calls = re.findall(r"dapo-megatron +([a-z].*)", shell) + re.findall(r"`dapo-megatron +([a-z][^`]*)`", text)
    commands = []
    for call in calls:
        words = call.split("#")[0].split()
        count = 2 if words[0] in GROUPS else 1
        commands.append((words[:count], words[count:]))
    return commands


@cache
def _help(*command: str) -> str:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
    assert result.exit_code == 0, f"dapo-megatron {' '.join(command)} is not a command: {result.output}"
    return result.output


def _options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) - {"--help"}


@pytest.mark.parametrize("name", ["write_recipe_reference", "write_command_reference"])
def test_references_are_up_to_date(name):
    tool = _tool(name)
    written = tool.REFERENCE.read_text(encoding="utf-8")
    assert written == tool.render_reference(), f"run python tools/{name}.py"


def test_recipe_reference_has_every_key():
    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8").replace("[]", "")
    assert {key for key in KNOWN_KEYS if "." in key} <= set(re.findall(r"^\| `([a-z0-9_.]+)` \|", text, re.MULTILINE))


def test_commands_in_the_readme_exist_with_their_options():
    commands = _commands(README)
    assert {" ".join(names) for names, _ in commands} == {
        "train", "check-method", "plan", "doctor", "submit", "serve", "evaluate", "report", "convert hf-to-megatron",
        "convert megatron-to-hf", "convert hf-to-hf", "convert megatron-to-megatron", "analyze entropy",
    }  # fmt: skip
    for names, words in commands:
        unknown = _options(" ".join(words)) - _options(_help(*names))
        assert not unknown, f"dapo-megatron {' '.join(names)} has no {unknown}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_files_on_a_page_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for names, words in _commands(text):
        unknown = _options(" ".join(words)) - _options(_help(*names))
        assert not unknown, f"{page}: dapo-megatron {' '.join(names)} has no {unknown}"
    shell = "\n".join(_code_blocks(text, "bash"))
    named = re.findall(r"(?<![\w/.])((?:recipes|tools|tests|docs|requirements|docker)/[\w./-]*\w)", shell + text)
    missing = {path for path in named if "NAME" not in path and not (ROOT / path).exists()}
    assert not missing, f"{page} names {sorted(missing)}"
    targets = {*re.findall(r"^make ([a-z-]+)", shell, re.MULTILINE), *re.findall(r"`make ([a-z-]+)", text)}
    assert targets <= _make_targets()


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([\w-]+\.md)", index))
    assert {Path(page).name for page in PAGES} - {"README.md"} == linked


def test_every_alert_has_a_cure():
    tree = ast.parse((ROOT / "dapo_megatron" / "monitoring" / "alerts.py").read_text(encoding="utf-8"))
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value is not None]
    names = {name for text in _texts(returned) if (name := re.match(r"([a-z ]+): ", text))}
    found = {name[1] for name in names}
    assert {"entropy collapse", "shortfall"} <= found, "the alerts are written in another way now"
    rows = re.findall(r"^\| ([a-z ]+) \| .+ \| .+ \|$", _troubleshooting("Alerts"), re.MULTILINE)
    assert found <= set(rows)


def test_messages_with_a_cure_are_those_of_the_code():
    text = _troubleshooting("Refused before the start") + _troubleshooting("Failed while running")
    messages = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(messages) > 20
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES["dapo_megatron"].rglob("*.py")]
    written = list(_texts(trees))
    for message in messages:
        pattern = re.compile(".*".join(re.escape(part) for part in message.split("…")), re.DOTALL)
        assert any(pattern.search(text) for text in written), f"nothing says {message!r}"


def _troubleshooting(heading: str) -> str:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    (section,) = [part for part in text.split("\n## ") if part.startswith(heading)]
    return section


def _texts(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Every text written in these nodes; what is computed into one stands as …."""
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_every_command_and_option_is_in_the_readme():
    documented = {names[0] for names, _ in _commands(README)} | {names[-1] for names, _ in _commands(README)}
    commands = [command.name or command.callback.__name__ for command in app.registered_commands]
    groups = {group.name: group.typer_instance for group in app.registered_groups}
    assert set(groups) == set(GROUPS)
    for group in groups.values():
        commands += [command.name for command in group.registered_commands]
    assert set(commands) <= documented
    assert _options(_help("train")) <= _options(README)
    assert _options(_help("plan")) <= _options(README)
    assert _options(_help("report")) <= _options(README)
    assert _options(_help("submit")) <= _options(README)
    for command in groups["convert"].registered_commands:
        assert _options(_help("convert", command.name)) <= _options(README)


def test_commands_listed_as_missing_are_missing():
    row = next(line for line in README.splitlines() if line.startswith("| commands |"))
    today, not_yet = ([word.strip() for word in cell.split(",") if word.strip()] for cell in row.split("|")[2:4])
    existing = {command.name or command.callback.__name__ for command in app.registered_commands} | set(GROUPS)
    assert set(today) == existing
    assert not set(not_yet) & existing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_recipe_keys_in_the_text_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    sections = "|".join(Recipe.model_fields)
    # `algorithm.eps_low`, `run.steps=80`, parallel.tensor=2; not file names such as `learner.py`, `supervised.jsonl`
    spans = [*re.findall(r"`([^`\n]+)`", text), *"\n".join(_code_blocks(text, "bash")).split()]
    keys = {m[1] for span in spans if (m := re.fullmatch(rf"((?:{sections})(?:\.[a-z0-9_]+(?:\[\])?)+)(=.*)?", span))}
    keys = {key.replace("[]", "") for key in keys if not key.endswith((".py", ".jsonl"))}
    assert keys or document in KEYLESS, f"{document} names no key at all: the pattern no longer fits"
    assert keys <= KNOWN_KEYS


def test_yaml_in_the_readme_is_a_recipe():
    blocks = _code_blocks(README, "yaml")
    assert blocks
    for block in blocks:
        recipe = build_recipe(yaml.safe_load(block))
        assert recipe.rollout.prompts_per_step % recipe.algorithm.mini_batch_prompts == 0


def test_python_in_the_readme_runs():
    blocks = _code_blocks(README, "python")
    assert blocks
    for block in blocks:
        names: dict = {}
        exec(compile(block, "README.md", "exec"), names)
        assert names["logits"].grad.abs().sum() > 0


def test_make_targets_in_the_readme_exist():
    named = set(re.findall(r"(?<![\w-])make ([a-z-]+)", "\n".join(re.findall(r"`+[^`]+`+", README))))
    assert {"demo", "test"} <= named <= _make_targets()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_resolve(document):
    path = ROOT / document
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        assert not re.match(r"[a-z]+:", target), f"{document} links outside the repository: {target}"
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{document}: {target} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, target


def test_architecture_names_every_module_and_no_other():
    paths = [p for folder in SOURCES.values() for p in folder.rglob("*.py") if p.name != "__init__.py"]
    modules = {p.relative_to(ROOT).as_posix() for p in paths}
    tests_and_tools = {p.name for place in ("tests", "tools") for p in (ROOT / place).glob("*.py")}
    rooms = _code_blocks(ARCHITECTURE, "text")[0]
    named = _modules_in_tree(rooms)
    assert named["package"] == modules
    assert named["other"] <= tests_and_tools
    for mentioned in set(re.findall(r"`([\w/]+\.py)`", ARCHITECTURE)):
        assert any(f"/{module}".endswith(f"/{mentioned}") for module in modules), f"there is no {mentioned}"


def test_symbols_beside_file_names_in_architecture_exist():
    pairs = re.findall(r"`([\w/]+\.py)` `(\w+)`", ARCHITECTURE)
    assert pairs
    for file, symbol in pairs:
        (source,) = [p for folder in SOURCES.values() for p in folder.rglob("*.py") if f"/{p}".endswith(f"/{file}")]
        names = {node.name for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) if hasattr(node, "name")}
        assert symbol in names, f"{file} has no {symbol}"


def test_rooms_import_only_what_architecture_allows():
    allowed = _import_table()
    rooms = {p.name: p for p in SOURCES["dapo_megatron"].iterdir() if (p / "__init__.py").is_file()}
    rooms["dapo_kernels"] = SOURCES["dapo_kernels"]
    assert set(allowed) == set(rooms)
    for room, folder in rooms.items():
        for path in folder.rglob("*.py"):
            extra = _imports(path) - {room, "errors", "files"} - allowed[room]
            assert not extra, f"{path.relative_to(ROOT)} imports {sorted(extra)}; ARCHITECTURE.md does not allow it"


def _modules_in_tree(tree: str) -> dict[str, set[str]]:
    """Python files of the indented tree: `package` with their paths, `other` as bare names (tests, tools).

    Rooms stand at the left margin; a line that opens with `name/` at two blanks opens a room inside dapo_megatron.
    """
    found: dict[str, set[str]] = {"package": set(), "other": set()}
    top = room = ""
    for line in tree.splitlines():
        if opened := re.match(r"(\w[\w/]*)/(\s|$)", line):
            top, room = opened[1], ""
        elif opened := re.match(r"  (\w+)/(\s|$)", line):
            room = f"{opened[1]}/"
        elif re.match(r"  \w", line):
            room = ""
        files = re.findall(r"\b(\w+\.py)\b", line)
        if top in ("tests", "tools"):
            found["other"].update(files)
        else:
            found["package"].update(f"{top}/{room}{file}" for file in files)
    return found


def _import_table() -> dict[str, set[str]]:
    table = ARCHITECTURE.split("## Who may know whom")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| `")]
    return {
        room.strip(" `"): set(re.findall(r"\w+", rooms)) | set(re.findall(r"\w+", libraries))
        for room, rooms, libraries in rows
    }


def _imports(path: Path) -> set[str]:
    """Rooms and files of dapo_megatron, and the libraries worth watching, that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = [node.module] if isinstance(node, ast.ImportFrom) else []
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else modules
        for module in modules:
            package, *inside = module.split(".")
            if package == "dapo_megatron" and inside:
                found.add(inside[0])
            elif package in ADOPTED:
                found.add(package)
    return found
