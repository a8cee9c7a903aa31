"""The command line of the measures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bench.__main__ import MEASURES, main
from bench.report import Figure, Result
from esper.contracts.errors import UnavailableError


@pytest.fixture
def in_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put_measure(monkeypatch: pytest.MonkeyPatch, name: str, measure: object) -> None:
    module = ModuleType(f"bench.{name}")
    module.measure = measure  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"bench.{name}", module)


def test_the_list_names_every_measure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in MEASURES)


def test_an_unknown_measure_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["nonsense"])
    assert ended.value.code == 2
    assert "nonsense" in capsys.readouterr().err


def test_a_measure_prints_and_writes_json(
    in_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[bool] = []

    def measure(*, quick: bool) -> Result:
        asked.append(quick)
        return Result(name="k1_dormant", figures=(Figure(name="f", value=1, unit="s"),))

    put_measure(monkeypatch, "k1_dormant", measure)
    assert main(["k1", "--quick", "--json"]) == 0
    assert asked == [True]
    assert json.loads(capsys.readouterr().out)["figures"][0]["value"] == 1
    assert (in_directory / "bench-results" / "k1_dormant.json").is_file()


def test_a_missing_peer_is_said_plainly(
    in_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(*, quick: bool) -> Result:
        raise UnavailableError("measure k3_cache needs theine: pip install 'esper[bench]'")

    put_measure(monkeypatch, "k3_cache", measure)
    assert main(["k3_cache"]) == 1
    assert "pip install 'esper[bench]'" in capsys.readouterr().err
    assert not (in_directory / "bench-results").exists()


def test_every_measure_has_a_module() -> None:
    bench = Path(__file__).parents[3] / "bench"
    assert all((bench / f"{name}.py").is_file() for name in MEASURES)
