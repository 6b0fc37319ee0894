"""The programs of a config, compiled ahead of time for devices that need not be there."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from meta_attention_jax.model import LanguageModel
from meta_attention_jax.sharding import AXES, split_axis
from meta_attention_jax.training import build
from meta_attention_jax.training.backbone import merge, trained
from meta_attention_jax.training.parallel import Parallel
from meta_attention_jax.training.step import in_controller, init_state
from meta_attention_jax.types import Batch


def abstract_batch(rows: int, time: int) -> Batch:
    """Shapes and types of a batch."""
    ids = jax.ShapeDtypeStruct((rows, time), jnp.int32)
    return Batch(
        tokens=ids, targets=ids, segment_ids=ids, positions=ids,
        loss_mask=jax.ShapeDtypeStruct((rows, time), jnp.bool_), kind=ids, num_bytes=ids,
        row=jax.ShapeDtypeStruct((rows,), jnp.int32),
    )


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def abstract_state(config: ConfigDict, vocab_size: int) -> Any:
    """Shapes and types of a training state."""
    spec = build.spec_for(config, vocab_size, 1)
    one = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_batch(1, config.data.sequence_length))
    hypers = build.build_hypers(config)
    return jax.eval_shape(lambda: init_state(spec, jax.random.key(0), one, hypers))


def abstract_frozen(config: ConfigDict, vocab_size: int) -> Any:
    """Shapes and types of a published model; None without one."""
    if not config.retrofit.backbone:
        return None
    spec = dataclasses.replace(build.spec_for(config, vocab_size, 1), frozen=False)
    one = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_batch(1, config.data.sequence_length))
    hypers = build.build_hypers(config)
    params = jax.eval_shape(lambda: init_state(spec, jax.random.key(0), one, hypers)).params
    own = flatten_dict(trained(params))
    return unflatten_dict({path: leaf for path, leaf in flatten_dict(params).items() if path not in own})


def lower_train(config: ConfigDict, devices: Sequence[jax.Device], vocab_size: int, *, packed: bool = False) -> Any:
    """The step that `loop.train` runs on these devices, real ones or those of `jax.experimental.topologies`, lowered;
    `compile()` is left to do. `packed`: that after the gate has ended, with packed dispatch."""
    parallel = build.check_parallel(config, devices)
    spec = build.spec_for(config, vocab_size, 1)
    spec = build.packed_spec(config, spec) if packed else spec
    state, frozen = abstract_state(config, vocab_size), abstract_frozen(config, vocab_size)
    hypers = jax.eval_shape(lambda: build.build_hypers(config))
    batch = abstract_batch(config.data.batch_size, config.data.sequence_length)
    rows = NamedSharding(parallel.mesh, PartitionSpec(AXES))
    return build.compile_step(parallel, spec).lower(
        _placed(state, parallel.shardings(state)), _placed(batch, jax.tree.map(lambda _: rows, batch)),
        _placed(hypers, parallel.shardings(hypers)), _placed(frozen, parallel.shardings(frozen)),
    )


def lower_decode(config: ConfigDict, devices: Sequence[jax.Device], vocab_size: int) -> Any:
    """One more token for every row of a batch, hard, from a cache of `data.sequence_length` tokens. Parameters are
    whole on every device and rows split over all, so nothing has to be sent."""
    mesh = Parallel("jit", devices).mesh
    rows = config.data.batch_size
    if rows % len(devices):
        raise ValueError(f"data.batch_size: expected a multiple of the {len(devices)} devices, got {rows}.")
    model = build.build_model(config, vocab_size).clone(mode="hard")
    params = merge(abstract_frozen(config, vocab_size), abstract_state(config, vocab_size).params)
    hypers = jax.eval_shape(lambda: build.build_hypers(config)).routing
    cache = jax.eval_shape(lambda: model.init_cache(rows, config.data.sequence_length))
    token = jax.ShapeDtypeStruct((rows,), jnp.int32)
    by_row, by_second = PartitionSpec(AXES), PartitionSpec(None, AXES)
    step = jax.shard_map(
        functools.partial(_decode_step, model), mesh=mesh,
        in_specs=(PartitionSpec(), by_second, by_row, PartitionSpec()), out_specs=(by_second, by_row), check_vma=False,
    )

    def placed(tree, spec):
        return _placed(tree, jax.tree.map(lambda _: NamedSharding(mesh, spec), tree))

    return jax.jit(step, donate_argnums=1).lower(
        placed(params, PartitionSpec()), placed(cache, by_second), placed(token, by_row),
        placed(hypers, PartitionSpec()),
    )


def _decode_step(model: LanguageModel, params: Any, cache: Any, token: Any, hypers: Any) -> Any:
    cache, out = model.apply({"params": params}, cache, token, hypers=hypers, method="decode")
    return cache, out.logits


def training_bytes(config: ConfigDict, devices: Sequence[jax.Device], vocab_size: int) -> dict[str, int]:
    """Bytes of a training step on one device, by what takes them; a model, to be held against the compiler's count.
    With b rows of a micro-batch per device, P parameters and a width of e bytes:

      state           parameters and two moments in float32: 12 P / fsdp, what is not split whole
      gradients       4 P / fsdp
      saved           the stream before every layer, e L b T D (a layer's inside is computed anew; without
                      remat it would be saved as well, and this is a lower bound)
      logits          float32 and their gradient: 8 b T V
      embedding       gathered, and its gradient: (e + 4) V D; only the gradient, shared, if not split
      published       in the place of the last, where there is one: it has no gradient
    """
    parallel = build.check_parallel(config, devices)
    state = abstract_state(config, vocab_size)

    def held(tree: Any) -> int:
        shardings = parallel.shardings(tree)
        sizes = jax.tree.map(lambda x, s: int(np.prod(s.shard_shape(x.shape))) * x.dtype.itemsize, tree, shardings)
        return sum(jax.tree.leaves(sizes))

    rows = config.data.batch_size // (len(devices) * config.optimizer.accumulate)
    tokens, dim = rows * config.data.sequence_length, config.model.model_dim
    width = jnp.dtype(config.model.dtype).itemsize
    split = parallel.shard_axis is not None
    frozen = abstract_frozen(config, vocab_size)
    if frozen is None:
        rest = {"embedding": (width + 4 if split else width) * vocab_size * dim}
    else:
        rest = {"published": held(frozen)}
    return {
        "state": held(state.replace(key=jax.ShapeDtypeStruct((2,), jnp.uint32))),
        "gradients": held(state.params),
        "saved": width * config.model.num_layers * tokens * dim,
        "logits": 8 * tokens * vocab_size,
        **rest,
    }


def gathered_bytes(config: ConfigDict, vocab_size: int) -> int:
    """Bytes of parameters that one training step has to gather on every device, and no more: each split matrix once per
    micro-batch, those of layers twice with remat, in the dtype that `sharding.gather` sends."""
    if config.parallel.fsdp == 1:
        return 0
    width = jnp.dtype(config.model.dtype).itemsize
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_state(config, vocab_size).params):
        if split_axis(path) is None:
            continue
        own = leaf.dtype.itemsize if in_controller(path) else width
        in_layer = path[0].key != "embedding"
        total += leaf.size * own * (2 if config.model.remat and in_layer else 1)
    return total * config.optimizer.accumulate


def lower_forward(config: ConfigDict, vocab_size: int, device: jax.Device, time: int) -> Any:
    """The forward pass of one sequence of `time` tokens on one device, layers unrolled, lowered."""
    unrolled = config.copy_and_resolve_references()
    unrolled.model.scan_layers = unrolled.model.remat = False
    model = build.build_model(unrolled, vocab_size)
    tokens = jax.ShapeDtypeStruct((1, time), jnp.int32)
    hypers = jax.eval_shape(lambda: build.build_hypers(config)).routing
    params = jax.eval_shape(
        lambda hypers: model.init(jax.random.key(0), jnp.zeros((1, time), jnp.int32), hypers=hypers), hypers
    )["params"]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def forward(params, tokens, hypers):
        return model.apply({"params": params}, tokens, hypers=hypers).logits

    arguments = (params, tokens, hypers)
    return jax.jit(forward).lower(*_placed(arguments, jax.tree.map(lambda _: sharding, arguments)))
