"""Command-line programs over `meta_attention_jax`: thin mains, benchmarks, notebooks."""
