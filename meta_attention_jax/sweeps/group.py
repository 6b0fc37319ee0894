"""The compiled programs of runs that differ in array inputs alone, and the memory that they need."""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Optional

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from meta_attention_jax.objective import summarise
from meta_attention_jax.training.backbone import merge
from meta_attention_jax.training.evaluation import eval_step, in_both_modes, sum_batches
from meta_attention_jax.training.job import Job
from meta_attention_jax.training.step import TrainState, init_state, train_step

POINTS = "points"


def stack(trees: Sequence[Any]) -> Any:
    """Trees of arrays of one shape as one with a leading axis of points, on the host."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def point_of(tree: Any, index: int) -> Any:
    """The tree of one point, [point ...] -> [...]."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def to_host(tree: Any) -> Any:
    """As NumPy arrays, typed keys as their data."""
    return jax.tree.map(lambda leaf: np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf), tree)


def device_bytes(device: jax.Device) -> Optional[int]:
    """Memory that a device has in all, or the host has free for CPU devices; None if it does not say."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    # Not MemFree: the page cache of a corpus just read can be had back.
    free = next((1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable:")), None)
    group = pathlib.Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        used = int((group / "memory.current").read_text())
        for line in (group / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                used -= int(line.split()[1])
        left = int((group / "memory.max").read_text()) - used
        free = left if free is None else min(free, left)
    return free


def points_that_fit(needed: int, one: int, points: int, memory: int) -> int:
    """How many points a device may train at once, 1 to `points` (at least 2): the rest of its `memory` over a point's
    bytes, from the bytes `needed` by a program of all and of `one`."""
    each = max((needed - one) / (points - 1), 1.0)
    return min(max(1 + int((memory - one) / each), 1), points)


def bytes_needed(compiled: Any) -> int:
    """Arguments, results and temporaries of a compiled program per device, by the compiler's count."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def in_turn(function: Callable[..., Any], in_axes: Sequence[Optional[int]]) -> Callable[..., Any]:
    """`jax.vmap` along axes 0 as a loop, one point after another."""

    def mapped(*args: Any) -> Any:
        def one(own: Any) -> Any:
            left = iter(own)
            return function(*(arg if axis is None else next(left) for arg, axis in zip(args, in_axes)))

        return jax.lax.map(one, [arg for arg, axis in zip(args, in_axes) if axis is not None])

    return mapped


