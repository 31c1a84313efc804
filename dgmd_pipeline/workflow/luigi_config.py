"""Reads the address of a scheduler from Luigi's configuration files, and discards everything else in them."""

import configparser
from pathlib import Path

from dgmd_pipeline.errors import SettingsError

PLACES = "luigi.cfg or client.cfg in the working directory or in /etc/luigi, or the file in LUIGI_CONFIG_PATH"


def load(named: Path | None = None) -> str | None:
    """Import Luigi, discard its configuration, and return the address of the scheduler in the file `named`.

    Luigi reads its configuration when it is imported. A file that was written for other pipelines could set time
    limits, task limits or more than one worker process. Such settings would make a run of this pipeline fail.
    Raises SettingsError if a file cannot be read, or if the file `named` does not exist.
    """
    if named and not named.is_file():
        raise SettingsError(f"LUIGI_CONFIG_PATH={named}: there is no such file.")
    try:
        from luigi.configuration import LuigiConfigParser, get_config

        address = _scheduler(LuigiConfigParser(), named) if named else None
        config = get_config()
    except (configparser.Error, UnicodeError, OSError) as error:
        raise _unreadable(str(error)) from None
    except ImportError as error:
        if "Parser not installed" not in str(error):
            raise
        raise _unreadable(str(error)) from None
    if isinstance(config, configparser.RawConfigParser):
        for section in config.sections():
            config.remove_section(section)
    config.set("core", "no_configure_logging", "true")
    return address


def _scheduler(parser: configparser.ConfigParser, path: Path) -> str | None:
    parser.read([path])

    def value(name: str) -> str | None:
        return next((parser["core"][each] for each in (name, name.replace("_", "-")) if each in parser["core"]), None)

    if "core" not in parser:
        return None
    if url := value("default_scheduler_url") or value("scheduler_url"):
        return url
    host = value("scheduler_host") or value("default_scheduler_host")
    port = value("scheduler_port") or value("default_scheduler_port") or "8082"
    return f"http://{host}:{port}/" if host else None


def _unreadable(reason: str) -> SettingsError:
    reason = " ".join(reason.split())
    return SettingsError(f"Luigi's configuration cannot be read ({reason}). Correct or remove it: {PLACES}.")
