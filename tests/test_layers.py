"""The order of the rooms: what may import what, circles, late imports, and who writes files."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "composable"
# A room imports itself and the rooms above it in this list, and nothing else.
ROOMS = (
    "printable",
    "errors",
    "progress",
    "interface",
    "files",
    "merging",
    "packaging.versions",
    "packaging.manifests",
    # The port alone: what signs files, and what lists releases, both use it.
    "packaging.registry.storage",
    "packaging.trust",
    "packaging.registry",
    "packaging.resolution",
    "packaging.install",
    "packaging.project",
    "packaging.bom",
    "packaging",
    "parallel",
    "kernels",
    "model",
    "corpora",
    "training",
    "vetting",
    "interop",
    "assembly",
    "workflows",
    "demo",
    "server",
    "cli",
)
# Rooms that do not know each other, though one stands above the other.
APART = (
    ("packaging", "parallel", "kernels", "model", "corpora", "training"),
    ("packaging.registry", "packaging.resolution"),
)
# `packaging` and `model` meet in these rooms, and in the files that `MEETINGS` names.
MEETING_ROOMS = ("assembly", "workflows", "demo", "server", "cli")
MEETINGS = {
    ("vetting.card", "packaging.manifests.manifest"): "a card is a file of a package",
}
# Imports inside functions. They count for the order of the rooms like any other; they are here, and
# only here, because of what they save when a command starts.
LATE_IMPORTS = {
    "packaging.manifests.packing": "only publishing checks tensors, which loads NumPy",
    "packaging.manifests.statistics": "only publishing and merging read tensors, which loads NumPy",
    "packaging.project.locking": "a project in sync needs no resolver; only a policy a backbone",
    "packaging.registry.registry": "only a signed registry needs TUF",
    "packaging.registry.locations": "a folder needs no HTTP client and no cloud library",
    "packaging.resolution.explain": "only a failure needs suggestions",
    "packaging.resolution.resolver": "a caller may bring a solver, and only a failure is explained",
    "demo.contributor": "a process confines itself before it loads anything that starts threads",
    "kernels.blocks": "only a program that a GPU or TPU may run needs Pallas",
    "interop.checkpoint": "each format needs a library that is installed on demand",
}
# Every file of the command line imports what its commands need when they run, so `--help` is fast.
LATE_ROOMS = ("cli",)
# Files other than `files.atomic` that write, and why nothing is lost by it.
WRITERS = {
    "demo.page": "a page that the next run makes again",
    "demo.contribution": "training text that the next run copies again, and a log",
    "packaging.project.export": "a tar file, into a sink of files.atomic",
    "corpora.documents": "training text that the next run writes again, alike to the byte",
    "training.ledger": "whole lines at the end of a file, whose last one may be cut",
}
# Files other than `files.reading` that open a file to read it, and why nothing can go wrong there.
READERS = {
    "assembly.huge_pages": "a file of the kernel",
    "corpora.extractors": "files of an unpacked package, whose digest was checked",
    "corpora.recipe": "a package whose digest was checked",
    "demo.contribution": "a log of our own",
    "demo.contributor": "checks that a file cannot be opened",
    "demo.page": "a resource of this package",
    "demo.sandbox": "names folders to the kernel, and reads nothing",
    "files.cloning": "makes a file",
    "kernels.native": "a file of this package, and one of the kernel",
    "packaging.manifests.template": "a folder of this package",
    "packaging.project.export": "writes a tar file",
    "training.ledger": "the last byte of a file of its own, and files of the kernel",
    "workflows.capacity": "a file of the kernel",
    "workflows.diff_page": "a resource of this package",
    "workflows.goodput": "a resource of this package",
    "workflows.merge_page": "a resource of this package",
    "workflows.pretrain": "a file of our own",
    "workflows.review_page": "a resource of this package",
    "workflows.smollm2": "a package whose digest was checked",
    "workflows.trunk_cache": "maps a file of our own cache, whose size was checked",
}
# Rooms that never load an array library: what starts fast, and what packaging needs.
WITHOUT_ARRAYS = (
    "printable",
    "errors",
    "progress",
    "interface",
    "files",
    "packaging",
    "server",
    "cli",
)
ARRAY_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "chex"}


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module):
    """Return the innermost room that holds a module."""
    fitting = [room for room in ROOMS if module == room or module.startswith(f"{room}.")]
    return max(fitting, key=len)


def is_in(module, room):
    return module == room or module.startswith(f"{room}.")


def targets_of(node):
    """Return the modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    found = []
    for alias in node.names:
        inner = PACKAGE.parent.joinpath(*node.module.split("."), alias.name)
        is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
        found.append(f"{node.module}.{alias.name}" if is_module else node.module)
    return found


