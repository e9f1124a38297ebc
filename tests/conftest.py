"""One thread for the suite: on a machine that others use, several spinning BLAS threads take ten to fifty times longer."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import torch

torch.set_num_threads(1)
