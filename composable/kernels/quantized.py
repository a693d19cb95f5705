"""Matrices that are kept in fewer bytes than they are computed with, and products with them.

A matrix of int8 has one scale for each output; one of bfloat16 needs none. They are widened to
float32 where they are multiplied and never in memory, so a product reads a quarter or half of the
bytes. Rows and sums are float32. `multiply` and the other functions take ordinary arrays as well,
so that a model's code does not branch on how its weights are kept.

On a CPU, products run in the native kernel where there is one (`native.py`), whatever their shapes,
and so do those of one row and an ordinary matrix of float32: decoding waits for memory, which the
kernel reads on all cores. Elsewhere a loop widens a block of the matrix at a time.
XLA's CPU backend needs one: it widens the whole matrix in memory if the product is written as one,
and the matrices of all layers if that is in a scan.

References:
    Dettmers et al. 2022, arXiv:2208.07339 (int8 with a scale for each output).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import Array, lax

from composable.kernels.native import MULTIPLY, is_on_one_device, load_native

# Largest whole number of an int8 that has a negative.
_LARGEST: Final = 127
# Rows of a matrix that the portable path widens at a time.
_BLOCK: Final = 32
# From this many rows on, widening the whole matrix once costs little beside the product.
_MANY: Final = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantized:
    """A matrix, or a stack of them, that is kept as int8 or bfloat16.

    Attributes:
        values: The numbers, int8, or the bits of bfloat16 as uint16: XLA's CPU backend widens a
            whole array of bfloat16 to slice it.
        scale: Factor of each output, float32, with a dimension of size one for each that sums run
            over; None for bfloat16.

    Example:
        >>> w = quantize(jnp.ones((2, 3)), "I8", inputs=(0,))
        >>> w.shape, w.values.dtype.name, w.dtype.name, w.scale.shape
        ((2, 3), 'int8', 'float32', (1, 3))
    """

    values: Array
    scale: Array | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return tuple(self.values.shape)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """Type of the numbers that the matrix stands for."""
        return jnp.dtype(jnp.float32)

    def __getitem__(self, index: Any) -> Quantized:
        """Return some matrices of a stack, or rows of a matrix whose outputs they are."""
        taken: Quantized = jax.tree.map(lambda array: array[index], self)
        return taken

    def flatten(self, n_inputs: int) -> Quantized:
        """Return a matrix of two dimensions, the first `n_inputs` as one and the others as one."""
        values = self.values.reshape(math.prod(self.shape[:n_inputs]), -1)
        scale = None if self.scale is None else self.scale.reshape(1, -1)
        return Quantized(values=values, scale=scale)


Matrix = Array | Quantized


def quantize(w: Array, dtype: str, inputs: tuple[int, ...]) -> Quantized:
    """Return a matrix in fewer bytes.

    Args:
        w: The matrix.
        dtype: "I8", rounded to 255 levels for each output, or "BF16".
        inputs: Dimensions that products sum over.

    Example:
        >>> w = quantize(jnp.array([[1.0, 20.0], [-2.0, 10.0]]), "I8", inputs=(0,))
        >>> w.values.tolist()
        [[64, 127], [-127, 64]]
    """
    if dtype == "BF16":
        bits = lax.bitcast_convert_type(w.astype(jnp.bfloat16), jnp.uint16)
        return Quantized(values=bits, scale=None)
    largest = jnp.max(jnp.abs(w), axis=inputs, keepdims=True)
    scale = jnp.where(largest > 0, largest / _LARGEST, 1).astype(jnp.float32)
    return Quantized(values=jnp.rint(w / scale).astype(jnp.int8), scale=scale)


def quantize_like(w: Array, like: Matrix) -> Matrix:
    """Return a matrix as another one is kept, whose inputs are its first dimension.

    Example:
        >>> quantize_like(jnp.ones((2, 3)), jnp.ones((2, 3), jnp.bfloat16)).dtype.name
        'bfloat16'
    """
    if isinstance(like, Quantized):
        return quantize(w, "BF16" if like.scale is None else "I8", inputs=(0,))
    return w.astype(like.dtype)


def widen(w: Matrix) -> Array:
    """Return a matrix as an ordinary array; one that is not quantized as it is.

    Example:
        >>> w = quantize(jnp.array([[1.0], [-2.0]]), "BF16", inputs=(0,))
        >>> widen(w).tolist()
        [[1.0], [-2.0]]
    """
    if not isinstance(w, Quantized):
        return w
    wide = _to_float(w.values)
    return wide if w.scale is None else wide * w.scale


def multiply(x: Array, w: Matrix, *, few: int = 1) -> Array:
    """Return `x @ w`.

    Args:
        x: Rows.
        w: A matrix, whose inputs are its first dimension.
        few: Rows of float32 up to which an ordinary matrix is multiplied by the native kernel.

    Example:
        >>> w = quantize(jnp.array([[1.0], [-2.0]]), "I8", inputs=(0,))
        >>> round(float(multiply(jnp.array([[3.0, 1.0]]), w)[0, 0]), 2)
        1.02
    """
    if isinstance(w, Quantized):
        return _multiply(x, w, is_transposed=False)
    if are_few_rows(x, w, few):
        return _multiply_few(x, w, is_transposed=False)
    return x @ w


def multiply_transposed(x: Array, w: Matrix) -> Array:
    """Return `x @ w.T`.

    Args:
        x: Rows.
        w: A matrix, whose inputs are its second dimension.

    Example:
        >>> w = quantize(jnp.array([[1.0, 2.0]]), "BF16", inputs=(1,))
        >>> multiply_transposed(jnp.array([[3.0, 1.0]]), w).tolist()
        [[5.0]]
    """
    if isinstance(w, Quantized):
        return _multiply(x, w, is_transposed=True)
    if are_few_rows(x, w):
        return _multiply_few(x, w, is_transposed=True)
    return jnp.einsum("...D,VD->...V", x, w)


def are_few_rows(x: Array, w: Matrix, few: int = 1) -> bool:
    """Return whether an ordinary matrix is multiplied by few rows of float32, on one device.

    Then the speed of memory is the limit, which the native kernel reaches and XLA does not.

    Args:
        x: Rows.
        w: A matrix.
        few: The largest number of rows; the native kernel takes up to 4 at a time.

    Example:
        >>> w = jnp.ones((2, 3))
        >>> are_few_rows(jnp.ones((1, 1, 2)), w), are_few_rows(jnp.ones((5, 2)), w)
        (True, False)
    """
    if isinstance(w, Quantized) or not x.dtype == w.dtype == jnp.float32:
        return False
    return 1 <= math.prod(x.shape[:-1]) <= few and is_on_one_device()


def take_rows(w: Matrix, index: Array) -> Array:
    """Return rows of a matrix, as ordinary arrays.

    Example:
        >>> w = quantize(jnp.array([[1.0, 2.0], [3.0, 4.0]]), "BF16", inputs=(1,))
        >>> take_rows(w, jnp.array([1])).tolist()
        [[3.0, 4.0]]
    """
    return widen(w[index])


def group_leaves(leaves: tuple[Array, ...], n: int) -> tuple[Quantized, ...]:
    """Return `n` matrices from their arrays, as `jax.tree.leaves` returned these.

    Example:
        >>> w = quantize(jnp.ones((1, 2)), "I8", inputs=(0,))
        >>> len(group_leaves(tuple(jax.tree.leaves([w, w])), 2))
        2
    """
    if len(leaves) == n:
        return tuple(Quantized(values=values, scale=None) for values in leaves)
    pairs = zip(leaves[::2], leaves[1::2], strict=True)
    return tuple(Quantized(values=values, scale=scale) for values, scale in pairs)


def describe_products(platform: str) -> str:
    """Return how products with quantized matrices run on a platform, and why.

    Args:
        platform: As jax names it: "cpu", "tpu", "gpu".

    Example:
        >>> describe_products("gpu")
        'portable loop: the native kernel is for CPUs'
    """
    if platform != "cpu":
        return "portable loop: the native kernel is for CPUs"
    native = load_native()
    return f"{'native kernel' if native.is_loaded else 'portable loop'}: {native.reason}"


def _to_float(values: Array) -> Array:
    if values.dtype == jnp.int8:
        return values.astype(jnp.float32)
    return jnp.asarray(lax.bitcast_convert_type(values.astype(jnp.uint32) << 16, jnp.float32))


def _multiply(x: Array, w: Quantized, *, is_transposed: bool) -> Array:
    n_inputs, n_outputs = w.shape[::-1] if is_transposed else w.shape
    no_scale = jnp.zeros(0, jnp.float32)
    scale = no_scale if w.scale is None else w.scale.reshape(n_outputs)
    y = _product(x.astype(jnp.float32).reshape(-1, n_inputs), w.values, scale, is_transposed)
    return y.reshape(*x.shape[:-1], n_outputs).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x: Array, w: Array, scale: Array, is_transposed: bool) -> Array:
    """Return `(x w) scale`, or `(x w^T) scale`; an empty scale stands for none."""
    portable = functools.partial(_multiply_blocks, is_transposed=is_transposed)
    if not load_native().is_loaded:
        return portable(x, w, scale)
    native = functools.partial(_multiply_natively, is_transposed=is_transposed)
    y: Array = lax.platform_dependent(x, w, scale, cpu=native, default=portable)
    return y


def _forward(
    x: Array, w: Array, scale: Array, is_transposed: bool
) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, w, scale, is_transposed), (w, scale)


def _backward(
    is_transposed: bool, residuals: tuple[Array, Array], dy: Array
) -> tuple[Array, None, None]:
    """Return the gradient of the rows; matrices are frozen."""
    w, scale = residuals
    scaled = dy * scale if scale.size else dy
    return _product(scaled, w, scale[:0], not is_transposed), None, None


_product.defvjp(_forward, _backward)


def _multiply_few(x: Array, w: Array, *, is_transposed: bool) -> Array:
    """Return the product of few rows and an ordinary matrix."""
    y_MF = _few_product(x.reshape(-1, x.shape[-1]), w, is_transposed)
    return y_MF.reshape(*x.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _few_product(x_MD: Array, w: Array, is_transposed: bool) -> Array:
    def portable(x_MD: Array, w: Array) -> Array:
        return x_MD @ (w.T if is_transposed else w)

    def native(x_MD: Array, w: Array) -> Array:
        return _multiply_natively(x_MD, w, jnp.zeros(0), is_transposed=is_transposed)

    if not load_native().is_loaded:
        return portable(x_MD, w)
    y_MF: Array = lax.platform_dependent(x_MD, w, cpu=native, default=portable)
    return y_MF


def _few_forward(x_MD: Array, w: Array, is_transposed: bool) -> tuple[Array, tuple[Array, Array]]:
    return _few_product(x_MD, w, is_transposed), (x_MD, w)


def _few_backward(
    is_transposed: bool, residuals: tuple[Array, Array], dy_MF: Array
) -> tuple[Array, Array]:
    x_MD, w = residuals
    dw = dy_MF.T @ x_MD if is_transposed else x_MD.T @ dy_MF
    return _few_product(dy_MF, w, not is_transposed), dw


_few_product.defvjp(_few_forward, _few_backward)


def _multiply_natively(x: Array, w: Array, scale: Array, *, is_transposed: bool) -> Array:
    shape = (x.shape[0], w.shape[0 if is_transposed else 1])
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    call = jax.ffi.ffi_call(MULTIPLY, result, vmap_method="sequential")
    y: Array = call(x, w, scale, is_transposed=is_transposed)
    return y


def _multiply_blocks(x: Array, w: Array, scale: Array, *, is_transposed: bool) -> Array:
    """Return the product, block by block of the matrix's rows."""
    n_rows, height = x.shape[0], w.shape[0]
    n_outputs = height if is_transposed else w.shape[1]
    block = height if n_rows >= _MANY else min(_BLOCK, height)

    def add(y: Array, start: Array | int, size: int) -> Array:
        part = _to_float(lax.dynamic_slice_in_dim(w, start, size))
        if is_transposed:
            return lax.dynamic_update_slice_in_dim(y, x @ part.T, start, axis=1)
        return y + lax.dynamic_slice_in_dim(x, start, size, axis=1) @ part

    y = jnp.zeros((n_rows, n_outputs), jnp.float32)
    n_blocks = height // block
    y = lax.fori_loop(0, n_blocks, lambda i, y: add(y, i * block, block), y)
    if height % block:
        y = add(y, n_blocks * block, height % block)
    return y * scale if scale.size else y
