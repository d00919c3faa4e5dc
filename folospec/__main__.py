"""`python -m folospec` is the command `folospec`."""

from folospec.cli.main import app

if __name__ == "__main__":
    app(prog_name="folospec")
