"""`optimum-cli freeact quantize | evaluate | ...`: the commands of `freeact`, where users of Optimum look for them.

Optimum imports every file of this namespace whenever its command line starts, so this one imports nothing of ours (and with
it torch) unless `freeact` is what was asked for. No folder above it may have an `__init__.py` (PEP 420).
"""

import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class FreeActCommand(BaseOptimumCLICommand):
    """All subcommands of `freeact`, with its own options and exit codes."""

    COMMAND = CommandInfo(name="freeact", help="4-bit weights, activations and KV cache (optimum_freeact).")

    @staticmethod
    def parse_args(parser):
        """Add the subcommands, if this is the command that runs."""
        if sys.argv[1:2] == ["freeact"]:
            from optimum_freeact.cli import add_commands

            add_commands(parser)

    def run(self):
        """Run the subcommand that was parsed."""
        from optimum_freeact.cli import run

        raise SystemExit(run(self.args))


REGISTER_COMMANDS = [FreeActCommand]
