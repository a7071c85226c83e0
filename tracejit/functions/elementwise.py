"""Every elementwise function under one roof: NumPy's ufuncs (``ufuncs``) and the functions around them (``numeric``).

Imported by ``tracejit.functions``.
"""

from __future__ import annotations

from tracejit.functions import numeric, ufuncs
from tracejit.functions.numeric import *  # noqa: F403
from tracejit.functions.ufuncs import *  # noqa: F403

__all__ = [*ufuncs.__all__, *numeric.__all__]  # noqa: PLE0604
