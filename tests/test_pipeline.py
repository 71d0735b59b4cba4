"""The pipeline on real, built networks and on small scans."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

import trtseg
from tests.golden import GOLDEN, read_golden, read_voxels
from trtseg.backends.base import ChainOutput
from trtseg.errors import (
    DeviceError,
    EngineError,
    EngineMissingError,
    InputError,
    ModelError,
    UsageError,
)
from trtseg.home import demo_folder
from trtseg.modelinstall import import_folder
from trtseg.nifti import scan_from_array
from trtseg.pipeline import EMPTY_BRAIN, Segmenter
from trtseg.scan import Scan

CASE = GOLDEN / "chain_random11" / "scan.nii.gz"


@pytest.fixture(scope="module")
def segmenter(engines_root: Path) -> Segmenter:
    return Segmenter("random11", engines=engines_root, device="auto")


@pytest.fixture(scope="module")
def result(segmenter: Segmenter) -> trtseg.Segmentation:
    return segmenter.segment(CASE, probabilities=True)


def test_result_is_frozen_and_complete(result: trtseg.Segmentation) -> None:
    image = nibabel.load(CASE)
    assert result.brain.dtype == result.cortex.dtype == np.uint8
    assert result.brain.shape == result.cortex.shape == image.shape
    assert np.array_equal(result.affine, image.affine)
    assert list(result.times) == ["read", "z-score", "brain", "cortex", "gate"]
    assert all(seconds >= 0 for seconds in result.times.values())
    assert result.device == "cpu"
    assert result.models == "random11"
    assert result.warnings == ()
    assert result.ga_weeks is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.brain_ml = 0.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        result.times["read"] = 0.0  # type: ignore[index]


def test_every_result_is_checked(result: trtseg.Segmentation) -> None:
    # Random weights find 1 mL of brain; 20 mL would be the least at any age.
    assert result.suspect
    assert result.qc.check("brain_found").verdict == "ok"
    assert result.qc.check("brain_volume").verdict == "suspect"
    assert result.qc.check("brain_volume").value == pytest.approx(result.brain_ml)
    assert result.qc is result.qc


def test_checks_by_gestational_age(segmenter: Segmenter) -> None:
    older = segmenter.segment(CASE, ga_weeks=27.4)
    assert older.ga_weeks == 27.4
    assert older.qc.check("gestational_age").value == 27.4
    with pytest.raises(UsageError, match="17 weeks"):
        segmenter.segment(CASE, ga_weeks=17)


def test_a_result_that_is_not_suspect(result: trtseg.Segmentation) -> None:
    side = np.linspace(-1, 1, 60)
    radius = np.sqrt(sum(np.square(g) for g in np.meshgrid(side, side, side, indexing="ij")))
    geometry = scan_from_array(radius, np.diag([1.2, 1.2, 1.2, 1])).geometry
    brain = (radius < 0.9).astype(np.uint8)
    cortex = brain - (radius < 0.85).astype(np.uint8)
    good = dataclasses.replace(result, brain=brain, cortex=cortex, geometry=geometry)
    assert good.qc.reasons == ()
    assert not good.suspect


def test_volumes_are_voxels_times_voxel_volume(result: trtseg.Segmentation) -> None:
    brain = read_golden("chain_random11", "brain_").labels
    cortex = read_golden("chain_random11", "cgm_").labels
    # The phantoms' voxels are 0.8 mm: 0.512 mm^3 each.
    assert result.brain_ml == pytest.approx(int(brain.sum()) * 0.512e-3, rel=1e-5)
    assert result.cortex_ml == pytest.approx(int(cortex.sum()) * 0.512e-3, rel=1e-5)


def test_cortex_is_gated_by_the_brain(result: trtseg.Segmentation) -> None:
    assert not result.cortex[result.brain == 0].any()
    assert result.cortex_probabilities is not None
    assert not result.cortex_probabilities[result.brain == 0].any()
    assert result.cortex_probabilities.dtype == np.float32


def test_path_image_and_array_give_the_same(
    segmenter: Segmenter, result: trtseg.Segmentation
) -> None:
    image = nibabel.load(CASE)
    raw = np.asanyarray(image.dataobj)
    for again in (segmenter.segment(image), segmenter.segment(raw, image.affine)):
        assert np.array_equal(again.brain, result.brain)
        assert np.array_equal(again.cortex, result.cortex)
        assert np.allclose(again.affine, result.affine)
        assert again.brain_probabilities is None
        assert again.cortex_probabilities is None


def test_scaling_the_intensities_changes_nothing_but_rounding(
    segmenter: Segmenter, result: trtseg.Segmentation
) -> None:
    image = nibabel.load(CASE)
    scaled = np.asanyarray(image.dataobj).astype(np.float64) * 3.5 + 100
    again = segmenter.segment(scaled, image.affine)
    assert (again.brain != result.brain).mean() < 1e-4


@pytest.mark.parametrize("reorient", [False, True])
def test_the_scan_that_follows_is_the_chains_unless_it_is_turned(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch, reorient: bool
) -> None:
    given: list[Any] = []
    run = segmenter.chain.run

    def watched(scan: Scan, **options: Any) -> ChainOutput:
        given.append(options.pop("following"))
        return run(scan, **options)

    def following() -> Scan | None:
        return None

    monkeypatch.setattr(segmenter.chain, "run", watched)
    segmenter.segment(CASE, reorient=reorient, following=following)
    segmenter.segment(CASE)
    assert given == [None if reorient else following, None]


def test_progress_counts_every_tile(segmenter: Segmenter) -> None:
    seen: list[tuple[str, int, int]] = []
    segmenter.segment(CASE, progress=lambda *args: seen.append(args))
    # 53 x 40 x 32 voxels: 2 x 2 x 2 tiles of 29.
    assert [step for step in seen if step[0] == "bdn"] == [("bdn", n, 8) for n in range(9)]
    cgm = [step for step in seen if step[0] == "cgm"]
    assert [done for _, done, _ in cgm] == list(range(cgm[0][2] + 1))


def test_a_given_mask_takes_the_brain_networks_place(segmenter: Segmenter, tmp_path: Path) -> None:
    shape = read_voxels(CASE).shape
    mask = np.zeros(shape, np.float32)
    mask[10:30, 10:30, 5:25] = 0.99999997
    path = tmp_path / "mask.nii.gz"
    nibabel.save(nibabel.Nifti1Image(mask, nibabel.load(CASE).affine), path)
    seen = set()
    result = segmenter.segment(
        CASE, mask=path, probabilities=True, progress=lambda net, *_: seen.add(net)
    )
    assert seen == {"cgm"}
    assert np.array_equal(result.brain, mask > 0.5)
    assert result.brain_probabilities is None
    image = nibabel.load(path)
    in_memory = nibabel.Nifti1Image((mask > 0.5).astype(np.uint8)[..., None], image.affine)
    for given in (mask > 0.5, image, in_memory):
        again = segmenter.segment(CASE, mask=given)
        assert np.array_equal(again.brain, result.brain)
        assert np.array_equal(again.cortex, result.cortex)


@pytest.mark.parametrize(
    ("shape", "shift", "said"),
    [
        (
            (4, 5, 6),
            0.15,
            r"mask: .* lie up to 0\.15 mm off the scan's; expected .* within 0\.1 mm",
        ),
        ((4, 5, 7), 0.0, r"a mask of shape \(4, 5, 7\); expected the scan's shape \(4, 5, 6\)"),
        ((4, 5, 6, 2), 0.0, "mask: 4-D with 2 volumes; expected one 3-D mask"),
    ],
)
def test_a_mask_image_must_lie_on_the_scan(
    segmenter: Segmenter, shape: tuple[int, ...], shift: float, said: str
) -> None:
    scan = nibabel.Nifti1Image(np.arange(120.0).reshape(4, 5, 6), np.eye(4))
    affine = np.eye(4)
    affine[2, 3] = shift
    mask = nibabel.Nifti1Image(np.ones(shape, np.uint8), affine)
    with pytest.raises(InputError, match=said):
        segmenter.segment(scan, mask=mask)


def test_a_mask_image_that_cannot_be_read_is_called_the_mask(segmenter: Segmenter) -> None:
    mask = nibabel.Nifti1Image(np.full(read_voxels(CASE).shape, np.nan, np.float32), np.eye(4))
    with pytest.raises(InputError, match=r"^mask: .* not finite"):
        segmenter.segment(CASE, mask=mask)
    with pytest.raises(InputError, match=r"^mask: Geometry;"):
        segmenter.segment(CASE, mask=scan_from_array(np.ones((2, 2, 2)), np.eye(4)).geometry)


def test_an_empty_brain_gives_empty_maps_and_a_warning(segmenter: Segmenter) -> None:
    shape = read_voxels(CASE).shape
    result = segmenter.segment(CASE, mask=np.zeros(shape, bool), probabilities=True)
    assert not result.brain.any()
    assert not result.cortex.any()
    assert result.cortex_probabilities is not None
    assert not result.cortex_probabilities.any()
    assert result.brain_ml == result.cortex_ml == 0.0
    assert result.suspect
    assert EMPTY_BRAIN in result.warnings
    said = "No brain was found: the mask given is empty, and so are both maps."
    assert result.qc.reasons[0] == result.qc.check("brain_found").line == said
    full = segmenter.segment(CASE, mask=np.ones(shape, bool))
    assert full.qc.check("brain_found").line == "A brain was found."


def test_demo_results_carry_the_notice(engines_root: Path) -> None:
    rng = np.random.default_rng(0)
    result = trtseg.segment(
        rng.normal(size=(10, 11, 12)), np.eye(4), models="demo", engines=engines_root
    )
    assert result.notice == "demo weights, synthetic, not for research or clinical use"


def test_arguments_that_cannot_be_used(segmenter: Segmenter) -> None:
    with pytest.raises(InputError, match="without its affine"):
        segmenter.segment(np.ones((4, 4, 4)))
    with pytest.raises(InputError, match="has its own"):
        segmenter.segment(CASE, np.eye(4))
    with pytest.raises(InputError, match="constant"):
        segmenter.segment(np.ones((4, 4, 4)), np.eye(4))
    with pytest.raises(InputError):
        segmenter.segment(3.5)
    for weeks in ("x", "27", [27.0]):
        with pytest.raises(UsageError, match="a gestational age that is no number"):
            segmenter.segment(CASE, ga_weeks=weeks)  # type: ignore[arg-type]


def test_errors_begin_with_the_scans_name_once(segmenter: Segmenter, tmp_path: Path) -> None:
    scan = tmp_path / "a.nii.gz"
    image = nibabel.Nifti1Image(np.full((4, 4, 4), 7, np.int16), None)
    nibabel.save(image, scan)
    for given, name, start in [
        (scan, None, f"{scan}: "),
        (str(scan), None, f"{scan}: "),
        (scan, "patient 3", "patient 3: "),
        (lambda: scan_from_array(np.ones((4, 4, 4)), np.eye(4)), None, ""),
        (lambda: scan_from_array(np.ones((4, 4, 4)), np.eye(4)), "b", "b: "),
    ]:
        with pytest.raises(InputError) as caught:
            segmenter.segment(given, name=name)
        assert str(caught.value).startswith(f"{start}a constant image (every voxel is ")
        assert "; expected a scan with some contrast; check " in str(caught.value)
    with pytest.raises(InputError) as caught:
        segmenter.segment(scan, reorient=True)
    assert str(caught.value).startswith(f"{scan}: a header without orientation")
    scan.write_bytes(b"bad")
    with pytest.raises(InputError) as caught:
        segmenter.segment(scan)
    assert str(caught.value).count(str(scan)) == 1


def test_a_closed_segmenter_says_so(engines_root: Path) -> None:
    with Segmenter("random11", engines=engines_root) as closed:
        pass
    with pytest.raises(UsageError, match=r"the segmenter is closed; .*make a new Segmenter"):
        closed.segment(CASE)


def test_nothing_built_says_the_command(tmp_path: Path) -> None:
    with pytest.raises(EngineMissingError, match="trtseg engines build --models demo"):
        Segmenter("demo", engines=tmp_path)


def test_no_published_weights_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="trtseg models pull") as caught:
        Segmenter(engines=tmp_path)
    assert "--models demo" in str(caught.value)


def test_a_built_set_needs_no_checkpoint(engines_root: Path) -> None:
    # The fixture's home is gone here, as on a box that was given the engines only.
    assert Segmenter("random11", engines=engines_root).models == "random11"


def test_a_build_of_another_checkpoint_is_stale(engines_root: Path) -> None:
    # The set of that name is another one on this machine: the demo's files.
    import_folder(demo_folder(), unpublished=True, name="random11")
    with pytest.raises(EngineError, match="another checkpoint"):
        Segmenter("random11", engines=engines_root)


def test_a_gpu_that_is_not_there(engines_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtseg.cuda.device.DRIVER", "libnone.so.1")
    with pytest.raises(DeviceError, match="driver is missing"):
        Segmenter("random11", engines=engines_root, device="cuda:0")
    with Segmenter("random11", engines=engines_root) as segmenter:
        assert segmenter.device == "cpu"
        assert segmenter.note == (
            "running on the CPU: the NVIDIA driver is missing (libnone.so.1 cannot be loaded)"
        )
