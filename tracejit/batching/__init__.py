"""``tj.vmap``: a function of one example becomes a function of many. See ``api.py``; rules per op family beside it."""

from tracejit.batching import arrays as arrays
from tracejit.batching import flow as flow
from tracejit.batching import gather as gather
from tracejit.batching import products as products
from tracejit.batching.api import vmap
from tracejit.batching.core import RULES, rule_for

__all__ = ["RULES", "rule_for", "vmap"]
