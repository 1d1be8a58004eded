"""service/settings.py: if this fails, a misspelt or impossible setting silently becomes a default."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import StartupError
from service.settings import Settings, load_settings
from service.settings_table import settings_page


def test_load_settings_reads_the_environment_and_lets_options_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMAMBA_PORT", "9000")
    monkeypatch.setenv("LAMAMBA_MODELS", "a, org/b ,")
    monkeypatch.setenv("LAMAMBA_DEVICE", "")
    settings = load_settings(port=9100, host=None)
    assert settings.port == 9100
    assert settings.models == ("a", "org/b")
    assert settings.device == "auto"
    assert load_settings().port == 9000


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        pytest.param(
            "LAMAMBA_MAX_ROW", "LAMAMBA_MAX_ROW: no such setting; did you mean LAMAMBA_MAX_ROWS", id="near"
        ),
        pytest.param(
            "LAMAMBA_XYZZY", "LAMAMBA_XYZZY: no such setting; there are LAMAMBA_ADMIN_KEY,", id="far"
        ),
    ],
)
def test_load_settings_names_an_unknown_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, message: str
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(StartupError, match=message):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "70000"),
        ("PORT", "http"),
        ("DEVICE", "gpu"),
        ("DTYPE", "int8"),
        ("MAX_QUEUE_IMAGES", "0"),
        ("DRAIN_TIMEOUT_S", "nan"),
        ("MAX_TIMEOUT_S", "0"),
        ("DEFAULT_TIMEOUT_S", "601"),
        ("PRIORITY_AGING_S", "-1"),
        ("ROOT_PATH", "no-slash"),
        ("LOG_LEVEL", "loud"),
        ("CORS_ORIGINS", "example.org"),
        ("CORS_ORIGINS", "https://example.org/"),
    ],
)
def test_load_settings_names_variable_and_value_of_a_wrong_one(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"LAMAMBA_{name}", value)
    with pytest.raises(StartupError, match=rf'LAMAMBA_{name}: "{value}" given; ') as refusal:
        load_settings()
    assert "\n" not in str(refusal.value)


def test_settings_deterministic_steps_are_not_compiled() -> None:
    with pytest.raises(StartupError, match=r"^deterministic: true given; compile is true"):
        load_settings(compile=True, deterministic=True)


def test_load_settings_names_a_wrong_option_by_its_own_name() -> None:
    with pytest.raises(StartupError, match=r"^port: -1 given"):
        load_settings(port=-1)


def test_every_setting_is_described() -> None:
    assert all(field.description for field in Settings.model_fields.values())


def test_the_page_of_settings_is_that_of_the_class() -> None:
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == settings_page(), "run `make docs`"
    assert (
        "| `LAMAMBA_PORT` | integer from 0 up to 65535 | `8000` | Port to listen on; 0 takes a free one. |"
        in page
    )
    assert "| `LAMAMBA_LOG_JSON` | true, false | `false` |" in page
    assert "| `LAMAMBA_BATCHING` | `continuous`, `static` | `continuous` |" in page
    assert page.count("\n| `LAMAMBA_") == len(Settings.model_fields)
