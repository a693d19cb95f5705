"""The contract: dimension key, router interface, expert signatures, digests. NumPy at most."""

from composable.interface.classes import hash_classes
from composable.interface.contract import BODY_KINDS, BodyKind, RouterInterface, TensorSpec
from composable.interface.digest import canonical_json, digest_bytes, digest_tensors, is_digest
from composable.interface.dims import DIMS
from composable.interface.settings import (
    DiscountedRecord,
    MixRule,
    OutputMixture,
    RouterSettings,
    SwitchingFilter,
    byte_router,
    subword_router,
)
from composable.interface.signature import body_signature, scout_signature, statistics_signature

__all__ = [
    "BODY_KINDS",
    "DIMS",
    "BodyKind",
    "DiscountedRecord",
    "MixRule",
    "OutputMixture",
    "RouterInterface",
    "RouterSettings",
    "SwitchingFilter",
    "TensorSpec",
    "body_signature",
    "byte_router",
    "canonical_json",
    "digest_bytes",
    "digest_tensors",
    "hash_classes",
    "is_digest",
    "scout_signature",
    "statistics_signature",
    "subword_router",
]
