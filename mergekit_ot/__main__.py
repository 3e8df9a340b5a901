"""`python -m mergekit_ot` is `mergekit-ot`."""

import sys

from mergekit_ot.cli import main


sys.exit(main())
