"""``python -m tracejit``: the same as the ``tracejit`` command."""

from tracejit.cli import main

raise SystemExit(main())
