"""Every functional form in one place, for those who write ``from tracejit.nn import functional as F``."""

from tracejit.nn.activations import *  # noqa: F403
from tracejit.nn.attention import *  # noqa: F403
from tracejit.nn.dense import *  # noqa: F403
from tracejit.nn.losses import *  # noqa: F403
from tracejit.nn.norms import *  # noqa: F403
from tracejit.nn.window import *  # noqa: F403
