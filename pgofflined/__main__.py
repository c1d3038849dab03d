"""``python -m pgofflined``."""

import sys

from pgofflined.cli import main

sys.exit(main())
