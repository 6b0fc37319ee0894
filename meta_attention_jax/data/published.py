"""The tokenizer of a published model, wherever it was read from, as data are made with it and runs keep it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np
import tokenizers

from meta_attention_jax.data.tokenizer import Ids, Tokenizer, byte_alphabet, text_of
from meta_attention_jax.fields import expect, whole


class PublishedTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers` as it was published. Tokens that are no text, such as the end of one, are
    never made from text and give none."""

    kind = "published"

    def __init__(
        self, inner: tokenizers.Tokenizer, *, start: Optional[int] = None, ends: Sequence[int] = (),
        template: Optional[str] = None, begins: bool = False,
    ):
        self._tokenizer = inner
        self.start = start  # Id that begins a text; None without one.
        self.begins = begins  # Whether texts that the model is asked by begin with it; windows of data do not.
        self.vocab_size = max(inner.get_vocab().values()) + 1
        self.ends = tuple(ends)  # Ids that end a text.
        for i in (*self.ends, *([] if start is None else [start])):
            known = f"ids of the {self.vocab_size} tokens that there are"
            expect(0 <= whole("tokenizer", i) < self.vocab_size, "tokenizer", known, i)
        self.template = template  # Of chats, in Jinja; None without one.
        special = {i for i, token in inner.get_added_tokens_decoder().items() if token.special}
        of_bytes = _of_bytes(inner)
        texts = ("" if i in special else inner.id_to_token(i) or "" for i in range(self.vocab_size))
        self._bytes = [_bytes_of(text, of_bytes) for text in texts]
        self.token_bytes = np.array([len(b) for b in self._bytes], np.int32)

    @classmethod
    def of_content(cls, content: Mapping[str, Any]) -> PublishedTokenizer:
        """What a run directory keeps of one."""
        inner = tokenizers.Tokenizer.from_str(json.dumps(content["tokenizer"]))
        return cls(inner, start=content.get("start"), ends=content["ends"], template=content["template"],
                   begins=content.get("begins", False))

    def encode(self, data: bytes) -> Ids:
        return self._encode(text_of(data), as_text=True)

    def encode_marked(self, text: str) -> Ids:
        """Token ids of a text in which what is written like a token that is no text is that token: of a conversation,
        for one."""
        return self._encode(text, as_text=False)

    def _encode(self, text: str, *, as_text: bool) -> Ids:
        """`as_text`: what is written like a token that is no text is text all the same."""
        self._tokenizer.encode_special_tokens = as_text
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode_text(self, ids: Sequence[int | np.integer] | Ids) -> str:
        """The text of an answer as the library writes one: some leave out the blank before its first word."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> Ids:
        """Ids of a conversation, {"role": ..., "content": ...} each, up to where the model answers."""
        return self.encode_marked(self.conversation(messages))

    def conversation(self, messages: Sequence[Mapping[str, str]], *, answer: bool = True) -> str:
        """A conversation as the model's template writes it, up to where the model answers, or without `answer` up to
        the end of what the last message says, for the model to go on with."""
        expect(self.template is not None, "chat", "a model with a chat template", "one without")
        try:
            import jinja2.sandbox
        except ModuleNotFoundError:
            raise ValueError("chat: expected the package jinja2 (pip install jinja2), got none.") from None

        def refuse(reason: str) -> None:
            raise jinja2.TemplateError(reason)

        messages = list(messages)
        if not answer:
            messages[-1] = {**messages[-1], "content": messages[-1]["content"] + _HERE}
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        token = lambda i: "" if i is None else self._tokenizer.id_to_token(i) or ""  # noqa: E731
        try:
            text = environment.from_string(self.template).render(
                messages=messages, add_generation_prompt=answer, bos_token=token(self.start),
                eos_token=token(self.ends[0] if self.ends else None), raise_exception=refuse,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"chat: expected messages that the model's template takes, got {str(error)!r}.") from None
        if answer:
            return text
        said, found, rest = text.rpartition(_HERE.strip())
        expect(found, "chat", "a template that keeps what the last message says", text)
        return said if rest.startswith(" ") else said.rstrip()  # Of a message that the template trims.

    @property
    def serialized(self) -> str:
        """The library's own `tokenizer.json`."""
        return self._tokenizer.to_str()

    def _decode(self, ids: Ids) -> bytes:
        return b"".join(self._bytes[i] for i in ids)

    def _content(self) -> str:
        inner, ends = json.loads(self._tokenizer.to_str()), [int(i) for i in self.ends]
        said = {"start": self.start, "ends": ends, "template": self.template, "begins": self.begins}
        return json.dumps({"kind": self.kind, "tokenizer": inner, **said})


_ALPHABET = byte_alphabet()
_HERE = "<the last message ends here> "  # With a blank, to see whether the template keeps it.


def _of_bytes(inner: tokenizers.Tokenizer) -> bool:
    """Whether characters of its tokens stand for bytes; elsewhere for themselves, as in "é"."""
    return '"ByteLevel"' in json.dumps(json.loads(inner.to_str())["decoder"])


def _bytes_of(token: str, of_bytes: bool) -> bytes:
    """The text of a token; where characters are themselves, a blank is U+2581 and a byte is written <0x0A>."""
    if of_bytes:
        return b"".join(bytes([_ALPHABET[c]]) if c in _ALPHABET else c.encode() for c in token)
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()
