"""The primitive operations, one file per family; importing this package fills the op table."""

from tracejit.ops import (
    barrier as barrier,
    contraction as contraction,
    control as control,
    creation as creation,
    elementwise as elementwise,
    indexing as indexing,
    ordering as ordering,
    reduction as reduction,
    registry as registry,
    shape as shape,
    window as window,
)
