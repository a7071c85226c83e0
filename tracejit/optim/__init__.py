"""Optimisers, schedules and gradient clipping: pure functions over any tree. Imported by users.

``opt = optim.adamw(3e-4)``, ``state = opt.init(model)``, ``model, state = opt.update(model, grads, state)``;
inside ``@trace`` or outside. ``optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(3e-4))`` puts
transforms in front.
"""

from tracejit.optim.base import *  # noqa: F403
from tracejit.optim.clipping import *  # noqa: F403
from tracejit.optim.optimizers import *  # noqa: F403
from tracejit.optim.schedules import *  # noqa: F403
