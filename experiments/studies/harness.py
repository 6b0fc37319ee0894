"""A run as a model of lm-eval (EleutherAI): what its tasks ask of one, answered by a routed model.

Requests of similar length go together: rows are padded on the right, which a causal model does not see, to a power of
two, and so is their number, up to `batch_size`. The numbers are those of lm-eval's `hf` model where every token is on
full attention: so are the words (what is written like a special token is that token), what begins a text, what is cut.
Importing this is enough for `lm_eval.simple_evaluate(model="meta_attention_jax", model_args={"run": ...})`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from meta_attention_jax.data.published import PublishedTokenizer
from meta_attention_jax.data.tokenizer import SymbolTokenizer
from meta_attention_jax.fields import expect, near, whole
from meta_attention_jax.generation import Draw, decode_loop, greedy, prefill, sampler_of
from meta_attention_jax.model import LanguageModel
from meta_attention_jax.objective import token_nll
from meta_attention_jax.run import Run
from meta_attention_jax.runs import load_run
from meta_attention_jax.sharding import without_mesh
from meta_attention_jax.types import RoutingHypers

NAME = "meta_attention_jax"
NAMES = ("run", "budget", "share", "price", "mode", "step", "backbone", "max_length", "prefix_token_id", "seed")
LEAST = 32
"""Tokens to which short rows are padded."""
CHUNK = 32
"""Tokens that are drawn before anybody looks for stop sequences."""
LOG = logging.getLogger(f"lm_eval.{NAME}")

command = cli_evaluate
Scored = tuple[Any, list[int], list[int]]  # What lm-eval caches it by, context, continuation.


class Mistake(ValueError):
    """A user's, told in one sentence."""


@contextlib.contextmanager
def mistakes() -> Iterator[None]:
    """Of checks, which come before the work: a ValueError of the work is none of the user's."""
    try:
        yield
    except ValueError as error:
        raise Mistake(str(error)) from None


def opened(
    run: Any, budget: Optional[float], share: Optional[float], price: Optional[float], mode: Optional[str],
    step: int | str, backbone: Optional[str],
) -> Run:
    """The run at its price."""
    expect(run is not None, "run", "a run directory, as in --model_args run=FOLDER", run)
    found = load_run(str(run), step=step, backbone=backbone)
    if budget is None and share is None:
        return found.at(price=price, mode=mode)
    expect(price is None, "price", "none beside a budget, which has its own", price)
    expect(mode in (None, "hard"), "mode", "'hard' with a budget", mode)
    return found.at_budget(cost=budget, share=share)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How a text goes on; requests that are alike in it are answered together."""

    until: tuple[str, ...]
    tokens: int  # At most.
    sampler: Draw


def drawing_of(asked: Any, default_tokens: int) -> Drawing:
    """What a task's `generation_kwargs` say."""
    said = normalize_gen_kwargs(asked, default_tokens)
    draws = {name: said.pop(name) for name in ("temperature", "top_k", "top_p") if said.get(name) is not None}
    until, tokens, samples = (said.pop(name) for name in ("until", "max_gen_toks", "do_sample"))
    if said.get("num_beams") == 1:
        said.pop("num_beams")
    known = "some of until, max_gen_toks, do_sample, temperature, top_k, top_p"
    expect(not said, "generation_kwargs", known, next(iter(said), None))
    expect(tokens >= 1, "max_gen_toks", "at least 1", tokens)
    if draws.get("top_k") == 0:  # All of them, to others.
        draws.pop("top_k")
    sampler = sampler_of(**{"temperature": 1.0, **draws}) if samples else greedy
    return Drawing(tuple(str(stop) for stop in until if stop), tokens, sampler)


