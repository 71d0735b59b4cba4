"""What a person checks a result by: a picture in three planes, and a page that says all about it.

The page is one HTML file that needs nothing else: the picture is inside it, it runs no script and
its content security policy lets it fetch nothing.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trtseg.files import atomic_write
from trtseg.nifti import has_orientation
from trtseg.qc import Check, brain_box, canonical_axes, voxel_sizes
from trtseg.sidecar import BRAIN_COLOR, CORTEX_COLOR, NOT_A_DEVICE, scan_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

    from trtseg.scan import Geometry, Scan

#: Slices of each plane.
COLUMNS = 5
#: Widest panel, in pixels; all panels have the same scale.
PANEL = 300
#: Tallest panel, in pixels, so that a long field of view gives no endless picture.
TALLEST = 420
#: Scan shown around the brain, in mm: enough to see what a mask leaves out.
MARGIN_MM = 10.0
#: Percentiles of the shown voxels that become black and white: robust against a few hot voxels.
WINDOW = (1.0, 99.5)
#: Tilt in degrees above which the picture says that its planes are oblique.
TILT_SAID = 1.0

_GAP = 6
_EDGE = 12
_TEXT = 15
_LINE = 22
_MARK = 17
_BAR_MM = 20.0
_BLACK, _WHITE, _PALE = (0, 0, 0), (255, 255, 255), (200, 200, 200)
_ALARM = (178, 34, 34)

_CONVENTION = (
    "Radiological convention: seen from the feet (axial) and from the front (coronal), "
    "the left of the fetus is on the right."
)


@dataclass(frozen=True)
class _Plane:
    """How a plane is cut from an array whose indices grow to right, anterior and superior."""

    name: str
    order: str
    axis: int
    across: int
    up: int
    left: str
    right: str
    top: str
    bottom: str


_PLANES = (
    _Plane("Axial", "from inferior to superior", 2, 0, 1, "R", "L", "A", "P"),
    _Plane("Coronal", "from posterior to anterior", 1, 0, 2, "R", "L", "S", "I"),
    _Plane("Sagittal", "from left to right", 0, 1, 2, "A", "P", "S", "I"),
)


@dataclass(frozen=True)
class Panel:
    """One slice in the picture.

    Attributes
    ----------
    plane : str
        ``"Axial"``, ``"Coronal"`` or ``"Sagittal"``.
    axis, index : int
        The stored array axis that is cut, and the slice's index on it.
    left, top, width, height : int
        Where it lies in the picture, in pixels.
    marks : tuple of str
        The sides of the body at its left, right, top and bottom edge.
    """

    plane: str
    axis: int
    index: int
    left: int
    top: int
    width: int
    height: int
    marks: tuple[str, str, str, str]


@dataclass(frozen=True)
class Picture:
    """The picture, as the bytes of a PNG file, and where each slice lies in it."""

    png: bytes
    width: int
    height: int
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class _View:
    """Scan and labels, turned so that indices grow to right, anterior and superior."""

    scan: NDArray[Any]
    brain: NDArray[np.bool_]
    cortex: NDArray[np.bool_]
    sizes: tuple[float, float, float]
    axes: tuple[tuple[int, int], ...]
    box: tuple[slice, slice, slice]

    def stored_index(self, world: int, index: int) -> int:
        """Index on the stored axis of a slice across the axis `world`."""
        return index if self.axes[world][1] > 0 else self.scan.shape[world] - 1 - index


def write_report(
    page: Path,
    picture: Path,
    *,
    scan: Scan,
    brain: NDArray[np.uint8],
    cortex: NDArray[np.uint8],
    description: Mapping[str, Any],
) -> None:
    """Write the picture and the page that holds it; each file is replaced atomically.

    Parameters
    ----------
    page, picture : Path
        The HTML and the PNG file.
    scan : Scan
        As read, not normalised.
    brain, cortex : ndarray, shape of the scan, uint8
    description : mapping
        From `trtseg.sidecar.describe`.

    Raises
    ------
    OutputError
        A file cannot be written.
    """
    drawn = draw(
        scan.data,
        brain,
        cortex,
        scan.geometry,
        title=f"Scan {scan_name(description)}",
        notice=description["notice"],
    )
    with atomic_write(picture) as stream:
        stream.write(drawn.png)
    # A file name may hold bytes that are no text; they are shown as references.
    content = render(description, drawn).encode("utf-8", "xmlcharrefreplace")
    with atomic_write(page) as stream:
        stream.write(content)


# The picture


def draw(
    scan: NDArray[Any],
    brain: NDArray[np.uint8],
    cortex: NDArray[np.uint8],
    geometry: Geometry,
    *,
    title: str,
    notice: str = "",
) -> Picture:
    """Draw slices in three planes through the brain, with the outlines of brain and cortex.

    Planes are cut along the stored axes, each shown as the plane of the body it is nearest to, all
    at one scale in true proportion, in radiological convention.

    Parameters
    ----------
    scan : ndarray, shape (i, j, k)
    brain, cortex : ndarray, shape (i, j, k), uint8
    geometry : Geometry
    title : str
    notice : str
        Shown in a bar of its own.

    Returns
    -------
    Picture
    """
    from PIL import Image, ImageDraw

    view = _view(scan, brain, cortex, geometry)
    scale = _scale(view)
    sizes = [_panel_size(view, plane, scale) for plane in _PLANES]
    column = max(width for width, _ in sizes)
    width = 2 * _EDGE + COLUMNS * column + (COLUMNS - 1) * _GAP
    head = _EDGE + (4 + bool(notice)) * _LINE
    height = head + sum(_LINE + tall + _GAP for _, tall in sizes) + _LINE + _EDGE
    image = Image.new("RGB", (width, height), _BLACK)
    pen = ImageDraw.Draw(image)
    grey = _window(view)
    _draw_head(pen, view, geometry, title, notice, grey, scale, width)
    panels = []
    top = head
    for plane, (wide, tall) in zip(_PLANES, sizes, strict=True):
        _write(pen, (_EDGE, top), f"{plane.name}, {plane.order}", _WHITE)
        top += _LINE
        for number, index in enumerate(_slices(view, plane)):
            left = _EDGE + number * (column + _GAP) + (column - wide) // 2
            panel = _panel(view, plane, index, (left, top, wide, tall), geometry)
            image.paste(_slice_image(view, plane, index, (wide, tall), grey), (left, top))
            _draw_marks(pen, panel)
            panels.append(panel)
        top += tall + _GAP
    _write(pen, (_EDGE, top), NOT_A_DEVICE, _PALE)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return Picture(stream.getvalue(), width, height, tuple(panels))


def _view(
    scan: NDArray[Any], brain: NDArray[Any], cortex: NDArray[Any], geometry: Geometry
) -> _View:
    axes = canonical_axes(geometry.affine)
    sides = voxel_sizes(geometry.affine)

    def turn(array: NDArray[Any]) -> NDArray[Any]:
        turned: NDArray[Any] = array.transpose([axis for axis, _ in axes])
        return turned[tuple(slice(None, None, sign) for _, sign in axes)]

    x, y, z = (sides[axis] for axis, _ in axes)
    inside = turn(brain) != 0
    return _View(turn(scan), inside, turn(cortex) != 0, (x, y, z), axes, brain_box(inside))


def _crop(view: _View, axis: int) -> tuple[int, int]:
    """Indices to show along an axis: the brain and a margin, within the array; end excluded."""
    margin = math.ceil(MARGIN_MM / view.sizes[axis])
    box = view.box[axis]
    return max(0, box.start - margin), min(view.scan.shape[axis], box.stop + margin)


def _millimetres(view: _View, axis: int) -> float:
    low, high = _crop(view, axis)
    return (high - low) * view.sizes[axis]


def _scale(view: _View) -> float:
    """Pixels per mm: the widest panel is PANEL wide, the tallest at most TALLEST tall."""
    widest = max(_millimetres(view, plane.across) for plane in _PLANES)
    tallest = max(_millimetres(view, plane.up) for plane in _PLANES)
    return min(PANEL / widest, TALLEST / tallest)


def _panel_size(view: _View, plane: _Plane, scale: float) -> tuple[int, int]:
    wide, tall = (round(_millimetres(view, axis) * scale) for axis in (plane.across, plane.up))
    return max(1, wide), max(1, tall)


def _slices(view: _View, plane: _Plane) -> list[int]:
    """Indices of the slices, spread evenly over the brain, off its very ends."""
    box = view.box[plane.axis]
    return [box.start + int((box.stop - box.start) * (n + 0.5) / COLUMNS) for n in range(COLUMNS)]


def _cut(array: NDArray[Any], view: _View, plane: _Plane, index: int) -> NDArray[Any]:
    """The slice as it is shown, rows from top to bottom: both its axes run against the index."""
    across, up = (slice(*_crop(view, axis)) for axis in (plane.across, plane.up))
    flat: NDArray[Any] = array.take(index, axis=plane.axis)[across, up]
    shown: NDArray[Any] = flat.T[::-1, ::-1]
    return shown


def _window(view: _View) -> tuple[float, float]:
    """Values shown black and white."""
    shown = view.scan[tuple(slice(*_crop(view, axis)) for axis in range(3))]
    low, high = np.percentile(shown, WINDOW)
    return float(low), float(high)


def _slice_image(
    view: _View, plane: _Plane, index: int, size: tuple[int, int], grey: tuple[float, float]
) -> Image:
    from PIL import Image

    low, high = grey
    values = (_cut(view.scan, view, plane, index).astype(np.float64) - low) / ((high - low) or 1.0)
    flat = Image.fromarray(np.ascontiguousarray(np.clip(values, 0, 1), dtype=np.float32))
    smooth = np.asarray(flat.resize(size, Image.Resampling.BICUBIC))
    pixels = np.repeat((np.clip(smooth, 0, 1) * 255).round().astype(np.uint8)[..., None], 3, axis=2)
    # The brain's line is the wider one: it lies on bright CSF, the cortex's on grey.
    for mask, color, width in ((view.brain, BRAIN_COLOR, 2), (view.cortex, CORTEX_COLOR, 1)):
        pixels[_outline(_cut(mask, view, plane, index), size, width)] = _rgb(color)
    return Image.fromarray(pixels)


def _outline(mask: NDArray[np.bool_], size: tuple[int, int], width: int) -> NDArray[np.bool_]:
    """Pixels within `width` of the edge of a mask drawn at `size` (across, down), on its inside."""
    rows, columns = (
        np.minimum((np.arange(n) + 0.5) * length / n, length - 1).astype(int)
        for n, length in zip(size[::-1], mask.shape, strict=True)
    )
    inside: NDArray[np.bool_] = mask[np.ix_(rows, columns)]
    core = inside
    for _ in range(width):
        big = np.pad(core, 1)
        core = core & big[:-2, 1:-1] & big[2:, 1:-1] & big[1:-1, :-2] & big[1:-1, 2:]
    return inside & ~core


def _panel(
    view: _View,
    plane: _Plane,
    index: int,
    box: tuple[int, int, int, int],
    geometry: Geometry,
) -> Panel:
    doubt = "" if has_orientation(geometry) else "?"
    marks = tuple(mark + doubt for mark in (plane.left, plane.right, plane.top, plane.bottom))
    left, right, top, bottom = marks
    return Panel(
        plane.name,
        view.axes[plane.axis][0],
        view.stored_index(plane.axis, index),
        *box,
        marks=(left, right, top, bottom),
    )


def _draw_marks(pen: ImageDraw, panel: Panel) -> None:
    left, right, top, bottom = panel.marks
    x0, x1 = panel.left + 4, panel.left + panel.width - 4
    y0, y1 = panel.top + 3, panel.top + panel.height - 4
    x, y = panel.left + panel.width // 2, panel.top + panel.height // 2
    for place, anchor, text in (
        ((x0, y), "lm", left),
        ((x1, y), "rm", right),
        ((x, y0), "mt", top),
        ((x, y1), "mb", bottom),
    ):
        _write(pen, place, text, _WHITE, anchor=anchor, size=_MARK, rim=2)
    name = f"{'ijk'[panel.axis]} {panel.index}"
    _write(pen, (x0, y1), name, _WHITE, anchor="lb", size=13, rim=2)


def _draw_head(
    pen: ImageDraw,
    view: _View,
    geometry: Geometry,
    title: str,
    notice: str,
    grey: tuple[float, float],
    scale: float,
    width: int,
) -> None:
    y = _EDGE
    if notice:
        pen.rectangle((0, 0, width, _LINE + 6), fill=_ALARM)
        _write(pen, (_EDGE, 6), notice.upper(), _WHITE, size=16, room=width - 2 * _EDGE)
        y += _LINE
    _write(pen, (_EDGE, y), title, _WHITE, size=18, room=width * 2 / 3)
    _draw_bar(pen, width - _EDGE, y + 9, scale)
    y += _LINE
    x: float = _EDGE
    for name, color in (("brain", BRAIN_COLOR), ("cortex", CORTEX_COLOR)):
        pen.line((x, y + 8, x + 26, y + 8), fill=_rgb(color), width=3)
        x = _write(pen, (x + 32, y), name, _WHITE) + 22
    found = "" if view.brain.any() else "No brain was found. "
    _write(
        pen,
        (x, y),
        f"{found}Black to white: {grey[0]:.4g} to {grey[1]:.4g}. "
        "Letter and number: stored axis and index of the slice, from 0.",
        _PALE,
    )
    y += _LINE
    _write(pen, (_EDGE, y), _CONVENTION + _sides_said(geometry), _WHITE)
    y += _LINE
    _write(pen, (_EDGE, y), _tilt_said(geometry.affine), _PALE)


def _sides_said(geometry: Geometry) -> str:
    if has_orientation(geometry):
        return " Sides are those of the scan's header."
    return " The header codes no orientation: the sides are a guess."


def _tilt_said(affine: NDArray[np.float64]) -> str:
    tilt = _tilt(affine)
    if tilt < TILT_SAID:
        return "Slices follow the scan's stored axes, which are those of the body by its header."
    return (
        f"Slices follow the scan's stored axes, up to {tilt:.0f} degrees off the axes of the body "
        "by its header: letters name the nearest side."
    )


def _tilt(affine: NDArray[np.float64]) -> float:
    """Largest angle in degrees between a stored axis and the anatomical one it stands for."""
    cosines = np.abs(affine[:3, :3]) / np.linalg.norm(affine[:3, :3], axis=0)
    aligned = [cosines[world, axis] for world, (axis, _) in enumerate(canonical_axes(affine))]
    return math.degrees(math.acos(min(1.0, *aligned)))


def _draw_bar(pen: ImageDraw, right: int, y: int, scale: float) -> None:
    length = round(_BAR_MM * scale)
    pen.line((right - length, y, right, y), fill=_WHITE, width=2)
    for x in (right - length, right):
        pen.line((x, y - 5, x, y + 5), fill=_WHITE, width=2)
    _write(pen, (right - length - 8, y), f"{_BAR_MM:g} mm", _WHITE, anchor="rm")


def _write(
    pen: ImageDraw,
    place: tuple[float, float],
    text: str,
    color: tuple[int, int, int],
    *,
    anchor: str = "lt",
    size: int = _TEXT,
    rim: int = 0,
    room: float = math.inf,
) -> float:
    """Write one line, on a picture with a dark rim of `rim` pixels; gives the x at which it ends.

    Text wider than `room` pixels is cut short and ends in dots.
    """
    font = _font(size)
    # Line breaks and the like would change where the text goes.
    plain = "".join(letter if letter.isprintable() else "?" for letter in text)
    if pen.textlength(plain, font) > room:
        while plain and pen.textlength(plain + "...", font) > room:
            plain = plain[:-1]
        plain += "..."
    pen.text(place, plain, color, font, anchor=anchor, stroke_width=rim, stroke_fill=_BLACK)
    return place[0] + float(pen.textlength(plain, font))


@functools.lru_cache
def _font(size: int) -> Any:
    """The font that comes inside Pillow: the same picture on every machine."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _rgb(color: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(color[1:])
    return (red, green, blue)


