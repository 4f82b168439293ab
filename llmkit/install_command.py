"""The command that adds a missing package to this installation."""

from pathlib import Path


def install_command(target: str, *, extra: str | None = None) -> str:
    """A `make` target of this checkout, or pip where there is none."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "Makefile").exists():
        return f"pip install 'llmkit[{extra}]'" if extra else "pip install llmkit"
    return f"make {target}" if checkout == Path.cwd() else f"make -C {checkout} {target}"
