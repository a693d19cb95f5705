import dataclasses
import json
import math

import pytest

from composable.errors import InterfaceError
from composable.interface import (
    DiscountedRecord,
    OutputMixture,
    RouterInterface,
    SwitchingFilter,
    byte_router,
    canonical_json,
    digest_bytes,
    subword_router,
)

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
SCOUTS = {"scout_prior": 0.05, "scout_rate": 0.01, "scout_power": 0.6}
# The same as values.
FILTER = SwitchingFilter(
    power=0.35,
    backbone_prior=0.8,
    switch_rate=0.003,
    max_expert_prior=0.2,
    margin=0.1,
    floor=0.05,
    top_k=4,
)
RECORD = DiscountedRecord(floor=0.05, top_k=4)
MIXTURE = OutputMixture(prior=0.05, rate=0.01, power=0.6)
# Fields that hold other values.
NESTED = ("mix", "output_mixture", "inert")
DELETED = "this field is deleted"


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


@pytest.mark.parametrize("schema", [1, 2])
@pytest.mark.parametrize(
    "field", [f.name for f in dataclasses.fields(RouterInterface) if f.name not in NESTED]
)
def test_every_field_is_in_the_digest(interface, field, schema):
    interface = dataclasses.replace(interface, schema=schema)
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
    if field == "schema":
        other = 3 - schema
    assert dataclasses.replace(interface, **{field: other}).digest != interface.digest


def nested_changes():
    """Return each field of each nested value, with the value and with the field changed."""
    for name, value in (("mix", RECORD), ("mix", FILTER), ("output_mixture", MIXTURE)):
        for field in dataclasses.fields(value):
            other = 7 if field.name == "top_k" else getattr(value, field.name) / 2
            yield pytest.param(
                name,
                value,
                dataclasses.replace(value, **{field.name: other}),
                id=f"{type(value).__name__}.{field.name}",
            )


@pytest.mark.parametrize("schema", [1, 2])
@pytest.mark.parametrize(("name", "value", "other"), [*nested_changes()])
def test_every_setting_is_in_the_digest(interface, name, value, other, schema):
    one, two = (dataclasses.replace(interface, schema=schema, **{name: v}) for v in (value, other))
    assert one.digest != two.digest
    assert RouterInterface.from_json(one.to_json()) == one
    assert RouterInterface.from_json(two.to_json()) == two


@pytest.mark.parametrize("schema", [1, 2])
def test_no_two_rules_have_one_digest(interface, schema):
    mixes = [DiscountedRecord(), RECORD, FILTER, dataclasses.replace(FILTER, top_k=None)]
    digests = {
        dataclasses.replace(interface, schema=schema, mix=mix, output_mixture=mixture).digest
        for mix in mixes
        for mixture in (None, MIXTURE)
    }
    assert len(digests) == 8


def test_schema_2_is_nested(interface):
    nested = dataclasses.replace(interface, schema=2, mix=FILTER, output_mixture=MIXTURE).to_dict()
    assert nested["mix"] == {
        "rule": "switching-filter",
        "power": 0.35,
        "backbone_prior": 0.8,
        "switch_rate": 0.003,
        "max_expert_prior": 0.2,
        "margin": 0.1,
        "floor": 0.05,
        "top_k": 4,
    }
    assert nested["output_mixture"] == {"prior": 0.05, "rate": 0.01, "power": 0.6}
    plain = dataclasses.replace(interface, schema=2).to_dict()
    assert plain["mix"] == {"rule": "discounted-record", "floor": 0.0}
    assert "output_mixture" not in plain


def test_the_digest_of_schema_2_does_not_depend_on_how_numbers_are_spelt(interface):
    whole, point = (
        dataclasses.replace(interface, schema=2, mix=dataclasses.replace(FILTER, power=power))
        for power in (1, 1.0)
    )
    assert whole.digest == point.digest


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("mix", None),
        ("mix", "switching-filter"),
        ("mix.rule", None),
        ("mix.rule", "vote"),
        ("mix.rule", ["switching-filter"]),
        ("mix.power", 0.0),
        ("mix.power", "1"),
        ("mix.power", None),
        ("mix.switch_rate", 1.0),
        ("mix.margin", float("nan")),
        ("mix.max_expert_prior", True),
        ("mix.top_k", 0),
        ("mix.top_k", 1.5),
        ("mix.top_k", None),
        ("mix.colour", "blue"),
        ("mix.floor", DELETED),
        ("mix", DELETED),
        ("output_mixture", None),
        ("output_mixture.prior", 0.0),
        ("output_mixture.rate", 0.0),
        ("output_mixture.power", DELETED),
        ("honours", DELETED),
        ("mix_power", 0.5),
        ("inert", []),
        ("schema", 3),
        ("schema", 2.0),
        ("schema", True),
    ],
)
def test_a_bad_field_of_schema_2_is_refused_by_its_path(interface, path, value):
    data = dataclasses.replace(interface, schema=2, mix=FILTER, output_mixture=MIXTURE).to_dict()
    *parents, last = path.split(".")
    table = data
    for parent in parents:
        table = table[parent]
    table[last] = value
    if value is DELETED:
        del table[last]
    with pytest.raises(InterfaceError) as caught:
        RouterInterface.from_dict(data, "interface.json")
    assert caught.value.where == f"interface.json.{path}"


def test_settings_without_effect_keep_the_digest_of_schema_1():
    data = {**FIELDS, "mix_share": 0.2, "mix_margin": 0.1}
    read = RouterInterface.from_dict(data)
    assert read.mix == DiscountedRecord()
    assert read.to_dict() == data
    assert RouterInterface.from_json(read.to_json()) == read
    with pytest.raises(InterfaceError, match="not empty"):
        dataclasses.replace(read, schema=2)


@pytest.mark.parametrize("make", [byte_router, subword_router])
def test_presets_survive_both_schemas(interface, make):
    for schema in (1, 2):
        preset = dataclasses.replace(interface, schema=schema, **vars(make()))
        assert RouterInterface.from_json(preset.to_json()) == preset


def test_an_interface_survives_its_json(interface):
    assert RouterInterface.from_json(interface.to_json()) == interface
    assert RouterInterface.from_dict(interface.to_dict()) == interface
    assert interface.to_json().endswith("}\n")


@pytest.mark.parametrize(
    ("more", "fields"), [(FILTERED, {"mix": None}), (SCOUTS, {"output_mixture": None})]
)
def test_what_came_later_survives_json_and_is_left_out_where_it_is_not_used(
    interface, more, fields
):
    values = {"mix": FILTER, "output_mixture": MIXTURE}
    other = dataclasses.replace(interface, **{name: values[name] for name in fields})
    assert RouterInterface.from_json(other.to_json()) == other
    assert RouterInterface.from_dict({**FIELDS, **more}) == other
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
    mixed = dataclasses.replace(interface, output_mixture=MIXTURE)
    assert mixed.safe_bound(100) == pytest.approx(plain + more)


def test_the_filter_without_what_came_later_has_the_digest_it_had(interface):
    first = {name: FILTERED[name] for name in ("mix_power", "mix_prior", "mix_switch_rate")}
    read = RouterInterface.from_dict({**FIELDS, **first})
    assert read.to_dict() == {**interface.to_dict(), **first}
    assert read.n_mixed == interface.top_k
    assert dataclasses.replace(interface, mix=DiscountedRecord(top_k=5)).n_mixed == 5


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
        ("schema", 3),
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
