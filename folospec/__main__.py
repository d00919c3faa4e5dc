"""Runs the command `folospec` as `python -m folospec`."""

from folospec.cli.main import app

if __name__ == "__main__":
    app(prog_name="folospec")
