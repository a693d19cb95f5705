import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from composable.errors import ModelError, TrainingError
from composable.parallel import batch_share, make_mesh, require_divisible, spec_of, split_rows

pytestmark = pytest.mark.slow

MESH = AbstractMesh((1, 4, 2), ("data", "fsdp", "tensor"))


@pytest.mark.parametrize(
    ("dims", "shape", "axes"),
    [
        ("DF", (32, 64), ("fsdp", "tensor")),
        ("FD", (64, 32), ("tensor", "fsdp")),
        ("VD", (256, 32), ("tensor", "fsdp")),
        ("DNH", (32, 4, 8), ("fsdp", "tensor", None)),
        ("DKH", (32, 2, 8), ("fsdp", "tensor", None)),
        ("DKH", (32, 1, 8), ("fsdp", None, None)),  # one key head cannot be split
        ("DF", (30, 64), (None, "tensor")),  # 30 does not divide by 4
        ("DR", (32, 4), ("fsdp", None)),
        ("WC", (16, 256), ("tensor", None)),
        ("D", (32,), ("fsdp",)),
        ("", (), ()),
    ],
)
def test_letters_say_where_an_array_lives(dims, shape, axes):
    assert spec_of(dims, shape, MESH) == PartitionSpec(*axes)


def test_on_one_device_everything_may_be_split_by_one():
    mesh = AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor"))
    assert spec_of("DF", (31, 7), mesh) == PartitionSpec("fsdp", "tensor")


@pytest.mark.parametrize(("dims", "shape"), [("DF", (32,)), ("D", (32, 64)), ("z", (3,))])
def test_letters_that_do_not_fit_are_refused(dims, shape):
    with pytest.raises(ModelError, match=repr(dims)):
        spec_of(dims, shape, MESH)


def test_every_parameter_of_a_backbone_and_an_expert_has_letters(tiny):
    from flax import nnx

    for module in (
        tiny.backbone,
        tiny.expert("a").body,
        tiny.expert("l", kind="lora", rank=2).body,
    ):
        for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param)):
            dims = leaf.get_metadata()["dims"]
            assert len(spec_of(dims, leaf[...].shape, MESH)) == leaf[...].ndim, path


def test_a_placed_tree_keeps_its_values(tiny):
    from flax import nnx

    from composable.parallel import shard_tree

    state = nnx.state(tiny.backbone)
    placed = shard_tree(state, make_mesh())
    for (path, found), (_, expected) in zip(
        nnx.to_flat_state(placed), nnx.to_flat_state(state), strict=True
    ):
        np.testing.assert_array_equal(found[...], expected[...], err_msg=str(path))
        assert found.get_metadata() == expected.get_metadata()


def test_a_process_alone_loads_all_rows():
    assert batch_share(make_mesh()) == (0, 1)


def test_parts_of_a_batch_have_an_equal_share_of_every_device():
    rows = np.arange(8)[:, None]
    assert split_rows(rows, 4).tolist() == rows.reshape(4, 2, 1).tolist()


def test_rows_that_do_not_divide_are_refused_with_a_number_that_does():
    with pytest.raises(TrainingError, match="6 rows do not divide among 1 devices, in 4") as caught:
        require_divisible(6, make_mesh(), n_parts=4)
    assert "a multiple of 4" in caught.value.hint
