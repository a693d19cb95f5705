"""Whatever stands in a file, only our own errors come out of reading it, soon and in little memory.

`benchmarks/fuzz.py` searches on with atheris, from the same readers and good inputs.
"""

from __future__ import annotations

import functools
import json
import resource
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composable.errors import ComposableError
from composable.packaging.manifests.toml import MAX_TOML_BYTES, format_key, format_value
from tests.support.faults.processes import run_forked
from tests.support.foreign_models import JSON_DOCUMENTS
from tests.support.readers import (
    BACKBONE_CONFIG,
    CARD,
    CATALOG_LINE,
    INDEX_LINE,
    INTERFACE,
    SPECIAL_TOKENS,
    TARGET_NAMES,
    UNIVERSE,
    Target,
    make_targets,
)

pytestmark = pytest.mark.slow

FINDS = Path(__file__).parents[1] / "finds"
MAX_SECONDS = 20.0  # of a slow and busy machine; what grows with the square takes minutes
MAX_MEMORY_BYTES = 128 << 20
TOML_TARGETS = ("manifest", "backbone", "project", "lock")
JSON_SEEDS: dict[str, Any] = {
    "index-line": INDEX_LINE,
    "catalog": CATALOG_LINE,
    "universe": UNIVERSE,
    "interface": INTERFACE,
    "backbone-config": BACKBONE_CONFIG,
    "special-tokens": SPECIAL_TOKENS,
    "card": CARD,
    **JSON_DOCUMENTS,
}
QUICK = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Target]:
    return make_targets(tmp_path_factory.mktemp("scratch"))


def read(target: Target, data: bytes) -> bool:
    """Feed a reader; say whether it accepted."""
    try:
        target.read(data)
    except ComposableError as error:
        assert len(str(error)) < 5000, "an error must not repeat a whole hostile file"
        return False
    return True


def test_the_targets_are_all_there_and_their_seeds_are_good(targets: Mapping[str, Target]) -> None:
    assert tuple(targets) == TARGET_NAMES
    for name, target in targets.items():
        for seed in target.seeds:
            if name != "names":
                assert read(target, seed), f"{name} must accept {seed!r}"


@pytest.mark.parametrize("path", sorted(FINDS.glob("*")), ids=lambda path: path.name)
def test_what_was_found_once(targets: Mapping[str, Target], path: Path) -> None:
    read(targets[path.name.rsplit("-", 1)[0]], path.read_bytes())


@pytest.mark.parametrize("name", TARGET_NAMES)
@given(data=st.data())
@QUICK
def test_bytes_cut_flipped_and_spliced(
    targets: Mapping[str, Target], name: str, data: st.DataObject
) -> None:
    target = targets[name]
    seed = data.draw(st.sampled_from(target.seeds))
    start = data.draw(st.integers(0, len(seed)))
    stop = data.draw(st.integers(start, min(len(seed), start + 40)))
    piece = data.draw(st.binary(max_size=20) | st.sampled_from([seed[start:stop] * 3, b"\0", b"9"]))
    read(target, seed[:start] + piece + seed[stop:])


# Values that a field may be given, each wrong for most fields.
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**300]),
    st.floats(),
    st.text(max_size=30),
    st.sampled_from(
        ["", "../x", "a" * 20_000, "\0", "𝒜", "sha256:" + "0" * 64, "^" * 50, "1." * 99]
    ),
    st.lists(st.integers() | st.text(max_size=5), max_size=4),
    st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=5), max_size=3),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything inside a nested value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in items:
        yield (*path, key)
        if isinstance(child, dict | list):
            yield from places(child, (*path, key))


