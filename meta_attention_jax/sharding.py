"""Fully sharded parameters: which axis of which leaf is split, and how a module gets whole leaves; and what runs on
every device's own rows when the caller has set a mesh.

Every matrix is split along one axis over the mesh axis "fsdp"; the optimizer's moments, which have the same paths, are
split alike. Inside `shard_map` a module gathers its own leaves when it reads them, one layer at a time, and the
transpose of that gather adds the gradients up and leaves each device its share:

    W = all_gather(W_i)        dL/dW_i = reduce_scatter_i(dL/dW)

Source: ZeRO stage 3 (arXiv 1910.02054).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, Optional

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from meta_attention_jax.types import Scalar

DATA, FSDP = "data", "fsdp"
AXES = (DATA, FSDP)
"""Mesh axes. The rows of a batch are split over both, parameters over the second."""

RULES: tuple[tuple[str, Optional[int]], ...] = (
    # The end of a leaf's path, and its split axis counted from the last, since scanned layers have
    # one more in front. Nearly all are of width D, so one divisor serves the model.
    (r"controller/.*hidden/kernel", -1),  # [D + 2, hidden]
    (r"controller/.*output/kernel", -2),  # [hidden, outputs]
    (r"embedding", -1),  # [V, D]
    (r"(query|key|value)/kernel", -3),  # [D, heads, d]
    (r"out/kernel", -1),  # [heads, d, D]
    (r"(gate|up)/kernel", -2),  # [D, F]
    (r"down/kernel", -1),  # [F, D]
    (r"", None),  # norms and biases: whole on every device
)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def split_axis(path: tuple[Any, ...]) -> Optional[int]:
    """The axis, from the last, along which the leaf at this path is split; None for not at all."""
    name = _name(path)
    return next(axis for rule, axis in RULES if re.search(rf"(^|/){rule}$" if rule else "", name))


def partition(tree: Any, axis_name: Optional[str] = FSDP) -> Any:
    """A `PartitionSpec` for every leaf of a state, of parameters, or of anything else (replicated); without the name of
    a mesh axis nothing is split."""

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        axis = None if axis_name is None else split_axis(path)
        if axis is None:
            return PartitionSpec()
        return PartitionSpec(*[None] * (leaf.ndim + axis), axis_name)

    return jax.tree_util.tree_map_with_path(spec, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(shard: Array, axis_name: str, axis: int, dtype: Any) -> Array:
    return jax.lax.all_gather(shard.astype(dtype), axis_name, axis=axis, tiled=True)


def _gather_forward(shard: Array, axis_name: str, axis: int, dtype: Any) -> tuple[Array, Array]:
    # Of the shard the backward pass wants the dtype alone.
    return _gather(shard, axis_name, axis, dtype), jnp.zeros((0,), shard.dtype)


def _gather_backward(axis_name: str, axis: int, dtype: Any, like: Array, cotangent: Array) -> tuple[Array]:
    # Added up in the parameter's own precision, whatever was gathered.
    cotangent = cotangent.astype(like.dtype)
    return (
        jax.lax.psum_scatter(cotangent, axis_name, scatter_dimension=axis, tiled=True),
    )


_gather.defvjp(_gather_forward, _gather_backward)


def gather(params: Any, axis_name: str, dtype: Optional[Any] = None) -> Any:
    """Whole leaves from the shards of a module's parameters, inside `shard_map` over `axis_name`.

    `dtype` is that which the module computes in (None: that of the leaves). Leaves that it casts anyway travel in it,
    so bfloat16 moves half the bytes and changes no number; controllers, which compute in float32 in part, as they are.
    """

    def whole(path: tuple[Any, ...], leaf: Array) -> Array:
        axis = split_axis(path)
        if axis is None:
            return leaf
        cast = leaf.dtype if dtype is None or "controller" in _name(path) else dtype
        return _gather(leaf, axis_name, leaf.ndim + axis, jnp.dtype(cast))

    return jax.tree_util.tree_map_with_path(whole, params)


def sum_gradients(gradients: Any, axis_names: Any, shard_axis: Optional[str]) -> Any:
    """Sum over all devices. What is split has been added up over the shard axis by its gather."""
    if shard_axis is None:
        return jax.lax.psum(gradients, axis_names)
    others = tuple(name for name in axis_names if name != shard_axis)
    return jax.tree_util.tree_map_with_path(
        lambda path, g: jax.lax.psum(g, axis_names if split_axis(path) is None else others), gradients
    )


def global_norm(tree: Any, shard_axis: Optional[str]) -> Scalar:
    """The root of the sum of squares of whole leaves, from their shards."""
    split = whole = jnp.float32(0.0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        square = jnp.sum(jnp.square(leaf)).astype(jnp.float32)
        if shard_axis is None or split_axis(path) is None:
            whole += square
        else:
            split += square
    if shard_axis is not None:
        whole += jax.lax.psum(split, shard_axis)
    return jnp.sqrt(whole)


def without_mesh(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as if its caller had set no mesh, for what places its arrays itself; not in `jit`."""

    @functools.wraps(function)
    def alone(*arguments: Any, **named: Any) -> Any:
        if jax.sharding.get_abstract_mesh().empty:
            return function(*arguments, **named)
        with jax.set_mesh(None):
            return function(*arguments, **named)

    return alone


