from __future__ import annotations

import base64
import hashlib
import io
import itertools
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from trtseg import qc, report, sidecar
from trtseg.engine import Engine
from trtseg.errors import OutputError
from trtseg.nifti import geometry_of_affine, scan_from_array
from trtseg.scan import Geometry, Scan

BLUE, ORANGE = (86, 180, 233), (230, 159, 0)
RED = (178, 34, 34)

#: Millimetres of the phantom head in RAS+: right, anterior and superior grow with the index.
SHAPE = (48, 56, 40)
CENTRE = (24, 28, 20)
RADII = (16, 20, 12)


@pytest.fixture
def small(monkeypatch):
    """Small panels, for what does not depend on their size."""
    monkeypatch.setattr(report, "PANEL", 100)


def ellipsoid(radii: tuple[int, ...], shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    grid = np.meshgrid(*(np.arange(size) for size in shape), indexing="ij")
    distance = sum(((g - c) / r) ** 2 for g, c, r in zip(grid, CENTRE, radii, strict=True))
    return (distance <= 1).astype(np.uint8)


def head() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A dim head in RAS+ with one bright mark to the left, to the front and up; 1 mm voxels."""
    brain = ellipsoid(RADII)
    cortex = brain - ellipsoid(tuple(r - 3 for r in RADII))
    scan = np.where(brain, 300, 100).astype(np.int16)
    scan[12:20, 34:44, 20:30] = 1000
    return scan, brain, cortex


def stored(array: np.ndarray, axes: tuple[int, ...], flips: tuple[bool, ...]) -> np.ndarray:
    """A RAS+ array as another scanner stores it."""
    turned = array.transpose(axes)
    return turned[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]


def stored_affine(axes: tuple[int, ...], flips: tuple[bool, ...]) -> np.ndarray:
    affine = np.diag([0.0, 0, 0, 1])
    for new, (world, flip) in enumerate(zip(axes, flips, strict=True)):
        affine[world, new] = -1 if flip else 1
        affine[world, 3] = SHAPE[world] - 1 if flip else 0
    return affine


def geometry(affine: np.ndarray | None = None, **header: int) -> Geometry:
    found = geometry_of_affine(np.eye(4) if affine is None else affine)
    return Geometry(found.affine, {**found.header, "sform_code": 2, **header})


def draw(*arrays: np.ndarray, affine: np.ndarray | None = None, **options: Any) -> report.Picture:
    return report.draw(*(arrays or head()), geometry(affine), **{"title": "Scan", **options})


def pixels(picture: report.Picture) -> np.ndarray:
    image = Image.open(io.BytesIO(picture.png))
    assert image.size == (picture.width, picture.height)
    assert image.mode == "RGB"
    return np.asarray(image)


def inside(picture: report.Picture, panel: report.Panel) -> np.ndarray:
    rows = slice(panel.top, panel.top + panel.height)
    return pixels(picture)[rows, panel.left : panel.left + panel.width]


def planes(picture: report.Picture, name: str) -> list[report.Panel]:
    return [panel for panel in picture.panels if panel.plane == name]


def where(picture: report.Picture, name: str, color: tuple[int, int, int]) -> tuple[float, float]:
    """Mean place of a colour in a plane's panels, as parts of width and height."""
    found = []
    for panel in planes(picture, name):
        part = inside(picture, panel).copy()
        part[[*range(24), *range(-24, 0)]] = 0  # the letters at the edges
        part[:, [*range(20), *range(-20, 0)]] = 0
        rows, columns = np.nonzero((part == color).all(axis=2))
        found += zip(columns / panel.width, rows / panel.height, strict=True)
    assert found
    x, y = np.mean(found, axis=0)
    return x, y


# Sides


def test_the_left_of_the_body_is_on_the_side_marked_left():
    picture = draw()
    white = (255, 255, 255)
    x, y = where(picture, "Axial", white)
    assert planes(picture, "Axial")[0].marks == ("R", "L", "A", "P")
    assert x > 0.6  # the mark is on the left, and so is the letter L: on the right of the picture
    assert y < 0.4  # and in front, where the letter A is: at the top
    x, y = where(picture, "Coronal", white)
    assert planes(picture, "Coronal")[0].marks == ("R", "L", "S", "I")
    assert x > 0.6
    assert y < 0.45
    x, y = where(picture, "Sagittal", white)
    assert planes(picture, "Sagittal")[0].marks == ("A", "P", "S", "I")
    assert x < 0.4
    assert y < 0.45


def glyph(letter: str) -> np.ndarray:
    image = Image.new("L", (30, 30))
    font = ImageFont.load_default(17)
    ImageDraw.Draw(image).text((15, 15), letter, 255, font, anchor="mm")
    return np.asarray(image) > 128


def letter_at(part: np.ndarray) -> str:
    """Which letter is written in a piece of the picture: the one that overlaps it best."""
    white = (part >= 128).all(axis=2)

    def overlap(letter: str) -> float:
        rows, columns = np.nonzero(glyph(letter))
        shape = glyph(letter)[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        tall, wide = shape.shape
        best = 0.0
        for y, x in np.ndindex(white.shape[0] - tall + 1, white.shape[1] - wide + 1):
            shared = (white[y : y + tall, x : x + wide] & shape).sum()
            best = max(best, float(shared / (white.sum() + shape.sum() - shared)))
        return best

    return max("LRAPSI", key=overlap)


def test_the_letters_are_where_the_panel_says():
    scan, brain, cortex = head()
    picture = draw(np.zeros_like(scan), brain, cortex)
    image = pixels(picture)
    for name in ("Axial", "Coronal", "Sagittal"):
        panel = planes(picture, name)[0]
        left, right = panel.left, panel.left + panel.width
        top, bottom = panel.top, panel.top + panel.height
        x, y = panel.left + panel.width // 2, panel.top + panel.height // 2
        found = (
            letter_at(image[y - 12 : y + 12, left : left + 20]),
            letter_at(image[y - 12 : y + 12, right - 20 : right]),
            letter_at(image[top : top + 20, x - 10 : x + 10]),
            letter_at(image[bottom - 20 : bottom, x - 10 : x + 10]),
        )
        assert found == panel.marks


@pytest.mark.parametrize(
    ("axes", "flips"),
    list(
        zip(
            itertools.cycle(itertools.permutations(range(3))),
            itertools.product([False, True], repeat=3),
            strict=False,
        )
    ),
)
def test_a_scan_looks_the_same_however_it_is_stored(small, axes, flips):
    arrays = head()
    straight = draw(*arrays)
    turned = draw(
        *(stored(array, axes, flips) for array in arrays), affine=stored_affine(axes, flips)
    )
    first, second = pixels(straight).copy(), pixels(turned).copy()
    for one, other in zip(straight.panels, turned.panels, strict=True):
        assert one.marks == other.marks
        assert (one.left, one.top, one.width, one.height) == (
            other.left,
            other.top,
            other.width,
            other.height,
        )
        # The stored axis and index, at the lower left, differ; both lead to the same slice.
        corner = np.s_[one.top + one.height - 22 : one.top + one.height, one.left : one.left + 45]
        first[corner] = second[corner] = 0
        world = axes[other.axis]
        assert world == one.axis
        last = SHAPE[world] - 1
        assert (last - other.index if flips[other.axis] else other.index) == one.index
    np.testing.assert_array_equal(first, second)


def test_an_oblique_scan_says_so_and_keeps_its_sides(small):
    angle = math.radians(20)
    affine = stored_affine((0, 1, 2), (True, True, False))
    turn = np.eye(4)
    turn[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    arrays = [stored(array, (0, 1, 2), (True, True, False)) for array in head()]
    straight, oblique = draw(*arrays, affine=affine), draw(*arrays, affine=turn @ affine)
    assert [panel.marks for panel in oblique.panels] == [panel.marks for panel in straight.panels]
    for one, other in zip(straight.panels, oblique.panels, strict=True):
        np.testing.assert_array_equal(inside(straight, one), inside(oblique, other))
    assert "up to 20 degrees off" in report._tilt_said(turn @ affine)
    assert "which are those of the body" in report._tilt_said(affine)
    assert (pixels(straight) != pixels(oblique)).any()


def test_a_header_without_orientation_leaves_the_sides_in_doubt():
    unknown = geometry(qform_code=0, sform_code=0)
    picture = report.draw(*head(), unknown, title="Scan")
    assert planes(picture, "Axial")[0].marks == ("R?", "L?", "A?", "P?")
    assert "guess" in report._sides_said(unknown)
    assert "guess" not in report._sides_said(geometry())
    assert "guess" not in report._sides_said(geometry(sform_code=0, qform_code=1))


# Shape and scale


def extent(part: np.ndarray, color: tuple[int, int, int]) -> tuple[int, int]:
    rows, columns = np.nonzero((part == color).all(axis=2))
    return int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1


def scale_of(picture: report.Picture) -> float:
    """Pixels per mm: the axial panels show the head and 10 mm around it, as far as there are."""
    return planes(picture, "Axial")[0].width / 48


def test_proportions_are_true():
    scan, brain, _ = head()
    picture = draw(scan, brain, np.zeros_like(brain))
    scale = scale_of(picture)
    for name, (wide, tall) in {
        "Axial": (33, 41),
        "Coronal": (33, 25),
        "Sagittal": (41, 25),
    }.items():
        middle = planes(picture, name)[2]
        found = extent(inside(picture, middle), BLUE)
        assert found == pytest.approx((wide * scale, tall * scale), abs=scale / 2 + 1)


@pytest.mark.parametrize(
    ("axes", "flips"),
    [((0, 1, 2), (False,) * 3), ((2, 0, 1), (True, False, True)), ((1, 2, 0), (False, True, True))],
)
def test_thick_slices_are_not_squeezed(axes, flips):
    scan, brain, _ = head()
    thick = [
        stored(array, axes, flips)[tuple(slice(None, None, 4 if w == 2 else 1) for w in axes)]
        for array in (scan, brain, np.zeros_like(brain))
    ]
    affine = stored_affine(axes, flips) @ np.diag([*(4.0 if w == 2 else 1.0 for w in axes), 1])
    picture = draw(*thick, affine=affine)
    scale = scale_of(picture)
    for name, (wide, tall) in {
        "Axial": (33, 41),
        "Coronal": (33, 28),
        "Sagittal": (41, 28),
    }.items():
        middle = planes(picture, name)[2]
        found = extent(inside(picture, middle), BLUE)
        assert found == pytest.approx((wide * scale, tall * scale), abs=4 * scale + 1)
        assert middle.height / middle.width == pytest.approx(
            {"Axial": 56 / 48, "Coronal": 40 / 48, "Sagittal": 40 / 56}[name], rel=0.02
        )


def test_panels_fill_the_picture():
    picture = draw()
    assert len(picture.panels) == 15
    assert max(panel.width for panel in picture.panels) == 300
    for one, other in itertools.pairwise(picture.panels):
        if one.plane == other.plane:
            assert one.left + one.width < other.left
            assert one.top == other.top
        else:
            assert one.top + one.height < other.top
    last = picture.panels[-1]
    assert last.left + last.width < picture.width
    assert last.top + last.height < picture.height


def test_a_tall_field_of_view_stays_on_the_page():
    shape = (20, 20, 300)
    brain = np.zeros(shape, np.uint8)
    brain[5:15, 5:15, 10:290] = 1
    picture = draw(brain.astype(float), brain, brain)
    assert max(panel.height for panel in picture.panels) == 420


def test_slices_run_through_the_brain_in_order():
    picture = draw()
    # The head lies at 8 to 40, 8 to 48 and 8 to 32 of axes i, j and k.
    assert [(panel.axis, panel.index) for panel in picture.panels] == [
        *((2, index) for index in (10, 15, 20, 25, 30)),
        *((1, index) for index in (12, 20, 28, 36, 44)),
        *((0, index) for index in (11, 17, 24, 31, 37)),
    ]


def test_a_scattered_voxel_does_not_move_the_picture(small):
    scan, brain, cortex = head()
    stray = brain.copy()
    stray[1, 1, 1] = 1
    assert draw(scan, stray, cortex).panels == draw(scan, brain, cortex).panels


# Grey and colour


def grey_inside(picture: report.Picture) -> int:
    """Grey of the middle of the head, off every line."""
    part = inside(picture, planes(picture, "Coronal")[3])
    red, green, blue = part[part.shape[0] // 2 + 6, part.shape[1] // 2]
    assert red == green == blue
    return int(red)


def test_the_window_is_robust(small):
    scan, brain, cortex = head()
    hot = scan.astype(np.float64)
    hot[24, 28, 20:23] = 1e6
    hot[0, 0, 0] = -1e6
    assert grey_inside(draw(hot, brain, cortex)) == grey_inside(draw(scan, brain, cortex)) > 40


def test_intensities_are_not_absolute(small):
    scan, brain, cortex = head()
    one, other = draw(scan, brain, cortex), draw(scan.astype(np.float64) * 8 - 3, brain, cortex)
    for panel in one.panels:
        np.testing.assert_allclose(
            inside(one, panel).astype(int), inside(other, panel).astype(int), atol=1
        )


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i4", "u8", "f2", "f4", "f8"])
def test_every_type_of_voxel(small, dtype):
    scan, brain, cortex = head()
    assert (
        draw((scan // 10).astype(dtype), brain, cortex).png == draw(scan // 10, brain, cortex).png
    )


def test_a_scan_without_contrast(small):
    _, brain, cortex = head()
    picture = draw(np.full(SHAPE, 7), brain, cortex)
    assert extent(inside(picture, picture.panels[2]), BLUE)[0] > 30


def test_outlines_have_their_colours_and_show_what_they_enclose():
    scan, brain, cortex = head()
    picture = draw(scan, brain, cortex)
    middle = inside(picture, planes(picture, "Axial")[2])
    blue, orange = ((middle == color).all(axis=2) for color in (BLUE, ORANGE))
    assert 0 < blue.sum() < 0.05 * blue.size
    assert 0 < orange.sum() < 0.05 * orange.size
    center = middle[middle.shape[0] // 2, middle.shape[1] // 2]
    assert tuple(center) not in (BLUE, ORANGE)


def test_an_outline_is_the_rim_of_the_voxels():
    mask = np.zeros((4, 4), bool)
    mask[1:3, 1:4] = True
    rim = report._outline(mask, (16, 8), 1)
    drawn = ["".join(".#"[int(one)] for one in line) for line in rim]
    assert drawn == [
        "................",
        "................",
        "....############",
        "....#..........#",
        "....#..........#",
        "....############",
        "................",
        "................",
    ]
    assert report._outline(mask, (16, 8), 2).sum() == 48


def test_no_brain_is_drawn_whole_without_lines():
    scan, brain, _ = head()
    empty = np.zeros_like(brain)
    picture = draw(scan, empty, empty)
    assert planes(picture, "Axial")[0].width * 56 == pytest.approx(
        planes(picture, "Axial")[0].height * 48, rel=0.02
    )
    for panel in picture.panels:
        part = inside(picture, panel)
        assert not (part == BLUE).all(axis=2).any()
        assert not (part == ORANGE).all(axis=2).any()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 30, 30), (30, 1, 40), (2, 3, 200)])
def test_odd_shapes(small, shape):
    ones = np.ones(shape, np.uint8)
    picture = draw(np.arange(ones.size).reshape(shape), ones, ones)
    assert len(picture.panels) == 15
    assert all(panel.width > 0 < panel.height for panel in picture.panels)


# Words


def test_a_notice_has_a_red_bar():
    with_notice, without = draw(notice="demo weights"), draw()
    assert tuple(pixels(with_notice)[2, 2]) == RED
    assert tuple(pixels(without)[2, 2]) == (0, 0, 0)
    assert with_notice.height > without.height


@pytest.mark.parametrize("text", ["x" * 400, "two\nlines\tand\x00more", "", "\udcff"])
def test_any_title_and_notice_stay_in_one_line(text):
    picture, plain = draw(title=text, notice=text or "n"), draw(notice="n")
    assert (picture.width, picture.height) == (plain.width, plain.height)
    for one, other in zip(picture.panels, plain.panels, strict=True):
        np.testing.assert_array_equal(inside(picture, one), inside(plain, other))
    assert (pixels(picture)[:, -12:][30:] == pixels(plain)[:, -12:][30:]).all()


def test_the_picture_is_the_same_every_time_and_holds_nothing_else():
    first, second = draw(), draw()
    assert first.png == second.png
    assert Image.open(io.BytesIO(first.png)).info == {}


# The page


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are closed in order."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.style = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.text += data

    def attribute(self, tag: str, name: str) -> str:
        [found] = {value for one, other, value in self.attributes if (one, other) == (tag, name)}
        return found


def description(folder: Path, *, name: str = "doe.nii", **changes: Any) -> dict[str, Any]:
    _, brain, cortex = head()
    source = folder / name
    source.write_bytes(b"abc")
    result = SimpleNamespace(
        brain=brain,
        brain_ml=123.46,
        cortex_ml=12.34,
        times={"read": 0.25, "brain": 2.0},
        models="demo",
        device="cpu",
        description="cpu, 2 threads",
        precision="float32",
        notice="demo weights",
        warnings=("header of a kind",),
    )
    for key in [key for key in changes if hasattr(result, key)]:
        setattr(result, key, changes.pop(key))
    manifest = {
        "checkpoint": {"bdn.model.ckpt.index": "1" * 64},
        "files": {"weights.npz": "2" * 64},
        "versions": {},
    }
    engine: Any = Engine(Path(), "demo", "bdn", None, manifest)  # type: ignore[arg-type]
    arguments = {
        "inputs": {"scan": source},
        "outputs": {"cortex_probabilities": source},
        "engines": {"bdn": engine},
        "qc": qc.assess(brain, cortex, geometry(), ga_weeks=23),
        "options": {"device": "auto", "mask": None, "save_dseg": True},
        **changes,
    }
    return sidecar.describe(result, **arguments)


def page(folder: Path, **changes: Any) -> Page:
    return Page(report.render(description(folder, **changes), PICTURE))


PICTURE = report.Picture(b"not really a picture", 30, 20, ())


def test_the_page_says_it_all(tmp_path):
    found = page(tmp_path)
    for text in (
        "trtseg report: scan ba7816bf8f01",
        "demo weights",
        "not a medical device",
        "Warning: header of a kind",
        "123.5 mL",
        "12.3 mL",
        "0.25 s",
        "2.25 s",
        "BDN checkpoint: index",
        "1" * 64,
        "BDN engine: weights.npz",
        "2" * 64,
        "input: scan",
        "output: cortex probabilities",
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "cpu, 2 threads, float32",
        "not given",
        "save dseg",
        "yes",
        "10.3389/fnins.2022.886083",
    ):
        assert text in found.text
    checks = description(tmp_path)["qc"]["checks"]
    assert len(checks) == 10
    for check in checks:
        for text in (check["title"], check["line"], check["verdict"], check["source"]):
            assert text in found.text


def test_a_suspect_result_says_why_first(tmp_path):
    found = page(tmp_path)
    said = found.text.index("Suspect: do not use this result unseen.")
    why = found.text.index("Brain volume: ")
    assert said < why < found.text.index("Volumes")


def test_a_result_nothing_is_said_against(tmp_path):
    _, brain, cortex = head()
    checks = qc.assess(brain, cortex, geometry())
    good = qc.Qc(tuple(check for check in checks.checks if check.verdict != "suspect"))
    found = page(tmp_path, qc=good)
    assert "No check found anything suspect. That does not make the result right" in found.text
    assert "do not use" not in found.text


def test_no_notice_no_alert(tmp_path):
    assert ("p", "role", "alert") in page(tmp_path).attributes
    assert ("p", "role", "alert") not in page(tmp_path, notice="").attributes


def test_the_page_fetches_nothing_and_runs_nothing(tmp_path):
    found = page(tmp_path)
    assert set(found.tags).isdisjoint({"script", "link", "iframe", "object", "a", "form", "base"})
    assert {name for _, name, _ in found.attributes} == {
        *("lang", "charset", "http-equiv", "content", "name"),
        *("class", "role", "width", "height", "alt", "src"),
    }
    assert found.attribute("img", "src") == (
        "data:image/png;base64," + base64.b64encode(b"not really a picture").decode()
    )
    assert "url(" not in found.style
    assert "@import" not in found.style
    text = report.render(description(tmp_path), PICTURE)
    assert not re.search(r"https?:", text)


def test_the_policy_allows_this_style_alone(tmp_path):
    found = page(tmp_path)
    digest = base64.b64encode(hashlib.sha256(found.style.encode()).digest()).decode()
    assert (
        "meta",
        "content",
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'",
    ) in found.attributes


def test_everything_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>\"' onload=x &amp;"
    clean = page(tmp_path)
    _, brain, cortex = head()
    checks = qc.assess(brain, cortex, geometry(), ga_weeks=23).checks
    bad = qc.Check(evil, evil, evil, evil, "suspect", evil, evil, evil)
    found = page(
        tmp_path,
        notice=evil,
        warnings=(evil,),
        models=evil.replace("/", "|"),
        description=evil,
        times={evil: 1.0},
        options={evil: evil},
        precision=evil,
        qc=qc.Qc((*checks[:-1], bad)),
    )
    assert set(found.tags) == set(clean.tags)
    assert {name for _, name, _ in found.attributes} == {name for _, name, _ in clean.attributes}
    assert found.text.count(evil) >= 10


def test_a_file_name_is_escaped_too(tmp_path):
    found = page(tmp_path, name='<b>"doe"&.nii', keep_names=True)
    assert "b" not in found.tags
    assert 'trtseg report: scan <b>"doe"&.nii' in found.text
    assert 'input: scan, <b>"doe"&.nii' in found.text


def test_no_name_unless_it_is_asked_for(tmp_path):
    options = {"mask": tmp_path / "doe_mask.nii"}
    text = report.render(description(tmp_path, options=options), PICTURE)
    assert "doe" not in text
    assert str(tmp_path) not in text
    assert tmp_path.name not in text


# Files


def scan() -> Scan:
    return scan_from_array(head()[0], np.eye(4))


def write(folder: Path, **changes: Any) -> None:
    _, brain, cortex = head()
    report.write_report(
        folder / "r.html",
        folder / "r.png",
        scan=scan(),
        brain=brain,
        cortex=cortex,
        description=description(folder, **changes),
    )


def test_both_files_are_written(tmp_path):
    write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["doe.nii", "r.html", "r.png"]
    found = Page((tmp_path / "r.html").read_text("utf-8"))
    picture = (tmp_path / "r.png").read_bytes()
    assert found.attribute("img", "src").endswith(base64.b64encode(picture).decode())
    image = Image.open(io.BytesIO(picture))
    assert found.attribute("img", "width") == str(image.width)
    assert found.attribute("img", "height") == str(image.height)
    assert tuple(image.getpixel((2, 2))) == RED


def test_the_same_result_gives_the_same_files(tmp_path, small):
    write(tmp_path)
    first = [(tmp_path / name).read_bytes() for name in ("r.html", "r.png")]
    write(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in ("r.html", "r.png")] == first


def test_a_name_that_is_no_text(tmp_path, small):
    write(tmp_path, name=os.fsdecode(b"doe\xff.nii"), keep_names=True)
    assert "scan doe&#56575;.nii" in (tmp_path / "r.html").read_text("utf-8")


@pytest.mark.parametrize("blocked", ["r.html", "r.png"])
def test_a_file_that_cannot_be_written(tmp_path, small, blocked):
    (tmp_path / blocked).mkdir()
    with pytest.raises(OutputError, match=rf"{blocked}: Is a directory"):
        write(tmp_path)
    assert not (tmp_path / "r.html").is_file()
    assert not list(tmp_path.glob(".*"))
