"`python -m tests [pytest arguments]`: everything that must hold, notebooks included; the last line is pytest's own"
import sys
from pathlib import Path

import pytest

SHARED = "-n", "logical", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder"  # out to cores, by file; -n 0 ends that

sys.exit(pytest.main([str(Path(__file__).parent), *SHARED, *sys.argv[1:]]))