class Group:
    """The compiled programs of a group of points, of one `space.program`, and on which of the devices each lies.
    `turns`: points of one device take turns within a program; None: on CPUs, whose caches a point alone fits, and which
    have no use for larger operations."""

    def __init__(self, jobs: Sequence[Job], devices: Sequence[jax.Device], turns: Optional[bool] = None):
        self.jobs = list(jobs)
        self.turns = devices[0].platform == "cpu" if turns is None else turns
        self.spec = jobs[0].spec
        self.fixed = jobs[0].config.controller.name == "fixed"  # The routes are.
        self.modes = ("soft",) if self.fixed else ("soft", "hard")  # To evaluate: of a fixed route one is enough.
        each = -(-len(jobs) // len(devices))
        devices = list(devices)[: -(-len(jobs) // each)]  # More would not be done sooner.
        # All have as many: the last point is trained as often as needed.
        rows = each * len(devices)
        self.padded = [*self.jobs, *([self.jobs[-1]] * (rows - len(jobs)))]
        self.mesh = Mesh(np.array(devices), (POINTS,), axis_types=(AxisType.Auto,))
        self.frozen = self.replicate(jobs[0].frozen)
        self.hypers = self.place(stack([job.hypers for job in self.padded]))
        self._keys = [job.config.seed for job in self.padded]
        fresh = functools.partial(init_state, self.spec, batch=self.jobs[0].dataset.train_batch(0))
        self._initialise = self.over_points(lambda key, hypers: fresh(key, hypers=hypers), (), 2)
        self._evaluations: dict[str, Any] = {}

    def place(self, tree: Any) -> Any:
        """[point ...] arrays on the devices of their points."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec(POINTS)))

    def replicate(self, tree: Any) -> Any:
        """The same on every device."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def over_points(self, function: Any, shared: Sequence[int], count: int, donate: tuple[int, ...] = ()) -> Any:
        """jit over points, of vmap or `in_turn`; arguments `shared` of `count` are the same for all."""
        axes = tuple(None if i in shared else 0 for i in range(count))
        specs = tuple(PartitionSpec() if i in shared else PartitionSpec(POINTS) for i in range(count))
        over = in_turn if self.turns else jax.vmap
        mapped = jax.shard_map(
            over(function, in_axes=axes), mesh=self.mesh, in_specs=specs, out_specs=PartitionSpec(POINTS),
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=donate)

    def states(self) -> TrainState:
        """Fresh states, [point ...], each made where it stays: that of its seed alone."""
        states = self._initialise(self._seeds(), self.hypers)
        if any(job.initial is not None for job in self.jobs):
            drawn = to_host(states.params)
            params = [
                point_of(drawn, index) if job.initial is None else merge(point_of(drawn, index), to_host(job.initial))
                for index, job in enumerate(self.padded)
            ]
            states = states.replace(params=self.place(stack(params)))
        return states

    def abstract_states(self) -> TrainState:
        """Shapes, types and places of `states`; nothing is allocated."""
        shapes = jax.eval_shape(self._initialise, self._seeds(), self.hypers)
        sharding = NamedSharding(self.mesh, PartitionSpec(POINTS))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)

    def abstract_point(self) -> TrainState:
        """The same of one point alone, on the first device."""
        sharding = SingleDeviceSharding(self.mesh.devices.flat[0])
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding), self.abstract_states()
        )

    def from_host(self, states: Sequence[TrainState]) -> TrainState:
        """States of the jobs as `to_host` gives them -> [point ...] on the devices of their points."""
        states = [*states, *([states[-1]] * (len(self.padded) - len(states)))]
        return jax.tree.map(
            lambda leaf, like: jax.random.wrap_key_data(leaf) if _is_key(like) else leaf,
            self.place(stack(states)), self.abstract_states(),
        )

    def _seeds(self) -> jax.Array:
        return self.place(jnp.stack([jax.random.key(seed) for seed in self._keys]))

    @functools.cached_property
    def step(self) -> Any:
        """The compiled training step of all points, (states, batch, hypers, frozen) -> (states, metrics)."""
        step = self.over_points(functools.partial(train_step, self.spec), (1, 3), 4, donate=(0,))
        batch = self.replicate(self.jobs[0].dataset.train_batch(0))
        return step.lower(self.abstract_states(), batch, self.hypers, self.frozen).compile()

    def evaluation(self, mode: str) -> Any:
        """The compiled evaluation of all points, (params, batch, hypers, frozen) -> sums."""
        if mode not in self._evaluations:
            dataset = self.jobs[0].dataset
            model = self.spec.model.clone(mode=mode, dispatch="dense")
            measure = functools.partial(eval_step, model, dataset.num_kinds)

            def of_point(params, batch, hypers, frozen):
                return measure(merge(frozen, params), batch, hypers)

            step = self.over_points(of_point, (1, 3), 4)
            batch = self.replicate(dataset.train_batch(0))
            params = self.abstract_states().params
            self._evaluations[mode] = step.lower(params, batch, self.hypers.routing, self.frozen).compile()
        return self._evaluations[mode]

    def needed(self) -> int:
        """Bytes per device: of a step, or of an evaluation beside the states it leaves alone."""
        resting = self.abstract_states().replace(params=None)
        resting = sum(x.dtype.itemsize * x.size for x in jax.tree.leaves(resting)) // self.mesh.size
        return max(bytes_needed(self.step), *(resting + bytes_needed(self.evaluation(mode)) for mode in self.modes))

    def evaluate(self, states: TrainState) -> list[dict[str, Any]]:
        """What `loop` logs of an evaluation, for every point."""
        config, dataset = self.jobs[0].config, self.jobs[0].dataset
        sums: dict[str, Any] = {}
        for mode in self.modes:
            step = self.evaluation(mode)
            batches = dataset.eval_batches("validation", max_batches=config.train.eval_batches)
            sums[mode] = jax.device_get(sum_batches(
                lambda batch: step(states.params, self.replicate(batch), self.hypers.routing, self.frozen), batches
            ))
        return [
            in_both_modes(self.fixed, lambda mode: self.report(index, sums[mode])) for index in range(len(self.jobs))
        ]

    def report(self, index: int, sums: Any, **scalars: Any) -> dict[str, Any]:
        """Metrics of one point from the sums of all."""
        job = self.jobs[index]
        return summarise(
            point_of(sums, index), mechanisms=tuple(job.config.model.mechanisms),
            costs=jax.device_get(job.hypers.routing.costs), **scalars,
        )
