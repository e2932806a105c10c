"""The structure of spell_megatron, read from its source. `docs/architecture.md` explains it; this file holds it.

Every import counts, also those inside functions and under `if TYPE_CHECKING`. Nothing of the package is imported here.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "spell_megatron"
MAP = ROOT / "docs" / "architecture.md"

# The rooms, floor by floor. A room is a folder or a top-level file; `evaluation.evaluate` is one file on a floor above
# the rest of its folder. A room may import rooms of its own floor, as long as they make no circle, and of lower floors.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("train", "leader", "ahead", "overlap", "director", "evaluation.evaluate", "planner", "report"),
    ("checkpoint", "preflight", "weights", "jobs", "corpus", "monitoring", "evaluation"),
    ("training", "rollout", "processes"),
    ("selfplay", "tokenizer", "token_pieces", "byte_pairs", "channels"),
    ("config", "files", "encodings", "folders", "hub", "parquet", "plural", "errors", "ranks"),
    ("__init__",),  # the version
)

# The whole configuration goes no further than these rooms. Below, a function takes the sections or values it reads.
# `jobs` writes it into the job, with the paths of the nodes; `evaluation.evaluate` is the entry of a command.
READ_CONFIG = {"config", "cli", "train", "leader", "director", "preflight", "planner", "jobs", "evaluation.evaluate"}

HEAVY = {"torch", "vllm", "megatron", "transformers"}
ROLES = ("questioner", "responder", "verifier")
REDIRECTS_CUDA = "training/cpu.py"

# Longer ones are split, or stand here with the number of lines that they may have and the reason.
FILE_LINES, LONG_FILES = 400, {}
FUNCTION_LINES, LONG_FUNCTIONS = 60, {}


@dataclass(frozen=True)
class Import:
    file: str  # "weights/push.py"
    line: int
    module: str  # "torch.distributed"; "spell_megatron.weights.names", also where only a function of it is imported
    name: str | None  # what is imported from the module
    at_start: bool  # when the file itself is imported: not inside a function, not only for the type checker

    @property
    def place(self) -> str:
        return f"spell_megatron/{self.file}:{self.line}"


@cache
def sources() -> dict[str, ast.Module]:
    """The syntax tree of each file of the package."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in files}


def module_of(file: str) -> str:
    """`weights/names.py` → `weights.names`; `weights/__init__.py` → `weights`; `__init__.py` → `__init__`."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@cache
def modules() -> dict[str, str]:
    """The file of each module of the package, by its name without `spell_megatron.`."""
    return {module_of(file): file for file in sources()}


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for file, tree in sources().items() for found in imports_of(file, tree))


def imports_of(file: str, node: ast.AST, at_start: bool = True) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(file, child.lineno, alias.name, None, at_start)
        elif isinstance(child, ast.ImportFrom):
            package = ["spell_megatron", *Path(file).parts][: -child.level] if child.level else []
            module = ".".join(package + ([child.module] if child.module else []))
            for alias in child.names:
                inside = f"{module}.{alias.name}"
                if inside.removeprefix("spell_megatron.") in modules():
                    yield Import(file, child.lineno, inside, None, at_start)
                else:
                    yield Import(file, child.lineno, module, alias.name, at_start)
        else:
            later = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            )
            yield from imports_of(file, child, at_start and not later)


def own(found: Import) -> str | None:
    """The module of the package that an import names, without `spell_megatron.`; None: another package's."""
    if found.module == "spell_megatron":
        return "__init__"
    return found.module.removeprefix("spell_megatron.") if found.module.startswith("spell_megatron.") else None


def room_of(module: str) -> str:
    rooms = {room for floor in FLOORS for room in floor}
    return module if module in rooms else module.split(".")[0]


def floor_of(room: str) -> int:
    """Counted from the bottom; a room without a floor is on top, until test_every_room_has_its_floor passes."""
    return next((i for i, floor in enumerate(reversed(FLOORS)) if room in floor), len(FLOORS))


def between_rooms() -> Iterator[tuple[Import, str, str]]:
    for found in imports():
        target = own(found)
        if target is not None:
            here, there = room_of(module_of(found.file)), room_of(target)
            if here != there:
                yield found, here, there


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """One circle for each set of nodes that reach each other."""
    arrows, found = {node: set(targets) for node, targets in arrows.items()}, []
    while True:
        try:
            TopologicalSorter(arrows).prepare()
            return found
        except CycleError as error:
            circle = error.args[1][::-1]  # graphlib follows the arrows backwards
            found.append(circle)
            arrows[circle[0]].discard(circle[1])


