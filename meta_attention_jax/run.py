"""A run, asked: what its model says of a text or a split.

    run = load_run("runs/recall")
    run.metrics                     what training logged, a pandas frame
    run.evaluate("test")            what is reported of a split
    run.logits("k1=v2 c0 ?k1")      of the token after each
    run.routes("k1=v2 c0 ?k1")      concentration, mean, uncertainty and mechanism per layer and token
    run.generate("k1=v2 c0 ?k1", steps=8)
    run.show("k1=v2 c0 ?k1")        coloured text in a notebook
    run.at(price=0.1), run.at_budget(cost=0.3)      the same at another price of its decisions

The corpus is opened when `run.dataset` is first asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional, Union

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from meta_attention_jax import answers, budgets
from meta_attention_jax.data.corpora import PLACED
from meta_attention_jax.data.manifest import check_manifest
from meta_attention_jax.data.pipeline import Dataset
from meta_attention_jax.data.tokenizer import Tokenizer
from meta_attention_jax.fields import LARGEST, expect, real, whole
from meta_attention_jax.files import Place, local
from meta_attention_jax.generation import generate, pad_prompts, sampler_of
from meta_attention_jax.model import LanguageModel, unstacked
from meta_attention_jax.objective import summarise
from meta_attention_jax.routing.decide import MODES
from meta_attention_jax.sharding import without_mesh
from meta_attention_jax.training import build, export
from meta_attention_jax.training.evaluation import Evaluator, logits_and_routing
from meta_attention_jax.training.logs import read_metrics
from meta_attention_jax.training.parallel import Parallel
from meta_attention_jax.training.rules import last_mode
from meta_attention_jax.training.step import Hypers
from meta_attention_jax.types import Batch, Routing, RoutingHypers

if TYPE_CHECKING:
    import pandas

Text = Union[str, bytes, Sequence[int | np.integer], Int[np.ndarray, "tokens"]]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A trained model and everything around it. Whatever is asked in vain (of data that are gone or not the same, an
    unknown token, mode or split, a number out of range) is answered by a ValueError of one sentence."""

    path: Place
    config: ConfigDict  # As trained.
    step: int  # Of the parameters.
    steps: tuple[int, ...]  # All that are saved.
    params: Any  # On this process's first device.
    model: LanguageModel  # In soft mode.
    tokenizer: Tokenizer
    hypers: Hypers
    sequence_length: int  # Of `dataset`.
    batch_size: int
    asked_mode: Optional[str] = None  # In the place of the one that training ends in.

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The run's corpus, as trained or at the length and batch size asked for."""
        scheme, _, place = self.config.data.corpus.partition(":")
        if f"{scheme}:" in PLACED and not local("data.corpus", place).exists():
            raise ValueError(
                f"corpus: expected the data of the run at {place!r}, got nothing there; say where "
                f"they are now by load_run(..., corpus='{scheme}:NEW'), or --corpus={scheme}:NEW of a command."
            )
        shape = self.config.copy_and_resolve_references()
        shape.data.sequence_length = self.sequence_length
        shape.data.batch_size = self.batch_size
        dataset = build.build_dataset(shape, self.path)
        check_manifest(dataset, self.path)
        return dataset

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """Names, the mechanism axis."""
        return tuple(self.config.model.mechanisms)

    @property
    def mode(self) -> str:
        """The mode of whatever is asked without one: that of `at`, else that which training ends in
        (`rules.last_mode`)."""
        return last_mode(self.config) if self.asked_mode is None else self.asked_mode

    @functools.cached_property
    def metrics(self) -> pandas.DataFrame:
        """What training logged: a row per record, `event` and `step` first, "/" in nested names."""
        return answers.records_frame(read_metrics(self.path))

    def encode(self, text: Text) -> Int[np.ndarray, "tokens"]:
        """Token ids of a text, at least one, behind the token that begins one where the tokenizer asks for it; ids stay
        as they are."""
        if isinstance(text, str):
            text = text.encode("utf-8", "surrogateescape")
        ids = self.tokenizer.encode(text) if isinstance(text, bytes) else np.asarray(text)
        if isinstance(text, bytes) and ids.size and getattr(self.tokenizer, "begins", False):
            ids = np.concatenate([[self.tokenizer.start], ids])
        pad_prompts([ids], self.tokenizer.vocab_size)
        return ids.astype(np.int32)

    def pieces(self, ids: Sequence[int | np.integer] | Int[np.ndarray, "tokens"]) -> list[bytes]:
        """The text of every token."""
        return [self.tokenizer.decode([token]) for token in ids]

    def logits(
        self, text: Text, *, mode: Optional[str] = None, threshold: Optional[float] = None
    ) -> Float[np.ndarray, "token vocab"]:
        """Logits of the token after each token of a text, or of token ids, in mode "soft", "hard" or "gated" (None is
        `mode`); `threshold` is theta of gated mode (None is the run's own)."""
        return self._apply(text, mode, threshold)[1]

    def routes(
        self, text: Text, *, mode: Optional[str] = None, threshold: Optional[float] = None
    ) -> answers.TextRoutes:
        """Where the model sends every token of a text; arguments as `logits`."""
        ids, _, routing = self._apply(text, mode, threshold)
        return answers.TextRoutes(
            pieces=self.pieces(ids),
            mechanisms=self.mechanisms,
            concentration=routing.concentration,
            mean=routing.mean,
            uncertainty=routing.uncertainty,
            route=routing.route,
            hard=routing.hard,
        )

    def evaluate(
        self, split: str = "validation", *, mode: Optional[str] = None, max_batches: Optional[int] = None
    ) -> dict[str, Any]:
        """Everything that is reported of a split, "train", "validation" or "test" (see `objective.summarise`), at the
        posterior mean: of at most `max_batches`, spread evenly over it, or of all. `mode` as in `logits`."""
        evaluator, params = self._evaluator
        hypers = evaluator.parallel.place(self.hypers.routing)
        sums = evaluator.sums(params, hypers, split=split, mode=self._mode(mode), max_batches=max_batches)
        return summarise(sums, mechanisms=self.mechanisms, costs=self.hypers.routing.costs)

    @functools.cached_property
    def _evaluator(self) -> tuple[Evaluator, Any]:
        """(evaluator, placed parameters): a mode is compiled once, whatever the price."""
        parallel = Parallel("jit", jax.local_devices()[:1])
        return Evaluator(self.model, self.dataset, parallel), parallel.place(self.params)

    def at(
        self, *, price: Optional[float] = None, threshold: Optional[float] = None, mode: Optional[str] = None
    ) -> Run:
        """The same run at another lambda or theta of its decisions (see `routing.decide`), or asked in another mode,
        without compiling. Soft mixtures take no decision: no price changes them."""
        hypers = self._routing_hypers(threshold)
        if price is not None:
            price = real("price", price)
            expect(abs(price) <= LARGEST, "price", "a finite number", price)
            hypers = hypers.replace(price=jnp.float32(price))
        other = dataclasses.replace(
            self, hypers=self.hypers.replace(routing=hypers),
            asked_mode=self.asked_mode if mode is None else self._mode(mode),
        )
        shared = self.__dict__.keys() & {"dataset", "metrics", "_evaluator"}
        other.__dict__.update({name: self.__dict__[name] for name in shared})
        return other

    def at_budget(self, *, cost: Optional[float] = None, share: Optional[float] = None) -> Run:
        """The run in mode hard at the price that `fit_budget` (or `experiments.evaluate --budget_cost`) has found for
        it, at its sequence length."""
        return budgets.at_budget(self, cost, share)

    def unstacked(self) -> Run:
        """The same run with its layers apart (see `model.unstacked`), for texts of hundreds of tokens on a CPU."""
        model, params = unstacked(self.model, self.params)
        return dataclasses.replace(self, model=model, params=params)

    def fit_budget(
        self, *, cost: Optional[float] = None, share: Optional[float] = None, max_batches: Optional[int] = None
    ) -> Run:
        """The run in mode hard, at the lowest price that keeps a budget on validation: the projected cost of the
        routes, from the cheapest mechanism's to 1, or the share of tokens on full attention. `budgets.json` of the run
        directory keeps it. `max_batches` as in `evaluate`."""
        return budgets.fit_budget(self, cost, share, max_batches)

    @without_mesh
    def routed_batch(self, split: str = "validation", *, mode: Optional[str] = None) -> tuple[Batch, Routing]:
        """The first batch of a split and its routing, [layer row time ...]; `mode` as in `logits`."""
        batch = next(self.dataset.eval_batches(split, max_batches=1))
        _, routing = logits_and_routing(
            self.model.clone(mode=self._mode(mode)), self.params, batch.tokens,
            batch.segment_ids, batch.positions, self.hypers.routing,
        )
        return batch, jax.device_get(routing)

    @without_mesh
    def generate(
        self,
        prompt: Text,
        *,
        steps: int = 100,
        mode: Optional[str] = None,
        temperature: Optional[float] = None,
        top_k: Optional[int] = None,
        top_p: Optional[float] = None,
        seed: int = 0,
        threshold: Optional[float] = None,
        stop: bool = True,
    ) -> answers.Continuation:
        """Goes on from a prompt, a text or token ids, by `steps` tokens, or to the first that ends a text for the
        tokenizer (with `stop`): greedy unless one of `Sampler`'s numbers is given, by samples of `seed` then; `mode`
        and `threshold` as in `logits`."""
        return self.generate_batch(
            [prompt], steps=steps, mode=mode, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            threshold=threshold, stop=stop,
        )[0]

    @without_mesh
    def generate_batch(
        self,
        prompts: Sequence[Text],
        *,
        steps: int = 100,
        mode: Optional[str] = None,
        temperature: Optional[float] = None,
        top_k: Optional[int] = None,
        top_p: Optional[float] = None,
        seed: int = 0,
        threshold: Optional[float] = None,
        stop: bool = True,
    ) -> list[answers.Continuation]:
        """`generate` from several prompts of any lengths together; every row of samples has a key of its own."""
        expect(not isinstance(prompts, (str, bytes)), "prompts", "a list of prompts", prompts)
        draw = sampler_of(temperature, top_k, top_p)
        rows = [self.encode(prompt) for prompt in prompts]
        ends = self.tokenizer.ends if stop else ()
        trace = generate(
            self.model,
            self.params,
            rows,
            steps=steps,
            hypers=self._routing_hypers(threshold),
            keys=jax.random.split(jax.random.key(whole("seed", seed)), len(rows)),
            sampler=draw,
            mode=self._mode(mode),
            ends=ends,
            known=self.tokenizer.vocab_size,
        )
        trace = jax.device_get(trace)
        made = []
        for row, ids in enumerate(rows):
            own = trace.row(row, len(ids))
            joined = np.concatenate([ids, own.tokens[0]])
            said = joined[:-1] if joined[-1] in ends else joined
            text = self.tokenizer.decode(said).decode(errors="replace")
            made.append(answers.Continuation(text=text, ids=joined, prompt=len(ids), trace=own))
        return made

    def export(self, path: str | pathlib.Path, *, model: bool = False, **note: Any) -> None:
        """The routers of a published model as a small folder, which `load_run` opens (see `training.export`); with
        `model` the published model too, as other libraries open it. `note`: what else `routing.json` says."""
        stacked = self.model.config.scan_layers == self.config.model.scan_layers
        expect(stacked, "run", "one with its layers as they were trained", "one that is unstacked")
        config = self.model.config if model else None
        export.write(
            local("path", path), self.path, self.config, self.params, self.step, self.hypers, mode=self.mode,
            model=config, note=note,
        )

    def show(
        self, text: Text, *, layer: Optional[int] = None, mode: Optional[str] = None, threshold: Optional[float] = None
    ) -> answers.Html:
        """The text coloured by mechanism, for a notebook; one layer or all."""
        found = self.routes(text, mode=mode, threshold=threshold)
        return found.html(title=f"{self.config.name}, step {self.step}", layer=layer)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.config.name!r}, step {self.step} of {self.steps})"

    def _repr_html_(self) -> str:
        return answers.table_html({
            "run": self.path, "config": self.config.name,
            "step": f"{self.step} of {', '.join(map(str, self.steps))}",
            "controller": self.config.controller.name, "corpus": self.config.data.corpus,
        })

    def _mode(self, mode: Optional[str]) -> str:
        mode = self.mode if mode is None else mode
        expect(mode in MODES, "mode", f"one of {MODES}", mode)
        return mode

    def _routing_hypers(self, threshold: Optional[float]) -> RoutingHypers:
        if threshold is None:
            return self.hypers.routing
        threshold = real("threshold", threshold)
        expect(0 <= threshold <= 1, "threshold", "theta in [0, 1]", threshold)
        return self.hypers.routing.replace(threshold=jnp.float32(threshold))

    @without_mesh
    def _apply(
        self, text: Text, mode: Optional[str], threshold: Optional[float]
    ) -> tuple[np.ndarray, np.ndarray, Routing]:
        """(ids, logits [token vocab], routing [layer token ...])."""
        ids = self.encode(text)
        # Lengths are rounded up, so that texts of similar length share a program; nothing looks ahead.
        most = self.model.config.context
        room = -len(ids) % 64 if most is None else max(min(-len(ids) % 64, most - len(ids)), 0)
        tokens = np.pad(ids, (0, room))[None]
        segments = np.pad(np.ones(len(ids), np.int32), (0, room))[None]
        logits, routing = jax.device_get(logits_and_routing(
            self.model.clone(mode=self._mode(mode)), self.params, tokens, segments, None,
            self._routing_hypers(threshold),
        ))
        return ids, logits[0, : len(ids)], jax.tree.map(lambda x: x[:, 0, : len(ids)], routing)
