"""What libraries do of their own while the demo runs: nothing that is seen, and nothing on the network."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

import datasets
from huggingface_hub import constants


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, no log lines below an error, no telemetry; afterwards all as before."""
    bars, level = not datasets.are_progress_bars_disabled(), logging.root.manager.disable
    offline = constants.HF_HUB_OFFLINE
    logging.disable(logging.WARNING)
    constants.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # TRL goes by transformers' old names.
            warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        logging.disable(level)
        constants.HF_HUB_OFFLINE = offline
        if bars:
            datasets.enable_progress_bars()
