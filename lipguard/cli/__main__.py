"""`python -m lipguard.cli`."""

from __future__ import annotations

import sys

from lipguard.cli.main import main

sys.exit(main())
