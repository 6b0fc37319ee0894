"""Controllers: who decides, for every token, which attention mechanism it uses."""
