"""Everything that touches pixels: theme, text, canvas, the graph's layers, the panels. Called by ``app`` and ``export``."""
