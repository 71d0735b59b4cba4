from __future__ import annotations

import contextlib
import gzip
import mmap
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.spm2analyze import Spm2AnalyzeHeader

from tests.golden import GOLDEN
from tests.images import (
    AFFINE,
    REAL_DTYPES,
    SHAPE,
    file_bytes,
    geometry,
    make_header,
    ramp,
    save,
)
from trtseg import nifti
from trtseg.errors import DeviceError, InputError
from trtseg.home import demo_folder


def fixed(examples: int) -> settings:
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


def open_files() -> list[str]:
    found = []
    for entry in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):
            found.append(str(entry.readlink()))
    return sorted(name for name in found if name.startswith("/") and "nii" in name)


def is_mapped(data: Any) -> bool:
    while data is not None and not isinstance(data, mmap.mmap):
        data = getattr(data, "base", None)
    return data is not None


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        nifti.read_scan(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# Reading: what is accepted


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII", "A.NII.GZ"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_every_real_type_is_read_as_nibabel_reads_it(tmp_path, name, version, endian, dtype):
    data = ramp(dtype=dtype)
    path = save(tmp_path / name, file_bytes(data, version=version, endian=endian))

    scan = nifti.read_scan(path)

    # nibabel picks its decompressor by a lower-case suffix
    image = nibabel.load(
        save(tmp_path / f"b{name.lower()[1:]}", file_bytes(data, version=version, endian=endian))
    )
    np.testing.assert_array_equal(scan.data, np.asanyarray(image.dataobj))
    assert scan.data.dtype == np.dtype(dtype)
    assert scan.data.dtype.isnative
    np.testing.assert_array_equal(scan.geometry.affine, image.affine)
    assert scan.geometry.nifti_version == version
    assert scan.warnings == ()


@pytest.mark.parametrize("dtype", REAL_DTYPES)
@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize(("slope", "inter"), [(0.37, 0.0), (1.0, -1024.0), (2.5e-3, 7.25)])
def test_scaled_values_are_the_doubles_of_nibabel(tmp_path, dtype, endian, slope, inter):
    content = file_bytes(ramp(dtype=dtype), endian=endian, scl_slope=slope, scl_inter=inter)
    path = save(tmp_path / "a.nii", content)

    data = nifti.read_scan(path).data

    assert data.dtype == np.float64
    np.testing.assert_array_equal(data, np.asanyarray(nibabel.load(path).dataobj))


@pytest.mark.parametrize(
    ("slope", "inter"), [(0.0, 5.0), (np.nan, np.nan), (np.inf, 3.0), (1.0, 0.0), (0.0, np.nan)]
)
def test_values_without_scaling_stay_the_stored_integers(tmp_path, slope, inter):
    path = save(tmp_path / "a.nii", file_bytes(ramp(), scl_slope=slope, scl_inter=inter))

    data = nifti.read_scan(path).data

    assert data.dtype == np.int16
    np.testing.assert_array_equal(data, ramp())


@pytest.mark.parametrize("suffixes", [(".hdr", ".img"), (".HDR", ".IMG")])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("offset", [0, 32])
def test_either_file_of_a_pair_reads_the_pair(tmp_path, suffixes, version, offset):
    header = make_header(SHAPE, "i2", version=version, vox_offset=offset)
    header["magic"] = header.pair_magic
    voxels = bytes(offset) + ramp().tobytes(order="F")
    for suffix, content in zip(suffixes, (header.binaryblock, voxels), strict=True):
        (tmp_path / f"a{suffix}").write_bytes(content)

    for suffix in suffixes:
        scan = nifti.read_scan(tmp_path / f"a{suffix}")
        np.testing.assert_array_equal(scan.data, ramp())
        np.testing.assert_array_equal(scan.geometry.affine, header.get_sform())


def test_analyze_pair_is_read_with_a_warning(tmp_path):
    header = Spm2AnalyzeHeader()
    header.set_data_dtype(np.int16)
    header.set_data_shape(SHAPE)
    header.set_zooms((0.75, 0.75, 1.0))
    header["scl_slope"] = 2
    (tmp_path / "a.hdr").write_bytes(header.binaryblock)
    (tmp_path / "a.img").write_bytes(ramp().tobytes(order="F"))

    scan = nifti.read_scan(tmp_path / "a.img")

    image = nibabel.load(tmp_path / "a.img")
    np.testing.assert_array_equal(scan.data, np.asanyarray(image.dataobj))
    np.testing.assert_array_equal(scan.geometry.affine, image.affine)
    assert len(scan.warnings) == 1
    assert "Analyze" in scan.warnings[0]


def test_extensions_before_the_voxels_are_skipped(tmp_path):
    offset = 352 + 3 * (1 << 20)  # longer than one read
    path = save(tmp_path / "a.nii.gz", file_bytes(ramp(), vox_offset=offset))

    np.testing.assert_array_equal(nifti.read_scan(path).data, ramp())


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("chunk", [1, 100, 352, 399, 400, 401, 640])
def test_voxels_are_put_together_from_many_reads(tmp_path, monkeypatch, name, chunk):
    monkeypatch.setattr(nifti, "_CHUNK", chunk)
    path = save(tmp_path / name, file_bytes(ramp((4, 5, 6, 2)), vox_offset=400))

    np.testing.assert_array_equal(nifti.read_scan(path).data, ramp((4, 5, 6, 2))[..., 0])


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("shape", [(4, 5, 6, 3), (4, 5, 6, 3, 1, 1)])
def test_first_volume_of_a_4d_file_is_taken_with_a_warning(tmp_path, name, shape):
    path = save(tmp_path / name, file_bytes(ramp(shape)))

    scan = nifti.read_scan(path)

    np.testing.assert_array_equal(scan.data, ramp(shape).reshape((4, 5, 6, 3))[..., 0])
    assert scan.warnings == (
        "4-D file of 3 volumes: the first is segmented, as the published system does",
    )


@pytest.mark.parametrize("shape", [(4, 5, 6, 1), (4, 5, 6, 1, 1, 1, 1)])
def test_axes_of_one_past_the_third_are_dropped_in_silence(tmp_path, shape):
    scan = nifti.read_scan(save(tmp_path / "a.nii", file_bytes(ramp(shape))))

    assert scan.shape == SHAPE
    assert scan.warnings == ()


@pytest.mark.parametrize("code", [0, 77])  # nibabel takes a code that does not exist for 0
def test_header_without_orientation_is_read_with_a_warning(tmp_path, code):
    path = save(tmp_path / "a.nii", file_bytes(ramp(), qform_code=code, sform_code=0))

    scan = nifti.read_scan(path)

    np.testing.assert_array_equal(scan.geometry.affine, nibabel.load(path).affine)
    assert scan.warnings == ("header without orientation (qform and sform codes are 0)",)


@pytest.mark.parametrize(("units", "name"), [(1, "metre"), (3 + 8, "micrometre")])
def test_unit_other_than_mm_is_read_with_a_warning(tmp_path, units, name):
    scan = nifti.read_scan(save(tmp_path / "a.nii", file_bytes(ramp(), xyzt_units=units)))

    assert scan.geometry.header["xyzt_units"] == units
    assert scan.warnings == (
        f"header with the {name} as its unit: read as mm, as nibabel reads it",
    )


@pytest.mark.parametrize("shift", [0.0, 0.009])
def test_forms_that_agree_are_not_spoken_of(tmp_path, shift):
    path = save(tmp_path / "a.nii", file_bytes(ramp(), qoffset_x=50 + shift))

    assert nifti.read_scan(path).warnings == ()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize(
    ("fields", "distance"),
    [
        ({"qoffset_x": 50.012}, "up to 0.012 mm apart"),
        ({"qoffset_x": 53, "qoffset_y": 62.5}, "up to 5 mm apart"),
        ({"quatern_b": 1.1}, "apart beyond measure"),  # longer than any rotation's
        ({"quatern_b": np.nan}, "apart beyond measure"),
    ],
)
def test_forms_that_disagree_are_read_with_a_warning(tmp_path, version, endian, fields, distance):
    content = file_bytes(ramp(), version=version, endian=endian, **fields)

    scan = nifti.read_scan(save(tmp_path / "a.nii", content))

    np.testing.assert_allclose(scan.geometry.affine, AFFINE, atol=1e-5)  # the sform
    (warning,) = scan.warnings
    assert warning.startswith(f"qform and sform put the same voxel {distance}, expected within")
    assert nifti.form_conflict(scan.geometry, scan.shape) in warning


@pytest.mark.parametrize("code", ["qform_code", "sform_code"])
@pytest.mark.parametrize("value", [0, 77])  # 77 stands for 0
def test_a_form_without_a_code_disagrees_with_nothing(tmp_path, code, value):
    fields = {code: value, "qoffset_x": 90}
    scan = nifti.read_scan(save(tmp_path / "a.nii", file_bytes(ramp(), **fields)))

    assert scan.warnings == ()
    assert nifti.has_orientation(scan.geometry)


def test_distance_is_taken_at_the_far_corners(tmp_path):
    # Half a turn about the first voxel: the opposite corner, 3 x 0.8, 4 x 0.75 and 5 x 0.75 mm
    # from it, would lie twice sqrt(2.4^2 + 3^2) mm from where the sform has it.
    straight = np.diag([0.8, 0.75, 0.75, 1])
    header = make_header(SHAPE, "i2")
    header.set_sform(straight, code="scanner")
    header.set_qform(np.diag([-1, -1, 1, 1]) @ straight, code="scanner")
    geometry = nifti.scan_from_image(nibabel.Nifti1Image(ramp(), straight, header)).geometry

    assert "up to 7.68 mm apart" in nifti.form_conflict(geometry, SHAPE)
    assert nifti.form_conflict(geometry, (1, 1, 6)) == ""


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image, nibabel.MGHImage])
def test_image_in_memory_gets_the_same_warnings(kind):
    affine = AFFINE @ np.diag([2, 2, 2, 1])
    warnings = nifti.scan_from_image(kind(ramp(dtype="f4"), affine)).warnings

    assert warnings == nifti.scan_from_array(ramp(), affine).warnings
    assert len(warnings) == 1


