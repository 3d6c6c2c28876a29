"""Run one program that must not see the mesh's own files: `python -I -m meshq.exec.confined HOME [FOLDER…] -- PROGRAM ARGS…`

Everything of this user stays open to it but HOME; in HOME only the FOLDERs are. For programs that run somebody else's code
outside of an attempt: building a source package runs whatever its author wrote.
"""

import os
import sys

from meshq.exec.confine import landlock_rules, restrict


def command_for(home: str, folders: list[str], command: list[str]) -> list[str]:
    """The words that run `command` confined. The folders must exist when it starts."""
    return [sys.executable, "-I", "-m", "meshq.exec.confined", home, *folders, "--", *command]


def main(words: list[str]) -> None:
    """Confine this process, then become the program."""
    end = words.index("--")
    home, *folders = words[:end]
    restrict(landlock_rules(home, [], folders))
    os.execv(words[end + 1], words[end + 1 :])


if __name__ == "__main__":
    main(sys.argv[1:])
