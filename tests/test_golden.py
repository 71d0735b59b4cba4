"""Parity: every golden output of DeepMedic v0.7.0, in float32 on the CPU.

The data and how it was made: tests/data/README.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.golden import NETWORK_CASES, golden_scan, network_case, read_golden
from trtseg import tiling
from trtseg.backends.openvino import OpenVINOBackend
from trtseg.chains import gate
from trtseg.engine import load_engine
from trtseg.pipeline import Segmenter

CHAINS = {
    "chain_crop": "demo",
    "chain_random11": "random11",
    "chain_23w": "demo",
}


@pytest.mark.parametrize("case", NETWORK_CASES)
def test_one_network_on_a_normalised_scan(case: str, engines_root: Path) -> None:
    volume, roi = network_case(case)
    backend = OpenVINOBackend()
    network = backend.load(load_engine(engines_root, "random11", "cgm"))
    plan = tiling.plan_tiles(volume.shape, network.spec, roi)
    output = gate(network.run(volume, plan, probabilities=True), roi)
    assert output.probabilities is not None
    read_golden(case).compare(output.labels, output.probabilities, case)


@pytest.mark.parametrize(("case", "models"), CHAINS.items())
def test_both_networks_on_a_raw_scan(case: str, models: str, engines_root: Path) -> None:
    brain, cortex = read_golden(case, "brain_"), read_golden(case, "cgm_")
    with Segmenter(models, engines=engines_root, device="cpu") as segmenter:
        result = segmenter.segment(golden_scan(case), probabilities=True)
        assert result.brain_probabilities is not None
        assert result.cortex_probabilities is not None
        brain.compare(result.brain, result.brain_probabilities, f"{case} brain")
        same_brain = np.array_equal(result.brain, brain.labels)
        if same_brain:
            # End to end and within the golden brain mask are then one comparison.
            cortex.compare(result.cortex, result.cortex_probabilities, f"{case} cortex")
            return
        disputed = result.brain != brain.labels
        kept = np.where(disputed, 0, result.cortex_probabilities)
        assert np.abs(kept - np.where(disputed, 0, cortex.scaled / 65535.0)).max() < 1e-4
        given = segmenter.segment(golden_scan(case), mask=brain.labels, probabilities=True)
        assert given.cortex_probabilities is not None
        cortex.compare(given.cortex, given.cortex_probabilities, f"{case} cortex, golden brain")
