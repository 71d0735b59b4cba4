"""SimpleITK, which reads NIfTI on its own, opens every map with the scan's geometry."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.faults.niftifile import header, save, voxels
from tests.golden import DEMO_SCAN, GOLDEN
from trtseg import nifti
from trtseg.output import plan_outputs
from trtseg.output import save as save_result

SimpleITK = pytest.importorskip("SimpleITK", reason="pip install 'trtseg[test]'")

SHAPE = (6, 5, 4)
#: NIfTI counts millimetres to the right and to the front, ITK to the left and to the back.
TO_ITK = np.diag([-1.0, -1.0, 1.0])


def quaternion(rotation: np.ndarray) -> tuple[float, float, float]:
    """b, c and d of a rotation with a positive trace, by the NIfTI standard."""
    a = np.sqrt(1 + np.trace(rotation)) / 2
    return (
        float((rotation[2, 1] - rotation[1, 2]) / (4 * a)),
        float((rotation[0, 2] - rotation[2, 0]) / (4 * a)),
        float((rotation[1, 0] - rotation[0, 1]) / (4 * a)),
    )


def fields(rotation: np.ndarray, qfac: float, **changes: Any) -> dict[str, Any]:
    """Both forms of a header: voxels of 0.8, 0.75 and 1.1 mm, rotated, mirrored by `qfac`."""
    sizes = (0.8, 0.75, 1.1)
    offset = (12.5, -30.25, 7.0)
    linear = rotation @ np.diag([1, 1, qfac]) @ np.diag(sizes)
    return {
        "pixdim": (qfac, *sizes, 1.0, 1.0, 1.0, 1.0),
        "quatern": quaternion(rotation),
        "qoffset": offset,
        "srow": tuple(np.column_stack([linear, offset]).ravel().tolist()),
        **changes,
    }


#: Turned by the angles of Pythagorean triples.
TILT = np.array([[1, 0, 0], [0, 0.8, -0.6], [0, 0.6, 0.8]])
TURN = np.array([[12 / 13, -5 / 13, 0], [5 / 13, 12 / 13, 0], [0, 0, 1]])

HEADERS = {
    "straight": fields(np.eye(3), 1.0),
    "mirrored": fields(np.eye(3), -1.0),
    "oblique": fields(TURN @ TILT, 1.0),
    "oblique-mirrored": fields(TILT @ TURN, -1.0),
    "qform-only": fields(TURN @ TILT, 1.0, sform_code=0),
    "sform-only": fields(TURN @ TILT, -1.0, qform_code=0),
    "template": fields(TILT, 1.0, qform_code=2, sform_code=4),
    "no-form": fields(np.eye(3), 1.0, qform_code=0, sform_code=0),
    "forms-disagree": fields(TURN, 1.0, qoffset=(17.5, -30.25, 7.0)),
    "metres": fields(TILT, 1.0, xyzt_units=1),
}


def geometry(image: Any) -> np.ndarray:
    """Size, spacing, origin and direction as SimpleITK has them."""
    return np.array(
        [*image.GetSize(), *image.GetSpacing(), *image.GetOrigin(), *image.GetDirection()]
    )


def results(scan: Path, out: Path, suffix: str = ".nii.gz") -> dict[Path, np.ndarray]:
    """Write all maps of a result on a scan's grid; give file to values."""
    read = nifti.read_scan(scan)
    rng = np.random.default_rng(3)
    brain = rng.integers(0, 2, read.shape).astype(np.uint8)
    maps = SimpleNamespace(
        brain=brain,
        cortex=brain * rng.integers(0, 2, read.shape).astype(np.uint8),
        brain_probabilities=rng.random(read.shape, dtype=np.float32),
        cortex_probabilities=rng.random(read.shape, dtype=np.float32),
        geometry=read.geometry,
        notice="",
    )
    (paths,) = plan_outputs([scan], out / f"cortex{suffix}", probabilities=True)
    save_result(maps, paths)
    assert paths.brain_probabilities is not None
    assert paths.cortex_probabilities is not None
    return {
        paths.brain: maps.brain,
        paths.cortex: maps.cortex,
        paths.brain_probabilities: maps.brain_probabilities,
        paths.cortex_probabilities: maps.cortex_probabilities,
    }


