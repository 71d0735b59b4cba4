"""The architecture of a network, read from its DeepMedic v0.7.0 ``*_model_config.cfg``.

DeepMedic runs such a file as Python; here it is read as data and nothing in it is ever run. A file
is a series of ``name = value`` lines and ``#`` comments. A value is a number, a quoted text (plain
or typographic quotes), ``True``, ``False``, ``None``, or a list or tuple of values, which may span
lines. A field that is absent, or ``None``, takes DeepMedic's default.

Read into the `NetworkSpec`: feature maps and residual layers of each pathway, subsampling factors,
FC layers and the first FC kernel, dropout rates, length of the batch-norm rolling averages,
segment and batch sizes.

Checked, since only one form can be run: 2 classes, 1 channel, kernels of 3 x 3 x 3, no layer of
lower rank, PReLU, batch norm in use, isotropic factors and first FC kernel, cubic segments.

Ignored, since inference does not depend on them: ``modelName``, ``folderForOutput``,
``segmentsDimVal``, ``batchSizeVal``, ``convWeightsInit``; and, as in DeepMedic, all fields of the
subsampled pathways where ``useSubsampledPathway`` is not ``True``.

Source of fields and defaults: DeepMedic v0.7.0, its handling of the model config.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeAlias

from trtseg.architecture import KERNEL, NetworkSpec, PathwaySpec
from trtseg.errors import ModelError

Value: TypeAlias = "int | float | str | bool | list[Value] | None"

# Limits far above any real config: a hostile file must cost neither memory nor time.
_LARGEST_FILE = 1 << 20
_LARGEST_NUMBER = 100_000
_LONGEST_NUMBER = 32
_LONGEST_LIST = 256
_DEEPEST_LIST = 8
_LONGEST_SHOWN = 120

_REQUIRED = (
    "numberOfOutputClasses",
    "numberOfInputChannels",
    "numberFMsPerLayerNormal",
    "kernelDimPerLayerNormal",
    "segmentsDimTrain",
    "batchSizeTrain",
)
_DEFAULTS: dict[str, Value] = {
    "layersWithResidualConnNormal": [],
    "lowerRankLayersNormal": [],
    "useSubsampledPathway": False,
    "subsampleFactor": [[3, 3, 3]],
    "numberFMsPerLayerFC": [],
    "kernelDimFor1stFcLayer": [1, 1, 1],
    "layersWithResidualConnFC": [],
    "dropoutRatesNormal": [],
    "dropoutRatesSubsampled": [],
    "activationFunction": "prelu",
    "rollAverageForBNOverThatManyBatches": 60,
}
#: Fields that default to the value of another one.
_MIRRORED = {
    "numberFMsPerLayerSubsampled": "numberFMsPerLayerNormal",
    "kernelDimPerLayerSubsampled": "kernelDimPerLayerNormal",
    "layersWithResidualConnSubsampled": "layersWithResidualConnNormal",
    "lowerRankLayersSubsampled": "lowerRankLayersNormal",
    "segmentsDimInference": "segmentsDimTrain",
    "batchSizeInfer": "batchSizeTrain",
}
_IGNORED = ("modelName", "folderForOutput", "segmentsDimVal", "batchSizeVal", "convWeightsInit")
_KNOWN = (*_REQUIRED, *_DEFAULTS, *_MIRRORED, "dropoutRatesFc", *_IGNORED)

#: Fields of DeepMedic versions before and after v0.7.0, and what is expected in their place.
_OTHER_VERSIONS = {
    "relu0orPrelu1": "activationFunction, which replaced it in DeepMedic v0.7.0",
    "initializeClassic0orDelving1": "convWeightsInit, which replaced it in DeepMedic v0.7.0",
    "kernelDimPerLayerFC": "kernelDimFor1stFcLayer, as in DeepMedic v0.7.0 (this is a later field)",
    "padTypePerLayerNormal": "no such field in DeepMedic v0.7.0 (this is a later field)",
    "padTypePerLayerSubsampled": "no such field in DeepMedic v0.7.0 (this is a later field)",
    "padTypePerLayerFC": "no such field in DeepMedic v0.7.0 (this is a later field)",
}

_CORRECT = "correct the config; if the network was trained this way, trtseg cannot run it"

# Either kind of quote may be typographic, and a text may open with one form and close with another.
_TOKEN = re.compile(
    r"""
    (?P<skip>[ \t\f]+ | \#[^\n]*)
    | (?P<newline>\n)
    | (?P<number>[+-]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)
    | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
    | (?P<text>["\u201c\u201d][^\\\n"\u201c\u201d]*(?:\\.[^\\\n"\u201c\u201d]*)*["\u201c\u201d]
             | ['\u2018\u2019][^\\\n'\u2018\u2019]*(?:\\.[^\\\n'\u2018\u2019]*)*['\u2018\u2019])
    | (?P<mark>[=\[\](),])
    """,
    re.VERBOSE,
)
_CLOSING = {"[": "]", "(": ")"}
_CONSTANTS = {"True": True, "False": False, "None": None}


def read_config(path: Path) -> NetworkSpec:
    """Read the architecture from a config file.

    Parameters
    ----------
    path : Path
        A DeepMedic v0.7.0 ``*_model_config.cfg``, UTF-8 (a byte order mark and Windows line ends
        are accepted), 1 MiB at most.

    Returns
    -------
    NetworkSpec

    Raises
    ------
    ModelError
        The file is missing or unreadable, or holds what `parse_config` refuses.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise ModelError(
            f"{path}: {error.strerror or error}",
            expected="a DeepMedic v0.7.0 *_model_config.cfg",
            action="check the path and its permissions",
        ) from error
    _check_size(len(data), str(path))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(
            f"{path}: no UTF-8 text at byte {error.start}",
            expected="a DeepMedic v0.7.0 *_model_config.cfg in UTF-8",
            action="check that this is the config, and save it as UTF-8",
        ) from error
    return parse_config(text, source=str(path))


def parse_config(text: str, *, source: str) -> NetworkSpec:
    """Read the architecture from the text of a config; nothing in it is run.

    Parameters
    ----------
    text : str
        Content of a DeepMedic v0.7.0 ``*_model_config.cfg``.
    source : str
        What error messages call it: the file's name.

    Returns
    -------
    NetworkSpec

    Raises
    ------
    ModelError
        The text is no series of ``name = value`` lines; a field is unknown, given twice, missing,
        of a wrong type, or asks for an architecture trtseg does not compute. The message gives
        `source`, the line, the field, the value found and what is supported.
    """
    _check_size(len(text), source)
    plain = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return _spec(_collect(_Parser(plain, source), source))


def _check_size(size: int, source: str) -> None:
    if size > _LARGEST_FILE:
        raise ModelError(
            f"{source}: more than {_LARGEST_FILE} bytes",
            expected="a DeepMedic v0.7.0 *_model_config.cfg, which is a short text",
            action="check the path",
        )


class _Token(NamedTuple):
    kind: str
    text: str
    line: int

    @property
    def shown(self) -> str:
        return "nothing" if self.kind in ("newline", "end") else repr(_clip(self.text))


def _tokens(text: str, source: str) -> Iterator[_Token]:
    at, line = 0, 1
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            start = text.rfind("\n", 0, at) + 1
            whole = text[start : start + _LONGEST_SHOWN].partition("\n")[0]
            rest = text[at : at + 20].partition("\n")[0]
            raise _form_error(source, line, f"{whole!r} cannot be read from {rest!r} on")
        if match.lastgroup != "skip":
            yield _Token(match.lastgroup or "", match.group(), line)
        line += match.lastgroup == "newline"
        at = match.end()
    yield _Token("end", "", line)


def _form_error(source: str, line: int, found: str) -> ModelError:
    return ModelError(
        f"{source}, line {line}: {found}",
        expected="lines of the form name = value, where value is a number, a quoted text, True, "
        "False, None or a list of these (a config is read, never run)",
        action="correct the line",
    )


@dataclass(frozen=True)
class _Field:
    """A field's value and where it stands; line 0 is a default."""

    source: str
    name: str
    value: Value
    line: int

    def refuse(self, expected: str) -> NoReturn:
        name, shown = _clip(self.name), _clip(repr(self.value))
        if self.line:
            found = f"{self.source}, line {self.line}: {name} = {shown}"
        else:
            found = f"{self.source}: {name} is not given, which means {shown}"
        raise ModelError(found, expected=expected, action=_CORRECT)


def _clip(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."


class _Parser:
    """Turns the text into fields, holding one token ahead."""

    def __init__(self, text: str, source: str) -> None:
        self._source = source
        self._tokens = _tokens(text, source)
        self._next = next(self._tokens)

    def fields(self) -> Iterator[_Field]:
        while self._next.kind != "end":
            if self._next.kind == "newline":
                self._advance()
            else:
                yield self._field()

    def _advance(self) -> _Token:
        token = self._next
        self._next = next(self._tokens, token)
        return token

    def _error(self, token: _Token, found: str) -> ModelError:
        return _form_error(self._source, token.line, found)

    def _field(self) -> _Field:
        name = self._advance()
        if name.kind != "name" or self._next.text != "=":
            raise self._error(name, f"{name.shown} does not begin an assignment")
        self._advance()
        value = self._value(_clip(name.text), 0)
        if self._next.kind not in ("newline", "end"):
            shown = f"{_clip(name.text)} = {_clip(repr(value))}"
            raise self._error(self._next, f"{shown} is followed by {self._next.shown}")
        return _Field(self._source, name.text, value, name.line)

    def _value(self, name: str, depth: int) -> Value:
        token = self._advance()
        if token.kind == "number":
            return self._number(name, token)
        if token.kind == "text":
            return token.text[1:-1]
        if token.text in _CONSTANTS:
            return _CONSTANTS[token.text]
        if token.text in _CLOSING:
            return self._items(name, token, depth)
        raise self._error(token, f"{name} has {token.shown} where a value belongs")

    def _number(self, name: str, token: _Token) -> int | float:
        if len(token.text) > _LONGEST_NUMBER:
            raise self._error(token, f"{name} has a number of {len(token.text)} characters")
        is_whole = token.text.lstrip("+-").isdigit()
        return int(token.text) if is_whole else float(token.text)

    def _items(self, name: str, opening: _Token, depth: int) -> Value:
        if depth >= _DEEPEST_LIST:
            raise self._error(opening, f"{name} has lists nested over {_DEEPEST_LIST} deep")
        items: list[Value] = []
        comma = False
        while not self._closes(opening):
            if items and not comma:
                raise self._error(
                    self._next,
                    f"{name} has {self._next.shown} where ',' or {_CLOSING[opening.text]!r} "
                    f"belongs (the list opens on line {opening.line})",
                )
            if len(items) >= _LONGEST_LIST:
                raise self._error(self._next, f"{name} has a list of over {_LONGEST_LIST} items")
            items.append(self._value(name, depth + 1))
            self._skip_newlines()
            comma = self._next.text == ","
            if comma:
                self._advance()
        # As in Python, (x) is x itself and (x,) a tuple of one.
        single = opening.text == "(" and len(items) == 1 and not comma
        return items[0] if single else items

    def _closes(self, opening: _Token) -> bool:
        self._skip_newlines()
        if self._next.text != _CLOSING[opening.text]:
            return False
        self._advance()
        return True

    def _skip_newlines(self) -> None:
        while self._next.kind == "newline":
            self._advance()


class _Config:
    """The fields of a config, with DeepMedic's defaults for those it does not give."""

    def __init__(self, given: dict[str, _Field], source: str) -> None:
        self._given = {name: field for name, field in given.items() if field.value is not None}
        self.source = source

    def __contains__(self, name: str) -> bool:
        return name in self._given

    def __getitem__(self, name: str) -> _Field:
        if name in self._given:
            return self._given[name]
        if name in _MIRRORED:
            return self[_MIRRORED[name]]
        if name in _DEFAULTS:
            return _Field(self.source, name, _DEFAULTS[name], 0)
        raise ModelError(
            f"{self.source}: {name} is missing",
            expected=f"all of {', '.join(_REQUIRED)}",
            action="use the config the network was trained with",
        )


def _collect(parser: _Parser, source: str) -> _Config:
    given: dict[str, _Field] = {}
    for field in parser.fields():
        if field.name not in _KNOWN:
            field.refuse(_instead(field.name))
        if field.name in given:
            field.refuse(f"each field once (it stands on line {given[field.name].line} already)")
        given[field.name] = field
    return _Config(given, source)


def _instead(name: str) -> str:
    if name in _OTHER_VERSIONS:
        return _OTHER_VERSIONS[name]
    known = {field.lower(): field for field in _KNOWN}
    close = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f" (did you mean {known[close[0]]}?)" if close else ""
    return f"a field of DeepMedic v0.7.0's model config{hint}"


def _spec(config: _Config) -> NetworkSpec:
    classes = _exactly(config["numberOfOutputClasses"], 2, "2 (background and one structure)")
    channels = _exactly(config["numberOfInputChannels"], 1, "1 (the T2w image)")
    if config["activationFunction"].value != "prelu":
        config["activationFunction"].refuse("'prelu'")
    pathways = _pathways(config)
    fc_maps = _wholes(config["numberFMsPerLayerFC"], least=1)
    if not fc_maps:
        config["numberFMsPerLayerFC"].refuse("at least one hidden FC layer, such as [250, 250]")
    values = {
        "fc_kernel": _fc_kernel(config["kernelDimFor1stFcLayer"]),
        "rolling_batches": _rolling(config["rollAverageForBNOverThatManyBatches"]),
        "train_segment": _segment(config["segmentsDimTrain"]),
        "train_batch": _whole(config["batchSizeTrain"], least=1),
        "tile": _segment(config["segmentsDimInference"]),
        "batch": _whole(config["batchSizeInfer"], least=1),
        "classes": classes,
        "channels": channels,
    }
    fc_residuals = _layers(config["layersWithResidualConnFC"], len(fc_maps))
    fc_dropout = _fc_dropout(config, len(fc_maps))
    try:
        return NetworkSpec(
            pathways=pathways,
            fc_maps=fc_maps,
            fc_residual_layers=fc_residuals,
            fc_dropout=fc_dropout,
            **values,
        )
    except ModelError as error:
        raise ModelError(
            f"{config.source}: {error.found}",
            expected=error.expected,
            action=error.action or _CORRECT,
        ) from error


def _pathways(config: _Config) -> tuple[PathwaySpec, ...]:
    maps = _wholes(config["numberFMsPerLayerNormal"], least=1)
    if not maps:
        config["numberFMsPerLayerNormal"].refuse("at least one layer")
    _check_kernels(config["kernelDimPerLayerNormal"], len(maps))
    _check_ranks(config["lowerRankLayersNormal"])
    normal = PathwaySpec(
        factor=1,
        feature_maps=maps,
        residual_layers=_layers(config["layersWithResidualConnNormal"], len(maps)),
        dropout=_rates(config["dropoutRatesNormal"], len(maps)),
    )
    used = config["useSubsampledPathway"]
    if not isinstance(used.value, bool):
        used.refuse("True or False")
    return (normal, *_subsampled(config, normal.layers)) if used.value else (normal,)


def _subsampled(config: _Config, layers: int) -> Iterator[PathwaySpec]:
    factors = _factors(config["subsampleFactor"])
    maps = _subsampled_maps(config["numberFMsPerLayerSubsampled"], layers)
    _check_kernels(config["kernelDimPerLayerSubsampled"], layers)
    _check_ranks(config["lowerRankLayersSubsampled"])
    residuals = _layers(config["layersWithResidualConnSubsampled"], layers)
    dropout = _rates(config["dropoutRatesSubsampled"], layers)
    # DeepMedic fills up the shorter of the two: maps by repeating the last, factors by adding 2.
    for index in range(max(len(factors), len(maps))):
        beyond = max(0, index - len(factors) + 1)
        yield PathwaySpec(
            factor=factors[min(index, len(factors) - 1)] + 2 * beyond,
            feature_maps=maps[min(index, len(maps) - 1)],
            residual_layers=residuals,
            dropout=dropout,
        )


def _factors(field: _Field) -> list[int]:
    cubes = [_cube(value) for value in _nested(field.value)]
    if min(cubes) < 2:
        field.refuse("one factor above 1, the same for all axes, per pathway: [[3, 3, 3], ...]")
    return cubes


def _subsampled_maps(field: _Field, layers: int) -> list[tuple[int, ...]]:
    lists = []
    for value in _nested(field.value):
        maps = _whole_tuple(value, least=1)
        if maps is None or len(maps) != layers:
            field.refuse(
                f"{layers} whole numbers from 1 to {_LARGEST_NUMBER}, as many as the normal "
                "pathway has layers: one list for all subsampled pathways or one list for each"
            )
        lists.append(maps)
    return lists


def _nested(value: Value) -> list[Value]:
    """A list of lists as it is; anything else, such as a flat list, as the only item of one."""
    if isinstance(value, list) and any(isinstance(item, list) for item in value):
        return value
    return [value]


def _fc_kernel(field: _Field) -> int:
    side = _cube(field.value)
    if side % 2 == 0:
        field.refuse("three equal odd numbers, such as [3, 3, 3]")
    return side


def _segment(field: _Field) -> int:
    side = _cube(field.value)
    if not side:
        field.refuse("three equal whole numbers above 0, such as [45, 45, 45]")
    return side


def _rolling(field: _Field) -> int:
    length = _as_whole(field.value)
    if length is None or length < 1:
        field.refuse(
            f"a whole number from 1 to {_LARGEST_NUMBER} (0 or less turns batch norm off, which is "
            "not supported)"
        )
    return length


def _fc_dropout(config: _Config, hidden: int) -> tuple[float, ...]:
    if "dropoutRatesFc" not in config:
        return (0.0,) + (0.5,) * hidden
    return _rates(config["dropoutRatesFc"], hidden + 1)


def _check_kernels(field: _Field, layers: int) -> None:
    kernels = field.value if isinstance(field.value, list) else []
    if len(kernels) != layers or any(_cube(kernel) != KERNEL for kernel in kernels):
        field.refuse(f"[{KERNEL}, {KERNEL}, {KERNEL}] for each of the {layers} layers")


def _check_ranks(field: _Field) -> None:
    if field.value != []:
        field.refuse("[]: layers of lower rank are not supported")


def _exactly(field: _Field, number: int, expected: str) -> int:
    if _as_whole(field.value) != number:
        field.refuse(expected)
    return number


def _whole(field: _Field, *, least: int) -> int:
    number = _as_whole(field.value)
    if number is None or number < least:
        field.refuse(f"a whole number from {least} to {_LARGEST_NUMBER}")
    return number


def _wholes(field: _Field, *, least: int) -> tuple[int, ...]:
    numbers = _whole_tuple(field.value, least=least)
    if numbers is None:
        field.refuse(f"a list of whole numbers from {least} to {_LARGEST_NUMBER}")
    return numbers


def _layers(field: _Field, layers: int) -> tuple[int, ...]:
    """Layers with a residual connection; DeepMedic cares for neither order nor repetition."""
    numbers = _whole_tuple(field.value, least=2)
    if numbers is None or any(number > layers for number in numbers):
        field.refuse(
            f"a list of layers from 2 to {layers} (a residual joins the input of the layer before)"
        )
    return tuple(sorted(set(numbers)))


def _rates(field: _Field, count: int) -> tuple[float, ...]:
    """Dropout rates, one per layer; an empty list means none."""
    if field.value == []:
        return (0.0,) * count
    rates = field.value if isinstance(field.value, list) else []
    numbers = tuple(_as_rate(rate) for rate in rates)
    if len(numbers) != count or None in numbers:
        field.refuse(f"[] or a list of {count} rates, 0 or more and below 1: one per layer")
    return tuple(number for number in numbers if number is not None)


def _as_rate(value: Value) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0.0 <= value < 1.0 else None


def _cube(value: Value) -> int:
    """Side n of [n, n, n]; 0 for anything else."""
    numbers = _whole_tuple(value, least=1)
    if numbers is None or len(numbers) != 3 or len(set(numbers)) != 1:
        return 0
    return numbers[0]


def _whole_tuple(value: Value, *, least: int) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    numbers = [_as_whole(item) for item in value]
    if any(number is None or number < least for number in numbers):
        return None
    return tuple(number for number in numbers if number is not None)


def _as_whole(value: Value) -> int | None:
    """The whole number a value is (5 or 5.0, not True), within the limit; else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if abs(value) > _LARGEST_NUMBER or value != int(value):
        return None
    return int(value)
