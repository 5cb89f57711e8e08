"""A real terminal (tmux) and a real browser (headless Chromium), and pictures of what they show."""

from __future__ import annotations

import contextlib
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

from tests.support.requirements import require_command

Theme = Literal["light", "dark"]

#: Size of a character of the terminal's font, in pixels.
_COLUMN, _LINE = 8, 16
#: Space around a terminal's text, in pixels.
_BORDER = 12
#: The value of Chromium's setting, by the theme that a page is to find.
_SCHEMES: Mapping[Theme, int] = {"dark": 0, "light": 1}


class Terminal(NamedTuple):
    """A terminal of a tmux server of its own."""

    tmux: tuple[str, ...]
    columns: int

    def screen(self) -> str:
        """What it shows: lines with escape sequences for colours."""
        command = [*self.tmux, "capture-pane", "-p", "-e"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.rstrip("\n")


@contextlib.contextmanager
def terminal(columns: int, rows: int, script: str, environment: Mapping[str, str]) -> Iterator[Terminal]:
    """A terminal of this size in which a shell runs `script`. It stays when the script has ended."""
    tmux = (require_command("tmux", "the pictures"), "-L", f"forkvm-{uuid.uuid4().hex[:8]}", "-f", "/dev/null")
    size = ("-x", str(columns), "-y", str(rows))
    command = [*tmux, "new-session", "-d", *size, f"sh -c {_quoted(f'{script}; exec sleep 600')}"]
    subprocess.run(command, env=dict(environment), check=True, timeout=30)
    try:
        yield Terminal(tmux, columns)
    finally:
        subprocess.run([*tmux, "kill-server"], check=False, timeout=30)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def photograph_terminal(shown: Terminal, picture: Path, scratch: Path) -> None:
    """Write a picture of a terminal."""
    text = Text.from_ansi(shown.screen())
    text.no_wrap = True
    console = Console(record=True, width=shown.columns, file=(scratch / "terminal.txt").open("w"), color_system="256")
    console.print(text)
    style = f"margin:0;padding:{_BORDER}px;font:13.3px/{_LINE}px 'DejaVu Sans Mono',monospace"
    page = (
        f'<!DOCTYPE html><meta charset="utf-8"><style>{{stylesheet}} body{{{{{style};color:{{foreground}};'
        "background:{background}}} pre{{margin:0;font:inherit}}</style><pre>{code}</pre>"
    )
    (scratch / "terminal.html").write_text(console.export_html(theme=SVG_EXPORT_THEME, code_format=page))
    console.file.close()
    rows = len(text.plain.splitlines())
    width, height = (count * size + 2 * _BORDER for count, size in ((shown.columns, _COLUMN), (rows, _LINE)))
    photograph_page(scratch / "terminal.html", picture, width, height, "dark")


def photograph_page(page: Path, picture: Path, width: int, height: int, theme: Theme) -> None:
    """Write a picture of a page in a window of this size, in pixels, whose user prefers this theme."""
    command = [
        require_command("chromium-headless-shell", "the pictures"),
        *("--no-sandbox", "--hide-scrollbars", f"--user-data-dir={page.parent / 'chromium'}"),
        *(f"--window-size={width},{height}", f"--blink-settings=preferredColorScheme={_SCHEMES[theme]}"),
        *(f"--screenshot={picture}", page.as_uri()),
    ]
    subprocess.run(command, capture_output=True, check=True, timeout=60)