def padded(
    rows: Sequence[Sequence[int]], most: int, most_rows: int
) -> tuple[Int[np.ndarray, "batch time"], Int[np.ndarray, "batch"]]:
    """Rows as one array, and their lengths; rows that only fill it up have one token."""
    above = lambda number: 1 << (number - 1).bit_length()  # noqa: E731
    time, count = min(max(above(max(map(len, rows))), LEAST), most), min(above(len(rows)), most_rows)
    tokens, lengths = np.zeros((count, time), np.int32), np.ones(count, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], lengths[i] = row, len(row)
    return tokens, lengths


def on_full(route: Int[Array, "..."], hard: Bool[Array, "..."], model: LanguageModel) -> Bool[Array, "..."]:
    """Whether full attention runs for a token of a layer; where it is no one mechanism's, all run."""
    router = model.config.router
    if "full" not in router.mechanisms:
        return route < 0
    return (route == router.mechanisms.index("full")) | ~(hard | router.is_fixed)


@functools.partial(jax.jit, static_argnames="model")
def score(
    model: LanguageModel, params: Any, tokens: Int[Array, "batch time"], lengths: Int[Array, "batch"],
    targets: Int[Array, "batch time"], hypers: RoutingHypers,
) -> tuple[Float[Array, "batch time"], Bool[Array, "batch time"], Float[Array, "batch"]]:
    """Log-probabilities (nats) of the targets, whether each is the likeliest, and the tokens of every row on full
    attention, mean of the layers that route."""
    inside = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    output = model.apply({"params": params}, tokens, segment_ids=inside.astype(jnp.int32), hypers=hypers)
    full = on_full(output.routing.route, output.routing.hard, model) & inside[None]
    likeliest = jnp.argmax(output.logits, axis=-1) == targets
    return -token_nll(output.logits, targets), likeliest, full.mean(0, dtype=jnp.float32).sum(-1)


