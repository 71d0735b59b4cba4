"""All 48 ways to store one scan: turned to one orientation, and back."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trtseg import nifti
from trtseg.errors import InputError
from trtseg.normalise import z_score
from trtseg.orientation import (
    Orientation,
    check_unambiguous,
    orientation_of,
    reorient,
    restore,
    to_canonical,
)
from trtseg.scan import Scan

#: nibabel's form: per axis of the array, the axis it goes to and the sign it gets.
VERSIONS = [
    np.array(list(zip(axes, signs, strict=True)))
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]

versions = st.sampled_from(VERSIONS)
shapes = st.tuples(*[st.integers(1, 7)] * 3)
zooms = st.tuples(*[st.floats(0.3, 4.0)] * 3)
degrees = st.floats(-44, 44)


def fixed(examples: int) -> settings:
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None)


def rotation(axis: int, angle: float) -> np.ndarray:
    """Rotation about one axis by degrees."""
    one, other = [n for n in range(3) if n != axis]
    matrix = np.eye(3)
    radians = np.radians(angle)
    matrix[one, one] = matrix[other, other] = np.cos(radians)
    matrix[one, other], matrix[other, one] = -np.sin(radians), np.sin(radians)
    return matrix


def affine_of(directions: np.ndarray, sizes: Any = (0.8, 0.8, 0.8)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = directions * np.asarray(sizes)
    affine[:3, 3] = (12.5, -30.25, 7.75)
    return affine


OBLIQUE = affine_of(rotation(0, 31) @ rotation(1, -17) @ rotation(2, 40), (0.8, 0.75, 1.0))


def numbered(shape: tuple[int, ...], dtype: str = "i2") -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def stored_as(data: np.ndarray, affine: np.ndarray, version: np.ndarray) -> nibabel.Nifti1Image:
    """The same image with other axes, by nibabel."""
    return nibabel.Nifti1Image(data, affine).as_reoriented(version)


def put_back(array: np.ndarray, version: np.ndarray) -> np.ndarray:
    """An array on the grid of a version, on the grid of the first image, by nibabel."""
    inverse = np.empty_like(version)
    for axis, (goes_to, sign) in enumerate(version):
        inverse[goes_to] = axis, sign
    return nibabel.orientations.apply_orientation(array, inverse)


def scan_of(image: nibabel.Nifti1Image) -> Scan:
    return nifti.scan_from_image(image)


# Orientation


@pytest.mark.parametrize(
    ("rows", "code", "axes", "flips"),
    [
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], "RAS", (0, 1, 2), (False, False, False)),
        ([[-1, 0, 0], [0, -1, 0], [0, 0, 1]], "LPS", (0, 1, 2), (True, True, False)),
        ([[0, 0, 1], [-1, 0, 0], [0, -1, 0]], "PIR", (2, 0, 1), (False, True, True)),
        ([[0, -1, 0], [0, 0, 1], [1, 0, 0]], "SLA", (1, 2, 0), (True, False, False)),
    ],
)
def test_orientation_of_straight_axes(rows, code, axes, flips):
    found = orientation_of(affine_of(np.array(rows)))

    assert found == Orientation(axes, flips)
    assert found.code == code


@given(version=versions, angle=degrees, axis=st.integers(0, 2), sizes=zooms)
@fixed(80)
def test_code_is_nibabels(version, angle, axis, sizes):
    image = stored_as(np.zeros((1, 1, 1)), affine_of(rotation(axis, angle), sizes), version)

    assert orientation_of(image.affine).code == "".join(nibabel.aff2axcodes(image.affine))


@pytest.mark.parametrize("angle", [45, 44.95, 45.05, -45])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_half_way_between_two_orientations(angle, axis):
    for version in VERSIONS:
        image = stored_as(numbered((2, 3, 4)), affine_of(rotation(axis, angle)), version)
        with pytest.raises(InputError, match="half way between two orientations"):
            to_canonical(scan_of(image))


@pytest.mark.parametrize(("angle", "code"), [(44.85, "RAS"), (45.15, "ALS")])
def test_close_to_half_way(angle, code):
    assert orientation_of(affine_of(rotation(2, angle))).code == code


@pytest.mark.parametrize(
    ("affine", "found"),
    [
        (np.diag([1, 0, 1, 1]), "singular"),
        (np.diag([1, np.nan, 1, 1]), "not finite"),
        (np.eye(3), "shape (3, 3)"),
        (np.ones((4, 4)), "last row"),
        ("RAS", "shape ()"),
    ],
)
def test_affine_of_no_orientation(affine, found):
    with pytest.raises(InputError) as caught:
        orientation_of(affine)
    assert found in str(caught.value)


def test_axis_without_a_direction(monkeypatch):
    nothing = np.array([[0, 1], [1, 1], [np.nan, np.nan]])  # nibabel's row for a dropped axis
    monkeypatch.setattr(nifti, "closest_axes", lambda affine: nothing)
    with pytest.raises(InputError, match="half way"):
        orientation_of(np.eye(4))


# There and back


@given(version=versions, shape=shapes, dtype=st.sampled_from(["u1", "i2", "f4", "f8"]))
@fixed(150)
def test_restore_is_the_inverse(version, shape, dtype):
    scan = scan_of(stored_as(numbered(shape, dtype), OBLIQUE, version))

    canonical, orientation = to_canonical(scan)
    back = restore(canonical.data, orientation)

    np.testing.assert_array_equal(back, scan.data)
    assert back.dtype == scan.data.dtype
    assert back.flags.c_contiguous
    assert canonical.data.flags.f_contiguous
    np.testing.assert_array_equal(reorient(back, orientation), canonical.data)


@given(version=versions, shape=shapes, sizes=zooms, angles=st.tuples(degrees, degrees, degrees))
@fixed(150)
def test_no_voxel_moves_in_space(version, shape, sizes, angles):
    turned = rotation(0, angles[0]) @ rotation(1, angles[1]) @ rotation(2, angles[2])
    scan = scan_of(stored_as(numbered(shape), affine_of(turned, sizes), version))
    try:
        canonical, _ = to_canonical(scan)
    except InputError:
        assume(False)

    indices = np.argwhere(np.ones(canonical.shape, bool))
    places = np.column_stack([indices, np.ones(len(indices))]) @ canonical.geometry.affine.T
    stored = (places @ np.linalg.inv(scan.geometry.affine).T)[:, :3]
    np.testing.assert_allclose(stored, stored.round(), atol=1e-9)
    np.testing.assert_array_equal(
        canonical.data[tuple(indices.T)], scan.data[tuple(stored.round().astype(int).T)]
    )
    assert orientation_of(canonical.geometry.affine).code == "RAS"
    assert canonical.geometry.voxel_volume_ml == pytest.approx(scan.geometry.voxel_volume_ml)
    header = canonical.geometry.header
    np.testing.assert_array_equal(
        [header["srow_x"], header["srow_y"], header["srow_z"]],
        canonical.geometry.affine[:3].astype(np.float32),
    )


def test_a_marked_corner_goes_to_its_place():
    # Left, posterior and superior grow: the first voxel is the rightmost, foremost and lowest.
    data = np.zeros((2, 3, 4), np.uint8)
    data[0, 0, 0] = 1
    scan = nifti.scan_from_array(data, affine_of(np.diag([-1, -1, 1])))

    canonical, orientation = to_canonical(scan)

    assert orientation.code == "LPS"
    assert np.argwhere(canonical.data).tolist() == [[1, 2, 0]]
    # Millimetres: the first voxel stays where it was, and the new first one is 0.8 mm per voxel
    # to its left and back.
    np.testing.assert_allclose(canonical.geometry.affine @ [1, 2, 0, 1], [12.5, -30.25, 7.75, 1])
    np.testing.assert_allclose(canonical.geometry.affine[:3, 3], [11.7, -31.85, 7.75], rtol=1e-6)


def test_a_marked_corner_among_permuted_axes():
    # Posterior, inferior and right grow: the last voxel is the hindmost, lowest and rightmost.
    data = np.zeros((2, 3, 4), np.uint8)
    data[-1, -1, -1] = 1
    scan = nifti.scan_from_array(data, affine_of(np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])))

    canonical, orientation = to_canonical(scan)

    assert orientation.code == "PIR"
    assert canonical.shape == (4, 2, 3)
    assert np.argwhere(canonical.data).tolist() == [[3, 0, 0]]
    assert np.argwhere(restore(canonical.data, orientation)).tolist() == [[1, 2, 3]]


def test_warnings_stay():
    scan = nifti.scan_from_array(numbered((2, 3, 4)), np.diag([-3.0, -3, 3, 1]))

    assert len(scan.warnings) == 1
    assert to_canonical(scan)[0].warnings == scan.warnings


# One scan, stored in 48 ways


def blob(shape: tuple[int, int, int] = (9, 11, 13)) -> np.ndarray:
    """A head-like lump off the centre, with noise, so that no two of the 48 are alike."""
    grid = np.indices(shape) / np.reshape(shape, (3, 1, 1, 1))
    centre = np.reshape((0.4, 0.55, 0.6), (3, 1, 1, 1))
    lump = 900 * np.exp(-9 * np.square(grid - centre).sum(axis=0))
    return (lump + np.random.default_rng(7).normal(0, 60, shape)).astype(np.int16)


def lopsided(scores: np.ndarray) -> np.ndarray:
    """Labels that depend on which axis is which and on where each goes, as a network's do."""
    padded = np.pad(scores, 1, mode="reflect")
    mixed = (
        padded[1:-1, 1:-1, 1:-1]
        + 0.9 * padded[2:, 1:-1, 1:-1]
        - 0.5 * padded[1:-1, 2:, 1:-1]
        + 0.2 * padded[1:-1, 1:-1, :-2]
    )
    return (mixed > 0).astype(np.uint8)


