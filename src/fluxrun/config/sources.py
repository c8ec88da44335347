"""The user's config folders as Hydra reads them: every file is looked at before Hydra builds what it holds."""

from __future__ import annotations

from pathlib import Path

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult

from fluxrun.errors import ConfigError
from fluxrun.reading import Unreadable, parse_yaml, read_text

MOST_BYTES = 2**20
"""A config file may be so long."""


class UserFiles(FileConfigSource):
    """A folder of config files that somebody else may have written: pipes, huge files and alias bombs are refused."""

    @staticmethod
    def scheme() -> str:
        """As in ``user://FOLDER``."""
        return "user"

    def load_config(self, config_path: str) -> ConfigResult:
        """A file's config. Raises ConfigError, which names the file."""
        path = Path(self.path) / self._normalize_file_name(config_path)
        try:
            parse_yaml(read_text(path, MOST_BYTES))
        except Unreadable as error:
            raise ConfigError(f"{path} {error}") from error
        return super().load_config(config_path)


def source_of(folder: Path) -> str:
    """The search path entry of a user's config folder."""
    Plugins.instance().register(UserFiles)
    return f"{UserFiles.scheme()}://{folder}"
