"""The command ``cda4rec``: ``app`` parses and reports errors, ``commands`` are the sub-commands, ``quickstart`` runs them all.

Heavy modules are imported inside the commands, so that ``--help`` and a typo are answered at once.
"""

from cda4rec_jax.cli.app import main

__all__ = ["main"]
