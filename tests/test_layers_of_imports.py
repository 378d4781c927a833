"""Who may import whom: the floors of docs/design.md, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dgpo_jax"

# A folder is one entry, "" is the package itself. What is in no list is a story, such as train.py: the top floor, which
# nobody imports.
FLOORS = [
    {"", "types", "config", "rules"},
    {"sharding", "quantization", "manifest", "processes", "files", "flags", "hardware", "activity", "watchdog", "hosts", "stopping"},
    {"models", "checkpoint", "ahead", "metrics", "plots", "comparison", "comparison_plots"},
    {"rl", "rewards", "data"},
    {"recipe", "build", "rollout", "rewarding", "supervised", "learning", "collecting", "restart", "plan", "session", "methods", "comparison_plan", "compiling", "profiling", "speed", "memory", "workdir", "health", "keeping"},
    {"evaluation", "preparation", "costs"},
]
STORIES = len(FLOORS)

# Worker processes start in tens of milliseconds and hold no device: neither these nor what they import know of JAX.
HOST = {"", "types", "config", "rules", "manifest", "files", "activity", "watchdog", "health", "rl.suspects", "flags", "hardware", "costs.hlo", "costs.hlo_costs", "costs.hlo_flops", "costs.hlo_kernels", "costs.hlo_memory", "metrics", "plots", "comparison", "comparison_plots", "processes", "rewards", "data", "rl.advantages", "rl.aggregation", "rl.desk", "rl.experience", "rl.kl", "rl.packing", "evaluation.estimators", "evaluation.judging", "evaluation.generations", "evaluation.report", "evaluation.differences"}
DEVICE_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "orbax"}

# rl/ is handed a model as functions, rewards as numbers; its formulas take arrays and numbers, never a config.
FORBIDDEN = [
    ("rl", {"models", "rewards", "data"}),
    ("rl.losses", {"config"}),
    ("rl.advantages", {"config"}),
    ("rl.aggregation", {"config"}),
    ("rl.correction", {"config"}),
    ("rl.experience", {"config"}),
    ("rl.kl", {"config"}),
    ("rl.packing", {"config"}),
]


def imports_of(source, module, is_package):
    """Full names of everything imported in the source, also inside functions; relative names resolved."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def read_package(root):
    """{module: set of what it imports}: modules of the package without its name in front, other libraries by theirs."""
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
        for path in root.rglob("*.py")
    }
    graph = {}
    for module, path in files.items():
        full = f"{root.name}.{module}".rstrip(".")
        graph[module] = {module.rpartition(".")[0]}  # Python runs the folder's __init__ first
        for name in imports_of(path.read_text(), full, path.name == "__init__.py"):
            inside, _, rest = name.partition(".")
            if inside != root.name:
                graph[module].add(f"library {inside}")
            elif rest in files:
                graph[module].add(rest)
            else:  # `from package.module import something`
                graph[module].add(rest.rpartition(".")[0])
    return graph


def floor_of(module):
    top = module.partition(".")[0]
    return next((number for number, names in enumerate(FLOORS) if top in names), STORIES)


def flaws(graph):
    """One line per import that breaks a rule, with both names."""
    found = []
    for module, imported in graph.items():
        for other in imported:
            if other.startswith("library ") or other == module:
                continue
            if not may_import(module, other):
                found.append(f"{module} (floor {floor_of(module)}) imports {other} (floor {floor_of(other)})")
            for name, not_these in FORBIDDEN:
                if is_within(module, name) and other.partition(".")[0] in not_these:
                    found.append(f"{module} imports {other}, which {name} may not")
        if any(is_within(module, name) for name in HOST):
            found.extend(" imports ".join(path) for path in paths_to_device(graph, module))
    return sorted(found)


def may_import(module, other):
    """Down always; sideways within a folder, or from one file to another on a floor below the stories."""
    sideways = floor_of(module) == floor_of(other) < STORIES and folder_of(module) == folder_of(other)
    return floor_of(other) < floor_of(module) or sideways


def folder_of(module):
    top = module.partition(".")[0]
    return top if (PACKAGE / top).is_dir() else ""


def is_within(module, name):
    return module == name or (name != "" and module.startswith(name + "."))


def paths_to_device(graph, start):
    """For each device library that `start` reaches, the shortest chain of imports to it."""
    frontier, seen = [[start]], {start}
    while frontier:
        path = frontier.pop(0)
        for other in sorted(graph.get(path[-1], ())):
            if other.removeprefix("library ") in DEVICE_LIBRARIES and other.startswith("library "):
                yield [*path, other]
            elif other not in seen:
                seen.add(other)
                frontier.append([*path, other])


def test_imports_point_down_or_sideways_within_a_folder():
    graph = read_package(PACKAGE)
    assert {"train", "rl.losses", "rewards.pool", "models"} <= set(graph)  # the walk has seen the package
    assert not flaws(graph), "\n".join(flaws(graph))


@pytest.mark.parametrize("module, source, complaint", [
    ("rl.losses", "import dgpo_jax.train", "rl.losses (floor 3) imports train (floor 6)"),
    ("rl.update", "from ..models import qwen", "rl.update imports models.qwen, which rl may not"),
    ("rl.losses", "from dgpo_jax.config import LossConfig", "rl.losses imports config, which rl.losses may not"),
    ("types", "from dgpo_jax import sharding", "types (floor 0) imports sharding (floor 1)"),
    ("train", "def f():\n    from dgpo_jax.sft import main", "train (floor 6) imports sft (floor 6)"),
    ("rewards.pool", "from dgpo_jax.data import problems", "rewards.pool (floor 3) imports data.problems (floor 3)"),
    ("metrics", "import jax.numpy as jnp", "metrics imports library jax"),
    ("rl.experience", "from dgpo_jax.rl.losses import sequence_sum", "rl.experience imports rl.losses imports library jax"),
    ("recipe", "from dgpo_jax.train import train", "recipe (floor 4) imports train (floor 6)"),
    ("rewards.math", "from dgpo_jax.sharding import to_host", "rewards.math imports sharding imports library jax"),
])
def test_the_walk_sees_a_wrong_import_and_names_both(module, source, complaint):
    graph = read_package(PACKAGE)
    graph[module] = graph[module] | read_one(source, module, set(graph))
    assert complaint in flaws(graph)


def read_one(source, module, modules):
    names = (name.removeprefix("dgpo_jax.") for name in imports_of(source, f"dgpo_jax.{module}", False))
    return {
        f"library {name.partition('.')[0]}" if name.partition(".")[0] in DEVICE_LIBRARIES
        else name if name in modules else name.rpartition(".")[0]
        for name in names
    }  # fmt: skip


@pytest.mark.parametrize("source, expected", [
    ("import dgpo_jax.rl.losses as x", ["dgpo_jax.rl.losses"]),
    ("from . import losses", ["dgpo_jax.rl.losses"]),
    ("from .losses import token_loss", ["dgpo_jax.rl.losses.token_loss"]),
    ("from ..types import Problem", ["dgpo_jax.types.Problem"]),
])
def test_relative_imports_are_resolved(source, expected):
    assert list(imports_of(source, "dgpo_jax.rl.update", is_package=False)) == expected


def test_the_host_side_leaves_jax_unloaded():
    # Also through other libraries, which the walk above cannot see.
    program = (
        "import sys, dgpo_jax.rewards.pool, dgpo_jax.data.problems, dgpo_jax.metrics, dgpo_jax.rewards.worker\n"
        "print(*sorted({'jax', 'flax', 'torch', 'tensorflow'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "\n"
