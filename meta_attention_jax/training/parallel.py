"""Two ways to run the same per-device function on many devices: jit over a mesh, and pmap.

Both give each device its rows; the numbers are the same. The mesh form is `jit(shard_map(...))`: what is inside is
written per device, which keeps every collective where the step put it (sums at the end, and the gathers of `sharding`
where parameters are split), and out of the loops of attention and accumulation.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Optional

import flax.jax_utils
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from meta_attention_jax.config import SCHEMA
from meta_attention_jax.fields import expect
from meta_attention_jax.sharding import AXES, DATA, FSDP, partition

PARALLEL_MODES = SCHEMA["parallel.mode"].choices


_cores = False  # Whether the CPU's devices are those of `device_per_core`.


def cores() -> int:
    """CPU cores that this process may use: its own, by a container's part of all."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # "max" is all.
        quota, period = pathlib.Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(round(int(quota) / int(period)), 1))
    return count


def device_per_core(most: Optional[int] = None) -> None:
    """Makes a device of every one of the `cores` (`most` of them), for the points of a sweep (`for_points`); a run by
    itself still has one. To be called before JAX has devices; changes nothing where it has, or where XLA_FLAGS or
    jax_num_cpu_devices say how many CPU devices there are."""
    global _cores
    if jax.config.jax_num_cpu_devices >= 0 or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    with contextlib.suppress(RuntimeError):  # There are devices.
        jax.config.update("jax_num_cpu_devices", min(cores(), most or cores()))
        _cores = True


def for_run() -> list[jax.Device]:
    """The devices that a run may have: all, of CPU cores one."""
    found = jax.devices()
    return found[:1] if _cores and found[0].platform == "cpu" else found


def for_points(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """The devices that points of one program share, where each alone would have these: of CPU cores all."""
    return jax.devices() if _cores and devices[0].platform == "cpu" else list(devices)


class Parallel:
    """Places arrays and compiles per-device functions over all devices of all processes, by "jit" (mesh of data x fsdp)
    or "pmap" (data alone)."""

    def __init__(self, mode: str = "jit", devices: Sequence[jax.Device] | None = None, fsdp: int = 1):
        expect(mode in PARALLEL_MODES, "parallel.mode", f"one of {PARALLEL_MODES}", mode)
        self.mode = mode
        self.devices = tuple(for_run() if devices is None else devices)
        divides = fsdp >= 1 and len(self.devices) % fsdp == 0
        expect(divides, "parallel.fsdp", f"a divisor of the {len(self.devices)} devices", fsdp)
        several = len({device.process_index for device in self.devices}) > 1
        what = "several processes" if several else f"parallel.fsdp = {fsdp}"
        expect(mode != "pmap" or (fsdp == 1 and not several), "parallel.mode", f"'jit' with {what}", mode)
        # The mesh axis that parameters and moments are split over; None where each device has all of them.
        self.shard_axis: Optional[str] = FSDP if fsdp > 1 else None
        shape = (len(self.devices) // fsdp, fsdp)
        # Auto: Linen and distrax do not know explicit axes.
        kinds = (AxisType.Auto,) * 2
        try:  # Neighbours on a TPU's wires, where its shape allows.
            self.mesh = jax.make_mesh(shape, AXES, axis_types=kinds, devices=self.devices)
        except (NotImplementedError, ValueError):
            self.mesh = Mesh(np.array(self.devices).reshape(shape), AXES, axis_types=kinds)

    def check_batch(self, batch_size: int, accumulate: int = 1) -> None:
        """Refuses a batch that does not split over devices and micro-batches."""
        share = len(self.devices) * accumulate
        product = f"{len(self.devices)} x {accumulate} = {share}"
        expect(batch_size % share == 0, "data.batch_size", f"a multiple of devices x optimizer.accumulate = {product}",
               batch_size)

    @property
    def _rows(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(AXES))

    def rows(self, batch_size: int) -> np.ndarray:
        """Numbers of the rows of a batch that this process gives to its devices, in order."""
        if self.mode == "pmap":
            return np.arange(batch_size)
        places = self._rows.addressable_devices_indices_map((batch_size,))
        numbers = [np.arange(batch_size)[index] for index, in places.values()]
        return np.sort(np.concatenate(numbers))

    def shardings(self, tree: Any) -> Any:
        """Where `place` puts each leaf, with a mesh."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), partition(tree, self.shard_axis))

    def place(self, tree: Any) -> Any:
        """States, parameters and hypers, the same in every process: split by `sharding.RULES` where there is a shard
        axis, the rest whole on every device."""
        if self.mode == "pmap":
            return flax.jax_utils.replicate(tree, self.devices)
        shardings = self.shardings(tree)
        if jax.process_count() == 1:
            return jax.device_put(tree, shardings)

        def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
            if getattr(leaf, "sharding", None) == sharding:
                return leaf
            host = np.asarray(leaf)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

        return jax.tree.map(put, tree, shardings)

    def make(self, function: Callable[..., Any], *args: Any) -> Any:
        """`place(function(*args))`, compiled so that with a mesh nothing is ever whole in one place."""
        if self.mode == "pmap":
            return self.place(function(*args))
        shardings = self.shardings(jax.eval_shape(function, *args))
        return jax.jit(function, out_shardings=shardings)(*args)

    def unreplicate(self, tree: Any) -> Any:
        """One copy of what pmap has on every device; a mesh's arrays as they are."""
        return flax.jax_utils.unreplicate(tree) if self.mode == "pmap" else tree

    def shard(self, batch: Any) -> Any:
        """The whole batch over all devices, from this process's rows (`rows`)."""
        here = [d for d in self.devices if d.process_index == jax.process_index()]
        if self.mode == "pmap":
            return jax.tree.map(lambda leaf: leaf.reshape(len(here), -1, *leaf.shape[1:]), batch)
        local = len(jax.tree.leaves(batch)[0])
        total = local * len(self.devices) // len(here)
        numbers = self.rows(total)

        def put(leaf: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                rows = np.arange(total)[index[0]]
                first = int(np.searchsorted(numbers, rows[0]))
                return leaf[first : first + len(rows)]

            return jax.make_array_from_callback((total, *leaf.shape[1:]), self._rows, part)

        return jax.tree.map(put, batch)

    def compile(
        self,
        function: Callable[..., Any],
        *,
        batch_argument: int,
        state_argument: Optional[int] = None,
        donate: tuple[int, ...] = (),
    ) -> Callable[..., Any]:
        """Compiles `function(*args, axis_name=...)`, whose argument `batch_argument` is split by rows. Every other
        argument is placed as by `place`. Every result is the same on all devices, but for the first of several where
        `state_argument` is given: that is a new one of this argument."""
        function = functools.partial(function, axis_name=DATA if self.mode == "pmap" else AXES)
        if jax.config.jax_debug_nans:
            donate = ()  # What has made a NaN is run again, operation by operation.
        if self.mode == "pmap":
            return jax.pmap(function, axis_name=DATA, devices=self.devices, donate_argnums=donate)

        def mapped(*args):
            specs = [
                PartitionSpec(AXES) if i == batch_argument else partition(arg, self.shard_axis)
                for i, arg in enumerate(args)
            ]
            out = PartitionSpec()
            # check_vma=False: gradients inside stay per device, as under pmap, and the step's own
            # psum adds them; the checker would insert a second one.
            return jax.shard_map(
                function, mesh=self.mesh, in_specs=tuple(specs),
                out_specs=out if state_argument is None else (specs[state_argument], out), check_vma=False,
            )(*args)

        return jax.jit(mapped, donate_argnums=donate)
