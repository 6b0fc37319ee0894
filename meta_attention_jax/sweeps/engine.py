"""Calls that are independent of each other, as tasks of a Ray cluster (extra `ray`).

A task has its devices and a process of its own. It is tried again when its worker or its machine dies, and has to go on
from what it finds. What a call has done is in files that all machines see: nothing is sent back but whether another
process was at it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from meta_attention_jax.fields import expect
from meta_attention_jax.training.interrupt import Interrupted, interruptible

RETRIES = 20
"""Deaths of its worker or machine that a task survives; one that kills its worker every time must come to an end."""

LOOK, PAUSE = 0.5, 10.0
"""Seconds between two looks for a signal; and before calls are tried again that another process was at."""


def connect(address: str | None, devices: int) -> dict[str, Any]:
    """Joins the Ray cluster at `address`, or starts one on this machine; what each task asks of it: `devices` TPUs or
    GPUs where a machine has some, else CPU cores. The machines have to be there already."""
    try:
        import ray
    except ModuleNotFoundError:
        raise ValueError(
            "engine: expected the package ray (extra ray: pip install 'ray>=2.60') for --engine=ray, got none."
        ) from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    jax.config.update("jax_platforms", "cpu")  # Of this process: the accelerators are the workers'.
    try:
        ray.init(address=address or "local", logging_level="error")
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"address: expected a Ray cluster that can be reached, got {address!r}: {reason}") from None
    has = {kind: max(int(node["Resources"].get(kind, 0)) for node in ray.nodes()) for kind in ("TPU", "GPU", "CPU")}
    kind = next((kind for kind in has if has[kind]), "CPU")
    expect(devices <= has[kind], "devices_per_group", f"at most the {has[kind]} {kind}s of a machine", devices)
    return {"resources": {"TPU": devices}} if kind == "TPU" else {f"num_{kind.lower()}s": devices}


def on_ray(work: Callable[..., Any], calls: Mapping[str, tuple[Any, ...]], asks: Mapping[str, Any]) -> list[str]:
    """work(*call) of all calls, in any order; what went wrong, by their names: one that fails stops no other. A call
    whose `work` returns true was at what another process does, and is made again, until that one is done or dead.

    Raises:
      Interrupted: SIGTERM or SIGINT, once all that run have saved and stopped.
    """
    import ray

    # A process for every call, for memory of devices and compiled programs go with it alone.
    task = ray.remote(max_calls=1, max_retries=RETRIES, **asks)(_in_worker)
    errors, left, cancelled = [], dict(calls), False
    with interruptible() as asked:
        while left and asked(0) is None:
            names = {task.remote(os.getcwd(), work, *call): name for name, call in left.items()}
            running, left = list(names), {}
            while running:
                done, running = ray.wait(running, timeout=LOOK)
                for ref in done:
                    try:
                        if ray.get(ref):
                            left[names[ref]] = calls[names[ref]]
                    except ray.exceptions.TaskCancelledError:
                        pass
                    except ray.exceptions.RayError as error:
                        errors.append(f"{names[ref]}: {_reason(error)}")
                        print(errors[-1], flush=True)
                if asked(0) is not None and not cancelled:  # Once: a second time, a worker stops without a save.
                    cancelled = True
                    for ref in running:
                        ray.cancel(ref)
            again = time.monotonic() + PAUSE
            while left and asked(0) is None and time.monotonic() < again:
                time.sleep(LOOK)
    return errors


def _in_worker(folder: str, work: Callable[..., Any], *call: Any) -> Any:
    os.chdir(folder)  # The call may have relative paths.
    try:
        return work(*call)
    except Interrupted as stop:
        if stop.signal != signal.SIGINT:  # Nobody cancelled it, the machine goes: Ray is to try again elsewhere.
            os._exit(1)
        raise


def _reason(error: Exception) -> str:
    """What a task failed of; a mistake is a sentence, a bug comes with its traceback."""
    cause = getattr(error, "cause", None)
    if cause is None:
        return f"expected a worker that lives, got {RETRIES + 1} that died ({type(error).__name__})."
    return str(cause if isinstance(cause, (ValueError, OSError)) else error)
