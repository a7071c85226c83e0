"""The primitive operations, one file per family; importing this package fills the op table."""

from tracejit.ops import (
    barrier as barrier,
)
from tracejit.ops import (
    contraction as contraction,
)
from tracejit.ops import (
    control as control,
)
from tracejit.ops import (
    creation as creation,
)
from tracejit.ops import (
    elementwise as elementwise,
)
from tracejit.ops import (
    indexing as indexing,
)
from tracejit.ops import (
    ordering as ordering,
)
from tracejit.ops import (
    reduction as reduction,
)
from tracejit.ops import (
    registry as registry,
)
from tracejit.ops import (
    shape as shape,
)
from tracejit.ops import (
    window as window,
)
