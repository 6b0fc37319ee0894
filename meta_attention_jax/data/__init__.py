"""Corpora, tokenizers and batches, on the host."""

from meta_attention_jax.data.corpora import Corpus, Document, load_corpus
from meta_attention_jax.data.manifest import write_manifest
from meta_attention_jax.data.pipeline import Dataset, make_dataset
from meta_attention_jax.data.recall import RecallConfig
from meta_attention_jax.data.recall_floor import entropy_floor
from meta_attention_jax.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer

__all__ = [
    "Corpus", "Dataset", "Document", "RecallConfig", "Tokenizer", "entropy_floor", "load_corpus", "load_tokenizer",
    "make_dataset", "make_tokenizer", "write_manifest",
]
