import pytest

from composable.errors import InterfaceError
from composable.interface import DIMS, RouterInterface, TensorSpec, body_signature, scout_signature
from composable.interface.dims import shape_of


@pytest.fixture
def interface():
    digest = "sha256:" + "a" * 64
    digests = dict.fromkeys(("backbone", "trunk", "tokenizer", "class_map", "anchor"), digest)
    return RouterInterface(
        name="tiny",
        version="1.0.0",
        **digests,
        vocab_size=300,
        n_classes=100,
        d_model=32,
        d_ff=64,
        tap=1,
        slots=(1, 4),
        scout_max_width=16,
        lora_max_rank=8,
        discount=0.95,
        top_k=2,
        backbone_prior=0.5,
        switch_rate=0.0,
        output_bounds=(8.0, 8.0),
    )


def test_a_full_body_has_three_matrices_in_every_slot(interface):
    shapes = {name: spec.shape for name, spec in body_signature(interface, "ffn").items()}
    assert shapes == {
        "slots.1.w_gate": (32, 64),
        "slots.1.w_up": (32, 64),
        "slots.1.w_down": (64, 32),
        "slots.4.w_gate": (32, 64),
        "slots.4.w_up": (32, 64),
        "slots.4.w_down": (64, 32),
    }


def test_a_low_rank_body_has_two_factors_of_each(interface):
    signature = body_signature(interface, "lora", 4)
    assert len(signature) == 2 * len(body_signature(interface, "ffn"))
    for name, full in body_signature(interface, "ffn").items():
        assert signature[f"{name}.a"].shape == (full.shape[0], 4)
        assert signature[f"{name}.b"].shape == (4, full.shape[1])


def test_a_scout_has_one_hidden_layer(interface):
    shapes = {name: spec.shape for name, spec in scout_signature(interface, 8).items()}
    assert shapes == {"w_in": (32, 8), "b_in": (8,), "w_out": (8, 100), "b_out": (100,)}


def test_tensors_are_of_either_dtype(interface):
    for spec in (*body_signature(interface, "ffn").values(), TensorSpec(shape=(1,))):
        assert spec.dtypes == ("BF16", "F32")


@pytest.mark.parametrize(
    ("kind", "rank", "field"),
    [
        ("moe", None, "body.kind"),
        ("", None, "body.kind"),
        ("lora", None, "body.rank"),
        ("lora", 0, "body.rank"),
        ("lora", 9, "body.rank"),
    ],
)
def test_a_body_outside_the_interface_is_refused(interface, kind, rank, field):
    with pytest.raises(InterfaceError) as caught:
        body_signature(interface, kind, rank)
    assert caught.value.where == field


@pytest.mark.parametrize("width", [0, 17])
def test_a_scout_outside_the_interface_is_refused(interface, width):
    with pytest.raises(InterfaceError) as caught:
        scout_signature(interface, width)
    assert caught.value.where == "scout.width"


def test_dimension_letters_stand_for_their_sizes():
    assert shape_of("DF", {"D": 3, "F": 5}) == (3, 5)
    assert shape_of("", {}) == ()
    with pytest.raises(KeyError):
        shape_of("Dx", {"D": 3, "x": 5})
    assert all(len(letter) == 1 and letter.isupper() for letter in DIMS)
