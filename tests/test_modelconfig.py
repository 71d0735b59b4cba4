from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtseg.architecture import PUBLISHED, NetworkSpec, PathwaySpec
from trtseg.errors import ModelError
from trtseg.modelconfig import parse_config, read_config

SAMPLE = Path(__file__).parent.parent / "docs" / "sample_model_config.cfg"

PROPERTY = settings(deadline=None, derandomize=True, max_examples=150)

#: The published values, one field each, so that a test can change or drop some.
FIELDS = {
    "modelName": '"sample"',
    "folderForOutput": '"."',
    "numberOfOutputClasses": "2",
    "numberOfInputChannels": "1",
    "numberFMsPerLayerNormal": "[30, 30, 40, 40, 40, 40, 50, 50]",
    "kernelDimPerLayerNormal": str([[3, 3, 3]] * 8),
    "layersWithResidualConnNormal": "[4, 6, 8]",
    "lowerRankLayersNormal": "[]",
    "useSubsampledPathway": "True",
    "numberFMsPerLayerSubsampled": "[30, 30, 40, 40, 40, 40, 50, 50]",
    "kernelDimPerLayerSubsampled": str([[3, 3, 3]] * 8),
    "subsampleFactor": "[[3, 3, 3], [5, 5, 5]]",
    "layersWithResidualConnSubsampled": "[4, 6, 8]",
    "numberFMsPerLayerFC": "[250, 250]",
    "kernelDimFor1stFcLayer": "[3, 3, 3]",
    "layersWithResidualConnFC": "[2]",
    "segmentsDimTrain": "[25, 25, 25]",
    "segmentsDimVal": "[17, 17, 17]",
    "segmentsDimInference": "[45, 45, 45]",
    "batchSizeTrain": "5",
    "batchSizeVal": "25",
    "batchSizeInfer": "5",
    "dropoutRatesNormal": "[]",
    "dropoutRatesSubsampled": "[]",
    "dropoutRatesFc": "[0.0, 0.5, 0.5]",
    "convWeightsInit": '["fanIn", 2]',
    "activationFunction": '"prelu"',
    "rollAverageForBNOverThatManyBatches": "60",
}

REQUIRED = (
    "numberOfOutputClasses",
    "numberOfInputChannels",
    "numberFMsPerLayerNormal",
    "kernelDimPerLayerNormal",
    "segmentsDimTrain",
    "batchSizeTrain",
)


def text_of(**changes: str | None) -> str:
    """The published config with some fields changed, added, or (None) dropped."""
    fields = FIELDS | changes
    return "".join(f"{name} = {value}\n" for name, value in fields.items() if value is not None)


def parsed(**changes: str | None) -> NetworkSpec:
    return parse_config(text_of(**changes), source="net.cfg")


def refused(text: str) -> str:
    with pytest.raises(ModelError) as caught:
        parse_config(text, source="net.cfg")
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.expected
    assert caught.value.action
    return message


def line_of(field: str, text: str) -> int:
    starts = [line.partition(" ")[0] for line in text.splitlines()]
    return starts.index(field) + 1


def test_sample_gives_the_published_networks() -> None:
    assert read_config(SAMPLE) == PUBLISHED


def test_sample_has_every_field_and_typographic_quotes() -> None:
    text = SAMPLE.read_text(encoding="utf-8")
    assert all(f"{field} = " in text for field in FIELDS)
    assert "modelName = \u201csample\u201d" in text


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_other_line_ends_and_a_byte_order_mark(tmp_path: Path, end: str) -> None:
    path = tmp_path / "net.cfg"
    text = "\ufeff" + SAMPLE.read_text(encoding="utf-8").replace("\n", end)
    path.write_bytes(text.encode())
    assert read_config(path) == PUBLISHED


def test_no_line_end_at_the_end() -> None:
    assert parse_config(text_of().rstrip("\n"), source="net.cfg") == PUBLISHED


def with_pathways(*pathways: PathwaySpec, **changes: Any) -> NetworkSpec:
    return replace(PUBLISHED, pathways=pathways, **changes)


