"""These tests need a CUDA device; `make gpu` runs them there, and without one this folder is not collected."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
