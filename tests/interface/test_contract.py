import dataclasses
import json
import math

import pytest

from composable.errors import InterfaceError
from composable.interface import RouterInterface, canonical_json, digest_bytes

DIGESTS = {
    field: "sha256:" + letter * 64
    for field, letter in zip(
        ("backbone", "trunk", "tokenizer", "class_map", "anchor"), "abcde", strict=True
    )
}
FIELDS = {
    "schema": 1,
    "name": "tiny",
    "version": "1.2.0",
    **DIGESTS,
    "vocab_size": 256,
    "n_classes": 256,
    "d_model": 32,
    "d_ff": 64,
    "tap": 1,
    "slots": [1, 2],
    "scout_max_width": 16,
    "lora_max_rank": 8,
    "discount": 0.95,
    "top_k": 2,
    "backbone_prior": 0.5,
    "switch_rate": 0.01,
    "output_bounds": [8.0, 16.0],
    "honours": ["sha256:" + "f" * 64],
}
# Every published expert records a digest of this form: if this constant has to change, then every
# expert that exists stops plugging in.
GOLDEN = "sha256:d076559b1b3510797ab924ad02bf136e762fb8221be544936325151fae82f11d"


FILTERED = {
    "mix_power": 0.35,
    "mix_prior": 0.8,
    "mix_switch_rate": 0.003,
    "mix_share": 0.2,
    "mix_margin": 0.1,
    "mix_floor": 0.05,
    "mix_top_k": 4,
}
HEDGED = {"scout_prior": 0.05, "scout_rate": 0.01, "scout_power": 0.6}


@pytest.fixture
def interface():
    return RouterInterface.from_dict(FIELDS)


def test_the_digest_is_the_one_it_always_was(interface):
    assert interface.digest == GOLDEN


def test_the_digest_is_of_the_canonical_json(interface):
    text = json.dumps(FIELDS, sort_keys=True, separators=(",", ":"))
    assert interface.digest == digest_bytes(text.encode())


def test_the_digest_does_not_hang_on_order_spelling_or_spaces(interface):
    shuffled = dict(sorted(FIELDS.items(), key=lambda item: item[0][::-1]))
    assert RouterInterface.from_json(json.dumps(shuffled, indent=7)).digest == interface.digest


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(RouterInterface)])
def test_every_field_is_in_the_digest(interface, field):
    if field == "schema":
        return  # only one value is readable
    if field.startswith("mix_"):
        interface = dataclasses.replace(interface, **FILTERED)
    if field.startswith("scout_") and field != "scout_max_width":
        interface = dataclasses.replace(interface, **HEDGED)
    value = getattr(interface, field)
    other = {
        str: lambda: DIGESTS["anchor"][:-1] + "0" if value.startswith("sha256:") else value + "0",
        int: lambda: value + 1 if field != "tap" else 1,
        float: lambda: value / 2,
        tuple: lambda: {"slots": (1, 3), "output_bounds": (8.0, 9.0), "honours": ()}[field],
    }[type(value)]()
    if field == "tap":
        interface = dataclasses.replace(interface, slots=(2, 3))
        other = 2
    assert dataclasses.replace(interface, **{field: other}).digest != interface.digest


def test_an_interface_survives_its_json(interface):
    assert RouterInterface.from_json(interface.to_json()) == interface
    assert RouterInterface.from_dict(interface.to_dict()) == interface
    assert interface.to_json().endswith("}\n")


@pytest.mark.parametrize("more", [FILTERED, HEDGED])
def test_what_came_later_survives_json_and_is_left_out_where_it_is_not_used(interface, more):
    other = dataclasses.replace(interface, **more)
    assert RouterInterface.from_json(other.to_json()) == other
    assert more.items() <= other.to_dict().items()
    assert not more.keys() & interface.to_dict().keys()


def test_scouts_that_have_a_share_need_a_rate():
    with pytest.raises(InterfaceError) as caught:
        RouterInterface.from_dict({**FIELDS, "scout_prior": 0.1})
    assert caught.value.where == "interface.scout_rate"


def test_the_bound_of_safe_mode_grows_with_the_share_of_scouts(interface):
    plain = interface.safe_bound(100)
    assert plain == pytest.approx(-math.log(0.5) - 100 * math.log(1 - 0.01 * 0.5))
    more = -math.log(1 - 0.05) - 100 * math.log(1 - 0.01 * 0.05)
    hedged = dataclasses.replace(interface, **HEDGED)
    assert hedged.safe_bound(100) == pytest.approx(plain + more)


