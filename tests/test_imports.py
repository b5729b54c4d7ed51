"""Holds the floors: who may import whom, read from the source without running it."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
OURS = ("passes", "jaxptis", "models", "experiments", "tests")
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in OURS
    for path in sorted((ROOT / folder).rglob("*.py"))
}
# What a module may import of ours, by the longest of these prefixes that its name has; every
# module may import those with its own prefix.
PLANNING = {"jaxptis.cluster", "jaxptis.plan", "jaxptis.schedules", "jaxptis.performance"}
OPTIMIZER = [
    f"jaxptis.optimizer.{name}"
    for name in ("steps", "partition", "certificate", "search", "papers")
]
MAY_IMPORT = {
    "passes": set(),
    "models": set(),
    "jaxptis.cluster": set(),
    "jaxptis.plan": {"jaxptis.cluster"},
    "jaxptis.schedules": {"jaxptis.cluster", "jaxptis.plan"},
    # A timeline draws itself.
    "jaxptis.performance": {"jaxptis.cluster", "jaxptis.plan", "jaxptis.pictures", "passes"},
    "jaxptis.pictures": {"jaxptis.plan", "jaxptis.performance"},
    "jaxptis.optimizer": PLANNING,
    **{name: {*PLANNING, *OPTIMIZER[:floor]} for floor, name in enumerate(OPTIMIZER)},
    "jaxptis.processes": {"passes"},
    "jaxptis.executor": PLANNING | {"jaxptis.processes", "passes"},
    "jaxptis.options": PLANNING,
    "jaxptis.make_plan": PLANNING | {"jaxptis.options", "jaxptis.optimizer"},
    "jaxptis.choose_costs": PLANNING | {"jaxptis.options", "jaxptis.processes", "passes"},
    "jaxptis.microbatches": {"jaxptis.options", "jaxptis.executor"},
    "jaxptis.compile": {
        *PLANNING,
        *("jaxptis.options", "jaxptis.make_plan", "jaxptis.choose_costs"),
        *("jaxptis.microbatches", "jaxptis.parts", "jaxptis.processes"),
        *("jaxptis.executor", "passes"),
    },
    "jaxptis": {"jaxptis", "passes"},
    "experiments": {"jaxptis", "models", "passes"},
    "tests": set(OURS),
}
JAX_FREE = (
    "jaxptis.cluster",
    "jaxptis.plan",
    "jaxptis.schedules",
    "jaxptis.optimizer",
    "jaxptis.make_plan",
    "jaxptis.pictures",
    "jaxptis.performance.simulate",
    "jaxptis.performance.costs",
    "jaxptis.performance.costs_file",
    "jaxptis.executor.tasks",
    "jaxptis.executor.emit_tasks",
    "jaxptis.executor.instructions",
    "jaxptis.executor.prove",
    "jaxptis.executor.memory",
)
PASSES_MAY_IMPORT = sys.stdlib_module_names | {"jax", "numpy", "scipy", "passes"}


def imports(module):
    package = module.split(".") if SOURCES[module].stem == "__init__" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{origin}.{alias.name}" for alias in node.names}
            yield from {n if n in SOURCES or "_src" in n else origin for n in names}


def within(module, *prefixes):
    return any(f"{module}.".startswith(f"{prefix}.") for prefix in prefixes)


def reachable(module, seen):
    seen.add(module)
    for name in imports(module) if module in SOURCES else ():
        if name not in seen:
            reachable(name, seen)
    return seen


def test_every_folder_of_a_package_is_in_the_wheel():
    """Setuptools leaves out a folder without an __init__.py."""
    folders = {path.parent for name, path in SOURCES.items() if not within(name, "tests")}
    assert not {folder for folder in folders if not (folder / "__init__.py").exists()}


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_imports_only_lower_floors(module):
    floor = max((floor for floor in MAY_IMPORT if within(module, floor)), key=len)
    ours = {name for name in imports(module) if within(name, *OURS)}
    assert not {name for name in ours if not within(name, floor, *MAY_IMPORT[floor])}


@pytest.mark.parametrize("module", [name for name in SOURCES if within(name, *JAX_FREE)])
def test_planning_needs_no_jax(module):
    assert not {name for name in reachable(module, set()) if within(name, "jax", "passes")}


@pytest.mark.parametrize("module", [name for name in SOURCES if within(name, "passes")])
def test_passes_import_jax_and_little_else(module):
    assert {name.split(".")[0] for name in imports(module)} <= PASSES_MAY_IMPORT


@pytest.mark.parametrize("module", [name for name in SOURCES if name != "passes.jaxprs.private"])
def test_only_one_file_knows_private_jax(module):
    assert not {
        name for name in imports(module) if within(name, "jax", "jaxlib") and "_src" in name
    }


@pytest.mark.parametrize("module", [name for name in SOURCES if within(name, "experiments")])
def test_no_program_is_imported(module):
    ours = {name for name in imports(module) if within(name, "experiments")}
    assert not {name for name in ours if "__main__" in SOURCES[name].read_text()}