NORMAL, SUB3, SUB5 = PUBLISHED.pathways
WIDE = (31, 31, 41, 41, 41, 41, 51, 51)
RATES = (0.0, 0.1, 0.0, 0.0, 0.2, 0.0, 0.0, 0.25)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"numberFMsPerLayerNormal": str(list(WIDE))},
            with_pathways(replace(NORMAL, feature_maps=WIDE), SUB3, SUB5),
        ),
        (
            {"layersWithResidualConnNormal": "[8, 4, 4]"},
            with_pathways(replace(NORMAL, residual_layers=(4, 8)), SUB3, SUB5),
        ),
        (
            {"dropoutRatesNormal": str(list(RATES))},
            with_pathways(replace(NORMAL, dropout=RATES), SUB3, SUB5),
        ),
        (
            {"numberFMsPerLayerSubsampled": str(list(WIDE))},
            with_pathways(
                NORMAL, replace(SUB3, feature_maps=WIDE), replace(SUB5, feature_maps=WIDE)
            ),
        ),
        (
            {"numberFMsPerLayerSubsampled": str([list(WIDE), list(SUB5.feature_maps)])},
            with_pathways(NORMAL, replace(SUB3, feature_maps=WIDE), SUB5),
        ),
        (
            {"layersWithResidualConnSubsampled": "[]"},
            with_pathways(
                NORMAL, replace(SUB3, residual_layers=()), replace(SUB5, residual_layers=())
            ),
        ),
        (
            {"dropoutRatesSubsampled": str(list(RATES))},
            with_pathways(NORMAL, replace(SUB3, dropout=RATES), replace(SUB5, dropout=RATES)),
        ),
        ({"subsampleFactor": "[7, 7, 7]"}, with_pathways(NORMAL, replace(SUB3, factor=7))),
        ({"subsampleFactor": "[[5,5,5], [3,3,3]]"}, with_pathways(NORMAL, SUB5, SUB3)),
        ({"useSubsampledPathway": "False"}, with_pathways(NORMAL)),
        (
            {"numberFMsPerLayerFC": "[260, 260, 270]", "dropoutRatesFc": "[0, 0, .25, 5e-1]"},
            replace(PUBLISHED, fc_maps=(260, 260, 270), fc_dropout=(0.0, 0.0, 0.25, 0.5)),
        ),
        ({"kernelDimFor1stFcLayer": "(5, 5, 5)"}, replace(PUBLISHED, fc_kernel=5)),
        ({"layersWithResidualConnFC": "[]"}, replace(PUBLISHED, fc_residual_layers=())),
        ({"dropoutRatesFc": "[]"}, replace(PUBLISHED, fc_dropout=(0.0, 0.0, 0.0))),
        ({"segmentsDimTrain": "[27, 27, 27]"}, replace(PUBLISHED, train_segment=27)),
        ({"segmentsDimInference": "[61, 61, 61]"}, replace(PUBLISHED, tile=61)),
        ({"batchSizeTrain": "7"}, replace(PUBLISHED, train_batch=7)),
        ({"batchSizeInfer": "8"}, replace(PUBLISHED, batch=8)),
        ({"rollAverageForBNOverThatManyBatches": "40"}, replace(PUBLISHED, rolling_batches=40)),
        ({"batchSizeTrain": "7.0"}, replace(PUBLISHED, train_batch=7)),
        ({"batchSizeTrain": "(7)"}, replace(PUBLISHED, train_batch=7)),
        ({"layersWithResidualConnFC": "(2,)"}, PUBLISHED),
    ],
)
def test_variations_in_scope(changes: dict[str, str], expected: NetworkSpec) -> None:
    assert parsed(**changes) == expected