def read_all(folder: Path, data: np.ndarray, affine: np.ndarray) -> list[Scan]:
    scans = []
    for number, version in enumerate(VERSIONS):
        path = folder / f"{number}.nii"
        nibabel.save(stored_as(data, affine, version), path)
        scans.append(nifti.read_scan(path))
    return scans


@pytest.mark.parametrize("shape", [(9, 11, 13), (2, 1, 15), (1, 8, 1)])
def test_reoriented_scans_have_the_same_z_scores(tmp_path, shape):
    scans = read_all(tmp_path, blob(shape).astype("f4") / 7, OBLIQUE)

    found = [z_score(to_canonical(scan)[0]).data for scan in scans]

    for scores in found:
        np.testing.assert_array_equal(scores, found[0])  # to the last bit


def test_a_file_that_is_canonical_already_is_left_as_it_is(tmp_path):
    nibabel.save(nibabel.Nifti1Image(blob(), OBLIQUE), tmp_path / "a.nii")
    scan = nifti.read_scan(tmp_path / "a.nii")

    canonical, orientation = to_canonical(scan)

    assert orientation.code == "RAS"
    np.testing.assert_array_equal(z_score(canonical).data, z_score(scan).data)
    np.testing.assert_array_equal(canonical.geometry.affine, scan.geometry.affine)


