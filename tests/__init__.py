"Contracts of the package as a whole; `python -m tests` runs them all, `pytest tests/test_x.py` runs one file"
import os

# Small matrices on few cores: one thread each is fastest, and notebooks already run side by side. Set before torch is imported.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"): os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")  # nothing may be fetched