# The page

_STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 1548px; margin: 0 auto; padding: 0 16px 32px; }
h1 { font-size: 26px; margin: 20px 0 4px; }
h2 { font-size: 19px; margin: 28px 0 8px; }
p { margin: 6px 0; }
.notice, .verdict { padding: 10px 14px; border-radius: 4px; font-weight: 600; }
.notice { background: #b22222; color: #fff; font-size: 19px; margin-top: 16px; }
.ok { background: #e3f0fa; }
.suspect { background: #ffe2a8; }
.verdict li { font-weight: 400; }
img { width: 100%; height: auto; display: block; margin-top: 12px; background: #000; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 5px 10px 5px 0;
  border-bottom: 1px solid #ddd; overflow-wrap: anywhere; }
th { font-weight: 600; }
td.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
td.word { white-space: nowrap; }
td.word span { padding: 1px 7px; border-radius: 3px; }
.small, td.small, td small { font-size: 13.5px; color: #444; }
td small { display: block; }
table.checks td { width: 28%; }
table.checks td.number, table.checks td.word { width: 1%; }
table.checks td + td.range { width: 17%; }
table.pairs { width: auto; }
table.pairs td:first-child { padding-right: 32px; }
code { font: 13.5px/1.45 ui-monospace, monospace; overflow-wrap: anywhere; }
.columns { display: grid; gap: 0 40px;
  grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); }
@media print { body { max-width: none; } .notice, .verdict, td.word span, img {
  print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def render(description: Mapping[str, Any], picture: Picture) -> str:
    """Make the page: one HTML document with the picture inside.

    Parameters
    ----------
    description : mapping
        From `trtseg.sidecar.describe`.
    picture : Picture

    Returns
    -------
    str
        HTML 5. Every text in it is escaped; the content security policy allows the style it holds,
        by hash, and pictures it holds, and nothing else.
    """
    name = _text(scan_name(description))
    notice = description["notice"]
    parts = [
        f"<h1>trtseg report: scan {name}</h1>",
        f'<p class="small">{_text(description["disclaimer"])}</p>',
        f'<p class="notice" role="alert">{_text(notice)}</p>' if notice else "",
        _verdict(description),
        _image(picture),
        _volumes(description),
        _checks(description),
        '<div class="columns">',
        _section("Stages", _pairs(_seconds(description["times_s"]))),
        _section("Options", _pairs(_options(description["options"]))),
        _section("Versions", _pairs(_versions(description))),
        "</div>",
        _section("Digests (SHA-256)", _digests(description)),
    ]
    return _document(f"trtseg report: scan {name}", "\n".join(filter(None, parts)))


def _document(title: str, body: str) -> str:
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _text(value: object) -> str:
    """`value` as HTML text or attribute value."""
    return html.escape(str(value), quote=True)


def _verdict(description: Mapping[str, Any]) -> str:
    suspect = [one["line"] for one in description["qc"]["checks"] if one["verdict"] == "suspect"]
    lines = "".join(f"<li>{_text(line)}</li>" for line in suspect)
    warnings = "".join(f"<li>Warning: {_text(line)}</li>" for line in description["warnings"])
    if suspect:
        kind, said = "suspect", "Suspect: do not use this result unseen."
    else:
        kind = "ok"
        said = "No check found anything suspect. That does not make the result right: look at it."
    listed = f"<ul>{lines}{warnings}</ul>" if lines or warnings else ""
    return f'<div class="verdict {kind}">{said}{listed}</div>'


def _image(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return (
        f'<img width="{picture.width}" height="{picture.height}" '
        'alt="Slices of the scan in three planes, with the outlines of brain and cortex. '
        f'{_text(_CONVENTION)}" src="data:image/png;base64,{data}">'
    )


def _volumes(description: Mapping[str, Any]) -> str:
    volumes = description["volumes_ml"]
    return _section(
        "Volumes",
        _pairs((name.capitalize(), f"{value:.1f} mL") for name, value in volumes.items()),
    )


def _checks(description: Mapping[str, Any]) -> str:
    rows = ["<tr><th>Check</th><th>Found</th><th>Verdict</th><th>Expected</th><th>Source</th></tr>"]
    for check in description["qc"]["checks"]:
        kind = check["verdict"] if check["verdict"] in ("ok", "suspect") else ""
        rows.append(
            f"<tr><td>{_text(check['title'])}<small>{_text(check['line'])}</small></td>"
            f'<td class="number">{_text(_shown(check))}</td>'
            f'<td class="word"><span class="{kind}">{_text(check["verdict"])}</span></td>'
            f'<td class="range">{_text(check["expected"] or "-")}</td>'
            f'<td class="small">{_text(check["source"])}</td></tr>'
        )
    return _section("Checks", f'<table class="checks">{"".join(rows)}</table>')


def _shown(check: Mapping[str, Any]) -> str:
    return Check(**check).shown


def _seconds(times: Mapping[str, float]) -> list[tuple[str, str]]:
    rows = [(stage, f"{seconds:.2f} s") for stage, seconds in times.items()]
    return [*rows, ("all", f"{sum(times.values()):.2f} s")]


def _options(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), _option(value)) for name, value in options.items()]


def _option(value: object) -> str:
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _versions(description: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("model set", description["models"]["set"]),
        ("device", f"{description['ran_on']}, {description['precision']}"),
        *description["versions"].items(),
    ]


def _digests(description: Mapping[str, Any]) -> str:
    rows = []
    for kind in ("inputs", "outputs"):
        for role, entry in description[kind].items():
            role = role.replace("_", " ")
            label = f"{kind[:-1]}: {role}" + (f", {entry['name']}" if "name" in entry else "")
            rows.append((label, entry["sha256"]))
    for net, entry in description["models"]["networks"].items():
        for kind in ("checkpoint", "engine"):
            for part, digest in entry[f"{kind}_sha256"].items():
                rows.append((f"{net.upper()} {kind}: {part}", digest))
    return _pairs(rows, code=True)


def _pairs(rows: Iterable[tuple[str, str]], *, code: bool = False) -> str:
    tag = ("<code>", "</code>") if code else ("", "")
    return (
        '<table class="pairs">'
        + "".join(
            f'<tr><td>{_text(name)}</td><td class="{"" if code else "number"}">'
            f"{tag[0]}{_text(value)}{tag[1]}</td></tr>"
            for name, value in rows
        )
        + "</table>"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>"