@pytest.mark.parametrize("affine", [affine_of(np.eye(3)), OBLIQUE])
def test_reoriented_labels_do_not_depend_on_how_the_scan_is_stored(tmp_path, affine):
    data = blob()
    expected = lopsided(z_score(nifti.scan_from_array(np.asfortranarray(data), affine)).data)

    for version, scan in zip(VERSIONS, read_all(tmp_path, data, affine), strict=True):
        canonical, orientation = to_canonical(scan)
        labels = restore(lopsided(z_score(canonical).data), orientation)

        assert labels.shape == scan.shape
        np.testing.assert_array_equal(put_back(labels, version), expected)


def test_labels_as_stored_are_those_of_the_array_alone(tmp_path):
    """Without reorienting, the affine has no say: other axes, another head to the network."""
    data = blob()
    results = set()
    for version, scan in zip(VERSIONS, read_all(tmp_path, data, OBLIQUE), strict=True):
        labels = lopsided(z_score(scan).data)

        array = np.asfortranarray(nibabel.orientations.apply_orientation(data, version))
        alone = z_score(nifti.scan_from_array(array, np.diag([0.8, 0.8, 0.8, 1])))
        np.testing.assert_array_equal(labels, lopsided(alone.data))
        results.add(put_back(labels, version).tobytes())
    assert len(results) == len(VERSIONS)


# What is no one orientation


def header_of(**fields: Any) -> nibabel.Nifti1Header:
    header = nibabel.Nifti1Header()
    header.set_data_shape((4, 5, 6))
    header.set_sform(affine_of(np.eye(3)), code="scanner")
    header.set_qform(affine_of(np.eye(3)), code="scanner")
    for name, value in fields.items():
        header[name] = value
    return header


def write(folder: Path, header: nibabel.Nifti1Header) -> Path:
    header.set_data_dtype("i2")
    header["vox_offset"] = 352
    content = header.binaryblock + bytes(4) + numbered((4, 5, 6)).tobytes(order="F")
    path = folder / "a.nii"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "fields", [{}, {"qform_code": 0, "qoffset_x": 90}, {"sform_code": 0}, {"qoffset_x": 12.505}]
)
def test_one_orientation_passes(tmp_path, fields):
    path = write(tmp_path, header_of(**fields))

    check_unambiguous(nifti.read_scan(path))


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"qoffset_x": 12.52}, "up to 0.02 mm apart"),
        ({"quatern_b": 0, "quatern_c": 0, "quatern_d": 1}, "up to 8 mm apart"),  # half a turn
        ({"quatern_b": 2}, "apart beyond measure"),
        ({"qform_code": 0, "sform_code": 0}, "header without orientation"),
    ],
)
def test_header_of_no_one_orientation(tmp_path, fields, found):
    scan = nifti.read_scan(write(tmp_path, header_of(**fields)))

    with pytest.raises(InputError) as caught:
        check_unambiguous(scan)
    assert found in str(caught.value)
    assert "without --reorient" in str(caught.value)


@pytest.mark.slow
def test_real_networks_give_one_answer_however_the_scan_is_stored(engines_root):
    from tests.golden import GOLDEN
    from trtseg.pipeline import Segmenter

    image = nibabel.load(GOLDEN / "chain_random11" / "scan.nii.gz")
    orders = [[[0, 1], [1, 1], [2, 1]], [[2, -1], [0, 1], [1, 1]], [[0, -1], [2, 1], [1, 1]]]
    answers = []
    with Segmenter("random11", engines=engines_root, device="cpu") as segmenter:
        for order in orders:
            stored = image.as_reoriented(np.array(order))
            result = segmenter.segment(stored, probabilities=True, reorient=True)
            assert result.brain.shape == stored.shape
            maps = (result.brain, result.cortex, result.cortex_probabilities)
            codes = nibabel.orientations.io_orientation(stored.affine)
            answers.append([nibabel.orientations.apply_orientation(m, codes) for m in maps])
    assert answers[0][0].any()
    for answer in answers[1:]:
        for found, expected in zip(answer, answers[0], strict=True):
            np.testing.assert_array_equal(found, expected)
