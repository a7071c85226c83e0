"""Graph layout without any drawing: ``layered`` (one level), ``compound`` (nested scopes), ``score`` (the whole page).

Pure Python, deterministic, no pygame. Called by ``tracejit_viz.scene``.
"""
