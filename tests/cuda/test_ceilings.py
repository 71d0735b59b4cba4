from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from tests.backends.fake_tensorrt import multiply
from tests.cuda.host_device import HostDevice, view
from trtseg.cuda import ceilings as module
from trtseg.cuda.ceilings import SIDE, measure

SMALL = 8


class Product:
    """Multiplies on the host, and keeps a factor and the product that came of it."""

    scratch_bytes = 0

    def __init__(self, device: HostDevice) -> None:
        self.device = device

    def bind(self, tensors: Mapping[str, int], scratch: int) -> None:
        self.tensors = dict(tensors)

    def enqueue(self) -> None:
        self.device.submit(self.run)

    def run(self) -> None:
        multiply(SMALL, self.tensors)
        self.factor, self.product = (
            view(self.tensors[name], np.float16, (SMALL, SMALL)).copy()
            for name in ("one", "product")
        )


def test_what_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_VALUES", 11)
    device = HostDevice()
    product = Product(device)
    with device.active():
        measure(device, product, side=SMALL, copy_bytes=256)
    assert len(np.unique(product.factor)) == 11
    assert len(np.unique(product.factor, axis=0)) == SMALL  # no two rows are alike
    np.testing.assert_array_equal(product.product, product.factor @ product.factor)
    device.close()


def test_no_two_rows_of_the_real_matrices_are_alike() -> None:
    assert math.gcd(SIDE, module._VALUES) == 1
    assert module._VALUES > SIDE
