"""What only a store in a server can do wrong; what every store must do is in test_events.py. The server is a real one."""

import builtins
import importlib
import logging
from pathlib import Path
from typing import Any

import pytest

from pennyweight.core.errors import ConfigError, DataError, DeviceError, StorageError
from pennyweight.data.events import Event
from pennyweight.data.valkey import TIMEOUT_S, ValkeyLog


def events(*names: int) -> list[Event]:
    return [Event(f"e{k}", "anna", str(k), time=k) for k in names]


def test_what_was_acknowledged_survives_a_kill(valkey: Any) -> None:
    with ValkeyLog(valkey.url) as log:
        assert log.append(events(1, 2, 3)) == 3
        valkey.kill()
        with pytest.raises(StorageError, match=r"127\.0\.0\.1:\d+ does not answer .*start it"):
            log.append(events(4))
        valkey.start()
        assert log.history("anna", 9) == ["1", "2", "3"] and len(log) == 3, "and the connection is made anew"
        assert log.append(events(3, 4)) == 1


def test_half_an_append_is_none(valkey: Any) -> None:
    """The server's own log is cut within an append, as a crash while writing leaves it."""
    with ValkeyLog(valkey.url) as log:
        log.append(events(1))
        log.append(events(2, 3, 4))
        valkey.kill()
        (written,) = (Path(valkey.folder) / "appendonlydir").glob("*.incr.aof")
        whole = written.read_bytes()
        written.write_bytes(whole[: whole.rindex(b"e4")])
        valkey.start()
        assert log.history("anna", 9) == ["1"] and len(log) == 1 and log.users() == [("anna", 1)]
        assert log.append(events(2, 3, 4)) == 3, "sent again, it is whole"


def test_two_services_share_a_server(valkey: Any) -> None:
    with ValkeyLog(valkey.url) as one, ValkeyLog(valkey.url) as other:
        assert (one.append(events(1)), other.append(events(1, 2))) == (1, 1)
        assert one.history("anna", 9) == other.history("anna", 9) == ["1", "2"]


def test_times_keep_all_their_bits(valkey: Any) -> None:
    with ValkeyLog(valkey.url) as log:
        log.append([Event("a", "u", "later", time=2**62 + 1), Event("b", "u", "sooner", time=2**62)])
        assert log.history("u", 9) == ["sooner", "later"]


@pytest.mark.parametrize(
    ("option", "value"), [("appendfsync", "everysec"), ("appendonly", "no"), ("maxmemory-policy", "allkeys-lru")]
)
def test_a_server_that_could_lose_events_is_refused(valkey: Any, option: str, value: str) -> None:
    valkey.kill()
    valkey.start(**{option: value})
    with pytest.raises(StorageError, match=rf"runs with {option} {value} and could lose events; .*--appendfsync always"):
        ValkeyLog(valkey.url)


def test_a_server_that_does_not_say_is_told_of(valkey: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Hosted servers keep their configuration to themselves."""
    valkey.kill()
    (valkey.folder / "users").write_text("user default on nopass ~* +@all -config\n")
    valkey.start(aclfile=str(valkey.folder / "users"))
    with caplog.at_level(logging.WARNING, "pennyweight"), ValkeyLog(valkey.url) as log:
        assert log.append(events(1)) == 1
    assert "does not say how it keeps events" in caplog.text and "--appendfsync always" in caplog.text


def test_a_full_server_loses_nothing(valkey: Any) -> None:
    with ValkeyLog(valkey.url) as log:
        log.append(events(1))
        log._server.config_set("maxmemory", 1)
        with pytest.raises(StorageError, match=r"refused .*maxmemory.*give it room"):
            log.append(events(2))
        assert log.history("anna", 9) == ["1"]
        log._server.config_set("maxmemory", 0)
        assert log.append(events(2)) == 1, "once there is room it goes on"


def test_a_server_that_hangs_is_an_error(valkey: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pennyweight.data.valkey.TIMEOUT_S", TIMEOUT_S / 100)
    with ValkeyLog(valkey.url) as log:
        log._server.client_pause(2000)
        with pytest.raises(StorageError, match="does not answer"):
            log.append(events(1))


def test_who_may_not_enter_is_told_and_the_password_is_not(valkey: Any) -> None:
    valkey.kill()
    valkey.start(requirepass="right")
    url = valkey.url.replace("//", "//:{}@")
    for wrong in (valkey.url, url.format("secret")):
        with pytest.raises(StorageError, match=r"refuses this user .*check user and password") as caught:
            ValkeyLog(wrong)
        assert "secret" not in str(caught.value)
    with ValkeyLog(url.format("right").replace("valkey:", "redis:")) as log:
        assert log.append(events(1)) == 1


def test_events_of_another_version_are_left_alone(valkey: Any) -> None:
    with ValkeyLog(valkey.url) as log:
        log._server.set("pennyweight:version", "9")
        with pytest.raises(DataError, match="holds events of version 9; this one reads version 1"):
            ValkeyLog(valkey.url)
        log._server.set("pennyweight:version", "1")
        log._server.set("pennyweight:events:anna", "not a list")
        with pytest.raises(StorageError, match=r"refused .*wrong kind"):
            log.seen("anna")


@pytest.mark.parametrize("url", ["http://localhost:6379", "valkey://localhost:port", "://"])
def test_a_url_that_is_no_servers(url: str) -> None:
    pytest.importorskip("valkey")
    with pytest.raises(ConfigError, match="write valkey://HOST:6379"):
        ValkeyLog(url)


def test_without_the_client_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise builtins.ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(DeviceError, match=r"pip install 'pennyweight\[valkey\]'"):
        ValkeyLog("valkey://localhost")
