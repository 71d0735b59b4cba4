"""Headers with mutations: each is read or refused in one line, in little time and memory."""

from __future__ import annotations

from pathlib import Path

from tests.faults.counts import count, run_child


def test_mutated_headers_are_read_or_refused(tmp_path: Path) -> None:
    # The child ends with a traceback on anything but InputError, on a hang, and where an input
    # asks for 500 MB of address space, whether it then uses them or not.
    wanted = count(1_500, 20_000)
    report = run_child("mutate", wanted, 1, tmp_path)
    outcomes = report["outcomes"]
    assert sum(outcomes.values()) >= wanted
    assert 0.2 * wanted < outcomes["accepted"] < 0.8 * wanted
    for refusal in (
        "not a NIfTI file; expected a N",
        "a singular affine; expected an",
        "# bytes of voxels in the file;",
        "an image with axes of (#, #, #",
        "z-score, a constant image (every",
    ):
        assert any(name.startswith(f"refused: {refusal[:22]}") for name in outcomes), refusal
    assert report["peak_bytes"] < 500 << 20