def test_the_filter_without_what_came_later_has_the_digest_it_had(interface):
    first = {name: FILTERED[name] for name in ("mix_power", "mix_prior", "mix_switch_rate")}
    plain = dataclasses.replace(interface, **first).to_dict()
    assert plain == {**interface.to_dict(), **first}
    assert RouterInterface.from_dict(plain).n_mixed == interface.top_k
    assert dataclasses.replace(interface, mix_top_k=5).n_mixed == 5


def test_honours_may_be_left_out(interface):
    shorter = {name: value for name, value in FIELDS.items() if name not in ("honours", "schema")}
    assert RouterInterface.from_dict(shorter) == dataclasses.replace(interface, honours=())


def test_it_honours_itself_and_what_it_lists(interface):
    assert interface.honours_digest(interface.digest)
    assert interface.honours_digest(interface.honours[0])
    assert not interface.honours_digest(DIGESTS["anchor"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mix_power", 1.5),
        ("mix_share", 0.0),
        ("mix_share", 1.1),
        ("mix_margin", -0.1),
        ("mix_margin", float("inf")),
        ("mix_floor", -0.1),
        ("mix_floor", 1.0),
        ("mix_top_k", -1),
        ("mix_top_k", 2.5),
        ("scout_prior", 1.0),
        ("scout_prior", -0.1),
        ("schema", 2),
        ("schema", "1"),
        ("name", 3),
        ("version", None),
        *((name, "sha256:" + "A" * 64) for name in DIGESTS),
        ("backbone", "a" * 64),
        ("trunk", "sha256:" + "a" * 63),
        ("trunk", "sha256:" + "a" * 64 + "\n"),
        ("vocab_size", 0),
        ("vocab_size", 256.0),
        ("n_classes", 0),
        ("n_classes", 1025),
        ("n_classes", True),
        ("d_model", -1),
        ("d_ff", 0),
        ("tap", 0),
        ("slots", []),
        ("slots", [2, 1]),
        ("slots", [1, 1]),
        ("slots", [0, 1]),
        ("slots", [1, "2"]),
        ("slots", [1, True]),
        ("slots", "12"),
        ("scout_max_width", 0),
        ("lora_max_rank", 0),
        ("lora_max_rank", False),
        ("discount", 0),
        ("discount", 1.01),
        ("discount", "0.9"),
        ("discount", float("nan")),
        ("top_k", 0),
        ("backbone_prior", 0.0),
        ("backbone_prior", 1.0),
        ("backbone_prior", float("nan")),
        ("switch_rate", -0.1),
        ("switch_rate", 1),
        ("switch_rate", float("nan")),
        ("output_bounds", [8.0]),
        ("output_bounds", [8.0, 0.0]),
        ("output_bounds", [8.0, float("nan")]),
        ("output_bounds", [8.0, "9"]),
        ("output_bounds", []),
        ("honours", ["sha256:"]),
        ("honours", [1]),
        ("honours", "sha256:" + "f" * 64),
        ("colour", "blue"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_bad_field_is_refused_by_its_path(field, value):
    with pytest.raises(InterfaceError) as caught:
        RouterInterface.from_dict({**FIELDS, field: value})
    assert caught.value.where == f"interface.{field}"


@pytest.mark.parametrize("field", sorted(FIELDS.keys() - {"honours", "schema"}))
def test_a_missing_field_is_refused_by_its_path(field):
    shorter = {name: value for name, value in FIELDS.items() if name != field}
    with pytest.raises(InterfaceError, match="missing field") as caught:
        RouterInterface.from_dict(shorter)
    assert caught.value.where == f"interface.{field}"


def test_a_float_may_be_written_as_a_whole_number_and_has_the_same_digest():
    whole, point = (RouterInterface.from_dict({**FIELDS, "discount": x}) for x in (1, 1.0))
    assert whole == point
    assert whole.digest == point.digest


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"interface"'])
def test_text_that_is_no_interface_is_refused(text):
    with pytest.raises(InterfaceError) as caught:
        RouterInterface.from_json(text)
    assert caught.value.where == "interface.json"


def test_canonical_json_cannot_say_nan():
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"discount": float("nan")})