@pytest.mark.parametrize(
    "path",
    [*sorted(GOLDEN.glob("*/scan.nii.gz")), demo_folder() / "phantom_23w.nii.gz"],
    ids=lambda path: path.parent.name,
)
def test_phantoms_have_nothing_to_warn_of(path):
    assert nifti.read_scan(path).warnings == ()


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_read_scan_keeps_nothing_of_the_file_open(tmp_path, name):
    path = save(tmp_path / name, file_bytes(ramp()))
    before = open_files()

    data = nifti.read_scan(path).data

    assert open_files() == before
    path.write_bytes(bytes(path.stat().st_size))
    np.testing.assert_array_equal(data, ramp())
    assert not is_mapped(data)


def test_repaired_header_is_not_spoken_of(tmp_path, capfd, caplog):
    # qfac 0, a code that does not exist, an odd offset: nibabel repairs or reports each of them
    content = file_bytes(ramp(), qform_code=77, vox_offset=355)
    header = nibabel.Nifti1Header(content[:348], check=False)
    header["pixdim"][0] = 0
    path = save(tmp_path / "a.nii", header.binaryblock + content[348:])

    scan = nifti.read_scan(path)
    nifti.write_labels(tmp_path / "b.nii", np.zeros(SHAPE, np.uint8), scan.geometry)

    assert caplog.records == []  # nibabel's logger among them
    assert capfd.readouterr() == ("", "")
    assert scan.geometry.header["pixdim"][0] == 0
    written = nibabel.Nifti1Header((tmp_path / "b.nii").read_bytes()[:348], check=False)
    assert written["pixdim"][0] == 0
    assert written["qform_code"] == 77


