"""Runs the check; its options are in `check`."""

import sys

from gpu_check.check import main

sys.exit(main())
