"""`python -m distributed_unlearn`."""

import sys

from distributed_unlearn.cli import main

sys.exit(main())
