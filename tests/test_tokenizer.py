"""Tokenizers: decode undoes encode, byte counts add up, training is deterministic."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers

from meta_attention_jax.data import tokenizer as tokenizer_module
from meta_attention_jax.data.corpora import Corpus, Document
from meta_attention_jax.data.published import PublishedTokenizer
from meta_attention_jax.data.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    SymbolTokenizer,
    load_tokenizer,
    make_tokenizer,
)

TEXTS = [
    ("the cat sat on the mat, then the cat ran; " * 40).encode(),
    ("Ein schöner Tag — naïve café, Ωmega, 日本語, 🙂🙂.\n" * 20).encode(),
]
CORPUS = Corpus(
    name="toy",
    source="a test",
    splits={
        "train": tuple(Document(f"{i}", text) for i, text in enumerate(TEXTS)),
        "validation": (Document("v", b"unseen"),),
        "test": (Document("t", b"unseen"),),
    },
)
SYMBOLS = ("k0=v0", "?k0", "v0", "c0")


@pytest.fixture(scope="module")
def bpe():
    return make_tokenizer("bpe", CORPUS, 300)


def random_text(rng, length):
    """Any characters of Unicode that UTF-8 can write."""
    points = rng.integers(0, 0x110000, length)
    kinds = rng.integers(0, 3, length)
    points = np.where(kinds == 0, points % 0x80, np.where(kinds == 1, points % 0x800, points))
    return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


def test_bytes_round_trip_on_any_bytes():
    tokenizer = ByteTokenizer()
    data = np.random.default_rng(0).integers(0, 256, 4096).astype(np.uint8).tobytes()
    ids = tokenizer.encode(data)
    assert ids.dtype == np.int32 and ids.tolist() == list(data)
    assert tokenizer.decode(ids) == data
    assert tokenizer.decode(tokenizer.encode(b"")) == b""


@pytest.mark.parametrize("seed", range(5))
def test_bpe_round_trip_on_any_text(bpe, seed):
    text = random_text(np.random.default_rng(seed), 500).encode()
    for data in (text, TEXTS[0] + text + TEXTS[1], b"", b" \n\n  \t x"):
        ids = bpe.encode(data)
        assert ids.dtype == np.int32
        assert bpe.decode(ids) == data
        assert bpe.token_bytes[ids].sum() == len(data)


@pytest.mark.slow
def test_bpe_round_trip_on_more_than_one_chunk(bpe):
    for text in ("line of text\n" * 90_000, "é" * 1_100_000):
        assert bpe.decode(bpe.encode(text.encode())) == text.encode()


def test_bpe_compresses_what_it_has_learned_and_decodes_single_tokens(bpe):
    ids = bpe.encode(TEXTS[0])
    assert len(ids) < len(TEXTS[0]) / 2
    assert b"".join(bpe.decode([i]) for i in ids) == TEXTS[0]
    assert sorted(bpe.decode([i]) for i in range(256)) == [bytes([b]) for b in range(256)]
    assert bpe.vocab_size == len(bpe.token_bytes) == 300
    assert bpe.token_bytes.min() == 1


def test_bpe_training_is_deterministic_and_reads_the_training_split_only(bpe, tmp_path):
    held_out = dict(CORPUS.splits, validation=(Document("v", b"zyzzyva " * 500),))
    again = make_tokenizer("bpe", Corpus("toy", "a test", held_out), 300)
    bpe.save(tmp_path / "a")
    again.save(tmp_path / "b")
    a, b = ((tmp_path / name / "tokenizer.json").read_bytes() for name in "ab")
    assert a == b


def test_saved_tokenizers_come_back(bpe, tmp_path):
    data = {"bytes": bytes(range(256)), "bpe": TEXTS[1], "symbols": b"k0=v0 c0 ?k0 v0 "}
    for tokenizer in (ByteTokenizer(), bpe, SymbolTokenizer(SYMBOLS)):
        folder = tmp_path / tokenizer.kind
        tokenizer.save(folder)
        loaded = load_tokenizer(folder)
        assert type(loaded) is type(tokenizer)
        assert loaded.vocab_size == tokenizer.vocab_size
        np.testing.assert_array_equal(loaded.token_bytes, tokenizer.token_bytes)
        ids = tokenizer.encode(data[tokenizer.kind])
        np.testing.assert_array_equal(loaded.encode(data[tokenizer.kind]), ids)
        assert loaded.decode(ids) == data[tokenizer.kind]
        assert [path.name for path in folder.iterdir()] == ["tokenizer.json"]


def test_saved_bpe_opens_in_the_library(bpe, tmp_path):
    bpe.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = TEXTS[1].decode()
    assert theirs.encode(text).ids == bpe.encode(TEXTS[1]).tolist()
    assert theirs.decode(theirs.encode(text).ids) == text


@pytest.mark.parametrize("form", ["byte-level", "sentencepiece"])
def test_a_published_tokenizer_is_kept_whole(form, bpe, tmp_path):
    """In the file of a run: ids, bytes, the ends of a text and the chat's template."""
    if form == "byte-level":
        bpe.save(tmp_path / "library")
        inner = tokenizers.Tokenizer.from_file(str(tmp_path / "library" / "tokenizer.json"))
        inner.add_special_tokens([tokenizers.AddedToken("<|end|>", special=True, normalized=False)])
    else:
        words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "c", "a", "ca", "\u2581ca"]
        vocab = {word: i for i, word in enumerate(words)}
        merges = [("c", "a"), ("\u2581", "ca")]
        inner = tokenizers.Tokenizer(
            tokenizers.models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        )
        inner.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
        inner.decoder = tokenizers.decoders.Sequence([
            tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()
        ])
    ends = np.array([inner.get_vocab_size() - 1])
    made = PublishedTokenizer(inner, ends=ends, template="{{ messages[0].content }} \u00e9")
    with pytest.raises(ValueError, match="got none."):
        make_tokenizer("model", CORPUS, None, tmp_path)
    made.save(tmp_path)
    for kept in (load_tokenizer(tmp_path), make_tokenizer("model", CORPUS, None, tmp_path)):
        assert isinstance(kept, PublishedTokenizer) and kept.vocab_size == made.vocab_size
        assert kept.ends == made.ends and kept.template == made.template
        np.testing.assert_array_equal(kept.token_bytes, made.token_bytes)
        np.testing.assert_array_equal(kept.encode(TEXTS[1]), made.encode(TEXTS[1]))
        assert kept.decode(kept.encode(TEXTS[1])) == TEXTS[1]
        assert [kept.decode([i]) for i in range(kept.vocab_size)] == [made.decode([i]) for i in range(kept.vocab_size)]
        kept.save(tmp_path / "again")
        assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    ByteTokenizer().save(tmp_path)
    with pytest.raises(ValueError, match="tokenizer: expected that of a published model in .*, got 'bytes'."):
        make_tokenizer("model", CORPUS, None, tmp_path)