@pytest.mark.parametrize(
    ("absent", "expected"),
    [
        ("numberFMsPerLayerSubsampled", PUBLISHED),
        ("kernelDimPerLayerSubsampled", PUBLISHED),
        ("layersWithResidualConnSubsampled", PUBLISHED),
        ("lowerRankLayersNormal", PUBLISHED),
        ("dropoutRatesNormal", PUBLISHED),
        ("dropoutRatesSubsampled", PUBLISHED),
        ("dropoutRatesFc", PUBLISHED),
        ("activationFunction", PUBLISHED),
        ("rollAverageForBNOverThatManyBatches", PUBLISHED),
        ("subsampleFactor", with_pathways(NORMAL, SUB3)),
        ("useSubsampledPathway", with_pathways(NORMAL)),
        ("kernelDimFor1stFcLayer", replace(PUBLISHED, fc_kernel=1)),
        ("layersWithResidualConnFC", replace(PUBLISHED, fc_residual_layers=())),
        ("segmentsDimInference", replace(PUBLISHED, tile=25)),
    ],
)
@pytest.mark.parametrize("absence", [None, "None"])
def test_defaults_of_absent_fields(absent: str, expected: NetworkSpec, absence: str | None) -> None:
    assert parsed(**{absent: absence}) == expected


def test_absent_inference_batch_is_the_training_batch() -> None:
    assert parsed(batchSizeTrain="9", batchSizeInfer=None).batch == 9


def test_subsampled_pathways_mirror_a_changed_normal_pathway() -> None:
    spec = parsed(
        numberFMsPerLayerNormal="[8, 9, 10]",
        kernelDimPerLayerNormal="[[3,3,3], [3,3,3], [3,3,3]]",
        layersWithResidualConnNormal="[3]",
        numberFMsPerLayerSubsampled=None,
        kernelDimPerLayerSubsampled=None,
        layersWithResidualConnSubsampled=None,
        layersWithResidualConnFC="[]",
    )
    assert [pathway.factor for pathway in spec.pathways] == [1, 3, 5]
    assert {pathway.feature_maps for pathway in spec.pathways} == {(8, 9, 10)}
    assert {pathway.residual_layers for pathway in spec.pathways} == {(3,)}


def test_default_fc_dropout_spares_the_first_layer_only() -> None:
    spec = parsed(numberFMsPerLayerFC="[250]", layersWithResidualConnFC="[]", dropoutRatesFc=None)
    assert spec.fc_dropout == (0.0, 0.5)


def test_fewer_lists_than_factors_repeat_the_last() -> None:
    narrow = list(NORMAL.feature_maps)
    spec = parsed(
        numberFMsPerLayerSubsampled=str([narrow, list(WIDE)]),
        subsampleFactor="[[3,3,3], [5,5,5], [9,9,9]]",
    )
    assert [pathway.factor for pathway in spec.pathways] == [1, 3, 5, 9]
    assert [pathway.feature_maps for pathway in spec.pathways[1:]] == [tuple(narrow), WIDE, WIDE]


def test_more_lists_than_factors_add_factors_two_apart() -> None:
    spec = parsed(
        numberFMsPerLayerSubsampled=str([list(WIDE)] * 4),
        subsampleFactor="[[3,3,3], [7,7,7]]",
        layersWithResidualConnFC="[]",
    )
    assert [pathway.factor for pathway in spec.pathways] == [1, 3, 7, 9, 11]


def test_fields_of_unused_subsampled_pathways_have_no_effect() -> None:
    spec = parsed(
        useSubsampledPathway="False",
        subsampleFactor="[3, 3, 1]",
        lowerRankLayersSubsampled="[1]",
        numberFMsPerLayerSubsampled="'none'",
    )
    assert spec == with_pathways(NORMAL)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modelName", "['any', (1.5, None, 'value')]"),
        ("folderForOutput", "None"),
        ("segmentsDimVal", "[1, 2]"),
        ("batchSizeVal", "'many'"),
        ("convWeightsInit", '["normal", 0.01]'),
        ("convWeightsInit", None),
    ],
)
def test_ignored_fields_take_any_plain_value(field: str, value: str | None) -> None:
    assert parsed(**{field: value}) == PUBLISHED