def none_of(faults: Iterator[str] | list[str], remedy: str) -> None:
    if faults := sorted(set(faults)):
        pytest.fail(f"{remedy}\n  " + "\n  ".join(faults), pytrace=False)


def test_every_room_has_its_floor():
    rooms = {room for floor in FLOORS for room in floor}
    none_of(
        [f"spell_megatron/{file}" for module, file in modules().items() if room_of(module) not in rooms],
        "Add each new folder or top-level file to FLOORS in tests/test_architecture.py, and to docs/architecture.md:",
    )
    parts = {room_of(module) for module in modules()}
    none_of(sorted(rooms - parts), "FLOORS names what no longer exists. Remove it there:")


def test_imports_go_down():
    none_of(
        [
            f"{found.place} ({here}) imports {found.module} ({there})"
            for found, here, there in between_rooms()
            if floor_of(here) < floor_of(there)
        ],
        "A room imports only rooms of its own floor or of lower ones (FLOORS in tests/test_architecture.py). Move what "
        "is needed to a lower room, or hand it over as an argument:",
    )


def test_rooms_make_no_circle():
    arrows, places = defaultdict(set), defaultdict(list)
    for found, here, there in between_rooms():
        arrows[here].add(there)
        places[here, there].append(f"{found.place} imports {found.module}")
    none_of(
        [
            " → ".join(circle) + "".join(f"\n    {places[arrow][0]}" for arrow in pairwise(circle))
            for circle in circles(arrows)
        ],
        "Rooms import each other in a circle. Move what both need to a lower room:",
    )


def test_files_make_no_circle():
    """As far as the imports go that run when a file is imported."""
    arrows = defaultdict(set)
    for found in imports():
        here, there = module_of(found.file), own(found)
        if found.at_start and there is not None and here != there:
            arrows[here].add(there)
    none_of(
        [" → ".join(circle) for circle in circles(arrows)],
        "Files import each other in a circle. Move what both need to a file of its own:",
    )


def test_selfplay_needs_no_model_library():
    reached, new = set(), {module for module in modules() if room_of(module) == "selfplay"}
    while new:
        reached |= new
        new = {own(found) for found in imports() if module_of(found.file) in new} - reached - {None}
    none_of(
        [
            f"{found.place} imports {found.module}"
            for found in imports()
            if module_of(found.file) in reached and found.module.split(".")[0] in HEAVY
        ],
        f"Self-play, and what it imports, does without {', '.join(sorted(HEAVY))}. It gets engines and tokenizer as "
        "arguments (selfplay/interfaces.py):",
    )


def test_training_knows_no_roles():
    none_of(
        [
            f"{found.place} imports {found.module}"
            for found, here, there in between_rooms()
            if (here, there) == ("training", "selfplay")
        ]
        + [
            f"spell_megatron/{file}:{line}: {word}"
            for file, tree in sources().items()
            if file.startswith("training/")
            for line, word in words_of(tree)
            if any(role in word.lower() for role in ROLES)
        ],
        "The trainer sees rows of tokens with weights, and no roles. Let selfplay/batch.py work out what differs:",
    )


def words_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The names and texts of a file's code, but not of its docstrings and comments."""
    docstrings = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "arg", "asname"):
            if isinstance(word := getattr(node, field, None), str):
                yield getattr(node, "lineno", 0), word
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def test_one_file_redirects_cuda():
    none_of(
        [
            f"spell_megatron/{file}:{line}"
            for file, tree in sources().items()
            if file != REDIRECTS_CUDA
            for line in changes_of_cuda(tree)
        ],
        f"Only {REDIRECTS_CUDA} changes torch.cuda, so that one file lists what differs on CPUs. Change it there:",
    )


def changes_of_cuda(tree: ast.Module) -> Iterator[int]:
    """Lines that assign to an attribute of torch.cuda, under whatever name."""
    names = {"torch.cuda"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.value) == "torch.cuda":
            names |= {ast.unparse(target) for target in node.targets}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names |= {alias.asname or alias.name for alias in node.names if module + alias.name == "torch.cuda"}

    def is_cuda(text: str) -> bool:
        return any(text == name or text.startswith(f"{name}.") for name in names)

    for node in ast.walk(tree):
        changed = []
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            changed = [node.value]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "patch.object")):
            changed = node.args[:1]
        if any(is_cuda(ast.unparse(what)) for what in changed):
            yield node.lineno


