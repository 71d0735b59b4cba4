from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu_check
import pytest
from gpu_report import PartError

from trtseg.errors import EXIT_DEVICE, EXIT_MODEL

GPU = {
    "device": "cuda:0",
    "name": "RTX 6000 Ada",
    "compute_capability": "8.9",
    "memory_bytes": 48 << 30,
}
PASSED = {"passed": 23, "failed": 0, "skipped": 0}
COST = {"multiply_adds": 30_000, "bytes": 2000, "time": 1}
FOUND = {
    "tiles": {"bdn": 300, "cgm": 100},
    "compiled": {"bdn": {"cost": COST}, "cgm": {"cost": COST}},
    "latency": {
        "seconds_network": 0.5,
        "without_mask": {
            "seconds": {"p50_s": 0.7},
            "stages": {"brain": {"p50_s": 0.4}, "cortex": {"p50_s": 0.1}},
        },
    },
    "ceilings": {"operations_per_second": 1e8, "bytes_per_second": 4e6},
    "files": {"seconds_read": 0.02, "seconds_write": 0.03},
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch) -> Any:
    """Runs the script with these answers of its parts; gives exit code and what was found."""

    def script(answers: dict[str, Any], *options: str, gpus: Any = (GPU,)) -> tuple[int, Any]:
        names = {id(part.run): name for name, part in gpu_check.PARTS.items()}

        def apart(action: Any, setting: Any, *, limit: float) -> Any:
            assert (setting.capability, limit) == ("8.9", 1230)
            answer = answers.get(names[id(action)], PartError("no such thing here"))
            if isinstance(answer, Exception):
                raise answer
            return answer

        path = tmp_path / "found.json"
        monkeypatch.setattr(gpu_check, "apart", apart)
        monkeypatch.setattr(gpu_check, "find_gpus", lambda: ("13.0", list(gpus)))
        monkeypatch.setattr("sys.argv", ["gpu_check.py", "--json", str(path), *options])
        code = gpu_check.main()
        return code, json.loads(path.read_text("utf-8")) if path.exists() else None

    return script


def test_the_order_of_the_parts() -> None:
    names = list(gpu_check.PARTS)
    assert names[:7] == [
        "own_part", "files", "frozen", "compiled", "validity", "latency", "ceilings",
    ]  # fmt: skip
    assert names[-3:] == ["torch_compiled", "ratios", "tests"]
    for form in ("plain", "transposed", "plain8", "transposed8"):
        place = names.index(f"compile_{form}")
        assert names[place : place + 3] == [f"compile_{form}", f"time_{form}", f"layers_{form}"]
    for name, part in gpu_check.PARTS.items():
        assert all(names.index(one) < names.index(name) for one in part.needs), name


def test_what_fails_costs_no_other_part(run: Any, capsys) -> None:
    timed = {net: {"batch": 16, "seconds_a_batch": 0.01} for net in ("bdn", "cgm")}
    answers = {
        "files": {"seconds_read": 0.1},
        "frozen": {"bdn": 1e-6},
        "compile_plain": {"bdn": {}},
        "compile_plain8": {"bdn": {}},
        "time_plain8": timed,
        "torch_eager": {"seconds": 1.0},
        "kernel_tests": PASSED,
        "tests": PASSED,
    }
    code, found = run(answers)
    assert code == 1
    assert {name: found[name] for name in answers} == answers
    assert found["gpu"] == {**GPU, "driver": found["gpu"]["driver"], "driver_cuda": "13.0"}
    assert found["tiles"] == {"bdn": 343, "cgm": 125}
    assert found["fastest_form"]["cgm"]["form"] == "plain8"
    failed = found["failed"]
    assert failed["own_part"] == failed["compiled"] == failed["time_plain"] == "no such thing here"
    assert failed["latency"] == failed["validity"] == "not tried: compiled failed"
    assert failed["time_transposed"] == "not tried: compile_transposed failed"
    assert failed["ratios"] == "not tried: compiled, latency, ceilings failed"
    assert str(found["tiles"]["bdn"]) in capsys.readouterr().out


