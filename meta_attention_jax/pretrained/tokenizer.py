"""The tokenizer of a published model, read: its `tokenizer.json`, or rebuilt from what a GGUF file says."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from meta_attention_jax.data.published import PublishedTokenizer
from meta_attention_jax.fields import expect
from meta_attention_jax.pretrained.source import json_of

CONTROL, USER = 3, 4  # Of `tokenizer.ggml.token_type`: no text, and text that is never cut.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = {  # What a text is first cut into, by `tokenizer.ggml.pre`.
    "gpt-2": None,
    "smollm": "digits",
    "llama-bpe": _PIECES.replace("DIGITS", r"\p{N}{1,3}"),
    "qwen2": _PIECES.replace("DIGITS", r"\p{N}"),
}


def from_folder(path: pathlib.Path, config: Mapping[str, Any]) -> PublishedTokenizer:
    """Of a folder with `tokenizer.json`."""
    file = path / "tokenizer.json"
    expect(file.is_file(), "path", f"tokenizer.json in {str(path)!r}", "none")
    try:
        inner = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # The library raises nothing more exact.
        raise ValueError(f"path: expected a whole tokenizer in {str(file)!r}, got {error}.") from None
    said = path / "tokenizer_config.json"
    template = json_of(said).get("chat_template") if said.is_file() else None
    jinja = path / "chat_template.jinja"
    if jinja.is_file():
        template = jinja.read_text(encoding="utf-8")
    generation = path / "generation_config.json"
    if generation.is_file():
        config = {**config, **json_of(generation)}
    ends = config.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    start = config.get("bos_token_id")
    begins = inner.encode("a").ids[:1] == [start]
    return PublishedTokenizer(inner, start=start, ends=ends, template=template, begins=begins)


def from_gguf(said: Mapping[str, Any]) -> PublishedTokenizer:
    """Of a GGUF file: byte-level merges (kind `gpt2`), or merges in the order of scores (kind `llama`)."""
    kind, tokens = said.get("tokenizer.ggml.model"), said.get("tokenizer.ggml.tokens")
    else_folder = "else a folder with tokenizer.json"
    expect(kind in ("gpt2", "llama"), "tokenizer.ggml.model", f"'gpt2' or 'llama', {else_folder}", kind)
    vocab = {token: i for i, token in enumerate(tokens)}
    inner = _byte_level(said, vocab) if kind == "gpt2" else _by_scores(said, vocab)
    types = said.get("tokenizer.ggml.token_type", [])
    special = [token for token, kind_of in zip(tokens, types) if kind_of == CONTROL]
    inner.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    own = [token for token, kind_of in zip(tokens, types) if kind_of == USER]
    inner.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in own])
    start, *ends = (said.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom"))
    words = said.get("tokenizer.ggml.pre")
    begins = said.get("tokenizer.ggml.add_bos_token", kind == "llama" or words == "llama-bpe") and start is not None
    return PublishedTokenizer(
        inner, start=None if start is None else int(start),
        ends=list(dict.fromkeys(int(end) for end in ends if end is not None)),
        template=said.get("tokenizer.chat_template"), begins=bool(begins),
    )


def _byte_level(said: Mapping[str, Any], vocab: Mapping[str, int]) -> tokenizers.Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in said.get("tokenizer.ggml.merges", [])]
    for merge in merges:  # The library would panic.
        known = len(merge) == 2 and all(token in vocab for token in (*merge, "".join(merge)))
        expect(known, "tokenizer.ggml.merges", "two tokens that make a third", " ".join(merge))
    words = said.get("tokenizer.ggml.pre", "gpt-2")
    expected = f"one of {', '.join(_WORDS)}, else a folder with tokenizer.json"
    expect(words in _WORDS, "tokenizer.ggml.pre", expected, words)
    # Llama 3 takes a word that is a token as it is.
    inner = tokenizers.Tokenizer(models.BPE(vocab=dict(vocab), merges=merges, ignore_merges=words == "llama-bpe"))
    pattern = _WORDS[words]
    if pattern is None:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif pattern == "digits":
        inner.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        ])
    else:
        inner.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])
    inner.decoder = decoders.ByteLevel()
    return inner


def _by_scores(said: Mapping[str, Any], vocab: Mapping[str, int]) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: of all pairs that make a token, the one whose token has the best score goes first."""
    scores = said["tokenizer.ggml.scores"]
    pairs = []
    for token, i in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                pairs.append((-scores[i], vocab[left], vocab[right], left, right))
    merges = [(left, right) for *_, left, right in sorted(pairs)]
    unknown = "<unk>" if "<unk>" in vocab else None
    inner = tokenizers.Tokenizer(
        models.BPE(vocab=dict(vocab), merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    before = [normalizers.Prepend("\u2581")] if said.get("tokenizer.ggml.add_space_prefix", True) else []
    inner.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "\u2581")])
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return inner
