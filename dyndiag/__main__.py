"""`python -m dyndiag`: the command line."""

import sys

from dyndiag.cli import main

sys.exit(main())
