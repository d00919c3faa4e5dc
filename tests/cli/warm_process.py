"""What a fork server imports: after one run, the processes that it forks start at once."""

import contextlib
import io

import torch

torch.set_num_threads(1)  # threads do not outlive a fork

from folospec.cli.main import app  # noqa: E402

with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    app(["generate", "import os", "--max-tokens", "2"], standalone_mode=False)