def test_all_goes_well(run: Any) -> None:
    answers = {name: {"of": name} for name, part in gpu_check.PARTS.items() if not part.derived} | {
        name: FOUND[name] for name in ("compiled", "latency", "ceilings", "files")
    }
    answers |= {"torch_eager": None, "torch_compiled": None}
    answers |= {"kernel_tests": PASSED, "tests": PASSED}
    for form in ("plain", "transposed", "plain8", "transposed8"):
        seconds = 0.01 if form == "transposed" else 0.02
        answers[f"time_{form}"] = {
            net: {"batch": 16, "seconds_a_batch": seconds} for net in ("bdn", "cgm")
        }
    code, found = run(answers)
    assert found["failed"] == {}
    assert code == 0
    assert found["fastest_form"]["bdn"]["form"] == "transposed"
    assert found["ratios"]["chain_to_network"] == pytest.approx(1.4)


@pytest.mark.parametrize(
    "tests",
    [{"passed": 0, "failed": 0, "skipped": 30}, {"passed": 29, "failed": 1, "skipped": 0}],
)
def test_tests_that_did_not_pass_are_not_well(run: Any, tests: dict[str, int]) -> None:
    assert run({"tests": tests}, "--only", "tests")[0] == 1
    assert run({"tests": PASSED}, "--only", "tests")[0] == 0


def test_parts_are_chosen_and_added(run: Any) -> None:
    code, found = run({"files": 1}, "--only", "files", "torch_*", "--skip", "torch_compiled")
    assert (code, found["files"], list(found["failed"])) == (1, 1, ["torch_eager"])
    code, found = run({"torch_eager": None}, "--add", "--only", "torch_eager")
    assert (code, found["files"], found["failed"]) == (0, 1, {})


def test_a_part_that_is_none(run: Any, capsys) -> None:
    with pytest.raises(SystemExit):
        run({}, "--skip", "teste")
    assert "no part 'teste'; there are own_part, files, " in capsys.readouterr().err


def test_no_gpu(run: Any, capsys) -> None:
    assert run({}, gpus=()) == (EXIT_DEVICE, None)
    assert capsys.readouterr().err.startswith("error: the NVIDIA driver is missing or sees no GPU")


def test_no_such_models(run: Any, capsys) -> None:
    assert run({}, "--models", "mine")[0] == EXIT_MODEL
    assert "mine" in capsys.readouterr().err


def test_the_targets_ratios() -> None:
    found = gpu_check.ratios(FOUND)
    # 2 x 30,000 operations and 2,000 bytes in each of 400 tiles.
    assert (found["operations"], found["bytes"]) == (24_000_000, 800_000)
    assert found["operations_per_second"] == 48e6
    assert found["bytes_per_second"] == 1.6e6
    assert found["chain_to_network"] == pytest.approx((0.5 + 0.7 - 0.4 - 0.1) / 0.5)
    assert found["end_to_end_to_network"] == pytest.approx((0.7 + 0.05) / 0.5)
    assert found["seconds_floor_estimated"] == pytest.approx(0.24)  # of 0.24 and 0.2
    assert found["network_to_floor_estimated"] == pytest.approx(0.5 / 0.24)
    assert "no bound" in found["note"]
    assert found["torch_eager_to_network"] is None
    assert found["missing"] == "torch_*: pip install torch, then make gpu-check"


def test_ratios_to_pytorch() -> None:
    figures = {"torch_eager": {"seconds": 2.0}, "torch_compiled": {"seconds": 1.0}}
    found = gpu_check.ratios({**FOUND, **figures})
    assert (found["torch_eager_to_network"], found["torch_compiled_to_network"]) == (4.0, 2.0)
    assert "missing" not in found


def test_what_pytest_says() -> None:
    found = gpu_check.outcome(
        """<?xml version="1.0"?><testsuites><testsuite name="pytest" tests="4">
        <testcase classname="t" name="test_a[1]"><system-out>--- Captured Out ---
a: 99.98% of labels equal
</system-out></testcase>
        <testcase classname="t" name="test_b"><failure message="assert 1 == 2&#10;more">long
        </failure></testcase>
        <testcase classname="t" name="test_c"><error message="failed on setup" /></testcase>
        <testcase classname="t" name="test_d"><skipped message="no GPU" /></testcase>
        </testsuite></testsuites>"""
    )
    assert found == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "failures": {"test_b": "assert 1 == 2", "test_c": "failed on setup"},
        "skipped_because": ["no GPU"],
        "said": {"test_a[1]": ["a: 99.98% of labels equal"]},
    }
