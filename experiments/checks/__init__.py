"""Commands that check the project itself: what a compiler says of a config, and what a kill does to a run."""
