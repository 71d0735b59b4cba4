from __future__ import annotations

import itertools

import pytest

from trtseg import errors


def test_message_joins_its_parts_on_one_line():
    error = errors.InputError("scan.nii: 2 dimensions", expected="3", action="choose another scan")
    assert str(error) == "scan.nii: 2 dimensions; expected 3; choose another scan"
    assert (error.found, error.expected, error.action) == (
        "scan.nii: 2 dimensions",
        "3",
        "choose another scan",
    )


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "found"),
        ({"expected": "that"}, "found; expected that"),
        ({"action": "do this"}, "found; do this"),
    ],
)
def test_message_leaves_out_empty_parts(parts, message):
    assert str(errors.TrtsegError("found", **parts)) == message


@pytest.mark.parametrize(
    ("name", "base", "code"),
    [
        ("TrtsegError", Exception, 1),
        ("InputError", errors.TrtsegError, 2),
        ("UsageError", errors.TrtsegError, 2),
        ("ModelError", errors.TrtsegError, 3),
        ("DownloadError", errors.ModelError, 3),
        ("MissingExtraError", errors.ModelError, 3),
        ("EngineError", errors.TrtsegError, 3),
        ("EngineMissingError", errors.EngineError, 3),
        ("NotCompiledError", errors.EngineMissingError, 3),
        ("DeviceError", errors.TrtsegError, 4),
        ("OutputError", errors.TrtsegError, 5),
    ],
)
def test_tree_and_exit_codes(name, base, code):
    kind = getattr(errors, name)
    assert kind.__base__ is base
    assert kind("found").exit_code == code


def test_every_error_of_the_module_is_in_the_tree():
    kinds = {v for v in vars(errors).values() if getattr(v, "__module__", "") == errors.__name__}
    kinds = {kind for kind in kinds if isinstance(kind, type)}
    assert len(kinds) == 11
    assert all(issubclass(kind, errors.TrtsegError) for kind in kinds)


def test_worst_exit_code_goes_by_weight_not_by_number():
    worst_first = [130, 5, 4, 3, 2, 6, 0]
    for worse, better in itertools.combinations(worst_first, 2):
        assert errors.worst_exit_code([better, worse, better]) == worse
        assert errors.worst_exit_code([worse, better]) == worse


def test_worst_exit_code_of_nothing_is_ok():
    assert errors.worst_exit_code([]) == 0
    assert errors.worst_exit_code([0, 0]) == 0