NAMES = ["a.nii", "a.nii.gz"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("volumes", [(), (2,)])
def test_bytes_after_the_voxels_are_spoken_of(tmp_path, name, volumes):
    content = file_bytes(ramp((*SHAPE, *volumes)))
    expected = nifti.read_scan(save(tmp_path / name, content))
    for surplus in (1, 15, 16, 5000):
        scan = nifti.read_scan(save(tmp_path / name, content + bytes(surplus)))
        np.testing.assert_array_equal(scan.data, expected.data)
        more = scan.warnings[len(expected.warnings) :]
        assert scan.warnings[: len(expected.warnings)] == expected.warnings
        assert len(more) == (surplus > 15)
        assert all(f"{surplus} bytes after the voxels" in line for line in more)


def test_a_header_of_too_small_an_image_is_spoken_of(tmp_path):
    i, j, k = SHAPE
    content = make_header((i, j, k - 1), "i2").binaryblock + bytes(4) + ramp().tobytes(order="F")
    (said,) = nifti.read_scan(save(tmp_path / "a.nii", content)).warnings
    assert f"{2 * i * j} bytes after the voxels that the header claims" in said


def test_bytes_after_the_voxels_of_a_pair_are_spoken_of(tmp_path):
    header = make_header(SHAPE, "i2", magic=b"ni1", vox_offset=0)
    (tmp_path / "a.hdr").write_bytes(header.binaryblock)
    (tmp_path / "a.img").write_bytes(ramp().tobytes(order="F") + bytes(16))
    (said,) = nifti.read_scan(tmp_path / "a.hdr").warnings
    assert "16 bytes after the voxels" in said


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("endian", "<>")
@pytest.mark.parametrize("bits", [0, 8, 32, -16])
def test_bits_that_are_not_those_of_the_type_are_spoken_of(tmp_path, name, version, endian, bits):
    content = file_bytes(ramp(), version=version, endian=endian, bitpix=bits)
    scan = nifti.read_scan(save(tmp_path / name, content))
    np.testing.assert_array_equal(scan.data, ramp())
    (said,) = scan.warnings
    assert said.startswith(f"header of int16 voxels that says {bits} bits per voxel (bitpix), ")
    assert "expected 16: read as int16" in said


# Reading: what is refused


def test_missing_file(tmp_path):
    assert "No such file" in refusal(tmp_path / "a.nii.gz")


def test_missing_half_of_a_pair(tmp_path):
    header = make_header(SHAPE, "i2", vox_offset=0, magic=b"ni1")
    (tmp_path / "a.hdr").write_bytes(header.binaryblock)
    with pytest.raises(InputError, match=r"a\.img: No such file"):
        nifti.read_scan(tmp_path / "a.hdr")
    (tmp_path / "a.hdr").rename(tmp_path / "a.img")
    with pytest.raises(InputError, match=r"a\.hdr: No such file"):
        nifti.read_scan(tmp_path / "a.img")


def test_memory_that_runs_out(tmp_path, monkeypatch):
    path = save(tmp_path / "a.nii", file_bytes(ramp()))

    def exhaust(*args: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(nifti, "_first_volume", exhaust)
    with pytest.raises(DeviceError, match=r"a\.nii: an image larger than the memory left"):
        nifti.read_scan(path)


@pytest.mark.parametrize("name", ["a.mgz", "a.nrrd", "a.dcm", "a", "a.gz"])
def test_other_suffixes(tmp_path, name):
    assert "suffix" in refusal(save(tmp_path / name, file_bytes(ramp())))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_empty_file(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"")
    assert "empty file" in refusal(path)


@pytest.mark.parametrize("content", [b"x", b"DICM" * 200, bytes(1000), b"\x1f\x8b" + bytes(900)])
def test_no_nifti_at_all(tmp_path, content):
    assert "not a NIfTI file" in refusal(save(tmp_path / "a.nii", content))


def test_analyze_header_in_a_single_file(tmp_path):
    header = Spm2AnalyzeHeader()
    header.set_data_shape(SHAPE)
    assert "not a NIfTI file" in refusal(save(tmp_path / "a.nii", header.binaryblock + bytes(999)))


def test_header_cut_short(tmp_path):
    assert "not a NIfTI file" in refusal(save(tmp_path / "a.nii", file_bytes(ramp())[:347]))
    content = file_bytes(ramp(), version=2)[:539]
    assert "not a NIfTI file" in refusal(save(tmp_path / "a.nii", content))


def test_kind_of_file_that_contradicts_the_name(tmp_path):
    content = file_bytes(ramp(), magic=b"ni1")
    assert "belongs to an .hdr/.img pair" in refusal(save(tmp_path / "a.nii", content))
    save(tmp_path / "a.img", bytes(999))
    message = refusal(save(tmp_path / "a.hdr", file_bytes(ramp())))
    assert "belongs to a single file" in message


@pytest.mark.parametrize("offset", [0, -16])
def test_voxels_inside_the_header(tmp_path, offset):
    content = file_bytes(ramp())
    header = nibabel.Nifti1Header(content[:348], check=False)
    header["vox_offset"] = offset
    message = refusal(save(tmp_path / "a.nii", header.binaryblock + content[348:]))
    assert "offset" in message or f"voxels at byte {offset}" in message


@pytest.mark.parametrize("offset", [np.nan, np.inf])
def test_offset_that_is_no_number(tmp_path, offset):
    content = file_bytes(ramp())
    header = nibabel.Nifti1Header(content[:348], check=False)
    header["vox_offset"] = offset
    refusal(save(tmp_path / "a.nii", header.binaryblock + content[348:]))


@pytest.mark.parametrize(
    ("dtype", "found"),
    [
        ([("R", "u1"), ("G", "u1"), ("B", "u1")], "colour voxels (RGB)"),
        ([("R", "u1"), ("G", "u1"), ("B", "u1"), ("A", "u1")], "colour voxels (RGBA)"),
        ("c8", "complex voxels (complex64)"),
        ("c16", "complex voxels (complex128)"),
    ],
)
def test_voxels_that_are_no_real_numbers(tmp_path, dtype, found):
    data = np.zeros(SHAPE, dtype=dtype)
    assert found in refusal(save(tmp_path / "a.nii", file_bytes(data)))
    with pytest.raises(InputError) as caught:
        nifti.scan_from_image(nibabel.Nifti1Image(data, AFFINE))
    assert found in str(caught.value)
    with pytest.raises(InputError) as caught:
        nifti.scan_from_array(data, AFFINE)
    assert found in str(caught.value)


@pytest.mark.parametrize("code", [0, 1, 255, 1536, 31415])
def test_unknown_voxel_types(tmp_path, code):
    content = bytearray(file_bytes(ramp()))
    content[70:72] = struct.pack("<h", code)
    if code == 1536 and nibabel.nifti1._float128t is not np.void:
        pytest.skip("this machine's long double is the type with code 1536")
    refusal(save(tmp_path / "a.nii", bytes(content)))


@pytest.mark.parametrize("shape", [(4,), (4, 5), (4, 5, 6, 1, 2), (4, 5, 6, 2, 2)])
def test_other_ranks(tmp_path, shape):
    assert f"{len(shape)} dimensions" in refusal(save(tmp_path / "a.nii", file_bytes(ramp(shape))))
    with pytest.raises(InputError, match=f"{len(shape)} dimensions"):
        nifti.scan_from_array(ramp(shape), AFFINE)


@pytest.mark.parametrize("rank", [0, 8, 100, -3])
def test_ranks_that_nifti_does_not_have(tmp_path, rank):
    content = file_bytes(ramp(), dim=[rank, 4, 5, 6, 1, 1, 1, 1])
    assert "number of dimensions" in refusal(save(tmp_path / "a.nii", content))


@pytest.mark.parametrize("dim", [(4, 0, 6), (0, 5, 6), (4, 5, -6)])
def test_axes_without_voxels(tmp_path, dim):
    content = file_bytes(ramp(), dim=[3, *dim, 1, 1, 1, 1])
    assert "axes of" in refusal(save(tmp_path / "a.nii", content))


def test_surface_data_disguised_as_a_volume(tmp_path):
    content = file_bytes(ramp(), dim=[3, 27307, 1, 6, 1, 1, 1, 1])
    assert "(163842, 1, 1)" in refusal(save(tmp_path / "a.nii", content))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_values_that_are_not_finite_are_counted(tmp_path, value, dtype):
    data = ramp(dtype=dtype)
    data[1, 2, 3:6] = value
    assert "3 voxels that are not finite" in refusal(save(tmp_path / "a.nii", file_bytes(data)))
    with pytest.raises(InputError, match="3 voxels"):
        nifti.scan_from_array(data, AFFINE)


def test_values_that_scaling_makes_infinite(tmp_path):
    content = file_bytes(np.full(SHAPE, 1e300), scl_slope=1e30)
    assert "120 voxels that are not finite" in refusal(save(tmp_path / "a.nii", content))


def test_intercept_that_is_not_finite(tmp_path):
    path = save(tmp_path / "a.nii", file_bytes(ramp(), scl_slope=1, scl_inter=np.inf))
    assert "intercept" in refusal(path)


def test_values_after_the_first_volume_are_not_judged(tmp_path):
    data = ramp((4, 5, 6, 2), "f4")
    data[..., 1] = np.nan
    assert nifti.read_scan(save(tmp_path / "a.nii", file_bytes(data))).shape == SHAPE


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ([np.nan, 0, 0, 0], "not finite"),
        ([0, 0, 0, np.inf], "not finite"),
        ([0, 0, 0, 5], "singular"),
        (AFFINE[1], "singular"),
    ],
)
def test_affine_of_no_use(tmp_path, row, found):
    assert found in refusal(save(tmp_path / "a.nii", file_bytes(ramp(), srow_x=row)))


