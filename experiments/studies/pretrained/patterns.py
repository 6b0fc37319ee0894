"""Patterns that no controller makes: layers, heads, tables."""

from __future__ import annotations

import numpy as np

from experiments.studies.pretrained import arms, local, plan
from experiments.studies.pretrained.material import Window
from experiments.studies.pretrained.study import Job, Study
from meta_attention_jax.console import say


def read_all(study: Study, count: int) -> None:
    """Every k-th layer, the best layers (an order for each task, and one for all), the best KV heads, tables by token
    id and by position."""
    reader, layers = study.reader, study.reader.layers
    config = reader.model.config

    def ranked() -> dict[str, list[int]]:
        of = lambda kind, number: study.material.windows(kind, "validation", number)  # noqa: E731
        ranked_by = {kind: of(kind, 6) for kind in plan.MAIN}
        ranked_by["lookup1"] = of("lookup1", 4) + of("lookup4", 4)  # An answer is two tokens or three.
        lost = {kind: arms.rank_layers(reader, windows) for kind, windows in ranked_by.items()}
        positive = [np.maximum(values, 0) for values in lost.values()]
        lost["one"] = sum(values / values.sum() for values in positive)
        return {kind: [int(i) for i in np.argsort(-values, kind="stable")] for kind, values in lost.items()}

    order = study.record.choose("layers", ranked)
    heads = study.record.choose("heads", lambda: [int(i) for i in np.argsort(
        -arms.rank_heads(reader, study.material.mixture("train", 20)).ravel(), kind="stable"
    )])
    windows = study.material.mixture("train", plan.TRAINING_WINDOWS)
    pool = local.collect(config, reader.params, windows, (False,), say)
    by_token = arms.token_table(pool, np.concatenate([w.tokens for w in windows]), config.vocab_size)
    by_place = arms.place_table(pool)
    del pool
    tables = {"token table": lambda w: by_token[:, w.tokens], "position": lambda w: by_place}
    levels = {}
    for name, table in tables.items():
        held = np.concatenate([table(w).ravel() for w in study.calibration(10)])
        for share in plan.SCORED_SHARES:
            level = study.record.choose(f"threshold {name}@{share}", lambda: float(np.quantile(held, 1 - share)))
            levels[name, share] = level

    def head_mask(share: float) -> np.ndarray:
        kept = np.zeros(layers * config.kv_heads, bool)
        kept[heads[: round(share * len(heads))]] = True
        return np.repeat(kept.reshape(layers, -1), config.num_heads // config.kv_heads, axis=1)

    def jobs(window: Window) -> list[Job]:
        time = len(window.tokens)
        task = {"lookup4": "lookup1", "code": "prose"}.get(window.kind, window.kind)
        found: list[Job] = []
        for share in plan.PATTERN_SHARES:
            number = round(share * layers)
            chosen = {"every k-th": arms.spread(layers, share), "best layers": order[task][:number],
                      "best layers, one order": order["one"][:number]}
            for name, own in chosen.items():
                mask = arms.layer_mask(layers, own, time)
                found.append((f"{name}@{share}", -1, share, lambda w, mask=mask: reader.forced(w, mask)))
            found.append((f"KV heads@{share}", -1, share, lambda w, share=share: reader.heads(w, head_mask(share))))
        for (name, share), level in levels.items():
            full = tables[name](window) > level
            found.append((f"{name}@{share}", -1, share, lambda w, full=full: reader.forced(w, full)))
        return found

    study.read(plan.KINDS, count, jobs)
