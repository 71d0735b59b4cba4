from __future__ import annotations

import json
import math
from dataclasses import replace

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtseg import qc
from trtseg.errors import InputError, UsageError
from trtseg.scan import Geometry

# 5 mm voxels: an eighth of a millilitre each.
SIDE = 5.0
SHAPE = (20, 22, 24)


def geometry(*sides: float) -> Geometry:
    return Geometry(np.diag([*(sides or (SIDE,) * 3), 1.0]), {"sform_code": 2})


def block(*slices: tuple[int, int], shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[tuple(slice(*one) for one in slices)] = 1
    return mask


#: 1000 voxels, 125 mL; of them 112, 14 mL.
BRAIN = block((5, 15), (5, 15), (5, 15))
CORTEX = block((5, 13), (5, 12), (5, 7))


def assess(brain: np.ndarray = BRAIN, cortex: np.ndarray = CORTEX, **options) -> qc.Qc:
    return qc.assess(brain, cortex, geometry(), **options)


def verdicts(result: qc.Qc) -> dict[str, str]:
    return {check.name: check.verdict for check in result.checks}


def of_size(voxels: int) -> np.ndarray:
    """One piece of so many voxels, clear of the border of its array."""
    mask = np.zeros((30, 30, 30), np.uint8)
    inner = np.zeros(28**3, np.uint8)
    inner[:voxels] = 1
    mask[1:-1, 1:-1, 1:-1] = inner.reshape(28, 28, 28)
    return mask


def test_a_plausible_result():
    result = assess(ga_weeks=23)
    assert verdicts(result) == {
        "brain_found": "ok",
        "components": "not judged",
        "largest_component": "ok",
        "border": "ok",
        "brain_volume": "ok",
        "cortex_volume": "ok",
        "cortex_fraction": "ok",
        "voxel_size": "not judged",
        "voxel_shape": "ok",
        "gestational_age": "ok",
    }
    assert not result.suspect
    assert result.reasons == ()
    assert result.check("brain_volume").value == pytest.approx(125.0)
    assert result.check("cortex_volume").value == pytest.approx(14.0)
    assert result.check("cortex_fraction").value == pytest.approx(11.2)


def test_without_an_age_nothing_is_said_of_it():
    assert list(verdicts(assess())) == list(verdicts(assess(ga_weeks=23)))[:-1]


def test_no_brain():
    empty = np.zeros(SHAPE, np.uint8)
    result = assess(empty, empty)
    assert verdicts(result) == {
        "brain_found": "suspect",
        "components": "not judged",
        "largest_component": "not judged",
        "border": "not judged",
        "brain_volume": "suspect",
        "cortex_volume": "suspect",
        "cortex_fraction": "not judged",
        "voxel_size": "not judged",
        "voxel_shape": "ok",
    }
    assert result.suspect
    assert result.reasons[0] == "No brain was found: both maps are empty."
    assert result.check("largest_component").value is None
    assert result.check("largest_component").shown == "-"


def test_a_brain_without_cortex():
    result = assess(cortex=np.zeros(SHAPE, np.uint8))
    assert result.check("cortex_volume").verdict == "suspect"
    assert result.check("cortex_fraction").verdict == "suspect"
    assert result.check("brain_volume").verdict == "ok"


def test_every_sentence_and_source_is_said():
    for check in assess(ga_weeks=30).checks:
        assert check.line.endswith(".")
        assert check.source
        assert bool(check.expected) == (check.verdict != "not judged")


def test_checks_are_plain_data():
    data = [check.to_dict() for check in assess(ga_weeks=25.5).checks]
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data[0] == {
        "name": "brain_found",
        "title": "Brain found",
        "value": "yes",
        "unit": "",
        "verdict": "ok",
        "expected": "yes",
        "source": "a scan that is segmented shows a brain",
        "line": "A brain was found.",
    }


def test_values_as_people_read_them():
    result = assess(ga_weeks=23.43)
    assert result.check("brain_volume").shown == "125.0 mL"
    assert result.check("components").shown == "1"
    assert result.check("border").shown == "0 voxels"
    assert result.check("voxel_size").shown == "5.00 x 5.00 x 5.00 mm"
    assert result.check("gestational_age").shown == "23.4 weeks"


# Pieces


def test_voxels_that_touch_by_a_corner_are_one_piece():
    mask = np.zeros((6, 6, 6), np.uint8)
    mask[1, 1, 1] = mask[2, 2, 2] = mask[4, 4, 2] = 1
    assert qc.component_sizes(mask).tolist() == [2, 1]
    mask[3, 3, 3] = 1
    assert qc.component_sizes(mask).tolist() == [4]


def test_no_pieces():
    assert qc.component_sizes(np.zeros((3, 3, 3), np.uint8)).tolist() == []


@pytest.mark.parametrize(("stray", "share", "verdict"), [(5, 95.0, "ok"), (6, 94.0, "suspect")])
def test_the_share_of_the_largest_piece(stray, share, verdict):
    brain = np.zeros((30, 30, 30), np.uint8)
    brain[2:12, 2:12, 2] = 1
    brain[11, 12 - stray : 12, 2] = 0  # 100 - stray voxels
    brain[20, 2 : 2 + 2 * stray : 2, 20] = 1  # as many again, each by itself
    result = qc.assess(brain, brain, geometry())
    largest = result.check("largest_component")
    assert result.check("components").value == 1 + stray
    assert largest.value == pytest.approx(share)
    assert largest.verdict == verdict


def test_the_box_leaves_out_scattered_voxels():
    brain = block((5, 15), (6, 14), (7, 12))
    assert qc.brain_box(brain) == (slice(5, 15), slice(6, 14), slice(7, 12))
    brain[0, 0, 0] = brain[19, 21, 23] = 1
    assert qc.brain_box(brain) == (slice(5, 15), slice(6, 14), slice(7, 12))
    brain[17:19, 17:20, 17:21] = 1  # 24 of 426 voxels: more than a twentieth
    assert qc.brain_box(brain) == (slice(5, 19), slice(6, 20), slice(7, 21))


def test_the_box_of_no_brain_is_everything():
    empty = np.zeros((3, 4, 5), np.uint8)
    assert qc.brain_box(empty) == (slice(0, 3), slice(0, 4), slice(0, 5))


def test_the_box_of_nothing_but_specks_is_everything():
    specks = np.zeros((9, 9, 9), np.uint8)
    specks[::2, ::2, ::4] = 1
    assert qc.brain_box(specks) == (slice(0, 9), slice(0, 9), slice(0, 9))


# The border


def test_the_faces_are_named_by_the_body():
    mask = np.zeros((4, 5, 6), np.uint8)
    mask[0, 2, 2] = 1
    mask[3, 1:3, 2] = 1
    mask[1, 0, 1:4] = 1
    mask[2, 2, 5] = 1
    straight = {"left": 1, "right": 2, "posterior": 3, "anterior": 0, "inferior": 0, "superior": 1}
    assert qc.border_voxels(mask, np.eye(4)) == straight
    # Stored as S, L, P: axis 0 grows to superior, 1 to the left, 2 to posterior.
    turned = mask.transpose(2, 0, 1)[:, ::-1, ::-1]
    affine = np.array([[0, -1, 0, 3], [0, 0, -1, 4], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    assert qc.border_voxels(turned, affine) == straight


def test_a_voxel_on_an_edge_counts_once():
    brain = block((0, 1), (0, 1), (4, 8))
    check = qc.assess(brain, brain, geometry()).check("border")
    assert check.value == 4
    assert "(left 4, posterior 4 voxels)" in check.line
    assert check.verdict == "suspect"


@pytest.mark.parametrize(("touching", "verdict"), [(2, "ok"), (3, "suspect")])
def test_a_touch_of_a_thousandth_is_let_pass(touching, verdict):
    brain = block((2, 12), (2, 12), (2, 22))  # 2000 voxels
    brain[2, 2, 2 : 2 + touching] = 0
    brain[0, 3, 3 : 3 + touching] = 1
    check = assess(brain).check("border")
    assert check.value == touching
    assert check.verdict == verdict
    assert f"(left {touching} voxels)" in check.line


def test_the_border_is_one_voxel_deep():
    brain = np.zeros((8, 8, 8), np.uint8)
    brain[1:-1, 1:-1, 1:-1] = 1
    assert qc.assess(brain, brain, geometry()).check("border").value == 0


def test_a_mask_of_one_slice_lies_on_the_border():
    brain = np.ones((1, 8, 8), np.uint8)
    check = qc.assess(brain, brain, geometry()).check("border")
    assert check.value == 64
    assert check.verdict == "suspect"


# Volumes


@pytest.mark.parametrize(
    ("ga_weeks", "brain", "cortex"),
    [
        # mean brain / 1.5 and mean intracranial * 1.5; mean cortex / 1.5 and * 1.5
        (19, "19.6 to 104.3 mL", "4.4 to 9.9 mL"),
        (23, "43.3 to 188.5 mL", "9.1 to 20.4 mL"),
        (23.99, "43.3 to 188.5 mL", "9.1 to 20.4 mL"),
        (24, "50.0 to 212.2 mL", "10.3 to 23.1 mL"),
        (30.5, "117.1 to 453.8 mL", "26.5 to 59.6 mL"),
        (37.9, "211.3 to 737.7 mL", "56.0 to 125.9 mL"),
        # no published value: all ages
        (18, "19.6 to 737.7 mL", "4.4 to 125.9 mL"),
        (38, "19.6 to 737.7 mL", "4.4 to 125.9 mL"),
        (None, "19.6 to 737.7 mL", "4.4 to 125.9 mL"),
    ],
)
def test_the_published_ranges(ga_weeks, brain, cortex):
    result = assess(ga_weeks=ga_weeks)
    for name, expected in (("brain_volume", brain), ("cortex_volume", cortex)):
        check = result.check(name)
        low, high = (float(number) for number in expected.split()[:3:2])
        found_low, found_high = (float(number) for number in check.expected.split()[:3:2])
        # A printed half may round either way.
        assert found_low == pytest.approx(low, abs=0.11)
        assert found_high == pytest.approx(high, abs=0.11)
        assert "10.3389/fnins.2022.886083" in check.source


def test_an_age_without_published_values_says_so():
    source = assess(ga_weeks=40).check("brain_volume").source
    assert "all ages of 19 to 37 weeks, for there is no value of 40 weeks" in source
    assert "Means of that week" not in source


def test_the_means_of_the_week_are_said():
    result = assess(ga_weeks=23.2)
    assert result.check("brain_volume").source.endswith(
        "Means of that week: 65.0 mL without CSF, 125.7 mL intracranial (SD 9.3)"
    )
    assert result.check("cortex_volume").source.endswith("Mean of that week: 13.6 mL (SD 0.9)")


@pytest.mark.parametrize(
    ("voxels", "ga_weeks", "verdict"),
    [
        # 0.125 mL a voxel; 43.32 to 188.55 mL at 23 weeks, 19.55 to 737.7 mL at any age
        (346, 23, "suspect"),
        (347, 23, "ok"),
        (1508, 23, "ok"),
        (1509, 23, "suspect"),
        (156, None, "suspect"),
        (157, None, "ok"),
        (5901, None, "ok"),
        (5902, None, "suspect"),
    ],
)
def test_the_limits_of_the_brain_volume(voxels, ga_weeks, verdict):
    brain = of_size(voxels)
    check = qc.assess(brain, brain, geometry(), ga_weeks=ga_weeks).check("brain_volume")
    assert check.value == pytest.approx(voxels * 0.125)
    assert check.verdict == verdict
    assert ("within" if verdict == "ok" else "outside") in check.line


@pytest.mark.parametrize(
    ("voxels", "verdict"),
    [(72, "suspect"), (73, "ok"), (163, "ok"), (164, "suspect")],  # 9.087 to 20.445 mL
)
def test_the_limits_of_the_cortex_volume(voxels, verdict):
    result = qc.assess(of_size(1000), of_size(voxels), geometry(), ga_weeks=23)
    assert result.check("cortex_volume").verdict == verdict


@pytest.mark.parametrize(
    ("voxels", "verdict"),
    [(62, "suspect"), (63, "ok"), (397, "ok"), (398, "suspect")],  # 6.30 to 39.74 %
)
def test_the_limits_of_the_fraction(voxels, verdict):
    result = qc.assess(of_size(1000), of_size(voxels), geometry())
    assert result.check("cortex_fraction").verdict == verdict


def test_the_table_holds_together():
    """Within each week cortex < brain < intracranial, and every mean grows from week to week."""
    weeks = [qc._WEEKS[week] for week in range(19, 38)]
    assert len(qc._WEEKS) == 19
    for week in weeks:
        assert week.cortex < week.brain < week.intracranial
    for name in ("brain", "intracranial", "cortex"):
        means = [getattr(week, name) for week in weeks]
        assert means == sorted(means)


# Voxels


@pytest.mark.parametrize(
    ("sides", "ratio", "verdict"),
    [
        ((0.8, 0.8, 0.8), 1.0, "ok"),
        ((0.8, 1.2, 0.8), 1.5, "ok"),
        (tuple(np.float32([0.8, 0.8, 1.2]).astype(float)), 1.5, "ok"),  # as a file has it
        ((1.0, 1.0, 1.6), 1.6, "suspect"),
        ((4.0, 1.25, 1.25), 3.2, "suspect"),
    ],
)
def test_the_shape_of_a_voxel(sides, ratio, verdict):
    result = qc.assess(BRAIN, CORTEX, geometry(*sides))
    check = result.check("voxel_shape")
    assert check.value == pytest.approx(ratio)
    assert check.verdict == verdict
    assert result.check("voxel_size").value == " x ".join(f"{side:.2f}" for side in sides)
    assert result.check("voxel_size").verdict == "not judged"


def test_voxel_sizes_of_an_oblique_affine():
    angle = math.radians(30)
    turn = np.array(
        [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]]
    )
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([0.5, 0.75, 2.0])
    assert qc.voxel_sizes(affine) == pytest.approx((0.5, 0.75, 2.0))


# Gestational age


@pytest.mark.parametrize(
    ("ga_weeks", "verdict"),
    [(18, "suspect"), (20.9, "suspect"), (21, "ok"), (38.9, "ok"), (39, "suspect")],
)
def test_the_ages_the_networks_were_developed_on(ga_weeks, verdict):
    assert assess(ga_weeks=ga_weeks).check("gestational_age").verdict == verdict


@pytest.mark.parametrize("ga_weeks", [17.9, 45.1, 0, -23, 161, math.nan, math.inf])
def test_an_age_no_fetus_has(ga_weeks):
    with pytest.raises(UsageError, match="18 to 45 weeks"):
        assess(ga_weeks=ga_weeks)


def test_an_age_of_one_week():
    with pytest.raises(UsageError, match=r"of 1 week; .* 27\.4, or as weeks\+days, such as 27\+3"):
        qc.check_ga(1)


@pytest.mark.parametrize("ga_weeks", [18, 45])
def test_the_ends_of_the_ages_are_taken(ga_weeks):
    qc.check_ga(ga_weeks)
    assert assess(ga_weeks=ga_weeks).check("gestational_age").value == ga_weeks


# Arrays


@pytest.mark.parametrize("shapes", [((4, 4), (4, 4)), ((4, 4, 4), (4, 4, 5))])
def test_arrays_that_do_not_fit(shapes):
    brain, cortex = (np.ones(shape, np.uint8) for shape in shapes)
    with pytest.raises(InputError, match="two 3-D arrays of one shape"):
        qc.assess(brain, cortex, geometry())


def test_what_is_checked_is_not_changed():
    brain, cortex = BRAIN.copy(), CORTEX.copy()
    brain.flags.writeable = cortex.flags.writeable = False
    assert assess(brain, cortex) == assess()


def test_the_order_in_memory_does_not_matter():
    assert assess(np.asfortranarray(BRAIN), np.asfortranarray(CORTEX)) == assess()


# Axes


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (np.diag([1.0, 1, 1]), ((0, 1), (1, 1), (2, 1))),
        (np.diag([-0.8, -0.8, 0.8]), ((0, -1), (1, -1), (2, 1))),
        # axis 0 to superior, 1 to the left, 2 to posterior
        ([[0, -1, 0], [0, 0, -1], [3, 0, 0]], ((1, -1), (2, -1), (0, 1))),
    ],
)
def test_canonical_axes(columns, expected):
    affine = np.eye(4)
    affine[:3, :3] = columns
    assert qc.canonical_axes(affine) == expected