def test_qform_of_no_use(tmp_path):
    content = file_bytes(ramp(), sform_code=0, quatern_b=2.0)
    assert "w2" in refusal(save(tmp_path / "a.nii", content))


@pytest.mark.parametrize("version", [1, 2])
def test_pair_of_numbers_for_a_file_cut_short(tmp_path, version):
    content = file_bytes(ramp(), version=version)[:-1]
    for name in ("a.nii", "a.nii.gz"):
        message = refusal(save(tmp_path / name, content))
        assert "239 bytes of voxels in the file; expected 240" in message


def test_offset_past_the_end_of_the_file(tmp_path):
    content = file_bytes(ramp(), vox_offset=4096)[:1000]
    for name in ("a.nii", "a.nii.gz"):
        message = refusal(save(tmp_path / name, content))
        assert "0 bytes of voxels in the file; expected 240" in message


def test_data_file_of_a_pair_cut_short(tmp_path):
    header = make_header(SHAPE, "i2", vox_offset=0, magic=b"ni1")
    (tmp_path / "a.hdr").write_bytes(header.binaryblock)
    (tmp_path / "a.img").write_bytes(bytes(100))
    assert "100 bytes of voxels in the file; expected 240" in refusal(tmp_path / "a.img")


@pytest.mark.parametrize(
    ("name", "side"), [("a.nii", 32767), ("a.nii.gz", 32767), ("a.nii", 1000), ("a.nii.gz", 1000)]
)
def test_claim_beyond_the_file_costs_no_memory(tmp_path, name, side):
    content = file_bytes(ramp(), dim=[3, side, side, side, 1, 1, 1, 1])
    path = save(tmp_path / name, content)
    refusal(path)  # imports what it needs
    tracemalloc.start()
    try:
        message = refusal(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert str(2 * side**3) in message
    if name == "a.nii" or side == 1000:
        assert "240 bytes of voxels in the file" in message
    else:
        assert "at most 17179869184 bytes" in message
    assert peak < 8 << 20


def test_memory_is_bounded_by_the_claim_not_by_the_stream(tmp_path):
    content = file_bytes(ramp()) + bytes(64 << 20)
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(content, 1))
    nifti.read_scan(path)
    tracemalloc.start()
    try:
        nifti.read_scan(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 8 << 20


# Reading: damaged gzip files


def compressed(path: Path) -> bytes:
    noise = np.random.default_rng(3).integers(0, 4096, (16, 16, 16)).astype("i2")
    return save(path, file_bytes(noise)).read_bytes()


@pytest.mark.parametrize("kept", [5, 40, 0.5, -9, -8, -4, -1])
def test_truncated_gzip(tmp_path, kept):
    path = tmp_path / "a.nii.gz"
    content = compressed(path)
    path.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    assert "truncated or damaged gzip" in refusal(path)


@pytest.mark.parametrize("position", [-1, -5, -2000, 3000, 1000])
def test_flipped_bit_in_gzip(tmp_path, position):
    path = tmp_path / "a.nii.gz"
    content = bytearray(compressed(path))
    content[position] ^= 0x10
    path.write_bytes(content)
    assert "truncated or damaged gzip" in refusal(path)


def test_checksum_past_the_voxels_is_checked(tmp_path):
    # nibabel itself stops at the last voxel and takes this file
    path = save(tmp_path / "a.nii.gz", file_bytes(ramp()) + bytes(1 << 16))
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)
    np.testing.assert_array_equal(nibabel.load(path).dataobj, ramp())
    assert "CRC" in refusal(path)