def by_rows(
    function: Callable[..., Any], in_axes: tuple[Optional[int], ...], out_axes: Any = 0, *, split: bool = False
) -> Callable[..., Any]:
    """`function`, on every device for its own rows where a mesh with explicit axes is set.

    There the type of an array says how it is split, and much of what is in here, loops and distrax above all, has no
    rule for such types. The first argument with rows says over which mesh axes the rows are split; the other axes of
    all arguments are made whole. Without a mesh, and inside `shard_map`, this is `function` itself.

    Args:
      function: pure; a row of its results depends on this row of its arguments, and on what all share.
      in_axes: of every argument the axis of the rows; None where all rows share it.
      out_axes: of the results, as `vmap`'s; all have rows.
      split: for loops whose trip counts follow the data and which would communicate: on auto axes, whose types say
        nothing, splits the rows over as many axes as their number allows; the others do the same work again.
    """

    def mapped(*arguments: Any) -> Any:
        first, axis = next(
            (leaf, axis) for argument, axis in zip(arguments, in_axes, strict=True)
            if axis is not None for leaf in jax.tree.leaves(argument)
        )
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:  # Arrays can bring one along.
            mesh = jax.typeof(first).sharding.mesh
        if mesh.explicit_axes:
            names, over = mesh.explicit_axes, jax.typeof(first).sharding.spec[axis]
        elif split and any(mesh.shape[name] > 1 for name in mesh.auto_axes):
            names, over = mesh.auto_axes, _divisors(first.shape[axis], mesh)
        else:
            return function(*arguments)

        def spec(axis: Optional[int]) -> PartitionSpec:
            return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, over)

        specs = tuple(spec(axis) for axis in in_axes)
        if mesh.explicit_axes:
            arguments = jax.sharding.reshard(arguments, tuple(NamedSharding(mesh, one) for one in specs))
        # check_vma=False: all sums over devices are the transpose's, which needs no types for them.
        return jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=jax.tree.map(spec, out_axes),
            axis_names=set(names), check_vma=False,
        )(*arguments)

    return mapped


def _divisors(rows: int, mesh: AbstractMesh) -> tuple[str, ...]:
    """The auto axes that this number of rows splits over evenly, the first ones first."""
    found = []
    for name in mesh.auto_axes:
        if mesh.shape[name] > 1 and rows % mesh.shape[name] == 0:
            found.append(name)
            rows //= mesh.shape[name]
    return tuple(found)
