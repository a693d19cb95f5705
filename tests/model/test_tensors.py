import ml_dtypes
import numpy as np
import pytest

from composable.errors import ModelError
from composable.model.tensors import from_tensors, shapes_of, to_tensors


def test_a_module_survives_named_arrays_to_the_bit(tiny):
    tensors = to_tensors(tiny.backbone)
    again = to_tensors(from_tensors(tiny.make_backbone_module(), tensors))
    assert tensors.keys() == again.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(again[name], array)


def test_names_are_attribute_paths(tiny):
    names = to_tensors(tiny.backbone).keys()
    assert {"embed", "class_map", "layers.0.attention.w_q", "layers.2.ffn.w_down"} <= names
    assert {"scout.w_in", "scout.b_out", "norm", "layers.1.attention_norm"} <= names
    shapes = shapes_of(tiny.make_backbone_module())
    assert shapes["layers.0.attention.w_k"] == (32, 2, 8)
    assert shapes.keys() == names


def test_rounding_leaves_integers_alone(tiny):
    tensors = to_tensors(tiny.backbone, "BF16")
    assert tensors["class_map"].dtype == np.int32
    assert tensors["embed"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape"])
def test_arrays_that_do_not_fit_are_refused_by_name(tiny, damage):
    tensors = to_tensors(tiny.backbone)
    if damage == "missing":
        del tensors["norm"]
    elif damage == "unknown":
        tensors["norms"] = tensors["norm"]
    else:
        tensors["norm"] = tensors["norm"][:-1]
    with pytest.raises(ModelError, match=r"'norms?'"):
        from_tensors(tiny.make_backbone_module(), tensors)