@given(
    angles=st.tuples(*[st.floats(-14, 14)] * 3),
    axes=st.permutations(range(3)),
    signs=st.tuples(*[st.sampled_from([-1, 1])] * 3),
    sides=st.tuples(*[st.floats(0.3, 6)] * 3),
)
@settings(max_examples=60, derandomize=True, deadline=None, database=None)
def test_canonical_axes_agree_with_nibabel(angles, axes, signs, sides):
    affine = np.eye(4)
    turn = np.eye(3)
    for angle, (one, other) in zip(np.radians(angles), ((0, 1), (1, 2), (2, 0)), strict=True):
        step = np.eye(3)
        step[one, one] = step[other, other] = np.cos(angle)
        step[one, other], step[other, one] = -np.sin(angle), np.sin(angle)
        turn = turn @ step
    affine[:3, :3] = (turn @ np.diag(signs))[:, axes] * sides
    codes = nibabel.aff2axcodes(affine)
    letters = ("LR", "PA", "IS")
    for (axis, sign), (low, high) in zip(qc.canonical_axes(affine), letters, strict=True):
        assert codes[axis] == (high if sign > 0 else low)


def test_reasons_are_the_suspect_lines():
    first, *others = assess().checks
    suspect = replace(first, verdict="suspect", line="Because.")
    assert qc.Qc((suspect, *others)).reasons == ("Because.",)
    assert qc.Qc((suspect, *others)).suspect