@st.composite
def disturbed(draw: st.DrawFn, good: Any) -> Any:
    """Return a copy of a good document with a few fields changed, dropped, added or renamed."""
    value = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(value)) or [()]))
        if not path:
            return value
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        act = draw(st.sampled_from(["change", "change", "drop", "add", "copy"]))
        if act == "change":
            parent[path[-1]] = draw(ODD)
        elif act == "drop":
            del parent[path[-1]]
        elif isinstance(parent, dict):
            key = draw(st.text(max_size=10) | st.sampled_from(["name", "__metadata__", "1.0.0"]))
            parent[key] = parent[path[-1]] if act == "copy" else draw(ODD)
        else:
            parent.append(parent[path[-1]] if act == "copy" else draw(ODD))
    return value


def to_toml(document: Mapping[str, Any]) -> bytes:
    """Write any nested value as TOML, as inline tables."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if item is not None}
        if isinstance(value, list):
            return [clean(item) for item in value if item is not None]
        return value

    lines = (f"{format_key(k)} = {format_value(v)}" for k, v in clean(document).items())
    return "\n".join(lines).encode("utf-8", "replace")


@pytest.mark.parametrize("name", TOML_TARGETS)
@given(data=st.data())
@QUICK
def test_odd_fields_in_toml(targets: Mapping[str, Target], name: str, data: st.DataObject) -> None:
    good = tomllib.loads(targets[name].seeds[0].decode())
    read(targets[name], to_toml(data.draw(disturbed(good))))


@pytest.mark.parametrize("name", JSON_SEEDS)
@given(data=st.data())
@QUICK
def test_odd_fields_in_json(targets: Mapping[str, Target], name: str, data: st.DataObject) -> None:
    document = data.draw(disturbed(JSON_SEEDS[name]))
    read(targets[name], json.dumps(document).encode())


@given(data=st.data())
@QUICK
def test_odd_fields_in_a_tensor_header(targets: Mapping[str, Target], data: st.DataObject) -> None:
    seed = targets["tensors"].seeds[0]
    size = int.from_bytes(seed[:8], "little")
    document = data.draw(disturbed(json.loads(seed[8 : 8 + size])))
    header = json.dumps(document).encode()
    length = data.draw(st.sampled_from([len(header), 0, 1, 2**64 - 1]) | st.integers(0, 2**64 - 1))
    tail = seed[8 + size :] * data.draw(st.integers(0, 2))
    read(targets["tensors"], length.to_bytes(8, "little") + header + tail)


@functools.cache
def attacks_in_toml() -> dict[str, bytes]:
    """Return long texts, each hard on one part of a reader.

    They are a sixteenth of the longest that is read, so that what grows with the square of the
    length fails clearly, and what grows with the length is quick.
    """
    n = MAX_TOML_BYTES // 16
    return {
        "deep arrays": b"x = " + b"[" * n,
        "deep tables": b"x = " + b"{a=" * (n // 3),
        "one deep key": b"a." * (n // 2) + b"a = 1",
        "many deep keys": b"".join(b"a." * 400 + b"k%d = 1\n" % i for i in range(n // 812)),
        "many deep headers": b"".join(b"[" + b"a." * 400 + b"k%d]\n" % i for i in range(n // 812)),
        "many keys": b"".join(b"k%d = 1\n" % i for i in range(n // 12)),
        "many tables": b"".join(b"[k%d]\n" % i for i in range(n // 11)),
        "many files": b"[[files]]\n" * (n // 10),
        "many experts": b"schema = 1\n" + b"[[expert]]\n" * (n // 11),
        "a long number": b"x = " + b"9" * n,
        "a long hex number": b"x = 0x" + b"f" * n,
        "a long string": b"x = '" + b"a" * n + b"'",
        "a string without end": b"x = '''" + b"'' " * (n // 3),
        "a long comment": b"#" + b"a" * n,
        "many escapes": b'x = "' + b"\\u0041" * (n // 6) + b'"',
        "a long array": b"x = [" + b"1," * (n // 2) + b"]",
        "a long list of tags": b"[expert]\nlanguages = [" + b'"a",' * (n // 4) + b"]",
        "names that are close": b"[expert]\n"
        + b"".join(b"nam%d = 1\n" % i for i in range(n // 13)),
    }


@functools.cache
def attacks_in_json() -> dict[str, bytes]:
    n = MAX_TOML_BYTES // 16
    many = {f"p{i}": {f"{j}.0.0": {} for j in range(50)} for i in range(100)}
    return {
        "deep arrays": b"[" * n,
        "deep objects": b'{"a":' * (n // 5),
        "a long number": b'{"name":' + b"9" * n + b"}",
        "a long float": b'{"name":' + b"1" * (n // 2) + b"." + b"1" * (n // 2) + b"}",
        "many keys": json.dumps({f"k{i}": 0 for i in range(n // 12)}).encode(),
        "many packages": json.dumps({**UNIVERSE, "packages": many}).encode(),
        "many files": json.dumps({**INDEX_LINE, "files": INDEX_LINE["files"] * 2_000}).encode(),  # type: ignore[operator]
        "many ranges": json.dumps(
            {**INDEX_LINE, "requires": {f"a{i}": ",".join([">1"] * 30) for i in range(1_500)}}
        ).encode(),
        "a long range": json.dumps({**INDEX_LINE, "requires": {"a": ">1," * 50_000}}).encode(),
        "a long name": json.dumps({**INDEX_LINE, "name": "a" * n}).encode(),
    }


@functools.cache
def attacks_on_tensors() -> dict[str, bytes]:
    n = 1 << 20
    entry = '"dtype":"U8","shape":[0],"data_offsets":[0,0]'
    many = "{" + ",".join(f'"t{i}":{{{entry}}}' for i in range(n // 60)) + "}"
    twice = "{" + ",".join('"a":1' for _ in range(n // 7)) + "}"
    headers = {
        "deep": b'{"a":' + b"[" * (n - 5),
        "many tensors": many.encode(),
        "one name many times": twice.encode(),
        "many names, one twice": many[:-1].encode() + b',"t0":1}',
        "a long shape": b'{"a":{"dtype":"U8","shape":[' + b"1," * (n // 3) + b"1]}}",
        "huge sizes": b'{"a":{"dtype":"U8","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,1]}}',
        "a long name": b'{"' + b"a" * (n - 10) + b'":1}',
        "spaces": b"{" + b" " * (n - 2) + b"}",
    }
    return {name: len(h).to_bytes(8, "little") + h for name, h in headers.items()}


ATTACKS = [
    *((name, attack) for name in TOML_TARGETS for attack in attacks_in_toml()),
    *((name, attack) for name in JSON_SEEDS for attack in attacks_in_json()),
    *(("tensors", attack) for attack in attacks_on_tensors()),
]


@pytest.mark.parametrize(("name", "attack"), ATTACKS)
def test_large_input_takes_bounded_time(
    targets: Mapping[str, Target], name: str, attack: str
) -> None:
    kind = "toml" if name in TOML_TARGETS else "json" if name in JSON_SEEDS else "tensors"
    attacks = {"toml": attacks_in_toml, "json": attacks_in_json, "tensors": attacks_on_tensors}
    data = attacks[kind]()[attack]
    started = time.process_time()
    read(targets[name], data)
    assert time.process_time() - started < MAX_SECONDS


def grow_while(work: Callable[[], object]) -> int:
    """Return by how many bytes a process grows while it works."""

    def measure() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)

    ending = run_forked(measure)
    assert ending.code == 0, str(ending)
    return int(ending.output)


@pytest.mark.parametrize("name", [*TOML_TARGETS, *JSON_SEEDS, "tensors"])
def test_large_input_takes_bounded_memory(targets: Mapping[str, Target], name: str) -> None:
    kind = attacks_in_toml if name in TOML_TARGETS else attacks_in_json
    attacks = attacks_on_tensors() if name == "tensors" else kind()

    def read_all() -> None:
        for data in attacks.values():
            read(targets[name], data)

    assert grow_while(read_all) < MAX_MEMORY_BYTES


def test_growth_is_measured() -> None:
    assert grow_while(lambda: bytes(range(256)) * (2 * MAX_MEMORY_BYTES // 256)) > MAX_MEMORY_BYTES
