import pytest

from composable.errors import TrainingError
from composable.parallel import make_mesh, parse_mesh
from composable.parallel.mesh import fit_mesh


def test_a_mesh_of_one_device_has_all_axes():
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1}


@pytest.mark.parametrize(
    ("text", "n_devices", "shape"),
    [
        ("data=4,fsdp=8", 32, (4, 8, 1, 1)),
        ("fsdp=8,tensor=2", 32, (2, 8, 2, 1)),
        ("data=2,fsdp=-1", 32, (2, 16, 1, 1)),
        (" tensor = 4 , data = 1 , fsdp = -1 ", 16, (1, 4, 4, 1)),
        ("data=-1", 7, (7, 1, 1, 1)),
        ("data=4,fsdp=8,tensor=2,expert=2", 128, (4, 8, 2, 2)),
        ("fsdp=2,expert=-1", 8, (1, 2, 1, 4)),
    ],
)
def test_sizes_are_fitted_to_the_devices(text, n_devices, shape):
    assert fit_mesh(parse_mesh(text), n_devices) == shape


@pytest.mark.parametrize("text", ["", "data", "model=2", "fsdp=x", "fsdp=2,fsdp=2", "data=1.5"])
def test_a_text_that_names_no_mesh_is_refused(text):
    with pytest.raises(TrainingError) as caught:
        parse_mesh(text)
    assert caught.value.where == "mesh"
    assert "data, fsdp, tensor, expert" in caught.value.message


@pytest.mark.parametrize(
    "text",
    ["fsdp=3", "data=2,fsdp=2", "data=0", "fsdp=-2", "data=-1,fsdp=-1", "data=64", "expert=16"],
)
def test_sizes_that_do_not_fit_are_refused_with_meshes_that_do(text):
    with pytest.raises(TrainingError, match="does not fit 8 devices") as caught:
        fit_mesh(parse_mesh(text), 8)
    proposals = caught.value.hint.removeprefix("meshes that fit: ").split("; ")
    assert len(proposals) == 3
    for proposal in proposals:
        assert fit_mesh(parse_mesh(proposal), 8)


def test_the_mesh_closest_to_the_wanted_one_is_proposed_first():
    with pytest.raises(TrainingError) as caught:
        fit_mesh(parse_mesh("data=1,fsdp=16,tensor=2"), 16)
    first = caught.value.hint.removeprefix("meshes that fit: ").split("; ")[0]
    assert first in ("data=1,fsdp=8,tensor=2", "data=1,fsdp=16")
