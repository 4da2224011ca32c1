"`python -m tests [pytest arguments]`: everything that must hold, notebooks included; the last line is pytest's own"
import sys
from pathlib import Path

import pytest

sys.exit(pytest.main([str(Path(__file__).parent), *sys.argv[1:]]))