def test_plain_file_named_gz(tmp_path):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(file_bytes(ramp()))
    assert "truncated or damaged gzip data (Not a gzipped file" in refusal(path)


# Reading: nothing but InputError for any content


@fixed(200)
@given(content=st.binary(max_size=700), name=st.sampled_from(["a.nii", "a.nii.gz", "b.hdr"]))
def test_random_bytes(tmp_path, content, name):
    (tmp_path / "b.img").write_bytes(bytes(100))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError):
        nifti.read_scan(tmp_path / name)


def read_or_refuse(path: Path) -> None:
    try:
        scan = nifti.read_scan(path)
    except InputError:
        return
    assert scan.data.dtype.isnative
    assert np.isfinite(scan.data).all()
    assert np.isfinite(scan.geometry.affine).all()
    assert np.isfinite(np.linalg.inv(scan.geometry.affine)).all()
    nifti.write_labels(path.with_name("out.nii"), np.zeros(scan.shape, np.uint8), scan.geometry)
    written = nifti.read_scan(path.with_name("out.nii")).geometry
    np.testing.assert_array_equal(written.affine, scan.geometry.affine)


@fixed(400)
@given(
    version=st.sampled_from([1, 2]),
    endian=st.sampled_from("<>"),
    changes=st.lists(st.tuples(st.integers(0, 555), st.binary(min_size=1, max_size=8)), max_size=4),
    kind=st.sampled_from(["single", "pair", "analyze", "gzip"]),
)
def test_mutated_headers(tmp_path, version, endian, changes, kind):
    if kind == "analyze":
        header: Any = Spm2AnalyzeHeader(endianness=endian)
        header.set_data_dtype(np.float32)
        header.set_data_shape(SHAPE)
    else:
        header = make_header(SHAPE, "f4", version=version, endian=endian)
    if kind == "pair":
        header["magic"] = header.pair_magic
        header["vox_offset"] = 0
    block = bytearray(header.binaryblock)
    content = bytearray(block.ljust(int(header["vox_offset"]), b"\0") + bytes(480))
    for position, value in changes:
        content[position : position + len(value)] = value
    if kind in ("single", "gzip"):
        name = "a.nii" if kind == "single" else "a.nii.gz"
        read_or_refuse(save(tmp_path / name, bytes(content)))
    else:
        (tmp_path / "a.hdr").write_bytes(content[: len(block)])
        (tmp_path / "a.img").write_bytes(bytes(480))
        read_or_refuse(tmp_path / "a.hdr")


