"""NumPy's functions on tensors: its names, signatures, promotion and broadcasting, over the primitives of ``tracejit.ops``.

Reached through operators, methods and NumPy's dispatch protocols; on concrete arrays each function is NumPy's own.
"""

from tracejit.functions.analysis import *  # noqa: F403
from tracejit.functions.creation import *  # noqa: F403
from tracejit.functions.editing import *  # noqa: F403
from tracejit.functions.elementwise import *  # noqa: F403
from tracejit.functions.indexing import *  # noqa: F403
from tracejit.functions.joining import *  # noqa: F403
from tracejit.functions.linalg import *  # noqa: F403
from tracejit.functions.nan_reductions import *  # noqa: F403
from tracejit.functions.numeric import *  # noqa: F403
from tracejit.functions.ordering import *  # noqa: F403
from tracejit.functions.reductions import *  # noqa: F403
from tracejit.functions.shape import *  # noqa: F403