def test_only_upper_rooms_know_the_whole_configuration():
    none_of(
        [
            f"{found.place} imports Config"
            for found in imports()
            if (found.module, found.name) == ("spell_megatron.config.schema", "Config")
            and room_of(module_of(found.file)) not in READ_CONFIG
        ],
        "Take the sections or values that are read, such as `training: TrainingConfig`, instead of the whole Config:",
    )


def test_the_loop_stays_on_one_screen():
    run = next(node for node in sources()["train.py"].body if isinstance(node, ast.FunctionDef) and node.name == "run")
    lines = {node.lineno for node in ast.walk(run) if isinstance(node, (ast.stmt, ast.expr))}
    faults = [f"run() has {len(lines)} lines of code; at most 80 fit on a screen"] if len(lines) > 80 else []
    if (depth := depth_of(run)) > 3:
        faults.append(f"run() is nested {depth} deep; at most 3")
    none_of(faults, "spell_megatron/train.py shows the algorithm on one screen. Move details to leader.py or below:")


def depth_of(node: ast.AST) -> int:
    """How deep statements are nested inside a function's own."""
    blocks = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match, ast.FunctionDef)
    below = [depth_of(child) + isinstance(child, blocks) - is_elif(node, child) for child in ast.iter_child_nodes(node)]
    return max(below, default=0)


def is_elif(node: ast.AST, child: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]


def test_files_of_tests_have_names_of_their_own():
    """pytest imports them by name, and without packages two of a name cannot be collected together."""
    files = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        files[path.name].append(str(path.relative_to(ROOT)))
    assert [same for same in files.values() if len(same) > 1] == []


def test_nothing_is_too_long():
    files, functions = {}, {}
    for file, tree in sources().items():
        files[file] = len((PACKAGE / file).read_text(encoding="utf-8").splitlines())
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                functions[f"{file}: {node.name}"] = node.end_lineno - node.lineno + 1
    faults = []
    for lines, limit, exceptions in ((files, FILE_LINES, LONG_FILES), (functions, FUNCTION_LINES, LONG_FUNCTIONS)):
        for name, length in lines.items():
            allowed = exceptions.get(name, (limit, ""))[0]
            if length > allowed:
                faults.append(f"{name} has {length} lines; at most {allowed}")
        faults += [f"{n} needs no exception any more" for n in exceptions if lines.get(n, 0) <= limit]
    none_of(faults, "Split it by ideas, or give the reason in LONG_FILES or LONG_FUNCTIONS of test_architecture.py:")


@pytest.fixture(scope="module")
def text() -> str:
    assert MAP.exists(), "docs/architecture.md is missing. It is the map of spell_megatron."
    return MAP.read_text(encoding="utf-8")


def test_the_map_is_short(text):
    lines = len(text.splitlines())
    assert lines <= 150, (
        f"docs/architecture.md has {lines} lines; at most 150. Move details to the docstrings of files."
    )


def test_the_map_names_every_room(text):
    folders = {path.name + "/" for path in PACKAGE.iterdir() if any(path.glob("*.py"))}
    files = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    none_of(
        [f"spell_megatron/{name}" for name in folders | files if not re.search(rf"(?<![\w-]){re.escape(name)}", text)],
        "docs/architecture.md names every folder and top-level file. Add a line for each of these:",
    )


def test_the_map_names_only_what_exists(text):
    paths = {
        f"/{path.relative_to(ROOT).as_posix()}" + "/" * path.is_dir()
        for folder in ("spell_megatron", "tests", "tools", "docs", "examples", "slurm", "benchmarks", ".ci")
        for path in [ROOT / folder, *(ROOT / folder).rglob("*")]
    } | {f"/{path.name}" for path in ROOT.iterdir()}
    named = re.findall(r"`([\w./-]+)`", text) + re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text)
    named += [word for block in re.findall(r"```.*?```", text, re.S) for word in re.findall(r"[\w./-]+\.py\b", block)]
    named = [name.removeprefix("../") for name in named if re.search(r"\.(py|md|toml)$|/$|/.*\.(ya?ml|sh)$", name)]
    none_of(
        [name for name in named if not name.startswith("runs/") and not any(p.endswith(f"/{name}") for p in paths)],
        "docs/architecture.md names paths that do not exist. Correct them:",
    )