def imports_of(path):
    """Yield (module, is inside a function) of all that a file imports, for type checking too."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    late = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert getattr(node, "level", 0) == 0, f"{path}: imports are absolute"
            for name in targets_of(node):
                yield name, id(node) in late


FILES = sorted(path for path in PACKAGE.rglob("*.py") if module_of(path))
INTERNAL = sorted(
    {
        (module_of(path), name.removeprefix("composable."), is_late)
        for path in FILES
        for name, is_late in imports_of(path)
        if name.startswith("composable.")
    }
)
PAIRS = sorted({(importer, imported) for importer, imported, _ in INTERNAL})


def test_there_is_something_to_check():
    assert len(FILES) > 120
    assert ("model.model", "errors") in PAIRS
    assert ("packaging.registry.locations", "packaging.registry.http", True) in INTERNAL


def test_every_file_is_in_a_room():
    for path in FILES:
        assert any(is_in(module_of(path), room) for room in ROOMS), path


def test_a_room_imports_only_rooms_above_it():
    upward = [
        (importer, imported)
        for importer, imported in PAIRS
        if ROOMS.index(room_of(imported)) > ROOMS.index(room_of(importer))
    ]
    assert upward == []


def test_no_circles():
    """Take away files that import nothing that is left, until none is left."""
    left = {module_of(path): set() for path in FILES}
    for importer, imported in PAIRS:
        if imported in left and imported != importer:
            left[importer].add(imported)
    while free := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in free}
    assert left == {}


@pytest.mark.parametrize("rooms", APART, ids=lambda rooms: " ".join(sorted(rooms)))
def test_rooms_that_do_not_know_each_other(rooms):
    allowed = {("training", "model"), ("training", "parallel"), ("model", "kernels")}
    allowed |= {("model", "parallel"), ("training", "corpora"), ("training", "kernels")}
    for importer, imported in PAIRS:
        ours = [room for room in rooms if is_in(importer, room)]
        theirs = [room for room in rooms if is_in(imported, room)]
        if ours and theirs and ours != theirs:
            assert (ours[0], theirs[0]) in allowed, (importer, imported)


def test_packaging_and_model_meet_in_few_rooms():
    met = {
        (importer, imported)
        for importer, imported in PAIRS
        if is_in(imported, "packaging") and not is_in(importer, "packaging")
        if not any(is_in(importer, room) for room in MEETING_ROOMS)
    }
    assert met == MEETINGS.keys()


def test_late_imports_are_listed():
    late = {importer for importer, _, is_late in INTERNAL if is_late}
    late = {module for module in late if not any(is_in(module, room) for room in LATE_ROOMS)}
    assert late == LATE_IMPORTS.keys()


@pytest.mark.parametrize("room", WITHOUT_ARRAYS)
def test_no_array_library_is_imported_where_none_belongs(room):
    for path in FILES:
        if is_in(module_of(path), room):
            roots = {name.split(".")[0] for name, _ in imports_of(path)}
            assert not roots & ARRAY_LIBRARIES, path


def writes_of(path):
    """Return the line of every call that writes a path whole or opens it for writing."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        owner = getattr(node.func, "value", None)
        if name in ("write_text", "write_bytes"):
            if not (isinstance(owner, ast.Name) and owner.id == "atomic"):
                yield node.lineno
        elif name == "open":
            arguments = [*node.args[-1:], *(keyword.value for keyword in node.keywords)]
            modes = [a.value for a in arguments if isinstance(a, ast.Constant)]
            if any(isinstance(mode, str) and set(mode) & set("wax+") for mode in modes):
                yield node.lineno


def test_every_write_goes_through_one_file():
    writers = {module_of(path) for path in FILES if any(writes_of(path))}
    assert writers - {"files.atomic"} == WRITERS.keys()


def reads_of(path):
    """Return the line of every call that opens a path or reads it whole."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        method = name.rpartition(".")[2]
        opens = method in ("read_text", "read_bytes", "open", "ZipFile") and name != "read_bytes"
        if opens or name in ("np.memmap", "np.load"):
            yield node.lineno


def test_every_read_goes_through_one_file():
    """A named pipe would be waited for, and a device has no end: see `files.reading`."""
    readers = {module_of(path) for path in FILES if any(reads_of(path))}
    assert readers - {"files.reading", "files.atomic"} == READERS.keys()


def test_tests_import_no_benchmark():
    """Benchmarks import tests.support; what both need is there."""
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        roots = {name.split(".")[0] for name, _ in imports_of(path)}
        assert "benchmarks" not in roots, path