@pytest.mark.parametrize(
    "value",
    [
        "'prelu'",
        '"prelu"',
        "\u2018prelu\u2019",
        "\u201cprelu\u201d",
        '\u201cprelu"',
        '"prelu\u201d',
        "\u2019prelu'",
        "\u201dprelu\u201c",
        "('prelu')",
    ],
)
def test_quotes_of_any_form(value: str) -> None:
    assert parsed(activationFunction=value) == PUBLISHED


@pytest.mark.parametrize(
    "value",
    [
        '"a # b"',
        "\u201cit's\u201d",
        r'"a \" b"',
        '"a [ b"',
        '""',
        "'=' # it's \"unbalanced",
        '"x"# x',
    ],
)
def test_texts_and_comments_hold_each_others_signs(value: str) -> None:
    assert parsed(modelName=value, batchSizeInfer="3 # was = 4") == replace(PUBLISHED, batch=3)


def test_lists_span_lines_with_comments_between() -> None:
    value = "[  # one per layer's\n 31, 31, # 'two\n\n 41,\n41, 41, 41, 51, 51,\n  ] # end"
    assert parsed(numberFMsPerLayerNormal=value).pathways[0].feature_maps == WIDE


def test_a_line_number_counts_the_lines_of_lists() -> None:
    text = "# first\n\nsubsampleFactor = [\n[3,3,3],\n]\nbatchSizeTrain = 'a'\n"
    text += text_of(batchSizeTrain=None, subsampleFactor=None)
    assert "net.cfg, line 6: batchSizeTrain = 'a'" in refused(text)


KERNELS = [[3, 3, 3]] * 7