def assert_opens(scan: Any, maps: dict[Path, np.ndarray]) -> None:
    """Assert that SimpleITK sees each map on the scan's own grid, with the values written."""
    for path, values in maps.items():
        image = SimpleITK.ReadImage(str(path))
        np.testing.assert_array_equal(geometry(image), geometry(scan), err_msg=str(path))
        stored = SimpleITK.GetArrayFromImage(image)
        np.testing.assert_array_equal(stored.transpose(2, 1, 0), values)
        assert stored.dtype == values.dtype


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("name", HEADERS)
def test_every_map_lies_where_the_scan_lies(
    tmp_path: Path, name: str, suffix: str, endian: str
) -> None:
    values = np.arange(120).reshape(SHAPE, order="F")
    block = header(1, endian, "i2", SHAPE, **HEADERS[name])
    path = save(tmp_path, "nii", block, voxels(values, "i2", endian))
    assert_opens(SimpleITK.ReadImage(str(path)), results(path, tmp_path / "out", suffix))


def test_maps_of_a_nifti_2_scan(tmp_path: Path) -> None:
    block = header(2, "<", "i2", SHAPE, **HEADERS["oblique"])
    path = save(tmp_path, "nii", block, voxels(np.arange(120).reshape(SHAPE), "i2", "<"))
    try:
        scan = SimpleITK.ReadImage(str(path))
    except RuntimeError:
        pytest.skip("this SimpleITK reads no NIfTI-2, neither the scan nor the maps")
    assert_opens(scan, results(path, tmp_path / "out"))


@pytest.mark.parametrize("name", ["straight", "mirrored", "oblique", "oblique-mirrored"])
def test_simpleitk_agrees_on_where_a_voxel_lies(tmp_path: Path, name: str) -> None:
    block = header(1, "<", "i2", SHAPE, **HEADERS[name])
    path = save(tmp_path, "gz", block, voxels(np.arange(120).reshape(SHAPE), "i2", "<"))
    affine = nifti.read_scan(path).geometry.affine
    (cortex,) = [file for file in results(path, tmp_path / "out") if file.name == "cortex.nii.gz"]
    image = SimpleITK.ReadImage(str(cortex))
    for index in [(0, 0, 0), (5, 0, 0), (0, 4, 0), (0, 0, 3), (5, 4, 3)]:
        expected = TO_ITK @ (affine[:3, :3] @ index + affine[:3, 3])
        found = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_maps_of_a_4d_scan_are_3d(tmp_path: Path) -> None:
    shape = (*SHAPE, 2)
    block = header(1, "<", "i2", shape, **HEADERS["oblique"])
    path = save(tmp_path, "nii", block, voxels(np.arange(240).reshape(shape), "i2", "<"))
    (tmp_path / "single").mkdir()
    single = save(
        tmp_path / "single",
        "nii",
        header(1, "<", "i2", SHAPE, **HEADERS["oblique"]),
        voxels(np.arange(120).reshape(SHAPE), "i2", "<"),
    )
    assert_opens(SimpleITK.ReadImage(str(single)), results(path, tmp_path / "out"))


def test_maps_of_a_pair(tmp_path: Path) -> None:
    block = header(1, ">", "f4", SHAPE, pair=True, **HEADERS["oblique-mirrored"])
    path = save(tmp_path, "hdr", block, voxels(np.arange(120).reshape(SHAPE), "f4", ">"))
    assert_opens(SimpleITK.ReadImage(str(path)), results(path, tmp_path / "out"))


@pytest.mark.parametrize(
    "scan", [DEMO_SCAN, *sorted(GOLDEN.glob("*/scan.nii.gz"))], ids=lambda path: path.parent.name
)
def test_maps_of_the_phantoms(tmp_path: Path, scan: Path) -> None:
    assert_opens(SimpleITK.ReadImage(str(scan)), results(scan, tmp_path))
