"""Speed and memory beside peers, one script per question: `python -m benchmarks.ranking`, or all of them."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py does; before torch starts its threads