@pytest.mark.parametrize(
    ("field", "value", "shown", "expected"),
    [
        ("numberOfOutputClasses", "3", "3", "2 (background"),
        ("numberOfOutputClasses", "True", "True", "2 (background"),
        ("numberOfOutputClasses", "'2'", "'2'", "2 (background"),
        ("numberOfOutputClasses", "[2]", "[2]", "2 (background"),
        ("numberOfInputChannels", "2", "2", "1 (the T2w image)"),
        ("numberOfInputChannels", "True", "True", "1 (the T2w image)"),
        ("numberFMsPerLayerNormal", "[]", "[]", "at least one layer"),
        ("numberFMsPerLayerNormal", "30", "30", "a list of whole numbers"),
        ("numberFMsPerLayerNormal", "'30'", "'30'", "a list of whole numbers"),
        ("numberFMsPerLayerNormal", "[30, 0]", "[30, 0]", "a list of whole numbers"),
        ("numberFMsPerLayerNormal", "[30, True]", "[30, True]", "a list of whole numbers"),
        ("numberFMsPerLayerNormal", "[30, 4.5]", "[30, 4.5]", "a list of whole numbers"),
        ("numberFMsPerLayerNormal", "[30, 1e9]", "[30, 1000000000.0]", "to 100000"),
        ("numberFMsPerLayerNormal", "[1e999]", "[inf]", "to 100000"),
        ("kernelDimPerLayerNormal", "[3, 3, 3]", "[3, 3, 3]", "[3, 3, 3] for each of the 8"),
        ("kernelDimPerLayerNormal", str(KERNELS), str(KERNELS), "[3, 3, 3] for each of the 8"),
        (
            "kernelDimPerLayerNormal",
            str([*KERNELS, [3, 3, 1]]),
            str([*KERNELS, [3, 3, 1]]),
            "[3, 3, 3] for each",
        ),
        (
            "kernelDimPerLayerNormal",
            str([*KERNELS, [5, 5, 5]]),
            str([*KERNELS, [5, 5, 5]]),
            "[3, 3, 3] for each",
        ),
        ("layersWithResidualConnNormal", "[1]", "[1]", "layers from 2 to 8"),
        ("layersWithResidualConnNormal", "[9]", "[9]", "layers from 2 to 8"),
        ("layersWithResidualConnNormal", "4", "4", "layers from 2 to 8"),
        ("lowerRankLayersNormal", "[3]", "[3]", "[]: layers of lower rank"),
        ("lowerRankLayersNormal", "0", "0", "[]: layers of lower rank"),
        ("useSubsampledPathway", "1", "1", "True or False"),
        ("useSubsampledPathway", "'True'", "'True'", "True or False"),
        ("numberFMsPerLayerSubsampled", "[30, 30]", "[30, 30]", "8 whole numbers"),
        ("numberFMsPerLayerSubsampled", "[]", "[]", "8 whole numbers"),
        ("numberFMsPerLayerSubsampled", "30", "30", "8 whole numbers"),
        ("numberFMsPerLayerSubsampled", "[30, [30]]", "[30, [30]]", "8 whole numbers"),
        ("kernelDimPerLayerSubsampled", str(KERNELS), str(KERNELS), "[3, 3, 3] for each of the 8"),
        ("subsampleFactor", "3", "3", "one factor above 1"),
        ("subsampleFactor", "[]", "[]", "one factor above 1"),
        ("subsampleFactor", "[3, 3, 1]", "[3, 3, 1]", "the same for all axes"),
        ("subsampleFactor", "[3, 3]", "[3, 3]", "the same for all axes"),
        ("subsampleFactor", "[[3,3,3], 5]", "[[3, 3, 3], 5]", "the same for all axes"),
        ("subsampleFactor", "[1, 1, 1]", "[1, 1, 1]", "one factor above 1"),
        ("layersWithResidualConnSubsampled", "[0]", "[0]", "layers from 2 to 8"),
        ("lowerRankLayersSubsampled", "[3]", "[3]", "[]: layers of lower rank"),
        ("numberFMsPerLayerFC", "[]", "[]", "at least one hidden FC layer"),
        ("numberFMsPerLayerFC", "250", "250", "a list of whole numbers"),
        ("kernelDimFor1stFcLayer", "[2, 2, 2]", "[2, 2, 2]", "three equal odd numbers"),
        ("kernelDimFor1stFcLayer", "[3, 3, 1]", "[3, 3, 1]", "three equal odd numbers"),
        ("kernelDimFor1stFcLayer", "3", "3", "three equal odd numbers"),
        ("layersWithResidualConnFC", "[3]", "[3]", "layers from 2 to 2"),
        ("segmentsDimTrain", "[25, 25, 20]", "[25, 25, 20]", "three equal whole numbers"),
        ("segmentsDimTrain", "25", "25", "three equal whole numbers"),
        ("segmentsDimInference", "[45, 45, 30]", "[45, 45, 30]", "three equal whole numbers"),
        ("segmentsDimInference", "[0, 0, 0]", "[0, 0, 0]", "three equal whole numbers"),
        ("batchSizeTrain", "0", "0", "a whole number from 1"),
        ("batchSizeTrain", "5.5", "5.5", "a whole number from 1"),
        ("batchSizeTrain", "True", "True", "a whole number from 1"),
        ("batchSizeInfer", "-1", "-1", "a whole number from 1"),
        ("batchSizeInfer", "100001", "100001", "to 100000"),
        ("dropoutRatesNormal", "[0.5]", "[0.5]", "[] or a list of 8 rates"),
        ("dropoutRatesSubsampled", "0.5", "0.5", "[] or a list of 8 rates"),
        ("dropoutRatesFc", "[0.0, 0.5]", "[0.0, 0.5]", "[] or a list of 3 rates"),
        ("dropoutRatesFc", "[0.0, 0.5, 1.0]", "[0.0, 0.5, 1.0]", "below 1"),
        ("dropoutRatesFc", "[0.0, 0.5, -0.5]", "[0.0, 0.5, -0.5]", "0 or more"),
        ("dropoutRatesFc", "[0.0, 0.5, '0.5']", "[0.0, 0.5, '0.5']", "a list of 3 rates"),
        ("dropoutRatesFc", "[0.0, 0.5, False]", "[0.0, 0.5, False]", "a list of 3 rates"),
        ("activationFunction", '"relu"', "'relu'", "'prelu'"),
        ("activationFunction", "1", "1", "'prelu'"),
        ("rollAverageForBNOverThatManyBatches", "0", "0", "turns batch norm off"),
        ("rollAverageForBNOverThatManyBatches", "-1", "-1", "turns batch norm off"),
        ("rollAverageForBNOverThatManyBatches", "True", "True", "turns batch norm off"),
        ("relu0orPrelu1", "1", "1", "activationFunction, which replaced it"),
        ("initializeClassic0orDelving1", "1", "1", "convWeightsInit, which replaced it"),
        ("kernelDimPerLayerFC", "[]", "[]", "kernelDimFor1stFcLayer"),
        ("padTypePerLayerNormal", "[]", "[]", "no such field in DeepMedic v0.7.0"),
        ("BATCHSIZETRAIN", "5", "5", "did you mean batchSizeTrain?"),
        ("dropoutRateFc", "[]", "[]", "did you mean dropoutRatesFc?"),
    ],
)
def test_refusals_name_file_line_field_value_and_what_is_supported(
    field: str, value: str, shown: str, expected: str
) -> None:
    text = text_of(**{field: value})
    message = refused(text)
    found, _, rest = message.partition("; expected ")
    assert found == f"net.cfg, line {line_of(field, text)}: {field} = {shown}"
    assert expected in rest