NUMBER_FIELDS = (
    *("vox_offset", "scl_slope", "scl_inter", "quatern_b", "quatern_d", "qoffset_x"),
    *("srow_x", "srow_y", "srow_z", "pixdim"),
)
NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, 3e38, float("nan"), float("inf"), 352.0, 1e9]),
    st.floats(width=32),
)


@fixed(400)
@given(
    version=st.sampled_from([1, 2]),
    fields=st.dictionaries(
        st.sampled_from(NUMBER_FIELDS),
        NUMBERS,
        max_size=4,
    ),
    codes=st.dictionaries(
        st.sampled_from(["qform_code", "sform_code", "datatype", "bitpix"]),
        st.integers(-(1 << 15), (1 << 15) - 1) | st.sampled_from([0, 1, 2, 4, 8, 16, 64, 128]),
        max_size=3,
    ),
    dim=st.lists(st.integers(-2, 8) | st.sampled_from([32767, -1]), min_size=8, max_size=8)
    | st.just([3, *SHAPE, 1, 1, 1, 1]),
)
def test_unusual_fields(tmp_path, version, fields, codes, dim):
    header = make_header(SHAPE, "f4", version=version, dim=dim)
    with np.errstate(all="ignore"):
        for name, value in {**fields, **codes}.items():
            if name == "vox_offset" and version == 2:
                value = int(value) if np.isfinite(value) and abs(value) < 1 << 60 else -1
            header[name] = value
    read_or_refuse(save(tmp_path / "a.nii", header.binaryblock + bytes(2000)))


@fixed(200)
@given(
    position=st.integers(0, 10_000),
    value=st.binary(min_size=1, max_size=4),
    cut=st.integers(0, 10_000),
)
def test_mutated_gzip(tmp_path, position, value, cut):
    path = tmp_path / "a.nii.gz"
    content = bytearray(gzip.compress(file_bytes(ramp(dtype="f4")), mtime=0))
    position %= len(content)
    content[position : position + len(value)] = value
    path.write_bytes(content[: len(content) - cut % 20])
    read_or_refuse(path)


# Images and arrays in memory


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_nifti_image_keeps_its_header_fields(kind):
    header = make_header(SHAPE, "i2", version=1 if kind is nibabel.Nifti1Image else 2)
    image = kind(ramp(), header.get_sform(), header)

    scan = nifti.scan_from_image(image)

    assert scan.geometry.nifti_version == (1 if kind is nibabel.Nifti1Image else 2)
    for field in nifti.GEOMETRY_FIELDS:
        assert scan.geometry.header[field].tobytes() == header[field].tobytes()
    np.testing.assert_array_equal(scan.geometry.affine, header.get_sform())
    np.testing.assert_array_equal(scan.data, ramp())


def test_image_whose_affine_was_changed_has_the_geometry_of_the_affine():
    image = nibabel.Nifti1Image(ramp(), AFFINE)
    image.affine[0, 3] += 10

    scan = nifti.scan_from_image(image)

    np.testing.assert_array_equal(scan.geometry.affine, image.affine.astype(np.float32))
    assert scan.geometry.header["srow_x"][3] == 60
    assert image.header["srow_x"][3] == 50


def test_image_of_another_format_has_the_geometry_of_its_affine():
    image = nibabel.MGHImage(ramp(dtype="f4"), AFFINE)

    scan = nifti.scan_from_image(image)

    np.testing.assert_array_equal(scan.data, ramp())
    np.testing.assert_array_equal(scan.geometry.affine, image.affine.astype(np.float32))
    assert scan.geometry.header["sform_code"] == 2


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("slope", [1.0, 0.5])
@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 6, 2)])
@pytest.mark.parametrize("endian", ["<", ">"])
def test_image_on_disk_is_read_into_memory(tmp_path, name, slope, shape, endian):
    path = save(tmp_path / name, file_bytes(ramp(shape), scl_slope=slope, endian=endian))

    scan = nifti.scan_from_image(nibabel.load(path))

    expected = nifti.read_scan(path)
    np.testing.assert_array_equal(scan.data, expected.data)
    assert scan.data.dtype == expected.data.dtype
    assert not is_mapped(scan.data)
    assert scan.warnings == expected.warnings
    for field in nifti.GEOMETRY_FIELDS:
        assert scan.geometry.header[field].tobytes() == expected.geometry.header[field].tobytes()


def test_image_whose_file_is_damaged(tmp_path):
    path = save(tmp_path / "a.nii", file_bytes(ramp()))
    image = nibabel.load(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="nibabel cannot read"):
        nifti.scan_from_image(image)


@pytest.mark.parametrize("image", [None, "a.nii", ramp(), 3])
def test_object_that_is_no_image(image):
    with pytest.raises(InputError, match=type(image).__name__):
        nifti.scan_from_image(image)


def test_image_without_an_affine():
    with pytest.raises(InputError, match="without an affine"):
        nifti.scan_from_image(nibabel.Nifti1Image(ramp(), None))


def test_array_has_the_geometry_nibabel_gives_it():
    scan = nifti.scan_from_array(ramp(), AFFINE)

    header = nibabel.Nifti1Image(ramp(), AFFINE).header
    header.set_xyzt_units("mm")
    for field in nifti.GEOMETRY_FIELDS:
        assert scan.geometry.header[field].tobytes() == header[field].tobytes()
    assert scan.geometry.nifti_version == 1
    np.testing.assert_array_equal(scan.geometry.affine, AFFINE.astype(np.float32))


