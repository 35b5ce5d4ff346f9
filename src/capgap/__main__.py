"""`python -m capgap`: the same as the command `capgap`."""

import sys

from capgap.jobs.cli import main

sys.exit(main())