@register_model(NAME)
class RoutedLM(TemplateLM):
    """A run. Arguments are those of `experiments.lm_eval`; a mistake among them is a `Mistake`."""

    def __init__(
        self, run: Any = None, budget: Optional[float] = None, share: Optional[float] = None,
        price: Optional[float] = None, mode: Optional[str] = None, step: int | str = "latest",
        backbone: Optional[str] = None, max_length: Optional[int] = None, prefix_token_id: Optional[int] = None,
        seed: int = 0, batch_size: int | str = 1, max_batch_size: Any = None, device: Any = None, **unknown: Any,
    ) -> None:
        del max_batch_size, device  # lm-eval gives them unasked; JAX_PLATFORMS says where a run is.
        super().__init__()
        with mistakes():
            for name in unknown:
                raise ValueError(f"model_args: expected some of {', '.join(NAMES)}, got {name!r}{near(name, NAMES)}")
            size = int(batch_size) if str(batch_size).isdigit() else 0
            expect(size > 0, "batch_size", "a number of rows", batch_size)
            self.run = opened(run, budget, share, price, mode, step, backbone)
            symbols = isinstance(self.run.tokenizer, SymbolTokenizer)
            expect(not symbols, "run", "a run of text", self.run.config.data.corpus)
            context, vocab = self.run.model.config.context, self.run.tokenizer.vocab_size
            length = context or self.run.sequence_length if max_length is None else whole("max_length", max_length)
            room = f"2 to the model's context of {context}" if context else "at least 2"
            expect(2 <= length <= (context or length), "max_length", room, length)
            if prefix_token_id is not None:
                prefix_token_id = whole("prefix_token_id", prefix_token_id)
                expect(0 <= prefix_token_id < vocab, "prefix_token_id", f"an id of the {vocab} tokens", prefix_token_id)
            self.key = jax.random.key(whole("seed", seed))
        self.batch_size, self.max_length, self.max_gen_toks = size, length, 256
        self.model = self.run.model.clone(mode=self.run.mode)
        self._prefix, self._tokens, self._on_full = prefix_token_id, 0, 0.0

    @property
    def eot_token_id(self) -> Optional[int]:
        return next(iter(self.run.tokenizer.ends), None)

    @property
    def prefix_token_id(self) -> int:
        tokenizer = self.run.tokenizer
        known = [self._prefix, getattr(tokenizer, "start", None), self.eot_token_id, *tokenizer.encode(b"\n")[:1]]
        found = next((int(i) for i in known if i is not None), None)
        with mistakes():
            expect(found is not None, "prefix_token_id", "an id, where no token begins a text", None)
        return found

    @property
    def tokenizer_name(self) -> str:
        return str(self.run.path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> Optional[str]:
        if not chat_template:
            return None
        template = getattr(self.run.tokenizer, "template", None)
        with mistakes():
            expect(template is not None, "apply_chat_template", "a tokenizer with a chat template",
                   self.run.tokenizer.kind)
        return template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.run.tokenizer.conversation(chat_history, answer=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: Optional[bool] = None, **_: Any) -> list[int]:
        tokenizer = self.run.tokenizer
        if not isinstance(tokenizer, PublishedTokenizer):
            return tokenizer.encode(string.encode("utf-8", "surrogateescape")).tolist()
        ids = tokenizer.encode_marked(string).tolist()
        begins = ids[:1] != [tokenizer.start] if add_special_tokens is None else add_special_tokens
        return [tokenizer.start, *ids] if tokenizer.begins and begins else ids

    def tok_decode(self, ids: Sequence[int]) -> str:
        tokenizer = self.run.tokenizer
        if isinstance(tokenizer, PublishedTokenizer):
            return tokenizer.decode_text(ids)
        return tokenizer.decode(ids).decode(errors="replace")

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for i, (text,) in enumerate(request.args for request in requests):
            pairs = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            owners += [i] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for i, (total, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)):
            totals[i] += total
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    @without_mesh
    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        most = self.max_length
        with mistakes():
            for _, _, said in requests:
                expect(1 <= len(said) <= most, "continuation", f"1 to max_length = {most} tokens", len(said))
        # Of a context of blanks alone nothing is left: lm-eval gives them to what is asked for.
        requests = [(key, context or [self.prefix_token_id], said) for key, context, said in requests]
        rows = [(context + said)[-most - 1 :] for _, context, said in requests]
        self._tell_cut(sum(len(context) + len(said) > most + 1 for _, context, said in requests))
        found: list[Any] = [None] * len(rows)
        for batch in self._batches(rows, range(len(rows)), "loglikelihood", disable_tqdm):
            tokens, lengths = padded([rows[i][:-1] for i in batch], most, self.batch_size)
            targets, _ = padded([rows[i][1:] for i in batch], most, self.batch_size)
            logs, likeliest, full = jax.device_get(
                score(self.model, self.run.params, tokens, lengths, targets, self.run.hypers.routing)
            )
            self._count(lengths[: len(batch)].sum(), full[: len(batch)].sum())
            for row, i in enumerate(batch):
                key, _, said = requests[i]
                asked = slice(lengths[row] - len(said), lengths[row])
                found[i] = float(logs[row, asked].sum(dtype=np.float64)), bool(likeliest[row, asked].all())
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, found[i])
        return found

    @without_mesh
    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        alike: dict[Drawing, list[int]] = {}
        with mistakes():
            for i, request in enumerate(requests):
                drawing = drawing_of(request.args[1], self.max_gen_toks)
                room = f"fewer than max_length = {self.max_length}"
                expect(drawing.tokens < self.max_length, "max_gen_toks", room, drawing.tokens)
                alike.setdefault(drawing, []).append(i)
            prompts = [self.tok_encode(request.args[0]) for request in requests]
            expect(all(prompts), "context", "a text to go on from", "")
        found = [""] * len(requests)
        for drawing, members in alike.items():
            most = self.max_length - drawing.tokens
            self._tell_cut(sum(len(prompts[i]) > most for i in members))
            for batch in self._batches(prompts, members, "generate_until", disable_tqdm):
                for i, text in zip(batch, self._drawn([prompts[i][-most:] for i in batch], batch, drawing)):
                    found[i] = text
                    if drawing.sampler is greedy:
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return found

    def _drawn(self, prompts: Sequence[list[int]], numbers: Sequence[int], drawing: Drawing) -> list[str]:
        """How each prompt goes on, up to its first stop; a row of samples has the key of the request's number."""
        model, params, hypers = self.model, self.run.params, self.run.hypers.routing
        known, steps = self.run.tokenizer.vocab_size, min(CHUNK, drawing.tokens)
        ends = (*self.run.tokenizer.ends, *self._marks(drawing.until))
        tokens, lengths = padded(prompts, self.max_length, self.batch_size)
        numbers = np.pad(numbers, (0, len(lengths) - len(numbers)))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(self.key, numbers)
        room = -(-drawing.tokens // steps) * steps
        cache, logits, first = prefill(model, params, tokens, lengths, hypers, capacity=tokens.shape[1] + room)
        full = np.asarray(on_full(first["route"], first["hard"], model))
        for row, prompt in enumerate(prompts):
            self._count(len(prompt), full[:, row, : len(prompt)].mean(0).sum())
        drawn: list[list[int]] = [[] for _ in prompts]
        going = set(range(len(prompts)))
        while going:
            cache, logits, seen = decode_loop(
                model, params, cache, logits, keys, hypers, steps=steps, sampler=drawing.sampler, ends=ends, known=known
            )
            new = np.asarray(seen["tokens"])
            full = np.asarray(on_full(seen["route"], seen["hard"], model))
            for row in sorted(going):
                own = new[row, : drawing.tokens - len(drawn[row])].tolist()
                end = next((i for i, token in enumerate(own) if token in ends), len(own))
                drawn[row] += own[:end]
                count = min(end + 1, len(own))
                self._count(count, full[:, row, :count].mean(0).sum())
                text = self.tok_decode(drawn[row])
                if end < len(own) or len(drawn[row]) == drawing.tokens or any(stop in text for stop in drawing.until):
                    going.remove(row)
        return [postprocess_generated_text(self.tok_decode(own), list(drawing.until), None) for own in drawn]

    def get_model_info(self) -> dict[str, Any]:
        """What was evaluated, and at what share of full attention."""
        run, share = self.run, self._on_full / self._tokens if self._tokens else None
        if share is not None:
            LOG.info("full attention ran on %.1f %% of the layers of %d tokens", 100 * share, self._tokens)
        return {
            "run_step": run.step, "run_mode": run.mode, "run_price": float(run.hypers.routing.price),
            "mechanisms": list(run.mechanisms), "full_attention_share": share, "tokens_read": self._tokens,
            "max_length": self.max_length,
        }

    def _batches(
        self, rows: Sequence[list[int]], members: Sequence[int], what: str, quiet: bool
    ) -> Iterator[list[int]]:
        """Numbers of rows, the longest first: what does not fit into memory shows at once."""
        order = sorted(members, key=lambda i: -len(rows[i]))
        with tqdm(total=len(order), desc=f"Running {what} requests", disable=quiet) as bar:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                yield batch
                bar.update(len(batch))

    def _marks(self, until: Sequence[str]) -> list[int]:
        """Of stop sequences those that are one token that is no text, which no text shows."""
        if not isinstance(self.run.tokenizer, PublishedTokenizer):
            return []
        ids = [self.tok_encode(stop, add_special_tokens=False) for stop in until]
        return [own[0] for own in ids if len(own) == 1 and not self.tok_decode(own)]

    def _count(self, tokens: int, on_full: float) -> None:
        self._tokens, self._on_full = self._tokens + int(tokens), self._on_full + float(on_full)

    def _tell_cut(self, number: int) -> None:
        if number:
            LOG.warning("%d requests are longer than max_length = %d allows: cut on the left", number, self.max_length)
