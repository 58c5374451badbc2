"""Every test runs offline and on one thread."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hypothesis import settings

torch.set_num_threads(1)

# No deadline: a busy machine is no failure. The same examples in every run of CI; fresh ones elsewhere.
settings.register_profile("dlm_tune", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("dlm_tune")
