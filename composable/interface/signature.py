"""The tensors that an expert's files must contain: names, shapes and dtypes, from the interface.

Tensor names are the on-disk format; renaming one is a major version.
"""

from __future__ import annotations

from typing import Final

from composable.errors import InterfaceError
from composable.interface.contract import SLOT_DIMS, BodyKind, RouterInterface, TensorSpec
from composable.interface.dims import shape_of

# Eigenvectors that statistics keep of a Gram matrix, and singular vectors of a gradient, at most.
GRAM_RANK: Final = 16
GRADIENT_RANK: Final = 4


def body_signature(
    interface: RouterInterface, kind: BodyKind, rank: int | None = None
) -> dict[str, TensorSpec]:
    """Return the tensors of a body, by name.

    A `ffn` body replaces the matrices of every slot: `slots.4.w_up`. A `lora` body adds a product
    of rank R to each of them: `slots.4.w_up.a` and `slots.4.w_up.b`.

    Args:
        interface: The contract.
        kind: "ffn" or "lora".
        rank: Rank R of a `lora` body; None for `ffn`.

    Raises:
        InterfaceError: For an unknown kind, or a rank that is missing or out of bounds.

    Example:
        >>> from composable.packaging.manifests.backbone_folder import find_backbone, read_interface
        >>> interface = read_interface(find_backbone("tiny-bytes"))
        >>> specs = body_signature(interface, "lora", rank=4)
        >>> next(name for name in specs if name.endswith("w_up.a"))
        'slots.2.w_up.a'
    """
    sizes = {"D": interface.d_model, "F": interface.d_ff}
    if kind == "ffn":
        return {
            f"slots.{layer}.{matrix}": TensorSpec(shape=shape_of(dims, sizes))
            for layer in interface.slots
            for matrix, dims in SLOT_DIMS.items()
        }
    if kind != "lora":
        raise InterfaceError(f"{kind!r} is not a body kind (ffn, lora)", where="body.kind")
    if rank is None or not 1 <= rank <= interface.lora_max_rank:
        raise InterfaceError(
            f"{rank!r} is not a rank between 1 and {interface.lora_max_rank}", where="body.rank"
        )
    sizes["R"] = rank
    return {
        f"slots.{layer}.{matrix}.{part}": TensorSpec(shape=shape_of(letters, sizes))
        for layer in interface.slots
        for matrix, dims in SLOT_DIMS.items()
        for part, letters in (("a", dims[0] + "R"), ("b", "R" + dims[1]))
    }


def scout_signature(interface: RouterInterface, width: int) -> dict[str, TensorSpec]:
    """Return the tensors of a scout, by name.

    Args:
        interface: The contract.
        width: Hidden width W.

    Raises:
        InterfaceError: For a width that the interface does not allow.

    Example:
        >>> from composable.packaging.manifests.backbone_folder import find_backbone, read_interface
        >>> interface = read_interface(find_backbone("tiny-bytes"))
        >>> scout_signature(interface, 32)["b_in"].shape
        (32,)
    """
    if not 1 <= width <= interface.scout_max_width:
        raise InterfaceError(
            f"{width!r} is not a width between 1 and {interface.scout_max_width}",
            where="scout.width",
        )
    sizes = {"D": interface.d_model, "W": width, "C": interface.n_classes}
    dims = {"w_in": "DW", "b_in": "W", "w_out": "WC", "b_out": "C"}
    return {name: TensorSpec(shape=shape_of(letters, sizes)) for name, letters in dims.items()}


def statistics_signature(interface: RouterInterface, width: int) -> dict[str, TensorSpec]:
    """Return the tensors of the statistics that may accompany an expert, by name.

    For each matrix of the body as it acts in a slot, whatever its kind, and of the scout, whose
    bias is one more row: `NAME.gram`, `NAME.rest`, `NAME.rows`, `NAME.columns`, `NAME.gradient_a`
    and `NAME.gradient_b`, with the meanings that `composable.merging.statistics` gives.

    Args:
        interface: The contract.
        width: Hidden width W of the scout.

    Example:
        >>> from composable.packaging.manifests.backbone_folder import find_backbone, read_interface
        >>> interface = read_interface(find_backbone("tiny-bytes"))
        >>> statistics_signature(interface, 64)["scout.w_in.gram"].shape
        (193, 16)
    """
    body = body_signature(interface, "ffn")
    matrices = {f"body.{name}": spec.shape for name, spec in body.items()}
    matrices["scout.w_in"] = (interface.d_model + 1, width)
    matrices["scout.w_out"] = (width + 1, interface.n_classes)
    specs = {}
    for name, (rows, columns) in matrices.items():
        rank = min(GRADIENT_RANK, rows, columns)
        shapes = {
            "gram": (rows, min(GRAM_RANK, rows)),
            "rest": (rows,),
            "rows": (rows,),
            "columns": (columns,),
            "gradient_a": (rows, rank),
            "gradient_b": (rank, columns),
        }
        for part, shape in shapes.items():
            specs[f"{name}.{part}"] = TensorSpec(shape=shape, dtypes=("BF16",))
    return specs
