"""Two ways to run the same per-device function on many devices: jit over a mesh, and pmap.

Both give each device its rows and replicate the rest, so the numbers are the same. The mesh form is
`jit(shard_map(...))`: what is inside is written per device, which keeps every collective where the
step put it (one psum at the end), and out of the loops of attention and accumulation.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Sequence

import flax.jax_utils
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

PARALLEL_MODES = ("jit", "pmap")
AXIS = "data"


class Parallel:
    """Places arrays and compiles per-device functions over the data axis.

    Attributes:
      mode: "jit" (mesh) or "pmap".
      devices: the devices of the data axis.
    """

    def __init__(self, mode: str = "jit", devices: Sequence[jax.Device] | None = None):
        if mode not in PARALLEL_MODES:
            raise ValueError(f"parallel.mode: expected one of {PARALLEL_MODES}, got {mode!r}.")
        self.mode = mode
        self.devices = tuple(jax.devices() if devices is None else devices)
        self.mesh = Mesh(np.array(self.devices), (AXIS,), axis_types=(AxisType.Auto,))

    def check_batch(self, batch_size: int, accumulate: int = 1) -> None:
        """Refuses a batch that does not split over devices and micro-batches."""
        share = len(self.devices) * accumulate
        if batch_size % share:
            raise ValueError(
                f"data.batch_size: expected a multiple of devices x optimizer.accumulate = "
                f"{len(self.devices)} x {accumulate} = {share}, got {batch_size}."
            )

    def replicate(self, tree: Any) -> Any:
        """The same value on every device."""
        if self.mode == "pmap":
            return flax.jax_utils.replicate(tree, self.devices)
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def unreplicate(self, tree: Any) -> Any:
        """One copy of a replicated value."""
        return flax.jax_utils.unreplicate(tree) if self.mode == "pmap" else tree

    def shard(self, batch: Any) -> Any:
        """Splits this process's rows over its devices."""
        if self.mode == "pmap":
            local = jax.local_device_count() if jax.process_count() > 1 else len(self.devices)
            return jax.tree.map(lambda leaf: leaf.reshape(local, -1, *leaf.shape[1:]), batch)
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return jax.tree.map(
            functools.partial(jax.make_array_from_process_local_data, sharding), batch
        )

    def compile(
        self, function: Callable[..., Any], *, batch_argument: int, donate: tuple[int, ...] = ()
    ) -> Callable[..., Any]:
        """Compiles `function(*args, axis_name=...)`, whose argument `batch_argument` is sharded.

        Every other argument and every result is replicated.
        """
        function = functools.partial(function, axis_name=AXIS)
        if jax.config.jax_debug_nans:
            donate = ()  # What has made a NaN is run again, operation by operation.
        if self.mode == "pmap":
            return jax.pmap(
                function, axis_name=AXIS, devices=self.devices, donate_argnums=donate
            )

        def specs(count: int) -> tuple[PartitionSpec, ...]:
            return tuple(
                PartitionSpec(AXIS) if i == batch_argument else PartitionSpec()
                for i in range(count)
            )

        def mapped(*args):
            # check_vma=False: gradients inside stay per device, as under pmap, and the step's own
            # psum adds them; the checker would insert a second one.
            return jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=specs(len(args)),
                out_specs=PartitionSpec(),
                check_vma=False,
            )(*args)

        return jax.jit(mapped, donate_argnums=donate)
