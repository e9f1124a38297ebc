"""The elimination front by front: what it must not prove."""

from __future__ import annotations

import pytest
import torch

from lipguard.errors import NotCertified
from lipguard.verify.enclosed import Enclosed
from lipguard.verify.lmi.elimination import Elimination


@pytest.mark.parametrize("size", [0.5, 2.0])
def test_imaginary_parts_of_a_pivot_count_beside_real_neighbours(size: float) -> None:
    """Pivots I + a [[0, i], [-i, 0]], a = 0, size, -size at the three frequencies: eigenvalues 1 +- size."""
    turned = torch.tensor([[0, 1j], [-1j, 0]], dtype=torch.complex128) * size
    x = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    z = Elimination([torch.ones(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)], [(3,), ()])
    z.add(0, 0, Enclosed(torch.stack([0 * turned, turned, -turned])))
    z.add(0, 1, Enclosed(x.expand(3, -1, -1)))
    if size > 1:
        with pytest.raises(NotCertified):
            z.least_rho()
    else:
        # x'P^-1 x = 1 / (1 - size^2) at the two frequencies that turn, 1 at the other.
        expected = 1 + 2 / (1 - size**2)
        assert expected <= z.least_rho() <= expected * (1 + 1e-9)
