"""One configuration for all: file, then environment, then flag; what is unknown is refused by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper.contracts.errors import ConfigError
from esper.mesh.settings import DEFAULT_PORTS, SERVICES, MeshSettings, default_state_dir, environment_of, resolve


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for key in list(os.environ):
        if key.upper().startswith("ESPER_"):
            monkeypatch.delenv(key)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "esper.toml"
    path.write_text('tezzeret_workers = 2\ndrain_deadline_s = 2.5\nredis_url = "redis://a"\n')
    return path


def test_a_flag_beats_the_environment_and_that_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_DRAIN_DEADLINE_S", "3.5")
    monkeypatch.setenv("ESPER_REDIS_URL", "redis://b")
    found = resolve({"redis_url": "redis://c", "database_url": None}, config_file=file)
    settings = found.settings
    assert (settings.tezzeret_workers, settings.drain_deadline_s, settings.redis_url) == (2, 3.5, "redis://c")
    assert found.sources["tezzeret_workers"] == f"file {file}"
    assert found.sources["drain_deadline_s"] == "environment"
    assert found.sources["redis_url"] == "flag"
    assert found.sources["database_url"] == "default"
    assert set(found.sources) == set(MeshSettings.model_fields)


def test_the_file_may_be_named_by_the_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_CONFIG", str(file))
    assert resolve().settings.tezzeret_workers == 2


def test_a_variable_may_be_written_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("esper_tezzeret_workers", "3")
    found = resolve()
    assert (found.settings.tezzeret_workers, found.sources["tezzeret_workers"]) == (3, "environment")


@pytest.mark.parametrize("name", ["ESPER_NATS_URI", "esper_nats_uri"])
def test_an_unknown_variable_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "x")
    with pytest.raises(ConfigError, match=f"environment must name known settings, got {name}"):
        resolve()


def test_an_unknown_key_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "esper.toml"
    path.write_text("nats_uri = 1\n")
    with pytest.raises(ConfigError, match="nats_uri must be valid: Extra inputs are not permitted") as caught:
        resolve(config_file=path)
    assert caught.value.parameter == "nats_uri"


def test_a_value_that_breaks_its_rule_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_TEZZERET_WORKERS", "many")
    with pytest.raises(ConfigError, match=r"tezzeret_workers must be valid: .*got 'many'"):
        resolve()


def test_a_rule_of_several_settings_tells_no_values() -> None:
    with pytest.raises(ConfigError, match="tls_key must be set together") as caught:
        resolve({"tls_ca": "/ca.pem", "database_url": "postgresql://me:secret@db/esper"})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("a = ", "config file must be TOML"), (None, "must be readable")])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "esper.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        resolve(config_file=path)


def test_a_child_process_sees_the_same_settings(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = resolve({"state_dir": file.parent, "log_json": True}, config_file=file).settings
    for key, value in environment_of(settings).items():
        monkeypatch.setenv(key, value)
    assert resolve().settings == settings


def test_state_rests_where_the_system_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_state_dir() == tmp_path / "esper"
    assert resolve().settings.database_of("urza") == f"sqlite:///{tmp_path}/esper/stores/urza.db"


def test_default_addresses_and_ports_agree() -> None:
    settings = MeshSettings()
    assert {name: int(settings.address_of(name).rpartition(":")[2]) for name in SERVICES} == DEFAULT_PORTS
