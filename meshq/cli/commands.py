"""typer's command and group, quicker to start.

typer looks at values with pydantic, which takes longer to import than all the rest of `meshq status`; it leaves out flags
that are True or False. Its own `--help` is None when it is not given: here it is False.
"""

import re
from typing import Any, Final

from typer.core import TyperCommand, TyperGroup

_BRACES: Final = re.compile(r"\{([A-Z]+)\}")
_TYPE: Final = re.compile(r" <(str|list\[str\])>")


def _settled(option: Any) -> Any:
    if option is not None and option.default is None:
        option.default = False
    return option


class Command(TyperCommand):
    def get_help(self, ctx: Any) -> str:
        """Without the braces and types that typer shows with arguments: `{TASK}`, `TASK <str>`."""
        text = _BRACES.sub(r"\1", str(super().get_help(ctx)))
        return _TYPE.sub(lambda found: " " * len(found[0]), text)

    def get_help_option(self, ctx: Any) -> Any:
        return _settled(super().get_help_option(ctx))


class Group(TyperGroup):
    def get_help_option(self, ctx: Any) -> Any:
        return _settled(super().get_help_option(ctx))