def test_an_unknown_name_unlike_any_other_gets_no_suggestion() -> None:
    assert "did you mean" not in refused(text_of(zzz="1"))


@pytest.mark.parametrize("field", REQUIRED)
@pytest.mark.parametrize("absence", [None, "None"])
def test_a_missing_field_is_named(field: str, absence: str | None) -> None:
    assert f"net.cfg: {field} is missing" in refused(text_of(**{field: absence}))


def test_absent_fc_layers_are_refused_as_the_default_they_mean() -> None:
    message = refused(text_of(numberFMsPerLayerFC=None))
    assert "net.cfg: numberFMsPerLayerFC is not given, which means []" in message


def test_a_field_given_twice_names_both_lines() -> None:
    text = text_of() + "batchSizeTrain = 6\n"
    message = refused(text)
    assert f"net.cfg, line {len(FIELDS) + 1}: batchSizeTrain = 6" in message
    assert f"stands on line {line_of('batchSizeTrain', text)} already" in message


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"segmentsDimInference": "[15, 15, 15]"}, "inference segment 15"),
        ({"segmentsDimTrain": "[16, 16, 16]"}, "training segment 16"),
        ({"subsampleFactor": "[[3,3,3], [3,3,3]]"}, "subsampling factors [3, 3]"),
        ({"numberFMsPerLayerFC": "[250, 100]"}, "FC residual layer 2 has 100 feature maps"),
    ],
)
def test_what_the_architecture_refuses_names_the_file(changes: dict[str, str], found: str) -> None:
    message = refused(text_of(**changes))
    assert message.startswith("net.cfg: architecture: ")
    assert found in message


