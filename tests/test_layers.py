"""The order of the layers: what may import what."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "composable"
# A layer imports only layers before it.
LAYERS = (
    "errors",
    "interface",
    "packaging",
    "parallel",
    "kernels",
    "model",
    "training",
    "vetting",
    "interop",
    "assembly",
    "demo",
    "cli",
)
# These know nothing of each other, though they stand in a row.
STRANGERS = ("packaging", "parallel", "kernels")
# `packaging` and `model` meet here and nowhere else.
MEETING_PLACES = ("assembly", "demo", "cli")
# Imports of `packaging` by layers that may also use `model`, and why each is right.
ALLOWED = {
    ("vetting.card", "packaging.atomic"): "every write goes through one file",
    ("interop.huggingface", "packaging.tensors"): "other people's tensor files are checked alike",
    ("vetting.card", "packaging.manifest"): "a card is a file of a package, and names its files",
}
# Files other than `packaging.atomic` that write, and why nothing is lost by it.
WRITERS = {
    "demo.report": "a page and figures that the next run makes again",
    "demo.run": "plays people at their keyboards, who edit manifests with an editor",
    "packaging.bundle": "a tar file, into a sink of packaging.atomic",
    "training.documents": "training text that the next run writes again, alike to the byte",
}
# Files that jax must never reach: what starts fast, and what packaging needs.
JAX_FREE_LAYERS = ("errors", "interface", "packaging", "cli")
ARRAY_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "chex"}


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
    """Return every module that a file imports, inside functions and for type checking too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            source = node.module
            for alias in node.names:
                inner = PACKAGE.parent.joinpath(*source.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                yield f"{source}.{alias.name}" if is_module else source


FILES = sorted(path for path in PACKAGE.rglob("*.py") if module_of(path))
INTERNAL = sorted(
    {
        (module_of(path), name.removeprefix("composable."))
        for path in FILES
        for name in imports_of(path)
        if name.startswith("composable.")
    }
)


def layer_of(module):
    return module.split(".")[0]


def test_there_is_something_to_check():
    assert len(FILES) > 40
    assert ("model.model", "errors") in INTERNAL
    assert ("vetting.card", "packaging.atomic") in INTERNAL


def test_every_file_is_in_a_layer():
    assert {layer_of(module_of(path)) for path in FILES} <= set(LAYERS)


def test_a_layer_imports_only_layers_before_it():
    rank = {layer: i for i, layer in enumerate(LAYERS)}
    upward = [
        (importer, imported)
        for importer, imported in INTERNAL
        if rank[layer_of(imported)] > rank[layer_of(importer)]
    ]
    assert upward == []


def test_packaging_parallel_and_kernels_know_nothing_of_each_other():
    met = [
        (importer, imported)
        for importer, imported in INTERNAL
        if layer_of(importer) in STRANGERS
        and layer_of(imported) in STRANGERS
        and layer_of(importer) != layer_of(imported)
    ]
    assert met == []


def test_packaging_and_model_meet_in_assembly_only():
    met = {
        (importer, imported)
        for importer, imported in INTERNAL
        if layer_of(imported) == "packaging"
        and layer_of(importer) not in ("packaging", *MEETING_PLACES)
    }
    assert met == ALLOWED.keys()


def test_no_file_but_the_meeting_places_imports_both():
    for path in FILES:
        module = module_of(path)
        layers = {layer_of(imported) for importer, imported in INTERNAL if importer == module}
        if layer_of(module) not in MEETING_PLACES:
            assert not {"packaging", "model"} <= layers, module


@pytest.mark.parametrize("layer", JAX_FREE_LAYERS)
def test_no_array_library_is_imported_where_none_belongs(layer):
    for path in FILES:
        if layer_of(module_of(path)) == layer:
            roots = {name.split(".")[0] for name in imports_of(path)}
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
    assert writers - {"packaging.atomic"} == WRITERS.keys()
