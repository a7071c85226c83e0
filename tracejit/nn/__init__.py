"""Neural networks: functional forms with PyTorch's names and modules that are plain pytrees. Imported by
users.

Functions work on NumPy arrays and inside traced code alike; modules are frozen dataclasses, built with a
NumPy Generator (``nn.Linear(784, 512, rng=np.random.default_rng(0))``) and passed through ``@trace`` and
``grad`` like any tree.
"""

from tracejit.nn import functional as functional
from tracejit.nn import init as init
from tracejit.nn.functional import *  # noqa: F403
from tracejit.nn.layers import *  # noqa: F403
from tracejit.nn.module import *  # noqa: F403
from tracejit.nn.transformer import *  # noqa: F403