@pytest.mark.parametrize(
    "value",
    [
        "__import__('pathlib').Path({marker!r}).touch()",
        "[open({marker!r}, 'w')]",
        "(open({marker!r}, 'w'),)",
        "open",
        "os.system",
        "f\"{{open({marker!r}, 'w')}}\"",
        "'a' + 'b'",
        "'a' 'b'",
        "'{{}}'.format(1)",
        "[1][0]",
        "9**9**9",
        "10 * [1]",
        "1 if True else 2",
        "lambda: 1",
        "[i for i in (1, 2)]",
        "{{'a': 1}}",
        "`ls`",
        "1; open({marker!r}, 'w')",
        "b'bytes'",
        "0x10",
        "010",
        "1j",
        "1_000",
        "1 2",
        "- 1",
        "",
        "[1,, 2]",
        "[1 2]",
        "[1, 2)",
        "[1, 2",
        "[1,",
        "]",
        "'unclosed",
        "\u201cunclosed'",
        "'a\\",
        "1" * 33,
        "[" * 9 + "]" * 9,
        "[" * 100_000,
        "[" + "1," * 300 + "]",
    ],
)
def test_anything_but_a_plain_value_is_refused_and_never_run(tmp_path: Path, value: str) -> None:
    marker = tmp_path / "ran"
    text = f"batchSizeTrain = 5\nmodelName = {value.format(marker=str(marker))}\n"
    message = refused(text)
    # A list left open runs on to the next line before it is found out.
    assert message.startswith(("net.cfg, line 2: ", "net.cfg, line 3: "))
    assert "modelName" in message
    assert "a config is read, never run" in message
    assert len(message) < 600
    assert not marker.exists()


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "open('x')",
        "if True:",
        "batchSizeTrain += 1",
        "batchSizeTrain: int = 5",
        "batchSizeTrain == 5",
        "a = b = 1",
        "a, b = 1, 2",
        "[1, 2]",
        '"""A config."""',
        "= 5",
        "modelName",
        "modelName \\",
        "\x00",
        "modelName\xa0= 'x'",
        "\ud800",
        "\x1b[2J",
    ],
)
def test_anything_but_an_assignment_is_refused(line: str) -> None:
    message = refused(f"# config\n{line}\n")
    assert message.startswith("net.cfg, line 2: ")
    assert message.isprintable()


def test_long_values_are_cut_in_messages() -> None:
    assert len(refused(text_of(batchSizeTrain=f"'{'x' * 5000}'"))) < 500


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.cfg", tmp_path):
        with pytest.raises(ModelError, match=r"model_config\.cfg") as caught:
            read_config(path)
        assert str(path) in caught.value.found


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"\xff\xfe\x00", "no UTF-8 text at byte 0"),
        (b"modelName = '\xe9'", "no UTF-8 text at byte 13"),
        (b"modelName = 1\x00", "cannot be read"),
        (("#" + "\u00e9" * (1 << 19)).encode(), "more than 1048576 bytes"),
        (b"", "numberOfOutputClasses is missing"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, data: bytes, found: str) -> None:
    path = tmp_path / "net.cfg"
    path.write_bytes(data)
    with pytest.raises(ModelError) as caught:
        read_config(path)
    assert str(path) in caught.value.found
    assert found in caught.value.found


def test_a_text_too_long_is_refused_unread() -> None:
    assert "more than 1048576 bytes" in refused("#" * ((1 << 20) + 1))


FRAGMENTS = st.sampled_from(
    [
        *FIELDS,
        *(f"{name} = {value}\n" for name, value in FIELDS.items()),
        *"=[](),\n\r\t #'\"\\.+-*{}:;\u201c\u201d\u2018\u2019\x00",
        *("True", "None", "3", "0.5", "1e999", "-1", "f'x'", "9**9"),
    ]
)


@PROPERTY
@given(st.one_of(st.text(), st.lists(FRAGMENTS, max_size=60).map("".join)))
def test_any_text_gives_a_spec_or_a_model_error(text: str) -> None:
    with contextlib.suppress(ModelError):
        parse_config(text, source="net.cfg")


@PROPERTY
@given(st.sampled_from(sorted(FIELDS)), st.lists(FRAGMENTS, max_size=8).map("".join))
def test_any_value_gives_a_spec_or_a_model_error(field: str, value: str) -> None:
    with contextlib.suppress(ModelError):
        parse_config(text_of(**{field: value}), source="net.cfg")


def residuals(layers: list[tuple[int, ...]], first_input: int) -> st.SearchStrategy[Any]:
    """Any set of layers whose output is, in all of `layers`, no narrower than what it adds."""
    allowed = [
        layer
        for layer in range(2, len(layers[0]) + 1)
        if all(
            maps[layer - 1] >= (first_input if layer == 2 else maps[layer - 3]) for maps in layers
        )
    ]
    subsets = st.sets(st.sampled_from(allowed)) if allowed else st.just(set())
    return subsets.map(lambda chosen: tuple(sorted(chosen)))


RATE = st.floats(min_value=0.0, max_value=1.0, exclude_max=True)
COUNT = st.integers(min_value=1, max_value=100)