def test_array_of_several_volumes():
    scan = nifti.scan_from_array(ramp((4, 5, 6, 3)), AFFINE)

    np.testing.assert_array_equal(scan.data, ramp((4, 5, 6, 3))[..., 0])
    assert scan.warnings[0].startswith("4-D file of 3 volumes")


@pytest.mark.parametrize("shape", [(0, 5, 6), (40_000, 1, 1)])
def test_array_with_axes_out_of_range(shape):
    with pytest.raises(InputError, match="axes of"):
        nifti.scan_from_array(np.zeros(shape, np.uint8), AFFINE)


@pytest.mark.parametrize(
    ("affine", "found"),
    [
        (np.eye(3), "shape (3, 3)"),
        (np.diag([1, 1, 0, 1]), "singular"),
        (np.diag([1e39, 1e39, 1e39, 1]), "not finite"),  # not in float32
    ],
)
def test_affine_of_no_use_for_an_array(affine, found):
    with pytest.raises(InputError) as caught:
        nifti.scan_from_array(ramp(), affine)
    assert found in str(caught.value)


# Writing

finite32 = st.floats(-300, 300, width=32)
zoom = st.floats(0.25, 4, width=32)


@st.composite
def headers(draw: Any) -> tuple[bytes, int]:
    """A NIfTI file whose geometry fields are arbitrary but make an affine, and its version."""
    version = draw(st.sampled_from([1, 2]))
    header = make_header((2, 3, 4), "u1", version=version, endian=draw(st.sampled_from("<>")))
    codes = draw(st.tuples(st.integers(0, 5), st.integers(0, 5)))
    header["qform_code"], header["sform_code"] = codes
    quaternion = np.array(draw(st.lists(st.floats(-1, 1), min_size=4, max_size=4)))
    quaternion[0] += 1e-3
    quaternion /= np.linalg.norm(quaternion) * (1 + 1e-6)
    for name, value in zip("bcd", quaternion[1:], strict=True):
        header[f"quatern_{name}"] = value
    for name in "xyz":
        header[f"qoffset_{name}"] = draw(finite32)
    header["pixdim"] = [draw(st.sampled_from([-1, 1])), *(draw(zoom) for _ in range(7))]
    rows = np.diag([draw(zoom) for _ in range(3)]) + 0.1 * np.array(
        draw(st.lists(st.floats(-0.5, 0.5), min_size=9, max_size=9))
    ).reshape(3, 3)
    for name, row in zip("xyz", rows, strict=True):
        header[f"srow_{name}"] = [*row, draw(finite32)]
    header["xyzt_units"] = draw(st.sampled_from([0, 1, 2, 3, 10, 18, 24]))
    offset = int(header["vox_offset"])
    return header.binaryblock.ljust(offset, b"\0") + bytes(range(24)), version


