"""Corpora, tokenizers and batches, on the host."""