@st.composite
def specs(draw: st.DrawFn) -> NetworkSpec:
    layers = draw(st.integers(min_value=1, max_value=5))
    maps = st.tuples(*[COUNT] * layers)
    dropout = st.one_of(st.just((0.0,) * layers), st.tuples(*[RATE] * layers))
    factors = draw(st.lists(st.integers(min_value=2, max_value=9), max_size=3, unique=True))
    normal_maps = draw(maps)
    normal = PathwaySpec(1, normal_maps, draw(residuals([normal_maps], 1)), draw(dropout))
    sub_maps = [draw(maps) for _ in factors]
    sub_residuals = draw(residuals(sub_maps, 1)) if factors else ()
    sub_dropout = draw(dropout)
    pathways = (
        normal,
        *(
            PathwaySpec(factor, each, sub_residuals, sub_dropout)
            for factor, each in zip(factors, sub_maps, strict=True)
        ),
    )
    fc_maps = tuple(draw(st.lists(COUNT, min_size=1, max_size=4)))
    concatenated = sum(pathway.feature_maps[-1] for pathway in pathways)
    field = 2 * layers + 1
    segment = st.integers(min_value=field, max_value=field + 40)
    return NetworkSpec(
        pathways=pathways,
        fc_maps=fc_maps,
        fc_kernel=draw(st.sampled_from([1, 3, 5])),
        fc_residual_layers=draw(residuals([fc_maps], concatenated)),
        fc_dropout=draw(st.tuples(*[RATE] * (len(fc_maps) + 1))),
        rolling_batches=draw(COUNT),
        train_segment=draw(segment),
        train_batch=draw(COUNT) + 1,  # batch norm of a single value has no variance
        tile=draw(segment),
        batch=draw(COUNT),
    )


def rendered(spec: NetworkSpec) -> str:
    """A config that asks for `spec`, with the fields in the published order."""
    normal, *subsampled = spec.pathways
    kernels = [[3, 3, 3]] * normal.layers
    values = {
        "numberOfOutputClasses": spec.classes,
        "numberOfInputChannels": spec.channels,
        "numberFMsPerLayerNormal": list(normal.feature_maps),
        "kernelDimPerLayerNormal": kernels,
        "layersWithResidualConnNormal": list(normal.residual_layers),
        "useSubsampledPathway": bool(subsampled),
        "numberFMsPerLayerFC": list(spec.fc_maps),
        "kernelDimFor1stFcLayer": [spec.fc_kernel] * 3,
        "layersWithResidualConnFC": list(spec.fc_residual_layers),
        "segmentsDimTrain": [spec.train_segment] * 3,
        "segmentsDimInference": [spec.tile] * 3,
        "batchSizeTrain": spec.train_batch,
        "batchSizeInfer": spec.batch,
        "dropoutRatesNormal": list(normal.dropout),
        "dropoutRatesFc": list(spec.fc_dropout),
        "rollAverageForBNOverThatManyBatches": spec.rolling_batches,
    }
    if subsampled:
        values |= {
            "numberFMsPerLayerSubsampled": [list(each.feature_maps) for each in subsampled],
            "kernelDimPerLayerSubsampled": kernels,
            "subsampleFactor": [[each.factor] * 3 for each in subsampled],
            "layersWithResidualConnSubsampled": list(subsampled[0].residual_layers),
            "dropoutRatesSubsampled": list(subsampled[0].dropout),
        }
    return "".join(f"{name} = {value!r}\n" for name, value in values.items())


@PROPERTY
@given(specs())
def test_a_rendered_spec_is_read_back(spec: NetworkSpec) -> None:
    assert parse_config(rendered(spec), source="net.cfg") == spec


@PROPERTY
@given(st.floats(min_value=0.0, max_value=1.0, exclude_max=True))
def test_rates_keep_every_digit(rate: float) -> None:
    read = parsed(dropoutRatesFc=f"[{rate!r}, 0, 0]").fc_dropout[0]
    assert math.copysign(1.0, read) == 1.0
    assert read.hex() == rate.hex()
