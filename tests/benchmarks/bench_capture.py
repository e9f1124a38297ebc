"""ResNet-50 at 224 x 224, as torchvision builds it, read in a fresh process: seconds and the process's largest memory.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_capture.py [side of the image]

Also run by `pytest -m slow tests/benchmarks/bench_capture.py`, which requires at most 4 GB.
"""

from __future__ import annotations

import os
import pathlib
import resource
import subprocess
import sys
import time

import pytest

TESTS = pathlib.Path(__file__).parents[1]
LARGEST = 4.0
"""GB: torch and the model take 0.35 of them."""


@pytest.mark.slow
def test_memory() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=True, timeout=600)
    *_, peak = done.stdout.split(" s CPU, peak ")
    assert 0.35 < float(peak.split()[0]) < LARGEST


def main(side: int) -> None:
    sys.path.insert(0, str(TESTS))
    import torch
    from gallery.images import ResNet

    import lipguard as lg

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ResNet().eval()
    began, cpu = time.perf_counter(), time.process_time()
    network = lg.capture(model, torch.zeros(1, 3, side, side))
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"{network}: {wall:.1f} s, {cpu:.1f} s CPU, peak {peak:.2f} GB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 224)
