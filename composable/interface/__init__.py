"""The contract: dimension key, router interface, expert signatures, digests. NumPy at most."""

from composable.interface.classes import hash_classes
from composable.interface.contract import BODY_KINDS, BodyKind, RouterInterface, TensorSpec
from composable.interface.digest import canonical_json, digest_bytes, digest_tensors, is_digest
from composable.interface.dims import DIMS
from composable.interface.signature import body_signature, scout_signature

__all__ = [
    "BODY_KINDS",
    "DIMS",
    "BodyKind",
    "RouterInterface",
    "TensorSpec",
    "body_signature",
    "canonical_json",
    "digest_bytes",
    "digest_tensors",
    "hash_classes",
    "is_digest",
    "scout_signature",
]