@fixed(200)
@given(made=headers(), name=st.sampled_from(["out.nii", "out.nii.gz"]), seed=st.integers(0, 99))
def test_what_is_written_lies_where_the_scan_lies(tmp_path, made, name, seed):
    content, version = made
    source = save(tmp_path / "scan.nii", content)
    scan = nifti.read_scan(source)
    labels = np.random.default_rng(seed).integers(0, 3, scan.shape).astype(np.uint8)

    nifti.write_labels(tmp_path / name, labels, scan.geometry)

    before, after = nibabel.load(source), nibabel.load(tmp_path / name)
    np.testing.assert_array_equal(np.asanyarray(after.dataobj), labels)
    np.testing.assert_array_equal(before.affine, scan.geometry.affine)
    np.testing.assert_array_equal(after.affine, before.affine)
    for one, other in zip(before.header.get_sform(True), after.header.get_sform(True), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(before.header.get_qform(True), after.header.get_qform(True), strict=True):
        np.testing.assert_array_equal(one, other)
    assert after.header.get_zooms() == before.header.get_zooms()
    assert after.header["xyzt_units"] == before.header["xyzt_units"]
    kind = nibabel.Nifti1Header if version == 1 else nibabel.Nifti2Header
    assert type(after.header) is kind
    for field in nifti.GEOMETRY_FIELDS:
        size = 4 if field == "pixdim" else None
        stored = np.atleast_1d(kind(content[: kind.sizeof_hdr], check=False)[field])[:size]
        written = np.atleast_1d(after.header[field])[:size]
        assert scan.geometry.header[field].dtype.isnative
        assert written.tobytes() == stored.astype(stored.dtype.newbyteorder("<")).tobytes(), field


@fixed(100)
@given(noise=st.binary(min_size=12, max_size=12), endian=st.sampled_from("<>"))
def test_unused_qform_is_carried_bit_for_bit(tmp_path, noise, endian):
    # NaNs with a payload included: with the sform in force these fields may hold anything
    header = make_header((2, 3, 4), "u1", endian=endian)
    block = bytearray(header.binaryblock)
    block[256:268] = noise  # quatern_b, quatern_c, quatern_d
    path = save(tmp_path / "scan.nii", bytes(block) + bytes(4 + 24))

    scan = nifti.read_scan(path)
    nifti.write_labels(tmp_path / "out.nii", np.zeros((2, 3, 4), np.uint8), scan.geometry)

    step = 1 if endian == "<" else -1
    expected = b"".join(noise[start : start + 4][::step] for start in (0, 4, 8))
    assert (tmp_path / "out.nii").read_bytes()[256:268] == expected


def test_geometry_of_a_4d_scan_is_written_without_its_time_step(tmp_path):
    header = make_header((4, 5, 6, 2), "i2")
    header["pixdim"][4] = 2.5
    content = header.binaryblock + bytes(4 + 480)
    scan = nifti.read_scan(save(tmp_path / "a.nii", content))

    nifti.write_labels(tmp_path / "out.nii", np.zeros(SHAPE, np.uint8), scan.geometry)

    written = nibabel.load(tmp_path / "out.nii").header
    assert written["dim"].tolist() == [3, 4, 5, 6, 1, 1, 1, 1]
    np.testing.assert_array_equal(written["pixdim"][:4], header["pixdim"][:4])
    assert written["pixdim"][4:].tolist() == [1, 1, 1, 1]
    assert written["xyzt_units"] == header["xyzt_units"]


@pytest.mark.parametrize("version", [1, 2])
def test_raw_header_of_what_is_written(tmp_path, version):
    scan = nifti.read_scan(save(tmp_path / "a.nii", file_bytes(ramp(), version=version)))
    path = tmp_path / "out.nii"

    nifti.write_labels(path, ramp(dtype="u1"), scan.geometry, description="trtseg 1")

    content = path.read_bytes()
    # byte positions of the NIfTI-1 and NIfTI-2 standards
    if version == 1:
        assert struct.unpack_from("<i", content, 0) == (348,)
        assert struct.unpack_from("<hh", content, 70) == (2, 8)  # datatype, bitpix
        assert struct.unpack_from("<fff", content, 108) == (352, 1, 0)  # offset, slope, intercept
        assert content[148:228] == b"trtseg 1".ljust(80, b"\0")
        assert content[344:352] == b"n+1\0" + bytes(4)
        assert content[352:] == ramp(dtype="u1").tobytes(order="F")
    else:
        assert struct.unpack_from("<i", content, 0) == (540,)
        assert content[4:12] == b"n+2\0\r\n\x1a\n"
        assert struct.unpack_from("<hh", content, 12) == (2, 8)
        assert struct.unpack_from("<qdd", content, 168) == (544, 1, 0)
        assert content[240:320] == b"trtseg 1".ljust(80, b"\0")
        assert content[540:544] == bytes(4)
        assert content[544:] == ramp(dtype="u1").tobytes(order="F")


def test_nothing_else_of_the_scan_is_carried_over(tmp_path):
    identity = {
        "descrip": b"Jane Doe 1990-01-01",
        "aux_file": b"/home/doe/scan",
        "db_name": b"doe",
        "intent_name": b"doe",
        "data_type": b"doe",
        "cal_max": 99,
        "toffset": 3,
        "slice_duration": 2,
        "intent_code": 1001,
        "dim_info": 57,
    }
    content = file_bytes(ramp(), vox_offset=400, **identity)
    scan = nifti.read_scan(save(tmp_path / "a.nii", content))

    nifti.write_labels(tmp_path / "out.nii", ramp(dtype="u1"), scan.geometry)

    written = nibabel.load(tmp_path / "out.nii").header
    fresh = nibabel.Nifti1Header()
    for field in identity:
        assert written[field] == fresh[field]
    assert b"doe" not in (tmp_path / "out.nii").read_bytes()[:352].lower()


@pytest.mark.parametrize("name", ["p.nii", "p.nii.gz"])
def test_probabilities_are_read_back_exactly(tmp_path, name):
    values = np.random.default_rng(1).random(SHAPE, dtype=np.float32)

    nifti.write_probabilities(tmp_path / name, values, geometry(), description="d" * 79)

    image = nibabel.load(tmp_path / name)
    assert image.get_data_dtype() == np.dtype("<f4")
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), values)
    assert image.header["descrip"] == b"d" * 79


def test_layout_in_memory_does_not_change_the_file(tmp_path):
    labels = ramp(dtype="u1")
    for name, array in [("c", labels), ("f", np.asfortranarray(labels)), ("v", labels[:, :, ::-1])]:
        nifti.write_labels(tmp_path / f"{name}.nii", array, geometry())
    assert (tmp_path / "c.nii").read_bytes() == (tmp_path / "f.nii").read_bytes()
    np.testing.assert_array_equal(nibabel.load(tmp_path / "v.nii").dataobj, labels[:, :, ::-1])


def test_same_labels_same_bytes(tmp_path, monkeypatch):
    first, second = tmp_path / "patient_7.nii.gz", tmp_path / "other.nii.gz"
    nifti.write_labels(first, ramp(dtype="u1"), geometry())
    monkeypatch.setattr("time.time", lambda: 2e9)
    nifti.write_labels(second, ramp(dtype="u1"), geometry())

    assert first.read_bytes() == second.read_bytes()
    head = first.read_bytes()[:10]
    assert head[:3] == b"\x1f\x8b\x08"
    assert head[3] == 0  # no flags: no name, comment or extra field
    assert head[4:8] == bytes(4)  # no time


@pytest.mark.parametrize("description", ["d" * 80, "é"])
def test_description_that_does_not_fit(tmp_path, description):
    with pytest.raises(ValueError, match=r"description|ascii"):
        nifti.write_labels(
            tmp_path / "a.nii", ramp(dtype="u1"), geometry(), description=description
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("labels", [ramp(), ramp(dtype="f4"), ramp((4, 5), "u1"), ramp() > 3])
def test_arrays_that_are_no_labels(tmp_path, labels):
    with pytest.raises(ValueError, match="expected 3-D uint8"):
        nifti.write_labels(tmp_path / "a.nii", labels, geometry())
    with pytest.raises(ValueError, match="expected 3-D float32"):
        nifti.write_probabilities(tmp_path / "a.nii", ramp(dtype="f8"), geometry())