def test_symbols_are_readable_and_weigh_no_bytes():
    tokenizer = SymbolTokenizer(SYMBOLS)
    assert tokenizer.decode([0, 3, 1, 2]) == b"k0=v0 c0 ?k0 v0 "
    assert tokenizer.encode(b"k0=v0 c0 ?k0 v0 ").tolist() == [0, 3, 1, 2]
    assert tokenizer.token_bytes.tolist() == [0, 0, 0, 0]


def test_a_kept_tokenizer_is_used_again(tmp_path):
    first = make_tokenizer("bpe", CORPUS, 300, tmp_path)
    assert not list(tmp_path.iterdir()), "what else is wrong with the data is not known yet"
    first.save(tmp_path)
    other = Corpus("other", "a test", dict(CORPUS.splits, train=(Document("x", b"abab" * 99),)))
    kept = make_tokenizer("bpe", other, 300, tmp_path)
    assert kept.encode(TEXTS[0]).tolist() == first.encode(TEXTS[0]).tolist()
    with pytest.raises(ValueError, match="expected bpe of 290 tokens .* got bpe of 300"):
        make_tokenizer("bpe", CORPUS, 290, tmp_path)
    ByteTokenizer().save(tmp_path)
    with pytest.raises(ValueError, match="got bytes of 256"):
        make_tokenizer("bpe", CORPUS, 300, tmp_path)


@pytest.mark.parametrize(
    "kind, vocab_size, message",
    [
        ("words", None, "tokenizer: expected one of bytes, bpe, model, got 'words'"),
        ("bytes", 300, "vocab_size: expected 256"),
        ("model", None, "tokenizer: expected a pretrained backbone, whose tokenizer 'model' is, got none."),
        ("bpe", None, "vocab_size: expected a number"),
        ("bpe", 255, "vocab_size: expected at least the 256 bytes, got 255"),
        ("bpe", 100_000, "vocab_size: expected at most .* got 100000"),
    ],
)
def test_impossible_tokenizers_are_refused(kind, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        make_tokenizer(kind, CORPUS, vocab_size)


def test_bad_input_is_refused(bpe, tmp_path):
    with pytest.raises(ValueError, match="text: expected UTF-8, .* at byte 2"):
        bpe.encode(b"ab\xff")
    with pytest.raises(ValueError, match="text: expected names such as k0=v0, got b'k9'"):
        SymbolTokenizer(SYMBOLS).encode(b"v0 k9")
    for tokenizer in (ByteTokenizer(), bpe, SymbolTokenizer(SYMBOLS)):
        for ids in ([-1], [0, tokenizer.vocab_size]):
            with pytest.raises(ValueError, match="ids: expected within"):
                tokenizer.decode(ids)
    with pytest.raises(ValueError, match="got no such file"):
        load_tokenizer(tmp_path)
    for content in ("{}", "[]", "no json", '{"kind": "symbols"}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="tokenizer: expected a tokenizer of this package"):
            load_tokenizer(tmp_path)


def test_a_word_of_a_whole_file_is_trained_on_in_pieces():
    """It took minutes: time of the square of its length."""
    text = ("abcde" * 100_000 + " short words " * 9 + "é" * 2500).encode()
    tokenizer = BPETokenizer.train([text], 260)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) < len(text) / 2
    pieces = list(tokenizer_module.short_words(text.decode()))
    assert "".join(pieces).encode() == text
    assert max(len(word) for piece in pieces for word in piece.split()) == 1000
    assert list(tokenizer_module.short_words("some words\n and more\n")) == ["some words\n and more\n"]
